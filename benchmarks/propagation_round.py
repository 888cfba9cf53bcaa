"""What one round of a propagation does to what a network calls lesion.

From the same start, one round of the recipe "lite" in several ways: labels cut or not, batch statistics
moving or frozen, with and without the overlap term of the loss. Then the share of lesion that the network
calls in slices of the pool that it has not learnt from, before and after. The pool needs no masks.

    python benchmarks/propagation_round.py START --data covid-semiseg
"""

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from covidnb.slices import list_slices, semiseg_root
from covidnb.training.infnet import load_network, predict_slices
from covidnb.training.semi_infnet import STAGES, PropagationConfig, propagate

PROBED = 24  # slices of the pool whose share is measured, at most


def without_overlap(logits, mask, official=False, weight=None):
    """Weighted cross-entropy: the structure loss without its overlap term."""
    pixelwise = F.binary_cross_entropy_with_logits(logits.to(mask.dtype), mask, reduction="none")
    return ((weight * pixelwise).sum((1, 2, 3)) / weight.sum((1, 2, 3))).mean()


def frozen(self, mode=True):
    """In place of BatchNorm2d.train: never leaves evaluation mode, so its statistics stay."""
    return nn.Module.train(self, False)


# cut of the labels, batch statistics frozen, overlap term left out
VARIANTS = (
    (None, False, False),
    (0.5, False, False),
    (0.7, False, False),
    (0.8, False, False),
    (None, True, False),
    (None, False, True),
    (None, True, True),
)


def called(weights: str | Path, files: list, size: int) -> float:
    """Mean share of the slices, in percent, that a network calls lesion."""
    net, _ = load_network(weights)
    return 100 * float(np.mean([(m > 0.5).mean() for m in predict_slices(net, files, size)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("start", help="weights.safetensors of a trained Inf-Net")
    parser.add_argument("--data", default="phantom", help="phantom, covid-semiseg or a folder")
    parser.add_argument("--precision", default="bf16-mixed", help="or 32-true")
    asked = parser.parse_args()
    lite = STAGES["lite"]["propagation"] | {"share_limits": (0.0, 100.0), "watched": 0}
    here = {"start": asked.start, "data": asked.data, "precision": asked.precision}
    pool = list_slices(semiseg_root(asked.data), "pseudo")
    order = np.random.default_rng(0).permutation(len(pool))  # as the propagation's, seed 0
    probed = [pool[k] for k in order[lite["per_round"] :][-PROBED:]]
    print(f"before: {called(asked.start, probed, lite['size']):.2f} % of {len(probed)} slices of the pool")
    print("| labels | batch statistics | overlap term | called after one round, % |")
    print("| --- | --- | --- | --- |")
    for cut, still, cross_entropy in VARIANTS:
        config = PropagationConfig(**(lite | here | {"pool": lite["per_round"], "cut": cut}))
        with ExitStack() as stack:
            if still:
                stack.enter_context(mock.patch.object(nn.BatchNorm2d, "train", frozen))
            if cross_entropy:
                stack.enter_context(mock.patch("covidnb.losses.structure_loss", without_overlap))
            out = stack.enter_context(tempfile.TemporaryDirectory())
            run = propagate(config, out)
            share = called(run.weights_path, probed, config.size)
        label = "soft" if cut is None else f"cut at {cut}"
        batch, overlap = "frozen" if still else "moving", "out" if cross_entropy else "in"
        print(f"| {label} | {batch} | {overlap} | {share:.2f} |", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
