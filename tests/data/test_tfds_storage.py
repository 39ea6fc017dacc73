"""TFDS data sets behind URLs: the same bytes by few requests, in forked processes too; what fails names itself."""

from __future__ import annotations

import json
import logging
import multiprocessing
import shutil
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import storage_fakes
import tfds_fakes as fakes
from storage_fakes import Bucket
from torch.utils.data import DataLoader

from trackbench.data.movi import MoviFDataModule
from trackbench.data.panning_movi_e import PanningMoviEDataModule
from trackbench.data.tfds import MoviScenes, TfdsDataset, find_version, storage, write_index
from trackbench.data.tfds.features import parse_features
from trackbench.data.tfds.storage import RemotePath, local_copy, place

SHARDS = (2, 3)


@pytest.fixture(scope="module")
def movi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = fakes.write_movi(tmp_path_factory.mktemp("data") / "movi_f" / "32x32" / "1.0.0", SHARDS)
    for shard in folder.glob("*.tfrecord-*"):
        write_index(shard)
    return folder


@pytest.fixture
def copy(movi: Path, tmp_path: Path) -> Path:
    return shutil.copytree(movi, tmp_path / "1.0.0")


@pytest.fixture(autouse=True)
def _new(monkeypatch: pytest.MonkeyPatch) -> None:
    Bucket.requests.clear()
    Bucket.failures.clear()
    monkeypatch.setattr(storage, "_WAITS", (0.0, 0.0, 0.0))


@pytest.fixture
def requests() -> list[tuple[str, str]]:
    return Bucket.requests


def bucket(folder: Path) -> str:
    return f"bucket://{folder}"


def shard(number: int, split: str = "train", count: int = len(SHARDS)) -> str:
    return f"movi_f-{split}.tfrecord-{number:05}-of-{count:05}"


