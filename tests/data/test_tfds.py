"""TFDS directories without TensorFlow: official ones, and small ones written byte by byte."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tfds_fakes as fakes
from tfds_fakes import SIDE, T

from trackbench.data.kubric import sample_tracks
from trackbench.data.tfds import MoviScenes, TfdsDataset, dataset, features, find_version, shards
from trackbench.data.tfds.crc32c import crc32c, masked_crc32c
from trackbench.data.tfds.features import Feature, parse_features


@pytest.fixture(scope="module")
def movi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a version, with 2 and 3 training scenes and 2 for validation."""
    return fakes.write_movi(tmp_path_factory.mktemp("data") / "movi_f" / "32x32" / "1.0.0")


@pytest.fixture
def copy(movi: Path, tmp_path: Path) -> Path:
    return shutil.copytree(movi, tmp_path / "1.0.0")


def first_shard(folder: Path) -> Path:
    return folder / "movi_f-train.tfrecord-00000-of-00002"


def edit(file: Path, change: Callable[[bytearray], Any]) -> None:
    content = bytearray(file.read_bytes())
    change(content)
    file.write_bytes(bytes(content))


# --- checksums -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),  # RFC 3720, B.4
    [
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_checksums_of_the_standard(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected


@pytest.mark.parametrize("length", [4095, 4096, 4097, 8192, 20_001])
def test_checksums_of_many_bytes_at_once(length: int) -> None:
    data = np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8).tobytes()
    assert crc32c(data) == fakes.crc32c(data)
    assert masked_crc32c(data).to_bytes(4, "little") == fakes.masked(data)


# --- official data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_examples_are_those_that_tfds_decodes(data_fixtures: Path, file_format: str) -> None:
    if file_format == "array_record":
        pytest.importorskip("array_record")
    root = data_fixtures / f"tfds_{file_format}"
    description = json.loads((root / "panning_movi_e/32x32/1.0.0/features.json").read_text())
    names = parse_features(description).keys()
    expected = json.loads((data_fixtures / "tfds_expected.json").read_text())
    for split, count in (("train", 2), ("validation", 1)):
        data = TfdsDataset(root, split, names, verify=True)
        assert len(data) == len(expected[split]) == count
        for index in range(count):
            given = data[index]
            wanted = expected[split][given["metadata/video_name"]]
            assert given.keys() == wanted.keys()
            for name, value in given.items():
                assert_as_described(value, wanted[name], name)


def assert_as_described(value: Any, wanted: dict[str, Any], name: str) -> None:
    if wanted["kind"] == "text":
        assert value == wanted["value"]
        return
    if wanted["kind"] == "ragged":
        assert [len(row) for row in value] == wanted["row_lengths"]
        flat, digest = np.concatenate(value), wanted["flat_sha256"]
    else:
        assert list(value.shape) == wanted["shape"]
        flat, digest = value, wanted["sha256"]
    assert str(flat.dtype) == wanted["dtype"]
    assert hashlib.sha256(np.ascontiguousarray(flat).tobytes()).hexdigest() == digest, name


def test_array_records_package_is_named_where_it_is_missing(
    data_fixtures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "array_record", None)
    monkeypatch.setitem(sys.modules, "array_record.python.array_record_module", None)
    scenes = MoviScenes(data_fixtures / "tfds_array_record")
    with pytest.raises(ImportError, match=r'00000-of-00001: .* pip install "trackbench\[movi\]"'):
        scenes[0]


def test_a_damaged_array_record_names_itself(data_fixtures: Path, tmp_path: Path) -> None:
    pytest.importorskip("array_record")
    folder = tmp_path / "1.0.0"
    folder.mkdir()
    for file in (data_fixtures / "tfds_array_record/panning_movi_e/32x32/1.0.0").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    shard = folder / "panning_movi_e-train.array_record-00000-of-00001"
    whole = shard.read_bytes()
    for damaged in (whole[:-65536], b"", whole[:500_000] + bytes(64) + whole[500_064:]):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"array_record-00000-of-00001: record 1: damaged"):
            MoviScenes(folder)[1]


