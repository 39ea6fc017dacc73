"""Query sampling against recorded official output."""

from __future__ import annotations

import numpy as np
import pytest

from trackbench.data.queries import sample_queries

CASES = 11


@pytest.mark.parametrize("mode", ["first", "strided"])
def test_equals_the_official_sampling(data_fixtures, mode) -> None:
    with np.load(data_fixtures / "sampling.npz", allow_pickle=False) as reference:
        cases = sorted({name.split("/")[1] for name in reference.files if name.startswith("in/")})
        assert len(cases) == CASES
        for case in cases:
            xy = reference[f"in/{case}/points"]
            visible = ~reference[f"in/{case}/occluded"]
            stride = int(reference[f"in/{case}/stride"])
            out = f"out/{case}/{mode}"
            if f"{out}/raises" in reference.files:
                assert str(reference[f"{out}/raises"]).startswith("ValueError")
                with pytest.raises(ValueError, match="none of the 4 tracks is ever visible"):
                    sample_queries(xy, visible, mode, stride)
                continue
            queries, tracks = sample_queries(xy, visible, mode, stride)
            np.testing.assert_array_equal(queries[None][..., [0, 2, 1]], reference[f"{out}/query_points"])
            np.testing.assert_array_equal(xy[tracks][None], reference[f"{out}/target_points"])
            np.testing.assert_array_equal(~visible[tracks][None], reference[f"{out}/occluded"])
            if mode == "strided":
                np.testing.assert_array_equal(tracks[None], reference[f"{out}/trackgroup"])


@pytest.mark.parametrize("seed", range(4))
def test_labels_decide_where_a_query_may_lie(seed) -> None:
    rng = np.random.default_rng(seed)
    xy = rng.random((8, 23, 2))
    visible, labelled = rng.random((8, 23)) < 0.4, rng.random((8, 23)) < 0.3
    expected = [
        next(((t, *xy[n, t], n) for t in range(23) if visible[n, t] and labelled[n, t]), None) for n in range(8)
    ]
    queries, tracks = sample_queries(xy, visible, "first", labelled=labelled)
    np.testing.assert_array_equal(np.column_stack([queries, tracks]), [row for row in expected if row])

    expected = [(t, *xy[n, t], n) for t in range(0, 23, 5) for n in range(8) if visible[n, t] and labelled[n, t]]
    queries, tracks = sample_queries(xy, visible, "strided", labelled=labelled)
    np.testing.assert_array_equal(np.column_stack([queries, tracks]), np.reshape(expected, (-1, 4)))


def test_refuses_what_it_cannot_sample() -> None:
    xy, visible = np.zeros((3, 4, 2)), np.ones((3, 4), bool)
    with pytest.raises(ValueError, match="mode must be 'first' or 'strided', got 'all'"):
        sample_queries(xy, visible, "all")
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        sample_queries(xy, visible, "strided", stride=0)
    with pytest.raises(ValueError, match=r"visible must be bool \(3, 4\)"):
        sample_queries(xy, visible.astype(float), "first")
    with pytest.raises(ValueError, match=r"labelled must be bool \(3, 4\)"):
        sample_queries(xy, visible, "first", labelled=visible[:2])
    with pytest.raises(ValueError, match=r"xy must be \(N, T, 2\)"):
        sample_queries(xy[..., :1], visible, "first")
