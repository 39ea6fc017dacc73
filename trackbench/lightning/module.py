"""One LightningModule for all trackers: it knows trackers and metrics, and no model's insides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trackbench.evaluation.runner import use_head_settings
from trackbench.metrics import TapVidMetric, to_metric_raster
from trackbench.structures import QueryMode, Tracks, VideoBatch
from trackbench.tracker import PointTracker

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[..., LRScheduler]
SHORT_NAMES = {
    "average_jaccard": "AJ",
    "average_pts_within_thresh": "delta_avg",
    "occlusion_accuracy": "OA",
}


class TrackerModule(pl.LightningModule):
    """Trains and validates any :class:`~trackbench.tracker.PointTracker`.

    Args:
        tracker: the model.
        optimizer: parameters -> optimiser (a Hydra ``_partial_``).
        scheduler: (optimiser, total_steps=...) -> schedule per optimiser step; None: constant.
        config: plain config of the tracker, stored in checkpoints so that they can be rebuilt.
        name: the model's name, stored beside it.
        query_mode: of the validation data, ``first`` or ``strided``.
        lr_scales: prefix of parameter names (``head.occ_linear``, ``backbone``) -> factor of their learning rate.
        val_head_settings: attributes of the head in validation and test, see
            :func:`~trackbench.evaluation.runner.head_settings_for`.

    A step whose gradients are not finite is skipped whole (no weight decay, no momentum) and counted in
    ``train/skipped_steps``.
    """

    def __init__(
        self,
        tracker: PointTracker,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        *,
        config: dict[str, Any] | None = None,
        name: str = "",
        query_mode: QueryMode = "first",
        lr_scales: Mapping[str, float] | None = None,
        val_head_settings: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.tracker = tracker
        self.metric = TapVidMetric(query_mode=query_mode)
        self.query_mode = query_mode
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler
        self._lr_scales = dict(lr_scales or {})
        self._val_head_settings = dict(val_head_settings or {})
        self._stored = {"name": name, "config": config or {}}
        self.skipped_steps: Tensor
        self.register_buffer("skipped_steps", torch.zeros((), dtype=torch.int64))

    def training_step(self, batch: VideoBatch, batch_idx: int) -> Tensor:
        """The sum of the head's loss terms."""
        prediction = self.tracker(batch.video, batch.queries)
        terms = self.tracker.loss(prediction, batch)
        total = torch.stack(list(terms.values())).sum()
        size = len(batch.video)
        self.log("train/loss", total, prog_bar=True, batch_size=size)
        self.log_dict({f"train/{key}": value for key, value in terms.items()}, batch_size=size)
        return total

    def validation_step(self, batch: VideoBatch, batch_idx: int) -> dict[str, Tracks]:
        """Track one video and score it at the metric's raster."""
        return {"tracks": self._score(batch)}

    def test_step(self, batch: VideoBatch, batch_idx: int) -> dict[str, Tracks]:
        """The same as validation."""
        return {"tracks": self._score(batch)}

    def _score(self, batch: VideoBatch) -> Tracks:
        if len(batch.video) != 1:
            raise ValueError(f"validation takes one video at a time, got a batch of {len(batch.video)}")
        with use_head_settings(self.tracker, self._val_head_settings):
            tracks = self.tracker.track_tensor(
                batch.video[0], batch.queries[0], both_directions=self.query_mode == "strided"
            )
        height, width = batch.video.shape[-2:]
        self.metric.update(
            batch.queries,
            to_metric_raster(batch.xy, height, width),
            batch.visible,
            to_metric_raster(tracks.xy[None].to(batch.xy.device), height, width),
            tracks.visible[None].to(batch.xy.device),
            ids=batch.names,
            labelled=batch.labelled,
        )
        return tracks

    def on_validation_epoch_end(self) -> None:
        """Mean over videos, the same on all ranks."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Mean over videos, the same on all ranks."""
        self._log_scores("test")

    def _log_scores(self, stage: str) -> None:
        scores = self.metric.compute()
        self.metric.reset()
        for key, value in scores.items():
            name = SHORT_NAMES.get(key, key)
            self.log(f"{stage}/{name}", torch.as_tensor(value).float(), prog_bar=name in SHORT_NAMES.values())

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, then drop the step if any gradient is not finite (gradients are equal on all ranks here)."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        self.log("train/grad_norm", norm)
        if not bool(torch.isfinite(norm)):
            self.skipped_steps += 1
            for parameter in self.parameters():
                parameter.grad = None
        elif gradient_clip_val is not None:
            self.clip_gradients(
                optimizer,
                gradient_clip_val=gradient_clip_val,
                gradient_clip_algorithm=gradient_clip_algorithm or "norm",
            )
        self.log("train/skipped_steps", self.skipped_steps.float())

    def configure_optimizers(self) -> Any:
        """Optimiser over the trainable parameters; the schedule advances with every optimiser step."""
        optimizer = self._make_optimizer(self._parameter_groups())
        if self._make_scheduler is None:
            return optimizer
        total_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = self._make_scheduler(optimizer, total_steps=total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _parameter_groups(self) -> list[Any]:
        """Trainable parameters, those with their own learning rate in groups of their own."""
        rest = {name: p for name, p in self.tracker.named_parameters() if p.requires_grad}
        if not rest:
            raise ValueError("the tracker has no trainable parameter")
        if not self._lr_scales:
            return list(rest.values())
        base = self._make_optimizer(list(rest.values())).defaults["lr"]
        groups = []
        for prefix, scale in self._lr_scales.items():
            names = [name for name in rest if name == prefix or name.startswith(f"{prefix}.")]
            if names:
                groups.append({"params": [rest.pop(name) for name in names], "lr": scale * base})
        return [*groups, {"params": list(rest.values())}] if rest else groups

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the tracker's config: a checkpoint is enough to rebuild its model."""
        checkpoint["trackbench"] = self._stored

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume another architecture, before any weight is touched."""
        own = self.state_dict()
        state = checkpoint["state_dict"]
        wrong = sorted(set(own) ^ set(state)) + [k for k in own if k in state and own[k].shape != state[k].shape]
        if wrong:
            stored = checkpoint.get("trackbench", {}).get("name", "another model")
            raise ValueError(
                f"the checkpoint holds {stored!r}, not {self._stored['name']!r}: "
                f"{len(wrong)} weights differ, e.g. {wrong[:5]}"
            )
