"""One `jax.jit` of a function, and the values that go in beside the arguments."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp

from .._compat import jit_disabled
from .._state.cell import Cell, shared
from .._state.structure import ARRAY, Structure
from .._trace.result import OutTree
from .args import spread_prefix
from .cache import Record


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


class Restart(Exception):
    """The entry has learned something: call again with its new `Compiled`."""


class Eager(Exception):
    """`jax.disable_jit()` is on: the function itself is to run."""


@runtime_checkable
class Owner(Protocol):
    """What a `Compiled` needs of the entry that it belongs to."""

    dead: bool

    def record(self, dynamic: Sequence[Any], known: dict) -> Record: ...
    def learn(self, record: Record) -> bool: ...


class Inputs(NamedTuple):
    """What goes into a compiled function beside its dynamic arguments."""

    cells: tuple[Cell, ...]  # stand-ins for the States of arguments
    targets: tuple[Cell | int, ...]  # the States, or their positions in the arguments
    structures: tuple[Structure, ...]
    consts: tuple[Any, ...]
    donated: tuple[int, ...] = ()  # positions in `cells`
    donated_leaves: tuple[int, ...] = ()
    shardings: tuple[Any, ...] | None = None  # of the dynamic arguments
    may_fail: bool = False


class Compiled:
    """A `jax.jit`, for States of given structures.

    Its arguments are the dynamic leaves, the flat values of the States, the arrays that
    the function closes over, and, where something is donated, the leaves and values
    that are.
    """

    def __init__(self, entry: Owner, inputs: Inputs, options: Options):
        self._entry = entry
        self._inputs = inputs
        self._options = options
        self._const_index = {id(c): i for i, c in enumerate(inputs.consts)}
        targets = inputs.targets
        self.targets = targets
        self.own = [t for t in targets if isinstance(t, Cell)]
        # None if some are States of the arguments, another one in each call.
        self.cells = self.own if len(self.own) == len(targets) else None
        self.structures = inputs.structures
        self.consts = inputs.consts
        self.donated = inputs.donated
        # Of the programs compiled here: by how long the list is that a run gives back.
        self.records: dict[int, Record] = {}
        self.epoch = -1  # of `shared.structures`, when the structures last fitted

        # Whether nothing goes in but dynamic leaves and States, see `call.Fast`.
        self.simple = not (
            inputs.consts
            or inputs.donated
            or inputs.donated_leaves
            or inputs.may_fail
            or inputs.shardings is not None
        )

        def body(*arguments: Any) -> Any:
            if self.simple:  # one container less for JAX to take apart at every call
                *dynamic, flats = arguments
                arguments = dynamic, flats, (), (), ()
            return self._body(*arguments)

        body.__name__ = body.__qualname__ = options.name
        how: dict[str, Any] = {} if self.simple else {"donate_argnums": (3, 4)}
        if inputs.shardings is not None:
            kept, given = _split(inputs.shardings, inputs.donated_leaves)
            how["in_shardings"] = (kept, None, None, given, None)
        self.jit = jax.jit(body, **how)
        # Equinox turns the failure of a check into an error that can be read, and waits
        # for it, which has to be done before anything is committed.
        self._run = eqx.filter_jit(body) if inputs.may_fail else self.jit

    # -- calling --

    def accepts(self, cells: Sequence[Cell]) -> bool:
        """Whether the States have the structures that this was compiled for.

        To be called with the lock held under which their values are read.
        """
        fits = all(
            c.structure is s for c, s in zip(cells, self.structures, strict=True)
        )
        if fits and self.cells is not None:
            self.epoch = shared.structures
            if self._entry.dead:  # it may die at any moment, and then resets the epoch
                self.epoch = -1
        return fits

    def run_by(self, executable: Callable[..., Any]) -> Compiled:
        """The same, with an executable that was compiled ahead of time in its place."""
        fixed = copy.copy(self)
        fixed.epoch = -1
        fixed._run = executable
        if self._inputs.may_fail:
            fixed._run = lambda *args: jax.block_until_ready(executable(*args))
        return fixed

    def arguments(self, dynamic: Sequence[Any], flats: Sequence[Any]) -> tuple:
        """The arguments of `jit`: always the same containers, or it would retrace."""
        if self.simple:
            return *dynamic, flats
        kept, given = _split(dynamic, self._inputs.donated_leaves)
        kept_flats, given_flats = _split(flats, self.donated)
        return kept, kept_flats, self.consts, given, given_flats

    def call(self, dynamic: Sequence[Any], flats: list[Any]) -> Any:
        for i in self.donated:
            flats[i] = _copy_if_held(flats, i)
        if self._inputs.may_fail:
            dynamic = self._placed(dynamic)
        arguments = self.arguments(dynamic, flats)
        donates = self.donated or self._inputs.donated_leaves
        if not donates or self._options.donate.startswith("warn"):
            return self._run(*arguments)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Some donated buffers were not usable"
            )
            return self._run(*arguments)

    def _placed(self, dynamic: Sequence[Any]) -> Sequence[Any]:
        shardings = self._inputs.shardings
        if shardings is None:
            return dynamic
        return [
            x if s is None else jax.device_put(x, s)
            for x, s in zip(dynamic, shardings, strict=True)
        ]

    # -- tracing: runs where JAX misses --

    def _body(
        self, dynamic: Any, flats: Any, consts: Any, given: Any, given_flats: Any
    ) -> Any:
        if jit_disabled():
            raise Eager
        inputs = self._inputs
        dynamic = _merge(dynamic, given, inputs.donated_leaves)
        flats = _merge(flats, given_flats, self.donated)
        values = list(zip(flats, self.structures, strict=True))
        known = dict(zip(inputs.cells, values, strict=True))
        record = self._entry.record(dynamic, known)
        self._entry.learn(record)
        if not self._covers(record):
            raise Restart
        program = record.program
        closed_over = [consts[self._const_index[id(c)]] for c in program.consts]
        leaves, writes = program(dynamic, known, closed_over)
        if self._options.out_shardings is not None:
            leaves = _constrain(leaves, program.out, self._options.out_shardings)
        written = [flat for flat, _ in writes.values()]
        kept = [flats[i] for i in self.untouched(record)]
        return self._marked(record, [*leaves, *written, *kept])

    def _marked(self, record: Record, outputs: list[Any]) -> list[Any]:
        """The results, with so many times None that the length names the program.

        Which compiled version a call has run, and so which program, is JAX's affair. It
        takes a list with None apart and puts it together in C++, and keeps nothing of
        ours alive for it.
        """
        length = len(outputs)
        while self.records.setdefault(length, record) is not record:
            length += 1
        return outputs + [None] * (length - len(outputs))

    def taken_apart(self, out: list[Any]) -> tuple[Record, list[Any], list[Any]]:
        """What a run gave back: its program, the result's leaves, and the States'."""
        record = self.records[len(out)]
        n = record.n_out
        end = n + len(record.structures) + len(self.untouched(record))
        return record, out[:n], out[n:end]

    def _covers(self, record: Record) -> bool:
        """Whether everything that the program needs is an input here."""
        program, inputs = record.program, self._inputs
        return (
            all(cell in inputs.cells for cell in program.reads)
            and all(id(c) in self._const_index for c in program.consts)
            and (inputs.may_fail or not record.may_fail)
            and not (self.donated and record.effects)
        )

    def untouched(self, record: Record) -> list[int]:
        """Values that are donated, but not written by this program: they come back."""
        cells = self._inputs.cells
        return [i for i in self.donated if cells[i] not in record.program.writes]


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


def _constrain(leaves: list[Any], out: OutTree, shardings: Any) -> list[Any]:
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
