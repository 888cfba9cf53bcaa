"""Scans to volumes: seconds a scan on one core, and what a second process brings.

The registry's chest CT (512 x 512 x 133), its lungs segmented by thresholds, cropped to 40 x 160 x 160, as
many copies as asked for. Bind the process to one core for the first figure: taskset -c 0.

    python benchmarks/prepare.py --scans 8 --jobs 2
"""

import argparse
import tempfile
import time

from covidnb import catalog
from covidnb.volumes import ScanFiles
from covidnb.volumes.prepare import prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scans", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=1)
    asked = parser.parse_args()
    ct = catalog.fetch("chest-ct") / "cxr.nii.gz"
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        result = prepare([ScanFiles(f"scan{k}", ct) for k in range(asked.scans)], folder, jobs=asked.jobs)
        seconds = time.perf_counter() - started
    if result.failed:
        raise SystemExit(str(result.failed))
    print(f"{asked.scans} scans, {asked.jobs} jobs: {seconds:.1f} s, {seconds / asked.scans:.1f} s a scan")


if __name__ == "__main__":
    main()
