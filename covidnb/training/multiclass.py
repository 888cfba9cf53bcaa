"""Training on classes: ground-glass opacity against consolidation (Fan et al., IEEE TMI 2020, Sec. III-E).

`python -m covidnb.training.multiclass CONFIG.json RUN_FOLDER` starts a run, or goes on with it.
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

from covidnb.losses import MultiClassLoss, multiclass_bce_loss, multiclass_dice_loss
from covidnb.metrics import dice_at, null_nan, slice_scores
from covidnb.nets import DeepLabV3Plus, FCN8s, MultiClassUNet
from covidnb.nets.infnet import resize
from covidnb.slices import SliceFiles, read_classes, read_image, training_split
from covidnb.slices.multiclass import (
    CLASSES,
    PALETTE,
    MultiClassSlices,
    class_input,
    read_prior,
    write_classes,
)
from covidnb.training import infnet, loop
from covidnb.training.loop import SliceConfig, Task
from covidnb.training.positions import mean_of_positions, positions
from covidnb.training.run import ConfigError, Run, from_recipe, parse_config, read_weights
from covidnb.training.threshold import ConsolidationCut

MODULE = "covidnb.training.multiclass"
OUTPUT = "probability of background, ground-glass opacity and consolidation for each pixel; the largest wins."
PICTURED = 6  # held-out slices in the picture of a validation


@dataclass(frozen=True)
class MultiClassConfig(SliceConfig):
    """What a run on classes depends on. Defaults: the paper's recipe, on the embedded data."""

    network: Literal["unet", "fcn8s", "deeplab"] = "unet"
    """The paper's multi-class U-Net, FCN8s or DeepLabV3+."""
    width: int = 64
    """Channels of the U-Net's first level."""
    backbone: str = "resnet50"
    """Of FCN8s and DeepLabV3+: a name of covidnb.nets.backbones.BACKBONES."""
    pretrained: bool = True
    """Start the backbone from ImageNet weights."""
    output_stride: Literal[8, 16] = 16
    """Of DeepLabV3+."""
    prior: str = "label"
    """Infection prior of the training slices: "label" (the doctor's), a folder of maps, or "none"."""
    prior_noise: float = 0.0
    """Training priors are made imperfect, up to this strength: see imperfect_prior."""
    eval_prior: str = ""
    """That of the evaluated slices: a folder of maps, the weights.safetensors of an Inf-Net run, or "label",
    which tells how well a perfect prior would do. Never assumed: a run with a prior must name it."""
    channel_order: Literal["plain", "official"] = "plain"
    """"official": the released one-hot, in which class k lands in channel k - 1."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.7
    """SGD's."""
    loss: Literal["bce", "dice"] = "bce"
    """"bce": the paper's, each class against the rest; "dice": weighted softmax cross-entropy, and Dice."""
    class_weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    """Of background, GGO and consolidation in the cross-entropy of the "dice" loss."""
    flips: bool = False
    """Average the maps of a slice in eight positions: mirrored or not, four quarter turns."""
    batch: int = 16
    epochs: int = 200
    lr: float = 1e-2
    drop_epoch: int = 200
    """The paper's learning rate stays as it is."""

    def __post_init__(self):
        super().__post_init__()
        if self.prior_noise < 0:
            raise ConfigError(f"parameter 'prior_noise' must not be negative, got {self.prior_noise}")
        if len(self.class_weights) != 3 or min(self.class_weights) < 0:
            raise ConfigError(
                f"parameter 'class_weights' needs three weights of at least 0, got {self.class_weights}"
            )
        if self.eval_prior and not self.takes_prior:
            raise ConfigError("parameter 'eval_prior' needs a 'prior': the network was to learn without one")
        if self.channel_order == "official" and self.loss != "bce":
            raise ConfigError(
                "parameter 'channel_order': the released one-hot gives pixels two classes or none, "
                "which only loss 'bce' can learn"
            )

    @property
    def takes_prior(self) -> bool:
        """Whether the network gets a prior beside the slice."""
        return self.prior != "none"


RECIPES = {
    "paper": {},
    "lite": {
        "width": 16,
        "prior_noise": 1.0,
        "size": 224,
        "batch": 8,
        "epochs": 60,
        "optimizer": "adam",
        "lr": 2e-3,
        "drop_epoch": 48,
        "loss": "dice",
        "augment": True,
        "flips": True,
    },
    "laptop": {
        "width": 16,
        "prior_noise": 1.0,
        "size": 160,
        "batch": 8,
        "epochs": 16,
        "optimizer": "adam",
        "lr": 2e-3,
        "drop_epoch": 13,
        "loss": "dice",
        "augment": True,
    },
    "glance": {
        "width": 8,
        "prior_noise": 1.0,
        "size": 64,
        "batch": 8,
        "epochs": 20,
        "optimizer": "adam",
        "lr": 1e-2,
        "drop_epoch": 16,
        "loss": "dice",
        "class_weights": (1.0, 4.0, 8.0),
    },
}


