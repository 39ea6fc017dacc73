"""Twenty steps of training on each format that a MOVi set can be in."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from trackbench.cli import main
from trackbench.composition import compose_config
from trackbench.training import train

STEPS = 20


@pytest.fixture(scope="module")
def source(data_fixtures: Path) -> Path:
    return data_fixtures / "tfds_tfrecord" / "panning_movi_e" / "32x32" / "1.0.0"


def losses(data: Path, output: Path, name: str = "movi_f") -> np.ndarray:
    """Of a tiny tracker on tiny clips."""
    small = [
        f"data={name}",
        f"data.path={data}",
        "data.num_frames=4",
        "data.height=24",
        "data.width=24",
        "data.num_points=4",
        "data.num_workers=0",
        "data.batch_size=1",
        "model=trackon_tiny",
        "tracker.input_size=[32,32]",
        "trainer.accelerator=cpu",
        "trainer.devices=1",
        f"trainer.max_steps={STEPS}",
        f"trainer.val_check_interval={STEPS}",
        "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false",
        "callbacks.progress=null",
        "callbacks.overlay=null",
        "threads=1",
        f"output_root={output}",
        f"output_dir={output / 'run'}",
        *(["data.val_share=0.5"] if name == "movi_f" else []),
    ]
    assert train(compose_config("train", small)) is not None
    with (output / "run" / "csv" / "metrics.csv").open() as file:
        found = np.array([float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]])
    assert len(found) == STEPS
    assert np.isfinite(found).all()
    return found


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The losses on the published files."""
    return losses(source, tmp_path_factory.mktemp("source"))


@pytest.mark.parametrize("file_format", ["compact", "array_record", "frames"])
def test_training_is_that_on_the_published_files(
    source: Path, expected: np.ndarray, tmp_path: Path, file_format: str
) -> None:
    if file_format == "array_record":
        pytest.importorskip("array_record")
    out = tmp_path / "data"
    arguments = ["prepare", "movi_f", "--source", str(source), "--out", str(out), "--workers", "1"]
    assert main([*arguments, "--format", file_format]) == 0
    found = losses(out, tmp_path)
    if file_format == "frames":  # coordinates are rounded to single precision there, and differences grow
        np.testing.assert_allclose(found[:5], expected[:5], rtol=1e-3)
    else:
        np.testing.assert_array_equal(found, expected)


def test_panning_movi_e_trains_on_the_compact_form(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    arguments = ["prepare", "panning_movi_e", "--source", str(source), "--out", str(out), "--workers", "1"]
    assert main(arguments) == 0
    losses(out, tmp_path, "panning_movi_e")
