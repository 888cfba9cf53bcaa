"""Compare the phantom's HU and lesions with medseg2's: a table, a figure, and the numbers for the chapters.

    python benchmarks/phantom_vs_medseg2.py [--patients 24] [--figure out.png] [--write]

medseg2 comes from $COVIDNB_DATA (or the cache); without it the numbers in data/reference are used. `--write`
puts both summaries, which hold no image, into data/reference/medseg2_summary.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk

import covidnb
from covidnb import catalog
from covidnb.ct import read_ct, read_mask
from covidnb.phantom import STYLES, chest
from covidnb.phantom.summary import TISSUES, hu_distance, size_distance, summarise

REFERENCE = Path(covidnb.__file__).parents[1] / "data" / "reference" / "medseg2_summary.json"
SOURCE = (
    "MedSeg, COVID-19 CT segmentation dataset no. 2, five volumes as packaged with GASNet: statistics only"
)
THRESHOLDS = np.arange(-800, -249, 25)  # HU


def medseg2_scans(folder: Path):
    """(ct, lungs, lesions) of every volume in the folder."""
    for path in sorted(folder.glob("medseg2_*_ct.nii.gz")):
        ct = read_ct(path)
        stem = path.name.removesuffix("_ct.nii.gz")
        yield (
            ct,
            read_mask(folder / f"{stem}_lung.nii.gz", ct),
            read_mask(folder / f"{stem}_lesion.nii.gz", ct),
        )


def phantom_scans(patients: int):
    """(ct, lungs, lesions) of the first patients, the scanner styles in turn."""
    styles = list(STYLES)
    for seed in range(patients):
        p = chest(seed, style=styles[seed % len(styles)])
        yield p.ct, p.lungs, p.lesions


def with_threshold_dice(scans, curves: list):
    """Hand the scans on; append to `curves` the Dice of each of THRESHOLDS as a finder of lesions."""
    for ct, lungs, lesions in scans:
        ill = sitk.GetArrayViewFromImage(lesions) > 0
        inside = (sitk.GetArrayViewFromImage(lungs) > 0) | ill
        hu, truth = sitk.GetArrayViewFromImage(ct)[inside], ill[inside]
        if truth.sum() * np.prod(ct.GetSpacing()) > 1000:
            found = [(hu > t) for t in THRESHOLDS]
            curves.append([2 * (f & truth).sum() / (f.sum() + truth.sum()) for f in found])
        yield ct, lungs, lesions


def threshold_row(curves: list) -> str:
    """The best common threshold and its Dice."""
    mean = np.mean(curves, axis=0)
    return f"{mean.max():.2f} at {THRESHOLDS[mean.argmax()]} HU"


def table(real: dict, ours: dict) -> str:
    """Both sides in Markdown."""

    def triple(values, digits=0):
        return " / ".join(f"{v:.{digits}f}" for v in values)

    rows = ["| | medseg2 | phantom | distance |", "| --- | --- | --- | --- |"]
    rows.append(f"| volumes | {real['scans']} | {ours['scans']} | |")
    for t in TISSUES:
        a, b = real["hu_quartiles"][t], ours["hu_quartiles"][t]
        rows.append(
            f"| {t}, quartiles in HU | {triple(a)} | {triple(b)} | {hu_distance(real, ours, t):.0f} HU |"
        )
    a, b = real["lesion_ml_quartiles"], ours["lesion_ml_quartiles"]
    rows.append(
        f"| lesions of 0.1 ml or more, quartiles in ml | {triple(a, 2)} | {triple(b, 2)}"
        f" | factor {10 ** size_distance(real, ours):.1f} |"
    )
    counts = [sum(s["lesion_counts"]) / len(s["shares"]["consolidation"]) for s in (real, ours)]
    rows.append(f"| lesions per ill volume | {counts[0]:.0f} | {counts[1]:.0f} | |")
    for name, what in (
        ("infected", "infected share of the lungs"),
        ("consolidation", "consolidation, share of the lesions"),
        ("peripheral", "lesion within 20 mm of the surface"),
        ("posterior", "lesion in the back half"),
        ("lower", "lesion in the lower half"),
    ):
        a, b = (np.percentile(s["shares"][name], [0, 50, 100]) * 100 for s in (real, ours))
        rows.append(f"| {what}, least / median / most in % | {triple(a)} | {triple(b)} | |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", type=int, default=24, help="number of phantoms")
    parser.add_argument("--figure", type=Path, help="where to draw the figure")
    parser.add_argument("--write", action="store_true", help=f"write {REFERENCE.name}")
    args = parser.parse_args()
    real_dice, our_dice = [], []
    try:
        real = summarise(with_threshold_dice(medseg2_scans(catalog.fetch("medseg2")), real_dice))
    except catalog.CatalogError:
        print(f"medseg2 is not at hand: its numbers come from {REFERENCE.name}\n")
        real = json.loads(REFERENCE.read_text())["medseg2"]
    start = time.perf_counter()
    ours = summarise(with_threshold_dice(phantom_scans(args.patients), our_dice))
    print(f"{args.patients} phantoms in {time.perf_counter() - start:.0f} s\n")
    print(table(real, ours))
    cells = [threshold_row(d) if d else "" for d in (real_dice, our_dice)]
    print(f"| Dice of the best single threshold in the lungs | {cells[0]} | {cells[1]} | |")
    if args.write:
        REFERENCE.parent.mkdir(parents=True, exist_ok=True)
        temporary = REFERENCE.with_suffix(".part")
        both = {"medseg2": {"source": SOURCE, **real}, "phantom": ours}
        temporary.write_text(json.dumps(both, indent=1) + "\n")
        os.replace(temporary, REFERENCE)
    if args.figure:
        from covidnb import view

        view.use_style()
        view.compare_histograms({"medseg2": real, "phantom": ours}).savefig(args.figure)


if __name__ == "__main__":
    main()