def configure(values: dict) -> MultiClassConfig:
    """Make a config of a recipe and what the caller sets beside it.

    Parameters
    ----------
    values : dict
        Fields of `MultiClassConfig`, and optionally "recipe": "paper" (the multi-class U-Net at 352 pixels:
        for a GPU), "lite" (one a quarter as wide at 224 pixels, a loss with Dice, imperfect priors, flips:
        real slices on two cores), "laptop" (less of the same, at 160 pixels), "glance" (a narrow one at 64
        pixels, rare classes weighted: seconds, where many runs are compared), or "auto": "laptop" on the
        phantom, else "lite".

    Raises
    ------
    ConfigError
        For an unknown recipe or field, or a value of the wrong type.
    """
    return from_recipe(MultiClassConfig, RECIPES, values)


def split_slices(config: MultiClassConfig) -> tuple[list[SliceFiles], list[SliceFiles]]:
    """List the slices to train on and those to evaluate on."""
    return training_split(config.data, config.fold, "multiclass_train", "multiclass_test")


def build(config: MultiClassConfig, pretrained: bool = False) -> nn.Module:
    """Make the network that a config names, with the backbone's ImageNet weights if asked for."""
    inputs = 6 if config.takes_prior else 3
    if config.network == "unet":
        return MultiClassUNet(inputs, config.width)
    if config.network == "fcn8s":
        return FCN8s(config.backbone, pretrained, inputs)
    return DeepLabV3Plus(config.backbone, pretrained, inputs, output_stride=config.output_stride)


def loss_of(config: MultiClassConfig, logits: Tensor, classes: Tensor) -> MultiClassLoss:
    """The loss that a config names."""
    if config.loss == "bce":
        return multiclass_bce_loss(logits, classes, official=config.channel_order == "official")
    return multiclass_dice_loss(logits, classes, config.class_weights)


def steps(
    config: MultiClassConfig, slices: MultiClassSlices, fabric: Fabric, net, optimizer, batches
) -> Iterator[MultiClassLoss]:
    """Take the optimiser steps of an epoch, one for each batch; yield the loss of each."""
    torch.manual_seed(config.seed * 100_003 + slices.epoch)  # dropout, the same after a resume
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(config, net(batch["image"]), batch["classes"])
        fabric.backward(loss.total)
        optimizer.step()
        yield loss


def probabilities(logits: Tensor, config: MultiClassConfig) -> Tensor:
    """Probability of background, GGO and consolidation, (N, 3, H, W), from a network's logits.

    With the "bce" loss each class was learnt against the rest, and the three need not sum to one.
    """
    if config.channel_order == "official":
        logits = logits.roll(1, dims=1)  # GGO, consolidation, background
    return torch.sigmoid(logits) if config.loss == "bce" else logits.softmax(1)


@torch.no_grad()
def predict_slice(
    net: nn.Module, config: MultiClassConfig, grey: np.ndarray, prior: np.ndarray | None = None
) -> np.ndarray:
    """Class probabilities of one slice; `.argmax(0)` is its class map.

    Parameters
    ----------
    net : Module
        Of `load_network`, or the authors' weights in a `MultiClassUNet` with `channel_order` "official".
    config : MultiClassConfig
        Its size, loss, channel order and flips tell how to feed and read the network.
    grey : uint8 (H, W)
        The slice, in a lung window, cropped to the lungs.
    prior : uint8 (H, W), optional
        Infection map, 255 for certain infection, where the network takes one.

    Returns
    -------
    ndarray
        float32 (3, H, W): background, GGO, consolidation.

    Raises
    ------
    ValueError
        Where the network takes a prior and there is none, or the other way round.
    """
    if config.takes_prior != (prior is not None):
        wants = "takes an infection prior: pass one" if config.takes_prior else "takes the slice alone"
        raise ValueError(f"this {type(net).__name__} {wants}")
    was_training = net.training
    net.eval()
    device = next(net.parameters()).device
    greys, priors = [grey], [prior]
    if config.flips:
        greys, priors = positions(grey), [None] * 8 if prior is None else positions(prior)
    inputs = [class_input(*planes, config.size) for planes in zip(greys, priors, strict=True)]
    logits = net(torch.stack(inputs).to(device)).float().cpu()
    net.train(was_training)
    sized = [resize(one[None], plane.shape) for one, plane in zip(logits, greys, strict=True)]
    maps = [probabilities(one, config)[0].numpy() for one in sized]
    return mean_of_positions(maps) if config.flips else maps[0]


