"""The recipes: every file of configs/ as its catalog.yaml describes it, checked and planned. Reads files, no more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from backends.engine import Role
from dynamo_ray import config_file
from dynamo_ray.cluster import layout
from dynamo_ray.cluster.assumptions import Assumptions
from dynamo_ray.cluster.layout import Layout
from dynamo_ray.config import DeploymentConfig, RoleConfig
from dynamo_ray.config_file import Document
from dynamo_ray.errors import ConfigError, Problem
from placement import cluster_file

FOLDER = Path(__file__).parents[1] / "configs"
"""In a checkout. A wheel holds no recipes: say where they are."""
CATALOG = "catalog.yaml"
TWO_CORES = cluster_file.from_document({"nodes": [{"name": "this-machine", "gpus": 0, "type": "cpu", "cpus": 2}]})
"""Where a recipe without a cluster fits."""
BEGIN, END = "<!-- recipes: written by `make recipes` -->\n", "<!-- /recipes -->\n"
COLUMNS = ("recipe", "model", "engine", "workers x GPUs", "cluster", "routing", "plan: shards, KV tokens a GPU", "ran")
SHORT = {Role.PREFILL: "P", Role.DECODE: "D", Role.AGGREGATED: ""}
ENGINES = {"vllm": "vLLM", "sglang": "SGLang", "trtllm": "TensorRT-LLM", "simulated": "simulated"}

Tokens = Annotated[int, msgspec.Meta(ge=1)]
Text = Annotated[str, msgspec.Meta(min_length=1)]


class Traffic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A typical request, in tokens."""

    prompt_tokens: Tokens
    answer_tokens: Tokens


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file, as the catalog has it."""

    file: Text
    title: Text
    size: Literal["small", "medium", "large"]
    traffic: Traffic
    source: Text
    """Where its flags and sizes are from."""
    cluster: Text | None = None
    """As `dynamo-ray plan --topology` takes it; None: two CPU cores."""
    ran: tuple[Text, ...] = ()
    """Where it served; empty: nowhere yet."""


@dataclass(frozen=True, slots=True)
class Recipe:
    path: Path
    about: Entry
    config: DeploymentConfig
    """Of its only application."""

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def num_gpus(self) -> int:
        """0 on CPU."""
        on_gpus = self.about.cluster is not None
        return sum(role.replicas * role.parallelism.num_ranks for role in self.config.roles.values()) if on_gpus else 0

    def plan(self) -> Layout:
        """On its cluster, for its traffic.

        Raises:
            ConfigError: It does not fit there; fields begin with the file's name.
        """
        traffic = self.about.traffic
        given = Assumptions(prompt_tokens=traffic.prompt_tokens, answer_tokens=traffic.answer_tokens)
        try:
            return layout.plan(self.config, self.about.cluster or TWO_CORES, given)
        except ConfigError as error:
            raise ConfigError(tuple(_in_file(self.about.file, problem) for problem in error.problems)) from error


def read(folder: Path = FOLDER) -> tuple[Recipe, ...]:
    """Every recipe of a folder, in the catalog's order, each file checked as `dynamo-ray validate` does but for Serve.

    Raises:
        ConfigError: There is no catalog, an entry of it is wrong, a file is wrong, missing, or in no entry; carries
            all of it.
    """
    document = config_file.read(folder / CATALOG)
    entries, problems = _entries(document)
    names = [entry.file for entry in entries]
    for file in sorted({path.name for path in folder.glob("*.yaml")} - {CATALOG, *names}):
        problems.append(Problem(file, f"is in no entry of {CATALOG}; add one, or move the file"))
    recipes: list[Recipe] = []
    for entry in entries:
        try:
            recipes.append(Recipe(folder / entry.file, entry, _config(folder / entry.file)))
        except ConfigError as error:
            problems += [_in_file(entry.file, problem) for problem in error.problems]
    if problems:
        raise ConfigError(tuple(problems))
    return tuple(recipes)


def _entries(document: Document) -> tuple[list[Entry], list[Problem]]:
    value = document.value
    listed = value.get("recipes") if isinstance(value, dict) else None
    if not isinstance(listed, list) or set(value) != {"recipes"}:
        return [], [Problem(CATALOG, "must be a mapping with one key, `recipes`, a list of entries")]
    found: list[Entry] = []
    problems = [document.problem(path, "given twice; keep one") for path in document.duplicates]
    for index, raw in enumerate(listed):
        try:
            entry = msgspec.convert(raw, Entry)
        except msgspec.ValidationError as error:
            problems.append(document.problem(("recipes", index), str(error)))
            continue
        if entry.file in {other.file for other in found}:
            problems.append(document.problem(("recipes", index, "file"), f"{entry.file} is listed twice; keep one"))
        found.append(entry)
    return found, problems


def _config(path: Path) -> DeploymentConfig:
    applications, problems = config_file.applications(config_file.read(path))
    if not problems and len(applications) != 1:
        problems = (Problem("applications", f"a recipe is one application of ours; here are {len(applications)}"),)
    if problems:
        raise ConfigError(problems)
    return applications[0].config


def _in_file(file: str, problem: Problem) -> Problem:
    return Problem(f"{file}: {problem.field}", problem.message, problem.line)


def row(recipe: Recipe) -> tuple[str, ...]:
    """What the table says of it, by COLUMNS. Raises ConfigError as `Recipe.plan`."""
    config, made = recipe.config, recipe.plan()
    return (
        recipe.name,
        config.model.name,
        " ".join(part for part in (ENGINES[config.backend], config.engine_version) if part),
        _workers(recipe),
        _cluster(recipe, made),
        config.router.policy,
        headline(made),
        "; ".join(recipe.about.ran) or "not yet",
    )


def headline(made: Layout) -> str:
    """How each role's worker is cut, and the KV tokens that one of its GPUs holds; roles that are alike once."""
    said = {name: f"{found.label}, {found.kv_tokens:,}" for name, found in made.fits.items()}
    if len(set(said.values())) <= 1:
        return next(iter(said.values()), "")
    return "; ".join(f"{SHORT[Role(name)]} {text}" for name, text in said.items())


