"""What every test shares: where the real data is, and what a missing network means."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first, slow ones after them, executed notebooks last: most faults show within a minute."""
    items.sort(key=lambda item: (item.get_closest_marker("slow") is not None, "notebook" in item.path.name))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real CT named by COVIDNB_DATA; the test is skipped where there is none."""
    folder = os.environ.get("COVIDNB_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip(
            "real CT not at hand: set COVIDNB_DATA to the folder that holds covid-semiseg, medseg2, ..."
        )
    return Path(folder)


@cache
def registry_answers() -> bool:
    """Whether pip can ask its package registry for anything; asked once per run."""
    pip = [sys.executable, "-m", "pip", "index", "versions", "pooch", "--retries", "0", "--timeout", "10"]
    try:
        return subprocess.run(pip, capture_output=True, timeout=60).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `network` where there is no package registry; with one, it has to pass."""
    if item.get_closest_marker("network") and not registry_answers():
        pytest.skip("no package registry can be reached")
