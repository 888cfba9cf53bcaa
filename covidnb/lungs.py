"""The lungs of a chest CT: by thresholds and anatomy with nothing to download, or by the network lungmask."""

from itertools import product

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from covidnb.ct import CTError

VOXEL = 1.5  # mm; finer scans are averaged to about this first: it costs 0.004 of Dice at most
AIR = -400.0  # HU; below it is gas or aerated lung: half-way from lung (-850) to soft tissue (50)
DENSE = -200.0  # HU; up to here ground glass is still told from fat (-100) and muscle (50)
BONE = 150.0  # HU; above it is bone or contrast medium, never lung
SMALLEST = 100.0  # ml; the smallest pocket of air that is taken for a lung

_SECTORS = 120  # directions in which the chest wall is sampled


class LungsNotFound(CTError):
    """The scan shows no lungs that the method can find; the message names what was looked for."""


def segment_lungs(image: sitk.Image, method: str = "threshold") -> sitk.Image:
    """Find both lungs, dense disease included, trachea and main bronchi left out.

    Parameters
    ----------
    image
        Chest CT in HU, in any orientation. The lungs must not touch its left, right, front or back border.
    method
        "threshold": thresholds, components and a repair of the pleura; nothing to download, a second or two.
        "lungmask": the U-Net R231 of Hofmanninger et al. (2020), if the package `lungmask` is installed and
        its weights are at hand.

    Returns
    -------
    SimpleITK.Image
        uint8, 1 in either lung, on `image`'s grid.

    Raises
    ------
    LungsNotFound
        No lungs in the scan.
    ModuleNotFoundError, covidnb.catalog.CatalogError
        The package lungmask, or its weights, are not here; the message says how to get them.
    """
    if method == "threshold":
        return _by_threshold(image)
    if method == "lungmask":
        return _by_lungmask(image)
    raise ValueError(f"segment_lungs: no method {method!r}; there are 'threshold' and 'lungmask'")


# ------------------------------------------------------------------------------------------ threshold


def _by_threshold(image: sitk.Image) -> sitk.Image:
    work = working_grid(image)
    hu = sitk.GetArrayViewFromImage(work)
    spacing = work.GetSpacing()[::-1]
    air = enclosed_air(hu)
    air &= ~airway(air, hu, spacing)
    lungs = lung_parts(air, hu, spacing)
    lungs |= dense_lung(lungs, hu, spacing)
    near = tuple(slice(max(s.start - 20, 0), s.stop + 20) for s in _box(lungs))  # the rest stays empty
    part, hu = lungs[near], hu[near]
    part = add_ground_glass(part, hu, spacing)
    part |= pleural_gaps(part, hu, spacing)
    lungs[near] = fill_enclosed(close_gaps(part, spacing), spacing)
    return on_grid_of(lungs, work, image)


def working_grid(image: sitk.Image) -> sitk.Image:
    """Turn a scan to LPS and average whole blocks of voxels so that none is much finer than `VOXEL`."""
    image = sitk.Cast(sitk.DICOMOrient(image, "LPS"), sitk.sitkFloat32)
    return sitk.BinShrink(image, [max(1, round(VOXEL / mm)) for mm in image.GetSpacing()])


def on_grid_of(mask: np.ndarray, work: sitk.Image, image: sitk.Image) -> sitk.Image:
    """Carry a mask (z, y, x) on the grid `work` to `image`'s grid: linear, cut at one half."""
    soft = sitk.GetImageFromArray(mask.astype(np.float32))
    soft.CopyInformation(work)
    # only the part of `image` that the mask reaches needs the interpolation
    z, y, x = _box(mask)
    corners = [
        image.TransformPhysicalPointToContinuousIndex(soft.TransformContinuousIndexToPhysicalPoint(corner))
        for corner in product(*([float(s.start - 1), float(s.stop)] for s in (x, y, z)))
    ]
    first = np.clip(np.floor(np.min(corners, axis=0)), 0, None).astype(int)
    last = np.minimum(np.ceil(np.max(corners, axis=0)) + 1, image.GetSize()).astype(int)
    part = sitk.Resample(
        soft,
        (last - first).tolist(),
        sitk.Transform(),
        sitk.sitkLinear,
        image.TransformIndexToPhysicalPoint(first.tolist()),
        image.GetSpacing(),
        image.GetDirection(),
    )
    whole = sitk.Image(image.GetSize(), sitk.sitkUInt8)
    whole.CopyInformation(image)
    return sitk.Paste(
        whole, sitk.BinaryThreshold(part, 0.5, 2.0), part.GetSize(), destinationIndex=first.tolist()
    )


