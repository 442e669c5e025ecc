"""The mutable cell that users see."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import equinox as eqx
import jax

from .. import _errors
from .._compat import array_class
from .._errors import StateTypeError, message
from . import access
from .cell import UNSET, Cell, Value
from .fingerprint import fingerprint
from .numbers import normalise
from .structure import Holder, Structure, flatten, leaves_of

T = TypeVar("T")


class State(Holder, Generic[T]):
    """A mutable cell that statefun's transforms see.

    A State is read and written through `.value`. Inside a statefun transform
    ([`statefun.filter_jit`][], …) reads become inputs of the compiled function and
    writes its outputs, however the function reached the State: as a leaf of a module
    that is an argument, through a closure, or as a global. Outside of any transform
    reads and writes just happen.

    The value is any pytree. Its arrays (`eqx.is_array`) are dynamic, everything else is
    static. Numbers and NumPy arrays become jax arrays when they are the value or sit in
    its plain tuples, lists and dicts; inside an `eqx.Module` they are left as they are.
    A Python number that is written takes the dtype of the array it replaces, and weak
    types are dropped. A State may sit in another State's value.

    `==` is identity. A State is no number or array: `state + 1`, `if state:`, `state[0]`
    and the like raise. It can't be hashed, can be copied and pickled (a State that
    occurs twice in what is copied is one State in the copy), and is a leaf, not a node,
    of pytrees.

    **Arguments:**

    - `value`: any pytree.
    - `name`: what errors and reports call the State.

    **Raises:** `statefun.StateTraceError` on a write, or a read that can't be right,
    inside a JAX transform that is not statefun's. `statefun.StateTypeError` where the
    State itself is used as a value.

    !!! example

        ```python
        import equinox as eqx, jax.numpy as jnp, statefun as sf

        class Counter(eqx.Module):
            count: sf.State

            def __init__(self):
                self.count = sf.State(jnp.array(0), name="count")

            @sf.filter_jit
            def __call__(self, x):
                self.count.value += 1
                return x * self.count.value
        ```

    !!! warning

        `state.value += 1` outside of a transform is a read and then a write: two threads
        that do it at the same time may count once. Inside `filter_jit` both count.
    """

    __slots__ = ("__weakref__", "_own")

    _own: Cell

    @property
    def _cell(self) -> Cell:
        """Where the value is: in a trace of which this is an argument, a stand-in."""
        frame = access.local.frame
        if frame is None or frame.stand_ins is None:
            return self._own
        return frame.stand_ins(self._own)

    # A kind of State whose value, though it is shared, differs between the lanes of a
    # vmap or the devices of a shard_map (random keys) says here what lane `index` of
    # `size` holds, and what the State holds after the lanes have written it. Both take
    # and return the flat value; they are static methods.
    _in_lane: ClassVar[Callable[[Any, Any, jax.Array, int], Any] | None] = None
    _after_lanes: ClassVar[Callable[[Any, Any, int], Any] | None] = None

    def __init__(self, value: T, *, name: str | None = None):
        _refuse_state(value, lambda: type(self).__name__)
        flat, structure = flatten(normalise(value))
        self._attach(flat, structure, name, _errors.caller(self))

    def _attach(self, flat: Any, structure: Any, name: str | None, where: str) -> None:
        cell = Cell(type(self), name, where)
        cell.handle = weakref.ref(self)
        access.create(cell, flat, structure)
        self._own = cell

    @property
    def value(self) -> T:
        """The value, put together from the current arrays."""
        return access.given_out(self._cell)

    @value.setter
    def value(self, value: T) -> None:
        cell = self._cell
        if type(value) is array_class():  # what most States hold
            access.write({cell: flatten(value)})
            return
        _refuse_state(value, cell.describe)
        access.check_write(cell)

        def present() -> Any:
            # A number takes the dtype that the State has: then the State is read, too.
            return access.value_of(cell) if access.has_value(cell) else None

        try:
            normal = normalise(value, present)
            new = flatten(normal)
        except TypeError as error:
            raise _errors.wrong_type(cell, error) from error
        handed = access.handed(cell)
        if handed is not None and handed.value is value:
            access.write_back(cell, handed, normal, new)
        else:
            access.write({cell: new})

    @property
    def name(self) -> str | None:
        """The name given at creation."""
        return self._cell.name

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        if access.local.frame is not None:
            # What a raw jit in here keeps of the value is looked after by the frame, see
            # `_trace.stale`; libraries that compile (diffrax) get modules with States.
            return id(self)
        raise StateTypeError(
            message(
                f"{self._cell.describe()} was hashed.",
                "outside of twins a State can't be hashed, on purpose: `eqx.filter_jit` "
                "and `jax.jit(static_argnums=…)` would take it for a static value and "
                "freeze its present value into the compiled code.",
                "`sf.filter_jit` in place of `eqx.filter_jit`; as the key of a dict, "
                "`id(state)`.",
            )
        )

    def __repr__(self) -> str:
        flat, structure = access.current(self._cell)
        name = f"name={self.name!r}, " if self.name is not None else ""
        return f"{type(self).__name__}({name}{_summary(flat, structure)})"

    # Copies are new States; `copy` and `pickle` keep track of what they have copied,
    # so a State that occurs twice stays one.

    def __copy__(self) -> State[T]:
        return self._like(access.read(self._cell))

    def __deepcopy__(self, memo: dict) -> State[T]:
        flat, structure = access.read(self._cell)
        shell = self._shell()
        new = memo[id(self)] = shell._bare()
        value = flatten(copy.deepcopy(structure.unflatten(flat), memo))
        new._attach(*value, shell.name, shell.where)
        for key, attribute in shell.attributes.items():
            object.__setattr__(new, key, copy.deepcopy(attribute, memo))
        return new

    def _static_key(self) -> Any:
        """What a traced function can see of a State beside its kind and its value."""
        attributes = _attributes(self)
        if not attributes:
            return self._cell.name
        return self._cell.name, fingerprint(attributes)

    def _shell(self) -> Shell:
        cell = self._cell
        return Shell(type(self), cell.name, cell.where, _attributes(self))

    def _stand_in(self, path: str) -> State[T]:
        """A State of the same kind and name without a value, for a traced function."""
        shell = self._shell()
        # Copies, lest the program change with a list that the user changes in place.
        new = dataclasses.replace(shell, attributes=_copied(shell.attributes))._bare()
        new._own = Cell(type(self), self.name, self._own.where)
        new._own.path = path
        new._own.handle = weakref.ref(new)
        return new

    def _like(self, value: Value) -> State[T]:
        return self._shell().state(*value)

    def __reduce__(self) -> Any:
        flat, structure = access.read(self._cell)
        return _unpickle, (self._shell(), structure.unflatten(flat))


def _used_as_value(name: str, use: str) -> Callable[..., Any]:
    def method(self: State, *args: Any, **kwargs: Any) -> Any:
        raise StateTypeError(
            message(
                f"{self._cell.describe()} was used as if it were its value, in `{use}`.",
                "a State is the cell and not what it holds; by itself it can only be "
                "asked whether it is another (`is`, `==`).",
                "write `.value`: `state.value`.",
            )
        )

    method.__name__, method.__qualname__ = name, f"State.{name}"
    return method


_BINARY = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "truediv": "/",
    "floordiv": "//",
    "mod": "%",
    "pow": "**",
    "matmul": "@",
    "and": "&",
    "or": "|",
    "xor": "^",
    "lshift": "<<",
    "rshift": ">>",
}
_FUNCTIONS = (
    "bool",
    "float",
    "int",
    "complex",
    "len",
    "iter",
    "abs",
    "round",
    "divmod",
)
_USES = {
    **{name: f"state {symbol} …" for name, symbol in _BINARY.items()},
    **{f"r{name}": f"… {symbol} state" for name, symbol in _BINARY.items()},
    **{name: f"{name}(state)" for name in _FUNCTIONS},
    "rdivmod": "divmod(…, state)",
    "lt": "state < …",
    "le": "state <= …",
    "gt": "state > …",
    "ge": "state >= …",
    "neg": "-state",
    "pos": "+state",
    "invert": "~state",
    "index": "operator.index(state)",
    "array": "asarray(state)",
    "getitem": "state[…]",
    "setitem": "state[…] = …",
    "delitem": "del state[…]",
    "contains": "… in state",
    "reversed": "reversed(state)",
}
for _name, _use in _USES.items():
    setattr(State, f"__{_name}__", _used_as_value(f"__{_name}__", _use))
State.__array_ufunc__ = None  # type: ignore[attr-defined]  # NumPy leaves `x + state` to us


class Param(State[T]):
    """A State that is trained: its inexact arrays are what gradients are taken of.

    Nothing else sets it apart from a [`statefun.State`][]. Subclass `State` in the same
    way for kinds of your own (`class Cache(sf.State): ...`) and pick them out of a tree
    with `sf.states(tree, Cache)`.

    !!! example

        ```python
        import equinox as eqx, jax, statefun as sf

        model = sf.Param(eqx.nn.Linear(2, 3, key=jax.random.key(0)), name="model")
        model.value(jax.numpy.ones(2))
        ```
    """

    __slots__ = ()


def _refuse_state(value: Any, owner: Callable[[], str]) -> None:
    if isinstance(value, State):
        raise StateTypeError(
            message(
                f"{value._cell.describe()} was given to {owner()} as its value.",
                "a State whose whole value is another State would have two `.value`s, "
                "one of them a State.",
                "pass `state.value`, or keep the State itself.",
            )
        )


def held(state: State) -> Any:
    """What a State holds, which is `.value` unless its kind gives out something else.

    Gradients are taken of it, and trees of States, copies and optimizers work on it: a
    kind that overrides `value` is neither converted twice nor half.
    """
    return access.value_of(state._cell)


@contextlib.contextmanager
def keeping_attributes(stand_ins: Sequence[State]) -> Iterator[None]:
    """Refuses that a traced function changes attributes of the States it is given.

    It has stand-ins for them, which the next trace will use as they are now.
    """
    before = [(s, _copied(_attributes(s)), _fingerprints(s)) for s in stand_ins]
    changed: list[tuple[State, str]] = []
    try:
        yield
        for state, _, then in before:
            now = _fingerprints(state)
            names = [n for n in then | now if then.get(n) != now.get(n)]
            changed.extend((state, name) for name in names)
    finally:
        for state, attributes, _ in before:
            for name in _attributes(state).keys() - attributes.keys():
                object.__delattr__(state, name)
            for name, attribute in attributes.items():
                object.__setattr__(state, name, attribute)
    for state, name in changed:
        raise StateTypeError(
            message(
                f"the attribute `{name}` of {state._own.describe()} was changed inside "
                "a traced function.",
                "inside, another State stands for the one that was passed, and what runs "
                "from then on is compiled and sets no attribute: the change would be lost.",
                "keep what changes in the State's value, or set the attribute outside.",
            )
        )


def _fingerprints(state: State) -> dict[str, Any]:
    return {name: fingerprint(x) for name, x in _attributes(state).items()}


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """The same with other lists and dicts, which may be changed in place."""
    return {name: jax.tree.map(lambda x: x, v) for name, v in attributes.items()}


def _attributes(state: State) -> dict[str, Any]:
    """What a subclass has added."""
    names = _slots(type(state))
    own = {n: getattr(state, n) for n in names if hasattr(state, n)}
    return own | dict(getattr(state, "__dict__", {}))


@functools.cache
def _slots(kind: type) -> tuple[str, ...]:
    names = [n for c in kind.__mro__ for n in getattr(c, "__slots__", ())]
    return tuple(n for n in names if n not in _OWN)


_OWN = ("__weakref__", "__dict__", "_own")


def is_state(x: Any) -> bool:
    """Whether `x` is a [`statefun.State`][] (of any kind).

    Meant as the `is_leaf` or filter argument of tree functions; a State is a leaf
    anyway.

    **Arguments:**

    - `x`: anything.

    **Returns:** a bool.

    !!! example

        ```python
        import equinox as eqx, jax.numpy as jnp, statefun as sf

        model = {"w": sf.Param(jnp.ones(2)), "size": 2}
        states, rest = eqx.partition(model, sf.is_state)
        ```
    """
    return isinstance(x, State)


@dataclasses.dataclass(frozen=True)
class Shell:
    """All of a State but its value: enough to make another one like it."""

    kind: type
    name: str | None = dataclasses.field(compare=False)
    where: str = dataclasses.field(compare=False)
    attributes: dict[str, Any]  # of a subclass

    def state(self, flat: Any, structure: Structure) -> Any:
        new = self._bare()
        new._attach(flat, structure, self.name, self.where)
        return new

    def _bare(self) -> Any:
        new: Any = self.kind.__new__(self.kind)  # type: ignore[call-overload]
        for key, attribute in self.attributes.items():
            object.__setattr__(new, key, attribute)
        return new


def _unpickle(shell: Shell, value: Any) -> Any:
    return shell.state(*flatten(value))


def _summary(flat: Any, structure: Any) -> str:
    if flat is UNSET:
        return "<no value>"
    leaves = leaves_of(flat, structure)
    if leaves is not flat:  # one array
        aval = jax.typeof(flat)
        return f"{aval.dtype}[{','.join(map(str, aval.shape))}]"
    pretty = eqx.tree_pformat(structure.unflatten(flat), width=1_000_000)
    return " ".join(pretty.split())
