"""The two-dimensional data sets: slices with infection masks and edges in the COVID-SemiSeg layout.

Everything that trains or scores on slices goes through `list_slices` (which files belong together) and
`InfectionSlices` (what a network gets to see of them). The phantom is written in the same layout by
`semiseg_root`, so no other code asks where slices come from.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from covidnb.files import natural_order
from covidnb.slices.files import (
    PARTS,
    SliceError,
    SliceFiles,
    check_size,
    list_slices,
    read_classes,
    read_image,
    read_mask,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "LUNG_MARGIN_MM",
    "PARTS",
    "InfectionSlices",
    "SliceError",
    "SliceFiles",
    "check_size",
    "fold",
    "list_slices",
    "lung_slices",
    "mask_edges",
    "natural_order",
    "network_input",
    "normalised",
    "patient_folds",
    "patient_of",
    "read_classes",
    "read_image",
    "read_mask",
    "resized_square",
    "semiseg_root",
    "training_split",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

LUNG_MARGIN_MM = 10  # of body left around the lungs of a slice: the pleura is where the lesions are


def mask_edges(mask: np.ndarray, method: str = "gradient") -> np.ndarray:
    """Boundary of a mask as the COVID-SemiSeg data set draws it, uint8 (H, W), 0 or 255.

    The data set's Edge files were made in two ways, both of the mask thresholded at 128 (infected above it):

    - "gradient": pixels where the central difference is not zero, a line two pixels wide, one on either side.
      Equal in every pixel to all 50 Edge files of the doctor's labels.
    - "canny": OpenCV's Canny (10, 150), a line of one pixel, as the released code makes it for pseudo-labels.
      Equal in every pixel to all 1,600 Edge files of the pseudo-labels. Of the doctor's labels it reproduces
      none: it agrees in 98.7 % of the pixels, but its mean Dice with their Edge files is 0.71.

    Parameters
    ----------
    mask : uint8 (H, W), 0..255.
    """
    infected = mask > 128
    if method == "gradient":
        edges = np.zeros(mask.shape, bool)
        for axis in (0, 1):
            moved = np.moveaxis(infected, axis, 0), np.moveaxis(edges, axis, 0)
            moved[1][1:-1] |= moved[0][2:] != moved[0][:-2]
            moved[1][0] |= moved[0][1] != moved[0][0]
            moved[1][-1] |= moved[0][-1] != moved[0][-2]
        return edges.astype(np.uint8) * 255
    if method == "canny":
        import cv2

        return cv2.Canny(infected.astype(np.uint8) * 255, 10, 150)
    raise SliceError(f"unknown edge method {method!r}: choose 'gradient' or 'canny'")


def _augmentation(size: int):
    """MONAI transforms for a (3, size, size) stack of image, mask and edge, and those for the image alone.

    Flips and quarter turns, because the doctor's slices lie on their side and the unlabelled ones upright;
    a small affine for posture and crop; gamma and gain for scanner and window.
    """
    from monai.transforms import (
        Compose,
        RandAdjustContrast,
        RandAffine,
        RandFlip,
        RandRotate90,
        RandScaleIntensity,
    )

    together = Compose(
        [
            RandFlip(prob=0.5, spatial_axis=0),
            RandFlip(prob=0.5, spatial_axis=1),
            RandRotate90(prob=0.75, max_k=3),
            RandAffine(
                prob=0.75,
                rotate_range=np.pi / 12,
                scale_range=0.1,
                translate_range=0.05 * size,
                mode="bilinear",
                padding_mode="zeros",
            ),
        ]
    )
    grey_values = Compose(
        [RandAdjustContrast(prob=0.5, gamma=(0.8, 1.25)), RandScaleIntensity(prob=0.5, factors=0.1)]
    )
    return together, grey_values


class InfectionSlices(Dataset):
    """Slices with mask and edge, as the released loader of Inf-Net prepares them, augmented on demand.

    As there, image, mask and edge are resized to a square by Pillow's (antialiased) bilinear filter, the edge
    after it was drawn at the slice's own size; masks and edges are therefore soft at their rims. Edge files
    are used where the data set has them, `mask_edges` draws the others.
    Ours is the augmentation (the released loader has none): it moves the three together and depends on
    (seed, epoch, index) alone, so that a resumed run sees what an uninterrupted one would have seen.

    Parameters
    ----------
    files : from `list_slices`; each needs a mask.
    size : side of the square in pixels; the paper's is 352.
    augment : flips, quarter turns, small affine and grey-value changes; call `set_epoch` before each epoch.
    seed : of the augmentation.
    edges : how edges without a file are drawn, see `mask_edges`.

    Items are dicts: "image" float32 (3, size, size), normalised with ImageNet's mean and standard deviation;
    "mask" and "edge" float32 (1, size, size) in [0, 1]; "name" str.

    Raises
    ------
    SliceError : no files, a file without mask, an unreadable file, or a mask of another size than its image.
    """

    def __init__(
        self,
        files: Sequence[SliceFiles],
        size: int = 352,
        augment: bool = False,
        seed: int = 0,
        edges: str = "gradient",
    ):
        if not files:
            raise SliceError("no slices to load: the list of files is empty")
        for item in files:
            if item.mask is None:
                raise SliceError(f"{item.image} has no mask: it cannot be learned from or scored")
        self.files = list(files)
        self.size = size
        self.seed = seed
        self.edges = edges
        self.epoch = 0
        self._transforms = _augmentation(size) if augment else None
        self._stacks: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.files)

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentation of `epoch` from now on."""
        self.epoch = epoch

    def _stack(self, index: int) -> torch.Tensor:
        """Image and labels of a slice as uint8 (C, size, size); decoded at first use and kept."""
        if index not in self._stacks:
            self._stacks[index] = torch.from_numpy(self._read(self.files[index]))
        return self._stacks[index]

    def _read(self, item: SliceFiles) -> np.ndarray:
        return _read_stack(item, self.size, self.edges)

    def __getitem__(self, index: int) -> dict:
        stack = self._stack(index).float() / 255
        if self._transforms is not None:
            stack = self._augmented(stack, index)
        image, mask, edge = stack.split(1)
        return {"image": normalised(image), "mask": mask, "edge": edge, "name": self.files[index].name}

    def _augmented(self, stack: torch.Tensor, index: int) -> torch.Tensor:
        together, grey_values = self._transforms
        draw = np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(2)
        together.set_random_state(seed=int(draw[0]))
        grey_values.set_random_state(seed=int(draw[1]))
        stack = together(stack)
        image = grey_values(stack[:1])
        return torch.cat([image, stack[1:]]).as_tensor().clamp(0, 1)


