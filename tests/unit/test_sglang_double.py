"""The double of SGLang has what its adapter uses, named and shaped as recorded from both versions' source."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from doubles import loader

from backends.engine import GenerateRequest, KVHandoff, Role, Sampling, Structure
from backends.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, decoder
from backends.sglang_requests import arguments

ADAPTER = [Path(__file__).parents[2] / f"backends/{name}.py" for name in ("sglang", "sglang_control")]
VERSIONS = ("0.5.16", "0.5.23")
STORED = BlockStored([-5, 7], None, [1, 2, 3, 4], 2, "GPU", cache_salt="tenant")
EVENTS = [STORED, BlockRemoved([-5], "GPU"), AllBlocksCleared()]


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> Iterator[str]:
    with loader.library("SGLANG_DOUBLE_VERSION", request.param):
        yield request.param
    for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
        del sys.modules[name]


def module(name: str) -> Any:
    return importlib.import_module(f"sglang.srt.{name}")


def recorded(version: str) -> dict[str, Any]:
    made: dict[str, Any] = module("server_args").recorded()[version]
    return made


def double_of(name: str) -> Callable[..., Any]:
    owner, _, function = name.rpartition(".")
    places = {
        "Engine": "entrypoints.engine",
        "TokenizerManager": "managers.tokenizer_manager",
        "TokenizerControlMixin": "managers.tokenizer_manager",
        "init_tokenizer_manager": "entrypoints.engine",
        "ZmqEventPublisher": "disaggregation.kv_events",
        "run_scheduler_process": "managers.scheduler",
        "run_detokenizer_process": "managers.detokenizer_manager",
        "run_data_parallel_controller_process": "managers.data_parallel_controller",
    }
    found = module(places[owner or function])
    if owner:
        found = getattr(found, owner.replace("TokenizerControlMixin", "TokenizerManager"))
    made: Callable[..., Any] = getattr(found, function)
    return made


def test_its_version_is_the_one_that_was_asked_for(version: str) -> None:
    assert importlib.import_module("sglang").__version__ == version
    assert set(VERSIONS) == set(module("server_args").recorded())


def test_functions_take_what_the_real_ones_take(version: str) -> None:
    functions = recorded(version)["functions"]
    assert functions
    for name, parameters in functions.items():
        ours = inspect.signature(double_of(name)).parameters
        real = [parameter for parameter, _, _ in parameters]
        named = [each.name for each in ours.values() if each.kind is each.POSITIONAL_OR_KEYWORD]
        if version == "0.5.16" and name == "run_data_parallel_controller_process":
            assert named.pop() == "prelaunched_schedulers"  # Of 0.5.23 only; nobody gives it in 0.5.16.
        assert named == real[: len(named)], name
        rest = [each for each in ours.values() if each.kind is each.VAR_POSITIONAL or each.kind is each.VAR_KEYWORD]
        needed = [parameter for parameter, kind, has_default in parameters if not has_default and kind == "positional"]
        assert rest or set(needed) <= set(named), name


def test_data_has_fields_of_the_real_ones(version: str) -> None:
    fields = recorded(version)["fields"]
    requests, loads = module("managers.io_struct"), module("managers.load_snapshot")
    for name in ("PauseGenerationReqInput", "ContinueGenerationReqInput", "UpdateWeightFromDiskReqInput"):
        assert set(getattr(requests, name).__dataclass_fields__) <= set(fields[name]), name
    for name in ("ReleaseMemoryOccupationReqInput", "ResumeMemoryOccupationReqInput"):
        assert list(getattr(requests, name).__dataclass_fields__) == fields[name]
    assert set(loads.LoadSnapshot.__struct_fields__) <= set(fields["LoadSnapshot"])
    assert list(loads.DisaggregationMetrics.__struct_fields__) == fields["DisaggregationMetrics"]
    assert set(module("server_args").DEFAULTS) <= set(fields["ServerArgs"]) | {"attn_dp_size"}


def test_the_adapter_touches_nothing_of_an_engine_that_the_real_one_has_not(version: str) -> None:
    """Also whatever the double has not: a test with it then fails by itself."""
    touched: dict[str, set[str]] = {"engine": set(), "manager": set()}
    owners = {"engine": "engine", "started": "engine", "_engine": "engine", "manager": "manager"}
    owners |= {"tokenizer_manager": "manager", "_manager": "manager"}
    for node in (node for file in ADAPTER for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.Attribute):
            owner = getattr(node.value, "attr", None) or getattr(node.value, "id", "")
            if owner in owners:
                touched[owners[owner]].add(node.attr)
    of_the_module = {"Engine", "init_tokenizer_manager", "run_data_parallel_controller_process"}
    touched["engine"] -= of_the_module
    assert {"generate_request", "rid_to_state", "flush_cache_communicator"} <= touched["manager"]
    assert touched["engine"] <= set(recorded(version)["engine"])
    assert touched["manager"] <= set(recorded(version)["manager"])
    assert recorded(version)["fake_bootstrap_host"] == module("disaggregation.utils").FAKE_BOOTSTRAP_HOST


def test_requests_have_only_fields_of_their_version(version: str) -> None:
    handoff = KVHandoff({"bootstrap_address": "10.0.0.1:9", "bootstrap_room": 4, "prefill_dp_rank": 0})
    for structure in (None, Structure("json_object"), Structure("regex", "a"), Structure("grammar", "root ::= x")):
        sampling = Sampling(5, seed=1, min_tokens=2, stop_token_ids=(1,), logprobs=2, structure=structure)
        made = arguments(GenerateRequest("r", [1], sampling, Role.DECODE, 0, handoff, "salt", "adapter", 3), version)
        assert set(made) <= set(recorded(version)["fields"]["GenerateReqInput"])
        assert set(made["sampling_params"]) <= set(recorded(version)["fields"]["SamplingParams"])


@pytest.mark.parametrize("leg", ["stop", "length", "abort"])
def test_outputs_say_what_the_real_ones_say(version: str, leg: str) -> None:
    reasons = {
        "stop": {"type": "stop", "matched": 7},
        "length": {"type": "length", "length": 1},
        "abort": {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None},
    }
    tokenizer_manager = module("managers.tokenizer_manager")
    manager = tokenizer_manager.TokenizerManager.__new__(tokenizer_manager.TokenizerManager)
    manager.server_args = SimpleNamespace(incremental_streaming_output=True)
    made = module("managers.io_struct").GenerateReqInput(
        input_ids=[1, 2], return_logprob=True, top_logprobs_num=1, stream=True
    )
    state = tokenizer_manager.ReqState([], False, SimpleNamespace(set=lambda: None), made)
    manager.rid_to_state = {"r": state}
    step = {"rid": "r", "token_ids": [7], "cached_tokens": 0, "logprobs": [(-0.5, 7, [(7, -0.5)])]}
    manager._handle_output(step | {"finish_reason": None}, rank=0)
    manager._handle_output(step | {"finish_reason": reasons[leg]}, rank=0)
    first, last = state.out_list
    assert (first["output_ids"], last["output_ids"]) == ([7], [7]), "incremental: each has its own tokens"
    assert set(last["meta_info"]) <= set(recorded(version)["meta_info"])
    assert last["meta_info"]["output_token_logprobs"] == [(-0.5, 7, None)]
    assert last["meta_info"]["output_top_logprobs"] == [[(-0.5, 7, None)]]
    assert list(reasons[leg]) == recorded(version)["finish_reasons"][leg]
    assert manager.rid_to_state == {}
    assert set(tokenizer_manager.ReqState.__dataclass_fields__) - {"cached_tokens", "abort_sent"} <= set(
        recorded(version)["request_state"]
    )


def test_kv_events_are_the_bytes_that_the_recorded_classes_make(version: str) -> None:
    events = module("disaggregation.kv_events")
    payload = events.ENCODERS[version](1.5, EVENTS, 3)
    types = event_types(recorded(version))
    blocks = [([-5], None, [1, 2]), ([7], -5, [3, 4])] if version == "0.5.16" else [([-5, 7], None, [1, 2, 3, 4])]
    salt = {} if version == "0.5.16" else {"cache_salt": "tenant"}
    expected = [
        types["BlockStored"](
            block_hashes=hashes,
            parent_block_hash=parent,
            token_ids=tokens,
            block_size=2,
            lora_id=None,
            medium="GPU",
            **salt,
        )
        for hashes, parent, tokens in blocks
    ]
    expected += [types["BlockRemoved"](block_hashes=[-5], medium="GPU"), types["AllBlocksCleared"]()]
    batch = types["EventBatch"](ts=1.5, events=expected, attn_dp_rank=3)
    assert payload == msgspec.msgpack.encode(batch)
    decoded = decoder(f"sglang-{version}")([b"", (0).to_bytes(8, "big"), payload])
    assert decoded.dp_rank == 3
    assert [token for event in decoded.events if isinstance(event, BlockStored) for token in event.token_ids] == [
        1,
        2,
        3,
        4,
    ]


def event_types(recording: dict[str, Any]) -> dict[str, Any]:
    """The classes of srt/disaggregation/kv_events.py, from their recorded fields and options."""
    fields, options, defaults = recording["fields"], recording["class_options"], recording["event_defaults"]

    def make(name: str, base: str) -> Any:
        given = [(field, Any, None) if field in defaults.get(name, ()) else (field, Any) for field in fields[name]]
        return msgspec.defstruct(name, given, **dict.fromkeys(options[base], True))

    made = {name: make(name, "KVCacheEvent") for name in ("BlockStored", "BlockRemoved", "AllBlocksCleared")}
    return made | {"EventBatch": make("EventBatch", "EventBatch")}
