"""Widths of one worker, and where in them a rank stands."""

from __future__ import annotations

from dataclasses import dataclass


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

    Ranks are numbered with tensor parallelism innermost, then attention data parallelism, then pipeline stages,
    so that ranks that talk most are neighbours (SGLang 0.5, `dp_attention.compute_dp_attention_world_info`).

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

    def coordinates(self, rank: int) -> Coordinates:
        """Raises ValueError for a rank outside 0..num_ranks-1."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"rank {rank} is not in 0..{self.num_ranks - 1}")
        stage, inside = divmod(rank, self.ranks_per_stage)
        attn_dp, attn_tp = divmod(inside, self.attn_tp)
        moe_ep, moe_tp = divmod(inside, self.moe_tp)
        return Coordinates(stage, attn_dp, attn_tp, moe_ep, moe_tp)

    def rank(self, pp: int, attn_dp: int, attn_tp: int) -> int:
        """The inverse of `coordinates`; ValueError for a coordinate outside its width."""
        sizes = {"pp": (pp, self.pp), "attn_dp": (attn_dp, self.attn_dp), "attn_tp": (attn_tp, self.attn_tp)}
        for name, (value, size) in sizes.items():
            if not 0 <= value < size:
                raise ValueError(f"{name}={value} is not in 0..{size - 1}")
        return (pp * self.attn_dp + attn_dp) * self.attn_tp + attn_tp
