"""The ranks that a request waits for: those that were best for it when it came, counting all who wait. Pure."""

from __future__ import annotations

from collections.abc import Callable

from dynamo_ray.routing.booked import Waiting
from dynamo_ray.routing.chooser import Choice, Chooser
from dynamo_ray.routing.policy import Ask
from dynamo_ray.routing.ranks import Holder

Choose = Callable[[int | None, int], Choice]
"""Among masks of prefill ranks (None: whoever decodes computes the prompt) and of decode ranks."""


class Wish:
    """One request's, from the first `seek` to `free`, which whoever made it calls on every path.

    Whoever took any free rank instead would leave its prefix behind, and evict another's where it goes: in an overload
    nearly every prompt would be computed anew (docs/routing.md, Queue).
    """

    __slots__ = ("_chooser", "_decode", "_prefill", "_version", "_waiting", "stuck", "uncached_tokens")

    def __init__(self, chooser: Chooser) -> None:
        self._chooser = chooser
        self._prefill: Holder | None = None
        self._decode: Holder | None = None
        self._waiting: Waiting | None = None
        self._version = -1
        self.stuck = 0
        """Those of its ranks that were busy at the last `seek`, as a mask; 0: it does not wait."""
        self.uncached_tokens = 0
        """Prompt tokens that its ranks did not have, when it chose them."""

    def seek(self, choose: Choose, prefill: int | None, decode: int, busy: int) -> Choice | None:
        """The ranks to book now; None: it waits for those it wants, and counts there.

        It chooses anew when ranks have come or gone, or when it may not use its own any more.
        """
        among = prefill, decode
        own = self._own()
        if own is not None and not (own[0] & ~(prefill or 0) or own[1] & ~decode):
            self.stuck = (own[0] | own[1]) & busy
            if self.stuck:
                return None
            among = prefill and (own[0] or prefill), own[1]
        self.free()
        choice = choose(*among)
        if not choice.mask & busy:
            return choice
        self._waiting = self._chooser.wait(choice)
        self._prefill = None if choice.prefill is None else choice.prefill.holder
        self._decode, self._version = choice.decode.holder, self._chooser.ranks.version
        self.stuck, self.uncached_tokens = choice.mask & busy, choice.uncached_tokens
        return None

    def hold(self, choose: Choose, prefill: int | None, decode: int, busy: int) -> None:
        """Wait though it may be able to go: others come first."""
        if not self.stuck:
            self.seek(choose, prefill, decode, -1)
            self.stuck = self.stuck & busy or self.stuck

    def uncached(self, ask: Ask, now_s: float) -> int:
        """Prompt tokens that the rank which is to compute them does not have now."""
        computing = self._prefill or self._decode
        return self.uncached_tokens if computing is None else self._chooser.uncached_tokens(ask, computing, now_s)

    def free(self) -> None:
        """It waits no longer."""
        if self._waiting is not None:
            self._waiting.free()
            self._waiting = self._prefill = self._decode = None
            self.stuck = 0

    def _own(self) -> tuple[int, int] | None:
        """Masks of its prefill and its decode rank; None: it has none, or must choose anew."""
        ranks = self._chooser.ranks
        if self._decode is None or self._version != ranks.version:
            return None
        decode, prefill = ranks.column(self._decode), None if self._prefill is None else ranks.column(self._prefill)
        assert decode is not None, "no rank has gone since"
        return 0 if prefill is None else 1 << prefill, 1 << decode
