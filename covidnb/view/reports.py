"""Figures of runs and of data sets: curves, best to worst, calibration, histograms."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.ticker import MaxNLocator

from .pictures import COLOURS, overlay


def training_curves(axes, log):
    """Draw a run's log: the loss terms on the first axis, the held-out scores (if any) on the second.

    Parameters
    ----------
    axes : two Axes
    log : pandas.DataFrame of a run's log.csv
    """
    losses, scores = axes
    for ax in axes:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for term in [name for name in ("global_map", "side4", "side3", "side2", "edge") if name in log]:
        losses.plot(log["epoch"], log[term], label=term, lw=2 if term == "side2" else 1)
    losses.set(xlabel="epoch", ylabel="loss", title="What training lowers")
    losses.legend()
    if "meanDic" in log:
        seen = log.dropna(subset="meanDic")
        scores.plot(seen["epoch"], seen["dice_at_0.5"], "o-", label="Dice at 0.5")
        scores.plot(seen["epoch"], seen["meanDic"], "o-", label="mean Dice over thresholds")
        scores.set(xlabel="epoch", ylim=(0, 1), title="Held-out slices")
        scores.legend()
    else:
        scores.step(log["epoch"], log["lr"], where="mid", color="#444444")
        scores.set(xlabel="epoch", ylabel="learning rate", yscale="log", title="Schedule")


def difference(truth, predicted):
    """Colour where two masks agree and differ, RGBA (H, W, 4): hit, missed, and called without cause."""
    truth, predicted = np.asarray(truth, bool), np.asarray(predicted, bool)
    picture = np.zeros((*truth.shape, 4))
    picture[truth & predicted] = (*to_rgb(COLOURS["truth"]), 0.7)
    picture[truth & ~predicted] = (*to_rgb(COLOURS["error"]), 0.9)
    picture[~truth & predicted] = (*to_rgb(COLOURS["consolidation"]), 0.9)
    return picture


def slice_table(rows, *, threshold=0.5):
    """Draw slices in rows: slice, truth, probability, difference at the threshold.

    Parameters
    ----------
    rows : list of (title, image uint8 (H, W), truth bool (H, W), probability (H, W) in 0..1)
    threshold : the cut of the difference

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure, grid = plt.subplots(len(rows), 4, figsize=(8, 2 * len(rows)), squeeze=False)
    for axes, (title, image, truth, probability) in zip(grid, rows, strict=True):
        for ax in axes:
            ax.imshow(image, vmin=0, vmax=255)
            ax.set(xticks=[], yticks=[])
        axes[0].set_ylabel(title)
        overlay(axes[1], truth, COLOURS["truth"])
        axes[2].imshow(probability, cmap="viridis", vmin=0, vmax=1)
        axes[3].imshow(difference(truth, probability >= threshold))
    for ax, name in zip(grid[0], ("slice", "truth", "probability", "difference"), strict=True):
        ax.set_title(name)
    marks = {"found": "truth", "missed": "error", "false alarm": "consolidation"}
    handles = [plt.Line2D([], [], color=COLOURS[c], lw=5, label=name) for name, c in marks.items()]
    figure.legend(handles=handles, loc="outside lower right", ncols=3)
    return figure


def class_table(rows, *, columns=("true classes", "predicted")):
    """Draw slices in rows: slice with the outline of its infection prior, then maps of classes over it.

    Parameters
    ----------
    rows : list of (title, image uint8 (H, W), prior bool (H, W) or None, class maps: arrays (H, W) of
        0 background, 1 GGO, 2 consolidation, one for each of `columns`)
    columns : what the class maps are

    Returns
    -------
    matplotlib.figure.Figure
    """
    across = 1 + len(columns)
    side = min(2.4, 11 / across)
    figure, grid = plt.subplots(
        len(rows), across, figsize=(side * across, 0.76 * side * len(rows) + 0.4), squeeze=False
    )
    for axes, (title, image, prior, *maps) in zip(grid, rows, strict=True):
        for ax in axes:
            ax.imshow(image, vmin=0, vmax=255)
            ax.set(xticks=[], yticks=[])
        axes[0].set_ylabel(title)
        if prior is not None:
            overlay(axes[0], prior, COLOURS["prediction"], alpha=0)
        for ax, classes in zip(axes[1:], maps, strict=True):
            for k, name in enumerate(("GGO", "consolidation"), 1):
                overlay(ax, classes == k, COLOURS[name], alpha=0.6)
    for ax, name in zip(grid[0], ("slice, prior", *columns), strict=True):
        ax.set_title(name)
    marks = {"prior": "prediction", "GGO": "GGO", "consolidation": "consolidation"}
    handles = [plt.Line2D([], [], color=COLOURS[c], lw=5, label=name) for name, c in marks.items()]
    figure.legend(handles=handles, loc="outside lower right", ncols=3)
    return figure


def confusion_table(ax, counts, names, *, title=""):
    """Draw a confusion matrix: the shares of each true class (a row), in percent, and the pixels.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    counts : (C, C) pixels of true (row) and predicted (column) class
    names : of the C classes
    title : written above
    """
    counts = np.asarray(counts)
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(share):
        ink = "white" if value > 60 else "black"
        ax.text(column, row, f"{value:.0f} %\n{counts[row, column]:,}", ha="center", va="center", color=ink)
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(names)), names, rotation=90, va="center")
    ax.set(xlabel="predicted", ylabel="true", title=title)


def reliability_diagram(ax, curve):
    """Draw what `metrics.reliability` counted: the observed share of lesion against the probability said."""
    ax.plot([0, 1], [0, 1], color="#444444", lw=0.8, ls="--", label="honest")
    ax.plot(curve["said"], curve["observed"], "o-", color=COLOURS["prediction"], label="this network")
    ax.set(xlabel="probability said", ylabel="share of lesion observed", xlim=(0, 1), ylim=(0, 1))
    ax.set_title(f"Calibration: off by {curve['error']:.3f} on average")
    ax.legend()


def compare_histograms(summaries):
    """Draw the HU and the lesion sizes of sets of scans over one another.

    Parameters
    ----------
    summaries : dict from a set's name to what `covidnb.phantom.summary.summarise` gives for it; three at most

    Returns
    -------
    figure with four axes: lung, ground glass and consolidation in HU, and lesion volumes in ml
    """
    tissues = {"lung": "Lung without lesion", "GGO": "Ground glass", "consolidation": "Consolidation"}
    figure, axes = plt.subplots(2, 2, figsize=(8, 5))
    for (name, summary), key in zip(summaries.items(), ("truth", "error", "lungs"), strict=False):
        style = {"color": COLOURS[key], "lw": 1.6}
        for ax, tissue in zip(axes.flat, tissues, strict=False):
            if summary["hu_density"][tissue]:
                ax.stairs(
                    2500 * np.array(summary["hu_density"][tissue]), summary["hu_edges"], label=name, **style
                )
                ax.axvline(summary["hu_quartiles"][tissue][1], ls=":", color=COLOURS[key])
        counts = np.array(summary["lesion_counts"])
        axes[1, 1].stairs(100 * counts / max(counts.sum(), 1), summary["lesion_ml_edges"], **style)
    for ax, title in zip(axes.flat, tissues.values(), strict=False):
        ax.set(title=title, xlabel="HU (dotted: median)", ylabel="% of voxels in 25 HU")
    axes[1, 1].set(
        title="Size of the lesions", xscale="log", xlabel="ml", ylabel="% of lesions", xlim=(0.08, 2000)
    )
    axes[0, 0].legend()
    return figure
