"""Puts the double of an engine's library in the place of the library, for as long as an engine starts.

What an engine's adapter imports later comes out of the packages that are loaded by then, and so do its processes: a
spawned one is told its parent's sys.path.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


@contextmanager
def library(variable: str, version: str) -> Iterator[None]:
    """The doubles are importable, and the one that reads this environment variable is of that version."""
    before = os.environ.get(variable)
    sys.path.insert(0, str(FOLDER))
    os.environ[variable] = version
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


@cache
def _models() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="doubled-models-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def model(name: str, **behaviour: Any) -> str:
    """The folder of a model that a double loads; `behaviour` is the double's to read."""
    folder = _models() / name
    folder.mkdir(exist_ok=True)
    config: Mapping[str, Any] = {"vocab_size": 32_000, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "double.json").write_text(json.dumps(behaviour))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")  # whole, and of no tensors
    return str(folder)
