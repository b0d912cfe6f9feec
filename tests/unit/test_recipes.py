"""The catalog: every file of configs/ is in it, planned on its cluster for its traffic, and shown in the README."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from backends.engine import Role
from dynamo_ray import recipes
from dynamo_ray.cli import recipes as listing
from dynamo_ray.cluster.layout import SHAPES, read_shape
from dynamo_ray.errors import ConfigError
from dynamo_ray.recipes import Recipe
from placement.memory import parameters
from placement.parallelism import Parallelism

ROOT = Path(__file__).parents[2]
ALL = recipes.read()
every = pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)
on_gpus = pytest.mark.parametrize("recipe", [one for one in ALL if one.num_gpus], ids=lambda recipe: recipe.name)
MAX_LENGTH = {"vllm": "max_model_len", "sglang": "context_length", "trtllm": "max_seq_len"}

AT_ONCE = {"vllm": "max_num_seqs", "sglang": "max_running_requests", "trtllm": "max_batch_size"}
"""SGLang's is of the whole worker, the others' of a rank; vLLM's nodes take requests of their own."""


def scalars(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [pair for key, inner in value.items() for pair in scalars(inner, str(key))]
    return [(name, value)]


@every
def test_it_fits_its_cluster_and_leaves_no_node_of_it_idle(recipe: Recipe) -> None:
    made = recipe.plan()
    used = {bundle.node_id for worker in made.plan.workers for bundle in worker.bundles}
    assert used == {node.node_id for node in made.topology.nodes}
    assert set(made.fits) == ({role.value for role in recipe.config.roles} if recipe.num_gpus else set())


@on_gpus
def test_a_typical_request_is_within_its_engines_limits(recipe: Recipe) -> None:
    traffic = recipe.about.traffic
    for name, role in recipe.config.roles.items():
        answer = 0 if name is Role.PREFILL else traffic.answer_tokens
        length = role.engine_args.get(MAX_LENGTH[recipe.config.backend])
        assert length is None or length >= traffic.prompt_tokens + answer
        buffer = role.engine_args.get("cache_transceiver_config", {}).get("max_tokens_in_buffer")
        assert buffer is None or buffer >= traffic.prompt_tokens


@on_gpus
def test_the_ingress_lets_an_engine_run_as_many_requests_as_it_can(recipe: Recipe) -> None:
    config = recipe.config
    for name, role in config.roles.items():
        at_once = role.engine_args.get(AT_ONCE[config.backend])
        if at_once is None or name is Role.PREFILL:
            continue
        ranks, nodes = role.parallelism.attn_dp, role.nodes if config.backend == "vllm" else 1
        a_rank = at_once / ranks if config.backend == "sglang" else at_once
        assert config.router.queue is not None
        at_once_here = config.limits.queued_requests(ranks // nodes)
        assert (config.router.queue.busy_requests or at_once_here) >= a_rank
        assert at_once_here >= a_rank * ranks / nodes


@every
def test_it_names_its_routing_policy_and_its_engines_version(recipe: Recipe) -> None:
    args = yaml.safe_load(recipe.path.read_text())["applications"][0]["args"]
    assert args["router"]["policy"] == recipe.config.router.policy
    assert recipe.config.backend == "simulated" or args["engine_version"]


@every
def test_it_switches_no_failure_detection_off(recipe: Recipe) -> None:
    for role in recipe.config.roles.values():
        for name, value in scalars({**role.env, **role.engine_args}):
            if re.search(r"timeout|watchdog|max_failure", name.lower()):
                assert float(value) <= 3600, name


@on_gpus
def test_its_head_says_how_to_plan_it_where_it_is_from_and_whether_it_was_run(recipe: Recipe) -> None:
    lines = recipe.path.read_text().splitlines()
    assert lines[0] == f"# dynamo-ray plan configs/{recipe.about.file} --topology {recipe.about.cluster}"
    head = "\n".join(line for line in lines if line.startswith("#"))
    assert f"dynamo-ray up configs/{recipe.about.file}" in head
    assert recipe.about.ran or "Not run" in head
    for repository in re.findall(r"[\w-]+/[\w-]+(?=[@, ])", recipe.about.source):
        assert repository in head


@every
def test_what_it_says_of_being_run_names_a_test_that_is_there(recipe: Recipe) -> None:
    for said in recipe.about.ran:
        assert (ROOT / said.rpartition(" ")[2]).is_file(), said


def test_every_size_has_every_engine() -> None:
    for size in ("small", "medium", "large"):
        engines = {recipe.config.backend for recipe in ALL if recipe.about.size == size}
        assert {"vllm", "trtllm"} <= engines
        assert "sglang" in engines or size == "medium"


def test_the_readme_holds_the_table() -> None:
    readme = (ROOT / "README.md").read_text()
    assert recipes.inserted(readme, recipes.markdown(ALL)) == readme, "run `make recipes`"


def test_a_catalog_that_does_not_match_its_folder_is_told_all_of_it(tmp_path: Path) -> None:
    good = next(recipe for recipe in ALL if recipe.name == "local-sim")
    text = good.path.read_text()
    (tmp_path / "good.yaml").write_text(text)
    (tmp_path / "orphan.yaml").write_text(text)
    (tmp_path / "wrong.yaml").write_text(text.replace("policy: latency", "policy: guess"))
    entry = {"title": "t", "size": "small", "traffic": {"prompt_tokens": 1, "answer_tokens": 1}, "source": "s"}
    entries = [{"file": file, **entry} for file in ("good.yaml", "wrong.yaml", "missing.yaml", "good.yaml")]
    entries += [{"file": "sized.yaml", **entry, "size": "huge"}, {"file": "keyed.yaml", **entry, "run": []}]
    (tmp_path / recipes.CATALOG).write_text(yaml.safe_dump({"recipes": entries}))
    with pytest.raises(ConfigError) as caught:
        recipes.read(tmp_path)
    said = "\n".join(str(problem) for problem in caught.value.problems)
    for expected in (
        "orphan.yaml: is in no entry of catalog.yaml",
        "missing.yaml: ",
        "wrong.yaml: applications[0].args.router.policy (line",
        "good.yaml is listed twice",
        "Invalid enum value 'huge' - at `$.size`",
        "unknown field `run`",
    ):
        assert expected in said
    assert len(caught.value.problems) == 6


@pytest.mark.parametrize("text", ["", "- a", "recipes: []\nmore: 1", "recipes: {}"])
def test_a_catalog_that_is_no_list_of_entries_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / recipes.CATALOG).write_text(text)
    with pytest.raises(ConfigError, match="a mapping with one key"):
        recipes.read(tmp_path)


def test_a_recipe_too_large_for_its_cluster_is_refused_with_its_file(tmp_path: Path) -> None:
    wide = next(recipe for recipe in ALL if recipe.name == "deepseek-r1-wideep")
    (tmp_path / wide.about.file).write_text(wide.path.read_text())
    entry = yaml.safe_load((recipes.FOLDER / recipes.CATALOG).read_text())["recipes"]
    entry = next(one for one in entry if one["file"] == wide.about.file) | {"cluster": "12x8xH100"}
    (tmp_path / recipes.CATALOG).write_text(yaml.safe_dump({"recipes": [entry]}))
    (small,) = recipes.read(tmp_path)
    with pytest.raises(ConfigError, match=r"deepseek-r1-wideep\.yaml: "):
        small.plan()


def test_the_listing_is_a_table_json_or_written_between_markers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listing.show(None, as_json=True, markdown=False, into=None)
    listed = json.loads(capsys.readouterr().out)
    wide = next(entry for entry in listed if entry["name"] == "deepseek-r1-wideep")
    assert (wide["num_gpus"], wide["backend"], wide["policy"]) == (104, "sglang", "latency")
    listing.show(None, as_json=False, markdown=False, into=None)
    assert "deepseek-r1-wideep" in capsys.readouterr().out
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{recipes.BEGIN}old\n{recipes.END}after\n")
    listing.show(None, as_json=False, markdown=False, into=readme)
    assert readme.read_text() == f"before\n{recipes.BEGIN}\n{recipes.markdown(ALL)}\n{recipes.END}after\n"
    readme.write_text("no markers")
    with pytest.raises(ConfigError, match="must have the lines"):
        listing.show(None, as_json=False, markdown=False, into=readme)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("Qwen3-8B", 8.19e9),
        ("Qwen3-32B", 32.76e9),
        ("Llama-3.3-70B-Instruct-FP8-dynamic", 70.55e9),
        ("Qwen3-235B-A22B-FP8", 235.1e9),
        ("gpt-oss-120b", 116.8e9),
        ("DeepSeek-R1-FP4", 671.03e9),
        ("GLM-5-NVFP4", 744e9),
        ("Kimi-K2-Instruct", 1026e9),
    ],
)
def test_a_shape_we_ship_has_the_published_number_of_parameters(name: str, published: float) -> None:
    shape = read_shape(SHAPES / f"{name}.json")
    assert parameters(shape, Parallelism()).total == pytest.approx(published, rel=0.02)
