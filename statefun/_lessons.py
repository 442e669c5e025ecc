"""What is said of a State that was read, written or made where that can't work."""

from __future__ import annotations

from ._cell import Cell
from ._errors import StateTraceError, lesson

_TWINS = "`sf.filter_jit`, `sf.filter_grad`, `sf.filter_vmap`, `sf.scan`, …"


def foreign_read(cell: Cell) -> StateTraceError:
    return StateTraceError(
        lesson(
            f"{cell.describe()} was read inside a raw JAX transform.",
            "`jax.jit`, `eqx.filter_jit`, `jax.make_jaxpr` and the like trace the "
            "function once and keep what they saw: the State's value would be frozen into "
            "the compiled code, and later changes of the State would be ignored.",
            f"use the transform of the same name from statefun ({_TWINS}), or read the "
            "State outside and pass the value in.",
        )
    )


def foreign_write(cell: Cell) -> StateTraceError:
    return StateTraceError(
        lesson(
            f"{cell.describe()} was written inside a raw JAX transform.",
            "the value belongs to a JAX trace that statefun does not see (`jax.grad`, "
            "`jax.vmap`, `jax.jit`, `jax.lax.scan`, an `eqx.filter_…`): it would be "
            "stored as a tracer and be meaningless as soon as the transform ends.",
            f"use the transform of the same name from statefun ({_TWINS}): it takes the "
            "value out of the transform and writes it to the State.",
        )
    )


def foreign_creation(cell: Cell) -> StateTraceError:
    return StateTraceError(
        lesson(
            f"{cell.describe()} was given a tracer inside a raw JAX transform.",
            "a State created there would hold a tracer, which is meaningless as soon as "
            "the transform ends.",
            f"use the transform of the same name from statefun ({_TWINS}): States that "
            "the function creates and returns in a module come out with their values.",
        )
    )


def mutated(cell: Cell) -> StateTraceError:
    return StateTraceError(
        lesson(
            f"the value of {cell.describe()} was changed in place inside a trace.",
            "`.value` puts the value together anew, so a change to one of its lists or "
            "dicts would be lost.",
            "assign the new value: `v = dict(state.value); v['k'] = x; state.value = v`.",
        )
    )
