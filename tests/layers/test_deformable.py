"""Deformable attention against reference values, a brute-force sum and its own algebra."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from trackbench.layers.deformable import DeformableAttention, deformable_sample

SHAPES = [(6, 5), (3, 4), (1, 2)]
CELLS = sum(h * w for h, w in SHAPES)


@pytest.fixture(scope="module")
def case(trackon_fixtures: Path) -> dict[str, Tensor]:
    with np.load(trackon_fixtures / "deform_attn_case.npz") as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


def shapes_of(case: dict[str, Tensor]) -> list[tuple[int, int]]:
    return [(int(h), int(w)) for h, w in case["spatial_shapes"]]


def attention_of(case: dict[str, Tensor]) -> DeformableAttention:
    module = DeformableAttention(32, int(case["heads"]), 3, int(case["points"])).eval()
    module.load_state_dict({k.removeprefix("msda."): v for k, v in case.items() if k.startswith("msda.")})
    return module


def test_module_matches_reference_forward_and_backward(case: dict[str, Tensor]) -> None:
    module = attention_of(case)
    names = ("query", "value", "reference_points")
    inputs = {name: case[f"msda_in_{name}"].clone().requires_grad_() for name in names}
    out = module(*inputs.values(), shapes_of(case))
    torch.testing.assert_close(out, case["msda_out"], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.double(), case["msda_out_f64"], atol=1e-5, rtol=0)
    out.backward(case["msda_grad_out"])
    for name, tensor in inputs.items():
        torch.testing.assert_close(tensor.grad, case[f"msda_grad_{name}"], atol=2e-4, rtol=0)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, case[f"msda_grad.{name}"], atol=2e-4, rtol=0)


def test_sampling_matches_reference(case: dict[str, Tensor]) -> None:
    out = deformable_sample(
        case["core_value"], shapes_of(case), case["core_sampling_locations"], case["core_attention_weights"]
    )
    torch.testing.assert_close(out, case["core_out"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("heads", "levels"), [(8, 4), (6, 3), (6, 1)])
def test_initial_offsets_match_reference(case: dict[str, Tensor], heads: int, levels: int) -> None:
    module = DeformableAttention(12 * heads, heads, levels, 4)
    expected = case[f"init_sampling_offsets_bias_h{heads}_l{levels}_p4"]
    torch.testing.assert_close(module.sampling_offsets.bias.detach(), expected, atol=1e-6, rtol=0)
    assert not module.sampling_offsets.weight.any()
    assert not module.attention_weights.weight.any()


def brute_force(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    B, Q, H, _, P, _ = locations.shape
    out = torch.zeros(B, Q, H, value.shape[-1], dtype=value.dtype)
    for b, q, head, level, p in np.ndindex(B, Q, H, len(SHAPES), P):
        h, w = SHAPES[level]
        first = sum(a * c for a, c in SHAPES[:level])
        x, y = (locations[b, q, head, level, p].double() * torch.tensor([w, h]) - 0.5).tolist()
        for line in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= line < h and 0 <= column < w:
                    share = (1 - abs(x - column)) * (1 - abs(y - line)) * weights[b, q, head, level, p]
                    out[b, q, head] += share * value[b, first + line * w + column, head]
    return out.flatten(2)


def test_sampling_equals_a_brute_force_sum_inside_and_outside() -> None:
    value = torch.randn(2, CELLS, 2, 3, dtype=torch.float64)
    locations = torch.rand(2, 4, 2, 3, 2, 2, dtype=torch.float64) * 2 - 0.5
    weights = torch.rand(2, 4, 2, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(
        deformable_sample(value, SHAPES, locations, weights), brute_force(value, locations, weights)
    )


def test_sampling_gradients_equal_finite_differences() -> None:
    value = torch.randn(1, CELLS, 2, 2, dtype=torch.float64, requires_grad=True)
    locations = (torch.rand(1, 3, 2, 3, 2, 2, dtype=torch.float64) * 1.2 - 0.1).requires_grad_()
    weights = torch.rand(1, 3, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: deformable_sample(x[0], SHAPES, *x[1:]), (value, locations, weights)
    )


def random_attention(**options: float) -> DeformableAttention:
    module = DeformableAttention(8, 2, 3, **options).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def test_few_and_many_queries_are_treated_alike() -> None:
    module = random_attention()
    query, value = torch.randn(2, CELLS, 8), torch.randn(2, CELLS, 8)
    reference = torch.rand(2, CELLS, 1, 2)
    together = module(query, value, reference, SHAPES)
    alone = torch.cat([module(query[:, i : i + 1], value, reference[:, i : i + 1], SHAPES) for i in range(5)], 1)
    torch.testing.assert_close(together[:, :5], alone, atol=1e-5, rtol=1e-5)


def test_value_ratio_narrows_the_values() -> None:
    module = DeformableAttention(8, 2, 3, value_ratio=0.5)
    assert module.value_proj.weight.shape == (4, 8)
    for queries in (1, CELLS):
        out = module(torch.randn(1, queries, 8), torch.randn(1, CELLS, 8), torch.rand(1, queries, 3, 2), SHAPES)
        assert out.shape == (1, queries, 8)


def test_one_reference_point_serves_all_levels() -> None:
    module = random_attention()
    query, value, reference = torch.randn(1, 4, 8), torch.randn(1, CELLS, 8), torch.rand(1, 4, 1, 2)
    torch.testing.assert_close(
        module(query, value, reference, SHAPES), module(query, value, reference.expand(-1, -1, 3, -1), SHAPES)
    )


def test_autocast_keeps_locations_in_float32() -> None:
    module = random_attention()
    query, value, reference = torch.randn(1, 4, 8), torch.randn(1, CELLS, 8), torch.rand(1, 4, 1, 2)
    exact, _ = module._locations(query, reference, SHAPES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        locations, weights = module._locations(query, reference, SHAPES)
        out = module(query, value, reference, SHAPES)
    assert locations.dtype == weights.dtype == torch.float32
    torch.testing.assert_close(locations, exact)
    torch.testing.assert_close(out.float(), module(query, value, reference, SHAPES), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, 1e30])
def test_broken_queries_do_not_read_outside_the_table(broken: float) -> None:
    locations = torch.full((1, 2, 2, 3, 4, 2), broken)
    out = deformable_sample(torch.randn(1, CELLS, 2, 3), SHAPES, locations, torch.rand(1, 2, 2, 3, 4))
    assert out.shape == (1, 2, 6)


def test_shapes_that_do_not_fill_the_value_are_refused() -> None:
    module = DeformableAttention(8, 2, 3)
    with pytest.raises(ValueError, match="3 levels that fill 44 cells"):
        module(torch.randn(1, 2, 8), torch.randn(1, CELLS, 8), torch.rand(1, 2, 1, 2), SHAPES[:2])
    with pytest.raises(ValueError, match="must divide"):
        DeformableAttention(9, 2, 3)


def test_geometry_kept_from_inference_mode_serves_training() -> None:
    module = random_attention()
    shapes = [(7, 3), (2, 2), (1, 1)]
    query, value, reference = torch.randn(1, 2, 8), torch.randn(1, 26, 8), torch.rand(1, 2, 1, 2)
    with torch.inference_mode():
        module(query, value, reference, shapes)
    module(query, value, reference, shapes).sum().backward()
    assert module.sampling_offsets.weight.grad is not None


def test_sampling_without_gradients_is_the_same_inside_on_and_beyond_the_borders() -> None:
    torch.manual_seed(0)
    shapes = [(6, 5), (3, 4), (2, 2)]
    value = torch.randn(2, sum(h * w for h, w in shapes), 3, 4, dtype=torch.float64)
    wide = 1.6 * torch.rand(2, 40, 3, 3, 5, 2, dtype=torch.float64) - 0.3
    cells = torch.randint(-2, 8, wide.shape) + 0.5  # exactly on a cell's centre, also outside
    sizes = torch.tensor(shapes, dtype=torch.float64).flip(1)[:, None]
    for locations in (wide, cells / sizes, torch.full_like(wide, 1e9), torch.full_like(wide, -math.inf)):
        weights = torch.rand(locations.shape[:-1], dtype=torch.float64)
        expected = deformable_sample(value, shapes, locations, weights)
        with torch.no_grad():
            found = deformable_sample(value, shapes, locations, weights)
        if locations.isfinite().all():
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    with torch.no_grad():  # no cell beyond the pyramid is read
        assert deformable_sample(value, shapes, torch.full_like(wide, math.nan), weights).isnan().all()
