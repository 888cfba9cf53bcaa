"""Keep what some runs logged: `python tools/record_logs.py data/results/NAME.csv COLUMN,... RUN_FOLDER...`.

One row for each row of each run's log.csv, with the run's name and the columns asked for, for pages and
chapters to draw. The file is written anew.
"""

import argparse
from pathlib import Path

import pandas as pd

from covidnb.files import whole


def logged(folder: Path, columns: list[str]) -> pd.DataFrame:
    """Columns of a run's log beside its name; empty where the run did not log them."""
    try:
        log = pd.read_csv(folder / "log.csv")
    except FileNotFoundError:
        raise SystemExit(f"{folder / 'log.csv'} does not exist: {folder} is no run that has begun") from None
    return log.reindex(columns=columns).assign(run=folder.name)[["run", *columns]]


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, help="CSV file to write")
    parser.add_argument("columns", help="names of the log's columns, with commas between them")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    asked = parser.parse_args(argv)
    rows = pd.concat([logged(folder, asked.columns.split(",")) for folder in asked.runs])
    with whole(asked.record) as part:
        rows.to_csv(part, index=False, float_format="%.4g")
    print(f"{asked.record}: {len(rows)} rows of {len(asked.runs)} runs")


if __name__ == "__main__":
    main()
