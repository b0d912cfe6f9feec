"""One choice of an answer on its way from tokens to text. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backends.engine import Sampling, TokenChunk, TokenLogprob
from dynamo_ray.errors import InternalError
from dynamo_ray.request.detokenise import Detokeniser, StopStrings

Located = tuple[int, TokenLogprob]
"""A token, and how many characters of the answer stand before it."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What one chunk adds to a choice; never empty."""

    text: str
    logprobs: Sequence[Located] = ()
    finish_reason: str | None = None
    """Set on the last one."""


class Choice:
    """Takes an engine's chunks and says what of them the client sees.

    A token that ends the answer (EOS, `stop_token_ids`) counts as generated but has no text. Tokens beyond the one
    that completes a stop string do not count, whatever chunk they came in.
    """

    __slots__ = (
        "_detokeniser",
        "_found",
        "_min_tokens",
        "_num_decoded",
        "_num_shown",
        "_pending",
        "_stop_token_ids",
        "_stops",
        "finish_reason",
        "index",
        "num_tokens",
    )

    def __init__(self, index: int, sampling: Sampling, detokeniser: Detokeniser, stops: Sequence[str]) -> None:
        self.index = index
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self._stop_token_ids = frozenset(sampling.stop_token_ids)
        self._min_tokens = sampling.min_tokens
        self._detokeniser = detokeniser
        self._stops = StopStrings(stops) if stops else None
        self._found = False
        self._num_decoded = 0
        self._num_shown = 0
        self._pending: list[Located] = []

    def take(self, chunk: TokenChunk) -> Delta | None:
        """What there is to show now; None while the text is held back.

        After a delta with a finish reason, which may come from a stop string, take nothing more.

        Raises:
            InternalError: The engine aborted a request that nobody had asked it to abort.
        """
        token_ids, reason = chunk.token_ids, chunk.finish_reason
        if reason == "abort":
            raise InternalError("the engine aborted the request")
        visible = token_ids
        if reason == "stop" and token_ids and token_ids[-1] in self._stop_token_ids:
            visible = token_ids[:-1]
        if self._stops is None and chunk.logprobs is None:
            text = self._detokeniser.push(visible) if visible else ""
            self.num_tokens += len(token_ids)
        else:
            text = self._take_singly(visible, chunk.logprobs)
            self.num_tokens += len(token_ids) - len(visible) if self.finish_reason is None else 0
        if reason is not None and self.finish_reason is None:
            text += self._end(reason)
        if not text and self.finish_reason is None:
            return None
        self._num_shown += len(text)
        return Delta(text, self._located() if self._pending else (), self.finish_reason)

    def _take_singly(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None) -> str:
        parts = []
        for position, token_id in enumerate(token_ids):
            if logprobs is not None:
                self._pending.append((self._num_decoded, logprobs[position]))
            text = self._detokeniser.push((token_id,))
            self._num_decoded += len(text)
            self.num_tokens += 1
            parts.append(self._cut(text))
            if self.finish_reason is not None:
                break
        return "".join(parts)

    def _cut(self, text: str) -> str:
        if self._stops is None or self.num_tokens <= self._min_tokens:
            return text
        shown, found = self._stops.push(text)
        if found:
            self._found, self.finish_reason = True, "stop"
        return shown

    def _end(self, reason: str) -> str:
        """The engine is done: what was held back is final, and may still complete a stop string."""
        text = self._cut(self._detokeniser.finish())
        if self.finish_reason is not None:
            return text
        self.finish_reason = reason
        return text + self._stops.finish() if self._stops is not None else text

    def _located(self) -> list[Located]:
        """Logprobs of tokens whose text has begun to show; the others wait, or were cut off with a stop string."""
        count = 0
        if self.finish_reason is not None and not self._found:
            count = len(self._pending)  # nothing was cut off: tokens without text belong to the answer too
        while count < len(self._pending) and self._pending[count][0] < self._num_shown:
            count += 1
        ready, self._pending = self._pending[:count], self._pending[count:]
        return ready
