"""Training GASNet (Xu et al. 2020): one volume with its lesions drawn, others known as sick or healthy.

The segmenter S and the generator G play against the discriminator D, while S also learns from what is known
of each volume. With some weights at 0 the same loop trains the segmenter alone, any of `volume_segmenter`.

`python -m covidnb.training.gasnet CONFIG.json RUN_FOLDER` starts a run, or goes on with it.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

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
from covidnb.training.loop import command_line, memory_advice, start_fabric
from covidnb.training.run import ConfigError, Run, from_recipe, parse_config, read_weights
from covidnb.training.volume_evaluation import evaluate_volumes, grey_rows, mean_dice

TERMS = (
    "adversarial",
    "generated_to_d",
    "original_to_d",
    "reconstruction",
    "paste",
    "multiple_instance",
    "healthy",
    "labelled",
)
KINDS = ("labelled", "covid", "healthy")  # the splits that are learned from


@dataclass(frozen=True)
class GasnetConfig:
    """What a run of GASNet depends on. Defaults: the paper's, on the embedded data.

    A step is one of S and G, with the steps of D that belong to it. (The paper counts those of S and G and
    those of D as iterations: its 300,000 are 150,000 steps, its 10,000 before paste and MIL are 5,000.)
    Each term of the loss has a weight, 0 to leave it out, and the step from which it counts.
    """

    data: str = "phantom"
    """"phantom", or a folder of volumes as `python -m covidnb.volumes` and its splits make it."""
    patients: int = 2020
    """Seed of the phantom's patients: another one gives others, the labelled one too."""
    size: tuple[int, ...] = (40, 160, 160)
    """(depth, height, width) of the phantom's volumes; those of a folder are what they are."""
    depth: int | None = 32
    """Slices of each volume that a step sees, at random where; None: all."""
    augment: bool = True
    """Noise, flips, faint warps, as the paper's."""
    network: Literal["gasnet", "unet3d", "vnet"] = "gasnet"
    """The segmenter: GASNet's, or a baseline from MONAI in its place."""
    width: int | None = None
    """Channels of the segmenter's first level; None: its own, 20 for GASNet's."""
    game_width: int = 32
    """Channels of the first level of G and D."""
    game_levels: int = 4
    """Halvings in G and D below their first level."""
    steps: int = 150_000
    """Steps of S and G."""
    batch: int = 4
    """Volumes of each kind in a step."""
    in_a_row: int = 2
    """Steps of S and G before it is D's turn."""
    d_steps: int = 5
    """Steps of D for each of S and G."""
    joint_step: bool = False
    """One optimiser step down all terms of S and G, instead of one in the game and one of S's own."""
    adversarial: float = 1.0
    """S, G: D shall call the synthetic volume healthy."""
    adversarial_from: int = 0
    adversarial_segmenter_from: int = 0
    """From this step on that term reaches S too; before, G alone."""
    generated_to_d: float = 1.0
    """G: D shall call all that G makes of a sick volume healthy; D: shall not, ever more faintly."""
    generated_to_d_from: int = 0
    original_to_d: float = 1.0
    """D: the sick volume as it came is diseased."""
    original_to_d_from: int = 0
    reconstruction: float = 100.0
    """G: healthy volumes stay as they are."""
    reconstruction_from: int = 0
    paste: float = 100.0
    """S: a lesion pasted into healthy lungs is found where it was pasted."""
    paste_from: int = 5_000
    multiple_instance: float = 1000.0
    """S: a sick volume has a lesion somewhere."""
    multiple_instance_from: int = 5_000
    healthy: float = 100.0
    """S: nothing is lesion in healthy volumes."""
    healthy_from: int = 0
    labelled: float = 500.0
    """S: the lesions that were drawn."""
    labelled_from: int = 0
    silence_original_to_d: float = 0.1
    """Below this value that term is scaled by 1e-4, as released; 0: never."""
    silence_adversarial: float = 0.16
    """The same for the sum of S's and G's terms in the game, by 1e-3."""
    silence_segmentation: float = 0.064
    """The same for the sum of S's own terms, by 1e-2."""
    silence_discriminator: float = 0.16
    """The same for the sum of D's terms, by 1e-6."""
    double_sigmoid: bool = False
    """The released multiple-instance term, which takes a probability for a logit."""
    s_lr: float = 1e-4
    """Learning rate of S, by Adam."""
    g_lr: float = 1e-5
    """Of G, by Adam."""
    d_lr: float = 1e-5
    """Of D."""
    d_optimizer: Literal["rmsprop", "adam"] = "rmsprop"
    """Of D."""
    weight_decay: float = 1e-3
    """Of S and D."""
    s_halving: int = 10_000
    """The learning rate of S halves every so many steps; 0: never."""
    game_halving: int = 15_000
    """The same of G and D."""
    ema: float = 0.999
    """Decay of the running mean of S's weights; the mean is what is scored and kept."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Arithmetic of the forward pass."""
    log_every: int = 500
    """Steps between rows of the log, each with a picture and a checkpoint."""
    validate_every: int = 0
    """Steps between scores of the validation volumes in the log, a multiple of `log_every`; 0: none."""
    workers: int = 0
    """Processes that prepare volumes ahead of the steps."""
    seed: int = 0
    """Of the weights' start, the order of the volumes and the augmentation."""

    def __post_init__(self):
        for name in ("steps", "batch", "in_a_row", "d_steps", "game_width", "game_levels", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"parameter {name!r} must be at least 1, got {getattr(self, name)}")
        for name in (*TERMS, *(f"{term}_from" for term in TERMS), "adversarial_segmenter_from"):
            if getattr(self, name) < 0:
                raise ConfigError(f"parameter {name!r} must not be negative, got {getattr(self, name)}")
        for name in ("s_lr", "g_lr", "d_lr", "ema"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"parameter {name!r} must lie between 0 and 1, got {getattr(self, name)}")
        if len(self.size) != 3 or min(self.size) < 8:
            raise ConfigError(f"parameter 'size' is (depth, height, width), from 8 voxels on: {self.size}")
        if self.validate_every % self.log_every:
            raise ConfigError(f"parameter 'validate_every' must be a multiple of log_every {self.log_every}")
        if not self.labelled:
            raise ConfigError("parameter 'labelled' must be above 0: nothing else says what a lesion is")

    @property
    def plays(self) -> bool:
        """Whether there is a game at all: without it G and D are not built."""
        return self.adversarial > 0 or self.generated_to_d > 0

    @property
    def kinds(self) -> tuple[str, ...]:
        """The splits that this run learns from."""
        sick = self.plays or self.paste > 0 or self.multiple_instance > 0
        healthy = self.plays or self.paste > 0 or self.healthy > 0
        return tuple(kind for kind, used in zip(KINDS, (True, sick, healthy), strict=True) if used)

    def weight(self, term: str, step: int) -> float:
        """Weight of a term in a step, counted from 0."""
        return getattr(self, term) if step >= getattr(self, f"{term}_from") else 0.0

    def learning_rate(self, player: str, step: int) -> float:
        """Learning rate of "s", "g" or "d" in a step, counted from 0."""
        halving = self.s_halving if player == "s" else self.game_halving
        return getattr(self, f"{player}_lr") * (0.5 ** (step // halving) if halving else 1.0)


# what every recipe below the paper's does differently from it
_SMALL = {
    "batch": 1,
    "in_a_row": 1,
    "d_steps": 1,
    "joint_step": True,
    "labelled": 5.0,
    "healthy": 1.0,
    "adversarial": 0.3,
    "generated_to_d": 0.1,
    "original_to_d": 0.5,
    "reconstruction": 3.0,
    "paste": 0.5,
    "multiple_instance": 0.05,
    "silence_original_to_d": 0.0,
    "silence_adversarial": 0.0,
    "silence_segmentation": 0.0,
    "silence_discriminator": 0.0,
    "s_lr": 1e-3,
    "g_lr": 5e-4,
    "d_lr": 2e-4,
    "d_optimizer": "adam",
    "weight_decay": 0.0,
    "s_halving": 0,
    "game_halving": 0,
    "ema": 0.98,
    "precision": "bf16-mixed",
    "game_levels": 3,
}
RECIPES = {
    "paper": {},
    "lite": _SMALL
    | {
        "width": 8,
        "game_width": 8,
        "steps": 1000,
        "adversarial_segmenter_from": 240,
        "paste_from": 480,
        "multiple_instance_from": 480,
        "log_every": 50,
    },
    "laptop": _SMALL
    | {
        "size": (16, 48, 48),
        "depth": None,
        "width": 8,
        "game_width": 8,
        "steps": 250,
        "adversarial_segmenter_from": 60,
        "paste_from": 120,
        "multiple_instance_from": 120,
        "log_every": 25,
    },
    "glance": _SMALL
    | {
        "size": (16, 48, 48),
        "depth": None,
        "width": 6,
        "game_width": 6,
        "steps": 120,
        "adversarial_segmenter_from": 30,
        "paste_from": 60,
        "multiple_instance_from": 60,
        "log_every": 10,
    },
}

_NO_GAME = {"adversarial": 0.0, "generated_to_d": 0.0, "original_to_d": 0.0, "reconstruction": 0.0}
_ALONE = _NO_GAME | {"paste": 0.0, "multiple_instance": 0.0}
ABLATION = {
    "labelled": _ALONE | {"healthy": 0.0},
    "healthy": _ALONE,
    "no game": _NO_GAME,
    "no original_to_d": {"original_to_d": 0.0},
    "no generated_to_d": {"generated_to_d": 0.0},
    "no reconstruction": {"reconstruction": 0.0},
    "no paste": {"paste": 0.0},
    "no multiple_instance": {"multiple_instance": 0.0},
    "gasnet": {},
}
"""GASNet and less of it: what differs from the config. "labelled": S learns from the labelled volume alone;
"healthy": and that nothing is lesion in healthy volumes; "no game": without G and D; then without a term."""


def configure(values: dict) -> GasnetConfig:
    """Make a config of a recipe and what the caller sets beside it.

    Parameters
    ----------
    values : dict
        Fields of `GasnetConfig`, and optionally "recipe": "paper" (for a GPU), "lite" (small networks on
        real volumes, two cores), "laptop" (the phantom at 16 x 48 x 48, minutes), "glance" (less of it), or
        "auto": "laptop" on the phantom, else "lite".

    Raises
    ------
    ConfigError
        For an unknown recipe or field, or a value of the wrong type.
    """
    return from_recipe(GasnetConfig, RECIPES, values)


def ablation(values: dict, names: list[str]) -> dict[str, GasnetConfig]:
    """Make the configs of variants of `ABLATION`; `values` are as for `configure` and hold for all of them.

    Raises
    ------
    ConfigError
        For an unknown variant, too.
    """
    for name in names:
        if name not in ABLATION:
            raise ConfigError(f"parameter 'variants': {name!r} is not one of {', '.join(ABLATION)}")
    return {name: configure(values | ABLATION[name]) for name in names}


def root_of(config: GasnetConfig) -> Path:
    """The folder of volumes that a config names; the phantom's are drawn if need be."""
    from covidnb.volumes import volumes_root  # here: it reads through SimpleITK, which a GPU box may lack

    return volumes_root(config.data, tuple(config.size), config.patients)


# ---------------------------------------------------------------------------------------------- volumes


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


# ---------------------------------------------------------------------------------------------- a step


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


# ---------------------------------------------------------------------------------------------- the loop


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
        turns = [self._step_of_d(step, turn) for turn in batches["turns"]]
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
            f"segmenter empty: {row['share_covid']:.2f} % of the sick lungs are lesion; let 'adversarial' "
            "reach S later ('adversarial_segmenter_from'), start 'paste' later, raise 'labelled' or "
            "'multiple_instance', lower 'healthy'"
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


def train(config: GasnetConfig, out: str | Path) -> Run:
    """Train and evaluate in a run folder; a folder that has begun goes on from its checkpoint.

    Everything random is drawn from (seed, step), and a checkpoint holds all networks and optimisers, so a
    killed and resumed run ends at the weights of an uninterrupted one: bit for bit on a CPU.

    Parameters
    ----------
    config : GasnetConfig
    out : str or Path
        The run folder: config.json, log.csv, checkpoint/, weights.safetensors (S, the running mean of its
        weights), metrics.json, predictions/ (NIfTI), validation/ (pictures), tensorboard/, model_card.md.

    Raises
    ------
    ConfigError
        Where the folder belongs to another config, its checkpoint cannot be used, or memory runs out.
    VolumeError
        Where the volumes cannot be used.
    """
    fabric = start_fabric(config)
    pools = pools_of(config, augment=True)
    run = Run(out, config)
    with memory_advice(config):
        segmenter, history = fit(fabric, run, pools)
        if not (run.folder / "metrics.json").exists():
            evaluate(run, segmenter, history, sum(len(pool) for pool in pools.values()))
    return run


def fit(fabric: Fabric, run: Run, pools: dict[str, Dataset]) -> tuple[nn.Module, list[dict]]:
    """Train to the last step, from the start or the last checkpoint; return S and the log."""
    config, saved = run.config, run.load_checkpoint()
    volumes, looked_at = StepVolumes(config, pools), pools_of(config, augment=False)
    shape = tuple(pools["labelled"][0]["image"].shape[1:])
    game = Game(fabric, config, shape, saved)
    history = saved["history"] if saved else []
    done = history[-1]["step"] if history else 0
    loader = DataLoader(
        volumes, batch_size=None, sampler=range(done, config.steps), num_workers=config.workers
    )
    loader = fabric.setup_dataloaders(loader, use_distributed_sampler=False)
    sums, started, told = {}, time.perf_counter(), []
    with tqdm(total=config.steps, initial=done, unit="step") as progress:
        for step, batches in enumerate(loader, done):
            for name, value in game.step(step, batches).items():
                total, count = sums.get(name, (0.0, 0))
                sums[name] = total + value.detach().float(), count + 1
            progress.update()
            if (step + 1) % config.log_every and step + 1 < config.steps:
                continue
            row = {"step": step + 1} | {name: float(total / count) for name, (total, count) in sums.items()}
            row["seconds"] = round(time.perf_counter() - started, 2)
            if config.validate_every and (step + 1) % config.validate_every == 0:
                row["Dice"] = mean_dice(game.segmenter, root_of(config))
            warnings = warnings_of(row) if step >= config.steps // 10 else []  # all are strangers at first
            row["warning"] = "; ".join(warnings)
            for warning in warnings:
                if warning.split(":")[0] not in told:
                    progress.write(f"step {step + 1}: {warning}")
            told = [warning.split(":")[0] for warning in warnings]
            history.append(row)
            run.write_log(history, picture(game.nets, looked_at, fabric.device), "step")
            run.save_checkpoint(game.state() | {"history": history})
            sums, started = {}, time.perf_counter()
    return game.segmenter, history


def evaluate(run: Run, segmenter: nn.Module, history: list[dict], trained: int) -> None:
    """Segment the validation volumes and write what a finished run has."""
    scores = evaluate_volumes(segmenter, root_of(run.config), run.folder / "predictions")
    counts = {"trained": trained, "evaluated": scores["crop"]["volumes"]}
    on_card = {
        f"{name}, mean, on the {grid}'s grid": mean
        for grid in ("crop", "scan")
        for name, mean in scores[grid]["mean"].items()
    }
    run.finish(segmenter, history, counts, scores, on_card, OUTPUT, unit="volumes", input=INPUT)


INPUT = "chest CT cropped to the lungs, -1250 to 250 HU scaled to -1 to 1."
OUTPUT = "probability of lesion for each voxel; 0.5 is the cut, within the lungs."


def load_network(weights: str | Path) -> tuple[nn.Module, GasnetConfig]:
    """Build the segmenter that a run's weights.safetensors is for, and fill it; ready to segment.

    Raises
    ------
    ConfigError
        Where the file is missing, damaged, or another method's.
    """
    header, tensors = read_weights(weights)
    if "multiple_instance" not in header["config"]:
        raise ConfigError(f"{weights} holds a {header['network']}, no segmenter of volumes")
    config = parse_config(GasnetConfig, header["config"])
    net = volume_segmenter(config.network, config.width)
    net.load_state_dict(tensors)
    return net.eval(), config


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    command_line("covidnb.training.gasnet", GasnetConfig, train, argv)


if __name__ == "__main__":
    main()
