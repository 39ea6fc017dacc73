"""Synthetic clips with exact ground truth, made on the fly."""

from trackbench.data.synthetic.datamodule import SyntheticDataModule
from trackbench.data.synthetic.dataset import SyntheticDataset

__all__ = ["SyntheticDataModule", "SyntheticDataset"]
