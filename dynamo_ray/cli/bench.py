"""`dynamo-ray bench`: traffic of a stated shape to a deployment, and a table of what its clients saw."""

from __future__ import annotations

import asyncio
import json
import random
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dynamo_ray import secrets
from dynamo_ray.cli import load, state
from dynamo_ray.cli.checked import check_file, check_url
from dynamo_ray.errors import PreflightError, Problem, StartError

PROBE_CHARACTERS = 4096
"""Of the request that tells how many characters a token has here."""
WORDS = ("river", "stone", "cloud", "green", "seven", "light", "north", "glass", "paper", "sound", "field", "metal")
TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the traffic."""

    requests: int
    concurrency: int
    prompt_tokens: int
    answer_tokens: int
    shared: float
    """How much of every prompt all of them begin with, in [0, 1]."""
    seed: int


def run(target: load.Target, shape: Shape) -> load.Figures:
    """Send that traffic.

    Raises:
        StartError: The deployment does not answer the first request.
    """
    texts = prompts(shape, asyncio.run(_characters_per_token(target)))
    with Progress(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("requests", total=len(texts))
        return asyncio.run(
            load.run(
                target, texts, shape.answer_tokens, shape.concurrency, lambda done: bar.update(task, completed=done)
            )
        )


def show(figures: load.Figures, as_json: bool) -> None:
    if as_json:
        print(json.dumps({**msgspec.to_builtins(figures), "tokens_per_s": figures.tokens_per_s}))
        return
    console = Console(highlight=False)
    table = Table("", "p50", "p90", "p99", box=None)
    for name, found in (("time to first token, ms", figures.ttft_s), ("between tokens, ms", figures.itl_s)):
        if found is not None:
            table.add_row(name, *(f"{1000 * found[p]:.2f}" for p in ("p50", "p90", "p99")))
    console.print(table)
    cached = figures.cached_tokens / max(1, figures.prompt_tokens)
    console.print(
        f"{figures.ok} of {figures.requests} requests in {figures.wall_s:.1f} s: "
        f"{figures.prompt_tokens} prompt tokens ({cached:.1%} cached), {figures.answer_tokens} answer tokens, "
        f"{figures.tokens_per_s:.1f} tokens/s"
    )
    for error, count in sorted(figures.errors.items(), key=lambda item: -item[1]):
        console.print(f"{count} failed: {error}", markup=False)


def target(file: Path | None, url: str | None, model: str | None, api_key: str | None) -> load.Target:
    """Of the file's first application, where it or `url` is served.

    Raises:
        PreflightError: It is not known where, or what is served there.
        ConfigError: The file or the URL is wrong.
    """
    if file is not None:
        config = check_file(file).applications[0].config
        model = model or config.model.name
        api_key = api_key or secrets.read_first("api_keys", config.api_keys)
    url = _running(file) if url is None else check_url("--url", url)
    if model is None:
        model = _served(url, api_key)
    return load.Target(url, model, api_key)


def _running(file: Path | None) -> str:
    found = [entry for entry in state.running() if file is None or Path(entry.config).resolve() == file.resolve()]
    if len(found) == 1:
        return found[0].url
    where = "" if file is None else f" {file}"
    if not found:
        raise PreflightError((Problem("--url", f"no `dynamo-ray up`{where} runs here; say where the deployment is"),))
    urls = ", ".join(entry.url for entry in found)
    raise PreflightError((Problem("--url", f"several run here: {urls}; say which"),))


def _served(url: str, api_key: str | None) -> str:
    request = urllib.request.Request(f"{url.rstrip('/')}/v1/models", headers=secrets.bearer(api_key))
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return str(json.loads(response.read())["data"][0]["id"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise PreflightError((Problem("--url", f"{url}/v1/models does not say what is served: {error}"),)) from error


async def _characters_per_token(target: load.Target) -> float:
    figures = await load.run(target, [_text(random.Random(0), PROBE_CHARACTERS)], 1)
    if not figures.ok or not figures.prompt_tokens:
        reason = next(iter(figures.errors), "it counts no prompt tokens")
        raise StartError(f"{target.url} does not answer the first request: {reason}")
    return PROBE_CHARACTERS / figures.prompt_tokens


def prompts(shape: Shape, characters_per_token: float) -> list[str]:
    """Random words, the same for the same shape; each as long as `shape.prompt_tokens` are at that ratio."""
    characters = round(shape.prompt_tokens * characters_per_token)
    num_shared = round(characters * shape.shared)
    shared = _text(random.Random(shape.seed), num_shared)
    return [
        shared + _text(random.Random(f"{shape.seed}/{number}"), characters - num_shared)
        for number in range(shape.requests)
    ]


def _text(chance: random.Random, characters: int) -> str:
    text = " ".join(chance.choices(WORDS, k=characters // 6 + 1))
    return text[:characters]
