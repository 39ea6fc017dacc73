"""trackbench: train, evaluate and compare point trackers, any backbone under any head."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trackbench import metrics
    from trackbench.composition import load_checkpoint, load_tracker, model_names
    from trackbench.structures import FrameTracks, Tracks, VideoBatch
    from trackbench.tracker import PointTracker, TrackerStream

__version__ = "0.1.0"

__all__ = [
    "FrameTracks",
    "PointTracker",
    "TrackerStream",
    "Tracks",
    "VideoBatch",
    "load_checkpoint",
    "load_tracker",
    "metrics",
    "model_names",
]

_MODULES = {
    "FrameTracks": "structures",
    "PointTracker": "tracker",
    "TrackerStream": "tracker",
    "Tracks": "structures",
    "VideoBatch": "structures",
    "load_checkpoint": "composition",
    "load_tracker": "composition",
    "metrics": "metrics",
    "model_names": "composition",
}


def __getattr__(name: str) -> Any:
    """Load public names when they are asked for: much of the package does without PyTorch, which takes seconds."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_MODULES[name]}")
    return module if name == _MODULES[name] else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
