"""Variants of a training step, timed in turn, and the table of their ratios."""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch


def print_ratios(
    title: str,
    heads: tuple[str, str],
    names: Sequence[str],
    steps: Sequence[Callable[[], float]],
    rounds: int,
) -> None:
    """Take each step once, for its loss, then `rounds` times in turn; print medians against the first.

    In turn, so that a slow minute slows all of them.

    Parameters
    ----------
    title : what was run; the number of threads is added.
    heads : of the columns of seconds and of the loss.
    names, steps : of the variants; a step returns its loss.
    """
    losses, times = [step() for step in steps], [[] for _ in steps]
    for _ in range(rounds):
        for step, taken in zip(steps, times, strict=True):
            started = time.perf_counter()
            step()
            taken.append(time.perf_counter() - started)
    print(f"{title}, {torch.get_num_threads()} threads")
    print(f"| variant | {heads[0]} | times faster | {heads[1]} |\n| --- | --- | --- | --- |")
    slowest = median(times[0])
    for name, taken, loss in zip(names, times, losses, strict=True):
        print(f"| {name} | {median(taken):.2f} | {slowest / median(taken):.2f} | {loss:.4f} |")
