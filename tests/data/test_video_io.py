"""Videos of many formats against OpenCV, folders of images, and writing against reading."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from trackbench.data.video_io import VideoReader, read_video, write_video

# name: (frames, height, width, frames per second), the same by PyAV 18.1
FORMATS = {
    "animated.gif": (4, 48, 64, 10),
    "av1_video.mkv": (125, 360, 640, 25),
    "bt709_full_range.mp4": (30, 720, 1280, 30),
    "h264_10bits.mp4": (30, 200, 200, 30),
    "h265_video.mp4": (10, 128, 128, 10),
    "nasa_13013.mp4": (325, 180, 320, 25),
    "nasa_13013_hdr.mp4": (325, 180, 320, 25),
    "nasa_13013_rotated.mp4": (17, 480, 270, 29.97),
    "test_non_zero_start.mp4": (12, 112, 200, 30),
    "testsrc2_mpeg4.avi": (30, 720, 1280, 30),
    "testsrc2_odd_height_and_width_444.mp4": (25, 241, 321, 25),
    "testsrc2_vp8.webm": (30, 720, 1280, 30),
    "testsrc2_vp9.webm": (30, 720, 1280, 30),
}
OTHER_COLOURS_IN_OPENCV = {"h264_10bits.mp4", "nasa_13013_hdr.mp4"}  # more than 8 bits
UNKNOWN_TO_OPENCV = {"av1_video.mkv"}


def opencv_frames(path: Path) -> np.ndarray:
    capture, frames = cv2.VideoCapture(str(path)), []
    while (answer := capture.read())[0]:
        frames.append(answer[1][..., ::-1])
    return np.stack(frames)


def moving_gradient(num_frames: int = 8, height: int = 48, width: int = 64) -> np.ndarray:
    y, x, t = np.ogrid[:height, :width, :num_frames]
    red = (x * 3 + y * 0 + t * 4).transpose(2, 0, 1)
    green = (x * 0 + y * 4 + t * 2).transpose(2, 0, 1)
    return np.stack([red, green, np.full_like(red, 90)], axis=-1).clip(0, 255).astype(np.uint8)


def test_the_table_names_every_file(realdata) -> None:
    assert {file.name for file in (realdata / "video_formats").iterdir()} == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_reads_every_format(realdata, name) -> None:
    path = realdata / "video_formats" / name
    num_frames, height, width, fps = FORMATS[name]
    reader = VideoReader(path)
    assert (reader.height, reader.width, reader.fps) == (height, width, fps)
    video = read_video(path)
    assert video.shape == (num_frames, height, width, 3)
    assert video.dtype == np.uint8
    if name in UNKNOWN_TO_OPENCV:
        return
    expected = opencv_frames(path)
    assert expected.shape == video.shape
    if name in OTHER_COLOURS_IN_OPENCV:
        for frame, other in zip(video, expected, strict=True):
            grey, other_grey = (cv2.cvtColor(np.array(image), cv2.COLOR_RGB2GRAY) for image in (frame, other))
            assert np.corrcoef(grey.ravel(), other_grey.ravel())[0, 1] > 0.95
    else:
        np.testing.assert_array_equal(video, expected)


def test_reader_is_lazy_repeatable_and_learns_its_length(realdata) -> None:
    reader = VideoReader(realdata / "video_formats/h265_video.mp4")
    with pytest.raises(TypeError, match=r"h265_video\.mp4: the number of frames is known only after reading"):
        len(reader)
    start = list(itertools.islice(reader, 3))
    with pytest.raises(TypeError):
        len(reader)
    whole = np.stack(list(reader))
    assert len(reader) == 10
    np.testing.assert_array_equal(np.stack(start), whole[:3])
    np.testing.assert_array_equal(np.stack(list(reader)), whole)


def test_max_frames(realdata) -> None:
    path = realdata / "clips/motocross.mp4"
    np.testing.assert_array_equal(read_video(path, max_frames=5), read_video(path)[:5])
    assert len(read_video(path, max_frames=1000)) == 60
    with pytest.raises(ValueError, match="max_frames must be at least 1, got 0"):
        read_video(path, max_frames=0)


def test_names_of_files_are_only_names(tmp_path) -> None:
    for name in ("-y.mp4", "concat:a|b.mp4", "a%03d.mp4", "with space & 'quote'.mp4", "http:x.mp4"):
        write_video(tmp_path / name, moving_gradient(3), fps=10)
        assert read_video(tmp_path / name).shape == (3, 48, 64, 3)


def test_folder_of_images_in_natural_order(tmp_path) -> None:
    video = moving_gradient(12)
    for t, frame in enumerate(video):
        Image.fromarray(frame).save(tmp_path / f"frame{t}.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "sub.png").mkdir()
    reader = VideoReader(tmp_path)
    assert (len(reader), reader.height, reader.width, reader.fps) == (12, 48, 64, None)
    np.testing.assert_array_equal(read_video(tmp_path), video)
    np.testing.assert_array_equal(read_video(tmp_path, max_frames=3), video[:3])


def test_images_of_a_folder_become_rgb(tmp_path) -> None:
    grey = moving_gradient(1)[0, ..., 0]
    Image.fromarray(grey).save(tmp_path / "1.png")
    Image.fromarray(np.dstack([grey, grey, grey, np.full_like(grey, 7)])).save(tmp_path / "2.PNG")
    np.testing.assert_array_equal(read_video(tmp_path), np.repeat(grey[None, ..., None], 3, axis=-1).repeat(2, 0))


def test_names_what_is_wrong_with_a_folder(tmp_path) -> None:
    with pytest.raises(ValueError, match="no images in this folder"):
        read_video(tmp_path)
    frame = moving_gradient(1)[0]
    Image.fromarray(frame).save(tmp_path / "1.png")
    Image.fromarray(frame[:20]).save(tmp_path / "2.png")
    with pytest.raises(ValueError, match="frame 1 is 20 x 64, the first one 48 x 64"):
        read_video(tmp_path)
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"2\.png: not a readable image"):
        read_video(tmp_path)
    Image.fromarray(frame[..., 0].astype(np.uint16)).save(tmp_path / "2.png")
    with pytest.raises(ValueError, match=r"2\.png: expected 8 bits per channel"):
        read_video(tmp_path)


def test_what_is_no_video_is_refused_by_name(tmp_path, realdata) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.mp4: no such file"):
        read_video(tmp_path / "absent.mp4")
    for content in (b"", b"no video at all", bytes(5000)):
        (tmp_path / "text.mp4").write_bytes(content)
        with pytest.raises(ValueError, match=r"text\.mp4: not a video with at least one frame"):
            read_video(tmp_path / "text.mp4")


@pytest.mark.parametrize(
    "name", ["clips/motocross.mp4", "video_formats/testsrc2_mpeg4.avi", "video_formats/testsrc2_vp9.webm"]
)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_cut_file_is_a_value_error(realdata, tmp_path, name, share) -> None:
    whole = (realdata / name).read_bytes()
    cut = tmp_path / f"cut{Path(name).suffix}"
    cut.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"cut\.\w+: (not a video|damaged or cut off)"):
        read_video(cut)


def test_cut_file_with_its_index_in_front_is_a_value_error(tmp_path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "whole.mp4", noise, fps=10)
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ValueError, match=r"cut\.mp4: damaged or cut off, \d frames were read"):
        read_video(tmp_path / "cut.mp4")


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 63), (47, 64), (1, 1)])
def test_written_video_is_read_back(tmp_path, height, width) -> None:
    video = moving_gradient(8, height, width)
    write_video(tmp_path / "new/clip.mp4", iter(video), fps=12.5)
    read = read_video(tmp_path / "new/clip.mp4")
    assert read.shape == (8, height + height % 2, width + width % 2, 3)
    padded = np.pad(video, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    assert np.abs(read.astype(int) - padded).mean() < 3
    assert VideoReader(tmp_path / "new/clip.mp4").fps == 12.5
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["clip.mp4"]


def test_written_video_is_what_browsers_play(tmp_path) -> None:
    write_video(tmp_path / "clip.mp4", moving_gradient(), fps=30)
    content = (tmp_path / "clip.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "index in front: playable while loading"
    assert b"avc1" in content, "H.264"
    profile = content[content.index(b"avcC") + 5]
    assert profile in (66, 77, 100), "baseline, main or high: 4:2:0 with 8 bits"
    capture = cv2.VideoCapture(str(tmp_path / "clip.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == 30
    assert np.abs(opencv_frames(tmp_path / "clip.mp4").astype(int) - moving_gradient()).mean() < 3


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "there are no frames to write"),
        ([np.zeros((4, 4, 3))], r"frames must be uint8 \(H, W, 3\), got float64"),
        ([np.zeros((4, 4), np.uint8)], r"frames must be uint8 \(H, W, 3\)"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)], r"a frame is \(4, 6\)"),
    ],
)
def test_unwritable_frames_leave_the_old_file_alone(tmp_path, frames, message) -> None:
    old = tmp_path / "clip.mp4"
    old.write_bytes(b"old")
    with pytest.raises(ValueError, match=rf"clip\.mp4: {message}"):
        write_video(old, frames, fps=10)
    assert old.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [old]


def test_refuses_other_names_and_rates(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"clip\.avi: expected a name that ends in \.mp4"):
        write_video(tmp_path / "clip.avi", moving_gradient(), fps=10)
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"clip\.mp4: fps must be positive"):
            write_video(tmp_path / "clip.mp4", moving_gradient(), fps=fps)


def test_copy_of_a_clip_keeps_its_frames(realdata, tmp_path) -> None:
    source = tmp_path / "source.mp4"
    shutil.copy(realdata / "clips/motocross.mp4", source)
    reader = VideoReader(source)
    assert reader.fps is not None
    write_video(source, reader, fps=reader.fps)
    again = read_video(source)
    assert again.shape == (60, 384, 512, 3)
    assert np.abs(again.astype(int) - read_video(realdata / "clips/motocross.mp4")).mean() < 4
