"""What loggers keep, read back from their own files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from trackbench.evaluation.logging import log_results, result_scalars
from trackbench.evaluation.runner import Row
from trackbench.metrics import METRICS


def rows() -> list[Row]:
    return [
        {
            "model": model,
            "benchmark": "davis",
            "video": video,
            "query_mode": "first",
            "checkpoint": "abc",
            **dict.fromkeys(METRICS, value),
            "num_points": 5,
            "num_frames": 10,
            "height": 64,
            "width": 96,
            "seconds": 0.5,
        }
        for model, video, value in (("m", "a", 0.25), ("m", "b", 0.75), ("n", "a", 0.5), ("n", "b", 0.375))
    ]


def speed() -> list[Row]:
    return [
        {
            "model": model,
            "num_points": points,
            "latency_ms": 2.0 * points,
            "latency_p95_ms": 3.0 * points,
            "fps": 500 / points,
            "peak_memory_mib": None,
            "gflops_per_frame": 1.5,
            "parameters": 10,
        }
        for model in ("m", "n")
        for points in (1, 64)
    ]


def test_scalars() -> None:
    scalars = result_scalars(rows(), speed())
    assert scalars["davis/first/m/average_jaccard"] == pytest.approx(0.5)
    assert scalars["davis/first/n/occlusion_accuracy"] == pytest.approx(0.4375)
    assert scalars["speed/m/64_points/latency_ms"] == 128
    assert "speed/m/64_points/peak_memory_mib" not in scalars


def test_csv(tmp_path: Path) -> None:
    log_results([CSVLogger(tmp_path, name="log", version="")], rows(), speed())
    with (tmp_path / "log" / "metrics.csv").open() as file:
        (kept,) = csv.DictReader(file)
    assert float(kept["davis/first/m/average_jaccard"]) == pytest.approx(0.5)
    assert float(kept["speed/n/1_points/fps"]) == 500


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="log", version="")
    log_results([logger], rows(), speed())
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    assert events.Scalars("davis/first/m/average_jaccard")[0].value == pytest.approx(0.5)
    assert [(e.step, e.value) for e in events.Scalars("speed/latency_ms/m")] == [(1, 2.0), (64, 128.0)]
    (text,) = events.Tensors("results/text_summary")
    assert b"| davis (first) | m | 50.0 |" in text.tensor_proto.string_val[0]


def test_speed_alone(tmp_path: Path) -> None:
    loggers = [
        CSVLogger(tmp_path, name="csv", version=""),
        TensorBoardLogger(tmp_path, name="tb", version=""),
    ]
    log_results(loggers, [], speed())
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        (kept,) = csv.DictReader(file)
    assert float(kept["speed/m/1_points/latency_ms"]) == 2
    assert len(kept) == 4 * 4 + 1  # four rows of four numbers, and the step


def test_wandb_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline_records: Callable[[Path], Iterator[Any]]
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    log_results([logger], rows(), speed())
    wandb.finish()
    wandb.teardown()  # waits for the service, which closes the file shortly after finish() returns
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    history: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    config_keys: list[str] = []
    for record in offline_records(file):
        kind = record.WhichOneof("record_type")
        items = {"history": record.history.item, "summary": record.summary.update}.get(kind, [])
        target = history if kind == "history" else summary
        for item in items:
            target["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        if kind == "config":
            config_keys += [item.value_json for item in record.config.update]
    assert summary["davis/first/m/average_jaccard"] == pytest.approx(0.5)
    assert summary["speed/n/64_points/latency_ms"] == 128
    folder = file.parent / "files"
    tables = {
        key.removesuffix("/_type"): json.loads((folder / history[key.replace("_type", "path")]).read_text())
        for key, value in history.items()
        if value == "table-file"
    }
    videos = tables["results/videos"]
    column = videos["columns"].index("average_jaccard")
    assert [line[column] for line in videos["data"]] == [0.25, 0.75, 0.5, 0.375]
    assert len(tables["results/summary"]["data"]) == 2
    assert len(tables["speed/table"]["data"]) == 4
    curve = next(table for key, table in tables.items() if "latency_against_points" in key)
    assert sorted(map(tuple, curve["data"])) == [
        (1, "m", 2.0),
        (1, "n", 2.0),
        (64, "m", 128.0),
        (64, "n", 128.0),
    ]
    scatter = next(table for key, table in tables.items() if "accuracy_against_speed" in key)
    assert len(scatter["data"]) == 2
    assert any("latency_against_points" in text for text in config_keys)
