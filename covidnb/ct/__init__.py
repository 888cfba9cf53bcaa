"""CT in: scans and masks as SimpleITK images, oriented by their header to LPS, in Hounsfield units."""

import json
import math
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from covidnb.ct.dicom import read_series, write_series
from covidnb.ct.files import READABLE, WRITABLE, CTError, check_complete, read_volume, suffix_of
from covidnb.files import whole

__all__ = [
    "READABLE",
    "WINDOWS",
    "WRITABLE",
    "CTError",
    "check_same_grid",
    "read_ct",
    "read_mask",
    "window",
    "write_like",
    "write_series",
]

# Display windows, name -> (low, high) in HU. "lung" is the range that GASNet clips to.
WINDOWS = {
    "lung": (-1250.0, 250.0),
    "mediastinum": (-160.0, 240.0),
    "bone": (-450.0, 1050.0),
    "wide": (-1024.0, 1024.0),
}

_GRID_KEY = "covidnb_file_grid"  # metadata of an image from read_ct: the geometry its file had


def read_ct(
    path: str | Path, *, series: str | None = None, stored_window: tuple[float, float] | None = None
) -> sitk.Image:
    """Read one CT scan as float32 HU, its axes turned by the header to LPS (left, posterior, superior).

    Parameters
    ----------
    path
        A folder that holds one DICOM series, or a NIfTI, MHA, MHD or NRRD file.
    series
        The SeriesInstanceUID to read from a DICOM folder that holds several.
    stored_window
        (low, high) in HU: the window in which an 8-bit or normalised volume was stored. Its values, 0 to 255,
        0 to 1 or -1 to 1, are mapped back onto that window. Leave it out for a file that holds HU.

    Returns
    -------
    SimpleITK.Image
        Array (z, y, x): x grows to the patient's left, y to the back, z to the head. It remembers the grid of
        its file, so that `write_like` can put a result back there.

    Raises
    ------
    CTError
        The file is missing, damaged, no volume, constant or holds NaN, the folder holds several series or a
        series with a gap, or the values are not HU and `stored_window` was not given.
    """
    path = Path(path)
    if path.is_dir():
        image = read_series(path, series)
    elif series is not None:
        raise CTError(f"{path}: series= chooses from a DICOM folder, and this is not a folder: leave it out.")
    else:
        image = read_volume(path)
    low, high = _value_range(image, path)
    if low == high:
        raise CTError(f"{path}: every voxel is {low:g}: an empty export. Export or download the scan again.")
    if stored_window is not None:
        image = _undo_window(image, stored_window, path)
    else:
        _check_hu(image, path)
    return _to_lps(sitk.Cast(image, sitk.sitkFloat32))


def read_mask(path: str | Path, like: sitk.Image) -> sitk.Image:
    """Read a label mask that belongs to the scan `like`, as uint8 on exactly its grid.

    The file may lie in another axis order than the scan's file: its header is what counts. Corners may differ
    by a twentieth of a voxel, which is what float32 headers and rounded spacings amount to.

    Raises
    ------
    CTError
        The file is missing, damaged, no volume, has another size or grid than `like`, or values other than
        whole numbers from 0 to 255.
    """
    path = Path(path)
    mask = read_volume(path)
    low, high = _value_range(mask, path)
    values = sitk.GetArrayViewFromImage(mask)
    if low < 0 or high > 255 or (values.dtype.kind == "f" and not np.array_equal(values, np.rint(values))):
        raise CTError(
            f"{path}: a mask holds whole numbers from 0 to 255, this file runs from {low:g} to {high:g}. "
            "Give the label file, not the scan or a probability map."
        )
    mask = sitk.Cast(_to_lps(mask), sitk.sitkUInt8)
    check_same_grid(mask, like, str(path))
    mask = sitk.GetImageFromArray(sitk.GetArrayViewFromImage(mask))
    mask.CopyInformation(like)
    return mask