def normalised(image: torch.Tensor) -> torch.Tensor:
    """Grey image (1, H, W) in [0, 1] as three channels with ImageNet's mean and deviation taken out."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (image - mean) / std


def resized_square(plane: np.ndarray, size: int) -> np.ndarray:
    """Plane (H, W) uint8 as a square of `size` pixels, by Pillow's (antialiased) bilinear filter."""
    from PIL import Image

    return np.asarray(Image.fromarray(plane).resize((size, size), Image.BILINEAR))


def lung_slices(ct, lungs) -> Iterator[tuple[int, np.ndarray, tuple[slice, slice]]]:
    """Axial slices of a scan as networks on slices see them: in the lung window, each cropped to its lungs.

    Parameters
    ----------
    ct : SimpleITK.Image in HU, LPS.
    lungs : SimpleITK.Image, uint8 on the same grid; slices without lung are passed over.

    Yields
    ------
    The slice's number, its grey values (uint8 (h, w)), and where they lie in it: (rows, columns). The box
    keeps 10 mm around the lungs.
    """
    import SimpleITK as sitk

    from covidnb.ct import WINDOWS, window

    inside = sitk.GetArrayFromImage(lungs)
    volume = sitk.GetArrayViewFromImage(ct)
    margins = [round(LUNG_MARGIN_MM / mm) for mm in ct.GetSpacing()[1::-1]]
    for z in np.flatnonzero(inside.any(axis=(1, 2))):
        box = tuple(
            slice(max(found.min() - margin, 0), found.max() + 1 + margin)
            for found, margin in zip(np.nonzero(inside[z]), margins, strict=True)
        )
        yield int(z), np.round(window(volume[z][box], *WINDOWS["lung"]) * 255).astype(np.uint8), box


