"""The healthy patient of the digital chest: organs as smooth signed distances in millimetres.

Everything is written in the patient's own coordinates, in mm: x to the left, y to the back, z to the head (LPS), with
the origin in the midline at mid-lung height. A structure is a field `d` that is negative inside; `fill` turns it into
the fraction of each voxel that the structure occupies, which is what partial volume means.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage
from scipy.interpolate import PchipInterpolator

# Numbers of the label map, in painting order: a later structure covers an earlier one.
ANATOMY = {
    "air": 0,
    "fat": 1,
    "muscle": 2,
    "skin": 3,
    "mediastinum": 4,
    "liver": 5,
    "stomach": 6,
    "spleen": 7,
    "heart": 8,
    "aorta": 9,
    "great vessels": 10,
    "oesophagus": 11,
    "spine": 12,
    "ribs": 13,
    "sternum": 14,
    "scapula": 15,
    "right lung": 16,
    "left lung": 17,
    "lung vessels": 18,
    "airway": 19,
    "table": 20,
}


@dataclass(frozen=True)
class Patient:
    """What differs between two people; lengths in mm, drawn by `Patient.draw`."""

    width: float  # scale of the rib cage from side to side, 1 = average
    depth: float  # the same from front to back
    height: float  # the same from base to apex
    fat: float  # subcutaneous fat
    muscle: float  # chest wall between ribs and fat
    breast: float  # extra soft tissue in front, 0 in most men
    heart: float  # scale of the heart
    lift: float  # how far the diaphragm stands above its average place (shallow breath)
    turn: float  # rotation about the long axis, radians
    sway: tuple[float, ...]  # amplitudes and phases of the low-frequency warp
    rib_step: float  # distance between ribs along the spine
    rib_phase: float
    kyphosis: float  # how far the upper chest lies in front of the lower

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Patient:
        """A patient at random; every use of the generator is here, so that the anatomy depends on nothing else."""
        woman = rng.random() < 0.45
        return cls(
            width=rng.normal(0.95 if woman else 1.03, 0.035),
            depth=rng.normal(0.97 if woman else 1.03, 0.05),
            height=np.clip(rng.normal(0.95 if woman else 1.02, 0.04), 0.86, 1.1),
            fat=rng.uniform(7, 24),
            muscle=rng.uniform(9, 14) if woman else rng.uniform(12, 19),
            breast=rng.uniform(10, 30) if woman else 0.0,
            heart=rng.normal(1.0, 0.06),
            lift=rng.uniform(-8, 16),
            turn=rng.normal(0, 0.025),
            sway=tuple(rng.uniform(0.6, 1.8, 4)) + tuple(rng.uniform(0, 2 * np.pi, 4)),
            rib_step=rng.normal(23.5, 0.8),
            rib_phase=rng.uniform(0, 1),
            kyphosis=rng.uniform(4, 14),
        )


@dataclass
class Grid:
    """Voxel centres in the patient's coordinates: z (Z,1,1), y and x (Z,Y,X), in mm, warped as the patient is."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    patient: Patient
    axes: list[np.ndarray] = field(init=False)  # unwarped, one vector per axis

    def __post_init__(self):
        top = 132.0 * self.patient.height  # the field of view starts above the apices
        nz, ny, nx = self.shape
        sz, sy, sx = self.spacing
        self.axes = [
            (top - sz * (nz - 1 - np.arange(nz))).astype(np.float32),
            (sy * (np.arange(ny) - (ny - 1) / 2)).astype(np.float32),
            (sx * (np.arange(nx) - (nx - 1) / 2)).astype(np.float32),
        ]
        z, y, x = np.ix_(*self.axes)
        dy, dx = self._shift(z, y, x)
        self.z, self.y, self.x = z, y + dy, x + dx

    def _shift(self, z, y, x):
        """Rotation about z and a slow sway of y with (z, x) and of x with (z, y)."""
        amp, phase = self.patient.sway[:4], self.patient.sway[4:]
        dx = (
            self.patient.turn * y
            + amp[0] * np.sin(z / 38 + phase[0])
            + amp[1] * np.sin(y / 27 + z / 60 + phase[1])
        )
        dy = (
            -self.patient.turn * x
            + amp[2] * np.sin(z / 33 + phase[2])
            + amp[3] * np.sin(x / 29 - z / 55 + phase[3])
        )
        return dy, dx

    def unwarped(self, points: np.ndarray) -> np.ndarray:
        """Where points (n, 3) given as z, y, x in the patient's coordinates lie on the unwarped axes."""
        z, y, x = points.T
        dy, dx = self._shift(z, y, x)
        return np.stack([z, y - dy, x - dx], axis=1)

    def box(self, low, high, margin: float = 6.0) -> tuple[slice, slice, slice]:
        """Slices of the axes between two corners (z, y, x) in mm, with a margin for the warp."""
        return tuple(
            slice(int(np.searchsorted(a, lo - margin)), int(np.searchsorted(a, hi + margin)))
            for a, lo, hi in zip(self.axes, low, high, strict=True)
        )

    def at(self, box):
        """z, y, x of a box, ready to broadcast."""
        bz, by, bx = box
        return self.z[bz], self.y[bz, by, bx], self.x[bz, by, bx]


