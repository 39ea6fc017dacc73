"""The published recipes, as configs and on miniature data."""

from __future__ import annotations

import csv
import inspect
from pathlib import Path

import numpy as np
import pytest
from folder_fakes import write_sequences
from hydra.utils import get_class
from omegaconf import DictConfig

from trackbench.composition import compose_config
from trackbench.data.movi import MoviFDataModule
from trackbench.training import epoch_lengths, train

NUM_SEQUENCES = 5


@pytest.fixture
def sequences(tmp_path: Path) -> Path:
    root = tmp_path / "movi_f"
    write_sequences(root, NUM_SEQUENCES)
    return root


def small_trackon(sequences: Path, output: Path, *overrides: str) -> DictConfig:
    """experiment=trackon_movi_f on small clips and a small model of the same classes, on the CPU."""
    small = [
        "experiment=trackon_movi_f",
        "backbone=vit_adapter_tiny",
        "trainer=cpu",
        "trainer.precision=bf16-mixed",
        "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false",
        "callbacks.progress=null",
        "callbacks.overlay=null",
        "epochs=2",
        f"data.path={sequences}",
        "data.num_frames=4",
        "data.height=40",
        "data.width=48",
        "data.num_points=6",
        "data.num_workers=0",
        "data.val_share=0.2",
        "head.dim=32",
        "head.num_heads=4",
        "head.grid_size=[16,16]",
        "head.trained_memory_size=3",
        "val_head_settings={support_grid: 2}",
        "head.levels=2",
        "tracker.input_size=[64,64]",
        "threads=1",
        f"output_root={output}",
        f"output_dir={output / 'run'}",
    ]
    return compose_config("train", [*small, *overrides])


def test_trackon_recipe_is_the_published_one() -> None:
    config = compose_config("train", ["experiment=trackon_movi_f", "data.path=x"])
    assert (config.data.num_frames, config.data.num_points) == (24, 480)
    assert (config.data.height, config.data.width) == (384, 512)
    assert list(config.tracker.input_size) == [384, 512]
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (5e-4, 1e-5)
    assert config.optimizer._target_ == "torch.optim.AdamW"
    assert config.scheduler.warmup_fraction == 0.01
    assert config.trainer.gradient_clip_val == 1.0
    assert (config.trainer.precision, config.trainer.strategy) == ("16-mixed", "ddp")
    assert (config.head.trained_memory_size, config.head.memory_size) == (12, None)
    assert (config.head.visibility_threshold, config.head.support_grid) == (0.8, 0)
    assert config.val_head_settings == {"support_grid": 20}
    assert (config.head.memory_mask_ratio, config.head.dropout) == (0.1, 0.1)
    assert config.backbone.freeze_vit
    assert (config.epochs, config.seed) == (150, 1234)
    assert config.data._target_.endswith(MoviFDataModule.__name__)


def test_the_command_line_wins_over_the_recipe() -> None:
    config = compose_config(
        "train", ["experiment=trackon_movi_f", "trainer=cpu", "data.num_points=7", "data.path=x"]
    )
    assert config.trainer.accelerator == "cpu"
    assert "strategy" not in config.trainer or config.trainer.strategy == "auto"
    assert config.data.num_points == 7


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trackon_recipe_trains_and_validates_every_epoch(
    sequences: Path, tmp_path: Path, checkpointing: bool
) -> None:
    flags = [f"{part}.checkpointing={str(checkpointing).lower()}" for part in ("backbone", "head")]
    best = train(small_trackon(sequences, tmp_path, "data.batch_size=2", *flags))
    assert best is not None
    with (tmp_path / "run" / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len(losses) == 2 * 2  # four sequences are left to train on, two per batch
    assert np.isfinite(losses).all()
    assert sum(bool(row["val/AJ"]) for row in rows) == 2
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert {"best.ckpt", "best_AJ.ckpt", "best_OA.ckpt", "last.ckpt"} <= names


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 6), (2, 3), (4, 2)])
def test_an_epoch_holds_every_clip_once(sequences: Path, tmp_path: Path, accumulate: int, steps: int) -> None:
    config = small_trackon(sequences, tmp_path, "epochs=3", "data.batch_size=2")
    config.trainer.accumulate_grad_batches = accumulate
    data = MoviFDataModule(sequences, batch_size=2, val_share=0.2)
    assert epoch_lengths(config, data) == {"max_steps": steps, "val_check_interval": 2}


def test_endless_data_has_no_epochs(tmp_path: Path) -> None:
    config = compose_config("train", ["epochs=2", f"output_root={tmp_path}", f"output_dir={tmp_path / 'run'}"])
    with pytest.raises(ValueError, match=r"epochs=2.*max_steps"):
        train(config)


def test_chrono_recipe_is_the_published_one() -> None:
    config = compose_config("train", ["experiment=chrono_panning_movi_e", "data.path=x"])
    assert (config.data.num_frames, config.data.num_points, config.data.batch_size) == (24, 256, 1)
    assert (config.data.height, config.data.width) == (256, 256)
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (1e-4, 1e-4)
    assert (config.scheduler.max_lr, config.scheduler.pct_start) == (1e-4, 0.003)
    assert config.trainer.max_steps == 100_000
    assert (config.trainer.precision, config.trainer.strategy) == ("bf16-mixed", "ddp")
    assert (config.trainer.gradient_clip_val, config.trainer.val_check_interval) == (1.0, 1000)
    assert (config.seed, config.callbacks.best.save_top_k) == (42, 3)
    assert config.backbone.trunk.frozen
    assert config.backbone.norm == "clip"
    assert not config.backbone.causal


@pytest.mark.parametrize("name", ["trackon_movi_f", "chrono_panning_movi_e"])
@pytest.mark.parametrize("model", ["trackon", "chrono_b", "trackon_chrono", "correlation_vit_adapter"])
def test_any_model_trains_by_any_recipe(name: str, model: str) -> None:
    config = compose_config("train", [f"experiment={name}", f"model={model}", "data.path=x"])
    assert config.name == model
    head = get_class(config.head._target_)
    accepted = inspect.signature(head).parameters
    assert {key for key in config.head if key != "_target_"} <= set(accepted)
