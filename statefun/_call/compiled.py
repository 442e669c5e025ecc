"""One `jax.jit` of a function, for States of given structures."""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from .._compat import checks_results, jit_disabled
from .._state.cell import Cell, Value, Values
from .._state.structure import ARRAY, Structure
from .._trace.program import Program
from .._trace.result import OutTree
from . import modules
from .args import spread_prefix


class Options(NamedTuple):
    """How a function is to be traced and compiled."""

    name: str = "fun"
    static_argnums: tuple[int, ...] = ()
    static_argnames: tuple[str, ...] = ()
    axis_env: Any = None
    ir_optimizations: tuple[str, ...] = ()
    donate: str = "none"
    donate_states: bool = False
    in_shardings: Any = None
    out_shardings: Any = None
    jit_options: tuple[tuple[str, Any], ...] = ()  # further arguments of `jax.jit`
    # How many arguments, the first, are the function itself: a module that is called.
    # All that the user says about arguments is about those that follow.
    bound: int = 0


class Restart(Exception):
    """The call has to be looked up again: something was learned, or has changed."""


class Trace:
    """A program, and what a call needs to know about it.

    `tick` and `filed` belong to the `Calls` that it is filed in; all else is fixed.
    """

    def __init__(self, program: Program, key: Any, configuration: Any):
        self.program = program
        self.key = key
        self.configuration = configuration
        self.n_out = program.n_out
        self.out = program.out
        # The result is None, or the first array, or built.
        self.result = 0 if program.out.is_none else 1 if program.out.is_array else 2
        self.written = tuple(program.writes)
        self.structures = tuple(program.writes.values())
        self.may_fail = program.may_fail
        self.effects = bool(program.jaxpr.effects)
        # Whether no write can change a structure that is known to be in place.
        self.keeps_structures = all(
            program.reads.get(c) is s for c, s in program.writes.items()
        )
        self.tick = 0
        self.filed = False
        self._modules: tuple[modules.Adoption, ...] | None = None  # in the result
        # Where each State of the program is among those of the arguments, if it is; and
        # the arguments that it was traced with, weakly: a cache must not keep a model
        # alive.
        self.positions: tuple[int | None, ...] = ()
        self.arguments: tuple[Callable[[], Any], ...] = ()

    def build(self, arrays: Sequence[Any], states: Sequence[Any]) -> Any:
        """The result of a call at top level, whose modules may be the next arguments."""
        out = self.out.build(arrays, states)
        if not self.out.packed:
            if self._modules is None:
                self._modules = modules.adoptions(out)
            if self._modules:
                modules.adopt(out, self._modules, arrays)
        return out


class _Present(threading.local):
    states: Sequence[Any] | None = None


present = _Present()
"""The States among the arguments of the call that is under way in this thread; None on
the hot path, on which nothing is traced. Set by `Calls`."""


