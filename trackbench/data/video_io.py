"""Video files and folders of images, in and out, frame by frame.

Files go through the ffmpeg program of ``imageio-ffmpeg`` (or the one named by its variable
``IMAGEIO_FFMPEG_EXE``), so that every machine decodes alike. Reading takes the frames as PPM images from a
pipe: they carry their own size, rotation applied.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import IO

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from trackbench.files import natural_order, written_whole

Frame = NDArray[np.uint8]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"})
_FRAME_RATE = re.compile(r"Stream #.*Video:.*?, ([\d.]+)(k?) fps")
_PPM_HEADER = re.compile(rb"P6\s(\d+) (\d+)\s255\n")


class VideoReader:
    """The frames of a video, one in memory at a time.

    Iterate over it for the frames, uint8 (H, W, 3) RGB; each iteration starts at the first frame. Of a file,
    it is the first video stream, rotated as the file asks, each stored frame once (also where frames last
    differently long), in 8 bit, without tone mapping. Of a folder, the images in natural order ("2.png"
    before "10.png").

    ``len`` is known for a folder, and for a file once it was read to its end: containers only estimate it.

    Args:
        path: a video file, or a folder of images.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: no video, or one without any frame. Also while iterating: a file that ends early or is
            damaged, and
            images of different sizes.

    Attributes:
        path: where it comes from.
        height: of the frames, pixels.
        width: of the frames, pixels.
        fps: frames per second to two decimals; None for a folder.
    """

    path: Path
    height: int
    width: int
    fps: float | None

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self._length: int | None = None
        self._images: list[Path] = []
        if self.path.is_dir():
            self._images = _images_in(self.path)
            self._length = len(self._images)
            self.fps = None
            self.height, self.width = _read_image(self._images[0]).shape[:2]
        elif self.path.is_file():
            self.fps, self.height, self.width = _probe(self.path)
        else:
            raise FileNotFoundError(f"{self.path}: no such file or folder")

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError(f"{self.path}: the number of frames is known only after reading them")
        return self._length

    def __iter__(self) -> Iterator[Frame]:
        count = 0
        for count, frame in enumerate(self._frames(), start=1):
            if frame.shape != (self.height, self.width, 3):
                raise ValueError(
                    f"{self.path}: frame {count - 1} is {frame.shape[0]} x {frame.shape[1]}, "
                    f"the first one {self.height} x {self.width}"
                )
            yield frame
        self._length = count

    def _frames(self) -> Iterator[Frame]:
        if self._images:
            return (_read_image(image) for image in self._images)
        return _decode(self.path)


def read_video(path: str | PathLike[str], max_frames: int | None = None) -> NDArray[np.uint8]:
    """Read a video file or a folder of images; see :class:`VideoReader`.

    Args:
        path: a video file, or a folder of images.
        max_frames: stop after so many frames; None: read all.

    Returns:
        (T, H, W, 3) uint8, RGB.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: as :class:`VideoReader`, or ``max_frames`` below 1.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames must be at least 1, got {max_frames}")
    return np.stack(list(itertools.islice(VideoReader(path), max_frames)))


def write_video(path: str | PathLike[str], frames: Iterable[Frame], fps: float) -> None:
    """Write an H.264 ``.mp4`` that browsers play (yuv420p, BT.709, index at the front).

    That format needs even sides: an odd one grows by a copy of its last row or column. The file appears at
    ``path`` only when it is complete.

    Args:
        path: file to write, ending in ``.mp4``; an existing one is replaced. Its folder is made if needed.
        frames: (T, H, W, 3) uint8 RGB, or any iterable of (H, W, 3) frames of one size, taken one at a time.
        fps: frames per second.

    Raises:
        ValueError: another suffix, no frames, frames of another type or shape, or ``fps`` that is not
        positive. RuntimeError: ffmpeg failed.
    """
    import mediapy  # here, as it is slow to load and readers have no use for it

    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"{path}: expected a name that ends in .mp4")
    if not 0 < fps < float("inf"):
        raise ValueError(f"{path}: fps must be positive, got {fps}")
    remaining = iter(frames)
    first = next(remaining, None)
    if first is None:
        raise ValueError(f"{path}: there are no frames to write")
    height, width = _checked_frame(first, path).shape[:2]
    padding = ((0, height % 2), (0, width % 2), (0, 0))

    mediapy.set_ffmpeg(imageio_ffmpeg.get_ffmpeg_exe())
    try:
        with (
            written_whole(path) as unfinished,
            mediapy.VideoWriter(
                unfinished,
                (height + height % 2, width + width % 2),
                fps=fps,
                crf=18,
                encoded_format="yuv420p",
                ffmpeg_args=FOR_BROWSERS,
            ) as writer,
        ):
            for frame in itertools.chain([first], remaining):
                if _checked_frame(frame, path).shape[:2] != (height, width):
                    raise ValueError(f"{path}: a frame is {frame.shape[:2]}, the first one {(height, width)}")
                writer.add_image(np.pad(frame, padding, mode="edge"))
    except BrokenPipeError as error:
        raise RuntimeError(f"{path}: ffmpeg stopped before all frames were written") from error


