from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from episode_fakes import T, V, write_episode

from trackbench.cli import main
from trackbench.files import sha256
from trackbench.robotics import attach as stage
from trackbench.robotics.attach import ABOUT, attach, verify
from trackbench.robotics.content import content_sha256
from trackbench.robotics.extract import extract
from trackbench.robotics.review import decide
from trackbench.robotics.track_file import CameraTracks, write_tracks
from trackbench.robotics.workspace import Workspace

NAMES = ("tip", "杯子")
KEYS = ("obs/keypoints", "obs/keypoints_visible", "obs/keypoints_confidence")


def make_rich(path: Path) -> None:
    """Add one of everything that HDF5 offers to an episode."""
    (path.parent / "beside.raw").write_bytes(bytes(range(64)))
    with h5py.File(path, "r+") as file:
        file.attrs["robot"] = "arm"
        file.attrs["big"] = np.arange(4, dtype=">i4")
        file.attrs.create("names", ["a", "bé"], dtype=h5py.string_dtype())
        file.attrs["nothing"] = h5py.Empty("f8")
        group = file.create_group("rest", track_order=True)
        rng = np.random.default_rng(0)
        noise = rng.integers(0, 9, (40, 5))
        group.create_dataset(
            "zipped", data=noise, chunks=(7, 5), compression="gzip", shuffle=True, fletcher32=True
        )
        group.create_dataset("lzf", data=noise, chunks=(7, 5), maxshape=(None, 5), compression="lzf")
        group.create_dataset("sparse", (100, 100), "f4", chunks=(10, 10), fillvalue=-3)[35, 35] = 1
        group.create_dataset("scaled", data=noise, scaleoffset=0)
        group["scalar"] = 3.5
        group["text"] = "words"
        group["bytes"] = np.bytes_(b"fixed")
        group.create_dataset("lines", data=["one", "two two"], dtype=h5py.string_dtype(), chunks=(1,))
        ragged = group.create_dataset("ragged", (2,), h5py.vlen_dtype("i4"))
        ragged[0], ragged[1] = [1, 2, 3], [4]
        group["table"] = np.array([(1, 2.0), (3, 4.0)], [("a", "i4"), ("b", "f8")])
        group.create_dataset("colour", data=[0, 1], dtype=h5py.enum_dtype({"red": 0, "green": 1}))
        group["opaque"] = np.void(b"\x00\x01\x02")
        group["empty"] = h5py.Empty("f4")
        group["zero"] = np.zeros((0, 3))
        group["type"] = np.dtype("f8")
        group["ref"] = np.array([file["step_2"].ref, group["table"].ref], h5py.ref_dtype)
        group["region"] = np.array([group["zipped"].regionref[3:9, 1:3]], h5py.regionref_dtype)
        group["time"] = np.arange(40.0)
        group["time"].make_scale("seconds")
        group["zipped"].dims[0].attach_scale(group["time"])
        group["zipped"].attrs["unit"] = "m"
        file["soft"] = h5py.SoftLink("/step_1/obs")
        file["dangling"] = h5py.SoftLink("/nowhere")
        file["external"] = h5py.ExternalLink("other.h5", "/data")
        file["again"] = group["zipped"]
        group["up"] = file["/"]  # a circle
        group.create_dataset("raw", (16,), "i4", external=[(str(path.parent / "beside.raw"), 0, 64)])
        layout = h5py.VirtualLayout((40,), "i8")
        layout[:] = h5py.VirtualSource(".", "/rest/zipped", (40, 5))[:, 2]
        group.create_virtual_dataset("virtual", layout)


def make_tracks(camera: int, names: tuple[str, ...] = NAMES, seed: int = 0) -> CameraTracks:
    K = len(names)
    rng = np.random.default_rng([seed, camera])
    return CameraTracks(
        names=names,
        queries=np.zeros((K, 3), np.float32),
        xy=rng.uniform(0, 24, (K, T, 2)).astype(np.float32),
        visible=rng.random((K, T)) < 0.7,
        visibility=rng.random((K, T)).astype(np.float32),
        error=np.zeros((K, T), np.float32),
        corrections=np.zeros((0, 4)),
        model="lucas_kanade",
        weights_sha256="",
        annotation_sha256="ab",
        trackbench_version="0.0",
    )


