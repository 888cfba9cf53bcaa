"""A scan in; its lesion mask, on its own grid, and the infected share of its lungs out.

`python -m covidnb.predict SCAN OUT_DIR --weights runs/infnet/weights.safetensors`. Several networks are
averaged; `--classes` names a multi-class network, which calls lesions ground glass or consolidation.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
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
from covidnb.slices.multiclass import CLASSES
from covidnb.training import multiclass
from covidnb.training.ensemble import average_maps
from covidnb.training.infnet import InfNetConfig, load_network
from covidnb.training.run import ConfigError, versions

BATCH = 8  # slices that go through the network at once
Networks = list[tuple[nn.Module, InfNetConfig]]
THRESHOLD = 0.5  # a voxel is lesion from this probability on


def lesion_probability(
    networks: Networks, ct: sitk.Image, lungs: sitk.Image, flips: bool = False
) -> np.ndarray:
    """Run slice networks over a scan as they were trained: slices in the lung window, cropped to the lungs.

    Parameters
    ----------
    networks : list of (Module, config)
        Of `covidnb.training.infnet.load_network`, each with the side, in pixels, that it was trained at;
        their maps are averaged.
    ct, lungs : SimpleITK.Image
        LPS, in HU, and the lungs on the same grid.
    flips : bool
        Average over each slice's eight positions too.

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
        greys = [grey for _, grey, _ in some]
        each = [average_maps(net, greys, config.size, flips) for net, config in networks]
        for (z, _, box), *maps in zip(some, *each, strict=True):
            probability[z][box] = np.mean(maps, axis=0)
    return np.where(inside, probability, np.float32(0))


def lesion_classes(
    network: tuple[nn.Module, multiclass.MultiClassConfig],
    ct: sitk.Image,
    lungs: sitk.Image,
    prior: np.ndarray,
) -> np.ndarray:
    """Call each lung voxel background, ground glass or consolidation, slice by slice.

    Parameters
    ----------
    network : (Module, config)
        Of `covidnb.training.multiclass.load_network`.
    ct, lungs : SimpleITK.Image
        As in `lesion_probability`.
    prior : (z, y, x) float32
        What `lesion_probability` returned: where lesion is.

    Returns
    -------
    ndarray
        (z, y, x) uint8: 0, or 1 for ground glass, 2 for consolidation; zero outside the lungs.
    """
    net, config = network
    inside = sitk.GetArrayViewFromImage(lungs) > 0
    classes = np.zeros(inside.shape, np.uint8)
    for z, grey, box in tqdm(list(lung_slices(ct, lungs)), desc="classes", unit="slice"):
        here = np.round(prior[z][box] * 255).astype(np.uint8)
        classes[z][box] = multiclass.predict_slice(net, config, grey, here).argmax(0)
    return np.where(inside, classes, np.uint8(0))


def predict(
    scan: str | Path,
    out: str | Path,
    weights: str | Path | Sequence[str | Path],
    classes: str | Path | None = None,
    **how_stored,
) -> dict:
    """Segment the lesions of a scan file or DICOM folder; write mask.nii.gz and report.json.

    Parameters
    ----------
    scan : str or Path
        What `covidnb.ct.read_ct` reads.
    out : str or Path
        Folder for the results; made if missing.
    weights : str, Path, or several
        weights.safetensors of runs on infection slices; several networks are averaged.
    classes : str or Path, optional
        weights.safetensors of a multi-class run with a prior, which is what `weights` say: the mask holds 1
        for ground glass and 2 for consolidation. Flips, and who says what is lesion, are as in that run.
    **how_stored
        Passed to `read_ct`: `series`, `stored_window`.

    Returns
    -------
    dict
        The report: millilitres of lung and lesion, of each class too if asked for, infected share in
        percent, what made it.

    Raises
    ------
    CTError
        Where the scan cannot be used, or shows no lungs.
    ConfigError
        Where the weights cannot.
    """
    weights = [weights] if isinstance(weights, str | Path) else list(weights)
    if not weights:
        raise ConfigError("no weights: give weights.safetensors of at least one run")
    networks = [load_network(path) for path in weights]
    namer = multiclass.load_network(classes) if classes else None
    if namer and not namer[1].takes_prior:
        raise ConfigError(f"{classes} is of a network that takes no prior: give one that learnt with a prior")
    ct = read_ct(scan, **how_stored)
    lungs = segment_lungs(ct)
    probability = lesion_probability(networks, ct, lungs, flips=bool(namer and namer[1].flips))
    by_threshold = not namer or namer[1].lesions == "prior"
    if namer:
        mask = lesion_classes(namer, ct, lungs, probability)
    else:
        mask = (probability >= THRESHOLD).astype(np.uint8)
    inside = sitk.GetArrayViewFromImage(lungs)
    voxel_ml = float(np.prod(ct.GetSpacing())) / 1000

    def millilitres(voxels: np.ndarray) -> float:
        return round(float(np.count_nonzero(voxels)) * voxel_ml, 1)

    report = {
        "scan": str(scan),
        "lungs_ml": millilitres(inside),
        "lesions_ml": millilitres(mask),
        "infected_share_percent": round(infected_share(mask > 0, inside), 2),
        **({f"{name}_ml": millilitres(mask == k) for k, name in enumerate(CLASSES) if k} if namer else {}),
        "threshold": THRESHOLD if by_threshold else None,
        "weights_sha256": {
            str(path): hashlib.sha256(Path(path).read_bytes()).hexdigest()
            for path in (*weights, *([classes] if classes else []))
        },
        "trained_on": sorted({config.data for _, config in [*networks, *([namer] if namer else [])]}),
        "versions": versions(),
        "warning": "Research and teaching only. Not for diagnosis.",
    }
    write_like(mask, ct, Path(out) / "mask.nii.gz")
    with whole(Path(out) / "report.json") as part:
        part.write_text(json.dumps(report, indent=2) + "\n")
    return report


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; 2 and a sentence on stderr where scan or weights cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m covidnb.predict", description=__doc__.splitlines()[0])
    parser.add_argument("scan", help="DICOM folder, NIfTI, MHA or NRRD file")
    parser.add_argument("out", help="folder for mask.nii.gz and report.json")
    parser.add_argument(
        "--weights", action="append", required=True, help="weights.safetensors of a run; again for an average"
    )
    parser.add_argument("--classes", help="weights.safetensors of a multi-class run: GGO 1, consolidation 2")
    parser.add_argument("--series", help="SeriesInstanceUID, where a DICOM folder holds several")
    parser.add_argument(
        "--stored-window", nargs=2, type=float, metavar=("LOW", "HIGH"), help="HU window of an 8-bit volume"
    )
    asked = parser.parse_args(argv)
    window = tuple(asked.stored_window) if asked.stored_window else None
    try:
        report = predict(
            asked.scan, asked.out, asked.weights, asked.classes, series=asked.series, stored_window=window
        )
    except (CTError, ConfigError, OSError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
