"""All calls of one function: the look-up, the run, and the commit.

A call goes like this:

1. Its arguments are taken apart (`args`). What is static about them picks a `Site`.
2. The values of the States that the site's programs read are read as one snapshot.
   Their structures pick a `Compiled`: one `jax.jit`.
3. The `jax.jit` is called. Which compiled version runs is JAX's decision, made by its
   C++ cache from shapes, dtypes, shardings and configuration. Only where JAX misses does
   `Compiled._body` run: there the function is traced to a program.
4. The length of the result says which program it was (its `Trace`), and so which States
   were written. They are committed in one step, if nobody else has written them
   meanwhile; else the call runs again on the new values.

If a program reads States, or closes over arrays, that its `Compiled` doesn't have as
inputs, the site takes them up and the call is looked up again, with the program at hand:
the function is not traced twice. `Restart` says so; `Calls.run` is the one place that
catches it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np

from .. import _compat
from .._errors import StateValueError, foreign_write, message
from .._state import access
from .._state.access import local
from .._state.cell import Cell, Value, commit, in_turn, snapshot
from .._state.state import State
from .._trace import result, transaction
from .._trace.names import Parameters
from . import args as _args
from .compiled import Compiled, Options, Restart, Trace, constrain, present
from .keys import CacheKey
from .locks import TracingLock
from .plan import Plan, fits, with_forms
from .site import Site


class Observer:
    """Is told of every trace, and of what is forgotten. A call that hits tells nobody.

    This one does nothing. `statefun.inspect._retraces` puts one in its place
    (`Calls.observer`) that keeps the reasons of traces: code further down must not
    import from there.
    """

    def tracing(
        self, site: Site, dynamic: Sequence[Any], values: Mapping[Cell, Value]
    ) -> None:
        """A function is about to be traced; raising forbids it."""

    def traced(self, site: Site, trace: Trace) -> None:
        """It was traced."""

    def forgetting(self, calls: Calls, traces: Sequence[Trace], why: str) -> None:
        """Traces of a function are gone."""

    def dropping(self, site: Site) -> None:
        """So are all of a site, with something that they were about."""

    def history(self, calls: Calls) -> list[Any]:
        """Why the function was traced, oldest first."""
        return []


class Calls:
    """Calls one function, and owns all that was traced and compiled for it.

    At most `maxsize` traces are kept, the least recently used goes first. A call that
    hits only stamps its trace with the number of the call; which one is the oldest is
    found out when one has to go.
    """

    observer = Observer()

    def __init__(self, fun: Callable, options: Options, maxsize: int = 128):
        self.fun = fun
        self.options = options
        self.maxsize = maxsize
        self.lookups = 0
        self.misses = 0
        self.sites: dict[Any, Site] = {}
        self.plans: dict[Any, Plan] = {}  # of hot calls, see `fast`
        self.tracing = TracingLock()
        self.history: Any = None  # of its traces: the observer's
        # Of traces that went with a State of theirs: what that State was, by key.
        self.lost: dict[CacheKey, str] = {}
        self._traces: dict[Trace, None] = {}
        self.names = Parameters(fun)
        self._static = _args.StaticArguments(
            fun, options.static_argnums, options.static_argnames, options.bound
        )
        # Whether other arguments than arrays make hot calls.
        self.recalls = not self._static

    # -- looking up --

    def key(self, args: tuple, kwargs: dict) -> Any:
        """Equal for calls with the same static part."""
        if self._static:
            args, kwargs = self._static.mark(args, kwargs)
        return _args.split(args, kwargs, self.names)[-1]

    def site(self, args: tuple, kwargs: dict) -> tuple[Site, tuple, list[State]]:
        """Where a call belongs, its dynamic leaves, and its States."""
        if self._static:
            args, kwargs = self._static.mark(args, kwargs)
        return self._site(args, kwargs)

    def site_ahead(self, args: tuple, kwargs: dict) -> tuple[Site, tuple, list[State]]:
        """As `site`, for who only looks ahead: a `jax.ShapeDtypeStruct` is an array."""
        if self._static:
            args, kwargs = self._static.mark(args, kwargs)
        leaves, treedef = jtu.tree_flatten((args, kwargs))
        if not any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
            return self._site(args, kwargs)
        shapes = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                leaves[i] = np.empty(0)  # an array, whatever its shape and dtype
                shapes[id(leaves[i])] = leaf
        site, dynamic, states = self._site(*treedef.unflatten(leaves))
        return site, tuple(shapes.get(id(x), x) for x in dynamic), states

    def _site(self, args: tuple, kwargs: dict) -> tuple[Site, tuple, list[State]]:
        dynamic, states, key = _args.split(args, kwargs, self.names)
        site = self.sites.get(key)
        if site is None:
            _args.check_arguments(args[self.options.bound :], kwargs)
            parts = _args.flatten(args, kwargs)
            nested = _args.with_nested(states)
            signature = _args.Signature(*parts, self.names, states, nested)
            site = self.sites.setdefault(key, Site(self, key, signature))
        if states and site.closure:
            # Stand-ins would make two of a State that the function reaches by a name.
            pins = {
                i: state._cell
                for i, state in enumerate(states)
                if state._cell in site.closure
            }
            if pins:
                site = self.pinned(site, pins)
        return site, dynamic, states

    def pinned(self, base: Site, pins: Mapping[int, Cell]) -> Site:
        key = base.key, tuple(pins.items())
        site = self.sites.get(key)
        if site is None:
            new = Site(self, key, base.signature, base, pins)
            site = self.sites.setdefault(key, new)
        return site

    # -- running --

    def run(self, args: tuple, kwargs: dict) -> Any:
        """A call, wherever it is made."""
        if _compat.jit_disabled():
            return self.eager(args, kwargs)
        if local.frame is not None or not _compat.at_top_level():
            trace, leaves, states = self._looked_up(self._run_in_trace, args, kwargs)
            return trace.out.build(leaves, states)
        run = functools.partial(self._run, call=(args, kwargs))
        trace, leaves, states = self._looked_up(run, args, kwargs)
        return trace.build(leaves, states)

    def trace_ahead(self, args: tuple, kwargs: dict) -> tuple[Site, Compiled, Any]:
        """For a call that is made later: its site, what it runs, and JAX's trace of it."""

        def trace(site: Site, dynamic: Any, states: Any) -> tuple[Site, Compiled, Any]:
            if not site.traces:
                site.find(dynamic, states)
            values = [access.read(c) for c in site.cells_of(site.inputs, states)]
            values = site.to_stand_ins(site.inputs, values, states)
            compiled = site.compiled(tuple(structure for _, structure in values))
            arguments = compiled.arguments(dynamic, [flat for flat, _ in values])
            return site, compiled, compiled.jit.trace(*arguments)

        return self._looked_up(trace, args, kwargs, self.site_ahead)

    def run_ahead(
        self, site: Site, compiled: Compiled, args: tuple, kwargs: dict
    ) -> Any:
        """Runs what was compiled for `site`; nothing is traced or compiled."""

        def run(_: Site, dynamic: Any, states: Any) -> Any:
            return self._run(site, dynamic, states, compiled)

        trace, leaves, states = self._looked_up(run, args, kwargs)
        return trace.out.build(leaves, states)

    def find(
        self, args: tuple, kwargs: dict, trace: bool = True, ahead: bool = True
    ) -> tuple[Site, Trace | None, tuple, list[State]]:
        """The trace for these arguments, without a call; `ahead`: see `site_ahead`."""

        def find(site: Site, dynamic: Any, states: Any) -> Any:
            return site, site.find(dynamic, states, trace), dynamic, states

        return self._looked_up(
            find, args, kwargs, self.site_ahead if ahead else self.site
        )

    def _looked_up(
        self,
        act: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        look: Callable[..., Any] | None = None,
    ) -> Any:
        """Looks a call up and does something with it, again where that says so."""
        self.lookups += 1
        states, around = present.states, (local.frame, _compat.current_trace())
        try:
            return self._look_up(act, args, kwargs, look or self.site)
        except BaseException:
            present.states = states
            transaction.back_outside(*around)
            raise

    def _look_up(
        self,
        act: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        look: Callable[..., Any],
    ) -> Any:
        while True:
            site, dynamic, states = look(args, kwargs)
            try:
                with of_call(states):
                    return act(site, dynamic, states)
            except Restart:
                continue

    def _run(
        self,
        site: Site,
        dynamic: Sequence[Any],
        states: Sequence[State],
        fixed: Compiled | None = None,
        call: tuple[tuple, dict] | None = None,
    ) -> tuple[Trace, list[Any], Sequence[State]]:
        """A call outside of any transform; the next one like `call` may be a hot one.

        States whose buffers are given to XLA are taken meanwhile: nobody else may see
        them.
        """
        if not (fixed or site.traces):
            # On its first call the function is traced here and not inside `jax.jit`,
            # where what it needs would be found out too late.
            site.find(dynamic, states)
        inputs = fixed.cells if fixed else tuple(site.inputs)
        cells = site.cells_of(inputs, states)
        donated = fixed.donated if fixed else site.donated

        def run() -> tuple[Trace, list[Any], Compiled]:
            _, values = snapshot(cells)
            values = site.to_stand_ins(inputs, values, states)
            structures = tuple(structure for _, structure in values)
            if fixed is None:
                compiled = site.compiled(structures)
                if compiled.donated != donated:  # JAX's configuration has changed
                    raise Restart
            else:
                compiled = fixed
                refuse_other_structures(compiled, structures, cells)
            flats = [flat for flat, _ in values]
            del values  # a reference would keep what is donated from being reused
            results: list[Any] = []
            try:
                compiled.call(dynamic, flats, results)
                self._commit(site, compiled, states, cells, flats, results)
            except BaseException:
                # What was donated is gone: an interrupt that comes after that must not
                # keep the new values from taking its place.
                if donated and results:
                    self._commit(site, compiled, states, cells, flats, results)
                raise
            trace, leaves, _ = compiled.take_apart(results[0])
            return trace, leaves, compiled

        if donated:
            trace, leaves, compiled = in_turn([cells[i] for i in donated], run)
        else:
            trace, leaves, compiled = run()
        self._used(site, trace)
        if call is not None:
            self._plan(site, compiled, *call)
        return trace, leaves, states

    def _commit(
        self,
        site: Site,
        compiled: Compiled,
        states: Sequence[State],
        cells: Sequence[Cell],
        flats: Sequence[Any],
        results: Sequence[Any],
    ) -> None:
        trace, _, written = compiled.take_apart(results[0])
        targets = site.cells_of(compiled.written_cells(trace), states)
        writes = site.from_stand_ins(targets, written, states)
        # A program with effects must not run twice: for it, the last writer wins.
        compare = not (trace.effects or compiled.donated)
        seen = dict(zip(cells, flats, strict=True)) if compare else {}
        if writes and not commit(writes, seen):
            raise Restart

    def _plan(self, site: Site, compiled: Compiled, args: tuple, kwargs: dict) -> None:
        """Makes the next call like this one a hot one, if it can be."""
        if not compiled.simple or site.spares:
            return
        if site.signature.only_arrays and not kwargs:
            self.plans[len(args)] = Plan(site, compiled, ())
        if not self.recalls or not (args or kwargs):
            return
        known = _args.recall(args, kwargs)
        if known is None:
            return
        key, views = known[0], []
        # If the arguments are still what they were when the site was looked up.
        if with_forms(key, views) == site.key:
            structures = [s for view in views for s in view.structures]
            if fits(site, compiled, structures):
                self.plans[key] = Plan(site, compiled, structures)

    def _run_in_trace(
        self, site: Site, dynamic: Sequence[Any], states: Sequence[State]
    ) -> tuple[Trace, list[Any], Sequence[State]]:
        """A call inside another transform, statefun's or not."""
        trace = site.find(dynamic, states)
        assert trace is not None
        site.learn(trace)
        program = trace.program
        access.touch(site.cells_of(program.order, states))
        reads = [access.read(c) for c in site.cells_of(program.reads, states)]
        reads = site.to_stand_ins(program.reads, reads, states)
        values = dict(zip(program.reads, reads, strict=True))
        if program.closed_over_tracers:  # it goes with the trace around
            leaves, new = program(dynamic, values)
            written = list(new.values())
            if self.options.out_shardings is not None:
                leaves = constrain(leaves, program.out, self.options.out_shardings)
        else:
            compiled = site.compiled_in_trace(trace)
            flats = [flat for flat, _ in reads]
            # Plain `jax.jit`: the outermost call looks after runtime checks.
            out = compiled.jit(*compiled.arguments(dynamic, flats))
            trace, leaves, written = compiled.take_apart(out)
        targets = site.cells_of(trace.written, states)
        if local.frame is not None:
            local.frame.checks |= trace.may_fail
        elif targets:
            raise foreign_write(targets[0])
        access.write(site.from_stand_ins(targets, written, states))
        self._used(site, trace)
        return trace, leaves, states

    def eager(self, args: tuple, kwargs: dict) -> Any:
        """Runs the function without tracing it, with the same effect on States."""
        _args.check_arguments(args[self.options.bound :], kwargs)

        def run() -> Any:
            out = self.fun(*args, **kwargs)
            result.refuse_bare_state(out, "returned")
            return out

        return transaction.transaction(lambda: transaction.nested(run))

    # -- what is kept --

    def file(self, site: Site, trace: Trace) -> None:
        """Keeps a trace: a new one, or one that was evicted but is still compiled."""
        evicted = []
        if trace not in site.traces:
            site.traces.append(trace)
        trace.tick = self.lookups
        trace.filed = True
        while len(self._traces) >= self.maxsize:
            oldest = min(list(self._traces), key=lambda t: t.tick)
            self._unfile([oldest])
            evicted.append(oldest)
        self._traces[trace] = None
        self.lost.pop(trace.key, None)
        if evicted:
            self.observer.forgetting(self, evicted, "full")
            for other in list(self.sites.values()):
                if other.traces and other.evict(evicted) and other is not site:
                    self._remove(other)

    def _used(self, site: Site, trace: Trace) -> None:
        trace.tick = self.lookups
        temporary = trace.program.closed_over_tracers
        if not (trace.filed or temporary) and self.sites.get(site.key) is site:
            self.file(site, trace)

    def refile(self, trace: Trace) -> None:
        """A hot call has used a trace that was evicted."""
        for site in list(self.sites.values()):
            if trace.key == site.cache_key(trace.program.in_avals):
                self.file(site, trace)

    def drop(self, site: Site) -> None:
        """Something that the site's programs are about is gone. Takes no lock that JAX or
        the user's code may be waiting for: it may run at any moment."""
        if self.sites.get(site.key) is site:
            self.observer.dropping(site)
            for cell in site.gone()[:1]:
                self.lost.update((t.key, cell.describe()) for t in site.traces)
            while len(self.lost) > self.maxsize:
                self.lost.pop(next(iter(self.lost)), None)
            self._unfile(site.traces)
            self._remove(site)

    def _remove(self, site: Site) -> None:
        if self.sites.get(site.key) is site:
            self.sites.pop(site.key, None)
        self.plans.clear()

    def _unfile(self, traces: Sequence[Trace]) -> None:
        for trace in traces:
            self._traces.pop(trace, None)
            trace.filed = False

    def clear(self) -> None:
        """Forgets everything that was traced and compiled."""
        self.observer.forgetting(self, list(self._traces), "cleared")
        self._unfile(list(self._traces))
        self.sites.clear()
        self.plans.clear()
        self.lost.clear()
        self.lookups = self.misses = 0

    def all_traces(self) -> list[Trace]:
        return list(self._traces)

    def with_key(self, key: CacheKey) -> list[Trace]:
        """Newest first."""
        return [t for t in reversed(self.all_traces()) if t.key == key]

    def stats(self) -> dict[str, Any]:
        hits = self.lookups - self.misses
        return {
            "size": len(self._traces),
            "maxsize": self.maxsize,
            "hits": hits,
            "misses": self.misses,
            "hit_rate": hits / self.lookups if self.lookups else 0.0,
        }


@contextlib.contextmanager
def of_call(states: Sequence[State]) -> Iterator[None]:
    """While a call is under way: which States its arguments hold."""
    before = present.states
    try:
        present.states = states
        yield
    finally:
        present.states = before


def refuse_other_structures(
    compiled: Compiled, structures: Sequence[Any], cells: Sequence[Cell]
) -> None:
    """For a function that was compiled ahead of time."""
    expected = zip(cells, structures, compiled.structures, strict=True)
    misfits = [c for c, now, then in expected if now is not then]
    if misfits:
        raise StateValueError(
            message(
                "a function compiled ahead of time was called with a State of another "
                "structure: " + ", ".join(c.describe() for c in misfits),
                "it was compiled for values of one structure.",
                "lower and compile it again, or call the function itself.",
            )
        )
