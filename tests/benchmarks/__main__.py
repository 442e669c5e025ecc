"""`python -m tests.benchmarks`: prints statefun's times beside those of the others.

Every module `bench_*.py` beside this one may have a list `ROWS` of `_harness.Row`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from ._harness import QUICK, Effort, Result, Row, measure

COLUMNS = ("what", "unit", "statefun", "against", "", "ratio", "at most", "")
LIBRARIES = (
    "statefun",
    "jax",
    "jaxlib",
    "equinox",
    "optax",
    "numpy",
    "flax",
    "brainstate",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("--quick", action="store_true", help="less exact, but sooner")
    parser.add_argument("--only", default="", help="rows with this in their name")
    parser.add_argument("--no-peers", action="store_true", help="budgets only")
    parser.add_argument("--markdown", action="store_true", help="a table for docs/")
    parser.add_argument("--strict", action="store_true", help="exit 1 if one is over")
    options = parser.parse_args(argv)

    effort = QUICK if options.quick else Effort()
    if options.no_peers:
        effort = dataclasses.replace(effort, peers=False)
    rows = [row for row in _rows() if options.only in row.name]
    results: list[Result] = []
    for i, row in enumerate(rows):
        print(f"\r\x1b[K[{i + 1}/{len(rows)}] {row.name}", end="", file=sys.stderr)
        results += measure(row, effort)
        jax.clear_caches()
    print("\r\x1b[K", end="", file=sys.stderr)

    show = _show_markdown if options.markdown else _show
    show([_cells(result) for result in results])
    print(_conditions())
    over = [result for result in results if result.over]
    if over:
        print(f"{len(over)} over budget")
    return 1 if over and options.strict else 0


def _rows() -> Iterator[Row]:
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        module = importlib.import_module(f".{path.stem}", __package__)
        yield from getattr(module, "ROWS", ())


def _cells(result: Result) -> tuple[str, ...]:
    if result.budget is None:
        budget, verdict = "", ""
    else:
        budget, verdict = f"{result.budget:.2f}", "over" if result.over else "ok"
    return (
        result.row.name,
        result.row.unit,
        _figure(result.ours),
        result.against,
        _figure(result.theirs),
        f"{result.ratio:.2f}",
        budget,
        verdict,
    )


def _figure(value: float) -> str:
    return (
        f"{value:.2f}"
        if value < 10
        else f"{value:.1f}"
        if value < 100
        else f"{value:.0f}"
    )


def _show(table: Sequence[Sequence[str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return _show_plain(table)
    pretty = Table(*COLUMNS)
    name = None
    for row in table:
        if row[0] != name and name is not None:
            pretty.add_section()
        style = {"over": "red", "ok": "green"}.get(row[-1], "")
        # The name once for all who do the same work.
        pretty.add_row(
            *(row if row[0] != name else ("", "", "", *row[3:])), style=style
        )
        name = row[0]
    width = None if sys.stdout.isatty() else 120
    Console(width=width).print(pretty)


def _show_plain(table: Sequence[Sequence[str]]) -> None:
    lines = [COLUMNS, *table]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = zip(line, widths, strict=True)
        print("  ".join(cell.ljust(width) for cell, width in cells).rstrip())


def _show_markdown(table: Sequence[Sequence[str]]) -> None:
    for line in (COLUMNS, ("---",) * len(COLUMNS), *table):
        print(f"| {' | '.join(line)} |")
    print()


def _conditions() -> str:
    """Under what the figures were taken."""
    versions = [f"Python {platform.python_version()}"]
    for name in LIBRARIES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} (not installed)")
    device = jax.devices()[0]
    where = f"{os.cpu_count()} cores, JAX on {device.platform} ({device.device_kind})"
    return f"{', '.join(versions)}; {where}"


if __name__ == "__main__":
    sys.exit(main())
