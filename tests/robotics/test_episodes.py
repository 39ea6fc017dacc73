from __future__ import annotations

import builtins
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from episode_fakes import H, T, V, W, pixels, write_episode

from trackbench.robotics.episodes import (
    EpisodeFile,
    EpisodeSettings,
    find_episodes,
    fingerprint,
    import_h5py,
    open_hdf5,
)


def assert_all_frames(episode: EpisodeFile, cameras: int = V, tolerance: int = 0) -> None:
    assert (episode.num_frames, episode.cameras, episode.height, episode.width) == (T, cameras, H, W)
    for t in range(T):
        images = episode.images(t)
        assert images.shape == (cameras, H, W, 3)
        assert images.dtype == np.uint8
        for camera in range(cameras):
            expected = pixels(t, camera).astype(int)
            assert abs(images[camera].astype(int) - expected).max() <= tolerance
            np.testing.assert_array_equal(episode.frame(t, camera), images[camera])


def test_steps_are_read_in_numeric_order(tmp_path: Path) -> None:
    numbers = [0, 1, 2, 9, 10, 11]
    path = write_episode(tmp_path / "a.h5", numbers)
    with EpisodeFile(path, EpisodeSettings(allow_gaps=True)) as episode:
        assert episode.steps == tuple(f"step_{n}" for n in numbers)
        assert (episode.image_key, episode.axes) == ("obs/image", "b v c h w")
        assert_all_frames(episode)
        np.testing.assert_array_equal(np.stack(list(episode.frames(1)))[4], pixels(4, 1))


def read_all(path: Path) -> None:
    with EpisodeFile(path) as episode:
        for t in range(T):
            episode.images(t)


LAYOUTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str, int]] = {
    "b v c h w": (lambda a: a, "b v c h w", 2),
    "v c h w": (lambda a: a[0], "v c h w", 2),
    "c h w": (lambda a: a[0, 0], "c h w", 1),
    "v h w c": (lambda a: a[0].transpose(0, 2, 3, 1), "v h w c", 2),
    "b v h w c": (lambda a: a.transpose(0, 1, 3, 4, 2), "b v h w c", 2),
    "h w c": (lambda a: a[0, 0].transpose(1, 2, 0), "h w c", 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_axes_are_inferred(tmp_path: Path, layout: str) -> None:
    change, axes, cameras = LAYOUTS[layout]
    with EpisodeFile(write_episode(tmp_path / "a.h5", change=change)) as episode:
        assert episode.axes == axes
        assert_all_frames(episode, cameras)


def test_axes_can_be_given(tmp_path: Path) -> None:
    path = write_episode(tmp_path / "a.h5", change=lambda a: a[0].transpose(2, 1, 0, 3))
    with pytest.raises(ValueError, match=r"axes|shape"):
        EpisodeFile(path)
    with EpisodeFile(path, EpisodeSettings(axes="h c v w")) as episode:
        assert_all_frames(episode)
    with pytest.raises(ValueError, match="expected a batch of 1 and 3 channels"):
        EpisodeFile(path, EpisodeSettings(image_key="obs/image", axes="h v c w"))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("white", [1, 255])
def test_float_images(tmp_path: Path, dtype: str, white: int) -> None:
    path = write_episode(tmp_path / "a.h5", change=lambda a: (a / 255 * white).astype(dtype))
    with EpisodeFile(path) as episode:
        assert episode.value_range == white
        assert_all_frames(episode, tolerance=0)


def test_the_range_of_values_holds_for_the_whole_episode(tmp_path: Path) -> None:
    dark = write_episode(tmp_path / "a.h5", range(40), change=lambda a: (a / 2550).astype(np.float32))
    with h5py.File(dark, "r+") as file:
        file["step_3/obs/image"][..., :2, :2] = 200.0
    with EpisodeFile(dark) as episode:
        np.testing.assert_array_equal(episode.images(0)[0], np.rint(pixels(0, 0) / 10).astype(np.uint8))
        with pytest.raises(ValueError, match=r"a\.h5: step_3/obs/image: values from .* to 200, expected \[0, 1\]"):
            episode.images(3)
    with EpisodeFile(dark, EpisodeSettings(value_range=255)) as episode:
        assert episode.images(0).max() == 0
        assert episode.images(3).max() == 200


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 1.5])
def test_values_that_make_no_sense(tmp_path: Path, value: float) -> None:
    path = write_episode(tmp_path / "a.h5", change=lambda a: (a / 255).astype(np.float32))
    with h5py.File(path, "r+") as file:
        file["step_0/obs/image"][..., 0, 0] = value
    with pytest.raises(ValueError, match="values"), EpisodeFile(path) as episode:
        episode.images(0)


