"""Where a clip's activations lie between two layers: on the device, in main memory or in a file."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

ActivationPlace = Literal["device", "cpu", "disk"]
ACTIVATION_PLACES = ("device", "cpu", "disk")


class ActivationStore:
    """States of a network's layers, one per piece of a clip, replaced layer by layer.

    In inference in place, which needs no second copy and does not scatter memory. With gradients, states are
    kept as they are.

    Args:
        place: "device" where they were computed; "cpu"; "disk", a memory-mapped file without a name, which the
            system frees with the store, also when the process dies.
        directory: where that file lies; None: the system's directory for temporary files, which may itself be
            in memory.

    Raises:
        ValueError: unknown place, or ``directory`` is none.
    """

    def __init__(self, place: ActivationPlace = "device", directory: str | Path | None = None) -> None:
        check_place(place)
        if place == "disk" and directory is not None and not Path(directory).is_dir():
            raise ValueError(f"activations_dir {str(directory)!r} is not a directory")
        self.place = place
        self.directory = directory
        self._states: list[Any] = []
        self._device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self._states)

    def append(self, state: Any) -> None:
        """Keep the state of the next piece."""
        self._states.append(None)
        self[len(self) - 1] = state

    def __setitem__(self, index: int, state: Any) -> None:
        """Replace the state of piece ``index``."""
        old = iter(tensors_of(self._states[index]))

        def keep(x: Tensor) -> Tensor:
            self._device = x.device
            if torch.is_grad_enabled():
                return x
            buffer = next(old, None)
            if buffer is None or (buffer.shape, buffer.dtype) != (x.shape, x.dtype):
                buffer = self._allocate(x)
            if buffer.data_ptr() != x.data_ptr():  # otherwise a map that the layer left as it was
                buffer.copy_(x)
            return buffer

        self._states[index] = map_tensors(keep, state)

    def __getitem__(self, index: int) -> Any:
        """The state of piece ``index``, on its device."""
        return self.frames(index, slice(None))

    def frames(self, index: int, rows: slice) -> Any:
        """Some frames of :meth:`__getitem__`; the others stay where they are."""
        return map_tensors(lambda x: x[rows].to(self._device), self._states[index])

    def pop(self, index: int) -> Any:
        """The state of piece ``index``, which is forgotten."""
        state = self[index]
        self._states[index] = None
        return state

    def _allocate(self, x: Tensor) -> Tensor:
        if self.place == "disk":
            return _mapped(x.shape, x.dtype, self.directory)
        return torch.empty(x.shape, dtype=x.dtype, device="cpu" if self.place == "cpu" else x.device)


def check_place(place: str) -> None:
    """Raise ValueError where ``place`` is none of ACTIVATION_PLACES."""
    if place not in ACTIVATION_PLACES:
        raise ValueError(f"activations must be one of {', '.join(ACTIVATION_PLACES)}, got {place!r}")


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply ``function`` to every tensor in dataclasses and tuples; everything else stays."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(map_tensors(function, item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {f.name: map_tensors(function, getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **changes)
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors that :func:`map_tensors` visits, in its order."""
    found: list[Tensor] = []

    def find(x: Tensor) -> Tensor:
        found.append(x)
        return x

    map_tensors(find, value)
    return found


def _mapped(shape: torch.Size, dtype: torch.dtype, directory: str | Path | None) -> Tensor:
    """A tensor in a file that loses its name at once and its space with the tensor."""
    with tempfile.NamedTemporaryFile(dir=directory, prefix="activations-") as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is an OSError here, and a crash once memory is mapped
            os.posix_fallocate(file.fileno(), 0, shape.numel() * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=shape.numel(), dtype=dtype).view(shape)
