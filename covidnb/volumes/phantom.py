"""The phantom's volumes in GASNet's folders: what part IV learns from without a download."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from covidnb import catalog, phantom
from covidnb.crop import SIZE
from covidnb.files import whole_folder
from covidnb.volumes import Scan, VolumeError, write_split, write_volume

COUNTS = {"labelled": 1, "covid": 8, "healthy": 8, "validation": 6}
SEVERITY = (0.04, 0.3)  # infected share of the sick, between these on a logarithmic scale
VERSION = 1  # of how phantoms are drawn for volumes


def phantom_volumes(size: tuple[int, int, int] = SIZE, *, seed: int = 2020, **counts: int) -> Path:
    """Volumes of phantom patients, no two of them alike, drawn if the cache does not have them.

    The sick have their lesions in lesion/, those of the split "covid" too: `LungVolumes` is told what may be
    learnt from them. Sick and healthy come from the same scanners: nothing but lesions tells them apart.

    Parameters
    ----------
    size : (depth, height, width) of the volumes.
    seed : of patients, lesions and scanners.
    counts : patients in each split, where they differ from `COUNTS`.

    Raises
    ------
    VolumeError : an unknown split.
    CatalogError : the disk is full.
    """
    if unknown := counts.keys() - COUNTS.keys():
        raise VolumeError(f"unknown split {min(unknown)!r}: the phantom has {', '.join(COUNTS)}")
    asked = {"size": size, "seed": seed, "counts": COUNTS | counts, "severity": SEVERITY, "version": VERSION}
    draw_all = partial(_draw_all, size=tuple(size), seed=seed, counts=COUNTS | counts)
    return drawn_folder("phantom-volumes", asked, draw_all)


def drawn_folder(name: str, asked: dict, draw_all: Callable[[Path], None]) -> Path:
    """A folder of the cache that `draw_all` fills unless it is there, drawn as `asked` by today's phantom."""
    sources = b"".join(path.read_bytes() for path in sorted(Path(phantom.__file__).parent.glob("*.py")))
    digest = hashlib.sha256(json.dumps(asked).encode() + sources).hexdigest()
    root = catalog.cache_dir() / f"{name}-{digest[:10]}"
    if not root.is_dir():
        with catalog.room_for("the drawn volumes"), whole_folder(root) as part:
            draw_all(part)
    return root


def _draw_all(root: Path, size: tuple[int, int, int], seed: int, counts: dict[str, int]) -> None:
    """Write all patients' volumes and the splits."""
    splits = {split: _patients(split, count, size, seed) for split, count in counts.items()}
    for split, some in splits.items():
        write_split(root, split, list(some))
    patients = [patient for some in splits.values() for patient in some.items()]
    for name, patient in tqdm(patients, desc="drawing the phantom's volumes (once)", disable=None):
        write_volume(root, name, draw(**patient), size, {"phantom": patient})


def _patients(split: str, count: int, size: tuple[int, int, int], seed: int) -> dict[str, dict]:
    """Names and arguments of `draw` for a split's patients; how many another split has does not matter."""
    rng = np.random.default_rng([seed, list(COUNTS).index(split)])
    # lungs fill about 0.8 of the field of view from head to foot and 0.6 across: the crop magnifies little
    shape = [max(round(n * m), 16) for n, m in zip(size, (1.25, 1.4, 1.4), strict=True)]
    patients = {}
    for number in range(1, count + 1):
        arguments = {
            "seed": int(rng.integers(2**31)),
            "shape": shape,
            "style": str(rng.choice(list(phantom.STYLES))),
            "severity": float(np.exp(rng.uniform(*np.log(SEVERITY)))),
        }
        patients[f"{split}{number:02d}"] = arguments | ({"severity": None} if split == "healthy" else {})
    return patients


def draw(seed: int, shape, style: str, severity: float | None) -> Scan:
    """A phantom patient as a scan; without a severity a healthy one, who has no lesion mask."""
    kind = "healthy" if severity is None else "covid"
    patient = phantom.chest(seed, kind=kind, shape=tuple(shape), style=style, severity=severity)
    return Scan(patient.ct, patient.lungs, None if severity is None else patient.lesions)
