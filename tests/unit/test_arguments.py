"""A user's engine arguments, held against the table of the engine's version: what is refused, and what it is told."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import yaml

from backends import arguments
from backends.arguments import SUPPORTED, Table, alternatives, command_line, settings_file, table
from backends.engine import EngineStartError

VERSIONS = [(backend, version) for backend, versions in SUPPORTED.items() for version in versions]
OWNED = {"tp_size": "parallelism.attn_tp", "kv_cache_config.event_buffer_max_size": "events"}


def mistakes(backend: str, version: str, **args: Any) -> list[str]:
    return [str(mistake) for mistake in arguments.mistakes(backend, version, args, OWNED)]


def every_argument(read: Table) -> list[arguments.Argument]:
    return [argument for fields in (read.fields, *read.nested.values()) for argument in fields.values()]


@pytest.mark.parametrize(("backend", "version"), VERSIONS)
def test_a_table_says_where_it_is_from_and_names_only_what_it_has(backend: str, version: str) -> None:
    read = table(backend, version)
    assert len(read.source) > 20
    assert len(read.fields) > 80
    plain = {"int", "float", "bool", "str", "dict", "any", "null"}
    named = {*plain, *read.nested, *read.variants}
    for argument in every_argument(read):
        for kind in alternatives(argument.type):
            inner = alternatives(kind[5:-1]) if kind.startswith("list[") else [kind]
            assert named.issuperset(inner) or kind == "list[list[int]]", argument
    for variants in read.variants.values():
        assert {"dict", *read.nested}.issuperset(variants.of.values())
    assert read.renamed.keys().isdisjoint(read.fields)
    assert read.removed.keys().isdisjoint(read.fields)
    for new in read.renamed.values():
        fields = read.fields
        *outer, last = new.split(".")
        for name in outer:
            fields = read.nested[alternatives(fields[name].type)[0]]
        assert last in fields


@pytest.mark.parametrize("backend", SUPPORTED)
def test_what_we_own_is_there_and_refused_with_its_place(backend: str) -> None:
    owned: dict[str, str] = importlib.import_module(f"backends.{backend}_args").OWNED
    for name, instead in owned.items():
        outer, _, inner = name.partition(".")
        read = [table(backend, version) for version in SUPPORTED[backend]]
        assert any(outer in each.fields or outer in each.renamed for each in read), f"{name} is in no version"
        given: dict[str, Any] = {outer: {inner: 1} if inner else 1}
        for version in SUPPORTED[backend]:
            (mistake,) = arguments.mistakes(backend, version, given, owned)
            assert str(mistake) == f"engine_args.{name}: follows from the configuration; use {instead}"


@pytest.mark.parametrize("version", SUPPORTED["sglang"])
@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"cuda_graph_max_bs": 256}, "engine_args.cuda_graph_max_bs: .* calls it 'cuda_graph_max_bs_decode'"),
        ({"cuda_graph_bs": [256]}, "engine_args.cuda_graph_bs: .* calls it 'cuda_graph_bs_decode'"),
        ({"prefill_round_robin_balance": True}, "engine_args.prefill_round_robin_balance: not in SGLang .*leave it"),
        ({"memfraction_static": 0.8}, "unknown to SGLang .*did you mean 'mem_fraction_static'"),
        ({"mem-fraction-static": 0.8}, "unknown to SGLang .*it is called 'mem_fraction_static'"),
        ({"tp_size": 2}, "follows from the configuration; use parallelism.attn_tp"),
        ({"tensor-parallel-size": 2}, "it is called 'tp_size', and it follows .*use parallelism.attn_tp"),
        ({"deepep_mode": "norml"}, "'norml' is none of auto, normal, low_latency; did you mean 'normal'"),
        ({"chunked_prefill_size": "4096"}, "must be an integer or null; it is '4096'"),
        ({"disable_radix_cache": 1}, "must be true or false; it is 1"),
        ({"page_size": True}, "must be an integer or null; it is true"),
        ({"cuda_graph_bs_decode": [1, "2"]}, r"engine_args.cuda_graph_bs_decode\[1\]: must be an integer; it is '2'"),
        ({"mem_fraction_static": {}}, "must be a number or null; it is a mapping"),
        ({"xyzzy": 1}, r"unknown to SGLang 0\.5\.\d+$"),
    ],
)
def test_a_mistake_is_told_with_what_to_write(version: str, args: dict[str, Any], said: str) -> None:
    with pytest.raises(EngineStartError, match=said):
        arguments.check("sglang", version, args, OWNED)


def test_all_mistakes_come_at_once_and_good_values_pass() -> None:
    good = {"mem_fraction_static": 1, "deepep_mode": "auto", "cuda_graph_bs_decode": [1, 2], "page_size": None}
    assert mistakes("sglang", "0.5.23", **good) == []
    assert len(mistakes("sglang", "0.5.23", **good, pagesize=1, tp_size=2)) == 2


def test_an_argument_of_another_version_names_it() -> None:
    assert mistakes("sglang", "0.5.23", load_publish_endpoint="auto") == []
    (said,) = mistakes("sglang", "0.5.16", load_publish_endpoint="auto")
    assert "unknown to SGLang 0.5.16; 0.5.23 has it" in said
    assert mistakes("sglang", "0.5.16", torchao_config="int8wo-64") == []
    assert "gone since 0.5.23" in mistakes("sglang", "0.5.23", torchao_config="int8wo-64")[0]


@pytest.mark.parametrize(
    ("version", "args", "said"),
    [
        ("1.2", {"moe_config": {"backend": "WIDEEP"}}, None),
        ("1.3", {"moe_config": {"backend": "WIDEEP"}}, "engine_args.moe_config.backend: 'WIDEEP' was removed in 1.3"),
        ("1.3", {"moe_config": {"bckend": "AUTO"}}, "moe_config.bckend: .*did you mean 'backend'"),
        ("1.3", {"moe_config": {"load_balancer": {"num_slots": "288"}}}, "load_balancer.num_slots: must be an integer"),
        ("1.3", {"moe_config": {"load_balancer": "/slots.yaml"}}, None),
        ("1.2", {"kv_cache_config": {"onboard_blocks": False}}, None),
        ("1.3", {"kv_cache_config": {"onboard_blocks": False}}, "gone since 1.3"),
        ("1.3", {"kv_cache_config": {"event_buffer_max_size": 1}}, "use events"),
        ("1.2", {"cuda_graph_config": None}, None),
        ("1.2", {"kv_cache_config": None}, "must be a mapping; it is null"),
        ("1.2", {"speculative_config": {"decoding_type": "MTP", "num_nextn_predict_layers": 1}}, None),
        ("1.2", {"speculative_config": {"decoding_type": "mtp"}}, "speculative_config.decoding_type: must be one of"),
        ("1.2", {"speculative_config": {"decoding_type": "MTP", "eagle_choices": []}}, "eagle_choices: unknown"),
        ("1.2", {"sampler_type": "auto"}, None),
        ("1.3", {"sampler_type": "auto"}, "accepts and ignores"),
    ],
)
def test_nested_models_of_tensorrt_llm_are_checked_by_version(
    version: str, args: dict[str, Any], said: str | None
) -> None:
    if said is None:
        arguments.check("trtllm", version, args, OWNED)
    else:
        with pytest.raises(EngineStartError, match=said):
            arguments.check("trtllm", version, args, OWNED)


@pytest.mark.parametrize("version", SUPPORTED["vllm"])
@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"eplb_config": {"num_redundant_experts": 32}, "enable_eplb": True, "all2all_backend": "deepep_v2"}, None),
        (
            {"compilation_config": {"pass_config": {"enable_noop": True}}},
            "calls it 'compilation_config.pass_config.eliminate_noops'",
        ),
        ({"num_redundant_experts": 32}, "calls it 'eplb_config.num_redundant_experts'"),
        ({"eplb_config": {"windowsize": 3}}, "eplb_config.windowsize: .*did you mean 'window_size'"),
        ({"eplb_config": '{"window_size": 3}'}, "must be a mapping"),
        ({"compilation_config": {"pass_config": {"fuse_everything": True}}}, "pass_config.fuse_everything: unknown"),
        ({"all2all_backend": "deepep"}, "'deepep' is none of "),
        ({"disable_log_requests": True}, "the ingress logs requests"),
        ({"hf_overrides": {"anything": 1}, "optimization_level": 3, "max_lora_rank": 16}, None),
        ({"max_lora_rank": 17}, "17 is none of 1, 8, 16"),
    ],
)
def test_nested_configurations_of_vllm_are_checked(version: str, args: dict[str, Any], said: str | None) -> None:
    found = mistakes("vllm", version, **args)
    if said is None:
        assert found == []
    else:
        with pytest.raises(EngineStartError, match=said):
            arguments.check("vllm", version, args, {})


def test_a_command_line_has_the_engines_own_spelling() -> None:
    args = {
        "model_path": "/m",
        "tp_size": 8,
        "disable_radix_cache": True,
        "skip_tokenizer_init": False,
        "lora_strict_loading": False,
        "random_seed": None,
        "cuda_graph_bs_decode": [1, 2],
        "extra_metric_labels": {"a": "b"},
        "forward_hooks": [{"name": "x"}],
        "lora_paths": {"sql": "/l"},
    }
    words = [
        *("--model-path", "/m", "--tp-size", "8", "--disable-radix-cache", "--no-lora-strict-loading"),
        *("--cuda-graph-bs-decode", "1", "2", "--extra-metric-labels", '{"a": "b"}'),
        *("--forward-hooks", '[{"name": "x"}]', "--lora-paths", "sql=/l"),
    ]
    assert command_line("sglang", "0.5.16", args) == ["python", "-m", "sglang.launch_server", *words]
    assert command_line("sglang", "0.5.23", args) == ["sglang", "serve", *words]


def test_vllms_negative_options_are_those_of_the_version() -> None:
    args = {"model": "/m", "enforce_eager": False, "disable_cascade_attn": False, "enable_log_requests": False}
    eager = ["vllm", "serve", "/m", "--no-enforce-eager"]
    assert command_line("vllm", "0.32.0", args) == [*eager, "--no-disable-cascade-attn", "--no-enable-log-requests"]
    assert command_line("vllm", "0.33.0", args) == [*eager, "--enable-cascade-attn", "--disable-log-requests"]


def test_tensorrt_llm_reads_its_arguments_from_a_file() -> None:
    args = {"model": "/m", "tensor_parallel_size": 4, "cuda_graph_config": None, "moe_config": {"backend": "TRTLLM"}}
    line = command_line("trtllm", "1.3", args)
    assert line == ["trtllm-serve", "/m", "--extra_llm_api_options", arguments.SETTINGS_FILE]
    del args["model"]
    assert yaml.safe_load(settings_file({"model": "/m", **args})) == args


def test_an_argument_without_an_option_is_named() -> None:
    with pytest.raises(EngineStartError, match=r"engine_args\.custom_sigquit_handler: has no option"):
        command_line("sglang", "0.5.23", {"model_path": "/m", "custom_sigquit_handler": "x"})


@pytest.mark.parametrize(
    ("backend", "asked", "found"),
    [
        ("sglang", None, "0.5.23"),
        ("sglang", "0.5.16", "0.5.16"),
        ("sglang", "0.5.16.post1", "0.5.16"),
        ("vllm", "0.32.0+cpu", "0.32.0"),
        ("trtllm", "1.2.1", "1.2"),
        ("trtllm", "1.3.0rc29", "1.3"),
    ],
)
def test_a_version_is_resolved_to_its_table(backend: str, asked: str | None, found: str) -> None:
    assert arguments.resolve(backend, asked) == found


@pytest.mark.parametrize(
    ("backend", "asked"), [("sglang", "0.5.17"), ("vllm", "0.31.0"), ("trtllm", "1.20"), ("trtllm", "x")]
)
def test_a_version_without_a_table_names_those_with_one(backend: str, asked: str) -> None:
    with pytest.raises(EngineStartError, match=f"^engine_version: .* {asked} is not supported; use .* or "):
        arguments.resolve(backend, asked)


def test_what_is_installed_must_be_supported_and_what_is_asked_for() -> None:
    assert arguments.check_installed("sglang", None, "0.5.16.post2") == "0.5.16"
    assert arguments.check_installed("trtllm", "1.2", "1.2.1") == "1.2"
    with pytest.raises(EngineStartError, match=r"0\.5\.23 is installed here, 0\.5\.16 is asked for"):
        arguments.check_installed("sglang", "0.5.16", "0.5.23")
    with pytest.raises(EngineStartError, match=r"1\.2\.0 is installed here, 1\.2\.1 is asked for"):
        arguments.check_installed("trtllm", "1.2.1", "1.2.0")
    with pytest.raises(EngineStartError, match=r"0.5.20 is installed here and not supported; install 0.5.16 or 0.5.23"):
        arguments.check_installed("sglang", None, "0.5.20")
    with pytest.raises(EngineStartError, match=r"0.5.20 is not supported; use"):
        arguments.check_installed("sglang", "0.5.20", "0.5.20")