def assert_equal(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert given.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_equal(given[name], value, err_msg=name)


# --- reading -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["bucket", "memory", "file", "http"])
def url(request: pytest.FixtureRequest, movi: Path) -> Iterator[str]:
    if request.param == "memory":
        yield storage_fakes.fill("memory://data/movi_f/32x32/1.0.0", movi).removesuffix("/1.0.0")
    elif request.param == "http":
        pytest.importorskip("aiohttp")
        with storage_fakes.web_server(movi.parent) as (address, _):
            yield address
    else:
        yield f"{request.param}://{movi.parent}/"


def test_examples_are_those_of_local_files(movi: Path, url: str) -> None:
    names = parse_features(fakes.movi_features()).keys()
    for split in ("train", "validation"):
        local, remote = TfdsDataset(movi, split, names), TfdsDataset(url, split, names)
        assert len(local) == len(remote)
        for index in reversed(range(len(local))):
            assert_equal(remote[index], local[index])
    local, remote = (MoviScenes(path).tracks(3, 9, np.random.default_rng(0)) for path in (movi, url))
    assert remote[0] == local[0]
    assert_equal(vars(remote[1]), vars(local[1]))


def test_official_files_are_read_from_a_storage_as_from_the_disk(data_fixtures: Path, tmp_path: Path) -> None:
    """Whose records vary in length; of flow and collisions, too."""
    folder = data_fixtures / "tfds_tfrecord"
    names = parse_features(json.loads(next(folder.rglob("features.json")).read_text())).keys()
    local, remote = (TfdsDataset(path, "train", names, verify=True) for path in (folder, bucket(folder)))
    for index in range(2):
        assert_equal(remote[index], local[index])


def test_data_modules_take_urls(movi: Path) -> None:
    for module in (
        PanningMoviEDataModule(bucket(movi), num_frames=8, height=24, width=24, num_points=5),
        MoviFDataModule(bucket(movi), num_frames=8, height=16, width=16, num_points=5, val_share=0.2),
        MoviFDataModule(f"file://{movi}", num_frames=8, height=16, width=16, num_points=5, val_share=0.2),
    ):
        batch = next(iter(module.train_dataloader()))
        assert batch.names[0].startswith("scene ")
        assert batch.video.shape[:2] == (1, 8)


def test_forked_processes_read_after_their_parent(movi: Path) -> None:
    """Through a client with a thread and connections, of which a forked process has neither."""
    pytest.importorskip("aiohttp")
    with storage_fakes.web_server(movi) as (url, _):
        scenes = MoviScenes(url)
        local = [MoviScenes(movi)[index] for index in range(len(scenes))]
        assert_equal(scenes[0], local[0])
        for _ in range(2):
            loader = DataLoader(
                scenes,  # type: ignore[arg-type]
                batch_size=None,
                num_workers=2,
                multiprocessing_context="fork",
                timeout=20,
                collate_fn=lambda scene: scene,
            )
            for given, wanted in zip(loader, local, strict=True):
                assert_equal({k: np.asarray(v) for k, v in given.items()}, wanted)
        assert_equal(scenes[1], local[1])


def test_data_sets_are_found_behind_urls(movi: Path, tmp_path: Path) -> None:
    for folder in (movi, movi.parent, movi.parent.parent, movi.parent.parent.parent):
        assert str(find_version(bucket(folder))) == bucket(movi)
    assert find_version(bucket(tmp_path)) is None
    assert find_version(bucket(tmp_path / "nowhere")) is None
    for name in ("movi_f/256x256/1.0.0", "movi_f/256x256/1.10.0", "movi_f/256x256/1.9.0", "0001/frames"):
        shutil.copytree(movi, tmp_path / name)
    assert str(find_version(bucket(tmp_path))) == bucket(tmp_path / "movi_f/256x256/1.10.0")
    shutil.copytree(movi, tmp_path / "movi_f/512x512/1.0.0")
    with pytest.raises(ValueError, match=r"give one of bucket://.*256x256/1\.10\.0, bucket://.*512x512/1\.0\.0"):
        find_version(bucket(tmp_path))


def test_paths_and_urls_are_told_apart(tmp_path: Path) -> None:
    assert place("/data/movi_f") == Path("/data/movi_f")
    assert place(f"file://{tmp_path}") == tmp_path
    assert place(tmp_path) is tmp_path
    remote = place("memory://a/b/")
    assert remote == RemotePath("memory://a/b")
    inner = remote / "c" / "d.txt"
    assert (str(inner), inner.name, inner.parent) == ("memory://a/b/c/d.txt", "d.txt", remote / "c")


# --- requests ------------------------------------------------------------------------------------------------


def test_a_sample_is_one_request(movi: Path, requests: list[tuple[str, str]]) -> None:
    scenes = MoviScenes(bucket(movi))
    assert [kind for kind, _ in requests] == ["list", "get", "get", "list"]  # two descriptions, no shard
    requests.clear()
    scenes[4]
    assert requests == [("get", shard(1) + ".index"), ("get", shard(1))]
    requests.clear()
    for index in (2, 3, 4, 2):
        scenes.tracks(index, 9, np.random.default_rng(0))
    assert requests == [("get", shard(1))] * 4


def test_without_an_index_headers_are_requests(
    copy: Path, requests: list[tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    (copy / f"{shard(1)}.index").unlink()
    with caplog.at_level(logging.WARNING):
        scenes = MoviScenes(bucket(copy))
    assert "1 of 2 shards have no index" in caplog.text
    requests.clear()
    scenes[4]
    assert requests == [("get", shard(1))] * (3 + 1)
    requests.clear()
    scenes[3]
    assert requests == [("get", shard(1))]


def test_only_a_record_is_transferred(movi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = RemotePath.read
    monkeypatch.setattr(RemotePath, "read", lambda self, a, b: (read.append(b - a), original(self, a, b))[1])
    TfdsDataset(bucket(movi), "train", ["camera/positions"])[3]
    assert read == [len(fakes.scene_record(fakes.scene(3), "scene 3")) + 16]


# --- the index -----------------------------------------------------------------------------------------------


def test_an_index_says_where_records_start(tmp_path: Path) -> None:
    records = [b"x" * n for n in (0, 5, 300, 1)]
    file = tmp_path / "a.tfrecord-00000-of-00001"
    file.write_bytes(fakes.tfrecord(records))
    assert write_index(file) == tmp_path / "a.tfrecord-00000-of-00001.index"
    content = json.loads(write_index(file, tmp_path / "elsewhere" / "x.index").read_text())
    assert content["offsets"] == [0, 16, 37, 353]
    assert content["size"] == 370 == file.stat().st_size
    file.write_bytes(b"")
    assert json.loads(write_index(file).read_text())["offsets"] == []
    file.write_bytes(fakes.tfrecord(records)[:-3])
    with pytest.raises(ValueError, match=rf"{file}: record 3: missing: the file is cut off in record 3"):
        write_index(file)
    with pytest.raises(FileNotFoundError):
        write_index(tmp_path / "nowhere")


def test_an_index_that_does_not_fit_names_itself(copy: Path) -> None:
    index = copy / f"{shard(0)}.index"
    content = json.loads(index.read_text())
    first, second = content["offsets"]

    def refused(change: dict[str, Any] | str, message: str, number: int = 1) -> None:
        index.write_text(change if isinstance(change, str) else json.dumps({**content, **change}))
        with pytest.raises(ValueError, match=rf"{shard(0)}: record {number}: .*{message}"):
            MoviScenes(bucket(copy))[number]

    refused({"size": content["size"] - 1}, r"\.index: made for a file of \d+ bytes, it has \d+")
    refused({"offsets": [first, second + 1]}, r"not at byte \d+: bucket://.*\.index is not the index of this file")
    refused({"offsets": [first]}, r"not at byte 0: bucket://.*\.index is not the index of this file", number=0)
    for offsets in ([], [3], [0, 15], [0, second, second], [0, content["size"] - 5], [0, -20], ["x"], 3):
        refused({"offsets": offsets}, r"\.index: not an index")
    for text in ("", "[]", '{"format": "other"}', "[" * 100_000):
        refused(text, r"\.index: not an index")
    index.write_text(json.dumps(content))
    assert_equal(MoviScenes(bucket(copy))[1], MoviScenes(copy)[1])
    index.unlink()
    MoviScenes(bucket(copy))[1]


# --- damage --------------------------------------------------------------------------------------------------


def test_missing_files_name_themselves(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"bucket:///.*nowhere: expected features\.json"):
        MoviScenes(bucket(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"bucket:///.*nowhere: expected features\.json"):
        MoviFDataModule(bucket(tmp_path / "nowhere")).setup()
    opened = MoviScenes(bucket(copy))
    (copy / shard(0)).unlink()
    with pytest.raises(FileNotFoundError, match=rf"^bucket://{copy}/{shard(0)}: no such file$"):
        opened[0]
    opened[2]
    with pytest.raises(
        FileNotFoundError, match=rf"bucket://.*{shard(0)}: no such file; 1 of 2 shards are missing"
    ):
        MoviScenes(bucket(copy))
    (copy / "dataset_info.json").unlink()
    with pytest.raises(ValueError, match=r"bucket://.*dataset_info\.json: no such file"):
        MoviScenes(bucket(copy))


@pytest.mark.parametrize("with_index", [True, False])
def test_a_file_that_is_cut_off_names_itself(copy: Path, with_index: bool) -> None:
    file = copy / shard(0)
    opened = MoviScenes(bucket(copy))
    opened[0]
    if not with_index:
        (copy / f"{shard(0)}.index").unlink()
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{shard(0)}: record 1: the file ends before byte {len(whole)}"):
        opened[1]  # it was longer when the data set was opened
    cause = "made for a file of" if with_index else f"cut off in record 1, at byte {len(whole) - 1}"
    with pytest.raises(ValueError, match=rf"{shard(0)}: record 1: .*{cause}"):
        MoviScenes(bucket(copy))[1]


def test_checksums_of_records_are_compared_on_request(tmp_path: Path) -> None:
    folder = fakes.write_movi(tmp_path / "1.0.0", shards=(1,), validation=1, checksums=True)
    MoviScenes(bucket(folder), verify=True)[0]
    file = folder / shard(0, count=1)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"record 0: damaged: its checksum"):
        MoviScenes(bucket(folder), verify=True)[0]


def test_protocols_that_cannot_be_read_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"gss://bucket/movi_f: unknown protocol 'gss', expected a path or a URL"):
        MoviScenes("gss://bucket/movi_f")
    missing = {"class": "no_such_package.FileSystem", "err": "Install no_such_package"}
    monkeypatch.setitem(storage.known_implementations, "absent", missing)
    for url in ("absent://bucket/movi_f", "simplecache::absent://bucket/movi_f"):
        with pytest.raises(ImportError, match=r"absent://bucket/movi_f: .*pip install no_such_package"):
            MoviFDataModule(url).setup()


# --- weather -------------------------------------------------------------------------------------------------


def test_requests_that_fail_are_repeated(movi: Path, requests: list[tuple[str, str]]) -> None:
    Bucket.failures += [TimeoutError(), ConnectionResetError(), RuntimeError("503")]
    scenes = MoviScenes(bucket(movi))
    scenes[0]
    requests.clear()
    Bucket.failures += [OSError("reset")] * 3
    scenes[1]
    assert requests == [("get", shard(0))] * 4
    Bucket.failures += [OSError("reset")] * 4
    with pytest.raises(
        OSError, match=rf"{shard(0)}: record 1: .*failed 4 times, the last time by OSError\('reset'\)"
    ):
        scenes[1]
    requests.clear()
    Bucket.failures.append(PermissionError("not yours"))
    with pytest.raises(OSError, match=rf"{shard(0)}: record 1: .*not yours"):
        scenes[1]
    assert len(requests) == 1  # no second attempt
    Bucket.failures += [OSError("reset")] * 4
    with pytest.raises(OSError, match=r"bucket://.*1\.0\.0: failed 4 times"):
        MoviScenes(bucket(movi))


def test_answers_of_a_server_that_is_busy_are_repeated(movi: Path) -> None:
    pytest.importorskip("aiohttp")
    with storage_fakes.web_server(movi) as (url, answers):
        scenes = MoviScenes(url)
        scenes[1]
        answers += [HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.BAD_GATEWAY]
        assert_equal(scenes[0], MoviScenes(movi)[0])
        answers += [HTTPStatus.SERVICE_UNAVAILABLE] * 4
        with pytest.raises(OSError, match=rf"http://.*{shard(0)}: record 0: .*failed 4 times.*503"):
            scenes[0]


# --- ArrayRecord ---------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def copied(file: RemotePath) -> Path:
    return local_copy(file, file.parent.entries()[file.name])


def test_a_copy_is_made_once_and_anew_where_the_file_changes(
    copy: Path, cache: Path, requests: list[tuple[str, str]]
) -> None:
    file = place(bucket(copy))
    assert isinstance(file, RemotePath)
    file /= shard(0)
    first = copied(file)
    assert first.is_relative_to(cache)
    assert first.read_bytes() == (copy / shard(0)).read_bytes()
    assert copied(file) == first
    assert [kind for kind, _ in requests].count("copy") == 1
    (copy / shard(0)).write_bytes(b"other")
    assert copied(file).read_bytes() == b"other"


def test_a_copy_appears_whole_or_not_at_all(copy: Path, cache: Path) -> None:
    file = RemotePath(bucket(copy), shard(0))
    Bucket.failures += [OSError("reset")] * 4
    entry = {"size": (copy / shard(0)).stat().st_size}
    with pytest.raises(OSError, match="failed 4 times"):
        local_copy(file, entry)
    (copy / shard(0)).write_bytes(b"half")
    with pytest.raises(ValueError, match=r"cut off: 4 of \d+ bytes arrived"):
        local_copy(file, entry)
    assert not [path for path in cache.rglob("*") if path.is_file() and path.name != "lock"]


def _copy_and_count(file: RemotePath, start: Any, counts: Any) -> None:
    start.wait()
    copied(file)
    counts.put([kind for kind, _ in Bucket.requests].count("copy"))


def test_processes_share_one_copy(copy: Path, cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, counts = context.Barrier(4), context.Queue()
    arguments = (RemotePath(bucket(copy), shard(0)), start, counts)
    processes = [context.Process(target=_copy_and_count, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    assert sum(counts.get(timeout=20) for _ in processes) == 1
    for process in processes:
        process.join()


def test_array_records_are_read_from_a_copy(data_fixtures: Path, cache: Path, requests: Any) -> None:
    pytest.importorskip("array_record")
    folder = data_fixtures / "tfds_array_record"
    local, remote = MoviScenes(folder), MoviScenes(bucket(folder))
    requests.clear()
    for index in (1, 0):
        assert_equal(remote[index], local[index])
    assert [kind for kind, _ in requests] == ["copy"]


@pytest.mark.parametrize("suffix", ["tfrecord", "array_record"])
def test_shards_are_found_that_were_converted_without_a_word(copy: Path, suffix: str) -> None:
    """As ``tfds convert_format --out_dir`` leaves them, with the descriptions copied beside them."""
    info = json.loads((copy / "dataset_info.json").read_text())
    info["fileFormat"] = {"tfrecord": "array_record", "array_record": "tfrecord"}[suffix]
    for split in info["splits"]:
        split.pop("filepathTemplate")
    (copy / "dataset_info.json").write_text(json.dumps(info))
    for file in copy.glob("*.tfrecord-*"):
        file.rename(file.with_name(file.name.replace("tfrecord", suffix)))
    for path in (copy, bucket(copy)):
        data = TfdsDataset(path, "train", ["metadata/video_name"])
        assert suffix in data._place(0)[0].path.name
        assert len(data) == 5
    (copy / shard(0).replace("tfrecord", suffix)).unlink()
    with pytest.raises(FileNotFoundError, match=r"-0000\d-of-00002: no such file; 1 of 2 shards are missing"):
        TfdsDataset(copy, "train", ["metadata/video_name"])
