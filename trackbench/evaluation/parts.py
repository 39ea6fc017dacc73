"""Where a tracker's time goes, part by part.

A table says which calls belong to which part. Calls nest: what a part calls that is a part of its own counts there
only, so that the parts of a frame add up to the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import wraps
from itertools import pairwise
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trackbench.backbones.chrono import ChronoBackbone
from trackbench.backbones.vit import Attention
from trackbench.heads.correlation import CorrelationHead
from trackbench.heads.memory.head import MemoryHead
from trackbench.layers.temporal import LocalAttention, TemporalAdapter
from trackbench.tracker import PointTracker

REST = "rest"  # uploading and resizing frames, results back to pixels


@dataclass(frozen=True)
class Part:
    """A line of the table.

    Attributes:
        label: the part that the calls belong to; several lines may share one.
        path: modules of the tracker by their dotted path, ``*`` as in file names; "": the tracker itself.
        methods: their methods that are the calls.
        kind: only modules of this class.
        after: the part that goes on when such a call returns, until the call around it does; None: the part that
            made the call.
    """

    label: str
    path: str
    methods: tuple[str, ...] = ("forward",)
    kind: type[nn.Module] = nn.Module
    after: str | None = None


HEAD_METHODS = ("step", "sample", "add")
CHRONO_PARTS = (
    # whatever happens between resizing and the head is the backbone's
    Part(REST, "", ("prepare",), after="backbone: rest"),
    Part("backbone: linear layers", "backbone.trunk.*", kind=nn.Linear),
    Part("backbone: attention", "backbone.trunk.*", kind=Attention),  # without its linear layers
    Part("backbone: adapters", "backbone.adapters.*", ("encode", "decode"), TemporalAdapter),
    Part("backbone: adapters", "backbone.adapters.*", ("project", "attend"), LocalAttention),
    Part("backbone: adapters", "backbone.adapters.*.norm2"),
)
BACKBONE_PARTS = (Part(REST, "", ("prepare",), after="backbone"),)
CORRELATION_PARTS = (Part("matching", "head", HEAD_METHODS, after=REST),)
MEMORY_PARTS = (
    Part("head: query features", "head", ("sample", "add"), after=REST),
    Part("head: tokens and pyramid", "head", ("step",), after=REST),
    Part("head: query updater", "head.sm_query_updater", ("update",)),
    Part("head: query decoder", "head.query_decoder"),
    Part("head: correlation", "head.projection1", after="head: correlation"),
    Part("head: re-ranking", "head.rerank_module", after="head: re-ranking"),
    Part("head: correlation", "head.projection2", after="head: correlation"),
    Part("head: offset and visibility", "head.offset_head", after="head: offset and visibility"),
    Part("head: offset and visibility", "head.visibility_head", after="head: memory write"),
    Part("head: memory write", "head.sm_query_updater", ("write",), after="head: memory write"),
)
# inside compiled code there is nothing to hold on to
COMPILED_PARTS = (*BACKBONE_PARTS, Part("head", "head", HEAD_METHODS, after=REST))


def parts_of(tracker: object, *, compiled: bool = False) -> tuple[Part, ...]:
    """The table for a tracker; empty for what is no backbone with a head."""
    if not isinstance(tracker, PointTracker):
        return ()
    known = isinstance(tracker.head, MemoryHead | CorrelationHead)
    if compiled or not known:
        return COMPILED_PARTS
    head = MEMORY_PARTS if isinstance(tracker.head, MemoryHead) else CORRELATION_PARTS
    backbone = CHRONO_PARTS if isinstance(tracker.backbone, ChronoBackbone) else BACKBONE_PARTS
    return (*backbone, *head)


class Clock(Protocol):
    """Reads something that only grows."""

    def read(self) -> Any:
        """A reading, taken without waiting for the device."""

    def differences(self, readings: Sequence[Any]) -> list[float]:
        """From each reading to the next."""


class WallClock:
    """Seconds of a device that the host waits for: the CPU."""

    def read(self) -> float:
        """Seconds."""
        return perf_counter()

    def differences(self, readings: Sequence[Any]) -> list[float]:
        """Seconds from each reading to the next."""
        return [after - before for before, after in pairwise(readings)]


class CudaClock:
    """Seconds of a CUDA device, by events in its queue: what the device waits for the host counts too."""

    def read(self) -> torch.cuda.Event:
        """An event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def differences(self, readings: Sequence[Any]) -> list[float]:
        """Seconds from each event to the next; waits for the last."""
        readings[-1].synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(readings)]


def device_clock(device: torch.device) -> Clock:
    """The clock for what runs on a device."""
    return CudaClock() if device.type == "cuda" else WallClock()


class OperationClock:
    """Floating-point operations that a counter has seen."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self._counter = counter

    def read(self) -> int:
        """Operations so far."""
        return self._counter.get_total_flops()

    def differences(self, readings: Sequence[Any]) -> list[float]:
        """Operations from each reading to the next."""
        return [float(after - before) for before, after in pairwise(readings)]


class Breakdown:
    """Splits what a call of a tracker takes among its parts.

    Args:
        tracker: the tracker.
        parts: the table; see :func:`parts_of`.
        clock: what is measured.
    """

    def __init__(self, tracker: object, parts: Sequence[Part], clock: Clock) -> None:
        self._tracker = tracker
        self._parts = parts
        self._clock = clock
        self._readings: list[Any] = []
        self._labels: list[str] = []  # of what follows each reading but the last
        self._stack: list[str] = []  # what is going on, outermost first; empty outside `record`
        self._known: list[str] = []  # parts of this tracker, in the order of the table

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Wrap the methods of the table for a while.

        Raises:
            AttributeError: a module of the table has no such method.
        """
        modules = list(self._tracker.named_modules()) if isinstance(self._tracker, nn.Module) else []
        with ExitStack() as undo:
            for part in self._parts:
                for path, module in modules:
                    if isinstance(module, part.kind) and fnmatchcase(path, part.path):
                        self._known += [label for label in (part.label, part.after) if label]
                        for method in part.methods:
                            undo.callback(_replace(module, method, self._wrapped(getattr(module, method), part)))
            yield

    def record(self, call: Callable[[], Any]) -> Any:
        """Call, and take the readings of :meth:`spent`."""
        self._readings, self._labels, self._stack = [self._clock.read()], [REST], [REST]
        try:
            return call()
        finally:
            self._readings.append(self._clock.read())
            self._stack = []

    def spent(self) -> dict[str, float]:
        """What each part took of the last recorded call, in units of the clock; ``rest`` comes last."""
        total = dict.fromkeys([*self._known, REST], 0.0)
        for label, amount in zip(self._labels, self._clock.differences(self._readings), strict=True):
            total[label] += amount
        rest = total.pop(REST)
        return {**total, REST: rest}

    def _switch(self, label: str) -> None:
        self._readings.append(self._clock.read())
        self._labels.append(label)

    def _wrapped(self, method: Callable[..., Any], part: Part) -> Callable[..., Any]:
        @wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._stack:
                return method(*args, **kwargs)
            self._stack.append(part.label)
            self._switch(part.label)
            try:
                return method(*args, **kwargs)
            finally:
                self._stack.pop()
                if part.after is not None:
                    self._stack[-1] = part.after
                self._switch(self._stack[-1])

        return timed


def _replace(module: nn.Module, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Give one object another method; what is returned undoes it."""
    before = vars(module).get(name)
    setattr(module, name, method)

    def undo() -> None:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)

    return undo
