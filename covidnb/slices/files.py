"""The files of a data set in the COVID-SemiSeg layout: which belong together, and what is in them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from covidnb.files import natural_order

PARTS = {
    "doctor": "TrainingSet/LungInfection-Train/Doctor-label",
    "pseudo": "TrainingSet/LungInfection-Train/Pseudo-label",
    "test": "TestingSet/LungInfection-Test",
    "multiclass_train": "TrainingSet/MultiClassInfection-Train",
    "multiclass_test": "TestingSet/MultiClassInfection-Test",
}


class SliceError(ValueError):
    """A slice, a mask or a folder of them cannot be used as it is."""


class SliceFiles(NamedTuple):
    """The files of one slice; those that its part of the data set does not have are None."""

    name: str
    image: Path
    mask: Path | None
    edge: Path | None
    prior: Path | None


def _by_stem(folder: Path) -> dict[str, Path]:
    """Files of `folder` by their name without suffix, hidden ones left out."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.name.startswith("."):
            continue
        if path.stem in found:
            raise SliceError(f"{path} and {found[path.stem].name} carry the same name: keep one of them")
        found[path.stem] = path
    return found


def _partners(folder: Path, images: dict[str, Path]) -> dict[str, Path]:
    """Files of `folder` by stem, which must be exactly those of `images`."""
    if not folder.is_dir():
        raise SliceError(f"{folder} does not exist: the images beside it need their masks")
    partners = _by_stem(folder)
    for stem in sorted(images.keys() - partners.keys(), key=natural_order):
        raise SliceError(
            f"{images[stem]} has no partner in {folder}: add {stem}.png there or remove the image"
        )
    for stem in sorted(partners.keys() - images.keys(), key=natural_order):
        raise SliceError(
            f"{partners[stem]} belongs to no image of {folder.parent / 'Imgs'}: remove it or add the image"
        )
    return partners


def list_slices(root: str | Path, part: str) -> list[SliceFiles]:
    """Slices of one part of a data set in the COVID-SemiSeg layout, in natural order of their names.

    Parameters
    ----------
    root : the folder that holds TrainingSet and TestingSet, see `semiseg_root`.
    part : "doctor", "pseudo", "test", "multiclass_train" or "multiclass_test".

    Raises
    ------
    SliceError : unknown part, missing folder, or a file without its partner of the same name.
    """
    if part not in PARTS:
        raise SliceError(f"unknown part {part!r}: choose one of {', '.join(PARTS)}")
    folder = Path(root) / PARTS[part]
    if not (folder / "Imgs").is_dir():
        raise SliceError(f"{folder / 'Imgs'} does not exist: {root} should hold the COVID-SemiSeg layout")
    images = _by_stem(folder / "Imgs")
    if not images:
        raise SliceError(f"{folder / 'Imgs'} holds no image")
    # Unlabelled slices may lack masks, edges can be computed, only the multi-class part has priors.
    optional = {"Edge", "Prior"} | ({"GT"} if part == "pseudo" else set())
    partners = {
        kind: _partners(folder / kind, images)
        for kind in ("GT", "Edge", "Prior")
        if kind not in optional or (folder / kind).is_dir()
    }
    return [
        SliceFiles(
            stem, images[stem], *(partners.get(kind, {}).get(stem) for kind in ("GT", "Edge", "Prior"))
        )
        for stem in sorted(images, key=natural_order)
    ]


def _open(path: Path):
    """Decoded PIL image; a missing, empty, truncated or non-image file is a SliceError that names it."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise SliceError(f"{path} does not exist") from None
    except UnidentifiedImageError:
        state = "empty" if path.stat().st_size == 0 else "not an image"
        raise SliceError(f"{path} is {state}: fetch the data set again") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise SliceError(f"{path} is damaged ({error}): fetch the data set again") from None
    return image


def read_image(path: str | Path) -> np.ndarray:
    """Grey values of a slice, uint8 (H, W), as stored (already in a lung window).

    Raises
    ------
    SliceError : the file is missing, empty, truncated or not an image.
    """
    return np.asarray(_open(Path(path)).convert("L"))


def read_mask(path: str | Path) -> np.ndarray:
    """Infection mask of a slice, uint8 (H, W) in 0..255.

    Soft maps (pseudo-labels) keep their grey values; in a palette file every class above 0 is infection.

    Raises
    ------
    SliceError : the file is missing, empty, truncated or not an image.
    """
    image = _open(Path(path))
    if image.mode == "P":
        return np.where(np.asarray(image) > 0, 255, 0).astype(np.uint8)
    return np.asarray(image.convert("L"))


def read_classes(path: str | Path) -> np.ndarray:
    """Class indices of a multi-class label, uint8 (H, W): 0 background, 1 GGO, 2 consolidation.

    Raises
    ------
    SliceError : the file cannot be read, has no palette (grey values are not classes) or other classes.
    """
    image = _open(Path(path))
    if image.mode != "P":
        raise SliceError(
            f"{path} has mode {image.mode}: a multi-class label is a palette PNG with indices 0, 1, 2"
        )
    classes = np.asarray(image)
    if classes.max() > 2:
        raise SliceError(f"{path} holds class {classes.max()}: only 0, 1 and 2 are known")
    return classes


def check_size(path: Path, plane: np.ndarray, image_path: Path, image: np.ndarray) -> None:
    """Refuse a label of another size than its image.

    Parameters
    ----------
    path, plane : the label's file, or what to call it, and its pixels (H, W).
    image_path, image : those of its slice.

    Raises
    ------
    SliceError : their sizes differ; the message names both files.
    """
    if plane.shape != image.shape:
        sizes = " and ".join(f"{width} x {height}" for height, width in (plane.shape, image.shape))
        raise SliceError(f"{path} and {image_path} differ in size ({sizes} pixels): they cannot be one slice")
