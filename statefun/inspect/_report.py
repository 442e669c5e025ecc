"""What `explain` returns: plain values, and ways to display them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from ._boxes import Box


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array, or another leaf, of the arguments, the result, a State or a closure.

    **Attributes:**

    - `path`: where it is.
    - `shape`, `dtype`, `bytes`: of an array; `bytes` is 0 for other leaves.
    - `static`: a non-array leaf as text.
    - `donated`: whether its buffer is given to the compiled function.
    """

    path: str
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    bytes: int = 0
    static: str | None = None
    donated: bool = False

    @property
    def type(self) -> str:
        """`float32[3,4]`, or the static value."""
        if self.dtype is None:
            return self.static or ""
        return f"{self.dtype}[{','.join(map(str, self.shape or ()))}]"


@dataclasses.dataclass(frozen=True)
class StateUse:
    """A State that a function touches, and how.

    **Attributes:**

    - `path`: how the function reaches it, where that is known.
    - `kind`, `name`, `created_at`: of the State.
    - `arrays`: the arrays of its value, each a `Leaf`: of the incoming value where that
        is read, else of the written one.
    - `becomes`: the type of the value that is written, where that is another one.
    - `read`, `written`: whether its incoming value is used, and whether it is assigned.
    - `donated`: whether its buffers are given to the compiled function.
    """

    path: str | None
    kind: str
    name: str | None
    created_at: str
    arrays: tuple[Leaf, ...]
    becomes: str | None
    read: bool
    written: bool
    donated: bool

    @property
    def bytes(self) -> int:
        return sum(leaf.bytes for leaf in self.arrays)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of a value that is one array."""
        return self.arrays[0].shape if len(self.arrays) == 1 else None

    @property
    def dtype(self) -> str | None:
        """The one dtype of all arrays, if there is one."""
        dtypes = {leaf.dtype for leaf in self.arrays}
        return dtypes.pop() if len(dtypes) == 1 else None

    @property
    def type(self) -> str:
        return type_of(self.arrays)

    @property
    def label(self) -> str:
        return self.path or self.name or f"{self.kind} of {self.created_at}"


def type_of(arrays: tuple[Leaf, ...]) -> str:
    """`float32[3,4]`, or `12 arrays of float32`."""
    if len(arrays) == 1:
        return arrays[0].type
    if not arrays:
        return "no arrays"
    dtypes = list(dict.fromkeys(str(leaf.dtype) for leaf in arrays))
    more = ", …" if len(dtypes) > 2 else ""
    return f"{len(arrays)} arrays of {', '.join(dtypes[:2])}{more}"


@dataclasses.dataclass(frozen=True)
class Cost:
    """XLA's figures for the compiled function; None where it gives none.

    **Attributes:**

    - `flops`, `bytes_accessed`: of one call, as XLA estimates them.
    - `argument_bytes`, `output_bytes`, `temporary_bytes`, `aliased_bytes`: the memory
        that it allocates; aliased is what outputs share with donated inputs.
    - `peak_bytes`: the most that is in use at once. It is XLA's own figure, and not every
        backend counts arguments and results alike.
    """

    flops: float | None
    bytes_accessed: float | None
    argument_bytes: int | None
    output_bytes: int | None
    temporary_bytes: int | None
    aliased_bytes: int | None
    peak_bytes: int | None


class Svg(str):
    """A picture, as text; notebooks show it."""

    __slots__ = ()

    def _repr_svg_(self) -> str:
        return str(self)


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What a function does with States, arguments and memory: see [`statefun.explain`][].

    `print(report)` shows a table of at most 100 columns (needs `statefun[display]`), and
    so do notebooks.

    **Attributes:**

    - `name`: of the function.
    - `states`: for each State a `StateUse`, in order of first access.
    - `arguments`, `outputs`, `constants`: for each a `Leaf`; constants are the arrays
        that the function closes over.
    - `equations`: how often each primitive occurs, at all depths.
    - `optimized`: the same after the passes named in `optimizations`.
    - `effects`: side effects, as text.
    - `cost`: a `Cost`, or None if the function was not compiled.
    - `box`: the nested transforms, a `Box`.
    """

    name: str
    states: tuple[StateUse, ...]
    arguments: tuple[Leaf, ...]
    outputs: tuple[Leaf, ...]
    constants: tuple[Leaf, ...]
    equations: dict[str, int]
    optimized: dict[str, int]
    optimizations: tuple[str, ...]
    effects: tuple[str, ...]
    cost: Cost | None
    box: Box

    def __repr__(self) -> str:
        n, m = len(self.states), sum(self.equations.values())
        return f"Report({self.name}: {n} States, {m} equations)"

    def __str__(self) -> str:
        from ._table import as_text

        return as_text(self)

    def __rich__(self) -> Any:
        from ._table import renderable

        return renderable(self)

    def _repr_html_(self) -> str:
        from ._table import as_html

        return as_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything as dicts, lists, strings and numbers, ready for `json.dumps`."""
        states = [
            {
                "path": use.path,
                "kind": use.kind,
                "name": use.name,
                "created_at": use.created_at,
                "shape": None if use.shape is None else list(use.shape),
                "dtype": use.dtype,
                "bytes": use.bytes,
                "becomes": use.becomes,
                "read": use.read,
                "written": use.written,
                "donated": use.donated,
                "arrays": [_leaf(leaf) for leaf in use.arrays],
            }
            for use in self.states
        ]
        return {
            "name": self.name,
            "states": states,
            "arguments": [_leaf(leaf) for leaf in self.arguments],
            "outputs": [_leaf(leaf) for leaf in self.outputs],
            "constants": [_leaf(leaf) for leaf in self.constants],
            "equations": dict(self.equations),
            "optimized": dict(self.optimized),
            "optimizations": list(self.optimizations),
            "effects": list(self.effects),
            "cost": None if self.cost is None else dataclasses.asdict(self.cost),
            "transforms": self.box.to_dict(),
        }

    def diagram(self, format: Literal["svg", "mermaid"] = "svg") -> str:
        """Draws the flow: States and arguments, the function, States and results.

        Transforms inside of the function are nested boxes.

        **Arguments:**

        - `format`: `"svg"`, which needs `statefun[diagram]` and shows in notebooks, or
            `"mermaid"`, text that GitHub and many documentation tools draw.
        """
        from . import _diagram, _mermaid

        if format == "mermaid":
            return _mermaid.mermaid(self)
        if format == "svg":
            return Svg(_diagram.svg(self))
        raise ValueError(f"`format` is {format!r}, but should be 'svg' or 'mermaid'.")


def _leaf(leaf: Leaf) -> dict[str, Any]:
    found = dataclasses.asdict(leaf)
    found["shape"] = None if leaf.shape is None else list(leaf.shape)
    return found


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def size(n: float) -> str:
    """A number of bytes, human-readable."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError
