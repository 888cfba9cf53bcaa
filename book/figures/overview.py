"""The picture of the landing page and of the README: one patient of the phantom, from scan to lesions.

`python book/figures/overview.py` writes book/assets/overview.png.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import SimpleITK as sitk
from matplotlib.colors import ListedColormap
from PIL import Image

from covidnb import phantom, view

PICTURE = Path(__file__).resolve().parents[1] / "assets" / "overview.png"


def edges(mask, margin):
    """Where a (z, y, x) mask ends in the plane, and a margin in voxels more: top, bottom, left, right."""
    y, x = (np.flatnonzero(mask.any(axes)) for axes in ((0, 2), (0, 1)))
    return y[0] - margin, y[-1] + margin, x[0] - margin, x[-1] + margin


def draw():
    """Four panels: scan, lungs, lesions by kind, all lesions from the front. Returns the figure."""
    patient = phantom.chest()
    ct, lungs, lesions = map(sitk.GetArrayFromImage, (patient.ct, patient.lungs, patient.lesions))
    dx, dy, dz = patient.ct.GetSpacing()
    # the slice with most lesion among those that cut both lungs where they are wide
    wide = lungs.sum((1, 2)) > 0.8 * lungs.sum((1, 2)).max()
    z = int(np.argmax((lesions > 0).sum((1, 2)) * wide))
    top, bottom, left, right = edges(lungs, margin=round(32 / dx))

    view.use_style()
    plt.rcParams.update({"font.size": 10, "axes.titlesize": 12, "axes.titlelocation": "left"})
    figure, grid = plt.subplots(2, 2, figsize=(8, 5.7), layout="constrained", facecolor="white")
    panels = grid.ravel()
    for ax, title in zip(panels, ("a scan, in HU", "its lungs", "its lesions, by kind"), strict=False):
        view.show_slice(ax, ct[z], spacing=(dy, dx), title=title)
        ax.set(xlim=(left, right), ylim=(bottom, top))
    view.overlay(panels[1], lungs[z], view.COLOURS["lungs"], label="lungs")
    view.overlay(panels[2], lesions[z] == 1, view.COLOURS["GGO"], alpha=0.5, label="ground-glass opacity")
    view.overlay(panels[2], lesions[z] == 2, view.COLOURS["consolidation"], alpha=0.5, label="consolidation")

    figure.legend(*panels[2].get_legend_handles_labels(), loc="outside lower center", ncols=2)

    # From the front, as a radiograph is looked at: head up, the patient's right on the left.
    depth = (lesions > 0).sum(1)[::-1] * dy
    share = 100 * (lesions > 0).sum() / lungs.sum()
    panels[3].imshow(lungs.any(1)[::-1], cmap=ListedColormap(["white", "#dfe4e8"]), aspect=dz / dx)
    shown = panels[3].imshow(np.ma.masked_equal(depth, 0), cmap="YlOrRd", vmin=0, aspect=dz / dx)
    panels[3].set_title(f"from the front: {share:.0f} % of the lungs")
    figure.colorbar(shown, ax=panels[3], label="depth of lesion, mm", shrink=0.8)
    for ax in panels:
        ax.set_axis_off()
        ax.set_anchor("N")
    return figure


if __name__ == "__main__":
    draw().savefig(PICTURE, dpi=100)
    # 256 colours are enough for it, and half the bytes
    Image.open(PICTURE).convert("RGB").quantize(256, kmeans=2).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1e3:.0f} kB")
