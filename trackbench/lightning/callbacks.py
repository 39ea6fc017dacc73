"""Callbacks: progress in steps, and an overlay video of the first validation clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from trackbench.data.loading import bad_training_samples
from trackbench.data.video_io import write_video
from trackbench.structures import Tracks, VideoBatch
from trackbench.visualization import overlay


class StepProgressBar(RichProgressBar):
    """Lightning's bar for training that is counted in steps: endless data has no epochs to name."""

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{'Training':{len(self.validation_description)}}"


class BadSampleCount(pl.Callback):
    """Report training samples that could not be read: ``train/bad_samples`` of rank 0, at the end of all ranks."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: VideoBatch, batch_idx: int
    ) -> None:
        """Log the count so far, where there is one: most runs have none."""
        if count := bad_training_samples(trainer.train_dataloader):
            pl_module.log("train/bad_samples", float(count), rank_zero_only=True, batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say how many there were."""
        here = torch.tensor(bad_training_samples(trainer.train_dataloader), device=pl_module.device)
        if count := int(trainer.strategy.reduce(here, reduce_op="sum")):
            rank_zero_warn(f"{count} training samples could not be read and were replaced; the log names them")


class OverlayVideo(pl.Callback):
    """Write predicted tracks over the first validation clip, to the run's folder and to W&B where it is on.

    Args:
        folder: where ``step_XXXXXXX.mp4`` goes.
        max_points: points drawn.
        fps: of the video.
    """

    def __init__(self, folder: str | Path, max_points: int = 32, fps: float = 8) -> None:
        self.folder = Path(folder)
        self.max_points = max_points
        self.fps = fps

    @rank_zero_only
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: VideoBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the first clip."""
        if batch_idx or dataloader_idx or trainer.sanity_checking:
            return
        few = slice(self.max_points)
        tracks: Tracks = outputs["tracks"]
        drawn = Tracks(tracks.xy[few], tracks.visible[few], tracks.visibility[few], tracks.queries[few])
        frames = overlay(batch.video[0].permute(0, 2, 3, 1).cpu().numpy(), drawn)
        path = self.folder / f"step_{trainer.global_step:07d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, frames, fps=self.fps)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_video("val/overlay", [str(path)], step=trainer.global_step, format=["mp4"])
