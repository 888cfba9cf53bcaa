"""Training Inf-Net on slices (Fan et al., IEEE TMI 2020, Sec. IV): multi-scale steps, deep supervision.

`python -m covidnb.training.infnet CONFIG.json RUN_FOLDER` starts a run, or goes on with it.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from covidnb.files import whole
from covidnb.losses import InfNetLoss, infnet_loss
from covidnb.metrics import dice_at, null_nan, slice_scores
from covidnb.nets import InfNet
from covidnb.nets.infnet import resize
from covidnb.slices import InfectionSlices, SliceFiles, fold, list_slices, read_mask, semiseg_root
from covidnb.training.run import ConfigError, Run, parse_config, read_weights, versions


@dataclass(frozen=True)
class InfNetConfig:
    """What an Inf-Net run depends on. The defaults are the paper's recipe; `data` is the embedded set."""

    data: str = "phantom"
    """"phantom", "covid-semiseg", or a folder in the COVID-SemiSeg layout."""
    fold: int | None = None
    """The training fold held out for evaluation; None trains on all and evaluates on the test part."""
    backbone: str = "res2net50"
    """A name of covidnb.nets.backbones.BACKBONES."""
    pretrained: bool = True
    """Start the backbone from ImageNet weights, as the paper does."""
    size: int = 352
    """Side of the square that slices are resized to, in pixels; a multiple of 32."""
    scales: tuple[float, ...] = (0.75, 1.0, 1.25)
    """Each batch takes one optimiser step at each of these multiples of `size`."""
    batch: int = 24
    """Slices a step."""
    epochs: int = 100
    """Passes over the training slices."""
    lr: float = 1e-4
    """Adam's learning rate."""
    drop_epoch: int = 50
    """From this epoch on the learning rate is a tenth."""
    clamp: float = 0.5
    """Gradients are clamped to plus or minus this value, element by element."""
    augment: bool = False
    """Flips, quarter turns, small affine and grey-value changes; the paper has none."""
    official_loss: bool = False
    """The released structure loss, whose weights never reach the BCE term."""
    validate_every: int = 0
    """Score the held-out fold every so many epochs; 0 only at the end."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Arithmetic of the forward pass."""
    seed: int = 0
    """Of the weights' start, the order of the slices and the augmentation."""

    def __post_init__(self):
        for name in ("size", "batch", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"parameter {name!r} must be at least 1, got {getattr(self, name)}")
        if self.size % 32:
            raise ConfigError(f"parameter 'size' must be a multiple of 32, got {self.size}")
        if not self.scales or min(self.scales) <= 0:
            raise ConfigError(f"parameter 'scales' needs positive numbers, got {self.scales}")
        if not 0 < self.lr < 1:
            raise ConfigError(f"parameter 'lr' must lie between 0 and 1, got {self.lr}")
        if self.validate_every and self.fold is None:
            raise ConfigError(
                "parameter 'validate_every' needs a 'fold' to score: the test part is for the end"
            )

    def learning_rate(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0 (the released code drops it again at every later one)."""
        return self.lr * (0.1 if epoch >= self.drop_epoch else 1.0)

    def side(self, scale: float) -> int:
        """Side of the training square at one scale: the nearest multiple of 32, at least 32."""
        return max(32, round(self.size * scale / 32) * 32)


RECIPES = {
    "paper": {},
    "lite": {
        "backbone": "efficientnet_lite0",
        "size": 256,
        "batch": 8,
        "epochs": 30,
        "lr": 3e-4,
        "drop_epoch": 24,
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
}


def configure(values: dict) -> InfNetConfig:
    """Make a config of a recipe and what the caller sets beside it.

    Parameters
    ----------
    values : dict
        Fields of `InfNetConfig`, and optionally "recipe": "paper" (Res2Net-50 at 352 pixels: for a GPU),
        "lite" (EfficientNet-Lite0 with ImageNet weights at 256 pixels: real slices on two cores), "laptop"
        (the same from random weights at 160 pixels: nothing to download), or "auto": "laptop" on the phantom,
        else "lite".

    Raises
    ------
    ConfigError
        For an unknown recipe or field, or a value of the wrong type.
    """
    values = dict(values)
    recipe = values.pop("recipe", "auto")
    if recipe == "auto":
        recipe = "laptop" if values.get("data", "phantom") == "phantom" else "lite"
    if recipe not in RECIPES:
        raise ConfigError(f"parameter 'recipe' must be 'auto' or one of {', '.join(RECIPES)}, got {recipe!r}")
    return parse_config(InfNetConfig, RECIPES[recipe] | values)


def split_slices(config: InfNetConfig) -> tuple[list[SliceFiles], list[SliceFiles]]:
    """List the slices to train on and those to evaluate on."""
    root = semiseg_root(config.data)
    train = list_slices(root, "doctor")
    if config.fold is None:
        return train, list_slices(root, "test")
    splits = None
    if config.data == "covid-semiseg":
        from covidnb.catalog import load_splits

        splits = load_splits(config.data)
    return fold(train, config.fold, splits)


def training_step(net: nn.Module, batch: dict, side: int, official: bool = False) -> InfNetLoss:
    """Loss of one batch resized to `side` x `side` pixels, targets too."""
    images, masks, edges = (
        x if x.shape[-1] == side else resize(x, (side, side), align_corners=True)
        for x in (batch["image"], batch["mask"], batch["edge"])
    )
    return infnet_loss(net(images), masks, edges, official=official)


def train_epoch(fabric: Fabric, net, optimizer, loader, config: InfNetConfig, progress) -> dict[str, float]:
    """Train for one epoch; return the mean of each loss term over its steps."""
    net.train()
    totals, steps = torch.zeros(len(InfNetLoss._fields), device=fabric.device), 0
    for batch in loader:
        for scale in config.scales:
            optimizer.zero_grad()
            loss = training_step(net, batch, config.side(scale), config.official_loss)
            fabric.backward(loss.total)
            nn.utils.clip_grad_value_(net.parameters(), config.clamp)
            optimizer.step()
            totals += torch.stack([term.detach().float() for term in loss])
            steps += 1
            progress.update()
    return dict(zip(InfNetLoss._fields, (totals / steps).tolist(), strict=True))


@torch.no_grad()
def predict_slices(net: nn.Module, files: list[SliceFiles], size: int, batch: int = 8) -> list[np.ndarray]:
    """Lesion probability sigmoid(S_2) of each slice, float32 at the slice's own size."""
    was_training = net.training
    net.eval()
    device = next(net.parameters()).device
    shapes = [read_mask(f.mask).shape for f in files]
    maps = []
    for items in DataLoader(InfectionSlices(files, size), batch_size=batch):
        logits = net(items["image"].to(device)).side2.float().cpu()
        for one in logits:
            maps.append(torch.sigmoid(resize(one[None], shapes[len(maps)]))[0, 0].numpy())
    net.train(was_training)
    return maps


def score(maps: list[np.ndarray], files: list[SliceFiles]) -> dict:
    """Toolbox scores of the maps, and plain Dice at 0.5 without stretching."""
    truths = [read_mask(f.mask) for f in files]
    scores = slice_scores(maps, truths)
    for f, row in zip(files, scores["per_slice"], strict=True):
        row["name"] = f.name
    return {"dice_at_0.5": dice_at(maps, truths), **scores}


def write_predictions(folder: Path, files: list[SliceFiles], maps: list[np.ndarray]) -> None:
    """Write each map as an 8-bit PNG, 255 for certain lesion; not stretched, so 0.5 stays at 127.5."""
    from PIL import Image

    for f, probability in zip(files, maps, strict=True):
        with whole(folder / f"{f.name}.png") as part:
            Image.fromarray(np.round(probability * 255).astype(np.uint8)).save(part, format="png")


def train(config: InfNetConfig, out: str | Path) -> Run:
    """Train and evaluate Inf-Net in a run folder; a folder that has begun goes on from its checkpoint.

    Everything random is drawn from (seed, epoch, index), and checkpoints are taken between epochs, so a
    killed and resumed run ends at the weights of an uninterrupted one: bit for bit on a CPU.

    Parameters
    ----------
    config : InfNetConfig
    out : str or Path
        The run folder: config.json, log.csv, checkpoint/, weights.safetensors, metrics.json, predictions/,
        model_card.md.

    Raises
    ------
    ConfigError
        Where the folder belongs to another config, or its checkpoint cannot be read.
    """
    files, held_out = split_slices(config)
    run = Run(out, config)
    fabric = Fabric(accelerator="auto", devices=1, precision=config.precision)
    net, history = _fit(fabric, run, files, held_out)
    if not (run.folder / "metrics.json").exists():
        maps = predict_slices(net, held_out, config.size)
        write_predictions(run.folder / "predictions", held_out, maps)
        scores = score(maps, held_out)
        run.save_weights(net)
        run.write_card("Inf-Net", config.data, len(files), len(held_out), scores)
        run.write_json(
            "metrics.json",
            {
                "scores": null_nan(scores),
                "slices": {"trained": len(files), "evaluated": len(held_out)},
                "seconds": sum(row["seconds"] for row in history),
                "versions": versions(),
            },
        )
    return run


def _fit(fabric: Fabric, run: Run, files, held_out) -> tuple[nn.Module, list[dict]]:
    """Train from the start or the last checkpoint to the last epoch; return the network and the log."""
    config = run.config
    saved = run.load_checkpoint()
    torch.manual_seed(config.seed)
    bare = InfNet(config.backbone, pretrained=config.pretrained and saved is None)
    bare = bare.to(memory_format=torch.channels_last)
    net, optimizer = fabric.setup(bare, torch.optim.Adam(bare.parameters(), lr=config.lr))
    history = []
    if saved is not None:
        bare.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        history = saved["history"]
    slices = InfectionSlices(files, config.size, augment=config.augment, seed=config.seed)
    order = torch.Generator()
    loader = fabric.setup_dataloaders(DataLoader(slices, config.batch, shuffle=True, generator=order))
    steps = len(loader) * len(config.scales)
    with tqdm(total=config.epochs * steps, initial=len(history) * steps, unit="step") as progress:
        for epoch in range(len(history), config.epochs):
            started = time.perf_counter()
            order.manual_seed(config.seed * 100_003 + epoch)
            slices.set_epoch(epoch)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate(epoch)
            row = {"epoch": epoch + 1, "lr": config.learning_rate(epoch)}
            row |= train_epoch(fabric, net, optimizer, loader, config, progress)
            row["seconds"] = round(time.perf_counter() - started, 2)
            if config.validate_every and (epoch + 1) % config.validate_every == 0:
                scores = score(predict_slices(net, held_out, config.size), held_out)
                row |= {"meanDic": scores["meanDic"], "dice_at_0.5": scores["dice_at_0.5"]}
            history.append(row)
            run.write_log(history)
            run.save_checkpoint(
                {"net": bare.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
            )
            progress.set_postfix(epoch=epoch + 1, loss=f"{row['total']:.3f}")
    return bare, history


def load_network(weights: str | Path) -> tuple[InfNet, InfNetConfig]:
    """Build the network that a run's weights.safetensors is for, and fill it; ready to predict.

    Raises
    ------
    ConfigError
        Where the file is missing, damaged, or another network's.
    """
    header, tensors = read_weights(weights)
    if header["network"] != "InfNet":
        raise ConfigError(f"{weights} holds a {header['network']}, not an InfNet")
    config = parse_config(InfNetConfig, header["config"])
    net = InfNet(config.backbone)
    net.load_state_dict(tensors)
    return net.eval(), config


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m covidnb.training.infnet", description=train.__doc__)
    parser.add_argument("config", help="JSON file with fields of InfNetConfig")
    parser.add_argument("out", help="run folder")
    arguments = parser.parse_args(argv)
    train(parse_config(InfNetConfig, json.loads(Path(arguments.config).read_text())), arguments.out)


if __name__ == "__main__":
    main()
