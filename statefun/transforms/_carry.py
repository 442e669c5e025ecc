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
from .._state.cell import Values
from .._state.static import static_key, treedef_key
from .._trace.names import Named
from .._trace.program import Program
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

    Its arrays change, everything else about it has to stay.
    """

    def __init__(self, name: str, init: Any):
        self._name = name
        self.init = init
        self.arrays, self.build = split_arrays(init)

    def check(self, out: Any) -> list[Any]:
        """The arrays of what the body returned, if it is like what it was given."""
        if not _same_layout(self.init, out):
            raise TypeError(
                f"{self._name} body function carry input and carry output must have the "
                "same pytree structure and the same leaves that are no arrays, but "
                f"{_difference(self.init, out)}."
            )
        return split_arrays(out)[0]

    def promote(self, given: Sequence[Any], returned: Sequence[Any]) -> bool:
        """Weakly typed inputs take the type that the body returns, as in `jax.lax`."""
        changed = False
        for i, (a, b) in enumerate(zip(given, returned, strict=True)):
            if getattr(a, "weak_type", False) and a.dtype != b.dtype:
                # Of the weakly typed array itself: a number gives way to an array.
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
) -> Program:
    """Traces a loop body `run(carry_arrays, *rest) -> (carry_arrays, anything)`."""
    n = len(carry.arrays)
    for attempt in (1, 2):
        program = trace_body(
            lambda *leaves: run(list(leaves[:n]), *leaves[n:]),
            [*carry.arrays, *rest],
            named,
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


class Loop:
    """A loop body as a program, and the States that it touches."""

    def __init__(
        self,
        name: str,
        carry: Carry,
        run: Callable[..., Any],
        rest: Sequence[Any],
        named: Named,
    ):
        self.carry = carry
        self.program = trace_loop(name, carry, run, rest, named)
        self.values = values_of({**self.program.reads, **self.program.writes})
        unchanged_types(name, self.program, self.values)
        note_checks(self.program)

    @property
    def init(self) -> tuple[list[Any], Values]:
        """The arrays of the carry, and the written States."""
        written = Values((c, self.values[c]) for c in self.program.writes)
        return self.carry.arrays, written

    def step(self, loop: Any, rest: Sequence[Any]) -> tuple[Any, list[Any]]:
        """One iteration: the next carry, and the arrays that the body returned beside."""
        arrays, written = loop
        leaves, new = self.program([*arrays, *rest], self.values | written)
        n = len(arrays)
        return (leaves[:n], new), leaves[n:]

    def finish(self, loop: Any, beside: Sequence[Any] = ()) -> tuple[Any, Any]:
        """Writes the States; the final carry, and what the body returned beside it."""
        (arrays, written), beside = jax_arrays((loop, beside))
        access.write(written)
        _, out = self.program.out.build([*arrays, *beside])
        return self.carry.build(arrays), out
