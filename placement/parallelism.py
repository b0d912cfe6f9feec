"""Widths of one worker, and where in them a rank stands."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

Axis = Literal["pp", "attn_dp", "attn_tp", "moe_ep", "moe_tp"]


@dataclass(frozen=True, slots=True)
class RankOrder:
    """How an engine numbers the ranks of a worker.

    In every engine read, experts are spread over the ranks of one stage by their number in it,
    attn_dp_rank * attn_tp + attn_tp_rank, and nodes hold consecutive ranks.

    Raises:
        ValueError: A field does not name each of its widths once.
    """

    name: str
    attention: tuple[Axis, Axis, Axis]
    """pp, attn_dp and attn_tp, the slowest-changing first."""
    experts: tuple[Axis, Axis]
    """moe_ep and moe_tp, the slowest-changing first."""
    exclusive: tuple[Axis, Axis] | None = None
    """Two widths that the engine cannot combine: one of them must be 1."""
    whole_nodes: bool = False
    """Whether a node holds whole slices of the slowest width, or a slice fills whole nodes."""

    def __post_init__(self) -> None:
        if sorted(self.attention) != ["attn_dp", "attn_tp", "pp"]:
            raise ValueError(f"attention={self.attention} must name pp, attn_dp and attn_tp once each")
        if sorted(self.experts) != ["moe_ep", "moe_tp"]:
            raise ValueError(f"experts={self.experts} must name moe_ep and moe_tp once each")


SGLANG = RankOrder("sglang", ("pp", "attn_dp", "attn_tp"), ("moe_ep", "moe_tp"), whole_nodes=True)
"""The same in 0.5.16 and 0.5.23; without context parallelism and with `moe_dp_size` 1, as we start it.

Source: world rank = tp_size * pp_rank + tp_rank: `srt/model_executor/model_runner.py` (0.5.16),
`srt/runtime_context.py` `derive_spawn_ranks` (0.5.23). Attention: `compute_dp_attention_world_info` in
`srt/layers/dp_attention.py`. Experts: `initialize_model_parallel` in `srt/distributed/parallel_state.py`. Nodes:
`_calculate_rank_ranges` in `srt/entrypoints/engine.py`, which leaves stages out, or numbers some that do not exist,
where neither of the nodes and pp divides the other.
"""

VLLM = RankOrder(
    "vllm", ("attn_dp", "pp", "attn_tp"), ("moe_ep", "moe_tp"), exclusive=("moe_ep", "moe_tp"), whole_nodes=True
)
"""vLLM 0.32; without prefill context parallelism.

Source: DP x PP x PCP x TP in `initialize_model_parallel`, `distributed/parallel_state.py`. Experts:
`FusedMoEParallelConfig.make` in `model_executor/layers/fused_moe/config.py`; `enable_expert_parallel` spreads them over
all ranks of a stage or none. Nodes: `nnodes_within_dp` in `config/parallel.py`, `init_device` in
`v1/worker/gpu_worker.py`, for `data_parallel_size_local` = max(1, attn_dp / nodes).
"""

TENSORRT_LLM = RankOrder(
    "tensorrt_llm", ("pp", "attn_dp", "attn_tp"), ("moe_tp", "moe_ep"), exclusive=("attn_dp", "attn_tp")
)
"""TensorRT-LLM 1.2 and 1.3; without context parallelism, whose place 1.3 moved, and with `moe_cluster_size` 1.

Source: `MpiTopology`, and `MappingBase` for moe_tp_rank, moe_ep_rank, node_rank and local_rank, in
`tensorrt_llm/mapping.py` (1.2.0rc2 @b35ac1b, and the later one with `DraftMapping`); Ray: `build_mesh` in
`tensorrt_llm/_torch/device_mesh.py` (main @1549c31). `enable_attention_dp` makes every tp rank an attention-DP rank:
`MappingBase.dp_size`.
"""


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Where one rank stands in each dimension."""

    pp: int
    attn_dp: int
    attn_tp: int
    moe_ep: int
    moe_tp: int