def enclosed_air(hu: np.ndarray, threshold: float = AIR) -> np.ndarray:
    """Voxels below `threshold` HU that no path within their axial slice joins to the slice's border.

    hu is (z, y, x). Slice by slice, because from the first slice of a scan to its last the air around the
    patient is one piece with whatever an open end lets in.
    """
    parts, number = ndimage.label(hu < threshold, _IN_SLICE)
    outside = np.zeros(number + 1, bool)
    for border in (parts[:, 0], parts[:, -1], parts[:, :, 0], parts[:, :, -1]):
        outside[np.unique(border)] = True
    outside[0] = True
    return ~outside[parts]


def airway(air: np.ndarray, hu: np.ndarray, spacing) -> np.ndarray:
    """Trachea and main bronchi: a chain, 25 mm tall or more, of small areas of gas between the lungs.

    In an axial slice the trachea is an area of its own; further down so is each main bronchus until it opens
    into the lung. Works whichever end of the scan is the head. Arrays (z, y, x), spacing (z, y, x) in mm.
    """
    areas, number = ndimage.label(air, _IN_SLICE)
    mm2 = _sizes(areas, number) * spacing[1] * spacing[2]
    large = (mm2 >= 1200)[areas]  # a carina, both bronchi included, stays below 1000 mm2
    small, number = ndimage.label((mm2 > 20)[areas] & ~large)
    if not number or not large.any():
        return np.zeros_like(air)
    columns = np.flatnonzero(large.any((0, 1)))
    middle, width = columns.mean(), np.ptp(columns) + 1
    height = np.array([(z.stop - z.start) * spacing[0] for z, _, _ in ndimage.find_objects(small)])
    voxels = np.nonzero(small)
    chain = small[voxels] - 1
    sizes = np.bincount(chain)
    centre = np.bincount(chain, voxels[2]) / sizes
    mean_hu = np.bincount(chain, hu[voxels]) / sizes
    # bronchi hold gas alone (-1000) with a rim of wall; tips of lung that end between the lungs are denser
    tube = (height >= 25) & (np.abs(centre - middle) < 0.2 * width) & (mean_hu < -750)
    return np.concatenate([[False], tube])[small]


def lung_parts(air: np.ndarray, hu: np.ndarray, spacing) -> np.ndarray:
    """Those connected parts of `air` that are lung: the largest, and others of its kind or of its height.

    Parts that touch by less than 6 mm count as two, so that gas in the stomach does not ride along. Lung is
    told from gas by its vessels: a twentieth of it is above -850 HU.

    Raises
    ------
    LungsNotFound
        No part is large enough and has vessels.
    """
    core, number = ndimage.label(ndimage.binary_erosion(air, _disk(3, spacing)))
    ml = _sizes(core, number) * np.prod(spacing) / 1000
    boxes = ndimage.find_objects(core)
    lung, gas, height = np.zeros(number + 1, bool), np.zeros(number + 1, bool), 0.0
    for n in np.argsort(ml)[::-1]:
        if ml[n] < 1 or lung.any() and ml[n] < 0.01 * ml[lung].max():
            break
        box = boxes[n - 1]
        middle, top = np.percentile(hu[box][core[box] == n], (50, 95))
        tall = (box[0].stop - box[0].start) * spacing[0]
        if lung.any():
            lung[n] = middle > -940 and top > -850 or tall > 0.5 * height
        elif ml[n] >= SMALLEST and top > -850:
            lung[n], height = True, tall
        gas[n] = not lung[n]
    if not lung.any():
        raise LungsNotFound(
            f"no lungs in this scan: looked for a pocket of {SMALLEST:g} ml or more below {AIR:g} HU that is "
            "closed off from the air around the patient in every axial slice and holds vessels; the largest "
            f"pocket has {ml.max():.0f} ml. Give a chest CT in HU, with the lungs clear of its borders."
        )
    # back to the full width: the erosion took 3 mm, and narrow tips altogether
    within = air & ~ndimage.binary_dilation(gas[core], _disk(4.5, spacing))
    lungs = ndimage.binary_dilation(lung[core], _IN_SLICE, _steps(12, spacing), within)
    return ndimage.binary_dilation(lungs, ndimage.generate_binary_structure(3, 1), 2, within)


