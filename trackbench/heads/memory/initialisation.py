"""A start that already tracks: the head as a plain feature matcher, with everything else switched to zero."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from trackbench.layers.attention import AttentionBlock

if TYPE_CHECKING:
    from trackbench.heads.memory.head import MemoryHead

RECTIFIER_MARGIN = 3.0  # lifts features of unit variance over the rectifiers, which then pass them through


@torch.no_grad()
def start_as_matcher(head: MemoryHead) -> None:
    """Initialise a head so that its correlation compares the projected features themselves.

    Residual branches of the decoder start at zero, the layers between the features and the correlation at the
    identity. Published trainings start from random layers and have the steps to learn matching; short ones do
    not.
    """
    projection = head.token_projection
    if projection.in_channels == head.dim:
        nn.init.dirac_(projection.weight)
    else:
        nn.init.orthogonal_(projection.weight)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    decoder = head.feature_decoder
    for layer in (decoder.linear1, decoder.linear2, decoder.linear3):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.constant_(decoder.linear1.bias, RECTIFIER_MARGIN)
    nn.init.constant_(decoder.linear4.bias, -RECTIFIER_MARGIN)
    for layer in (decoder.linear4, head.projection1, head.projection2):
        nn.init.eye_(layer.weight)
    for layer in (head.projection1, head.projection2, head.sm_query_updater.query_residual):
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(head.sm_query_updater.query_residual.weight)
    _keep_query(head.query_decoder.modules())
    fusion = head.rerank_module.sample_query_fusion
    nn.init.zeros_(fusion.bias)
    nn.init.zeros_(fusion.weight)
    fusion.weight[:, : head.dim] = torch.eye(head.dim)
    nn.init.constant_(head.corr_layer.weight, 0.2)
    head.corr_layer.weight[:, 0] = 1.0


def _keep_query(modules: Iterable[nn.Module]) -> None:
    """Attention blocks that return their (normalised) query at first."""
    for block in modules:
        if isinstance(block, AttentionBlock):
            for layer in (block.mha.out_proj, block.linear2):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
