"""Training on classes: ground-glass opacity against consolidation (Fan et al., IEEE TMI 2020, Sec. III-E).

`python -m covidnb.training.multiclass CONFIG.json RUN_FOLDER` starts a run, or goes on with it.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from covidnb.losses import MultiClassLoss, multiclass_bce_loss, multiclass_dice_loss
from covidnb.nets import DeepLabV3Plus, FCN8s, MultiClassUNet
from covidnb.slices import SliceFiles, read_image, training_split
from covidnb.slices.multiclass import CLASSES, MultiClassSlices, read_prior, write_classes
from covidnb.training import infnet, loop
from covidnb.training.ensemble import average_maps
from covidnb.training.loop import Task
from covidnb.training.multiclass.config import RECIPES, MultiClassConfig, configure
from covidnb.training.multiclass.maps import (
    card_scores,
    grey_reference,
    picture,
    predict_slice,
    predict_slices,
    probabilities,
    score,
)
from covidnb.training.run import ConfigError, Run, parse_config, read_weights

__all__ = [
    "RECIPES",
    "MultiClassConfig",
    "build",
    "configure",
    "grey_reference",
    "load_network",
    "main",
    "predict_slice",
    "predict_slices",
    "probabilities",
    "score",
    "split_slices",
    "steps",
    "train",
]

MODULE = "covidnb.training.multiclass"
OUTPUT = "probability of background, ground-glass opacity and consolidation for each pixel; the largest wins."
PICTURED = 6  # held-out slices in the picture of a validation


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
        maps = average_maps(net, [read_image(f.image) for f in held_out], theirs.size, config.flips)
        infnet.write_predictions(folder, held_out, maps)
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
