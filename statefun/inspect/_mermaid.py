"""A report as a Mermaid flow chart, which is plain text."""

from __future__ import annotations

from collections.abc import Iterator

from ._boxes import Box
from ._flow import Node, detail_of, flow, title_of
from ._report import Report


def mermaid(report: Report) -> str:
    inputs, outputs = flow(report)
    lines = ["flowchart LR"]
    lines += [f"  i{i}{_node(node)}" for i, node in enumerate(inputs)]
    lines += _Subgraphs().lines(report.box, "  ")
    lines += [f"  o{i}{_node(node)}" for i, node in enumerate(outputs)]
    lines += [f"  i{i} --> f0" for i in range(len(inputs))]
    lines += [f"  f0 --> o{i}" for i in range(len(outputs))]
    return "\n".join(lines) + "\n"


def _node(node: Node) -> str:
    text = "<br/>".join(map(_escape, (node.title, node.detail)))
    opening, closing = ('["', '"]') if node.state else ('(["', '"])')
    return f"{opening}{text}{closing}"


class _Subgraphs:
    def __init__(self) -> None:
        self._made = 0

    def lines(self, box: Box, indent: str) -> Iterator[str]:
        name = f"f{self._made}"
        self._made += 1
        # A subgraph without a node in it would be drawn as a node.
        yield f'{indent}subgraph {name}["{_escape(title_of(box))}"]'
        yield f'{indent}  {name}n["{detail_of(box)}"]'
        for inner in box.inside:
            yield from self.lines(inner, indent + "  ")
        yield f"{indent}end"


def _escape(text: str) -> str:
    """Escapes, by Mermaid's entities, what would end a label or be taken for HTML."""
    codes = {"#": "#35;", '"': "#quot;", "<": "#lt;", ">": "#gt;", "&": "#amp;"}
    text = "".join(codes.get(c, c) for c in text)
    return text.replace("`", "#96;").replace("\\", "#92;")
