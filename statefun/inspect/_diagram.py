"""A report as a picture, drawn with drawsvg.

The layout is three columns: what goes in, the function, what comes out. A State keeps its
row on both sides, so that every arrow is horizontal and no two of them cross. Text is set
in a monospaced face, whose width is known without measuring, and each box is made as wide
as its text: labels can't overlap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ._boxes import Box
from ._extras import missing
from ._flow import Node, detail_of, flow, title_of
from ._report import Report

_SIZE = 12
# In units of the size of the type. No monospaced face in use is wider than 0.62.
_ADVANCE = 0.62 * _SIZE
_LINE = 16
_PAD = 10
_GAP = 10
_ARROW = 48
_MARGIN = 16
_LONGEST = 52  # characters of a label; the whole of it shows as a tool tip
_MOST = 24  # boxes inside of one box; the rest are counted

_INK, _FAINT, _PAPER = "#1f2933", "#52606d", "#ffffff"
_STATE, _VALUE = ("#e3f2fd", "#1976d2"), ("#f5f7fa", "#7b8794")
_SHADES = ("#fff8e1", "#ffecb3", "#ffe082", "#ffd54f")
_EDGE = "#b8860b"


@dataclasses.dataclass(frozen=True)
class _Placed:
    """A box of transforms with its size."""

    title: str
    detail: str
    inside: tuple[_Placed, ...]
    width: float
    height: float


def svg(report: Report) -> str:
    try:
        import drawsvg
    except ImportError as error:
        raise missing("drawsvg", "diagram", "draw a diagram as SVG") from error

    inputs, outputs = flow(report)
    box = _measure(report.box)
    rows = max((n.row for n in (*inputs, *outputs)), default=-1) + 1
    row_height = 2 * _LINE + _PAD + _GAP
    body = max(box.height, rows * row_height + _GAP)
    left, right = _column(inputs), _column(outputs)
    width = 2 * _MARGIN + left + right + box.width + 2 * _ARROW
    if not left:
        width -= _ARROW
    if not right:
        width -= _ARROW
    height = 2 * _MARGIN + body

    picture = drawsvg.Drawing(width, height)
    pen = _Pen(drawsvg, picture)
    picture.append(drawsvg.Rectangle(0, 0, width, height, fill=_PAPER))
    middle = _MARGIN + (left + _ARROW if left else 0)
    pen.box(dataclasses.replace(box, height=body), middle, _MARGIN, 0)
    for node in inputs:
        y = _MARGIN + _GAP + node.row * row_height
        end = pen.node(node, _MARGIN, y, left)
        pen.arrow(end, middle, y + row_height / 2 - _GAP / 2)
    for node in outputs:
        y = _MARGIN + _GAP + node.row * row_height
        start = middle + box.width
        pen.node(node, start + _ARROW, y, right)
        pen.arrow(start, start + _ARROW, y + row_height / 2 - _GAP / 2)
    return str(picture.as_svg())


def _short(text: str) -> str:
    """Leaves the middle out: the ends of a path say most."""
    if len(text) <= _LONGEST:
        return text
    head = (_LONGEST - 1) // 2
    return f"{text[:head]}…{text[head + 1 - _LONGEST :]}"


def _wide(*texts: str) -> float:
    return max(len(_short(text)) for text in texts) * _ADVANCE + 2 * _PAD


def _column(nodes: Sequence[Node]) -> float:
    return max((_wide(n.title, n.detail) for n in nodes), default=0)


def _measure(box: Box) -> _Placed:
    inside = [_measure(inner) for inner in box.inside[:_MOST]]
    rest = box.inside[_MOST:]
    if rest:
        n = sum(inner.equations * inner.times for inner in rest)
        inside.append(_measure(Box(f"{len(rest)} more", n)))
    title, detail = title_of(box), detail_of(box)
    width = max(_wide(title, detail), *(p.width + 2 * _PAD for p in inside), 0)
    height = 2 * _LINE + _PAD + sum(p.height + _GAP for p in inside)
    return _Placed(title, detail, tuple(inside), width, height)


class _Pen:
    def __init__(self, drawsvg: Any, picture: Any):
        self._d = drawsvg
        self._picture = picture
        self._head = drawsvg.Marker(-0.1, -3, 6, 3, scale=2, orient="auto")
        self._head.append(drawsvg.Lines(0, -3, 6, 0, 0, 3, close=True, fill=_FAINT))

    def _text(self, text: str, x: float, y: float, **style: Any) -> None:
        options = {"fill": _INK, "font_family": "DejaVu Sans Mono, monospace", **style}
        short = _short(text)
        drawn = self._d.Text(short, _SIZE, x, y, **options)
        if short != text:
            drawn.append_title(text)
        self._picture.append(drawn)

    def _rectangle(self, x: float, y: float, w: float, h: float, **style: Any) -> None:
        self._picture.append(self._d.Rectangle(x, y, w, h, **style))

    def node(self, node: Node, x: float, y: float, width: float) -> float:
        """Returns where it ends."""
        fill, stroke = _STATE if node.state else _VALUE
        corner = 4 if node.state else 14
        height = 2 * _LINE + _PAD
        self._rectangle(x, y, width, height, rx=corner, fill=fill, stroke=stroke)
        self._text(node.title, x + _PAD, y + _LINE + 1, font_weight="bold")
        self._text(node.detail, x + _PAD, y + 2 * _LINE + 1, fill=_FAINT)
        return x + width

    def box(self, box: _Placed, x: float, y: float, depth: int) -> None:
        shade = _SHADES[min(depth, len(_SHADES) - 1)]
        self._rectangle(x, y, box.width, box.height, rx=6, fill=shade, stroke=_EDGE)
        self._text(box.title, x + _PAD, y + _LINE + 1, font_weight="bold")
        self._text(box.detail, x + _PAD, y + 2 * _LINE + 1, fill=_FAINT)
        y += 2 * _LINE + _PAD
        for inner in box.inside:
            wide = dataclasses.replace(inner, width=box.width - 2 * _PAD)
            self.box(wide, x + _PAD, y, depth + 1)
            y += inner.height + _GAP

    def arrow(self, x: float, to: float, y: float) -> None:
        line = self._d.Line(
            x + 3, y, to - 20, y, stroke=_FAINT, stroke_width=1.5, marker_end=self._head
        )
        self._picture.append(line)
