"""`dynamo-ray flags`: each node's own command line, before there are nodes, or on planned ones."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from backends import LaunchPlan, agreement, arguments, launch_plan, placeholders
from backends.engine import LaunchSpec, NodePlace, Role
from dynamo_ray.cli import flags as printing
from dynamo_ray.cli.flags import Flags
from dynamo_ray.config import LAUNCHERS
from dynamo_ray.errors import ConfigError

ADAPTERS = [(backend, version) for backend, versions in arguments.SUPPORTED.items() for version in versions]
CONFIGS = Path(__file__).parents[2] / "configs"


def flags_of(name: str, topology: str | None = None) -> Flags:
    (found,) = printing.flags(CONFIGS / name, topology)
    return found


def test_every_node_has_its_own_rank_and_all_have_one_leader() -> None:
    decode = [launch for launch in flags_of("deepseek-r1-wideep.yaml").launches if launch.worker == "decode-0"]
    assert [launch.node_rank for launch in decode] == list(range(9))
    for launch in decode:
        words = list(launch.plan.command)
        assert words[words.index("--node-rank") + 1] == str(launch.node_rank)
        assert words[words.index("--host") + 1] == f"<node-{launch.node_rank}>"
        assert words[words.index("--dist-init-addr") + 1] == "<node-0>:<port+0>"
        assert words[words.index("--nccl-port") + 1] == "<port+8>"


def test_an_engine_that_starts_its_ranks_as_ray_actors_starts_on_its_leader_alone(tmp_path: Path) -> None:
    document = yaml.safe_load((CONFIGS / "deepseek-r1-wideep.yaml").read_text())
    document["applications"][0]["args"]["decode"]["launcher"] = "ray"
    changed = tmp_path / "ray.yaml"
    changed.write_text(yaml.safe_dump(document))
    (found,) = printing.flags(changed, None)
    assert [launch.worker for launch in found.launches] == ["prefill-0"] * 4 + ["decode-0"]
    assert "# decode-0, node 0 of 9; starts its ranks on all of them as Ray actors" in printing.text(found)


def test_on_a_topology_the_nodes_have_their_planned_addresses() -> None:
    found = flags_of("deepseek-r1-wideep.yaml", "13x8xH100")
    hosts = [launch.plan.arguments["host"] for launch in found.launches]
    assert sorted(hosts) == [f"node-{number:02d}" for number in range(13)]
    leaders = {launch.worker: launch.plan.arguments["host"] for launch in found.launches if launch.node_rank == 0}
    for launch in found.launches:
        assert launch.plan.arguments["dist_init_addr"] == f"{leaders[launch.worker]}:<port+0>"
    assert "workers are alike" not in printing.text(found)


def test_a_topology_without_room_is_refused_with_the_role() -> None:
    with pytest.raises(ConfigError, match=r"applications\[0\]\.args\.prefill: prefill-0 needs 4 nodes"):
        flags_of("deepseek-r1-wideep.yaml", "12x8xH100")
    with pytest.raises(ConfigError, match="--topology: "):
        flags_of("deepseek-r1-wideep.yaml", "13x8xH10")


def test_the_text_is_a_shells_but_for_its_placeholders() -> None:
    found = flags_of("local-dep.yaml")
    said = printing.text(found)
    for block in said.replace("<", "").replace(">", "").split("# ")[1:]:
        _, _, script = block.partition("\n")
        words = shlex.split(script.replace("\\\n", " "))
        assert "vllm" in words
        assert words[words.index("vllm") + 1] == "serve"
        assert all("=" in word for word in words[: words.index("vllm")])


def test_replicas_are_said_once_and_simulated_engines_have_no_command() -> None:
    said = printing.text(flags_of("local-sim.yaml"))
    assert "# prefill-0, node 0 of 1; 2 workers are alike" in said
    assert "simulated, in its worker's process" in said


def test_tensorrt_llm_s_settings_are_shown_beside_its_command(tmp_path: Path) -> None:
    role = {
        "nodes": 4,
        "parallelism": {"attn_dp": 16, "moe_ep": 16},
        "resources": {"cpus": 4},
        "engine_args": {
            "max_batch_size": 128,
            "cuda_graph_config": {"enable_padding": True, "batch_sizes": [1, 2, 4]},
            "moe_config": {"backend": "CUTEDSL", "load_balancer": {"num_slots": 256, "layer_updates_per_iter": 1}},
            "kv_cache_config": {"free_gpu_memory_fraction": 0.7, "dtype": "fp8"},
            "speculative_config": {"decoding_type": "MTP", "num_nextn_predict_layers": 1},
        },
    }
    args = {"backend": "trtllm", "engine_version": "1.3", "accelerator": "GB300", "prefill": role, "decode": role}
    document = yaml.safe_load((CONFIGS / "deepseek-r1-wideep.yaml").read_text())
    document["applications"][0]["args"] = {"model": {"name": "m", "path": "/m"}, **args}
    file = tmp_path / "trtllm.yaml"
    file.write_text(yaml.safe_dump(document))
    (found,) = printing.flags(file, None)
    decode = found.launches[1]
    assert decode.plan.command == ("trtllm-serve", "/m", "--extra_llm_api_options", arguments.SETTINGS_FILE)
    settings = yaml.safe_load(decode.plan.settings or "")
    assert settings["tensor_parallel_size"] == settings["moe_expert_parallel_size"] == 16
    assert settings["enable_attention_dp"] is True
    assert settings["speculative_config"] == role["engine_args"]["speculative_config"]
    assert "#   tensor_parallel_size: 16" in printing.text(found)
    document["applications"][0]["args"]["decode"] = {**role, "engine_args": {"moe_config": {"backend": "WIDEEP"}}}
    file.write_text(yaml.safe_dump(document))
    with pytest.raises(ConfigError, match=r"decode\.engine_args\.moe_config\.backend .*'WIDEEP' was removed in 1\.3"):
        next(printing.flags(file, None))


def test_json_has_the_arguments_and_the_command_of_each() -> None:
    made = printing.as_json(flags_of("local.yaml"))
    assert (made["backend"], made["version"]) == ("vllm", "0.32.0")
    assert [(node["worker"], node["node_rank"]) for node in made["nodes"]] == [("prefill-0", 0), ("decode-0", 0)]
    for node in made["nodes"]:
        assert node["arguments"]["block_size"] == 32
        assert node["command"][:2] == ["vllm", "serve"]
        assert node["environment"]["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "<port+0>"


def test_a_port_that_is_not_known_counts_like_a_number_and_reads_as_what_it_is() -> None:
    port = placeholders.place(0).ports[16] - 8
    assert f"{port + 3}" == str(port + 3) == "<port+11>"
    assert placeholders.written({"a": [port], "b": (port, 7)}) == {"a": ["<port+8>"], "b": ["<port+8>", 7]}


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize(("backend", "version"), ADAPTERS)
def test_what_an_adapter_starts_is_all_in_the_table_of_its_version(
    backend: str, version: str, on_cpu: bool, role: Role
) -> None:
    place = NodePlace("10.0.0.7", tuple(range(20_000, 20_100)))
    wide = replace(
        LaunchSpec("w", role, "m", "/m", attn_dp=2, moe_ep=2, nodes=(place,), loras={"sql": "/l"}, version=version),
        launcher=LAUNCHERS[backend][0],
    )
    for spec in (wide, replace(wide, attn_dp=1, attn_tp=2, kv_events=False, loras={})):
        launched = launch_plan(backend, version, spec, on_cpu=on_cpu, env={"MINE": "1"})
        assert arguments.mistakes(backend, version, launched.arguments, {}) == ()
        assert len(launched.command) > 3
        assert launched.environment["MINE"] == "1"


@pytest.mark.parametrize(
    ("backend", "prefill", "decode", "name"),
    [
        ("sglang", {"page_size": 64}, {"page_size": 128}, "page_size"),
        ("sglang", {"page_size": 64}, {"page_size": 64, "attention_backend": "cutlass_mla"}, "page_size"),
        ("sglang", {"page_size": 64}, {"page_size": 1, "decode_attention_backend": "flashmla"}, None),
        ("sglang", {"page_size": 32}, {"page_size": 32, "attention_backend": "trtllm_mla"}, None),
        ("sglang", {"page_size": 1, "prefill_attention_backend": "trtllm_mha"}, {"page_size": 64}, None),
        ("sglang", {"page_size": 1, "prefill_attention_backend": "flashmla"}, {"page_size": 1}, None),
        ("sglang", {"kv_cache_dtype": "auto"}, {}, None),
        ("sglang", {"kv_cache_dtype": "bf16"}, {}, "kv_cache_dtype"),
        ("vllm", {"dtype": "half"}, {"dtype": "float16"}, None),
        ("vllm", {"speculative_config": {"method": "mtp"}}, {}, "speculative_config.method"),
        ("vllm", {"attention_backend": "FLASHMLA"}, {}, "attention_backend"),
        ("trtllm", {"kv_cache_config": {"tokens_per_block": 32}}, {}, None),
        ("trtllm", {"kv_cache_config": {"tokens_per_block": 64}}, {}, "kv_cache_config.tokens_per_block"),
        ("trtllm", {}, {"cache_transceiver_config": {"backend": "UCX"}}, "cache_transceiver_config.backend"),
        ("trtllm", {}, {"speculative_config": {"decoding_type": "MTP"}}, "speculative_config.decoding_type"),
        ("simulated", {"block_size": 16}, {"block_size": 32}, None),
    ],
)
def test_what_both_sides_of_a_hand_off_must_share(
    backend: str, prefill: dict[str, object], decode: dict[str, object], name: str | None
) -> None:
    found = agreement.check(backend, LaunchPlan({}, prefill), LaunchPlan({}, decode))
    assert [each.name for each in found] == ([] if name is None else [name])
    for each in found:
        assert "here" in each.message
        assert "in prefill; write the same in both" in each.message


def test_the_environment_counts_where_it_decides_the_layout() -> None:
    one, other = LaunchPlan({"VLLM_KV_CACHE_LAYOUT": "HND"}, {}), LaunchPlan({"VLLM_KV_CACHE_LAYOUT": "NHD"}, {})
    (found,) = agreement.check("vllm", one, other)
    assert found.in_environment
    assert agreement.check("vllm", one, one) == ()
