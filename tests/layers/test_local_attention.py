from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trackbench.layers import local_attention as module
from trackbench.layers.local_attention import bottom_right_window, in_reach, local_attention

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="this implementation runs on CUDA only")


def brute_force(q: Tensor, k: Tensor, v: Tensor, window: int, causal: bool, first: int = 0) -> Tensor:
    """Frame by frame, with the keys in its window cut out."""
    reach = window // 2
    frames = []
    for i in range(q.shape[2]):
        now = first + i
        seen = slice(max(0, now - reach), now + 1 if causal else now + reach + 1)
        weights = ((q[:, :, i : i + 1] * k[:, :, seen]).sum(-1) / q.shape[-1] ** 0.5).softmax(-1)
        frames.append((weights[..., None] * v[:, :, seen]).sum(2))
    return torch.stack(frames, dim=2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [1, 5, 6, 13])
@pytest.mark.parametrize("num_frames", [1, 4, 13, 36, 37, 61, 150])
def test_banded_is_brute_force(num_frames: int, window: int, causal: bool) -> None:
    q, k, v = (torch.randn(2, 3, num_frames, 4, dtype=torch.float64) for _ in range(3))
    expected = brute_force(q, k, v, window, causal)
    torch.testing.assert_close(local_attention(q, k, v, window, causal), expected)


PIECES = [(1, 7, 3), (5, 9, 0), (5, 9, 4), (40, 60, 20), (70, 90, 3), (100, 140, 25)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("num_queries", "num_keys", "first"), PIECES)
def test_queries_of_some_frames(num_queries: int, num_keys: int, first: int, causal: bool) -> None:
    q = torch.randn(2, 3, num_queries, 4, dtype=torch.float64)
    k, v = (torch.randn(2, 3, num_keys, 4, dtype=torch.float64) for _ in range(2))
    expected = brute_force(q, k, v, 9, causal, first)
    torch.testing.assert_close(local_attention(q, k, v, 9, causal, first), expected)


@pytest.mark.parametrize("num_frames", [10, 101])
def test_banded_gradients_are_brute_force(num_frames: int) -> None:
    inputs = [torch.randn(1, 2, num_frames, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(1, 2, num_frames, 4, dtype=torch.float64)
    ours = torch.autograd.grad((local_attention(*inputs, 13) * weight).sum(), inputs)
    theirs = torch.autograd.grad((brute_force(*inputs, 13, False) * weight).sum(), inputs)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected)


class LargestTensor(TorchDispatchMode):
    """The elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.itemsize for x in tree_leaves(results) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *sizes])
        return results


def test_banded_never_holds_a_square() -> None:
    q, k, v = (torch.randn(1, 1, 4000, 2) for _ in range(3))
    with LargestTensor() as seen:
        local_attention(q, k, v, 13)
    assert 0 < seen.elements < 100 * 4000  # 4000 x 4000 would be 16 million


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "first"), [*PIECES, (1, 1, 0), (300, 300, 0), (130, 300, 100), (256, 270, 7)]
)
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_mask_is_brute_force(
    monkeypatch: pytest.MonkeyPatch, num_queries: int, num_keys: int, first: int, causal: bool
) -> None:
    """FlexAttention as it runs without a compiler, on any device, under our mask of blocks."""
    monkeypatch.setattr(module, "_compiled_flex", lambda: flex_attention.flex_attention)
    q = torch.randn(1, 2, num_queries, 16)
    k, v = (torch.randn(1, 2, num_keys, 16) for _ in range(2))
    actual = module.flex_attention(q, k, v, 6, 0 if causal else 6, first)
    torch.testing.assert_close(actual, brute_force(q, k, v, 13, causal, first), atol=1e-5, rtol=0)
    blocks = module._flex_mask(num_queries, num_keys, 6, 0 if causal else 6, first, q.device)
    assert int(blocks.kv_num_blocks.max()) <= 3  # the band and no more, however many keys there are


@needs_cuda
@pytest.mark.parametrize("backend", ["flex", "xformers"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "first"), [(20, 20, 0), (200, 200, 0), (8, 20, 6), (1, 13, 6)]
)
def test_backends_on_cuda(backend: str, num_queries: int, num_keys: int, first: int, causal: bool) -> None:
    if backend == "xformers":
        pytest.importorskip("xformers")
    q = torch.randn(64, 4, num_queries, 32, device="cuda", requires_grad=True)
    k, v = (torch.randn(64, 4, num_keys, 32, device="cuda", requires_grad=True) for _ in range(2))
    weight = torch.randn_like(q)
    actual = local_attention(q, k, v, 13, causal, first, backend)  # type: ignore[arg-type]
    expected = brute_force(q, k, v, 13, causal, first)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    ours = torch.autograd.grad((actual * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for gradient, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-3, rtol=0)


def test_mask_is_that_of_xformers() -> None:
    attn_bias = pytest.importorskip("xformers.ops.fmha.attn_bias")
    cases = [(6, 6, 1, 0, 0), (6, 6, 30, 0, 0), (6, 6, 8, 6, 6), (6, 6, 8, 2, 3), (6, 0, 8, 6, 0), (2, 2, 5, 0, 2)]
    for before, after, num_queries, first, behind in cases:
        num_keys = first + num_queries + behind
        window = bottom_right_window(num_queries, num_keys, before, after, first)
        theirs = attn_bias.LocalAttentionFromBottomRightMask(**window).materialize((num_queries, num_keys))
        query_time = first + torch.arange(num_queries)[:, None]
        assert torch.equal(theirs == 0, in_reach(query_time, torch.arange(num_keys), before, after))
    published = attn_bias.LocalAttentionFromBottomRightMask(window_left=6, window_right=6)
    assert bottom_right_window(40, 40, 6, 6, 0) == {"window_left": 6, "window_right": 6}
    time = torch.arange(40)
    assert torch.equal(published.materialize((40, 40)) == 0, (time[:, None] - time).abs() <= 6)


def test_refusals() -> None:
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match="one of auto, banded, flex, xformers"):
        local_attention(q, q, q, 3, backend="flash")  # type: ignore[arg-type]
    for backend in ("flex", "xformers"):
        with pytest.raises(ValueError, match=f"'{backend}' needs a CUDA device, got cpu"):
            local_attention(q, q, q, 3, backend=backend)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="4 queries from frame 1"):
        local_attention(q, q, q, 3, first=1)
