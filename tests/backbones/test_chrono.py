from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trackbench.backbones.chrono import ChronoBackbone
from trackbench.backbones.cnn import XFeat
from trackbench.backbones.staged import StagedBackbone
from trackbench.backbones.vit import DinoV2


def make_trunk(kind: str, **options: object) -> StagedBackbone:
    if kind == "cnn":
        return XFeat(pretrained=False, **options)  # type: ignore[arg-type]
    tiny: dict[str, object] = {"embed_dim": 24, "depth": 4, "num_heads": 2, "token_grid": 5}
    return DinoV2(registers=True, **tiny, **options)  # type: ignore[arg-type]


def make_backbone(kind: str, **options: object) -> ChronoBackbone:
    """A small model whose adapters are not at their start, where they add nothing."""
    backbone = ChronoBackbone(make_trunk(kind), hidden=8, heads=2, **options)  # type: ignore[arg-type]
    for adapter in backbone.adapters:
        assert isinstance(adapter.conv2, nn.Conv2d)
        nn.init.normal_(adapter.conv2.weight, std=0.3)
    return backbone.eval()


def encode_as_stream(backbone: ChronoBackbone, video: Tensor) -> tuple[Tensor, list[int]]:
    stream = backbone.stream()
    features, ready = [], []
    for frame in video.unbind(1):
        results = stream.push(frame)
        features += results
        ready.append(len(features))
    return torch.stack(features + stream.flush(), dim=1), ready


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_new_adapters_leave_the_trunk_as_it_is(kind: str) -> None:
    trunk = make_trunk(kind).eval()
    video = torch.rand(2, 3, 3, 64, 64)
    torch.testing.assert_close(ChronoBackbone(trunk, hidden=8, heads=2).eval()(video), trunk(video))


def test_what_the_vit_blocks_see() -> None:
    """Stage by stage by hand: block, then its adapter on the patch tokens; nothing after the last block."""
    backbone = make_backbone("vit")
    trunk = backbone.trunk
    assert isinstance(trunk, DinoV2)
    video = torch.rand(1, 3, 3, 40, 40)
    tokens = trunk.begin(video[0]).tokens
    for index, block in enumerate(trunk.vit.blocks):
        tokens = block(tokens)
        if index < 3:
            maps = tokens[:, 5:].reshape(1, 3, 5, 5, 24).permute(0, 1, 4, 2, 3)
            delta = backbone.adapters[index](maps)[0].permute(0, 2, 3, 1).reshape(3, 25, 24)
            tokens = torch.cat([tokens[:, :5], tokens[:, 5:] + delta], dim=1)
    expected = trunk.vit.norm(tokens)[:, 5:].transpose(1, 2).reshape(1, 3, 24, 5, 5)
    assert len(backbone.adapters) == 3
    torch.testing.assert_close(backbone(video), expected)


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_every_adapter_matters(kind: str) -> None:
    backbone = make_backbone(kind)
    video = torch.rand(1, 4, 3, 64, 64)
    before = backbone(video)
    for adapter in backbone.adapters:
        assert isinstance(adapter.conv2, nn.Conv2d)
        weight = adapter.conv2.weight.detach().clone()
        nn.init.zeros_(adapter.conv2.weight)
        assert (backbone(video) - before).abs().max() > 1e-3
        with torch.no_grad():
            adapter.conv2.weight.copy_(weight)


@pytest.mark.parametrize("kind", ["vit", "cnn"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_frames", [1, 4, 25])
def test_stream_equals_clip(kind: str, causal: bool, num_frames: int) -> None:
    backbone = make_backbone(kind, window=5, norm="frame", causal=causal)
    video = torch.rand(2, num_frames, 3, 64, 64)
    with torch.no_grad():
        streamed, ready = encode_as_stream(backbone, video)
        torch.testing.assert_close(streamed, backbone(video), atol=1e-5, rtol=1e-5)
    lookahead = backbone.lookahead
    assert lookahead == (0 if causal else 2 * len(backbone.adapters))
    assert ready == [max(0, frame + 1 - lookahead) for frame in range(num_frames)]


def test_clip_norm_streams_at_the_end() -> None:
    backbone = make_backbone("vit")
    assert backbone.context is None
    assert backbone.lookahead is None
    video = torch.rand(1, 3, 3, 64, 64)
    streamed, ready = encode_as_stream(backbone, video)
    assert ready == [0, 0, 0]
    torch.testing.assert_close(streamed, backbone(video))


def test_context_bounds_what_a_frame_depends_on() -> None:
    backbone = make_backbone("vit", window=3, norm="frame")
    assert backbone.context == 3
    video = torch.rand(1, 9, 3, 64, 64)
    changed = video.clone()
    changed[:, 8] = torch.rand(1, 3, 64, 64)
    difference = (backbone(video) - backbone(changed)).abs().amax(dim=(0, 2, 3, 4))
    assert (difference[:5] < 1e-6).all()
    assert (difference[5:] > 0).all()
    assert difference[5] > 1e-6


def test_chunks_do_not_change_features() -> None:
    backbone = make_backbone("vit")
    video = torch.rand(2, 5, 3, 64, 64)
    backbone.trunk.frames_per_chunk = 3
    chunked = backbone(video)
    backbone.trunk.frames_per_chunk = None
    torch.testing.assert_close(chunked, backbone(video))


@pytest.mark.parametrize("norm", ["clip", "frame"])
@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_frozen_trunk_trains_every_adapter(kind: str, norm: str) -> None:
    """Adapter 0 sees channels-last input without gradient: torch 2.13's group norm crashes on it (CPU)."""
    backbone = ChronoBackbone(make_trunk(kind, frozen=True), hidden=8, heads=2, norm=norm)  # type: ignore[arg-type]
    for adapter in backbone.adapters:
        assert isinstance(adapter.conv2, nn.Conv2d)
        nn.init.normal_(adapter.conv2.weight, std=0.1)
    features = backbone.train()(torch.rand(1, 4, 3, 64, 64))
    (features * torch.randn_like(features)).sum().backward()
    published = [p for name, p in backbone.trunk.named_parameters() if not name.startswith("fine_projection")]
    assert all(p.grad is None for p in published)
    for adapter in backbone.adapters:
        for name, p in adapter.named_parameters():
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            assert p.grad.abs().max() > 0, name


def test_pool_per_adapter() -> None:
    backbone = ChronoBackbone(make_trunk("cnn"), hidden=8, heads=2, pool=[8, 4, 2, 1])
    assert [adapter.pool for adapter in backbone.adapters] == [8, 4, 2, 1]
    assert backbone(torch.rand(1, 2, 3, 96, 64)).shape == (1, 2, 64, 24, 16)
    with pytest.raises(ValueError, match="3 numbers for 4 adapters"):
        ChronoBackbone(make_trunk("cnn"), pool=[8, 4, 2])
