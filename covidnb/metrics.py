"""How good is a mask: the slice scores of the Inf-Net paper, volume scores in mm, the infected share.

The slice scores are those of the authors' MATLAB toolbox, degenerate slices included. Where the toolbox
thresholds a map 256 times, `threshold_curves` counts once: a pixel that passes a threshold passes all lower
ones, so two histograms (lesion and background) hold every confusion table there is.

`python -m covidnb.metrics PRED_DIR TRUTH_DIR` pairs pictures by name and prints one JSON object.
"""

import argparse
import json
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from covidnb.files import natural_order

# 1, 254/255, ..., 0 as the toolbox's `1:-1/255:0` gives them. The products differ from k/255 in the last bit
# for many k, and a map stored in 8 bits lies on that very grid: other rounding moves a score by up to 0.002.
THRESHOLDS = np.maximum(1.0 + np.arange(256) * (-1 / 255), 0.0)
EPS = np.finfo(float).eps
LESION_GREY = 128  # truth is what is brighter than this
PICTURES = {".png", ".jpg", ".jpeg"}

CURVES = ("Dic", "Sen", "Spe", "Em")


def slice_scores(preds: Sequence, truths: Sequence) -> dict:
    """Score soft maps of slices as the Inf-Net authors' toolbox does.

    Parameters
    ----------
    preds : (K, H, W) array or list of K arrays (H, W), each slice of its own size
        Soft maps, uint8 (0..255) or float (0..1). Each is min-max stretched to [0, 1] first.
    truths : like `preds`
        Masks: bool, 0/1, grey levels (lesion where > 128) or float 0..1 (lesion where > 128/255).

    Returns
    -------
    dict
        "meanDic", "meanSen", "meanSpe", "meanEm": the curve over 256 thresholds, averaged over slices, then
        over thresholds; "maxDic", "maxEm": that averaged curve at its best threshold; "Sm", "MAE": means over
        slices; "per_slice": the same scores of each slice. A slice that is lesion all over has no
        specificity: its "meanSpe" is NaN and so is that of the whole set, as in the toolbox.

    Raises
    ------
    ValueError
        Different numbers of slices or sizes, NaN, values outside the range; the message names the slice.

    Source: Fan et al. 2020, and the toolbox the authors released with it.
    """
    curves, per_slice = [], []
    for pred, truth in _pairs(preds, truths):
        soft = stretch(pred)
        curves.append(_curves(soft, truth))
        scores = _summary(curves[-1])
        scores |= {"Sm": s_measure(soft, truth), "MAE": float(np.abs(soft - truth).mean())}
        per_slice.append(scores)
    averaged = {name: np.mean([curve[name] for curve in curves], axis=0) for name in CURVES}
    soft_scores = {name: float(np.mean([scores[name] for scores in per_slice])) for name in ("Sm", "MAE")}
    return _summary(averaged) | soft_scores | {"per_slice": per_slice}


