"""The baselines without a network: grey values alone tell lesions from lung, and their classes apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

SMOOTHING = 1.5  # sigma in pixels: single noisy pixels would cost the baseline Dice it need not lose


def smoothed(image: np.ndarray) -> np.ndarray:
    """Smooth an 8-bit slice, uint8."""
    return np.round(gaussian_filter(image.astype(np.float32), SMOOTHING)).astype(np.uint8)


@dataclass(frozen=True)
class GreyBand:
    """Grey values from `low` to `high`, both counted in, are called lesion."""

    low: int
    high: int
    dice: float
    """Mean Dice of the band on the slices that it was chosen on."""

    @classmethod
    def fit(cls, images: Sequence[np.ndarray], truths: Sequence[np.ndarray]) -> "GreyBand":
        """Choose the band with the best mean Dice of all 32,896.

        Two histograms a slice hold the overlap and the size of every band: no band is tried pixel by pixel.

        Parameters
        ----------
        images : sequence of uint8 (H, W)
        truths : sequence of uint8 (H, W)
            Lesion above 128.
        """
        total = np.zeros((256, 256))
        for image, truth in zip(images, truths, strict=True):
            grey, lesion = smoothed(image), truth > 128
            inside = np.bincount(grey[lesion], minlength=256)
            everywhere = np.bincount(grey.ravel(), minlength=256)
            # band[low, high] = sum of a histogram's bins low..high
            overlap, size = (_bands(h) for h in (inside, everywhere))
            total += 2 * overlap / np.maximum(size + lesion.sum(), 1)
        total = np.where(np.triu(np.ones((256, 256), bool)), total / len(images), -1)
        low, high = np.unravel_index(total.argmax(), total.shape)
        return cls(int(low), int(high), float(total.max()))

    def predict(self, image: np.ndarray) -> np.ndarray:
        """Map of a slice, float32 (H, W): 1 in the band, else 0."""
        grey = smoothed(image)
        return ((grey >= self.low) & (grey <= self.high)).astype(np.float32)


@dataclass(frozen=True)
class ConsolidationCut:
    """Infected pixels of at least this grey value are called consolidation, the others ground glass."""

    grey: int
    dice: float
    """Mean Dice of the two classes, over the slices that the cut was chosen on and a true infection map."""

    @classmethod
    def fit(cls, images: Sequence[np.ndarray], classes: Sequence[np.ndarray]) -> "ConsolidationCut":
        """Choose the cut with the best mean Dice of both classes of all 257.

        Parameters
        ----------
        images : sequence of uint8 (H, W)
        classes : sequence of uint8 (H, W)
            0 background, 1 GGO, 2 consolidation. A slice without a class counts 0 for it, as in the toolbox.
        """
        total = np.zeros(257)
        for image, labels in zip(images, classes, strict=True):
            # histogram of each class, and what lies below each cut
            below = [
                np.concatenate([[0], np.cumsum(np.bincount(smoothed(image)[labels == k], minlength=256))])
                for k in (1, 2)
            ]
            ggo, dense = (counts[-1] for counts in below)
            called_ggo = below[0] + below[1]
            total += below[0] / np.maximum(called_ggo + ggo, 1)
            total += (dense - below[1]) / np.maximum(ggo + dense - called_ggo + dense, 1)
        grey = int(total.argmax())
        return cls(grey, float(total[grey] / len(images)))

    def predict(self, image: np.ndarray, infected: np.ndarray) -> np.ndarray:
        """Classes of a slice, uint8 (H, W), from its grey values and its infection map (bool)."""
        return np.where(infected, 1 + (smoothed(image) >= self.grey), 0).astype(np.uint8)


def _bands(histogram: np.ndarray) -> np.ndarray:
    """Sum of a histogram's bins from row to column, float64 (256, 256)."""
    upto = np.concatenate([[0], np.cumsum(histogram)]).astype(float)
    return upto[None, 1:] - upto[:-1, None]
