"""Training Inf-Net, and its baselines, on slices (Fan et al., IEEE TMI 2020, Sec. IV): multi-scale steps,
deep supervision.

`python -m covidnb.training.infnet CONFIG.json RUN_FOLDER` starts a run, or goes on with it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning_fabric import Fabric
from PIL import Image
from torch import Tensor, nn

from covidnb.files import whole
from covidnb.losses import InfNetLoss, infnet_loss
from covidnb.metrics import dice_at, null_nan, slice_scores
from covidnb.nets import InfNet, InfNetOutput, UNet, UNetPlusPlus
from covidnb.nets.infnet import resize
from covidnb.slices import (
    InfectionSlices,
    SliceFiles,
    list_slices,
    network_input,
    read_image,
    read_mask,
    semiseg_root,
    training_split,
)
from covidnb.training import loop
from covidnb.training.loop import SliceConfig, Task
from covidnb.training.run import ConfigError, Run, from_recipe, parse_config, read_weights, variants

MODULE = "covidnb.training.infnet"
EDGES = {"doctor": "gradient", "pseudo": "canny"}  # how the data set's authors drew the edges of each part
PICTURED = 6  # held-out slices in the picture of a validation


@dataclass(frozen=True)
class InfNetConfig(SliceConfig):
    """What a run on infection slices depends on. Defaults: the paper's recipe, on the embedded data."""

    part: Literal["doctor", "pseudo"] = "doctor"
    """Learn from the doctor's labels, or from pseudo-labels of the unlabelled slices."""
    labels: str = ""
    """Folder of pseudo-labels, as a propagation leaves it; empty: those that the data set has."""
    network: Literal["infnet", "unet", "unet++"] = "infnet"
    """Inf-Net, or a baseline that learns by the same loss, on its one output."""
    width: int | None = None
    """Channels of a baseline's first level; None: 64 for U-Net, 32 for U-Net++."""
    backbone: str = "res2net50"
    """Inf-Net's: a name of covidnb.nets.backbones.BACKBONES."""
    pretrained: bool = True
    """Start the backbone from ImageNet weights, as the paper does."""
    edge: bool = True
    """Inf-Net with edge guidance."""
    reverse: bool = True
    """Inf-Net with reverse attention; with neither it ends at the partial decoder's global map."""
    start: str = ""
    """weights.safetensors of a run of the same network to start from; empty: from the backbone alone."""
    scales: tuple[float, ...] = (0.75, 1.0, 1.25)
    """Each batch takes one optimiser step at each of these multiples of `size`."""
    official_schedule: bool = False
    """The released schedule: from `drop_epoch` on, a tenth again at every epoch."""
    clamp: float = 0.5
    """Gradients are clamped to plus or minus this value, element by element."""
    official_loss: bool = False
    """The released structure loss, whose weights never reach the BCE term."""

    def __post_init__(self):
        super().__post_init__()
        if not self.scales or min(self.scales) <= 0:
            raise ConfigError(f"parameter 'scales' needs positive numbers, got {self.scales}")
        if self.labels and self.part != "pseudo":
            raise ConfigError("parameter 'labels' names pseudo-labels: set part 'pseudo' to learn from them")

    def learning_rate(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0."""
        if not self.official_schedule:
            return super().learning_rate(epoch)
        return self.lr * 0.1 ** max(0, epoch - self.drop_epoch + 1)

    def side(self, scale: float) -> int:
        """Side of the training square at one scale: the nearest multiple of 32, at least 32."""
        return max(32, round(self.size * scale / 32) * 32)


RECIPES = {
    "paper": {},
    "lite": {
        "backbone": "efficientnet_lite0",
        "size": 256,
        "batch": 8,
        "epochs": 60,
        "lr": 3e-4,
        "drop_epoch": 48,
        "augment": True,
    },
    "laptop": {
        "backbone": "efficientnet_lite0",
        "pretrained": False,
        "size": 160,
        "batch": 8,
        "epochs": 16,
        "lr": 2e-3,
        "drop_epoch": 13,
        "augment": True,
    },
    "glance": {
        "backbone": "efficientnet_lite0",
        "pretrained": False,
        "size": 96,
        "scales": (1.0,),
        "batch": 8,
        "epochs": 16,
        "lr": 3e-3,
        "drop_epoch": 13,
        "augment": True,
    },
}


ABLATION = {
    "decoder": {"edge": False, "reverse": False},
    "edge": {"reverse": False},
    "reverse": {"edge": False},
    "all": {},
    "released loss": {"official_loss": True},
    "released schedule": {"official_schedule": True},
}
"""Inf-Net without parts of itself, and with faults of the released code: what differs from the config."""


def configure(values: dict) -> InfNetConfig:
    """Make a config of a recipe and what the caller sets beside it.

    Parameters
    ----------
    values : dict
        Fields of `InfNetConfig`, and optionally "recipe": "paper" (Res2Net-50 at 352 pixels: for a GPU),
        "lite" (EfficientNet-Lite0 with ImageNet weights at 256 pixels: real slices on two cores), "laptop"
        (the same from random weights at 160 pixels: nothing to download), "glance" (that at 96 pixels and one
        scale: seconds, where many runs are compared), or "auto": "laptop" on the phantom, else "lite".

    Raises
    ------
    ConfigError
        For an unknown recipe or field, or a value of the wrong type.
    """
    return from_recipe(InfNetConfig, RECIPES, values)


def ablation(values: dict, names: list[str]) -> dict[str, InfNetConfig]:
    """Make the configs of variants of `ABLATION`; `values` are as for `configure` and hold for all of them.

    Raises
    ------
    ConfigError
        For an unknown variant, too.
    """
    return variants(configure, ABLATION, values, names)


def split_slices(config: InfNetConfig) -> tuple[list[SliceFiles], list[SliceFiles]]:
    """List the slices to train on and those to evaluate on.

    Raises
    ------
    ConfigError
        Where an unlabelled slice has no label, neither in the data set nor in the folder `labels`.
    """
    train, held_out = training_split(config.data, config.fold)
    if config.part == "doctor":
        return train, held_out
    return labelled(list_slices(semiseg_root(config.data), "pseudo"), config.labels), held_out


def labelled(pool: list[SliceFiles], labels: str | Path = "") -> list[SliceFiles]:
    """Unlabelled slices with the pseudo-labels of a folder, NAME.png each; without one, the data set's own.

    Of a folder that labels only some of the slices, those.
    """
    if labels:
        masks = {path.stem: path for path in Path(labels).glob("*.png")}
        pool = [f._replace(mask=masks[f.name], edge=None) for f in pool if f.name in masks]
        if not pool:
            raise ConfigError(
                f"parameter 'labels': {labels} has no NAME.png for any of the unlabelled slices"
            )
    elif any(f.mask is None for f in pool):
        raise ConfigError("parameter 'labels': these slices come without labels; name a folder that has them")
    return pool


def build(config: InfNetConfig, pretrained: bool = False) -> nn.Module:
    """Make the network that a config names, with the backbone's ImageNet weights if asked for."""
    if config.network == "infnet":
        return InfNet(config.backbone, pretrained, edge=config.edge, reverse=config.reverse)
    kind = {"unet": UNet, "unet++": UNetPlusPlus}[config.network]
    return kind() if config.width is None else kind(width=config.width)


def parameters(config: InfNetConfig) -> int:
    """Count the trainable numbers of a config's network."""
    return sum(p.numel() for p in build(config).parameters())


def outputs(net: nn.Module, images: Tensor) -> InfNetOutput:
    """Logits of any of the networks: a baseline's one map is its finest."""
    out = net(images)
    return InfNetOutput(None, None, None, out, None) if isinstance(out, Tensor) else out


def training_step(net: nn.Module, batch: dict, side: int, official: bool = False) -> InfNetLoss:
    """Loss of one batch resized to `side` x `side` pixels, targets too."""
    images, masks, edges = (
        x if x.shape[-1] == side else resize(x, (side, side), align_corners=True)
        for x in (batch["image"], batch["mask"], batch["edge"])
    )
    return infnet_loss(outputs(net, images), masks, edges, official=official)


def steps(config: InfNetConfig, fabric: Fabric, net, optimizer, batches) -> Iterator[InfNetLoss]:
    """Take the optimiser steps of an epoch, one for each batch and scale; yield the loss of each."""
    for batch in batches:
        for scale in config.scales:
            optimizer.zero_grad()
            loss = training_step(net, batch, config.side(scale), config.official_loss)
            fabric.backward(loss.total)
            nn.utils.clip_grad_value_(net.parameters(), config.clamp)
            optimizer.step()
            yield loss


@torch.no_grad()
def predict_greys(net: nn.Module, greys: list[np.ndarray], size: int, batch: int = 8) -> list[np.ndarray]:
    """Lesion probability of slices (Inf-Net: sigmoid(S_2)).

    Parameters
    ----------
    net : Module
        Of `build` or `load_network`; its mode is left as it was.
    greys : list of ndarray
        uint8 (H, W), in the lung window, each of its own size.
    size : int
        The side, in pixels, that the network was trained at.
    batch : int
        Slices that go through the network at once.

    Returns
    -------
    list of ndarray
        float32 in [0, 1], each of its slice's size.
    """
    was_training = net.training
    net.eval()
    device = next(net.parameters()).device
    maps = []
    for start in range(0, len(greys), batch):
        some = greys[start : start + batch]
        inputs = torch.stack([network_input(grey, size) for grey in some]).to(device)
        logits = outputs(net, inputs).prediction.float().cpu()
        for grey, one in zip(some, logits, strict=True):
            maps.append(torch.sigmoid(resize(one[None], grey.shape))[0, 0].numpy())
    net.train(was_training)
    return maps


def predict_slices(net: nn.Module, files: list[SliceFiles], size: int) -> list[np.ndarray]:
    """Lesion probability of the slices in files, see `predict_greys`."""
    return predict_greys(net, [read_image(f.image) for f in files], size)


def score(maps: list[np.ndarray], files: list[SliceFiles]) -> dict:
    """Toolbox scores of the maps, and plain Dice at 0.5 without stretching."""
    truths = [read_mask(f.mask) for f in files]
    scores = slice_scores(maps, truths)
    for f, one, truth, row in zip(files, maps, truths, scores["per_slice"], strict=True):
        row |= {"name": f.name, "dice_at_0.5": dice_at([one], [truth])}
    return {"dice_at_0.5": dice_at(maps, truths), **scores}


def picture(files: list[SliceFiles], maps: list[np.ndarray], side: int = 128) -> np.ndarray:
    """Slices over their true masks over the network's maps, uint8 (3 side, N side, 3): a glance at a run."""

    def square(plane: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(plane).resize((side, side), Image.BILINEAR))

    columns = [
        np.concatenate([square(read_image(f.image)), square(read_mask(f.mask)), square(np.uint8(255 * m))])
        for f, m in zip(files, maps, strict=True)
    ]
    return np.repeat(np.concatenate(columns, axis=1)[..., None], 3, axis=2)


def validate(files: list[SliceFiles], size: int, net: nn.Module) -> tuple[dict, np.ndarray]:
    """Scores of a network on held-out slices, for the log, and a picture of the first of them."""
    maps = predict_slices(net, files, size)
    scores = score(maps, files)
    return {k: scores[k] for k in ("meanDic", "dice_at_0.5")}, picture(files[:PICTURED], maps[:PICTURED])


def write_map(path: Path, probability: np.ndarray) -> np.ndarray:
    """Write a map as an 8-bit PNG, 255 for certain lesion; not stretched, so 0.5 stays at 127.5."""
    grey = np.round(np.asarray(probability, np.float32) * 255).astype(np.uint8)
    with whole(path) as part:
        Image.fromarray(grey).save(part, format="png")
    return grey


def write_predictions(folder: Path, files: list[SliceFiles], maps: list[np.ndarray]) -> None:
    """Write the map of each slice as NAME.png."""
    for f, probability in zip(files, maps, strict=True):
        write_map(folder / f"{f.name}.png", probability)


def train(config: InfNetConfig, out: str | Path) -> Run:
    """Train and evaluate in a run folder; a folder that has begun goes on from its checkpoint.

    See `covidnb.training.loop.train` for what a resumed run and several devices mean.

    Parameters
    ----------
    config : InfNetConfig
    out : str or Path
        The run folder: config.json, log.csv, checkpoint/, weights.safetensors, metrics.json, predictions/,
        validation/, tensorboard/, model_card.md.

    Raises
    ------
    ConfigError
        Where the folder belongs to another config, its checkpoint or the weights to start from cannot be
        used, or memory runs out.
    """
    files, held_out = split_slices(config)

    def prepare(run: Run) -> Task:
        return Task(
            slices=InfectionSlices(
                files, config.size, augment=config.augment, seed=config.seed, edges=EDGES[config.part]
            ),
            network=partial(_first_network, config),
            optimizer=lambda net: torch.optim.Adam(net.parameters(), lr=config.lr),
            steps=partial(steps, config),
            validate=partial(validate, held_out, config.size),
            evaluate=lambda run, net, history: evaluate(run, config, net, history, len(files), held_out),
            passes=len(config.scales),
        )

    return loop.train(MODULE, config, out, prepare)


def _first_network(config: InfNetConfig, fresh: bool) -> nn.Module:
    """Network of a config: from the weights it starts with, or where a checkpoint will fill it, without."""
    if not (fresh and config.start):
        return build(config, pretrained=config.pretrained and fresh)
    net, theirs = load_network(config.start)
    for field in ("network", "width", "backbone", "edge", "reverse"):
        if getattr(theirs, field) != getattr(config, field):
            raise ConfigError(
                f"parameter 'start': {config.start} has {field} {getattr(theirs, field)!r}, this run "
                f"{getattr(config, field)!r}: give weights of the same network"
            )
    return net


def evaluate(run: Run, config: InfNetConfig, net: nn.Module, history, trained: int, held_out) -> None:
    """Segment the held-out slices and write what a finished run has; `config` is the network's."""
    maps = predict_slices(net, held_out, config.size)
    write_predictions(run.folder / "predictions", held_out, maps)
    counts = {"trained": trained, "evaluated": len(held_out)}
    run.finish(net, history, counts, null_nan(score(maps, held_out)), built_by=config)


def refuse_learnt(parameter: str, weights: str, theirs: InfNetConfig, data: str, fold: int | None) -> None:
    """Refuse weights for slices of a training fold that they have not held out.

    Raises
    ------
    ConfigError
        Naming the parameter that gave the weights.
    """
    if theirs.data == data and fold not in (None, theirs.fold):
        raise ConfigError(
            f"parameter {parameter!r}: {weights} held out fold {theirs.fold}, not {fold}: its maps of slices "
            "that it has learnt would be too good"
        )


def load_network(weights: str | Path) -> tuple[nn.Module, InfNetConfig]:
    """Build the network that a run's weights.safetensors is for, and fill it; ready to predict.

    Raises
    ------
    ConfigError
        Where the file is missing, damaged, or another network's.
    """
    header, tensors = read_weights(weights)
    kinds = [kind.__name__ for kind in (InfNet, UNet, UNetPlusPlus)]
    if header["network"] not in kinds:
        raise ConfigError(f"{weights} holds a {header['network']}, not one of {', '.join(kinds)}")
    config = parse_config(InfNetConfig, header["config"])
    net = build(config)
    net.load_state_dict(tensors)
    return net.eval(), config


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    loop.command_line(MODULE, InfNetConfig, train, argv)


if __name__ == "__main__":
    main()