def network_input(grey: np.ndarray, size: int) -> torch.Tensor:
    """One slice, uint8 (H, W), as `InfectionSlices` gives it to a network: float32 (3, size, size)."""
    return normalised(torch.tensor(resized_square(grey, size))[None].float() / 255)


def _read_stack(item: SliceFiles, size: int, edges: str) -> np.ndarray:
    """Image, mask and edge of one slice, resized as the released loader does, uint8 (3, size, size)."""
    image, mask = read_image(item.image), read_mask(item.mask)
    edge = read_mask(item.edge) if item.edge else mask_edges(mask, edges)
    check_size(item.mask, mask, item.image, image)
    check_size(item.edge, edge, item.image, image)
    return np.stack([resized_square(plane, size) for plane in (image, mask, edge)])


def patient_of(name: str) -> str:
    """Patient (or scan) in the name of a slice: all before the last underscore and its number.

    Raises
    ------
    SliceError : the name has no such number, as the doctor-labelled slices of covid-semiseg.
    """
    match = re.fullmatch(r"(.+)_\d+", name)
    if match is None:
        raise SliceError(
            f"the name of slice {name!r} does not tell its patient: split by a file of data/splits"
        )
    return match[1]


def fold(
    files: Sequence[SliceFiles], k: int, splits: dict | None = None
) -> tuple[list[SliceFiles], list[SliceFiles]]:
    """Training and held-out slices of fold `k`; no patient is in both.

    Parameters
    ----------
    files : from `list_slices`.
    k : the fold that is held out, from 0.
    splits : from `catalog.load_splits`; its "folds" list the names of the slices of each. None: five folds by
        the patient in the slices' names, as the phantom has it.

    Raises
    ------
    SliceError : no such fold, or a slice that no fold names.
    """
    folds = splits["folds"] if splits else patient_folds([item.name for item in files])
    if not 0 <= k < len(folds):
        raise SliceError(f"there is no fold {k}: choose one from 0 to {len(folds) - 1}")
    known = {name for names in folds for name in names}
    for item in files:
        if item.name not in known:
            raise SliceError(f"slice {item.name} ({item.image}) is in no fold of this split")
    held_out = set(folds[k])
    return [f for f in files if f.name not in held_out], [f for f in files if f.name in held_out]


def training_split(
    data: str | Path, k: int | None, train: str = "doctor", test: str = "test"
) -> tuple[list[SliceFiles], list[SliceFiles]]:
    """Slices of a data set to train on and those to evaluate on.

    Parameters
    ----------
    data : see `semiseg_root`.
    k : the fold of the training part that is held out; None evaluates on the test part.
    train, test : parts, see `list_slices`.
    """
    root = semiseg_root(data)
    files = list_slices(root, train)
    if k is None:
        return files, list_slices(root, test)
    splits = None
    if data == "covid-semiseg":
        from covidnb.catalog import load_splits

        splits = load_splits(data)
    return fold(files, k, splits)


def patient_folds(names: Sequence[str], folds: int = 5) -> list[list[str]]:
    """Names of slices dealt to `folds` folds, patient by patient in natural order."""
    patients = sorted({patient_of(name) for name in names}, key=natural_order)
    if len(patients) < folds:
        raise SliceError(f"{len(patients)} patients cannot be dealt to {folds} folds")
    where = {patient: number % folds for number, patient in enumerate(patients)}
    return [[name for name in names if where[patient_of(name)] == k] for k in range(folds)]


def semiseg_root(data: str | Path = "phantom") -> Path:
    """Root folder of a data set in the COVID-SemiSeg layout.

    Parameters
    ----------
    data : "phantom" (drawn once into the cache, in less than a minute), "covid-semiseg" (see `catalog.fetch`)
        or a folder.

    Raises
    ------
    SliceError : the folder is not in that layout.
    CatalogError : the data set is not here and cannot be fetched, or the disk is full.
    """
    if data == "phantom":
        from covidnb.slices.phantom import phantom_root

        return phantom_root()
    if data == "covid-semiseg":
        from covidnb import catalog

        root = catalog.fetch("covid-semiseg")
    else:
        root = Path(data)
    if not any((root / folder).is_dir() for folder in PARTS.values()):
        raise SliceError(f"{root} is not in the COVID-SemiSeg layout: it lacks TrainingSet and TestingSet")
    return root