def fill(d: np.ndarray, width: float) -> np.ndarray:
    """Fraction of a voxel inside a surface at signed distance d (mm, negative inside); width is the voxel's, in mm."""
    return np.clip(0.5 - d / width, 0, 1)


def smooth_min(a, b, k: float):
    """Union of two signed distances whose seam is rounded over k mm (polynomial smooth minimum, Quilez 2013)."""
    h = np.maximum(k - np.abs(a - b), 0) / k
    return np.minimum(a, b) - h * h * (k / 4)


def smooth_max(a, b, k: float):
    """Intersection of two signed distances whose edge is rounded over k mm."""
    return -smooth_min(-a, -b, k)


def ellipsoid(grid_at, centre, axes, tilt: float = 0.0):
    """Signed distance (approximate) to an ellipsoid; centre and half axes as (z, y, x), tilt turns y into x."""
    z, y, x = grid_at
    z, y, x = z - centre[0], y - centre[1], x - centre[2]
    if tilt:
        c, s = np.cos(tilt), np.sin(tilt)
        y, x = c * y - s * x, s * y + c * x
    k = np.sqrt((z / axes[0]) ** 2 + (y / axes[1]) ** 2 + (x / axes[2]) ** 2)
    return (k - 1) * np.float32(min(axes))


def capsule(grid_at, p, q, rp: float, rq: float):
    """Signed distance to a tapering tube from p (radius rp) to q (radius rq); points as (z, y, x)."""
    z, y, x = grid_at
    p, q = np.asarray(p, np.float32), np.asarray(q, np.float32)
    v = q - p
    t = ((z - p[0]) * v[0] + (y - p[1]) * v[1] + (x - p[2]) * v[2]) / max(float(v @ v), 1e-6)
    t = np.clip(t, 0, 1)
    d2 = (z - p[0] - t * v[0]) ** 2 + (y - p[1] - t * v[1]) ** 2 + (x - p[2] - t * v[2]) ** 2
    return np.sqrt(d2) - (rp + t * (rq - rp))


def profile(heights, values):
    """A smooth curve through (height in mm, value) pairs, flat beyond its ends."""
    f = PchipInterpolator(heights, values)
    return lambda z: f(np.clip(z, heights[0], heights[-1])).astype(np.float32)


class Painter:
    """A scan in the making: `hu` (noise-free, float32) and `labels` (uint8), painted structure by structure."""

    def __init__(self, grid: Grid):
        self.grid = grid
        self.hu = np.full(grid.shape, -1000, np.float32)
        self.labels = np.zeros(grid.shape, np.uint8)
        self.voxel = max(grid.spacing[1:])

    def paint(self, name: str | None, d, hu, box=None, width: float | None = None):
        """Blend `hu` in where the signed distance `d` is negative; name None leaves the labels as they are."""
        box = box or (slice(None),) * 3
        part = fill(d, width or self.voxel)
        old = self.hu[box]
        old += part * (hu - old)
        if name is not None:
            self.labels[box][part > 0.5] = ANATOMY[name]

    def paint_shape(self, name, low, high, shape, hu, width=None):
        """The same within a box; `shape` gets the box's coordinates and returns signed distances."""
        box = self.grid.box(low, high)
        if all(s.stop > s.start for s in box):
            self.paint(name, shape(self.grid.at(box)), hu, box, width)


