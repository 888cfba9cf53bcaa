"""The phantom's slices in the COVID-SemiSeg layout: what the course learns from without a download."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from PIL import Image
from tqdm import tqdm

from covidnb import catalog, phantom
from covidnb.files import whole_folder
from covidnb.slices import PARTS, lung_slices, mask_edges
from covidnb.slices.multiclass import PALETTE

POOL_TRUTH = "PhantomTruth"  # masks of the unlabelled slices: to judge pseudo-labels by, never to learn from

PHANTOM = {
    "seed": 2020,
    "shape": (24, 224, 224),  # voxels z, y, x of each patient: 13 mm between slices, 1.7 mm within
    "patients": {"doctor": 10, "test": 6, "pseudo": 4},
    "slices": {"doctor": 5, "test": 5, "pseudo": 15},  # of each patient
    "version": 2,  # of how slices are cut and written
}


def phantom_root() -> Path:
    """The phantom's slices, drawn if the cache does not have them.

    The folder's name carries a hash of the parameters and of the sources that draw the phantom, so that
    slices of an older phantom are never taken for today's.
    """
    sources = b"".join(path.read_bytes() for path in sorted(Path(phantom.__file__).parent.glob("*.py")))
    digest = hashlib.sha256(json.dumps(PHANTOM).encode() + sources).hexdigest()
    root = catalog.cache_dir() / f"phantom-slices-{digest[:10]}"
    if not root.is_dir():
        with catalog.room_for("the phantom's slices"), whole_folder(root) as part:
            _draw_phantom(part)
    return root


def _draw_phantom(root: Path) -> None:
    """Write the slices of all phantom patients; no patient is in two parts."""
    rng = np.random.default_rng(PHANTOM["seed"])
    parts = [part for part, patients in PHANTOM["patients"].items() for _ in range(patients)]
    bar = tqdm(parts, desc="drawing the phantom's slices (once)", disable=None)  # only in a terminal
    for number, part in enumerate(bar, 1):
        seed, style = int(rng.integers(2**31)), str(rng.choice(list(phantom.STYLES)))
        patient = phantom.chest(seed, shape=PHANTOM["shape"], style=style)
        for z, image, classes in _axial_slices(patient, PHANTOM["slices"][part], part == "pseudo"):
            _write_slice(root, part, f"phantom{number:02d}_{z:02d}", image, classes)


def _axial_slices(patient, count: int, lesion_free: bool) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """`count` slices of a phantom, evenly spread: their number, grey values and classes (uint8 (H, W)).

    Those with a label show a lesion; unlike in COVID-SemiSeg all lie upright.
    """
    lungs, classes = (sitk.GetArrayFromImage(image) for image in (patient.lungs, patient.lesions))
    areas = lungs.sum((1, 2))
    wanted = areas > areas.max() / 4  # not the tips of the lungs
    if not lesion_free:
        wanted &= (classes > 0).sum((1, 2)) > 20
    found = np.flatnonzero(wanted)
    taken = set(found[np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)])
    for z, grey, box in lung_slices(patient.ct, patient.lungs):
        if z in taken:
            yield z, grey, classes[z][box]


def _write_slice(root: Path, part: str, name: str, image: np.ndarray, classes: np.ndarray) -> None:
    """Write one slice into every folder of the layout that holds slices of this part."""
    mask = np.where(classes > 0, 255, 0).astype(np.uint8)
    infection, edge = Image.fromarray(mask), Image.fromarray(mask_edges(mask))
    kinds = Image.fromarray(classes)
    kinds.putpalette(PALETTE)
    written = {
        "doctor": {
            "doctor": {"GT": infection, "Edge": edge},
            "multiclass_train": {"GT": kinds, "Prior": infection},
        },
        "test": {"test": {"GT": infection}, "multiclass_test": {"GT": kinds}},
        "pseudo": {"pseudo": {}},
    }
    if part == "pseudo":
        (root / POOL_TRUTH).mkdir(exist_ok=True)
        infection.save(root / POOL_TRUTH / f"{name}.png")
    for where, labels in written[part].items():
        for kind, content in {"Imgs": Image.fromarray(image), **labels}.items():
            path = root / PARTS[where] / kind / f"{name}.{'jpg' if kind == 'Imgs' else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            content.save(path, quality=95)
