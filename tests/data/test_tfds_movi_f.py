"""MOVi-F from its TFDS directory, where the folder format is taken, too."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import tfds_fakes as fakes
import torch
from tfds_fakes import SIDE, T

from trackbench.composition import compose_config
from trackbench.data.movi import MoviFDataModule
from trackbench.data.tfds import MoviScenes, SceneSequences
from trackbench.training import train

SIZE = (24, 28)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.write_movi(tmp_path_factory.mktemp("movi_f") / "32x32" / "1.0.0").parent


def module(root: Path, **settings: object) -> MoviFDataModule:
    options = {"num_frames": 6, "height": SIZE[0], "width": SIZE[1], "num_points": 8, "val_share": 0.2, **settings}
    return MoviFDataModule(root, **options)  # type: ignore[arg-type]


def test_sequences_are_a_fixed_crop_with_tracks(root: Path) -> None:
    sequences = SceneSequences(MoviScenes(root))
    assert len(sequences) == 5
    areas = []
    for index in range(5):
        sequence = sequences[index]
        assert sequence.num_frames == T
        clip = sequence.clip(0, T)
        assert clip.frames.shape == (T, SIDE, SIDE, 3)
        assert clip.name == f"scene {index}"
        again = SceneSequences(MoviScenes(root))[index].clip(0, T)
        np.testing.assert_array_equal(clip.frames, again.frames)
        np.testing.assert_array_equal(clip.xy, again.xy)
        part = sequence.clip(2, 5)
        np.testing.assert_array_equal(part.frames, clip.frames[2:7])
        np.testing.assert_array_equal(part.xy, clip.xy[:, 2:7])
        np.testing.assert_array_equal(part.visible, clip.visible[:, 2:7])
        areas.append(np.array_equal(clip.frames, fakes.scene(index)["video"]))
        with pytest.raises(ValueError, match=f"scene {index}: expected at least 9 frames from 2 on, it has 8"):
            sequence.clip(2, 7)
    assert not all(areas)  # most are cropped


def test_clips_are_made_as_from_the_folder_format(root: Path) -> None:
    data = module(root)
    data.setup()
    assert data.num_training_clips == 4
    (held_out,) = data.val_dataloader()
    assert held_out.video.shape == (1, 6, 3, *SIZE)
    assert held_out.visible[..., 0].all()
    names = set()
    for index in range(8):
        batch = data.train_clips[index]  # type: ignore[index]
        names.add(batch.names[0])
        assert batch.video.shape == (1, 6, 3, *SIZE)
        assert batch.xy.shape == (1, 8, 6, 2)
        real = torch.ones(8, dtype=torch.bool) if batch.labelled is None else batch.labelled[0, :, 0]
        assert batch.visible[0, real, 0].all()
    assert names | set(held_out.names) == {f"scene {i}" for i in range(5)}
    assert not names & set(held_out.names)
    validation = module(root, split="validation", val_share=0)
    validation.setup()
    assert validation.num_training_clips == 2


def test_training_runs(root: Path, tmp_path: Path) -> None:
    small = [
        "data=movi_f",
        f"data.path={root}",
        "data.num_frames=6",
        "data.height=24",
        "data.width=28",
        "data.num_points=8",
        "data.num_workers=0",
        "data.batch_size=2",
        "data.val_share=0.2",
        "model=trackon_tiny",
        "tracker.input_size=[64,64]",
        "trainer.accelerator=cpu",
        "trainer.devices=1",
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
        "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false",
        "callbacks.progress=null",
        "callbacks.overlay=null",
        "threads=1",
        f"output_root={tmp_path}",
        f"output_dir={tmp_path / 'run'}",
    ]
    best = train(compose_config("train", small))
    assert best is not None
    with (tmp_path / "run" / "csv" / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == 2
    assert all(np.isfinite(losses))
