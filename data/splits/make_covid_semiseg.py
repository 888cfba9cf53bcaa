"""Make covid-semiseg.json: five folds of the 50 doctor-labelled slices, apparent patients kept together.

COVID-SemiSeg names no patients: its labelled slices are numbered pictures. This script looks for slices that
seem to be of one patient, among the 50 for training and the 48 for testing, and deals whole groups to folds.

    python data/splits/make_covid_semiseg.py
"""

import json
from pathlib import Path

import cv2
import numpy as np
from scipy.sparse.csgraph import connected_components

from covidnb.catalog import fetch
from covidnb.files import natural_order, whole
from covidnb.slices import SliceFiles, list_slices, read_image

FOLDS = 5

ABOUT = (
    "Five folds of the 50 doctor-labelled slices of COVID-SemiSeg; slices that seem to be of one patient "
    "are in one fold. 'groups' are those apparent patients, 'test_twins' the test slices that seem to be "
    "of a patient of the training slices. Made by data/splits/make_covid_semiseg.py."
)
METHOD = (
    "Two of the 98 labelled slices are linked when their anatomy matches (normalised cross-correlation of "
    "the band-passed slices at 128 x 128 pixels, best of shifts up to 10 pixels, at least 0.72), or when "
    "they were rendered alike and are of like size: the commonest grey value of soft tissue differs by at "
    "most 3.75, that of lung by 12.5, the noise in soft tissue by 1.1, the share of saturated pixels by "
    "0.0075 and of black ones by 0.003, the longer side by 15 %. Linked slices form a group. Then a "
    "montage of all slices was looked at and the links of BY_EYE were added: the same unusual rendering "
    "or disease, missed by the rule."
)
LIMITS = (
    "No patient is known: the groups are guesses. Links by rendering may join patients of one scanner and "
    "page, which only makes a fold harder; a patient whose slices look unlike each other may still be in "
    "two folds. Of the test twins, 21, 91, 93 and 97 match a training slice's anatomy at 0.8 or more; the "
    "others share rendering and size, the weakest links being those of 73, 77 and 99."
)
# training and test slices that the rule leaves apart and that look like one patient
BY_EYE = [("3", "12"), ("12", "28"), ("12", "90"), ("30", "47"), ("8", "29"), ("39", "76")]


def anatomy(image: np.ndarray) -> np.ndarray:
    """A slice at 128 x 128 pixels without its slow grey changes, float32."""
    small = cv2.GaussianBlur(
        cv2.resize(image, (128, 128), interpolation=cv2.INTER_AREA).astype(np.float32), (0, 0), 1
    )
    return small - cv2.GaussianBlur(small, (0, 0), 12)


def match(a: np.ndarray, b: np.ndarray) -> float:
    """Best normalised cross-correlation of two slices over shifts of up to 10 pixels."""
    return max(
        float(cv2.matchTemplate(x, y[10:-10, 10:-10], cv2.TM_CCOEFF_NORMED).max())
        for x, y in ((a, b), (b, a))
    )


def rendering(image: np.ndarray) -> np.ndarray:
    """How a slice was rendered: grey of soft tissue and lung, noise, shares of 255 and 0, log of its side."""
    counts = np.bincount(image.ravel(), minlength=256) / image.size
    smooth = np.convolve(counts, np.ones(5) / 5, "same")
    soft, lung = 150 + np.argmax(smooth[150:250]), np.argmax(smooth[:120])
    grey = image.astype(float)
    tissue = cv2.erode((np.abs(grey - soft) < 25).astype(np.uint8), np.ones((7, 7))) > 0
    noise = (grey - cv2.GaussianBlur(grey, (0, 0), 1.2))[tissue].std() if tissue.sum() > 200 else -1.0
    return np.array([soft, lung, noise, counts[255], counts[0], np.log(max(image.shape))])


TOLERANCE = np.array([3.75, 12.5, 1.1, 0.0075, 0.003, np.log(1.15)])


def apparent_patients(slices: list[SliceFiles]) -> list[list[str]]:
    """Names of the slices, grouped."""
    images = [read_image(item.image) for item in slices]
    shapes, renderings = [anatomy(image) for image in images], [rendering(image) for image in images]
    names = [item.name for item in slices]
    linked = np.zeros((len(names), len(names)), bool)
    for i in range(len(names)):
        for j in range(i):
            alike = (np.abs(renderings[i] - renderings[j]) <= TOLERANCE).all()
            linked[i, j] = alike or match(shapes[i], shapes[j]) >= 0.72
    for a, b in BY_EYE:
        linked[names.index(a), names.index(b)] = True
    number, group_of = connected_components(linked, directed=False)
    groups = [[names[i] for i in np.flatnonzero(group_of == group)] for group in range(number)]
    return [sorted(group, key=natural_order) for group in groups]


def deal(groups: list[list[str]]) -> list[list[str]]:
    """Whole groups to folds, the largest first, each to the fold with the fewest slices so far."""
    folds: list[list[str]] = [[] for _ in range(FOLDS)]
    for group in sorted(groups, key=lambda group: (-len(group), natural_order(group[0]))):
        min(folds, key=len).extend(group)
    return [sorted(fold, key=natural_order) for fold in folds]


def main() -> None:
    root = fetch("covid-semiseg")
    doctor, test = list_slices(root, "doctor"), list_slices(root, "test")
    train_names = {item.name for item in doctor}
    everyone = apparent_patients(doctor + test)
    groups = [[name for name in group if name in train_names] for group in everyone]
    twins = {
        name: train
        for group, train in zip(everyone, groups, strict=True)
        if train
        for name in group
        if name not in train
    }
    groups = sorted((group for group in groups if group), key=lambda group: natural_order(group[0]))
    split = {
        "about": ABOUT,
        "method": METHOD,
        "limits": LIMITS,
        "groups": groups,
        "folds": deal(groups),
        "test_twins": dict(sorted(twins.items(), key=lambda pair: natural_order(pair[0]))),
    }
    with whole(Path(__file__).with_name("covid-semiseg.json")) as part:
        part.write_text(compact(split) + "\n", encoding="utf-8")
    print(f"{len(groups)} apparent patients, folds of {[len(fold) for fold in split['folds']]} slices")
    print(f"{len(twins)} of {len(test)} test slices have a twin among the training slices")


def compact(split: dict) -> str:
    """JSON with a line for each inner list, so that a change of one fold is a change of one line."""
    lines = []
    for key, value in split.items():
        if isinstance(value, str):
            lines.append(f"  {json.dumps(key)}: {json.dumps(value)}")
        elif isinstance(value, dict):
            inner = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f"  {json.dumps(key)}: {{\n{inner}\n  }}")
        else:
            inner = ",\n".join(f"    {json.dumps(v)}" for v in value)
            lines.append(f"  {json.dumps(key)}: [\n{inner}\n  ]")
    return "{\n" + ",\n".join(lines) + "\n}"


if __name__ == "__main__":
    main()
