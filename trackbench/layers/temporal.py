"""Attention along time in a local window, and Chrono's temporal adapter around it.

"Exploring Temporally-Aware Features for Point Tracking" (Kim et al., CVPR 2025), the temporal adapter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trackbench.layers.local_attention import ATTENTION_BACKENDS, AttentionBackend, local_attention
from trackbench.layers.precision import at_least_float32

AdapterNorm = Literal["clip", "frame", "running"]
ADAPTER_NORMS = ("clip", "frame", "running")


class LocalAttention(nn.Module):
    """Multi-head attention along time in a local window.

    Args:
        dim: channels C, a multiple of ``heads``.
        heads: attention heads.
        window: see :func:`local_attention`.
        causal: see :func:`local_attention`.
        backend: see :func:`local_attention`.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        window: int = 13,
        causal: bool = False,
        backend: AttentionBackend = "auto",
    ) -> None:
        super().__init__()
        if backend not in ATTENTION_BACKENDS:
            raise ValueError(f"attention backend must be one of {', '.join(ATTENTION_BACKENDS)}, got {backend!r}")
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        if window < 1:
            raise ValueError(f"window must be at least 1 frame, got {window}")
        self.heads = heads
        self.window = window
        self.causal = causal
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, T, C) -> queries, keys and values, each (n, heads, T, C / heads)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, first: int = 0) -> Tensor:
        """Queries (n, heads, Tq, C / heads), the first at key ``first`` -> output (n, Tq, C)."""
        attended = local_attention(q, k, v, self.window, self.causal, first, self.backend)
        return self.proj(attended.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        """(n, T, C) -> (n, T, C)."""
        return self.attend(*self.project(x))


def frame_moments(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over channels and cells of maps (B, n, C, h, w), each (B, n)."""
    maps, dims = at_least_float32(maps), (2, 3, 4)
    if torch.is_grad_enabled():
        variance, mean = torch.var_mean(maps, dim=dims, correction=0)
        return mean, variance
    # several times faster on the CPU, but autograd would keep the differences
    mean = maps.mean(dim=dims, keepdim=True)
    return mean.flatten(1), (maps - mean).square_().mean(dim=dims)


class Moments:
    """Mean and variance of all frames so far, jointly over channels, frames and cells, in float64.

    Pieces are merged through their own means (Chan, Golub and LeVeque, 1979), which no offset of the values harms.
    """

    def __init__(self) -> None:
        self.num_frames = 0
        self.mean: Tensor | None = None
        self.variance: Tensor | None = None

    def update(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Take the next frames (B, n, C, h, w); mean and variance up to and including each, (B, n)."""
        mean, variance = frame_moments(maps)
        dtype = torch.float32 if mean.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        mean, variance = mean.to(dtype), variance.to(dtype)
        if self.mean is None or self.variance is None:
            self.mean, self.variance = mean[:, 0], torch.zeros_like(mean[:, 0])
        count = self.num_frames + torch.arange(1, mean.shape[1] + 1, device=mean.device)
        shift = mean - self.mean[:, None]
        moved = shift.cumsum(dim=1) / count
        # second moment about the mean before, then about the new one
        second = self.num_frames * self.variance[:, None] + (variance + shift.square()).cumsum(dim=1)
        means, variances = self.mean[:, None] + moved, (second / count - moved.square()).clamp(min=0)
        self.num_frames += mean.shape[1]
        self.mean, self.variance = means[:, -1], variances[:, -1]
        return means, variances

    def expand(self, num_frames: int) -> tuple[Tensor, Tensor]:
        """Mean and variance so far, the same for each of ``num_frames`` frames: (B, num_frames)."""
        if self.mean is None or self.variance is None:
            raise ValueError("moments of no frame: with norm='clip' the whole clip must be counted first")
        return self.mean[:, None].expand(-1, num_frames), self.variance[:, None].expand(-1, num_frames)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes."""
        return {"num_frames": self.num_frames, "mean": _copy(self.mean), "variance": _copy(self.variance)}

    def load_state_dict(self, content: Mapping[str, Any], device: torch.device) -> None:
        """Go on where another one stopped. Raises ValueError where ``content`` is something else."""
        check_keys(content, {"num_frames", "mean", "variance"}, "moments")
        num_frames, mean, variance = content["num_frames"], content["mean"], content["variance"]
        if isinstance(mean, Tensor) and isinstance(variance, Tensor):
            fits = (
                isinstance(num_frames, int) and num_frames > 0 and mean.ndim == 1 and mean.shape == variance.shape
            )
        else:
            fits = num_frames == 0 and mean is None and variance is None
        if not fits:
            raise ValueError("moments state must hold a number of frames, and mean and variance of shape (B,)")
        self.num_frames, self.mean, self.variance = num_frames, _copy(mean, device), _copy(variance, device)


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
            that every frame depends on every other; "frame" each frame by itself; "running" the frames up to
            and including each, which approaches "clip" with the same weights. The last two allow streaming.
        causal: no frame sees a later one (not with norm "clip").
        attention_backend: see :func:`local_attention`.
        checkpointing: in training, compute the unpooled activations again in the backward pass instead of
            keeping them.
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
        attention_backend: AttentionBackend = "auto",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if norm not in ADAPTER_NORMS:
            raise ValueError(f"norm must be one of {', '.join(ADAPTER_NORMS)}, got {norm!r}")
        if causal and norm == "clip":
            raise ValueError("a causal adapter needs norm='frame' or 'running', norm='clip' sees the whole clip")
        self.pool = pool
        self.norm_over = norm
        self.checkpointing = checkpointing
        self.norm = nn.GroupNorm(1, dim)
        self.conv1 = nn.Conv2d(dim, hidden, 3, padding=1)
        self.conv_pool = nn.Conv2d(hidden, hidden, pool, stride=pool)
        self.norm2 = nn.LayerNorm(hidden)
        self.attn_temp = LocalAttention(hidden, heads, window, causal, attention_backend)
        self.conv_upsample = nn.ConvTranspose2d(hidden, hidden, pool, stride=pool)
        self.conv2 = nn.Conv2d(hidden, dim, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        if self.conv2.bias is not None:
            nn.init.zeros_(self.conv2.bias)

    @property
    def reach(self) -> int:
        """Frames before (and, if not causal, after) a frame that its attention sees."""
        return self.attn_temp.window // 2

    @property
    def lookahead(self) -> int | None:
        """Later frames that a frame's result depends on; None: the whole clip."""
        if self.norm_over == "clip":
            return None
        return 0 if self.attn_temp.causal else self.reach

    def forward(self, maps: Tensor) -> Tensor:
        """Maps of a clip (B, T, C, h, w) -> what to add to them (B, T, C, h, w)."""
        clip = Moments()
        if self.norm_over == "clip":
            clip.update(maps)
        (pooled,) = self.attend_chunks([maps], clip)
        return self.decode(pooled, maps.shape[-2], maps.shape[-1])

    def attend_chunks(self, chunks: Iterable[Tensor], moments: Moments) -> Iterator[Tensor]:
        """The part of :meth:`forward` before :meth:`decode`, on a clip in pieces.

        It reads no further ahead than the window: afterwards the maps of a piece may be overwritten.

        Args:
            chunks: (B, n, C, h, w) each, consecutive frames.
            moments: those of the whole clip for norm "clip", otherwise new ones.

        Yields:
            Pooled frames for :meth:`decode`, (B, n, hidden, ceil(h / pool), ceil(w / pool)), piece by piece.
        """
        window = _PooledWindow(self)
        sizes: deque[int] = deque()

        def arriving() -> Iterator[Tensor]:
            for maps in chunks:
                sizes.append(maps.shape[1])
                yield window.push(self.encode(maps, moments))
            yield window.flush()

        ready: Tensor | None = None
        for frames in arriving():
            ready = frames if ready is None else torch.cat([ready, frames], dim=1)
            while sizes and ready.shape[1] >= sizes[0]:
                size = sizes.popleft()
                yield ready[:, :size]
                ready = ready[:, size:]

    def encode(self, maps: Tensor, moments: Moments) -> Tensor:
        """Frames (B, n, C, h, w) -> pooled (B, n, hidden, ceil(h / pool), ceil(w / pool))."""
        if self.norm_over == "clip":
            mean, variance = moments.expand(maps.shape[1])
        else:
            mean, variance = frame_moments(maps) if self.norm_over == "frame" else moments.update(maps)
        return checkpointed(self.checkpointing, self._encode, maps, mean, variance)

    def _encode(self, maps: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        maps = at_least_float32(maps)
        scale = (variance + self.norm.eps).rsqrt().to(maps.dtype)[..., None, None, None]
        scale = scale * self.norm.weight[:, None, None]
        x = (maps - mean.to(maps.dtype)[..., None, None, None]) * scale + self.norm.bias[:, None, None]
        x = F.relu(self.conv1(x.flatten(0, 1)))
        h, w = x.shape[-2:]
        right, below = -w % self.pool, -h % self.pool
        if right or below:
            x = F.pad(x, (0, right, 0, below), mode="replicate")
        return F.relu(self.conv_pool(x)).unflatten(0, maps.shape[:2])

    def decode(self, pooled: Tensor, h: int, w: int) -> Tensor:
        """Pooled frames (B, n, hidden, hp, wp) -> (B, n, C, h, w)."""
        x = F.relu(self.conv_upsample(pooled.flatten(0, 1)))[..., :h, :w]
        return self.conv2(x).unflatten(0, pooled.shape[:2])

    def stream(self) -> AdapterStream:
        """Frame by frame with the results of :meth:`forward`. Raises ValueError for norm "clip"."""
        return AdapterStream(self)


def checkpointed(enabled: bool, function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function``; where ``enabled``, keep only its arguments for the backward pass.

    The function must not draw random numbers.
    """
    if not (enabled and torch.is_grad_enabled()):
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class _Held(NamedTuple):
    """What a :class:`_PooledWindow` keeps: waiting frames, and keys and values also of some before them."""

    pooled: Tensor  # (B, waiting, hidden, hp, wp)
    queries: Tensor  # (B hp wp, heads, waiting, d)
    keys: Tensor  # (B hp wp, heads, frames, d)
    values: Tensor  # (B hp wp, heads, frames, d)


class _PooledWindow:
    """Attention along time over pooled frames that arrive in pieces, added to them.

    It holds the frames that wait for later ones, and the keys and values that waiting or later frames see.
    """

    def __init__(self, adapter: TemporalAdapter) -> None:
        self.adapter = adapter
        self.reach = adapter.reach
        self.lookahead = 0 if adapter.attn_temp.causal else adapter.reach
        self.held: _Held | None = None
        self.first = 0  # which key is of the first waiting frame

    @property
    def num_waiting(self) -> int:
        """Frames that wait for later ones."""
        return 0 if self.held is None else self.held.pooled.shape[1]

    def push(self, pooled: Tensor) -> Tensor:
        """Take the next frames (B, n, hidden, hp, wp); return those that became ready, (B, m, hidden, hp, wp)."""
        sequence = pooled.permute(0, 3, 4, 1, 2).flatten(0, 2)
        new = _Held(pooled, *self.adapter.attn_temp.project(self.adapter.norm2(sequence)))
        if self.held is not None:
            joined = zip(self.held, new, (1, 2, 2, 2), strict=True)
            new = _Held(*(torch.cat([old, x], dim=dim) for old, x, dim in joined))
        return self._attend(new, max(0, new.pooled.shape[1] - self.lookahead))

    def flush(self) -> Tensor:
        """The clip has ended: the frames whose window it cuts off."""
        if self.held is None:
            raise ValueError("a clip without frames")
        return self._attend(self.held, self.num_waiting)

    def _attend(self, held: _Held, count: int) -> Tensor:
        """Let the first ``count`` frames that wait go, and the keys that no later one sees."""
        pooled, queries, keys, values = held
        unseen = max(0, self.first + count - self.reach)
        self.held = _Held(pooled[:, count:], queries[:, :, count:], keys[:, :, unseen:], values[:, :, unseen:])
        first, self.first = self.first, self.first + count - unseen
        if count == 0:
            return pooled[:, :0]
        attended = self.adapter.attn_temp.attend(queries[:, :, :count], keys, values, first)
        B, _, _, hp, wp = pooled.shape
        return pooled[:, :count] + attended.unflatten(0, (B, hp, wp)).permute(0, 3, 4, 1, 2)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes."""
        held = None if self.held is None else {name: x.detach().clone() for name, x in self.held._asdict().items()}
        return {"held": held, "first": self.first}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Go on where another window of the same adapter stopped. Raises ValueError where it does not fit."""
        check_keys(content, {"held", "first"}, "window")
        first, held = content["first"], None
        if content["held"] is not None:
            check_keys(content["held"], set(_Held._fields), "held")
            held = _Held(**content["held"])
        if not isinstance(first, int) or not (first == 0 if held is None else self._fits(held, first)):
            shapes = held and {name: tuple(getattr(x, "shape", ())) for name, x in held._asdict().items()}
            raise ValueError(f"window state does not fit its adapter: first {first!r}, held {shapes}")
        device = self.adapter.norm2.weight.device
        self.held = None if held is None else _Held(*(x.detach().to(device, copy=True) for x in held))
        self.first = first

    def _fits(self, held: _Held, first: int) -> bool:
        hidden, heads = self.adapter.norm2.normalized_shape[0], self.adapter.attn_temp.heads
        if not all(isinstance(x, Tensor) for x in held) or held.pooled.ndim != 5 or not 0 <= first <= self.reach:
            return False
        B, waiting, _, hp, wp = held.pooled.shape
        lengths = (waiting, first + waiting, first + waiting)
        shapes = [(B * hp * wp, heads, length, hidden // heads) for length in lengths]
        return (
            waiting <= self.lookahead
            and held.pooled.shape[2] == hidden
            and [tuple(x.shape) for x in held[1:]] == shapes
        )


def check_keys(content: Mapping[str, Any], expected: set[str], what: str) -> None:
    """Raise ValueError where the state of ``what`` has other keys than ``expected``."""
    if set(content) != expected:
        raise ValueError(f"{what} state must hold {sorted(expected)}, got {sorted(content)}")


def _copy(x: Tensor | None, device: torch.device | None = None) -> Tensor | None:
    return None if x is None else x.detach().to(device or x.device, copy=True)


class AdapterStream:
    """A :class:`TemporalAdapter` fed frame by frame, with memory for one window of pooled frames."""

    def __init__(self, adapter: TemporalAdapter) -> None:
        if adapter.lookahead is None:
            raise ValueError("norm='clip' cannot run frame by frame; use norm='frame' or 'running'")
        self.adapter = adapter
        self.moments = Moments()
        self.window = _PooledWindow(adapter)
        self.size = (0, 0)

    @property
    def num_waiting(self) -> int:
        """Frames that wait for later ones."""
        return self.window.num_waiting

    def push(self, maps: Tensor) -> list[Tensor]:
        """Take the next frame's maps (B, C, h, w); return the results of that shape that became ready."""
        self.size = (maps.shape[-2], maps.shape[-1])
        return self._decode(self.window.push(self.adapter.encode(maps[:, None], self.moments)))

    def flush(self) -> list[Tensor]:
        """The video has ended: the results of the frames whose window it cuts off."""
        return [] if self.window.held is None else self._decode(self.window.flush())

    def _decode(self, pooled: Tensor) -> list[Tensor]:
        # one by one: a flushed window of unpooled frames would take several times the memory
        return [self.adapter.decode(pooled[:, i : i + 1], *self.size)[:, 0] for i in range(pooled.shape[1])]

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes: nested dicts of tensors, integers and None."""
        return {
            "moments": self.moments.state_dict(),
            "window": self.window.state_dict(),
            "height": self.size[0],
            "width": self.size[1],
        }

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Go on where another stream of the same adapter stopped. Raises ValueError where it does not fit."""
        check_keys(content, {"moments", "window", "height", "width"}, "adapter")
        if not isinstance(content["height"], int) or not isinstance(content["width"], int):
            raise ValueError("adapter state must hold height and width as integers")
        self.moments.load_state_dict(content["moments"], self.adapter.norm2.weight.device)
        self.window.load_state_dict(content["window"])
        self.size = (content["height"], content["width"])
