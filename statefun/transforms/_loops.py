"""`scan`, `map`, `fori_loop`, `while_loop` and `associative_scan`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jec
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax

from .. import _frame
from .._cell import Cell, Value
from .._compat import Tracer
from .._errors import StateTraceError, lesson
from .._program import Program
from .._structure import static_key, treedef_key
from ._eager import answering_for, compiled_when_eager
from ._progress import with_progress
from ._thread import (
    evaluate,
    note_checks,
    split_arrays,
    threaded,
    trace_body,
    transaction,
    unchanged_types,
    values_of,
)
from ._vmap import filter_vmap


class Carry:
    """What goes around in a loop: the user's carry, and the States that are written.

    Its arrays change, everything else about it has to stay.
    """

    def __init__(self, name: str, init: Any):
        self._name = name
        self.init = init
        self.arrays, self.build = split_arrays(init)

    def check(self, out: Any) -> list[Any]:
        """The arrays of what the body returned, if it is like what it was given."""
        if not _same_layout(self.init, out):
            raise TypeError(
                f"{self._name} body function carry input and carry output must have the "
                "same pytree structure and the same leaves that are no arrays, but "
                f"{_difference(self.init, out)}."
            )
        return split_arrays(out)[0]

    def promote(self, given: Sequence[Any], returned: Sequence[Any]) -> bool:
        """Weakly typed inputs take the type that the body returns, as in `jax.lax`."""
        changed = False
        for i, (a, b) in enumerate(zip(given, returned, strict=True)):
            if getattr(a, "weak_type", False) and a.dtype != b.dtype:
                # Of the weakly typed array itself: a number gives way to an array.
                common = jnp.result_type(self.arrays[i], b.dtype)
                if common == b.dtype:
                    self.arrays[i] = lax.convert_element_type(self.arrays[i], b.dtype)
                    changed = True
        return changed

    def check_types(self, given: Sequence[Any], returned: Sequence[Any]) -> None:
        paths = [
            jtu.keystr(path)
            for path, leaf in jtu.tree_leaves_with_path(self.init)
            if eqx.is_array(leaf)
        ]
        for path, a, b in zip(paths, given, returned, strict=True):
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                raise TypeError(
                    f"{self._name} body function carry input and carry output must have "
                    f"equal types, but the input carry{path} has type {a.str_short()} "
                    f"and the output {b.str_short()}."
                )


def _same_layout(a: Any, b: Any) -> bool:
    if jtu.tree_structure(a) != jtu.tree_structure(b):
        return False
    if treedef_key(jtu.tree_structure(a)) != treedef_key(jtu.tree_structure(b)):
        return False
    pairs = zip(jtu.tree_leaves(a), jtu.tree_leaves(b), strict=True)
    return all(
        (eqx.is_array(x) and eqx.is_array(y))
        or (
            not eqx.is_array(x)
            and not eqx.is_array(y)
            and static_key(x) == static_key(y)
        )
        for x, y in pairs
    )


def _difference(a: Any, b: Any) -> str:
    if jtu.tree_structure(a) != jtu.tree_structure(b):
        return f"got {jtu.tree_structure(a)} and {jtu.tree_structure(b)}"
    for (path, x), y in zip(
        jtu.tree_leaves_with_path(a), jtu.tree_leaves(b), strict=True
    ):
        if not _same_layout(x, y):
            return f"at carry{jtu.keystr(path)} the input is {x!r} and the output {y!r}"
    return "they differ"


def _trace_loop(
    name: str, carry: Carry, run: Callable[..., Any], rest: Sequence[Any]
) -> Program:
    """Traces a loop body `run(carry_arrays, *rest) -> (carry_arrays, anything)`."""
    n = len(carry.arrays)
    for attempt in (1, 2):
        program = trace_body(
            lambda *leaves: run(list(leaves[:n]), *leaves[n:]), [*carry.arrays, *rest]
        )
        given, returned = program.in_avals[:n], program.out_avals[:n]
        if attempt == 2 or not carry.promote(given, returned):
            break
    carry.check_types(given, returned)
    return program


def _element(x: Any) -> Any:
    """What the body sees of an array that is scanned over."""
    aval = jax.typeof(x)
    return jec.mapped_aval(aval.shape[0], 0, aval)


def as_arrays(tree: Any) -> Any:
    """Python numbers become arrays, as `jax.lax` takes them, except inside modules."""

    def convert(x: Any) -> Any:
        return jnp.asarray(x) if isinstance(x, bool | int | float | complex) else x

    return jtu.tree_map(convert, tree, is_leaf=lambda x: isinstance(x, eqx.Module))


class _Loop:
    """A loop body as a program, and the States that it touches."""

    def __init__(
        self, name: str, carry: Carry, run: Callable[..., Any], rest: Sequence[Any]
    ):
        self.carry = carry
        self.program = _trace_loop(name, carry, run, rest)
        self.values = values_of({**self.program.reads, **self.program.writes})
        unchanged_types(name, self.program, self.values)
        note_checks(self.program)

    @property
    def init(self) -> tuple[list[Any], list[Any]]:
        """The arrays of the carry, and the written States."""
        return self.carry.arrays, [self.values[c][0] for c in self.program.writes]

    def inside(self, states: Sequence[Any]) -> dict[Cell, Value]:
        """What the States hold in an iteration."""
        written = zip(self.program.writes.items(), states, strict=True)
        return self.values | {c: (flat, s) for (c, s), flat in written}

    def step(self, loop: Any, rest: Sequence[Any]) -> tuple[Any, list[Any]]:
        """One iteration: the next carry, and the arrays that the body returned beside."""
        arrays, states = loop
        leaves, new = evaluate(self.program, [*arrays, *rest], self.inside(states))
        n = len(arrays)
        return (leaves[:n], [flat for flat, _ in new.values()]), leaves[n:]

    def finish(self, loop: Any, beside: Sequence[Any] = ()) -> tuple[Any, Any]:
        """Writes the States; the final carry, and what the body returned beside it."""
        arrays, states = loop
        _frame.write(
            {
                c: (flat, s)
                for (c, s), flat in zip(
                    self.program.writes.items(), states, strict=True
                )
            }
        )
        _, out = self.program.out.build([*arrays, *beside])
        return self.carry.build(arrays), out


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
) -> Any:
    carry = Carry("scan", init)
    x_arrays, build_x = split_arrays(xs)

    def run(carry_arrays: list, *x: Any) -> Any:
        out, y = as_arrays(f(carry.build(carry_arrays), build_x(x)))
        return carry.check(out), y

    loop = _Loop("scan", carry, run, [_element(x) for x in x_arrays])
    steps = x_arrays[0].shape[0] if x_arrays else length
    body, x_arrays = with_progress(progress, steps or 0, loop.step, x_arrays, reverse)
    final, ys = lax.scan(
        body, loop.init, x_arrays, length, reverse, unroll, **dict(options)
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
) -> tuple[Any, Any]:
    """As `jax.lax.scan`, for bodies that read and write States.

    States that the body writes join the carry, others that it reads are closed over.
    Carry, elements and outputs may hold leaves that are no arrays (a module with its
    activation function); in the carry these must stay the same.

    **Arguments:**

    - `f`: `(carry, x) -> (carry, y)`.
    - `init`: the first carry.
    - `xs`: what to scan over: arrays with a leading axis of equal length.
    - `length`, `reverse`, `unroll`: as in `jax.lax.scan`.
    - `progress`: True, or a description, for a progress bar (needs the extra
        `progress`). It doesn't change the result.

    **Returns:** `(carry, ys)`, the outputs stacked along a new leading axis. A State that
    the body makes and returns in a module comes out with stacked values.

    **Raises:** `TypeError` if the carry changes structure, shape or dtype;
    `statefun.StateValueError` if a State does.

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
    _check_lengths(xs, length)
    return _scan(f, as_arrays(init), xs, length, reverse, unroll, options, progress)


