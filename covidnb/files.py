"""Files that are whole or not there, and the order of their names.

The one place that writes through a temporary name.
"""

import errno
import os
import re
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


def natural_order(name: str) -> list:
    """Sort key that puts slice 2 before slice 10."""
    return [int(piece) if k % 2 else piece for k, piece in enumerate(re.split(r"(\d+)", name))]
