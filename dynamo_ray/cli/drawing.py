"""Draws the picture of a plan three ways: on the terminal, as SVG and as PNG."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from math import ceil
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image, ImageDraw, ImageFont
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dynamo_ray.cli.picture import MARKS, Cell, Line, Paint, Picture, Section, Sheet, Use, paint_of, paints_of, sheet_of

# The terminal.


def terminal(picture: Picture) -> RenderableType:
    """A block a leaf or NVLink domain, a line a node, a cell a GPU; says so where it draws less than that."""
    sheet, paints = sheet_of(picture), paints_of(picture)
    cells = [cell for section in sheet.sections for line in section.lines for cell in line.gpus + line.cpu_ranks]
    width = max((len(cell.text) for cell in cells), default=1)
    head = [Text(sheet.title, style="bold"), Text(sheet.summary), *map(Text, sheet.remarks)]
    panels = [
        Panel(_grid(section, paints, width), title=Text(section.title), title_align="left", expand=False)
        for section in sheet.sections
    ]
    return Group(*head, Columns(panels), *(_terminal_legend(section, paints) for section in sheet.legend))


def _grid(section: Section, paints: Mapping[str, Paint], width: int) -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column()
    for line in section.lines:
        parts = [_terminal_cells(cells, paints, width) for cells in (line.gpus, line.cpu_ranks) if cells]
        grid.add_row(Text(line.label), Text("  ").join(parts), Text(line.note, no_wrap=True, overflow="ellipsis"))
    return grid


def _terminal_cells(cells: Iterable[Cell], paints: Mapping[str, Paint], width: int) -> Text:
    text = Text()
    for cell in cells:
        paint = paint_of(cell.slot, paints)
        # What has no work keeps the terminal's own background, be it dark or light.
        style = f"{paint.ink} on {paint.fill}" if cell.slot.use == Use.RANK else "dim"
        text.append(f" {cell.text or MARKS[cell.slot.use]:>{width}} ", style=style)
    return text


def _terminal_legend(section: Section, paints: Mapping[str, Paint]) -> RenderableType:
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


def _measure(sheet: Sheet) -> _Grid:
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


def _cells_width(line: Line, cell: int) -> int:
    return (len(line.gpus) + len(line.cpu_ranks)) * cell + (_GAP if line.gpus and line.cpu_ranks else 0)


def _height(section: Section) -> int:
    return _HEADING + len(section.lines) * _LINE + _PAD - 4


def _pieces(sections: Iterable[Section]) -> Iterator[Section]:
    """Long sections in parts of about the same length, none taller than a rack."""
    for section in sections:
        size = ceil(len(section.lines) / ceil(len(section.lines) / _MAX_PIECE))
        for start in range(0, len(section.lines), size):
            title = section.title if start == 0 else f"{section.title} (continued)"
            yield replace(section, title=title, lines=section.lines[start : start + size])


def _columns(sheet: Sheet, grid: _Grid) -> list[list[Section]]:
    """Sections from top to bottom, then left to right, in the fewest columns that make the picture wider than high;
    the legend has the last ones.
    """
    total = _stacked(sheet.sections)
    columns: list[list[Section]] = []
    for number in range(1, len(sheet.sections) + 1):
        limit = ceil(total / number)
        while len(columns := _filled(sheet.sections, limit)) > number:
            limit += _LINE
        if len(columns) * grid.section + grid.legend >= 1.2 * limit:
            break
    longest = max(map(_stacked, columns), default=0)
    # A legend somewhat longer than the nodes is read more easily than one in two columns.
    return columns + _filled(sheet.legend, longest * 4 // 3)


def _stacked(sections: Iterable[Section]) -> int:
    return sum(_height(section) + _GAP for section in sections)


def _filled(sections: Sequence[Section], tallest: int) -> list[list[Section]]:
    columns: list[list[Section]] = []
    room = 0
    for section in sections:
        if not columns or room < _height(section) + _GAP:
            columns.append([])
            room = tallest
        columns[-1].append(section)
        room -= _height(section) + _GAP
    return columns


def _layout(picture: Picture) -> _Drawing:
    whole, paints = sheet_of(picture), paints_of(picture)
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
    section: Section, x: int, y: int, width: int, grid: _Grid, paints: Mapping[str, Paint], is_collapsed: bool
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
    cell: Cell, kind: str, home: str, x: int, y: int, width: int, paints: Mapping[str, Paint]
) -> Iterator[_Shape]:
    paint = paint_of(cell.slot, paints)
    what = f"{cell.slot.worker} {cell.text}".strip() or cell.slot.use.value
    yield _Rect(kind, x, y, width, _CELL_HEIGHT, paint.fill, paint.stroke, tip=f"{home}: {what}" if home else "")
    # A number is read on a plain ground.
    if paint.hatch and not cell.text:
        yield from _hatching(x + 1, y + 1, width - 2, _CELL_HEIGHT - 2, paint)
    if cell.text:
        yield _Label(x + width // 2, y + _CELL_HEIGHT // 2 + 5, cell.text, _FONT, paint.ink, is_centred=True)


def _hatching(x: int, y: int, width: int, height: int, paint: Paint) -> Iterator[_Stroke]:
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
