"""A cluster that is not there yet, as a Topology: from a shorthand such as 13x8xH100, or from a YAML file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from math import inf
from pathlib import Path
from typing import Any

import yaml

from placement.gpus import GIB, gpu_type
from placement.topology import NO_ACCELERATOR, UNLIMITED_BYTES, Node, Resources, Topology, TopologyError

SHORTHAND = re.compile(r"(?P<nodes>\d+)x(?P<gpus>\d+)x(?P<type>[A-Za-z0-9]+)(@nvl(?P<domain>\d+))?(/(?P<leaf>\d+))?")
EXAMPLES = "13x8xH100, 16x8xH200/4 (4 nodes a leaf), 18x4xGB200@nvl72, or several joined by +"

ENOUGH = Resources(cpus=inf, memory_bytes=UNLIMITED_BYTES)
"""What a host has where its description does not say: then only its GPUs can be short."""

KEYS = ("name", "count", "gpus", "type", "leaf", "domain", "used_gpus", "drained", "cpus", "memory_gib")


@dataclass(frozen=True, slots=True)
class _Kind:
    """Nodes that are alike."""

    path: str
    name: str
    count: int
    gpus: int
    accelerator: str
    leaf: str = ""
    domain: str = ""
    used_gpus: int = 0
    drained: bool = False
    host: Resources = ENOUGH

    def nodes(self) -> Iterator[Node]:
        total = Resources(self.host.cpus, self.gpus, self.host.memory_bytes)
        free = Resources(total.cpus, self.gpus - self.used_gpus, total.memory_bytes)
        for index in range(self.count):
            name = self.name if self.count == 1 else f"{self.name}-{index:0{len(str(self.count - 1))}}"
            yield Node(
                name, name, free, total, self.accelerator, domain=self.domain, leaf=self.leaf, drained=self.drained
            )


def read_topology(text: str) -> Topology:
    """A shorthand, or else the path of a YAML file.

    Raises:
        TopologyError: It is neither, or describes what cannot be; every problem with its path.
    """
    if all(SHORTHAND.fullmatch(part) for part in text.split("+")):
        return from_shorthand(text)
    path = Path(text)
    if not path.is_file():
        raise TopologyError((f"{text!r}: there is no such file, and it is no shorthand like {EXAMPLES}",))
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise TopologyError((f"{text}: cannot be read as YAML: {' '.join(str(error).split())}",)) from error
    return from_document(document)


def from_shorthand(text: str) -> Topology:
    """`NODESxGPUSxTYPE`, then `@nvlGPUS` for NVLink domains of that many GPUs, then `/NODES` for leaves of that many
    nodes; several joined by `+`. Nodes are named by their place: node-00, node-01, ...

    Raises:
        TopologyError: A part is wrong; names it.
    """
    problems: list[str] = []
    nodes: list[Node] = []
    for index, part in enumerate(text.split("+")):
        found = SHORTHAND.fullmatch(part)
        if found is None:
            problems.append(f"topology[{index}]: {part!r} is not like {EXAMPLES}")
            continue
        given = {key: int(value) for key, value in found.groupdict().items() if value is not None and key != "type"}
        problems += _shorthand_problems(f"topology[{index}]", given, found["type"])
        if not problems:
            prefix = "node" if "+" not in text else f"node{index}"
            nodes += _numbered(prefix, given, found["type"])
    if problems:
        raise TopologyError(tuple(problems))
    return Topology(tuple(nodes))


def _shorthand_problems(path: str, given: Mapping[str, int], accelerator: str) -> Iterator[str]:
    yield from (f"{path}.{key}: must be at least 1" for key, value in given.items() if value < 1)
    yield from _gpu_problem(path, accelerator)
    domain, gpus = given.get("domain"), given["gpus"]
    if domain is not None and gpus and domain % gpus:
        yield f"{path}.domain: {domain} GPUs are no whole number of nodes of {gpus}"


def _numbered(prefix: str, given: Mapping[str, int], accelerator: str) -> Iterator[Node]:
    count, gpus = given["nodes"], given["gpus"]
    width = max(2, len(str(count - 1)))
    nodes_per_domain = given["domain"] // gpus if "domain" in given else 0
    for index in range(count):
        yield from _Kind(
            prefix,
            f"{prefix}-{index:0{width}}",
            1,
            gpus,
            accelerator,
            leaf=f"{prefix}-leaf-{index // given['leaf']}" if "leaf" in given else "",
            domain=f"{prefix}-nvl-{index // nodes_per_domain}" if nodes_per_domain else "",
        ).nodes()


def from_document(document: Any) -> Topology:
    """`nodes:` is a list; each entry is one node with a `name`, or `count` of them alike.

    Its other keys: `gpus`, `type`, and where they matter `leaf`, `domain` (NVLink), `used_gpus`, `drained`, `cpus`,
    `memory_gib`.

    Raises:
        TopologyError: Unknown keys or GPUs, impossible numbers, names given twice, a leaf for some nodes only.
    """
    listed = document.get("nodes") if isinstance(document, Mapping) else None
    if not isinstance(listed, list) or not listed:
        raise TopologyError(("nodes: missing; a topology is a list of nodes, each {name, gpus, type, ...}",))
    problems: list[str] = []
    if isinstance(document, Mapping):
        problems += [f"{key}: unknown key; there is only `nodes`" for key in document if key != "nodes"]
    kinds: list[_Kind] = []
    for index, entry in enumerate(listed):
        found = list(_entry_problems(f"nodes[{index}]", entry))
        problems += found
        if not found:
            kinds.append(_kind(f"nodes[{index}]", index, entry))
    problems += _together(kinds)
    if problems:
        raise TopologyError(tuple(problems))
    return Topology(tuple(node for kind in kinds for node in kind.nodes()))


def _entry_problems(path: str, entry: Any) -> Iterator[str]:
    if not isinstance(entry, Mapping):
        yield f"{path}: is not a mapping; write {{name: n0, gpus: 8, type: H100}}"
        return
    for key in entry:
        if key not in KEYS:
            near = get_close_matches(str(key), KEYS, n=1)
            yield f"{path}.{key}: unknown key; " + (
                f"did you mean `{near[0]}`?" if near else f"known: {', '.join(KEYS)}"
            )
    yield from (f"{path}.{key}: missing" for key in ("gpus", "type") if key not in entry)
    for key, least in (("count", 1), ("gpus", 0), ("used_gpus", 0), ("cpus", 0), ("memory_gib", 0)):
        value = entry.get(key, least)
        whole = key in ("count", "gpus", "used_gpus")
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or value < least:
            yield f"{path}.{key}: must be a {'whole ' if whole else ''}number of at least {least}; it is {value!r}"
        elif key == "used_gpus" and isinstance(entry.get("gpus"), int) and value > entry["gpus"]:
            yield f"{path}.used_gpus: {value} of {entry['gpus']} GPUs"
    for key in ("name", "type", "leaf", "domain"):
        if not isinstance(entry.get(key, "x"), str | int) or entry.get(key, "x") == "":
            yield f"{path}.{key}: must be a name; it is {entry[key]!r}"
    if not isinstance(entry.get("drained", False), bool):
        yield f"{path}.drained: must be true or false; it is {entry['drained']!r}"
    if isinstance(entry.get("type"), str) and entry["type"] != NO_ACCELERATOR:
        yield from _gpu_problem(path, entry["type"])


def _gpu_problem(path: str, name: str) -> Iterator[str]:
    try:
        gpu_type(name)
    except ValueError as error:
        yield f"{path}.type: {error}"


def _kind(path: str, index: int, entry: Mapping[str, Any]) -> _Kind:
    host = Resources(
        cpus=float(entry.get("cpus", ENOUGH.cpus)),
        memory_bytes=int(entry["memory_gib"] * GIB) if "memory_gib" in entry else ENOUGH.memory_bytes,
    )
    return _Kind(
        path,
        str(entry.get("name", f"node{index}")),
        entry.get("count", 1),
        entry["gpus"],
        str(entry["type"]),
        str(entry.get("leaf", "")),
        str(entry.get("domain", "")),
        entry.get("used_gpus", 0),
        entry.get("drained", False),
        host,
    )


def _together(kinds: list[_Kind]) -> Iterator[str]:
    """What is wrong only beside the other nodes."""
    names = Counter(node.node_id for kind in kinds for node in kind.nodes())
    yield from (f"nodes: the name {name!r} is given {count} times" for name, count in names.items() if count > 1)
    if any(kind.leaf for kind in kinds):
        yield from (f"{kind.path}.leaf: missing, and other nodes have one" for kind in kinds if not kind.leaf)
