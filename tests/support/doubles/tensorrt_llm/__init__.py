"""A double of TensorRT-LLM: what backends.trtllm calls of it, in both versions, on the simulated engine instead of a
model.

Names, signatures and fields are those of the real one (tests/unit/test_trtllm_double.py). Its workers are processes in
place of Ray's actors, so Ray's part is doubled too. What the doubled model does is in its folder's `double.json`.
"""

from __future__ import annotations

import os
from typing import Any

from backends import trtllm_ray

VERSION_VARIABLE = "TRTLLM_DOUBLE_VERSION"
"""Which version it is, read by whoever asks: tests start both in one process."""
RELEASES = {"1.2": "1.2.1", "1.3": "1.3.0"}

trtllm_ray.kill = lambda worker: worker.kill()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return RELEASES[os.environ.get(VERSION_VARIABLE, "1.3")]
    if name == "LLM":
        from tensorrt_llm.llmapi.llm import LLMS

        return LLMS[os.environ.get(VERSION_VARIABLE, "1.3")]
    raise AttributeError(name)