@pytest.mark.parametrize(
    ("name", "key"),
    [("frame{}", "rgb"), ("data/t_{}", "cameras/front/color"), ("{}", "obs/image"), ("step_{:05}", "obs/image")],
)
def test_other_names_are_inferred(tmp_path: Path, name: str, key: str) -> None:
    with EpisodeFile(write_episode(tmp_path / "a.h5", name=name, key=key)) as episode:
        assert (episode.steps[3], episode.image_key) == (name.format(3), key)
        assert_all_frames(episode)


def test_other_names_can_be_given(tmp_path: Path) -> None:
    path = write_episode(tmp_path / "a.h5", name="t{}_data")
    settings = EpisodeSettings(step_pattern="t{}_data", image_key="obs/image")
    with EpisodeFile(path, settings) as episode:
        assert episode.steps[0] == "t0_data"
        assert_all_frames(episode)
    with pytest.raises(ValueError, match=r"no groups x_\{\}; found t0_data"):
        EpisodeFile(path, EpisodeSettings(step_pattern="x_{}"))
    with pytest.raises(ValueError, match="step_0 has no dataset obs/rgb"):
        EpisodeFile(write_episode(tmp_path / "b.h5"), EpisodeSettings(image_key="obs/rgb"))


def test_series_without_images_and_other_datasets_are_left_out(tmp_path: Path) -> None:
    path = write_episode(tmp_path / "a.h5", key="obs/front")
    with h5py.File(path, "r+") as file:
        for n in range(4):
            file[f"note_{n}/text"] = "x"
            file[f"step_{n}/obs/depth"] = np.zeros((1, V, H, W), np.uint16)
    with EpisodeFile(path) as episode:
        assert_all_frames(episode)


def test_steps_below_groups_are_found_beside_other_numbered_groups(tmp_path: Path) -> None:
    path = write_episode(tmp_path / "a.h5", name="data/step_{}")
    with h5py.File(path, "r+") as file:
        file["note_0/text"] = "x"
        file["data/step_0"].attrs["fps"] = file["note_0"].attrs["fps"] = 12
    with EpisodeFile(path) as episode:
        assert (episode.steps[5], episode.fps) == ("data/step_5", 12.0)
        assert_all_frames(episode)
    with h5py.File(path, "r+") as file:
        del file["data"]
    with pytest.raises(ValueError, match="note_0: no dataset looks like RGB images; found text object"):
        EpisodeFile(path)


def test_several_candidates_are_refused(tmp_path: Path) -> None:
    path = write_episode(tmp_path / "a.h5", key="front")
    with h5py.File(path, "r+") as file:
        for n in range(T):
            file[f"step_{n}/back"] = file[f"step_{n}/front"][()]
    with pytest.raises(ValueError, match=r"several datasets look like images, .*set image_key"):
        EpisodeFile(path)
    with h5py.File(path, "r+") as file:
        file["other_0/front"] = file["step_0/front"][()]
    with pytest.raises(ValueError, match="several series of steps hold images"):
        EpisodeFile(path, EpisodeSettings(image_key="front"))


def test_a_missing_step_is_named_unless_gaps_are_allowed(tmp_path: Path) -> None:
    path = write_episode(tmp_path / "a.h5", [0, 1, 2, 3, 5, 6])
    with pytest.raises(ValueError, match=r"a\.h5: step 4 is missing after step_3"):
        EpisodeFile(path)
    with EpisodeFile(path, EpisodeSettings(allow_gaps=True)) as episode:
        assert_all_frames(episode)
    with EpisodeFile(write_episode(tmp_path / "b.h5", range(5, 35, 5))) as episode:  # every fifth: no gap
        assert_all_frames(episode)