def _check_lengths(xs: Any, length: int | None) -> None:
    """Raises as `jax.lax.scan` does, before the body is traced."""
    leaves = [x for x in jtu.tree_leaves(xs) if eqx.is_array(x)]
    if any(x.ndim == 0 for x in leaves):
        raise IndexError("scan got a value with no leading axis to scan over.")
    lengths = {x.shape[0] for x in leaves}
    if length is not None:
        lengths.add(int(length))
    if not lengths:
        raise ValueError("scan got no values to scan over and `length` not provided.")
    if len(lengths) > 1:
        raise ValueError(f"scan got values with different lengths: {sorted(lengths)}.")


def map(
    f: Callable[[Any], Any],
    xs: Any,
    *,
    batch_size: int | None = None,
    progress: bool | str = False,
) -> Any:
    """As `jax.lax.map`, for functions that read and write States.

    **Arguments:**

    - `f`: applied to one element after the other.
    - `xs`: arrays with a leading axis of equal length.
    - `batch_size`: how many elements to do at once, with [`statefun.filter_vmap`][];
        States are then shared by the elements of a batch.
    - `progress`: as of [`statefun.scan`][].

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
    return _map(f, xs, batch_size, progress)


@compiled_when_eager
def _map(
    f: Callable[[Any], Any], xs: Any, batch_size: int | None, progress: bool | str
) -> Any:
    if batch_size is None:
        return scan(lambda _, x: ((), f(x)), (), xs, progress=progress)[1]
    if batch_size < 1:
        raise ValueError(f"batch_size has to be positive, but is {batch_size}.")
    arrays, build = split_arrays(xs)
    n = arrays[0].shape[0]
    batches, rest = n // batch_size, n % batch_size
    whole = n - rest
    many = filter_vmap(lambda x: as_arrays(f(x)))

    def reshape(x: Any, into: tuple[int, ...]) -> Any:
        return x.reshape(*into, *x.shape[1:])

    outs = []
    if batches:
        stacked = build([reshape(x[:whole], (batches, batch_size)) for x in arrays])
        out = scan(lambda _, x: ((), many(x)), (), stacked, progress=progress)[1]
        out_arrays, build_out = split_arrays(out)
        outs.append(build_out([x.reshape(whole, *x.shape[2:]) for x in out_arrays]))
    if rest or not batches:
        outs.append(many(build([x[whole:] for x in arrays])))
    if len(outs) == 1:
        return outs[0]
    (first, build_out), (second, _) = [split_arrays(out) for out in outs]
    return build_out(
        [jnp.concatenate(pair) for pair in zip(first, second, strict=True)]
    )


@compiled_when_eager
def _fori_loop(
    lower: Any,
    upper: Any,
    body_fun: Callable,
    init_val: Any,
    unroll: int | bool | None,
    progress: bool | str,
) -> Any:
    carry = Carry("fori_loop", init_val)

    def run(arrays: list, i: Any) -> Any:
        return carry.check(as_arrays(body_fun(i, carry.build(arrays)))), None

    loop = _Loop("fori_loop", carry, run, [_index_type(lower, upper)])
    if progress is False:
        final = lax.fori_loop(
            lower, upper, lambda i, at: loop.step(at, [i])[0], loop.init, unroll=unroll
        )
        return loop.finish(final)[0]
    if isinstance(lower, Tracer) or isinstance(upper, Tracer):
        raise ValueError(
            "a progress bar needs loop bounds that are known when tracing."
        )
    steps = max(int(upper) - int(lower), 0)
    index = jnp.asarray(lower)

    def count(at: Any, _: Any) -> Any:
        i, loop_at = at
        return (i + 1, loop.step(loop_at, [i])[0]), []

    body, xs = with_progress(progress, steps, count, [])
    options = {} if unroll is None else {"unroll": unroll}
    (_, final), _ = lax.scan(body, (index, loop.init), xs, length=steps, **options)  # type: ignore[arg-type]
    return loop.finish(final)[0]


def _index_type(lower: Any, upper: Any) -> Any:
    """What `jax.lax.fori_loop` passes as the index."""
    seen = []
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
) -> Any:
    """As `jax.lax.fori_loop`, for bodies that read and write States.

    **Arguments:**

    - `lower`, `upper`: the first index, and the one after the last.
    - `body_fun`: `(i, val) -> val`.
    - `init_val`: the first value. Leaves that are no arrays must stay the same.
    - `unroll`: as in `jax.lax.fori_loop`.
    - `progress`: as of [`statefun.scan`][]; the bounds must be known when tracing.

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
    return _fori_loop(lower, upper, body_fun, as_arrays(init_val), unroll, progress)


