"""Widths of one worker, and where in them a rank stands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.parallelism import Coordinates, Parallelism

widths = st.tuples(*[st.integers(1, 4)] * 3).map(lambda w: Parallelism(w[0], w[1], w[0] * w[1], 1, w[2]))


@given(widths)
def test_ranks_and_coordinates_are_each_other_s_inverse(widths: Parallelism) -> None:
    seen = set()
    for rank in range(widths.num_ranks):
        at = widths.coordinates(rank)
        assert widths.rank(at.pp, at.attn_dp, at.attn_tp) == rank
        seen.add((at.pp, at.attn_dp, at.attn_tp))
    assert len(seen) == widths.num_ranks


def test_tensor_parallel_ranks_are_neighbours() -> None:
    widths = Parallelism(attn_tp=2, attn_dp=4, moe_ep=4, moe_tp=2, pp=2)
    assert widths.coordinates(3) == Coordinates(pp=0, attn_dp=1, attn_tp=1, moe_ep=1, moe_tp=1)
    assert widths.coordinates(8) == Coordinates(pp=1, attn_dp=0, attn_tp=0, moe_ep=0, moe_tp=0)


def test_widths_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"attn_tp\*attn_dp=4 must equal moe_ep\*moe_tp=3"):
        Parallelism(attn_tp=2, attn_dp=2, moe_ep=3)
    with pytest.raises(ValueError, match="pp=0"):
        Parallelism(pp=0)


def test_ranks_outside_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rank 2 is not in 0\.\.1"):
        Parallelism(attn_tp=2, moe_tp=2).coordinates(2)
    with pytest.raises(ValueError, match="attn_dp=1"):
        Parallelism(attn_tp=2, moe_tp=2).rank(0, 1, 0)
