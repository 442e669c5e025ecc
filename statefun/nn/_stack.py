"""`Stack`: equal layers as one module, run by a loop."""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._errors import StateValueError, message
from .._state.cell import Cell
from .._state.fingerprint import fingerprint
from .._state.state import State, held
from .._state.static import static_key
from .._state.structure import flatten
from .._state.tree import first_difference, states, tree_key
from .._trace.result import unpack
from .._trace.transaction import transaction
from ..transforms._carry import as_arrays
from ..transforms._checkpoint import filter_checkpoint
from ..transforms._eager import compiled_when_eager
from ..transforms._entries import part_of, run_on_part
from ..transforms._loops import entries_of, scan, scan_blocks
from ..transforms._twin import split_arrays
from ..transforms._vmap import filter_vmap

Remat = None | int | Literal["each", "sqrt"] | Callable[..., bool]


class Stack(eqx.Module):
    """Equal layers, one after the other, as one module whose arrays are stacked.

    A stack is traced and compiled as one layer in a loop, however deep it is. Its layers
    may hold States of any kind (weights, statistics, caches, random keys): each layer
    has its own entry of them, along their leading axis. A State that the layers were
    given from outside is shared by all of them.

    **Arguments:**

    - `make`: makes a layer: `make(key)`, or `make()` without a `key`. It is traced once.
    - `n`: how many layers.
    - `key`: split into a key for each layer.

    **Attributes:**

    - `layers`: the stacked module. Its arrays, and those of the States in it, have a
        leading axis of `n`.
    - `shared`: the States that all layers share.

    !!! example

        ```python
        import equinox as eqx, jax, statefun as sf

        class Layer(eqx.Module):
            linear: sf.Param

            def __init__(self, key):
                self.linear = sf.Param(eqx.nn.Linear(8, 8, key=key))

            def __call__(self, x):
                return x + jax.nn.relu(self.linear.value(x))

        stack = sf.nn.Stack(Layer, 12, key=jax.random.key(0))
        stack(jax.numpy.ones(8))
        stack.layers.linear.value.weight.shape  # (12, 8, 8)
        ```

    !!! info

        `stack[i]` and `stack[i:j]` are [`statefun.nn.Part`][]s: they run single layers on
        the States of the stack. `unstack()` makes layers of their own.
    """

    layers: Any
    shared: tuple[State, ...]
    _n: int = eqx.field(static=True)

    def __init__(self, make: Callable[..., Any], n: int, *, key: Any = None):
        n = operator.index(n)
        if n < 1:
            raise ValueError(f"a stack has at least one layer, but `n` is {n}.")
        # Weakly: a State that the function has made must not outlive it here.
        seen: list[weakref.ref[State]] = []

        def one(*key: Any) -> Any:
            layer = make(*key)
            seen.extend(map(weakref.ref, states(layer).values()))
            return layer

        keys = () if key is None else (jax.random.split(key, n),)
        self.layers = filter_vmap(one, axis_size=n)(*keys)
        # The States that the function has made come out as others, stacked.
        given = [s for s in states(self.layers).values() if any(s is t() for t in seen)]
        self.shared = tuple(given)
        self._n = n

    @staticmethod
    def of(layers: Sequence[Any]) -> Stack:
        """A stack of layers that are there already.

        **Arguments:**

        - `layers`: modules of the same structure. The stack has States of its own, with
            the values of theirs. A State that is one and the same in all of them stays it.

        **Raises:** `statefun.StateValueError` that names the first path where two layers
        differ.

        !!! example

            ```python
            import equinox as eqx, jax, statefun as sf

            keys = jax.random.split(jax.random.key(0), 3)
            stack = sf.nn.Stack.of([eqx.nn.Linear(4, 4, key=key) for key in keys])
            ```
        """
        layers = list(layers)
        if not layers:
            raise ValueError("a stack has at least one layer, but was given none.")
        stacking = _Stacking()
        stacked = stacking.stacked(layers, "")
        return _stack(stacked, tuple(stacking.shared.values()), len(layers))

    def __call__(
        self,
        x: Any,
        *shared: Any,
        xs: Any = None,
        has_aux: bool = False,
        remat: Remat = None,
        unroll: int | bool = 1,
    ) -> Any:
        """Runs the layers one after the other.

        **Arguments:**

        - `x`: what the first layer is given; each layer returns what the next one gets,
            of the same structure, shapes and dtypes.
        - `shared`: further arguments, the same for all layers.
        - `xs`: inputs of the single layers, with a leading axis of `len(stack)`: each
            layer is called as `layer(x, *shared, entry)`. States in it (caches) hold an
            entry for each layer.
        - `has_aux`: whether the layers return a pair of what the next one gets and an
            output of their own.
        - `remat`: what the backward pass computes again, rather than to keep it: `None`,
            nothing; `"each"`, every layer; an integer, blocks of so many layers;
            `"sqrt"`, blocks of about √n; a policy of `jax.checkpoint_policies`, in every
            layer what it says. It changes neither results nor what States hold.
        - `unroll`: as in `jax.lax.scan`.

        **Returns:** what the last layer returns; with `has_aux` a pair of it and the
        stacked outputs of all layers.
        """
        _block_size(remat, self._n)  # raises before anything runs
        out, outs = _stack_call(self, x, shared, xs, has_aux, remat, unroll)
        return (out, outs) if has_aux else out

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int | slice) -> Part:
        return Part(self, *_range(index, self._n))

    def __iter__(self) -> Iterator[Part]:
        return (self[i] for i in range(self._n))

    def unstack(self) -> list[Any]:
        """The layers as modules of their own.

        **Returns:** a list. Their States are new, and hold the entries that those of the
        stack hold now; what is written to them later is not seen by the stack. States
        that all layers share stay these.

        !!! example

            ```python
            import equinox as eqx, jax, statefun as sf

            make = lambda key: eqx.nn.Linear(4, 4, key=key)
            first, second = sf.nn.Stack(make, 2, key=jax.random.key(0)).unstack()
            ```
        """
        return [part.copy() for part in self]


