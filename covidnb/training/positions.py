"""A slice in its eight positions, mirrored or not and turned by quarters: one map from a network's eight."""

import numpy as np

POSITIONS = tuple((mirrored, turns) for mirrored in (False, True) for turns in range(4))


def positions(plane: np.ndarray) -> list[np.ndarray]:
    """Plane (H, W) in its eight positions, the first as it is; four of them are (W, H)."""
    # contiguous: torch takes no array that runs backwards
    return [
        np.ascontiguousarray(np.rot90(plane[:, ::-1] if mirrored else plane, turns))
        for mirrored, turns in POSITIONS
    ]


def mean_of_positions(maps: list[np.ndarray]) -> np.ndarray:
    """Mean (..., H, W) of maps of the eight `positions` of a plane, each moved back."""
    back = [np.rot90(one, -turns, (-2, -1)) for one, (_, turns) in zip(maps, POSITIONS, strict=True)]
    return sum(one[..., ::-1] if m else one for one, (m, _) in zip(back, POSITIONS, strict=True)) / 8
