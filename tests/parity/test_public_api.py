"""Official files by name, through the public API alone: the official numbers, in pixels of the video."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

import trackbench


def generator_of(folder: Path) -> ModuleType:
    """The fixtures' own weight generator."""
    spec = importlib.util.spec_from_file_location(f"weights_of_{folder.name}", folder / "weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_trackon(trackon_fixtures: Path, tmp_path: Path) -> None:
    generator = generator_of(trackon_fixtures)
    weights = generator.make_state_dict(generator.load_spec(trackon_fixtures / "trackon_spec.json"), 103)
    path = tmp_path / "trackon.pt"
    model = {f"module.{key}": value for key, value in weights.items()}
    torch.save({"model": model, "args": argparse.Namespace(memory_size=12), "epoch": 150}, path)
    tracker = trackbench.load_tracker("trackon", path, memory_size=48)
    with np.load(trackon_fixtures / "inference_case.npz", allow_pickle=False) as data:
        video, queries = data["video"][0].transpose(0, 2, 3, 1), data["queries"]
        points, visible = data["points_mem48"].transpose(1, 0, 2), data["visibility_mem48"].T
    asked = queries.copy()
    tracks = tracker.track(video, queries)
    np.testing.assert_array_equal(queries, asked)
    np.testing.assert_allclose(tracks.xy.numpy(), points, atol=2e-3, rtol=0)
    np.testing.assert_array_equal(tracks.visible.numpy(), visible)


def test_chrono(chrono_fixtures: Path, tmp_path: Path) -> None:
    generator = generator_of(chrono_fixtures)
    seed = json.loads((chrono_fixtures / "manifest.json").read_text())["seed"]
    weights = generator.make_state_dict(generator.load_spec(chrono_fixtures / "spec_small.json"), seed)
    path = tmp_path / "chrono.ckpt"
    torch.save({"state_dict": {f"model.{key}": value for key, value in weights.items()}}, path)
    tracker = trackbench.load_tracker("chrono_s", path, token_grid=16)
    with np.load(chrono_fixtures / "reduced_small.npz", allow_pickle=False) as data:
        queries = data["query_points"][0][:, [0, 2, 1]]
        tracks = tracker.track(data["video"][0], queries)
        np.testing.assert_allclose(tracks.xy.numpy(), data["tracks"][0], atol=3e-3, rtol=0)
        np.testing.assert_array_equal(tracks.visible.numpy(), ~data["occluded"][0])
