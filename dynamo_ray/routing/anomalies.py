"""What was wrong with what came in: counted by kind and source, said once each."""

from __future__ import annotations

import logging
from collections import Counter
from enum import StrEnum

log = logging.getLogger(__name__)

GONE = "gone"
"""The source of what ranks did that are known no longer."""


class Anomaly(StrEnum):
    UNREADABLE = "unreadable"
    """Not a batch of the source's wire format; or larger than any is."""
    UNKNOWN_RANK = "unknown_rank"
    """Of an old epoch, or of a worker that is gone."""
    UNKNOWN_PARENT = "unknown_parent"
    """Stored below a block that was never told of, so nobody can tell which prompt it continues."""
    UNKNOWN_BLOCK = "unknown_block"
    """Said to be on a slower tier without its tokens, and never told of before."""
    BLOCK_SIZE = "block_size"
    """Not positive, or larger than any engine's."""
    LENGTH = "length"
    """Not as many tokens as its blocks hold."""
    TOKENS = "tokens"
    """Not integers of 32 bits."""
    CONTRADICTION = "contradiction"
    """A block of the same name, and of other tokens, is held."""
    TOO_MANY_BLOCKS = "too_many_blocks"
    """More than a rank can hold, or in one batch than one can tell of."""
    MEDIUM = "medium"
    """On a tier whose name is not known."""
    SEQUENCE = "sequence"
    """A number that comes again or out of turn."""
    NO_REPLAY = "no_replay"
    """The replay endpoint does not answer."""


class Anomalies:
    """Counters of one process. A source is a rank, by the name it is logged under."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[Anomaly, str]] = Counter()

    def saw(self, anomaly: Anomaly, source: object, detail: str, count: int = 1) -> None:
        """Count it, and log it if this source did not do so before."""
        key = (anomaly, str(source))
        if key not in self.counts:
            log.warning("%s: %s: %s (said once; the rest is counted)", key[1], anomaly, detail)
        self.counts[key] += count

    def total(self, anomaly: Anomaly) -> int:
        return sum(count for (kind, _), count in self.counts.items() if kind == anomaly)

    def forget(self, source: object) -> None:
        """The source is gone: what it did still counts, as nobody's."""
        name = str(source)
        for anomaly in Anomaly:
            count = self.counts.pop((anomaly, name), 0)
            if count:
                self.counts[anomaly, GONE] += count
