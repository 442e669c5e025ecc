"""`cond` and `switch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.tree_util as jtu
from jax import lax

from .._errors import StateValueError, message
from .._state import access
from .._state.cell import Cell, Value, Values
from .._state.static import static_key, treedef_key
from .._state.structure import ARRAY, LEAF, Structure, leaves_of
from .._trace.names import named
from .._trace.program import Program
from .._trace.result import OutTree, Reference
from ._carry import as_arrays
from ._eager import answering_for, compiled_when_eager
from ._twin import jax_arrays, note_checks, split_arrays, trace_body, values_of


class _Branches:
    """The branches as programs, with one set of States that they all write."""

    def __init__(self, name: str, branches: Sequence[Callable], operands: tuple):
        self._branches = branches
        self.operands, build = split_arrays(operands)
        self.programs = [
            trace_body(
                lambda *x, b=b: as_arrays(b(*build(x))),
                self.operands,
                named(b, operands),
            )
            for b in branches
        ]
        note_checks(*self.programs)
        self._check_results(name)
        self._written: dict[Cell, Structure] = {}
        for program in self.programs:
            self._written.update(program.writes)
        # In a branch that doesn't write it a State keeps what it holds.
        kept = [
            c for c in self._written if any(c not in p.writes for p in self.programs)
        ]
        reads = [c for program in self.programs for c in program.reads]
        self._values = values_of(dict.fromkeys([*reads, *kept]))
        self._check_states(name, kept)

    def pure(self) -> list[Callable[..., Any]]:
        """The branches as functions of the operands' arrays."""

        def of(program: Program, branch: Callable) -> Callable[..., Any]:
            def run(arrays: Sequence[Any]) -> Any:
                leaves, new = program(arrays, self._values)
                held = self._values | new
                return leaves, Values((c, held[c]) for c in self._written)

            run.__wrapped__ = branch  # type: ignore[attr-defined]  # errors name it
            return run

        return [of(p, b) for p, b in zip(self.programs, self._branches, strict=True)]

    def finish(self, out: Any) -> Any:
        """Writes the States; the result."""
        leaves, written = jax_arrays(out)
        access.write(written)
        return self.programs[0].out.build(leaves)

    def _check_results(self, name: str) -> None:
        first = self.programs[0].out
        for i, program in enumerate(self.programs[1:], start=1):
            if not _same_layout(first, program.out):
                raise TypeError(
                    f"the branches of `{name}` must return the same structure, with the "
                    "same non-array leaves, but branch 0 returns "
                    f"{_show(first)} and branch {i} {_show(program.out)}."
                )

    def _check_states(self, name: str, kept: Sequence[Cell]) -> None:
        for cell in self._written:
            sources: list[tuple[str, Structure, Sequence[Any]]] = [
                (f"branch {i}", p.writes[cell], p.written_avals(cell))
                for i, p in enumerate(self.programs)
                if cell in p.writes
            ]
            if cell in kept:
                value = self._values[cell]
                sources.append(("the State, before,", value[1], _avals(value)))
            (who, s, avals), *others = sources
            for other, t, more in others:
                if s is not t or _types(avals) != _types(more):
                    raise StateValueError(
                        message(
                            f"the branches of `{name}` leave different values in "
                            f"{cell.describe()}: {who} has {_describe(s, avals)} and "
                            f"{other} {_describe(t, more)}.",
                            "whichever branch runs, what comes out has one structure, "
                            "shape and dtype. A branch that doesn't write the State "
                            "leaves what it held.",
                            "write a value of the same kind in every branch.",
                        )
                    )


def _avals(value: Value) -> list[Any]:
    return [jax.typeof(x) for x in leaves_of(*value)]


def _types(avals: Sequence[Any]) -> list[Any]:
    return [(a.shape, a.dtype) for a in avals]


def _describe(structure: Structure, avals: Sequence[Any]) -> str:
    if structure is LEAF:
        return avals[0].str_short()
    return f"{structure.treedef} of {', '.join(a.str_short() for a in avals)}"


def _same_layout(a: OutTree, b: OutTree) -> bool:
    if treedef_key(a.treedef) != treedef_key(b.treedef):
        return False
    pairs = zip(a.leaves, b.leaves, strict=True)
    return all(x is y or _key(x) == _key(y) for x, y in pairs)


def _key(leaf: Any) -> Any:
    return leaf.cell if type(leaf) is Reference else static_key(leaf)


def _show(out: OutTree) -> str:
    leaves = ["*" if leaf is ARRAY else leaf for leaf in out.leaves]
    return str(jtu.tree_unflatten(out.treedef, leaves))


@compiled_when_eager
def _cond(pred: Any, true_fun: Callable, false_fun: Callable, operands: tuple) -> Any:
    branches = _Branches("cond", (true_fun, false_fun), operands)
    return branches.finish(lax.cond(pred, *branches.pure(), branches.operands))


@compiled_when_eager
def _switch(index: Any, branches: tuple[Callable, ...], operands: tuple) -> Any:
    traced = _Branches("switch", branches, operands)
    return traced.finish(lax.switch(index, traced.pure(), traced.operands))


_NO_OPERAND: Any = object()


@answering_for(_cond)
def cond(
    pred: Any,
    true_fun: Callable[..., Any],
    false_fun: Callable[..., Any],
    *operands: Any,
    operand: Any = _NO_OPERAND,
) -> Any:
    """As `jax.lax.cond`, for branches that read and write States.

    A State that one branch writes and the other doesn't keeps its value in the other.

    **Arguments:**

    - `pred`: a boolean or a number, a scalar.
    - `true_fun`, `false_fun`: the branches.
    - `operands`: their arguments; non-array leaves are passed as they are.
    - `operand`: their argument, by name, if there is one.

    **Returns:** the result of the branch that ran. Non-array leaves must be the same in
    both.

    **Raises:** `TypeError` if the branches return different structures or types;
    `statefun.StateValueError` if they leave different kinds of value in a State.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        clipped = sf.State(jnp.array(0))

        def clip(x):
            clipped.value += 1
            return jnp.ones_like(x)

        sf.cond(jnp.array(3.0) > 1, clip, lambda x: x, jnp.array(3.0))
        ```
    """
    if operand is not _NO_OPERAND:
        if operands:
            raise TypeError("`operand` and positional operands can't both be given.")
        operands = (operand,)
    return _cond(as_arrays(pred), true_fun, false_fun, as_arrays(operands))


@answering_for(_switch)
def switch(
    index: Any,
    branches: Sequence[Callable[..., Any]],
    *operands: Any,
    operand: Any = _NO_OPERAND,
) -> Any:
    """As `jax.lax.switch`, for branches that read and write States.

    **Arguments:**

    - `index`: an integer scalar, clamped to the number of branches.
    - `branches`: at least one function.
    - `operands`, `operand`: as of [`statefun.cond`][].

    **Returns:** and **Raises:** as [`statefun.cond`][].

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        used = sf.State(jnp.zeros(3))

        def branch(i):
            def run(x):
                used.value = used.value.at[i].add(1)
                return x * i
            return run

        sf.switch(jnp.array(2), [branch(i) for i in range(3)], jnp.array(3.0))
        ```
    """
    if operand is not _NO_OPERAND:
        if operands:
            raise TypeError("`operand` and positional operands can't both be given.")
        operands = (operand,)
    if not all(callable(b) for b in branches):
        raise TypeError("`switch`: the branches have to be callable.")
    if len(branches) == 0:
        raise ValueError("`switch` needs at least one branch.")
    return _switch(as_arrays(index), tuple(branches), as_arrays(operands))
