"""Keep what finished runs scored: `python tools/record_runs.py data/results/NAME.json RUN_FOLDER...`.

A run folder holds weights and maps, which stay out of the repository; its config and scores go in, one entry
a run, so that pages and chapters show figures that a run has written. A run recorded before is replaced.
"""

import argparse
import json
import sys
from pathlib import Path

from covidnb.files import whole

SCORES = ("dice_at_0.5", "meanDic", "meanSen", "meanSpe", "Sm", "meanEm", "MAE")
CLASSES = ("GGO", "consolidation")  # a run on classes has scores for each


def without_paths(value):
    """A config's value; weights of another run, a path of one machine, by the name of that run's folder."""
    if isinstance(value, list):
        return [without_paths(one) for one in value]
    return Path(value).parent.name if isinstance(value, str) and "/" in value else value


def rounded(scores):
    """Scores without those by slice or volume; a run's seeds agree on fewer than four digits."""
    if isinstance(scores, dict):
        singles = ("per_slice", "per_volume")
        return {name: rounded(value) for name, value in scores.items() if name not in singles}
    return round(scores, 4) if isinstance(scores, float) else scores


def by_slice(scores: dict) -> dict[str, list[float]]:
    """Slice to its Dice at 0.5 and over thresholds; of a run on classes: of GGO and of consolidation.

    The latter are the toolbox's, of the map of 0 and 1 where the class is the likeliest.
    """
    if "per_slice" in scores:
        return {
            row["name"]: [round(row[name], 4) for name in ("dice_at_0.5", "meanDic")]
            for row in scores["per_slice"]
        }
    kinds = [scores[name]["toolbox_of_argmax"]["per_slice"] for name in CLASSES]
    return {rows[0]["name"]: [round(row["meanDic"], 4) for row in rows] for rows in zip(*kinds, strict=True)}


def by_volume(scores: dict) -> dict[str, dict[str, float]]:
    """Volume to its Dice on each grid, "crop" and "scan", and to what was found and is lesion on the last.

    Dice is None in a volume without lesions; the shares are in percent of the lungs.
    """
    volumes: dict[str, dict] = {}
    for row in scores["per_volume"]:
        shares = {name: rounded(row[name]) for name in ("share_found", "share_true")}
        volumes.setdefault(row["name"], {}).update({row["grid"]: rounded(row.get("Dice"))} | shares)
    return volumes


def entry(folder: Path) -> dict:
    """Config, scores, and scores by slice or volume of one finished run."""
    try:
        config, metrics = (
            json.loads((folder / f"{name}.json").read_text()) for name in ("config", "metrics")
        )
    except FileNotFoundError as missing:
        raise SystemExit(f"{missing.filename} does not exist: {folder} is no finished run") from None
    scores = metrics["scores"]
    singles = {"volumes": by_volume(scores)} if "per_volume" in scores else {"slices": by_slice(scores)}
    return {
        "name": folder.name,
        "config": {field: without_paths(value) for field, value in config.items()},
        "scores": rounded({name: scores[name] for name in SCORES} if "per_slice" in scores else scores),
        **singles,
        "seconds": round(metrics["seconds"]),
        "versions": metrics["versions"],
    }


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, help="JSON file to write or to add to")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    asked = parser.parse_args(argv)
    kept = json.loads(asked.record.read_text()) if asked.record.exists() else []
    new = [entry(folder) for folder in asked.runs]
    names = {one["name"] for one in new}
    kept = [one for one in kept if one["name"] not in names] + new
    lines = ",\n".join(json.dumps(one) for one in sorted(kept, key=lambda one: one["name"]))
    with whole(asked.record) as part:
        part.write_text(f"[\n{lines}\n]\n")
    print(f"{asked.record}: {len(kept)} runs, {len(new)} of them new or replaced")


if __name__ == "__main__":
    sys.exit(main())
