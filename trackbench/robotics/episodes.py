"""Episodes in HDF5 files: numbered groups of steps, each with a dataset of images; read-only, one step at a time.

Files come from elsewhere. Images are read from the file itself: nothing that a file says makes the reader open
another one (external links, external storage and virtual datasets are refused, for images).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trackbench.files import natural_order

SUFFIXES = (".h5", ".hdf5")
USUAL_IMAGE = "obs/image"
LARGEST_STEP = 2**30  # bytes of images in one step: more is a damaged or hostile file

_AXES = frozenset("bvchw")
_NUMBERED = re.compile(r"(.*?)(\d{1,18})")
_LEAST_SIDE = 8  # pixels, of what is taken for an image unasked
_SAMPLED_STEPS = 8  # what the range of float images is inferred from
_MOST_OBJECTS, _DEEPEST = 10_000, 8  # bounds of the search for images in a step
_FINGERPRINT_BLOCKS, _BLOCK = 64, 4096

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class EpisodeSettings:
    """How episodes are laid out, where that is not to be inferred from the file.

    Attributes:
        image_key: name of the image dataset within a step, e.g. ``"obs/image"``. Inferred: that name, or else the
            only dataset of the first step that looks like images.
        step_pattern: name of the steps' groups with ``{}`` for the number, e.g. ``"step_{}"`` or
            ``"data/frame_{}"``. Inferred: the only series of numbered groups in the file, or in one of its groups,
            that holds images.
        axes: letters of the image dataset's axes: ``b`` batch (of 1), ``v`` cameras, ``c`` channels (RGB),
            ``h`` height, ``w`` width, e.g. ``"b v c h w"``. Inferred: the axis of 3 before or after h and w.
        value_range: value of white, 1 or 255. Inferred: 255 for uint8; for floats from the values of some steps.
        allow_gaps: take steps with uneven gaps in their numbers as they are. Numbers that all differ by the same
            amount are no gaps.
    """

    image_key: str | None = None
    step_pattern: str | None = None
    axes: str | None = None
    value_range: int | None = None
    allow_gaps: bool = False

    def __post_init__(self) -> None:
        if self.image_key is not None and not self.image_key.strip("/"):
            raise ValueError("image_key: expected a name such as obs/image")
        if self.step_pattern is not None and self.step_pattern.rpartition("/")[2].count("{}") != 1:
            raise ValueError(f"step_pattern {self.step_pattern!r}: expected one {{}}, as in step_{{}}")
        if self.axes is not None:
            axes = self.axes.split()
            if len(set(axes)) != len(axes) or not {"c", "h", "w"} <= set(axes) <= _AXES:
                raise ValueError(f"axes {self.axes!r}: expected c h w and at most b v, as in 'b v c h w'")
        if self.value_range not in (None, 1, 255):
            raise ValueError(f"value_range {self.value_range}: expected 1 or 255")


INFERRED = EpisodeSettings()


class EpisodeFile:
    """An episode, open for reading; a context manager.

    Args:
        path: the HDF5 file; it is opened read-only.
        settings: of its layout.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty, damaged or no HDF5; it holds no steps with images, or steps that do not belong
            together (missing ones, another shape or type); the settings do not fit. One line that names the file.

    Attributes:
        path: the file.
        steps: names of the groups of the steps, in numeric order.
        image_key: name of the image dataset within a step.
        axes: of the image datasets, e.g. ``"b v c h w"``.
        num_frames: T.
        cameras: number of cameras.
        height: pixels.
        width: pixels.
    """

    path: Path
    steps: tuple[str, ...]
    image_key: str
    axes: str
    num_frames: int
    cameras: int
    height: int
    width: int

    def __init__(self, path: Path, settings: EpisodeSettings = INFERRED) -> None:
        self.path = Path(path)
        self._file = open_hdf5(self.path)
        self._settings = settings
        try:
            with self._naming_file():
                self._find_steps()
                self._check_images()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> EpisodeFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @cached_property
    def fps(self) -> float | None:
        """Frames per second: the attribute ``fps`` of the file, one of its groups or its images; None without.

        Raises:
            ValueError: it is no positive number, or there are two different ones.
        """
        with self._naming_file():
            found: dict[float, str] = {}
            for name, value in self._fps_attributes:
                found.setdefault(_positive(value, f"attribute fps of {name}"), name)
            if len(found) > 1:
                told = ", ".join(f"{value:g} in {name}" for value, name in list(found.items())[:2])
                raise ValueError(f"two different fps: {told}")
            return next(iter(found), None)

    @cached_property
    def value_range(self) -> int:
        """Value of white, 1 or 255, for all steps.

        Raises:
            ValueError: the values of float images fit neither.
        """
        if self._settings.value_range is not None:
            return self._settings.value_range
        if self._dtype == np.uint8:
            return 255
        with self._naming_file():
            chosen = np.unique(np.linspace(0, self.num_frames - 1, _SAMPLED_STEPS).round().astype(int))
            highest = max(float(np.max(self._raw(int(t), None))) for t in chosen)
            if highest <= 1.01:
                return 1
            if 2 < highest <= 255.5:
                return 255
            raise ValueError(
                f"{self.image_key}: values up to {highest:g}, neither in [0, 1] nor in [0, 255]; set value_range"
            )

    def images(self, t: int) -> Images:
        """The images of all cameras at frame t: (cameras, H, W, 3) uint8; a view, not contiguous in general.

        Raises:
            ValueError: the data are damaged, or values lie outside the range that holds for the episode.
        """
        return self._read(t, None)

    def frame(self, t: int, camera: int) -> Images:
        """The image of a camera at frame t: (H, W, 3) uint8. Raises as :meth:`images`."""
        if not 0 <= camera < self.cameras:
            raise ValueError(f"{self.path}: camera {camera}: expected 0 to {self.cameras - 1}")
        return np.ascontiguousarray(self._read(t, camera)[0])

    def frames(self, camera: int) -> Iterator[Images]:
        """The images of a camera in order, (H, W, 3) uint8, one in memory at a time. Raises as :meth:`images`."""
        return (self.frame(t, camera) for t in range(self.num_frames))

    def attribute(self, name: str) -> str | None:
        """A text attribute of the file; None without."""
        with self._naming_file():
            value = self._file.attrs.get(name)
        if isinstance(value, bytes):
            return value.decode(errors="replace")
        return value if isinstance(value, str) else None

    def datasets(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Type and shape of the other datasets of the first step, by their names within it.

        Those whose data lie in another file are left out, and what is no array of numbers has the type ``object``.
        """
        with self._naming_file():
            found = {}
            for name, dataset in _datasets(member(self._file, self.steps[0])):
                if name == self.image_key or dataset.external or dataset.is_virtual:
                    continue
                numbers = dataset.shape is not None and dataset.dtype.kind in "biuf"
                found[name] = (dataset.dtype if numbers else np.dtype(object), dataset.shape or ())
            return found

    def value(self, t: int, name: str) -> NDArray[Any]:
        """What a dataset of :meth:`datasets` holds at frame t.

        Raises:
            ValueError: the step does not have it, or in another type or shape.
        """
        with self._naming_file():
            first, here = (member(self._file, f"{self.steps[step]}/{name}") for step in (0, t))
            if not _is_dataset(here) or here.external or here.is_virtual:
                raise ValueError(f"{self.steps[t]} has no {name}, which {self.steps[0]} has")
            if (here.dtype, here.shape) != (first.dtype, first.shape):
                was = f"{first.dtype} {first.shape}"
                raise ValueError(f"{self.steps[t]}/{name} is {here.dtype} {here.shape}, the first step's {was}")
            return here[()]

    def _read(self, t: int, camera: int | None) -> Images:
        if not 0 <= t < self.num_frames:
            raise ValueError(f"{self.path}: frame {t}: expected 0 to {self.num_frames - 1}")
        white = self.value_range
        with self._naming_file():
            raw = self._raw(t, camera)
            if raw.dtype != np.uint8:
                raw = self._to_bytes(raw, t, white)
        axes = self.axes.split()
        if "b" in axes:
            raw = raw.squeeze(axes.index("b"))
            axes.remove("b")
        if "v" not in axes:
            raw, axes = raw[None], ["v", *axes]
        return raw.transpose([axes.index(axis) for axis in "vhwc"])

    def _raw(self, t: int, camera: int | None) -> NDArray[Any]:
        dataset = member(self._file, f"{self.steps[t]}/{self.image_key}")
        axes = self.axes.split()
        if camera is None or "v" not in axes:
            return dataset[()]
        return dataset[tuple(slice(camera, camera + 1) if axis == "v" else slice(None) for axis in axes)]

    def _to_bytes(self, raw: NDArray[Any], t: int, white: int) -> Images:
        low, high = float(raw.min()), float(raw.max())  # NaN, if there is one
        if not (low >= -0.01 * white and high <= 1.01 * white):
            raise ValueError(
                f"{self.steps[t]}/{self.image_key}: values from {low:g} to {high:g}, expected [0, {white}] as in "
                "the whole episode (value_range)"
            )
        scaled = raw * raw.dtype.type(255 / white)
        return np.clip(np.rint(scaled, out=scaled), 0, 255, out=scaled).astype(np.uint8)

    def _find_steps(self) -> None:
        """Set ``steps`` and ``image_key``."""
        if self._settings.step_pattern is not None:
            above, _, name = self._settings.step_pattern.rpartition("/")
            parent = member(self._file, above) if above else self._file
            prefix, suffix = name.split("{}")
            series = _series(parent, above, prefix, suffix) if _is_group(parent) else {}
            if not series:
                raise ValueError(f"no groups {self._settings.step_pattern}; found {_listed(self._file)}")
            self.steps = self._in_order(series)
            self.image_key = self._find_image(self.steps[0])
            return
        without: list[dict[int, str]] = []
        for depth in (0, 1):
            groups = [("", self._file)] if depth == 0 else list(_members(self._file))
            every = [series for above, group in groups if _is_group(group) for series in _all_series(group, above)]
            holding = [series for series in every if self._holds_images(series)]
            if len(holding) > 1:
                told = " and ".join(f"{series[min(series)]}..." for series in holding[:2])
                raise ValueError(f"several series of steps hold images, {told}; set step_pattern")
            if holding:
                self.steps = self._in_order(holding[0])
                self.image_key = self._find_image(self.steps[0])
                return
            without += every
        if without:
            self._find_image(without[0][min(without[0])])  # says what it has instead
        raise ValueError(f"no numbered groups of steps, such as step_0; found {_listed(self._file)}")

    def _holds_images(self, series: dict[int, str]) -> bool:
        try:
            self._find_image(series[min(series)])
        except ValueError:
            return False
        return True

    def _in_order(self, series: dict[int, str]) -> tuple[str, ...]:
        numbers = sorted(series)
        strides = np.diff(numbers)
        if len(strides) and not self._settings.allow_gaps and strides.min() != strides.max():
            stride = int(strides.min())
            before = numbers[int(np.argmax(strides != stride))]
            raise ValueError(
                f"step {before + stride} is missing after {series[before]}; allow_gaps takes the rest as it is"
            )
        return tuple(series[number] for number in numbers)

    def _find_image(self, step: str) -> str:
        """The name of the image dataset within a step's group."""
        group = member(self._file, step)
        if self._settings.image_key is not None:
            return self._settings.image_key.strip("/")
        if _is_dataset(member(group, USUAL_IMAGE)):
            return USUAL_IMAGE
        datasets = dict(_datasets(group))
        looking = [name for name, dataset in datasets.items() if self._looks_like_images(dataset)]
        if len(looking) == 1:
            return looking[0]
        if looking:
            raise ValueError(f"{step}: several datasets look like images, {', '.join(looking[:5])}; set image_key")
        told = ", ".join(f"{name} {dataset.dtype} {dataset.shape}" for name, dataset in list(datasets.items())[:5])
        raise ValueError(f"{step}: no dataset looks like RGB images; found {told or 'no dataset'}")

    def _looks_like_images(self, dataset: Any) -> bool:
        try:
            axes = self._settings.axes or _infer_axes(dataset.shape)
            sizes = _sizes(dataset.shape, axes)
        except ValueError:
            return False
        return _is_image_type(dataset.dtype) and min(sizes["h"], sizes["w"]) >= _LEAST_SIDE

    def _check_images(self) -> None:
        """All steps hold images of one shape and type; what is said of fps on the way is kept."""
        places = [("/", self._file)]
        places += [(name, item) for name, item in _members(self._file, set(self.steps)) if _is_group(item)]
        self._fps_attributes = [(name, item.attrs["fps"]) for name, item in places if "fps" in item.attrs]
        above, _, last = self.image_key.rpartition("/")
        shape = None
        for step in self.steps:
            name = f"{step}/{self.image_key}"
            group = member(self._file, step)
            inner = member(group, above)
            dataset: Any = None if inner is None else member(inner, last)
            places = [(step, group), (f"{step}/{above}", inner), (name, dataset)]
            self._fps_attributes += [
                (at, item.attrs["fps"]) for at, item in places if item is not None and "fps" in item.attrs
            ]
            if not _is_dataset(dataset):
                raise ValueError(f"{step} has no dataset {self.image_key}")
            if dataset.external or dataset.is_virtual:
                raise ValueError(f"{name}: its data lie in another file, which is not read")
            if shape is None:
                self._take_layout(dataset, name)
                shape = dataset.shape
            if dataset.shape != shape or dataset.dtype != self._dtype:
                raise ValueError(
                    f"{name} is {dataset.dtype} {dataset.shape}, the first step's {self._dtype} {shape}"
                )
            stored = max(dataset.nbytes, np.prod(dataset.chunks or (0,)) * dataset.dtype.itemsize)
            if stored > LARGEST_STEP:
                raise ValueError(f"{name}: {dataset.nbytes / 2**30:.1f} GiB of images in one step {dataset.shape}")

    def _take_layout(self, dataset: Any, name: str) -> None:
        self._dtype = dataset.dtype
        if not _is_image_type(dataset.dtype):
            raise ValueError(f"{name} is {dataset.dtype}, expected uint8 or float")
        if self._settings.value_range == 1 and dataset.dtype == np.uint8:
            raise ValueError(f"{name} is uint8, for which value_range 1 makes no sense")
        try:
            self.axes = " ".join((self._settings.axes or _infer_axes(dataset.shape)).split())
            sizes = _sizes(dataset.shape, self.axes)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        self.num_frames = len(self.steps)
        self.cameras, self.height, self.width = sizes.get("v", 1), sizes["h"], sizes["w"]

    @contextmanager
    def _naming_file(self) -> Iterator[None]:
        """HDF5's errors, of many types, as one line that names the file."""
        try:
            yield
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, UnicodeError) as error:
            raise ValueError(f"{self.path}: {_one_line(error)}") from error