def threshold_curves(pred: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """Dice, sensitivity, specificity and E-measure of one slice at each of `THRESHOLDS`.

    `pred` and `truth` are one slice as in `slice_scores`. Returns {"Dic", "Sen", "Spe", "Em"}, each an array
    of 256 values. The first three are 0 where no lesion pixel is found, specificity too: the toolbox's rule.
    """
    ((pred, truth),) = _pairs([pred], [truth])
    return _curves(stretch(pred), truth)


def dice_at(preds: Sequence, truths: Sequence, threshold: float = 0.5) -> float:
    """Mean over slices of the Dice at one threshold, on the maps as they are: nothing is stretched.

    `preds`, `truths` and errors as in `slice_scores`; a pixel is lesion where its value (uint8: grey / 255)
    is at least `threshold`. A slice without lesion scores 1 when nothing is predicted in it, else 0.
    """
    return float(np.mean([_dice(pred >= threshold, truth) for pred, truth in _pairs(preds, truths)]))


def reliability(preds: Sequence, truths: Sequence, bins: int = 10) -> dict:
    """How far a map's probabilities can be taken at their word, over the pixels of all slices.

    Parameters
    ----------
    preds, truths : as in `slice_scores`; nothing is stretched.
    bins : of equal width between 0 and 1; empty ones are left out.

    Returns
    -------
    dict
        "said" and "observed": mean probability and share of lesion of each bin; "pixels": its size; "error":
        the expected calibration error, the mean of their distance weighted by the pixels.
    """
    pixels, said, lesions = np.zeros((3, bins))
    for pred, truth in _pairs(preds, truths):
        where = np.minimum((pred * bins).astype(int), bins - 1).ravel()
        pixels += np.bincount(where, minlength=bins)
        said += np.bincount(where, pred.ravel(), minlength=bins)
        lesions += np.bincount(where, truth.ravel(), minlength=bins)
    kept = pixels > 0
    pixels, said, lesions = (counted[kept] for counted in (pixels, said, lesions))
    error = np.abs(said - lesions).sum() / pixels.sum()
    return {"said": said / pixels, "observed": lesions / pixels, "pixels": pixels, "error": float(error)}


def stretch(soft: np.ndarray) -> np.ndarray:
    """Min-max stretch a map to [0, 1]; a constant map stays as it is (MATLAB's `mapminmax`)."""
    low, high = soft.min(), soft.max()
    return soft if low == high else (soft - low) / (high - low)


def s_measure(soft: np.ndarray, truth: np.ndarray) -> float:
    """Structure measure of a soft map (H, W) in [0, 1] against a bool mask: half by object, half by region.

    An empty (full) mask has no structure to compare: it scores the mean background (foreground) of the map.
    Source: Fan et al., "Structure-measure: a new way to evaluate foreground maps", ICCV 2017, alpha = 0.5.
    """
    share = truth.mean()
    if share in (0, 1):
        return float(soft.mean() if share else 1 - soft.mean())
    by_object = share * _object_score(soft[truth]) + (1 - share) * _object_score(1 - soft[~truth])
    return max(0.0, float(0.5 * by_object + 0.5 * _region_score(soft, truth)))


def volume_scores(
    pred: np.ndarray,
    truth: np.ndarray,
    spacing: Sequence[float],
    lungs: np.ndarray | None = None,
    tolerance: float = 2.0,
) -> dict[str, float]:
    """Score one volume: overlap in voxels, surfaces in millimetres.

    Parameters
    ----------
    pred, truth : (D, H, W)
        Bool or label arrays (lesion where > 0) or float probabilities (lesion where >= 0.5).
    spacing : three floats
        Voxel size in mm in the order of the axes, (z, y, x): `image.GetSpacing()[::-1]` of a SimpleITK image.
    lungs : (D, H, W), optional
        Count only what lies in this mask, in the prediction and in the truth alike.
    tolerance : float
        Surfaces this near, in mm, agree: for "surfaceDice".

    Returns
    -------
    dict
        "Dice", "sensitivity", "specificity", "HD95" in mm (95th percentile of the surface distances, the
        larger of the two directions), "surfaceDice". NaN where undefined: all but specificity in a volume
        without lesions, so that a `nanmean` runs over volumes with lesions, as the papers' does. Lesions of
        which nothing is predicted have Dice 0, HD95 infinite and surfaceDice 0.

    Raises
    ------
    ValueError
        Arrays that are not of one (D, H, W) size, NaN, values outside [0, 1], a spacing that is not three
        positive numbers, an empty lung mask. ImportError where MONAI is missing.
    """
    pred, truth = _volume(pred, "pred"), _volume(truth, "truth")
    inside = np.ones(truth.shape, bool) if lungs is None else _volume(lungs, "lungs")
    _same_size(pred=pred, truth=truth, lungs=inside)
    if len(spacing) != 3 or not all(math.isfinite(step) and step > 0 for step in spacing):
        raise ValueError(f"spacing must be three positive sizes in mm, (z, y, x); got {tuple(spacing)}")
    if not inside.any():
        raise ValueError("the lung mask is empty: segment the lungs again, or leave `lungs` out")

    healthy = inside & ~truth
    scores = {"specificity": float((healthy & ~pred).sum() / healthy.sum()) if healthy.any() else math.nan}
    pred, truth = pred & inside, truth & inside
    if not truth.any():
        return dict.fromkeys(("Dice", "sensitivity", "HD95", "surfaceDice"), math.nan) | scores
    scores |= {"Dice": _dice(pred, truth), "sensitivity": float((pred & truth).sum() / truth.sum())}
    if not pred.any():
        return scores | {"HD95": math.inf, "surfaceDice": 0.0}
    return scores | _surface_scores(pred, truth, tuple(map(float, spacing)), tolerance)


def infected_share(lesions: np.ndarray, lungs: np.ndarray) -> float:
    """Share of the lungs that is lesion, in percent.

    Two arrays of one (D, H, W) size: lesions (label > 0, or probability >= 0.5) and lungs. Lesion voxels
    outside the lung mask do not count. Raises ValueError for other sizes, NaN or an empty lung mask.
    """
    lesions, lungs = _volume(lesions, "lesions"), _volume(lungs, "lungs")
    _same_size(lesions=lesions, lungs=lungs)
    if not lungs.any():
        raise ValueError("the lung mask is empty: a share of no lung is undefined")
    return float(100 * (lesions & lungs).sum() / lungs.sum())


def _summary(curves: dict[str, np.ndarray]) -> dict[str, float]:
    means = {f"mean{name}": float(curve.mean()) for name, curve in curves.items()}
    return means | {f"max{name}": float(curves[name].max()) for name in ("Dic", "Em")}


def _curves(soft: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    # Bin b: the pixels that pass threshold b and none before it. Rounding finds the nearest threshold;
    # whether it is passed, or only the next lower one, is said by the comparison that 256 passes would make.
    bins = 255 - np.rint(soft.ravel() * 255).astype(np.intp)
    bins += soft.ravel() < THRESHOLDS[bins]
    predicted = np.cumsum(np.bincount(bins, minlength=256))
    hits = np.cumsum(np.bincount(bins[truth.ravel()], minlength=256))
    lesion, size = int(truth.sum()), truth.size
    found = hits > 0
    # 0 / 0 where there is no lesion (then nothing is found either), or no background (then NaN stays)
    with np.errstate(invalid="ignore"):
        specificity = (size - lesion - predicted + hits) / (np.float64(size) - lesion)
        sensitivity = hits / np.float64(lesion)
    return {
        "Dic": 2 * hits / np.maximum(predicted + lesion, 1),
        "Sen": np.where(found, sensitivity, 0.0),
        "Spe": np.where(found, specificity, 0.0),
        "Em": _e_measure(predicted, hits, lesion, size),
    }


def _e_measure(predicted: np.ndarray, hits: np.ndarray, lesion: int, size: int) -> np.ndarray:
    """Enhanced alignment of binary maps with the mask, from their counts (Fan et al., IJCAI 2018).

    A pixel's alignment depends on its two bits alone, so the sum over the slice has four terms.
    """
    if lesion == 0:
        return (size - predicted) / (size - 1 + EPS)
    if lesion == size:
        return predicted / (size - 1 + EPS)
    total = 0.0
    counts = {
        (1, 1): hits,
        (1, 0): predicted - hits,
        (0, 1): lesion - hits,
        (0, 0): size - lesion - predicted + hits,
    }
    for (bit, label), count in counts.items():
        a, b = bit - predicted / size, label - lesion / size
        total = total + count * (2 * a * b / (a * a + b * b + EPS) + 1) ** 2 / 4
    return total / (size - 1 + EPS)


def _object_score(values: np.ndarray) -> float:
    """How bright and how even the map is over the pixels that should be bright."""
    mean = values.mean()
    spread = values.std(ddof=1) if values.size > 1 else 0.0
    return 2 * mean / (mean**2 + 1 + spread + EPS)


def _region_score(soft: np.ndarray, truth: np.ndarray) -> float:
    """SSIM of the four quarters around the mask's centre of mass, weighted by their area."""
    row, column = (_centre(truth.sum(axis=axis)) for axis in (1, 0))
    score = 0.0
    for rows in (slice(None, row), slice(row, None)):
        for columns in (slice(None, column), slice(column, None)):
            quarter = truth[rows, columns]
            if quarter.size:  # a centre in the last row or column leaves quarters of weight 0
                score += quarter.size / truth.size * _ssim(soft[rows, columns], quarter)
    return score


def _centre(profile: np.ndarray) -> int:
    # counted from 1 and rounded half up, as MATLAB's round does
    return math.floor((profile * np.arange(1, profile.size + 1)).sum() / profile.sum() + 0.5)


def _ssim(soft: np.ndarray, truth: np.ndarray) -> float:
    x, y = soft.mean(), truth.mean()
    dx, dy = soft - x, truth - y
    norm = truth.size - 1 + EPS
    alpha = 4 * x * y * (dx * dy).sum() / norm
    beta = (x * x + y * y) * ((dx * dx).sum() + (dy * dy).sum()) / norm
    if alpha == 0:
        return float(beta == 0)
    return alpha / (beta + EPS)


def _dice(pred: np.ndarray, truth: np.ndarray) -> float:
    both = pred.sum() + truth.sum()
    return float(2 * (pred & truth).sum() / both) if both else 1.0


def _surface_scores(
    pred: np.ndarray, truth: np.ndarray, spacing: tuple, tolerance: float
) -> dict[str, float]:
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    # MONAI wants (batch, class, D, H, W); the rest of the volume holds no surface, so leave it out
    box = tuple(slice(axis.min(), axis.max() + 1) for axis in np.nonzero(pred | truth))
    pred, truth = (np.pad(mask[box], 1) for mask in (pred, truth))
    pair = [torch.from_numpy(mask)[None, None].float() for mask in (pred, truth)]
    options = {"include_background": True, "spacing": spacing}
    with warnings.catch_warnings():  # MONAI 1.6 calls an argument of its own that it has deprecated
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
        distance = compute_hausdorff_distance(*pair, percentile=95, **options)
        surface = compute_surface_dice(*pair, class_thresholds=[tolerance], use_subvoxels=True, **options)
    return {"HD95": float(distance), "surfaceDice": float(surface)}


def _pairs(preds: Sequence, truths: Sequence) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Check the slices and yield (float64 map in [0, 1], bool mask); errors name the slice's index."""
    if len(preds) != len(truths):
        raise ValueError(
            f"{len(preds)} predictions, {len(truths)} truths: pass one truth for each prediction"
        )
    if len(preds) == 0:
        raise ValueError("no slices to score")
    for index, (pred, truth) in enumerate(zip(preds, truths, strict=True)):
        pred, truth = np.asarray(pred), np.asarray(truth)
        if pred.ndim != 2 or pred.shape != truth.shape or not pred.size:
            raise ValueError(
                f"slice {index}: prediction {pred.shape} and truth {truth.shape} must be (H, W), of one size"
            )
        yield _soft_map(pred, f"prediction {index}"), _mask(truth, f"truth {index}")


def _soft_map(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array / 255
    if array.dtype == bool:
        return array.astype(float)
    if array.dtype.kind != "f":
        raise ValueError(f"{name} is {array.dtype}: pass uint8 (0..255) or float (0..1)")
    # written so that NaN fails it
    if not (array.min() >= 0 and array.max() <= 1):
        raise ValueError(
            f"{name} has NaN or values outside [0, 1] ({array.min():g} to {array.max():g}): "
            "pass probabilities (a sigmoid of the logits), or uint8"
        )
    return array.astype(float)


def _mask(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == bool:
        return array
    if array.dtype.kind == "f":
        return _soft_map(array, name) > LESION_GREY / 255
    if array.dtype.kind not in "iu" or array.min() < 0 or 1 < array.max() <= LESION_GREY or array.max() > 255:
        # a label map 0, 1, 2 would otherwise pass for a slice without lesion
        raise ValueError(
            f"{name} is no mask ({array.dtype}, {array.min()} to {array.max()}): "
            "pass bool, 0/1, or grey levels 0..255 with the lesion above 128"
        )
    return array > (LESION_GREY if array.max() > 1 else 0)


def _volume(array: np.ndarray, name: str) -> np.ndarray:
    # a SimpleITK image would turn into a flat list of voxels here, without its shape
    if not hasattr(array, "__array__"):
        raise ValueError(f"{name} must be an array (D, H, W): sitk.GetArrayFromImage(image) makes one")
    array = np.asarray(array)
    if array.ndim != 3:
        raise ValueError(f"{name} has shape {array.shape}: pass a volume (D, H, W)")
    return _soft_map(array, name) >= 0.5 if array.dtype.kind == "f" else array > 0


def _same_size(**volumes: np.ndarray) -> None:
    if len({volume.shape for volume in volumes.values()}) > 1:
        sizes = ", ".join(f"{name} {volume.shape}" for name, volume in volumes.items())
        raise ValueError(f"volumes of different sizes: {sizes}; bring them onto one grid first")


def _pictures(folder: Path) -> dict[str, Path]:
    """Pictures of a folder by stem, in natural order (2 before 10)."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir(), key=lambda path: natural_order(path.stem)):
        if path.suffix.lower() in PICTURES:
            if path.stem in found:
                raise ValueError(f"{path}: same name as {found[path.stem].name}; keep one of them")
            found[path.stem] = path
    if not found:
        raise ValueError(f"{folder}: holds no .png or .jpg")
    return found


def _read_slice(path: Path) -> np.ndarray:
    """The first channel of an 8-bit picture as uint8, or a one-bit picture as bool."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            array = np.asarray(picture)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three on broken files
        raise ValueError(f"{path}: cannot be read as a picture ({error})") from error
    if array.dtype not in (bool, np.uint8):
        raise ValueError(f"{path}: {array.dtype} picture; save it with 8 bits per pixel")
    return array if array.ndim == 2 else array[..., 0]


def score_folders(pred_dir: Path | str, truth_dir: Path | str) -> dict:
    """`slice_scores` of two folders of pictures (.png, .jpg) paired by stem.

    Adds "slices" (their number), "dice_at_0.5" (`dice_at`, nothing stretched) and each slice's "name". Raises
    ValueError naming the file that has no partner, another size or cannot be read.
    """
    preds, truths = _pictures(Path(pred_dir)), _pictures(Path(truth_dir))
    for here, there, folder in ((preds, truths, truth_dir), (truths, preds, pred_dir)):
        if odd := [path for stem, path in here.items() if stem not in there]:
            more = f" (nor {len(odd) - 1} others)" if len(odd) > 1 else ""
            raise ValueError(f"{odd[0]}: no picture of that name in {folder}{more}")
    pairs = []
    for stem, path in truths.items():
        pred, truth = _read_slice(preds[stem]), _read_slice(path)
        if pred.shape != truth.shape:
            raise ValueError(f"{preds[stem]}: size {pred.shape}, but its truth {path} is {truth.shape}")
        pairs.append((pred, _mask(truth, str(path))))
    columns = [list(column) for column in zip(*pairs, strict=True)]
    scores = slice_scores(*columns)
    for stem, entry in zip(truths, scores["per_slice"], strict=True):
        entry["name"] = stem
    return {"slices": len(pairs), "dice_at_0.5": dice_at(*columns)} | scores


def main(arguments: Sequence[str] | None = None) -> int:
    """Print `score_folders` as one JSON object (NaN as null); errors go to stderr, with exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m covidnb.metrics", description="Score predicted slices.")
    parser.add_argument("pred_dir", type=Path, help="folder of soft maps, 8-bit .png or .jpg")
    parser.add_argument("truth_dir", type=Path, help="folder of masks of the same names, lesion > 128")
    options = parser.parse_args(arguments)
    try:
        scores = score_folders(options.pred_dir, options.truth_dir)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(null_nan(scores), indent=1))
    return 0


def null_nan(scores: dict) -> dict:
    """Scores with None for NaN, in "per_slice" too: JSON has no NaN."""

    def cleaned(value):
        if isinstance(value, list):
            return [null_nan(entry) for entry in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    return {name: cleaned(value) for name, value in scores.items()}


if __name__ == "__main__":
    sys.exit(main())