def predict_slices(
    net: nn.Module, config: MultiClassConfig, files: list[SliceFiles], prior: str | Path | None
) -> list[np.ndarray]:
    """Class probabilities of each slice, its prior read from `prior` (see `read_prior`)."""
    return [
        predict_slice(net, config, read_image(f.image), None if prior is None else read_prior(f, prior))
        for f in files
    ]


def score(maps: list[np.ndarray], files: list[SliceFiles]) -> dict:
    """Score class probabilities, lesion class by lesion class.

    Returns
    -------
    dict
        For "GGO" and "consolidation": "toolbox_of_argmax", `slice_scores` of the pixels where the class is
        the likeliest (how the published rows were made: the mean over thresholds of a map of 0 and 1 is its
        Dice, but for the last threshold; a slice without the class counts 0); "toolbox_of_probability", the
        same of its soft map; "dice_of_argmax", plain Dice, where a slice without the class counts 1 if none
        is predicted; "dice_where_present", that over the slices with the class; "slices_with", their number.
        "confusion": pixels of true (row) and predicted (column) class.
    """
    truths = [read_classes(f.mask) for f in files]
    likeliest = [m.argmax(0) for m in maps]
    scores, count = {}, len(CLASSES)
    for k, name in list(enumerate(CLASSES))[1:]:
        wanted, found = ([plane == k for plane in planes] for planes in (truths, likeliest))
        present = [j for j, mask in enumerate(wanted) if mask.any()]
        scores[name] = {
            "toolbox_of_argmax": _toolbox(found, wanted, files),
            "toolbox_of_probability": _toolbox([m[k] for m in maps], wanted, files),
            "dice_of_argmax": dice_at(found, wanted),
            "dice_where_present": _dice_of(found, wanted, present),
            "slices_with": len(present),
        }
    pairs = sum(
        np.bincount(count * t.astype(int).ravel() + p.ravel(), minlength=count**2)
        for t, p in zip(truths, likeliest, strict=True)
    )
    return scores | {"confusion": pairs.reshape(count, count).tolist()}


def grey_reference(files: list[SliceFiles], held_out: list[SliceFiles], prior: str | Path) -> dict:
    """What a run has to beat: scores of one grey value, the best on `files`, within the prior of `held_out`.

    Returns
    -------
    dict
        As `score`, and "grey", that value: from it on, infected pixels are called consolidation.
    """
    cut = ConsolidationCut.fit([read_image(f.image) for f in files], [read_classes(f.mask) for f in files])
    named = [cut.predict(read_image(f.image), read_prior(f, prior) >= 128) for f in held_out]
    maps = [np.stack([classes == k for k in range(3)]).astype(np.float32) for classes in named]
    return {"grey": cut.grey} | score(maps, held_out)


def _toolbox(maps: list, truths: list, files: list[SliceFiles]) -> dict:
    scores = slice_scores(maps, truths)
    for f, row in zip(files, scores["per_slice"], strict=True):
        row["name"] = f.name
    return null_nan(scores)


def _dice_of(found: list, wanted: list, present: list[int]) -> float | None:
    return dice_at([found[j] for j in present], [wanted[j] for j in present]) if present else None


def picture(files: list[SliceFiles], maps: list[np.ndarray], side: int = 128) -> np.ndarray:
    """Slices over their true classes over the network's, uint8 (3 side, N side, 3): a glance at a run."""
    colours = np.array(PALETTE, np.uint8).reshape(-1, 3)
    columns = []
    for f, m in zip(files, maps, strict=True):
        grey = np.repeat(read_image(f.image)[..., None], 3, axis=2)
        planes = (grey, colours[read_classes(f.mask)], colours[m.argmax(0)])
        columns.append(np.concatenate([Image.fromarray(p).resize((side, side)) for p in planes]))
    return np.concatenate(columns, axis=1)


def validate(config: MultiClassConfig, files, prior, net: nn.Module) -> tuple[dict, np.ndarray]:
    """Scores of a network on held-out slices, for the log, and a picture of the first of them."""
    maps = predict_slices(net, config, files, prior)
    scores = score(maps, files)
    each = {name: scores[name]["toolbox_of_argmax"]["meanDic"] for name in CLASSES[1:]}
    return each | {"meanDic": sum(each.values()) / 2}, picture(files[:PICTURED], maps[:PICTURED])


