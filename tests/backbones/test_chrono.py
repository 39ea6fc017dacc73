from __future__ import annotations

import gc
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from live_tensors import LiveTensors
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trackbench.backbones.activations import ActivationStore, tensors_of
from trackbench.backbones.chrono import ChronoBackbone
from trackbench.backbones.cnn import XFeat
from trackbench.backbones.staged import StagedBackbone
from trackbench.backbones.vit import DinoV2
from trackbench.composition import build_tracker, compose_config


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
    return torch.stack([*features, *stream.flush()], dim=1), ready


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
@pytest.mark.parametrize("norm", ["frame", "running"])
@pytest.mark.parametrize("num_frames", [1, 4, 25])
def test_stream_equals_clip(kind: str, causal: bool, norm: str, num_frames: int) -> None:
    backbone = make_backbone(kind, window=5, norm=norm, causal=causal)
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


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("norm", ["clip", "frame", "running"])
@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_chunks_do_not_change_features(kind: str, norm: str, dtype: torch.dtype, atol: float) -> None:
    backbone = make_backbone(kind, norm=norm, window=5).to(dtype)
    video = torch.rand(2, 11, 3, 64, 64, dtype=dtype)
    backbone.trunk.frames_per_chunk = None
    expected = backbone(video)
    for frames_per_chunk in (1, 3, 6, 100):
        backbone.trunk.frames_per_chunk = frames_per_chunk
        torch.testing.assert_close(backbone(video), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("activations", ["device", "cpu", "disk"])
@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_encode_clip_equals_forward(kind: str, activations: str, tmp_path: Path) -> None:
    backbone = make_backbone(kind, window=5, activations=activations, activations_dir=tmp_path)
    backbone.trunk.frames_per_chunk = 6
    video = torch.rand(2, 11, 3, 64, 64)
    with torch.no_grad():
        clip = backbone.encode_clip(iter(video.unbind(1)))
        assert len(clip) == 11
        assert [clip[t].shape for t in (0, 10)] == [backbone(video)[:, 0].shape] * 2
        features = torch.stack([clip[t] for t in range(11)], dim=1)
        backbone.activations = "device"
        torch.testing.assert_close(features, backbone(video), atol=1e-6, rtol=0)
    with pytest.raises(IndexError):
        clip[11]


def test_encode_clip_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="activations must be one of device, cpu, disk, got 'tape'"):
        make_backbone("vit", activations="tape")
    backbone = make_backbone("vit", activations="disk", activations_dir=tmp_path / "absent")
    with torch.no_grad(), pytest.raises(ValueError, match="absent' is not a directory"):
        backbone(torch.rand(1, 2, 3, 64, 64))
    with pytest.raises(ValueError, match="without frames"):
        make_backbone("vit").encode_clip([])


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's mappings from /proc")
def test_activations_on_disk_leave_nothing(tmp_path: Path) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(f"{tmp_path}/activations-")

    backbone = make_backbone("vit", activations="disk", activations_dir=tmp_path)
    backbone.trunk.frames_per_chunk = 2
    seen: list[int] = []

    def frames(fail: bool) -> Iterator[Tensor]:
        for _ in range(6):
            yield torch.rand(1, 3, 64, 64)
            seen.append(mapped())
            assert list(tmp_path.iterdir()) == []  # the files have no name
        if fail:
            raise RuntimeError("the video ends early")

    with torch.no_grad():
        clip = backbone.encode_clip(frames(fail=False))
        assert seen == [0, 1, 1, 2, 2, 3]
        assert mapped() == 3  # and no second copy after three more layers
        del clip
        gc.collect()
        assert mapped() == 0
        with pytest.raises(RuntimeError, match="ends early"):
            backbone.encode_clip(frames(fail=True))
        gc.collect()
        assert mapped() == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_memory_is_one_layer_and_a_constant(kind: str) -> None:
    backbone = make_backbone(kind, window=5)
    backbone.trunk.frames_per_chunk = 2
    image = torch.rand(1, 3, 64, 64)
    one_state = backbone.trunk.begin(image)
    for index in range(len(backbone.trunk.stage_dims)):
        one_state = backbone.trunk.run_stage(index, one_state)
    per_frame = sum(x.nbytes for x in tensors_of(one_state))

    peaks = {}
    for num_frames in (12, 60):
        gc.collect()
        with torch.no_grad(), LiveTensors() as memory:
            clip = backbone.encode_clip(image + 0.01 * t for t in range(num_frames))
            held = memory.live
            for t in range(num_frames):
                clip[t]
        assert held == pytest.approx(num_frames * per_frame, rel=0.01)
        peaks[num_frames] = memory.peak
    growth = (peaks[60] - peaks[12]) / 48
    assert growth == pytest.approx(per_frame, rel=0.01)


