"""Real chests with the phantom's lesions grown in them, in GASNet's folders: what one drawn scan is worth.

The labelled volume comes from one scanner (the registry's chest), all others from another (uiip): what was
drawn in one hospital has to serve in the next. The anatomy of the held-out volumes is in no other split.
"""

from functools import cache
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from covidnb import catalog, phantom
from covidnb.crop import SIZE
from covidnb.ct import read_ct, read_mask
from covidnb.volumes import Scan, write_split, write_volume
from covidnb.volumes.phantom import SEVERITY, drawn_folder

LABELLED_CHEST = "chest-ct"
OTHER_CHESTS = ("uiip_1", "uiip_2", "uiip_3", "uiip_4")
LOBES = range(10, 15)  # of the registry's anatomical mask
MILD = 0.05  # infected share of the labelled volume
COUNTS = {
    "covid": 9,
    "validation": 4,
}  # sick volumes: three of each chest that is learned from, four held out
VERSION = 1


def implanted_volumes(size: tuple[int, int, int] = SIZE, *, seed: int = 2020) -> Path:
    """Volumes of real chests, drawn if the cache does not have them.

    Parameters
    ----------
    size : (depth, height, width) of the volumes.
    seed : of the lesions; its remainder by four says which of the four chests is held out.

    Raises
    ------
    CatalogError : the chests are not here, or the disk is full.
    """
    for name in (LABELLED_CHEST, "uiip"):
        catalog.fetch(name)
    asked = {"size": size, "seed": seed, "counts": COUNTS, "severity": [MILD, *SEVERITY], "version": VERSION}

    def draw_all(root: Path) -> None:
        splits = _patients(seed)
        for split, some in splits.items():
            write_split(root, split, list(some))
        patients = [patient for some in splits.values() for patient in some.items()]
        for name, patient in tqdm(patients, desc="growing lesions in real chests (once)", disable=None):
            write_volume(root, name, draw(**patient), size, {"implant": patient})

    return drawn_folder("implanted-volumes", asked, draw_all)


def _patients(seed: int) -> dict[str, dict[str, dict]]:
    """Arguments of `draw` by split and name."""
    rng = np.random.default_rng(seed)
    held_out = OTHER_CHESTS[seed % len(OTHER_CHESTS)]
    learned = [chest for chest in OTHER_CHESTS if chest != held_out]

    def sick(chest: str, severity: float | None = None) -> dict:
        drawn = float(np.exp(rng.uniform(*np.log(SEVERITY))))
        return {"chest": chest, "seed": int(rng.integers(2**31)), "severity": severity or drawn}

    covid = [learned[k % len(learned)] for k in range(COUNTS["covid"])]
    return {
        "labelled": {"labelled01": sick(LABELLED_CHEST, MILD)},
        "covid": {f"covid{k:02d}": sick(chest) for k, chest in enumerate(covid, 1)},
        "healthy": {
            f"healthy{k:02d}": {"chest": chest, "seed": 0, "severity": None}
            for k, chest in enumerate(learned, 1)
        },
        "validation": {f"validation{k:02d}": sick(held_out) for k in range(1, COUNTS["validation"] + 1)},
    }


def draw(chest: str, seed: int, severity: float | None) -> Scan:
    """A chest with lesions as a scan; without a severity as it is, who has no lesion mask."""
    ct, lungs = _chest(chest)
    if severity is None:
        return Scan(ct, lungs, None)
    sick, lesions = phantom.implant_lesions(ct, lungs, seed, severity=severity)
    return Scan(sick, lungs, lesions)


@cache
def _chest(name: str) -> tuple[sitk.Image, sitk.Image]:
    """A healthy chest and its lungs, uint8 0 or 1."""
    if name == LABELLED_CHEST:
        folder = catalog.fetch(LABELLED_CHEST)
        ct = read_ct(folder / "cxr.nii.gz")
        labels = read_mask(folder / "mask.nii.gz", ct)
        return ct, (labels >= LOBES[0]) & (labels <= LOBES[-1])
    folder = catalog.fetch("uiip")
    ct = read_ct(folder / f"{name}_ct.nii.gz")
    return ct, read_mask(folder / f"{name}_lung.nii.gz", ct) > 0
