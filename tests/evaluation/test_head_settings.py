"""Settings that a benchmark gives to heads: whose, for how long, and what the results say of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from trackbench.backbones.base import Backbone
from trackbench.baselines import Static
from trackbench.composition import build_tracker, compose_config, tracker_config
from trackbench.evaluation.main import evaluate_models
from trackbench.evaluation.runner import head_settings_for, use_head_settings
from trackbench.heads.memory import MemoryHead
from trackbench.structures import Tracks
from trackbench.tracker import PointTracker

PUBLISHED = {
    "when": {"trained_memory_size": 12},
    "memory_size": 48,
    "visibility_threshold": 0.8,
    "support_grid": 20,
}


class Patches(Backbone):
    def __init__(self) -> None:
        super().__init__()
        self.dim, self.stride = 4, 8.0
        self.conv = nn.Conv2d(3, 4, 8, stride=8)

    def forward(self, video: Tensor) -> Tensor:
        return self.conv(video.flatten(0, 1)).unflatten(0, video.shape[:2])


class Recorder(PointTracker):
    """Remembers the settings that its head had when it tracked."""

    seen: list[tuple[Any, ...]]

    def track(self, *args: Any, **kwargs: Any) -> Tracks:
        head = self.head
        self.seen.append((head.memory_size, head.visibility_threshold, head.support_grid))
        return super().track(*args, **kwargs)


def recorder(trained: int = 12, **settings: Any) -> Recorder:
    torch.manual_seed(0)
    head = MemoryHead(
        in_dim=4, dim=4, num_heads=1, decoder_layers=1, rerank_layers=1, offset_layers=1, num_candidates=2,
        levels=1, grid_size=(4, 4), trained_memory_size=trained, **{"visibility_threshold": 0.6, **settings},
    )  # fmt: skip
    tracker = Recorder(backbone=Patches(), head=head, input_size=(32, 32))
    tracker.seen = []
    return tracker.eval()


@pytest.mark.parametrize(
    ("name", "memory_size", "threshold"),
    [
        ("tapvid_davis", 48, 0.8),
        ("tapvid_robotap", 48, 0.8),
        ("tapvid_kinetics", 96, 0.8),
        ("tapvid_rgb_stacking", 80, 0.5),
    ],
)
def test_published_constants(name: str, memory_size: int, threshold: float) -> None:
    published = compose_config("eval", [f"benchmark={name}"]).benchmark.head_settings
    expected = {"memory_size": memory_size, "visibility_threshold": threshold, "support_grid": 20}
    small = {"backbone": "dinov2_tiny"}
    assert head_settings_for(build_tracker(tracker_config("trackon", small)), published) == expected
    for other, overrides in (("chrono_s", small), ("trackon_tiny", small), ("static", {}), ("lucas_kanade", {})):
        assert head_settings_for(build_tracker(tracker_config(other, overrides)), published) == {}


def test_what_the_user_chose_stays() -> None:
    chosen = {"head.memory_size": 7, "support_grid": 0}
    assert head_settings_for(recorder(), PUBLISHED, keep=chosen) == {"visibility_threshold": 0.8}
    assert head_settings_for(recorder(), None) == {}


def test_heads_with_another_training_take_nothing() -> None:
    assert head_settings_for(recorder(trained=8), PUBLISHED) == {}
    assert head_settings_for(SimpleNamespace(head=None), PUBLISHED) == {}
    assert head_settings_for(Static(), PUBLISHED) == {}


def test_unknown_settings_are_refused_whatever_the_tracker() -> None:
    for tracker in (recorder(), Static()):
        with pytest.raises(
            ValueError, match=r"unknown memory_sise; expected memory_size, .*, support_grid or when"
        ):
            head_settings_for(tracker, {"memory_sise": 48})
    with pytest.raises(ValueError, match="MemoryHead has no trained_memory"):
        head_settings_for(recorder(), {"when": {"trained_memory": 12}, "memory_size": 48})


def test_settings_last_as_long_as_the_block() -> None:
    tracker = recorder()
    head = tracker.head
    with use_head_settings(tracker, {"memory_size": 48, "support_grid": 20}) as in_force:
        assert in_force == "memory_size=48, visibility_threshold=0.6, support_grid=20"
        assert head.start(1).context.shape[2] == 48
    with pytest.raises(ZeroDivisionError), use_head_settings(tracker, {"memory_size": 48}):
        _ = 1 // 0
    assert (head.memory_size, head.visibility_threshold, head.support_grid) == (None, 0.6, 0)
    with use_head_settings(tracker, {}) as in_force:
        assert in_force == "memory_size=as trained, visibility_threshold=0.6, support_grid=0"
    with use_head_settings(Static(), {}) as in_force:
        assert in_force == ""


@pytest.fixture
def run(data_fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Evaluate a recorder called trackon_tiny, and static, on two benchmarks."""

    def evaluate(**changes: Any) -> Recorder:
        made: list[Recorder] = []

        def load(name: str, checkpoint: object, device: str, **settings: Any) -> Any:
            if name == "static":
                return Static()
            made.append(recorder(**{key.removeprefix("head."): value for key, value in settings.items()}))
            return made[-1]

        monkeypatch.setattr("trackbench.evaluation.main.load_tracker", load)
        config: DictConfig = compose_config("eval", ["models=[trackon_tiny,static]", "limit=1", "overlays=0"])
        config.output_dir = str(tmp_path)
        config.benchmarks = ["tapvid_davis", "tapvid_kinetics"]
        config.paths = {
            "tapvid_davis": str(data_fixtures / "tapvid" / "tapvid_davis" / "tapvid_davis.pkl"),
            "tapvid_kinetics": str(data_fixtures / "tapvid" / "tapvid_kinetics"),
        }
        for key, value in changes.items():
            config[key] = value
        assert evaluate_models(config) is not None
        return made[0]

    return evaluate


