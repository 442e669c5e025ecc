"""A traced function: a pure jaxpr, the States it reads and writes, its output's layout.

`trace` runs a function under a `TracedFrame` inside `jax.make_jaxpr`. Every State that
the function reads shows up in the jaxpr as a `state_read` equation; `lift` removes these
and makes their results inputs. What comes out is a `Program`: a value, pure, that any
transform can hand to JAX.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jec
import jax.tree_util as jtu

from . import _compat, _frame
from ._cell import Cell, Value, Values
from ._compat import Tracer
from ._errors import StateTypeError, lesson
from ._frame import TracedFrame
from ._state import Shell, State
from ._structure import ARRAY, Structure, TreeDef, flat_of, flatten, leaves_of

# -- what a function returns --------------------------------------------------------


class Packed(eqx.Module):
    """In a result, the place of a State that the function made: its value, a subtree.

    Transforms see the arrays (vmap stacks them), and every run makes its own State.
    """

    value: Any
    shell: Shell = eqx.field(static=True)
    index: int = eqx.field(static=True)  # among the new States, so that sharing is kept


@dataclasses.dataclass(frozen=True)
class Argument:
    """In a result, the place of a State that came in as a leaf of an argument."""

    index: int


class Reference:
    """The place of a State in something that is cached: held weakly.

    A cache must not keep a State alive; its owner notices when it is gone.
    """

    __slots__ = ("_state", "cell")

    def __init__(self, state: State):
        self.cell = state._cell
        self._state = weakref.ref(state)

    def __call__(self) -> State:
        state = self._state()
        assert state is not None, "what refers to a State that is gone is not used"
        return state


def pack(
    out: Any, created: Container[Cell], arg_index: Mapping[Cell, int] | None = None
) -> Any:
    """A result with its new States taken apart: a tree that JAX can work on.

    **Arguments:**

    - `out`: what the function returned.
    - `created`: the States that were made while it ran.
    - `arg_index`: the stand-ins for the States of the arguments, by position.
    """
    made: dict[Cell, Packed] = {}

    def replace(leaf: Any) -> Any:
        if not isinstance(leaf, State):
            return leaf
        cell = leaf._cell
        if arg_index is not None and cell in arg_index:
            return Argument(arg_index[cell])
        if cell not in created:
            return leaf
        if cell in made:  # its value comes with the first occurrence
            return Packed(None, leaf._shell(), made[cell].index)
        made[cell] = Packed(None, leaf._shell(), len(made))
        flat, structure = _frame.current(cell)
        value = jtu.tree_map(replace, structure.unflatten(flat))
        return Packed(value, leaf._shell(), made[cell].index)

    return jtu.tree_map(replace, out)


def unpack(tree: Any, arg_states: Sequence[Any] = ()) -> Any:
    """The inverse of `pack`: makes new States."""
    made: dict[int, State] = {}

    def replace(leaf: Any) -> Any:
        if type(leaf) is Argument:
            return arg_states[leaf.index]
        if type(leaf) is Reference:
            return leaf()
        if type(leaf) is Packed:
            if leaf.index not in made:
                made[leaf.index] = leaf.shell.state(*flatten(inside(leaf.value)))
            return made[leaf.index]
        return leaf

    def inside(tree: Any) -> Any:
        return jtu.tree_map(replace, tree, is_leaf=lambda x: type(x) is Packed)

    return inside(tree)


_LEAF = jtu.tree_structure(0)
_NONE = jtu.tree_structure(None)


@dataclasses.dataclass(frozen=True)
class OutTree:
    """How a result is put together from the arrays that the jaxpr returns."""

    treedef: TreeDef
    leaves: tuple  # ARRAY, or a static leaf
    only_arrays: bool
    packed: bool  # whether there is anything to unpack

    @property
    def is_array(self) -> bool:
        return self.only_arrays and self.treedef == _LEAF

    @property
    def is_none(self) -> bool:
        return self.treedef == _NONE

    def cells(self) -> list[Cell]:
        """The States that were there before and are part of the result."""
        return [leaf.cell for leaf in self.leaves if type(leaf) is Reference]

    def build(self, arrays: Sequence[Any], arg_states: Sequence[Any] = ()) -> Any:
        if self.only_arrays:
            tree = self.treedef.unflatten(arrays)
        else:
            rest = iter(arrays)
            tree = self.treedef.unflatten(
                [next(rest) if leaf is ARRAY else leaf for leaf in self.leaves]
            )
        return unpack(tree, arg_states) if self.packed else tree


def flatten_out(
    out: Any, created: Container[Cell], arg_index: Mapping[Cell, int] | None = None
) -> tuple[list[Any], OutTree]:
    """Splits a function's result into arrays and layout. Arguments as of `pack`."""
    leaves = jtu.tree_leaves(out)
    has_states = any(isinstance(leaf, State) for leaf in leaves)
    packed = pack(out, created, arg_index) if has_states else out
    leaves, treedef = jtu.tree_flatten(packed)
    arrays = [leaf for leaf in leaves if eqx.is_array(leaf)]
    spec = tuple(
        ARRAY
        if eqx.is_array(leaf)
        else Reference(leaf)
        if isinstance(leaf, State)
        else leaf
        for leaf in leaves
    )
    return arrays, OutTree(treedef, spec, len(arrays) == len(leaves), has_states)


