"""`filter_custom_jvp` and `filter_custom_vjp`.

The function and its rules become pure: the States that they read are arguments, those
that they write results. Which ones there are has to be known before JAX runs a rule,
which may be much later, when a jaxpr is differentiated; so function and forward rule are
both traced when the function is called.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
from jax.custom_derivatives import SymbolicZero

from .. import _frame
from .._errors import StateTraceError, lesson
from .._frame import Cell, Value
from .._program import Program
from .._structure import Structure
from ._thread import (
    evaluate,
    note_checks,
    split_arrays,
    threaded,
    trace_body,
    transaction,
    values_of,
)

_log = logging.getLogger(__name__)


class _Touched:
    """The States that a function and its rules read and write."""

    def __init__(self, name: str, program: Program, rule: Program | None):
        self._name = name
        programs = [program] if rule is None else [program, rule]
        self.written: dict[Cell, Structure] = {}
        for p in programs:
            self.written.update(p.writes)
        reads = [cell for p in programs for cell in p.reads]
        self.values = values_of(dict.fromkeys([*reads, *self.written]))

    def flats(self) -> list[Any]:
        """What the States hold, as arguments that must not be differentiated."""
        flats = [flat for flat, _ in self.values.values()]
        return _not_differentiated(self._name, list(self.values), flats)

    def inside(self, flats: Sequence[Any]) -> dict[Cell, Value]:
        pairs = zip(self.values.items(), flats, strict=True)
        return {cell: (flat, s) for (cell, (_, s)), flat in pairs}

    def run(
        self, run: Callable[[], Any], flats: Sequence[Any], may_write: bool = True
    ) -> tuple[Any, list[Any]]:
        """Runs a rule: its result, and what the written States hold then."""
        inside = self.inside(flats)
        out, written = threaded(run, inside, view=self._unknown, sealed=True)
        for cell in written.cells:
            if cell not in self.written or not may_write:
                raise self._late(cell, "wrote")
        new = dict(zip(written.cells, written.flats, strict=True))
        return out, [new.get(c, inside[c][0]) for c in self.written]

    def finish(self, flats: Sequence[Any]) -> None:
        pairs = zip(self.written.items(), flats, strict=True)
        _frame.write({cell: (flat, s) for (cell, s), flat in pairs})

    def _unknown(self, cell: Cell, _: Value) -> Value:
        raise self._late(cell, "read")

    def _late(self, cell: Cell, what: str) -> StateTraceError:
        return StateTraceError(
            lesson(
                f"a rule of the custom derivative of {self._name} {what} "
                f"{cell.describe()}, which the function does not.",
                "JAX may run a rule long after the call, when its results can no longer "
                "reach the State: the States of a rule have to be known at the call. The "
                "backward rule can't write any.",
                "read or write the State in the function, too; write it in the function "
                "or the forward rule.",
            )
        )


def _not_differentiated(
    name: str, cells: Sequence[Cell], flats: list[Any]
) -> list[Any]:
    """The values, such that differentiating with respect to them raises."""

    @jax.custom_jvp
    def identity(flats: list[Any]) -> list[Any]:
        return flats

    def rule(primals: Any, tangents: Any) -> Any:
        ((flats,), (tangents,)) = primals, tangents
        for cell, tangent in zip(cells, tangents, strict=True):
            leaves = jtu.tree_leaves(tangent, is_leaf=_is_zero)
            if not all(map(_is_zero, leaves)):
                raise StateTraceError(
                    lesson(
                        f"{cell.describe()} is read in {name}, which has a custom "
                        "derivative, and was differentiated.",
                        "the rule gives derivatives for the function's arguments only; "
                        "that of the State would be silently zero.",
                        "pass the State's value as an argument.",
                    )
                )
        return flats, tangents

    identity.defjvp(rule, symbolic_zeros=True)
    return identity(flats)


def _is_zero(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


class _Discovering(threading.local):
    """The functions whose rules are being traced ahead in this thread."""

    def __init__(self) -> None:
        self.functions: set[int] = set()


_discovering = _Discovering()


def _discover(
    owner: Any, run: Callable[..., Any], arrays: Sequence[Any]
) -> Program | None:
    """Traces a rule to find the States it touches.

    The rule is given a tangent for every inexact array, though a real call may have some
    that are not differentiated. A rule that insists on such a pattern can't be traced in
    this way: it may then touch the States of the function itself, and is refused any
    other when it runs. The same holds for a call of the function by its own rule.
    """
    functions = _discovering.functions
    if id(owner) in functions:
        return None
    functions.add(id(owner))
    try:
        return trace_body(run, arrays)
    except Exception as error:
        name = owner.fn.__name__
        _log.debug("the rule of %s was not traced ahead: %r", name, error)
        return None
    finally:
        functions.discard(id(owner))


class filter_custom_jvp:
    """As `equinox.filter_custom_jvp`, for functions that read and write States.

    States that the function or its rule reads are inputs that are not differentiated;
    States that the rule writes are written when it runs in place of the function.

    **Arguments:**

    - `fn`: the function. Returns arrays.

    **Raises:** `statefun.StateTraceError` when one differentiates with respect to a State
    that is read in there.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        calls = sf.State(jnp.array(0))

        @sf.filter_custom_jvp
        def clip(x):
            calls.value += 1
            return jnp.clip(x, -1, 1)

        @clip.def_jvp
        def clip_jvp(primals, tangents):
            return clip(*primals), tangents[0]  # straight through

        sf.filter_grad(clip)(jnp.array(3.0))
        ```
    """

    def __init__(self, fn: Callable[..., Any]):
        self.fn = fn
        self._rule: Callable[..., Any] | None = None
        functools.update_wrapper(self, fn, updated=())

    def def_jvp(self, fn_jvp: Callable[..., Any]) -> Callable[..., Any]:
        """Sets the rule: `(primals, tangents, **kwargs) -> (out, tangent_out)`.

        A tangent is None where nothing is differentiated.
        """
        self._rule = fn_jvp
        return fn_jvp

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return transaction(lambda: self._run(args, kwargs))

    def _run(self, args: tuple, kwargs: dict) -> Any:
        rule = self._rule
        name = self.fn.__name__
        if rule is None:
            raise AttributeError(f"No JVP defined for {name}: use `def_jvp`.")
        arrays, build = split_arrays((args, kwargs))
        program = trace_body(lambda *x: _call(self.fn, build(x)), arrays)
        note_checks(program)

        def ahead(*x: Any) -> Any:
            args, kwargs = build(x)
            return rule(args, eqx.filter(args, eqx.is_inexact_array), **kwargs)

        touched = _Touched(name, program, _discover(self, ahead, arrays))

        def pure(arrays: list, consts: list, flats: list) -> Any:
            leaves, new = evaluate(program, arrays, touched.inside(flats), consts)
            held = touched.inside(flats)
            return leaves, [(new.get(c) or held[c])[0] for c in touched.written]

        custom = eqx.filter_custom_jvp(pure)

        def pure_jvp(primals: Any, tangents: Any) -> Any:
            (arrays, _, flats), (t_arrays, t_consts, _) = primals, tangents
            if any(t is not None for t in t_consts):
                raise ValueError(
                    f"{name} has a custom derivative and closes over a value that is "
                    "differentiated: pass it as an argument."
                )
            args, kwargs = build(arrays)
            t_args, t_kwargs = _tangents(build, t_arrays, len(arrays))
            if jtu.tree_leaves(t_kwargs):
                raise ValueError("Received keyword tangent")
            (out, t_out), held = touched.run(
                lambda: rule(args, t_args, **kwargs), flats
            )
            leaves, _ = split_arrays(out)
            t_leaves = jtu.tree_structure(out).flatten_up_to(t_out)
            t_leaves = [
                t
                for t, x in zip(t_leaves, jtu.tree_leaves(out), strict=True)
                if eqx.is_array(x)
            ]
            nothing = jtu.tree_map(lambda _: None, held)
            return (leaves, held), (t_leaves, nothing)

        custom.def_jvp(pure_jvp)
        leaves, held = custom(arrays, list(program.consts), touched.flats())
        touched.finish(held)
        return program.out.build(leaves)


def _call(fn: Callable[..., Any], arguments: tuple[tuple, dict]) -> Any:
    args, kwargs = arguments
    return fn(*args, **kwargs)


def _tangents(build: Callable, tangents: Sequence[Any], n: int) -> Any:
    """The tangents in the structure of the arguments, None for all that has none."""
    marks = [object() for _ in range(n)]
    by_mark = {id(m): t for m, t in zip(marks, tangents, strict=True)}
    return jtu.tree_map(lambda x: by_mark.get(id(x)), build(marks))


class filter_custom_vjp:
    """As `equinox.filter_custom_vjp`, for functions that read and write States.

    States that the function or its rules read are inputs that are not differentiated;
    States that the forward rule writes are written when it runs in place of the function.
    The backward rule sees them as they were at the call, and can't write any.

    **Arguments:**

    - `fn`: the function; its first argument is differentiated.

    **Raises:** `statefun.StateTraceError` when one differentiates with respect to a State
    that is read in there.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        scale = sf.State(jnp.array(2.0))

        @sf.filter_custom_vjp
        def f(x):
            return jnp.sin(x)

        @f.def_fwd
        def fwd(perturbed, x):
            return jnp.sin(x), None

        @f.def_bwd
        def bwd(residuals, grad, perturbed, x):
            return scale.value * grad * jnp.cos(x)

        sf.filter_grad(f)(jnp.array(0.0))
        ```
    """

    def __init__(self, fn: Callable[..., Any]):
        self.fn = fn
        self.fn_fwd: Callable[..., Any] | None = None
        self.fn_bwd: Callable[..., Any] | None = None
        functools.update_wrapper(self, fn, updated=())

    def def_fwd(self, fn_fwd: Callable[..., Any]) -> Callable[..., Any]:
        """Sets the forward rule: `(perturbed, vjp_arg, *args) -> (out, residuals)`."""
        self.fn_fwd = fn_fwd
        return fn_fwd

    def def_bwd(self, fn_bwd: Callable[..., Any]) -> Callable[..., Any]:
        """Sets the backward rule:
        `(residuals, grad_out, perturbed, vjp_arg, *args) -> grad_vjp_arg`."""
        self.fn_bwd = fn_bwd
        return fn_bwd

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __call__(self, vjp_arg: Any, /, *args: Any, **kwargs: Any) -> Any:
        return transaction(lambda: self._run(vjp_arg, args, kwargs))

    def _run(self, vjp_arg: Any, args: tuple, kwargs: dict) -> Any:
        name = self.fn.__name__
        fwd, bwd = self.fn_fwd, self.fn_bwd
        if fwd is None or bwd is None:
            raise RuntimeError(f"`def_fwd` or `def_bwd` not yet called for {name}")
        arrays, build = split_arrays(((vjp_arg, *args), kwargs))
        program = trace_body(lambda *x: _call(self.fn, build(x)), arrays)
        note_checks(program)
        everything = jtu.tree_map(eqx.is_inexact_array, vjp_arg)

        def ahead(*x: Any) -> Any:
            (vjp_arg, *args), kwargs = build(x)
            return fwd(everything, vjp_arg, *args, **kwargs)

        def both(*x: Any) -> Any:
            (vjp_arg, *args), kwargs = build(x)
            out, residuals = fwd(everything, vjp_arg, *args, **kwargs)
            grad = eqx.filter(out, eqx.is_inexact_array)
            return bwd(residuals, grad, everything, vjp_arg, *args, **kwargs)

        rules = _discover(self, both, arrays) or _discover(self, ahead, arrays)
        touched = _Touched(name, program, rules)
        custom = eqx.filter_custom_vjp(functools.partial(_pure_vjp, program, touched))

        def pure_fwd(
            perturbed: Any,
            vjp_arg: Any,
            args: Any,
            kwargs: Any,
            consts: Any,
            flats: Any,
        ) -> Any:
            (out, residuals), held = touched.run(
                lambda: fwd(perturbed, vjp_arg, *args, **kwargs), flats
            )
            return (out, held), residuals

        def pure_bwd(
            residuals: Any,
            grad: Any,
            perturbed: Any,
            vjp_arg: Any,
            args: Any,
            kwargs: Any,
            consts: Any,
            flats: Any,
        ) -> Any:
            grad_out, _ = grad
            grad_arg, _ = touched.run(
                lambda: bwd(residuals, grad_out, perturbed, vjp_arg, *args, **kwargs),
                flats,
                may_write=False,
            )
            return grad_arg

        custom.def_fwd(pure_fwd)
        custom.def_bwd(pure_bwd)
        out, held = custom(vjp_arg, args, kwargs, list(program.consts), touched.flats())
        touched.finish(held)
        return out


def _pure_vjp(
    program: Program,
    touched: _Touched,
    vjp_arg: Any,
    args: Any,
    kwargs: Any,
    consts: Any,
    flats: Any,
) -> Any:
    arrays, _ = split_arrays(((vjp_arg, *args), kwargs))
    held = touched.inside(flats)
    leaves, new = evaluate(program, arrays, held, consts)
    return program.out.build(leaves), [
        (new.get(c) or held[c])[0] for c in touched.written
    ]