@dataclass(frozen=True, slots=True)
class Parallelism:
    """Every layer's ranks are used twice: attn_tp * attn_dp by attention, moe_ep * moe_tp by the experts.

    Ranks are numbered in SGLang's order where no other is named. `placement.memory.check` holds the widths against
    a model.

    Raises:
        ValueError: A width is below 1, or the two products differ; names the widths.
    """

    attn_tp: int = 1
    attn_dp: int = 1
    moe_ep: int = 1
    moe_tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.attn_tp * self.attn_dp != self.moe_ep * self.moe_tp:
            raise ValueError(
                f"attn_tp*attn_dp={self.attn_tp * self.attn_dp} must equal moe_ep*moe_tp={self.moe_ep * self.moe_tp}"
            )

    @property
    def ranks_per_stage(self) -> int:
        return self.attn_tp * self.attn_dp

    @property
    def num_ranks(self) -> int:
        return self.ranks_per_stage * self.pp

    def coordinates(self, rank: int, order: RankOrder = SGLANG) -> Coordinates:
        """Raises ValueError for a rank outside 0..num_ranks-1, and for widths that the order's engine refuses."""
        self.check(order)
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"rank {rank} is not in 0..{self.num_ranks - 1}")
        at = self._unravel(rank, order.attention)
        at |= self._unravel(at["attn_dp"] * self.attn_tp + at["attn_tp"], order.experts)
        return Coordinates(**at)

    def rank(self, pp: int, attn_dp: int, attn_tp: int, order: RankOrder = SGLANG) -> int:
        """The inverse of `coordinates`; ValueError for a coordinate outside its width."""
        self.check(order)
        at = {"pp": pp, "attn_dp": attn_dp, "attn_tp": attn_tp}
        rank = 0
        for axis in order.attention:
            _check_range(axis, at[axis], getattr(self, axis))
            rank = rank * int(getattr(self, axis)) + at[axis]
        return rank

    def check(self, order: RankOrder) -> None:
        """Raises ValueError, with both widths, where the order's engine cannot combine two of them."""
        if order.exclusive and min(getattr(self, axis) for axis in order.exclusive) > 1:
            widths = " and ".join(f"{axis}={getattr(self, axis)}" for axis in order.exclusive)
            raise ValueError(f"{widths}: one of them must be 1 for {order.name}")

    def _unravel(self, number: int, axes: tuple[Axis, ...]) -> dict[str, int]:
        at: dict[str, int] = {}
        for axis in reversed(axes):
            number, at[axis] = divmod(number, getattr(self, axis))
        return at


@dataclass(frozen=True, slots=True)
class Position:
    """A rank's GPU and its coordinates."""

    node: int
    """Among the worker's nodes, in their order: `Bundle.node_rank`."""
    gpu: int
    """Among the GPUs that the worker has on the node."""
    at: Coordinates


@dataclass(frozen=True, slots=True)
class RankLayout:
    """The ranks of one worker on its nodes, in its engine's order; every rank has one position and back.

    Raises:
        ValueError: The engine cannot run these widths, or not on this many nodes; names the fields.
    """

    parallelism: Parallelism
    order: RankOrder = SGLANG
    nodes: int = 1

    def __post_init__(self) -> None:
        self.parallelism.check(self.order)
        if self.nodes < 1:
            raise ValueError(f"nodes={self.nodes} must be at least 1")
        if self.parallelism.num_ranks % self.nodes:
            raise ValueError(f"nodes={self.nodes} must divide the {self.parallelism.num_ranks} ranks")
        axis = self.order.attention[0]
        width = getattr(self.parallelism, axis)
        if self.order.whole_nodes and self.nodes % width and width % self.nodes:
            raise ValueError(
                f"nodes={self.nodes} must divide {axis}={width} or be a multiple of it for {self.order.name}"
            )

    @property
    def gpus_per_node(self) -> int:
        return self.parallelism.num_ranks // self.nodes

    def position(self, rank: int) -> Position:
        """Raises ValueError for a rank outside 0..num_ranks-1."""
        at = self.parallelism.coordinates(rank, self.order)
        return Position(*divmod(rank, self.gpus_per_node), at)

    def rank(self, position: Position) -> int:
        """The inverse of `position`; ValueError, with the field, for one that no rank has."""
        at = position.at
        rank = self.parallelism.rank(at.pp, at.attn_dp, at.attn_tp, self.order)
        is_at = self.position(rank)
        named = [("node", position.node, is_at.node), ("gpu", position.gpu, is_at.gpu)]
        named += [(field.name, getattr(at, field.name), getattr(is_at.at, field.name)) for field in fields(at)]
        for name, given, actual in named:
            if given != actual:
                raise ValueError(f"{name}={given} is not where rank {rank} stands: {name}={actual}")
        return rank

    def rank_on(self, node: int, gpu: int) -> int:
        """Raises ValueError for a node or GPU that the worker does not have."""
        return self.ranks_on(node)[_check_range("gpu", gpu, self.gpus_per_node)]

    def ranks_on(self, node: int) -> range:
        """In GPU order; ValueError for a node that the worker does not have."""
        first = _check_range("node", node, self.nodes) * self.gpus_per_node
        return range(first, first + self.gpus_per_node)

    def groups(self, axis: Axis) -> tuple[tuple[int, ...], ...]:
        """The ranks that talk along one width, each group in the order of its width and the groups by first rank.

        The ranks of an attention or pp group share their other two attention coordinates; those of an expert group
        share pp and the other expert coordinate.
        """
        axes = ("pp", *self.order.experts) if axis in self.order.experts else self.order.attention
        shared = [other for other in axes if other != axis]
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.parallelism.num_ranks):
            at = self.parallelism.coordinates(rank, self.order)
            groups.setdefault(tuple(getattr(at, other) for other in shared), []).append(rank)
        return tuple(map(tuple, groups.values()))


def _check_range(name: str, value: int, size: int) -> int:
    if not 0 <= value < size:
        raise ValueError(f"{name}={value} is not in 0..{size - 1}")
    return value
