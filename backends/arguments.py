"""What every engine's arguments are called and may hold, version by version; imports no engine.

The tables in arguments/ were read from the engines' own sources (each says which); a row is an argument:

* `type`: alternatives, such as `int|null` or `list[str]`; a name is a nested configuration, or one of `variants`
* `choices`, where it takes no others; `gone`: former choices, and why
* `flag`: its option, where that is not its name with dashes; null: it has none
* `off`: the option that switches it off; true: `--no-` and its name
* `json`: a list that is one option's JSON, not several words; `pairs`: a mapping that is a word `name=value` an entry
* `aliases`: other spellings of the option
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from backends.engine import EngineStartError

SUPPORTED: dict[str, tuple[str, ...]] = {
    "vllm": ("0.32.0", "0.33.0"),
    "sglang": ("0.5.16", "0.5.23"),
    "trtllm": ("1.2", "1.3"),
}
"""Versions with a table, oldest first. A row stands for its patches too: 1.2 for 1.2.1, 0.5.16 for 0.5.16.post1."""

ENGINES = {"vllm": "vLLM", "sglang": "SGLang", "trtllm": "TensorRT-LLM"}
TABLES = Path(__file__).with_suffix("")
SETTINGS_FILE = "<engine.yaml>"
"""Stands in TensorRT-LLM's command line for the file that `settings_file` makes."""
MAX_SHOWN = 60
"""Characters of a value in a message."""

Key = tuple[str | int, ...]
"""Where a value is, below `engine_args`."""


class Argument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    choices: tuple[Any, ...] = ()
    gone: dict[str, str] = {}
    flag: str | UnsetType | None = UNSET
    off: str | bool = False
    json: bool = False
    pairs: bool = False
    aliases: tuple[str, ...] = ()


