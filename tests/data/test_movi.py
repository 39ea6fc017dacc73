"""MOVi-F training clips: queries, order, padding without loss, validation, and a run of train.py's machinery."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from folder_fakes import write_sequences
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue

from trackbench.composition import build_tracker, compose_config
from trackbench.data.clip import Clip
from trackbench.data.folder import TrackedSequence, TrackFolder
from trackbench.data.movi import MoviFDataModule, TrainingClips, training_query_frames
from trackbench.structures import VideoBatch
from trackbench.training import train

SIZE = (40, 48)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sequences(tmp_path_factory.mktemp("movi_f"), count=5)


def clips(root: Path, **settings: object) -> TrainingClips:
    folder = TrackFolder(root)
    options = {"num_frames": 5, "size": SIZE, "num_points": 12, **settings}
    return TrainingClips(folder, range(len(folder)), **options)  # type: ignore[arg-type]


def take(batches: Iterator[VideoBatch], count: int) -> list[VideoBatch]:
    return [next(batches) for _ in range(count)]


def assert_equal(first: VideoBatch, second: VideoBatch) -> None:
    assert first.names == second.names
    for key in ("video", "queries", "xy", "visible"):
        torch.testing.assert_close(getattr(first, key), getattr(second, key), rtol=0, atol=0)
    assert (first.labelled is None) == (second.labelled is None)


def test_queries_are_as_published() -> None:
    rng = np.random.default_rng(0)
    visible = rng.random((43, 9)) < 0.5
    visible[:, 0] = True
    drawn = np.array([training_query_frames(visible, rng) for _ in range(3000)])
    assert (drawn[:, 10:] == 0).all()  # 43 // 4 are random, the others at their first visible frame
    for point in range(10):
        share = np.bincount(drawn[:, point], minlength=9) / 3000
        expected = visible[point] / visible[point].sum()
        assert np.abs(share - expected).max() < 0.05
    visible[20, 0], visible[20, 1:] = False, True
    assert training_query_frames(visible, rng)[20] == 1
    assert training_query_frames(visible[:0], rng).shape == (0,)


@pytest.mark.parametrize("augment", [True, False])
def test_a_clip_is_of_fixed_size_and_consistent(root: Path, augment: bool) -> None:
    data = clips(root, num_points=30, augment=augment)
    padded = 0
    for index in range(20):
        batch = data[index]
        assert batch.video.shape == (1, 5, 3, *SIZE)
        assert batch.video.dtype == torch.uint8
        assert batch.xy.shape == (1, 30, 5, 2)
        real = torch.ones(30, dtype=torch.bool) if batch.labelled is None else batch.labelled[0, :, 0]
        padded += int((~real).sum())
        frames = batch.queries[0, :, 0].long()
        assert batch.visible[0, real, 0].all()
        assert batch.visible[0, real, frames[real]].all()
        torch.testing.assert_close(batch.queries[0, real, 1:], batch.xy[0, real, frames[real]])
        seen = batch.xy[batch.visible]
        assert (seen >= 0).all()
        assert (seen < torch.tensor(SIZE[::-1])).all()
        assert not batch.visible[0, ~real].any()
    assert padded > 0
    batch = VideoBatch.collate([data[0], data[1]])
    assert batch.xy.shape == (2, 30, 5, 2)


def test_the_plain_clip_is_the_first_window_and_the_first_points(root: Path) -> None:
    data = clips(root, augment=False)
    batch = data[0]
    sequence = data.folder[data.folder.names.index(batch.names[0])]
    whole = sequence.clip(0, 5)
    top, left = (64 - 40) // 2, (80 - 48) // 2
    np.testing.assert_array_equal(
        batch.video[0].permute(0, 2, 3, 1), whole.frames[:, top : top + 40, left : left + 48]
    )
    xy = sequence.xy[:, :5] - (left, top)
    inside = sequence.visible[:, 0] & ((xy[:, 0] >= 0) & (xy[:, 0] < (48, 40))).all(axis=1)
    np.testing.assert_array_equal(batch.xy[0], xy[inside][:12].astype(np.float32))


def test_clips_depend_on_seed_and_index_alone_and_differ_between_visits(root: Path) -> None:
    data, other = clips(root, seed=1), clips(root, seed=2)
    assert_equal(data[7], clips(root, seed=1)[7])
    names = [data[index].names[0] for index in range(10)]
    assert sorted(names[:5]) == sorted(names[5:]) == data.folder.names  # every sequence once per epoch
    again = 5 + names[5:].index(names[0])
    assert not torch.equal(data[0].video, data[again].video)
    assert not torch.equal(data[0].video, other[names.index(other[0].names[0])].video)


def test_windows_of_longer_sequences(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sequences have 6 frames: a clip of 4 starts at 0, 1 or 2, in the published loader never at the last."""
    starts = []

    def clip(sequence: TrackedSequence, start: int, num_frames: int) -> Clip:
        starts.append(start)
        return read(sequence, start, num_frames)

    read = TrackedSequence.clip
    monkeypatch.setattr(TrackedSequence, "clip", clip)
    for settings, expected in (({}, {0, 1, 2}), ({"official_quirks": True}, {0, 1}), ({"augment": False}, {0})):
        data = clips(root, num_frames=4, **settings)
        starts.clear()
        assert all(data[index].video.shape[1] == 4 for index in range(20))
        assert set(starts) == expected
    with pytest.raises(ValueError, match=r"expected at least 7 frames from 0 on, it has 6"):
        clips(root, num_frames=7)[0]


