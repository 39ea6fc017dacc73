"""Data sets as TensorFlow Datasets publishes them, read without TensorFlow."""

from trackbench.data.tfds.dataset import TfdsDataset, find_version
from trackbench.data.tfds.scenes import MoviScenes
from trackbench.data.tfds.sequences import SceneSequences
from trackbench.data.tfds.shards import write_index

__all__ = ["MoviScenes", "SceneSequences", "TfdsDataset", "find_version", "write_index"]
