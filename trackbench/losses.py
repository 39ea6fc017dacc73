"""Training losses of the memory head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackbench.heads.base import HeadOutput, Target

HEAD_PIXELS_PER_CELL = 4.0

RASTER = 256.0  # pixels per side of the raster that Chrono's distances are measured on


class TrackOnLoss(nn.Module):
    """Track-On's six loss terms (https://arxiv.org/abs/2501.18487, section 3.4), in pixels of a stride-4 map.

    Each term is a mean over the entries that its mask selects, and 0 where it selects none.

    Args:
        point_weight: of both classification terms.
        visibility_weight: of the visibility term.
        offset_weight: of the offset term.
        uncertainty_weight: of both uncertainty terms.
        temperature: divides the correlations before the softmax over cells.
        error_threshold: error in pixels of a stride-4 map beyond which a prediction counts as wrong.
        offset_limit: the offset error, in the same pixels, saturates here (no gradient beyond).
        after_query: count only frames later than the query's; False: all frames.
    """

    def __init__(
        self,
        *,
        point_weight: float = 3.0,
        visibility_weight: float = 1.0,
        offset_weight: float = 1.0,
        uncertainty_weight: float = 1.0,
        temperature: float = 0.05,
        error_threshold: float = 8.0,
        offset_limit: float = 8.0,
        after_query: bool = True,
    ) -> None:
        super().__init__()
        self.point_weight = point_weight
        self.visibility_weight = visibility_weight
        self.offset_weight = offset_weight
        self.uncertainty_weight = uncertainty_weight
        self.temperature = temperature
        self.error_threshold = error_threshold
        self.offset_limit = offset_limit
        self.after_query = after_query

    def forward(self, output: HeadOutput, target: Target) -> dict[str, Tensor]:
        """The named terms, weighted; their sum is what is back-propagated.

        Args:
            output: of :class:`trackbench.heads.memory.head.MemoryHead`, from a pass that recorded gradients.
            target: ground truth in cells.

        Raises:
            ValueError: the output lacks the correlations, which are not kept without gradients.
        """
        extra = output["extra"]
        if "coarse" not in extra:
            raise ValueError("the output has no correlations: run the head with gradients enabled")
        # entries without a position are masked below, but NaN times zero is NaN
        target = target._replace(xy=target.xy.nan_to_num())
        counted, found = self._masks(target)
        cells = _cell_of(target.xy, extra["size"])
        visible = target.visible.to(extra["visible_logit"].dtype)
        wrong = self._is_wrong(extra["xy"], target)
        candidate_wrong = self._is_wrong(extra["candidates"].movedim(3, 0), target).movedim(0, 3)
        candidate_loss = _binary(extra["candidate_logits"], candidate_wrong).mean(dim=-1)
        return {
            "point_loss": self.point_weight * self._classification(extra["coarse"], cells, found),
            "point_loss_local": self.point_weight * self._classification(extra["fine"], cells, found),
            "visibility_loss": self.visibility_weight
            * _masked_mean(_binary(extra["visible_logit"], visible), counted),
            "offset_loss": self.offset_weight * self._offset(extra["offsets"], target.xy - extra["centre"], found),
            "uncertainty_loss": self.uncertainty_weight
            * _masked_mean(_binary(extra["uncertain_logit"], wrong), counted),
            "uncertainty_loss_topk": self.uncertainty_weight * _masked_mean(candidate_loss, counted),
        }

    def _masks(self, target: Target) -> tuple[Tensor, Tensor]:
        """(B, N, T) bool: entries that count, and those of them where the point is visible."""
        counted = target.labelled
        if self.after_query:
            frame = torch.arange(target.xy.shape[2], device=target.xy.device)
            counted = counted & (frame > target.queries[..., :1].long())
        return counted, counted & target.visible

    def _classification(self, correlation: Tensor, cells: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy over the cells of a frame; correlation (B, N, T, h * w)."""
        labels = torch.where(mask, cells, -100).flatten()
        logits = correlation.flatten(0, 2).float() / self.temperature
        total = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        return total / mask.sum().clamp(min=1)

    def _offset(self, offsets: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
        """Saturated L1 error, mean over the layers; offsets (B, N, T, layers, 2), wanted (B, N, T, 2)."""
        error = (offsets - wanted[:, :, :, None]).abs().sum(dim=-1) * HEAD_PIXELS_PER_CELL
        return _masked_mean(error.clamp(max=self.offset_limit).mean(dim=-1), mask)

    def _is_wrong(self, xy: Tensor, target: Target) -> Tensor:
        """1.0 where points (..., B, N, T, 2) are far from the target or the target is hidden, else 0."""
        error = (xy.detach() - target.xy).norm(dim=-1) * HEAD_PIXELS_PER_CELL
        return ((error > self.error_threshold) | ~target.visible).to(xy.dtype)


def _cell_of(xy: Tensor, size: tuple[int, int]) -> Tensor:
    """Number of the cell, row by row, that holds each point (..., 2); 0 for points outside."""
    h, w = size
    column, line = xy[..., 0].floor().long(), xy[..., 1].floor().long()
    inside = (column >= 0) & (column < w) & (line >= 0) & (line < h)
    return torch.where(inside, line * w + column, 0)


def _binary(logits: Tensor, label: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.float(), label.float(), reduction="none")


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)