def prepare(folder: Path, names: str = "a", rich: bool = False, **layout: Any) -> tuple[Path, Workspace]:
    """Episodes, extracted, with random tracks, accepted."""
    source, workspace = folder / "in", Workspace(folder / "out")
    for name in names:
        path = write_episode(source / f"{name}.h5", chunks=True, compression="gzip", **layout)
        if rich:
            make_rich(path)
    assert all(outcome.error is None for outcome in extract(source, workspace, workers=1))
    for number, name in enumerate(names):
        for camera in range(V):
            write_tracks(workspace.file(name, camera, "tracks"), make_tracks(camera, seed=number))
    decide(workspace, list(names), "accept", "looks right")
    return source, workspace


def outcomes(source: Path, workspace: Workspace, **options: Any) -> dict[str, str | None]:
    """Episode -> its error, or what became of it."""
    done = attach(source, workspace, workers=1, **options)
    return {o.item: o.error if o.result is None else o.result.state for o in done}


def checks(folder: Path, source: Path | None = None) -> dict[str, str | None]:
    return {outcome.item: outcome.error for outcome in verify(folder, source, workers=1)}


def digests(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): sha256(path) for path in sorted(root.rglob("*")) if path.is_file()}


def everything(file: h5py.File) -> Iterator[tuple[str, Any]]:
    """Each name in a file with what is there, put down plainly: links, attributes, storage and values."""
    waiting = [("", file["/"])]
    seen = {h5py.h5o.get_info(file["/"].id).addr: "/"}
    while waiting:
        path, item = waiting.pop()
        yield f"{path}@", {name: str(item.attrs.get_id(name).dtype) for name in item.attrs}
        for name, value in item.attrs.items():
            yield f"{path}@{name}", plain(value, file)
        if isinstance(item, h5py.Dataset):
            yield path, (item.dtype.str, item.shape, item.maxshape, item.chunks, item.compression, item._filters)
            yield f"{path}=", plain(item[()], file)
            if item.chunks:
                count = item.id.get_num_chunks()
                offsets = sorted(item.id.get_chunk_info(index).chunk_offset for index in range(count))
                yield f"{path}#", [(offset, item.id.read_direct_chunk(offset)) for offset in offsets]
        elif isinstance(item, h5py.Group):
            for name in item:
                link = item.get(name, getlink=True)
                if not isinstance(link, h5py.HardLink):
                    yield f"{path}/{name}", (type(link).__name__, getattr(link, "filename", ""), link.path)
                    continue
                place = h5py.h5o.get_info(item[name].id).addr
                if place in seen:
                    yield f"{path}/{name}", ("is", seen[place])
                else:
                    seen[place] = f"{path}/{name}"
                    waiting.append((f"{path}/{name}", item[name]))


def plain(value: Any, file: h5py.File) -> Any:
    if isinstance(value, h5py.Reference):
        return file[value].name
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        return [plain(element, file) for element in value.ravel()]
    if isinstance(value, np.void) and value.dtype.names:
        return [plain(value[name], file) for name in value.dtype.names]
    return repr(value) if isinstance(value, h5py.Empty | str | bytes) else (value.dtype.str, value.tobytes())


def test_keypoints_stand_beside_the_images(tmp_path: Path) -> None:
    source, workspace = prepare(tmp_path)
    assert outcomes(source, workspace) == {"a": "written"}
    tracks = [make_tracks(camera) for camera in range(V)]
    with h5py.File(workspace.attached / "a.h5") as file:
        for t in range(T):
            xy, visible, confidence = (file[f"step_{t}/{key}"] for key in KEYS)
            assert (xy.shape, xy.dtype) == ((1, V, 2, 2), np.float32)
            assert (visible.shape, visible.dtype) == ((1, V, 2), np.bool_)
            assert (confidence.shape, confidence.dtype) == ((1, V, 2), np.float32)
            for camera in range(V):
                np.testing.assert_array_equal(xy[0, camera], tracks[camera].xy[:, t])
                np.testing.assert_array_equal(visible[0, camera], tracks[camera].visible[:, t])
                np.testing.assert_array_equal(confidence[0, camera], tracks[camera].visibility[:, t])
        about = file[ABOUT].attrs
        assert list(about["names"]) == list(NAMES)
        assert list(about["model"]) == ["lucas_kanade"] * V
        assert list(about["weights_sha256"]) == [""] * V
        assert (about["decision"], about["decision_reason"]) == ("accept", "looks right")
        assert "0.5" in about["coordinates"]
        assert list(about["tracks_sha256"]) == [sha256(workspace.file("a", c, "tracks")) for c in range(V)]


