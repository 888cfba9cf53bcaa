"""`python -m covidnb.volumes IN_FOLDER OUT_FOLDER --jobs N`: scans to volumes cropped to the lungs."""

import argparse
import sys

from covidnb.crop import SIZE
from covidnb.volumes import VolumeError
from covidnb.volumes.prepare import prepare


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line: 0, or 1 where some scans failed, or 2 where there is nothing to do."""
    parser = argparse.ArgumentParser(
        prog="python -m covidnb.volumes",
        description="Cut the lungs out of every scan of a folder, for GASNet. Started again, it goes on.",
    )
    parser.add_argument(
        "scans", help="folder with images/ (and lung/, lesion/), NAME_ct files, or scans alone"
    )
    parser.add_argument("out", help="folder for images/, lung/, lesion/ and crop/")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes, each on one core")
    parser.add_argument("--size", type=int, nargs=3, default=SIZE, metavar=("D", "H", "W"), help="in voxels")
    parser.add_argument("--method", default="threshold", choices=("threshold", "lungmask"), help="for lungs")
    parser.add_argument(
        "--stored-window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="HU window of 8-bit volumes"
    )
    asked = parser.parse_args(arguments)
    if asked.jobs < 1:
        parser.error("--jobs: at least 1")
    try:
        result = prepare(
            asked.scans,
            asked.out,
            size=tuple(asked.size),
            method=asked.method,
            stored_window=asked.stored_window,
            jobs=asked.jobs,
        )
    except (VolumeError, OSError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    print(f"{len(result.done)} prepared, {len(result.kept)} there already, {len(result.failed)} failed")
    for name, reason in result.failed.items():
        print(f"  {name}: {reason}")
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main())