class Variants(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nested configurations told apart by one of their own keys."""

    by: str
    of: dict[str, str]


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The arguments of one version of one engine."""

    source: str
    fields: dict[str, Argument]
    nested: dict[str, dict[str, Argument]] = {}
    variants: dict[str, Variants] = {}
    renamed: dict[str, str] = {}
    removed: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Mistake:
    key: Key
    message: str

    def __str__(self) -> str:
        return f"engine_args.{dotted(self.key)}: {self.message}"


def resolve(backend: str, asked: str | None) -> str:
    """The version whose table holds for the one a configuration asks for; the newest if it asks for none.

    Raises:
        EngineStartError: It is not supported; names those that are.
    """
    if asked is None:
        return SUPPORTED[backend][-1]
    found = _supported(backend, asked)
    if found is None:
        raise EngineStartError(
            f"engine_version: {ENGINES[backend]} {asked} is not supported; use {' or '.join(SUPPORTED[backend])}"
        )
    return found


def check_installed(backend: str, asked: str | None, installed: str) -> str:
    """The version whose table holds for what is installed.

    Raises:
        EngineStartError: That is not supported, or not what the configuration asks for.
    """
    engine = ENGINES[backend]
    if asked is not None:
        resolve(backend, asked)
        if not _is_of(installed, asked):
            raise EngineStartError(
                f"engine_version: {engine} {installed} is installed here, {asked} is asked for; install that, or "
                "set engine_version to what is installed"
            )
    found = _supported(backend, installed)
    if found is None:
        raise EngineStartError(
            f"engine_version: {engine} {installed} is installed here and not supported; install "
            f"{' or '.join(SUPPORTED[backend])}"
        )
    return found


def check(backend: str, version: str, engine_args: Mapping[str, Any], owned: Mapping[str, str]) -> None:
    """Refuse an argument that is unknown to that version, not the user's to set, or cannot hold that value.

    Raises:
        EngineStartError: The first mistake; it starts with `engine_args.<key>: ` and says what to write.
    """
    for mistake in mistakes(backend, version, engine_args, owned):
        raise EngineStartError(str(mistake))


def mistakes(
    backend: str, version: str, engine_args: Mapping[str, Any], owned: Mapping[str, str]
) -> tuple[Mistake, ...]:
    """Everything that is wrong with the user's arguments for a version that `resolve` returned.

    Args:
        owned: arguments that follow from the rest of the configuration, and what to set instead; dots go into
            nested configurations.
    """
    return tuple(_Check(backend, version, owned).fields(table(backend, version).fields, engine_args, ()))


def command_line(backend: str, version: str, args: Mapping[str, Any]) -> list[str]:
    """The command that starts the engine's own server with these arguments.

    TensorRT-LLM takes them in a file, which stands there as SETTINGS_FILE; `settings_file` makes it.

    Raises:
        EngineStartError: An argument has no option, or not for that value; names it.
    """
    given = dict(args)
    if backend == "trtllm":
        return ["trtllm-serve", str(given.pop("model")), "--extra_llm_api_options", SETTINGS_FILE]
    if backend == "vllm":
        start = ["vllm", "serve", str(given.pop("model"))]
    elif version == "0.5.16":
        start = ["python", "-m", "sglang.launch_server"]
    else:
        start = ["sglang", "serve"]
    known = table(backend, version).fields
    return start + [word for name, value in given.items() for word in _option(name, known[name], value)]


def settings_file(args: Mapping[str, Any]) -> str:
    """The YAML that TensorRT-LLM's server reads: every argument but the model."""
    import yaml

    given = {name: value for name, value in args.items() if name != "model"}
    return yaml.safe_dump(given, sort_keys=False, default_flow_style=False)


@cache
def table(backend: str, version: str) -> Table:
    """The table of a version that `resolve` returned."""
    return msgspec.json.decode((TABLES / f"{backend}-{version}.json").read_bytes(), type=Table)


def dotted(key: Key) -> str:
    """moe_config.load_balancer, lora_paths[0]."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


class _Check:
    """One engine's arguments, against one table."""

    def __init__(self, backend: str, version: str, owned: Mapping[str, str]) -> None:
        self._backend = backend
        self._version = version
        self._owned = owned
        self._table = table(backend, version)

    def fields(self, known: Mapping[str, Argument], given: Mapping[Any, Any], at: Key) -> Iterator[Mistake]:
        for name, value in given.items():
            key = (*at, str(name))
            refusal = self._not_settable(key)
            if refusal is not None:
                yield Mistake(key, refusal)
            elif name not in known:
                yield Mistake(key, self._unknown(str(name), known, at))
            else:
                yield from self._value(known[name], value, key)

    def _not_settable(self, key: Key) -> str | None:
        name = dotted(key)
        if name in self._owned:
            return f"follows from the configuration; use {self._owned[name]}"
        if name in self._table.renamed:
            new = self._table.renamed[name]
            return f"{self._engine} calls it {new!r}{self._instead(new)}"
        if name in self._table.removed:
            return f"not in {self._engine}: {self._table.removed[name]}"
        return None

    @property
    def _engine(self) -> str:
        return f"{ENGINES[self._backend]} {self._version}"

    def _instead(self, name: str) -> str:
        return f", and it follows from the configuration; use {self._owned[name]}" if name in self._owned else ""

    def _unknown(self, name: str, known: Mapping[str, Argument], at: Key) -> str:
        problem = f"unknown to {self._engine}"
        spelt = {alias: field for field, argument in known.items() for alias in (field, *argument.aliases)}
        plain = name.lstrip("-").replace("-", "_")
        if plain in spelt:
            return f"{problem}; it is called {spelt[plain]!r}{self._instead(spelt[plain])}"
        others = [v for v in SUPPORTED[self._backend] if v != self._version]
        having = [v for v in others if not at and name in table(self._backend, v).fields]
        if having:
            return f"{problem}; {' and '.join(having)} has it"
        near = get_close_matches(plain, spelt, n=1)
        return f"{problem}; did you mean {spelt[near[0]]!r}?" if near else problem

    def _value(self, argument: Argument, value: Any, key: Key) -> Iterator[Mistake]:
        kinds = alternatives(argument.type)
        if isinstance(value, Mapping):
            for kind in kinds:
                if kind in self._table.nested or kind in self._table.variants:
                    yield from self._nested(kind, value, key)
                    return
        if not any(_fits(kind, value) for kind in kinds):
            place, kinds, value = _misfit(kinds, value, key)
            yield Mistake(place, f"must be {' or '.join(map(self._said, kinds))}; it is {_shown(value)}")
            return
        for place, item in _scalars(value, key):
            wrong = _choice(argument, item)
            if wrong:
                yield Mistake(place, wrong)

    def _nested(self, kind: str, value: Mapping[Any, Any], key: Key) -> Iterator[Mistake]:
        variants = self._table.variants.get(kind)
        if variants is None:
            yield from self.fields(self._table.nested[kind], value, key)
            return
        which = value.get(variants.by)
        if which not in variants.of:
            yield Mistake((*key, variants.by), f"must be one of {', '.join(variants.of)}; it is {_shown(which)}")
            return
        inner = variants.of[which]
        if inner in self._table.nested:
            yield from self.fields(self._table.nested[inner], value, key)

    def _said(self, kind: str) -> str:
        nested = kind in self._table.nested or kind in self._table.variants
        return "a mapping" if nested else _SAID.get(kind, "a list" if kind.startswith("list[") else kind)


_SAID = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
    "dict": "a mapping",
    "null": "null",
    "any": "anything",
}


