"""The double of TensorRT-LLM has what its adapter uses, named and shaped as recorded from both versions' source."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from doubles import loader

from backends import arguments, trtllm_ray
from backends.engine import EngineError, EngineStartError, GenerateRequest, LaunchSpec, Role, Sampling, Structure
from backends.trtllm import EXECUTOR, TensorRTLLMEngine
from backends.trtllm_args import bundle_indices
from backends.trtllm_requests import (
    FIRST_LOGPROBS,
    HANDED_OVER,
    call_arguments,
    disaggregation_arguments,
    guide_arguments,
    handoff,
    sampling_arguments,
    scheduling_arguments,
)

VERSIONS = arguments.SUPPORTED["trtllm"]
DATA = {
    "SamplingParams": "sampling_params",
    "GuidedDecodingParams": "sampling_params",
    "DisaggregatedParams": "disaggregated_params",
    "SchedulingParams": "scheduling_params",
    "LoRARequest": "executor.request",
    "Logprob": "executor.result",
    "CompletionOutput": "executor.result",
}
EVERYTHING = Sampling(9, 0.7, 0.9, 40, 0.1, 0.2, 0.3, 1.1, seed=5, min_tokens=2, stop_token_ids=(7,), logprobs=2)


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> Iterator[str]:
    with loader.library("TRTLLM_DOUBLE_VERSION", request.param):
        yield request.param
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


def module(name: str) -> Any:
    return importlib.import_module(f"tensorrt_llm.{name}")


def recorded(version: str) -> dict[str, Any]:
    made: dict[str, Any] = module("recorded").recorded()[version]
    return made


def signature(function: Any) -> list[list[Any]]:
    """[name, kind, whether it may be left out] each."""
    made = []
    for each in inspect.signature(function).parameters.values():
        is_rest = each.kind is each.VAR_KEYWORD
        made.append([each.name, "rest" if is_rest else "positional", is_rest or each.default is not each.empty])
    return made


def test_its_functions_take_what_the_real_ones_take(version: str) -> None:
    executor = module("executor.executor")
    owners = {
        "LLM": module("llmapi.llm").LLMS[version],
        "GenerationResult": module("executor.result").GenerationResult,
        "RayExecutor": executor.RayExecutor,
        "RpcWorkerMixin": executor.RpcClient,
    }
    functions = recorded(version)["functions"]
    assert functions
    for name, expected in functions.items():
        owner, _, function = name.rpartition(".")
        assert signature(getattr(owners[owner], function)) == expected, name


def test_its_classes_of_data_have_the_real_fields_and_defaults(version: str) -> None:
    check = module("recorded").check
    for name, place in DATA.items():
        made = getattr(module(place), name)
        known = recorded(version)["fields"][name]
        assert known.keys() <= {field.name for field in dataclasses.fields(made)}
        needed = {key: 1 for key, default in known.items() if default is None}
        value = made(**needed)
        for key, default in known.items():
            assert default is None or getattr(value, key) == default[0], f"{name}.{key}"
        check(value, version)


def test_a_field_of_the_other_version_is_an_error_as_there() -> None:
    with loader.library("TRTLLM_DOUBLE_VERSION", "1.2"):
        check = module("recorded").check
        of_1_3 = module("disaggregated_params").DisaggregatedParams(disagg_request_id=1)
    check(of_1_3, "1.3")
    with pytest.raises(TypeError, match="unexpected keyword argument 'disagg_request_id'"):
        check(of_1_3, "1.2")


def test_every_keyword_of_the_adapters_is_one_of_that_version(version: str) -> None:
    fields, functions = recorded(version)["fields"], recorded(version)["functions"]
    legs = [leg for leg in Role if version != "1.2" or leg is Role.AGGREGATED]
    for leg in legs:
        assert sampling_arguments(EVERYTHING, leg, version).keys() < fields["SamplingParams"].keys()
    for kind in ("json_object", "json_schema", "regex", "grammar"):
        args = guide_arguments(Sampling(9, structure=Structure(kind, "x")))  # type: ignore[arg-type]
        assert args is not None
        assert args.keys() < fields["GuidedDecodingParams"].keys()
    assert scheduling_arguments(0).keys() <= fields["SchedulingParams"].keys()
    made = GenerateRequest("r", [1], EVERYTHING, cache_salt="tenant", priority=1)
    call = {"sampling_params", "scheduling_params", "disaggregated_params", "lora_request"}
    takes = {name for name, _, _ in functions["LLM.generate_async"]}
    assert call_arguments(made, version).keys() | call <= takes
    prefill = disaggregation_arguments(GenerateRequest("r", [1], EVERYTHING, Role.PREFILL), version)
    assert prefill is not None
    assert {*prefill, *HANDED_OVER[version]} <= fields["DisaggregatedParams"].keys()
    told = SimpleNamespace(**dict.fromkeys(HANDED_OVER["1.3"], 1))
    handed = handoff(told, [{5: SimpleNamespace(logprob=-1.0, rank=1)}], version)
    decode = disaggregation_arguments(GenerateRequest("r", [1], EVERYTHING, Role.DECODE, handoff=handed), version)
    assert decode is not None
    assert decode.keys() == {"request_type", *HANDED_OVER[version]}
    assert FIRST_LOGPROBS in handed.params
    assert version == "1.2" or "first_gen_log_probs" in fields["DisaggregatedParams"]


def spec(path: str, version: str, **fields: Any) -> LaunchSpec:
    return LaunchSpec("a-0", Role.AGGREGATED, "doubled", path, version=version, launcher="ray", **fields)


async def test_its_workers_are_placed_in_the_group_that_the_engine_is_in(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    llm = module("llmapi.llm").LLMS[version]

    def take(self: Any, **kwargs: Any) -> None:
        given.update(kwargs)
        raise RuntimeError("enough")

    monkeypatch.setattr(llm, "__init__", take)
    launch = spec(loader.model("doubled"), version, attn_dp=2, moe_ep=2, bundles=(3,))
    with pytest.raises(EngineStartError, match="enough"):
        await TensorRTLLMEngine(launch, placement_group=lambda: "our group").start()
    placement = given["ray_placement_config"]
    assert placement == {"placement_groups": ["our group"], "placement_bundle_indices": [bundle_indices(launch)]}
    assert placement.keys() <= recorded(version)["fields"]["RayPlacementConfig"].keys()
    assert arguments.mistakes("trtllm", version, given, {}) == ()
    assert llm.__name__.startswith("_LLM")
    assert importlib.import_module(EXECUTOR[version]).RayExecutor is module("executor.executor").RayExecutor


async def test_outside_any_group_a_placed_worker_does_not_start(version: str) -> None:
    launch = spec(loader.model("doubled"), version, bundles=(0,))
    with pytest.raises(EngineStartError, match="placement group"):
        await TensorRTLLMEngine(launch, placement_group=lambda: None).start()


async def test_another_version_than_asked_for_does_not_start(version: str) -> None:
    (other,) = set(VERSIONS) - {version}
    with pytest.raises(EngineStartError, match=rf"engine_version: .*{other} is asked for"):
        await TensorRTLLMEngine(spec(loader.model("doubled"), other)).start()


async def test_a_model_without_a_configuration_does_not_start() -> None:
    with pytest.raises(EngineStartError, match=r"model\.path: .*/nowhere"):
        await TensorRTLLMEngine(spec("/nowhere", "1.3")).start()


async def test_slots_must_be_the_models_experts_and_the_copies(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text(
        '{"vocab_size": 9, "max_position_embeddings": 9, "n_routed_experts": 8, "text": 1}'
    )
    balanced = {"moe_config": {"load_balancer": {"num_slots": 12}}}
    launch = spec(str(tmp_path), "1.3", attn_dp=2, moe_ep=2, redundant_experts=2, engine_args=balanced)
    with pytest.raises(EngineStartError, match=r"num_slots: 12 are not the model's 8 experts and .*=2"):
        await TensorRTLLMEngine(launch).start()


def test_the_installed_ray_has_the_name_that_1_2_imports_from_there() -> None:
    trtllm_ray.restore_old_names()
    from ray.util.placement_group import PlacementGroupSchedulingStrategy
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as Expected

    assert PlacementGroupSchedulingStrategy is Expected


def test_what_a_raylet_tells_of_its_node_is_not_told_to_other_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_RAYLET_PID", "7")
    monkeypatch.delenv("RAY_NODE_IP_ADDRESS", raising=False)
    with trtllm_ray.without_node_variables():
        assert "RAY_RAYLET_PID" not in os.environ
    assert os.environ["RAY_RAYLET_PID"] == "7"
    assert "RAY_NODE_IP_ADDRESS" not in os.environ


async def test_other_nodes_have_no_share_of_their_own() -> None:
    launch = dataclasses.replace(spec("/nowhere", "1.3", attn_dp=2, moe_ep=2), node_rank=1)
    launch = dataclasses.replace(launch, nodes=launch.nodes * 2)
    engine = TensorRTLLMEngine(launch)
    with pytest.raises(EngineError):
        await engine.check_health()
    assert await engine.start() is None
    await engine.check_health()
    assert engine.load() == ()
    await engine.stop()
