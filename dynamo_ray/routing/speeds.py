"""How fast the engines are, learned from what requests took; what nothing has been seen of is assumed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from backends.engine import Role

FORGET = 0.98
"""Of a line's samples, at each new one: about the last fifty decide, so a change of load is followed in seconds."""
CLIP = 4.0
"""A sample counts for at most so many times what was predicted: one stalled request must not bend a line."""
RIDGE = 2.0
"""Samples that the assumed line, made as slow as what is seen, counts for at each end: prompts that are all of one
length do not tell overhead from speed."""
BLEND = 0.05
"""Weight of a new sample in a group's slowness, and in the mean length of answers."""
FADE = 0.002
"""Of every group's slowness, at each sample of its role: a group that was slow is tried again."""
NOISE = 1.25
"""Groups within this factor of their role count as equal: like ranks must not be told apart by chance."""

PREFILL = (0.02, 1 / 20_000, 4096.0)
LINK = (0.005, 1 / 500_000, 4096.0)
STEP = (0.015, 1 / 50_000_000, 100_000.0)
"""Assumed (overhead in s, s per token, tokens at which that is meant): an H100's, for a model that fills it."""
ANSWER_TOKENS = 128.0
UNCACHED_TOKENS = 2048.0


class Line:
    """seconds = overhead_s + s_per_token * tokens; least squares over decayed, clipped samples. A sample is O(1)."""

    __slots__ = ("_n", "_prior", "_x", "_xx", "_xy", "_y", "num_samples", "overhead_s", "s_per_token")

    def __init__(self, overhead_s: float, s_per_token: float, tokens: float) -> None:
        self.overhead_s = overhead_s
        self.s_per_token = s_per_token
        self.num_samples = 0
        self._prior = (overhead_s, s_per_token, tokens)
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def __call__(self, tokens: float) -> float:
        return self.overhead_s + self.s_per_token * tokens

    def observe(self, tokens: float, seconds: float) -> None:
        """Take a sample; one that is no positive time teaches nothing."""
        if not seconds > 0:
            return
        if self.num_samples >= 8:
            predicted = self(tokens)
            seconds = min(max(seconds, predicted / CLIP), predicted * CLIP)
        self.num_samples += 1
        self._n = self._n * FORGET + 1.0
        self._x = self._x * FORGET + tokens
        self._y = self._y * FORGET + seconds
        self._xx = self._xx * FORGET + tokens * tokens
        self._xy = self._xy * FORGET + tokens * seconds
        self._fit()

    def _fit(self) -> None:
        """Neither part below zero, and a token never free: a queue must always cost something."""
        overhead_s, s_per_token, tokens = self._prior
        assumed_s = overhead_s + s_per_token * tokens
        unseen_s = assumed_s * FORGET**self.num_samples
        factor = (self._y + unseen_s) / (self._n * overhead_s + self._x * s_per_token + unseen_s)
        overhead_s, assumed_s = factor * overhead_s, factor * assumed_s
        n, x, y = self._n + 2 * RIDGE, self._x + RIDGE * tokens, self._y + RIDGE * (overhead_s + assumed_s)
        xx, xy = self._xx + RIDGE * tokens * tokens, self._xy + RIDGE * tokens * assumed_s
        slope = (n * xy - x * y) / (n * xx - x * x)
        if slope * x > y:
            slope = xy / xx
        self.s_per_token = max(slope, factor * s_per_token / 100)
        self.overhead_s = max((y - self.s_per_token * x) / n, 0.0)


