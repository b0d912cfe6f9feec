"""A double of SGLang: what backends.sglang calls of it, in both versions, on the simulated engine instead of a model.

Names and signatures are those of the real ones (tests/unit/test_sglang_double.py). Processes are too: schedulers, with
attention DP a controller, and a detokenizer. What the doubled model does is in its folder's `double.json`.
"""

from __future__ import annotations

import os

VERSIONS = ("0.5.16", "0.5.23")
VERSION_VARIABLE = "SGLANG_DOUBLE_VERSION"
"""Which version it is, read by whoever asks: tests start both in one process."""


def __getattr__(name: str) -> str:
    if name == "__version__":
        return os.environ.get(VERSION_VARIABLE, VERSIONS[-1])
    raise AttributeError(name)
