"""What `filter_custom_jvp` and `filter_custom_vjp` share.

A function and its rules become pure: the States that they read are arguments, those
that they write results. These are determined in two ways.

*On values.* Outside of a jaxpr JAX runs either the function or its rule, immediately
and on the values of the call, and so do the twins. A State whose value is concrete is
simply read. One that holds a tracer (of the `grad` or `vmap` around) must be an
argument; when such a State is read, it becomes one, and the call is repeated.

*Ahead.* In a jaxpr the rule runs later, when the jaxpr is differentiated, and can then
reach no State any more. So function and rule are traced at the call, to see what they
touch.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from .. import _compat
from .._compat import Tracer
from .._errors import StateTraceError, message
from .._state import access
from .._state.cell import Cell, Value, Values
from .._state.structure import Structure, leaves_of
from .._trace.frame import TracedFrame
from .._trace.nondiff import not_differentiated
from .._trace.program import Program
from .._trace.result import unpack
from ._twin import (
    Updates,
    run_pure,
    split_arrays,
    trace_body,
    transaction,
    values_of,
)

_log = logging.getLogger(__name__)


class CustomDerivative:
    """A function with a derivative of its own: base of the two twins."""

    def __init__(self, fn: Callable[..., Any]):
        self.fn = fn
        functools.update_wrapper(self, fn, updated=())

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @property
    def name(self) -> str:
        return getattr(self.fn, "__name__", repr(self.fn))

    def run(self, args: tuple, kwargs: dict) -> Any:
        return transaction(lambda: self._run(args, kwargs))

    def run_rule(self, args: tuple, kwargs: dict) -> Any:
        """Runs the rule as if everything were differentiated."""
        raise NotImplementedError

    def attempt(
        self, touched: Touched, fn: Callable[..., Any], args: tuple, kwargs: dict
    ) -> tuple[Any, Updates]:
        """Hands JAX the function and its rules: the result, and what was written.

        **Arguments:**

        - `touched`: the States, which are to be passed through.
        - `fn`: the function, or what stands for it.
        - `args`, `kwargs`: its arguments.
        """
        raise NotImplementedError

    def _run(self, args: tuple, kwargs: dict) -> Any:
        touched, fn = Touched(self.name), self.fn
        if _in_a_jaxpr():
            body, rule = self._ahead(args, kwargs)
            if body is not None:
                touched.expect(body, rule)
                fn = functools.partial(_replay, body)
        out, written = touched.retrying(
            lambda: self.attempt(touched, fn, args, kwargs),
            lambda: self._ahead(args, kwargs),
        )
        written.write()
        return unpack(out)

    def _ahead(self, args: tuple, kwargs: dict) -> tuple[Program | None, ...]:
        """The function and its rules, traced."""
        arrays, build = split_arrays((args, kwargs))
        return (
            ahead(self, "fn", lambda *x: _call(self.fn, *build(x)), arrays),
            ahead(self, "rule", lambda *x: self.run_rule(*build(x)), arrays),
        )


def _call(fn: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    return fn(*args, **kwargs)


def _replay(program: Program, /, *args: Any, **kwargs: Any) -> Any:
    """What the function did when it was traced, without running it again."""
    arrays, _ = split_arrays((args, kwargs))
    leaves, new = program(arrays, values_of(program.reads))
    access.write(new)
    return program.out.build(leaves)


def _in_a_jaxpr() -> bool:
    """Whether what runs now goes into a jaxpr, which may be differentiated later."""
    frame = access.local.frame
    while frame is not None:
        if isinstance(frame, TracedFrame):
            return True
        frame = frame.parent
    return _compat.makes_jaxpr()


class _Ahead(threading.local):
    """What is being traced ahead in this thread."""

    def __init__(self) -> None:
        self.running: set[Hashable] = set()


_ahead = _Ahead()


def ahead(
    owner: CustomDerivative, part: str, run: Callable[..., Any], arrays: Sequence[Any]
) -> Program | None:
    """Traces the function or a rule, to see which States it touches.

    None if that can't be done: because it wants concrete values, or insists on another
    pattern of what is differentiated. Then nothing is known ahead, and what is wrong,
    if anything is, shows when it runs. A rule that calls its own function would recurse
    forever, so it isn't traced a second time inside itself.
    """
    key = id(owner), part
    if key in _ahead.running:
        return None
    _ahead.running.add(key)
    try:
        return trace_body(run, arrays)
    except Exception as error:
        _log.debug("%s of %s was not traced ahead: %r", part, owner.name, error)
        return None
    finally:
        _ahead.running.discard(key)


class _Met(Exception):
    """A State was met that has to be an argument, and is none yet."""

    def __init__(self, by: Touched, cell: Cell):
        self.by = by
        self.cell = cell


class Touched:
    """The States that a function and its rules touch.

    They are arguments of what JAX gets, and their new values results of it. While the
    call goes on more may be found; a rule that JAX runs later has to make do with these.
    """

    def __init__(self, name: str):
        self._name = name
        self._values = Values()
        self._written: dict[Cell, Structure] = {}
        self._checks = False
        self._open = True

    def expect(self, *programs: Program | None) -> None:
        """Takes note of what has been traced ahead."""
        known = [p for p in programs if p is not None]
        for program in known:
            self._written.update(program.writes)
        reads = [cell for program in known for cell in program.reads]
        self._values = values_of(dict.fromkeys([*reads, *self._written]))
        self._checks = any(program.may_fail for program in known)

    def retrying(
        self,
        attempt: Callable[[], Any],
        look_ahead: Callable[[], Sequence[Program | None]],
    ) -> Any:
        """Makes the call, again if need be, until every State is known.

        The first one that is met is taken as a sign that there are more.
        """
        looked = False
        try:
            while True:
                try:
                    return attempt()
                except _Met as met:
                    if met.by is not self:
                        raise
                    programs = () if looked else look_ahead()
                    looked = True
                    cells = [c for p in programs if p is not None for c in p.reads]
                    new = [c for c in [met.cell, *cells] if c not in self._values]
                    self._values = Values(self._values | values_of(new))
        finally:
            self._open = False
            self._values = Values()  # JAX keeps the rules, and the rules this object

    def values(self) -> Values:
        """What the States hold, as arguments that must not be differentiated."""
        return not_differentiated(
            self._values, functools.partial(_differentiated, self._name)
        )

    def run(self, run: Callable[[], Any], inside: Values) -> tuple[Any, Updates]:
        """Runs the function or a rule: its result, and what the States hold then."""
        out, written = run_pure(
            run, inside, view=self._meet, sealed=not self._open, ends=True
        )
        new = written.values
        late = [c for c in new if c not in self._written]
        if late and not self._open:
            raise too_late(self._name, late[0], "wrote")
        # The same States whether function or rule runs: what is not written stays.
        held = {**inside, **new}
        kept = Values((c, held[c]) for c in dict.fromkeys([*self._written, *new]))
        return out, Updates(kept, frozenset(), self._checks or written.checks)

    def _meet(self, cell: Cell, value: Value) -> Value:
        if not self._open:
            raise too_late(self._name, cell, "read")
        if any(isinstance(x, Tracer) for x in leaves_of(*value)):
            raise _Met(self, cell)
        return value


def too_late(name: str, cell: Cell, what: str) -> StateTraceError:
    return StateTraceError(
        message(
            f"a rule of the custom derivative of {name} {what} "
            f"{cell.describe()}, which the function does not.",
            "JAX may run a rule long after the call, when its results can no longer "
            "reach the State: the States of a rule have to be known at the call. The "
            "backward rule can't write any.",
            "read or write the State in the function, too; write it in the function "
            "or the forward rule.",
        )
    )


def _differentiated(name: str, cell: Cell) -> StateTraceError:
    return StateTraceError(
        message(
            f"{cell.describe()} is read in {name}, which has a custom derivative, and "
            "was differentiated.",
            "the rule gives derivatives for the function's arguments only; that of the "
            "State would be silently zero.",
            "pass the State's value as an argument.",
        )
    )