def write_like(result: np.ndarray | sitk.Image, image: sitk.Image, path: str | Path) -> Path:
    """Write a mask or volume that lies on `image`'s grid.

    For an image from `read_ct` it is written in the grid that the scan's own file had. The file appears
    complete or not at all. Booleans and integers from 0 to 255 become uint8, everything else float32.

    Parameters
    ----------
    result
        Array (z, y, x) or image on `image`'s grid.
    image
        The scan that the result belongs to.
    path
        Ends in .nii, .nii.gz, .mha or .nrrd.

    Raises
    ------
    CTError
        Unknown ending, or `result` does not lie on `image`'s grid.
    OSError
        The file cannot be written, for example because the disk is full. Nothing is left behind.
    """
    path = Path(path)
    suffix_of(path, WRITABLE)
    if isinstance(result, sitk.Image):
        check_same_grid(result, image, "the result to write")
        result = sitk.GetArrayFromImage(result)  # a view would not keep a temporary image alive
    if result.shape != image.GetSize()[::-1]:
        raise CTError(
            f"{path}: the array is {result.shape} (z, y, x), the scan is {image.GetSize()[::-1]}. "
            "Resample or invert the crop first."
        )
    is_label = result.dtype.kind in "bui" and result.min() >= 0 and result.max() <= 255
    out = sitk.GetImageFromArray(result.astype(np.uint8 if is_label else np.float32, copy=False))
    out.CopyInformation(image)
    out = _to_file_grid(out, image)
    with whole(path) as part:
        try:
            sitk.WriteImage(out, str(part), useCompression=True)
            check_complete(part)  # ITK's NIfTI writer does not notice a full disk
        except (RuntimeError, CTError) as fault:
            raise OSError(f"{path}: could not be written: is the disk full, or the folder locked?") from fault
    return path


def window(hu: np.ndarray | sitk.Image, low: float, high: float) -> np.ndarray:
    """Map [low, high] HU linearly onto [0, 1] and clip: float32, same shape as the array."""
    if not low < high:
        raise ValueError(f"window: low must be below high, not {low:g} and {high:g} HU")
    if isinstance(hu, sitk.Image):
        hu = sitk.GetArrayFromImage(hu)
    return np.clip((np.asarray(hu, np.float32) - low) / (high - low), 0.0, 1.0, dtype=np.float32)


# ---------------------------------------------------------------------------------------------- values


def _value_range(image: sitk.Image, path: Path) -> tuple[float, float]:
    values = sitk.GetArrayViewFromImage(image)
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(low + high):
        raise CTError(
            f"{path}: holds NaN or infinite voxels. Replace them at the source (padding is -1024 HU)."
        )
    return low, high


def _check_hu(image: sitk.Image, path: Path) -> None:
    """Refuse values that cannot be HU, by the two anchors of the scale: gas near -1000 and tissue near 0.

    In HU every scan that shows some lung has two groups of voxels: gas in and around the body, and soft
    tissue, fat and blood within 200 HU of water. A chest cropped to the lungs keeps both. Whatever was scaled
    to 8 bits, to [0, 1] or stretched, or has lost its rescale intercept, misses one of the two.
    """
    step = max(1, round((image.GetNumberOfPixels() / 1e6) ** (1 / 3)))  # a million voxels tell as much as all
    voxels = sitk.GetArrayViewFromImage(image)[::step, ::step, ::step]
    low, high = voxels.min(), voxels.max()
    voxels = voxels[(voxels > -1500) & (voxels < 3500)]  # without padding (-2000, -3024) and metal
    gas, tissue = voxels[voxels < -500], voxels[voxels >= -500]
    if min(gas.size, tissue.size) >= 0.01 * voxels.size > 0:
        gas_hu, tissue_hu = np.median(gas), np.median(tissue)
        if -1100 < gas_hu < -650 and -200 < tissue_hu < 200:
            return
        found = f"its gas lies at {gas_hu:.0f} and its tissue at {tissue_hu:.0f}: contrast-stretched values"
    elif low >= 0 and high <= 255:
        found = f"its values run from {low:g} to {high:g}: an 8-bit picture or normalised values"
    elif high - low <= 20:
        found = f"its values run from {low:g} to {high:g}: normalised values"
    elif low >= 0:
        found = f"its values run from {low:g} to {high:g}: stored values without their rescale intercept"
    else:
        share = gas.size / max(voxels.size, 1)
        found = f"{share:.1%} of its values lie between -1500 and -500, and a chest is part air, part tissue"
    raise CTError(
        f"{path}: not in Hounsfield units: {found}. In HU air is -1000 and water 0 in every scan: "
        "thresholds, windows and trained networks rely on it. Go back to the DICOM series or to a file that "
        "kept HU. If you know the window this file was stored in, say so: "
        "read_ct(path, stored_window=(-1250, 250))."
    )


