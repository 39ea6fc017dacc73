"""Attention along time in a local window, and Chrono's temporal adapter around it.

"Exploring Temporally-Aware Features for Point Tracking" (Kim et al., CVPR 2025), the temporal adapter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackbench.layers.precision import at_least_float32

AdapterNorm = Literal["clip", "frame"]


def local_attention(q: Tensor, k: Tensor, v: Tensor, window: int, causal: bool = False) -> Tensor:
    """Softmax attention in which frame i sees the frames j with |i - j| <= window // 2.

    Time and memory grow linearly with T: queries go in blocks, each with the keys within its reach.

    Args:
        q: (n, heads, T, d).
        k: (n, heads, T, d).
        v: (n, heads, T, d).
        window: frames that a frame sees, itself in the middle.
        causal: no frame sees a later one; it sees itself and the window // 2 frames before it.

    Returns:
        (n, heads, T, d).
    """
    reach, T = window // 2, q.shape[2]
    block = max(4 * reach, 16)
    if block + 2 * reach >= T:  # one block would hold nearly everything
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_band(T, reach, causal, q.device))

    blocks = -(-T // block)
    rest = blocks * block - T
    # (n, heads, blocks, block, d) queries against (n, heads, blocks, block + 2 reach, d) keys
    q = F.pad(q, (0, 0, 0, rest)).unflatten(2, (blocks, block))
    k, v = (
        F.pad(x, (0, 0, reach, rest + reach)).unfold(2, block + 2 * reach, block).transpose(-1, -2) for x in (k, v)
    )
    query_time = torch.arange(blocks * block, device=q.device).view(blocks, block, 1)
    key_time = torch.arange(block + 2 * reach, device=q.device) - reach
    key_time = key_time + block * torch.arange(blocks, device=q.device).view(blocks, 1, 1)
    mask = _in_reach(query_time, key_time, reach, causal) & (key_time >= 0) & (key_time < T)
    mask = mask | (query_time >= T)  # padded queries must see something, or their softmax is NaN
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(2, 3)[:, :, :T]


def _in_reach(query_time: Tensor, key_time: Tensor, reach: int, causal: bool) -> Tensor:
    age = query_time - key_time
    return (age <= reach) & (age >= (0 if causal else -reach))


def _band(num_frames: int, reach: int, causal: bool, device: torch.device) -> Tensor:
    time = torch.arange(num_frames, device=device)
    return _in_reach(time[:, None], time[None, :], reach, causal)


class LocalAttention(nn.Module):
    """Multi-head attention along time in a local window.

    Args:
        dim: channels C, a multiple of ``heads``.
        heads: attention heads.
        window: see :func:`local_attention`.
        causal: see :func:`local_attention`.
    """

    def __init__(self, dim: int, heads: int = 4, window: int = 13, causal: bool = False) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        if window < 1:
            raise ValueError(f"window must be at least 1 frame, got {window}")
        self.heads = heads
        self.window = window
        self.causal = causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, T, C) -> queries, keys and values, each (n, heads, T, C / heads)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def merge(self, attended: Tensor) -> Tensor:
        """Heads (n, heads, T, C / heads) -> output (n, T, C)."""
        return self.proj(attended.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        """(n, T, C) -> (n, T, C)."""
        return self.merge(local_attention(*self.project(x), self.window, self.causal))


class TemporalAdapter(nn.Module):
    """Chrono's temporal adapter: what a block's feature maps lack of their neighbours in time.

    Norm -> 3x3 convolution -> pooling by a strided convolution -> attention along time at every pooled
    location -> upsampling by a transposed convolution -> 3x3 convolution. The last one starts at zero,
    so that a new adapter changes nothing. Maps that ``pool`` does not divide are padded with their border and
    cropped again.

    Args:
        dim: channels C of the maps.
        hidden: channels inside.
        heads: attention heads.
        window: frames that a frame sees.
        pool: side of the pooled patches in cells.
        norm: what the group norm takes its mean and variance over: "clip" (published) all frames at once, so
            that every frame depends on every other; "frame" each frame by itself, which allows streaming.
        causal: no frame sees a later one (with norm "frame").
    """

    def __init__(
        self,
        dim: int,
        hidden: int = 128,
        heads: int = 4,
        window: int = 13,
        pool: int = 4,
        norm: AdapterNorm = "clip",
        causal: bool = False,
    ) -> None:
        super().__init__()
        if norm not in ("clip", "frame"):
            raise ValueError(f"norm must be 'clip' or 'frame', got {norm!r}")
        if causal and norm == "clip":
            raise ValueError("a causal adapter needs norm='frame': norm='clip' looks at the whole clip")
        self.pool = pool
        self.per_frame_norm = norm == "frame"
        self.norm = nn.GroupNorm(1, dim)
        self.conv1 = nn.Conv2d(dim, hidden, 3, padding=1)
        self.conv_pool = nn.Conv2d(hidden, hidden, pool, stride=pool)
        self.norm2 = nn.LayerNorm(hidden)
        self.attn_temp = LocalAttention(hidden, heads, window, causal)
        self.conv_upsample = nn.ConvTranspose2d(hidden, hidden, pool, stride=pool)
        self.conv2 = nn.Conv2d(hidden, dim, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        if self.conv2.bias is not None:
            nn.init.zeros_(self.conv2.bias)

    @property
    def context(self) -> int | None:
        """Frames on each side that a frame's result depends on; None: the whole clip."""
        return self.attn_temp.window // 2 if self.per_frame_norm else None

    @property
    def lookahead(self) -> int | None:
        """Later frames that a frame's result depends on; None: the whole clip."""
        return 0 if self.attn_temp.causal else self.context

    def forward(self, maps: Tensor) -> Tensor:
        """Maps of a clip (B, T, C, h, w) -> what to add to them (B, T, C, h, w)."""
        B, T = maps.shape[:2]
        return next(self.in_chunks([maps.flatten(0, 1)], B)).unflatten(0, (B, T))

    def in_chunks(self, chunks: list[Tensor], batch_size: int) -> Iterator[Tensor]:
        """:meth:`forward` on frames in pieces, so that only one piece at a time is unpooled.

        Args:
            chunks: (n, C, h, w) each, together the frames of all samples, sample by sample.
            batch_size: number of samples.

        Yields:
            What to add to each piece, (n, C, h, w).
        """
        h, w = chunks[0].shape[-2:]
        lengths = [len(chunk) for chunk in chunks]
        statistics = self.statistics(chunks, batch_size).split(lengths)
        pooled = torch.cat([self.encode(maps, moments) for maps, moments in zip(chunks, statistics, strict=True)])
        del chunks  # the caller replaces them while this generator waits
        pooled = self.attend(pooled.unflatten(0, (batch_size, -1))).flatten(0, 1)
        for part in pooled.split(lengths):
            yield self.decode(part, h, w)

    def statistics(self, chunks: list[Tensor], batch_size: int) -> Tensor:
        """Mean and variance to normalise each frame with: (frames, 2)."""
        moments = [torch.var_mean(at_least_float32(maps), dim=(1, 2, 3), correction=0) for maps in chunks]
        variance, mean = (torch.cat(part).view(batch_size, -1) for part in zip(*moments, strict=True))
        if not self.per_frame_norm:  # frames are equally large: the clip's moments follow from theirs
            clip_mean = mean.mean(dim=1, keepdim=True)
            clip_variance = (variance + (mean - clip_mean).square()).mean(dim=1, keepdim=True)
            mean, variance = clip_mean.expand_as(mean), clip_variance.expand_as(variance)
        return torch.stack([mean, variance], dim=-1).flatten(0, 1)

    def _normalize(self, maps: Tensor, statistics: Tensor) -> Tensor:
        """Group norm with one group, by given statistics (n, 2)."""
        mean, variance = statistics[..., None, None, None].unbind(1)
        scale = (variance + self.norm.eps).rsqrt() * self.norm.weight[:, None, None]
        return (at_least_float32(maps) - mean) * scale + self.norm.bias[:, None, None]

    def attend(self, pooled: Tensor) -> Tensor:
        """Attention along time on pooled frames (B, T, hidden, hp, wp), added to them."""
        B, _, _, hp, wp = pooled.shape
        sequence = pooled.permute(0, 3, 4, 1, 2).flatten(0, 2)
        sequence = sequence + self.attn_temp(self.norm2(sequence))
        return sequence.unflatten(0, (B, hp, wp)).permute(0, 3, 4, 1, 2)

    def encode(self, maps: Tensor, statistics: Tensor) -> Tensor:
        """Frames (n, C, h, w), statistics (n, 2) -> pooled (n, hidden, ceil(h / pool), ceil(w / pool))."""
        x = F.relu(self.conv1(self._normalize(maps, statistics)))
        h, w = x.shape[-2:]
        right, below = -w % self.pool, -h % self.pool
        if right or below:
            x = F.pad(x, (0, right, 0, below), mode="replicate")
        return F.relu(self.conv_pool(x))

    def decode(self, pooled: Tensor, h: int, w: int) -> Tensor:
        """Pooled frames (n, hidden, hp, wp) -> (n, C, h, w)."""
        x = F.relu(self.conv_upsample(pooled))[..., :h, :w]
        return self.conv2(x)

    def stream(self) -> AdapterStream:
        """Frame by frame with the results of :meth:`forward`. Raises ValueError for norm "clip"."""
        return AdapterStream(self)