@compiled_when_eager
def _stack_call(
    stack: Stack,
    x: Any,
    shared: tuple,
    xs: Any,
    has_aux: bool,
    remat: Any,
    unroll: int | bool,
) -> tuple[Any, Any]:
    def one(x: Any, at: tuple[Any, Any]) -> tuple[Any, Any]:
        layer, entry = at
        out = layer(x, *shared, *(() if xs is None else (entry,)))
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(
                "with `has_aux=True` each layer of a stack has to return a pair, but "
                f"one returned {type(out).__name__}."
            )
        return out if has_aux else (out, None)

    x, n = as_arrays(x), len(stack)
    each = (stack.layers, xs)
    axes = [(s, None) for s in stack.shared]
    block = _block_size(remat, n)
    if block is None:
        if remat is not None:
            policy = None if remat == "each" else remat
            # In a loop that isn't unrolled no two layers have anything in common.
            one = filter_checkpoint(one, policy=policy, prevent_cse=unroll != 1)
        return scan(one, x, each, n, unroll=unroll, state_axes=axes)
    entries = entries_of("Stack", one, (x, shared), each, n, axes)
    inner = {"unroll": unroll, "state_axes": entries.in_front()}
    blocks = filter_checkpoint(
        lambda x, each: scan(one, x, each, **inner), prevent_cse=False
    )
    return scan_blocks("Stack", blocks, x, each, entries, block)


class Part(eqx.Module):
    """One or several neighboring layers of a [`statefun.nn.Stack`][].

    Its States are those of the stack: what a layer writes when it is run through a part
    is its entry in the stack. Arrays outside of States are slices of the stack's.

    `part[i]`, `part[i:j]`, `len` and iteration as of the stack. Taking a gradient with
    respect to a part is taking it with respect to the States of the whole stack: it has
    the stacked shape, with zeros for the layers that were not run.

    !!! example

        ```python
        import equinox as eqx, jax, jax.numpy as jnp, statefun as sf

        class Count(eqx.Module):
            calls: sf.State

            def __init__(self):
                self.calls = sf.State(jnp.array(0))

            def __call__(self, x):
                self.calls.value += 1
                return x + 1

        stack = sf.nn.Stack(Count, 3)
        stack[1](jnp.array(0.0))
        stack[1].apply(lambda layer: layer.calls.value)  # 1
        stack.layers.calls.value  # [0, 1, 0]
        ```
    """

    stack: Stack
    _start: int = eqx.field(static=True)
    _n: int | None = eqx.field(static=True)  # None: a single layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer, or for several the stack, is called."""
        return self.apply(lambda layers: layers(*args, **kwargs))

    def apply(self, f: Callable[[Any], Any]) -> Any:
        """Calls a function with the layer, or with a stack of the several layers.

        **Arguments:**

        - `f`: may read and write the States of the layer, call its methods, …

        **Returns:** what `f` returns. A State of the layer that is part of it is that of
        the stack, with all entries.
        """
        stack, shape = self.stack, () if self._n is None else (self._n,)

        def run() -> Any:
            axes = [(s, None) for s in stack.shared]
            entries = entries_of("Stack", f, (), stack.layers, stack._n, axes)
            arrays, build = split_arrays(stack.layers)
            layers = build([part_of(x, self._start, shape) for x in arrays])
            if self._n is not None:
                layers = _stack(layers, stack.shared, self._n)
            return unpack(run_on_part(entries, lambda: f(layers), self._start, shape))

        return transaction(run)

    def copy(self) -> Any:
        """The layer as a module of its own, or a stack of the several layers.

        Its States are new, but for those that all layers of the stack share.
        """
        stack, made = self.stack, {s._cell: s for s in self.stack.shared}
        shape = () if self._n is None else (self._n,)

        def copied(leaf: Any) -> Any:
            if eqx.is_array(leaf):
                return part_of(leaf, self._start, shape)
            if not isinstance(leaf, State):
                return leaf
            if leaf._cell not in made:
                value = jtu.tree_map(copied, held(leaf))
                made[leaf._cell] = leaf._like(flatten(value))
            return made[leaf._cell]

        layers = jtu.tree_map(copied, stack.layers)
        return layers if self._n is None else _stack(layers, stack.shared, self._n)

    def __len__(self) -> int:
        if self._n is None:
            raise TypeError(
                "this part of a stack is a single layer, and has no length."
            )
        return self._n

    def __getitem__(self, index: int | slice) -> Part:
        start, n = _range(index, len(self))
        return Part(self.stack, self._start + start, n)

    def __iter__(self) -> Iterator[Part]:
        return (self[i] for i in range(len(self)))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            message(
                f"a part of a stack has no attribute {name!r}.",
                "it runs layers whose arrays and States are entries of the stack's, and "
                "has none of its own.",
                f"`part.apply(lambda layer: layer.{name})` for what is in the layer; "
                f"`part.copy().{name}` for that of a copy; `stack.layers.{name}` for all "
                "layers together.",
            )
        )


