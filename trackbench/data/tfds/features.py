"""What ``features.json`` says of the features of a data set, and how their values are decoded."""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from trackbench.data.tfds.example import bytes_list, float_list, int_list

Shape = tuple[int | None, ...]
Value = NDArray[Any] | list[NDArray[Any]] | str | list[str]

_RAGGED_VALUES, _RAGGED_LENGTHS = "ragged_flat_values", "ragged_row_lengths_0"
_PNG_START = struct.Struct(">8s4x4sIIBB")  # signature, "IHDR", width, height, bit depth, colour type
_COLOUR_TYPE = {1: 0, 3: 2, 4: 6}  # by channels: grey, RGB, RGB with alpha
_NUMBERS = ("uint8", "uint16", "int32", "int64", "float32", "bool")


@dataclass(frozen=True)
class Feature:
    """One feature of an example.

    Attributes:
        name: its path, such as ``camera/positions``.
        kind: how it is stored: PNG files, a list of numbers, or text.
        dtype: of its values, as numpy names it; ``str`` for text.
        shape: of its values, None where examples differ. For images at least (height, width, channels).
    """

    name: str
    kind: Literal["image", "number", "text"]
    dtype: str
    shape: Shape

    @property
    def is_ragged(self) -> bool:
        """Whether rows differ in length: stored as flat values and row lengths."""
        return self.shape.count(None) > 1

    @property
    def stored(self) -> tuple[str, ...]:
        """The names in a record that hold it."""
        if self.is_ragged and self.kind != "image":
            return f"{self.name}/{_RAGGED_VALUES}", f"{self.name}/{_RAGGED_LENGTHS}"
        return (self.name,)

    def decode(self, stored: Mapping[str, bytes], images: Collection[int] | None = None) -> Value:
        """The value in a record.

        Args:
            stored: a Feature message for each of ``stored``; an empty list may be absent.
            images: the only ones to decode of several images; the others stay zero. None: all.

        Returns:
            An array of ``shape`` and ``dtype``; a list of arrays, one per row, where rows differ in length; a
            string, or a list of strings.

        Raises:
            ValueError: it is of another kind, type or size, or an image is damaged.
        """
        try:
            values = [stored.get(name, b"") for name in self.stored]
            return self._images(bytes_list(values[0]), images) if self.kind == "image" else self._decode(*values)
        except ValueError as error:
            raise ValueError(f"feature {self.name}: {error}") from error

    def _decode(self, values: bytes, row_lengths: bytes = b"") -> Value:
        if self.kind == "text":
            texts = [text.decode() for text in bytes_list(values)]
            if self.shape:
                return texts
            if len(texts) != 1:
                raise ValueError(f"expected 1 text, got {len(texts)}")
            return texts[0]
        numbers = self._numbers(values)
        if not self.is_ragged:
            return _reshaped(numbers, self.shape)
        rows = _reshaped(numbers, self.shape[1:])
        lengths = int_list(row_lengths)
        if (lengths < 0).any() or lengths.sum() != len(rows):
            raise ValueError(f"expected {len(rows)} rows, its row lengths are {lengths.tolist()}")
        return np.split(rows, np.cumsum(lengths)[:-1]) if len(lengths) else []

    def _numbers(self, values: bytes) -> NDArray[Any]:
        dtype = np.dtype(self.dtype)
        if dtype.kind == "f":
            return float_list(values).astype(dtype, copy=False)
        numbers = int_list(values)
        if dtype != np.int64 and len(numbers):
            least, most = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
            if numbers.min() < least or numbers.max() > most:
                raise ValueError(f"expected {dtype} values, got {numbers.min()} to {numbers.max()}")
        return numbers.astype(dtype, copy=False)

    def _images(self, files: list[bytes], wanted: Collection[int] | None) -> NDArray[Any]:
        number = self.shape[0] if len(self.shape) > 3 else 1
        if not files or number not in (None, len(files)):
            raise ValueError(f"expected {number or 'some'} images, got {len(files)}")
        height, width, channels = self.shape[-3:]
        if channels not in _COLOUR_TYPE or self.dtype not in ("uint8", "uint16"):
            raise ValueError(
                f"expected uint8 or uint16 images of 1, 3 or 4 channels, got {self.dtype} {self.shape}"
            )
        first = _png_header(files[0])
        bits = 8 * np.dtype(self.dtype).itemsize
        expected = (height or first[0], width or first[1], bits, _COLOUR_TYPE[channels])
        wanted = range(len(files)) if wanted is None else wanted
        if wanted and max(wanted) >= len(files):
            raise ValueError(f"expected at least {max(wanted) + 1} images, got {len(files)}")
        for index in wanted:  # before memory is taken: nothing larger than what was asked for is ever decoded
            header = _png_header(files[index])
            if header != expected:
                raise ValueError(
                    f"image {index}: expected (height, width, bits, colour type) {expected}, got {header}"
                )
        images = np.zeros((len(files), *expected[:2], channels), self.dtype)
        for index in wanted:
            try:
                _decode_png(files[index], images[index])
            except (ValueError, cv2.error) as error:
                raise ValueError(f"image {index}: {error}") from error
        return images if len(self.shape) > 3 else images[0]


