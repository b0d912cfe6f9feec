"""What a page of the documentation holds: commands, what they are said to print, links, and the program's own words."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("dynamo-ray", "make", "ray", "serve")
PACKAGES = ("dynamo_ray", "placement", "backends")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(`+) ?(.+?) ?\1")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_EXITS = re.compile(r"#.*\bexits with (\d+)")
_FIELD = re.compile(r"\{[^{}]*\}|%(?:\.\d+)?[sdrgf]")


@dataclass(frozen=True, slots=True)
class Block:
    language: str
    text: str

    def lines(self) -> list[str]:
        """Whole commands: continued lines are joined."""
        return [line.strip() for line in re.sub(r"\\\n\s*", " ", self.text).splitlines() if line.strip()]


@dataclass(frozen=True, slots=True)
class Command:
    program: str
    arguments: tuple[str, ...]
    own: bool = True
    """Not what another program is told to start somewhere else."""
    exit_code: int = 0

    def __str__(self) -> str:
        return shlex.join((self.program, *self.arguments))


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in _FENCE.findall(page.read_text())]


def prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text())


def spans(text: str) -> list[str]:
    return [found[1] for found in _SPAN.findall(text.replace("\n", " "))]


def links(page: Path) -> list[str]:
    return [link for link in _LINK.findall(prose(page)) if "://" not in link]


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def commands(line: str, programs: tuple[str, ...] = PROGRAMS) -> Iterator[Command]:
    """Those of these programs in a line of shell: on their own, in a pipe, or behind another's `--`."""
    exits = _EXITS.search(line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|&;()"):
            parts.append([])
        else:
            parts[-1].append(word)
    for words in parts:
        kept = words[: words.index(">")] if ">" in words else words
        at = kept.index("--") + 1 if "--" in kept else 0
        while at < len(kept) and "=" in kept[at]:
            at += 1
        if at < len(kept) and kept[at] in programs:
            own, code = "--" not in kept, int(exits[1]) if exits else 0
            yield Command(kept[at], tuple(kept[at + 1 :]), own, code)


@cache
def messages() -> tuple[str, ...]:
    """Every text in the program's source that is no docstring; `...` for what is filled in when it is printed."""
    return tuple(text for package in PACKAGES for file in (ROOT / package).rglob("*.py") for text in _texts(file))


def _texts(file: Path) -> Iterator[str]:
    tree = ast.parse(file.read_text())
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield _template(_FIELD.sub("...", _FIELD.sub("...", node.value)))
        elif isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
            yield _template("".join(map(str, parts)))


def _template(text: str) -> str:
    return re.sub(r"(\.\.\.)+", "...", text)
