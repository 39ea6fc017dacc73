"""Which points a benchmark asks for: the query sampling of TAP-Vid."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trackbench.structures import QueryMode


def sample_queries(
    xy: NDArray[Any],
    visible: NDArray[np.bool_],
    mode: QueryMode,
    stride: int = 5,
    labelled: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Take query points from ground-truth tracks.

    Two modes (Doersch et al., "TAP-Vid", NeurIPS 2022, section 3.1). ``first``: one query per track that is
    ever visible, at the first frame where it is. ``strided``: at frames 0, stride, 2 * stride, ... one query
    for every track visible there, so a track is asked for as often as it is seen; ordered by frame, then by
    track.

    Args:
        xy: (N, T, 2), x and y.
        visible: (N, T) bool.
        mode: ``first`` or ``strided``.
        stride: frames between query frames; ``strided`` only.
        labelled: (N, T) bool; a query is only taken where a track is labelled. None: everywhere.

    Returns:
        Queries (n, 3) as (t, x, y), and the index (n,) of the track that each one asks for. ``strided`` may
        give none.

    Raises:
        ValueError: shapes that do not belong together, an unknown mode, a stride below 1, or, in mode
            ``first``, no
            track that is ever visible.
    """
    if xy.ndim != 3 or xy.shape[2] != 2:
        raise ValueError(f"xy must be (N, T, 2), got {xy.shape}")
    for name, flags in (("visible", visible), ("labelled", labelled)):
        if flags is not None and (flags.shape != xy.shape[:2] or flags.dtype != bool):
            raise ValueError(f"{name} must be bool {xy.shape[:2]}, got {flags.dtype} {flags.shape}")
    can_ask = visible if labelled is None else visible & labelled

    if mode == "first":
        tracks = np.flatnonzero(can_ask.any(axis=1))
        if not len(tracks):
            raise ValueError(f"none of the {len(xy)} tracks is ever visible: there is nothing to query")
        frames = can_ask[tracks].argmax(axis=1)
    elif mode == "strided":
        if stride < 1:
            raise ValueError(f"stride must be at least 1, got {stride}")
        nth, tracks = np.nonzero(can_ask[:, ::stride].T)
        frames = nth * stride
    else:
        raise ValueError(f"mode must be 'first' or 'strided', got {mode!r}")

    queries = np.concatenate([frames[:, None], xy[tracks, frames]], axis=1).astype(np.float64)
    return queries, tracks.astype(np.int64)
