"""Lesions with the distribution of COVID-19, grown in any pair of lungs from the lung mask alone.

Peripheral, posterior and lower-lobe leaning, on both sides and in several places; ground glass first,
consolidation in some of it; outlines that follow the pleura and end at the walls of secondary lobules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from scipy import ndimage
from scipy.spatial import cKDTree

from covidnb.phantom.geometry import fill, smooth_noise

GGO, CONSOLIDATION = 1, 2


class Growth(NamedTuple):
    """Lesions on a grid: `labels` (uint8) 0, GGO, CONSOLIDATION; `part` 0..1, how much of the airspace is
    filled; `hu`, what it is filled to. A voxel is labelled where `part` is at least one half."""

    labels: np.ndarray
    part: np.ndarray
    hu: np.ndarray

    def fill(self, airspace: np.ndarray) -> np.ndarray:
        """HU of the airspace once it is filled; never darker than before."""
        return airspace + self.part * np.maximum(self.hu - airspace, 0)


@dataclass(frozen=True)
class Disease:
    """One patient's disease."""

    severity: float  # share of the lungs to infect
    size: float  # median half extent of a lesion along the pleura, mm
    ggo: float  # median HU of its ground glass
    solid: float  # chance that a lesion holds consolidation
    paving: float  # HU of the thickened septa in crazy paving, 0 without

    @classmethod
    def draw(cls, rng: np.random.Generator, severity: float | None, crazy_paving: bool | None) -> Disease:
        """A disease at random; severity and crazy paving may be given."""
        drawn_severity = float(np.clip(rng.lognormal(np.log(0.055), 0.9), 0.005, 0.4))
        drawn_paving, septa = rng.random() < 0.25, float(rng.uniform(100, 180))
        severity = drawn_severity if severity is None else severity
        paved = drawn_paving if crazy_paving is None else crazy_paving
        return cls(
            severity=severity,
            size=(9 + 55 * np.sqrt(severity)) * rng.uniform(0.7, 1.3),
            ggo=float(np.clip(rng.normal(-640, 45), -720, -540)),
            solid=float(rng.beta(1.2, 1.2)),
            paving=septa if paved else 0.0,
        )


def depth_in(lungs: np.ndarray, spacing) -> np.ndarray:
    """Distance to the surface of the mask in mm, 0 outside it; spacing as (z, y, x)."""
    image = sitk.GetImageFromArray(lungs.astype(np.uint8))
    image.SetSpacing([float(s) for s in spacing[::-1]])
    distance = sitk.SignedMaurerDistanceMap(image, False, False, True)
    return np.maximum(-sitk.GetArrayViewFromImage(distance), 0)


