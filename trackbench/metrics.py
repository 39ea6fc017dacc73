"""TAP-Vid metrics: average Jaccard, delta_avg and occlusion accuracy.

Definitions: Doersch et al., "TAP-Vid: A Benchmark for Tracking Any Point in a Video", NeurIPS 2022, section
3.1. All of them are ratios of counts over the evaluated entries of a video, so the counts are what is stored
and gathered; the ratios are taken at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from trackbench.structures import QueryMode

Array = NDArray[Any] | Tensor
Coordinates = TypeVar("Coordinates", Tensor, NDArray[Any])

METRIC_RASTER = (256, 256)
THRESHOLDS = (1, 2, 4, 8, 16)
METRICS = (
    "average_jaccard",
    "average_pts_within_thresh",
    "occlusion_accuracy",
    *(f"jaccard_{threshold}" for threshold in THRESHOLDS),
    *(f"pts_within_{threshold}" for threshold in THRESHOLDS),
)

# columns of a row of counts: evaluated, occlusion right, visible, then per threshold: within, TP, FP
_N = len(THRESHOLDS)
_EVALUATED, _OCCLUSION_RIGHT, _VISIBLE = 0, 1, 2
_WITHIN, _TRUE_POSITIVE, _FALSE_POSITIVE = (
    slice(3, 3 + _N),
    slice(3 + _N, 3 + 2 * _N),
    slice(3 + 2 * _N, 3 + 3 * _N),
)
_COLUMNS = 3 + 3 * _N


def to_metric_raster(xy: Coordinates, height: int, width: int) -> Coordinates:
    """Scale coordinates of a ``height`` x ``width`` frame to the 256 x 256 raster of the metrics.

    Args:
        xy: (..., 2), x in [0, width], y in [0, height].
        height: height of the frame in pixels.
        width: width of the frame in pixels.

    Returns:
        (..., 2), x and y in [0, 256], same type; half precision becomes float32.

    Raises:
        ValueError: if the last axis is not (x, y).
    """
    if xy.shape[-1] != 2:
        raise ValueError(f"xy must be (..., 2), got {tuple(xy.shape)}")
    scale = (METRIC_RASTER[1] / width, METRIC_RASTER[0] / height)
    if isinstance(xy, Tensor):
        xy = xy if xy.dtype == torch.float64 else xy.float()
        return xy * xy.new_tensor(scale)
    return xy * np.asarray(scale, dtype=np.float64 if xy.dtype == np.float64 else np.float32)


def tapvid(
    queries: Array,
    gt_xy: Array,
    gt_visible: Array,
    pred_xy: Array,
    pred_visible: Array,
    query_mode: QueryMode = "first",
    per_track: bool = False,
    labelled: Array | None = None,
) -> dict[str, NDArray[np.float64]]:
    """TAP-Vid metrics of a batch of videos.

    Evaluated are the frames after the query frame (``first``) or all frames but the query frame
    (``strided``). The query frame is ``round(t)``, halves to the even frame. With a threshold of x pixels:

    - ``occlusion_accuracy``: share of evaluated entries whose visibility is predicted right;
    - ``pts_within_x``: share of the visible entries with an error strictly below x, whatever visibility was
      predicted;
    - ``jaccard_x`` = TP / (visible + FP): TP is visible, predicted visible and within x; FP is predicted
      visible and occluded or not within x. A far prediction of a visible point counts in both terms of the
      denominator;
    - ``average_pts_within_thresh`` (delta_avg) and ``average_jaccard`` (AJ): means over x in 1, 2, 4, 8, 16.

    A ratio without any entry is NaN, never an error or a warning: everything where no frame is evaluated,
    ``pts_within_*`` where no evaluated entry is visible, ``jaccard_*`` where in addition nothing is predicted
    visible. A prediction that is NaN is outside every threshold.

    Args:
        queries: (B, N, 3), (t, x, y).
        gt_xy: (B, N, T, 2), pixels of the 256 x 256 raster (:func:`to_metric_raster`).
        gt_visible: (B, N, T) bool.
        pred_xy: (B, N, T, 2), as ``gt_xy``.
        pred_visible: (B, N, T) bool.
        query_mode: how the queries were sampled; decides which frames are evaluated.
        per_track: one value per track instead of one per video.
        labelled: (B, N, T) bool, entries that count; None: all of them.

    Returns:
        The values of :data:`METRICS` in [0, 1] or NaN, each (B,) over all tracks of a video, or (B, N) per
        track.

    Raises:
        ValueError: shapes that do not belong together, visibility that is not boolean, a query frame outside
            the video, or an unknown query mode.
    """
    counts = _count(queries, gt_xy, gt_visible, pred_xy, pred_visible, query_mode, labelled)
    return _scores(counts if per_track else counts.sum(axis=1))


class TapVidMetric(Metric):
    """TAP-Vid metrics of a data set: per video, and their mean over videos.

    A video is known by its id, and counts once: a sampler that repeats videos to give every process as many
    of them changes nothing. So ids must be unique within a data set. Counts and ids are tensors of any length
    per process, gathered by concatenation.

    The mean of a metric runs over the videos that have a value for it (see :func:`tapvid` for when a video
    has none); how many of the videos lack at least one value is ``videos_without_score``.

    Args:
        query_mode: how the queries were sampled, ``first`` or ``strided``.
        **kwargs: arguments of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    counts: list[Tensor]
    ids: list[Tensor]

    def __init__(self, query_mode: QueryMode = "first", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_query_mode(query_mode)
        self.query_mode: QueryMode = query_mode
        self.add_state("counts", default=[], dist_reduce_fx="cat")
        self.add_state("ids", default=[], dist_reduce_fx="cat")
        self._add_empty_rows()

    def reset(self) -> None:
        """Forget all videos."""
        super().reset()
        self._add_empty_rows()

    def update(
        self,
        queries: Tensor,
        gt_xy: Tensor,
        gt_visible: Tensor,
        pred_xy: Tensor,
        pred_visible: Tensor,
        ids: Sequence[str | int] | Tensor,
        labelled: Tensor | None = None,
    ) -> None:
        """Add B videos; shapes and units as in :func:`tapvid`.

        Args:
            queries: (B, N, 3), (t, x, y).
            gt_xy: (B, N, T, 2), pixels of the 256 x 256 raster.
            gt_visible: (B, N, T) bool.
            pred_xy: (B, N, T, 2), pixels of the 256 x 256 raster.
            pred_visible: (B, N, T) bool.
            ids: one name or number per video, such as ``VideoBatch.names``.
            labelled: (B, N, T) bool, entries that count; None: all of them.

        Raises:
            ValueError: as :func:`tapvid`, or if there is not one id per video.
        """
        counts = _count(queries, gt_xy, gt_visible, pred_xy, pred_visible, self.query_mode, labelled).sum(axis=1)
        if len(ids) != len(counts):
            raise ValueError(f"expected {len(counts)} ids, one per video, got {len(ids)}")
        self.counts.append(torch.from_numpy(counts).to(self.device))
        self.ids.append(_encode_ids(ids).to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """Means over videos.

        Returns:
            Scalars: :data:`METRICS`, each over the videos that have a value (NaN if none has), ``videos``,
            and ``videos_without_score``, the number of videos in which at least one metric has no value.
        """
        scores = _scores(np.stack([*self._counts_by_id().values(), np.zeros(_COLUMNS, np.int64)])[:-1])
        values = np.stack([scores[name] for name in METRICS])
        has_value = ~np.isnan(values)
        totals = np.where(has_value, values, 0.0).sum(axis=1)
        means = _ratio(totals, has_value.sum(axis=1))
        result = dict(zip(METRICS, means, strict=True))
        result["videos"] = values.shape[1]
        result["videos_without_score"] = (~has_value.all(axis=0)).sum()
        return {name: torch.tensor(float(value), device=self.device) for name, value in result.items()}

    def rows(self) -> dict[str, dict[str, float]]:
        """Per-video values: id -> metric -> value or NaN, sorted by id.

        With several processes this gathers, so all of them must call it.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            by_id = self._counts_by_id()
        rows = {}
        for video in sorted(by_id):
            scores = _scores(by_id[video])
            rows[video] = {name: float(scores[name]) for name in METRICS}
        return rows

    def _add_empty_rows(self) -> None:
        """A process without videos must gather tensors of the same kind as the others."""
        self.counts.append(torch.zeros(0, _COLUMNS, dtype=torch.int64, device=self.device))
        self.ids.append(torch.zeros(0, dtype=torch.uint8, device=self.device))

    def _counts_by_id(self) -> dict[str, NDArray[np.int64]]:
        counts = dim_zero_cat(self.counts).cpu().numpy()
        ids = _decode_ids(dim_zero_cat(self.ids))
        by_id: dict[str, NDArray[np.int64]] = {}
        for video, row in zip(ids, counts, strict=True):
            by_id.setdefault(video, row)
        return by_id


def _encode_ids(ids: Sequence[str | int] | Tensor) -> Tensor:
    """All ids as UTF-8 bytes, each closed by a zero: a tensor that survives concatenation."""
    texts = [str(video) for video in (ids.tolist() if isinstance(ids, Tensor) else ids)]
    if any("\0" in text for text in texts):
        raise ValueError(f"a video id must not hold a zero character, got {texts}")
    return torch.tensor(list("".join(f"{text}\0" for text in texts).encode()), dtype=torch.uint8)


def _decode_ids(encoded: Tensor) -> list[str]:
    return bytes(encoded.cpu().numpy()).decode().split("\0")[:-1]


def _count(
    queries: Array,
    gt_xy: Array,
    gt_visible: Array,
    pred_xy: Array,
    pred_visible: Array,
    query_mode: QueryMode,
    labelled: Array | None,
) -> NDArray[np.int64]:
    """Counts per track, (B, N, columns)."""
    _check_query_mode(query_mode)
    q, gt, pred = _numbers(queries), _numbers(gt_xy), _numbers(pred_xy)
    if q.ndim != 3 or q.shape[-1] != 3:
        raise ValueError(f"queries must be (B, N, 3) as (t, x, y), got {q.shape}")
    if gt.ndim != 4 or gt.shape[:2] != q.shape[:2] or gt.shape[3] != 2:
        raise ValueError(f"gt_xy must be (B, N, T, 2) with B, N = {q.shape[:2]}, got {gt.shape}")
    if pred.shape != gt.shape:
        raise ValueError(f"pred_xy must be {gt.shape} as gt_xy, got {pred.shape}")
    flags = gt.shape[:3]
    visible = _flags("gt_visible", gt_visible, flags)
    pred_seen = _flags("pred_visible", pred_visible, flags)

    evaluated = _evaluated_frames(q[..., 0], flags[2], query_mode)
    if labelled is not None:
        evaluated &= _flags("labelled", labelled, flags)

    with np.errstate(invalid="ignore", over="ignore"):  # NaN or infinite coordinates are just not within
        squared_error = np.square(pred - gt).sum(axis=-1)
        within = [squared_error < threshold**2 for threshold in THRESHOLDS]

    shown, claimed = evaluated & visible, evaluated & pred_seen
    columns = [
        evaluated,
        evaluated & (visible == pred_seen),
        shown,
        *(shown & near for near in within),
        *(shown & claimed & near for near in within),
        *(claimed & ~(visible & near) for near in within),
    ]
    return np.stack([column.sum(axis=-1, dtype=np.int64) for column in columns], axis=-1)


def _scores(counts: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """Counts (..., columns) -> values (...)."""
    visible = counts[..., _VISIBLE, None]
    within = _ratio(counts[..., _WITHIN], visible)
    jaccard = _ratio(counts[..., _TRUE_POSITIVE], visible + counts[..., _FALSE_POSITIVE])
    scores = {
        "average_jaccard": jaccard.mean(axis=-1),
        "average_pts_within_thresh": within.mean(axis=-1),
        "occlusion_accuracy": _ratio(counts[..., _OCCLUSION_RIGHT], counts[..., _EVALUATED]),
    }
    for index, threshold in enumerate(THRESHOLDS):
        scores[f"jaccard_{threshold}"] = jaccard[..., index]
        scores[f"pts_within_{threshold}"] = within[..., index]
    return {name: scores[name] for name in METRICS}


def _ratio(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(part / whole, dtype=np.float64)


def _evaluated_frames(query_time: NDArray[Any], num_frames: int, query_mode: QueryMode) -> NDArray[np.bool_]:
    """(B, N) query times -> (B, N, T) bool."""
    query_frame = np.round(query_time)
    inside = (query_frame >= 0) & (query_frame < num_frames)  # False for NaN
    if not inside.all():
        raise ValueError(
            f"query frames must lie in [0, {num_frames - 1}], got t = {query_time[~inside].tolist()[:5]}"
        )
    frames = np.arange(num_frames)
    if query_mode == "first":
        return frames > query_frame[..., None]
    return frames != query_frame[..., None]


def _numbers(values: Array) -> NDArray[Any]:
    """As numpy, in its own precision but at least float32."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values if values.dtype == torch.float64 else values.float()).numpy()
    array = np.asarray(values)
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _flags(name: str, values: Array, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.dtype.kind not in "biu" or array.shape != shape:
        raise ValueError(f"{name} must be bool {shape}, got {array.dtype} {array.shape}")
    return array.astype(bool)


def _check_query_mode(query_mode: str) -> None:
    if query_mode not in ("first", "strided"):
        raise ValueError(f"query_mode must be 'first' or 'strided', got {query_mode!r}")