def find_episodes(source: Path) -> dict[str, Path]:
    """The episode files in a folder and below, by id, in natural order; or the one file.

    The id is the path relative to ``source`` without suffix, with "/" between folders; where two files differ in
    their suffix alone, theirs keep it. Hidden files are left out.

    Raises:
        FileNotFoundError: there is nothing at ``source``.
        ValueError: there are no ``.h5`` or ``.hdf5`` files.
    """
    source = Path(source)
    if source.is_file():
        return {source.stem: source}
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such file or folder")
    files = [
        path.relative_to(source)
        for path in source.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and not path.is_dir()
    ]
    if not files:
        raise ValueError(f"{source}: no {' or '.join(SUFFIXES)} files in this folder")
    short = [file.with_suffix("").as_posix() for file in files]
    names = [file.as_posix() if short.count(name) > 1 else name for file, name in zip(files, short, strict=True)]
    found = sorted(
        zip(names, files, strict=True), key=lambda pair: [natural_order(part) for part in pair[1].parts]
    )
    return {name: source / file for name, file in found}


def fingerprint(path: Path) -> str:
    """What tells another recording from this one at once: the digest of the size and of 64 blocks across the file.

    A change of a few bytes in between can go unnoticed; a file that was recorded again or cut short cannot.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in np.linspace(0, max(0, size - _BLOCK), _FINGERPRINT_BLOCKS).astype(int):
            file.seek(int(start))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def import_h5py() -> Any:
    """The package h5py, an optional dependency.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError('HDF5 files need h5py: pip install "trackbench[robotics]"') from error
    return h5py


