"""`filter_jit` beside `jax.jit`, `eqx.filter_jit` and other libraries with state."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

import statefun as sf

from . import _transformer as net
from ._harness import (
    OURS,
    Contender,
    Effort,
    Row,
    Samples,
    calls,
    first_calls,
    process_figures,
)

PURE = "jax.jit, flat list"
EQUINOX = "eqx.filter_jit"


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _threaded(fun: Callable[..., tuple], *values: Any) -> Contender:
    """A pure function whose results are its next arguments."""

    def call() -> None:
        nonlocal values
        values = fun(*values)

    return Contender(call, lambda: jtu.tree_leaves(values[0])[0])


class _Plain:
    """An object with an attribute."""

    def __init__(self, value: jax.Array):
        self.value = value


def _eager(peers: bool) -> Mapping[str, Contender]:
    def contender(holder: Any) -> Contender:
        def call() -> None:
            holder.value = holder.value + 1

        return Contender(call, lambda: holder.value)

    zero = jnp.zeros((), int)  # not weakly typed, which a State would make of it
    return {
        OURS: contender(sf.State(zero)),
        "a plain attribute": contender(_Plain(zero)),
    }


# -- many scalars -------------------------------------------------------------------


def _scalars(n: int) -> list[jax.Array]:
    return [jnp.array(float(i)) for i in range(n)]


def _all_plus_one(values: list[Any]) -> list[Any]:
    return [x + 1 for x in values]


def _sum_into_first(values: list[Any]) -> list[Any]:
    total = values[0]
    for x in values[1:]:
        total = total + x
    return [total]


def _scalar_states(
    n: int, work: Callable[[list], list]
) -> Callable[[bool], Mapping[str, Contender]]:
    """N scalars go in; `work` gives new values of the first ones, the others stay."""

    def build(peers: bool) -> Mapping[str, Contender]:
        states = [sf.State(x) for x in _scalars(n)]

        @sf.filter_jit
        def step() -> None:
            _assign(states, work([s.value for s in states]))

        @jax.jit
        def pure(values: list) -> tuple[list]:
            new = work(values)
            return ([*new, *values[len(new) :]],)

        found = {
            OURS: Contender(step, lambda: states[0].value),
            PURE: _threaded(pure, _scalars(n)),
        }
        if peers:
            found[EQUINOX] = _threaded(eqx.filter_jit(pure.__wrapped__), _scalars(n))
            found |= _nnx_scalars(n, work) if _has("flax") else {}
            found |= _brainstate_scalars(n, work) if _has("brainstate") else {}
        return found

    return build


def _assign(cells: list[Any], values: list[Any]) -> None:
    for cell, value in zip(cells, values, strict=False):
        cell.value = value


def _nnx_scalars(n: int, work: Callable[[list], list]) -> Mapping[str, Contender]:
    from flax import nnx

    class Holder(nnx.Module):
        def __init__(self) -> None:
            self.cells = nnx.List([nnx.Variable(x) for x in _scalars(n)])

    def step(holder: Holder) -> None:
        new = work([cell[...] for cell in holder.cells])
        for cell, value in zip(holder.cells, new, strict=False):
            cell[...] = value

    def contender(call: Callable[[], Any], holder: Holder) -> Contender:
        return Contender(call, lambda: holder.cells[0][...])

    one, other = Holder(), Holder()
    jitted = nnx.jit(step)
    return {
        "nnx.jit": contender(lambda: jitted(one), one),
        "nnx.cached_partial": contender(
            nnx.cached_partial(nnx.jit(step), other), other
        ),
    }


def _brainstate_scalars(
    n: int, work: Callable[[list], list]
) -> Mapping[str, Contender]:
    import brainstate

    cells = [brainstate.State(x) for x in _scalars(n)]

    @brainstate.transform.jit
    def step() -> None:
        _assign(cells, work([cell.value for cell in cells]))

    return {"brainstate": Contender(step, lambda: cells[0].value)}


# -- a training step ----------------------------------------------------------------


def _flat_advance() -> tuple[Callable[..., tuple], list[jax.Array], jax.Array]:
    """The step for `jax.jit` with the arrays of model and optimizer in one list."""
    model, opt_state, tokens = net.start()
    arrays, static = eqx.partition((model, opt_state), eqx.is_array)
    leaves, treedef = jtu.tree_flatten(arrays)

    def flat(leaves: list, tokens: Any) -> tuple[list, Any]:
        model, opt_state = eqx.combine(treedef.unflatten(leaves), static)
        model, opt_state, loss = net.advance(model, opt_state, tokens)
        return jtu.tree_leaves(eqx.filter((model, opt_state), eqx.is_array)), loss

    return flat, leaves, tokens


def _stateful_step(
    **options: Any,
) -> tuple[Callable[[Any], Any], sf.Param, sf.State, jax.Array]:
    start_model, start_opt_state, tokens = net.start()
    model, opt_state = sf.Param(start_model), sf.State(start_opt_state)

    @sf.filter_jit(**options)
    def step(tokens: jax.Array) -> jax.Array:
        model.value, opt_state.value, loss = net.advance(
            model.value, opt_state.value, tokens
        )
        return loss

    return step, model, opt_state, tokens


def _held(peers: bool) -> Mapping[str, Contender]:
    step, model, _, tokens = _stateful_step()
    flat, leaves, _ = _flat_advance()
    pure = jax.jit(flat)
    found = {
        OURS: Contender(lambda: step(tokens), lambda: model.value.head.weight),
        PURE: _threaded(lambda leaves, _: pure(leaves, tokens), leaves, None),
        EQUINOX: _passed_on(eqx.filter_jit(net.advance)),
    }
    if peers and _has("brainstate"):
        found["brainstate"] = _brainstate_held()
    if peers and _has("flax"):
        found |= _nnx_held()
    return found


def _passed_on(advance: Callable[..., tuple]) -> Contender:
    """Model and optimizer state in and out, as modules."""
    model, opt_state, tokens = net.start()

    def call() -> None:
        nonlocal model, opt_state
        model, opt_state, _ = advance(model, opt_state, tokens)

    return Contender(call, lambda: model.head.weight)


def _arguments(peers: bool) -> Mapping[str, Contender]:
    return {
        OURS: _passed_on(sf.filter_jit(net.advance)),
        EQUINOX: _passed_on(eqx.filter_jit(net.advance)),
    }


def _brainstate_held() -> Contender:
    """A brainstate State holds arrays only: the rest of the model stays outside."""
    import brainstate

    flat, leaves, tokens = _flat_advance()
    cell = brainstate.State(leaves)

    @brainstate.transform.jit
    def step(tokens: Any) -> Any:
        cell.value, loss = flat(cell.value, tokens)
        return loss

    return Contender(lambda: step(tokens), lambda: cell.value[0])


def _nnx_held() -> Mapping[str, Contender]:
    """As an NNX user has it: a Variable for each array."""
    from flax import nnx

    flat, leaves, tokens = _flat_advance()

    class Holder(nnx.Module):
        def __init__(self) -> None:
            self.cells = nnx.List([nnx.Variable(x) for x in leaves])

    def step(holder: Holder, tokens: Any) -> Any:
        new, loss = flat([cell[...] for cell in holder.cells], tokens)
        for cell, value in zip(holder.cells, new, strict=True):
            cell[...] = value
        return loss

    def contender(call: Callable[[Any], Any], holder: Holder) -> Contender:
        return Contender(lambda: call(tokens), lambda: holder.cells[0][...])

    one, other = Holder(), Holder()
    jitted = nnx.jit(step)
    return {
        "nnx.jit": contender(lambda tokens: jitted(one, tokens), one),
        "nnx.cached_partial": contender(
            nnx.cached_partial(nnx.jit(step), other), other
        ),
    }


def _first() -> Mapping[str, Callable[[], Any]]:
    step, _, _, tokens = _stateful_step()
    model, opt_state, _ = net.start()

    def advance(model: Any, opt_state: Any, tokens: Any) -> tuple:
        return net.advance(model, opt_state, tokens)

    jitted = eqx.filter_jit(advance)

    def equinox() -> Any:
        return eqx.filter(jitted(model, opt_state, tokens), eqx.is_array)

    return {OURS: lambda: step(tokens), EQUINOX: equinox}


# -- not a time ---------------------------------------------------------------------


def _peak_memory(_: Effort) -> Samples:
    """Megabytes that XLA plans for: what is alive at once while the program runs."""
    step, _, _, tokens = _stateful_step(donate_states=True)
    flat, leaves, _ = _flat_advance()
    ours = step.lower(tokens).compile()
    theirs = jax.jit(flat, donate_argnums=0).lower(leaves, tokens).compile()
    return {OURS: [_planned(ours)], "jax.jit, all donated": [_planned(theirs)]}


def _planned(compiled: Any) -> float:
    sizes = compiled.memory_analysis()
    return (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        + sizes.temp_size_in_bytes
        - sizes.alias_size_in_bytes
    ) / 1e6


_IMPORT = """
from time import perf_counter
start = perf_counter()
import {module}
print(1e6 * (perf_counter() - start))
"""


def _importing(module: str) -> list[str]:
    return [sys.executable, "-c", _IMPORT.format(module=module)]


ROWS = [
    Row("s.value = s.value + 1, eager", calls(_eager), {"a plain attribute": 1.5}),
    *(
        Row(
            f"call, {n} scalar State{'s' * (n > 1)}, all written",
            calls(_scalar_states(n, _all_plus_one)),
            {PURE: budget},
        )
        for n, budget in ((1, 1.25), (10, 1.10), (100, 1.05), (1000, 1.05))
    ),
    Row(
        "call, 100 scalar States read, 1 written",
        calls(_scalar_states(100, _sum_into_first)),
        {PURE: 0.45},
    ),
    Row("train step, held in States", calls(_held), {PURE: 1.08, EQUINOX: 0.27}),
    Row("train step, passed in and out", calls(_arguments), {EQUINOX: 0.60}),
    Row("first call of the train step", first_calls(_first), {EQUINOX: 1.10}),
    Row(
        "peak memory, donate_states",
        _peak_memory,
        {"jax.jit, all donated": 1.02},
        unit="MB",
    ),
    Row(
        "import",
        process_figures(
            {OURS: _importing("statefun"), "equinox": _importing("equinox")}
        ),
        {"equinox": 1.15},
    ),
]