def test_soft_links_are_followed_within_the_file(tmp_path: Path) -> None:
    path = write_episode(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file.move("step_2", "hidden")
        file["step_2"] = h5py.SoftLink("/hidden")
        file.move("step_3/obs/image", "step_3/obs/pixels")
        file["step_3/obs/image"] = h5py.SoftLink("pixels")
    with EpisodeFile(path) as episode:
        assert_all_frames(episode)


def external_link(path: Path) -> None:
    secret = write_episode(path.parent / "elsewhere" / "secret.h5")
    with h5py.File(path, "r+") as file:
        del file["step_1"]
        file["step_1"] = h5py.ExternalLink(str(secret), "step_1")


def external_images(path: Path) -> None:
    secret = write_episode(path.parent / "elsewhere" / "secret.h5")
    with h5py.File(path, "r+") as file:
        del file["step_1/obs/image"]
        file["step_1/obs/image"] = h5py.ExternalLink(str(secret), "step_1/obs/image")


def external_storage(path: Path) -> None:
    raw = path.parent / "secret.raw"
    raw.write_bytes(bytes(V * 3 * H * W))
    with h5py.File(path, "r+") as file:
        del file["step_1/obs/image"]
        stored = [(str(raw), 0, V * 3 * H * W)]
        file.create_dataset("step_1/obs/image", (1, V, 3, H, W), "u1", external=stored)


def virtual_images(path: Path) -> None:
    secret = write_episode(path.parent / "elsewhere" / "secret.h5")
    layout = h5py.VirtualLayout((1, V, 3, H, W), "u1")
    layout[:] = h5py.VirtualSource(str(secret), "step_1/obs/image", (1, V, 3, H, W))
    with h5py.File(path, "r+") as file:
        del file["step_1/obs/image"]
        file.create_virtual_dataset("step_1/obs/image", layout)


def circle(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["step_1/obs"]
        file["step_1/obs"] = h5py.SoftLink("/step_1/obs")


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            for name, value in changes.items():
                where = name.replace("__", "/")
                if where in file:
                    del file[where]
                if value is not None:
                    file[where] = value

    return edit


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwritten(path: Path) -> None:
    """The compressed data of a chunk are not what they were."""
    with h5py.File(path, "r") as file:
        place = file["step_1/obs/image"].id.get_chunk_info(0)
    with path.open("r+b") as raw:
        raw.seek(place.byte_offset)
        raw.write(b"\xff" * place.size)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (lambda path: path.write_bytes(b"") and None, "the file is empty"),
    "not hdf5": (lambda path: path.write_bytes(b"nothing of this kind" * 99) and None, "not an HDF5 file"),
    "truncated": (truncated, "truncated"),
    "damaged data": (overwritten, "inflate|filter|read data"),
    "no steps": (edited(**{f"step_{n}": None for n in range(T)}), "no numbered groups of steps.*found nothing"),
    "no images": (edited(step_4__obs__image=None), "step_4 has no dataset obs/image"),
    "a group for images": (edited(step_4__obs__image=None, step_4__obs__image__x=1), "step_4 has no dataset"),
    "a dataset for a step": (edited(step_4=1), "step_4 is not a group"),
    "another shape": (
        edited(step_4__obs__image=np.zeros((1, 1, 3, H, W), "u1")),
        r"step_4/obs/image is uint8 \(1, 1",
    ),
    "another type": (edited(step_4__obs__image=np.zeros((1, V, 3, H, W), "f4")), "step_4/obs/image is float32"),
    "the same number": (edited(step_04__obs__image=np.zeros((1, V, 3, H, W), "u1")), "have the same number"),
    "all one channel": (
        edited(**{f"step_{n}__obs__image": np.zeros((1, V, 1, H, W), "u1") for n in range(T)}),
        r"obs/image: shape \(1, 2, 1, 24, 32\)",
    ),
    "all int16": (
        edited(**{f"step_{n}__obs__image": np.zeros((1, V, 3, H, W), "i2") for n in range(T)}),
        "int16, expected uint8 or float",
    ),
    "a batch of two": (
        edited(**{f"step_{n}__obs__image": np.zeros((2, V, 3, H, W), "u1") for n in range(T)}),
        "batch of 1",
    ),
    "external link": (external_link, "step_1 is a link to another file, which is not followed"),
    "external images": (external_images, "obs/image is a link to another file"),
    "external storage": (external_storage, "step_1/obs/image: its data lie in another file"),
    "virtual": (virtual_images, "step_1/obs/image: its data lie in another file"),
    "links in a circle": (circle, "links go in a circle"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_get_one_line_that_names_them(tmp_path: Path, kind: str) -> None:
    path = write_episode(tmp_path / "bad.h5", compression="gzip")
    edit, told = BROKEN[kind]
    edit(path)
    with pytest.raises(ValueError, match=told) as error:
        read_all(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_step_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.h5"
    with h5py.File(path, "w") as file:
        shape = (1, 1, 3, 30_000, 30_000)
        file.create_dataset("step_0/obs/image", shape, "u1", chunks=(1, 1, 1, 1000, 1000), compression="gzip")
    with pytest.raises(ValueError, match=r"2\.5 GiB of images in one step"):
        EpisodeFile(path)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        EpisodeFile(tmp_path / "none.h5")
    with pytest.raises(IsADirectoryError):
        EpisodeFile(tmp_path)
    path = write_episode(tmp_path / "a.h5")
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as HDF5 does while it writes
        with pytest.raises(ValueError, match=r"a\.h5: .*lock"):
            open_hdf5(path)


def test_fps(tmp_path: Path) -> None:
    with EpisodeFile(write_episode(tmp_path / "a.h5")) as episode:
        assert episode.fps is None
    path = write_episode(tmp_path / "b.h5", fps=25)
    with EpisodeFile(path) as episode:
        assert episode.fps == 25.0
    with h5py.File(path, "r+") as file:
        file["step_4/obs"].attrs["fps"] = np.array([25.0])
    with EpisodeFile(path) as episode:
        assert episode.fps == 25.0
    with h5py.File(path, "r+") as file:
        file["step_4/obs/image"].attrs["fps"] = 30
    with (
        EpisodeFile(path) as episode,
        pytest.raises(ValueError, match=r"b\.h5: two different fps: 25 in /, 30 in"),
    ):
        _ = episode.fps


@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf, "30", [30, 31]])
def test_fps_that_makes_no_sense(tmp_path: Path, value: object) -> None:
    path = write_episode(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file.attrs["fps"] = value
    with EpisodeFile(path) as episode, pytest.raises(ValueError, match="attribute fps of /: expected a positive"):
        _ = episode.fps


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"step_pattern": "step"}, "step_pattern"),
        ({"step_pattern": "{}/step"}, "step_pattern"),
        ({"axes": "b v c h"}, "axes"),
        ({"axes": "c h w w"}, "axes"),
        ({"axes": "c h w t"}, "axes"),
        ({"value_range": 2}, "value_range"),
        ({"image_key": "/"}, "image_key"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        EpisodeSettings(**settings)


def test_bytes_are_not_in_0_to_1(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="uint8, for which value_range 1 makes no sense"):
        EpisodeFile(write_episode(tmp_path / "a.h5"), EpisodeSettings(value_range=1))


def test_frames_and_cameras_that_are_not_there(tmp_path: Path) -> None:
    with EpisodeFile(write_episode(tmp_path / "a.h5")) as episode:
        for t, camera in ((-1, 0), (T, 0), (0, -1), (0, V)):
            with pytest.raises(ValueError, match="expected 0 to"):
                episode.frame(t, camera)


def test_finding_episodes(tmp_path: Path) -> None:
    for name in ("run_10.h5", "run_9.hdf5", "day/run_2.h5", "same.h5", "same.hdf5", ".hidden.h5", "notes.txt"):
        write_episode(tmp_path / name, range(1))
    found = find_episodes(tmp_path)
    assert list(found) == ["day/run_2", "run_9", "run_10", "same.h5", "same.hdf5"]
    assert found["day/run_2"] == tmp_path / "day" / "run_2.h5"
    assert find_episodes(tmp_path / "run_10.h5") == {"run_10": tmp_path / "run_10.h5"}
    with pytest.raises(FileNotFoundError):
        find_episodes(tmp_path / "none")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"no \.h5 or \.hdf5 files"):
        find_episodes(tmp_path / "nothing")


def test_fingerprints_tell_recordings_apart(tmp_path: Path) -> None:
    first = write_episode(tmp_path / "a.h5", compression="gzip")
    same = write_episode(tmp_path / "b.h5", compression="gzip")
    other = write_episode(tmp_path / "c.h5", change=lambda a: a + 1, compression="gzip")
    assert fingerprint(first) == fingerprint(same) != fingerprint(other)
    truncated(same)
    assert fingerprint(first) != fingerprint(same)


def test_without_h5py_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def importing(name: str, *rest: Any, **more: Any) -> Any:
        if name == "h5py":
            raise ImportError("no h5py")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(ImportError, match=r'pip install "trackbench\[robotics\]"'):
        import_h5py()
