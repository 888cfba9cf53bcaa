"""What a segmenter of lung volumes finds in volumes it has not learned from, scored and written as files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from covidnb.metrics import infected_share, null_nan, volume_scores


@torch.no_grad()
def segment_volume(net: nn.Module, item: dict) -> np.ndarray:
    """Lesions of an item of `LungVolumes`, whole: probability >= 0.5, within the lungs; uint8 (D, H, W)."""
    was_training = net.training
    net.eval()
    device = next(net.parameters()).device
    probability = net(item["image"][None].to(device))[0, 0].float().cpu()
    net.train(was_training)
    return ((probability >= 0.5) & (item["lungs"][0] > 0)).numpy().astype(np.uint8)


def mean_dice(net: nn.Module, root: str | Path, split: str = "validation") -> float:
    """Mean Dice over the volumes of a split that have lesions, on the crop's grid."""
    from covidnb.volumes import LungVolumes, list_volumes

    volumes = LungVolumes(list_volumes(root, split), lesions=True)
    dices = []
    for item in (volumes[k] for k in range(len(volumes))):
        found, truth = segment_volume(net, item) > 0, item["lesions"][0].numpy() > 0
        if truth.any():
            dices.append(2 * (found & truth).sum() / (found.sum() + truth.sum()))
    return float(np.mean(dices)) if dices else float("nan")


def evaluate_volumes(
    net: nn.Module, root: str | Path, predictions: str | Path | None = None, split: str = "validation"
) -> dict:
    """Score the volumes of a split on the crop's grid and, where the scan is at hand, on the scan's.

    Parameters
    ----------
    net : Module
        (N, 1, D, H, W) in, probabilities out.
    root : str or Path
        Folder of volumes.
    predictions : str or Path, optional
        Folder for what is found, NAME.nii.gz each: on the scan's grid where the scan is at hand, else on the
        volume's.
    split : str
        Of the folder.

    Returns
    -------
    dict
        "crop" and "scan", each with "mean" and "sd" of "Dice", "sensitivity", "specificity", "HD95" in mm,
        "surfaceDice" over the volumes with lesions, and of "share_found" and "share_true" (infected share in
        percent) over all; HD95 over those of which anything was found, "missed" being how many were not.
        "per_volume": the same of each, by "name" and "grid". Without NaN: null.
    """
    from covidnb.ct import CTError, read_ct, write_like
    from covidnb.volumes import LungVolumes, crop_of, list_volumes, scan_of

    rows = []
    for files in list_volumes(root, split):
        item = LungVolumes([files], lesions=files.lesions is not None)[0]
        found = segment_volume(net, item)
        grid = read_ct(files.image)
        truth = item["lesions"][0].numpy() if "lesions" in item else None
        rows.append(_row(files.name, "crop", found, item["lungs"][0].numpy(), truth, grid))
        try:
            scan = scan_of(root, files.name)
        except CTError:  # it is no longer where it was: the volume's own grid has to do
            scan = None
        if scan is not None:
            grid, found = scan.ct, _array(crop_of(root, files.name).invert(found))
            truth = None if scan.lesions is None else _array(scan.lesions)
            rows.append(_row(files.name, "scan", found, _array(scan.lungs), truth, grid))
        if predictions is not None:
            write_like(found, grid, Path(predictions) / f"{files.name}.nii.gz")
    summaries = {grid: _summary([row for row in rows if row["grid"] == grid]) for grid in ("crop", "scan")}
    return summaries | null_nan({"per_volume": rows})


def _array(image) -> np.ndarray:
    import SimpleITK as sitk

    return sitk.GetArrayFromImage(image)


def _row(name: str, grid: str, found, lungs, truth, image) -> dict:
    """Scores of one volume on one grid; NaN where undefined."""
    row = {"name": name, "grid": grid, "share_found": infected_share(found, lungs)}
    if truth is None:
        return row
    scores = volume_scores(found, truth, image.GetSpacing()[::-1])
    if np.isinf(scores["HD95"]):
        scores["HD95"] = np.nan
    return row | {"share_true": infected_share(truth, lungs)} | scores


def _summary(rows: list[dict]) -> dict:
    """Mean and standard deviation of each score over the volumes where it is defined."""
    means, deviations = {}, {}
    for name in dict.fromkeys(key for row in rows for key in row if key not in ("name", "grid")):
        values = np.array([row[name] for row in rows if np.isfinite(row.get(name, np.nan))])
        if len(values):
            means[name] = float(values.mean())
            deviations[name] = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    missed = sum(row.get("Dice") == 0 and row["share_found"] == 0 for row in rows)
    return {"mean": means, "sd": deviations, "missed": missed, "volumes": len(rows)}


def grey_rows(rows: Sequence[Sequence[np.ndarray]], height: int = 96) -> np.ndarray:
    """Planes in [0, 1] side by side, each `height` pixels high, rows below each other; uint8 (H, W, 3)."""

    def enlarged(plane: np.ndarray) -> np.ndarray:
        width = round(plane.shape[1] * height / plane.shape[0])
        grey = np.uint8(np.clip(255 * plane, 0, 255).round())
        return np.asarray(Image.fromarray(grey).resize((width, height), Image.BILINEAR))

    grey = np.concatenate([np.concatenate([enlarged(p) for p in row], axis=1) for row in rows])
    return np.repeat(grey[..., None], 3, axis=2)
