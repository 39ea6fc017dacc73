"""Evaluate models x benchmarks: ``python eval.py model=[trackon_tiny,static] benchmark=synthetic``."""

import sys

import hydra
from omegaconf import DictConfig

from trackbench.evaluation.main import evaluate_models


@hydra.main(config_path="configs", config_name="eval", version_base="1.3")
def main(config: DictConfig) -> float | None:
    """Compose, evaluate, and return the first model's score."""
    return evaluate_models(config)


if __name__ == "__main__":
    # `model` is a list of names here, not one choice of the config group of that name
    sys.argv[1:] = [f"models={a.removeprefix('model=')}" if a.startswith("model=") else a for a in sys.argv[1:]]
    main()
