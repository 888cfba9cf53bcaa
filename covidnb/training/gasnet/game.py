"""A step of GASNet: what it sees, the terms that its players descend, and what goes wrong in the game."""

from typing import NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset

from covidnb.losses import (
    SILENCES,
    Silence,
    adversarial_loss,
    compose,
    discriminator_loss,
    generated_to_d_loss,
    healthy_loss,
    labelled_loss,
    multiple_instance_loss,
    original_to_d_loss,
    paste_loss,
    reconstruction_loss,
    silenced,
)
from covidnb.nets.gasnet import Discriminator, Generator, volume_segmenter
from covidnb.training.gasnet.config import KINDS, GasnetConfig, root_of
from covidnb.training.volume_evaluation import grey_rows


class StepVolumes(Dataset):
    """What each step sees; item t is drawn from (seed, t) alone.

    Items are dicts of a batch for each kind of volume, and "turns": the batches of D's steps, if it is its
    turn. A batch is a dict of "image" in [-1, 1], "lungs" and, of the labelled, "lesions", (N, 1, D, H, W).

    Parameters
    ----------
    config : GasnetConfig
    pools : dict
        `LungVolumes` by kind.
    """

    def __init__(self, config: GasnetConfig, pools: dict[str, Dataset]):
        self.config = config
        self.pools = pools

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, step: int) -> dict:
        config = self.config
        batches = {kind: self._batch(kind, step, 0) for kind in self.pools}
        turns = config.in_a_row * config.d_steps if config.plays and (step + 1) % config.in_a_row == 0 else 0
        batches["turns"] = [
            {kind: self._batch(kind, step, 1 + turn) for kind in ("covid", "healthy")}
            for turn in range(turns)
        ]
        return batches

    def _batch(self, kind: str, step: int, turn: int) -> dict[str, Tensor]:
        pool, config = self.pools[kind], self.config
        rng = np.random.default_rng((config.seed, step, turn, KINDS.index(kind)))
        order = np.resize(rng.permutation(len(pool)), config.batch)  # a small pool is seen again and again
        first = (step * (1 + config.in_a_row * config.d_steps) + turn) * config.batch
        items = []
        for slot, index in enumerate(order):
            pool.set_epoch(first + slot)
            items.append(pool[int(index)])
        return {key: torch.stack([item[key] for item in items]) for key in items[0] if key != "name"}


def pools_of(config: GasnetConfig, augment: bool) -> dict[str, Dataset]:
    """The volumes of each kind that a run learns from.

    Raises
    ------
    VolumeError
        Where a split is missing, or the labelled volume has no lesions.
    """
    from covidnb.volumes import LungVolumes, list_volumes

    root = root_of(config)
    return {
        kind: LungVolumes(
            list_volumes(root, kind),
            lesions=kind == "labelled",
            depth=config.depth if augment else None,
            augment=augment and config.augment,
            seed=config.seed,
        )
        for kind in config.kinds
    }


class Players(NamedTuple):
    """The networks, or their optimisers; G and D are None where there is no game."""

    s: nn.Module
    g: nn.Module | None
    d: nn.Module | None


def build(config: GasnetConfig, shape: tuple[int, int, int]) -> Players:
    """Make the networks that a config names, for volumes of a shape (depth, height, width)."""
    s = volume_segmenter(config.network, config.width)
    if not config.plays:
        return Players(s, None, None)
    width, levels = config.game_width, config.game_levels
    released = (levels, shape) == (4, (32, 160, 160))  # all that the last layer of D fits without pooling
    return Players(s, Generator(width, levels), Discriminator(width, levels, adaptive=not released))


def find(s: nn.Module, volumes: dict[str, Tensor]) -> dict[str, Tensor]:
    """What S finds in volumes of each kind, in one pass: instance norm keeps them apart."""
    masks = s(torch.cat(list(volumes.values())))
    return dict(zip(volumes, masks.split([len(v) for v in volumes.values()]), strict=True))