def test_the_original_content_is_preserved(tmp_path: Path) -> None:
    source, workspace = prepare(tmp_path, rich=True)
    before = digests(source)
    assert outcomes(source, workspace) == {"a": "written"}
    assert digests(source) == before
    with h5py.File(source / "a.h5") as original, h5py.File(workspace.attached / "a.h5") as file:
        expected, found = dict(everything(original)), dict(everything(file))
        assert len(expected) > 100
        assert {name: found[name] for name in expected} == expected
        added = {name.split("@")[0].rstrip("=#") for name in found.keys() - expected.keys()}
        mine = {f"/step_{t}/{key}" for t in range(T) for key in KEYS}
        assert added == mine | {f"/{ABOUT}", f"/{ABOUT}/steps"}
    assert checks(workspace.attached, source) == {"a": None}


EDITS: dict[str, Callable[[h5py.File], None]] = {
    "a value": lambda file: file["rest/zipped"].__setitem__((3, 3), 77),
    "a value in a contiguous dataset": lambda file: file["step_1/action"].__setitem__(1, 77),
    "a text": lambda file: file["rest/lines"].__setitem__(1, "three"),
    "a ragged row": lambda file: file["rest/ragged"].__setitem__(1, [5]),
    "a reference": lambda file: file["rest/ref"].__setitem__(0, file["step_3"].ref),
    "a region": lambda file: file["rest/region"].__setitem__(0, file["rest/zipped"].regionref[3:9, 1:4]),
    "an attribute": lambda file: file.attrs.__setitem__("robot", "leg"),
    "an attribute more": lambda file: file["rest/table"].attrs.__setitem__("new", 1),
    "the type of an attribute": lambda file: file.attrs.create("big", np.arange(4, dtype="<i4")),
    "a soft link": lambda file: (file.pop("soft"), file.__setitem__("soft", h5py.SoftLink("/step_2/obs"))),
    "an external link": lambda file: (
        file.__delitem__("external"),
        file.__setitem__("external", h5py.ExternalLink("another.h5", "/data")),
    ),
    "a hard link": lambda file: (file.pop("again"), file.__setitem__("again", file["rest/table"])),
    "a link more": lambda file: file.__setitem__("more", h5py.SoftLink("/x")),
    "a dataset less": lambda file: file.pop("rest/opaque"),
    "a shape": lambda file: file["rest/lzf"].resize(41, axis=0),
    "a keypoint": lambda file: file["step_4/obs/keypoints"].__setitem__((0, 1, 1, 0), 3.25),
    "visibility": lambda file: file["step_4/obs/keypoints_visible"].__setitem__(
        (0, 1, 1), not file["step_4/obs/keypoints_visible"][0, 1, 1]
    ),
    "a step of keypoints": lambda file: file.pop("step_4/obs/keypoints_confidence"),
    "a name": lambda file: file[ABOUT].attrs.__setitem__("names", ["tip", "cup"]),
    "the digest": lambda file: file[ABOUT].attrs.pop("content_sha256"),
    "all that says it is ours": lambda file: file.pop(ABOUT),
}


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Workspace]:
    source, workspace = prepare(tmp_path_factory.mktemp("rich"), rich=True)
    assert outcomes(source, workspace) == {"a": "written"}
    return source, workspace


@pytest.mark.parametrize("kind", EDITS)
def test_verify_sees_every_change(rich: tuple[Path, Workspace], tmp_path: Path, kind: str) -> None:
    path = Path(shutil.copy(rich[1].attached / "a.h5", tmp_path / "a.h5"))
    assert checks(tmp_path) == {"a": None}
    with h5py.File(path, "r+") as file:
        EDITS[kind](file)
    told = checks(tmp_path)["a"]
    assert told is not None
    assert str(path) in told


def test_verify_sees_damage_and_goes_on(rich: tuple[Path, Workspace], tmp_path: Path) -> None:
    source, workspace = rich
    for name in "abcd":
        shutil.copy(workspace.attached / "a.h5", tmp_path / f"{name}.h5")
    (tmp_path / "a.h5").write_bytes((tmp_path / "a.h5").read_bytes()[:-3000])
    (tmp_path / "b.h5").write_bytes(b"")
    shutil.copy(source / "a.h5", tmp_path / "c.h5")
    told = checks(tmp_path, source)
    assert told["d"] is None
    assert "truncated" in str(told["a"])
    assert "empty" in str(told["b"])
    assert "not a file that `trackbench h5 attach` wrote" in str(told["c"])


def test_verify_compares_with_the_original_as_it_is_now(tmp_path: Path) -> None:
    source, workspace = prepare(tmp_path)
    outcomes(source, workspace)
    with h5py.File(source / "a.h5", "r+") as file:
        file["step_1/action"][0] = 9
    assert checks(workspace.attached) == {"a": None}
    assert "the original is not what" in str(checks(workspace.attached, source)["a"])