class Chest:
    """The parts of one patient, each a signed distance on the grid, and the order in which they are painted."""

    def __init__(self, grid: Grid, rng: np.random.Generator):
        self.grid, self.p, self.rng = grid, grid.patient, rng
        p = self.p
        h = p.height
        z = grid.z / h
        # inner wall of the rib cage: half width, half depth and the line of the gutters beside the spine
        self.half_width = (
            profile([-165, -100, -40, 30, 75, 105, 124], [126, 134, 133, 121, 97, 68, 34])(z) * p.width
        )
        self.half_depth = (
            profile([-165, -100, -40, 30, 75, 105, 124], [90, 94, 93, 84, 66, 47, 26])(z) * p.depth
        )
        self.back = (
            profile([-165, -60, 20, 80, 124], [82, 90, 91, 82 - p.kyphosis / 2, 66 - p.kyphosis])(z) * p.depth
        )
        self.centre = self.back - self.half_depth
        ax = np.abs(grid.x)
        # the front of the vertebrae, from which the mediastinum hangs
        self.spine_y = self.back[:, :, :] - 24.0
        yc = grid.y - self.centre
        r = np.sqrt(ax * ax + yc * yc)
        s = ((ax / self.half_width) ** 2.35 + (np.abs(yc) / self.half_depth) ** 2.35) ** (1 / 2.35)
        self.cage = r - r / np.maximum(s, 1e-3)  # radial distance to the inner wall
        self.angle = np.arctan2(ax, -yc)  # 0 at the sternum, pi at the spine

    # ---- soft tissue -------------------------------------------------------------------------------------------
    def paint_body(self, art: Painter):
        """Skin, fat, muscle; breasts; the table below."""
        g, p = self.grid, self.p
        z = g.z / p.height
        wide = (
            profile([-165, -60, 40, 95, 132], [150, 158, 160, 168, 176])(z) * p.width
            + p.fat * 0.9
            + p.muscle * 0.6
        )
        front = profile([-165, -60, 30, 90, 132], [104, 106, 98, 74, 52])(z) * p.depth
        back = profile([-165, -60, 30, 90, 132], [116, 122, 124, 122, 112])(z) * p.depth
        top, bottom = -(front + p.fat), back + p.fat * 0.5
        cy, b = (top + bottom) / 2, (bottom - top) / 2
        yc = g.y - cy
        bump = p.breast * np.exp(-(((g.z + 5) / 45) ** 2))
        r2 = np.sqrt(g.x * g.x + yc * yc)
        s = ((np.abs(g.x) / wide) ** 2.5 + (np.abs(yc) / b) ** 2.5) ** (1 / 2.5)
        skin = r2 - r2 / np.maximum(s, 1e-3)
        if p.breast:
            skin = smooth_min(
                skin,
                ellipsoid(
                    (g.z, g.y, np.abs(g.x)), (-5, -95 * p.depth, 80 * p.width), (55, 28 + p.breast, 60)
                ),
                30,
            )
        side = np.sin(self.angle)
        fat = p.fat * (0.75 + 0.35 * side) + bump * (self.angle < 1.2)
        muscle = smooth_max(skin + 2 + fat, self.cage - 70, 10)
        muscle = smooth_min(muscle, self.cage - 14, 12)
        art.paint("skin", skin, 40)
        art.paint("fat", skin + 2.2, -102)
        art.paint("muscle", muscle, 52)
        # planes of fat between the muscles
        plane = np.abs(self.cage - 17 - 7 * np.sin(2.0 * self.angle + 0.02 * g.z)) - 1.0
        plane = np.maximum(plane, muscle + 3)
        art.paint(None, plane, -40, width=3.0)
        # table: two curved plates
        bed = bottom.max() + 6 + (g.x / 60) ** 2
        art.paint("table", np.abs(g.y - bed - 3) - 1.2, -300)
        art.paint("table", np.abs(g.y - bed - 26 + (g.x / 55) ** 2) - 1.2, -500)
        self.skin = skin

    def paint_bones(self, art: Painter):
        """Ribs (one field for all of them), scapulae, spine, sternum, clavicles."""
        g, p = self.grid, self.p
        z = g.z
        # ribs run in a shell outside the inner wall and drop as they come forward
        shell = self.cage - 5.5
        near = np.nonzero((np.abs(shell) < 9).any(axis=(1, 2)))[0]
        sel = np.nonzero(np.abs(shell) < 9)
        t = 1 - self.angle[sel] / np.pi  # 0 at the spine, 1 at the sternum
        drop = (105 * t - 62 * t**2.4) * p.height  # falls, then the cartilage rises again
        height = np.broadcast_to(z, g.shape)[sel] + drop
        phase = height / p.rib_step + p.rib_phase
        number = np.round(phase)
        dz = (phase - number) * p.rib_step * 0.82  # across the rib, which slopes
        d = (np.sqrt((shell[sel] / 4.2) ** 2 + (dz / 6.2) ** 2) - 1) * 4.2
        up = 112 * p.height
        d = np.where((height > up) | (height < -190), 9, d)
        cartilage = np.clip((t - 0.74) / 0.06, 0, 1)
        bone = np.where(d > -1.6, 620.0, 260.0) * (1 - cartilage) + 95 * cartilage
        part = fill(d, art.voxel * 1.3)
        art.hu[sel] += part * (bone - art.hu[sel])
        art.labels[sel] = np.where(part > 0.5, ANATOMY["ribs"], art.labels[sel])
        del near
        # scapulae: thin plates behind the upper ribs
        zs = z / p.height
        plate = np.maximum(
            np.abs(self.cage - 20 - 8 * np.cos(3 * (self.angle - 2.2))) - 2.4,
            np.abs(self.angle - 2.25) * 60 - 32,
        )
        plate = np.maximum(plate, np.abs(zs - 55) - 62)
        plate = np.maximum(plate, self.skin + p.fat + 4)
        art.paint("scapula", plate, 480)
        # vertebrae
        y0 = self.spine_y[:, 0, 0]
        lo, hi = (g.axes[0][0], float(y0.min()) - 30, -55), (g.axes[0][-1], float(y0.max()) + 75, 55)
        box = g.box(lo, hi)
        bz, by, bx = g.at(box)
        yv = by - self.spine_y[box[0]]
        size = profile([-165, 0, 130], [1.12, 1.0, 0.8])(z[box[0]])
        body = (np.sqrt((bx / (17.5 * size)) ** 2 + ((yv - 2) / (14.5 * size)) ** 2) - 1) * 14
        level = (bz / p.rib_step + p.rib_phase) % 1.0
        disc = np.exp(-(((np.minimum(level, 1 - level)) / 0.13) ** 2))
        canal = np.sqrt((bx / 9.5) ** 2 + ((yv - 23) / 8) ** 2) * 8 - 8
        ring = np.maximum(np.sqrt((bx / 16) ** 2 + ((yv - 24) / 13) ** 2) * 13 - 13, -canal)
        spinous = np.maximum(np.abs(bx) - 3.2, np.abs(yv - 48) - 15)
        spinous = np.maximum(spinous, np.abs((level - 0.62)) * p.rib_step - 7.5)
        transverse = np.maximum(np.abs(yv - 25 - 0.25 * np.abs(bx)) - 5.5, np.abs(bx) - 34)
        transverse = np.maximum(transverse, np.abs(level - 0.42) * p.rib_step - 6)
        marrow = 190 - 120 * disc
        cortex = 430 - 330 * disc
        art.paint("spine", body, np.where(body < -2, marrow, cortex), box)
        arch = np.minimum(np.minimum(ring, spinous), np.maximum(transverse, -canal))
        art.paint("spine", arch, 420, box)
        art.paint(None, canal, 32, box)
        # sternum and clavicles
        front = self.centre - self.half_depth
        box = g.box((-70 * p.height, -200, -45), (100 * p.height, 40, 45))
        bz, by, bx = g.at(box)
        ys = by - front[box[0]] + 9
        half = profile([-70, -50, 40, 62, 85], [8, 16, 15, 28, 30])(bz / p.height)
        plate = smooth_max(np.abs(bx) - half, np.abs(ys) - 5.5, 4)
        plate = smooth_max(plate, np.abs(bz / p.height - 12) - 76, 4)
        art.paint("sternum", plate, np.where(plate < -1.8, 150.0, 420.0), box)
        top = 84 * p.height
        y_top = float(np.interp(top, g.axes[0], front[:, 0, 0])) - 10
        for side in (-1, 1):
            a = (top, y_top, side * 26.0)
            b = (top + 34, y_top + 42, side * 150.0 * p.width)
            lo, hi = np.minimum(a, b) - 9, np.maximum(a, b) + 9
            art.paint_shape("sternum", lo, hi, lambda at, a=a, b=b: capsule(at, a, b, 7, 6), 380)

    # ---- mediastinum -------------------------------------------------------------------------------------------
    def _tube_points(self):
        """Courses of the great vessels and the airway: name -> (points (z, y, x) mm, radii mm)."""
        p, h = self.p, self.p.height
        w = p.width

        def back(z):  # the front of the spine at a height
            return float(np.interp(z * h, self.grid.axes[0], self.spine_y[:, 0, 0]))

        s_arch = back(48)
        carina = (24 * h, back(24) - 24, 3.0)
        tubes = {
            "aorta": [
                (
                    [-22, -1, 12],
                    [10, -16, -8],
                    [38, -14, -12],
                    [57, 0, -4],
                    [62, 14, 8],
                    [56, s_arch - 14, 19],
                    [38, back(38) - 6, 24],
                    [0, back(0) - 2, 24],
                    [-70, back(-70) - 4, 19],
                    [-170, back(-170) - 10, 8],
                ),
                (15, 16, 16, 14.5, 13.5, 13, 12.5, 12, 11.5, 10.5),
            ],
            "pulmonary trunk": [
                ([-14, -34, 22], [10, -32, 24], [26, -12, 22], [30, 10, 30], [28, 18, 40]),
                (14, 14, 13.5, 11, 9),
            ],
            "right pulmonary artery": [
                ([24, -10, 18], [20, -2, -10], [16, 4, -32], [12, 8, -42]),
                (11, 11, 10, 8),
            ],
            "superior vena cava": [
                ([118, -2, -34], [70, -8, -28], [30, -8, -27], [-8, -8, -27]),
                (7, 9, 10, 11),
            ],
            "left brachiocephalic vein": [([98, -8, 36], [74, -24, 8], [64, -16, -22]), (7, 7, 8)],
            "brachiocephalic artery": [([58, -4, -4], [90, -2, -14], [125, 4, -22]), (7, 6.5, 5)],
            "left carotid": [([60, 8, 6], [125, 6, 16]), (5, 4)],
            "left subclavian": [([58, 16, 14], [95, 18, 22], [118, 14, 34]), (6, 5.5, 5)],
            "inferior vena cava": [([-30, 0, -24], [-75, 12, -22], [-165, 25, -22]), (12, 12, 12)],
            "azygos": [
                ([-120, back(-120) + 2, -6], [20, back(20) - 3, -9], [34, back(34) - 6, -16], [36, 6, -24]),
                (3.5, 4, 4.5, 4.5),
            ],
            "left lower vein": [([-16, 22, 16], [-14, 26, 44]), (8, 6)],
            "right lower vein": [([-18, 20, -14], [-18, 24, -44]), (8, 6)],
        }
        points = {k: (np.asarray(v[0], np.float32) * (h, 1, w), v[1]) for k, v in tubes.items()}
        points["trachea"] = (
            np.asarray([[136 * h, back(136) - 22, 0], [60 * h, back(60) - 23, -1], carina], np.float32),
            (9, 8.5, 9),
        )
        points["right bronchus"] = (
            np.asarray([carina, [10 * h, carina[1] + 2, -22 * w], [0, carina[1] + 4, -36 * w]], np.float32),
            (7.5, 6.8, 5),
        )
        points["left bronchus"] = (
            np.asarray([carina, [8 * h, carina[1] + 4, 26 * w], [-6 * h, carina[1] + 8, 44 * w]], np.float32),
            (7, 6, 4.8),
        )
        points["oesophagus"] = (
            np.asarray(
                [
                    [136 * h, back(136) - 8, 4],
                    [50 * h, back(50) - 9, 4],
                    [0, back(0) - 13, 2],
                    [-80 * h, back(-80) - 16, 12],
                    [-110 * h, back(-110) - 24, 20],
                ],
                np.float32,
            ),
            (6, 6.5, 6.5, 7, 8),
        )
        return points

    def build_mediastinum(self):
        """Signed distances of the heart and of every tube, and of all of it with its fat, which the lungs wrap around."""
        g, p = self.grid, self.p
        k, lift = p.heart, p.lift * 0.6
        y_front = float(np.interp(-45, g.axes[0], (self.centre - self.half_depth)[:, 0, 0]))
        base = np.array([-48 * p.height + lift, y_front + 52, 0])
        self.heart_parts = [
            (base + (-6, -4, 34), (40 * k, 36 * k, 40 * k), 0.6),  # left ventricle
            (base + (-8, -20, 4), (40 * k, 26 * k, 36 * k), 0.2),  # right ventricle
            (base + (6, 6, -26), (38 * k, 27 * k, 24 * k), 0.0),  # right atrium
            (base + (24, 22, 8), (22 * k, 22 * k, 34 * k), 0.0),  # left atrium
        ]
        heart = np.full(g.shape, 60, np.float32)
        for centre, axes, tilt in self.heart_parts:
            r = max(axes) + 45
            box = g.box(centre - r, centre + r)
            heart[box] = smooth_min(heart[box], ellipsoid(g.at(box), centre, axes, tilt), 14)
        self.heart = heart
        self.tubes = self._tube_points()
        self.tube_d = {}
        hull = heart - 4
        for name, (points, radii) in self.tubes.items():
            margin = max(radii) + 22
            box = g.box(points.min(0) - margin, points.max(0) + margin)
            at = g.at(box)
            d = np.full([s.stop - s.start for s in box], 60, np.float32)
            for a, b, ra, rb in zip(points[:-1], points[1:], radii[:-1], radii[1:], strict=True):
                d = np.minimum(d, capsule(at, a, b, ra, rb))
            self.tube_d[name] = (box, d)
            if name not in ("left lower vein", "right lower vein", "inferior vena cava"):
                hull[box] = smooth_min(hull[box], d - 2.5, 12)
        # the sheet of fat in the midline, thin behind the sternum, wide at the inlet, and the spine with its cover
        depth = (g.y - (self.centre - self.half_depth)) / (2 * self.half_depth)
        half = 5 + 14 * np.clip((depth - 0.25) / 0.4, 0, 1) + 14 * np.clip((g.z / p.height - 70) / 45, 0, 1)
        hull = smooth_min(hull, np.abs(g.x - 2) - half, 14)
        yv = g.y - self.spine_y
        spine = (np.sqrt((g.x / 22) ** 2 + ((yv - 6) / 20) ** 2) - 1) * 20
        self.hull = smooth_min(hull, np.where(yv > 6, np.minimum(spine, np.abs(g.x) - 21), spine), 12)

    def build_lungs(self):
        """Right and left lung as signed distances: the cage less the mediastinum, above the domes of the diaphragm."""
        g, p = self.grid, self.p
        wall = -self.cage  # depth inside the wall
        # domes: highest in the middle of each side, falling to the recess at the wall, deepest at the back
        fall = 26 + 62 * np.clip(self.angle / np.pi, 0, 1) ** 1.3
        dome = np.empty(g.shape, np.float32)
        for side, top in ((-1, -62.0), (1, -76.0)):
            inward = np.clip(wall / (58 * p.width), 0, 1)
            shape = (1 - inward) ** 2.2
            part = top * p.height + p.lift - fall * p.height * shape
            mask = g.x * side >= 0
            dome = np.where(mask, part, dome) if side == 1 else np.where(mask, part, 0)
        self.dome = dome
        above = (dome - g.z) * 0.75
        lungs = smooth_max(self.cage + 1.5, -self.hull, 9)
        lungs = smooth_max(lungs, above, 7)
        lungs = np.maximum(lungs, (g.z - 118 * p.height) * 0.8)
        self.lungs = lungs
        self.above = above

    def paint_inside(self, art: Painter):
        """What lies within the cage: fat, abdominal organs, heart, vessels, airway; then the aerated lungs."""
        g, p = self.grid, self.p
        art.paint("mediastinum", self.cage + 1, -98)
        under = smooth_max(self.cage + 2.5, -self.above * 1.3 + 2, 8)
        right = smooth_max(under, g.x - 22 - 0.25 * (g.y + 60), 20)
        art.paint("liver", right, 58)
        left = smooth_max(under + 3, -(g.x - 12), 14)
        art.paint("stomach", smooth_max(left, g.y - 22, 16), 28)
        gas = smooth_max(smooth_max(left + 9, g.y + 22, 6), -(g.x - 30), 10)
        art.paint(None, gas, -960)
        art.paint("spleen", smooth_max(smooth_max(left, 34 - g.y, 14), 46 - g.x, 14), 48)
        rim = np.maximum(np.abs(under + 1.5) - 1.5, self.cage)
        art.paint(None, rim, 45)
        art.paint(None, self.heart - 3.5, -90)
        art.paint("heart", self.heart, 43)
        for name, (box, d) in self.tube_d.items():
            if name in ("trachea", "right bronchus", "left bronchus"):
                continue
            label = {"aorta": "aorta", "oesophagus": "oesophagus"}.get(name, "great vessels")
            art.paint(label, d, 40 if label != "oesophagus" else 32, box)

    def paint_airway(self, art: Painter):
        """Trachea and main bronchi, wall first."""
        for name in ("trachea", "right bronchus", "left bronchus"):
            box, d = self.tube_d[name]
            art.paint("mediastinum", d - 1.6, 20, box)
        for name in ("trachea", "right bronchus", "left bronchus"):
            box, d = self.tube_d[name]
            art.paint("airway", d, -985, box)


