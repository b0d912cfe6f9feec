"""What a person sees of the workers."""

from __future__ import annotations

from rich.console import Console

from backends.engine import Role
from dynamo_ray.cli.display import table
from dynamo_ray.request.membership import Phase, WorkerStatus


def test_an_engine_s_own_words_are_shown_as_they_are() -> None:
    detail = "vLLM did not start. Its last lines: [core.py:1510] no [bold] room in [/dev/shm]"
    console = Console(width=200, record=True, force_terminal=False)
    console.print(table((WorkerStatus("decode-0", Role.DECODE, Phase.BACKOFF, 2, detail, 0.0, 2),), 5.0))
    assert detail in console.export_text()
