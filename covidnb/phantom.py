"""The course's embedded data: a seeded digital chest CT with known lungs, vessels, GGO and consolidation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from covidnb import anatomy, lesions

ANATOMY = anatomy.ANATOMY
FIELD_OF_VIEW = (318.0, 380.0, 380.0)  # mm, z y x: what `shape` divides when no spacing is given


@dataclass(frozen=True)
class Style:
    """A scanner's look: reconstruction kernel, noise, slice thickness, calibration."""

    blur: float  # in-plane point spread (sigma), mm
    noise: float  # standard deviation in HU in the middle of the body
    grain: float  # correlation length of the noise (sigma), mm
    thickness: float  # slice thickness, mm
    offset: float = 0.0  # error of calibration, HU


STYLES = {
    "standard": Style(blur=0.7, noise=18, grain=0.9, thickness=5.0),
    "sharp": Style(blur=0.35, noise=42, grain=0.5, thickness=4.0, offset=-8),
    "low_dose": Style(blur=0.8, noise=55, grain=1.1, thickness=5.0, offset=4),
    "thick": Style(blur=0.9, noise=12, grain=1.1, thickness=9.0, offset=6),
}


class Phantom(NamedTuple):
    """One patient: `ct` float32 HU, `lungs` 0/1, `lesions` 0/1 GGO/2 consolidation, `anatomy` labels of `ANATOMY`."""

    ct: sitk.Image
    lungs: sitk.Image
    lesions: sitk.Image
    anatomy: sitk.Image


def chest(
    seed: int = 2020, *, kind: str = "covid", shape=(72, 224, 224), spacing=None, style: str = "standard"
) -> Phantom:
    """A digital chest CT, the same for the same arguments.

    shape is (z, y, x) in voxels, spacing (z, y, x) in mm; without spacing the whole chest (318 x 380 x 380 mm) is
    covered. `kind="healthy"` is the same patient and the same noise without the lesions. Images are LPS. Raises
    ValueError on an unknown kind or style, or on a shape or spacing that cannot hold a chest.
    """
    if kind not in ("covid", "healthy"):
        raise ValueError(f"chest: kind is {kind!r}; it must be 'covid' or 'healthy'")
    if style not in STYLES:
        raise ValueError(f"chest: no style named {style!r}; there are {', '.join(STYLES)}")
    shape = tuple(int(n) for n in shape)
    if len(shape) != 3 or min(shape) < 16:
        raise ValueError(f"chest: shape is {shape}; it must be three numbers (z, y, x) of at least 16")
    spacing = tuple(f / n for f, n in zip(FIELD_OF_VIEW, shape, strict=True)) if spacing is None else spacing
    spacing = tuple(float(s) for s in spacing)
    if len(spacing) != 3 or not all(0.3 <= s <= 25 for s in spacing):
        raise ValueError(f"chest: spacing is {spacing}; it must be three numbers (z, y, x) of 0.3 to 25 mm")
    seeds = np.random.SeedSequence(seed).spawn(4)
    body_rng, tree_rng, lesion_rng, noise_rng = map(np.random.default_rng, seeds)
    patient = anatomy.Patient.draw(body_rng)
    grid = anatomy.Grid(shape, spacing, patient)
    art = anatomy.Painter(grid)
    body = anatomy.Chest(grid, body_rng)
    body.paint_body(art)
    body.build_mediastinum()
    body.build_lungs()
    body.paint_inside(art)
    body.paint_bones(art)
    aerated = anatomy.fill(body.lungs, art.voxel)
    mask = body.lungs < 0
    for name, side in (("right lung", mask & (grid.x < 2)), ("left lung", mask & (grid.x >= 2))):
        art.labels[side] = ANATOMY[name]
    # gravity: the lung is denser at the back
    base = -868 + 45 * (grid.y - body.centre) / body.half_depth
    base = np.broadcast_to(base, shape).astype(np.float32)
    vessels = lung_vessels(body, grid, mask, tree_rng)
    air = base + vessels * (40 - base)
    kindly = lesions.grow_lesions(mask, spacing, lesion_rng, severity=0.12, crazy_paving=False)
    labels = kindly.labels if kind == "covid" else np.zeros(shape, np.uint8)
    if kind == "covid":
        air = lesions.fill_airspace(air, base, kindly)
    art.hu += aerated * (air - art.hu)
    art.labels[mask & (vessels > 0.5)] = ANATOMY["lung vessels"]
    body.paint_airway(art)
    lung_mask = mask & (art.labels != ANATOMY["airway"])
    ct = scan(art.hu, spacing, STYLES[style], noise_rng)
    out = []
    for a in (ct, lung_mask.astype(np.uint8), labels * lung_mask, art.labels):
        image = sitk.GetImageFromArray(a)
        image.SetSpacing(spacing[::-1])
        image.SetOrigin([float(v[0]) for v in grid.axes[::-1]])
        out.append(image)
    return Phantom(*out)