@pytest.mark.parametrize("key", ["rgb", "cameras/front/color"])
def test_other_image_names(tmp_path: Path, key: str) -> None:
    source, workspace = prepare(tmp_path, key=key, name="data/frame_{:03}")
    assert outcomes(source, workspace) == {"a": "written"}
    above = key.rpartition("/")[0]
    with h5py.File(workspace.attached / "a.h5") as file:
        for kind in ("keypoints", "keypoints_visible", "keypoints_confidence"):
            assert file[f"data/frame_003/{above}/{kind}"].shape[:3] == (1, V, 2)
    assert checks(workspace.attached, source) == {"a": None}


def test_cameras_with_different_keypoints(tmp_path: Path) -> None:
    source, workspace = prepare(tmp_path)
    tracks = make_tracks(1, ("杯子", "box", "lid"))
    write_tracks(workspace.file("a", 1, "tracks"), tracks)
    decide(workspace, ["a"], "accept")
    assert outcomes(source, workspace) == {"a": "written"}
    with h5py.File(workspace.attached / "a.h5") as file:
        assert list(file[ABOUT].attrs["names"]) == ["tip", "杯子", "box", "lid"]
        xy, visible, confidence = (file[f"step_2/{key}"][0] for key in KEYS)
        np.testing.assert_array_equal(xy[1, 1:], tracks.xy[:, 2])
        assert np.isnan(xy[0, 2:]).all()
        assert np.isnan(xy[1, 0]).all()
        assert not visible[0, 2:].any()
        assert not visible[1, 0]
        assert confidence[1, 0] == 0
    workspace.file("a", 0, "tracks").unlink()  # a camera without tracks
    decide(workspace, ["a"], "accept")
    assert outcomes(source, workspace) == {"a": "written"}
    with h5py.File(workspace.attached / "a.h5") as file:
        assert list(file[ABOUT].attrs["names"]) == ["杯子", "box", "lid"]
        assert np.isnan(file["step_0/obs/keypoints"][0, 0]).all()
        assert list(file[ABOUT].attrs["model"]) == ["", "lucas_kanade"]


def test_only_what_is_accepted_is_attached(tmp_path: Path) -> None:
    source, workspace = prepare(tmp_path, "abcd")
    decide(workspace, ["b"], "reject", "blurred")
    write_tracks(workspace.file("c", 0, "tracks"), make_tracks(0, seed=99))  # tracked again after the decision
    assert outcomes(source, workspace) == {"a": "written", "c": "stale", "d": "written"}
    assert sorted(path.name for path in workspace.attached.iterdir()) == ["a.h5", "d.h5"]
    decide(workspace, ["a"], "reject")
    write_tracks(workspace.file("d", 0, "tracks"), make_tracks(0, seed=98))
    kept = digests(workspace.attached)
    told = outcomes(source, workspace)
    assert "not accepted (any more)" in str(told["a"])
    assert "earlier tracks" in str(told["d"])
    assert digests(workspace.attached) == kept
    decide(workspace, ["d"], "accept")
    assert outcomes(source, workspace)["d"] == "written"


def test_what_is_there_stays(tmp_path: Path) -> None:
    source, workspace = prepare(tmp_path, "ab")
    to = tmp_path / "elsewhere"
    assert outcomes(source, workspace, to=to) == {"a": "written", "b": "written"}
    times = {path: path.stat().st_mtime_ns for path in to.iterdir()}
    assert outcomes(source, workspace, to=to) == {"a": "there", "b": "there"}
    assert {path: path.stat().st_mtime_ns for path in to.iterdir()} == times
    assert not workspace.attached.exists()


def test_what_would_be_overwritten_is_refused(tmp_path: Path) -> None:
    source, workspace = prepare(tmp_path, "abc")
    for name, key in (("a", "step_3/obs/keypoints"), ("b", ABOUT)):
        with h5py.File(source / f"{name}.h5", "r+") as file:
            file[key] = 1
    shutil.rmtree(workspace.root)
    _, workspace = prepare_again(source, workspace)
    workspace.attached.mkdir()
    shutil.copy(source / "a.h5", workspace.attached / "c.h5")
    before = digests(tmp_path)
    told = outcomes(source, workspace)
    assert "step_3 holds obs/keypoints already" in str(told["a"])
    assert "holds keypoints already" in str(told["b"])
    assert "was not written by `trackbench h5 attach`" in str(told["c"])
    assert digests(tmp_path) == before
    with pytest.raises(ValueError, match="must not lie in the folder of episodes"):
        list(attach(source, workspace, to=source))


