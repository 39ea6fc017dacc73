"""ViT-Adapter at a small size; the published size is in tests/parity/test_trackon.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trackbench.backbones.vit_adapter import Grid, ViTAdapter


def tiny(**options: Any) -> ViTAdapter:
    settings = {"embed_dim": 24, "depth": 4, "num_heads": 2, "deformable_heads": 3, "prior_width": 4}
    return ViTAdapter(**(settings | {"patch_size": 14, "image_size": 56, "dropout": 0.0} | options))


@pytest.mark.parametrize(("height", "width"), [(64, 96), (60, 76), (56, 56), (33, 47)])
def test_maps_have_a_quarter_of_the_size_rounded_up(height: int, width: int) -> None:
    backbone = tiny().eval()
    maps = backbone(torch.rand(2, 3, 3, height, width))
    assert maps.shape == (2, 3, 24, -(-height // 4), -(-width // 4))
    assert maps.isfinite().all()
    assert backbone.dim == 24
    assert (backbone.context, backbone.lookahead) == (0, 0)


def test_frames_are_independent_in_evaluation_whatever_the_chunk() -> None:
    backbone = tiny(frames_per_chunk=2).eval()
    video = torch.rand(1, 5, 3, 56, 64)
    with torch.no_grad():
        chunked = backbone(video)
        backbone.frames_per_chunk = None
        torch.testing.assert_close(backbone(video), chunked, atol=1e-5, rtol=1e-5)
        stream = backbone.stream()
        streamed = [maps for frame in video.unbind(1) for maps in stream.push(frame)]
    assert stream.flush() == []
    torch.testing.assert_close(torch.stack(streamed, dim=1), chunked, atol=1e-5, rtol=1e-5)


def gradients(backbone: ViTAdapter, video: torch.Tensor) -> dict[str, torch.Tensor]:
    backbone.zero_grad()
    backbone(video).square().mean().backward()
    return {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}


def open_gates(backbone: ViTAdapter) -> ViTAdapter:
    for interaction in backbone.interactions:
        torch.nn.init.normal_(interaction.injector.gamma)
    return backbone


def test_gradients_flow_through_the_frozen_vit_to_the_first_injector() -> None:
    backbone = open_gates(tiny())
    found = gradients(backbone, torch.rand(1, 2, 3, 56, 56))
    assert not any(name.startswith("vit.") for name in found)
    assert found["interactions.0.injector.gamma"].abs().sum() > 0
    trainable = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert trainable == set(found)


def test_the_vit_trains_when_it_is_not_frozen() -> None:
    found = gradients(tiny(freeze_vit=False), torch.rand(1, 2, 3, 56, 56))
    assert found["vit.blocks.0.attn.qkv.weight"].abs().sum() > 0


def test_checkpointing_changes_no_gradient() -> None:
    backbone = open_gates(tiny())
    video = torch.rand(1, 2, 3, 56, 56)
    expected = gradients(backbone, video)
    backbone.checkpointing = True
    found = gradients(backbone, video)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


def test_the_adapter_starts_without_touching_the_vit() -> None:
    backbone = tiny().eval()
    injector = backbone.interactions[0].injector
    patches, pyramid = torch.randn(1, 16, 24), torch.randn(1, 84, 24)
    patch_grid = Grid.of([(4, 4)], patches.device)
    pyramid_grid = Grid.of([(8, 8), (4, 4), (2, 2)], patches.device)
    torch.testing.assert_close(injector(patches, patch_grid, pyramid, pyramid_grid), patches)
    torch.nn.init.ones_(injector.gamma)
    assert not torch.allclose(injector(patches, patch_grid, pyramid, pyramid_grid), patches)


def test_sizes_that_do_not_work_are_refused() -> None:
    with pytest.raises(ValueError, match="depth must be a multiple of 4, got 6"):
        tiny(depth=6)
    with pytest.raises(ValueError, match="at least 14 x 14"):
        tiny()(torch.rand(1, 1, 3, 12, 64))
    with pytest.raises(ValueError, match="frames_per_chunk"):
        tiny(frames_per_chunk=0)