def _undo_window(image: sitk.Image, stored_window: tuple[float, float], path: Path) -> sitk.Image:
    """Map stored values (0 to 255, 0 to 1 or -1 to 1) back onto the HU window they were stored in."""
    low_hu, high_hu = map(float, stored_window)
    if not low_hu < high_hu:
        raise CTError(f"{path}: stored_window is (low, high) in HU, low below high, not {stored_window}.")
    low, high = _value_range(image, path)
    eight_bit = image.GetPixelID() == sitk.sitkUInt8
    for first, last in [(0, 1), (-1, 1), (0, 255)]:
        if first <= low and high <= last and (last == 255 or not eight_bit):
            scale = (high_hu - low_hu) / (last - first)
            return sitk.ShiftScale(
                image, shift=low_hu / scale - first, scale=scale, outputPixelType=sitk.sitkFloat64
            )
    raise CTError(
        f"{path}: stored_window is for values from 0 to 255, 0 to 1 or -1 to 1; this file has {low:g} to "
        f"{high:g}. If it holds HU, leave stored_window out."
    )


# ---------------------------------------------------------------------------------------------- grids


def _to_lps(image: sitk.Image) -> sitk.Image:
    """Permute and flip the axes to LPS and note the geometry that the file had."""
    oriented = sitk.DICOMOrient(image, "LPS")
    grid = {"size": image.GetSize(), "origin": image.GetOrigin(), "direction": image.GetDirection()}
    oriented.SetMetaData(_GRID_KEY, json.dumps(grid))
    return oriented


def _to_file_grid(out: sitk.Image, image: sitk.Image) -> sitk.Image:
    """Turn `out`, on `image`'s grid, back to the axes of the file that `image` was read from."""
    if not image.HasMetaDataKey(_GRID_KEY):
        return out
    grid = json.loads(image.GetMetaData(_GRID_KEY))
    orientation = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(grid["direction"])
    out = sitk.DICOMOrient(out, orientation)
    same_place = np.allclose(out.GetOrigin(), grid["origin"], atol=1e-6)
    if same_place and list(out.GetSize()) == grid["size"]:  # not so if the image was cropped since
        out.SetOrigin(grid["origin"])  # to the last digit: flipping there and back rounds
        out.SetDirection(grid["direction"])
    return out


def _corners(image: sitk.Image) -> np.ndarray:
    """Positions in mm of the eight corner voxels, (8, 3)."""
    ends = np.array(image.GetSize()) - 1
    return np.array([image.TransformIndexToPhysicalPoint((ends * c).tolist()) for c in np.ndindex(2, 2, 2)])


def check_same_grid(image: sitk.Image, like: sitk.Image, what: str) -> None:
    """Refuse an image that does not lie on `like`'s grid with a CTError that calls it `what`."""
    if image.GetSize() != like.GetSize():
        raise CTError(
            f"{what}: {image.GetSize()} voxels (x, y, z), the scan has {like.GetSize()}. Use the mask of "
            "this very scan, or resample it to the scan first."
        )
    apart = np.linalg.norm(_corners(image) - _corners(like), axis=1).max()
    if apart > 0.05 * min(like.GetSpacing()):
        raise CTError(
            f"{what}: lies up to {apart:.3g} mm off the scan's grid (another origin, spacing or direction). "
            "Use the mask of this very scan, or resample it to the scan first."
        )