class Terms(NamedTuple):
    """Terms of a loss by name, unweighted, and their weighted sum."""

    each: dict[str, Tensor]
    total: Tensor


def weighed(config: GasnetConfig, step: int, each: dict[str, Tensor], own: float | Tensor = 0.0) -> Terms:
    """Sum terms by the weights that they have in this step; `own` is what has no weight of its own."""
    return Terms(each, sum((config.weight(name, step) * term for name, term in each.items()), own))


def game_terms(config: GasnetConfig, step: int, players: Players, batches: dict, mask: Tensor) -> Terms:
    """S's and G's terms in the game against D; `mask` is what S finds in the sick volumes.

    Terms that do not count yet are not computed. "change" is no term, but how far G moves what S marks, in
    HU: where G copies its input, it is 0.
    """
    sick, lungs = batches["covid"]["image"], batches["covid"]["lungs"]
    each = {}
    if config.weight("reconstruction", step):
        healthy = batches["healthy"]["image"]
        generated, same = players.g(torch.cat([sick, healthy])).split([len(sick), len(healthy)])
        each["reconstruction"] = reconstruction_loss(same, healthy)
    else:
        generated = players.g(sick)
    if config.weight("adversarial", step):
        moved = mask if step >= config.adversarial_segmenter_from else mask.detach()
        each["adversarial"] = adversarial_loss(players.d(compose(sick, generated, moved, lungs)).logit)
    if config.weight("generated_to_d", step):
        each["generated_to_d"] = generated_to_d_loss(players.d(generated).logit)
    terms = weighed(config, step, each)
    inside = (mask * lungs).detach()
    change = 750 * ((generated - sick).abs().detach() * inside).sum() / (inside.sum() + 1e-6)
    return Terms(terms.each | {"change": change}, terms.total)


def own_terms(config: GasnetConfig, step: int, s: nn.Module, batches: dict, masks: dict) -> Terms:
    """S's own terms; `masks` are what it finds in the volumes of each kind."""
    each = {"labelled": labelled_loss(masks["labelled"], batches["labelled"]["lesions"])}
    if config.weight("healthy", step):
        each["healthy"] = healthy_loss(masks["healthy"])
    if config.weight("multiple_instance", step):
        lungs = batches["covid"]["lungs"]
        each["multiple_instance"] = multiple_instance_loss(masks["covid"], lungs, config.double_sigmoid)
    if config.weight("paste", step):
        mask, lungs = masks["covid"].detach(), batches["healthy"]["lungs"]
        pasted = compose(batches["healthy"]["image"], batches["covid"]["image"], mask, lungs)
        each["paste"] = paste_loss(s(pasted), mask, lungs)
    return weighed(config, step, each)


def discriminator_terms(config: GasnetConfig, step: int, players: Players, batches: dict) -> Terms:
    """D's terms on a batch of sick and one of healthy volumes.

    "d_right" is no term, but the share of synthetic and healthy volumes that D calls what they are.
    """
    sick, lungs = batches["covid"]["image"], batches["covid"]["lungs"]
    with torch.no_grad():
        generated = players.g(sick)
        composed = compose(sick, generated, players.s(sick), lungs)
    shown = {"composed": composed, "healthy": batches["healthy"]["image"]}
    if config.weight("original_to_d", step):
        shown["original"] = sick
    if config.weight("generated_to_d", step):
        shown["generated"] = generated
    logits = players.d(torch.cat(list(shown.values()))).logit
    logits = dict(zip(shown, logits.split([len(v) for v in shown.values()]), strict=True))
    own = discriminator_loss(logits["composed"], logits["healthy"])
    each = {}
    if "original" in logits:
        silence = silence_at(config.silence_original_to_d, "original_to_d")
        each["original_to_d"] = original_to_d_loss(logits["original"], silence)
    if "generated" in logits:
        each["generated_to_d"] = generated_to_d_loss(logits["generated"], True, step / config.steps)
    total = weighed(config, step, each).total + own
    right = torch.cat([logits["composed"] > 0, logits["healthy"] <= 0]).float().mean()
    return Terms({f"d_{name}": term for name, term in each.items()} | {"d_own": own, "d_right": right}, total)


