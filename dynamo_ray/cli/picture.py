"""What a plan looks like, as values: every GPU and who has it, in lines and sections, each worker with its colour."""

from __future__ import annotations

import colorsys
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import groupby

from placement.plan import WorkerPlacement
from placement.topology import NO_ACCELERATOR, Node, Topology

MAX_NODES = 64
"""Above so many nodes, a line is a run of like nodes."""
MAX_LINES = 128
"""Runs that are drawn one by one; the rest is counted."""
MAX_KEYS = 24
"""Workers of a role that the legend names; the rest is counted."""


class Use(StrEnum):
    """What a GPU is for."""

    RANK = "rank"
    FREE = "free"
    SPARE = "spare"
    DRAINED = "drained"
    HELD = "held by others"


@dataclass(frozen=True, slots=True)
class Slot:
    """One GPU, or one rank on CPU cores."""

    use: Use
    worker: str = ""
    role: str = ""
    rank: int = -1
    """-1 where no rank of the plan runs."""


@dataclass(frozen=True, slots=True)
class NodePicture:
    label: str
    accelerator: str
    gpus: tuple[Slot, ...]
    """Ranks in the order of the plan's workers, then what has no work, then what others hold."""
    cpu_ranks: tuple[Slot, ...] = ()
    """Ranks that compute on cores and take no GPU."""