def grow_tree(root: np.ndarray, points: np.ndarray, balance: float = 0.5):
    """Branching tree through points (n, 3): each point joins where the way from the root stays short.

    A minimum spanning tree with balancing factor (Cuntz et al. 2010). Returns `parent` (n + 1,) over [root, *points],
    in an order in which parents come before children, and that order.
    """
    nodes = np.vstack([root, points]).astype(np.float32)
    n = len(nodes)
    parent = np.zeros(n, int)
    path = np.zeros(n, np.float32)
    away = np.linalg.norm(nodes - nodes[0], axis=1)
    cost = away.copy()
    cost[0] = np.inf
    order = [0]
    for _ in range(n - 1):
        i = int(np.argmin(cost))
        order.append(i)
        cost[i] = np.inf
        path[i] = path[parent[i]] + np.linalg.norm(nodes[i] - nodes[parent[i]])
        offer = np.sqrt(((nodes - nodes[i]) ** 2).sum(1)) + balance * path[i]
        better = (offer < cost) & np.isfinite(cost)
        cost[better] = offer[better]
        parent[better] = i
    return nodes, parent, order


def murray_radii(parent, order, tip: float, power: float = 2.8):
    """Radius of the branch above each node: tips at `tip` mm, r^power of a parent the sum of its children's (Murray 1926)."""
    flow = np.zeros(len(parent))
    children = np.bincount(parent[order[1:]], minlength=len(parent))
    flow[children == 0] = 1
    for i in reversed(order[1:]):
        flow[parent[i]] += flow[i]
    return tip * np.maximum(flow, 1) ** (1 / power)


