"""The demo: train three tiny trackers on synthetic clips, compare them with the baselines, write a report."""

from __future__ import annotations

import shutil
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from trackbench.composition import compose_config
from trackbench.evaluation.main import evaluate_models
from trackbench.training import train

TRAINED = ("trackon_tiny", "chrono_tiny", "trackon_chrono_tiny")
BASELINES = ("lucas_kanade", "static")


def run_demo(output: Path, *, steps: int | None = None, fresh: bool = False) -> float | None:
    """Train, evaluate and compare; interrupted runs go on where they stopped.

    Args:
        output: folder of the runs, results and ``report.html``.
        steps: training steps per model; None: as ``configs/experiment/demo.yaml`` says.
        fresh: train again even where a finished run is there.

    Returns:
        The score of the first model.
    """
    console = Console()
    output = output.resolve()
    for number, name in enumerate(TRAINED, start=1):
        folder = output / "train" / name
        console.rule(f"[{number}/{len(TRAINED)}] training {name}")
        if fresh and folder.exists():
            shutil.rmtree(folder)
        _train(name, folder, steps, console)
    console.rule("evaluating")
    config = compose_config("eval", ["experiment=demo_eval", f"models=[{','.join(TRAINED + BASELINES)}]"])
    config.checkpoints = {name: str(checkpoint_of(output / "train" / name)) for name in TRAINED}
    config.output_dir = str(output / "eval")
    return evaluate_models(config)


def checkpoint_of(folder: Path) -> Path:
    """The best checkpoint of a run, or its last where nothing was validated."""
    best, last = (folder / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    return best if best.is_file() else last


def _train(name: str, folder: Path, steps: int | None, console: Console) -> None:
    done = folder / "finished"
    config = _config(name, folder, steps)
    wanted = str(config.trainer.max_steps)
    if done.is_file() and done.read_text() == wanted:
        console.print(f"{name}: already trained for {wanted} steps ({folder}); --fresh trains again")
        return
    last = folder / "checkpoints" / "last.ckpt"
    if last.is_file():
        console.print(f"{name}: resuming from {last}")
        config.ckpt_path = str(last)
    train(config)
    done.write_text(wanted)


def _config(name: str, folder: Path, steps: int | None) -> DictConfig:
    config = compose_config("train", [f"model={name}", "experiment=demo"])
    config.output_dir = str(folder)
    if steps is not None:
        config.trainer.max_steps = steps
    return config
