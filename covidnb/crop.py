"""Cut both lungs out of a scan at the size GASNet works on, and carry masks back where they came from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from covidnb.ct import WINDOWS, CTError, check_same_grid

SIZE = (40, 160, 160)  # depth, height, width in voxels: GASNet's
CLIP = WINDOWS["lung"]  # HU: GASNet's
SMALLEST = 0.001  # components of the lung mask below this share of the scan's voxels do not count: GASNet's


@dataclass(frozen=True)
class LungCrop:
    """The box around both lungs in one scan, resized to a fixed number of voxels (Xu et al. 2020).

    Faces are aligned, not centres: the crop's first voxel begins where the box's first voxel begins, and the
    last ends where the last ends. Voxel i of `size` lies at (i + 1/2) * box / size - 1/2 voxels of the box.
    So nothing shifts and nothing shrinks, a box of the crop's own size is copied as it is, and the crop is an
    image with spacing, origin and direction that viewers lay over the scan.

    All fields are tuples of numbers in ITK's order (x, y, z), except `size`: `dataclasses.asdict` gives what
    JSON can keep, and `LungCrop(**kept)` what it was.

    Attributes
    ----------
    start, box : first voxel and number of voxels of the box in the scan.
    size : (depth, height, width) of the crop.
    scan_size, spacing, origin, direction : the scan's own grid; mm.
    """

    start: tuple[int, int, int]
    box: tuple[int, int, int]
    size: tuple[int, int, int]
    scan_size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]

    @classmethod
    def of(cls, lungs: sitk.Image, size: tuple[int, int, int] = SIZE) -> LungCrop:
        """The crop around all components of a lung mask that hold a thousandth of the scan's voxels or more.

        Raises
        ------
        CTError
            The mask holds no such component.
        """
        inside = sitk.GetArrayFromImage(lungs) > 0
        # the rest of the scan, most of it, need not be looked at for components
        rough = (ndimage.find_objects(inside.view(np.uint8)) or [(slice(0, 1),) * 3])[0]
        labels, _ = ndimage.label(inside[rough])
        voxels = np.bincount(labels.ravel())
        voxels[0] = 0
        counts = voxels >= SMALLEST * inside.size
        if not counts.any():
            raise CTError(
                f"this lung mask has no part of {SMALLEST:.1%} of the scan: its largest has {voxels.max()} "
                f"of {inside.size} voxels. Give the mask of both lungs, for example from segment_lungs."
            )
        boxes = [box for box, large in zip(ndimage.find_objects(labels), counts[1:], strict=True) if large]
        faces = np.array([[(along.start, along.stop) for along in box] for box in boxes])  # (boxes, zyx, 2)
        start = faces[:, ::-1, 0].min(0)
        return cls(
            start=tuple(int(a + along.start) for a, along in zip(start, rough[::-1], strict=True)),
            box=tuple(int(n) for n in faces[:, ::-1, 1].max(0) - start),
            size=tuple(int(n) for n in size),
            scan_size=lungs.GetSize(),
            spacing=lungs.GetSpacing(),
            origin=lungs.GetOrigin(),
            direction=lungs.GetDirection(),
        )

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """The box as slices of the scan's array (z, y, x)."""
        return tuple(slice(s, s + n) for s, n in zip(self.start[::-1], self.box[::-1], strict=True))

    def apply(self, image: sitk.Image) -> sitk.Image:
        """Cut the box out of an image on the scan's grid and resize it.

        A uint8 image is a mask: nearest voxel, uint8. Anything else is CT: linear, then clipped to
        [-1250, 250] HU, float32.

        Raises
        ------
        CTError
            The image does not lie on the grid that the crop was made for.
        """
        check_same_grid(image, self._scan_grid(), "the image to crop")
        grid = self._crop_grid()
        if image.GetPixelID() != sitk.sitkUInt8:
            image = sitk.Resample(sitk.Cast(image, sitk.sitkFloat32), grid, sitk.Transform(), sitk.sitkLinear)
            return sitk.Clamp(image, sitk.sitkFloat32, *CLIP)
        inside = sitk.GetArrayFromImage(image)[self.slices]
        small = sitk.GetImageFromArray(inside[_nearest(self.box[::-1], self.size)])
        small.CopyInformation(grid)
        return small

    def invert(self, mask: np.ndarray | sitk.Image) -> sitk.Image:
        """Carry a mask on the crop back onto the scan: nearest voxel inside the box, zeros outside.

        Parameters
        ----------
        mask
            Array of `size` (depth, height, width) or image on the crop's grid; whole numbers, 0 to 255.

        Returns
        -------
        SimpleITK.Image
            uint8 on the scan's grid.

        Raises
        ------
        CTError
            Another size or grid, or values that are no labels, such as probabilities.
        """
        if isinstance(mask, sitk.Image):
            check_same_grid(mask, self._crop_grid(), "the mask to carry back (compared with the crop)")
            mask = sitk.GetArrayFromImage(mask)
        if mask.shape != tuple(self.size):
            raise CTError(
                f"the mask to carry back is {mask.shape} (depth, height, width), the crop is "
                f"{tuple(self.size)}. Give one volume, without batch and channel."
            )
        labels = mask.astype(np.uint8)
        if not np.array_equal(labels, mask):
            raise CTError(
                f"the mask to carry back runs from {mask.min():g} to {mask.max():g}, and these are no labels "
                "(whole numbers from 0 to 255). Threshold probabilities first, for example at 0.5."
            )
        whole = np.zeros(self.scan_size[::-1], np.uint8)
        whole[self.slices] = labels[_nearest(self.size, self.box[::-1])]
        image = sitk.GetImageFromArray(whole)
        image.CopyInformation(self._scan_grid())
        return image

    def _scan_grid(self) -> sitk.Image:
        return _grid(self.scan_size, self.spacing, self.origin, self.direction)

    def _crop_grid(self) -> sitk.Image:
        size = np.array(self.size[::-1])
        step = np.array(self.box) / size  # one voxel of the crop, in voxels of the scan
        first = np.array(self.start) + (step - 1) / 2
        origin = self._scan_grid().TransformContinuousIndexToPhysicalPoint(first.tolist())
        return _grid(size.tolist(), (np.array(self.spacing) * step).tolist(), origin, self.direction)


def _grid(size, spacing, origin, direction) -> sitk.Image:
    """An image of zeros, uint8, with that geometry."""
    grid = sitk.Image(size, sitk.sitkUInt8)
    grid.SetSpacing(spacing)
    grid.SetOrigin(origin)
    grid.SetDirection(direction)
    return grid


def _nearest(have: tuple[int, ...], want: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Index arrays that resize an array of shape `have` to `want` by nearest neighbour, faces aligned.

    In whole numbers, so that a centre which falls on a face always goes to the same side: up.
    """
    return np.ix_(*((2 * np.arange(n) + 1) * m // (2 * n) for m, n in zip(have, want, strict=True)))
