"""Painting the patient of the digital chest: HU and labels of everything but the aerated lung."""

from __future__ import annotations

import numpy as np

from covidnb.phantom.body import AIRWAY, ANATOMY, CAGE_FRONT, CAGE_LEVELS, Body
from covidnb.phantom.geometry import capsule, ellipsoid, fill, profile, smooth_max, smooth_min, superellipse


class Painter:
    """The scan in the making: `hu` (float32, without noise) and `labels` (uint8, numbered as in `ANATOMY`).

    A structure painted later covers an earlier one. The lungs are left airless for `lungs.aerate`.
    """

    def __init__(self, body: Body):
        self.body, self.patient, self.grid = body, body.patient, body.grid
        self.hu = np.full(self.grid.shape, -1000, np.float32)
        self.labels = np.zeros(self.grid.shape, np.uint8)
        self._wall()
        self._abdomen()
        self._mediastinum()
        self._ribs()
        self._spine()
        self._front()
        self._scapulae()

    def _blend(self, name, distance, hu, box=..., width=None):
        """Blend HU in where the distance is negative; name None leaves the labels as they are."""
        part = fill(distance, self.grid.voxel if width is None else width)
        old = self.hu[box]
        old += part * (hu - old)
        if name is not None:
            self.labels[box][part > 0.5] = ANATOMY[name]

    def _wall(self):
        """Skin, fat, muscle, breasts, table."""
        p, g, body = self.patient, self.grid, self.body
        z = g.z / p.height
        levels = [-165, -60, -20, 30, 80, 110, 150]
        half = profile(levels, [126, 130, 130, 130, 136, 143, 152], z) * p.width + p.fat + p.muscle + 12
        padding_front, padding_back = 0.8 * p.fat + 0.3 * p.muscle, 0.6 * p.fat + 0.5 * p.muscle
        front = profile(levels, [-100, -103, -102, -97, -84, -70, -58], z) * p.depth - padding_front
        back = profile(levels, [102, 112, 118, 116, 104, 92, 74], z) * p.depth + padding_back
        centre, depth = (front + back) / 2 + p.lean(z), (back - front) / 2
        skin = superellipse(g.x, g.y - centre, half, depth, 2.4)
        if p.breast:
            middle = (0, 14 - 101.5 * p.depth - padding_front, 78 * p.width)
            size = (52, 16 + 1.1 * p.breast, 54)
            mirrored = (g.z, g.y, np.abs(g.x))
            breast = ellipsoid(mirrored, middle, size)
            skin = smooth_min(skin, breast, 30)
        self.skin = skin
        lateral = np.sin(np.minimum(body.around, np.pi / 2)) ** 2
        fat = p.fat * (0.6 + 0.5 * lateral)
        muscle = smooth_min(smooth_max(skin + 2 + fat, body.cage - 58, 12), body.cage - 11, 8)
        self._blend("skin", skin, 35)
        self._blend("fat", skin + 2.2, -104)
        if p.breast:
            strands = np.sin(g.x / 4.1 + g.z / 9) * np.sin(g.y / 3.7 + 1) * 6
            gland = ellipsoid(mirrored, (middle[0], middle[1] - 4, middle[2]), [0.62 * s for s in size])
            self._blend(None, np.maximum(gland + strands, skin + 8), 5, width=6)
        self._blend("muscle", muscle, 52)
        # sheets of fat between the muscles, and the fat of the armpits
        sheet = np.sin(2.1 * body.around + g.z / 47) * np.sin(g.z / 31 + body.around * 3)
        plane = np.maximum(np.abs(body.cage - 17 - 5 * sheet) - 1.6 * (0.4 + sheet), muscle + 2)
        self._blend(None, plane, -70, width=3)
        for side in (-1, 1):
            pit = np.array((72 * p.height, -8, side * (112 * p.width + 22)))
            box = g.box(pit - 50, pit + 50)
            self._blend("fat", ellipsoid(g.at(box), pit, (46, 30, 13)), -95, box)
        flat_y, flat_x = g.axes[1][:, None], g.axes[2]  # the table does not sway with the patient
        bed = 124 * p.depth + padding_back - 9 * (1 - (flat_x / 190) ** 2)
        for depth, thick, hu in ((3, 1.3, -250), (30, 1.1, -400)):
            curve = bed + depth * (1 - 0.45 * (flat_x / 190) ** 2)
            self._blend("table", np.maximum(np.abs(flat_y - curve) - thick, 3 - skin), hu)

    def _abdomen(self):
        """The fat inside the cage, and the organs under the diaphragm."""
        p, g, body = self.patient, self.grid, self.body
        self._blend("mediastinal fat", body.cage + 1, -100)
        top = int(np.searchsorted(g.axes[0], float(body.dome.max()) + 8))
        if top == 0:
            return
        box = (slice(0, top), slice(None), slice(None))
        z, y, x = g.at(box)
        width = body.dome_width[box]
        under = smooth_max(body.cage[box] + 3, 3 - body.above[box], 6)
        under = smooth_max(under, 9 - body.column[box], 12)  # fat around spine and aorta
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
        sheet = np.maximum(np.abs(body.above[box] - 1.5) - 1.5, body.cage[box] + 1)
        self._blend(None, sheet, 48, box, width)

    def _mediastinum(self):
        """Heart with its fat, great vessels, oesophagus."""
        body = self.body
        self._blend(None, body.heart - 3, -95)
        self._blend("heart", body.heart, 42)
        for name, (box, distance) in body.tubes.items():
            if name not in AIRWAY:
                label = name if name in ANATOMY else "great vessels"
                self._blend(label, distance, 34 if name == "oesophagus" else 41, box)

    def _ribs(self):
        """All ribs from one periodic field: from the spine down and forward to their cartilage."""
        p, g, body = self.patient, self.grid, self.body
        shell = body.cage - 5.5
        where = np.nonzero(np.abs(shell) < 6 + g.voxel)
        around, shell = body.around[where], shell[where]
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

    def _spine(self):
        """Vertebrae with discs, canal, arches and processes, square to the curve of the spine."""
        p, g, body = self.patient, self.grid, self.body
        line = body.spine_front[:, 0, 0]
        box = g.box((g.axes[0][0], line.min() - 20, -50), (g.axes[0][-1], line.max() + 75, 50))
        z, y, x = g.at(box)
        y = y - body.spine_front[box[0]]
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

    def _front(self):
        """Sternum and clavicles."""
        p, g, body = self.patient, self.grid, self.body
        h = p.height
        box = g.box((-40 * h, -140, -45), (112 * h, 0, 45))
        z, y, x = g.at(box)
        z = z / h
        half = profile([-40, -20, 50, 68, 74, 104], [7, 15, 14, 16, 27, 24], z)
        y = y - body.front[box[0]] + 5
        plate = smooth_max(smooth_max(np.abs(x) - half, np.abs(y) - 5.5, 4), np.abs(z - 36) - 70, 4)
        self._blend("sternum and clavicles", plate, np.where(plate < -2, 130, 420), box)
        start = (108 * h, float(profile(CAGE_LEVELS, CAGE_FRONT, 100)) * p.depth + p.lean(100) - 8)
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

    def _scapulae(self):
        """Thin plates behind the upper ribs, with spine and neck."""
        p, g, body = self.patient, self.grid, self.body
        box = g.box((8 * p.height, -40, -190), (140 * p.height, 140, 190))
        z = g.z[box[0]] / p.height
        around, cage = body.around[box], body.cage[box]
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
