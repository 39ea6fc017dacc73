"""Fit a tracker from a composed config: what ``train.py`` and the demo run."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from trackbench.composition import build_tracker, compose_config, plain_config
from trackbench.data.datamodule import TrainAndValidate
from trackbench.evaluation.runner import head_settings_for
from trackbench.lightning.module import TrackerModule

log = logging.getLogger(__name__)
# Lightning's advertisement, and its note that checkpoints hold the optimiser too
_NOISE = ("litlogger", "`weights_only` was not set")
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
    lambda record: not any(noise in record.getMessage() for noise in _NOISE)
)


def train(config: DictConfig) -> float | None:
    """Train, validate and keep checkpoints as ``config`` says.

    Args:
        config: ``configs/train.yaml`` with its groups.

    Returns:
        The best value of ``config.monitor``, for sweeps; None where nothing was validated.

    Raises:
        ValueError: a config without a trainable tracker, or a checkpoint of another architecture.
        FileNotFoundError: ``ckpt_path=last`` and there is none.
    """
    if config.get("backbone") is None:
        raise ValueError(f"{config.name} has nothing to train; choose a model with a backbone and a head")
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = resolve_checkpoint(config)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    if config.get("threads"):
        torch.set_num_threads(config.threads)
    OmegaConf.save(config, output / "config.yaml", resolve=True)

    tracker = build_tracker(config)
    module = TrackerModule(
        tracker=tracker,
        optimizer=instantiate(config.optimizer),
        scheduler=instantiate(config.scheduler) if config.get("scheduler") else None,
        config=plain_config(config),
        name=config.name,
        query_mode=config.query_mode,
        lr_scales=config.get("lr_scales"),
        val_head_settings=head_settings_for(tracker, config.get("val_head_settings")),
    )
    data = instantiate(config.data)
    lengths = epoch_lengths(config, data)
    if config.get("validation"):
        benchmark = compose_config(
            "eval", [f"benchmark={config.validation}", f"query_mode={config.query_mode}"]
        ).benchmark
        if config.validation_path is not None:
            benchmark.path = str(config.validation_path)
        data = TrainAndValidate(data, instantiate(benchmark.dataset))
    loggers = _loggers(config)
    trainer: pl.Trainer = instantiate(
        config.trainer,
        **lengths,
        logger=loggers,
        callbacks=[instantiate(node) for node in config.callbacks.values() if node is not None],
        use_distributed_sampler=False,
        default_root_dir=str(output),
    )
    trainable = sum(p.numel() for p in module.tracker.parameters() if p.requires_grad)
    log.info("%s: %s trainable parameters, output in %s", config.name, f"{trainable:,}", output)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        trainer.save_checkpoint(output / "checkpoints" / "last.ckpt")
    finally:
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.finish()
    return _best(trainer, config.monitor)


def epoch_lengths(config: DictConfig, data: pl.LightningDataModule) -> dict[str, int]:
    """What ``epochs`` means to the trainer: ``max_steps`` (optimiser steps) and ``val_check_interval`` (batches).

    Training data has no end here, so an epoch is as many batches of all ranks as hold every clip once.

    Raises:
        ValueError: ``epochs`` is given and the data does not say how many clips it has.
    """
    if config.get("epochs") is None:
        return {}
    data.setup("fit")
    count = getattr(data, "num_training_clips", None)
    if count is None:
        raise ValueError(
            f"epochs={config.epochs}: {type(data).__name__} has no size; give trainer.max_steps instead"
        )
    world_size = instantiate(config.trainer, logger=False, enable_checkpointing=False).world_size
    batches = math.ceil(count / (config.data.batch_size * world_size))
    steps = math.ceil(config.epochs * batches / config.trainer.accumulate_grad_batches)
    log.info("%s epochs of %d clips on %d ranks: %d steps", config.epochs, count, world_size, steps)
    return {"max_steps": steps, "val_check_interval": batches}


def resolve_checkpoint(config: DictConfig) -> str | None:
    """The file behind ``ckpt_path``: null, a path, or ``last`` for the newest run of the same name."""
    wanted = config.get("ckpt_path")
    if wanted is None:
        return None
    if wanted != "last":
        if not Path(wanted).is_file():
            raise FileNotFoundError(f"ckpt_path={wanted}: no such file")
        return str(wanted)
    folder = Path(config.output_root) / "train" / config.name
    found = sorted(folder.glob("**/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"ckpt_path=last: no checkpoints/last.ckpt under {folder}")
    log.info("resuming from %s", found[-1])
    return str(found[-1])


def _loggers(config: DictConfig) -> list[Logger]:
    """Every logger that is on; the config and the commit travel with each."""
    loggers = [instantiate(node) for node in config.logger.values() if node is not None]
    settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    for logger in loggers:
        logger.log_hyperparams(settings)
    return loggers


def _best(trainer: pl.Trainer, monitor: str) -> float | None:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.best_model_score is not None:
            return float(callback.best_model_score)
    value = trainer.callback_metrics.get(monitor)
    return None if value is None else float(value)
