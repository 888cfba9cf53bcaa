"""A set of scans in numbers: HU histograms, sizes and places of lesions, and nothing of the images."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import SimpleITK as sitk
from scipy import ndimage
from scipy.stats import wasserstein_distance

from covidnb.phantom.lesions import CONSOLIDATION, GGO, depth_in

HU_EDGES = np.arange(
    -1050, 151, 25
)  # medseg2 ends at about 150 HU: what lies beyond either end counts as the end
ML_EDGES = np.geomspace(0.03, 3000, 21)
TISSUES = ("lung", "GGO", "consolidation")
SMALLEST_ML = 0.1  # pieces below are a pencil's slip


def summarise(scans: Iterable[tuple[sitk.Image, sitk.Image, sitk.Image]]) -> dict:
    """HU and lesions of scans given as (ct in HU, lungs, lesions), all LPS and on one grid each.

    Histograms are means over the scans that hold at least 1 ml of the tissue ("lung" is lung without lesion),
    so that no large patient outweighs the others; quartiles are medians over the same scans. Shares are per
    scan: infected (of the lungs), and of the lesions: consolidation, within 20 mm of the lung's surface,
    behind the lungs' middle, below the middle of their height.
    """
    density = {t: [] for t in TISSUES}
    quartiles = {t: [] for t in TISSUES}
    shares = {s: [] for s in ("infected", "consolidation", "peripheral", "posterior", "lower")}
    pieces, volumes = [], []
    for ct, lung_mask, lesion_mask in scans:
        hu = sitk.GetArrayViewFromImage(ct)
        lesions = sitk.GetArrayViewFromImage(lesion_mask)
        lungs = (sitk.GetArrayViewFromImage(lung_mask) > 0) | (lesions > 0)
        spacing = ct.GetSpacing()[::-1]
        ml = float(np.prod(spacing)) / 1000
        volumes.append(float(lungs.sum() * ml))
        for tissue, where in zip(
            TISSUES, (lungs & (lesions == 0), lesions == GGO, lesions == CONSOLIDATION), strict=True
        ):
            if where.sum() * ml >= 1:
                values = np.clip(hu[where], HU_EDGES[0], HU_EDGES[-1] - 1)
                density[tissue].append(np.histogram(values, HU_EDGES, density=True)[0])
                quartiles[tissue].append(np.percentile(values, [25, 50, 75]))
        ill = lesions > 0
        shares["infected"].append(float(ill.sum() / lungs.sum()))
        if ill.sum() * ml < 1:
            continue
        label, _ = ndimage.label(ill, np.ones((3, 3, 3)))
        pieces.extend(np.bincount(label.ravel())[1:] * ml)
        box = ndimage.find_objects(lungs.astype(np.uint8))[0]
        at = np.argwhere(ill[box])
        depth = depth_in(np.pad(lungs[box], 1), spacing)[1:-1, 1:-1, 1:-1]
        middle = np.argwhere(lungs[box]).mean(axis=0)
        shares["consolidation"].append(float((lesions == CONSOLIDATION).sum() / ill.sum()))
        shares["peripheral"].append(float((depth[tuple(at.T)] < 20).mean()))
        shares["posterior"].append(float((at[:, 1] > middle[1]).mean()))
        shares["lower"].append(float((at[:, 0] < lungs[box].shape[0] / 2).mean()))
    pieces = np.array([p for p in pieces if p >= SMALLEST_ML])
    return {
        "scans": len(volumes),
        "lung_ml": [round(v) for v in volumes],
        "hu_edges": HU_EDGES.tolist(),
        "hu_density": {t: np.round(np.mean(d, axis=0), 7).tolist() if d else [] for t, d in density.items()},
        "hu_quartiles": {
            t: np.round(np.median(q, axis=0)).tolist() if q else [] for t, q in quartiles.items()
        },
        "lesion_ml_edges": np.round(ML_EDGES, 4).tolist(),
        "lesion_counts": np.histogram(pieces, ML_EDGES)[0].tolist(),
        "lesion_ml_quartiles": np.round(np.percentile(pieces, [25, 50, 75]), 2).tolist()
        if len(pieces)
        else [],
        "shares": {k: np.round(v, 4).tolist() for k, v in shares.items()},
    }


def hu_distance(a: dict, b: dict, tissue: str) -> float:
    """Wasserstein distance in HU between two summaries' histograms of a tissue; NaN where one has none."""
    if not (a["hu_density"][tissue] and b["hu_density"][tissue]):
        return float("nan")
    centres = (np.array(a["hu_edges"])[:-1] + np.array(a["hu_edges"])[1:]) / 2
    return float(wasserstein_distance(centres, centres, a["hu_density"][tissue], b["hu_density"][tissue]))


def size_distance(a: dict, b: dict) -> float:
    """Wasserstein distance between two summaries' lesion volumes, in factors of ten."""
    edges = np.log10(a["lesion_ml_edges"])
    centres = (edges[:-1] + edges[1:]) / 2
    return float(wasserstein_distance(centres, centres, a["lesion_counts"], b["lesion_counts"]))