def bare_state(tree: Any, path: str = "") -> tuple[str, State] | None:
    """The first State that is `tree` itself or sits in its plain tuples, lists, dicts."""
    if isinstance(tree, State):
        return path, tree
    if type(tree) in (tuple, list):
        items = [(f"[{i}]", x) for i, x in enumerate(tree)]
    elif type(tree) is dict:
        items = [(f"[{k!r}]", x) for k, x in tree.items()]
    else:
        return None
    for key, x in items:
        found = bare_state(x, path + key)
        if found is not None:
            return found
    return None


def refuse_bare_state(tree: Any, role: str) -> None:
    found = bare_state(tree)
    if found is None:
        return
    path, state = found
    raise StateTypeError(
        lesson(
            f"{state._cell.describe()} was {role}{f' at `{path}`' if path else ''}.",
            "a State is not data that flows through a function: the function reads and "
            "writes it in place.",
            "use the State through the function's closure or as a leaf of an "
            "`eqx.Module` argument; pass and return `state.value` where the value is "
            "meant.",
        )
    )


_CALLBACKS = {"pure_callback", "io_callback"}


# -- programs -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A traced function.

    The inputs of `closed` are the dynamic leaves of the arguments, then the arrays of
    the States in `reads`; its outputs are the arrays of the result, then those of the
    States in `writes`. A program holds no tracer, unless the function closed over one;
    `closed_over_tracers` says so, and such a program must not outlive the trace.
    """

    closed: jec.ClosedJaxpr
    order: tuple[Cell, ...]  # all States, by first access
    reads: dict[Cell, Structure]
    writes: dict[Cell, Structure]
    out: OutTree
    in_avals: tuple  # of the arguments
    read_avals: dict[Cell, tuple]
    n_out: int  # arrays of the result

    @property
    def jaxpr(self) -> Any:
        return self.closed.jaxpr

    @property
    def consts(self) -> Sequence[Any]:
        return self.closed.consts

    def without_consts(self) -> Program:
        """The same, for what it closes over to be given when it is evaluated."""
        nothing = [None] * len(self.consts)
        return dataclasses.replace(self, closed=_compat.close(self.jaxpr, nothing))

    @property
    def closed_over_tracers(self) -> bool:
        return any(isinstance(c, Tracer) for c in self.consts)

    @property
    def may_fail(self) -> bool:
        """Whether running it may raise: a callback may, and `eqx.error_if` is one."""
        return bool(primitives_of(self.jaxpr) & _CALLBACKS)

    def written_avals(self, cell: Cell) -> tuple:
        written = unflatten_values(self.out_avals[self.n_out :], self.writes)
        return tuple(leaves_of(*written[cell]))

    def __call__(
        self,
        dynamic: Sequence[Any],
        values: Mapping[Cell, Value],
        consts: Sequence[Any] | None = None,
    ) -> tuple[list[Any], Values]:
        """Pure: the arrays of the result, and what the written States hold then."""
        consts = self.consts if consts is None else consts
        reads = [x for cell in self.reads for x in leaves_of(*values[cell])]
        return self.split(_compat.eval_jaxpr(self.jaxpr, consts, *dynamic, *reads))

    @property
    def out_avals(self) -> list[Any]:
        return [v.aval for v in self.jaxpr.outvars]

    @property
    def read_avals_flat(self) -> list[Any]:
        return [aval for cell in self.reads for aval in self.read_avals[cell]]

    def reads_with_avals(self) -> Iterator[tuple[Cell, Structure, tuple]]:
        for cell, structure in self.reads.items():
            yield cell, structure, self.read_avals[cell]

    def avals(self, cell: Cell) -> tuple:
        """Of the incoming value if it is read, else of the written one."""
        if cell in self.reads:
            return self.read_avals[cell]
        return self.written_avals(cell)

    def misfit(self, cell: Cell, flat: Any, structure: Structure) -> str | None:
        """Why a value can't stand in for the one that was traced; None if it can."""
        traced = self.reads[cell]
        if structure is not traced:
            return f"its structure is {structure}, and {traced} was traced"
        avals = [jax.typeof(x) for x in leaves_of(flat, structure)]
        for path, new, old in zip(
            structure.paths(), avals, self.read_avals[cell], strict=True
        ):
            if (new.shape, new.dtype) != (old.shape, old.dtype):
                at = f"the array at `{path}`" if path else "the array"
                return f"{at} is {new.str_short()}, and {old.str_short()} was traced"
        return None

    def unflatten_reads(self, leaves: Sequence[Any]) -> Values:
        return unflatten_values(leaves, self.reads)

    def split(self, outputs: Sequence[Any]) -> tuple[list[Any], Values]:
        """The outputs of the jaxpr as the result's arrays and the States' new values."""
        return list(outputs[: self.n_out]), unflatten_values(
            outputs[self.n_out :], self.writes
        )