def _stack(layers: Any, shared: tuple[State, ...], n: int) -> Stack:
    stack = object.__new__(Stack)
    for name, value in (("layers", layers), ("shared", shared), ("_n", n)):
        object.__setattr__(stack, name, value)
    return stack


def _range(index: int | slice, n: int) -> tuple[int, int | None]:
    """Where a part begins, and how many layers it has; None for a single layer."""
    if isinstance(index, slice):
        start, stop, step = index.indices(n)
        if step != 1 or stop <= start:
            raise IndexError(
                f"a part of a stack is one or several neighboring layers, not {index}."
            )
        return start, stop - start
    i = operator.index(index)
    if not -n <= i < n:
        raise IndexError(f"the stack has {n} layers, and none of the number {i}.")
    return i % n, None


def _block_size(remat: Any, n: int) -> int | None:
    """How many layers are computed again together, if it is blocks of them."""
    if isinstance(remat, int) and not isinstance(remat, bool) and remat > 0:
        return min(remat, n)
    if isinstance(remat, str) and remat == "sqrt":
        return math.isqrt(n - 1) + 1
    if remat is None or callable(remat) or (isinstance(remat, str) and remat == "each"):
        return None
    raise ValueError(
        f"`remat` is {remat!r}, but should be None, 'each', 'sqrt', the number of layers "
        "in a block, or a policy of `jax.checkpoint_policies`."
    )


class _Stacking:
    """Makes one tree of equal ones: arrays and the values of States are stacked."""

    def __init__(self) -> None:
        self.shared: dict[Cell, State] = {}
        self._made: dict[tuple[Cell, ...], State] = {}
        self._group: dict[Cell, tuple[Cell, ...]] = {}

    def stacked(self, trees: Sequence[Any], path: str) -> Any:
        first, *others = trees
        for i, tree in enumerate(others, 1):
            if tree_key(tree) != tree_key(first):
                at = path + first_difference(first, tree)
                raise _differ(i, at, "other structure or other static fields")
        leaves = zip(*map(jtu.tree_leaves, trees), strict=True)
        new = [
            self._leaf(path + jtu.keystr(keys), xs)
            for (keys, _), xs in zip(
                jtu.tree_leaves_with_path(first), leaves, strict=True
            )
        ]
        return jtu.tree_unflatten(jtu.tree_structure(first), new)

    def _leaf(self, path: str, xs: Sequence[Any]) -> Any:
        keys = [_key(x) for x in xs]
        for i, key in enumerate(keys):
            if key != keys[0]:
                raise _differ(i, path, f"{_shown(xs[i])}, in place of {_shown(xs[0])}")
        if isinstance(xs[0], State):
            return self._state(path, xs)
        return jnp.stack(xs) if eqx.is_array(xs[0]) else xs[0]

    def _state(self, path: str, states: Sequence[State]) -> State:
        first, cells = states[0], tuple(s._cell for s in states)
        if len(cells) > 1 and len(set(cells)) == 1:
            return self.shared.setdefault(cells[0], first)
        if cells not in self._made:
            for i, cell in enumerate(cells):
                if self._group.setdefault(cell, cells) != cells or cell in self.shared:
                    what = f"{cell.describe()}, which stands in another place as well"
                    raise _differ(i, path, what)
            value = self.stacked([held(s) for s in states], path + ".value")
            self._made[cells] = first._like(flatten(value))
        return self._made[cells]


def _key(leaf: Any) -> Any:
    """Equal for leaves that can be stacked."""
    if isinstance(leaf, State):
        return type(leaf), fingerprint(leaf._shell().attributes)
    if eqx.is_array(leaf):
        return leaf.shape, leaf.dtype
    return static_key(leaf)


def _shown(leaf: Any) -> str:
    return jax.typeof(leaf).str_short() if eqx.is_array(leaf) else repr(leaf)


def _differ(i: int, path: str, what: str) -> StateValueError:
    return StateValueError(
        message(
            f"layer {i} differs from layer 0 at `{path or 'its root'}`: it has {what}.",
            "the layers of a stack are one traced function on different arrays, so all "
            "else about them has to be equal.",
            "make the layers equal there, or call them one after the other.",
        )
    )
