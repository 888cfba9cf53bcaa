"""The table of versions on the environment page."""

import platform
from importlib.metadata import version
from pathlib import Path

from IPython.display import Markdown

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"


def versions() -> Markdown:
    """What is installed now, with the reason that requirements.txt gives for it."""
    rows = [("Python", platform.python_version(), f"on {platform.system()}, {platform.machine()}")]
    for line in REQUIREMENTS.read_text().splitlines():
        pin, _, reason = line.partition("#")
        if pin.strip():
            name = pin.split("==")[0].strip()
            rows.append((name, version(name), reason.strip()))
    lines = ["| package | version | why |", "| --- | --- | --- |"]
    return Markdown("\n".join(lines + [f"| {name} | {installed} | {why} |" for name, installed, why in rows]))