def parse_features(description: Any) -> dict[str, Feature]:
    """The features in the content of ``features.json``, by name.

    Both layouts are read: that of protobuf's JSON (TFDS 4.5 and later) and the one before. Features of a kind
    that cannot be decoded here are left out.

    Raises:
        ValueError: the content is not of that form.
    """
    try:
        return {feature.name: feature for feature in _walk(description, (), ())}
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a description of features: {error!r}") from error


def _walk(node: Any, path: tuple[str, ...], outer: Shape) -> Iterator[Feature]:
    """The features under a node, whose sequences around it have the lengths ``outer``."""
    kind = str(node.get("pythonClassName", node.get("type"))).rsplit(".", 1)[-1]
    in_old_layout = "content" in node
    content = node["content"] if in_old_layout else next((v for v in node.values() if isinstance(v, dict)), {})
    name = "/".join(path)
    if kind == "FeaturesDict":
        for key, inner in (content if in_old_layout else content["features"]).items():
            yield from _walk(inner, (*path, key), outer)
    elif kind == "Sequence":
        yield from _walk(content["feature"], path, (*outer, _length(content.get("length"))))
    elif kind == "Text":
        yield Feature(name, "text", "str", outer)
    elif kind == "ClassLabel":
        yield Feature(name, "number", "int64", outer)
    elif kind == "BBoxFeature":
        yield Feature(name, "number", "float32", (*outer, 4))
    elif kind in ("Image", "Video"):
        yield Feature(name, "image", content.get("dtype") or "uint8", outer + _shape(content))
    elif kind in ("Tensor", "Scalar") and str(content.get("encoding", "none")).lower() == "none":
        dtype = str(content["dtype"])
        if dtype in _NUMBERS:
            yield Feature(name, "number", dtype, outer + _shape(content))


def _shape(content: Mapping[str, Any]) -> Shape:
    shape = content.get("shape") or ()
    return tuple(_length(n) for n in (shape.get("dimensions", ()) if isinstance(shape, dict) else shape))


def _length(number: Any) -> int | None:
    """JSON has 64-bit numbers as strings; -1 stands for a length that differs."""
    return None if number is None or int(number) < 0 else int(number)


def _reshaped(numbers: NDArray[Any], shape: Shape) -> NDArray[Any]:
    known = math.prod(n for n in shape if n is not None)
    fits = known > 0 and len(numbers) % known == 0 if None in shape else len(numbers) == known
    if not fits:
        wanted = ", ".join("n" if n is None else str(n) for n in shape)
        raise ValueError(f"expected ({wanted}) values, got {len(numbers)}")
    return numbers.reshape([len(numbers) // known if n is None else n for n in shape])


def _png_header(file: bytes) -> tuple[int, int, int, int]:
    """Height, width, bits per channel and colour type."""
    if len(file) < _PNG_START.size:
        raise ValueError(f"not a PNG: {len(file)} bytes")
    signature, header, width, height, bits, colour_type = _PNG_START.unpack_from(file)
    if signature != b"\x89PNG\r\n\x1a\n" or header != b"IHDR":
        raise ValueError("not a PNG")
    return height, width, bits, colour_type


def _decode_png(file: bytes, out: NDArray[Any]) -> None:
    """Decode into (height, width, channels). OpenCV, as Pillow would cut 16-bit colours down to 8."""
    image = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise ValueError("a damaged PNG")
    image = image.reshape(*image.shape[:2], -1)
    if image.shape != out.shape or image.dtype != out.dtype:
        raise ValueError(f"expected {out.dtype} {out.shape}, got {image.dtype} {image.shape}")
    if out.shape[2] == 1:
        out[:] = image
    else:
        cv2.cvtColor(image, cv2.COLOR_BGR2RGB if out.shape[2] == 3 else cv2.COLOR_BGRA2RGBA, dst=out)