def prepare_again(source: Path, workspace: Workspace) -> tuple[Path, Workspace]:
    names = [outcome.item for outcome in extract(source, workspace, workers=1)]
    for name in names:
        for camera in range(V):
            write_tracks(workspace.file(name, camera, "tracks"), make_tracks(camera))
    decide(workspace, names, "accept")
    return source, workspace


def test_bad_episodes_get_a_line_each_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, workspace = prepare(tmp_path, "abcd")
    with h5py.File(source / "a.h5", "r+") as file:
        file["new"] = np.random.default_rng(0).random(5000)
    (source / "b.h5").unlink()
    workspace.file("c", 0, "tracks").write_bytes(b"none")
    decide(workspace, ["c"], "accept")
    assert main(["h5", "attach", str(source), str(workspace.root), "--workers", "1"]) == 1
    lines = capsys.readouterr().err.splitlines()
    for name, told in {"a": "changed since", "b": "no such file", "c": "not a file of tracks"}.items():
        assert len([line for line in lines if line.startswith(f"{name}: ") and told in line]) == 1
    assert lines[-1].startswith("1 episodes attached, 0 were there, 0 not accepted")
    assert [path.name for path in workspace.attached.iterdir()] == ["d.h5"]
    assert main(["h5", "verify", str(workspace.attached), "--against", str(source)]) == 0
    assert "1 files are as they were written" in capsys.readouterr().err


def test_links_out_of_the_copy_are_not_written_through(tmp_path: Path) -> None:
    """Between extraction and now the group of a step became a link to another file."""
    source, workspace = prepare(tmp_path)
    victim = write_episode(tmp_path / "victim.h5")
    before = sha256(victim)
    with h5py.File(source / "a.h5", "r+") as file:
        del file["step_3"]
        file["step_3"] = h5py.ExternalLink(str(victim), "step_3")
    info = workspace.info("a")
    path = Path(shutil.copy(source / "a.h5", tmp_path / "copy.h5"))
    keypoints, _ = stage._gather(workspace, info)
    with pytest.raises(ValueError, match="link to another file"):
        stage._write_keypoints(path, info, keypoints, {}, source / "a.h5")
    assert sha256(victim) == before


def test_what_is_read_back_must_be_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, workspace = prepare(tmp_path)
    real = content_sha256
    monkeypatch.setattr(stage, "content_sha256", lambda file, out=(): real(file, out) + ("x" if out else ""))
    assert "what was read back is not what was written" in str(outcomes(source, workspace)["a"])
    assert list(workspace.attached.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from trackbench.robotics import attach
from trackbench.robotics.workspace import Workspace
read, count = attach.read_attached, 0
def counting(file):
    global count
    count += 1
    if count == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(file)
attach.read_attached = counting
list(attach.attach(Path(sys.argv[1]), Workspace(Path(sys.argv[2])), workers=1))
"""


def test_a_killed_run_is_completed_by_the_next(tmp_path: Path) -> None:
    source, workspace = prepare(tmp_path, "abc")
    outcomes(source, workspace, to=tmp_path / "expected")
    killed = subprocess.run([sys.executable, "-c", KILLED, source, workspace.root], check=False)
    assert killed.returncode == -9
    names = [path.name for path in workspace.attached.iterdir()]
    assert "a.h5" in names
    assert any(re.fullmatch(r"\..*part-b\.h5", name) for name in names)
    assert checks(workspace.attached) == {"a": None}  # what is not finished does not count
    assert outcomes(source, workspace) == {"a": "there", "b": "written", "c": "written"}
    assert digests(workspace.attached) == digests(tmp_path / "expected")


LIMITED = """
import resource, sys
from pathlib import Path
from trackbench.robotics.attach import attach
from trackbench.robotics.workspace import Workspace
limit = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for outcome in attach(Path(sys.argv[1]), Workspace(Path(sys.argv[2])), workers=1):
    print(outcome.error)
"""


@pytest.mark.parametrize("beyond", [-1000, 500], ids=["while copying", "while adding"])
def test_a_full_disk_leaves_nothing_half_done(tmp_path: Path, beyond: int) -> None:
    """A limit on the size of files stands for a full disk."""
    source, workspace = prepare(tmp_path)
    limit = str((source / "a.h5").stat().st_size + beyond)
    command = [sys.executable, "-c", LIMITED, source, workspace.root, limit]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout
    assert list(workspace.attached.iterdir()) == []
