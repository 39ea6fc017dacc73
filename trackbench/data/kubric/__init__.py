"""Ground-truth point tracks from Kubric's rendered scenes (MOVi-E, panning MOVi-E, MOVi-F)."""

from trackbench.data.kubric.projection import project_tracks
from trackbench.data.kubric.sampling import SampledTracks, sample_tracks

__all__ = ["SampledTracks", "project_tracks", "sample_tracks"]
