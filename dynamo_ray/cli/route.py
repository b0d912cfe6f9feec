"""`dynamo-ray route`: where a prompt would go now, which other ranks there are, and why not those."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from dynamo_ray import secrets
from dynamo_ray.cli import state
from dynamo_ray.errors import ConfigError, PreflightError, Problem

if TYPE_CHECKING:
    from dynamo_ray.config import DeploymentConfig
    from dynamo_ray.routing.explanation import Explanation, LegExplanation

TIMEOUT_S = 30.0
SHOWN_CANDIDATES = 16


def main(
    file: Annotated[Path, typer.Argument(help="The `serve run` file of what runs.", show_default=False)],
    prompt: Annotated[
        Path,
        typer.Option(
            help="A file: text, token ids as a JSON list, messages as a JSON list, or the JSON body of a request.",
            show_default=False,
        ),
    ],
    url: Annotated[str | None, typer.Option(help="Of the application; without it, the `up` of this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Ask a running deployment where a prompt would go, and why; nothing is generated, nothing is counted."""
    from dynamo_ray.cli.checked import check_file, check_url

    if url is not None:
        check_url("--url", url)
    checked = check_file(file)
    applications, roots = checked.applications, checked.urls(_root(file, checked.host, checked.port))
    if len(applications) > 1 and url is not None:
        names = ", ".join(application.name for application in applications)
        raise ConfigError((Problem("--url", f"this file has several applications, {names}; leave it out"),))
    for application, root in zip(applications, roots, strict=True):
        body = body_of(prompt, application.config.model.name)
        found = ask(url or root, body, application.config)
        if as_json:
            typer.echo(msgspec.json.encode(found).decode())
        else:
            _show(found)


def body_of(file: Path, model: str) -> dict[str, Any]:
    """The request that a prompt's file stands for.

    Raises:
        ConfigError: It is not there, or is JSON of no kind that a request takes.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError((Problem("--prompt", f"{file} cannot be read: {error}"),)) from error
    given: Any
    try:
        given = json.loads(text)
    except ValueError:
        given = text
    match given:
        case {"messages": _} | {"prompt": _}:
            return {"model": model, **given}
        case [{"role": _}, *_]:
            return {"model": model, "messages": given}
        case [int(), *_]:
            return {"model": model, "prompt": given}
        case dict() | list():
            message = f"{file} is JSON, but no list of token ids or messages, and has no `messages` or `prompt`"
            raise ConfigError((Problem("--prompt", message),))
    return {"model": model, "prompt": text}


def ask(url: str, body: dict[str, Any], config: DeploymentConfig) -> Explanation:
    """Raises PreflightError where nothing answers as it should, ConfigError where it finds the request wrong."""
    from dynamo_ray.routing.explanation import Explanation

    key = secrets.read_first("api_keys", config.api_keys)
    headers = {"Content-Type": "application/json", **secrets.bearer(key)}
    request = urllib.request.Request(f"{url.rstrip('/')}/v1/route", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return msgspec.json.decode(response.read(), type=Explanation)
    except urllib.error.HTTPError as error:
        with error:
            said = _said(error.read()) or f"{error.code} {error.reason}"
        kind = ConfigError if error.code in (400, 413) else PreflightError
        raise kind((Problem("--prompt" if kind is ConfigError else "--url", f"{url} says: {said}"),)) from error
    except (OSError, ValueError) as error:
        raise PreflightError((Problem("--url", f"no deployment answers at {url}: {error}"),)) from error


def _said(body: bytes) -> str | None:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return None


def _root(file: Path, host: str, port: int) -> str:
    """Of the `up` of this user that serves the file, else where the file says it is."""
    for entry in state.running():
        if Path(entry.config).resolve() == file.resolve():
            port = entry.port
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _show(found: Explanation) -> None:
    console = Console(highlight=False)
    for role, leg in (("prefill", found.prefill), ("decode" if found.prefill else "prefill and decode", found.decode)):
        if leg is not None:
            said = f"{role}, policy {found.policy}, {leg.prompt_tokens} prompt tokens: {leg.why}"
            console.print(said, soft_wrap=True)
            console.print(_table(leg))
    console.print(f"expected: the first token after {found.predicted_ttft_s:.3g} s")


def _table(leg: LegExplanation) -> Table:
    shown = leg.candidates[:SHOWN_CANDIDATES]
    terms = [*dict.fromkeys(term for candidate in shown for term in candidate.terms)]
    caption = f"and {len(leg.candidates) - len(shown)} more" if len(leg.candidates) > len(shown) else None
    made = Table(box=None, caption=caption, caption_justify="left")
    made.add_column("", no_wrap=True)
    made.add_column("worker", no_wrap=True)
    spoken = [term.replace("_", " ") for term in terms]
    for name in ("rank", "cost", *spoken, "overlap blocks", "queued tokens", "requests", "KV tokens"):
        made.add_column(name, justify="right")
    for candidate in shown:
        costs = [candidate.cost, *(candidate.terms.get(term) for term in terms)]
        counts = (candidate.overlap_blocks, candidate.queued_tokens, candidate.num_requests, candidate.kv_tokens)
        made.add_row(
            "->" if candidate.chosen else "",
            candidate.worker,
            str(candidate.dp_rank),
            *("-" if cost is None else f"{cost:g}" for cost in costs),
            *map(str, counts),
        )
    return made
