"""The exceptions of statefun, and how they speak about a State.

Every message has the same four parts: what happened, to which State (name, path, where
it was created), why, and what to write instead. Tests match the first line.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._state.cell import Cell


class StateError(Exception):
    """Base class of the errors that are about a State.

    Errors that Python has a class for (a wrong type, a wrong value) are raised as
    `StateTypeError` and `StateValueError`, which are also a `TypeError` and a
    `ValueError`.
    """


class StateTraceError(StateError, RuntimeError):
    """A State was read or written where JAX's tracing makes that impossible."""


class StateTypeError(StateError, TypeError):
    """A State was used where it can't be used, or given a value of the wrong type."""


class StateValueError(StateError, ValueError):
    """A State's value doesn't fit: another structure, shape or dtype was expected."""


_SKIPPED = ("statefun", "equinox", "jax", "jaxtyping", "beartype", "dataclasses")


def caller(made: object = None) -> str:
    """`file:line` of the nearest frame that is the user's.

    **Arguments:**

    - `made`: an object under construction: the `__init__`s of its subclasses are
        skipped.
    """
    frame = inspect.currentframe()
    assert frame is not None, "this Python has no frames"
    while frame.f_back is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        code = frame.f_code
        # The `__init__` of a dataclass is made from a string.
        generated = code.co_filename.startswith("<") and code.co_name == "__init__"
        own = (
            code.co_name == "__init__"
            and code.co_argcount > 0
            and frame.f_locals.get(code.co_varnames[0]) is made
        )
        if package not in _SKIPPED and not generated and not own:
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def message(what: str, why: str, instead: str) -> str:
    """The text of an error: what happened, why, and what to write instead."""
    return f"{what}\n\nWhy: {why}\n\nInstead: {instead}"


# -- a State read, written or made where that can't work ------------------------------

_TWINS = "`sf.filter_jit`, `sf.filter_grad`, `sf.filter_vmap`, `sf.scan`, …"


def foreign_read(cell: Cell) -> StateTraceError:
    """For a read inside a raw transform that keeps what it saw."""
    return StateTraceError(
        message(
            f"{cell.describe()} was read inside a raw JAX transform.",
            "`jax.jit`, `eqx.filter_jit`, `jax.make_jaxpr` and the like trace the "
            "function once and keep what they saw: the State's value would be frozen into "
            "the compiled code, and later changes of the State would be ignored.",
            f"use the transform of the same name from statefun ({_TWINS}), or read the "
            "State outside and pass the value in.",
        )
    )


def escaped_tracer(cells: Collection[Cell]) -> StateTraceError:
    """For a tracer that a program refers to when every trace around it has ended.

    **Arguments:**

    - `cells`: the States that were read inside raw transforms.
    """
    read = ", ".join(cell.describe() for cell in cells)
    what = f"the value of {read}" if read else "a value"
    return StateTraceError(
        message(
            f"{what} was used outside of the transform that it is traced by.",
            "a raw `jax.custom_jvp`, `jax.custom_vjp` or one of Equinox runs its function "
            "outside of the derivative that is taken, unless it is one with respect to "
            "its arguments; and a tracer that was stored somewhere is meaningless when "
            "its transform has ended.",
            "`sf.filter_custom_jvp` and `sf.filter_custom_vjp`, which know of States; or "
            "pass the State's value as an argument.",
        )
    )


def foreign_write(cell: Cell) -> StateTraceError:
    """For a write inside a raw transform, whose value would be a tracer."""
    return StateTraceError(
        message(
            f"{cell.describe()} was written inside a raw JAX transform.",
            "the value belongs to a JAX trace that statefun does not see (`jax.grad`, "
            "`jax.vmap`, `jax.jit`, `jax.lax.scan`, an `eqx.filter_…`): it would be "
            "stored as a tracer and be meaningless as soon as the transform ends.",
            f"use the transform of the same name from statefun ({_TWINS}): it takes the "
            "value out of the transform and writes it to the State. For "
            "`optax.microbatch` that is `sf.filter_grad(…, microbatch=…)`.",
        )
    )


def foreign_creation(cell: Cell) -> StateTraceError:
    """For a State that is created with a tracer inside a raw transform."""
    return StateTraceError(
        message(
            f"{cell.describe()} was given a tracer inside a raw JAX transform.",
            "a State created there would hold a tracer, which is meaningless as soon as "
            "the transform ends.",
            f"use the transform of the same name from statefun ({_TWINS}): States that "
            "the function creates and returns in a module come out with their values.",
        )
    )


def wrong_type(cell: Cell, error: TypeError) -> StateTypeError:
    """For a number that doesn't fit the dtype of the array it would replace."""
    return StateTypeError(
        message(
            f"a value of the wrong type was written to {cell.describe()}: {error}.",
            "a Python number that is written takes the dtype of the array it replaces, "
            "and must not lose its value by it.",
            "write an array of the dtype that you want: `jnp.asarray(value)`.",
        )
    )


def left_behind(cell: Cell) -> StateTraceError:
    """For a State that a traced function made and kept elsewhere than in its result."""
    return StateTraceError(
        message(
            f"{cell.describe()} was created inside a traced function, which left it "
            "somewhere else than in its result (a list or dict, an attribute, a closure).",
            "the function is traced once, and the State has a value only while it is: "
            "what runs from then on neither reads nor writes it.",
            "create the State outside of the function, or return the `eqx.Module` that "
            "holds it: every call then returns a new State with its value.",
        )
    )


def mutated(cell: Cell) -> StateTraceError:
    """For a value that was changed in place inside a trace."""
    return StateTraceError(
        message(
            f"the value of {cell.describe()} was changed in place inside a trace.",
            "`.value` is rebuilt from its arrays, so a change to one of its lists, dicts "
            "or objects would be lost.",
            "assign the new value: `v = state.value`, change `v`, `state.value = v`.",
        )
    )
