"""DICOM series: one file per slice, sorted and checked by position when read, written as a scanner does."""

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from covidnb.ct.files import CTError, check_volume, read_header
from covidnb.files import whole_folder


def read_series(folder: Path, series: str | None) -> sitk.Image:
    """Read one DICOM series, its rescale slope and intercept applied, its slices sorted by position.

    Parameters
    ----------
    folder
        Holds the slices, of one series or several.
    series
        The SeriesInstanceUID to read; None where there is one alone.

    Raises
    ------
    CTError
        There is none, several to choose from, or one with a damaged or missing slice.
    """
    found = {
        uid: sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)
        for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    }
    listed = {Path(file).name for files in found.values() for file in files}
    for path in sorted(folder.iterdir()):
        # GDCM passes over a slice that it cannot read: at either end of the scan no gap would tell
        if path.name not in listed and path.name != "DICOMDIR" and path.is_file() and _is_dicom(path):
            raise CTError(f"{path}: this DICOM file is cut short or damaged. Copy or export it again.")
    if not found:
        raise CTError(
            f"{folder}: no DICOM slices in this folder. Give the folder that holds them directly, or a file."
        )
    if series is None and len(found) > 1 or series is not None and series not in found:
        listing = "\n".join(f"  {uid}: {_describe_series(files)}" for uid, files in found.items())
        raise CTError(
            f"{folder}: which DICOM series? Say read_ct(path, series=UID) with one of these:\n{listing}"
        )
    files = found[series if series is not None else next(iter(found))]
    try:
        # an enhanced CT keeps all its slices, and their positions, in one file
        image = sitk.ReadImage(_sorted_by_position(files, folder) if len(files) > 1 else files[0])
    except RuntimeError as error:
        raise CTError(
            f"{folder}: the DICOM series cannot be read: a slice is damaged, lacks its position or has "
            f"another size. Export the series again. (ITK: {str(error).strip().splitlines()[-1]})"
        ) from None
    check_volume(image.GetSize(), image.GetNumberOfComponentsPerPixel(), folder)
    return image


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _describe_series(files: tuple[str, ...]) -> str:
    header = read_header(files[0])
    name = header.GetMetaData("0008|103e").strip() if header.HasMetaDataKey("0008|103e") else "no description"
    return f"{len(files)} slices, {name}"


def _sorted_by_position(files: tuple[str, ...], folder: Path) -> list[str]:
    """Sort slices along their normal; refuse a gap, a doubled slice or a tilted gantry."""
    headers = [read_header(file) for file in files]
    cosines = np.array(headers[0].GetMetaData("0020|0037").split("\\"), float)  # of rows, then columns
    positions = np.array([header.GetMetaData("0020|0032").split("\\") for header in headers], float)
    normal = np.cross(cosines[:3], cosines[3:])
    order = np.argsort(positions @ normal)
    along = positions[order] @ normal  # mm
    steps = np.diff(along)
    usual = float(np.median(steps))
    if usual == 0:
        raise CTError(
            f"{folder}: most slices lie in the same place as another. Keep one acquisition per folder."
        )
    for i in np.flatnonzero(np.abs(steps - usual) > 0.1 * usual):
        here = f"{along[i]:.1f} and {along[i + 1]:.1f} mm on the slice axis, where the step is {usual:.3g} mm"
        if steps[i] > usual:
            raise CTError(f"{folder}: a slice is missing between {here}. Export all slices of the series.")
        raise CTError(f"{folder}: slices too close, at {here}. Keep one acquisition per folder.")
    shift = np.linalg.norm(np.diff(positions[order], axis=0) - np.outer(steps, normal), axis=1).max()
    if shift > 0.02 * usual:
        raise CTError(
            f"{folder}: tilted gantry: each slice is shifted by {shift:.2g} mm against the one before, and a "
            "regular grid cannot hold that. Convert it with a tool that untilts it, such as dcm2niix."
        )
    return [files[i] for i in order]


def write_series(
    image: sitk.Image, folder: str | Path, *, uid: str = "2.25.2020", name: str = "chest"
) -> Path:
    """Write a scan in HU as a scanner does: one DICOM file per slice, unsigned integers and an intercept.

    Parameters
    ----------
    image
        HU from -1024 to 64511, rounded to whole numbers.
    folder
        Made, with slice_000.dcm and so on from foot to head. It appears complete or not at all.
    uid, name
        SeriesInstanceUID and SeriesDescription.

    Raises
    ------
    CTError
        The folder exists, or the HU do not fit.
    OSError
        A slice cannot be written, for example because the disk is full. Nothing is left behind.
    """
    folder = Path(folder)
    values = sitk.GetArrayViewFromImage(image)
    if folder.exists():
        raise CTError(f"{folder}: exists. Give a new folder, so that no two series mix.")
    if values.min() < -1024 or values.max() > 64511:
        raise CTError(
            f"{folder}: HU from {values.min():g} to {values.max():g} do not fit: clip them to -1024."
        )
    direction = image.GetDirection()
    tags = {
        "0008|0016": "1.2.840.10008.5.1.4.1.1.2",  # CT Image Storage
        "0008|0060": "CT",
        "0008|103e": name,
        "0020|000d": f"{uid}.0",  # study
        "0020|000e": uid,
        "0020|0037": _decimals(direction[0::3] + direction[1::3]),  # of the rows, of the columns
        "0028|0100": "16",  # bits: allocated, stored, the highest; and unsigned
        "0028|0101": "16",
        "0028|0102": "15",
        "0028|0103": "0",
        "0028|1052": "-1024",  # rescale intercept
        "0028|1053": "1",  # rescale slope
    }
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    with whole_folder(folder) as part:
        for k in range(image.GetDepth()):
            piece = sitk.Cast(sitk.Round(image[:, :, k]), sitk.sitkFloat64)  # the writer takes HU from floats
            own = {
                "0008|0018": f"{uid}.{k + 1}",
                "0020|0013": str(k + 1),
                "0020|0032": _decimals(image.TransformIndexToPhysicalPoint((0, 0, k))),
            }
            for tag, value in (tags | own).items():
                piece.SetMetaData(tag, value)
            writer.SetFileName(str(part / f"slice_{k:03d}.dcm"))
            try:
                writer.Execute(piece)
            except RuntimeError as fault:
                raise OSError(f"{folder}: could not be written: is the disk full?") from fault
    return folder


def _decimals(values: tuple[float, ...]) -> str:
    """DICOM decimal strings, of at most 16 characters each."""
    return "\\".join(f"{value:.10g}" for value in values)
