"""TFDS directories of MOVi converted: shard by shard, and to frames; resumed, refused, checked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from trackbench.cli import main
from trackbench.data.folder import TrackFolder
from trackbench.data.kubric import sample_tracks
from trackbench.data.prepare.movi import find_source
from trackbench.data.prepare.shards import select_descriptions
from trackbench.data.tfds import MoviScenes, SceneSequences, TfdsDataset
from trackbench.data.tfds.features import parse_features
from trackbench.data.tfds.scenes import TRACK_FEATURES

sys.path.insert(0, str(Path(__file__).parents[1]))
import tfds_fakes as fakes

FORMATS = ("compact", "array_record", "frames")


@pytest.fixture(scope="module")
def movi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a version, with checksums: 1, 2 and 1 training scenes and 1 for validation."""
    folder = tmp_path_factory.mktemp("data") / "movi_f" / "32x32" / "1.0.0"
    return fakes.write_movi(folder, (1, 2, 1), 1, checksums=True)


def prepare(source: Path | str, out: Path, *options: str, name: str = "movi_f") -> int:
    return main(["prepare", name, "--source", str(source), "--out", str(out), "--workers", "1", *options])


def tree(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def records(file: Path) -> list[bytes]:
    """Of a TFRecord file, after its specification."""
    content, at, found = file.read_bytes(), 0, []
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        record = content[at + 12 : at + 12 + length]
        assert content[at + 8 : at + 12] == fakes.masked(content[at : at + 8])
        assert content[at + 12 + length : at + 16 + length] == fakes.masked(record)
        found.append(record)
        at += 16 + length
    return found


def same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


# --- compact -----------------------------------------------------------------------------------------------------


def test_compact_records_decode_as_the_source(movi: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "movi"
    assert prepare(movi, out) == 0
    names = {path.name for path in out.glob("*tfrecord*[0-9]")}
    assert names == {path.name for path in movi.glob("*tfrecord*")}
    for split, count in (("train", 4), ("validation", 1)):
        before, after = MoviScenes(movi, split), MoviScenes(out, split, verify=True)
        assert len(before) == len(after) == count
        for index in range(count):
            expected, scene = before[index], after[index]
            assert expected.keys() == scene.keys()
            for key in expected:
                same(expected[key], scene[key])
    for name in names:  # checksums by another implementation; the features by their own bytes
        for old, new in zip(records(movi / name), records(out / name), strict=True):
            assert len(new) < len(old)
    description = json.loads((out / "features.json").read_text())
    assert "forward_flow" not in parse_features(description)
    info = json.loads((out / "dataset_info.json").read_text())
    train = next(split for split in info["splits"] if split["name"] == "train")
    assert train["shardLengths"] == ["1", "2", "1"]
    whole = b"".join(b"".join(records(file)) for file in sorted(out.glob("*-train.tfrecord*-of-00003")))
    assert int(train["numBytes"]) == len(whole)


def test_official_records_keep_their_bytes(data_fixtures: Path, tmp_path: Path) -> None:
    source = data_fixtures / "tfds_tfrecord"
    assert prepare(source, tmp_path / "out", "--splits", "train") == 0
    folder = source / "panning_movi_e/32x32/1.0.0"
    description = json.loads((tmp_path / "out/features.json").read_text())
    kept = parse_features(description)
    assert set(TRACK_FEATURES) < kept.keys()
    assert {"camera/field_of_view", "metadata/num_instances"} < kept.keys()
    assert all(name in TRACK_FEATURES or name.startswith(("camera/", "metadata/")) for name in kept)
    every = parse_features(json.loads((folder / "features.json").read_text()))
    assert all(every[name] == feature for name, feature in kept.items())
    before = TfdsDataset(source, "train", kept)
    after = TfdsDataset(tmp_path / "out", "train", kept, verify=True)
    expected = json.loads((data_fixtures / "tfds_expected.json").read_text())["train"]
    assert len(after) == len(before) == 2
    for index in range(2):
        old, new = before[index], after[index]
        for name in kept:
            same(old[name], new[name])
        official = expected[str(new["metadata/video_name"])]
        for name in TRACK_FEATURES:
            if name != "metadata/video_name":
                content = np.ascontiguousarray(new[name]).tobytes()
                assert hashlib.sha256(content).hexdigest() == official[name]["sha256"]
    shard = "panning_movi_e-train.tfrecord-00000-of-00001"
    for old_record, new_record in zip(records(folder / shard), records(tmp_path / "out" / shard), strict=True):
        assert len(new_record) < 0.5 * len(old_record)
    with pytest.raises(ValueError, match="no split 'validation'"):
        MoviScenes(tmp_path / "out", "validation")


def test_all_features_are_the_whole_records(data_fixtures: Path, tmp_path: Path) -> None:
    folder = data_fixtures / "tfds_tfrecord/panning_movi_e/32x32/1.0.0"
    assert prepare(folder, tmp_path / "out", "--all-features", name="panning_movi_e") == 0
    for shard in folder.glob("*.tfrecord-*"):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()
    labels = "instances-category.labels.txt"
    assert (tmp_path / "out" / labels).read_bytes() == (folder / labels).read_bytes()
    for name in ("features.json", "dataset_info.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((folder / name).read_text())


def test_each_shard_gets_an_index(movi: Path, tmp_path: Path) -> None:
    assert prepare(movi, tmp_path / "out") == 0
    for shard in (tmp_path / "out").glob("*-train.tfrecord*-of-00003"):
        offsets = json.loads(shard.with_name(shard.name + ".index").read_text())["offsets"]
        lengths = [len(record) + 16 for record in records(shard)]
        assert offsets == [sum(lengths[:k]) for k in range(len(lengths))]


def test_descriptions_of_both_layouts_are_cut_alike() -> None:
    description = fakes.movi_features()
    kept = {"depth", "camera/positions", "instances/quaternions"}
    for layout in (description, fakes.in_old_layout(description)):
        assert parse_features(select_descriptions(layout, kept)).keys() == kept
    with pytest.raises(ValueError, match="has none of nothing"):
        select_descriptions(description, {"nothing"})


def test_array_record_holds_the_same_examples(movi: Path, tmp_path: Path) -> None:
    pytest.importorskip("array_record")
    assert prepare(movi, tmp_path / "compact") == 0
    assert prepare(movi, tmp_path / "out", "--format", "array_record") == 0
    assert prepare(movi, tmp_path / "again", "--format", "array_record") == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "again")
    before, after = MoviScenes(movi), MoviScenes(tmp_path / "out")
    for index in range(4):
        expected, scene = before[index], after[index]
        for key in expected:
            same(expected[key], scene[key])
    assert prepare(tmp_path / "out", tmp_path / "back") == 0  # and from ArrayRecord
    for shard in (tmp_path / "compact").glob("*.tfrecord-*"):
        assert shard.read_bytes() == (tmp_path / "back" / shard.name).read_bytes()


def test_array_record_needs_its_package(
    movi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "array_record.python", None)
    assert prepare(movi, tmp_path / "out", "--format", "array_record") == 1
    assert 'pip install "trackbench[movi]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tfds_reads_it(data_fixtures: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorflow")
    tfds = pytest.importorskip("tensorflow_datasets")
    source = data_fixtures / "tfds_tfrecord"
    for options in ([], ["--all-features"]):
        out = tmp_path / f"out{len(options)}"
        assert prepare(source, out, *options) == 0
        examples = tfds.builder_from_directory(str(out)).as_dataset(split="train")
        for number, example in enumerate(tfds.as_numpy(examples)):
            scene = MoviScenes(out)[number]
            np.testing.assert_array_equal(example["video"], scene["video"])
            np.testing.assert_array_equal(example["depth"][..., 0], scene["depth"])
            np.testing.assert_array_equal(example["instances"]["bboxes_3d"], scene["bboxes_3d"])
            assert example["metadata"]["video_name"].decode() == scene["name"]
        assert number == 1


# --- frames ------------------------------------------------------------------------------------------------------


def test_frames_are_what_is_made_on_the_fly(movi: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert prepare(movi, out, "--format", "frames") == 0
    folder, sequences = TrackFolder(out), SceneSequences(MoviScenes(movi))
    assert folder.names == ["0000", "0001", "0002", "0003"]
    for index in range(4):
        written, made = folder[index].clip(0, fakes.T), sequences[index].whole
        np.testing.assert_array_equal(written.frames, made.frames)
        np.testing.assert_array_equal(written.xy, made.xy.astype(np.float32))
        np.testing.assert_array_equal(written.visible, made.visible)


def test_frames_are_read_as_the_official_loaders_do(data_fixtures: Path, tmp_path: Path) -> None:
    source, out = data_fixtures / "tfds_tfrecord", tmp_path / "out"
    assert prepare(source, out, "--format", "frames", "--num-tracks", "30") == 0
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["0000", "0001"]
    for name in ("0000", "0001"):
        files = sorted((out / name / "frames").iterdir())
        assert [file.name for file in files] == [f"{t:03}.png" for t in range(24)]
        frames = np.stack([np.asarray(Image.open(file)) for file in files])
        annotations = np.load(out / name / f"{name}.npy", allow_pickle=True).item()
        assert annotations.keys() == {"coords", "visibility"}
        rng = np.random.default_rng([3, int(name)])
        expected = sample_tracks(MoviScenes(source)[int(name)], 30, rng, random_crop=True)
        np.testing.assert_array_equal(frames, expected.frames)
        same(annotations["coords"], expected.xy.astype(np.float32))
        same(np.logical_not(annotations["visibility"]), expected.visible)
        assert 0.1 < expected.visible.mean() < 0.9


def test_sequences_of_another_size_and_number(movi: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--format", "frames", "--size", "48x40", "--sequences", "6", "--splits", "validation", "train")
    assert prepare(movi, out, *options) == 0
    train, held_out = TrackFolder(out / "train"), TrackFolder(out / "validation")
    assert train.names == held_out.names == [f"{i:04}" for i in range(6)]
    for again, number in ((0, 4), (1, 5)):  # scenes again, with another crop
        before, after = train[again].clip(0, fakes.T), train[number].clip(0, fakes.T)
        assert before.frames.shape == after.frames.shape == (fakes.T, 48, 40, 3)
        assert not np.array_equal(before.frames, after.frames)
    scene = MoviScenes(movi)[1]
    expected = sample_tracks(scene, 2048, np.random.default_rng([3, 5]), random_crop=True, size=(48, 40))
    np.testing.assert_array_equal(train[5].clip(0, fakes.T).frames, expected.frames)
    np.testing.assert_array_equal(train[5].xy, expected.xy.astype(np.float32))


def test_published_quirks(movi: Path, tmp_path: Path) -> None:
    options = ("--format", "frames", "--official-quirks", "--sequences", "1")
    assert prepare(movi, tmp_path / "out", *options) == 0
    coords = np.load(tmp_path / "out/0000/0000.npy", allow_pickle=True).item()["coords"]
    assert coords.shape == (2048, fakes.T, 2)  # filled up with copies
    assert len(np.unique(coords[:, 0], axis=0)) < 1000


# --- resuming ----------------------------------------------------------------------------------------------------

KILLED_WHILE_WRITING = """
import os, signal, sys
from contextlib import contextmanager
from trackbench.cli import main
from trackbench.data.prepare import frames, shards

left = int(sys.argv.pop(1))

def count():
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

writer, png = shards.shard_writer, frames._png

@contextmanager
def shard_writer(*arguments):
    with writer(*arguments) as write:
        yield lambda record: (write(record), count())

def write_png(frame):
    count()
    return png(frame)

shards.shard_writer, frames._png = shard_writer, write_png
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("file_format", "writes", "kept"),
    [("compact", 3, "*-00000-of-00003"), ("array_record", 3, "*-00000-of-00003"), ("frames", 50, "0000")],
)
def test_a_killed_run_goes_on(movi: Path, tmp_path: Path, file_format: str, writes: int, kept: str) -> None:
    if file_format == "array_record":
        pytest.importorskip("array_record")
    options = ("--format", file_format)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert prepare(movi, whole, *options) == 0
    arguments = ["prepare", "movi_f", "--source", str(movi), "--out", str(out), "--workers", "1", *options]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_WRITING, str(writes), *arguments], capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert any(".part-" in path.name for path in out.iterdir())
    assert not (out / "SHA256SUMS").exists()
    finished = {path: path.stat().st_mtime_ns for path in out.glob(kept)}
    assert finished
    with (out / "prepare.jsonl").open("a") as file:
        file.write('{"item": "cut o')  # killed while it wrote that, too
    assert prepare(movi, out, *options) == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert tree(out) == tree(whole)


def test_what_was_damaged_is_made_anew(movi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert prepare(movi, out) == 0
    before = tree(out)
    edited, removed = sorted(out.glob("*-train*-of-00003"))[:2]
    content = bytearray(edited.read_bytes())
    content[1000] ^= 1
    edited.write_bytes(bytes(content))
    removed.unlink()
    assert main(["prepare", "movi_f", "--out", str(out), "--verify", "--workers", "1"]) == 1
    shown = capsys.readouterr().err
    assert f"wrong: {edited}: changed" in shown
    assert f"wrong: {removed}: missing" in shown
    assert prepare(movi, out) == 0
    assert "2 were there" in capsys.readouterr().err
    assert tree(out) == before
    assert main(["prepare", "movi_f", "--out", str(out), "--verify", "--workers", "1"]) == 0


def test_sums_are_those_of_sha256sum(movi: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert prepare(movi, out, "--format", "frames", "--sequences", "2") == 0
    lines = [line.split("  ") for line in (out / "SHA256SUMS").read_text().splitlines()]
    assert {name: digest for digest, name in lines} == {k: v for k, v in tree(out).items() if k != "SHA256SUMS"}


def test_several_processes_write_the_same(movi: Path, tmp_path: Path) -> None:
    for number, workers in enumerate("12"):
        out = tmp_path / str(number)
        assert prepare(movi, out, "--workers", workers) == 0
    assert tree(tmp_path / "0") == tree(tmp_path / "1")


# --- bad records -------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(movi: Path, tmp_path: Path) -> Path:
    return shutil.copytree(movi, tmp_path / "source")


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 10)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(("damage", "said"), [(cut, "cut off in record 1"), (flip, "checksum")])
@pytest.mark.parametrize("file_format", FORMATS)
def test_bad_records_are_named(
    copy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file_format: str,
    damage: Callable[[Path], None],
    said: str,
) -> None:
    if file_format == "array_record":
        pytest.importorskip("array_record")
    out = tmp_path / "out"
    shard = copy / "movi_f-train.tfrecord-00001-of-00003"
    whole = shard.read_bytes()
    damage(shard)
    options = ("--format", file_format, "--splits", "train")
    assert prepare(copy, out, *options) == 1
    shown = capsys.readouterr().err
    assert f"failed: {shard}: record 1:" in shown
    assert said in shown
    assert "not finished: 1 failed" in shown
    assert not (out / "SHA256SUMS").exists()

    assert prepare(copy, out, *options, "--skip-bad") == 0  # the rest was done
    shown = capsys.readouterr().err
    assert f"skipped: {shard}: record 1:" in shown
    assert f"{3 if file_format == 'frames' else 2} were there, 1 bad ones skipped" in shown
    if file_format == "frames":
        assert TrackFolder(out).names == ["0000", "0001", "0003"]
    else:
        assert [MoviScenes(out)[i]["name"] for i in range(3)] == ["scene 0", "scene 1", "scene 3"]

    shard.write_bytes(whole)  # repaired: as if nothing had been
    assert prepare(copy, out, *options) == 0
    assert "0 bad ones" in capsys.readouterr().err
    assert prepare(copy, tmp_path / "new", *options) == 0
    assert tree(out) == tree(tmp_path / "new")


def test_a_missing_shard_is_named(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "movi_f-train.tfrecord-00002-of-00003").unlink()
    assert prepare(copy, tmp_path / "out") == 1
    assert "movi_f-train.tfrecord-00002-of-00003: no such file" in capsys.readouterr().err


# --- what is refused ---------------------------------------------------------------------------------------------


def test_folders_that_hold_something_else_are_left_alone(
    movi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert prepare(movi, tmp_path) == 1
    assert "holds something else" in capsys.readouterr().err
    assert prepare(movi, movi / "out") == 1
    assert "must not lie in the source" in capsys.readouterr().err
    assert prepare(movi, movi.parent) == 1
    out = tmp_path / "out"
    assert prepare(movi, out, "--splits", "validation") == 0
    capsys.readouterr()
    before = tree(out)
    assert prepare(movi, out) == 1
    assert "splits was ['validation'], now ['train', 'validation']" in capsys.readouterr().err
    assert tree(out) == before


def test_a_full_disk_is_known_before(
    movi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert prepare(movi, out, "--dry-run") == 0
    said = capsys.readouterr().err
    assert "4 of train, 1 of validation in 4 shards; needs about" in said
    assert not out.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert prepare(movi, out) == 1
    assert "1.0 kB are free" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_estimate_is_near(
    movi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str
) -> None:
    if file_format == "array_record":
        pytest.importorskip("array_record")
    needed = []
    monkeypatch.setattr(
        "trackbench.data.prepare.movi.check_room", lambda path, size: needed.append(size) or "room"
    )
    out = tmp_path / "out"
    assert prepare(movi, out, "--format", file_format) == 0
    block = 4096 if file_format == "frames" else 1
    notes = ("SHA256SUMS", "prepare.jsonl")
    files = [path for path in out.rglob("*") if path.is_file() and path.name not in notes]
    written = sum(-(-path.stat().st_size // block) * block for path in files)
    assert 0.9 * written < needed[0] < (2 if file_format == "array_record" else 1.1) * written
    assert prepare(movi, out, "--format", file_format) == 0
    assert needed[1] < 0.6 * needed[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "64"], "--size: only for --format frames"),
        (["--format", "frames", "--all-features"], "not for --format frames"),
        (["--splits", "nothing"], "has no split 'nothing'"),
        (["--splits", "train", "train"], "names one twice"),
        (["--config", "512x512"], "not of the configuration 512x512"),
        (["--workers", "0"], "at least 1"),
        (["--format", "frames", "--num-tracks", "0"], "at least 1"),
    ],
)
def test_settings_that_make_no_sense(
    movi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert prepare(movi, tmp_path / "out", *options) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- where the source lies ---------------------------------------------------------------------------------------


def test_sources_are_found_below_their_parents(movi: Path, tmp_path: Path) -> None:
    parent = tmp_path / "tfds"
    for name, config in (("movi_e", "32x32"), ("movi_f", "32x32"), ("movi_f", "64x64")):
        shutil.copytree(movi, parent / name / config / "1.0.0")
    expected = parent / "movi_f" / "64x64" / "1.0.0"
    for above in (parent, parent / "movi_f", expected.parent, expected):
        assert find_source(str(above), "movi_f", "64x64") == expected
    assert find_source(str(parent), "movi_e") == parent / "movi_e" / "32x32" / "1.0.0"
    with pytest.raises(ValueError, match=r"give one of .*32x32/1\.0\.0, .*64x64/1\.0\.0; --config picks one"):
        find_source(str(parent), "movi_f")
    with pytest.raises(ValueError, match="none of them is movi_e/128x128"):
        find_source(str(parent), "movi_e", "128x128")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_source(str(tmp_path / "nowhere"), "movi_f")
    with pytest.raises(ValueError, match="unknown protocol 'nonsense'"):
        find_source("nonsense://there", "movi_f")


@pytest.mark.parametrize("file_format", ["compact", "frames"])
def test_sources_behind_urls(movi: Path, tmp_path: Path, file_format: str) -> None:
    bucket = fsspec.filesystem("memory")
    for file in movi.iterdir():
        bucket.pipe_file(f"/tfds/movi_f/32x32/1.0.0/{file.name}", file.read_bytes())
    options = ("--format", file_format, "--config", "32x32")
    assert prepare("memory://tfds", tmp_path / "remote", *options) == 0
    assert prepare(movi, tmp_path / "local", *options) == 0
    assert tree(tmp_path / "remote") == tree(tmp_path / "local")
