"""A request that counts on its ranks, from the choice to its end, and what it teaches of their speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backends.engine import Role
from dynamo_ray.routing.choice import Choice
from dynamo_ray.routing.load import Booking

if TYPE_CHECKING:
    from dynamo_ray.routing.chooser import Chooser


class Waiting:
    """A request that counts on ranks which do not have it yet, until `free`. That may be called again."""

    __slots__ = ("_bookings", "_chooser", "_coming")

    def __init__(self, chooser: Chooser, bookings: list[Booking], coming: list[int] | None) -> None:
        self._chooser, self._bookings, self._coming = chooser, bookings, coming

    def free(self) -> None:
        coming, self._coming = self._coming, None
        if coming:
            self._chooser.end(self._bookings[0].column, coming, None)
        for booking in self._bookings:
            self._chooser.table.free(booking)


MIN_ANSWER_TOKENS = 8
"""Shorter answers tell little of the time between two tokens."""


class Booked:
    """A choice that counts, until `free`. Every method may be called again, and after `free`, to no effect.

    What it took teaches `Speeds`: call each method when it happens.
    """

    __slots__ = (
        "_booked_s",
        "_chooser",
        "_coming",
        "_decode",
        "_done_s",
        "_first_s",
        "_groups",
        "_prefill",
        "choice",
        "predicted",
    )

    def __init__(
        self, chooser: Chooser, choice: Choice, prefill: Booking | None, decode: Booking, now_s: float
    ) -> None:
        self.choice = choice
        """Until the first token: it holds arrays over all candidates."""
        self.predicted = choice.predict()
        """Its ttft_s and itl_s are what to hold the observed ones against."""
        self._chooser = chooser
        self._prefill, self._decode = prefill, decode
        self._booked_s = now_s
        self._done_s: float | None = None
        self._first_s: float | None = None
        self._coming = chooser.begin(choice.prefill or choice.decode, prefill or decode)
        """Prompt blocks whose computing others may count on."""
        first = choice.prefill
        self._groups = ("" if first is None else first.group, choice.decode.group)

    @property
    def _computing(self) -> Booking:
        return self._prefill or self._decode

    def prefill_done(self, now_s: float) -> None:
        """The prefill rank is free of this prompt, though its KV may still wait there."""
        if self._done_s is None and self._computing.column is not None:
            self._done_s = now_s
            if self._prefill is not None:
                self._learn_prefill(now_s - self._booked_s)
            self._settle(now_s)

    def first_token(self, now_s: float) -> None:
        """Nothing of the prompt is left to compute."""
        if self._first_s is not None or self._decode.column is None:
            return
        self._first_s = now_s
        speeds, predicted = self._chooser.speeds, self.predicted
        if self._done_s is not None and self._prefill is not None:
            taken_s = now_s - self._done_s - predicted.itl_s
            speeds.handed_over(self._groups, predicted.moved_tokens, taken_s)
        elif self._prefill is not None:
            self._learn_prefill(now_s - self._booked_s - speeds.link(predicted.moved_tokens) - predicted.itl_s)
        else:
            self._learn_prefill(now_s - self._booked_s)
        self._settle(now_s)
        self._chooser.table.prefilled(self._decode)
        del self.choice

    def free(self, now_s: float, generated_tokens: int = 0) -> None:
        """Count it out. `generated_tokens`: how many came, of a request that ended well; 0 teaches nothing."""
        if self._first_s is not None and self._decode.column is not None and generated_tokens >= MIN_ANSWER_TOKENS:
            role = Role.AGGREGATED if self._prefill is None else Role.DECODE
            itl_s = (now_s - self._first_s) / (generated_tokens - 1)
            self._chooser.speeds.stepped(role, self._groups[1], self.predicted.step_tokens, itl_s, generated_tokens)
        self._settle(None)
        self._chooser.table.generated(self._decode, generated_tokens)
        self._chooser.table.free(self._decode)

    def _learn_prefill(self, seconds: float) -> None:
        role, group = (Role.AGGREGATED, 1) if self._prefill is None else (Role.PREFILL, 0)
        if seconds > 0:
            self._chooser.speeds.prefilled(role, self._groups[group], self.predicted.prefill_tokens, seconds)

    def _settle(self, now_s: float | None) -> None:
        """The prompt is computed (None: will not be): others count on it no longer, its rank is rid of it."""
        coming, self._coming = self._coming, None
        if coming:
            self._chooser.end(self._computing.column, coming, now_s)
        if self._prefill is not None:
            if now_s is not None:
                self._chooser.table.moved(self._prefill.column)
            self._chooser.table.free(self._prefill)