class _PendingFrame(NamedTuple):
    query: Tensor
    pooled: Tensor
    size: tuple[int, int]


class AdapterStream:
    """A :class:`TemporalAdapter` fed frame by frame, with memory for one window of pooled frames."""

    def __init__(self, adapter: TemporalAdapter) -> None:
        if adapter.context is None or adapter.lookahead is None:
            raise ValueError("an adapter with norm='clip' cannot run frame by frame; use norm='frame'")
        self.adapter = adapter
        self.reach, self.lookahead = adapter.context, adapter.lookahead
        self.keys_values: deque[tuple[Tensor, Tensor]] = deque()
        self.pending: deque[_PendingFrame] = deque()
        self.frames_before = 0  # frames in keys_values that come before the first pending one

    def push(self, maps: Tensor) -> list[Tensor]:
        """Take the next frame's maps (B, C, h, w); return the results of that shape that became ready."""
        adapter = self.adapter
        pooled = adapter.encode(maps, adapter.statistics([maps], len(maps)))
        sequence = pooled.permute(0, 2, 3, 1).flatten(0, 2)[:, None]
        q, k, v = adapter.attn_temp.project(adapter.norm2(sequence))
        self.pending.append(_PendingFrame(q, pooled, (maps.shape[-2], maps.shape[-1])))
        self.keys_values.append((k, v))
        return [self._pop()] if len(self.pending) > self.lookahead else []

    def flush(self) -> list[Tensor]:
        """The video has ended: the results of the frames whose window it cuts off."""
        return [self._pop() for _ in range(len(self.pending))]

    def _pop(self) -> Tensor:
        frame = self.pending.popleft()
        window = list(self.keys_values)[: self.frames_before + 1 + self.lookahead]
        k, v = (torch.cat(part, dim=2) for part in zip(*window, strict=True))
        attended = self.adapter.attn_temp.merge(F.scaled_dot_product_attention(frame.query, k, v))
        n, hidden, hp, wp = frame.pooled.shape
        attended = attended.view(n, hp, wp, hidden).permute(0, 3, 1, 2)
        if self.frames_before == self.reach:
            self.keys_values.popleft()
        else:
            self.frames_before += 1
        return self.adapter.decode(frame.pooled + attended, *frame.size)