def open_hdf5(path: Path) -> Any:
    """An ``h5py.File``, open for reading.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty, damaged, still being written, or no HDF5.
    """
    h5py = import_h5py()
    with path.open("rb") as file:
        start = file.read(1)
    if not start:
        raise ValueError(f"{path}: the file is empty")
    try:
        if not h5py.is_hdf5(path):
            raise ValueError("not an HDF5 file")
        return h5py.File(path, "r")
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: {_one_line(error)}") from error


def member(group: Any, name: str) -> Any:
    """The group or dataset ``name`` below ``group``, through hard and soft links; None where there is none.

    Raises:
        ValueError: an external link is on the way, or soft links go in a circle.
    """
    h5py = import_h5py()
    parts, item, followed = name.split("/")[::-1], group, 0
    while parts:
        part = parts.pop()
        if part in ("", "."):
            continue
        if not _is_group(item):
            return None
        links, encoded = item.id.links, part.encode("utf-8", "surrogateescape")
        if not links.exists(encoded):
            return None
        kind = links.get_info(encoded).type
        if kind == h5py.h5l.TYPE_HARD:
            item = item[part]
        elif kind == h5py.h5l.TYPE_SOFT:
            followed += 1
            if followed > 32:
                raise ValueError(f"{name}: links go in a circle")
            path = item.get(part, getlink=True).path
            parts += path.split("/")[::-1]
            item = item.file if path.startswith("/") else item
        else:
            raise ValueError(f"{item.name.rstrip('/')}/{part} is a link to another file, which is not followed")
    return item