def train(config: MultiClassConfig, out: str | Path) -> Run:
    """Train and evaluate in a run folder; a folder that has begun goes on from its checkpoint.

    See `covidnb.training.loop.train` for what a resumed run and several devices mean.

    Parameters
    ----------
    config : MultiClassConfig
    out : str or Path
        The run folder: config.json, log.csv, checkpoint/, weights.safetensors, metrics.json, predictions/
        (palette files of the likeliest class), prior/ (where Inf-Net made it), validation/, tensorboard/,
        model_card.md. metrics.json has the scores of `score` and, where there is a prior, under "one grey
        value" those of `grey_reference`.

    Raises
    ------
    ConfigError
        Where the folder belongs to another config, its checkpoint or the weights of the prior cannot be
        used, or memory runs out.
    SliceError
        Where a slice has no prior.
    """
    files, held_out = split_slices(config)

    def prepare(run: Run) -> Task:
        prior = _eval_prior(run, held_out)
        slices = MultiClassSlices(
            files,
            config.size,
            prior=config.prior if config.takes_prior else None,
            noise=config.prior_noise,
            augment=config.augment,
            seed=config.seed,
        )
        return Task(
            slices=slices,
            network=lambda fresh: build(config, pretrained=config.pretrained and fresh),
            optimizer=partial(_optimizer, config),
            steps=partial(steps, config, slices),
            validate=partial(validate, config, held_out, prior),
            evaluate=partial(_evaluate, files, held_out, prior),
        )

    return loop.train(MODULE, config, out, prepare)


def _optimizer(config: MultiClassConfig, net: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that a config names."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(net.parameters(), lr=config.lr, momentum=config.momentum)
    return torch.optim.Adam(net.parameters(), lr=config.lr)


def _eval_prior(run: Run, held_out: list[SliceFiles]) -> str | Path | None:
    """Say where the evaluated slices' priors are; if `eval_prior` names weights, make them first."""
    config = run.config
    if not config.takes_prior:
        return None
    if not config.eval_prior:
        raise ConfigError(
            "parameter 'eval_prior' is missing: give a folder of maps of the evaluated slices (predictions/ "
            "of a run), the weights.safetensors of an Inf-Net run, or 'label' for a perfect prior"
        )
    if not config.eval_prior.endswith(".safetensors"):
        for f in held_out:
            read_prior(f, config.eval_prior)  # a missing one is found now, not after hours of training
        return config.eval_prior
    folder = run.folder / "prior"
    if not all((folder / f"{f.name}.png").exists() for f in held_out):
        net, theirs = infnet.load_network(config.eval_prior)
        infnet.refuse_learnt("eval_prior", config.eval_prior, theirs, config.data, config.fold)
        infnet.write_predictions(folder, held_out, infnet.predict_slices(net, held_out, theirs.size))
    return folder


def _evaluate(files, held_out, prior, run: Run, net: nn.Module, history: list[dict]) -> None:
    """Segment the held-out slices and write what a finished run has."""
    config = run.config
    maps = predict_slices(net, config, held_out, prior)
    for f, m in zip(held_out, maps, strict=True):
        write_classes(run.folder / "predictions" / f"{f.name}.png", m.argmax(0).astype(np.uint8))
    scores = score(maps, held_out)
    if config.takes_prior:
        scores["one grey value"] = grey_reference(files, held_out, prior)
    counts = {"trained": len(files), "evaluated": len(held_out)}
    run.finish(net, history, counts, scores, card_scores(scores), OUTPUT)


def card_scores(scores: dict) -> dict[str, float]:
    """Rows of the model card: what each score is of is in its name."""
    rows = {}
    for name in CLASSES[1:]:
        own = scores[name]
        for kind in ("toolbox_of_argmax", "toolbox_of_probability"):
            for figure in ("meanDic", "meanSen", "meanSpe", "Sm", "meanEm", "MAE"):
                rows[f"{name}, {kind}, {figure}"] = own[kind][figure]
        rows |= {f"{name}, {kind}": own[kind] for kind in ("dice_of_argmax", "dice_where_present")}
    return rows


def load_network(weights: str | Path) -> tuple[nn.Module, MultiClassConfig]:
    """Build the network that a run's weights.safetensors is for, and fill it; ready to predict.

    Raises
    ------
    ConfigError
        Where the file is missing, damaged, or another method's.
    """
    header, tensors = read_weights(weights)
    if "class_weights" not in header["config"]:
        raise ConfigError(f"{weights} holds a {header['network']} that knows no classes")
    config = parse_config(MultiClassConfig, header["config"])
    net = build(config)
    net.load_state_dict(tensors)
    return net.eval(), config


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    loop.command_line(MODULE, MultiClassConfig, train, argv)


if __name__ == "__main__":
    main()