class ChronoLoss(nn.Module):
    """Huber loss on positions, and binary cross-entropy on occlusion and on "the position is off".

    Distances are measured on a raster of 256 x 256 pixels, whatever the grid of cells. Unlabelled entries
    count nowhere; occluded ones only in the occlusion term, though means run over all labelled entries.

    Args:
        position_weight: factor of the position term.
        huber_delta: distance in pixels where the position term turns from square to linear.
        expected_dist_threshold: distance in pixels above which a position counts as off.
        factor: factor of every term; 2 as published, where the same output is counted twice.
        matching_weight: factor of one more term that is not published: cross-entropy of the matching over all
            cells. The position term sees only the cells around the best one, so a wrong match gives it nothing
            to learn from; short trainings need this one.
    """

    def __init__(
        self,
        position_weight: float = 0.05,
        huber_delta: float = 4.0,
        expected_dist_threshold: float = 6.0,
        factor: float = 2.0,
        matching_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.position_weight = position_weight
        self.huber_delta = huber_delta
        self.expected_dist_threshold = expected_dist_threshold
        self.factor = factor
        self.matching_weight = matching_weight

    def forward(
        self,
        xy: Tensor,
        occlusion: Tensor,
        expected_dist: Tensor,
        target: Target,
        grid: tuple[int, int],
        cell_logits: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The terms, weighted.

        Args:
            xy: (B, N, T, 2) in cells.
            occlusion: (B, N, T) logits: the point is occluded.
            expected_dist: (B, N, T) logits: the position is off.
            target: ground truth in cells; positions of entries that do not count may be NaN.
            grid: cells (h, w) of the feature map.
            cell_logits: (B, N, T, h*w), for the matching term.

        Returns:
            Scalars "position", "occlusion" and "expected_dist", and "matching" where it has a weight.
        """
        h, w = grid
        counted = target.visible & target.labelled
        # entries that do not count are given their own prediction: no error, no gradient, no NaN
        wanted = torch.where(counted[..., None], target.xy.to(xy.dtype), xy.detach())
        dx, dy = (xy - wanted).unbind(-1)
        square = (dx * (RASTER / w)).square() + (dy * (RASTER / h)).square()
        distance = (square + 1e-6).sqrt()  # no infinite slope at zero

        linear = self.huber_delta * (distance - self.huber_delta / 2)
        huber = torch.where(distance < self.huber_delta, square / 2, linear) * counted
        is_off = (square.detach() > self.expected_dist_threshold**2).to(expected_dist.dtype)
        off_error = F.binary_cross_entropy_with_logits(expected_dist, is_off, reduction="none") * counted
        occluded = (~target.visible).to(occlusion.dtype)
        occlusion_error = F.binary_cross_entropy_with_logits(occlusion, occluded, reduction="none")

        labelled = target.labelled
        num_labelled = labelled.sum().clamp(min=1)
        terms = {
            "position": self.position_weight * huber,
            "occlusion": occlusion_error * labelled,
            "expected_dist": off_error,
        }
        losses = {name: self.factor * term.sum() / num_labelled for name, term in terms.items()}
        if self.matching_weight and cell_logits is not None:
            losses["matching"] = self.matching_weight * _matching(cell_logits, target.xy, counted, grid)
        return losses


def _matching(cell_logits: Tensor, xy: Tensor, counted: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean cross-entropy of the cell that holds the point, over counted entries inside the map; 0 without any."""
    h, w = grid
    x, y = xy.nan_to_num().floor().long().unbind(-1)
    counted = counted & (x >= 0) & (x < w) & (y >= 0) & (y < h)
    cell = (y.clamp(0, h - 1) * w + x.clamp(0, w - 1)).masked_fill(~counted, -100)
    total = F.cross_entropy(cell_logits.flatten(0, 2), cell.flatten(), ignore_index=-100, reduction="sum")
    return total / counted.sum().clamp(min=1)
