"""Branching trees for the lungs: arteries, veins and bronchi from the hilum to the periphery."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from covidnb.phantom.geometry import capsule, fill


class Tree(NamedTuple):
    """Branches of a tree: `start` and `end` (n, 3) in mm as (z, y, x), `radius` (n,) in mm, root first."""

    start: np.ndarray
    end: np.ndarray
    radius: np.ndarray


def scatter(mask, axes, step: float, rng: np.random.Generator) -> np.ndarray:
    """One random point (z, y, x in mm) per cube of `step` mm that the mask (Z, Y, X) reaches."""
    voxels = np.argwhere(mask)
    voxels = voxels[rng.permutation(len(voxels))]
    points = np.stack([axis[i] for axis, i in zip(axes, voxels.T, strict=True)], axis=1)
    cube = np.floor((points - points.min(axis=0)) / step).astype(np.int64)
    _, first = np.unique(cube @ np.array([1, 1_000, 1_000_000]), return_index=True)
    return points[np.sort(first)]


def grow_tree(root, points, *, tip: float, balance: float = 0.35, power: float = 2.7) -> Tree:
    """Connect points (n, 3) to a root (3,) so that both the branches and the ways from the root stay short.

    A minimum spanning tree with a balancing factor (Cuntz et al. 2010, doi:10.1371/journal.pcbi.1000877).
    Radii follow Murray's law: `tip` mm at the ends, and r^power of a branch the sum of its children's.
    """
    nodes = np.vstack([root, points]).astype(np.float32)
    n = len(nodes)
    parent = np.zeros(n, int)
    path = np.zeros(n, np.float32)
    cost = np.linalg.norm(nodes - nodes[0], axis=1)
    cost[0] = np.inf
    waiting = np.ones(n, bool)
    waiting[0] = False
    order = np.zeros(n - 1, int)
    for k in range(n - 1):
        i = order[k] = int(np.argmin(cost))
        cost[i], waiting[i] = np.inf, False
        step = nodes[i] - nodes[parent[i]]
        path[i] = path[parent[i]] + np.sqrt(step @ step)
        gap = nodes - nodes[i]
        offer = np.sqrt(np.einsum("ij,ij->i", gap, gap)) + balance * path[i]
        better = waiting & (offer < cost)
        cost[better], parent[better] = offer[better], i
    flow = np.zeros(n)
    flow[np.bincount(parent[order], minlength=n) == 0] = 1
    for i in order[::-1]:
        flow[parent[i]] += flow[i]
    # pull each fork towards its neighbours: vessels run smoothly
    for _ in range(2):
        mean = np.zeros_like(nodes)
        np.add.at(mean, parent[order], nodes[order] * flow[order, None])
        inner = np.nonzero(np.bincount(parent[order], minlength=n) > 0)[0]
        inner = inner[inner > 0]
        ahead = mean[inner] / flow[inner, None]
        nodes[inner] = 0.5 * nodes[inner] + 0.25 * nodes[parent[inner]] + 0.25 * ahead
    return Tree(nodes[parent[order]], nodes[order], tip * flow[order] ** (1 / power))


def draw_tubes(canvas, axes, tree: Tree, voxel: float) -> None:
    """Write the fraction of each voxel that the branches fill into `canvas` (the maximum where they overlap).

    `axes` are the canvas's voxel centres (z, y, x) in mm. A branch thinner than a voxel is drawn as wide as
    one and as faint as its cross-section asks.
    """
    origin = np.array([a[0] for a in axes])
    step = np.array([a[1] - a[0] for a in axes])
    size = np.array(canvas.shape)
    shown = np.maximum(tree.radius, voxel / 2)
    weight = (tree.radius / shown) ** 2
    reach = (shown + voxel / 2)[:, None]
    low = np.ceil((np.minimum(tree.start, tree.end) - reach - origin) / step).astype(int)
    high = np.floor((np.maximum(tree.start, tree.end) + reach - origin) / step).astype(int) + 1
    low, high = np.clip(low, 0, size), np.clip(high, 0, size)
    seen = np.nonzero((high > low).all(axis=1))[0]
    za, ya, xa = axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]
    for k in seen:
        (z0, y0, x0), (z1, y1, x1) = low[k], high[k]
        d = capsule(
            (za[z0:z1], ya[:, y0:y1], xa[..., x0:x1]),
            tree.start[k],
            tree.end[k],
            float(shown[k]),
            float(shown[k]),
        )
        view = canvas[z0:z1, y0:y1, x0:x1]
        np.maximum(view, fill(d, voxel) * np.float32(weight[k]), out=view)
