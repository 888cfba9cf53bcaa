"""The scanner of the digital chest: point spread, slice profile, noise, calibration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage


@dataclass(frozen=True)
class Style:
    """How one scanner and reconstruction look."""

    blur: float  # in-plane point spread (sigma), mm
    edge: float  # overshoot of a sharp kernel, 0 for a soft one
    noise: float  # standard deviation in the body, HU
    grain: float  # correlation length of the noise (sigma), mm
    slice: float  # thickness of a slice, mm
    offset: float  # error of calibration, HU


STYLES = {
    "standard": Style(blur=0.7, edge=0.0, noise=22, grain=0.8, slice=5.0, offset=0),
    "sharp": Style(blur=0.4, edge=0.5, noise=45, grain=0.55, slice=4.0, offset=-8),
    "low_dose": Style(blur=0.8, edge=0.0, noise=60, grain=1.0, slice=5.0, offset=5),
    "thick": Style(blur=0.9, edge=0.0, noise=12, grain=1.1, slice=10.0, offset=8),
}


def noise(shape, spacing, style: Style, rng: np.random.Generator) -> np.ndarray:
    """Correlated noise of a style, HU; spacing (z, y, x) in mm."""
    _, sy, sx = spacing
    grain = rng.standard_normal(shape, np.float32)
    fine = ndimage.gaussian_filter(grain, (0, style.grain / sy, style.grain / sx), truncate=3)
    if style.edge:  # a sharp kernel amplifies the fine structure
        fine -= 0.7 * ndimage.gaussian_filter(
            fine, (0, 2 * style.grain / sy, 2 * style.grain / sx), truncate=3
        )
    return fine * np.float32(style.noise / fine.std())


def scan(hu: np.ndarray, spacing, style: Style, rng: np.random.Generator) -> np.ndarray:
    """The scan of noise-free HU (Z, Y, X): whole numbers from -1024 to 3071 HU, as scanners store them."""
    sz, sy, sx = spacing
    profile = style.slice / np.sqrt(12) / sz  # sigma of a rectangular slice
    out = ndimage.gaussian_filter(hu, (profile, style.blur / sy, style.blur / sx), truncate=3)
    if style.edge:
        out += style.edge * (out - ndimage.gaussian_filter(out, (0, 1.2 / sy, 1.2 / sx), truncate=3))
    out += noise(hu.shape, spacing, style, rng)
    return np.clip(np.rint(out + np.float32(style.offset)), -1024, 3071)
