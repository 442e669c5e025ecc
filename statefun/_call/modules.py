"""How an argument comes apart, and what is remembered about it from call to call.

Taking an `eqx.Module` apart runs Python for each of its nodes: at 100 nodes it costs
several times what `jax.jit` takes to pass the arrays on. But a module is frozen: the one
that came last time comes apart as it did then. So from the second time on that a module
is seen, this is remembered, by its identity (`Memory`):

- Its arrays, in order, and weak references to its States.
- Its `Form`: everything else about it. Forms are interned, so the key of a call compares
  them with `is`, and two modules of the same structure have the same one.
- What in it can change: lists, dicts, and the fields of modules that are not frozen (yet:
  in `__init__`; or for good: copies made by `copy`). Their items are compared, by
  identity, at each call.

Any other kind of pytree node may keep what it likes wherever it likes, and static values
with a `__hash__` of their own may be mutable. A module with one of these inside is taken
apart at each call, and so is every module inside a trace, where it may hold tracers.

Nothing is kept alive. What is remembered goes with the module, and where an item of a
list or dict goes, what is remembered about all of the module goes too. An array that is
itself such an item is held weakly. For the same reason lists and dicts are reached by
their path from the module: holding them would hold what refers back to the module.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import operator
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._compat import array_class, at_top_level
from .._state.access import local
from .._state.cell import Cell, settle, shared
from .._state.state import Param, State
from .._state.static import TreeDef, static_key
from .._state.structure import ARRAY
from .forms import Form, View, flatten_anew
from .reader import children, learn_to_read, read


class _Probe(eqx.Module):
    def method(self) -> None: ...


_BoundMethod = type(_Probe().method)
_PLAIN = frozenset({str, bytes, bool, int, float, complex, types.FunctionType})


def _name_key(name: Any) -> Any:
    return name if type(name) is str else static_key(name)


def _is_named(arg: Any) -> bool:
    """Whether a tuple of a class of its own is a named tuple, as JAX sees it."""
    kind = type(arg)
    known = _named.get(kind)
    if known is None:
        children, treedef = jtu.tree_flatten(arg, is_leaf=lambda x: x is not arg)
        known = _named[kind] = (
            treedef.node_data() == (kind, None)
            and len(children) == len(arg)
            and all(map(operator.is_, children, arg))
        )
    return known


_named: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


# -- memory -------------------------------------------------------------------------

Path = tuple[tuple[bool, Any], ...]
"""Where in a module: for each step, is it an attribute, and its name, key or index."""


class Watchlist(NamedTuple):
    """What of the modules of one form has to be looked at in every call."""

    # Lists, dicts and `__dict__`s of open modules, and tuples in one of these: an outer
    # one before those inside. Of each the keys or indices of items that are watched, too.
    watched: tuple[tuple[Path, frozenset], ...]
    weak: tuple[int, ...]  # the arrays that are items of what is watched


class Watch(NamedTuple):
    """What was in a list, dict or tuple: the keys, and a reference to each item.

    None stands for an item that is watched itself.
    """

    path: Path
    kind: type
    names: Sequence[Any] | None
    items: Sequence[Callable[[], Any] | None]


@dataclasses.dataclass(slots=True)
class Memory:
    """How a module came apart."""

    form: weakref.ref[Form]  # weak: its statics may refer to the module
    dynamic: list[Any]
    weak: Sequence[tuple[int, weakref.ref]]  # arrays that are held weakly
    cells: Sequence[weakref.ref[Cell]]
    state_keys: Sequence[tuple[int, Any]]  # of States whose attributes may change
    watched: Sequence[Watch]
    # What its States' values looked like, and when: of `shared.structures`.
    view: tuple[View | None, int] = (None, -1)
    may_change: bool = True

    def __post_init__(self) -> None:
        self.may_change = bool(self.watched or self.state_keys)

    def holds(self, module: Any) -> bool:
        """Whether the module is as it was."""
        return all(_is_as_it_was(module, watch) for watch in self.watched) and all(
            _state(self.cells[i])._static_key() == key for i, key in self.state_keys
        )

    def arrays(self) -> list[Any]:
        if not self.weak:
            return self.dynamic
        arrays = self.dynamic.copy()
        for i, ref in self.weak:
            arrays[i] = ref()
        return arrays


def _state(ref: weakref.ref[Cell]) -> State:
    return ref().handle()  # type: ignore[union-attr, misc]


# A callback of a weak reference may come between any two operations, also when the
# interpreter ends and the names of this module are gone. So it is one operation on a dict
# or one attribute that is set, and is bound to what it needs.
_entries: dict[int, _Entry] = {}


class _Entry:
    """A module that was seen, and what is remembered about it."""

    __slots__ = ("key", "memory", "ref")

    def __init__(self, module: eqx.Module):
        self.key = id(module)
        self.ref = weakref.ref(module, functools.partial(_entries.pop, self.key))
        self.memory: Memory | None = None


def _item_died(key: int, _: Any, entries: dict[int, _Entry] = _entries) -> None:
    """Of an item of a list or dict: its arrays are to go, too."""
    entry = entries.get(key)
    if entry is not None:
        entry.memory = None


def apart(
    module: Any, entry: _Entry | None, dynamic: list[Any], states: list[State]
) -> Form:
    """Takes what is no plain container apart; a module from memory where it is there."""
    nodes: list[Any] | None = None
    is_new = False
    if local.frame is None and at_top_level():
        memory = entry and entry.memory
        form = memory and memory.form()
        if memory is not None and form is not None and memory.holds(module):
            dynamic += memory.arrays()
            states += map(_state, memory.cells)
            return form
        is_new = entry is None and isinstance(module, eqx.Module)
        if is_new:
            _entries[id(module)] = _Entry(module)
            form = read(module, dynamic)
            if form is not None:
                return form
        elif entry is not None:
            nodes = []
    form, found, held = flatten_anew(module, None if nodes is None else nodes.append)
    if is_new:
        form.passed = True
        learn_to_read(module, form, lambda: _learn(module, form, ()))
    elif nodes is not None and entry is not None:
        watchlist = _learn(module, form, nodes)
        if watchlist is not None:
            entry.memory = _remember(entry, module, form, watchlist, found, held)
    dynamic += found
    states += held
    return form


class Forgotten(Exception):
    """What a call needs of an argument is not remembered."""


def remembered(
    module: Any, entry: _Entry | None, dynamic: list[Any], cells: list[weakref.ref]
) -> View:
    """As `apart`, at top level and from memory alone: appends references to the cells,
    and sees how the values in these are put together."""
    if entry is None or (memory := entry.memory) is None:
        raise Forgotten
    if memory.may_change and not memory.holds(module):
        raise Forgotten
    if cells and not set(cells).isdisjoint(memory.cells):  # a State of two arguments
        raise Forgotten
    dynamic += memory.arrays() if memory.weak else memory.dynamic
    cells += memory.cells
    view, epoch = memory.view
    if view is None or epoch != shared.structures:
        return _look(memory)
    return view


def _look(memory: Memory) -> View:
    epoch, form = shared.structures, memory.form()
    if form is None:
        raise Forgotten
    cells: list[Any] = [ref() for ref in memory.cells]
    if any(cell.handed is not None for cell in cells):
        epoch = -1  # somebody may change it in place, at any time
        settle(cells)
    structures = tuple([cell.structure for cell in cells])
    view = form.views.get(structures)
    if view is None:
        view = form.views.setdefault(structures, View(form, structures))
    memory.view = view, epoch
    return view


def _find(module: Any, path: Path) -> Any:
    for is_attribute, name in path:
        module = object.__getattribute__(module, name) if is_attribute else module[name]
    return module


def _is_as_it_was(module: Any, watch: Watch) -> bool:
    """Whether a container holds the very same items as when it was remembered."""
    try:
        node = _find(module, watch.path)
    except AttributeError:  # a field was deleted, which Equinox lets happen
        return False
    if type(node) is not watch.kind or len(node) != len(watch.items):
        return False
    if watch.names is not None:
        if not all(map(operator.is_, node, watch.names)):
            return False
        node = node.values()
    pairs = zip(node, watch.items, strict=True)
    return all(item is None or item() is x for x, item in pairs)


def _learn(module: Any, form: Form, nodes: Sequence[Any]) -> Watchlist | None:
    """What has to be looked at in a module with these nodes; None: all of it."""
    if not form.steady:
        return None
    opened = [x for x in nodes if isinstance(x, eqx.Module) and _is_open(x)]
    if not opened and form.watchlist is not None:
        return form.watchlist
    watchlist = _watchlist(module, form, set(map(id, opened)))
    form.steady = watchlist is not None
    if not opened:
        form.watchlist = watchlist
    return watchlist


def _remember(
    entry: _Entry,
    module: Any,
    form: Form,
    watchlist: Watchlist,
    dynamic: Sequence[Any],
    states: Sequence[State],
) -> Memory:
    """What is to be remembered of a module as it has just been taken apart."""

    def guard(item: Any) -> Callable[[], Any]:
        try:
            return weakref.ref(item, functools.partial(_item_died, entry.key))
        except TypeError:  # a number, a string
            return lambda: item

    def watch(path: Path, inner: frozenset) -> Watch:
        node = _find(module, path)
        names = tuple(node) if type(node) is dict else None
        pairs = enumerate(node) if names is None else node.items()
        items = [None if name in inner else guard(item) for name, item in pairs]
        return Watch(path, type(node), names, items)

    arrays, weak = list(dynamic), []
    for i in watchlist.weak:
        try:
            weak.append((i, weakref.ref(arrays[i])))
        except TypeError:  # a NumPy scalar
            continue
        arrays[i] = None
    return Memory(
        weakref.ref(form),
        arrays,
        weak,
        [weakref.ref(state._own) for state in states],
        [
            (i, state._static_key())
            for i, state in enumerate(states)
            if type(state) not in (State, Param)  # these have no attributes
        ],
        [watch(path, inner) for path, inner in watchlist.watched],
    )


def _is_open(module: eqx.Module) -> bool:
    """Whether fields of a module can be set: in its `__init__`, and in a copy.

    Equinox has no question for it, so a field is set to what it is.
    """
    if type(module).__setattr__ is not eqx.Module.__setattr__:
        return True
    for name, value in list(vars(module).items()):
        if not callable(value):  # Equinox may warn of these
            try:
                setattr(module, name, value)
            except dataclasses.FrozenInstanceError:
                return False
            break
    return True


def _watchlist(module: Any, form: Form, opened: set[int]) -> Watchlist | None:
    """Finds out where in a module something can change; None: anywhere."""
    arrays = 0
    watched: list[Path] = []
    weak: list[int] = []

    def visit(node: Any, treedef: TreeDef, path: Path, loose: bool) -> bool:
        """`loose` is whether nothing holds the node but a container that can change."""
        nonlocal arrays
        if treedef.node_data() is None:
            if eqx.is_array(node):
                if loose:
                    weak.append(arrays)
                arrays += 1
                return True
            return isinstance(node, State) or _is_constant(node)
        kind, aux = treedef.node_data()
        if node is None:
            return True
        is_module = isinstance(node, eqx.Module)
        if is_module:
            if not _is_constant(aux):
                return False
            loose = id(node) in opened
            if loose:
                path = *path, (True, "__dict__")
        elif kind is list or kind is dict:
            loose = True
        elif not (isinstance(node, tuple) and (kind is tuple or _is_named(node))):
            return False
        if loose:
            watched.append(path)
        for (name, x), below in zip(children(node), treedef.children(), strict=True):
            step = is_module and not loose, name
            if not visit(x, below, (*path, step), loose):
                return False
        return True

    if not visit(module, form.treedef, (), False):
        return None
    inner: dict[Path, set] = {path: set() for path in watched}
    for *around, (_, name) in filter(None, watched):
        inner.get(tuple(around), set()).add(name)
    paths = tuple((path, frozenset(names)) for path, names in inner.items())
    return Watchlist(paths, tuple(weak))


_CONSTANT = (
    *(str, bytes, int, float, complex, type, range, enum.Enum, np.generic, np.dtype),
    *(types.NoneType, types.FunctionType, types.BuiltinFunctionType, types.MethodType),
    *(jax.sharding.Sharding, jax.sharding.Mesh, jax.sharding.PartitionSpec),
    *(jax.Array, jnp.ufunc, jax.ShapeDtypeStruct, type(jtu.tree_structure(0))),
)


def _is_constant(static: Any) -> bool:
    """Whether a static value is equal to the same values as long as it lives."""
    kind = type(static)
    if kind.__hash__ is object.__hash__ or isinstance(static, _CONSTANT):
        return True
    if isinstance(static, tuple | frozenset):
        return all(map(_is_constant, static))
    return (
        dataclasses.is_dataclass(kind)
        and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
        and all(
            _is_constant(getattr(static, field.name, None))
            for field in dataclasses.fields(kind)
        )
    )


# -- any argument -------------------------------------------------------------------


def take(
    arg: Any,
    dynamic: list[Any],
    states: list[Any],
    module: Callable[[Any, _Entry | None, list[Any], list[Any]], Any] = apart,
) -> Any:
    """Takes an argument apart, from memory where possible.

    **Arguments:**

    - `arg`: an argument, or an item of a plain container that is one.
    - `dynamic`, `states`: its arrays and States are appended to these, in JAX's order.
    - `module`: what does it for a module: `apart`, or `remembered`.

    **Returns:** its key.
    """
    kind = type(arg)
    if kind is array_class():
        dynamic.append(arg)
        return ARRAY
    entry = _entries.get(id(arg))
    if entry is not None and entry.ref() is arg:
        return module(arg, entry, dynamic, states)
    if kind is tuple or kind is list or (issubclass(kind, tuple) and _is_named(arg)):
        return kind, tuple([take(x, dynamic, states, module) for x in arg])
    if kind is dict:
        names = sorted(arg)  # as JAX does
        items = [take(arg[name], dynamic, states, module) for name in names]
        return kind, tuple(map(_name_key, names)), tuple(items)
    if arg is None:
        return None
    if kind in _PLAIN:
        return static_key(arg)
    if kind is _BoundMethod:  # made anew at each access: its module is what lasts
        return kind, arg.__func__, take(arg.__self__, dynamic, states, module)
    if eqx.is_array(arg):  # NumPy's, and tracers
        dynamic.append(arg)
        return ARRAY
    return module(arg, None, dynamic, states)


# -- results ------------------------------------------------------------------------


class Adoption(NamedTuple):
    """A module in a result, and which of the result's arrays are its own."""

    path: Path
    form: weakref.ref[Form]
    start: int
    stop: int


