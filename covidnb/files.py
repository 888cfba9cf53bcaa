"""Files and folders that are whole or not there, and the order of their names.

The one place that writes through a temporary name.
"""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it to `path` only if the block ends well.

    The temporary name keeps the suffixes (SimpleITK and Pillow choose the format by them). Where the
    block raises, a full disk included, the temporary file is removed and an older `path` stays as it was.

    Parameters
    ----------
    path : str or Path
        Where the file shall be; missing parent folders are made.

    Raises
    ------
    OSError
        Naming `path` where the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        yield part
        with open(part, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(part, path)
    except OSError as fault:
        if fault.errno != errno.ENOSPC:
            raise
        raise OSError(errno.ENOSPC, f"no room to write {path}: free some space and start again") from fault
    finally:
        with suppress(FileNotFoundError):
            part.unlink()


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`; rename it to `path` only if the block ends well, else remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".part-{path.name}-", dir=path.parent))
    try:
        yield part
        part.chmod(0o755)  # mkdtemp's own mode shuts other users out
        try:
            part.rename(path)
        except OSError:
            if not path.is_dir():  # another process may have been quicker: its folder is as good
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def natural_order(name: str) -> list:
    """Sort key that puts slice 2 before slice 10."""
    return [int(piece) if k % 2 else piece for k, piece in enumerate(re.split(r"(\d+)", name))]