def unflatten_values(
    arrays: Sequence[Any], structures: Mapping[Cell, Structure]
) -> Values:
    values, start = Values(), 0
    for cell, structure in structures.items():
        stop = start + len(structure.slots)
        values[cell] = flat_of(arrays[start:stop], structure), structure
        start = stop
    return values


def trace(
    run: Callable[..., Any],
    dynamic: Sequence[Any],
    *,
    known: Mapping[Cell, Value] | None = None,
    arg_index: Mapping[Cell, int] | None = None,
    axis_env: Any = None,
) -> Program:
    """Traces `run(*dynamic)`, once, to a `Program`.

    **Arguments:**

    - `run`: takes the dynamic leaves one by one and returns any pytree.
    - `dynamic`: arrays, or anything else `jax.make_jaxpr` takes.
    - `known`: values that stand in for those of the States they belong to.
    - `arg_index`: the stand-ins for States of arguments, by position.
    - `axis_env`: as in `jax.make_jaxpr`.

    **Raises:** `TypeError` if a State is returned bare or in a plain container.
    """
    frame = TracedFrame(known)
    found: dict[str, Any] = {}

    def flat(*leaves: Any) -> list[Any]:
        with frame:
            out = run(*leaves)
            refuse_bare_state(out, "returned")
            arrays, found["out"] = flatten_out(out, frame.created, arg_index)
            found["n_out"] = len(arrays)
            mine = [c for c in frame.order if c in frame.writes]
            writes = {c: frame.writes[c] for c in mine if c not in frame.created}
            found["reads"] = {c: v[1] for c, v in frame.reads.items()}
            found["writes"] = {c: v[1] for c, v in writes.items()}
            for values in (writes, frame.reads):
                for value in values.values():
                    arrays.extend(leaves_of(*value))
            return arrays

    with _frame.trace_context():
        closed = jax.make_jaxpr(flat, axis_env=axis_env)(*dynamic)
    n_reads = sum(len(s.slots) for s in found["reads"].values())
    closed, probes = lift(closed, n_reads)
    # A probe marks each read inside a raw transform. Those that are not at the top level
    # of the jaxpr are in one that the transform has made, and that JAX keeps. Transforms
    # that keep nothing (grad, vmap) leave theirs at the top level.
    if frame.probes != len(set(probes)):
        _frame.forget_inner_traces()
    return Program(
        closed=closed,
        order=tuple(c for c in frame.order if c not in frame.created),
        in_avals=tuple(v.aval for v in closed.jaxpr.invars[: len(dynamic)]),
        read_avals=frame.avals,
        **found,
    )


def lift(closed: jec.ClosedJaxpr, n_reads: int) -> tuple[jec.ClosedJaxpr, list[int]]:
    """Makes the reads of States inputs of the jaxpr.

    **Arguments:**

    - `closed`: a jaxpr with `state_read` equations at its top level, whose last
        `n_reads` outputs are the results of these (which also keeps JAX from dropping
        the names of results that nothing uses).

    **Returns:** the jaxpr without these equations and outputs, its inputs extended by
    their results; and the tokens of the probes found.
    """
    jaxpr = closed.jaxpr
    keep = len(jaxpr.outvars) - n_reads
    kept, probes = [], []
    for eqn in jaxpr.eqns:
        if eqn.primitive is _frame.state_probe_p:
            probes.append(eqn.params["token"])
        elif eqn.primitive is not _frame.state_read_p:
            kept.append(eqn)
    lifted = jaxpr.replace(
        eqns=kept,
        constvars=jaxpr.constvars,
        invars=[*jaxpr.invars, *jaxpr.outvars[keep:]],
        outvars=jaxpr.outvars[:keep],
    )
    return _compat.close(lifted, closed.consts), probes


# -- questions to a jaxpr -----------------------------------------------------------


def primitives_of(jaxpr: Any) -> set[str]:
    """The names of all primitives in a jaxpr, sub-jaxprs included."""
    names: set[str] = set()
    todo, seen = [jaxpr], set()
    while todo:
        jaxpr = todo.pop()
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        if id(jaxpr) in seen:
            continue
        seen.add(id(jaxpr))
        for eqn in jaxpr.eqns:
            names.add(eqn.primitive.name)
            todo.extend(jec.jaxprs_in_params(eqn.params))
    return names
