from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trackbench.layers.temporal import LocalAttention, Moments, TemporalAdapter


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
    assert adapter.lookahead == 0


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (2, 3)])
def test_maps_that_the_pool_does_not_divide(size: tuple[int, int]) -> None:
    adapter = trained_adapter(pool=4)
    result = adapter(torch.randn(1, 3, 6, *size))
    assert result.shape == (1, 3, 6, *size)
    assert result.isfinite().all()


def in_pieces(adapter: TemporalAdapter, maps: Tensor, sizes: list[int], overwrite: bool = False) -> Tensor:
    """The adapter on a clip cut into pieces; ``overwrite`` spoils a piece as soon as its result is there."""
    pieces = list(maps.clone().split(sizes, dim=1))
    moments = Moments()
    if adapter.norm_over == "clip":
        for piece in pieces:
            moments.update(piece)
    results = []
    for index, pooled in enumerate(adapter.attend_chunks(iter(pieces), moments)):
        results.append(adapter.decode(pooled, maps.shape[-2], maps.shape[-1]))
        if overwrite:
            pieces[index].fill_(1e6)
    assert [result.shape[1] for result in results] == sizes
    return torch.cat(results, dim=1)


@pytest.mark.parametrize("norm", ["clip", "frame", "running"])
@pytest.mark.parametrize("sizes", [[23], [1] * 23, [8, 8, 7], [2, 15, 1, 5]])
def test_pieces_equal_clip(sizes: list[int], norm: str) -> None:
    adapter = trained_adapter(window=9, norm=norm).double()
    maps = torch.randn(2, 23, 6, 8, 12, dtype=torch.float64) + torch.arange(23)[:, None, None, None]
    pieces = in_pieces(adapter, maps, sizes, overwrite=True)
    torch.testing.assert_close(pieces, adapter(maps), atol=1e-10, rtol=0)


def test_moments_of_pieces_are_those_of_the_clip() -> None:
    """In float32 frames with an offset that E[x^2] - E[x]^2 would not survive."""
    maps = torch.randn(2, 40, 6, 5, 7) * 3 + 1000 + torch.arange(40)[:, None, None, None]
    moments = Moments()
    for piece in maps.split(7, dim=1):
        moments.update(piece)
    flat = maps.double().flatten(1)
    torch.testing.assert_close(moments.mean, flat.mean(dim=1), atol=1e-4, rtol=0)
    torch.testing.assert_close(moments.variance, flat.var(dim=1, correction=0), atol=0, rtol=1e-5)


def test_running_norm_takes_the_frames_so_far() -> None:
    maps = torch.randn(2, 9, 6, 4, 5, dtype=torch.float64) + torch.arange(9)[:, None, None, None]
    moments = Moments()
    means, variances = (
        torch.cat(x, dim=1) for x in zip(*map(moments.update, maps.split([2, 4, 3], 1)), strict=True)
    )
    for t in range(9):
        past = maps[:, : t + 1].flatten(1)
        torch.testing.assert_close(means[:, t], past.mean(dim=1))
        torch.testing.assert_close(variances[:, t], past.var(dim=1, correction=0))
    first = trained_adapter(norm="running", causal=True).double()
    clip = trained_adapter(norm="clip").double()
    clip.load_state_dict(first.state_dict())
    torch.testing.assert_close(first(maps)[:, :1], clip(maps[:, :1]))


@pytest.mark.parametrize("norm", ["frame", "running"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_frames", [1, 3, 6, 23])
def test_stream_equals_clip(num_frames: int, causal: bool, norm: str) -> None:
    adapter = trained_adapter(window=9, norm=norm, causal=causal)
    maps = torch.randn(2, num_frames, 6, 8, 12)
    stream = adapter.stream()
    ready = [stream.push(frame) for frame in maps.unbind(1)]
    lookahead = adapter.lookahead
    assert lookahead == (0 if causal else 4)
    assert [len(results) for results in ready] == [int(t >= lookahead) for t in range(num_frames)]
    results = [result for results in ready for result in results] + stream.flush()
    torch.testing.assert_close(torch.stack(results, dim=1), adapter(maps), atol=1e-5, rtol=0)


def test_stream_without_frames() -> None:
    assert trained_adapter(norm="frame").stream().flush() == []


def test_checkpointing_leaves_gradients_as_they_are() -> None:
    plain = trained_adapter(window=5).double()
    saving = TemporalAdapter(6, hidden=8, heads=2, window=5, checkpointing=True).double()
    saving.load_state_dict(plain.state_dict())
    maps = torch.randn(1, 7, 6, 8, 8, dtype=torch.float64)
    for adapter in (plain, saving):
        adapter(maps).square().sum().backward()
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


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
    with pytest.raises(ValueError, match="backend"):
        TemporalAdapter(8, attention_backend="flash")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="whole clip must be counted"):
        next(TemporalAdapter(8).attend_chunks([torch.zeros(1, 1, 8, 4, 4)], Moments()))
