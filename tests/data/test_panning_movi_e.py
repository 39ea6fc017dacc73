"""Chrono's training data from a TFDS directory: colours, clips, order, validation, and training on them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tfds_fakes as fakes
import torch
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue
from skimage import color
from tfds_fakes import SIDE, T

from trackbench.composition import compose_config
from trackbench.data.colour import ColourAugmentation, change_colours
from trackbench.data.panning_movi_e import PanningMoviEDataModule, SceneClips
from trackbench.data.tfds import MoviScenes
from trackbench.structures import VideoBatch
from trackbench.training import train

SIZE = (40, 48)
AMOUNTS = [(0.1, 0.6, 1.4, -0.2), (-0.1, 1.4, 0.6, 0.15), (0.0, 1.0, 1.0, 0.0), (0.02, 1.3, 0.9, 0.05)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    fakes.write_movi(folder / "panning_movi_e" / "32x32" / "1.0.0", name="panning_movi_e")
    return folder


def clips(root: Path, **settings: object) -> SceneClips:
    options = {"num_frames": T, "size": SIZE, "num_points": 12, **settings}
    return SceneClips(MoviScenes(root), **options)  # type: ignore[arg-type]


def module(root: Path, **settings: object) -> PanningMoviEDataModule:
    options = {"num_frames": T, "height": SIZE[0], "width": SIZE[1], "num_points": 12, **settings}
    return PanningMoviEDataModule(root, **options)  # type: ignore[arg-type]


def take(batches: Iterator[VideoBatch], count: int) -> list[VideoBatch]:
    return [next(batches) for _ in range(count)]


def assert_equal(first: VideoBatch, second: VideoBatch) -> None:
    assert first.names == second.names
    for key in ("video", "queries", "xy", "visible"):
        torch.testing.assert_close(getattr(first, key), getattr(second, key), rtol=0, atol=0)


# --- colours -------------------------------------------------------------------------------------------------


def colours(seed: int = 0) -> np.ndarray:
    """Random ones, dark ones, greys, black and white, (20, 16, 3) in [0, 1]."""
    frame = np.random.default_rng(seed).random((20, 16, 3), np.float32)
    frame[4:8] *= 0.1
    frame[8:10] = frame[8:10, :, :1]
    frame[10], frame[11] = 0, 1
    return frame


@pytest.mark.parametrize("amounts", AMOUNTS)
def test_colours_change_as_in_hsv(amounts: tuple[float, float, float, float]) -> None:
    """Against scikit-image, which knows colours in [0, 1] only: kept there here by what they start from."""
    brightness, saturation, contrast, hue = amounts
    frame = colours() * 0.4 + 0.3
    wanted = color.rgb2hsv(frame + brightness)
    wanted[..., 1] = np.minimum(wanted[..., 1] * saturation, 1)
    wanted = color.hsv2rgb(wanted)
    mean = wanted.mean(axis=(0, 1))
    wanted = (wanted - mean) * contrast + mean
    assert wanted.min() > 0
    assert wanted.max() < 1
    wanted = color.rgb2hsv(wanted)
    wanted[..., 0] = (wanted[..., 0] + hue) % 1
    given = change_colours(frame, *amounts)
    np.testing.assert_allclose(given, color.hsv2rgb(wanted), atol=1e-5)


@pytest.mark.parametrize("amounts", AMOUNTS)
def test_colours_change_as_in_tensorflow(amounts: tuple[float, float, float, float]) -> None:
    tf = pytest.importorskip("tensorflow")
    brightness, saturation, contrast, hue = amounts
    wanted = tf.image.adjust_brightness(tf.constant(colours()), brightness)
    wanted = tf.image.adjust_saturation(wanted, saturation)
    wanted = tf.image.adjust_hue(tf.image.adjust_contrast(wanted, contrast), hue)
    np.testing.assert_allclose(change_colours(colours(), *amounts), wanted.numpy(), atol=1e-5)


def test_no_change_of_colours_is_none_and_saturation_goes_to_grey() -> None:
    np.testing.assert_allclose(change_colours(colours(), 0, 1, 1, 0), colours(), atol=1e-6)
    grey = change_colours(colours(), 0, 0, 1, 0)
    np.testing.assert_allclose(grey, np.broadcast_to(colours().max(axis=2, keepdims=True), grey.shape), atol=1e-6)


def test_colours_are_changed_and_dropped_as_often_as_published() -> None:
    frames = (colours() * 255).astype(np.uint8)[None].repeat(2, axis=0)
    original = frames.copy()
    augmentation, rng = ColourAugmentation(), np.random.default_rng(0)
    same = grey = 0
    for _ in range(1000):
        new = augmentation(frames, rng)
        assert new.dtype == np.uint8
        np.testing.assert_array_equal(new[0], new[1])  # all frames alike
        same += np.array_equal(new, frames)
        grey += bool((new == new[..., :1]).all())
    assert abs(same - 160) < 50  # 0.2 x 0.8
    assert abs(grey - 200) < 50
    np.testing.assert_array_equal(frames, original)
    dropped = ColourAugmentation(changed=0, dropped=1)(frames, rng)
    np.testing.assert_allclose(dropped[..., 0], frames @ [0.2989, 0.587, 0.114], atol=0.51)


def test_one_seed_gives_one_change() -> None:
    frames = (colours() * 255).astype(np.uint8)[None]
    augmentation = ColourAugmentation(changed=1)
    first, again, other = (augmentation(frames, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


# --- clips ---------------------------------------------------------------------------------------------------


def test_a_plain_clip_is_the_scene_with_its_motion(root: Path) -> None:
    """The plate moves by a pixel a frame, the wall stands; points are asked for at centres of their pixels."""
    data = clips(root, size=(SIDE, SIDE), augment=False)
    for index in range(5):
        batch = data[index]
        number = int(batch.names[0].removeprefix("scene "))
        scene = fakes.scene(number)
        np.testing.assert_array_equal(batch.video[0].permute(0, 2, 3, 1), scene["video"])
        assert batch.labelled is None
        t, x, y = batch.queries[0].numpy().T
        assert (x % 1 == 0.5).all()
        assert (y % 1 == 0.5).all()
        assert len(set(t.tolist())) == 2  # two frames on a grid of stride 4
        on_plate = scene["segmentations"][t.astype(int), y.astype(int), x.astype(int), 0] == 1
        assert 0 < on_plate.sum() < 12
        steps = np.arange(T) - t[:, None]
        wanted = np.stack([x[:, None] + steps * on_plate[:, None], np.broadcast_to(y[:, None], steps.shape)], -1)
        np.testing.assert_allclose(batch.xy[0], wanted, atol=2e-3)
        left, top, right, bottom = np.add(fakes.PLATE, number % 3)
        visible, moved = batch.visible[0].numpy(), np.arange(T)
        u, v = wanted[..., 0], wanted[..., 1]
        margin = np.minimum.reduce([u - left - moved, right + moved - u, v - top, bottom - v])
        assert visible[on_plate].all()  # the plate stays in the frame
        wall = ~on_plate
        assert not visible[wall][margin[wall] > 1].any()
        assert visible[wall][margin[wall] < -1].all()


def test_an_augmented_clip_is_a_crop_with_its_tracks(root: Path) -> None:
    """Without colours: what the frames show at a track is what the scene shows at its point."""
    data = clips(root)
    for index in range(12):
        batch = data[index]
        assert batch.video.shape == (1, T, 3, *SIZE)
        assert batch.video.dtype == torch.uint8
        assert batch.xy.shape == (1, 12, T, 2)
        real = torch.ones(12, dtype=torch.bool) if batch.labelled is None else batch.labelled[0, :, 0]
        frames = batch.queries[0, :, 0].long()
        at_query = batch.xy[0, torch.arange(12), frames]
        torch.testing.assert_close(batch.queries[0, real, 1:], at_query[real], rtol=0, atol=5e-3)
        steps = batch.xy[0, real].diff(dim=1)
        assert (steps[..., 1].abs() < 5e-3).all()
        moving = steps[..., 0].mean(dim=1)
        torch.testing.assert_close(steps[..., 0], moving[:, None].expand_as(steps[..., 0]), rtol=0, atol=5e-3)
        scale = moving[moving > 0.5]
        if len(scale):  # all of the plate move by a pixel of the scene
            assert scale.max() - scale.min() < 1e-2
            assert 1.0 <= scale[0] * SIDE / SIZE[1] <= 3.0
        seen = batch.xy[batch.visible]
        assert (seen >= 0).all()
        assert (seen <= torch.tensor(SIZE[::-1])).all()


def test_missing_points_are_padded_without_loss_or_as_published(root: Path) -> None:
    batch = clips(root, num_points=60)[0]
    assert batch.labelled is not None
    found = int(batch.labelled[0, :, 0].sum())
    assert 1 < found < 60
    assert not batch.visible[0, found:].any()
    quirk = clips(root, num_points=60, official_quirks=True)[0]
    assert quirk.labelled is None
    assert quirk.xy.shape == (1, 60, T, 2)
    torch.testing.assert_close(quirk.xy[0, found:], quirk.xy[0, found - 2].expand(60 - found, T, 2))


def test_clips_depend_on_seed_and_index_alone_and_differ_between_visits(root: Path) -> None:
    data = clips(root, seed=1)
    assert_equal(data[7], clips(root, seed=1)[7])
    names = [data[index].names[0] for index in range(10)]
    assert sorted(names[:5]) == sorted(names[5:]) == [f"scene {i}" for i in range(5)]  # each once per epoch
    again = 5 + names[5:].index(names[0])
    assert not torch.equal(data[0].video, data[again].video)


def test_parts_of_scenes_start_anywhere(root: Path) -> None:
    data = clips(root, num_frames=4, size=(SIDE, SIDE), augment=False)
    starts = set()
    for index in range(40):
        batch = data[index]
        whole = fakes.scene(int(batch.names[0].removeprefix("scene ")))["video"]
        video = batch.video[0].permute(0, 2, 3, 1).numpy()
        starts |= {t for t in range(5) if np.array_equal(video, whole[t : t + 4])}
    assert starts == {0, 1, 2, 3, 4}


def test_arguments_are_checked(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 8, 0"):
        clips(root, num_points=0)
    with pytest.raises(ValueError, match=r"tfrecord-0000\d-of-00002: record \d: expected at least 12 frames"):
        clips(root, num_frames=12)[0]
    with pytest.raises(ValueError, match=r"record \d: .* multiples of stride 4, got \(6, 32, 32\)"):
        clips(root, num_frames=6)[0]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        module(tmp_path / "nowhere").setup()
    with pytest.raises(ValueError, match="has no split 'test'"):
        module(root, split="test").setup()
    with pytest.raises(ValueError, match="nothing to validate on"):
        module(root, val_split=None).val_dataloader()


# --- the datamodule ------------------------------------------------------------------------------------------


def test_workers_do_not_change_the_data(root: Path) -> None:
    alone, helped = (
        take(iter(module(root, batch_size=2, num_workers=workers).train_dataloader()), 3) for workers in (0, 2)
    )
    for first, second in zip(alone, helped, strict=True):
        assert first.video.shape == (2, T, 3, *SIZE)
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


def test_validation_is_the_same_for_all_seeds(root: Path) -> None:
    first, second = (list(module(root, seed=seed, num_points=60).val_dataloader()) for seed in (0, 1))
    assert [batch.names for batch in first] == [["scene 100"], ["scene 101"]]
    for one, other in zip(first, second, strict=True):
        assert_equal(one, other)
        assert one.labelled is None
        assert one.video.shape == (1, T, 3, *SIZE)
        assert 0 < one.xy.shape[1] < 60
    assert len(list(module(root, val_videos=1).val_dataloader())) == 1
    assert module(root).num_training_clips == 5


def test_the_recipe_is_chronos() -> None:
    data = compose_config("train", ["data=panning_movi_e", "data.path=x"]).data
    assert (data.num_frames, data.height, data.width, data.num_points, data.batch_size) == (24, 256, 256, 256, 1)
    with pytest.raises(MissingMandatoryValue, match=r"data\.path"):
        _ = compose_config("train", ["data=panning_movi_e"]).data.path


def config(root: Path, output: Path, *overrides: str) -> DictConfig:
    small = [
        "data=panning_movi_e",
        f"data.path={root}",
        f"data.num_frames={T}",
        "data.height=40",
        "data.width=48",
        "data.num_points=30",
        "data.num_workers=0",
        "data.batch_size=2",
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
def test_training_runs_and_validates(root: Path, tmp_path: Path, model: str) -> None:
    best = train(config(root, tmp_path, f"model={model}"))
    assert best is not None
    assert 0 <= best <= 1
    with (tmp_path / "run" / "csv" / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == 2
    assert all(np.isfinite(losses))