def lung_vessels(body, grid, mask, rng) -> np.ndarray:
    """Arteries and veins of both lungs: fraction of each voxel, from trees that run from the hilum to the periphery."""
    step = grid.spacing[0]
    over = max(1, round(step / grid.spacing[1]))
    fine = (np.arange(grid.shape[0] * over) - (over - 1) / 2) / over * step + grid.axes[0][0]
    axes = [fine.astype(np.float32), grid.axes[1], grid.axes[2]]
    canvas = np.zeros((len(fine), *grid.shape[1:]), np.float32)
    inner = body.lungs < -4
    for side in (-1, 1):
        part = inner & (grid.x * side > 0)
        for root in ((14.0, 12.0, 40.0), (-16.0, 22.0, 42.0)):
            root = np.array([root[0] * body.p.height, root[1], side * root[2] * body.p.width])
            points = scatter_jitter(part, grid.axes, rng)
            nodes, parent, order = anatomy.grow_tree(grid.unwarped(root[None])[0], points)
            radii = anatomy.murray_radii(parent, order, 0.42)
            k = np.array(order[1:])
            anatomy.draw_tubes(canvas, axes, nodes[parent[k]], nodes[k], radii[k], art_voxel(grid))
    return canvas.reshape(grid.shape[0], over, *grid.shape[1:]).mean(1)


def art_voxel(grid):
    return max(grid.spacing[1:])


def scatter_jitter(part, axes, rng):
    return anatomy.scatter(part, axes, 13.0, rng)


def scan(hu: np.ndarray, spacing, style: Style, rng: np.random.Generator) -> np.ndarray:
    """What the scanner makes of noise-free HU: point spread, slice profile, correlated noise, calibration, 12 bits."""
    sz, sy, sx = spacing
    psf = (style.thickness / np.sqrt(12) / sz, style.blur / sy, style.blur / sx)
    out = ndimage.gaussian_filter(hu, psf)
    noise = rng.standard_normal(hu.shape, np.float32)
    noise = ndimage.gaussian_filter(noise, (0.3, style.grain / sy, style.grain / sx))
    out += noise * (style.noise / noise.std()) + style.offset
    return np.clip(np.round(out), -1024, 3071).astype(np.float32)


def implant_lesions(
    ct: sitk.Image, lungs: sitk.Image, seed: int, *, severity: float = 0.12, crazy_paving: bool = False
):
    """Grow the same lesions in a real healthy CT: returns (ct, lesions) on its own grid."""
    hu = sitk.GetArrayFromImage(ct).astype(np.float32)
    inside = sitk.GetArrayFromImage(lungs) > 0
    rng = np.random.default_rng(seed)
    spacing = ct.GetSpacing()[::-1]
    growth = lesions.grow_lesions(inside, spacing, rng, severity=severity, crazy_paving=crazy_paving)
    base = np.float32(np.median(hu[inside]))
    new = lesions.fill_airspace(hu, base, growth)
    out = []
    for a in (new, growth.labels):
        image = sitk.GetImageFromArray(a)
        image.CopyInformation(ct)
        for key in ct.GetMetaDataKeys():
            image.SetMetaData(key, ct.GetMetaData(key))
        out.append(image)
    return tuple(out)
