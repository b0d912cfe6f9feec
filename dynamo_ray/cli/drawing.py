"""A plan as a picture: which rank runs on which GPU, for the terminal, as SVG and as PNG."""

from __future__ import annotations

import colorsys
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from io import BytesIO
from itertools import groupby
from math import ceil
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image, ImageDraw, ImageFont
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

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
class _Cell:
    text: str
    slot: Slot
    """How it is painted; its rank does not matter."""


@dataclass(frozen=True, slots=True)
class _Line:
    label: str
    gpus: tuple[_Cell, ...]
    cpu_ranks: tuple[_Cell, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Section:
    title: str
    lines: tuple[_Line, ...]
    is_legend: bool = False


@dataclass(frozen=True, slots=True)
class _Sheet:
    title: str
    summary: str
    remarks: tuple[str, ...]
    """What a line is and what was left out; empty where each node is drawn."""
    sections: tuple[_Section, ...]
    legend: tuple[_Section, ...]


def _sheet(picture: Picture) -> _Sheet:
    nodes = [node for block in picture.blocks for node in block.nodes]
    legend = tuple(_legend(picture, nodes))
    if len(nodes) <= MAX_NODES:
        sections = tuple(_Section(_title(block), tuple(map(_node_line, block.nodes))) for block in picture.blocks)
        return _Sheet(picture.title, _summary(nodes), (), sections, legend)
    sections, rest = _collapsed(picture.blocks)
    remarks = [f"Above {MAX_NODES} nodes, a line is a run of like nodes, and a number counts GPUs or ranks on cores."]
    remarks += [f"Not drawn: {_summary(rest)}."] if rest else []
    return _Sheet(picture.title, _summary(nodes), tuple(remarks), sections, legend)


def _collapsed(blocks: Sequence[Block]) -> tuple[tuple[_Section, ...], list[NodePicture]]:
    """Runs of like nodes that have work or are spares, and the nodes outside of those."""
    sections: list[_Section] = []
    rest: list[NodePicture] = []
    num_lines = 0
    for block in blocks:
        lines: list[_Line] = []
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
            sections.append(_Section(_title(block), tuple(lines)))
    return tuple(sections), rest


def _profile(node: NodePicture) -> tuple[Slot, ...]:
    """Equal for nodes that differ in nothing but their ranks' numbers."""
    return tuple(replace(slot, rank=-1) for slot in node.gpus + node.cpu_ranks)


def _run_line(label: str, run: Sequence[NodePicture]) -> _Line:
    gpus = Counter(replace(slot, rank=-1) for node in run for slot in node.gpus)
    cpu_ranks = Counter(replace(slot, rank=-1) for node in run for slot in node.cpu_ranks)
    notes = [_names(slot.worker for slot in gpus | cpu_ranks)]
    notes += [f"{count:,} {slot.use}" for slot, count in gpus.items() if slot.use != Use.RANK]
    return _Line(
        label,
        tuple(_Cell(f"{count:,}", slot) for slot, count in gpus.items()),
        tuple(_Cell(f"{count:,}", slot) for slot, count in cpu_ranks.items()),
        ", ".join(filter(None, notes)),
    )


def _node_line(node: NodePicture) -> _Line:
    gpus = tuple(_Cell(str(slot.rank) if slot.use == Use.RANK else "", slot) for slot in node.gpus)
    cpu_ranks = tuple(_Cell(str(slot.rank), slot) for slot in node.cpu_ranks)
    uses = {slot.use for slot in node.gpus}
    notes = [_names(slot.worker for slot in node.gpus + node.cpu_ranks)]
    notes += [use.value for use in (Use.SPARE, Use.DRAINED) if use in uses]
    return _Line(node.label, gpus, cpu_ranks, ", ".join(filter(None, notes)))


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


def _legend(picture: Picture, nodes: Sequence[NodePicture]) -> Iterator[_Section]:
    ranks = Counter(slot.worker for slot in _all_slots(nodes))
    homes = Counter(worker for node in nodes for worker in {slot.worker for slot in _all_slots([node])})
    on_cores = {slot.worker for node in nodes for slot in node.cpu_ranks}
    for role in _HUES:
        names = [worker for worker, of_role in picture.workers if of_role == role]
        lines = [
            _Line(
                "",
                (_Cell("", Slot(Use.RANK, worker, role)),),
                note=f"{worker}: {_count(ranks[worker], 'rank')} on {_count(homes[worker], 'node')}"
                + (", on CPU cores" if worker in on_cores else ""),
            )
            for worker in names[:MAX_KEYS]
        ]
        if more := names[MAX_KEYS:]:
            total = sum(ranks[worker] for worker in more)
            lines.append(_Line("", (), note=f"and {_count(len(more), 'more worker')}: {_count(total, 'rank')}"))
        if lines:
            yield _Section(role, tuple(lines), is_legend=True)
    uses = Counter(slot.use for node in nodes for slot in node.gpus)
    others = [use for use in Use if use != Use.RANK and uses[use]]
    if others:
        lines = [_Line("", (_Cell("", Slot(use)),), note=f"{use}: {_count(uses[use], 'GPU')}") for use in others]
        yield _Section("no rank of this plan", tuple(lines), is_legend=True)


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
class _Paint:
    fill: str
    ink: str
    stroke: str
    hatch: str = ""
    """The colour of its diagonal lines; empty: it has none."""
    is_crossed: bool = False
    """The lines go both ways."""


_UNUSED = {
    Use.FREE: _Paint("#ffffff", "#57606a", "#c4cad2"),
    Use.SPARE: _Paint("#ffffff", "#3d3557", "#8574b5", hatch="#a99bd0"),
    Use.DRAINED: _Paint("#eceef1", "#3f464e", "#a6adb7", hatch="#b4bac3", is_crossed=True),
    Use.HELD: _Paint("#9aa2ad", "#16191d", "#858d98"),
}
_MARKS = {Use.RANK: "", Use.FREE: ".", Use.SPARE: "+", Use.DRAINED: "-", Use.HELD: "x"}
"""What a terminal shows where there is no number, to be read without colours too."""


def _paints(picture: Picture) -> dict[str, _Paint]:
    """By worker."""
    seen: Counter[str] = Counter()
    paints = {}
    for worker, role in picture.workers:
        paints[worker] = _worker_paint(role, seen[role])
        seen[role] += 1
    return paints


def _worker_paint(role: str, index: int) -> _Paint:
    lightness = _LIGHTNESS[index % len(_LIGHTNESS)]
    fill = _rgb(_HUES[role], lightness)
    # Rec. 709 luma, on the screen's own scale: dark text where the ground is bright.
    is_bright = 0.2126 * fill[0] + 0.7152 * fill[1] + 0.0722 * fill[2] > 120
    return _Paint(_hex(fill), "#101418" if is_bright else "#ffffff", _hex(_rgb(_HUES[role], lightness * 0.8)))


def _rgb(hue: int, lightness: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hls_to_rgb(hue / 360, lightness, 0.75)
    return round(red * 255), round(green * 255), round(blue * 255)


def _hex(colour: tuple[int, int, int]) -> str:
    return "#" + "".join(f"{channel:02x}" for channel in colour)


def _paint(slot: Slot, paints: Mapping[str, _Paint]) -> _Paint:
    return paints[slot.worker] if slot.use == Use.RANK else _UNUSED[slot.use]


# The terminal.


def terminal(picture: Picture) -> RenderableType:
    """A block a leaf or NVLink domain, a line a node, a cell a GPU; says so where it draws less than that."""
    sheet, paints = _sheet(picture), _paints(picture)
    cells = [cell for section in sheet.sections for line in section.lines for cell in line.gpus + line.cpu_ranks]
    width = max((len(cell.text) for cell in cells), default=1)
    head = [Text(sheet.title, style="bold"), Text(sheet.summary), *map(Text, sheet.remarks)]
    panels = [
        Panel(_grid(section, paints, width), title=Text(section.title), title_align="left", expand=False)
        for section in sheet.sections
    ]
    return Group(*head, Columns(panels), *(_terminal_legend(section, paints) for section in sheet.legend))


def _grid(section: _Section, paints: Mapping[str, _Paint], width: int) -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column()
    for line in section.lines:
        parts = [_terminal_cells(cells, paints, width) for cells in (line.gpus, line.cpu_ranks) if cells]
        grid.add_row(Text(line.label), Text("  ").join(parts), Text(line.note, no_wrap=True, overflow="ellipsis"))
    return grid


def _terminal_cells(cells: Iterable[_Cell], paints: Mapping[str, _Paint], width: int) -> Text:
    text = Text()
    for cell in cells:
        paint = _paint(cell.slot, paints)
        # What has no work keeps the terminal's own background, be it dark or light.
        style = f"{paint.ink} on {paint.fill}" if cell.slot.use == Use.RANK else "dim"
        text.append(f" {cell.text or _MARKS[cell.slot.use]:>{width}} ", style=style)
    return text


def _terminal_legend(section: _Section, paints: Mapping[str, _Paint]) -> RenderableType:
    entries = [
        Text.assemble(_terminal_cells(line.gpus, paints, 1), " ", line.note, no_wrap=True, overflow="ellipsis")
        for line in section.lines
    ]
    return Group(Text(section.title, style="bold"), Columns(entries, padding=(0, 2)))


# SVG and PNG: shapes once, as values, in pixels; then two back ends.


@dataclass(frozen=True, slots=True)
class _Rect:
    kind: str
    """`panel`, `gpu`, `rank` (on CPU cores), `run` (of nodes) or `key`."""
    x: int
    y: int
    width: int
    height: int
    fill: str
    stroke: str
    radius: int = 3
    tip: str = ""


@dataclass(frozen=True, slots=True)
class _Stroke:
    x1: int
    y1: int
    x2: int
    y2: int
    colour: str


@dataclass(frozen=True, slots=True)
class _Label:
    x: int
    baseline: int
    text: str
    size: int
    ink: str
    is_centred: bool = False
    is_bold: bool = False


_Shape = _Rect | _Stroke | _Label


@dataclass(frozen=True, slots=True)
class _Drawing:
    width: int
    height: int
    title: str
    shapes: tuple[_Shape, ...]


_MARGIN, _GAP, _PAD = 24, 16, 12
_LINE, _CELL_HEIGHT, _HEADING = 26, 22, 34
_FONT, _TITLE_FONT = 13, 20
_INK, _FAINT, _PANEL, _PANEL_EDGE = "#1f2328", "#59636e", "#f6f8fa", "#d7dde3"
_MAX_PIECE = 18
"""Lines of a section in one piece: the nodes of an NVL72 rack."""


def _text_width(text: str, size: int = _FONT) -> int:
    """Enough for the fonts of both back ends."""
    return ceil(len(text) * size * 0.58)


@dataclass(frozen=True, slots=True)
class _Grid:
    """Widths that all sections share, so that their columns line up."""

    label: int
    cell: int
    """With the space after it."""
    cells: int
    note: int
    legend: int
    """Of a whole column."""

    @property
    def section(self) -> int:
        """Of a whole column."""
        return self.label + self.cells + self.note + 2 * _PAD


def _measure(sheet: _Sheet) -> _Grid:
    lines = [line for section in sheet.sections for line in section.lines]
    texts = [cell.text for line in lines for cell in line.gpus + line.cpu_ranks]
    cell = max([26, *(_text_width(text) + 8 for text in texts)]) + 3
    label = max((_text_width(line.label) for line in lines), default=0) + 10
    cells = max((_cells_width(line, cell) for line in lines), default=0) + 10
    notes = [_text_width(line.note) for line in lines]
    titles = [_text_width(section.title) - label - cells for section in sheet.sections]
    keys = [cell + 6 + _text_width(line.note) for section in sheet.legend for line in section.lines]
    headings = [_text_width(section.title) for section in sheet.legend]
    return _Grid(label, cell, cells, max([0, *notes, *titles]), max([0, *keys, *headings]) + 2 * _PAD)


def _cells_width(line: _Line, cell: int) -> int:
    return (len(line.gpus) + len(line.cpu_ranks)) * cell + (_GAP if line.gpus and line.cpu_ranks else 0)


def _height(section: _Section) -> int:
    return _HEADING + len(section.lines) * _LINE + _PAD - 4


def _pieces(sections: Iterable[_Section]) -> Iterator[_Section]:
    """Long sections in parts of about the same length, none taller than a rack."""
    for section in sections:
        size = ceil(len(section.lines) / ceil(len(section.lines) / _MAX_PIECE))
        for start in range(0, len(section.lines), size):
            title = section.title if start == 0 else f"{section.title} (continued)"
            yield replace(section, title=title, lines=section.lines[start : start + size])


def _columns(sheet: _Sheet, grid: _Grid) -> list[list[_Section]]:
    """Sections from top to bottom, then left to right, in the fewest columns that make the picture wider than high;
    the legend has the last ones.
    """
    total = _stacked(sheet.sections)
    columns: list[list[_Section]] = []
    for number in range(1, len(sheet.sections) + 1):
        limit = ceil(total / number)
        while len(columns := _filled(sheet.sections, limit)) > number:
            limit += _LINE
        if len(columns) * grid.section + grid.legend >= 1.2 * limit:
            break
    longest = max(map(_stacked, columns), default=0)
    # A legend somewhat longer than the nodes is read more easily than one in two columns.
    return columns + _filled(sheet.legend, longest * 4 // 3)


def _stacked(sections: Iterable[_Section]) -> int:
    return sum(_height(section) + _GAP for section in sections)


def _filled(sections: Sequence[_Section], tallest: int) -> list[list[_Section]]:
    columns: list[list[_Section]] = []
    room = 0
    for section in sections:
        if not columns or room < _height(section) + _GAP:
            columns.append([])
            room = tallest
        columns[-1].append(section)
        room -= _height(section) + _GAP
    return columns


def _layout(picture: Picture) -> _Drawing:
    whole, paints = _sheet(picture), _paints(picture)
    sheet = replace(whole, sections=tuple(_pieces(whole.sections)), legend=tuple(_pieces(whole.legend)))
    grid = _measure(sheet)
    shapes: list[_Shape] = [_Label(_MARGIN, _MARGIN + 16, sheet.title, _TITLE_FONT, _INK, is_bold=True)]
    top = _MARGIN + 38
    for text in (sheet.summary, *sheet.remarks):
        shapes.append(_Label(_MARGIN, top, text, _FONT, _FAINT))
        top += 20
    x, bottom = _MARGIN, top
    for column in _columns(sheet, grid):
        y, width = top, grid.legend if column[0].is_legend else grid.section
        for section in column:
            shapes += _section_shapes(section, x, y, width, grid, paints, bool(sheet.remarks))
            y += _height(section) + _GAP
        x, bottom = x + width + _GAP, max(bottom, y - _GAP)
    widest = max(
        x - _GAP - _MARGIN,
        _text_width(sheet.title, _TITLE_FONT),
        *map(_text_width, (sheet.summary, *sheet.remarks)),
    )
    return _Drawing(widest + 2 * _MARGIN, bottom + _MARGIN, sheet.title, tuple(shapes))


def _section_shapes(
    section: _Section, x: int, y: int, width: int, grid: _Grid, paints: Mapping[str, _Paint], is_collapsed: bool
) -> Iterator[_Shape]:
    yield _Rect("panel", x, y, width, _height(section), _PANEL, _PANEL_EDGE, radius=6)
    yield _Label(x + _PAD, y + 22, section.title, _FONT, _INK, is_bold=True)
    kind = "key" if section.is_legend else "run" if is_collapsed else "gpu"
    for index, line in enumerate(section.lines):
        top = y + _HEADING + index * _LINE
        baseline = top + _CELL_HEIGHT // 2 + 5
        left = x + _PAD + (0 if section.is_legend else grid.label)
        if line.label:
            yield _Label(x + _PAD, baseline, line.label, _FONT, _INK)
        for number, cell in enumerate(line.gpus):
            yield from _cell_shapes(cell, kind, line.label, left + number * grid.cell, top, grid.cell - 3, paints)
        start = left + len(line.gpus) * grid.cell + (_GAP if line.gpus else 0)
        for number, cell in enumerate(line.cpu_ranks):
            yield from _cell_shapes(cell, "rank", line.label, start + number * grid.cell, top, grid.cell - 3, paints)
        note = left + (grid.cell + 6 if section.is_legend else grid.cells)
        yield _Label(note, baseline, line.note, _FONT, _INK if section.is_legend else _FAINT)


def _cell_shapes(
    cell: _Cell, kind: str, home: str, x: int, y: int, width: int, paints: Mapping[str, _Paint]
) -> Iterator[_Shape]:
    paint = _paint(cell.slot, paints)
    what = f"{cell.slot.worker} {cell.text}".strip() or cell.slot.use.value
    yield _Rect(kind, x, y, width, _CELL_HEIGHT, paint.fill, paint.stroke, tip=f"{home}: {what}" if home else "")
    # A number is read on a plain ground.
    if paint.hatch and not cell.text:
        yield from _hatching(x + 1, y + 1, width - 2, _CELL_HEIGHT - 2, paint)
    if cell.text:
        yield _Label(x + width // 2, y + _CELL_HEIGHT // 2 + 5, cell.text, _FONT, paint.ink, is_centred=True)


def _hatching(x: int, y: int, width: int, height: int, paint: _Paint) -> Iterator[_Stroke]:
    """Diagonals 6 pixels apart that end at the rectangle's edges."""
    for offset in range(5, width + height, 6):
        x1, y1 = min(offset, width), max(0, offset - width)
        x2, y2 = max(0, offset - height), min(offset, height)
        yield _Stroke(x + x1, y + y1, x + x2, y + y2, paint.hatch)
        if paint.is_crossed:
            yield _Stroke(x + width - x1, y + y1, x + width - x2, y + y2, paint.hatch)


def save(picture: Picture, path: Path) -> None:
    """Write it as what the suffix says.

    Raises:
        ValueError: The suffix is neither .svg nor .png.
        OSError: The file cannot be written.
    """
    match path.suffix.lower():
        case ".svg":
            path.write_text(svg(picture), encoding="utf-8")
        case ".png":
            path.write_bytes(png(picture))
        case other:
            raise ValueError(f"{path}: a drawing is saved as .svg or .png, not as {other or 'a file without suffix'}")


def svg(picture: Picture) -> str:
    """A document of its own; each GPU is one `<rect class="gpu">` whose tooltip says what runs on it."""
    drawing = _layout(picture)
    size = f'width="{drawing.width}" height="{drawing.height}" viewBox="0 0 {drawing.width} {drawing.height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="Helvetica, Arial, sans-serif">',
            f"<title>{escape(drawing.title)}</title>",
            f'<path fill="#ffffff" d="M0 0H{drawing.width}V{drawing.height}H0Z"/>',
            *map(_svg_shape, drawing.shapes),
            "</svg>\n",
        ]
    )


def _svg_shape(shape: _Shape) -> str:
    match shape:
        case _Rect():
            tip = f"><title>{escape(shape.tip)}</title></rect>" if shape.tip else "/>"
            return (
                f'<rect class="{shape.kind}" x="{shape.x + 0.5}" y="{shape.y + 0.5}" width="{shape.width - 1}" '
                f'height="{shape.height - 1}" rx="{shape.radius}" fill="{shape.fill}" stroke="{shape.stroke}"{tip}'
            )
        case _Stroke():
            return f'<path stroke="{shape.colour}" d="M{shape.x1} {shape.y1}L{shape.x2} {shape.y2}"/>'
        case _Label():
            anchor = ' text-anchor="middle"' if shape.is_centred else ""
            weight = ' font-weight="600"' if shape.is_bold else ""
            return (
                f'<text x="{shape.x}" y="{shape.baseline}" font-size="{shape.size}" fill="{shape.ink}"'
                f"{anchor}{weight}>{escape(shape.text)}</text>"
            )


_SUPERSAMPLING = 3
"""Pillow draws shapes without smoothing, so they are drawn larger and scaled down."""


def png(picture: Picture) -> bytes:
    """The same picture as `svg`, in as many pixels."""
    drawing = _layout(picture)
    scale = _SUPERSAMPLING
    large = Image.new("RGB", (drawing.width * scale, drawing.height * scale), "#ffffff")
    canvas = ImageDraw.Draw(large)
    for shape in drawing.shapes:
        match shape:
            case _Rect():
                box = (shape.x, shape.y, shape.x + shape.width, shape.y + shape.height)
                corners = [edge * scale for edge in box[:2]] + [edge * scale - 1 for edge in box[2:]]
                canvas.rounded_rectangle(corners, shape.radius * scale, shape.fill, shape.stroke, width=scale)
            case _Stroke():
                ends = [edge * scale for edge in (shape.x1, shape.y1, shape.x2, shape.y2)]
                canvas.line(ends, shape.colour, width=scale)
    image = large.resize((drawing.width, drawing.height), Image.Resampling.BOX)
    # Text is smooth by itself, and sharper where it is not scaled.
    canvas = ImageDraw.Draw(image)
    for shape in drawing.shapes:
        if isinstance(shape, _Label):
            font = ImageFont.load_default(shape.size)
            anchor = "ms" if shape.is_centred else "ls"
            bold = 0.3 if shape.is_bold else 0
            canvas.text((shape.x, shape.baseline), shape.text, shape.ink, font, anchor, stroke_width=bold)
    written = BytesIO()
    image.save(written, "PNG", optimize=True)
    return written.getvalue()
