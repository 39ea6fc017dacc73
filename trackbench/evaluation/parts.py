"""Where time goes, part by part: that of a tracker by its modules, that of anything by functions.

A table says which calls belong to which part. Calls nest: what a part calls that is a part of its own counts there
only, so that the parts add up to the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import wraps
from itertools import pairwise
from pkgutil import resolve_name
from time import perf_counter, process_time
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


class Line(Protocol):
    """A line of a table: which calls belong to a part."""

    @property
    def label(self) -> str:
        """The part that the calls belong to; several lines may share one."""

    @property
    def after(self) -> str | None:
        """The part that goes on when such a call returns, until the call around it does.

        None: the part that made the call.
        """

    def calls(self, root: object) -> list[tuple[Any, str]]:
        """The objects, and the names that they are called by on each."""


@dataclass(frozen=True)
class Part:
    """Methods of a tracker's modules.

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

    def calls(self, root: object) -> list[tuple[Any, str]]:
        """The methods of the modules of a tracker that it has."""
        modules = root.named_modules() if isinstance(root, nn.Module) else ()
        found = [m for path, m in modules if isinstance(m, self.kind) and fnmatchcase(path, self.path)]
        return [(module, method) for module in found for method in self.methods]


@dataclass(frozen=True)
class Function:
    """A function or method of a package.

    Where it gives a context manager, entering that counts too, but not what is done within it.

    Attributes:
        label: see :class:`Line`.
        path: where it is looked up when it is called: ``package.module:function`` names the module that calls it,
            which need not be the one that defines it, or ``package.module:Class.method``.
        after: see :class:`Line`.
    """

    label: str
    path: str
    after: str | None = None

    def calls(self, root: object) -> list[tuple[Any, str]]:
        """The one place.

        Raises:
            ImportError: there is no such module.
            AttributeError: nothing of that name in it.
        """
        module, _, names = self.path.partition(":")
        owner_names, _, name = names.rpartition(".")
        owner = resolve_name(f"{module}:{owner_names}")
        getattr(owner, name)
        return [(owner, name)]


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


class CpuClock:
    """Processor seconds of all threads of this process."""

    def read(self) -> float:
        """Seconds."""
        return process_time()

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
    """Splits what a call takes among parts.

    Args:
        root: what the lines look for calls in: the tracker.
        parts: the table; see :func:`parts_of`.
        clock: what is measured.
    """

    def __init__(self, root: object, parts: Sequence[Line], clock: Clock) -> None:
        self._root = root
        self._parts = parts
        self._clock = clock
        self._readings: list[Any] = []
        self._labels: list[str] = []  # of what follows each reading but the last
        self._stack: list[str] = []  # what is going on, outermost first; empty outside `record`
        self._known: list[str] = []  # parts that the root has, in the order of the table

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Wrap the calls of the table for a while.

        Raises:
            AttributeError: something of the table is not there.
        """
        with ExitStack() as undo:
            for part in self._parts:
                for owner, name in part.calls(self._root):
                    self._known += [label for label in (part.label, part.after) if label]
                    undo.callback(_replace(owner, name, self._wrapped(getattr(owner, name), part)))
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

    def _wrapped(self, call: Callable[..., Any], part: Line) -> Callable[..., Any]:
        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._stack:
                return call(*args, **kwargs)
            with self._during(part):
                result = call(*args, **kwargs)
            return self._entered(result, part) if isinstance(result, AbstractContextManager) else result

        return timed

    @contextmanager
    def _during(self, part: Line) -> Iterator[None]:
        self._stack.append(part.label)
        self._switch(part.label)
        try:
            yield
        finally:
            self._stack.pop()
            if part.after is not None:
                self._stack[-1] = part.after
            self._switch(self._stack[-1])

    @contextmanager
    def _entered(self, context: AbstractContextManager[Any], part: Line) -> Iterator[Any]:
        with ExitStack() as stack:
            with self._during(part):
                value = stack.enter_context(context)
            yield value


def _replace(owner: Any, name: str, call: Callable[..., Any]) -> Callable[[], None]:
    """Give an object, class or module another function; what is returned undoes it."""
    before = vars(owner).get(name)
    setattr(owner, name, staticmethod(call) if isinstance(before, staticmethod) else call)

    def undo() -> None:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    return undo
