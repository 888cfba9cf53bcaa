"""Real chests in GASNet's folders, as they are or with the phantom's lesions grown in them.

"implants": the labelled volume comes from one scanner (the registry's chest), all others from another (uiip).
What was drawn in one hospital has to serve in the next; the held-out anatomy is in no other split.
"medseg2": the labelled volume and those to find lesions in are of real patients, one of whom is held out.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from covidnb import catalog, phantom
from covidnb.crop import SIZE
from covidnb.ct import read_ct, read_mask
from covidnb.volumes import Scan, write_split, write_volume
from covidnb.volumes.phantom import SEVERITY, drawn_folder

REGISTRY = "chest-ct"
UIIP = ("uiip_1", "uiip_2", "uiip_3", "uiip_4")
LOBES = (10, 14)  # first and last in the registry's anatomical mask
MILD = 0.05  # infected share of the labelled volume of "implants"
COPIES = 3  # sick volumes of each chest that is learned from in "implants"
HELD_OUT = 4  # lesions, one after the other, in its held-out chest
VERSION = 1


def chest_volumes(data: str, size: tuple[int, int, int] = SIZE, *, seed: int = 2020) -> Path:
    """Volumes of real chests, drawn if the cache does not have them.

    Parameters
    ----------
    data : "implants" or "medseg2".
    size : (depth, height, width) of the volumes.
    seed : of the lesions; its remainder by four says which chest, or which patient, is held out.

    Raises
    ------
    CatalogError : the chests are not here, or the disk is full.
    """
    splits = {"implants": _implants, "medseg2": _medseg2}[data](np.random.default_rng(seed), seed % 4)
    for name in (REGISTRY, "uiip") + (("medseg2",) if data == "medseg2" else ()):
        catalog.fetch(name)

    def draw_all(root: Path) -> None:
        chests = [chest for some in splits.values() for chest in some.items()]
        for name, chest in tqdm(chests, desc="cropping real chests (once)", disable=None):
            write_volume(root, name, draw(**chest), size, {"chest": chest})
        for split, some in splits.items():
            write_split(root, split, list(some))

    return drawn_folder(f"{data}-volumes", {"size": size, "splits": splits, "version": VERSION}, draw_all)


def _implants(rng: np.random.Generator, held_out: int) -> dict[str, dict[str, dict]]:
    """Arguments of `draw` by split and name; lesions in the labelled scan are few."""
    learned = [name for name in UIIP if name != UIIP[held_out]]
    return {
        "labelled": {f"{REGISTRY}-sick": _sick(REGISTRY, rng, MILD)},
        "covid": {f"{name}-sick{k}": _sick(name, rng) for k in range(1, 1 + COPIES) for name in learned},
        "healthy": {name: _as_it_is(name) for name in learned},
        "validation": {
            f"{UIIP[held_out]}-sick{k}": _sick(UIIP[held_out], rng) for k in range(1, 1 + HELD_OUT)
        },
    }


def _medseg2(rng: np.random.Generator, held_out: int) -> dict[str, dict[str, dict]]:
    """The same of medseg2: a labelled patient, a held-out one, the others known as sick.

    Lesions are grown in the healthy chests, too: else sick and healthy would differ in their scanner, and
    D could tell them apart by that. Patient d's volume 6, practically without lesions, is only scored.
    """
    patients = catalog.load_splits("volumes")["sets"]["medseg2"]["folds"]
    labelled, *others = (patients[(held_out + k) % len(patients)][-1] for k in range(1, len(patients)))
    healthy = (REGISTRY, *UIIP)
    return {
        "labelled": {labelled: _as_it_is(labelled)},
        "covid": {name: _as_it_is(name) for name in others}
        | {f"{name}-sick": _sick(name, rng) for name in healthy},
        "healthy": {name: _as_it_is(name) for name in healthy},
        "validation": {name: _as_it_is(name) for name in patients[held_out]},
    }


def _sick(name: str, rng: np.random.Generator, severity: float | None = None) -> dict:
    drawn = float(np.exp(rng.uniform(*np.log(SEVERITY))))
    return {"name": name, "seed": int(rng.integers(2**31)), "severity": severity or drawn}


def _as_it_is(name: str) -> dict:
    return {"name": name, "seed": 0, "severity": None}


def draw(name: str, seed: int, severity: float | None) -> Scan:
    """A chest as a scan; with a severity, lesions are grown in it first."""
    scan = _chest(name)
    if severity is None:
        return scan
    sick, lesions = phantom.implant_lesions(scan.ct, scan.lungs, seed, severity=severity)
    return Scan(sick, scan.lungs, lesions)


@lru_cache(maxsize=1)  # lesions are grown in one chest after another; a scan is some 100 MB
def _chest(name: str) -> Scan:
    """A chest as its data set has it; the healthy ones without lesions."""
    if name == REGISTRY:
        folder = catalog.fetch(REGISTRY)
        ct = read_ct(folder / "cxr.nii.gz")
        labels = read_mask(folder / "mask.nii.gz", ct)
        return Scan(ct, (labels >= LOBES[0]) & (labels <= LOBES[1]), None)
    data = name.split("_")[0]
    folder = catalog.fetch(data)
    ct = read_ct(folder / f"{name}_ct.nii.gz")
    lungs = read_mask(folder / f"{name}_lung.nii.gz", ct) > 0
    lesions = read_mask(folder / f"{name}_lesion.nii.gz", ct) if data == "medseg2" else None
    return Scan(ct, lungs, lesions)