def test_quirks_leave_missing_points_out(root: Path) -> None:
    data = clips(root, num_points=200, official_quirks=True)
    counts = {data[index].xy.shape[1] for index in range(6)}
    assert max(counts) < 40
    assert all(data[index].labelled is None for index in range(6))


def test_arguments_are_checked(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 5, 0"):
        clips(root, num_points=0)
    with pytest.raises(ValueError, match="val_share"):
        MoviFDataModule(root, val_share=1.0)
    with pytest.raises(ValueError, match="holding out 4 of 4 sequences leaves none"):
        MoviFDataModule(write_sequences(tmp_path, count=4), val_share=0.99).setup()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        MoviFDataModule(tmp_path / "nowhere").setup()
    none = MoviFDataModule(root, val_share=0)
    with pytest.raises(ValueError, match="nothing to validate on"):
        none.val_dataloader()
    assert len(none.train_clips.indices) == 5  # type: ignore[union-attr]


def module(root: Path, **settings: object) -> MoviFDataModule:
    options = {
        "num_frames": 5,
        "height": SIZE[0],
        "width": SIZE[1],
        "num_points": 12,
        "val_share": 0.4,
        **settings,
    }
    return MoviFDataModule(root, **options)  # type: ignore[arg-type]


def test_workers_do_not_change_the_data(root: Path) -> None:
    alone, helped = (
        take(iter(module(root, batch_size=2, num_workers=workers).train_dataloader()), 3) for workers in (0, 2)
    )
    for first, second in zip(alone, helped, strict=True):
        assert first.video.shape == (2, 5, 3, *SIZE)
        assert_equal(first, second)


def test_ranks_share_the_stream_and_a_resumed_run_goes_on_in_it(root: Path) -> None:
    expected = take(iter(module(root).train_dataloader()), 8)
    for rank in range(2):
        data = module(root)
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            global_rank=rank, world_size=2, global_step=1, accumulate_grad_batches=2
        )
        resumed = take(iter(data.train_dataloader()), 2)  # two batches of each rank are done
        assert_equal(resumed[0], expected[4 + rank])
        assert_equal(resumed[1], expected[6 + rank])


def test_held_out_sequences_are_not_trained_on_and_the_same_for_all_seeds(root: Path) -> None:
    names = []
    for seed in (0, 1):
        data = module(root, seed=seed)
        data.setup()
        held_out = [batch.names[0] for batch in data.val_dataloader()]
        trained = {name for batch in take(iter(data.train_dataloader()), 9) for name in batch.names}
        assert len(held_out) == 2
        assert trained == set(TrackFolder(root).names) - set(held_out)
        names.append(held_out)
    assert names[0] == names[1]
    for batch in data.val_dataloader():
        assert (batch.queries[..., 0] == 0).all()
        assert batch.visible[..., 0].all()


def test_davis_is_validated_on_as_published(root: Path, data_fixtures: Path) -> None:
    data = module(root, val_path=data_fixtures / "tapvid" / "tapvid_davis")
    data.setup()
    batches = list(data.val_dataloader())
    assert len(batches) == 3
    assert all(batch.video.shape[-2:] == (256, 256) for batch in batches)
    assert len(data.train_clips.indices) == 5  # type: ignore[union-attr]


def config(root: Path, output: Path, *overrides: str) -> DictConfig:
    small = [
        "data=movi_f",
        f"data.path={root}",
        "data.num_frames=5",
        "data.height=40",
        "data.width=48",
        "data.num_points=30",
        "data.num_workers=0",
        "data.val_share=0.2",
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
        f"output_root={output}",
        f"output_dir={output / 'run'}",
    ]
    return compose_config("train", [*small, *overrides])


@pytest.mark.parametrize("model", ["trackon_tiny", "chrono_tiny"])
def test_padded_points_carry_no_loss(root: Path, tmp_path: Path, model: str) -> None:
    tracker = build_tracker(config(root, tmp_path, f"model={model}"))
    data = clips(root, num_points=30)
    batch = VideoBatch.collate([data[0], data[1]])
    assert batch.labelled is not None
    assert not batch.labelled.all()
    prediction = tracker(batch.video, batch.queries)
    terms = tracker.loss(prediction, batch)
    padded = ~batch.labelled
    batch.xy[padded] = 17.0
    batch.visible[padded] = True
    others = tracker.loss(prediction, batch)
    for name, value in terms.items():
        assert torch.isfinite(value)
        torch.testing.assert_close(value, others[name], rtol=0, atol=0)


@pytest.mark.parametrize("model", ["trackon_tiny", "chrono_tiny"])
def test_training_runs_and_validates(root: Path, tmp_path: Path, model: str) -> None:
    best = train(config(root, tmp_path, f"model={model}", "data.batch_size=2"))
    assert best is not None
    assert 0 <= best <= 1
    with (tmp_path / "run" / "csv" / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == 2
    assert all(np.isfinite(losses))


def test_the_path_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(MissingMandatoryValue, match=r"data\.path"):
        _ = compose_config("train", ["data=movi_f"]).data.path
