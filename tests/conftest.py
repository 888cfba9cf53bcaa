"""What every test shares: where the real data is, and what a missing network means."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real CT named by COVIDNB_DATA; the test is skipped where there is none."""
    folder = os.environ.get("COVIDNB_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("real CT not at hand: set COVIDNB_DATA to the folder that holds covid-semiseg, medseg2, ...")
    return Path(folder)
