"""What a layout costs the network: the bytes of one request that cross leaves.

Two flows count. Inside a worker every token's hidden state goes to the ranks that hold its experts and back, in every
MoE layer; experts are taken as equally busy, so a token goes from its node to each node alike. Between roles the KV of
the prompt moves from one prefill worker to one decode worker, all pairs alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from placement.model_shape import ModelShape

Leaves = Mapping[str, int]
"""How many nodes of a worker are in each leaf."""


@dataclass(frozen=True, slots=True)
class RequestShape:
    """A typical request, and what each of its tokens moves. The defaults are DeepSeek-R1's, in fp8."""

    prompt_tokens: int = 4096
    answer_tokens: int = 1024
    alltoall_bytes_per_token: int = 10_081_792
    """Dispatch and combine of one token in all layers, were every chosen expert on another node."""
    kv_bytes_per_token: int = 35_136


@dataclass(frozen=True, slots=True)
class Traffic:
    """Mean bytes of one request that cross leaves."""

    alltoall_bytes: float = 0.0
    handoff_bytes: float = 0.0

    @property
    def total_bytes(self) -> float:
        return self.alltoall_bytes + self.handoff_bytes


def request_shape(shape: ModelShape, prompt_tokens: int, answer_tokens: int, kv_bytes_per_token: int) -> RequestShape:
    """Of a model: dispatch in fp8 with a scale for each 128 values, combine in bf16 (DeepEP)."""
    if shape.experts is None:
        return RequestShape(prompt_tokens, answer_tokens, 0, kv_bytes_per_token)
    dispatch = shape.hidden_size + 4 * (shape.hidden_size // 128)
    message = dispatch + 2 * shape.hidden_size
    alltoall = message * shape.experts.num_per_token * sum(shape.is_moe)
    return RequestShape(prompt_tokens, answer_tokens, alltoall, kv_bytes_per_token)


def alltoall_share(leaves: Leaves) -> float:
    """The share of a worker's all-to-all that crosses leaves, in [0, 1]."""
    nodes = sum(leaves.values())
    return 1.0 - sum(count * count for count in leaves.values()) / (nodes * nodes)


def apart(one: Leaves, other: Leaves) -> float:
    """How likely a node of one worker and a node of the other are in different leaves."""
    smaller, larger = (one, other) if len(one) <= len(other) else (other, one)
    together = sum(count * larger.get(leaf, 0) for leaf, count in smaller.items())
    return 1.0 - together / (sum(one.values()) * sum(other.values()))


def traffic(request: RequestShape, workers: Mapping[str, Sequence[Leaves]]) -> Traffic:
    """Of all workers together, by role (`prefill`, `decode` or `aggregated`); a request goes to each alike."""
    alltoall = sum(
        request.alltoall_bytes_per_token * tokens_of(request, role) * _mean(alltoall_share(leaves) for leaves in found)
        for role, found in workers.items()
        if found
    )
    pairs = [apart(one, other) for one in workers.get("prefill", ()) for other in workers.get("decode", ())]
    handoff = request.kv_bytes_per_token * request.prompt_tokens * _mean(pairs) if pairs else 0.0
    return Traffic(alltoall, handoff)


def tokens_of(request: RequestShape, role: str) -> int:
    """Tokens of a request that a worker of that role computes."""
    prompt = 0 if role == "decode" else request.prompt_tokens
    answer = 0 if role == "prefill" else request.answer_tokens
    return prompt + answer


def leaves_of(leaves: Iterable[str]) -> Leaves:
    return Counter(leaves)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
