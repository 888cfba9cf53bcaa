"""Slices that a network learns in seconds, discs brighter than a noisy ground, and the runs on them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from covidnb.training.infnet import InfNetConfig


def make_slices(root: Path, part: str, names: list[str], labels: bool = True) -> None:
    """Write 64 x 64 discs and, unless told not to, their masks into a part of the COVID-SemiSeg layout."""
    side = 64
    rng = np.random.default_rng(len(names))
    y, x = np.mgrid[:side, :side]
    for kind in ("Imgs", "GT") if labels else ("Imgs",):
        (root / part / kind).mkdir(parents=True, exist_ok=True)
    for name in names:
        cy, cx, r = rng.uniform(16, 48, 2).tolist() + [rng.uniform(6, 14)]
        lesion = (y - cy) ** 2 + (x - cx) ** 2 < r**2
        grey = np.clip(60 + 90 * lesion + rng.normal(0, 12, (side, side)), 0, 255).astype(np.uint8)
        Image.fromarray(grey).save(root / part / "Imgs" / f"{name}.png")
        if labels:
            Image.fromarray(lesion.astype(np.uint8) * 255).save(root / part / "GT" / f"{name}.png")


def tiny_infnet(root: Path | str, **changes) -> InfNetConfig:
    """Config of a small Inf-Net for the slices in `root`; `changes` are fields that a test has otherwise."""
    tiny = InfNetConfig(
        data=str(root),
        backbone="efficientnet_lite0",
        pretrained=False,
        size=64,
        scales=(1.0,),
        batch=5,
        epochs=4,
        lr=1e-3,
        drop_epoch=3,
        augment=True,
    )
    return replace(tiny, **changes)


def epochs_logged(folder: Path) -> int:
    """Epochs in the log of a run folder, which another process may be writing."""
    log = folder / "log.csv"
    return len(log.read_text().splitlines()) - 1 if log.exists() else 0