def dense_lung(lungs: np.ndarray, hu: np.ndarray, spacing) -> np.ndarray:
    """The other lung, where `lungs` lie on one side and the other side is too dense for `AIR`.

    Looks again with the threshold `DENSE`. Empty when both sides have lung, or there is nothing to find.
    """
    tissue = np.flatnonzero((hu > DENSE).any((0, 1)))
    middle = int(tissue.mean())
    right = lungs[:, :, :middle].mean() * middle / (lungs.mean() * lungs.shape[2])
    if 0.12 < right < 0.88:
        return np.zeros_like(lungs)
    air = enclosed_air(hu, DENSE) & ~ndimage.binary_dilation(lungs, _disk(4.5, spacing))
    air[:, :, middle:] &= right > 0.5
    air[:, :, :middle] &= right < 0.5
    try:
        return lung_parts(air & ~airway(air, hu, spacing), hu, spacing)
    except LungsNotFound:
        return np.zeros_like(lungs)


def add_ground_glass(lungs: np.ndarray, hu: np.ndarray, spacing) -> np.ndarray:
    """Grow the lungs by up to 30 mm within an axial slice into areas between `AIR` and `DENSE`.

    Only areas that are 6 mm wide somewhere count: the blurred rim of the lung, which has the same HU, does
    not. Slices are smoothed first, against noise.
    """
    sigma = [0, 1.5 / spacing[1], 1.5 / spacing[2]]
    dense = (ndimage.gaussian_filter(hu, sigma, truncate=2) < DENSE) & (hu > -600) & ~lungs
    dense = ndimage.binary_opening(dense, _disk(3, spacing))
    return ndimage.binary_dilation(lungs, _IN_SLICE, _steps(30, spacing), lungs | dense)