def silence_at(below: float, name: str) -> Silence | None:
    """The released silence of that name, from another threshold; None where that is 0."""
    return SILENCES[name]._replace(below=below) if below else None


class Game:
    """Networks, optimisers and the running mean of S, and what a step does to them.

    Parameters
    ----------
    fabric : Fabric
    config : GasnetConfig
    shape : (depth, height, width) of the volumes.
    saved : `state` of an earlier step, or None.
    """

    def __init__(self, fabric: Fabric, config: GasnetConfig, shape: tuple[int, int, int], saved: dict | None):
        self.fabric, self.config = fabric, config
        torch.manual_seed(config.seed)
        self.bare = build(config, shape)
        mean = AveragedModel(self.bare.s, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        self.mean = fabric.to_device(mean)
        if saved is not None:
            self.mean.load_state_dict(saved["mean"])
        nets, optimizers = [], []
        for player, net in zip(Players._fields, self.bare, strict=True):
            if net is not None:
                if saved is not None:
                    net.load_state_dict(saved["nets"][player])
                net.to(memory_format=torch.channels_last_3d)
                net, optimizer = fabric.setup(net, self._optimizer(player, net))
                if saved is not None:
                    optimizer.load_state_dict(saved["optimizers"][player])
            else:
                optimizer = None
            nets.append(net)
            optimizers.append(optimizer)
        self.nets, self.optimizers = Players(*nets), Players(*optimizers)

    def _optimizer(self, player: str, net: nn.Module) -> torch.optim.Optimizer:
        config, rate = self.config, self.config.learning_rate(player, 0)
        if player == "d" and config.d_optimizer == "rmsprop":
            return torch.optim.RMSprop(net.parameters(), lr=rate, weight_decay=config.weight_decay)
        return torch.optim.Adam(
            net.parameters(), lr=rate, weight_decay=0.0 if player == "g" else config.weight_decay
        )

    def state(self) -> dict:
        """All that the next step depends on."""
        nets, optimizers = (
            {name: one.state_dict() for name, one in some._asdict().items() if one is not None}
            for some in (self.bare, self.optimizers)
        )
        return {"nets": nets, "optimizers": optimizers, "mean": self.mean.state_dict()}

    @property
    def segmenter(self) -> nn.Module:
        """S with the running mean of its weights: the one to keep."""
        return self.mean.module

    def step(self, step: int, batches: dict) -> dict[str, Tensor]:
        """Take a step of S and G, and those of D that follow it; return terms and what is watched."""
        torch.manual_seed(self.config.seed * 1_000_003 + step)  # dropout, where the segmenter has it
        for name, optimizer in self.optimizers._asdict().items():
            for group in optimizer.param_groups if optimizer else ():
                group["lr"] = self.config.learning_rate(name, step)
        seen = self._step_of_s_and_g(step, batches)
        self.mean.update_parameters(self.bare.s)
        turns = [self._step_of_d(step, seen_by_d) for seen_by_d in batches["turns"]]
        return seen | {name: sum(turn[name] for turn in turns) / len(turns) for name in (turns or [{}])[0]}

    def _step_of_s_and_g(self, step: int, batches: dict) -> dict[str, Tensor]:
        config, (s, g, d) = self.config, self.nets
        images = {kind: batches[kind]["image"] for kind in config.kinds}
        game, masks = Terms({}, 0.0), None
        if g is not None:
            d.requires_grad_(False)
            masks = find(s, images if config.joint_step else {"covid": images["covid"]})
            game = game_terms(config, step, self.nets, batches, masks["covid"])
            game = game._replace(total=self._silenced(game.total, "adversarial"))
            if not config.joint_step:
                self._descend(game.total, "s", "g")
            d.requires_grad_(True)
        if masks is None or not config.joint_step:
            masks = find(s, images)
        own = own_terms(config, step, s, batches, masks)
        total = self._silenced(own.total, "segmentation")
        if g is not None and config.joint_step:
            self._descend(total + game.total, "s", "g")
        else:
            self._descend(total, "s")
        shares = {f"share_{kind}": lesion_share(masks[kind], batches[kind]["lungs"]) for kind in masks}
        return game.each | own.each | shares

    def _step_of_d(self, step: int, batches: dict) -> dict[str, Tensor]:
        terms = discriminator_terms(self.config, step, self.nets, batches)
        self._descend(self._silenced(terms.total, "discriminator"), "d")
        return terms.each

    def _silenced(self, total: Tensor | float, name: str) -> Tensor | float:
        silence = silence_at(getattr(self.config, f"silence_{name}"), name)
        return silenced(total, silence) if isinstance(total, Tensor) else total

    def _descend(self, loss: Tensor | float, *players: str) -> None:
        """A step of some players' optimisers down a loss; none where no term of it counts yet."""
        if not isinstance(loss, Tensor):
            return
        optimizers = [getattr(self.optimizers, player) for player in players]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.fabric.backward(loss)
        for optimizer in optimizers:
            optimizer.step()


def lesion_share(mask: Tensor, lungs: Tensor) -> Tensor:
    """Share of the lungs that S calls lesion, in percent."""
    return 100 * ((mask.detach() >= 0.5) & (lungs > 0)).sum() / lungs.sum().clamp(min=1)


EMPTY = 0.1  # % of the lungs
EVERYWHERE = 50.0  # % of the lungs, in healthy volumes
COPY = 30.0  # HU


def warnings_of(row: dict) -> list[str]:
    """What a row of the log says has gone wrong with the game, and what to change."""
    found = []
    if row.get("share_covid", 100.0) < EMPTY:
        found.append(
            f"segmenter empty: {row['share_covid']:.2f} % of the sick lungs are lesion; raise 'labelled', "
            "lower 'healthy', raise 'multiple_instance', start 'paste' later or let 'adversarial' reach S "
            "later ('adversarial_segmenter_from')"
        )
    if row.get("share_healthy", row["share_labelled"]) > EVERYWHERE:
        share = row.get("share_healthy", row["share_labelled"])
        where = "healthy" if "share_healthy" in row else "labelled"
        found.append(
            f"segmenter everywhere: {share:.0f} % of the {where} lungs are lesion; raise 'healthy' and "
            "'labelled', lower 'adversarial' and 'multiple_instance'"
        )
    if row.get("change", COPY) < COPY and row["share_covid"] >= EMPTY:
        found.append(
            f"generator copying: what S marks is moved by {row['change']:.0f} HU only; raise 'adversarial' "
            "or 'original_to_d' (D must see what is sick), lower 'reconstruction'"
        )
    return found


@torch.no_grad()
def picture(nets: Players, pools: dict[str, Dataset], device) -> np.ndarray:
    """Scan, mask, generated and composed slice (columns) of a sick, a healthy and the labelled volume (rows).

    uint8 (H, W, 3), the slice of each volume with the most lung; without G two columns.
    """
    rows = []
    for kind in ("covid", "healthy", "labelled"):
        if kind in pools:
            item = pools[kind][0]
            image, lungs = (item[key][None].to(device) for key in ("image", "lungs"))
            mask = nets.s(image)
            planes = [(image + 1) / 2, mask * lungs]
            if nets.g is not None:
                generated = nets.g(image)
                planes += [(generated + 1) / 2, (compose(image, generated, mask, lungs) + 1) / 2]
            most = int(lungs.sum((0, 1, 3, 4)).argmax())
            rows.append([plane[0, 0, most].float().cpu().numpy() for plane in planes])
    return grey_rows(rows)
