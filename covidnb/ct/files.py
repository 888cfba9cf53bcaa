"""Volume files: the one error, what can be read and written, and whether a file is whole."""

import gzip
import math
import zlib
from pathlib import Path

import SimpleITK as sitk

READABLE = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr")
WRITABLE = (".nii", ".nii.gz", ".mha", ".nrrd")  # one file each, so that a write can be atomic


class CTError(ValueError):
    """A scan or mask that cannot be used; the message names the file and what to do about it."""


def suffix_of(path: Path, allowed: tuple[str, ...]) -> str:
    """Ending of a file's name, one of `allowed`; any other is a CTError."""
    for suffix in sorted(allowed, key=len, reverse=True):
        if path.name.lower().endswith(suffix):
            return suffix
    raise CTError(
        f"{path}: not a volume file that this course knows ({', '.join(allowed)}). "
        "For DICOM give the folder that holds the slices."
    )


def read_volume(path: Path) -> sitk.Image:
    """Read a whole 3-D volume file, or raise one CTError that says what is wrong with it."""
    if not path.exists():
        raise CTError(f"{path}: no such file. Check the path, or download it again.")
    if path.is_dir():
        raise CTError(f"{path}: a folder, where a volume file is needed ({', '.join(READABLE)}).")
    suffix_of(path, READABLE)
    if path.stat().st_size == 0:
        raise CTError(f"{path}: the file is empty. Copy or download it again.")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        check_volume(reader.GetSize(), reader.GetNumberOfComponents(), path)
        check_complete(path)
        return reader.Execute()
    except RuntimeError as error:
        raise CTError(
            f"{path}: cannot be read: damaged, cut short or not an image. Copy or download it again. "
            f"(ITK: {str(error).strip().splitlines()[-1]})"
        ) from None


def check_volume(size: tuple[int, ...], components: int, path: Path) -> None:
    """Refuse what is not one scalar 3-D volume; size is (x, y, z)."""
    if len(size) == 4:
        raise CTError(f"{path}: 4-D, {size}. Save one time point or channel as a 3-D volume and give that.")
    if len(size) != 3 or min(size) < 2:
        raise CTError(f"{path}: a 2-D image, {size}. Give the whole scan: at least two slices in one volume.")
    if components != 1:
        raise CTError(f"{path}: {components} values per voxel, a colour image. Give the scan itself.")


def check_complete(path: Path) -> None:
    """Refuse a NIfTI file that is shorter than its header says: ITK would fill the rest with zeros."""
    if suffix_of(path, READABLE) not in (".nii", ".nii.gz"):
        return  # the other formats' readers notice by themselves
    header = read_header(str(path))
    bits = math.prod(header.GetSize()) * int(header.GetMetaData("bitpix"))
    expected = int(float(header.GetMetaData("vox_offset"))) + bits // 8
    with path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    length = 0
    try:
        with gzip.open(path) if zipped else path.open("rb") as stream:
            while block := stream.read(1 << 22):
                length += len(block)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        length = 0  # the end is missing, or the checksum is wrong
    if length < expected:
        raise CTError(f"{path}: cut short or damaged. Copy or download it again.")


def read_header(path: str) -> sitk.ImageFileReader:
    """Reader that has read a file's header, and none of its voxels."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    reader.ReadImageInformation()
    return reader