def held_bytes(content: Any) -> int:
    return sum(x.nbytes for x in tree_leaves(content) if isinstance(x, Tensor))


@pytest.mark.parametrize("options", [{"norm": "frame"}, {"norm": "running"}, {"norm": "frame", "causal": True}])
def test_stream_holds_no_more_after_200_frames(options: dict[str, Any]) -> None:
    backbone = make_backbone("vit", window=5, **options)
    stream = backbone.stream()
    live, saved, counts = [], [], []
    with torch.no_grad(), LiveTensors() as memory:
        for frame in range(200):
            counts.append(len(stream.push(torch.rand(1, 3, 40, 40))))
            live.append(memory.live)
            if frame % 20 == 19:
                saved.append(held_bytes(stream.state_dict()))
    assert counts == [0] * backbone.lookahead + [1] * (200 - backbone.lookahead)
    assert len(set(saved)) == 1
    assert max(live[24:]) <= max(live[:24])  # 3 adapters of 2 frames before and 2 after each frame


@pytest.mark.parametrize("kind", ["vit", "cnn"])
@pytest.mark.parametrize("options", [{"norm": "frame"}, {"norm": "running"}, {"norm": "frame", "causal": True}])
@pytest.mark.parametrize("stopped_at", [0, 1, 5, 14])
def test_stream_goes_on_from_a_file(kind: str, options: dict[str, Any], stopped_at: int) -> None:
    backbone = make_backbone(kind, window=5, **options)
    video = torch.rand(2, 15, 3, 64, 64)
    file = io.BytesIO()
    with torch.no_grad():
        expected, _ = encode_as_stream(backbone, video)
        stream = backbone.stream()
        features = [x for frame in video[:, :stopped_at].unbind(1) for x in stream.push(frame)]
        torch.save(stream.state_dict(), file)
        for frame in video.unbind(1):  # what was saved is a copy
            stream.push(frame)
        file.seek(0)
        second = backbone.stream()
        second.load_state_dict(torch.load(file, weights_only=True))
        features += [x for frame in video[:, stopped_at:].unbind(1) for x in second.push(frame)]
        assert torch.equal(torch.stack([*features, *second.flush()], dim=1), expected)


