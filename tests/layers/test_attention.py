"""Attention blocks against reference values and PyTorch's own module."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trackbench.layers.attention import AttentionBlock, DeformableBlock, MultiheadAttention


@pytest.fixture(scope="module")
def case(trackon_fixtures: Path) -> dict[str, Tensor]:
    with np.load(trackon_fixtures / "deform_attn_case.npz") as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


def test_deformable_block_matches_reference(case: dict[str, Tensor]) -> None:
    block = DeformableBlock(32, int(case["heads"]), 3, int(case["points"])).eval()
    block.load_state_dict({k.removeprefix("dms."): v for k, v in case.items() if k.startswith("dms.")})
    shapes = [(int(h), int(w)) for h, w in case["spatial_shapes"]]
    out = block(case["msda_in_query"], case["msda_in_value"], case["msda_in_reference_points"], shapes)
    torch.testing.assert_close(out, case["dms_out"], atol=1e-5, rtol=0)


def test_attention_block_matches_reference(case: dict[str, Tensor]) -> None:
    block = AttentionBlock(32, int(case["heads"])).eval()
    block.load_state_dict({k.removeprefix("mhab."): v for k, v in case.items() if k.startswith("mhab.")})
    q, k, v = (case[f"mhab_in_{name}"] for name in "qkv")
    torch.testing.assert_close(block(q, k, v, case["mhab_in_mask"]), case["mhab_out"], atol=1e-5, rtol=0)
    torch.testing.assert_close(block(q, q, q), case["mhab_out_self"], atol=1e-5, rtol=0)


def test_attention_equals_torch_with_and_without_mask() -> None:
    ours = MultiheadAttention(12, 3)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, key, value = torch.randn(4, 5, 12), torch.randn(4, 7, 12), torch.randn(4, 7, 12)
    ignored = torch.rand(4, 7) < 0.5
    ignored[:, 0] = False
    for mask in (None, ignored):
        expected, _ = theirs(query, key, value, key_padding_mask=mask)
        torch.testing.assert_close(ours(query, key, value, mask), expected, atol=1e-6, rtol=1e-5)


def test_ignored_keys_have_no_influence() -> None:
    attention = MultiheadAttention(8, 2)
    query, key = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    ignored = torch.tensor([[False, True, False, True, True]]).expand(2, -1)
    other = torch.where(ignored[..., None], torch.full_like(key, 1e3), key)
    torch.testing.assert_close(attention(query, key, key, ignored), attention(query, other, other, ignored))


@pytest.mark.parametrize("grad", [False, True])
def test_queries_without_any_key_get_the_bias_and_finite_gradients(grad: bool) -> None:
    attention = MultiheadAttention(8, 2)
    nn.init.normal_(attention.out_proj.bias)
    query = torch.randn(2, 3, 8, requires_grad=grad)
    ignored = torch.tensor([[True] * 5, [True, False, True, True, True]])
    with torch.set_grad_enabled(grad):
        out = attention(query, torch.randn(2, 5, 8), torch.randn(2, 5, 8), ignored)
    torch.testing.assert_close(out[0], attention.out_proj.bias.expand(3, -1))
    assert out.isfinite().all()
    if grad:
        out.square().sum().backward()
        assert query.grad is not None
        assert query.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in attention.parameters())


def test_dropout_acts_in_training_only() -> None:
    block = AttentionBlock(8, 2, dropout=0.5)
    x = torch.randn(1, 4, 8)
    assert not torch.equal(block(x, x, x), block(x, x, x))
    block.eval()
    torch.testing.assert_close(block(x, x, x), block(x, x, x))


def test_heads_must_divide_channels() -> None:
    with pytest.raises(ValueError, match="num_heads=3 must divide dim=8"):
        MultiheadAttention(8, 3)
