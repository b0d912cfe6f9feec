"""Mistakes in a file: all at once, each with its field, its line and what to write."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from backends.engine import Role
from dynamo_ray import config_file, load_config
from dynamo_ray.config import DeploymentConfig, PrefillOnDecodeConfig
from dynamo_ray.errors import ConfigError, Problem

GOOD = """\
applications:
  - name: a
    import_path: dynamo_ray.app:build
    args:
      model: {name: m, path: /m}
      backend: simulated
      aggregated: &role
        replicas: 2
"""


def problems(tmp_path: Path, text: str) -> list[Problem]:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return list(config_file.applications(config_file.read(file))[1])


def test_a_good_file_has_no_problems_and_one_application(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(GOOD)
    found, wrong = config_file.applications(config_file.read(file))
    assert wrong == ()
    assert [(application.name, application.config.backend) for application in found] == [("a", "simulated")]


def test_from_python_a_file_is_loaded_as_the_configuration_of_one_application(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(GOOD)
    assert load_config(str(file)) == load_config(file, "a")
    (tmp_path / "none.yaml").write_text("applications: []")
    with pytest.raises(
        ConfigError, match=r"applications: none in .*none\.yaml has `import_path: dynamo_ray\.app:build`"
    ):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"name one of those in .*: a$"):
        load_config(file, "b")
    _, application = GOOD.split("\n", 1)
    file.write_text(GOOD + application.replace("&role", "").replace("name: a", "name: b"))
    assert load_config(file, "b").backend == "simulated"
    with pytest.raises(ConfigError, match=r"name one of those in .*: a, b$"):
        load_config(file)
    file.write_text(GOOD.replace("replicas: 2", "replicas: 0"))
    with pytest.raises(ConfigError, match=r"aggregated.replicas \(line 8\)"):
        load_config(file)


@pytest.mark.parametrize(
    ("before", "after", "field", "line", "message"),
    [
        ("replicas: 2", "replcas: 2", "applications[0].args.aggregated.replcas", 8, "did you mean `replicas`?"),
        ("replicas: 2", "replicas: 0", "applications[0].args.aggregated.replicas", 8, "it is 0"),
        ("simulated", "vlm", "applications[0].args.backend", 6, "'simulated', 'vllm', 'sglang' or 'trtllm'"),
        ("name: m, ", "", "applications[0].args.model.name", 5, "missing"),
        (
            "replicas: 2",
            "engine_args: {block_sise: 1}",
            "applications[0].args.aggregated.engine_args.block_sise",
            8,
            "block_size",
        ),
        (
            "replicas: 2",
            "replicas: 2\n      router: {policy: blokcs}",
            "applications[0].args.router.policy",
            9,
            "known: ",
        ),
        ("replicas: 2", "replicas: 2\n        replicas: 3", "applications[0].args.aggregated.replicas", 9, "twice"),
        (
            "replicas: 2",
            "parallelism: {attn_dp: 3, moe_ep: 2}",
            "applications[0].args.aggregated.parallelism",
            8,
            "does not divide",
        ),
        ("backend:", "kv-events: zmq\n      backend:", "applications[0].args.kv-events", 6, "did you mean `events`?"),
        (
            "backend:",
            "limits: {max-retries: 3}\n      backend:",
            "applications[0].args.limits.max-retries",
            6,
            "did you mean `max_retries`?",
        ),
        ("path: /m", "path: /m, loras: {m: /x}", "applications[0].args.model", 5, "loras.m: the model itself"),
        (
            "replicas: 2",
            "resources: {memory_gib: .inf}",
            "applications[0].args.aggregated.resources.memory_gib",
            8,
            "finite",
        ),
    ],
)
def test_each_mistake_has_its_field_its_line_and_the_fix(
    tmp_path: Path, before: str, after: str, field: str, line: int, message: str
) -> None:
    assert before in GOOD
    (problem,) = problems(tmp_path, GOOD.replace(before, after))
    assert (problem.field, problem.line) == (field, line)
    assert message in problem.message


def test_all_mistakes_come_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("simulated", "vlm").replace("replicas", "replcas").replace("path: /m", "pth: /m")
    assert {problem.line for problem in problems(tmp_path, text)} == {5, 6, 8}


def test_what_we_own_of_an_engine_may_not_be_set(tmp_path: Path) -> None:
    text = GOOD.replace("simulated", "vllm").replace("replicas: 2", "engine_args: {tensor_parallel_size: 2}")
    (problem,) = problems(tmp_path, text)
    assert problem.field.endswith("engine_args.tensor_parallel_size")
    assert "parallelism.attn_tp" in problem.message


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ("simulated", "aggregated.launcher: simulated starts by processes; leave it out"),
        ("vllm", "aggregated.launcher: vllm starts by processes; leave it out"),
        ("sglang", None),
        ("trtllm", None),
    ],
)
def test_ranks_start_as_ray_actors_only_where_the_engine_can(backend: str, said: str | None) -> None:
    given = {"model": {"name": "m", "path": "/m"}, "backend": backend, "aggregated": {"launcher": "ray"}}
    if said is None:
        assert DeploymentConfig.model_validate(given).launcher(Role.AGGREGATED) == "ray"
    else:
        with pytest.raises(ValidationError, match=re.escape(said)):
            DeploymentConfig.model_validate(given)


def test_prompts_are_computed_on_decode_workers_only_where_the_engine_can() -> None:
    router = {"prefill_on_decode": {"max_uncached_tokens": 256}}
    given = {"model": {"name": "m", "path": "/m"}, "router": router}
    split: dict[str, object] = {"prefill": {}, "decode": {}}
    for backend in ("simulated", "vllm"):
        DeploymentConfig.model_validate({**given, **split, "backend": backend})
    for backend in ("sglang", "trtllm"):
        with pytest.raises(ValidationError, match=r"router\.prefill_on_decode: .* computes no prompt"):
            DeploymentConfig.model_validate({**given, **split, "backend": backend})
    with pytest.raises(
        ValidationError, match=r"router\.prefill_on_decode: an `aggregated` worker computes every prompt"
    ):
        DeploymentConfig.model_validate({**given, "aggregated": {}, "backend": "vllm"})


def test_without_a_prefill_worker_decode_workers_compute_as_much_as_else_or_more() -> None:
    for gone, limit in ((None, 256), (256, 256), (4096, 4096)):
        given = {"max_uncached_tokens": 256, "max_uncached_tokens_without_prefill": gone}
        made = PrefillOnDecodeConfig.model_validate(given)
        assert (made.limit(prefill_lives=True), made.limit(prefill_lives=False)) == (256, limit)
    with pytest.raises(ValidationError, match=r"max_uncached_tokens_without_prefill: 255 is less .* give 256 or more"):
        PrefillOnDecodeConfig(max_uncached_tokens=256, max_uncached_tokens_without_prefill=255)


def test_tensorrt_llm_s_ray_actors_need_a_cpu_each() -> None:
    role = {"parallelism": {"attn_dp": 8, "moe_ep": 8}, "nodes": 2, "resources": {"cpus": 3}}
    given = {"model": {"name": "m", "path": "/m"}, "aggregated": role}
    with pytest.raises(ValidationError, match=r"aggregated\.resources\.cpus: .* a node has 4; at least 4"):
        DeploymentConfig.model_validate({**given, "backend": "trtllm"})
    role["resources"] = {"cpus": 4}
    DeploymentConfig.model_validate({**given, "backend": "trtllm"})


def test_how_ranks_start_follows_from_the_engine_where_it_is_not_said() -> None:
    decode = {"launcher": "processes"}
    given = {"model": {"name": "m", "path": "/m"}, "prefill": {}, "decode": decode}
    assert DeploymentConfig.model_validate({**given, "backend": "sglang"}).launcher(Role.PREFILL) == "processes"
    with pytest.raises(ValidationError, match=r"decode\.launcher: trtllm starts by ray; leave it out"):
        DeploymentConfig.model_validate({**given, "backend": "trtllm"})
    decode.clear()
    assert DeploymentConfig.model_validate({**given, "backend": "trtllm"}).launcher(Role.DECODE) == "ray"


def test_args_that_are_no_mapping_are_said(tmp_path: Path) -> None:
    text = "applications:\n  - {name: a, import_path: 'dynamo_ray.app:build'}\n"
    (problem,) = problems(tmp_path, text)
    assert (problem.field, problem.line) == ("applications[0].args", 2)


@pytest.mark.parametrize(
    "text",
    [
        "a: [1",
        "\t- x",
        "a: *nowhere",
        "? [x]\n: {}",
        "a: 2024-02-30",
        "a: !!int x",
        "a: !!bool x",
        "a: !!timestamp x",
        "a: &x [*x]",
        "a: " + "[" * 2000,
    ],
)
def test_what_is_no_yaml_is_one_clear_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        config_file.read(file)


def test_a_file_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read"):
        config_file.read(tmp_path / "nothing.yaml")


def test_anchors_and_merge_keys_count_as_written_out(tmp_path: Path) -> None:
    text = GOOD + "        resources: &r {cpus: 0.5}\n      limits: {max_retries: 1}\nx: {<<: {a: 1}, b: 2}\n"
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert config_file.read(file).value["x"] == {"a": 1, "b": 2}
