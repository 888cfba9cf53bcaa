"""Figures and widgets of the notebooks. Nothing but notebooks imports this room."""

from .pictures import COLOURS, overlay, show_slice, source, use_style
from .reports import (
    class_table,
    compare_histograms,
    confusion_table,
    difference,
    reliability_diagram,
    slice_table,
    training_curves,
)
from .viewers import SliceViewer, frame_viewer, slice_viewer

__all__ = [
    "COLOURS",
    "SliceViewer",
    "class_table",
    "compare_histograms",
    "confusion_table",
    "difference",
    "frame_viewer",
    "overlay",
    "reliability_diagram",
    "show_slice",
    "slice_table",
    "slice_viewer",
    "source",
    "training_curves",
    "use_style",
]
