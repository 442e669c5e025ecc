"""Arguments of a call: arrays are dynamic, States are parameters, all else is static.

`split` takes a call's arguments apart; a `Signature` is everything about them that is
static, and puts them together again around other arrays and other States. Calls with
equal keys share a `Signature`, and through it one compiled program.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu

from .._errors import message
from .._state import access
from .._state.cell import Cell
from .._state.state import State
from .._state.static import TreeDef, is_identity, is_weak, static_key, treedef_key
from .._state.structure import ARRAY, Structure
from .._trace.names import Parameters
from .._trace.result import refuse_bare_state
from . import modules
from .forms import Unhashable, leaf_keys


class Static:
    """An argument that `static_argnums` or `static_argnames` make static: a leaf."""

    __slots__ = ("key", "value")

    def __init__(self, value: Any, label: str):
        self.value = value
        self.key = static_key(value)
        if is_identity(self.key):
            raise TypeError(
                message(
                    f"the static argument {label} can't be hashed: it is a "
                    f"{type(value).__name__}.",
                    "a static argument is part of the key under which the traced "
                    "function is cached.",
                    "pass something hashable (a tuple for a list, a frozen dataclass), "
                    "or don't make the argument static.",
                )
            )

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.key == other.key

    def __repr__(self) -> str:
        return f"Static({self.value!r})"


class Weak:
    """A static leaf that is held weakly: it is equal to itself only, so once it is gone
    no call can pass it again."""

    __slots__ = ("_ref", "label")

    def __init__(self, ref: Callable[[], Any]):
        self._ref = ref
        leaf = ref()
        self.label = getattr(leaf, "__qualname__", f"<{type(leaf).__name__}>")

    def peek(self) -> Any:
        """The leaf, or None if it is gone."""
        return self._ref()

    def __call__(self) -> Any:
        leaf = self._ref()
        assert leaf is not None, "an argument lives as long as the call"
        return leaf


class Signature:
    """What is static about a call, and stand-ins for the States among its arguments.

    The stand-ins are what the traced function sees. A program so speaks of the first,
    second, … State of the arguments, and serves every module of the same structure.
    """

    __slots__ = (
        "_key",
        "dynamic",
        "leaves",
        "nested",
        "only_arrays",
        "stand_ins",
        "treedef",
    )

    def __init__(
        self,
        leaves: Sequence[Any],
        treedef: TreeDef,
        keys: tuple,
        names: Parameters,
        states: Sequence[State] = (),
        nested: Nested = (),
    ):
        self.treedef = treedef
        self.leaves = list(leaves)
        self.stand_ins: list[State] = []
        self.dynamic = [i for i, leaf in enumerate(leaves) if eqx.is_array(leaf)]
        args, kwargs = treedef.children()
        n = args.num_leaves
        self._key = (
            (treedef_key(args), keys[:n]),
            (treedef_key(kwargs), keys[n:]),
            sum(i < n for i in self.dynamic),
        )
        self.nested = nested
        # Whether each argument is an array, given by position.
        plain = all(map(jtu.treedef_is_leaf, args.children()))
        self.only_arrays = plain and len(self.dynamic) == len(leaves) == n
        made: dict[Cell, State] = {}
        paths = jtu.tree_flatten_with_path(treedef.unflatten(leaves))[0]
        for i, leaf in enumerate(leaves):
            if eqx.is_array(leaf):
                self.leaves[i] = ARRAY
            elif isinstance(leaf, State):
                if leaf._cell not in made:
                    made[leaf._cell] = leaf._stand_in(names.path(paths[i][0]))
                    self.stand_ins.append(made[leaf._cell])
                self.leaves[i] = made[leaf._cell]
            elif is_weak(keys[i]):
                self.leaves[i] = Weak(keys[i][1])
        for owner, form, places in nested:
            outer = self.stand_ins[owner]._own.path
            for (at, *_), path in zip(places, form.state_paths(), strict=True):
                if at == len(self.stand_ins):
                    stand_in = states[at]._stand_in(f"{outer}.value{path}")
                    self.stand_ins.append(stand_in)

    def key(self, pins: Mapping[int, Cell]) -> tuple[Any, Any, int]:
        """The static parts of the positional and the keyword arguments, and how many of
        the arrays are positional."""
        args, kwargs, n = self._key
        return ((*args, *self.nested, *pins.items()), kwargs, n)

    def weak_leaves(self) -> list[Any]:
        """Functions and the like among the arguments: a cache must not keep them, nor
        what they close over."""
        return [leaf() for leaf in self.leaves if type(leaf) is Weak]

    def build(self, dynamic: Sequence[Any]) -> tuple[tuple, dict]:
        leaves = list(self.leaves)
        for i, array in zip(self.dynamic, dynamic, strict=True):
            leaves[i] = array
        leaves = [x() if type(x) is Weak else x for x in leaves]
        args, kwargs = self.treedef.unflatten(leaves)
        args = tuple(a.value if type(a) is Static else a for a in args)
        kwargs = {k: a.value if type(a) is Static else a for k, a in kwargs.items()}
        return args, kwargs

    def _argument(self) -> list[Any]:
        """For every dynamic leaf the position or name of its argument."""
        return [_key(path[1]) for path in self.paths()]

    def paths(self) -> list[tuple]:
        """Where in `(args, kwargs)` the dynamic leaves are."""
        indices = self.treedef.unflatten(range(len(self.leaves)))
        paths = [path for path, _ in jtu.tree_leaves_with_path(indices)]
        return [paths[i] for i in self.dynamic]

    def donated(self, donate: str, bound: int = 0) -> list[int]:
        """The dynamic leaves that are donated: see `filter_jit`; `bound`: `Options`."""
        if donate == "none":
            return []
        spared = bound if donate.endswith("except-first") else None
        return [i for i, arg in enumerate(self._argument()) if arg != spared]

    def spread(self, shardings: Any, bound: int = 0) -> list[Any] | None:
        """A prefix tree over the positional arguments, as a list for dynamic leaves."""
        if shardings is None:
            return None
        args, _ = self.treedef.unflatten(range(len(self.leaves)))
        if not isinstance(shardings, tuple):
            shardings = (shardings,) * (len(args) - bound)
        by_leaf = spread_prefix((None,) * bound + shardings, args)
        n = len(by_leaf)
        return [by_leaf[i] if i < n else None for i in self.dynamic]


def spread_prefix(prefix: Any, tree: Any) -> list[Any]:
    """For every leaf of `tree` the leaf of `prefix` that stands above it.

    `None`, shardings and partition specs are leaves of the prefix.
    """

    def is_leaf(x: Any) -> bool:
        return x is None or isinstance(
            x, jax.sharding.Sharding | jax.sharding.PartitionSpec
        )

    spread: list[Any] = []

    def add(item: Any, sub: Any) -> None:
        spread.extend([item] * len(jtu.tree_leaves(sub)))

    jtu.tree_map(add, prefix, tree, is_leaf=is_leaf)
    return spread


def _key(entry: Any) -> Any:
    return entry.idx if hasattr(entry, "idx") else entry.key


class StaticArguments:
    """Which arguments are static as a whole, by position and by name.

    As `jax.jit` does, positions are taken for names and names for positions where the
    signature says what belongs together.
    """

    def __init__(
        self,
        fun: Any,
        argnums: Sequence[int],
        argnames: Sequence[str],
        bound: int = 0,
    ):
        self._bound = bound  # see `Options`
        self.argnums = tuple(argnums)
        self.argnames = tuple(argnames)
        try:
            parameters = list(inspect.signature(fun).parameters.values())[bound:]
        except (ValueError, TypeError):  # a builtin has no signature
            parameters = []
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self._also = [names.index(name) for name in self.argnames if name in names]
        self._names = {
            *self.argnames,
            *(names[i] for i in self.argnums if -len(names) <= i < len(names)),
        }

    def __bool__(self) -> bool:
        return bool(self.argnums or self.argnames)

    def mark(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Wraps the arguments that are static."""
        itself, args = args[: self._bound], args[self._bound :]
        marked = list(args)
        given = sum(name in self._names for name in kwargs)
        for i in self.argnums:
            if -len(args) <= i < len(args):
                marked[i] = Static(args[i], f"at position {i}")
            elif not given:
                raise ValueError(
                    f"static_argnums has {i}, but the call has only {len(args)} "
                    "positional arguments."
                )
        for i in self._also:
            if i < len(args) and type(marked[i]) is not Static:
                marked[i] = Static(args[i], f"at position {i}")
        names = self._names
        return (*itself, *marked), {
            k: Static(v, f"{k!r}") if k in names else v for k, v in kwargs.items()
        }