_BT709 = ("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv")
FOR_BROWSERS = ("-vf", "scale=out_color_matrix=bt709:out_range=tv", *_BT709, "-movflags", "+faststart")


def _checked_frame(frame: Frame, path: Path) -> Frame:
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        raise ValueError(f"{path}: frames must be uint8 (H, W, 3), got {frame.dtype} {frame.shape}")
    return frame


def _images_in(folder: Path) -> list[Path]:
    images = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
    if not images:
        raise ValueError(f"{folder}: no images in this folder, expected {', '.join(sorted(IMAGE_SUFFIXES))}")
    return sorted(images, key=lambda file: natural_order(file.name))


def _read_image(path: Path) -> Frame:
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"{path}: expected 8 bits per channel, got mode {image.mode}")
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's for damaged files
        raise ValueError(f"{path}: not a readable image: {error}") from error


def _probe(path: Path) -> tuple[float, int, int]:
    """Frame rate, height and width, from decoding the first frame."""
    with _ffmpeg(path, "info", ["-frames:v", "1"]) as (pipe, log):
        frame = _next_frame(pipe)
        pipe.read()
        messages = log()
    if frame is None:
        raise ValueError(f"{path}: not a video with at least one frame: {_last_lines(messages)}")
    _, _, about_output = messages.partition("Output #0")
    rate = _FRAME_RATE.search(about_output)
    if rate is None:
        raise ValueError(f"{path}: no frame rate in the answer of ffmpeg: {_last_lines(messages)}")
    return float(rate[1]) * (1000 if rate[2] else 1), *frame.shape[:2]


def _decode(path: Path) -> Iterator[Frame]:
    with _ffmpeg(path, "error") as (pipe, log):
        count = 0
        while (frame := _next_frame(pipe)) is not None:
            count += 1
            yield frame
        problems = log()
    if problems:
        raise ValueError(f"{path}: damaged or cut off, {count} frames were read: {_last_lines(problems)}")


@contextmanager
def _ffmpeg(
    path: Path, verbosity: str, output_options: Sequence[str] = ()
) -> Iterator[tuple[IO[bytes], Callable[[], str]]]:
    """Run ffmpeg on the first video stream.

    Gives its output, PPM images, and a function that waits for its end and gives its messages.
    """
    with tempfile.TemporaryFile() as messages:  # not a pipe: nobody reads it until the end
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-nostats", "-v", verbosity]
        command += ["-i", f"file:{path}", *output_options, "-map", "0:V:0", "-fps_mode", "passthrough"]
        command += ["-c:v", "ppm", "-pix_fmt", "rgb24", "-f", "image2pipe", "-"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages)
        assert process.stdout is not None

        def log() -> str:
            code = process.wait()
            messages.seek(0)
            text = messages.read().decode(errors="replace").strip()
            return text if text or code == 0 else f"ffmpeg ended with code {code}"

        try:
            yield process.stdout, log
        finally:
            process.stdout.close()
            process.kill()
            process.wait()


def _next_frame(pipe: IO[bytes]) -> Frame | None:
    lines = [pipe.readline() for _ in range(3)]
    header = _PPM_HEADER.fullmatch(b"".join(lines))
    if header is None:
        return None
    width, height = int(header[1]), int(header[2])
    data = pipe.read(width * height * 3)
    if len(data) != width * height * 3:
        return None
    return np.frombuffer(bytearray(data), np.uint8).reshape(height, width, 3)


def _last_lines(messages: str) -> str:
    return "; ".join(messages.strip().splitlines()[-3:]) or "ffmpeg gave no reason"
