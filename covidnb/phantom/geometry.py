"""Smooth signed distances on a voxel grid: what every organ of the digital chest is made of.

Lengths are in mm, in the patient's own coordinates: x to the left, y to the back, z to the head (LPS), the
origin in the midline at mid-lung height. A field is negative inside a structure; `fill` turns it into the
fraction of each voxel that the structure occupies, which is what partial volume means. Arrays are (z, y, x).
"""

from __future__ import annotations

import numpy as np
from scipy.interpolate import PchipInterpolator


class Grid:
    """Voxel centres of a scan in the patient's coordinates: `z` (Z,1,1), `y` and `x` (Z,Y,X), float32, mm.

    A patient never lies quite straight: `turn` (radians) rotates about the long axis and `sway`, four
    amplitudes (mm) and four phases, adds slow waves, so that no outline is a formula's.
    """

    def __init__(self, shape, spacing, top: float, turn: float, sway):
        self.shape, self.spacing = tuple(shape), tuple(spacing)
        self.turn, self.sway = turn, sway
        nz, ny, nx = self.shape
        sz, sy, sx = self.spacing
        self.axes = [
            (top - sz * np.arange(nz)[::-1]).astype(np.float32),
            (sy * (np.arange(ny) - (ny - 1) / 2) + 4).astype(np.float32),  # the body lies a little low
            (sx * (np.arange(nx) - (nx - 1) / 2)).astype(np.float32),
        ]
        self.voxel = max(sy, sx)
        z, y, x = np.ix_(*self.axes)
        dy, dx = self._shift(z, y, x)
        self.z, self.y, self.x = z, y + dy, x + dx

    def _shift(self, z, y, x):
        """How far a point has moved: y with (z, x) and x with (z, y)."""
        a, b, c, d, pa, pb, pc, pd = self.sway
        dx = self.turn * y + a * np.sin(z / 38 + pa) + b * np.sin(y / 27 + z / 60 + pb)
        dy = -self.turn * x + c * np.sin(z / 33 + pc) + d * np.sin(x / 29 - z / 55 + pd)
        return dy, dx

    def on_axes(self, points: np.ndarray) -> np.ndarray:
        """Points (n, 3) of the patient's coordinates on the straight `axes`, where thin tubes are drawn."""
        z, y, x = np.asarray(points, np.float32).T
        dy, dx = self._shift(z, y, x)
        return np.stack([z, y - dy, x - dx], axis=1)

    def box(self, low, high, margin: float = 6.0):
        """Slices that hold the block between two corners (z, y, x); the margin allows for the sway."""
        return tuple(
            slice(int(np.searchsorted(a, lo - margin)), int(np.searchsorted(a, hi + margin)))
            for a, lo, hi in zip(self.axes, low, high, strict=True)
        )

    def at(self, box):
        """z, y, x of a box, ready to broadcast."""
        return self.z[box[0]], self.y[box], self.x[box]


def fill(d, width: float):
    """Fraction of a voxel inside a surface at signed distance d; width is the size of the voxel, in mm."""
    return np.clip(0.5 - d / width, 0, 1)


def smooth_min(a, b, k: float):
    """Union of two signed distances with its seam rounded over k mm (Quilez's polynomial smooth minimum)."""
    h = np.maximum(k - np.abs(a - b), 0) / k
    return np.minimum(a, b) - h * h * (k / 4)


def smooth_max(a, b, k: float):
    """Intersection of two signed distances with its edge rounded over k mm."""
    return -smooth_min(-a, -b, k)


def ellipsoid(at, centre, axes, tilt: float = 0.0):
    """Approximate signed distance to an ellipsoid: centre, half axes (z, y, x), tilt from y to x, radians."""
    z, y, x = at
    z, y, x = z - float(centre[0]), y - float(centre[1]), x - float(centre[2])
    if tilt:
        c, s = float(np.cos(tilt)), float(np.sin(tilt))
        y, x = c * y - s * x, s * y + c * x
    k = np.sqrt((z / axes[0]) ** 2 + (y / axes[1]) ** 2 + (x / axes[2]) ** 2)
    return (k - 1) * float(min(axes))


def capsule(at, p, q, radius_p: float, radius_q: float):
    """Signed distance to a tapering tube from p to q, points as (z, y, x)."""
    z, y, x = at
    pz, py, px = (float(v) for v in p)
    vz, vy, vx = float(q[0]) - pz, float(q[1]) - py, float(q[2]) - px
    z, y, x = z - pz, y - py, x - px
    t = np.clip((z * vz + y * vy + x * vx) / max(vz * vz + vy * vy + vx * vx, 1e-6), 0, 1)
    d2 = (z - t * vz) ** 2 + (y - t * vy) ** 2 + (x - t * vx) ** 2
    return np.sqrt(d2) - (radius_p + t * (radius_q - radius_p))


def superellipse(x, y, half_width, half_depth, power: float):
    """Radial distance to the curve |x/a|^p + |y/b|^p = 1, negative inside."""
    r = np.sqrt(x * x + y * y)
    s = (np.abs(x) / half_width) ** power + (np.abs(y) / half_depth) ** power
    return r * (1 - np.maximum(s, 1e-4) ** (-1 / power))


def profile(heights, values, z):
    """A smooth curve through (height, value) pairs at heights z, constant beyond its ends; float32."""
    curve = PchipInterpolator(heights, values)
    return curve(np.clip(z, heights[0], heights[-1])).astype(np.float32)


def smooth_noise(shape, spacing, scale: float, rng: np.random.Generator) -> np.ndarray:
    """Noise of standard deviation 1 that varies over `scale` mm, interpolated from a coarse lattice."""
    size = [max(2, int(np.ceil(n * s / scale)) + 2) for n, s in zip(shape, spacing, strict=True)]
    field = rng.standard_normal(size, np.float32)
    for axis, (n, s) in enumerate(zip(shape, spacing, strict=True)):
        at = np.arange(n) * s / scale
        low = at.astype(int)
        w = (at - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        w = w * w * (3 - 2 * w)
        field = np.take(field, low, axis=axis) * (1 - w) + np.take(field, low + 1, axis=axis) * w
    return field / max(float(field.std()), 1e-6)