class Speeds:
    """One line per role for computing prompts, one for hand-offs, one per role for decode steps, in the tokens that
    `latency` counts; and by how much each lockstep group is slower than its role.
    """

    def __init__(self) -> None:
        self.prefill = {role: Line(*PREFILL) for role in Role}
        """Tokens: queued ahead and the prompt's own uncached ones. Seconds: until the prompt is computed."""
        self.link = Line(*LINK)
        """Tokens: handed over. Seconds: from the end of prefill until decode steps."""
        self.step = {role: Line(*STEP) for role in Role}
        """Tokens: the load of the group's slowest rank. Seconds: between two tokens of a request."""
        self.answer_tokens = ANSWER_TOKENS
        """Mean length of answers."""
        self.uncached_tokens = UNCACHED_TOKENS
        """Mean number of prompt tokens that a request has had computed."""
        self._slowness: NDArray[np.float64] = np.ones(0)
        self._groups: dict[str, NDArray[np.intp]] = {}
        self._links: dict[tuple[str, str], float] = {}
        self.slow_links: dict[tuple[str, str], float] = {}
        """Seconds of a hand-off between (prefill group, decode group) over what `link` says, where it is not noise."""
        self.any_slow = False
        """Whether `slowness` is more than noise anywhere."""

    def up(self, group: str, columns: Sequence[int]) -> None:
        """Know these ranks of a lockstep group, as fast as any until seen."""
        known = self._groups.get(group, np.empty(0, np.intp))
        self._groups[group] = np.union1d(known, np.array(columns, np.intp))
        missing = int(self._groups[group].max()) + 1 - len(self._slowness)
        if missing > 0:
            self._slowness = np.append(self._slowness, np.ones(max(missing, len(self._slowness))))
        self._slowness[columns] = 1.0

    def down(self, group: str, columns: Sequence[int]) -> None:
        """Forget these ranks of a group; with its last one, its links."""
        self._slowness[columns] = 1.0
        left = np.setdiff1d(self._groups.get(group, np.empty(0, np.intp)), np.array(columns, np.intp))
        if len(left):
            self._groups[group] = left
            return
        self._groups.pop(group, None)
        for links in (self._links, self.slow_links):
            for pair in [pair for pair in links if group in pair]:
                del links[pair]

    def slowness(self, columns: NDArray[np.intp]) -> NDArray[np.float64] | float:
        """Seconds these ranks take over what their role's line says; 1.0 where none differs by more than noise."""
        if not self.any_slow:
            return 1.0
        slowness = self._slowness.take(columns)
        return np.where((slowness > NOISE) | (slowness < 1 / NOISE), slowness, 1.0)

    def booked(self, uncached_tokens: int) -> None:
        """A prompt was sent to be computed."""
        self.uncached_tokens += BLEND * (uncached_tokens - self.uncached_tokens)

    def prefilled(self, role: Role, group: str, tokens: float, seconds: float) -> None:
        """A prompt was computed so long after it was sent."""
        line = self.prefill[role]
        self._compare(group, seconds / line(tokens))
        line.observe(tokens, seconds)

    def handed_over(self, groups: tuple[str, str], tokens: float, seconds: float) -> None:
        """Decode had its first token so long after the prompt was computed, its own step taken off."""
        if seconds <= 0:
            return
        ratio = min(max(seconds / self.link(tokens), 1 / CLIP), CLIP)
        self.link.observe(tokens, seconds)
        slowness = self._links[groups] = self._links.get(groups, 1.0) * (1 - BLEND) + ratio * BLEND
        if slowness > NOISE or slowness < 1 / NOISE:
            self.slow_links[groups] = slowness
        else:
            self.slow_links.pop(groups, None)

    def stepped(self, role: Role, group: str, tokens: float, seconds: float, num_tokens: int) -> None:
        """An answer of so many tokens came, with so long between two of them on average."""
        line = self.step[role]
        if role is Role.DECODE:
            self._compare(group, seconds / line(tokens))
        line.observe(tokens, seconds)
        self.answer_tokens += BLEND * (num_tokens - self.answer_tokens)

    def _compare(self, group: str, ratio: float) -> None:
        columns = self._groups.get(group)
        if columns is None or not ratio > 0:
            return
        slowness = self._slowness
        slowness += (1.0 - slowness) * FADE
        slowness[columns] += BLEND * (min(max(ratio, 1 / CLIP), CLIP) - slowness[columns])
        self.any_slow = bool(((slowness > NOISE) | (slowness < 1 / NOISE)).any())