def _members(group: Any, leave_out: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """What hard and soft links of a group lead to, with their names; links to other files are left out."""
    h5py = import_h5py()
    for name in group:
        if name not in leave_out and not isinstance(group.get(name, getlink=True), h5py.ExternalLink):
            item = member(group, name)
            if item is not None:
                yield name, item


def _datasets(group: Any) -> Iterator[tuple[str, Any]]:
    """All datasets below a group, each group entered once, with their names relative to it."""
    h5py = import_h5py()
    entered = set()
    waiting: list[tuple[str, Any]] = [("", group)]
    count = 0
    while waiting:
        above, item = waiting.pop()
        address = h5py.h5o.get_info(item.id).addr
        if address in entered or above.count("/") > _DEEPEST:
            continue
        entered.add(address)
        for name, found in _members(item):
            count += 1
            if count > _MOST_OBJECTS:
                raise ValueError(f"{group.name}: more than {_MOST_OBJECTS} objects in one step; set image_key")
            if _is_group(found):
                waiting.append((f"{above}{name}/", found))
            elif _is_dataset(found):
                yield f"{above}{name}", found


def _series(group: Any, above: str, prefix: str, suffix: str) -> dict[int, str]:
    """The members of a group named by ``prefix``, a number and ``suffix``: full names by number."""
    wanted = re.compile(re.escape(prefix) + r"(\d{1,18})" + re.escape(suffix))
    found: dict[int, str] = {}
    for name in group:
        match = wanted.fullmatch(name)
        if match is None:
            continue
        full = f"{above}/{name}" if above else name
        if not _is_group(member(group, name)):
            raise ValueError(f"{full} is not a group, expected the group of a step")
        if int(match[1]) in found:
            raise ValueError(f"{found[int(match[1])]} and {full} have the same number")
        found[int(match[1])] = full
    return found


def _all_series(group: Any, above: str) -> list[dict[int, str]]:
    """The series of numbered groups in a group, one per prefix."""
    prefixes = []
    for name in group:
        match = _NUMBERED.fullmatch(name)
        if match is not None and match[1] not in prefixes and _is_group(member(group, name)):
            prefixes.append(match[1])
    return [_series(group, above, prefix, "") for prefix in prefixes]


def _infer_axes(shape: tuple[int, ...]) -> str:
    leading = {3: "", 4: "v ", 5: "b v "}.get(len(shape))
    first = len(shape) > 2 and shape[-3] == 3 and min(shape[-2:]) >= _LEAST_SIDE
    last = len(shape) > 2 and shape[-1] == 3 and min(shape[-3:-1]) >= _LEAST_SIDE
    if leading is None or first == last:
        raise ValueError(
            f"shape {tuple(shape)}: expected (1, cameras, 3, H, W), (cameras, 3, H, W), (3, H, W), or with the 3 "
            "last; set axes"
        )
    return leading + ("c h w" if first else "h w c")


def _sizes(shape: tuple[int, ...], axes: str) -> dict[str, int]:
    letters = axes.split()
    if len(letters) != len(shape):
        raise ValueError(f"shape {tuple(shape)} does not have the axes {axes!r}")
    sizes = dict(zip(letters, shape, strict=True))
    if sizes["c"] != 3 or sizes.get("b", 1) != 1 or min(shape) < 1:
        raise ValueError(f"shape {tuple(shape)} with axes {axes!r}: expected a batch of 1 and 3 channels")
    return sizes


def _is_image_type(dtype: Any) -> bool:
    return dtype == np.uint8 or dtype in (np.float16, np.float32, np.float64)


def _is_group(item: Any) -> bool:
    return isinstance(item, import_h5py().Group)


def _is_dataset(item: Any) -> bool:
    return isinstance(item, import_h5py().Dataset)


def _positive(value: Any, name: str) -> float:
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "fiu" or not 0 < float(array.item()) < float("inf"):
        raise ValueError(f"{name}: expected a positive number, got {str(value)[:40]!r}")
    return float(array.item())


def _listed(group: Any) -> str:
    names = list(group)
    return (", ".join(names[:5]) + (", ..." if len(names) > 5 else "")) or "nothing"


def _one_line(error: BaseException) -> str:
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split()) or type(error).__name__