def test_tfds_reads_the_same_from_a_small_directory(tmp_path: Path) -> None:
    """That what the other tests read is what TFDS calls a data set."""
    pytest.importorskip("tensorflow")
    tfds = pytest.importorskip("tensorflow_datasets")
    folder = fakes.write_movi(tmp_path / "movi_f/32x32/1.0.0", shards=(1, 1), validation=1, checksums=True)
    theirs = list(tfds.builder_from_directory(folder).as_dataset(split="train").as_numpy_iterator())
    names = parse_features(fakes.movi_features()).keys()
    ours = {
        example["metadata/video_name"]: example for example in TfdsDataset(folder, "train", names, verify=True)
    }
    assert len(theirs) == len(ours) == 2
    for example in theirs:
        own = ours[example["metadata"]["video_name"].decode()]
        for name in names - {"metadata/video_name"}:
            wanted: Any = example
            for key in name.split("/"):
                wanted = wanted[key]
            assert own[name].dtype == wanted.dtype
            np.testing.assert_array_equal(own[name], wanted, err_msg=name)


# --- reading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"packed": False}, {"key_first": False}])
def test_values_are_those_written(tmp_path: Path, how: dict[str, bool]) -> None:
    written = fakes.scene(4)
    record = fakes.scene_record(written, "a scene", **how)
    folder = fakes.write_dataset(tmp_path / "1.0.0", {"train": [[record]]}, fakes.movi_features(), checksums=True)
    names = parse_features(fakes.movi_features()).keys()
    (read,) = TfdsDataset(folder, "train", names, verify=True)
    assert read.pop("metadata/video_name") == "a scene"
    assert read.keys() == written.keys()
    for name, value in written.items():
        assert read[name].dtype == value.dtype
        np.testing.assert_array_equal(read[name], value, err_msg=name)


def test_both_layouts_of_the_description_say_the_same(movi: Path, copy: Path) -> None:
    description = fakes.movi_features()
    assert parse_features(fakes.in_old_layout(description)) == parse_features(description)
    (copy / "features.json").write_text(json.dumps(fakes.in_old_layout(description)))
    np.testing.assert_array_equal(MoviScenes(copy)[3]["depth"], MoviScenes(movi)[3]["depth"])


def test_examples_are_found_in_all_shards_in_any_order(movi: Path) -> None:
    data = TfdsDataset(movi, "train", ["metadata/video_name"])
    assert len(data) == 5
    for index in (4, 0, 3, 1, 2, 4):
        assert data[index] == {"metadata/video_name": f"scene {index}"}
    for index in (-1, 5):
        with pytest.raises(IndexError, match=f"example {index} of 5"):
            data[index]


