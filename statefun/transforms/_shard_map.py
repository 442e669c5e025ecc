"""`shard_map`."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax.sharding import PartitionSpec

from .._call.args import spread_prefix
from .._compat import varying_axes
from .._errors import StateTraceError, StateValueError, message
from .._state import access
from .._state.cell import Cell, Value, Values
from .._state.structure import leaves_of
from .._trace.names import Named, named
from .._trace.result import unpack
from ._state_axes import Rule, items_of_states, reachable
from ._twin import (
    Lanes,
    Updates,
    Wrapper,
    run_pure,
    split_arrays,
    transaction,
    values_of,
)

# What `jax.shard_map` takes to infer the specs has no public name.
_INFER = inspect.signature(jax.shard_map).parameters["in_specs"].default


class _Found(Exception):
    """A State that is held in pieces was met, and had not been expected."""

    def __init__(self, by: Rule, cell: Cell):
        self.by = by
        self.cell = cell


class _ShardMap(Wrapper):
    _fun: Callable
    _in_specs: Any = eqx.field(static=True)
    _out_specs: Any = eqx.field(static=True)
    _state_specs: Any
    _options: dict[str, Any] = eqx.field(static=True)

    @property
    def __wrapped__(self) -> Callable:
        return self._fun

    def __call__(self, /, *args: Any) -> Any:
        def run() -> Any:
            rule = Rule(
                "state_specs", self._state_specs, _is_spec, self._specs_of_states(args)
            )
            found: list[Cell] = []
            while True:
                try:
                    return self._share(args, rule, found)
                except _Found as late:
                    if late.by is not rule:  # it is of a `shard_map` around
                        raise
                    found.append(late.cell)

        return transaction(run)

    def _share(self, args: tuple, rule: Rule, found: list[Cell]) -> Any:
        in_pieces: dict[Cell, PartitionSpec] = {}
        for cell in [*reachable(self._fun, args, self._state_specs), *found]:
            spec = rule(cell)
            if spec is not None:
                self._check_spec(cell, spec)
                in_pieces[cell] = spec
        values = values_of(in_pieces)
        arrays, build = split_arrays(args)
        # One group of written States for each spec: which States these are is known
        # only when the function has run.
        specs = [PartitionSpec(), *dict.fromkeys(in_pieces.values())]
        seen: dict[str, Any] = {}

        names = self._axis_names()
        lanes = Lanes(
            math.prod(names.values()), lambda: jax.lax.axis_index(tuple(names))
        )

        def view(cell: Cell, value: Value) -> Value:
            if rule(cell) is not None:
                raise _Found(rule, cell)
            return lanes.view(cell, value)

        def inner(pieces: Values, *arrays: Any) -> Any:
            run = lambda: self._fun(*build(arrays))  # noqa: E731
            out, written = run_pure(run, pieces, keeps=True, view=view, ends=True)
            written, seen["advanced"] = lanes.take_out(written)
            groups = [Values() for _ in specs]
            for cell, value in written.values.items():
                spec = rule(cell)
                if spec is not None and cell not in in_pieces:
                    raise _Found(rule, cell)
                if spec is None:
                    _check_shared(cell, value)
                groups[0 if spec is None else specs.index(spec)][cell] = value
            seen["checks"] = written.checks
            dynamic, seen["static"] = eqx.partition(out, eqx.is_array)
            return dynamic, groups

        labels = ["states", *named(self._fun, args).labels]
        Named(self._fun, labels).lend_to(inner)
        options: Any = self._options
        in_specs = self._specs(args)
        if in_specs is not None:
            pairs = zip(values.items(), in_pieces.values(), strict=True)
            in_specs = (Values((c, (p, s)) for (c, (_, s)), p in pairs), *in_specs)
            options = self._options | {"in_specs": in_specs}
        mapped = jax.shard_map(inner, out_specs=(self._out_specs, specs), **options)
        dynamic, groups = mapped(values, *arrays)
        written = Values(pair for group in groups for pair in group.items())
        Updates(written, frozenset(), seen["checks"]).write()
        lanes.advance(seen["advanced"])
        return unpack(eqx.combine(dynamic, seen["static"]))

    def _mesh(self) -> Any:
        return self._options["mesh"] or jax.sharding.get_abstract_mesh()

    def _check_spec(self, cell: Cell, spec: PartitionSpec) -> None:
        """Raises unless the State can be held in such pieces."""
        for x in leaves_of(*access.read(cell)):
            aval = jax.typeof(x)
            wrong = _misfit(aval.shape, spec, self._mesh().shape)
            if wrong is not None:
                raise StateValueError(
                    message(
                        f"`shard_map` splits {cell.describe()} by {spec}, but its value, "
                        f"{aval.str_short()}, {wrong}.",
                        "a State that comes in by an argument with a spec, or that "
                        "`state_specs` names, is held in pieces of equal shape.",
                        "give the State such a value, another spec, or `P()` to have it "
                        "replicated.",
                    )
                )

    def _axis_names(self) -> dict[Any, int]:
        """The axes that are mapped, and their sizes."""
        mesh = self._mesh()
        wanted = self._options["axis_names"] or mesh.axis_names
        return {name: mesh.shape[name] for name in mesh.axis_names if name in wanted}

    def _specs(self, args: tuple) -> list[Any] | None:
        """A spec for every array of the arguments; None to have JAX infer them."""
        if self._in_specs is _INFER:
            return None
        leaves = jax.tree_util.tree_leaves(args)
        spread = spread_prefix(self._given(args), args)
        return [s for s, x in zip(spread, leaves, strict=True) if eqx.is_array(x)]

    def _given(self, args: tuple) -> tuple:
        given = self._in_specs
        return given if type(given) is tuple else (given,) * len(args)

    def _specs_of_states(self, args: tuple) -> dict[Cell, PartitionSpec]:
        """The specs by which States are split that come in by an argument."""
        if self._in_specs is _INFER:
            return {}
        return items_of_states("shard_map", self._given(args), args)


def _misfit(shape: tuple, spec: PartitionSpec, mesh: Any) -> str | None:
    """Why an array can't be split by a spec; None if it can."""
    if len(spec) > len(shape):
        return f"has {len(shape)} axes"
    for size, entry in zip(shape, spec, strict=False):
        names = entry if isinstance(entry, tuple) else (entry,)
        parts = 1
        for name in names:
            if name is not None and name not in mesh:
                return f"can't be split along {name!r}, which the mesh doesn't have"
            parts *= 1 if name is None else mesh[name]
        if size % parts:
            return f"has {size} entries, to be split into {parts} pieces"
    return None


