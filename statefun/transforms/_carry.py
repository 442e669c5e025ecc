"""What a loop carries: the user's carry, and the States that its body writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jec
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax

from .._state import access
from .._state.cell import Cell, Values
from .._state.static import static_key, treedef_key
from .._state.structure import Structure, leaves_of
from .._trace.names import Named
from .._trace.program import Program
from .._trace.result import refuse_bare_state
from ._entries import NO_ENTRIES, Entries
from ._twin import (
    jax_arrays,
    note_checks,
    split_arrays,
    trace_body,
    unchanged_types,
    values_of,
)


class Carry:
    """What goes around in a loop: the user's carry, and the States that are written.

    Its arrays change; everything else about it must stay the same.
    """

    def __init__(self, name: str, init: Any):
        self._name = name
        self.init = init
        self.arrays, self.build = split_arrays(init)

    def check(self, out: Any) -> list[Any]:
        """The arrays of what the body returned, if its structure is that of the
        input."""
        refuse_bare_state(out, "returned")
        if not _same_layout(self.init, out):
            raise TypeError(
                f"{self._name} body function carry input and carry output must have the "
                "same pytree structure and the same non-array leaves, but "
                f"{_difference(self.init, out)}."
            )
        return split_arrays(out)[0]

    def promote(self, given: Sequence[Any], returned: Sequence[Any]) -> bool:
        """Weakly typed inputs take the type that the body returns, as in `jax.lax`."""
        changed = False
        for i, (a, b) in enumerate(zip(given, returned, strict=True)):
            if getattr(a, "weak_type", False) and a.dtype != b.dtype:
                # The weakly typed array itself: a number is promoted to the array's
                # type.
                common = jnp.result_type(self.arrays[i], b.dtype)
                if common == b.dtype:
                    self.arrays[i] = lax.convert_element_type(self.arrays[i], b.dtype)
                    changed = True
        return changed

    def check_types(self, given: Sequence[Any], returned: Sequence[Any]) -> None:
        paths = [
            jtu.keystr(path)
            for path, leaf in jtu.tree_leaves_with_path(self.init)
            if eqx.is_array(leaf)
        ]
        for path, a, b in zip(paths, given, returned, strict=True):
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                raise TypeError(
                    f"{self._name} body function carry input and carry output must have "
                    f"equal types, but the input carry{path} has type {a.str_short()} "
                    f"and the output {b.str_short()}."
                )


def _same_layout(a: Any, b: Any) -> bool:
    if treedef_key(jtu.tree_structure(a)) != treedef_key(jtu.tree_structure(b)):
        return False
    pairs = zip(jtu.tree_leaves(a), jtu.tree_leaves(b), strict=True)
    return all(
        (eqx.is_array(x) and eqx.is_array(y))
        or (
            not eqx.is_array(x)
            and not eqx.is_array(y)
            and static_key(x) == static_key(y)
        )
        for x, y in pairs
    )


def _difference(a: Any, b: Any) -> str:
    if treedef_key(jtu.tree_structure(a)) != treedef_key(jtu.tree_structure(b)):
        return f"got {jtu.tree_structure(a)} and {jtu.tree_structure(b)}"
    for (path, x), y in zip(
        jtu.tree_leaves_with_path(a), jtu.tree_leaves(b), strict=True
    ):
        if not _same_layout(x, y):
            return f"at carry{jtu.keystr(path)} the input is {x!r} and the output {y!r}"
    return "they differ"


def trace_loop(
    name: str,
    carry: Carry,
    run: Callable[..., Any],
    rest: Sequence[Any],
    named: Named,
    view: Callable[..., Any],
) -> Program:
    """Traces a loop body `run(carry_arrays, *rest) -> (carry_arrays, anything)`."""
    n = len(carry.arrays)
    for attempt in (1, 2):
        program = trace_body(
            lambda *leaves: run(list(leaves[:n]), *leaves[n:]),
            [*carry.arrays, *rest],
            named,
            view,
        )
        given, returned = program.in_avals[:n], program.out_avals[:n]
        if attempt == 2 or not carry.promote(given, returned):
            break
    carry.check_types(given, returned)
    return program


def element(x: Any) -> Any:
    """What the body sees of an array that is scanned over."""
    aval = jax.typeof(x)
    return jec.mapped_aval(aval.shape[0], 0, aval)


def as_arrays(tree: Any) -> Any:
    """Python numbers become arrays, as `jax.lax` takes them, except inside modules."""

    def convert(x: Any) -> Any:
        return jnp.asarray(x) if isinstance(x, bool | int | float | complex) else x

    return jtu.tree_map(convert, tree, is_leaf=lambda x: isinstance(x, eqx.Module))


_NOTHING = Values()


class Loop:
    """A loop body as a program, and the States that it touches.

    Of some States each step has an entry of its own: they go with what is scanned over,
    and what is written to them with what the body returns beside the carry.
    """

    def __init__(
        self,
        name: str,
        carry: Carry,
        run: Callable[..., Any],
        rest: Sequence[Any],
        named: Named,
        entries: Entries = NO_ENTRIES,
    ):
        self.carry = carry
        self.program = trace_loop(name, carry, run, rest, named, entries.avals)
        self._entries = entries
        touched = {**self.program.reads, **self.program.writes}
        self._sliced = {c for c in touched if entries.axis_of(c) is not None}
        self.values = values_of(c for c in touched if c not in self._sliced)
        unchanged_types(name, self.program, self._avals_before())
        note_checks(self.program)

    def _avals_before(self) -> dict[Cell, tuple[Sequence[Any], Structure]]:
        """What a step finds in the States that it writes."""
        before = {}
        for cell in self.program.writes:
            value = self.values.get(cell) or access.current(cell)
            avals = self._entries.avals(cell, value)
            if avals is None:
                avals = [jax.typeof(x) for x in leaves_of(*value)]
            before[cell] = avals, value[1]
        return before

    @property
    def init(self) -> tuple[list[Any], Values]:
        """The arrays of the carry, and the written States that all steps share."""
        mine = (c for c in self.program.writes if c not in self._sliced)
        return self.carry.arrays, Values((c, self.values[c]) for c in mine)

    @property
    def entries(self) -> Values:
        """What the States hold that are read entry by entry, to be scanned over."""
        values = values_of(c for c in self.program.reads if c in self._sliced)
        return Values((c, self._entries.to_front(c, v)) for c, v in values.items())

    def step(
        self, loop: Any, rest: Sequence[Any], entries: Values = _NOTHING
    ) -> tuple[Any, tuple[list[Any], Values]]:
        """One iteration: the next carry, and beside it the arrays that the body returned
        and the entries that it wrote."""
        arrays, written = loop
        leaves, new = self.program([*arrays, *rest], self.values | written | entries)
        n = len(arrays)
        shared = Values((c, v) for c, v in new.items() if c not in self._sliced)
        sliced = Values((c, v) for c, v in new.items() if c in self._sliced)
        return (leaves[:n], shared), (leaves[n:], sliced)

    def finish(self, loop: Any, beside: Any = ((), _NOTHING)) -> tuple[Any, Any]:
        """Writes the States; the final carry, and what the body returned beside it."""
        (arrays, written), (beside, entries) = jax_arrays((loop, beside))
        whole = ((c, self._entries.from_front(c, v)) for c, v in entries.items())
        access.write(written | Values(whole))
        _, out = self.program.out.build([*arrays, *beside])
        return self.carry.build(arrays), out