def test_tensorflow_is_not_needed(movi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorflow", "tensorflow_datasets"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    assert MoviScenes(movi)[0]["video"].shape == (T, SIDE, SIDE, 3)


def test_only_what_is_asked_for_is_read(movi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def count(file: Any, start: int, stop: int) -> bytes:
        read.append(stop - start)
        return original(file, start, stop)

    original = shards._read
    monkeypatch.setattr(shards, "_read", count)
    TfdsDataset(movi, "train", ["camera/positions"])[1]
    assert sum(read) < 4000
    read.clear()
    MoviScenes(movi)[1]
    flow = len(fakes.feature(fakes.scene(1)["forward_flow"]))
    record = len(fakes.scene_record(fakes.scene(1), "scene 1"))
    assert sum(read) < record - flow + 4000


def test_integers_of_all_lengths() -> None:
    values = np.array([0, 1, 127, 128, 16384, 2**31, 2**62, 2**63 - 1, -1, -(2**63)])
    feature = Feature("x", "number", "int64", (None,))
    np.testing.assert_array_equal(feature.decode({"x": fakes.feature(values)}), values)
    assert feature.decode({}).shape == (0,)  # an empty list may be left out


def test_rows_of_several_lengths() -> None:
    feature = Feature("boxes", "number", "float32", (None, None, 2))
    assert feature.stored == ("boxes/ragged_flat_values", "boxes/ragged_row_lengths_0")
    flat = np.arange(6, dtype=np.float32)
    values = dict(zip(feature.stored, [fakes.feature(flat), fakes.feature(np.array([2, 0, 1]))], strict=True))
    rows = feature.decode(values)
    assert [row.tolist() for row in rows] == [[[0, 1], [2, 3]], [], [[4, 5]]]
    values[feature.stored[1]] = fakes.feature(np.array([2, 2]))
    with pytest.raises(ValueError, match=r"feature boxes: expected 3 rows, its row lengths are \[2, 2\]"):
        feature.decode(values)


def test_directories_are_found_from_above(movi: Path, tmp_path: Path) -> None:
    for path in (movi, movi.parent, movi.parent.parent, movi.parent.parent.parent):
        assert find_version(path) == movi
    assert find_version(tmp_path) is None
    assert find_version(tmp_path / "nowhere") is None
    for name in ("movi_f/256x256/1.0.0", "movi_f/256x256/1.10.0", "movi_f/256x256/1.9.0", "0001/frames"):
        shutil.copytree(movi, tmp_path / name)
    assert find_version(tmp_path) == tmp_path / "movi_f/256x256/1.10.0"
    shutil.copytree(movi, tmp_path / "movi_f/512x512/1.0.0")
    with pytest.raises(ValueError, match=r"give one of .*256x256/1\.10\.0, .*512x512/1\.0\.0"):
        find_version(tmp_path)


# --- tracks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [False, True])
def test_tracks_are_those_of_the_whole_scene(movi: Path, monkeypatch: pytest.MonkeyPatch, crop: bool) -> None:
    scenes = MoviScenes(movi)
    whole = sample_tracks(
        scenes[2], 12, np.random.default_rng(5), random_crop=crop, max_sampled_frac=0.5, size=(40, 24)
    )
    decoded = []
    original = features._decode_png
    monkeypatch.setattr(features, "_decode_png", lambda *args: (decoded.append(1), original(*args)))
    rng = np.random.default_rng(5)
    name, tracks = scenes.tracks(2, 12, rng, random_crop=crop, max_sampled_frac=0.5, size=(40, 24))
    assert name == "scene 2"
    for key, value in vars(whole).items():
        np.testing.assert_array_equal(getattr(tracks, key), value)
    frames = len(np.unique(whole.queries[:, 0]))
    assert 0 < frames <= 2
    assert len(decoded) == 3 * T + 2 * frames  # surfaces only where a query looks at them


def test_parts_of_scenes(movi: Path) -> None:
    scenes, starts = MoviScenes(movi), set()
    whole = scenes[0]["video"]
    for seed in range(30):
        _, tracks = scenes.tracks(0, 10, np.random.default_rng(seed), num_frames=4)
        assert tracks.xy.shape[1] == 4
        starts |= {t for t in range(5) if np.array_equal(tracks.frames, whole[t : t + 4])}
        assert set(np.diff(tracks.xy[..., 0], axis=1).round(2).ravel()) <= {0.0, 1.0}  # wall and plate
    assert starts == {0, 1, 2, 3, 4}
    with pytest.raises(ValueError, match=r"tfrecord-00001-of-00002: record 1: expected at least 12 frames"):
        scenes.tracks(3, 10, np.random.default_rng(0), num_frames=12)


# --- damage --------------------------------------------------------------------------------------------------


def test_a_file_that_is_cut_off_names_itself(copy: Path) -> None:
    shard = first_shard(copy)
    whole = shard.read_bytes()
    second = 16 + int.from_bytes(whole[:8], "little")
    for length, message in (
        (second, "record 1: missing: the file holds 1 records, expected 2"),
        (second + 5, "record 1: missing: the file is cut off in the header of record 1"),
        (len(whole) - 1, f"record 1: missing: the file is cut off in record 1, at byte {len(whole) - 1}"),
    ):
        shard.write_bytes(whole[:length])
        scenes = MoviScenes(copy)
        scenes[0]
        with pytest.raises(ValueError, match=f"{shard}: {message}"):
            scenes[1]
    shard.write_bytes(b"")
    with pytest.raises(ValueError, match="record 0: missing: the file holds 0 records"):
        MoviScenes(copy)[0]


def test_a_damaged_header_names_itself_and_leaves_other_shards_alone(copy: Path) -> None:
    edit(first_shard(copy), lambda content: content.__setitem__(3, 1))
    scenes = MoviScenes(copy)
    for index in (0, 1):
        with pytest.raises(ValueError, match=f"00000-of-00002: record {index}: .* header of record 0 is damaged"):
            scenes[index]
    scenes[2]


def test_checksums_of_records_are_compared_on_request(tmp_path: Path) -> None:
    folder = fakes.write_movi(tmp_path / "1.0.0", shards=(1, 1), validation=1, checksums=True)
    MoviScenes(folder, verify=True)[0]
    value = np.float32(32).tobytes()
    edit(
        first_shard(folder),
        lambda content: content.__setitem__(slice((at := content.index(value)), at + 4), np.float32(33).tobytes()),
    )
    MoviScenes(folder)[0]  # a number like any other
    with pytest.raises(ValueError, match=r"00000-of-00002: record 0: damaged: its checksum"):
        MoviScenes(folder, verify=True)[0]


def test_damaged_bytes_are_a_value_error_or_other_values(copy: Path) -> None:
    shard = first_shard(copy)
    whole = shard.read_bytes()
    rng = np.random.default_rng(0)
    refused = unnamed = 0
    for _ in range(150):
        damaged = bytearray(whole)
        place = int(rng.integers(12, len(whole) // 2))
        damaged[place : place + 4] = rng.bytes(4)
        shard.write_bytes(bytes(damaged))
        try:
            MoviScenes(copy).tracks(0, 8, np.random.default_rng(0))
        except ValueError as error:
            refused += 1
            unnamed += str(shard) not in str(error)
    assert not unnamed
    assert refused > 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"depth": [fakes.png(np.zeros((SIDE, SIDE, 1), np.uint16))] * (T - 1)},
            "depth: expected 8 images, got 7",
        ),
        ({"depth": [b"GIF89a" * 9] * T}, "depth: not a PNG"),
        (
            {"depth": [fakes.png(np.zeros((SIDE, SIDE, 1), np.uint8))] * T},
            r"depth: image 0: expected .* \(32, 32, 16, 0\), got \(32, 32, 8, 0\)",
        ),
        (
            {"normal": [fakes.png(np.zeros((SIDE, 2 * SIDE, 3), np.uint16))] * T},
            r"normal: image \d: expected .* \(32, 32, 16, 2\), got \(32, 64, 16, 2\)",
        ),
        ({"video": [fakes.png(np.zeros((SIDE, SIDE, 3), np.uint8))[:90]] * T}, "video: image 0: a damaged PNG"),
        ({"camera/positions": np.zeros(23, np.float32)}, r"camera/positions: expected \(8, 3\) values, got 23"),
        ({"instances/quaternions": np.zeros(33, np.float32)}, r"quaternions: expected \(n, 8, 4\) values, got 33"),
        ({"camera/focal_length": np.array([1])}, "camera/focal_length: holds integers, expected floats"),
        ({"metadata/video_name": [b"a", b"b"]}, "metadata/video_name: expected 1 text, got 2"),
        ({"metadata/video_name": [b"\xff"]}, "metadata/video_name: .*utf-8"),
        ({"instances/quaternions": np.full((1, T, 4), 9, np.float32)}, "obj_quaternions.*unit"),
    ],
)
def test_a_record_that_does_not_fit_names_file_and_feature(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    content = fakes.scene()
    stored = {key: [fakes.png(i) for i in v] if key in fakes.IMAGES else v for key, v in content.items()}
    record = fakes.example({**stored, "metadata/video_name": [b"x"], **change})
    folder = fakes.write_dataset(tmp_path / "1.0.0", {"train": [[record]]}, fakes.movi_features())
    with pytest.raises(ValueError, match=f"movi_f-train.tfrecord-00000-of-00001: record 0: .*{message}"):
        MoviScenes(folder).tracks(0, 8, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"\x0b", "wire type 3"),
        (b"\x0a\x7f", "ends at 129, beyond 2"),
        (b"\xff" * 30, "a number has no end"),
        (b"", "feature .*: expected"),
    ],
)
def test_what_is_no_example_is_refused(tmp_path: Path, record: bytes, message: str) -> None:
    folder = fakes.write_dataset(tmp_path / "1.0.0", {"train": [[record]]}, fakes.movi_features())
    with pytest.raises(ValueError, match=f"record 0: .*{message}"):
        MoviScenes(folder)[0]


def test_images_that_are_not_there_are_missed() -> None:
    feature = Feature("depth", "image", "uint16", (None, 4, 4, 1))
    stored = {"depth": fakes.feature([fakes.png(np.full((4, 4, 1), i, np.uint16)) for i in (5, 6, 7)])}
    assert feature.decode(stored, {0, 2})[:, 0, 0, 0].tolist() == [5, 0, 7]
    with pytest.raises(ValueError, match="feature depth: expected at least 4 images, got 3"):
        feature.decode(stored, range(4))


def test_values_outside_of_their_type_are_refused() -> None:
    feature = Feature("x", "number", "uint16", (2,))
    with pytest.raises(ValueError, match="feature x: expected uint16 values, got -1 to 70000"):
        feature.decode({"x": fakes.feature(np.array([-1, 70000]))})


def test_missing_files_name_themselves(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: expected features\.json"):
        MoviScenes(tmp_path / "nowhere")
    first_shard(copy).unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.tfrecord-00000-of-00002: .*1 of 2 shards are missing"):
        MoviScenes(copy)
    MoviScenes(copy, "validation")
    (copy / "dataset_info.json").unlink()
    with pytest.raises(ValueError, match=r"dataset_info\.json: no such file"):
        MoviScenes(copy)


def test_damaged_descriptions_name_themselves(copy: Path) -> None:
    info_file, features_file = copy / "dataset_info.json", copy / "features.json"
    info = json.loads(info_file.read_text())
    with pytest.raises(ValueError, match=r"dataset_info\.json: has no split 'test', only 'train', 'validation'"):
        MoviScenes(copy, "test")
    with pytest.raises(ValueError, match=r"features\.json: lacks optical_flow"):
        TfdsDataset(copy, "train", ["depth", "optical_flow"])
    train = {"name": "train", "shardLengths": ["2", "3"]}
    for change, message in (
        ({"fileFormat": "riegeli"}, "expected shards of tfrecord or array_record, got riegeli"),
        ({"splits": 3}, "not a description of a data set"),
        ({"splits": [{"name": "train", "shardLengths": ["two"]}]}, "invalid literal"),
        ({"splits": [{"name": "train", "shardLengths": []}]}, "split 'train' has no examples"),
        ({"splits": [{**train, "filepathTemplate": "../{SPLIT}-{SHARD_X_OF_Y}"}]}, r"must lie beside it.*\.\./"),
        ({"name": "../../etc/passwd"}, "must lie beside it"),
    ):
        info_file.write_text(json.dumps({**info, **change}))
        with pytest.raises(ValueError, match=rf"dataset_info\.json: .*{message}"):
            MoviScenes(copy)
    info_file.write_text(json.dumps({**info, "splits": [train], "fileFormat": None}))  # as older versions wrote it
    assert len(MoviScenes(copy)) == 5
    for content in ("[1", "[]", '{"pythonClassName": "x.FeaturesDict", "featuresDict": 3}', "[" * 100_000):
        features_file.write_text(content)
        with pytest.raises(ValueError, match=r"features\.json: "):
            MoviScenes(copy)


def test_names_follow_the_template() -> None:
    template = "{SPLIT}-{SHARD_INDEX}-{NUM_SHARDS}.{FILEFORMAT}"
    given = dataset._shard_name(Path("x"), template, "movi_f", "train", "tfrecord", 3, 12)
    assert given == "train-00003-00012.tfrecord"
