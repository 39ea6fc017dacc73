"""Train a tracker: ``python train.py model=trackon_tiny trainer.max_steps=200``."""

import hydra
from omegaconf import DictConfig

from trackbench.training import train


@hydra.main(config_path="configs", config_name="train", version_base="1.3")
def main(config: DictConfig) -> float | None:
    """Compose, train, and return the metric that sweeps optimise."""
    return train(config)


if __name__ == "__main__":
    main()