def close_gaps(lungs: np.ndarray, spacing, radius: float = 8.0) -> np.ndarray:
    """Close vessels, bronchi and dents narrower than 2 `radius` mm, slice by slice."""
    disk = _disk(radius, spacing)
    margin = [(0, 0), *((n // 2, n // 2) for n in disk.shape[1:])]
    closed = ndimage.binary_closing(np.pad(lungs, margin), disk)
    (top, _), (left, _) = margin[1:]
    return closed[:, top : top + lungs.shape[1], left : left + lungs.shape[2]]


def unrolled_pleura(lungs: np.ndarray, spacing) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The lungs' outer and inner surface as seen from an axis in front of the spine.

    Returns
    -------
    outer, inner
        Distance in mm of the lungs' last and first voxel along each direction, (z, 120): the directions run
        from front over right (-90 degrees), back (0) and left (90) to front. 0 where a ray meets no lung.
    distance, sector
        Of each pixel of a slice from the axis, in mm, and the number of its direction, both (y, x).
    """
    rows, columns = np.nonzero(lungs.any(0))
    y0 = rows.min() + 0.65 * np.ptp(rows)
    x0 = (columns.min() + columns.max()) / 2
    y, x = np.ogrid[: lungs.shape[1], : lungs.shape[2]]
    y, x = (y - y0) * spacing[1], (x - x0) * spacing[2]
    distance = np.hypot(y, x)
    sector = ((np.arctan2(x, y) / (2 * np.pi) + 0.5) * _SECTORS).astype(int) % _SECTORS
    z, y, x = np.nonzero(lungs)
    ray = z * _SECTORS + sector[y, x]
    outer, inner = np.zeros(len(lungs) * _SECTORS), np.full(len(lungs) * _SECTORS, np.inf)
    np.maximum.at(outer, ray, distance[y, x])
    np.minimum.at(inner, ray, distance[y, x])
    inner[np.isinf(inner)] = 0
    return outer.reshape(-1, _SECTORS), inner.reshape(-1, _SECTORS), distance, sector


def pleural_gaps(lungs: np.ndarray, hu: np.ndarray, spacing) -> np.ndarray:
    """What is missing between the lungs and the chest wall: consolidation that reaches the ribs.

    Seen from an axis in front of the spine the chest wall is smooth from slice to slice. A dent of
    consolidation in it is a valley along z, with aerated lung on the wall above and below: valleys up to
    100 mm tall and 60 mm deep are levelled to the wall around them. Bone is left out.
    """
    outer, inner, distance, sector = unrolled_pleura(lungs, spacing)
    angle = np.abs((np.arange(_SECTORS) + 0.5) * 360 / _SECTORS - 180)  # from the back
    ribs = (angle > 25) & (angle < 130)  # not the spine, and not where the heart lies on the front wall
    tall = 2 * int(50 / spacing[0]) + 1
    level = ndimage.grey_closing(np.pad(outer, ((tall, tall), (0, 0))), (tall, 1))[tall:-tall]
    dent = (level > outer + 6) & ribs
    if not dent.any():
        return np.zeros_like(lungs)
    seen = outer > 0
    wall = _along_z(outer, seen & ~ndimage.binary_dilation(dent), dent)
    start = np.where(seen, outer, _along_z(inner, seen, dent & ~seen))
    dent &= (wall > start) & (wall < start + 60)
    start[~dent], wall[~dent] = np.inf, 0
    return (distance > start[:, sector]) & (distance <= wall[:, sector]) & ~lungs & (hu < BONE)


def fill_enclosed(lungs: np.ndarray, spacing) -> np.ndarray:
    """Fill holes: those that the lungs enclose from all sides, and in a slice those of up to 6 cm2.

    Larger holes in a slice are the domes of the diaphragm. The ends of the scan count as open.
    """
    around = np.pad(~lungs, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    areas, number = ndimage.label(around, _IN_SLICE)
    around &= (_sizes(areas, number) * spacing[1] * spacing[2] > 600)[areas]
    parts, number = ndimage.label(around)
    is_open = np.zeros(number + 1, bool)
    is_open[np.unique(parts[[0, -1]])] = True
    return ~(is_open[parts] & around)[:, 1:-1, 1:-1]


_IN_SLICE = ndimage.generate_binary_structure(3, 1)
_IN_SLICE[[0, 2]] = False  # neighbours in the axial slice alone


def _box(mask: np.ndarray) -> tuple[slice, slice, slice]:
    """Bounding box of a mask that is not empty."""
    return ndimage.find_objects(mask.astype(np.uint8))[0]


def _sizes(parts: np.ndarray, number: int) -> np.ndarray:
    """Voxels of each component; 0 for the background."""
    sizes = np.bincount(parts.ravel(), minlength=number + 1)
    sizes[0] = 0
    return sizes


def _steps(mm: float, spacing) -> int:
    return max(1, round(mm / spacing[1]))


def _disk(mm: float, spacing) -> np.ndarray:
    """A disk in the axial plane as a structure (1, y, x): radius `mm`, at least one pixel."""
    ry, rx = (max(mm / s, 1) for s in spacing[1:])
    y, x = np.ogrid[-int(ry) : int(ry) + 1, -int(rx) : int(rx) + 1]
    return ((y / ry) ** 2 + (x / rx) ** 2 <= 1)[None]


def _along_z(values: np.ndarray, known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`values` (z, directions) with the `wanted` cells linear along z between the `known`; else 0."""
    values = np.where(wanted, 0, values)
    for column in np.flatnonzero(wanted.any(0) & known.any(0)):
        at, to = (np.flatnonzero(cells[:, column]) for cells in (known, wanted))
        values[to, column] = np.interp(to, at, values[at, column])
    return values


# ------------------------------------------------------------------------------------------ lungmask


def _by_lungmask(image: sitk.Image) -> sitk.Image:
    try:
        from lungmask import LMInferer
    except ImportError:
        raise ModuleNotFoundError(
            "segment_lungs: method='lungmask' needs the package lungmask, which is not installed: "
            "pip install lungmask (it uses the torch that is here), or take method='threshold'"
        ) from None
    from covidnb.catalog import fetch  # only this method has anything to fetch

    weights = fetch("lungmask-r231")
    labels = LMInferer(modelpath=str(weights), tqdm_disable=True).apply(image)
    lungs = sitk.GetImageFromArray((labels > 0).astype(np.uint8))
    lungs.CopyInformation(image)
    if not labels.any():
        raise LungsNotFound("no lungs in this scan: lungmask's R231 found none. Give a chest CT in HU.")
    return lungs
