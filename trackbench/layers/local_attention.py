"""Attention along time in a local window: one function, several implementations."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

AttentionBackend = Literal["auto", "banded", "flex", "xformers"]
ATTENTION_BACKENDS = ("auto", "banded", "flex", "xformers")

FLEX_BLOCK = 128  # frames per side of FlexAttention's blocks


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    causal: bool = False,
    first: int = 0,
    backend: AttentionBackend = "auto",
) -> Tensor:
    """Softmax attention in which frame i sees the frames j with |i - j| <= window // 2.

    Time and memory grow linearly with the number of queries, with every backend.

    Args:
        q: (n, heads, Tq, d), queries of Tq consecutive frames.
        k: (n, heads, Tk, d), keys of Tk consecutive frames, among them those of the queries.
        v: (n, heads, Tk, d).
        window: frames that a frame sees, itself in the middle.
        causal: no frame sees a later one; it sees itself and the window // 2 frames before it.
        first: which key is of the same frame as the first query.
        backend: "banded": queries in blocks, each with the keys within its reach, on any device. "flex":
            FlexAttention, compiled; "xformers": its memory-efficient attention; both on CUDA only. "auto":
            the banded one, which needs neither a compiler nor a package.

    Returns:
        (n, heads, Tq, d).

    Raises:
        ValueError: a backend that is unknown or cannot run here; queries without keys.
    """
    if first < 0 or first + q.shape[2] > k.shape[2]:
        raise ValueError(f"{q.shape[2]} queries from frame {first} on do not lie among {k.shape[2]} keys")
    before = window // 2
    after = 0 if causal else before
    # keys that no query sees; afterwards at most `before` keys precede the first query, `after` follow the last
    unseen = max(0, first - before)
    seen = slice(unseen, first + q.shape[2] + after)
    k, v, first = k[:, :, seen], v[:, :, seen], first - unseen
    return _implementation(backend, q.device)(q, k, v, before, after, first)


def in_reach(query_time: Tensor, key_time: Tensor, before: int, after: int) -> Tensor:
    """Which frames see which: the mask that every implementation follows."""
    age = query_time - key_time
    return (age <= before) & (age >= -after)


Implementation = Callable[[Tensor, Tensor, Tensor, int, int, int], Tensor]


def _implementation(backend: str, device: torch.device) -> Implementation:
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(f"attention backend must be one of {', '.join(ATTENTION_BACKENDS)}, got {backend!r}")
    if backend in ("auto", "banded"):
        return banded_attention
    if device.type != "cuda":
        raise ValueError(f"attention backend {backend!r} needs a CUDA device, got {device}; use 'banded'")
    if backend == "flex":
        return flex_attention
    if importlib.util.find_spec("xformers") is None:
        raise ValueError("attention backend 'xformers' needs the package xformers; use 'banded' or 'flex'")
    return xformers_attention


def banded_attention(q: Tensor, k: Tensor, v: Tensor, before: int, after: int, first: int) -> Tensor:
    """Queries in blocks, each against the keys that any of the block sees."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    block = max(2 * (before + after), 16)
    span = before + block + after
    if span >= num_keys:  # one block would hold nearly everything
        query_time = first + torch.arange(num_queries, device=q.device)
        key_time = torch.arange(num_keys, device=q.device)
        mask = in_reach(query_time[:, None], key_time, before, after)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    blocks = -(-num_queries // block)
    q = F.pad(q, (0, 0, 0, blocks * block - num_queries)).unflatten(2, (blocks, block))
    # (n, heads, blocks, block, d) queries against (n, heads, blocks, span, d) keys
    left = before - first
    right = blocks * block + before + after - left - num_keys
    k, v = (F.pad(x, (0, 0, left, right)).unfold(2, span, block).transpose(-1, -2) for x in (k, v))
    start = block * torch.arange(blocks, device=q.device).view(blocks, 1, 1)
    query_time = first + start + torch.arange(block, device=q.device)[:, None]
    key_time = start + torch.arange(span, device=q.device) - left
    mask = in_reach(query_time, key_time, before, after) & (key_time >= 0) & (key_time < num_keys)
    mask = mask | (query_time >= first + num_queries)  # padded queries must see something, or their softmax is NaN
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(2, 3)[:, :, :num_queries]


def flex_attention(q: Tensor, k: Tensor, v: Tensor, before: int, after: int, first: int) -> Tensor:
    """PyTorch's FlexAttention (Dong et al., 2024, arXiv 2412.05496) with a mask of blocks."""
    mask = _flex_mask(q.shape[2], k.shape[2], before, after, first, q.device)
    return _compiled_flex()(q.contiguous(), k.contiguous(), v.contiguous(), block_mask=mask)


@lru_cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention as flex

    return torch.compile(flex)


@lru_cache(maxsize=64)
def _flex_mask(num_queries: int, num_keys: int, before: int, after: int, first: int, device: torch.device) -> Any:
    """The blocks on the band, without a mask of queries by keys."""
    from torch.nn.attention.flex_attention import BlockMask

    starts = torch.arange(0, num_queries, FLEX_BLOCK)
    ends = (starts + FLEX_BLOCK).clamp(max=num_queries) - 1
    low = (starts + first - before).clamp(min=0) // FLEX_BLOCK
    high = (ends + first + after).clamp(max=num_keys - 1) // FLEX_BLOCK
    # every row must be as long as all keys have blocks; only the first `count` entries of a row are read
    indices = low[:, None] + torch.arange(-(-num_keys // FLEX_BLOCK))
    counts = (high - low + 1).int()
    return BlockMask.from_kv_blocks(
        counts[None, None].to(device),
        indices.clamp(max=indices.shape[1] - 1).int()[None, None].to(device),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=lambda b, h, query, key: in_reach(query + first, key, before, after),
        seq_lengths=(num_queries, num_keys),
    )


def xformers_attention(q: Tensor, k: Tensor, v: Tensor, before: int, after: int, first: int) -> Tensor:
    """The operator of the published Chrono."""
    operators: Any = importlib.import_module("xformers.ops")
    bias = importlib.import_module("xformers.ops.fmha.attn_bias").LocalAttentionFromBottomRightMask(
        **bottom_right_window(q.shape[2], k.shape[2], before, after, first)
    )
    # its layout is (n, T, heads, d)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return operators.memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)


def bottom_right_window(num_queries: int, num_keys: int, before: int, after: int, first: int) -> dict[str, int]:
    """The same window with the last query at the last key, as xformers counts it."""
    behind = num_keys - num_queries - first  # keys after the last query, at most `after`
    return {"window_left": before + behind, "window_right": after - behind}
