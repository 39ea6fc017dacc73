"""trackbench: train, evaluate and compare point trackers, any backbone under any head."""

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