class Compiled:
    """A `jax.jit`, for States of given structures.

    Its arguments are the dynamic leaves, the flat values of the States, the arrays that
    the function closes over, and, where something is donated, the leaves and values
    that are.

    **Arguments:**

    - `find`: `find(dynamic, values) -> Trace`, called where JAX misses. Has whatever the
        trace needs taken up by the `Site`, and raises `Restart` if that is not an input
        here.
    - `cells`: the States that go in; stand-ins for those of the arguments.
    - `structures`: theirs.
    - `consts`: arrays that the function closes over.
    - `donated`, `donated_leaves`: positions in `cells` and in the dynamic leaves.
    - `shardings`: of the dynamic leaves.
    - `may_fail`: whether a run may raise, and so has to be waited for.
    """

    def __init__(
        self,
        find: Callable[[Compiled, Sequence[Any], Values], Trace],
        options: Options,
        cells: Sequence[Cell],
        structures: Sequence[Structure],
        consts: Sequence[Any],
        donated: Sequence[int] = (),
        donated_leaves: Sequence[int] = (),
        shardings: Sequence[Any] | None = None,
        may_fail: bool = False,
    ):
        self._find = find
        self._options = options
        self._shardings = shardings
        self._donated_leaves = donated_leaves
        self.cells = cells
        self.structures = structures
        self.consts = consts
        self.donated = donated
        self.may_fail = may_fail
        self._const_index = {id(c): i for i, c in enumerate(consts)}
        # Of the traces compiled here: by how long the list is that a run gives back.
        self.traces: dict[int, Trace] = {}
        # Whether nothing goes in but dynamic leaves and States, see `fast`.
        self.simple = not (
            consts or donated or donated_leaves or may_fail or shardings is not None
        )

        def body(*arguments: Any) -> Any:
            if self.simple:  # one container less for JAX to take apart at every call
                *dynamic, flats = arguments
                arguments = dynamic, flats, (), (), ()
            return self._body(*arguments)

        body.__name__ = body.__qualname__ = options.name
        how: dict[str, Any] = {} if self.simple else {"donate_argnums": (3, 4)}
        if shardings is not None:
            kept, given = _split(shardings, donated_leaves)
            how["in_shardings"] = (kept, None, None, given, None)
        more = dict(options.jit_options)
        self.jit = jax.jit(body, **how, **more)
        # Equinox turns the failure of a check into an error that can be read, and waits
        # for it, which has to be done before anything is committed.
        self._run = eqx.filter_jit(body, **more) if may_fail else self.jit

    # -- calling --

    def run_by(self, executable: Callable[..., Any]) -> Compiled:
        """The same, with an executable that was compiled ahead of time in its place."""
        fixed = copy.copy(self)
        fixed._run = executable
        if self.may_fail:
            fixed._run = lambda *args: jax.block_until_ready(executable(*args))
        return fixed

    def arguments(self, dynamic: Sequence[Any], flats: Sequence[Any]) -> tuple:
        """The arguments of `jit`: always the same containers, or it would retrace."""
        if self.simple:
            return *dynamic, flats
        kept, given = _split(dynamic, self._donated_leaves)
        kept_flats, given_flats = _split(flats, self.donated)
        return kept, kept_flats, self.consts, given, given_flats

    def call(
        self, dynamic: Sequence[Any], flats: list[Any], results: list[Any]
    ) -> None:
        """Runs it, and puts what it gives back in `results`: in one step with the run, so
        that it is there whenever an exception from outside arrives."""
        spare = checks_results()  # here only with an executable made before it was on
        for i in self.donated:
            flats[i] = _copied(flats[i]) if spare else _copy_if_held(flats, i)
        if self.may_fail:
            dynamic = self._placed(dynamic)
        arguments = self.arguments(dynamic, flats)
        donates = self.donated or self._donated_leaves
        with warnings.catch_warnings() if donates else contextlib.nullcontext():
            if donates and not self._options.donate.startswith("warn"):
                warnings.filterwarnings(
                    "ignore", message="Some donated buffers were not usable"
                )
            results.extend(itertools.starmap(self._run, (arguments,)))

    def _placed(self, dynamic: Sequence[Any]) -> Sequence[Any]:
        if self._shardings is None:
            return dynamic
        return [
            x if s is None else jax.device_put(x, s)
            for x, s in zip(dynamic, self._shardings, strict=True)
        ]

    def take_apart(self, out: list[Any]) -> tuple[Trace, list[Any], list[Value]]:
        """What a run gave back: its trace, the result's leaves, and for each of
        `written_cells` the value."""
        trace = self.traces[len(out)]
        untouched = self._untouched(trace)
        end = trace.n_out + len(trace.structures)
        values = list(zip(out[trace.n_out : end], trace.structures, strict=True))
        rest = out[end : end + len(untouched)]
        values += [
            (x, self.structures[i]) for i, x in zip(untouched, rest, strict=True)
        ]
        return trace, out[: trace.n_out], values

    def written_cells(self, trace: Trace) -> list[Cell]:
        return [*trace.written, *(self.cells[i] for i in self._untouched(trace))]

    def _untouched(self, trace: Trace) -> list[int]:
        """Values that are donated, but not written by this program: they come back."""
        return [i for i in self.donated if self.cells[i] not in trace.program.writes]

    # -- tracing: runs where JAX misses --

    def _body(
        self, dynamic: Any, flats: Any, consts: Any, given: Any, given_flats: Any
    ) -> Any:
        if jit_disabled() or present.states is None:
            raise Restart
        dynamic = _merge(dynamic, given, self._donated_leaves)
        flats = _merge(flats, given_flats, self.donated)
        values = Values(
            zip(self.cells, zip(flats, self.structures, strict=True), strict=True)
        )
        trace = self._find(self, dynamic, values)
        program = trace.program
        closed_over = [consts[self._const_index[id(c)]] for c in program.consts]
        leaves, writes = program(dynamic, values, closed_over)
        if self._options.out_shardings is not None:
            leaves = constrain(leaves, program.out, self._options.out_shardings)
        written = [flat for flat, _ in writes.values()]
        kept = [flats[i] for i in self._untouched(trace)]
        return self._marked(trace, [*leaves, *written, *kept])

    def covers(self, trace: Trace) -> bool:
        """Whether everything that the program needs is an input here."""
        program = trace.program
        return (
            all(cell in self.cells for cell in program.reads)
            and all(id(c) in self._const_index for c in program.consts)
            and (self.may_fail or not trace.may_fail)
            and not (self.donated and trace.effects)
        )

    def _marked(self, trace: Trace, outputs: list[Any]) -> list[Any]:
        """The results, with so many times None that the length names the program.

        Which compiled version a call has run, and so which program, is JAX's affair. It
        takes a list with None apart and puts it together in C++, and keeps nothing of
        ours alive for it. A dict with a key for the program cost 6 % of a call at one
        State and 11 % at ten, the length at most 2 %.
        """
        length = len(outputs)
        while self.traces.setdefault(length, trace) is not trace:
            length += 1
        return outputs + [None] * (length - len(outputs))


