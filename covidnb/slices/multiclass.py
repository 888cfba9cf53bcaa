"""Slices with classes: ground-glass opacity and consolidation, and the infection prior beside the slice."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from covidnb.files import whole
from covidnb.slices import (
    InfectionSlices,
    SliceError,
    SliceFiles,
    check_size,
    network_input,
    normalised,
    read_classes,
    read_image,
    read_mask,
    resized_square,
)

CLASSES = ("background", "GGO", "consolidation")
PALETTE = (0, 0, 0, 128, 0, 0, 0, 128, 0)  # GGO red, consolidation green, as in the paper's figures


def write_classes(path: str | Path, classes: np.ndarray) -> None:
    """Write class indices, uint8 (H, W), as the palette PNG that `read_classes` reads."""
    from PIL import Image

    with whole(path) as part:
        image = Image.fromarray(classes)
        image.putpalette(PALETTE)
        image.save(part, format="png")


def read_prior(item: SliceFiles, source: str | Path) -> np.ndarray:
    """Infection prior of a slice, uint8 (H, W), 255 for certain infection.

    Parameters
    ----------
    item : from `list_slices`.
    source : "label", the true infection of both classes together, or a folder of maps NAME.png, such as the
        predictions/ of a run on the same slices.

    Raises
    ------
    SliceError : the folder has no map of this slice, or one that cannot be read.
    """
    if source == "label":
        return read_mask(item.prior or item.mask)
    path = Path(source) / f"{item.name}.png"
    if not path.is_file():
        raise SliceError(
            f"{path} does not exist: a folder of priors holds a map of every slice, "
            "as predictions/ of a run that was evaluated on these slices"
        )
    return read_mask(path)


def imperfect_prior(prior: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Make of a true infection mask what a network might have made of it.

    Lesions are lost and invented, and the borders of the others moved, in places outwards, in places inwards,
    and blurred. Of the 50 real labels, at 256 pixels, strength 0.5 leaves a mean Dice of 0.82 and strength 1
    of 0.67 (five draws: 0.80 to 0.85, 0.61 to 0.71); Inf-Net's maps of held-out slices have 0.61 to 0.79 by
    fold, 0.68 on average (data/results/baselines_folds.json).

    Parameters
    ----------
    prior : (H, W) in [0, 1].
    strength : 0 leaves it as it is.
    rng : each call draws anew.

    Returns
    -------
    float32 (H, W) in [0, 1]; 0.5 is the border.
    """
    if strength == 0:
        return prior.astype(np.float32)
    side = max(prior.shape)
    lesions, count = ndimage.label(prior >= 0.5)
    lost = np.flatnonzero(rng.random(count) < 0.2 * strength) + 1
    kept = (lesions > 0) & ~np.isin(lesions, lost)
    y, x = np.mgrid[: prior.shape[0], : prior.shape[1]] / side
    for _ in range(rng.poisson(0.75 * strength)):
        (cy, cx), (ry, rx) = rng.uniform(0.1, 0.9, 2), rng.uniform(0.02, 0.08, 2)
        kept |= ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
    if not kept.any():
        return np.zeros(prior.shape, np.float32)
    # distance from the border, positive inside; a smooth field moves the border by a few pixels
    distance = ndimage.distance_transform_edt(kept) - ndimage.distance_transform_edt(~kept)
    field = ndimage.gaussian_filter(rng.standard_normal(prior.shape), 0.03 * side)
    field = 0.01 * side * strength * (field / field.std() + rng.standard_normal())
    softness = 0.01 * side * strength
    return (1 / (1 + np.exp(np.clip(-(distance + field) / softness, -50, 50)))).astype(np.float32)


def class_input(grey: np.ndarray, prior: np.ndarray | None, size: int) -> torch.Tensor:
    """One slice, and its prior if the network takes one, as `MultiClassSlices` gives them to a network.

    Parameters
    ----------
    grey : uint8 (H, W).
    prior : uint8 (H, W), 255 for certain infection, or None.
    size : side of the square in pixels.

    Returns
    -------
    float32 (3 or 6, size, size)
    """
    planes = [grey] if prior is None else [grey, prior]
    return torch.cat([network_input(plane, size) for plane in planes])


class MultiClassSlices(InfectionSlices):
    """Slices with the class of each pixel, and with an infection prior, as a multi-class network learns them.

    Slice and prior are resized and normalised alike, three channels each, as the released loader does. That
    one resizes the labels' grey values bilinearly and reads what lies between two classes as classes far
    beyond; ours resizes each class for itself and takes the largest. Augmentation as in `InfectionSlices`.

    Parameters
    ----------
    files : from `list_slices`, part "multiclass_train" or "multiclass_test".
    size : side of the square in pixels.
    prior : see `read_prior`; None for slices alone.
    noise : training priors are made imperfect, each at a strength drawn between 0 and this one, afresh in
        every epoch: see `imperfect_prior`.
    augment, seed : see `InfectionSlices`; `seed` is also that of the noise.

    Items are dicts: "image" float32 (3, size, size), with a prior (6, size, size); "classes" int64
    (size, size); "name" str.

    Raises
    ------
    SliceError : as `InfectionSlices`; a label that is no palette file; a slice without prior.
    """

    def __init__(
        self,
        files: Sequence[SliceFiles],
        size: int = 352,
        prior: str | Path | None = "label",
        noise: float = 0.0,
        augment: bool = False,
        seed: int = 0,
    ):
        super().__init__(files, size, augment, seed)
        self.prior = prior
        self.noise = noise

    def _read(self, item: SliceFiles) -> np.ndarray:
        """Image, GGO, consolidation and, if there is one, prior."""
        image, classes = read_image(item.image), read_classes(item.mask)
        check_size(item.mask, classes, item.image, image)
        planes = [image, *(np.where(classes == k, 255, 0).astype(np.uint8) for k in (1, 2))]
        if self.prior is not None:
            planes.append(read_prior(item, self.prior))
            check_size(Path(f"the prior of {item.name}"), planes[-1], item.image, image)
        return np.stack([resized_square(plane, self.size) for plane in planes])

    def __getitem__(self, index: int) -> dict:
        stack = self._stack(index).float() / 255
        if self._transforms is not None:
            stack = self._augmented(stack, index)
        image, ggo, consolidation, *prior = stack
        classes = torch.stack([1 - ggo - consolidation, ggo, consolidation]).argmax(0)
        channels = [normalised(image[None])]
        if prior:
            channels.append(normalised(self._imperfect(prior[0], index)[None]))
        return {"image": torch.cat(channels), "classes": classes, "name": self.files[index].name}

    def _imperfect(self, prior: torch.Tensor, index: int) -> torch.Tensor:
        if not self.noise:
            return prior
        # a stream of its own: the noise of a slice does not depend on how it was augmented
        rng = np.random.default_rng((self.seed, self.epoch, index, 1))
        return torch.from_numpy(imperfect_prior(prior.numpy(), rng.uniform(0, self.noise), rng))
