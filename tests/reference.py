"""statefun, written naively: slow, obvious, and what the real one is compared with.

States are the entries of a dict. A function runs eagerly, statement by statement, on the
dict itself. What statefun gets from frames, lifted reads and compare-and-swap comes here
from one copy of the dict before each call, put back if the call raises.

Programs for such comparisons are data (`Assign`, `Call`, …), drawn by `programs()` and run
by `execute`, which only asks its store for `store[name]`, `store[name] = value` and
`store.call(body, x)`. `Reference` is one store; a test makes another of real States.

Results are compared bit for bit, so the programs hold only arithmetic that XLA may not
round in another way when it compiles it as a whole: integers, and for floats no product
followed by a sum, which would be contracted to one instruction with one rounding.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st


class Refused(Exception):
    """What a drawn program raises."""


class Reference:
    """A dict of values, and calls that change all of it or nothing."""

    def __init__(self, values: dict[str, Any]):
        self.values = dict(values)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.values[name] = value

    def call(self, fun: Callable, *args: Any) -> Any:
        before = dict(self.values)
        try:
            return fun(*args)
        except BaseException:
            self.values = before
            raise


class Store(Protocol):
    def __getitem__(self, name: str) -> Any: ...
    def __setitem__(self, name: str, value: Any) -> None: ...
    def call(self, fun: Any, *args: Any) -> Any: ...


# -- programs -----------------------------------------------------------------------

NAMES = ("a", "b", "c")
LONGEST = 4


@dataclasses.dataclass(frozen=True)
class Read:
    name: str


@dataclasses.dataclass(frozen=True)
class Argument:
    pass


@dataclasses.dataclass(frozen=True)
class Constant:
    value: int


@dataclasses.dataclass(frozen=True)
class Apply:
    """An operation on vectors; the longer one is cut to the length of the shorter."""

    op: str
    left: Any
    right: Any


@dataclasses.dataclass(frozen=True)
class Assign:
    """`name.value = expression`, of whatever shape and dtype that is."""

    name: str
    value: Any


@dataclasses.dataclass(frozen=True)
class Call:
    """A nested jitted function; its result is written to a State."""

    body: tuple
    argument: Any
    into: str
    caught: bool  # whether an exception in it ends here


@dataclasses.dataclass(frozen=True)
class RaiseIfLong:
    """Raises if a State's value has that many elements: known while tracing."""

    name: str
    length: int


def _cut(x: Any, y: Any) -> tuple[Any, Any]:
    n = min(x.shape[0], y.shape[0])
    x, y = x[:n], y[:n]
    if x.dtype != y.dtype:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return x, y


def _join(x: Any, y: Any) -> Any:
    if x.dtype != y.dtype:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.concatenate([x, y])[:LONGEST]


OPERATIONS: dict[str, Callable] = {
    "add": lambda x, y: jnp.add(*_cut(x, y)),
    "subtract": lambda x, y: jnp.subtract(*_cut(x, y)),
    "maximum": lambda x, y: jnp.maximum(*_cut(x, y)),
    "select": lambda x, y: jnp.where(jnp.less(*_cut(x, y)), *_cut(y, x)),
    "join": _join,
    "reverse": lambda x, y: x[::-1],
    "shorten": lambda x, y: x[: max(1, x.shape[0] - 1)],
    "to_float": lambda x, y: x.astype(jnp.float32),
}


def evaluate(expression: Any, store: Store, x: Any) -> Any:
    match expression:
        case Read(name):
            return store[name]
        case Argument():
            return x
        case Constant(value):
            return jnp.full((2,), value, jnp.int32)
        case Apply(op, left, right):
            return OPERATIONS[op](evaluate(left, store, x), evaluate(right, store, x))
    raise AssertionError(expression)


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of one vector; returns a vector and how many statements it ran."""

    statements: tuple
    result: Any

    def __call__(self, store: Store, x: Any) -> tuple[Any, int]:
        for statement in self.statements:
            execute(statement, store, x)
        return evaluate(self.result, store, x), len(self.statements)


def execute(statement: Any, store: Store, x: Any) -> None:
    match statement:
        case Assign(name, value):
            store[name] = evaluate(value, store, x)
        case RaiseIfLong(name, length):
            if store[name].shape[0] >= length:
                raise Refused(name)
        case Call(body, argument, into, caught):
            given = evaluate(argument, store, x)
            try:
                store[into] = store.call(body, given)[0]
            except Refused:
                if not caught:
                    raise


def called(program: Program) -> Iterator[Program]:
    """The bodies of nested calls, of which each is jitted once."""
    for statement in program.statements:
        if isinstance(statement, Call):
            yield statement.body
            yield from called(statement.body)


def expressions() -> st.SearchStrategy:
    leaves = st.one_of(
        st.builds(Read, st.sampled_from(NAMES)),
        st.just(Argument()),
        st.builds(Constant, st.integers(1, 9)),
    )
    return st.recursive(
        leaves,
        lambda inner: st.builds(
            Apply, st.sampled_from(sorted(OPERATIONS)), inner, inner
        ),
        max_leaves=3,
    )


def programs(depth: int = 2) -> st.SearchStrategy[Program]:
    """Small programs of reads, writes, nested calls and exceptions."""
    statement = st.builds(Assign, st.sampled_from(NAMES), expressions())
    if depth:
        statement |= st.builds(
            RaiseIfLong, st.sampled_from(NAMES), st.integers(2, LONGEST)
        )
        statement |= st.builds(
            Call,
            st.deferred(lambda: programs(depth - 1)),
            expressions(),
            st.sampled_from(NAMES),
            st.booleans(),
        )
    body = st.lists(statement, min_size=1, max_size=3).map(tuple)
    return st.builds(Program, body, expressions())


def values() -> st.SearchStrategy[jax.Array]:
    """Vectors of int32 or float32. Small whole numbers: their sums are exact."""
    numbers = st.lists(st.integers(-8, 8), min_size=1, max_size=LONGEST)
    dtypes = st.sampled_from([jnp.int32, jnp.float32])
    return st.builds(jnp.array, numbers, dtypes)


def stores() -> st.SearchStrategy[dict[str, jax.Array]]:
    return st.fixed_dictionaries({name: values() for name in NAMES})


# -- comparing ----------------------------------------------------------------------


def bits(tree: Any) -> Any:
    """A tree of arrays as something that is equal exactly if every bit is."""

    def of(leaf: Any) -> Any:
        array = np.asarray(leaf)
        return array.dtype.name, array.shape, array.tobytes()

    return jax.tree.map(of, tree)
