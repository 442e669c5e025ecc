"""A report as tables, with rich."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ._extras import missing
from ._report import Leaf, Report, plural, size

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

WIDTH = 100
_MOST = 40  # rows of a table of leaves; the rest is summed up
_PRIMITIVES = 12


def as_text(report: Report) -> str:
    console = _console(io.StringIO(), color_system=None)
    console.print(renderable(report))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines).rstrip()


def as_html(report: Report) -> str:
    console = _console(io.StringIO(), record=True)
    console.print(renderable(report))
    code = '<pre style="line-height:1.2;overflow-x:auto">{code}</pre>'
    return console.export_html(inline_styles=True, code_format=code)


def _console(file: io.StringIO, **options: Any) -> Console:
    try:
        from rich.console import Console
    except ImportError as error:
        raise missing("rich", "display", "show a report as a table") from error
    return Console(file=file, width=WIDTH, legacy_windows=False, **options)


def renderable(report: Report) -> Group:
    """For `rich.print(report)`, in color and at the terminal's width."""
    try:
        from rich.console import Group
        from rich.text import Text
    except ImportError as error:
        raise missing("rich", "display", "show a report as a table") from error
    n, m = sum(report.equations.values()), sum(report.optimized.values())
    head = Text(report.name, style="bold", overflow="fold")
    head.append(
        f": {plural(len(report.states), 'State')}, {plural(n, 'equation')}", "default"
    )
    parts: list[Any] = [head, _states(report)]
    for title, leaves in (
        ("Arguments", report.arguments),
        ("Result", report.outputs),
        ("Closed-over constants", report.constants),
    ):
        if leaves:
            parts.append(_leaves(title, leaves))
    parts.append(_equations(report, n, m))
    if report.effects:
        parts.append(Text(f"Effects: {', '.join(report.effects)}", overflow="fold"))
    parts.append(_cost(report))
    return Group(*parts)


def _table(title: str, columns: Sequence[tuple[str, dict]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_footer=False,
    )
    for name, options in columns:
        table.add_column(name, **{"overflow": "fold", **options})
    return table


def _add(table: Table, *cells: str) -> None:
    from rich.text import Text

    # As `Text`: `[0]` in a path would be taken for markup.
    table.add_row(*map(Text, cells))


_RIGHT: dict[str, Any] = {"justify": "right", "no_wrap": True}
_FIXED: dict[str, Any] = {"no_wrap": True}


def _states(report: Report) -> Any:
    from rich.text import Text

    if not report.states:
        return Text("It touches no State.")
    named = any(use.name for use in report.states)
    columns: list[tuple[str, dict]] = [("State", {"ratio": 5}), ("kind", {})]
    columns += [("name", {})] * named + [("type", {}), ("bytes", _RIGHT)]
    columns += [("read", _FIXED), ("written", _FIXED), ("donated", _FIXED)]
    table = _table("States", columns)
    for use in report.states:
        type = use.type if use.becomes is None else f"{use.type} → {use.becomes}"
        marks = ["✓" if x else "" for x in (use.read, use.written, use.donated)]
        label = use.path or f"(created at {_place(use.created_at)})"
        name = [use.name or ""] * named
        _add(table, label, use.kind, *name, type, size(use.bytes), *marks)
    if len(report.states) > 1:
        total = size(sum(use.bytes for use in report.states))
        _add(table, "total", "", *[""] * named, "", total, "", "", "")
    return table


def _place(where: str) -> str:
    """The file without its folders."""
    return where.replace("\\", "/").rpartition("/")[2]


def _leaves(title: str, leaves: Sequence[Leaf]) -> Any:
    columns = [("path", {}), ("type", {}), ("bytes", _RIGHT), ("", _FIXED)]
    table = _table(title, columns)
    shown = leaves if len(leaves) <= _MOST else leaves[: _MOST - 1]
    for leaf in shown:
        note = (
            "donated" if leaf.donated else "static" if leaf.static is not None else ""
        )
        bytes = size(leaf.bytes) if leaf.static is None else ""
        _add(table, leaf.path, leaf.type, bytes, note)
    rest = leaves[len(shown) :]
    if rest:
        _add(table, f"… {len(rest)} more", "", _sum(rest), "")
    if len(leaves) > 1:
        _add(table, "total", "", _sum(leaves), "")
    return table


def _sum(leaves: Iterable[Leaf]) -> str:
    return size(sum(leaf.bytes for leaf in leaves))


def _equations(report: Report, n: int, m: int) -> Any:
    columns = [("primitive", {}), ("traced", _RIGHT), ("optimized", _RIGHT)]
    table = _table("Equations", columns)
    names = list(dict.fromkeys([*report.equations, *report.optimized]))
    before, after = report.equations, report.optimized
    for name in names[:_PRIMITIVES]:
        _add(table, name, str(before.get(name, 0)), str(after.get(name, 0)))
    rest = names[_PRIMITIVES:]
    if rest:
        sums = [sum(c.get(x, 0) for x in rest) for c in (before, after)]
        _add(table, f"{len(rest)} others", *map(str, sums))
    _add(table, "total", str(n), str(m))
    return table


def _cost(report: Report) -> Any:
    from rich.text import Text

    cost = report.cost
    if cost is None:
        return Text("XLA: not compiled; explain(..., compile=True) says what it costs.")
    table = _table("XLA", [("", {}), ("", _RIGHT)])
    for name, value, unit in (
        ("flops", cost.flops, ""),
        ("bytes accessed", cost.bytes_accessed, "B"),
        ("arguments", cost.argument_bytes, "B"),
        ("results", cost.output_bytes, "B"),
        ("temporaries", cost.temporary_bytes, "B"),
        ("shared by donation", cost.aliased_bytes, "B"),
        ("peak memory", cost.peak_bytes, "B"),
    ):
        if value is not None:
            _add(table, name, size(value) if unit else f"{value:,.0f}")
    table.show_header = False
    return table
