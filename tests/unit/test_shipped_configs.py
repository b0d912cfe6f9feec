"""Every file under configs/: valid, its flags known to its engine's version, prefill and decode of one mind."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import backends
from backends.engine import Role
from dynamo_ray.cli import flags as printing
from dynamo_ray.cli.checked import check_file
from dynamo_ray.cluster.launches import disagreements, first_launches
from dynamo_ray.errors import ConfigError
from dynamo_ray.recipes import CATALOG, FOLDER

CONFIGS = [path for path in sorted(FOLDER.glob("*.yaml")) if path.name != CATALOG]
WIDEEP = next(path for path in CONFIGS if path.name == "deepseek-r1-wideep.yaml")
LOCAL = next(path for path in CONFIGS if path.name == "local.yaml")
checked = cache(check_file)
shipped = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)


def problems(tmp_path: Path, path: Path, **changes: Any) -> list[str]:
    """What is said of a shipped file, with dotted keys under `args` set otherwise."""
    document = yaml.safe_load(path.read_text())
    for dotted, value in changes.items():
        *outer, last = dotted.split("__")
        inner = document["applications"][0]["args"]
        for key in outer:
            inner = inner[key]
        inner[last] = value
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(document))
    try:
        check_file(changed)
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


@shipped
def test_its_flags_are_all_in_the_table_of_its_engines_version(path: Path) -> None:
    for application in checked(path).applications:
        config = application.config
        version = backends.resolve_version(config.backend, config.engine_version)
        assert config.backend == "simulated" or config.engine_version == version, "a file says what it was written for"
        for role in config.roles.values():
            assert backends.mistakes(config.backend, version, role.engine_args) == ()


@shipped
def test_its_prefill_and_decode_agree(path: Path) -> None:
    for application in checked(path).applications:
        leaders = {role: first_launches(application.config, role)[0] for role in application.config.roles}
        assert disagreements(application.config, leaders) == ()


@shipped
def test_its_command_lines_render_for_every_node(path: Path) -> None:
    for found in printing.flags(path, None):
        roles = found.config.roles
        nodes = {name: 1 if found.config.launcher(name) == "ray" else role.nodes for name, role in roles.items()}
        assert len(found.launches) == sum(nodes.values())
        said = printing.text(found)
        for launch in found.launches:
            assert f"# {launch.worker}, node {launch.node_rank} of {launch.num_nodes}" in said
        assert len(json.dumps(printing.as_json(found))) > 100


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decode__engine_args__mem_fraction": 0.8}, "decode.engine_args.mem_fraction (line"),
        ({"decode__engine_args__cuda_graph_max_bs": 256}, "calls it 'cuda_graph_max_bs_decode'"),
        ({"prefill__engine_args__tp_size": 32}, "use parallelism.attn_tp"),
        ({"prefill__engine_args__deepep_mode": "norml"}, "did you mean 'normal'?"),
        ({"prefill__engine_args__page_size": 32}, "decode.engine_args.page_size (line"),
        ({"decode__engine_args__kv_cache_dtype": "fp8_e4m3"}, "'fp8_e4m3' here, 'auto' in prefill; write the same"),
        ({"decode__env__SGLANG_DSV4_KV_LAYOUT": "v41"}, "decode.env.SGLANG_DSV4_KV_LAYOUT (line"),
        ({"decode__env__SGLANG_HOST_IP": "10.0.0.1"}, "is given its own; leave it out"),
        ({"engine_version": "0.5.17"}, "engine_version (line"),
        ({"prefill__launcher": "ray"}, "prefill.launcher: "),
        ({"decode__parallelism": {"attn_dp": 72, "moe_ep": 36, "pp": 2}}, "decode.nodes (line"),
    ],
)
def test_a_mistake_in_it_is_told_with_its_line_before_anything_starts(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    (problem,) = problems(tmp_path, WIDEEP, **changes)
    assert said in problem


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine_version": "0.31.0"}, "vLLM 0.31.0 is not supported; use 0.32.0 or 0.33.0"),
        ({"decode__engine_args": {"block_size": 16}}, "decode.engine_args.block_size (line"),
        ({"prefill__launcher": "ray"}, "prefill.launcher: vllm starts by processes; leave it out"),
        ({"backend": "simulated", "prefill__engine_args": {}, "decode__engine_args": {}}, "has no versions; leave it"),
    ],
)
def test_the_same_for_vllm(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert any(said in problem for problem in problems(tmp_path, LOCAL, **changes))


def test_the_wide_file_keeps_the_published_widths_and_limits() -> None:
    (application,) = check_file(WIDEEP).applications
    prefill, decode = (first_launches(application.config, role)[0] for role in (Role.PREFILL, Role.DECODE))
    assert (prefill.num_nodes, decode.num_nodes) == (4, 9)
    for launch, width, requests in ((prefill, 32, 8192), (decode, 72, 18432)):
        args = launch.plan.arguments
        assert args["tp_size"] == args["dp_size"] == args["ep_size"] == width
        assert args["max_running_requests"] == requests == width * 256
        assert args["ep_num_redundant_experts"] == 32
    tokens_a_step = decode.plan.environment["SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"]
    assert decode.plan.arguments["cuda_graph_bs_decode"] == [int(tokens_a_step)]
