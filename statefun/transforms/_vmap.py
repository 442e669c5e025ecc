"""`filter_vmap`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np

from .. import _compat
from .._call.args import spread_prefix
from .._errors import StateTraceError, StateValueError, message
from .._state import access
from .._state.cell import UNSET, Cell, Value, Values
from .._state.state import is_state
from .._state.structure import flat_of, leaves_of
from .._trace.result import unpack
from ._state_axes import (
    Rule,
    check_axis,
    is_axis,
    items_of_states,
    mesh_axis,
    size_along,
)
from ._twin import Lanes, Wrapper, run_pure

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
        axes = _axes(self._fun, self._in_axes, args, kwargs)
        states = items_of_states("filter_vmap", axes, (args, kwargs))
        if any(map(is_state, jtu.tree_leaves((args, kwargs)))):
            axes = _past_states(axes)
        rule = Rule("state_axes", self._state_axes, is_axis, states)
        size, marker, marker_axis = self._lanes(rule, axes, args, kwargs)
        inside: list[Any] = []  # the marker in the vmap
        lanes = Lanes(size or 1, lambda: _compat.lane_number(inside[0]))

        def check(cell: Cell, value: Value) -> int | None:
            """The axis that a State is mapped along, which its arrays have to have."""
            axis = rule(cell)
            if axis is not None and size is not None and value[0] is not UNSET:
                avals = [jax.typeof(x) for x in leaves_of(*value)]
                check_axis("filter_vmap", cell, avals, axis, size)
                _check_sharding(cell, avals, axis, jax.typeof(marker), marker_axis)
            return axis

        def lane(cell: Cell, value: Value) -> Value:
            """What a lane sees of a State."""
            axis = check(cell, value)
            if axis is None:
                return lanes.view(cell, value)
            flat, structure = value
            cut = [
                _compat.lane_of(inside[0], x, axis) for x in leaves_of(flat, structure)
            ]
            return flat_of(cut, structure), structure

        for cell in states:
            check(cell, access.current(cell))
        outside = _compat.current_trace()
        seen: dict[str, Any] = {}
        turns: list[int | None] = []  # the axis of each array that is written

        def inner(marker: Any, args: tuple, kwargs: dict) -> Any:
            inside.append(marker)
            try:
                out, written = run_pure(
                    lambda: self._fun(*args, **kwargs),
                    view=lane,
                    ends=True,
                    changes=lambda cell: rule(cell) is not None or lanes.splits(cell),
                )
            finally:
                inside.clear()  # a tracer must not outlive its trace
            written, advanced = lanes.take_out(written)
            axes = [check(cell, access.current(cell)) for cell in written.values]
            _check_shared(written.values, axes, outside)
            seen["advanced"] = advanced
            slots = [len(s.slots) for _, s in written.values.values()]
            turns.extend(a for a, n in zip(axes, slots, strict=True) for _ in range(n))
            return out, written

        vmapped = eqx.filter_vmap(
            inner,
            in_axes=(marker_axis, *axes),
            # Which States are written is known when `inner` has run, and this is asked
            # after that, for one array after the other.
            out_axes=(self._out_axes, lambda _: turns.pop(0)),
            axis_name=self._axis_name,
            axis_size=self._axis_size,
            **self._vmapkwargs,
        )
        out, written = vmapped(marker, args, kwargs)
        written.write()
        lanes.advance(seen["advanced"])
        return unpack(out)

    def _lanes(
        self, rule: Rule, axes: Any, args: tuple, kwargs: dict
    ) -> tuple[int | None, Any, int | None]:
        """How many lanes there are, and an array that is mapped, with its axis."""
        first = _first_mapped((args, kwargs), axes)
        if first is not None:
            x, axis = first
            return self._axis_size or x.shape[axis], x, axis
        size = self._axis_size
        if size is None:
            size = size_along(rule, self._fun, args, kwargs, self._state_axes)
        # NumPy: it costs nothing where it isn't used.
        return (None, None, None) if size is None else (size, np.arange(size), 0)


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
    """The axes of the arrays: States are no business of `jax.vmap`."""

    def past(axis: Any) -> Any:
        def of(leaf: Any) -> Any:
            if is_state(leaf):
                return None
            return axis(leaf) if callable(axis) else axis

        return of

    return jtu.tree_map(past, axes)


def _first_mapped(args: Any, axes: Any) -> tuple[Any, int] | None:
    """The first array that is mapped, and its axis."""

    for axis, x in zip(spread_prefix(axes, args), jtu.tree_leaves(args), strict=True):
        mine: Any = axis(x) if callable(axis) else axis
        if mine is not None and eqx.is_array(x) and -x.ndim <= mine < x.ndim:
            return x, mine
    return None


def _check_sharding(
    cell: Cell, avals: Sequence[Any], axis: int, marker: Any, marker_axis: Any
) -> None:
    """Refuses a State that is not split over the mesh like what else is mapped."""
    wanted = mesh_axis(marker, marker_axis)
    for aval in avals:
        if mesh_axis(aval, axis) != wanted:
            raise StateValueError(
                message(
                    f"`filter_vmap` maps {cell.describe()} along axis {axis}, which is "
                    f"sharded by {mesh_axis(aval, axis)}, beside arguments whose mapped "
                    f"axis is sharded by {wanted}.",
                    "the axes of the mesh are explicit, and then JAX wants all that is "
                    "mapped to be sharded the same.",
                    "place the State's value like the arguments: `jax.device_put`.",
                )
            )


def _check_shared(written: Values, axes: Sequence[int | None], outside: Any) -> None:
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
    - `state_axes`: which States hold a batch, and along which axis. None: those in
        arguments that are mapped do, along the axis of the argument; all lanes share the
        others. An integer: all do. A list of pairs of a State, a kind of
        State or a predicate, and an axis: the first that matches decides.
    - `vmapkwargs`: passed on to `jax.vmap`.

    **Returns:** the vectorised function.

    **Raises:** `statefun.StateTraceError` if a value that differs along the axis is
    written to a State that is shared; `statefun.StateValueError` if a State that is
    mapped has not one entry for each lane.

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
