"""One try at a request on one pair of workers, and what the next try looks like when it fails. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import msgspec

from backends.engine import Feature, GenerateRequest, KVHandoff, Role, Sampling, TokenChunk
from dynamo_ray.errors import DeadlineExceeded, InternalError, InvalidRequest, RequestError, WorkerLost
from dynamo_ray.request.connection import LegFailed
from dynamo_ray.request.generation import Generation


@dataclass(slots=True)
class Attempt:
    """A request, the tokens its client already has, and how this try goes on from there."""

    request: Generation
    deadline_s: float
    """On the loop's clock."""
    arrived_s: float = 0.0
    """On the same clock: in a queue, a later try stands where the first one would."""
    number: int = 0
    num_losses: int = 0
    """Tries that a worker lost; those that found no room do not count."""
    delivered: list[int] = field(default_factory=list)
    """Every token the client has, of this try and those before."""
    skip: int = 0
    """Tokens of this try that the client already has."""
    token_ids: list[int] = field(default_factory=list)
    """What this try's engines take as the prompt."""
    excluded: Mapping[str, LegFailed] = field(default_factory=dict)
    """Workers that failed this request, and how."""

    def __post_init__(self) -> None:
        if not self.token_ids:
            self.token_ids = self.request.token_ids

    def leg(
        self, role: Role, dp_rank: int, handoff: KVHandoff | None, features: Collection[Feature]
    ) -> GenerateRequest:
        """What an engine with those features is asked."""
        return GenerateRequest(
            request_id=f"{self.request.request_id}.{self.number}",
            token_ids=self.token_ids,
            sampling=_after(self.request.sampling, len(self.token_ids) - len(self.request.token_ids)),
            leg=role,
            dp_rank=dp_rank,
            handoff=handoff,
            cache_salt=self.request.cache_salt,
            lora=self.request.lora,
            # One that orders nothing by it would refuse it; the ingress's own queue has honoured it.
            priority=self.request.priority if Feature.PRIORITY in features else 0,
        )

    def deliver(self, chunk: TokenChunk) -> TokenChunk | None:
        """What of this chunk the client has not had yet; None if nothing."""
        if self.skip:
            chunk = self._without_skipped(chunk)
        self.delivered += chunk.token_ids
        return chunk if chunk.token_ids or chunk.finish_reason is not None else None

    def after(self, failure: LegFailed, max_retries: int) -> Attempt:
        """The next try.

        Raises:
            InvalidRequest: The engine refused the request itself; no other would take it.
            WorkerLost: Tried often enough, or it cannot be replayed.
        """
        if not failure.retryable:
            raise _refusal(failure, self.request.sampling) from failure
        num_losses = self.num_losses + (not failure.overloaded)
        if num_losses > max_retries:
            raise WorkerLost(f"gave up after {num_losses} workers were lost; the last one: {failure}") from failure
        excluded = {**self.excluded, failure.worker: failure}
        retried = replace(self, number=self.number + 1, num_losses=num_losses, excluded=excluded)
        if not self.delivered:
            return retried
        prompt = self.request.token_ids
        match resumption(self.request.sampling):
            case "continue":
                return replace(retried, skip=0, token_ids=[*prompt, *self.delivered])
            case "restart":
                return replace(retried, skip=len(self.delivered), token_ids=prompt)
        raise WorkerLost(
            f"lost after {len(self.delivered)} tokens, and an answer that is sampled without a seed, under a presence "
            f"or frequency penalty or to a structure, cannot be replayed: {failure}"
        ) from failure

    def deadline_error(self) -> RequestError:
        return DeadlineExceeded("the request took longer than its deadline allows", "x-request-timeout-s")

    def _without_skipped(self, chunk: TokenChunk) -> TokenChunk:
        dropped = min(self.skip, len(chunk.token_ids))
        self.skip -= dropped
        return msgspec.structs.replace(
            chunk,
            token_ids=chunk.token_ids[dropped:],
            logprobs=None if chunk.logprobs is None else chunk.logprobs[dropped:],
        )


def resumption(sampling: Sampling) -> Literal["continue", "restart"] | None:
    """How an answer whose worker died goes on, token-exact where the engine is; None: it cannot.

    `continue`: what was delivered becomes prompt. Not under a seed, because an engine's generator cannot be moved to
    the middle of a sequence; not under penalties that count generated tokens only, nor to a structure, of which an
    engine would begin another one. `restart`: computed again from the start, and what was delivered is skipped; only
    where the same tokens come again.
    """
    counts_from_start = bool(sampling.presence_penalty or sampling.frequency_penalty or sampling.structure)
    sampled = sampling.temperature > 0
    if sampled and sampling.seed is None:
        return None if counts_from_start else "continue"
    return "restart" if sampled or counts_from_start else "continue"


def _after(sampling: Sampling, num_delivered: int) -> Sampling:
    if not num_delivered:
        return sampling
    return msgspec.structs.replace(
        sampling,
        max_tokens=sampling.max_tokens - num_delivered,
        min_tokens=max(0, sampling.min_tokens - num_delivered),
    )


def _refusal(failure: LegFailed, sampling: Sampling) -> RequestError:
    field = failure.field
    if field is None and sampling.structure is not None:
        # vLLM 0.32 and SGLang 0.5.16 do not say that it was the structure which they could not compile; all else that
        # a client sends has been checked before.
        field = "structure"
    return InternalError(str(failure)) if field is None else InvalidRequest(failure.message, field)