def test_stream_states_that_do_not_fit() -> None:
    backbone = make_backbone("vit", window=5, norm="frame")
    stream = backbone.stream()
    for _ in range(4):
        stream.push(torch.rand(1, 3, 64, 64))

    def refuse(backbone: ChronoBackbone, content: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            backbone.stream().load_state_dict(content)

    refuse(backbone, {}, "must hold")
    refuse(make_backbone("cnn", norm="frame"), stream.state_dict(), "hold 4 adapters")
    refuse(make_backbone("vit", window=3, norm="frame"), stream.state_dict(), "does not fit")
    for key, message in (("held", "does not fit"), ("first", "does not fit")):
        content = stream.state_dict()
        content["adapters"][0]["window"][key] = None
        refuse(backbone, content, message)
    content = stream.state_dict()
    content["adapters"][0]["window"]["held"]["keys"] = torch.zeros(1)
    refuse(backbone, content, "does not fit")
    content = stream.state_dict()
    content["waiting"][0].pop()
    refuse(backbone, content, "frames that wait, but")
    content = stream.state_dict()
    content["waiting"][0][0] = {"maps": []}
    refuse(backbone, content, r"ViTState must hold \['grid', 'tokens'\]")


@pytest.mark.parametrize("name", ["chrono_causal_s", "chrono_causal_b"])
def test_causal_configs(name: str) -> None:
    """Zero latency, the stream is the clip, and every adapter learns; the trunk made small."""
    small = ["embed_dim=24", "depth=3", "num_heads=2", "token_grid=8"]
    config = compose_config(
        "tracker", ["model=chrono_s", f"backbone={name}", *(f"+backbone.trunk.{o}" for o in small[:3])]
    )
    config.backbone.trunk.token_grid = 8
    config.backbone.hidden = 16
    backbone = build_tracker(config).backbone
    assert backbone.lookahead == 0
    for adapter in backbone.adapters:
        nn.init.normal_(adapter.conv2.weight, std=0.3)
    video = torch.rand(1, 9, 3, 112, 112)
    features = backbone.train()(video)
    (features * torch.randn_like(features)).sum().backward()
    for adapter in backbone.adapters:
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
    with torch.no_grad():
        streamed, ready = encode_as_stream(backbone.eval(), video)
    assert ready == list(range(1, 10))
    torch.testing.assert_close(streamed, features.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("norm", ["clip", "frame", "running"])
@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_frozen_trunk_trains_every_adapter(kind: str, norm: str, checkpointing: bool) -> None:
    """Adapter 0 sees channels-last input without gradient: torch 2.13's group norm crashes on it (CPU)."""
    trunk = make_trunk(kind, frozen=True)
    backbone = ChronoBackbone(trunk, hidden=8, heads=2, norm=norm, checkpointing=checkpointing)  # type: ignore[arg-type]
    if kind == "vit":
        maps = trunk.get_map(trunk.run_stage(0, trunk.begin(torch.rand(2, 3, 64, 64))))
        assert not maps.requires_grad
        assert maps.stride(1) == 1
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


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("norm", ["clip", "frame", "running"])
def test_checkpointing_saves_memory_and_no_gradient_changes(norm: str, frozen: bool) -> None:
    video = torch.rand(2, 7, 3, 64, 64, dtype=torch.float64)
    plain = make_backbone("vit", norm=norm, window=5).double().train()
    saving = make_backbone("vit", norm=norm, window=5, checkpointing=True).double().train()
    saving.load_state_dict(plain.state_dict())
    saved = {}
    for name, backbone in (("plain", plain), ("saving", saving)):
        backbone.trunk.requires_grad_(not frozen)
        backbone.trunk.frames_per_chunk = 4
        kept: dict[int, int] = {}

        def pack(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = backbone(video).square().mul(torch.linspace(0, 1, 24).double()[:, None, None]).sum()
        saved[name] = sum(kept.values())
        loss.backward()
    for (name, ours), theirs in zip(saving.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None, name
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    assert saved["saving"] < saved["plain"] / 2


@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
@torch.no_grad()
def test_activation_store_replaces_in_place(place: Any, tmp_path: Path) -> None:
    store = ActivationStore(place, tmp_path)
    store.append((torch.arange(6.0).view(3, 2), 7))
    before = store[0][0].data_ptr()
    store[0] = (torch.ones(3, 2), 8)
    assert store[0][0].data_ptr() == before
    assert store[0][1] == 8
    assert torch.equal(store.frames(0, slice(1, None, 2))[0], torch.ones(1, 2))
    store[0] = (torch.ones(3, 2, dtype=torch.bfloat16), torch.zeros(4))
    assert [x.dtype for x in store.pop(0)] == [torch.bfloat16, torch.float32]


def test_pool_per_adapter() -> None:
    backbone = ChronoBackbone(make_trunk("cnn"), hidden=8, heads=2, pool=[8, 4, 2, 1])
    assert [adapter.pool for adapter in backbone.adapters] == [8, 4, 2, 1]
    assert backbone(torch.rand(1, 2, 3, 96, 64)).shape == (1, 2, 64, 24, 16)
    with pytest.raises(ValueError, match="3 numbers for 4 adapters"):
        ChronoBackbone(make_trunk("cnn"), pool=[8, 4, 2])


def test_compiled_blocks_serve_clips_and_streams() -> None:
    torch.manual_seed(0)
    trunk = DinoV2(embed_dim=32, depth=3, num_heads=2, token_grid=3)
    backbone = ChronoBackbone(trunk, hidden=8, heads=2, window=3, pool=2, norm="frame").eval()
    video = torch.rand(1, 5, 3, 42, 42)
    with torch.no_grad():
        expected = backbone(video)
        torch._dynamo.reset()
        counters = torch._dynamo.utils.counters
        counters.clear()
        backbone.compile(backend="eager", dynamic=False, fullgraph=True)
        clip = backbone.encode_clip(video.unbind(1))
        stream = backbone.stream()
        streamed = [features for frame in video.unbind(1) for features in stream.push(frame)]
        streamed += stream.flush()
    assert 1 <= counters["stats"]["unique_graphs"] <= 2  # pieces of several frames, and single frames
    for t in range(5):
        torch.testing.assert_close(clip[t], expected[:, t], atol=1e-5, rtol=0)
        torch.testing.assert_close(streamed[t], expected[:, t], atol=1e-5, rtol=0)
