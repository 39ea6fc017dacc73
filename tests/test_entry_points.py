"""train.py and eval.py as a user starts them; configs inside the wheel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from trackbench.composition import compose_config, configs_dir

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_the_config_is_readable(tmp_path: Path) -> None:
    result = run("train.py", "backbone=chrono_tiny", "head=memory_tiny", "--cfg", "job", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "ChronoBackbone" in result.stdout
    assert "MemoryHead" in result.stdout
    assert "XFeat" in result.stdout


@pytest.mark.parametrize(
    ("script", "argument", "message"),
    [
        ("train.py", "model=nonesuch", "Could not find 'model/nonesuch'"),
        ("train.py", "trainer.max_stepz=3", "Could not override 'trainer.max_stepz'"),
        ("eval.py", "benchmark=nonesuch", "Could not find 'benchmark/nonesuch'"),
        ("eval.py", "model=[nonesuch]", "unknown model 'nonesuch'"),
    ],
)
def test_bad_names_and_keys_get_a_clear_error(tmp_path: Path, script: str, argument: str, message: str) -> None:
    result = run(script, argument, cwd=tmp_path)
    assert result.returncode != 0
    assert message in result.stderr


def test_a_sweep_runs_every_combination_and_its_checkpoint_is_evaluated(tmp_path: Path) -> None:
    small = [
        "model=chrono_tiny",
        "tracker.input_size=[64,64]",
        "data.num_frames=4",
        "data.height=64",
        "data.width=64",
        "data.num_points=8",
        "data.val_videos=1",
        "trainer.max_steps=1",
        "trainer.val_check_interval=1",
        "trainer.accelerator=cpu",
        "trainer.devices=1",
        "callbacks.overlay=null",
    ]
    result = run("train.py", "-m", *small, "seed=1,2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    checkpoints = sorted(tmp_path.glob("outputs/sweeps/*/*/checkpoints/last.ckpt"))
    assert [path.parts[-3] for path in checkpoints] == ["0", "1"]

    evaluation = [
        "benchmark.dataset.length=1",
        "benchmark.dataset.num_frames=4",
        "output_dir=scores",
        "report=false",
    ]
    result = run("eval.py", f"model=[static,{checkpoints[0]}]", *evaluation, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "scores" / "results" / "summary.json").read_text())
    assert len(summary["results"]) == 2


@pytest.mark.parametrize("name", sorted(path.stem for path in (configs_dir() / "experiment").glob("*.yaml")))
def test_every_experiment_composes(name: str) -> None:
    compose_config("eval" if name.endswith("_eval") else "train", [f"experiment={name}"])


def test_a_wheel_installed_elsewhere_loads_trackers(tmp_path: Path) -> None:
    build = "from hatchling.build import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, check=True, capture_output=True, timeout=120
    )
    (wheel,) = tmp_path.glob("*.whl")
    elsewhere = tmp_path / "elsewhere"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(elsewhere)
    use = (
        "import trackbench, pathlib, sys; assert str(pathlib.Path(trackbench.__file__)).startswith(sys.argv[1]);"
        "from trackbench.composition import configs_dir; assert str(configs_dir()).startswith(sys.argv[1]);"
        "import trackbench.evaluation.report;"
        "print(type(trackbench.load_tracker('trackon_tiny').head).__name__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", use, str(elsewhere)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(elsewhere)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "MemoryHead"
