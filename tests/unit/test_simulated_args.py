from __future__ import annotations

from typing import Any

import pytest

from backends.engine import EngineStartError
from backends.simulated_args import SimulatedArgs, parse_args


def test_what_is_not_given_has_its_default() -> None:
    assert parse_args({}) == SimulatedArgs()
    assert parse_args({"step_s": 0, "kv_blocks": 512}) == SimulatedArgs(step_s=0.0, kv_blocks=512)


@pytest.mark.parametrize(
    "given",
    [
        {"block_sise": 3},
        {"block_size": "x"},
        {"block_size": 0},
        {"max_running": True},
        {"step_s": -0.1},
        {"prefill_tokens_per_s": 0},
        {"handoff": "none"},
        {"token_high": 1 << 32},
        {"failing_node": -1},
        {"token_high": 5, "token_low": 10},
        {"kv_blocks": 10, "block_size": 16, "max_model_len": 161},
    ],
)
def test_what_cannot_be_is_refused_with_its_key(given: dict[str, Any]) -> None:
    with pytest.raises(EngineStartError, match=f"^engine_args.{next(iter(given))}: "):
        parse_args(given)