def _workers(recipe: Recipe) -> str:
    def count(role: RoleConfig) -> str:
        each = "" if recipe.about.cluster is None else f"x{role.parallelism.num_ranks}"
        return f"{role.replicas}{each}"

    return ", ".join(f"{SHORT[name]} {count(role)}".strip() for name, role in recipe.config.roles.items())


def _cluster(recipe: Recipe, made: Layout) -> str:
    if recipe.about.cluster is None:
        return "2 cores"
    nodes = {bundle.node_id for worker in made.plan.workers for bundle in worker.bundles}
    return f"{recipe.num_gpus} {recipe.config.accelerator}, {len(nodes)} node{'s' if len(nodes) > 1 else ''}"


def as_json(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    """For programs: the catalog's entries, and what follows from the files and their plans."""
    return [
        {
            **msgspec.to_builtins(recipe.about),
            "name": recipe.name,
            "path": str(recipe.path),
            "model": recipe.config.model.name,
            "backend": recipe.config.backend,
            "engine_version": recipe.config.engine_version,
            "accelerator": recipe.config.accelerator,
            "num_gpus": recipe.num_gpus,
            "policy": recipe.config.router.policy,
            "plan": layout.as_json(recipe.plan()),
        }
        for recipe in recipes
    ]


def markdown(recipes: Sequence[Recipe]) -> str:
    """A table for each size; names link to their files from the repository's root."""
    return "\n".join(_tables(recipes))


def _tables(recipes: Sequence[Recipe]) -> Iterator[str]:
    for size in dict.fromkeys(recipe.about.size for recipe in recipes):
        yield f"**{size.capitalize()}**\n"
        yield f"| {' | '.join(COLUMNS)} |"
        yield "|---" * len(COLUMNS) + "|"
        for recipe in recipes:
            if recipe.about.size == size:
                name, *rest = row(recipe)
                yield f"| {' | '.join([f'[{name}](configs/{recipe.about.file})', *rest])} |"
        yield ""


def inserted(text: str, table: str) -> str:
    """The text with the table in place of what stands between its two markers.

    Raises:
        ConfigError: It has not both markers, once and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ConfigError((Problem("--into", f"the file must have the lines {BEGIN.strip()} and {END.strip()} once"),))
    return f"{before}{BEGIN}\n{table}\n{END}{after}"
