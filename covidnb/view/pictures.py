"""One style, one palette; slices and masks; the packaged source."""

import inspect
import textwrap

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb

from covidnb.ct import WINDOWS, window

# One meaning, one colour, in the whole book; told apart with every common kind of colour blindness.
COLOURS = {
    "lungs": "#56B4E9",
    "GGO": "#E69F00",
    "consolidation": "#AA4499",
    "truth": "#009E73",
    "prediction": "#0072B2",
    "error": "#D55E00",
}


def use_style() -> None:
    """Set the book's Matplotlib style: call it once, in a notebook's first code cell."""
    plt.rcParams.update(
        {
            "figure.figsize": (8, 4),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": plt.cycler(color=[*COLOURS.values(), "#444444"]),
            "legend.frameon": False,
            "image.cmap": "gray",
            "image.interpolation": "nearest",
        }
    )


def show_slice(ax, hu, low=WINDOWS["lung"][0], high=WINDOWS["lung"][1], *, spacing=(1.0, 1.0), title=""):
    """Draw one slice in a window, true to its proportions.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    hu : array (rows, columns) in HU
    low, high : ends of the window in HU, drawn black and white
    spacing : mm between rows and between columns
    title : written above

    Returns
    -------
    matplotlib.image.AxesImage
    """
    drawn = ax.imshow(window(hu, low, high), vmin=0, vmax=1, cmap="gray", aspect=spacing[0] / spacing[1])
    ax.set_title(title)
    ax.set_axis_off()
    return drawn


def overlay(ax, mask, colour=COLOURS["prediction"], *, alpha=0.35, label=None):
    """Tint a mask's area on top of a slice and draw its outline.

    Parameters
    ----------
    ax : axes that `show_slice` drew on
    mask : array (rows, columns), true inside
    colour : any Matplotlib colour, usually one of `COLOURS`
    alpha : opacity of the tint, 0 for the outline alone
    label : name for `ax.legend()`
    """
    inside = np.asarray(mask, bool)
    tint = np.zeros((*inside.shape, 4))
    tint[inside] = (*to_rgb(colour), alpha)
    ax.imshow(tint, aspect=ax.get_aspect())
    if inside.any() and not inside.all():
        ax.contour(inside, levels=[0.5], colors=[colour], linewidths=0.9)
    if label is not None:
        ax.plot([], [], color=colour, lw=4, alpha=0.8, label=label)


def source(obj):
    """Render the packaged source of a function or class as highlighted code in a notebook."""
    from IPython.display import Markdown

    return Markdown(f"```python\n{textwrap.dedent(inspect.getsource(obj)).rstrip()}\n```")
