"""srt/managers/detokenizer_manager.py: a process that has nothing to do where tokens are not turned into text."""

from __future__ import annotations

import threading
from typing import Any


def run_detokenizer_process(server_args: Any, port_args: Any, detokenizer_manager_class: Any = None) -> None:
    threading.Event().wait()
