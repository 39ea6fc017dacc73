"""Work in slices, so that what lies between input and output never exists as a whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def by_chunks(function: Callable[..., Tensor], *inputs: Tensor | None, dim: int, size: int) -> Tensor:
    """``function(*inputs)``, computed for ``size`` entries of axis ``dim`` at a time.

    Only on the CPU and without gradients, where intermediate results then stay in the caches and in memory that
    the allocator hands out again; otherwise in one go.

    Args:
        function: treats the entries of that axis independently, and keeps the axis where it is.
        inputs: tensors of equal length along the axis, or None.
        dim: the axis, of inputs and result.
        size: entries per chunk, positive.
    """
    tensors = [tensor for tensor in inputs if tensor is not None]
    length = tensors[0].shape[dim]
    whole = tensors[0].device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling()
    if whole or length <= size:
        return function(*inputs)
    slices = [[None] * -(-length // size) if tensor is None else tensor.split(size, dim) for tensor in inputs]
    return torch.cat([function(*parts) for parts in zip(*slices, strict=True)], dim=dim)
