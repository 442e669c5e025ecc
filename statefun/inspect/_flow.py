"""The inputs and outputs in the picture of a function: its left and right columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ._boxes import Box
from ._report import Leaf, Report, StateUse, plural, size


@dataclasses.dataclass(frozen=True)
class Node:
    """A State, or all arguments, constants or results together.

    `row` is the same for a State that is read and written, on both sides.
    """

    title: str
    detail: str
    row: int
    state: bool


def flow(report: Report) -> tuple[list[Node], list[Node]]:
    """What goes in and what comes out."""
    left = [
        _summary("arguments", report.arguments),
        _summary("constants", report.constants),
    ]
    right = [_summary("result", report.outputs)]
    inputs = [dataclasses.replace(n, row=i) for i, n in enumerate(filter(None, left))]
    outputs = [dataclasses.replace(n, row=i) for i, n in enumerate(filter(None, right))]
    first = max(len(inputs), len(outputs))
    for row, use in enumerate(report.states, first):
        donated = ", donated" if use.donated else ""
        node = Node(use.label, _detail(use) + donated, row, True)
        if use.read:
            inputs.append(node)
        if use.written:
            detail = f"{use.kind} {use.becomes}" if use.becomes else _detail(use)
            outputs.append(dataclasses.replace(node, detail=detail))
    return inputs, outputs


def _detail(use: StateUse) -> str:
    return f"{use.kind} {use.type}, {size(use.bytes)}"


def _summary(title: str, leaves: Sequence[Leaf]) -> Node | None:
    arrays = [leaf for leaf in leaves if leaf.static is None]
    if not arrays:
        return None
    if len(arrays) == 1:
        return Node(
            arrays[0].path, f"{arrays[0].type}, {size(arrays[0].bytes)}", 0, False
        )
    total = size(sum(leaf.bytes for leaf in arrays))
    return Node(title, f"{len(arrays)} arrays, {total}", 0, False)


def title_of(box: Box) -> str:
    return box.label if box.times == 1 else f"{box.label} x {box.times}"


def detail_of(box: Box) -> str:
    return plural(box.equations, "equation")
