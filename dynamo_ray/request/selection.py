"""Which ranks a request takes of those that it may, and of those that are free: a pair, or decode alone. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dynamo_ray.config import PrefillOnDecodeConfig
from dynamo_ray.routing.chooser import Choice, Chooser
from dynamo_ray.routing.policy import Ask


@dataclass(frozen=True, slots=True)
class Selection:
    """Masks name ranks. Of prefill ranks, None: whoever decodes computes every prompt; 0: there are none now."""

    chooser: Chooser
    short: PrefillOnDecodeConfig | None
    """Which prompts a decode rank computes itself."""

    def best(self, ask: Ask, prefill: int | None, decode: int, now_s: float) -> Choice | None:
        """Among those masks; None: it needs a prefill rank, and there is none."""
        if prefill is None:
            return self.chooser.choose(ask, None, decode, now_s)
        alone = self.alone(ask, decode, bool(prefill), now_s)
        if alone is not None or not prefill:
            return alone
        return self.chooser.choose(ask, prefill, decode, now_s)

    def alone(self, ask: Ask, decode: int, prefill_lives: bool, now_s: float) -> Choice | None:
        """On a decode rank that computes the prompt itself, where there is as little of it as is allowed."""
        if self.short is None:
            return None
        choice = self.chooser.choose(ask, None, decode, now_s)
        return choice if choice.decode.uncached_tokens <= self.short.limit(prefill_lives) else None

    def free(
        self, ask: Ask, prefill: int | None, decode: int, busy: int, is_short: Callable[[bool], bool], now_s: float
    ) -> Choice | int:
        """The best of what is free, for a policy that does not wait for its first choice; or the ranks it waits for.

        Args:
            is_short: whether it needs no prefill rank, by whether there are any; asked where all of them are busy.
        """
        free, free_decode = prefill and prefill & ~busy, decode & ~busy
        choice = None
        if free_decode and not (prefill and not free):
            choice = self.best(ask, free, free_decode, now_s)
        elif free_decode and is_short(True):
            choice = self.alone(ask, free_decode, True, now_s)
        if choice is not None:
            return choice
        return (0 if free else prefill or 0) | (0 if free_decode else decode)
