"""Helper package of the course: all that a chapter or a run imports."""

__version__ = "0.1.0"