def split(
    args: tuple, kwargs: dict, names: Parameters
) -> tuple[tuple, list[State], Any]:
    """Takes arguments apart; modules that came before from memory: see `modules`.

    **Returns:** the arrays, the States (each once), and the key: hashable, equal for
    arguments that differ only in their arrays and in which States they hold. How States
    are shared is part of the key. `flatten` gives what a `Signature` needs beside them.
    """
    dynamic: list[Any] = []
    states: list[State] = []
    try:
        key = _take(args, kwargs, dynamic, states, modules.apart)
    except Unhashable:
        raise _unhashable(args, kwargs, names) from None
    if len(states) > 1:
        index: dict[Cell, int] = {}
        order = [index.setdefault(state._cell, len(index)) for state in states]
        if len(index) < len(order):  # two arguments share a State
            key = key, tuple(order)
            states = [states[order.index(i)] for i in range(len(index))]
    nested = with_nested(states)
    if nested:
        key = key, nested, None, None  # no other key has four parts
    # A tuple, like the positional arguments that the fast path passes on as they are:
    # another container would be another key for JAX.
    return tuple(dynamic), states, key


def recall(args: tuple, kwargs: dict) -> tuple[Any, list[Any], list[Any]] | None:
    """As `split`, from memory alone, for the hot path.

    **Returns:** the key, in which a `forms.View` stands for each form, the arrays, and
    weak references to the cells of the States; None if it can't be done.
    """
    dynamic: list[Any] = []
    cells: list[Any] = []
    how = modules.remembered
    try:
        if kwargs:
            key = _take(args, kwargs, dynamic, cells, how)
        else:  # written out for the hot path
            key = tuple([modules.take(arg, dynamic, cells, how) for arg in args])
    except (modules.Forgotten, Unhashable):
        return None
    return key, dynamic, cells


