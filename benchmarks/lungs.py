"""Lungs by thresholds: Dice, share of the disease inside, and CPU seconds on one core, per data set.

python benchmarks/lungs.py    # data sets that are not at hand are left out; the registry's CT is fetched
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import time
from collections.abc import Iterator

import numpy as np
import SimpleITK as sitk

from covidnb import catalog, lungs, phantom
from covidnb.ct import read_ct, read_mask

Case = tuple[sitk.Image, np.ndarray, np.ndarray | None]  # scan, truth of the lungs, lesions if labelled


def folder_cases(name: str, numbers: tuple[int, ...]) -> Iterator[Case]:
    """Scans of medseg2 or uiip, where they are at hand."""
    if (folder := catalog.find(name)) is None:
        return
    for n in numbers:
        ct = read_ct(folder / f"{name}_{n}_ct.nii.gz")
        truth = sitk.GetArrayFromImage(read_mask(folder / f"{name}_{n}_lung.nii.gz", ct)) > 0
        lesion = folder / f"{name}_{n}_lesion.nii.gz"
        yield ct, truth, sitk.GetArrayFromImage(read_mask(lesion, ct)) if lesion.exists() else None


def chest_ct_cases(seeds: tuple[int, ...] = ()) -> Iterator[Case]:
    """The registry's CT as it is, or with lesions implanted, once for each seed."""
    folder = catalog.fetch("chest-ct", quiet=True)
    ct = read_ct(folder / "cxr.nii.gz")
    anatomy = read_mask(folder / "mask.nii.gz", ct)
    lobes = sitk.BinaryThreshold(anatomy, 10, 14)
    truth = sitk.GetArrayFromImage(lobes) > 0
    if not seeds:
        yield ct, truth, None
    for seed in seeds:
        ill, lesions = phantom.implant_lesions(ct, lobes, seed, severity=0.2)
        yield ill, truth, sitk.GetArrayFromImage(lesions)


def phantom_cases(seeds: tuple[int, ...]) -> Iterator[Case]:
    """Digital chests with COVID-19; seed 2020 is the book's running case."""
    for seed in seeds:
        chest = phantom.chest(seed)
        arrays = (sitk.GetArrayFromImage(image) for image in (chest.lungs, chest.lesions))
        yield chest.ct, next(arrays) > 0, next(arrays)


def thresholds_alone(ct: sitk.Image) -> np.ndarray:
    """The same method without its repairs: air inside the patient, its lung parts, vessels closed."""
    work = lungs.working_grid(ct)
    hu, spacing = sitk.GetArrayFromImage(work), work.GetSpacing()[::-1]
    air = lungs.enclosed_air(hu)
    parts = lungs.lung_parts(air & ~lungs.airway(air, hu, spacing), hu, spacing)
    closed = lungs.close_gaps(parts, spacing)
    return sitk.GetArrayFromImage(lungs.on_grid_of(closed, work, ct)) > 0


def score(cases: Iterator[Case]) -> list[float] | None:
    """Dice: mean, worst; shares inside: lesion, consolidation, without and with repair; seconds. Or None."""
    dice, found, seconds = [], [], []
    for ct, truth, lesions in cases:
        start = time.process_time()
        mask = sitk.GetArrayFromImage(lungs.segment_lungs(ct)) > 0
        seconds.append(time.process_time() - start)
        dice.append(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))
        if lesions is not None:
            bare = thresholds_alone(ct)
            ill, dense = lesions > 0, lesions == 2
            found.append([(m & part).sum() for part in (ill, dense) for m in (bare, mask, part)])
    if not dice:
        return None
    without, repaired, of, dense_without, dense_repaired, dense_of = np.sum(found or [[np.nan] * 6], axis=0)
    shares = [without / of, repaired / of, dense_without / dense_of, dense_repaired / dense_of]
    return [np.mean(dice), min(dice), *shares, max(seconds)]


def main() -> None:
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    sets = {
        "chest-ct, 512 x 512 x 133": chest_ct_cases(),
        "chest-ct, lesions implanted x 3": chest_ct_cases((1, 2, 3)),
        "medseg2, 5 scans": folder_cases("medseg2", (1, 2, 5, 6, 7)),
        "uiip, 4 scans": folder_cases("uiip", (1, 2, 3, 4)),
        "phantom, running case": phantom_cases((2020,)),
        "phantom, 4 more": phantom_cases((1, 2, 3, 4)),
    }
    print("| data | Dice, mean | worst | lesion inside: bare, repaired | consolidation inside | s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, cases in sets.items():
        if (row := score(cases)) is not None:
            mean, worst, *shares, seconds = row
            a, b, c, d = (f"{share:.3f}" for share in shares)
            print(
                f"| {name} | {mean:.4f} | {worst:.4f} | {a}, {b} | {c}, {d} | {seconds:.2f} |".replace(
                    "nan, nan", "-"
                )
            )


if __name__ == "__main__":
    main()
