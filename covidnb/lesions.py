"""Lesions with the distribution of COVID-19, grown in any pair of lungs from the lung mask alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from scipy import ndimage
from scipy.spatial import cKDTree


class Growth(NamedTuple):
    """Lesions on a grid: labels 0/1/2 (uint8), opaque fraction 0..1 and the HU that the airspace is filled to."""

    labels: np.ndarray
    part: np.ndarray
    hu: np.ndarray


def depth_in(lungs: np.ndarray, spacing) -> np.ndarray:
    """Distance to the surface of the mask in mm (0 outside); spacing as (z, y, x)."""
    image = sitk.GetImageFromArray(lungs.astype(np.uint8))
    image.SetSpacing([float(s) for s in spacing[::-1]])
    d = sitk.GetArrayViewFromImage(
        sitk.SignedMaurerDistanceMap(
            image, squaredDistance=False, useImageSpacing=True, insideIsPositive=True
        )
    )
    return np.maximum(d, 0)


def grow_lesions(
    lungs: np.ndarray, spacing, rng: np.random.Generator, *, severity: float, crazy_paving: bool
):
    """Grow GGO and consolidation in a lung mask (Z, Y, X) until about `severity` of its volume is infected.

    spacing is (z, y, x) in mm, the axes run as in LPS arrays (z to the head, y to the back). Returns a `Growth`.
    """
    spacing = np.asarray(spacing, float)
    lungs = lungs > 0
    depth = depth_in(lungs, spacing)
    idx = np.argwhere(lungs)
    low, high = idx.min(0), idx.max(0) + 1
    mm = (idx - low) * spacing
    extent = (high - low) * spacing
    at = tuple(idx.T)
    d = depth[at]
    # the costal side: away from the axis between the lungs
    centre = mm.mean(0)
    gy, gx = (mm[:, 1] - centre[1]) / extent[1], (mm[:, 2] - centre[2]) / extent[2]
    outer = np.hypot(gy, gx)
    weight = np.exp(-(((d - 7) / 6) ** 2)) * np.clip(outer - 0.2, 0, None) ** 1.5
    weight *= np.exp(2.2 * gy) * np.exp(-2.0 * (mm[:, 0] / extent[0] - 0.5))
    weight /= weight.sum()
    total = lungs.sum() * spacing.prod()
    # cells of the size of secondary lobules: lesions end at their walls
    cells = mm[rng.choice(len(mm), max(8, int(total / 15.0**3 * 1.2)), replace=False)]
    dist, cell = cKDTree(cells).query(mm, k=2, workers=1)
    jitter = rng.normal(0, 0.16, len(cells))[cell[:, 0]]
    septum = np.clip(1.4 - (dist[:, 1] - dist[:, 0]) / 1.6, 0, 1)
    noise = np.zeros(lungs.shape, np.float32)
    for scale, gain in ((14, 0.22), (6, 0.14)):
        field = ndimage.gaussian_filter(rng.standard_normal(lungs.shape, np.float32), scale / spacing / 2)
        noise += gain * field / max(field.std(), 1e-6)
    rough = noise[at] + jitter

    part = np.zeros(len(mm), np.float32)
    hu = np.full(len(mm), -1000, np.float32)
    dense = np.zeros(len(mm), np.float32)
    solid_share = rng.beta(1.2, 2.2)
    for _ in range(60):
        if part.sum() * spacing.prod() >= severity * total:
            break
        i = rng.choice(len(mm), p=weight)
        size = np.exp(rng.normal(np.log(18), 0.45))
        thick = size * rng.uniform(0.4, 0.9)
        lift = d - d[i]
        gap = mm - mm[i]
        along = np.maximum((gap * (0.8, 1, 1)) ** 2 @ np.ones(3) - lift**2, 0)
        q = np.sqrt((lift / thick) ** 2 + along / size**2) + rough
        soft = rng.uniform(0.12, 0.4)
        mine = np.clip((1 - q) / soft, 0, 1)
        level = np.clip(rng.normal(-600, 60), -740, -460) + 150 * np.clip(1 - q, 0, 1)
        part = np.maximum(part, mine)
        hu = np.where(mine > 0, np.maximum(hu, level), hu)
        if rng.random() < 0.25 + solid_share:
            core = rng.uniform(0.25, 0.75)
            j = rng.choice(np.nonzero(q < 0.8)[0]) if (q < 0.8).any() else i
            gap = np.sqrt(((mm - mm[j]) ** 2).sum(1)) / (size * core) + 1.3 * rough
            dense = np.maximum(dense, np.clip((1 - gap) / 0.25, 0, 1) * (mine > 0.5))
    if crazy_paving:
        hu = hu + 160 * septum * (part > 0)
    hu = hu + dense * (-40 - hu)
    labels = np.zeros(lungs.shape, np.uint8)
    labels[at] = np.where(part >= 0.5, np.where(dense >= 0.5, 2, 1), 0)
    full = np.zeros(lungs.shape, np.float32)
    full[at] = part
    level = np.full(lungs.shape, -1000, np.float32)
    level[at] = hu
    return Growth(labels, full, level)


def fill_airspace(hu: np.ndarray, base, growth: Growth) -> np.ndarray:
    """HU after the airspace has been filled: parenchyma at `base` goes to the lesion's HU, vessels (40 HU) stay."""
    solid = np.clip((hu - base) / (40 - base), 0, 1)
    target = growth.hu + solid * (40 - growth.hu)
    return hu + growth.part * np.maximum(target - hu, 0)