def adoptions(result: Any) -> tuple[Adoption, ...]:
    """The modules in a result, if there are any that can be remembered, for `adopt`."""
    found: list[Adoption] = []
    count = 0

    def visit(item: Any, path: Path) -> None:
        nonlocal count
        if isinstance(item, eqx.Module):
            form, dynamic, states = flatten_anew(item)
            if not states and _learn(item, form, ()):
                found.append(
                    Adoption(path, weakref.ref(form), count, count + len(dynamic))
                )
            count += len(dynamic)
        elif type(item) in (list, dict) or (
            isinstance(item, tuple) and _is_named(item)
        ):
            for name, child in children(item):
                visit(child, (*path, (False, name)))
        else:
            count += sum(map(eqx.is_array, jtu.tree_leaves(item)))

    visit(result, ())
    return tuple(found)


def adopt(result: Any, found: Sequence[Adoption], arrays: Sequence[Any]) -> None:
    """Remembers the modules in a result, which were just put together from `arrays`.

    What a training step gives back is what the next one is given: so it need not be taken
    apart for that. Modules of forms that were never an argument are left alone.
    """
    for path, ref, start, stop in found:
        form = ref()
        if form is not None and form.passed and form.watchlist is not None:
            module = _find(result, path)
            entry = _Entry(module)
            entry.memory = _remember(
                entry, module, form, form.watchlist, arrays[start:stop], ()
            )
            _entries[entry.key] = entry
