from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trackbench.layers.temporal import LocalAttention, TemporalAdapter, local_attention


def brute_force(q: Tensor, k: Tensor, v: Tensor, window: int, causal: bool) -> Tensor:
    """Frame by frame, with the keys in its window cut out."""
    T, reach = q.shape[2], window // 2
    frames = []
    for i in range(T):
        seen = slice(max(0, i - reach), i + 1 if causal else i + reach + 1)
        weights = ((q[:, :, i : i + 1] * k[:, :, seen]).sum(-1) / q.shape[-1] ** 0.5).softmax(-1)
        frames.append((weights[..., None] * v[:, :, seen]).sum(2))
    return torch.stack(frames, dim=2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [1, 5, 6, 13])
@pytest.mark.parametrize("num_frames", [1, 4, 13, 36, 37, 61, 150])
def test_local_attention_is_brute_force(num_frames: int, window: int, causal: bool) -> None:
    q, k, v = (torch.randn(2, 3, num_frames, 4, dtype=torch.float64) for _ in range(3))
    expected = brute_force(q, k, v, window, causal)
    torch.testing.assert_close(local_attention(q, k, v, window, causal), expected)


@pytest.mark.parametrize("num_frames", [10, 101])
def test_local_attention_gradients_are_brute_force(num_frames: int) -> None:
    inputs = [torch.randn(1, 2, num_frames, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(1, 2, num_frames, 4, dtype=torch.float64)
    ours = torch.autograd.grad((local_attention(*inputs, 13) * weight).sum(), inputs)
    theirs = torch.autograd.grad((brute_force(*inputs, 13, False) * weight).sum(), inputs)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected)


def trained_adapter(**options: object) -> TemporalAdapter:
    adapter = TemporalAdapter(6, hidden=8, heads=2, **options)  # type: ignore[arg-type]
    torch.nn.init.normal_(adapter.conv2.weight, std=0.2)
    return adapter


def test_new_adapter_adds_nothing() -> None:
    assert TemporalAdapter(6, hidden=8)(torch.randn(2, 3, 6, 8, 8)).abs().max() == 0


def test_samples_do_not_mix() -> None:
    adapter = trained_adapter()
    maps = torch.randn(2, 5, 6, 8, 12)
    torch.testing.assert_close(adapter(maps)[1:], adapter(maps[1:]))


def test_clip_norm_reaches_every_frame_and_frame_norm_the_window() -> None:
    maps = torch.randn(1, 20, 6, 8, 8)
    changed = maps.clone()
    changed[:, -1] = torch.randn(1, 6, 8, 8)
    for norm, first_changed in (("clip", 0), ("frame", 19 - 2)):
        adapter = trained_adapter(window=5, norm=norm)
        difference = (adapter(maps) - adapter(changed)).abs().amax(dim=(0, 2, 3, 4))
        assert (difference[first_changed:] > 1e-4).all()
        assert (difference[:first_changed] < 1e-6).all()


def test_causal_adapter_does_not_look_ahead() -> None:
    adapter = trained_adapter(window=5, norm="frame", causal=True)
    maps = torch.randn(1, 9, 6, 8, 8)
    torch.testing.assert_close(adapter(maps)[:, :4], adapter(maps[:, :4]))
    assert (adapter.context, adapter.lookahead) == (2, 0)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (2, 3)])
def test_maps_that_the_pool_does_not_divide(size: tuple[int, int]) -> None:
    adapter = trained_adapter(pool=4)
    result = adapter(torch.randn(1, 3, 6, *size))
    assert result.shape == (1, 3, 6, *size)
    assert result.isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_frames", [1, 3, 6, 23])
def test_stream_equals_clip(num_frames: int, causal: bool) -> None:
    adapter = trained_adapter(window=9, norm="frame", causal=causal)
    maps = torch.randn(2, num_frames, 6, 8, 12)
    stream = adapter.stream()
    ready = [stream.push(frame) for frame in maps.unbind(1)]
    if causal:
        assert [len(results) for results in ready] == [1] * num_frames
    results = [result for results in ready for result in results] + stream.flush()
    torch.testing.assert_close(torch.stack(results, dim=1), adapter(maps), atol=1e-5, rtol=0)


def test_stream_memory_is_one_window() -> None:
    stream = trained_adapter(window=5, norm="frame").stream()
    for _ in range(30):
        stream.push(torch.randn(1, 6, 4, 4))
    assert len(stream.keys_values) <= 5
    assert len(stream.pending) == 2


def test_trains_on_channels_last_input_without_gradient() -> None:
    """torch 2.13 crashes in the CPU backward of group norm on such an input."""
    adapter = trained_adapter()
    maps = torch.randn(2, 8, 8, 6).permute(0, 3, 1, 2)[None]
    F.mse_loss(adapter(maps), torch.zeros(1, 2, 6, 8, 8)).backward()
    assert adapter.norm.weight.grad is not None
    assert adapter.norm.weight.grad.isfinite().all()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="norm"):
        TemporalAdapter(6, norm="batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="causal"):
        TemporalAdapter(6, causal=True)
    with pytest.raises(ValueError, match="frame by frame"):
        TemporalAdapter(6).stream()
    with pytest.raises(ValueError, match="heads"):
        LocalAttention(6, heads=4)
    with pytest.raises(ValueError, match="window"):
        LocalAttention(8, heads=4, window=0)
