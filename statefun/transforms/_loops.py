"""`scan`, `map`, `fori_loop`, `while_loop` and `associative_scan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax

from .._compat import Tracer
from .._errors import StateTraceError, StateTypeError, message
from .._state import access
from .._state.cell import Cell
from .._state.state import State
from .._trace.names import Named, Parameters, named
from .._trace.result import unpack
from ._bounded import as_max_steps, bounded_while, check_condition, stop_if_unfinished
from ._carry import Carry, Loop, as_arrays, element
from ._eager import answering_for, compiled_when_eager
from ._entries import Entries, part_of, run_on_part
from ._segments import Checkpoint, as_checkpoint, scan_segments
from ._state_axes import Passed, Rule, is_axis, items_of_states, size_along
from ._twin import (
    note_checks,
    run_pure,
    split_arrays,
    trace_body,
    transaction,
    values_of,
)
from ._vmap import filter_vmap


@compiled_when_eager
def _scan(
    f: Callable,
    init: Any,
    xs: Any,
    length: int | None,
    reverse: bool,
    unroll: int | bool,
    options: tuple[tuple[str, Any], ...],
    progress: bool | str,
    state_axes: Passed,
    checkpoint: Checkpoint = None,
    name: str = "scan",
) -> Any:
    xs = Passed.open(xs)
    entries = entries_of(name, f, init, xs, length, state_axes.tree)
    carry = Carry(name, init)
    x_arrays, build_x = split_arrays(xs)

    def run(carry_arrays: list, *x: Any) -> Any:
        out, y = as_arrays(f(carry.build(carry_arrays), build_x(x)))
        return carry.check(out), y

    elements = [element(x) for x in x_arrays]
    loop = Loop(name, carry, run, elements, named(f, (init, xs)), entries)
    final, ys = scan_segments(
        lambda at, x: loop.step(at, *x),
        *(loop.init, (x_arrays, loop.entries), entries.steps, reverse, unroll),
        *(checkpoint, progress),
        **dict(options),
    )
    return loop.finish(final, ys)


@answering_for(_scan)
def scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    _split_transpose: bool = False,
    *,
    progress: bool | str = False,
    state_axes: Any = None,
    checkpoint: int | str | None = None,
) -> tuple[Any, Any]:
    """As `jax.lax.scan`, for bodies that read and write States.

    A State that comes in by `xs` is sliced like the arrays there: each step reads and
    writes its own entry, and when the loop is over the State holds all of them. States
    that are reached in another way are shared by all steps: those that the body writes
    join the carry, others that it reads are closed over.

    Carry, elements and outputs may hold leaves that are no arrays (a module with its
    activation function); in the carry these must stay the same.

    **Arguments:**

    - `f`: `(carry, x) -> (carry, y)`.
    - `init`: the first carry.
    - `xs`: what to scan over: arrays, and States that hold arrays, with a leading axis of
        equal length.
    - `length`, `reverse`, `unroll`: as in `jax.lax.scan`.
    - `progress`: True, or a description, for a progress bar (needs the extra
        `progress`). It doesn't change the result.
    - `state_axes`: which States hold an entry for each step, and along which axis, as of
        [`statefun.filter_vmap`][]. None: those in `xs` do, along their leading axis.
    - `checkpoint`: how much is kept for the backward pass. None: the intermediate values
        of all `n` steps. An integer: of one segment of so many steps at a time, and the
        carry at the start of each; the backward pass computes every step a second time.
        `"sqrt"`: the same with segments of about `sqrt(n)` steps. `"recursive"`:
        segments in segments, at most 16 to each, so that what is kept grows as `log(n)`;
        every level computes the steps once more. It changes no result, save for the
        rounding of gradients.

    **Returns:** `(carry, ys)`, the outputs stacked along a new leading axis. A State that
    the body makes and returns in a module comes out with stacked values.

    **Raises:** `TypeError` if the carry changes structure, shape or dtype;
    `statefun.StateValueError` if a State does, or if one that is sliced doesn't have one
    entry for each step; `ValueError` if `checkpoint` is something else.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        total = sf.State(jnp.array(0.0))

        def body(carry, x):
            total.value += x
            return carry * x, total.value

        sf.scan(body, jnp.array(1.0), jnp.arange(1.0, 5.0))
        ```
    """
    options = (("_split_transpose", True),) if _split_transpose else ()
    return _scan(
        f,
        as_arrays(init),
        Passed.along(xs),
        length,
        reverse,
        unroll,
        options,
        progress,
        Passed(state_axes),
        as_checkpoint("scan", checkpoint),
    )


def entries_of(
    name: str, f: Callable, init: Any, xs: Any, length: int | None, state_axes: Any
) -> Entries:
    """How many steps there are, and of which States each has an entry of its own.

    Raises as `jax.lax.scan` does, before the body is traced.
    """
    leaves = [x for x in jtu.tree_leaves(xs) if eqx.is_array(x)]
    if any(x.ndim == 0 for x in leaves):
        raise IndexError(f"{name} got a value with no leading axis to scan over.")
    lengths = {x.shape[0] for x in leaves}
    if length is not None:
        lengths.add(int(length))
    states = items_of_states(name, (None, 0), (init, xs))
    rule = Rule("state_axes", state_axes, is_axis, states)
    if not lengths:
        of_states = size_along(rule, xs, f, state_axes)
        if of_states is None:
            raise ValueError(
                f"{name} got no values to scan over and `length` not provided."
            )
        lengths.add(of_states)
    if len(lengths) > 1:
        raise ValueError(
            f"{name} got values with different lengths: {sorted(lengths)}."
        )
    entries = Entries(name, rule, lengths.pop())
    for cell in states:
        entries.avals(cell, access.current(cell))  # raises where the sizes differ
    return entries


def refuse_states(name: str, role: str, tree: Any) -> None:
    """Refuses States in the place of arrays of which there are no single entries."""
    for path, leaf in jtu.tree_leaves_with_path(tree):
        if isinstance(leaf, State):
            raise StateTypeError(
                message(
                    f"{leaf._cell.describe()} is among the `{role}` of `{name}`, at "
                    f"`{role}{jtu.keystr(path)}`.",
                    "the arrays beside it are cut along their axis, and the State would "
                    "be left whole.",
                    "reach a State by the closure of the function; for one that holds an "
                    "entry for each element, pass `sf.freeze(module)`.",
                )
            )


def map(
    f: Callable[[Any], Any],
    xs: Any,
    *,
    batch_size: int | None = None,
    progress: bool | str = False,
    state_axes: Any = None,
    checkpoint: int | str | None = None,
) -> Any:
    """As `jax.lax.map`, for functions that read and write States.

    **Arguments:**

    - `f`: applied to one element after the other.
    - `xs`: arrays, and States that hold arrays, with a leading axis of equal length.
    - `batch_size`: how many elements to do at once, with [`statefun.filter_vmap`][];
        States that all elements share can then hold nothing that differs in a batch.
    - `progress`, `state_axes`, `checkpoint`: as of [`statefun.scan`][]; steps are then
        batches, if there is a `batch_size`.

    **Returns:** the results, stacked along a new leading axis.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        seen = sf.State(jnp.array(0))

        def f(x):
            seen.value += 1
            return x**2

        sf.map(f, jnp.arange(4.0))
        ```
    """
    return _map(
        *(f, Passed.along(xs), batch_size, progress, Passed(state_axes)),
        as_checkpoint("map", checkpoint),
    )


@compiled_when_eager
def _map(
    f: Callable[[Any], Any],
    xs: Any,
    batch_size: int | None,
    progress: bool | str,
    state_axes: Passed,
    checkpoint: Checkpoint,
) -> Any:
    xs = Passed.open(xs)
    if batch_size is None:

        def body(_: Any, x: Any) -> Any:
            return (), f(x)

        Named(f, ["_", Parameters(f).positional(0)]).lend_to(body)
        options = (None, False, 1, (), progress, state_axes, checkpoint, "map")
        return _scan(body, (), xs, *options)[1]
    if batch_size < 1:
        raise ValueError(f"batch_size has to be positive, but is {batch_size}.")
    entries = entries_of("map", f, (), xs, None, state_axes.tree)
    many = filter_vmap(lambda x: as_arrays(f(x)), state_axes=entries.in_front())
    blocks = lambda _, x: ((), many(x))  # noqa: E731
    return scan_blocks(
        "map", blocks, (), xs, entries, batch_size, progress, checkpoint
    )[1]


def scan_blocks(
    name: str,
    block: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any,
    entries: Entries,
    size: int,
    progress: bool | str = False,
    checkpoint: Checkpoint = None,
) -> tuple[Any, Any]:
    """A scan over blocks of `size` elements, and at the end one with those that remain.

    **Arguments:**

    - `block`: `(carry, xs) -> (carry, ys)`, for the elements of one block together.
    - `entries`: how many elements there are, and the States that go with them.
    """
    arrays, build = split_arrays(xs)

    def part(
        carry: Any, start: int, steps: int, size: int, progress: bool | str
    ) -> Any:
        blocks = build([part_of(x, start, (steps, size)) for x in arrays])
        axes = Passed(entries.in_front())
        options = (steps, False, 1, (), progress, axes, checkpoint, name)
        return run_on_part(
            entries,
            lambda: _scan(block, carry, blocks, *options),
            start,
            (steps, size),
        )

    n = entries.steps
    whole, rest = n // size, n % size
    carry, outs = init, []
    if whole or not rest:
        carry, out = part(carry, 0, whole, size, progress)
        outs.append(split_arrays(out))
    if rest:
        carry, out = part(carry, n - rest, 1, rest, False)
        outs.append(split_arrays(out))
    (_, build_ys), *_ = outs
    joined = [
        jnp.concatenate([y.reshape(y.shape[0] * y.shape[1], *y.shape[2:]) for y in ys])
        for ys in zip(*(arrays for arrays, _ in outs), strict=True)
    ]
    return unpack(carry), unpack(build_ys(joined))


@compiled_when_eager(bounds=2)
def _fori_loop(
    lower: Any,
    upper: Any,
    body_fun: Callable,
    init_val: Any,
    unroll: int | bool | None,
    progress: bool | str,
    checkpoint: Checkpoint,
) -> Any:
    carry = Carry("fori_loop", init_val)

    def run(arrays: list, i: Any) -> Any:
        return carry.check(as_arrays(body_fun(i, carry.build(arrays)))), None

    index = _index_type(lower, upper)
    (first, *others) = named(body_fun, (jnp.zeros(()), init_val)).labels
    names = Named(body_fun, [*others, first])  # `run` takes the index last
    loop = Loop("fori_loop", carry, run, [index], names)
    if progress is False and checkpoint is None:
        final = lax.fori_loop(
            lower, upper, lambda i, at: loop.step(at, [i])[0], loop.init, unroll=unroll
        )
        return loop.finish(final)[0]
    if isinstance(lower, Tracer) or isinstance(upper, Tracer):
        what = "a progress bar" if checkpoint is None else "a checkpointed `fori_loop`"
        raise ValueError(f"{what} needs loop bounds that are known when tracing.")
    steps = max(int(upper) - int(lower), 0)
    index = jnp.asarray(lower)

    def count(at: Any, _: Any) -> Any:
        i, loop_at = at
        return (i + 1, loop.step(loop_at, [i])[0]), []

    (_, final), _ = scan_segments(
        *(count, (index, loop.init), [], steps, False),
        *(1 if unroll is None else unroll, checkpoint, progress),
    )
    return loop.finish(final)[0]


def _index_type(lower: Any, upper: Any) -> Any:
    """What `jax.lax.fori_loop` passes as the index."""
    seen = []
    with jax.disable_jit(False):  # else a loop without iterations never runs its body
        jax.eval_shape(
            lambda: lax.fori_loop(
                lower, upper, lambda i, c: (seen.append(jax.typeof(i)), c)[1], 0
            )
        )
    return seen[0]


@answering_for(_fori_loop)
def fori_loop(
    lower: Any,
    upper: Any,
    body_fun: Callable[[Any, Any], Any],
    init_val: Any,
    *,
    unroll: int | bool | None = None,
    progress: bool | str = False,
    checkpoint: int | str | None = None,
) -> Any:
    """As `jax.lax.fori_loop`, for bodies that read and write States.

    **Arguments:**

    - `lower`, `upper`: the first index, and the one after the last.
    - `body_fun`: `(i, val) -> val`.
    - `init_val`: the first value. Leaves that are no arrays must stay the same.
    - `unroll`: as in `jax.lax.fori_loop`.
    - `progress`, `checkpoint`: as of [`statefun.scan`][]; the bounds must be known when
        tracing.

    **Returns:** the last value.

    **Raises:** as [`statefun.scan`][].

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        last = sf.State(jnp.array(0))

        def body(i, x):
            last.value = i
            return x * 2.0

        sf.fori_loop(0, 3, body, jnp.array(1.0))
        ```
    """
    return _fori_loop(
        *(lower, upper, body_fun, as_arrays(init_val), unroll, progress),
        as_checkpoint("fori_loop", checkpoint),
    )


@compiled_when_eager
def _while_loop(
    cond_fun: Callable,
    body_fun: Callable,
    init_val: Any,
    max_steps: int | None,
    checkpoint: Checkpoint,
    throw: bool,
) -> Any:
    carry = Carry("while_loop", init_val)

    def run(arrays: list) -> Any:
        return carry.check(as_arrays(body_fun(carry.build(arrays)))), None

    loop = Loop("while_loop", carry, run, [], named(body_fun, (init_val,)))
    condition = trace_body(
        lambda *arrays: as_arrays(cond_fun(carry.build(arrays))),
        carry.arrays,
        named(cond_fun, (init_val,)),
    )
    if condition.writes:
        raise only_reads("condition of `while_loop`", next(iter(condition.writes)))
    note_checks(condition)
    others = values_of(c for c in condition.reads if c not in loop.values)

    def cond(at: Any) -> Any:
        arrays, written = at
        leaves, _ = condition(arrays, others | loop.values | written)
        return condition.out.build(leaves)

    def step(at: Any) -> Any:
        return loop.step(at, [])[0]

    if max_steps is None:
        return loop.finish(lax.while_loop(cond, step, loop.init))[0]
    check_condition(condition)
    final, unfinished = bounded_while(cond, step, loop.init, max_steps, checkpoint)
    if throw:
        note_checks(always=True)
        final, unfinished = stop_if_unfinished(
            (final, unfinished), unfinished, body_fun, max_steps
        )
    out = loop.finish(final)[0]
    return out if throw else (out, ~jnp.asarray(unfinished))


@answering_for(_while_loop)
def while_loop(
    cond_fun: Callable[[Any], Any],
    body_fun: Callable[[Any], Any],
    init_val: Any,
    *,
    max_steps: int | None = None,
    checkpoint: int | str | None = "sqrt",
    throw: bool = True,
) -> Any:
    """As `jax.lax.while_loop`, for functions that read and write States.

    With `max_steps` it has a gradient in reverse mode. It still stops when the condition
    says so; steps that it doesn't take cost next to nothing.

    **Arguments:**

    - `cond_fun`: `val -> bool`; may read States, but not write any.
    - `body_fun`: `val -> val`.
    - `init_val`: the first value. Leaves that are no arrays must stay the same.
    - `max_steps`: how often the body runs at most. None: there is no limit, and no
        gradient in reverse mode.
    - `checkpoint`: what is kept for the backward pass, with `max_steps`, as of
        [`statefun.scan`][]. With None that is room for the intermediate values of
        `max_steps` steps, whether they are taken or not.
    - `throw`: whether it is an error if the condition still holds after `max_steps`
        steps. As any runtime check it makes a call wait for its result.

    **Returns:** the last value. With `throw=False`: `(val, done)`, where `done` is a
    boolean array, false if the condition still holds. States are then as the last step
    has left them.

    **Raises:** as [`statefun.scan`][]; `statefun.StateTraceError` if the condition
    writes a State; `equinox.EquinoxRuntimeError` if the condition still holds after
    `max_steps` steps, and no State is written then. `ValueError` if `max_steps` is no
    positive integer.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        count = sf.State(jnp.array(0))

        def body(x):
            count.value += 1
            return x / 2

        sf.while_loop(lambda x: count.value < 3, body, jnp.array(8.0))

        halve = lambda x: sf.while_loop(lambda x: x > 1, body, x, max_steps=100)
        sf.filter_grad(halve)(jnp.array(8.0))  # 1/8
        ```
    """
    return _while_loop(
        *(cond_fun, body_fun, as_arrays(init_val), as_max_steps(max_steps, throw)),
        *(as_checkpoint("while_loop", checkpoint), bool(throw)),
    )


def only_reads(who: str, cell: Cell) -> StateTraceError:
    return StateTraceError(
        message(
            f"the {who} wrote to {cell.describe()}.",
            "how often, and in what order, it runs is not defined.",
            "write the State outside of it.",
        )
    )


def associative_scan(
    fn: Callable[[Any, Any], Any], elems: Any, reverse: bool = False, axis: int = 0
) -> Any:
    """As `jax.lax.associative_scan`, for functions that read States.

    **Arguments:**

    - `fn`: associative, takes and returns trees like `elems`. It may read States, but
        not write any: it is called on whole slices, and in no fixed order.
    - `elems`, `reverse`, `axis`: as in `jax.lax.associative_scan`. Leaves that are no
        arrays must stay the same.

    **Returns:** a tree like `elems`.

    **Raises:** `statefun.StateTraceError` if `fn` writes a State.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        decay = sf.State(jnp.array(0.5))
        sf.associative_scan(lambda a, b: a * decay.value + b, jnp.arange(4.0))
        ```
    """
    refuse_states("associative_scan", "elems", elems)
    arrays, build = split_arrays(elems)

    def combine(a: list, b: list) -> list:
        out, written = run_pure(lambda: fn(build(a), build(b)), ends=True)
        if written.values:
            raise only_reads(
                "function of `associative_scan`", next(iter(written.values))
            )
        return split_arrays(out)[0]

    return transaction(
        lambda: build(lax.associative_scan(combine, arrays, reverse, axis))
    )
