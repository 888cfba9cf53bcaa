"""The course's embedded data: a seeded digital chest CT with known lungs, vessels, GGO and consolidation.

`chest()` with its default arguments is the patient that the whole book follows. `implant_lesions` grows the
same lesions in a real healthy CT.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from covidnb.phantom import lungs as _lungs
from covidnb.phantom.body import ANATOMY, Body, Patient
from covidnb.phantom.lesions import CONSOLIDATION, GGO, Disease, Growth, grow
from covidnb.phantom.lungs import VESSEL_HU
from covidnb.phantom.paint import Painter
from covidnb.phantom.scanner import STYLES, Style, scan

__all__ = ["ANATOMY", "CONSOLIDATION", "GGO", "STYLES", "Phantom", "Style", "chest", "implant_lesions"]

FIELD_OF_VIEW = (318.0, 380.0, 380.0)  # mm, (z, y, x): what `shape` divides when no spacing is given

SERIES = 158  # of the possible series of patients, one whose number 2020 makes a good running case


class Phantom(NamedTuple):
    """One patient on one grid (LPS): `ct` in HU (float32) and, as uint8, `lungs` 0/1, `lesions` 0, 1 = GGO,
    2 = consolidation, and `anatomy`, numbered as in `ANATOMY`. The lungs hold their vessels and bronchi."""

    ct: sitk.Image
    lungs: sitk.Image
    lesions: sitk.Image
    anatomy: sitk.Image


def chest(
    seed: int = 2020,
    *,
    kind: str = "covid",
    shape=(72, 224, 224),
    spacing=None,
    style: str = "standard",
    severity: float | None = None,
    crazy_paving: bool | None = None,
) -> Phantom:
    """A digital chest CT; the same arguments give the same voxels.

    Parameters
    ----------
    seed : the patient, the disease and the noise.
    kind : "covid", or "healthy": the same patient and noise without the lesions.
    shape, spacing : voxels and mm, both (z, y, x); without a spacing the grid covers 318 x 380 x 380 mm.
    style : a scanner of `STYLES`.
    severity : infected share of the lungs, 0 to 0.6, at random when not given.
    crazy_paving : whether septa are thickened in the ground glass, at random when not given.

    Raises ValueError for an argument out of range, naming it.
    """
    shape, spacing = _grid_arguments(shape, spacing)
    if kind not in ("covid", "healthy"):
        raise ValueError(f"kind={kind!r}: a chest is 'covid' or 'healthy'")
    if style not in STYLES:
        raise ValueError(f"style={style!r}: there is {', '.join(repr(s) for s in STYLES)}")
    _check_severity(severity)
    patient_rng, lung_rng, disease_rng, noise_rng = _streams(seed)
    patient = Patient.draw(patient_rng)
    body = Body(patient, patient.grid(shape, spacing))
    art = Painter(body)
    inside = _lungs.interior(body, lung_rng)
    mask = body.lungs < 0
    if not mask.any():
        raise ValueError(
            f"shape={shape}, spacing={spacing}: no lung in the field of view; cover more of the chest"
        )
    lesions = np.zeros(shape, np.uint8)
    airspace = inside.parenchyma
    if kind == "covid":
        growth = grow(
            mask * body.lobes, spacing, disease_rng, Disease.draw(disease_rng, severity, crazy_paving)
        )
        airspace, lesions = growth.fill(airspace), growth.labels
    mask = _lungs.aerate(body, art.hu, art.labels, inside, _lungs.tissue(inside, airspace))
    ct = scan(art.hu, spacing, STYLES[style], noise_rng)
    arrays = (ct, mask.astype(np.uint8), lesions * mask, art.labels)
    return Phantom(*(_image(a, body.grid) for a in arrays))


def implant_lesions(
    ct: sitk.Image,
    lungs: sitk.Image,
    seed: int = 2020,
    *,
    severity: float | None = None,
    crazy_paving: bool | None = None,
) -> tuple[sitk.Image, sitk.Image]:
    """Grow the phantom's lesions in a real healthy CT.

    Parameters
    ----------
    ct : HU, LPS, as `covidnb.ct.read_ct` returns it; lungs : mask on the same grid.
    seed, severity, crazy_paving : as in `chest`.

    Returns the new CT (float32) and the lesions (uint8: 0, 1 = GGO, 2 = consolidation), both with the ct's
    geometry and metadata. Vessels and the scan's own noise stay; no voxel outside the lungs changes. Raises
    ValueError where the grids differ, the lungs are empty, or the image is not LPS.
    """
    _check_severity(severity)
    for what, of in (
        ("size", sitk.Image.GetSize),
        ("spacing", sitk.Image.GetSpacing),
        ("origin", sitk.Image.GetOrigin),
    ):
        if len(of(ct)) != 3 or not np.allclose(of(ct), of(lungs), atol=1e-3):
            raise ValueError(
                f"lungs: {what} {of(lungs)}, but the ct has {of(ct)}; give the mask on the ct's grid"
            )
    orientation = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(ct.GetDirection())
    if orientation != "LPS":
        raise ValueError(
            f"ct: oriented {orientation}; read it with covidnb.ct.read_ct, which turns it to LPS"
        )
    inside = sitk.GetArrayViewFromImage(lungs) > 0
    if not inside.any():
        raise ValueError("lungs: the mask is empty; segment the lungs first (covidnb.lungs.segment_lungs)")
    hu = sitk.GetArrayFromImage(ct).astype(np.float32)
    spacing = ct.GetSpacing()[::-1]
    rng = _streams(seed)[2]
    growth = grow(inside, spacing, rng, Disease.draw(rng, severity, crazy_paving))
    box = ndimage.find_objects((growth.part > 0).astype(np.uint8))
    if box:
        box = box[0]
        local = Growth(*(a[box] for a in growth))
        hu[box] += _added(hu, inside, box, local, spacing) * inside[box]
    images = []
    for array in (hu, growth.labels):
        image = sitk.GetImageFromArray(array)
        image.CopyInformation(ct)
        for key in ct.GetMetaDataKeys():
            image.SetMetaData(key, ct.GetMetaData(key))
        images.append(image)
    return tuple(images)


def _added(hu, inside, box, growth: Growth, spacing):
    """HU that lesions add to a scan within a box: airspace is filled, vessels and the scan's noise stay."""
    air = np.argwhere(inside & (hu < -650))[::17]
    if not len(air):
        raise ValueError("ct: no aerated lung (below -650 HU) inside the mask; is it in HU?")
    # the healthy parenchyma, darker in front than behind
    plane = np.linalg.lstsq(np.c_[air, np.ones(len(air))], hu[tuple(air.T)], rcond=None)[0]
    z, y, x = np.ogrid[box]
    airspace = (plane[0] * z + plane[1] * y + plane[2] * x + plane[3]).astype(np.float32)
    blur = [0.0, *(max(0.8 / s, 0.8) for s in spacing[1:])]  # voxels: noise goes, vessels stay
    smooth = ndimage.gaussian_filter(hu[box], blur)
    solid = np.clip((smooth - airspace) / (VESSEL_HU - airspace), 0, 1)
    filled = growth.hu + solid * (VESSEL_HU - growth.hu)
    return ndimage.gaussian_filter(growth.part * np.maximum(filled - smooth, 0), blur)


