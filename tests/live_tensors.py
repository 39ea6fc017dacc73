"""Memory in tests, counted and not measured."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors alive that operators returned while it was on, and their highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.users: dict[int, int] = {}
        self.references: dict[int, weakref.ref[Tensor]] = {}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for x in results if isinstance(results, tuple | list) else (results,):
            if isinstance(x, Tensor) and id(x) not in self.references:
                self._add(x)
        self.peak = max(self.peak, self.live)
        return results

    def _add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        address, size, name = storage.data_ptr(), storage.nbytes(), id(x)
        self.live += 0 if address in self.users else size
        self.users[address] = self.users.get(address, 0) + 1

        def remove(_: object) -> None:
            del self.references[name]
            self.users[address] -= 1
            if self.users[address] == 0:
                del self.users[address]
                self.live -= size

        self.references[name] = weakref.ref(x, remove)
