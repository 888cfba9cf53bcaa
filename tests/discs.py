"""Slices that a network learns in seconds: discs brighter than a noisy ground."""

from pathlib import Path

import numpy as np
from PIL import Image


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
