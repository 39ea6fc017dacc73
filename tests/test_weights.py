"""Official checkpoint files, made here from their published key lists; and files that must be refused."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trackbench


@pytest.fixture(scope="module")
def trackon(trackon_fixtures: Path) -> dict[str, Tensor]:
    spec = json.loads((trackon_fixtures / "trackon_spec.json").read_text())["state_dict"]
    torch.manual_seed(0)
    return {
        key: 0.02 * torch.randn(entry["shape"])
        if entry["dtype"] == "float32"
        else torch.zeros(entry["shape"], dtype=torch.int64)
        for key, entry in spec.items()
    }


@pytest.fixture(scope="module")
def chrono(chrono_fixtures: Path) -> dict[str, Tensor]:
    spec = json.loads((chrono_fixtures / "spec_small.json").read_text())["tensors"]
    torch.manual_seed(0)
    return {key: 0.02 * torch.randn(shape) for key, (shape, _) in spec.items()}


def trackon_file(path: Path, weights: dict[str, Tensor], **changes: Any) -> Path:
    content = {
        "model": {f"module.{key}": value for key, value in weights.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 5e-4}]},
        "scheduler": {"last_epoch": 3},
        "scaler": None,
        "epoch": 4,
        "args": argparse.Namespace(lr=5e-4, epoch_num=150),
    }
    torch.save(content | changes, path)
    return path


def test_an_official_trackon_file_loads_by_name(tmp_path: Path, trackon: dict[str, Tensor]) -> None:
    tracker = trackbench.load_tracker("trackon", trackon_file(tmp_path / "trackon.pt", trackon), memory_size=48)
    weights = tracker.state_dict()
    assert len(weights) == len(trackon) == 753
    for ours, theirs in (
        ("backbone.vit.pos_embed", "backbone.vit_encoder.pos_embed"),
        ("backbone.spm.stem.0.weight", "backbone.vit_encoder.spm.stem.0.weight"),
        ("head.token_projection.weight", "backbone.token_projection.weight"),
        ("head.query_decoder.time_embedding", "query_decoder.time_embedding"),
        ("head.corr_layer.weight", "corr_layer.weight"),
    ):
        assert torch.equal(weights[ours], trackon[theirs])


def test_an_official_chrono_file_loads_by_name(tmp_path: Path, chrono: dict[str, Tensor]) -> None:
    path = tmp_path / "chrono.ckpt"
    torch.save({"state_dict": {f"model.{key}": value for key, value in chrono.items()}, "epoch": 3}, path)
    tracker = trackbench.load_tracker("chrono_s", path)
    weights = tracker.state_dict()
    for ours, theirs in (
        ("backbone.trunk.vit.blocks.3.attn.qkv.weight", "dino.blocks.3.attn.qkv.weight"),
        ("backbone.adapters.10.attn_temp.proj.bias", "adapter.10.attn_temp.proj.bias"),
        ("head.occ_linear.weight", "occ_linear.weight"),
    ):
        assert torch.equal(weights[ours], chrono[theirs])
    with pytest.raises(ValueError, match=r"chrono\.ckpt holds another architecture: .*missing.*unexpected"):
        trackbench.load_tracker("trackon_tiny", path)


class _Surprise:
    """Pickles to a call, as a malicious file would."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pickle.loads, (pickle.dumps(None),))


def test_files_that_would_run_code_are_refused_by_name(tmp_path: Path, trackon: dict[str, Tensor]) -> None:
    path = trackon_file(tmp_path / "bad.pt", trackon, args=_Surprise())
    with pytest.raises(ValueError, match=r"bad\.pt: refused .*pickle.*loads"):
        trackbench.load_tracker("trackon", path)


def test_every_key_that_does_not_fit_is_listed(tmp_path: Path, trackon: dict[str, Tensor]) -> None:
    def load(name: str, weights: dict[str, Tensor]) -> None:
        trackbench.load_tracker("trackon", trackon_file(tmp_path / name, weights))

    with pytest.raises(ValueError, match=r"1 missing: head\.projection1\.bias"):
        load("missing.pt", {k: v for k, v in trackon.items() if k != "projection1.bias"})
    with pytest.raises(ValueError, match=r"1 unexpected: head\.projection1\.scale"):
        load("more.pt", trackon | {"projection1.scale": torch.ones(1)})
    with pytest.raises(ValueError, match=r"strange\.pt: .*not Track-On's: module\.stranger"):
        load("strange.pt", trackon | {"stranger": torch.ones(1)})
    with pytest.raises(ValueError, match=r"head\.projection1\.bias \(1,\) instead of \(256,\)"):
        load("shape.pt", trackon | {"projection1.bias": torch.ones(1)})


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save({"state_dict": {"a": 3}}, tmp_path / "number.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "list.pt").read_bytes()[:200])
    for name in ("list", "other", "number", "text", "cut"):
        with pytest.raises(ValueError, match=rf"{name}\.pt"):
            trackbench.load_tracker("trackon_tiny", tmp_path / f"{name}.pt")
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        trackbench.load_tracker("trackon_tiny", tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="static has no weights"):
        trackbench.load_tracker("static", tmp_path / "list.pt")