def rows_of(folder: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    rows = [row for path in folder.glob("results/*/*.csv") for row in csv.DictReader(path.open())]
    return {(row["benchmark"], row["model"], row["checkpoint"]): row for row in rows}


def test_each_benchmark_gives_its_own(run: Any, tmp_path: Path) -> None:
    tracker = run()
    assert tracker.seen == [(48, 0.8, 20), (96, 0.8, 20)]
    assert (tracker.head.memory_size, tracker.head.visibility_threshold, tracker.head.support_grid) == (
        None,
        0.6,
        0,
    )
    rows = rows_of(tmp_path)
    stated = {key[:2]: row["head_settings"] for key, row in rows.items()}
    text = "memory_size={}, visibility_threshold=0.8, support_grid=20"
    assert stated == {
        ("tapvid_davis", "trackon_tiny"): text.format(48),
        ("tapvid_kinetics", "trackon_tiny"): text.format(96),
        ("tapvid_davis", "static"): "",
        ("tapvid_kinetics", "static"): "",
    }
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert f"trackon_tiny on tapvid_davis: {text.format(48)}" in summary["environment"]["head_settings"]
    page = (tmp_path / "report.html").read_text()
    assert text.format(96) in page
    assert "trackon_tiny (" not in page  # one model, not one per settings


def test_results_with_other_settings_are_other_results(run: Any, tmp_path: Path) -> None:
    run(benchmarks=["tapvid_davis"])
    assert run(benchmarks=["tapvid_davis"]).seen == []  # there already
    tracker = run(benchmarks=["tapvid_davis"], overrides={"trackon_tiny": {"head.memory_size": 7}})
    assert tracker.seen == [(7, 0.8, 20)]
    stated = [row["head_settings"] for key, row in rows_of(tmp_path).items() if key[1] == "trackon_tiny"]
    assert sorted(text.split(",")[0] for text in stated) == ["memory_size=48", "memory_size=7"]
