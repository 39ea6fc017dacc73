"""Peak memory of a block of code: the allocator's on CUDA, else that of the process, or of several."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

MIB = 2**20
SAMPLE_SECONDS = 0.002
TREE_SAMPLE_SECONDS = 0.05  # the kernel walks all pages for each


@dataclass
class MemoryPeak:
    """Filled when the block of :func:`peak_memory` or :func:`peak_memory_of_all` ends.

    Attributes:
        added: highest use above that at the start of the block, in bytes; None where it cannot be told.
        total: highest use, in bytes, with weights and, on the CPU, with the interpreter and its libraries.
        kind: what was measured: ``"cuda allocator"``, ``"resident set"``, ``"proportional set"`` or ``"unknown"``.
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
        sampler = _Sampler(resident_bytes, SAMPLE_SECONDS)
        sampler.start()
        try:
            yield peak
        finally:
            sampler.stop()
        peak.total, peak.added, peak.kind = sampler.highest, sampler.highest - before, "resident set"


@contextmanager
def peak_memory_of_all() -> Iterator[MemoryPeak]:
    """Measure the peak memory of this process and the child processes of ``multiprocessing``, summed up.

    A page that several of them share counts once. A thread samples it every 50 ms, which costs time: nothing
    else should be measured meanwhile. ``added`` stays None.
    """
    peak = MemoryPeak()
    if proportional_bytes() is None:
        yield peak
        return
    sampler = _Sampler(proportional_bytes, TREE_SAMPLE_SECONDS)
    sampler.start()
    try:
        yield peak
    finally:
        sampler.stop()
    peak.total, peak.kind = sampler.highest, "proportional set"


def proportional_bytes() -> int | None:
    """Proportional set of this process and its children; None where the system does not tell."""
    own = _proportional_bytes(os.getpid())
    if own is None:
        return None
    children = (_proportional_bytes(child.pid) for child in multiprocessing.active_children())
    return own + sum(size or 0 for size in children)  # a child may have ended


def _proportional_bytes(pid: int | None) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def resident_bytes() -> int | None:
    """Resident set of this process; None where the system does not tell (there is no /proc)."""
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


class _Sampler(threading.Thread):
    """Keeps the highest of what ``read`` gives."""

    def __init__(self, read: Callable[[], int | None], seconds: float) -> None:
        super().__init__(daemon=True)
        self.highest = read() or 0
        self._read = read
        self._seconds = seconds
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(self._seconds):
            self._sample()

    def stop(self) -> None:
        self._done.set()
        self.join()
        self._sample()

    def _sample(self) -> None:
        self.highest = max(self.highest, self._read() or 0)


def _return_free_memory() -> None:
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
        if trim is not None:
            trim(0)
