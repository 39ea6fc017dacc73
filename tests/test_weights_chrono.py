from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from trackbench.backbones.chrono import ChronoBackbone
from trackbench.backbones.vit import DinoV2
from trackbench.heads.correlation import CorrelationHead
from trackbench.weights_chrono import load_chrono_state_dict


@pytest.fixture
def official(chrono_fixtures: Path) -> dict[str, Tensor]:
    spec = json.loads((chrono_fixtures / "spec_small.json").read_text())["tensors"]
    return {key: torch.randn(shape) for key, (shape, _) in spec.items()}


def test_published_keys_fit_exactly(official: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "chrono.ckpt"
    torch.save({"state_dict": {f"model.{key}": value for key, value in official.items()}, "epoch": 3}, path)
    tracker = nn.ModuleDict({"backbone": ChronoBackbone(DinoV2()), "head": CorrelationHead(384)})
    tracker.load_state_dict(load_chrono_state_dict(path))
    weights = tracker.state_dict()
    for ours, theirs in (
        ("backbone.trunk.vit.blocks.3.attn.qkv.weight", "dino.blocks.3.attn.qkv.weight"),
        ("backbone.adapters.10.attn_temp.proj.bias", "adapter.10.attn_temp.proj.bias"),
        ("head.occ_linear.weight", "occ_linear.weight"),
    ):
        assert torch.equal(weights[ours], official[theirs])


def test_files_that_are_something_else(official: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "chrono.ckpt"
    with pytest.raises(FileNotFoundError, match=r"chrono\.ckpt"):
        load_chrono_state_dict(path)
    torch.save({**official, "decoder.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"not Chrono's: decoder\.weight"):
        load_chrono_state_dict(path)
    torch.save({key: value for key, value in official.items() if not key.startswith("adapter.")}, path)
    with pytest.raises(ValueError, match=r"lacks keys of Chrono: adapter\.\*"):
        load_chrono_state_dict(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="not a Chrono checkpoint"):
        load_chrono_state_dict(path)