@compiled_when_eager
def _while_loop(cond_fun: Callable, body_fun: Callable, init_val: Any) -> Any:
    carry = Carry("while_loop", init_val)

    def run(arrays: list) -> Any:
        return carry.check(as_arrays(body_fun(carry.build(arrays)))), None

    loop = _Loop("while_loop", carry, run, [])
    condition = trace_body(
        lambda *arrays: as_arrays(cond_fun(carry.build(arrays))), carry.arrays
    )
    if condition.writes:
        raise only_reads("condition of `while_loop`", next(iter(condition.writes)))
    note_checks(condition)
    others = values_of(c for c in condition.reads if c not in loop.values)

    def cond(at: Any) -> Any:
        arrays, states = at
        leaves, _ = evaluate(condition, arrays, others | loop.inside(states))
        return condition.out.build(leaves)

    final = lax.while_loop(cond, lambda at: loop.step(at, [])[0], loop.init)
    return loop.finish(final)[0]


@answering_for(_while_loop)
def while_loop(
    cond_fun: Callable[[Any], Any], body_fun: Callable[[Any], Any], init_val: Any
) -> Any:
    """As `jax.lax.while_loop`, for functions that read and write States.

    **Arguments:**

    - `cond_fun`: `val -> bool`; may read States, but not write any.
    - `body_fun`: `val -> val`.
    - `init_val`: the first value. Leaves that are no arrays must stay the same.

    **Returns:** the last value.

    **Raises:** as [`statefun.scan`][]; and `statefun.StateTraceError` if the condition
    writes a State.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        count = sf.State(jnp.array(0))

        def body(x):
            count.value += 1
            return x / 2

        sf.while_loop(lambda x: count.value < 3, body, jnp.array(8.0))
        ```
    """
    return _while_loop(cond_fun, body_fun, as_arrays(init_val))


def only_reads(who: str, cell: Cell) -> StateTraceError:
    return StateTraceError(
        lesson(
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
    arrays, build = split_arrays(elems)

    def combine(a: list, b: list) -> list:
        out, written = threaded(lambda: fn(build(a), build(b)))
        if written.cells:
            raise only_reads("function of `associative_scan`", written.cells[0])
        return split_arrays(out)[0]

    return transaction(
        lambda: build(lax.associative_scan(combine, arrays, reverse, axis))
    )
