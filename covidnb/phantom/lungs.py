"""What fills the lungs of the digital chest: parenchyma, vessels, bronchi, and some mimics of disease."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from covidnb.phantom import trees
from covidnb.phantom.body import AIRWAY, ANATOMY, Body
from covidnb.phantom.geometry import fill, smooth_noise

VESSEL_HU = 40.0
TIP = 0.55  # radius of the thinnest vessels, mm


class Interior(NamedTuple):
    """The inside of the lungs: `parenchyma` in HU, fractions of a voxel in `vessels`, `walls` and `lumen`."""

    parenchyma: np.ndarray
    vessels: np.ndarray
    walls: np.ndarray
    lumen: np.ndarray


def parenchyma(body: Body, rng: np.random.Generator) -> np.ndarray:
    """HU of the aerated lung: denser at the back, mottled, hazy under the pleura there, thin atelectases."""
    p, g = body.patient, body.grid
    hu = p.aeration + p.gravity * (0.5 * body.ahead) + 10 * smooth_noise(g.shape, g.spacing, 6, rng)
    hu += 14 * smooth_noise(g.shape, g.spacing, 30, rng)
    patches = np.clip(0.7 + 0.5 * smooth_noise(g.shape, g.spacing, 24, rng), 0, 2)
    near = np.exp(-np.clip(-body.lungs, 0, None) / 6) * np.clip(2.2 * (body.ahead - 0.45), 0, 1)
    hu += p.haze * patches * near
    hu += 110 * np.exp(-np.square(body.fissure / 1.1))
    for _ in range(rng.poisson(1.5)):
        _atelectasis(body, hu, rng)
    return hu.astype(np.float32)


def _atelectasis(body: Body, hu, rng):
    """One thin plate of airless lung near a base: no disease, and no label."""
    g = body.grid
    low = (body.lungs < -4) & (g.z < body.dome + 45)
    if not low.any():
        return
    voxels = np.argwhere(low)
    i = voxels[rng.integers(len(voxels))]
    centre = np.array([a[k] for a, k in zip(g.axes, i, strict=True)])
    normal = np.array([1.0, *rng.normal(0, 0.4, 2)])
    normal /= np.linalg.norm(normal)
    radius = rng.uniform(10, 24)
    box = g.box(centre - radius, centre + radius)
    z, y, x = (v - c for v, c in zip(g.at(box), centre, strict=True))
    off = z * normal[0] + y * normal[1] + x * normal[2]
    plate = np.maximum(np.abs(off) - 1.0, np.sqrt(z * z + y * y + x * x) - radius)
    hu[box] += fill(plate, 4.0) * rng.uniform(250, 500)


def interior(body: Body, rng: np.random.Generator) -> Interior:
    """Grow the trees of both lungs and fill the rest with parenchyma."""
    g = body.grid
    over = max(1, round(g.spacing[0] / g.voxel))  # thin vessels need thin slices
    step = g.spacing[0] / over
    fine = g.axes[0][0] + step * (np.arange(g.shape[0] * over) - (over - 1) / 2)
    axes = [fine.astype(np.float32), g.axes[1], g.axes[2]]
    vessels, walls, lumen = (np.zeros((len(fine), *g.shape[1:]), np.float32) for _ in range(3))
    deep = body.lungs < -3.5
    straight = {name: g.on_axes([end])[0] for name, end in body.ends.items()}
    sides = {
        "right": (g.x < 0, "right pulmonary artery", ("right lower vein", "right upper vein")),
        "left": (g.x >= 0, "pulmonary trunk", ("left lower vein", "left upper vein")),
    }
    for mask, artery, veins in sides.values():
        lung = deep & mask
        if not lung.any():
            continue
        arteries = trees.grow_tree(straight[artery], trees.scatter(lung, g.axes, 11.5, rng), tip=TIP)
        trees.draw_tubes(vessels, axes, arteries, g.voxel)
        points = trees.scatter(lung, g.axes, 12.5, rng)
        upper = points[:, 0] > straight[veins[0]][0] + 12
        for root, chosen in ((veins[0], ~upper), (veins[1], upper)):
            trees.draw_tubes(vessels, axes, trees.grow_tree(straight[root], points[chosen], tip=TIP), g.voxel)
        # a bronchus runs beside each larger artery
        large = arteries.radius > 1.15
        beside = np.array([0.55, 0.55, 0.63]) * (arteries.radius[large] * 1.9 + 0.6)[:, None]
        bronchi = trees.Tree(
            arteries.start[large] + beside, arteries.end[large] + beside, 0.85 * arteries.radius[large]
        )
        trees.draw_tubes(lumen, axes, bronchi, g.voxel)
        trees.draw_tubes(walls, axes, bronchi._replace(radius=1.25 * bronchi.radius + 0.35), g.voxel)
    thick = [a.reshape(g.shape[0], over, *g.shape[1:]).mean(axis=1) for a in (vessels, walls, lumen)]
    return Interior(parenchyma(body, rng), *thick)


def aerate(body: Body, hu, labels, inside: Interior, air: np.ndarray):
    """Put the lungs (`air`, HU) and the central airways into the painted body; returns the lung mask."""
    g, p = body.grid, body.patient
    part = fill(body.sides, g.voxel) * fill(body.above, body.dome_width + p.blurred)
    hu += part * (air - hu)
    mask = body.lungs < 0
    for name in AIRWAY:
        box, distance = body.tubes[name]
        old = hu[box]
        old += fill(distance - 1.1, g.voxel) * (20 - old)
    for name in AIRWAY:
        box, distance = body.tubes[name]
        old = hu[box]
        old += fill(distance, g.voxel) * (-990 - old)
        labels[box][distance < 0] = ANATOMY["airway"]
    mask &= labels != ANATOMY["airway"]
    labels[mask & (g.x < 1)] = ANATOMY["right lung"]
    labels[mask & (g.x >= 1)] = ANATOMY["left lung"]
    labels[mask & (inside.vessels > 0.5)] = ANATOMY["lung vessels"]
    labels[mask & (inside.lumen > 0.5)] = ANATOMY["airway"]
    return mask


def tissue(inside: Interior, filled: np.ndarray) -> np.ndarray:
    """HU of the lung once its airspace (`filled`, HU) has got its vessels and bronchi."""
    hu = filled + np.maximum(inside.walls - inside.lumen, 0) * (-100 - filled)
    hu += inside.lumen * (-960 - hu)
    return hu + inside.vessels * (VESSEL_HU - hu)
