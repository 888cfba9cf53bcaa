"""GASNet's augmentation, its strengths as in the paper's code, through MONAI and in the axial plane.

A volume's slices are the channels of one picture, so that all of them, and the masks, move together.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from monai.transforms import (
    Compose,
    Rand2DElastic,
    RandAffine,
    RandFlip,
    RandGaussianSmooth,
    RandomizableTransform,
)

SOMETIMES = 0.2  # how often each of the transforms below is applied, except the flip
NOISE = 0.005  # uniform, of the range of HU: 7.5 HU
PIXELS = 160  # the width that lengths in pixels were chosen at; they shrink with smaller volumes


class RandPerspective(RandomizableTransform):
    """Stretch a quadrilateral to the whole picture; its corners lie inwards by |N(0, s)| of the sides.

    Parameters
    ----------
    scale : range of s, which is drawn anew each time.
    prob : how often.
    """

    def __init__(self, scale: tuple[float, float], prob: float):
        super().__init__(prob)
        self.scale = scale

    def __call__(self, picture: torch.Tensor) -> torch.Tensor:
        """Warp a (C, H, W) picture, bilinearly, its border repeated."""
        self.randomize(None)
        if not self._do_transform:
            return picture
        inwards = np.abs(self.R.normal(scale=self.R.uniform(*self.scale), size=(4, 2)))
        grid = 2 * _quadrilateral(inwards, *picture.shape[1:]) - 1
        grid = torch.from_numpy(grid).to(picture)[None]
        return F.grid_sample(picture[None], grid, padding_mode="border", align_corners=False)[0]


def _quadrilateral(inwards: np.ndarray, height: int, width: int) -> np.ndarray:
    """Where in the unit square each pixel of a picture comes from, (H, W, 2) as (x, y).

    The homography takes the corners (0, 0), (1, 0), (1, 1), (0, 1) inwards by the rows of `inwards`: shares
    of the sides.
    """
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1)], float)
    moved = corners + inwards * np.where(corners > 0, -1, 1)
    equations, right = [], []
    for (x, y), (u, v) in zip(corners, moved, strict=True):
        equations += [(x, y, 1, 0, 0, 0, -x * u, -y * u), (0, 0, 0, x, y, 1, -x * v, -y * v)]
        right += [u, v]
    homography = np.append(np.linalg.solve(equations, right), 1).reshape(3, 3)
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    u, v, w = np.tensordot(homography, np.stack([x, y, np.ones_like(x)]), 1)
    return np.stack([u / w, v / w], -1)


@cache
def _transforms(width: int) -> tuple[Compose, RandGaussianSmooth]:
    """What moves image and masks, and what blurs the image alone, for volumes of that width in voxels."""
    pixel = width / PIXELS
    # an affine grid that covers 1 / 1.05 of the picture enlarges it by 5 %
    enlarge = (1 / 1.05 - 1, 0.0)
    warp = {"prob": SOMETIMES, "mode": "bilinear", "padding_mode": "border"}
    together = Compose(
        [
            RandFlip(prob=0.5, spatial_axis=1),
            RandAffine(rotate_range=np.radians(5), scale_range=(enlarge, enlarge), **warp),
            # every eighth pixel moves by N(0, s): in the mean as far as by the paper's uniform +-0.4 pixels
            Rand2DElastic(spacing=(8, 8), magnitude_range=(0.0, 0.4 / np.sqrt(3) * pixel), **warp),
            RandPerspective(scale=(0.01, 0.03), prob=SOMETIMES),
        ]
    )
    sigma = (0.0, 0.8 * pixel)
    return together, RandGaussianSmooth(sigma_x=sigma, sigma_y=sigma, prob=SOMETIMES)


def augmented(image: torch.Tensor, masks: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Augment a volume and its masks; the same seed gives the same result.

    Parameters
    ----------
    image : float32 (1, D, H, W) in [0, 1].
    masks : float32 (M, D, H, W), 0 or 1; cut at one half again after they moved.
    seed : of all that is drawn.
    """
    depth, height, width = image.shape[1:]
    seeds = np.random.SeedSequence(seed).generate_state(3)
    together, blur = _transforms(width)
    together.set_random_state(seed=int(seeds[0]))
    blur.set_random_state(seed=int(seeds[1]))
    moved = together(torch.cat([image, masks]).reshape(-1, height, width))
    # the blur takes what lies beyond the border for 0: give it the border's own values there
    margin = 4
    blurred = blur(F.pad(moved[:depth], [margin] * 4, mode="replicate"))[:, margin:-margin, margin:-margin]
    image, masks = (m.as_tensor().reshape(-1, depth, height, width) for m in (blurred, moved[depth:]))
    noise = np.random.default_rng(seeds[2]).uniform(-NOISE, NOISE, image.shape)
    return (image + torch.from_numpy(noise).float()).clamp(0, 1), (masks >= 0.5).float()
