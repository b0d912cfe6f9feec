"""Widths of one worker, and where in them a rank stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.parallelism import (
    SGLANG,
    TENSORRT_LLM,
    VLLM,
    Axis,
    Coordinates,
    Parallelism,
    Position,
    RankLayout,
    RankOrder,
)

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


# The engines' own numbering, written as the engines write it: every rank's coordinates, in rank order.


def sglang(width: Parallelism) -> list[Coordinates]:
    """`derive_spawn_ranks` and `derive_attention_ranks`, srt/runtime_context.py, sglang 0.5.23."""
    tp_size = width.attn_tp * width.attn_dp
    per_expert_rank = tp_size // width.moe_ep
    return [
        Coordinates(
            pp=rank // tp_size,
            attn_dp=rank % tp_size // width.attn_tp,
            attn_tp=rank % tp_size % width.attn_tp,
            moe_ep=rank % tp_size // per_expert_rank,
            moe_tp=rank % tp_size % per_expert_rank,
        )
        for rank in range(tp_size * width.pp)
    ]


def vllm(width: Parallelism) -> list[Coordinates]:
    """`arange(world_size).reshape(dp, pp, tp)`, distributed/parallel_state.py, and `flatten_tp_across_dp_and_pcp`."""
    at = []
    for dp_rank, pp_rank, tp_rank in product(range(width.attn_dp), range(width.pp), range(width.attn_tp)):
        flat = dp_rank * width.attn_tp + tp_rank
        moe_ep, moe_tp = (flat, 0) if width.moe_ep > 1 else (0, flat)
        at.append(Coordinates(pp_rank, dp_rank, tp_rank, moe_ep, moe_tp))
    return at


def tensorrt_llm(width: Parallelism) -> list[Coordinates]:
    """The properties of `Mapping` with cp_size and moe_cluster_size 1, tensorrt_llm/mapping.py, 1.2.0rc2."""
    tp_size = width.attn_tp * width.attn_dp
    at = []
    for rank in range(tp_size * width.pp):
        tp_rank = rank % tp_size
        attn_dp, attn_tp = (tp_rank, 0) if width.attn_dp > 1 else (0, tp_rank)
        at.append(
            Coordinates(
                rank // tp_size, attn_dp, attn_tp, moe_ep=tp_rank % width.moe_ep, moe_tp=tp_rank // width.moe_ep
            )
        )
    return at


ENGINES: dict[str, tuple[RankOrder, Callable[[Parallelism], list[Coordinates]]]] = {
    "sglang": (SGLANG, sglang),
    "vllm": (VLLM, vllm),
    "tensorrt_llm": (TENSORRT_LLM, tensorrt_llm),
}


def divisors(number: int) -> st.SearchStrategy[int]:
    return st.sampled_from([width for width in range(1, number + 1) if number % width == 0])


@st.composite
def layouts(draw: st.DrawFn, order: RankOrder) -> RankLayout:
    """Any layout that the order's engine takes."""
    attn_tp, attn_dp, pp = (draw(st.integers(1, 6)) for _ in range(3))
    if order.exclusive == ("attn_dp", "attn_tp") and draw(st.booleans()):
        attn_dp = 1
    elif order.exclusive == ("attn_dp", "attn_tp"):
        attn_tp = 1
    ranks = attn_tp * attn_dp
    moe_ep = draw(st.sampled_from([1, ranks]) if order.exclusive == ("moe_ep", "moe_tp") else divisors(ranks))
    width = Parallelism(attn_tp, attn_dp, moe_ep, ranks // moe_ep, pp)
    outer = getattr(width, order.attention[0])
    fits = [n for n in range(1, width.num_ranks + 1) if width.num_ranks % n == 0]
    if order.whole_nodes:
        fits = [n for n in fits if n % outer == 0 or outer % n == 0]
    return RankLayout(width, order, draw(st.sampled_from(fits)))


def every_layout() -> st.SearchStrategy[RankLayout]:
    return st.one_of([layouts(order) for order, _ in ENGINES.values()])


@pytest.mark.parametrize("engine", ENGINES)
@given(data=st.data())
def test_ranks_are_numbered_as_the_engine_numbers_them(engine: str, data: st.DataObject) -> None:
    order, numbering = ENGINES[engine]
    layout = data.draw(layouts(order))
    ranks = range(layout.parallelism.num_ranks)
    assert [layout.position(rank).at for rank in ranks] == numbering(layout.parallelism)


@given(every_layout())
def test_ranks_and_positions_are_each_other_s_inverse(layout: RankLayout) -> None:
    ranks = range(layout.parallelism.num_ranks)
    positions = [layout.position(rank) for rank in ranks]
    assert [layout.rank(position) for position in positions] == list(ranks)
    assert [layout.rank_on(position.node, position.gpu) for position in positions] == list(ranks)
    experts = {(position.at.pp, position.at.moe_ep, position.at.moe_tp) for position in positions}
    assert len(experts) == len(set(positions)) == len(ranks)
    assert [rank for node in range(layout.nodes) for rank in layout.ranks_on(node)] == list(ranks)


@given(every_layout(), st.sampled_from(["node", "gpu", "pp", "attn_dp", "attn_tp", "moe_ep", "moe_tp"]), st.data())
def test_a_position_that_contradicts_itself_is_refused(layout: RankLayout, name: str, data: st.DataObject) -> None:
    position = layout.position(data.draw(st.integers(0, layout.parallelism.num_ranks - 1)))
    if name in ("node", "gpu"):
        wrong = replace(position, **{name: getattr(position, name) + 1})
    else:
        wrong = replace(position, at=replace(position.at, **{name: getattr(position.at, name) + 1}))
    field = name if name in ("node", "gpu", "moe_ep", "moe_tp") else r"\w+"  # Others move the rank: any may differ.
    with pytest.raises(ValueError, match=rf"^{field}=\d+ is not "):
        layout.rank(wrong)


@given(every_layout(), st.sampled_from(["pp", "attn_dp", "attn_tp", "moe_ep", "moe_tp"]))
def test_groups_hold_every_rank_once_in_the_order_of_their_width(layout: RankLayout, axis: Axis) -> None:
    groups = layout.groups(axis)
    width = getattr(layout.parallelism, axis)
    assert sorted(rank for group in groups for rank in group) == list(range(layout.parallelism.num_ranks))
    for group in groups:
        assert [getattr(layout.position(rank).at, axis) for rank in group] == list(range(width))


@given(layouts(SGLANG))
def test_sglang_builds_the_same_expert_groups(layout: RankLayout) -> None:
    """`initialize_model_parallel`, srt/distributed/parallel_state.py, sglang 0.5.16 and 0.5.23, moe_dp_size 1."""
    width = layout.parallelism
    tp_size, moe_ep, moe_tp = width.ranks_per_stage, [], []
    for tp_group in range(width.pp):
        for moe_tp_idx in range(width.moe_tp):
            start = tp_group * tp_size + moe_tp_idx
            moe_ep.append(tuple(range(start, start + width.moe_ep * width.moe_tp, width.moe_tp)))
        for ep_idx in range(width.moe_ep):
            start = tp_group * tp_size + ep_idx * width.moe_tp
            moe_tp.append(tuple(range(start, start + width.moe_tp)))
    assert (list(layout.groups("moe_ep")), list(layout.groups("moe_tp"))) == (moe_ep, moe_tp)


@given(layouts(SGLANG))
def test_sglang_starts_the_same_ranks_on_every_node_and_gpu(layout: RankLayout) -> None:
    """`_calculate_rank_ranges`, srt/entrypoints/engine.py, and `compute_local_gpu_id`, sglang 0.5.16 and 0.5.23."""
    width, nnodes = layout.parallelism, layout.nodes
    tp_size = width.ranks_per_stage
    pp_size_per_node, nnodes_per_pp_rank = max(width.pp // nnodes, 1), max(nnodes // width.pp, 1)
    tp_size_per_node = tp_size // nnodes_per_pp_rank
    seen = 0
    for node_rank in range(nnodes):
        first_pp = pp_size_per_node * (node_rank // nnodes_per_pp_rank)
        first_tp = tp_size_per_node * (node_rank % nnodes_per_pp_rank)
        for pp_rank in range(first_pp, first_pp + pp_size_per_node):
            for tp_rank in range(first_tp, first_tp + tp_size_per_node):
                gpu = (pp_rank % pp_size_per_node) * tp_size_per_node + tp_rank % tp_size_per_node
                assert layout.rank_on(node_rank, gpu) == tp_size * pp_rank + tp_rank
                seen += 1
    assert seen == width.num_ranks


@given(layouts(VLLM))
def test_vllm_starts_the_same_ranks_on_every_node_and_gpu(layout: RankLayout) -> None:
    """`nnodes_within_dp`, config/parallel.py; `init_device`, v1/worker/gpu_worker.py; multiproc_executor.py; 0.32."""
    width, nnodes = layout.parallelism, layout.nodes
    world_size = width.attn_tp * width.pp
    data_parallel_size_local = max(1, width.attn_dp // nnodes)
    nnodes_within_dp = nnodes // (width.attn_dp // data_parallel_size_local)
    local_world_size = world_size // nnodes_within_dp
    for dp_rank, node_in_replica in product(range(width.attn_dp), range(nnodes_within_dp)):
        node = dp_rank // data_parallel_size_local * nnodes_within_dp + node_in_replica
        for local_rank in range(local_world_size):
            gpu = local_rank
            if nnodes_within_dp == 1:
                gpu += dp_rank % data_parallel_size_local * world_size
            rank_in_replica = local_world_size * node_in_replica + local_rank
            assert layout.rank_on(node, gpu) == dp_rank * world_size + rank_in_replica


@given(layouts(TENSORRT_LLM))
def test_tensorrt_llm_counts_the_same_nodes_and_gpus(layout: RankLayout) -> None:
    """`MappingBase.node_rank` and `local_rank`, tensorrt_llm/mapping.py, 1.2.0rc2."""
    for rank in range(layout.parallelism.num_ranks):
        position = layout.position(rank)
        assert (position.node, position.gpu) == (rank // layout.gpus_per_node, rank % layout.gpus_per_node)


@pytest.mark.parametrize(
    ("axis", "groups"),
    [
        ("moe_tp", [(0, 4), (1, 5), (2, 6), (3, 7), (8, 12), (9, 13), (10, 14), (11, 15)]),
        ("moe_ep", [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)]),
        ("pp", [(0, 8), (1, 9), (2, 10), (3, 11), (4, 12), (5, 13), (6, 14), (7, 15)]),
        ("attn_tp", [tuple(range(8)), tuple(range(8, 16))]),
    ],
)
def test_tensorrt_llm_s_documented_groups(axis: Axis, groups: list[tuple[int, ...]]) -> None:
    """The docstring of `Mapping`: "2 nodes with 16 GPUs, moe_tp_size = 2, moe_ep_size = 4, pp_size = 2"."""
    layout = RankLayout(Parallelism(attn_tp=8, moe_ep=4, moe_tp=2, pp=2), TENSORRT_LLM, nodes=2)
    assert list(layout.groups(axis)) == groups


@pytest.mark.parametrize("order", [SGLANG, VLLM])
def test_the_documented_tensor_and_pipeline_groups(order: RankOrder) -> None:
    """The docstring of `initialize_model_parallel`, the same in SGLang and vLLM: 8 GPUs, tp 2, pp 4."""
    layout = RankLayout(Parallelism(attn_tp=2, moe_tp=2, pp=4), order)
    assert layout.groups("attn_tp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layout.groups("pp") == ((0, 2, 4, 6), (1, 3, 5, 7))


def test_vllm_s_documented_experts() -> None:
    """The docstring of `FusedMoEParallelConfig.make`: TP = 2, DP = 2, with and without expert parallelism."""
    tensor, expert = Parallelism(2, 2, moe_tp=4), Parallelism(2, 2, moe_ep=4)
    assert [tensor.coordinates(device, VLLM).moe_tp for device in range(4)] == [0, 1, 2, 3]
    assert [expert.coordinates(device, VLLM).moe_ep for device in range(4)] == [0, 1, 2, 3]
    assert [expert.coordinates(device, VLLM).attn_dp for device in range(4)] == [0, 0, 1, 1]


TP2_DP2_PP2 = Parallelism(attn_tp=2, attn_dp=2, moe_ep=4, pp=2)


@pytest.mark.parametrize(
    ("layout", "rank", "position"),
    [
        # (node, gpu, (pp, attn_dp, attn_tp, moe_ep, moe_tp))
        (RankLayout(TP2_DP2_PP2, SGLANG, 2), 2, (0, 2, (0, 1, 0, 2, 0))),
        (RankLayout(TP2_DP2_PP2, SGLANG, 2), 5, (1, 1, (1, 0, 1, 1, 0))),
        (RankLayout(TP2_DP2_PP2, VLLM, 2), 2, (0, 2, (1, 0, 0, 0, 0))),
        (RankLayout(TP2_DP2_PP2, VLLM, 2), 5, (1, 1, (0, 1, 1, 3, 0))),
        (RankLayout(Parallelism(8, 1, 4, 2), SGLANG), 5, (0, 5, (0, 0, 5, 2, 1))),
        (RankLayout(Parallelism(8, 1, 4, 2), TENSORRT_LLM), 5, (0, 5, (0, 0, 5, 1, 1))),
        (RankLayout(Parallelism(1, 8, 4, 2, 2), TENSORRT_LLM, 2), 13, (1, 5, (1, 5, 0, 1, 1))),
        (RankLayout(Parallelism(1, 72, 72), SGLANG, 9), 71, (8, 7, (0, 71, 0, 71, 0))),
        (RankLayout(Parallelism(1, 72, 72), VLLM, 9), 71, (8, 7, (0, 71, 0, 71, 0))),
        (RankLayout(Parallelism(1, 72, 72), TENSORRT_LLM, 9), 71, (8, 7, (0, 71, 0, 71, 0))),
        (RankLayout(Parallelism(16, 1, 1, 16), VLLM, 4), 9, (2, 1, (0, 0, 9, 0, 9))),
    ],
)
def test_known_ranks(layout: RankLayout, rank: int, position: tuple[int, int, tuple[int, ...]]) -> None:
    assert astuple(layout.position(rank)) == position
    node, gpu, at = position
    assert layout.rank(Position(node, gpu, Coordinates(*at))) == rank


def test_expert_groups_of_the_engines_differ_where_experts_are_cut() -> None:
    width = Parallelism(attn_tp=8, moe_ep=4, moe_tp=2)
    assert RankLayout(width, SGLANG).groups("moe_ep") == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert RankLayout(width, TENSORRT_LLM).groups("moe_ep") == ((0, 1, 2, 3), (4, 5, 6, 7))


def test_an_expert_group_of_vllm_leaves_the_other_stage_s_ranks_out() -> None:
    """`all_ranks.transpose(1, 2).reshape(-1, dp * tp)`, distributed/parallel_state.py."""
    assert RankLayout(TP2_DP2_PP2, VLLM).groups("moe_ep") == ((0, 1, 4, 5), (2, 3, 6, 7))
    assert RankLayout(TP2_DP2_PP2, SGLANG).groups("moe_ep") == ((0, 1, 2, 3), (4, 5, 6, 7))


@pytest.mark.parametrize(
    ("width", "order", "nodes", "message"),
    [
        (Parallelism(), SGLANG, 0, "nodes=0 must be at least 1"),
        (Parallelism(attn_tp=8, moe_tp=8), SGLANG, 3, "nodes=3 must divide the 8 ranks"),
        (
            Parallelism(attn_tp=3, moe_tp=3, pp=2),
            SGLANG,
            3,
            "nodes=3 must divide pp=2 or be a multiple of it for sglang",
        ),
        (Parallelism(2, 3, moe_tp=6), VLLM, 2, "nodes=2 must divide attn_dp=3 or be a multiple of it for vllm"),
        (Parallelism(8, 1, 4, 2), VLLM, 1, "moe_ep=4 and moe_tp=2: one of them must be 1 for vllm"),
        (Parallelism(4, 2, 8), TENSORRT_LLM, 1, "attn_dp=2 and attn_tp=4: one of them must be 1 for tensorrt_llm"),
    ],
)
def test_layouts_that_an_engine_cannot_start_are_refused(
    width: Parallelism, order: RankOrder, nodes: int, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        RankLayout(width, order, nodes)


def test_widths_that_an_engine_refuses_have_no_ranks() -> None:
    width = Parallelism(8, 1, 4, 2)
    with pytest.raises(ValueError, match="moe_ep=4 and moe_tp=2"):
        width.coordinates(0, VLLM)
    with pytest.raises(ValueError, match="moe_ep=4 and moe_tp=2"):
        width.rank(0, 0, 0, VLLM)


def test_places_that_do_not_exist_are_refused() -> None:
    layout = RankLayout(Parallelism(attn_dp=16, moe_ep=16), nodes=2)
    with pytest.raises(ValueError, match=r"^node=2 is not in 0\.\.1$"):
        layout.rank_on(2, 0)
    with pytest.raises(ValueError, match=r"^gpu=-1 is not in 0\.\.7$"):
        layout.rank_on(0, -1)
    with pytest.raises(ValueError, match=r"^rank 16 is not in 0\.\.15$"):
        layout.position(16)
    with pytest.raises(ValueError, match=r"^moe_ep=3 is not where rank 9 stands: moe_ep=9$"):
        layout.rank(Position(1, 1, Coordinates(pp=0, attn_dp=9, attn_tp=0, moe_ep=3, moe_tp=0)))


def test_an_order_that_misses_a_width_is_refused() -> None:
    with pytest.raises(ValueError, match="attention="):
        RankOrder("other", ("pp", "pp", "attn_tp"), ("moe_ep", "moe_tp"))
    with pytest.raises(ValueError, match="experts="):
        RankOrder("other", ("pp", "attn_dp", "attn_tp"), ("moe_ep", "moe_ep"))
