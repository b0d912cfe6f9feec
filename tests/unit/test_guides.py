"""The guides: each command is one that the program takes, what needs no cluster runs, and quotes are its own words."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
import ray.scripts.scripts as ray
import ray.serve.scripts as serve
import typer
import yaml
from guides import PROGRAMS, ROOT, Block, Command, anchors, blocks, commands, links, messages, prose, spans
from typer.testing import CliRunner

import dynamo_ray
from dynamo_ray.cli.commands import app
from dynamo_ray.errors import StartupError
from dynamo_ray.kubernetes.clouds import FABRICS
from dynamo_ray.routing import policies
from dynamo_ray.simulator.workloads import WORKLOADS

GUIDES = sorted((ROOT / "docs/guides").glob("*.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *GUIDES]
TROUBLE = ROOT / "docs/guides/troubleshooting.md"
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
ELSEWHERE = ("kubectl", "helm", "az", "eksctl", "aws", "gcloud", "docker", "ray", "sbatch", "srun", "pip")
NEEDS_NOTHING = ("validate", "plan", "flags", "recipes", "manifest", "simulate")
"""Commands that start nothing and ask nobody; unless they are given an address."""
PLACEHOLDER = re.compile(r"^[A-Z]+$|\.\.\.")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
every_guide = pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
group = typer.main.get_group(app)
CLIS: dict[str, Any] = {"dynamo-ray": group, "ray": ray.cli, "serve": serve.cli}


def check(command: Command) -> None:
    """Raises for a command, an option, a value or a number of arguments that there is not."""
    if command.program == "make":
        assert command.arguments[0] in TARGETS, command
    elif command.arguments != ("--help",):
        program = CLIS[command.program]
        context = (typer.Context if program is group else click.Context)(program)
        name, found, rest = program.resolve_command(context, list(command.arguments))
        while isinstance(found, click.Group):
            context = click.Context(found, parent=context)
            name, found, rest = found.resolve_command(context, rest)
        assert found is not None
        if rest != ["--help"]:
            found.make_context(name, list(rest), parent=context)


def of_blocks(page: Path) -> list[Command]:
    shell = (block for block in blocks(page) if block.language in ("sh", "bash"))
    return [found for block in shell for line in block.lines() for found in commands(line)]


def in_text(page: Path) -> Iterator[Command]:
    for span in spans(prose(page)):
        if re.match(rf"({'|'.join(PROGRAMS)}) [a-z]", span):
            yield from commands(span)


@every_page
def test_each_command_is_one_that_its_program_takes(page: Path) -> None:
    for command in of_blocks(page):
        check(command)
        for word in command.arguments:
            assert not word.startswith("configs/") or (ROOT / word).exists(), f"{command}: there is no {word}"
    for command in in_text(page):
        if len(command.arguments) > 1 or command.program == "make":
            check(command)
        else:
            assert command.arguments[0] in CLIS[command.program].commands, command  # named, not given


@every_guide
def test_what_needs_no_cluster_runs_and_prints_what_the_page_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, make in WORKLOADS.items():
        monkeypatch.setitem(WORKLOADS, name, partial(make, 3))  # the whole of one takes half a minute
    printed: set[str] = set()
    for block in blocks(page):
        if block.language == "text":
            lines = {squeezed(line) for line in block.text.splitlines()} - {"", "..."}
            assert lines <= printed, f"{page.name} shows what no command on it prints: {sorted(lines - printed)}"
        elif block.language == "sh":
            for line in block.lines():
                printed |= {squeezed(said) for found in commands(line) if runs(found) for said in run(found)}
    assert printed, "every guide shows something that runs"
    for made in tmp_path.glob("*/*.yaml"):
        for command in started_by(made):
            check(command)


def runs(command: Command) -> bool:
    arguments = command.arguments
    return (
        command.program == "dynamo-ray"
        and command.own
        and (arguments[0] in NEEDS_NOTHING or "--help" in arguments)
        and "--address" not in arguments
        and not any(PLACEHOLDER.search(word) for word in arguments)
    )


def run(command: Command) -> list[str]:
    """What it prints, by line, once it has ended as the page says."""
    result = CliRunner().invoke(app, list(command.arguments))
    code, said = result.exit_code, result.output
    if isinstance(result.exception, StartupError):  # as `main` does with it
        code, said = result.exception.exit_code, f"{said}{result.exception}"
    assert code == command.exit_code, f"{command} exits with {code}: {said}{result.exception!r}"
    return said.splitlines()


def squeezed(line: str) -> str:
    return " ".join(line.split())


def started_by(manifest: Path) -> Iterator[Command]:
    """What of ours the containers in it start."""
    for document in yaml.safe_load_all(manifest.read_text()):
        for container in containers(document):
            words = container.get("command", [])
            if words[:1] == ["dynamo-ray"]:
                yield Command("dynamo-ray", tuple(words[1:]))
            elif words[:1] == ["sh"]:
                yield from (found for line in Block("sh", words[-1]).lines() for found in commands(line))


def containers(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield from (one for key in ("containers", "initContainers") for one in value.get(key) or ())
        for inner in value.values():
            yield from containers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from containers(inner)


def test_machines_of_the_cloud_pages_are_those_of_the_manifests() -> None:
    for page, cloud in (("eks", "eks-efa"), ("gke", "gke-roce")):
        text = (ROOT / f"docs/guides/{page}.md").read_text()
        rows = re.findall(r"^\| `[^|]*` \| \d ([A-Z]+\d+) \| (\d|yes)", text, re.MULTILINE)
        machines = FABRICS[cloud].machines
        assert {gpu for gpu, _ in rows} == set(machines)
        assert all(said in ("yes", str(machines[gpu].devices_per_gpu)) for gpu, said in rows)


@every_page
def test_links_lead_to_what_is_there(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@every_guide
def test_shell_is_well_formed_and_what_is_not_run_is_said_at_the_top(page: Path) -> None:
    shell = "\n".join(block.text for block in blocks(page) if block.language in ("sh", "bash"))
    done = subprocess.run(["bash", "-n"], input=shell, text=True, capture_output=True, timeout=10)
    assert done.returncode == 0, done.stderr
    if any(re.search(rf"^\s*{word} ", shell, re.MULTILINE) for word in ELSEWHERE):
        assert "**Not run here**" in " ".join(page.read_text().splitlines()[:10])


@every_page
def test_python_on_a_page_takes_from_dynamo_ray_what_there_is(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            taken = [node for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.ImportFrom)]
            named = {name.name for node in taken if node.module == "dynamo_ray" for name in node.names}
            assert named <= set(dynamo_ray.__all__), f"{page.name}: {named - set(dynamo_ray.__all__)}"


def test_the_policy_that_the_routing_page_writes_runs_in_the_simulator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written, used = [block.text for block in blocks(ROOT / "docs/routing.md") if block.language == "python"]
    (tmp_path / "my_policies.py").write_text(written)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "trace.jsonl").write_text(
        '{"timestamp": 0, "input_length": 600, "output_length": 2, "hash_ids": [1, 2]}'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(policies, "_REGISTERED", {})
    exec(used, {})
    hit_share, ttft_s, goodput_per_s = map(float, capsys.readouterr().out.split())
    assert hit_share == 0.0
    assert ttft_s > 0.0
    assert goodput_per_s > 0.0


def test_every_guide_is_listed_in_the_readme() -> None:
    listed = links(ROOT / "README.md")
    assert not [page.name for page in GUIDES if f"docs/guides/{page.name}" not in listed]


def test_symptoms_are_the_program_s_own_words() -> None:
    rows = re.findall(r"^\| (.*?) \|", prose(TROUBLE), re.MULTILINE)
    quoted = [span for row in rows for span in spans(row)]
    assert len(quoted) > 40
    known = "\n".join(messages())
    assert not [quote for quote in quoted if quote not in known]
