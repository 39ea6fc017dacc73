"""Peak memory of a block of code: the allocator's on CUDA, the resident set of the process elsewhere."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

MIB = 2**20
SAMPLE_SECONDS = 0.002


@dataclass
class MemoryPeak:
    """Filled when the block of :func:`peak_memory` ends.

    Attributes:
        added: highest use above that at the start of the block, in bytes; None where it cannot be told.
        total: highest use, in bytes, with weights and, on the CPU, with the interpreter and its libraries.
        kind: what was measured: ``"cuda allocator"``, ``"resident set"`` or ``"unknown"``.
    """

    added: int | None = None
    total: int | None = None
    kind: str = "unknown"


@contextmanager
def peak_memory(device: torch.device) -> Iterator[MemoryPeak]:
    """Measure the peak memory of a block.

    On the CPU a thread samples the resident set every 2 ms: what lives shorter may be missed. Free memory is
    handed back to the system first, since the block would otherwise reuse it unseen.
    """
    peak = MemoryPeak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.total = torch.cuda.max_memory_allocated(device)
        peak.added, peak.kind = peak.total - before, "cuda allocator"
    elif resident_bytes() is None:
        yield peak
    else:
        _return_free_memory()
        before = resident_bytes() or 0
        sampler = _Sampler()
        sampler.start()
        try:
            yield peak
        finally:
            sampler.stop()
        peak.total, peak.added, peak.kind = sampler.highest, sampler.highest - before, "resident set"


def resident_bytes() -> int | None:
    """Resident set of this process; None where the system does not tell (there is no /proc)."""
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


class _Sampler(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest = resident_bytes() or 0
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._sample()

    def stop(self) -> None:
        self._done.set()
        self.join()
        self._sample()

    def _sample(self) -> None:
        self.highest = max(self.highest, resident_bytes() or 0)


def _return_free_memory() -> None:
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
        if trim is not None:
            trim(0)