def _is_spec(item: Any) -> bool:
    return isinstance(item, PartitionSpec)


def _check_shared(cell: Cell, value: Value) -> None:
    """Refuses a value that differs between devices, for a State that is replicated."""
    if any(map(varying_axes, leaves_of(*value))):
        raise StateTraceError(
            message(
                "inside `shard_map` a value that differs between devices was written to "
                f"{cell.describe()}.",
                "the State is replicated: all devices hold the same value.",
                "write something that is equal on all devices "
                "(`jax.lax.pmean(x, axis_name)`), or let the State be held in pieces: "
                "`shard_map(…, state_specs=[(state, P('axis'))])`.",
            )
        )


def shard_map(
    f: Callable | None = None,
    /,
    *,
    out_specs: Any,
    in_specs: Any = _INFER,
    mesh: Any = None,
    axis_names: Any = frozenset(),
    check_vma: bool = True,
    state_specs: Any = None,
) -> Any:
    """As `jax.shard_map`, for functions that read and write States.

    There is no twin of `jax.pmap`, which JAX itself builds on `shard_map` now.

    **Arguments:**

    - `f`: the function of the pieces; may be left out, to use the rest as a decorator.
    - `out_specs`, `in_specs`, `mesh`, `axis_names`, `check_vma`: as in `jax.shard_map`.
        Arguments and results may have non-array leaves.
    - `state_specs`: which States are held in pieces, and how. None: those in arguments
        are, by the spec of the argument; all devices hold the same value of the others.
        A `PartitionSpec`: all States are. A list of pairs of a State, a kind of State or
        a predicate, and a spec: the first that matches decides.

    **Returns:** the mapped function.

    **Raises:** `statefun.StateTraceError` if a value that differs between devices is
    written to a State that is replicated. (Not with `check_vma=False`: then JAX keeps no
    account of it.)

    !!! example

        ```python
        import jax, jax.numpy as jnp, statefun as sf
        from jax.sharding import PartitionSpec as P

        mesh = jax.make_mesh((jax.device_count(),), ("d",),
                             axis_types=(jax.sharding.AxisType.Auto,))
        total = sf.State(jnp.array(0.0))

        def f(x):
            total.value += jax.lax.psum(x.sum(), "d")
            return 2 * x

        sf.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"))(jnp.arange(8.0))
        ```
    """
    if f is None:
        return functools.partial(
            shard_map,
            out_specs=out_specs,
            in_specs=in_specs,
            mesh=mesh,
            axis_names=axis_names,
            check_vma=check_vma,
            state_specs=state_specs,
        )
    options = {"mesh": mesh, "axis_names": axis_names, "check_vma": check_vma}
    return eqx.module_update_wrapper(
        _ShardMap(f, in_specs, out_specs, state_specs, options)
    )