class _Field:
    """The lungs' bounding box while lesions grow in it."""

    def __init__(self, lobes: np.ndarray, spacing: np.ndarray, rng: np.random.Generator):
        self.lobes, self.spacing = lobes, spacing
        self.inside = inside = lobes > 0
        shape = lobes.shape
        self.axes = [np.arange(n, dtype=np.float32) * s for n, s in zip(shape, spacing, strict=True)]
        self.depth = depth_in(np.pad(inside, 1), spacing)[1:-1, 1:-1, 1:-1]
        self.rough = 0.24 * smooth_noise(shape, spacing, 13, rng)
        self.rough += 0.15 * smooth_noise(shape, spacing, 5, rng)
        self.texture = smooth_noise(shape, spacing, 4, rng)
        self.voxels = np.argwhere(inside)
        self.lobules = self._cells(14, rng)
        self.jitter = rng.normal(0, 0.13, self.lobules.n).astype(np.float32)
        self.mesh = self._cells(6, rng)
        self.part, self.solid = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.hu = np.full(shape, -1000, np.float32)

    def _cells(self, size: float, rng: np.random.Generator) -> cKDTree:
        """Random points of the lungs, about `size` mm apart: their Voronoi cells stand for lobules."""
        count = max(8, int(1.3 * len(self.voxels) * float(self.spacing.prod()) / size**3))
        points = self.voxels[rng.integers(len(self.voxels), size=count)]
        return cKDTree((points + rng.uniform(-0.5, 0.5, points.shape)) * self.spacing)

    def likelihood(self) -> np.ndarray:
        """How likely a lesion starts at each voxel: under the costal pleura, at the back, low."""
        z, y, x = ((self.voxels + 0.5) / self.inside.shape - 0.5).T  # -0.5 to 0.5 in the lungs' box
        surface = np.exp(-np.square((self.depth[self.inside] - 6) / 5))
        costal = np.clip(np.hypot(y, x) - 0.12, 0, None) ** 1.5  # not the mediastinal side
        weight = (surface * costal + 0.008) * np.exp(3.0 * y - 3.0 * z)
        return weight / weight.sum()

    def _around(self, centre, reach: float):
        """Slices of a block `reach` mm around a voxel, and z, y, x in mm from it."""
        where = centre * self.spacing
        box = tuple(
            slice(int(np.searchsorted(a, w - reach)), int(np.searchsorted(a, w + reach)))
            for a, w in zip(self.axes, where, strict=True)
        )
        return box, np.ix_(*[a[b] - w for a, b, w in zip(self.axes, box, where, strict=True)])

    def add(self, centre, largest: float, disease: Disease, rng: np.random.Generator) -> int:
        """Grow one lesion of at most about `largest` mm3 around a voxel; returns the voxels it adds."""
        along = min(disease.size * rng.lognormal(0, 0.65), 0.8 * largest ** (1 / 3))  # half extents in mm
        through = along * rng.uniform(0.35, 0.9)  # across the pleura
        stretch = rng.uniform(0.7, 1.5)  # along the body's axis
        soft = rng.uniform(0.2, 0.6)
        level = disease.ggo + rng.normal(0, 60)
        core = rng.uniform(0.4, 1.1) if rng.random() < disease.solid else 0.0
        towards = rng.normal(0, 0.35, 3)
        # 1 at the lesion's outline: depth below the pleura is one coordinate, so that it follows the pleura
        box, (z, y, x) = self._around(centre, 1.6 * along * max(1, stretch))
        lift = self.depth[box] - self.depth[tuple(centre)]
        flat = np.maximum((z / stretch) ** 2 + y * y + x * x - lift * lift, 0)
        smooth = np.sqrt(np.square(lift / through) + flat / along**2)
        near = np.nonzero((self.lobes[box] == self.lobes[tuple(centre)]) & (smooth < 1.6))
        at = tuple(n + b.start for n, b in zip(near, box, strict=True))
        points = np.stack(at, axis=1) * self.spacing
        _, lobule = self.lobules.query(points)
        rough = self.rough[at] + self.jitter[lobule]
        q = smooth[near] + rough
        part = np.clip((1 - q) / soft, 0, 1)
        hu = level + 130 * np.clip(1 - q, 0, 1) + 60 * self.texture[at]
        if disease.paving:
            gap, _ = self.mesh.query(points, k=2)
            hu += disease.paving * fill(gap[:, 1] - gap[:, 0] - 1.0, 1.5)
        old = self.part[at]
        self.hu[at] = np.where(part > old, hu, self.hu[at])  # the lesion that fills a voxel most sets its HU
        self.part[at] = np.maximum(old, part)
        if core:
            middle = (centre * self.spacing + towards * along).astype(np.float32)
            q = np.sqrt(np.square(points - middle).sum(axis=1)) / (core * along) + 1.4 * rough
            self.solid[at] = np.maximum(self.solid[at], np.clip((1 - q) / 0.7, 0, 1) * (part > 0.5))
        return int(((part >= 0.5) & (old < 0.5)).sum())

    def clear_specks(self):
        """Take away what would be labelled in pieces under 0.15 ml: no reader would have drawn them."""
        pieces, count = ndimage.label(self.part >= 0.5, np.ones((3, 3, 3)))
        size = np.bincount(pieces.ravel(), minlength=count + 1) * float(self.spacing.prod())
        size[0] = np.inf
        self.part[(size < 150)[pieces]] = 0


def grow(lungs: np.ndarray, spacing, rng: np.random.Generator, disease: Disease) -> Growth:
    """Grow lesions in a lung mask (Z, Y, X) until `disease.severity` of its volume is infected.

    The mask may number lobes (1, 2, ...): a lesion does not cross from one into another. spacing is (z, y, x)
    in mm; the axes run as in an LPS image's array: z to the head, y to the back.
    """
    whole = np.asarray(lungs, np.uint8)
    box = ndimage.find_objects((whole > 0).astype(np.uint8))[0]
    field = _Field(np.ascontiguousarray(whole[box]), np.asarray(spacing, np.float32), rng)
    chance = np.cumsum(field.likelihood())
    left = disease.severity * len(field.voxels)
    for _ in range(400):
        if left <= 0:
            break
        start = min(int(np.searchsorted(chance, rng.random())), len(chance) - 1)
        left -= field.add(field.voxels[start], max(left * float(field.spacing.prod()), 800), disease, rng)
    field.clear_specks()
    consolidated = rng.normal(-50, 30) + 60 * field.texture
    hu = field.hu + field.solid * (consolidated - field.hu)
    labels = np.where(field.part >= 0.5, np.where(field.solid >= 0.5, CONSOLIDATION, GGO), 0).astype(np.uint8)
    out = Growth(*(np.zeros(whole.shape, a.dtype) for a in (labels, field.part, hu)))
    for full, local in zip(out, (labels, field.part, hu), strict=True):
        full[box] = local
    return out