def alternatives(type_: str) -> list[str]:
    """The bars outside brackets part them: `list[int|str]|null` has two."""
    return re.findall(r"(?:[^|\[]|\[[^\]]*\])+", type_)


def _fits(kind: str, value: Any) -> bool:
    if kind == "any":
        return True
    if kind.startswith("list["):
        inner = alternatives(kind[5:-1])
        items = isinstance(value, Sequence) and not isinstance(value, str)
        return items and all(any(_fits(one, item) for one in inner) for item in value)
    if isinstance(value, bool):
        return kind == "bool"
    types: dict[str, type | tuple[type, ...]] = {
        "null": type(None),
        "int": int,
        "float": (int, float),
        "str": str,
        "dict": Mapping,
    }
    return kind in types and isinstance(value, types[kind])


def _misfit(kinds: list[str], value: Any, key: Key) -> tuple[Key, list[str], Any]:
    """The value, or the first item of it, that is of none of the kinds; and where it is."""
    lists = [kind for kind in kinds if kind.startswith("list[")]
    if len(lists) == 1 and isinstance(value, Sequence) and not isinstance(value, str):
        inner = alternatives(lists[0][5:-1])
        for index, item in enumerate(value):
            if not any(_fits(one, item) for one in inner):
                return _misfit(inner, item, (*key, index))
    return key, kinds, value


def _scalars(value: Any, key: Key) -> Iterator[tuple[Key, Any]]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        for index, item in enumerate(value):
            yield from _scalars(item, (*key, index))
    elif not isinstance(value, Mapping):
        yield key, value


def _choice(argument: Argument, value: Any) -> str | None:
    """Why the value is none to choose; choices bind only values of a type that they have."""
    alike = [choice for choice in argument.choices if type(choice) is type(value)]
    if not alike or value in alike:
        return None
    if value in argument.gone:
        return f"{value!r} was {argument.gone[value]}"
    near = get_close_matches(str(value), map(str, alike), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{_shown(value)} is none of {', '.join(map(str, alike))}{hint}"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "a list"
    if isinstance(value, bool | None):
        return json.dumps(value)
    return repr(value) if len(repr(value)) <= MAX_SHOWN else f"{repr(value)[:MAX_SHOWN]}..."


def _supported(backend: str, version: str) -> str | None:
    return next((known for known in SUPPORTED[backend] if _is_of(version, known)), None)


def _is_of(version: str, line: str) -> bool:
    """1.2.1 and 1.2rc3 are of 1.2, and 0.32.0+cpu of 0.32.0; 1.20 is not of 1.2."""
    mine, its = _release(version), _release(line)
    return bool(its) and mine[: len(its)] == its


def _release(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()


def _option(name: str, argument: Argument, value: Any) -> list[str]:
    """The words that set one argument; none where leaving it out says the same."""
    flag = f"--{name.replace('_', '-')}" if argument.flag is UNSET else argument.flag
    kinds = alternatives(argument.type)
    if value is None or (value is False and "bool" in kinds and not argument.off):
        return []
    if flag is None:
        raise EngineStartError(f"engine_args.{name}: has no option on the command line")
    if value is True and "bool" in kinds:
        return [flag]
    if value is False and "bool" in kinds:
        return [argument.off if isinstance(argument.off, str) else f"--no-{flag.removeprefix('--')}"]
    if isinstance(value, Mapping) and argument.pairs:
        return [flag, *(f"{key}={item}" for key, item in value.items())]
    if isinstance(value, Mapping) or argument.json:
        return [flag, json.dumps(value)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [flag, *(json.dumps(item) if isinstance(item, Mapping) else str(item) for item in value)]
    return [flag, str(value)]
