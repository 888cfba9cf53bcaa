"""A scan in; its lesion mask, on its own grid, and the infected share of its lungs out.

`python -m covidnb.predict SCAN OUT_DIR --weights runs/infnet/weights.safetensors`
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from torch import nn
from tqdm.auto import tqdm

from covidnb.ct import CTError, read_ct, write_like
from covidnb.files import whole
from covidnb.lungs import segment_lungs
from covidnb.metrics import infected_share
from covidnb.slices import lung_slices
from covidnb.training.infnet import load_network, predict_greys
from covidnb.training.run import ConfigError, versions

BATCH = 8  # slices that go through the network at once
THRESHOLD = 0.5  # a voxel is lesion from this probability on


def lesion_probability(net: nn.Module, ct: sitk.Image, lungs: sitk.Image, size: int) -> np.ndarray:
    """Run a slice network over a scan, slice by slice, as it was trained: lung window, cropped to the lungs.

    Parameters
    ----------
    net : Module
        Of `load_network`, in evaluation mode.
    ct, lungs : SimpleITK.Image
        LPS, in HU, and the lungs on the same grid.
    size : int
        The side, in pixels, that the network was trained at.

    Returns
    -------
    ndarray
        (z, y, x) float32 in [0, 1]; zero outside the lungs.
    """
    inside = sitk.GetArrayViewFromImage(lungs) > 0
    probability = np.zeros(inside.shape, np.float32)
    slices = list(lung_slices(ct, lungs))
    for start in tqdm(range(0, len(slices), BATCH), desc="slices", unit=f"{BATCH} slices"):
        some = slices[start : start + BATCH]
        maps = predict_greys(net, [grey for _, grey, _ in some], size)
        for (z, _, box), one in zip(some, maps, strict=True):
            probability[z][box] = one
    return np.where(inside, probability, np.float32(0))


def predict(scan: str | Path, out: str | Path, weights: str | Path, **how_stored) -> dict:
    """Segment the lesions of a scan file or DICOM folder; write mask.nii.gz and report.json.

    Parameters
    ----------
    scan : str or Path
        What `covidnb.ct.read_ct` reads.
    out : str or Path
        Folder for the results; made if missing.
    weights : str or Path
        weights.safetensors of a run.
    **how_stored
        Passed to `read_ct`: `series`, `stored_window`.

    Returns
    -------
    dict
        The report: millilitres of lung and lesion, infected share in percent, what made it.

    Raises
    ------
    CTError
        Where the scan cannot be used, or shows no lungs.
    ConfigError
        Where the weights cannot.
    """
    net, config = load_network(weights)
    ct = read_ct(scan, **how_stored)
    lungs = segment_lungs(ct)
    lesions = (lesion_probability(net, ct, lungs, config.size) >= THRESHOLD).astype(np.uint8)
    inside = sitk.GetArrayViewFromImage(lungs)
    voxel_ml = float(np.prod(ct.GetSpacing())) / 1000
    report = {
        "scan": str(scan),
        "lungs_ml": round(float(inside.sum()) * voxel_ml, 1),
        "lesions_ml": round(float(lesions.sum()) * voxel_ml, 1),
        "infected_share_percent": round(infected_share(lesions, inside), 2),
        "threshold": THRESHOLD,
        "weights_sha256": hashlib.sha256(Path(weights).read_bytes()).hexdigest(),
        "trained_on": config.data,
        "versions": versions(),
        "warning": "Research and teaching only. Not for diagnosis.",
    }
    write_like(lesions, ct, Path(out) / "mask.nii.gz")
    with whole(Path(out) / "report.json") as part:
        part.write_text(json.dumps(report, indent=2) + "\n")
    return report


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; 2 and a sentence on stderr where scan or weights cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m covidnb.predict", description=__doc__.splitlines()[0])
    parser.add_argument("scan", help="DICOM folder, NIfTI, MHA or NRRD file")
    parser.add_argument("out", help="folder for mask.nii.gz and report.json")
    parser.add_argument("--weights", required=True, help="weights.safetensors of a run")
    parser.add_argument("--series", help="SeriesInstanceUID, where a DICOM folder holds several")
    parser.add_argument(
        "--stored-window", nargs=2, type=float, metavar=("LOW", "HIGH"), help="HU window of an 8-bit volume"
    )
    asked = parser.parse_args(argv)
    window = tuple(asked.stored_window) if asked.stored_window else None
    try:
        report = predict(asked.scan, asked.out, asked.weights, series=asked.series, stored_window=window)
    except (CTError, ConfigError, OSError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