def _split(items: Sequence[Any], positions: Sequence[int]) -> tuple[list, list]:
    chosen = set(positions)
    kept = [x for i, x in enumerate(items) if i not in chosen]
    return kept, [items[i] for i in positions]


def _merge(kept: Sequence[Any], given: Sequence[Any], positions: Sequence[int]) -> list:
    """The inverse of `_split`, also where nothing was split off."""
    merged = list(kept)
    for i, x in zip(positions, given, strict=bool(given)):
        merged.insert(i, x)
    return merged


def constrain(leaves: list[Any], out: OutTree, shardings: Any) -> list[Any]:
    """The arrays of a result, with the shardings that the user asked for."""
    tree = out.treedef.unflatten(range(len(out.leaves)))
    spread = spread_prefix(shardings, tree)
    chosen = [s for s, leaf in zip(spread, out.leaves, strict=True) if leaf is ARRAY]
    return [
        x if s is None else jax.lax.with_sharding_constraint(x, s)
        for x, s in zip(leaves, chosen, strict=True)
    ]


# -- donation: whose arrays are they? -----------------------------------------------


def _copy_if_held(flats: list[Any], i: int) -> Any:
    """The flat value, with a copy of each array that somebody else holds a reference to.

    A donated array is deleted; one that the user has kept (`old = state.value`), that a
    second State shares or another call is using must not be.
    """
    flat = flats[i]
    if type(flat) is not list:
        return jnp.copy(flat) if sys.getrefcount(flat) > _REFERENCES[0] else flat
    if sys.getrefcount(flat) > _REFERENCES[1]:
        return [jnp.copy(x) for x in flat]
    return [jnp.copy(x) if sys.getrefcount(x) > _REFERENCES[2] else x for x in flat]


def _copied(flat: Any) -> Any:
    return jax.tree.map(jnp.copy, flat)


def _calibrate() -> tuple[int, int, int]:
    """The counts that the same code sees for a value nobody else holds."""
    cell = Cell(object, None, "")
    counts = []
    for make in (lambda: object(), lambda: [object()]):
        cell.flat = make()
        flats = [cell.flat]
        flat = flats[0]
        counts.append(sys.getrefcount(flat))
    counts += [sys.getrefcount(x) for x in flats[0]]
    return counts[0], counts[1], counts[2]


_REFERENCES = _calibrate()