def _streams(seed: int) -> list[np.random.Generator]:
    """A generator each for patient, lungs, disease and noise: none depends on another."""
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed={seed!r}: give a whole number, 0 or more")
    return [np.random.default_rng(s) for s in np.random.SeedSequence((int(seed), SERIES)).spawn(4)]


def _grid_arguments(shape, spacing):
    shape = tuple(shape)
    if len(shape) != 3 or not all(isinstance(n, int | np.integer) and 16 <= n <= 1024 for n in shape):
        raise ValueError(f"shape={shape}: give three whole numbers (z, y, x) from 16 to 1024")
    if spacing is None:
        return shape, tuple(f / n for f, n in zip(FIELD_OF_VIEW, shape, strict=True))
    spacing = tuple(float(s) for s in spacing)
    if len(spacing) != 3 or not all(0.25 <= s <= 25 for s in spacing):
        raise ValueError(f"spacing={spacing}: give three lengths (z, y, x) from 0.25 to 25 mm")
    return shape, spacing


def _check_severity(severity):
    if severity is not None and not 0 <= severity <= 0.6:
        raise ValueError(f"severity={severity}: the infected share of the lungs is from 0 to 0.6")


def _image(array: np.ndarray, grid) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(grid.spacing[::-1])
    image.SetOrigin([float(a[0]) for a in grid.axes[::-1]])
    return image