def _take(
    args: tuple, kwargs: dict, dynamic: list[Any], states: list[Any], module: Any
) -> Any:
    key = tuple([modules.take(arg, dynamic, states, module) for arg in args])
    if not kwargs:
        return key
    names = sorted(kwargs)  # JAX's order
    parts = [modules.take(kwargs[k], dynamic, states, module) for k in names]
    return key, tuple(names), tuple(parts)


def flatten(args: tuple, kwargs: dict) -> tuple[list[Any], TreeDef, tuple]:
    """All leaves of the arguments, how they are put together, and a key for each leaf."""
    leaves, treedef = jtu.tree_flatten((args, kwargs))
    return leaves, treedef, leaf_keys(leaves)[0]


Nested = tuple[tuple[int, Structure, tuple], ...]
"""For the States of the arguments that hold others: their position, the form of their
value, and position, kind and attributes of each State in it."""


def with_nested(states: list[State]) -> Nested:
    """Adds the States that are in the values of States, so that they are States of the
    arguments, too: a program serves every network in a Param, whichever its States."""
    found = []
    positions: dict[Cell, int] = {}
    for i, state in enumerate(states):  # it grows meanwhile
        structure = access.structure_of(state._cell)
        if structure is None or not structure.states:
            continue
        positions = positions or {s._cell: i for i, s in enumerate(states)}
        places = []
        for inner in structure.states:
            at = positions.setdefault(inner._cell, len(states))
            if at == len(states):
                states.append(inner)
            places.append((at, type(inner), inner._static_key()))
        found.append((i, structure.form, tuple(places)))
    return tuple(found)


def check_arguments(args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Refuses States that are an argument themselves or sit in its plain containers."""
    for i, arg in enumerate(args):
        refuse_bare_state(arg, f"passed as argument {i}")
    for name, arg in kwargs.items():
        refuse_bare_state(arg, f"passed as argument {name!r}")


def _unhashable(args: tuple, kwargs: dict, names: Parameters) -> TypeError:
    path, leaf = next(
        (path, leaf)
        for path, leaf in jtu.tree_leaves_with_path((args, kwargs))
        if not (eqx.is_array(leaf) or isinstance(leaf, State))
        and is_identity(static_key(leaf))
    )
    return TypeError(
        message(
            f"the argument `{names.path(path)}` can't be hashed: it is a "
            f"{type(leaf).__name__}.",
            "non-array leaves are static, and part of the key under which the traced "
            "function is cached.",
            "pass an array, or something hashable.",
        )
    )