@dataclass(frozen=True, slots=True)
class Block:
    """Nodes that share a leaf and an NVLink domain, as far as there are any."""

    leaf: str
    domain: str
    nodes: tuple[NodePicture, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    title: str
    blocks: tuple[Block, ...]
    workers: tuple[tuple[str, str], ...]
    """(worker, role), in the plan's order."""


def draw(
    topology: Topology,
    workers: Sequence[WorkerPlacement],
    roles: Mapping[str, str],
    spares: Iterable[str] = (),
    title: str = "Placement",
) -> Picture:
    """Every GPU of the cluster and every rank of the plan, each exactly once.

    Args:
        topology: as the plan was made from it; what is not free there belongs to others.
        roles: by worker group: `prefill`, `decode` or `aggregated`.
        spares: ids of nodes that are kept free.

    Raises:
        ValueError: The plan is not of this topology (a node that it lacks, more ranks than free GPUs), or a group has
            no role that can be drawn.
    """
    for group in {worker.group for worker in workers}:
        if roles.get(group) not in _HUES:
            raise ValueError(f"{group}: its role must be one of {', '.join(_HUES)}; it is {roles.get(group)!r}")
    gpu_ranks: dict[str, list[Slot]] = defaultdict(list)
    cpu_ranks: dict[str, list[Slot]] = defaultdict(list)
    for worker in workers:
        for bundle in worker.bundles:
            ranks = gpu_ranks if bundle.resources.gpus else cpu_ranks
            ranks[bundle.node_id] += (Slot(Use.RANK, worker.worker, roles[worker.group], rank) for rank in bundle.ranks)
    kept = frozenset(spares)
    unknown = (gpu_ranks.keys() | cpu_ranks.keys() | kept) - {node.node_id for node in topology.nodes}
    if unknown:
        raise ValueError(f"not in the topology: {', '.join(sorted(unknown))}")
    labels = _labels(topology.nodes)
    nodes = {
        node.node_id: NodePicture(
            labels[node.node_id],
            node.accelerator,
            _slots(node, gpu_ranks[node.node_id], node.node_id in kept),
            tuple(cpu_ranks[node.node_id]),
        )
        for node in topology.nodes
    }
    return Picture(
        _printable(title), _blocks(topology.nodes, nodes), tuple((w.worker, roles[w.group]) for w in workers)
    )


def _printable(text: str) -> str:
    """Control characters can be in no XML, not even escaped, and would act on a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _labels(nodes: Sequence[Node]) -> dict[str, str]:
    """Addresses, as people know them; nodes that share one also show the start of their id."""
    times = Counter(node.address for node in nodes)
    return {
        node.node_id: _printable(node.address if times[node.address] == 1 else f"{node.address}/{node.node_id[:8]}")
        for node in nodes
    }


def _slots(node: Node, ranks: Sequence[Slot], spare: bool) -> tuple[Slot, ...]:
    idle = node.free.gpus - len(ranks)
    if idle < 0:
        raise ValueError(f"{node.node_id}: {len(ranks)} ranks on {node.free.gpus} free GPUs")
    use = Use.DRAINED if node.drained else Use.SPARE if spare else Use.FREE
    return (*ranks, *[Slot(use)] * idle, *[Slot(Use.HELD)] * (node.total.gpus - node.free.gpus))


def _blocks(nodes: Sequence[Node], pictures: Mapping[str, NodePicture]) -> tuple[Block, ...]:
    size = Counter(node.domain for node in nodes)
    members: dict[tuple[str, str], list[NodePicture]] = defaultdict(list)
    for node in nodes:
        # A domain of one node says no more than the node's own line.
        members[node.leaf, node.domain if size[node.domain] > 1 else ""].append(pictures[node.node_id])
    return tuple(
        Block(_printable(leaf), _printable(domain), tuple(inside)) for (leaf, domain), inside in members.items()
    )


# What is drawn, whatever draws it: sections of lines of cells.


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    slot: Slot
    """How it is painted; its rank does not matter."""


@dataclass(frozen=True, slots=True)
class Line:
    label: str
    gpus: tuple[Cell, ...]
    cpu_ranks: tuple[Cell, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    lines: tuple[Line, ...]
    is_legend: bool = False


@dataclass(frozen=True, slots=True)
class Sheet:
    title: str
    summary: str
    remarks: tuple[str, ...]
    """What a line is and what was left out; empty where each node is drawn."""
    sections: tuple[Section, ...]
    legend: tuple[Section, ...]


def sheet_of(picture: Picture) -> Sheet:
    nodes = [node for block in picture.blocks for node in block.nodes]
    legend = tuple(_legend(picture, nodes))
    if len(nodes) <= MAX_NODES:
        sections = tuple(Section(_title(block), tuple(map(_node_line, block.nodes))) for block in picture.blocks)
        return Sheet(picture.title, _summary(nodes), (), sections, legend)
    sections, rest = _collapsed(picture.blocks)
    remarks = [f"Above {MAX_NODES} nodes, a line is a run of like nodes, and a number counts GPUs or ranks on cores."]
    remarks += [f"Not drawn: {_summary(rest)}."] if rest else []
    return Sheet(picture.title, _summary(nodes), tuple(remarks), sections, legend)


def _collapsed(blocks: Sequence[Block]) -> tuple[tuple[Section, ...], list[NodePicture]]:
    """Runs of like nodes that have work or are spares, and the nodes outside of those."""
    sections: list[Section] = []
    rest: list[NodePicture] = []
    num_lines = 0
    for block in blocks:
        lines: list[Line] = []
        for _, like in groupby(block.nodes, key=_profile):
            run = list(like)
            ours = any(slot.use in (Use.RANK, Use.SPARE) for slot in _all_slots(run))
            if not ours or num_lines == MAX_LINES:
                rest += run
                continue
            name = run[0].label if len(run) == 1 else f"{run[0].label} .. {run[-1].label} ({len(run)})"
            lines.append(_run_line(name, run))
            num_lines += 1
        if lines:
            sections.append(Section(_title(block), tuple(lines)))
    return tuple(sections), rest


def _profile(node: NodePicture) -> tuple[Slot, ...]:
    """Equal for nodes that differ in nothing but their ranks' numbers."""
    return tuple(replace(slot, rank=-1) for slot in node.gpus + node.cpu_ranks)


def _run_line(label: str, run: Sequence[NodePicture]) -> Line:
    gpus = Counter(replace(slot, rank=-1) for node in run for slot in node.gpus)
    cpu_ranks = Counter(replace(slot, rank=-1) for node in run for slot in node.cpu_ranks)
    notes = [_names(slot.worker for slot in gpus | cpu_ranks)]
    notes += [f"{count:,} {slot.use}" for slot, count in gpus.items() if slot.use != Use.RANK]
    return Line(
        label,
        tuple(Cell(f"{count:,}", slot) for slot, count in gpus.items()),
        tuple(Cell(f"{count:,}", slot) for slot, count in cpu_ranks.items()),
        ", ".join(filter(None, notes)),
    )


def _node_line(node: NodePicture) -> Line:
    gpus = tuple(Cell(str(slot.rank) if slot.use == Use.RANK else "", slot) for slot in node.gpus)
    cpu_ranks = tuple(Cell(str(slot.rank), slot) for slot in node.cpu_ranks)
    uses = {slot.use for slot in node.gpus}
    notes = [_names(slot.worker for slot in node.gpus + node.cpu_ranks)]
    notes += [use.value for use in (Use.SPARE, Use.DRAINED) if use in uses]
    return Line(node.label, gpus, cpu_ranks, ", ".join(filter(None, notes)))


def _names(workers: Iterable[str]) -> str:
    """Each name once; those that count up are joined: decode-0..3."""
    runs: list[tuple[str, int, int]] = []
    parts: list[str] = []
    for worker in dict.fromkeys(filter(None, workers)):
        found = re.fullmatch(r"(.*-)(\d+)", worker)
        stem, number = (found[1], int(found[2])) if found else (worker, -1)
        if runs and number > 0 and runs[-1][0] == stem and runs[-1][2] == number - 1:
            runs[-1] = (stem, runs[-1][1], number)
            parts[-1] = f"{stem}{runs[-1][1]}..{number}"
        else:
            runs.append((stem, number, number))
            parts.append(worker)
    return ", ".join(parts)


def _title(block: Block) -> str:
    kinds = Counter((len(node.gpus), node.accelerator) for node in block.nodes)
    return ", ".join(
        [
            *([block.leaf] if block.leaf else []),
            *([f"NVLink {block.domain}"] if block.domain else []),
            *(_kind(gpus, accelerator, count) for (gpus, accelerator), count in kinds.items()),
        ]
    )


def _kind(gpus: int, accelerator: str, count: int) -> str:
    nodes = _count(count, "node")
    return f"{nodes} without GPUs" if accelerator == NO_ACCELERATOR or not gpus else f"{nodes} x {gpus} {accelerator}"


def _summary(nodes: Sequence[NodePicture]) -> str:
    gpus = Counter(slot.role or slot.use.value for node in nodes for slot in node.gpus)
    on_cores = sum(len(node.cpu_ranks) for node in nodes)
    parts = [f"{gpus[use]:,} {use}" for use in (*_HUES, *Use) if gpus[use]]
    parts += [f"{_count(on_cores, 'rank')} on CPU cores"] if on_cores else []
    head = f"{_count(len(nodes), 'node')}, {_count(sum(gpus.values()), 'GPU')}"
    return f"{head}: {', '.join(parts)}" if parts else head


def _legend(picture: Picture, nodes: Sequence[NodePicture]) -> Iterator[Section]:
    ranks = Counter(slot.worker for slot in _all_slots(nodes))
    homes = Counter(worker for node in nodes for worker in {slot.worker for slot in _all_slots([node])})
    on_cores = {slot.worker for node in nodes for slot in node.cpu_ranks}
    for role in _HUES:
        names = [worker for worker, of_role in picture.workers if of_role == role]
        lines = [
            Line(
                "",
                (Cell("", Slot(Use.RANK, worker, role)),),
                note=f"{worker}: {_count(ranks[worker], 'rank')} on {_count(homes[worker], 'node')}"
                + (", on CPU cores" if worker in on_cores else ""),
            )
            for worker in names[:MAX_KEYS]
        ]
        if more := names[MAX_KEYS:]:
            total = sum(ranks[worker] for worker in more)
            lines.append(Line("", (), note=f"and {_count(len(more), 'more worker')}: {_count(total, 'rank')}"))
        if lines:
            yield Section(role, tuple(lines), is_legend=True)
    uses = Counter(slot.use for node in nodes for slot in node.gpus)
    others = [use for use in Use if use != Use.RANK and uses[use]]
    if others:
        lines = [Line("", (Cell("", Slot(use)),), note=f"{use}: {_count(uses[use], 'GPU')}") for use in others]
        yield Section("no rank of this plan", tuple(lines), is_legend=True)


def _all_slots(nodes: Iterable[NodePicture]) -> Iterator[Slot]:
    return (slot for node in nodes for slot in node.gpus + node.cpu_ranks)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


# Colours.

_HUES = {"prefill": 28, "decode": 212, "aggregated": 150}
"""Degrees, by role; the order of the legend. Told apart by people who see red and green alike."""
_LIGHTNESS = (0.46, 0.74, 0.34, 0.62, 0.84)
"""By the worker's place in its role, so that neighbours differ most."""


@dataclass(frozen=True, slots=True)
class Paint:
    fill: str
    ink: str
    stroke: str
    hatch: str = ""
    """The colour of its diagonal lines; empty: it has none."""
    is_crossed: bool = False
    """The lines go both ways."""


_UNUSED = {
    Use.FREE: Paint("#ffffff", "#57606a", "#c4cad2"),
    Use.SPARE: Paint("#ffffff", "#3d3557", "#8574b5", hatch="#a99bd0"),
    Use.DRAINED: Paint("#eceef1", "#3f464e", "#a6adb7", hatch="#b4bac3", is_crossed=True),
    Use.HELD: Paint("#9aa2ad", "#16191d", "#858d98"),
}
MARKS = {Use.RANK: "", Use.FREE: ".", Use.SPARE: "+", Use.DRAINED: "-", Use.HELD: "x"}
"""What a terminal shows where there is no number, to be read without colours too."""


def paints_of(picture: Picture) -> dict[str, Paint]:
    """By worker."""
    seen: Counter[str] = Counter()
    paints = {}
    for worker, role in picture.workers:
        paints[worker] = _worker_paint(role, seen[role])
        seen[role] += 1
    return paints


def _worker_paint(role: str, index: int) -> Paint:
    lightness = _LIGHTNESS[index % len(_LIGHTNESS)]
    fill = _rgb(_HUES[role], lightness)
    # Rec. 709 luma, on the screen's own scale: dark text where the ground is bright.
    is_bright = 0.2126 * fill[0] + 0.7152 * fill[1] + 0.0722 * fill[2] > 120
    return Paint(_hex(fill), "#101418" if is_bright else "#ffffff", _hex(_rgb(_HUES[role], lightness * 0.8)))


def _rgb(hue: int, lightness: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hls_to_rgb(hue / 360, lightness, 0.75)
    return round(red * 255), round(green * 255), round(blue * 255)


def _hex(colour: tuple[int, int, int]) -> str:
    return "#" + "".join(f"{channel:02x}" for channel in colour)


def paint_of(slot: Slot, paints: Mapping[str, Paint]) -> Paint:
    return paints[slot.worker] if slot.use == Use.RANK else _UNUSED[slot.use]
