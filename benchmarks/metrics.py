"""Seconds to score 48 slices: `covidnb.metrics` against the plain formulation, 256 passes over each slice.

python benchmarks/metrics.py [--slices 48] [--size 400]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from covidnb import metrics


def plain_curves(soft: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """What `threshold_curves` returns, word for word from the definition: one pass per threshold.

    `soft`: stretched map (H, W) in [0, 1]; `truth`: bool mask. The tests compare with it.
    """
    curves = {name: np.zeros(256) for name in metrics.CURVES}
    for i, threshold in enumerate(metrics.THRESHOLDS):
        binary = soft >= threshold
        curves["Em"][i] = _plain_e_measure(binary, truth)
        hits = np.count_nonzero(binary & truth)
        if hits:
            curves["Dic"][i] = 2 * hits / (binary.sum() + truth.sum())
            curves["Sen"][i] = hits / truth.sum()
            background = np.count_nonzero(~truth)
            curves["Spe"][i] = np.count_nonzero(~binary & ~truth) / background if background else np.nan
    return curves


def _plain_e_measure(binary: np.ndarray, truth: np.ndarray) -> float:
    if not truth.any():
        enhanced = 1.0 - binary
    elif truth.all():
        enhanced = binary.astype(float)
    else:
        a, b = binary - binary.mean(), truth - truth.mean()
        enhanced = (2 * a * b / (a * a + b * b + metrics.EPS) + 1) ** 2 / 4
    return enhanced.sum() / (truth.size - 1 + metrics.EPS)


def make_slices(count: int, size: int, seed: int = 0) -> tuple[list, list]:
    """Elliptic lesions and soft, noisy maps of them: uint8 (size, size) each."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    preds, truths = [], []
    for _ in range(count):
        (cy, cx), (ry, rx) = rng.uniform(0.3, 0.7, 2), rng.uniform(0.05, 0.25, 2)
        inside = 1 - np.hypot((y - cy) / ry, (x - cx) / rx)
        truths.append((inside > 0).astype(np.uint8) * 255)
        soft = 1 / (1 + np.exp(-6 * inside)) + rng.normal(0, 0.02, inside.shape)
        preds.append((255 * soft.clip(0, 1)).astype(np.uint8))
    return preds, truths


def seconds(task) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def time_command(preds: list, truths: list) -> float:
    """Wall time of the whole process `python -m covidnb.metrics` on these slices as PNG files."""
    with tempfile.TemporaryDirectory() as folder:
        for part, slices in (("pred", preds), ("truth", truths)):
            Path(folder, part).mkdir()
            for index, array in enumerate(slices):
                Image.fromarray(array).save(Path(folder, part, f"{index}.png"))
        command = [sys.executable, "-m", "covidnb.metrics", f"{folder}/pred", f"{folder}/truth"]
        return seconds(lambda: subprocess.run(command, check=True, capture_output=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, default=48)
    parser.add_argument("--size", type=int, default=400, help="pixels a side")
    options = parser.parse_args()
    preds, truths = make_slices(options.slices, options.size)
    fast = seconds(lambda: metrics.slice_scores(preds, truths))
    plain = seconds(
        lambda: [plain_curves(metrics.stretch(p / 255), t > 128) for p, t in zip(preds, truths, strict=True)]
    )
    print(f"{options.slices} slices of {options.size} x {options.size} pixels")
    print(f"slice_scores, histograms (S-measure and MAE included): {fast:8.2f} s")
    print(f"256 passes (without S-measure and MAE):                {plain:8.2f} s")
    print(f"ratio:                                                 {plain / fast:8.0f}")
    print(f"python -m covidnb.metrics, whole process:              {time_command(preds, truths):8.2f} s")


if __name__ == "__main__":
    main()
