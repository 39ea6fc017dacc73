"""TAP-Vid files against what the official loaders made of them, and annotated clips against their arrays."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image

from trackbench.data.safe_pickle import PickledArray, PickledBytes, UnsafePickleError
from trackbench.data.tapvid import TapVidDataModule, TapVidDataset, TapVidFilesDataset, resize_uint8_video
from trackbench.metrics import tapvid
from trackbench.structures import VideoBatch

FOLDERS = {
    "davis": "tapvid_davis",
    "rgb_stacking": "tapvid_rgb_stacking",
    "kinetics": "tapvid_kinetics",
    "kinetics_generated": "kinetics_generated",
    "davis_native": "tapvid_davis",
}


def name_of(source: str) -> str:
    """``FILE:KEY`` of the reference -> our name."""
    file, key = source.split(":")
    return f"{Path(file).stem}:{key}" if key.isdigit() else key


def reference_items(reference: Any, dataset: str, mode: str) -> dict[str, dict[str, np.ndarray]]:
    start = f"tapnet/{dataset}/{mode}/"
    items: dict[str, dict[str, np.ndarray]] = {}
    for key in reference.files:
        if key.startswith(start):
            index, field = key.removeprefix(start).split("/")
            items.setdefault(index, {})[field] = reference[key]
    return {name_of(str(item["source"])): item for item in items.values()}


def sha256_of_video(item: VideoBatch) -> str:
    frames = item.video[0].permute(0, 2, 3, 1).contiguous()
    return hashlib.sha256(frames.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("dataset", "mode", "count"),
    [
        ("davis", "first", 3),
        ("davis", "strided", 3),
        ("davis_native", "first", 3),
        ("rgb_stacking", "first", 2),
        ("rgb_stacking", "strided", 2),
        ("kinetics", "first", 5),
        ("kinetics", "strided", 5),
        ("kinetics_generated", "first", 2),
    ],
)
def test_equals_the_official_loader(data_fixtures, dataset, mode, count) -> None:
    ours = TapVidDataset(
        dataset.split("_native")[0].split("_generated")[0],
        data_fixtures / "tapvid" / FOLDERS[dataset],
        query_mode=mode,
        resolution=None if dataset == "davis_native" else (256, 256),
    )
    with np.load(data_fixtures / "tapvid_expected.npz", allow_pickle=False) as reference:
        official = reference_items(reference, dataset, mode)
    assert len(ours) == count
    assert set(ours.names) == set(official)
    for name, item in zip(ours.names, ours, strict=False):
        expected = official[name]
        assert item.names == [name]
        assert sha256_of_video(item) == expected["video_u8_sha256"]
        queries = expected["query_points"][..., [0, 2, 1]].astype(np.float32)
        np.testing.assert_array_equal(item.queries, queries)
        np.testing.assert_array_equal(item.xy, expected["target_points"].astype(np.float32))
        np.testing.assert_array_equal(item.visible, ~expected["occluded"])
        assert item.labelled is None


def test_robotap_equals_its_arrays(data_fixtures) -> None:
    folder = data_fixtures / "tapvid/robotap"
    content = {}
    for split in sorted(folder.glob("*.pkl")):
        content |= pickle.loads(split.read_bytes())
    dataset = TapVidDataset("robotap", folder, resolution=None)
    assert sorted(dataset.names) == sorted(content)
    for name, item in zip(dataset.names, dataset, strict=False):
        video, points, occluded = (content[name][key] for key in ("video", "points", "occluded"))
        np.testing.assert_array_equal(item.video[0].permute(0, 2, 3, 1), video)
        seen = ~occluded.all(axis=1)
        np.testing.assert_array_equal(item.visible[0], ~occluded[seen])
        height, width = video.shape[1:3]
        expected = points[seen].astype(np.float64) * [width, height]
        np.testing.assert_array_equal(item.xy[0], expected.astype(np.float32))


def test_order_is_by_file_and_name(data_fixtures) -> None:
    kinetics = TapVidDataset("kinetics", data_fixtures / "tapvid/tapvid_kinetics")
    expected = [f"000{shard}_of_0010:{index}" for shard, index in [(0, 0), (0, 1), (1, 0), (2, 0), (9, 0)]]
    assert kinetics.names == expected
    davis = TapVidDataset("davis", data_fixtures / "tapvid/tapvid_davis/tapvid_davis.pkl")
    assert davis.names == ["blackswan-synth", "breakdance-synth", "goat-synth"]


def jpeg(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def tapvid_video(num_frames: int = 6, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "video": rng.integers(0, 256, (num_frames, 20, 30, 3), dtype=np.uint8),
        "points": rng.random((4, num_frames, 2)),
        "occluded": rng.random((4, num_frames)) < 0.3,
    }


def write(path: Path, content: Any) -> Path:
    path.write_bytes(pickle.dumps(content))
    return path


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize(
    "container", [list, lambda f: np.array(f, dtype="S"), lambda f: np.array(f, dtype=object)]
)
@pytest.mark.parametrize("grey", [False, True])
def test_jpeg_frames_in_every_container(tmp_path, container, grey, as_dict) -> None:
    video = tapvid_video()
    files = [jpeg(frame[..., 0] if grey else frame) for frame in video["video"]]
    video["video"] = container(files)
    file = write(tmp_path / "0003_of_0010.pkl", {"clip": video} if as_dict else [video])
    dataset = TapVidDataset("kinetics", tmp_path, resolution=None)
    assert dataset.names == (["clip"] if as_dict else ["0003_of_0010:0"])
    for t, data in enumerate(files):
        expected = np.array(Image.open(io.BytesIO(data)))
        expected = np.repeat(expected[..., None], 3, axis=-1) if grey else expected
        np.testing.assert_array_equal(dataset[0].video[0, t].permute(1, 2, 0), expected)
    assert file.exists()


def test_opening_leaves_the_videos_in_their_files(tmp_path) -> None:
    frames = [np.random.default_rng(t).integers(0, 256, (120, 120, 3), dtype=np.uint8) for t in range(6)]
    arrays, files = tapvid_video(), tapvid_video()
    arrays["video"] = np.stack(frames)
    files["video"] = [jpeg(frame) for frame in frames]
    write(tmp_path / "0000_of_0010.pkl", [arrays, files])
    dataset = TapVidDataset("kinetics", tmp_path)
    (_, first), (_, second) = dataset._videos
    assert isinstance(first["video"], PickledArray)
    assert all(isinstance(frame, PickledBytes) for frame in second["video"])
    again = pickle.loads(pickle.dumps(dataset))  # as a worker process that is spawned gets it
    torch.testing.assert_close(again[1].video, dataset[1].video, rtol=0, atol=0)


def test_a_key_in_two_files_stays_unique(tmp_path) -> None:
    write(tmp_path / "robotap_split0.pkl", {"push": tapvid_video(), "pull": tapvid_video()})
    write(tmp_path / "robotap_split1.pkl", {"push": tapvid_video(seed=1)})
    dataset = TapVidDataset("robotap", tmp_path)
    assert dataset.names == ["pull", "robotap_split0:push", "robotap_split1:push"]


def test_strided_repeats_a_track_per_query(tmp_path) -> None:
    video = tapvid_video(num_frames=11)
    video["occluded"][:] = False
    write(tmp_path / "tapvid_davis.pkl", {"clip": video})
    item = TapVidDataset("davis", tmp_path, query_mode="strided")[0]
    assert item.queries.shape == (1, 12, 3)
    torch.testing.assert_close(item.queries[0, :, 0], torch.tensor([0.0, 5.0, 10.0]).repeat_interleave(4))
    torch.testing.assert_close(item.xy[0, :4], item.xy[0, 4:8])
    batch = torch.arange(12)
    torch.testing.assert_close(item.queries[0, :, 1:], item.xy[0, batch, item.queries[0, :, 0].long()])


def change(**entries: Any) -> dict[str, Any]:
    return {**tapvid_video(), **entries}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text", "expected a dict or a list of videos, got str"),
        ({"clip": 3}, "video 'clip' must be a dict, got int"),
        ({"clip": {"video": np.zeros(3)}}, "video 'clip' lacks occluded, points"),
        ({"clip": change(points=np.zeros((4, 6, 3)))}, r"points must be float \(N, T, 2\)"),
        (
            {"clip": change(points=np.zeros((4, 5, 2)), occluded=np.zeros((4, 5), bool))},
            "expected 5 frames as in its points, got 6",
        ),
        ({"clip": change(occluded=np.zeros((3, 6), bool))}, r"occluded must be bool \(4, 6\)"),
        ({"clip": change(occluded=np.zeros((4, 6)))}, "occluded must be bool"),
        ({"clip": change(occluded=np.ones((4, 6), bool))}, "none of the 4 tracks is ever visible"),
        ({"clip": change(video=np.zeros((6, 20, 30), np.uint8))}, r"frames must be \(T, H, W, 3\)"),
        ({"clip": change(video=np.zeros((6, 20, 30, 3)))}, "frames must be uint8 .* got float64"),
        ({"clip": change(video=[b"no image"] * 6)}, "frame 0 is not a readable JPEG"),
        ({"clip": change(video=[jpeg(np.zeros((9, 9, 3), np.uint8))[:200]] * 6)}, "not a readable JPEG"),
        ({"clip": change(video=[3] * 6)}, "frame 0 must be the bytes of a JPEG, got int"),
        ({"clip": change(video=[])}, "expected 6 frames as in its points, got 0"),
        (
            {"clip": change(video=[jpeg(np.zeros((9, 9 + t, 3), np.uint8)) for t in range(6)])},
            "expected frames of one size",
        ),
    ],
)
def test_names_what_is_wrong_with_a_file(tmp_path, content, message) -> None:
    write(tmp_path / "tapvid_davis.pkl", content)
    with pytest.raises(ValueError, match=rf"(?s)tapvid_davis\.pkl.*{message}"):
        _ = TapVidDataset("davis", tmp_path, resolution=None)[0]


def test_refuses_wrong_arguments_and_absent_files(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"dataset must be one of davis, .* got 'moving_mnist'"):
        TapVidDataset("moving_mnist", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file tapvid_davis\.pkl"):
        TapVidDataset("davis", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent: no such file or folder"):
        TapVidFilesDataset(tmp_path / "absent")
    with pytest.raises(ValueError, match="resolution must be"):
        TapVidFilesDataset(tmp_path, resolution=(256,))
    write(tmp_path / "tapvid_davis.pkl", {"clip": print})
    with pytest.raises(UnsafePickleError, match=r"builtins\.print"):
        TapVidDataset("davis", tmp_path)


def test_resize_is_pillows_lanczos() -> None:
    video = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    ours = resize_uint8_video(iter(video), (24, 70))
    for frame, resized in zip(video, ours, strict=True):
        expected = Image.fromarray(frame).resize((70, 24), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(resized, np.array(expected))
    np.testing.assert_array_equal(resize_uint8_video(video, (40, 50)), video)


def write_clip(path: Path, **changes: Any) -> dict[str, Any]:
    video = tapvid_video()
    files = [jpeg(frame) for frame in video["video"]]
    arrays = {
        "jpeg_blob": np.frombuffer(b"".join(files), np.uint8),
        "jpeg_offsets": np.cumsum([0, *map(len, files)]),
        "points": video["points"].astype(np.float32),
        "occluded": video["occluded"],
        "labelled": np.random.default_rng(1).random((4, 6)) < 0.6,
        **changes,
    }
    arrays = {key: value for key, value in arrays.items() if value is not None}
    np.savez(path, **arrays)
    return arrays


@pytest.mark.parametrize("mode", ["first", "strided"])
def test_annotated_clip_queries_labelled_and_visible_points_only(tmp_path, mode) -> None:
    arrays = write_clip(tmp_path / "clip.npz")
    item = TapVidFilesDataset(tmp_path, query_mode=mode, resolution=None)[0]
    askable = arrays["labelled"] & ~arrays["occluded"]
    if mode == "first":
        expected = [(row.argmax(), n) for n, row in enumerate(askable) if row.any()]
    else:
        expected = [(t, n) for t in (0, 5) for n in range(4) if askable[n, t]]
    tracks = [n for _, n in expected]
    assert item.labelled is not None
    np.testing.assert_array_equal(item.queries[0, :, 0], [t for t, _ in expected])
    np.testing.assert_array_equal(item.labelled[0], arrays["labelled"][tracks])
    np.testing.assert_array_equal(item.visible[0], ~arrays["occluded"][tracks])
    np.testing.assert_allclose(item.xy[0], arrays["points"][tracks] * [30, 20], rtol=1e-6)
    assert item.names == ["clip"]


def test_real_annotated_clips(realdata) -> None:
    dataset = TapVidFilesDataset(realdata / "annotated")
    assert dataset.names == ["camel", "cmu_house", "horsejump-high", "kitchen"]
    camel, house = dataset[0], dataset[1]
    assert camel.video.shape == (1, 90, 3, 256, 256)
    assert camel.queries.shape == (1, 20, 3)
    assert camel.labelled is not None
    asked = camel.queries[0, :, 0].long()
    points = torch.arange(20)
    assert (camel.labelled & camel.visible)[0, points, asked].all()
    torch.testing.assert_close(camel.queries[0, :, 1:], camel.xy[0, points, asked])
    assert house.labelled is None
    assert house.video.shape == (1, 111, 3, 256, 256)
    assert (house.video[:, :, 0] == house.video[:, :, 2]).all()  # grey JPEG


@pytest.mark.parametrize(
    ("clip", "average_jaccard", "delta_avg", "occlusion_accuracy"),
    [
        ("camel", 0.082, 0.138, 0.915),
        ("cmu_house", 0.146, 0.239, 1.000),
        ("horsejump-high", 0.019, 0.038, 0.914),
        ("kitchen", 0.196, 0.310, 0.968),
    ],
)
def test_standing_still_scores_what_was_measured_elsewhere(
    realdata, clip, average_jaccard, delta_avg, occlusion_accuracy
) -> None:
    item = TapVidFilesDataset(realdata / "annotated" / f"{clip}.npz")[0]
    still = item.queries[:, :, None, 1:].expand_as(item.xy)
    scores = tapvid(
        item.queries, item.xy, item.visible, still, torch.ones_like(item.visible), labelled=item.labelled
    )
    assert scores["average_jaccard"][0] == pytest.approx(average_jaccard, abs=6e-4)
    assert scores["average_pts_within_thresh"][0] == pytest.approx(delta_avg, abs=6e-4)
    assert scores["occlusion_accuracy"][0] == pytest.approx(occlusion_accuracy, abs=6e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": None}, "lacks points"),
        ({"labelled": np.ones((4, 5), bool)}, r"labelled must be bool \(4, 6\)"),
        ({"labelled": np.zeros((4, 6), bool)}, "none of the 4 tracks is ever visible"),
        ({"jpeg_offsets": np.array([0, 10, 5])}, r"jpeg_offsets must be T \+ 1 growing integers"),
        ({"jpeg_offsets": np.array([0, 10**9])}, "jpeg_offsets"),
        ({"jpeg_blob": np.zeros((4, 4))}, "jpeg_blob must be uint8"),
        ({"jpeg_blob": np.zeros(10**5, np.uint8)}, "frame 0 is not a readable JPEG"),
        ({"points": np.array([None])}, "not a readable annotated clip: .*allow_pickle=False"),
    ],
)
def test_names_what_is_wrong_with_a_clip(tmp_path, changes, message) -> None:
    write_clip(tmp_path / "clip.npz", **changes)
    with pytest.raises(ValueError, match=rf"clip\.npz: .*{message}"):
        _ = TapVidFilesDataset(tmp_path)[0]


def test_cut_clip_is_a_value_error(tmp_path) -> None:
    write_clip(tmp_path / "clip.npz")
    whole = (tmp_path / "clip.npz").read_bytes()
    dataset = TapVidFilesDataset(tmp_path)
    for content in (b"", b"no archive", whole[:1000], whole[:-30], whole[:500] + bytes(200) + whole[700:]):
        (tmp_path / "clip.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"clip\.npz"):
            _ = dataset[0]


class CollectNames(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def validation_step(self, batch: VideoBatch, batch_idx: int) -> None:
        assert batch.video.shape[0] == 1
        self.seen += batch.names

    test_step = validation_step

    def predict_step(self, batch: VideoBatch, batch_idx: int) -> list[str]:
        return batch.names


def test_datamodule_serves_the_trainer(data_fixtures, tmp_path) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    davis = TapVidDataModule("davis", data_fixtures / "tapvid/tapvid_davis", resolution=[64, 64], num_workers=1)
    names = ["blackswan-synth", "breakdance-synth", "goat-synth"]
    module = CollectNames()
    trainer.validate(module, datamodule=davis, verbose=False)
    assert module.seen == names
    trainer.test(module, datamodule=davis, verbose=False)
    assert module.seen == names * 2
    assert trainer.predict(module, datamodule=davis) == [[name] for name in names]
    write_clip(tmp_path / "clip.npz")
    files = TapVidDataModule("files", tmp_path)
    assert [batch.names for batch in files.val_dataloader()] == [["clip"]]
