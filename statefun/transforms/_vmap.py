"""`filter_vmap`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
import numpy as np
from jax import lax

from .. import _compat
from .._errors import StateTraceError, message
from .._state.cell import Cell, Value, Values
from .._state.state import is_state
from .._state.structure import flat_of, leaves_of
from .._trace.result import unpack
from ._state_axes import reachable, rule
from ._twin import Lanes, Wrapper, run_pure, values_of

# `eqx.if_array` makes a rule that looks at each leaf; one is enough.
_ARRAYS_ALONG_0 = eqx.if_array(0)


class _Vmap(Wrapper):
    _fun: Callable
    _in_axes: Any
    _out_axes: Any
    _axis_name: Hashable = eqx.field(static=True)
    _axis_size: int | None = eqx.field(static=True)
    _state_axes: Any
    _vmapkwargs: dict[str, Any] = eqx.field(static=True)

    @property
    def __wrapped__(self) -> Callable:
        return self._fun

    def _run(self, args: tuple, kwargs: dict) -> Any:
        axis_of = rule(self._state_axes, lambda axis: isinstance(axis, int))
        mapped: dict[Cell, int] = {}
        if self._state_axes is not None:
            for cell, state in reachable(
                self._fun, args, kwargs, self._state_axes
            ).items():
                axis = axis_of(state)
                if axis is not None:
                    mapped[cell] = axis
        pieces = values_of(mapped)
        in_axes, kw_axes = _axes(self._fun, self._in_axes, args, kwargs)
        if any(map(is_state, jtu.tree_leaves((args, kwargs)))):
            in_axes, kw_axes = _past_states((in_axes, kw_axes))
        axes = [mapped[c] for c in pieces]
        along = Values(
            zip(
                pieces,
                zip(axes, (s for _, s in pieces.values()), strict=True),
                strict=False,
            )
        )
        axes_in = along, in_axes, kw_axes
        size = self._axis_size or _size((pieces, args, kwargs), axes_in)
        number: list[Any] = []  # of the lane
        lanes = Lanes(size or 1, lambda: number[0])

        def lane(cell: Cell, value: Value) -> Value:
            """What a lane sees of a State that was not known to be touched."""
            axis = axis_for(cell)
            if axis is None:
                return lanes.view(cell, value)
            mapped[cell] = axis
            flat, structure = value
            cut = [
                lax.dynamic_index_in_dim(x, number[0], axis, keepdims=False)
                for x in leaves_of(flat, structure)
            ]
            return flat_of(cut, structure), structure

        def axis_for(cell: Cell) -> int | None:
            if cell in mapped:
                return mapped[cell]
            state = None if cell.handle is None else cell.handle()
            return None if state is None else axis_of(state)

        outside = _compat.current_trace()
        seen: dict[str, Any] = {}
        turns: list[int | None] = []  # the axis of each array that is written

        def inner(lane_number: Any, pieces: Values, args: tuple, kwargs: dict) -> Any:
            number.append(lane_number)
            out, written = run_pure(
                lambda: self._fun(*args, **kwargs), pieces, view=lane
            )
            number.clear()  # a tracer must not outlive its trace
            written, advanced = lanes.take_out(written.without(written.created))
            axes = [axis_for(cell) for cell in written.values]
            _check_shared(written.values, axes, outside)
            seen["advanced"] = advanced
            slots = [len(s.slots) for _, s in written.values.values()]
            turns.extend(a for a, n in zip(axes, slots, strict=True) for _ in range(n))
            return out, written

        vmapped = eqx.filter_vmap(
            inner,
            in_axes=(None if size is None else 0, *axes_in),
            # Which States are written is known when `inner` has run, and this is asked
            # after that, for one array after the other.
            out_axes=(self._out_axes, lambda _: turns.pop(0)),
            axis_name=self._axis_name,
            axis_size=self._axis_size,
            **self._vmapkwargs,
        )
        # NumPy: it costs nothing where it isn't used.
        numbers = 0 if size is None else np.arange(size, dtype=np.int32)
        out, written = vmapped(numbers, pieces, args, kwargs)
        written.write()
        lanes.advance(seen["advanced"])
        return unpack(out)


def _axes(fun: Callable, in_axes: Any, args: tuple, kwargs: dict) -> tuple[Any, Any]:
    """`in_axes` for the positional and for the keyword arguments."""
    default = _ARRAYS_ALONG_0
    if not isinstance(in_axes, dict):
        return in_axes, {name: default for name in kwargs}
    rest = dict(in_axes)
    names = list(inspect.signature(fun).parameters)
    positional = tuple(rest.pop(n, default) for n in names[: len(args)])
    keyword = {name: rest.pop(name, default) for name in kwargs}
    if rest:
        raise ValueError(
            f"The following `in_axes` did not correspond to any argument: {tuple(rest)}"
        )
    return positional, keyword


def _past_states(axes: Any) -> Any:
    """An integer is the axis of the arrays; States have theirs from `state_axes`."""

    def past(axis: Any) -> Any:
        if not isinstance(axis, int):
            return axis
        return lambda leaf: None if is_state(leaf) else axis

    return jtu.tree_map(past, axes)


def _size(args: Any, axes: Any) -> int | None:
    """The size of the mapped axis; None if nothing is mapped."""

    def resolve(axis: Any, sub: Any) -> list:
        leaves = jtu.tree_leaves(sub)
        axes = [axis(x) if callable(axis) else axis for x in leaves]
        return [
            x.shape[a]
            for x, a in zip(leaves, axes, strict=True)
            if a is not None and eqx.is_array(x) and -x.ndim <= a < x.ndim
        ]

    sizes = jtu.tree_map(resolve, axes, args, is_leaf=lambda x: x is None)
    return next(iter(jtu.tree_leaves(sizes)), None)


def _check_shared(written: Values, axes: list[int | None], outside: Any) -> None:
    """Refuses a value that differs along the axis, for a State that is shared."""
    rows = zip(written.items(), axes, strict=True)
    arrays = [(c, x) for (c, v), axis in rows if axis is None for x in leaves_of(*v)]
    differing = _compat.batched([x for _, x in arrays], outside)
    if differing:
        cell = arrays[min(differing)][0]
        raise StateTraceError(
            message(
                f"inside `filter_vmap` a value that differs along the mapped axis was "
                f"written to {cell.describe()}.",
                "the State is shared by all lanes, and can hold one value.",
                "write something that is equal in all lanes (`jax.lax.pmean(x, axis_name)` "
                "with `axis_name=…`), or let the State hold a batch: "
                "`filter_vmap(f, state_axes=[(state, 0)])`.",
            )
        )


def filter_vmap(
    fun: Callable | None = None,
    *,
    in_axes: Any = _ARRAYS_ALONG_0,
    out_axes: Any = _ARRAYS_ALONG_0,
    axis_name: Hashable = None,
    axis_size: int | None = None,
    state_axes: Any = None,
    **vmapkwargs: Any,
) -> Any:
    """As `equinox.filter_vmap`, for functions that read and write States.

    A State that the function makes and returns in a module comes out with a batch of
    values, stacked along `out_axes`: `filter_vmap(Net)(keys)` makes an ensemble.

    **Arguments:**

    - `fun`: the function; may be left out, to use the rest as a decorator.
    - `in_axes`, `out_axes`, `axis_name`, `axis_size`: as in Equinox. Keyword arguments
        may be passed, too; their arrays are mapped along axis 0, or as `in_axes`, a dict
        of names, says.
    - `state_axes`: which States hold a batch, and along which axis. None: no State does;
        all lanes share them. An integer: all do. A list of pairs of a State, a kind of
        State or a predicate, and an axis: the first that matches decides.
    - `vmapkwargs`: passed on to `jax.vmap`.

    **Returns:** the vectorised function.

    **Raises:** `statefun.StateTraceError` if a value that differs along the axis is
    written to a State that is shared.

    !!! example

        ```python
        import jax, jax.numpy as jnp, statefun as sf

        total = sf.State(jnp.array(0.0))
        last = sf.State(jnp.zeros(3))

        def f(x):
            total.value += jax.lax.psum(x, "batch")
            last.value = x

        sf.filter_vmap(f, axis_name="batch", state_axes=[(last, 0)])(jnp.arange(3.0))
        ```
    """
    if fun is None:
        return functools.partial(
            filter_vmap,
            in_axes=in_axes,
            out_axes=out_axes,
            axis_name=axis_name,
            axis_size=axis_size,
            state_axes=state_axes,
            **vmapkwargs,
        )
    return eqx.module_update_wrapper(
        _Vmap(fun, in_axes, out_axes, axis_name, axis_size, state_axes, vmapkwargs)
    )