def scatter(mask, axes, step: float, rng: np.random.Generator):
    """One random point (z, y, x in mm) per block of `step` mm that the mask (Z, Y, X) reaches."""
    idx = np.argwhere(mask)
    idx = idx[rng.permutation(len(idx))]
    mm = np.stack([a[i] for a, i in zip(axes, idx.T, strict=True)], axis=1)
    key = np.floor((mm - mm.min(0)) / step).astype(int)
    _, first = np.unique(key @ np.array([1, 1000, 1000000]), return_index=True)
    return mm[np.sort(first)]


def draw_tubes(canvas, axes, starts, ends, radii, voxel: float):
    """Write the voxel fraction of many thin tubes into `canvas` (maximum where they overlap); points on `axes`, mm."""
    origin = np.array([a[0] for a in axes])
    step = np.array([a[1] - a[0] for a in axes])
    size = np.array(canvas.shape)
    shown = np.maximum(radii, voxel / 2)
    weight = (radii / shown) ** 2
    reach = (shown + voxel / 2)[:, None]
    low = np.clip(np.floor((np.minimum(starts, ends) - reach - origin) / step), 0, size).astype(int)
    high = np.clip(np.ceil((np.maximum(starts, ends) + reach - origin) / step) + 1, 0, size).astype(int)
    for a, b, r, w, lo, hi in zip(starts, ends, shown, weight, low, high, strict=True):
        if (hi <= lo).any():
            continue
        z = axes[0][lo[0] : hi[0], None, None]
        y = axes[1][None, lo[1] : hi[1], None]
        x = axes[2][None, None, lo[2] : hi[2]]
        d = capsule((z, y, x), a, b, r, r)
        part = np.clip(0.5 - d / voxel, 0, 1) * w
        view = canvas[lo[0] : hi[0], lo[1] : hi[1], lo[2] : hi[2]]
        np.maximum(view, part, out=view)
