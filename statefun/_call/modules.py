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
from .._state.cell import Cell
from .._state.state import Param, State
from .._state.static import TreeDef, is_identity, static_key, treedef_key
from .._state.structure import ARRAY


class Form:
    """What is static about an argument, and how its States are shared: interned.

    Equal to itself only, which makes it a key that is compared in no time.
    """

    __slots__ = ("__weakref__", "plan", "steady", "treedef")

    def __init__(self, treedef: TreeDef):
        self.treedef = treedef
        self.steady = True  # until a node or a static value is found that may change
        self.plan: Plan | None = None  # for modules with all fields frozen


class Unhashable(TypeError):
    """A static leaf is no possible key. Whoever knows its path says so."""


# Without a lock, as structures are: the step that matters, `setdefault`, is atomic.
_forms: dict[Any, weakref.ref[Form]] = {}


def _intern(treedef: TreeDef, keys: tuple) -> Form:
    key = treedef_key(treedef), keys
    known = _forms.get(key)
    form = None if known is None else known()
    while form is None:
        if known is not None and _forms.get(key) is known:
            _forms.pop(key, None)
        new = Form(treedef)
        gone = functools.partial(_forms.pop, key)  # gone(ref) runs no Python code
        known = _forms.setdefault(key, weakref.ref(new, gone))
        form = known()
    return form


def leaf_keys(leaves: Sequence[Any]) -> tuple[tuple, list[Any], list[State]]:
    """A key for every leaf, the arrays, and the States, each once.

    The key of a State says which of the States it is, so how they are shared.
    """
    keys, dynamic = [], []
    states: list[State] = []
    index: dict[Cell, int] = {}
    concrete = array_class()
    for leaf in leaves:
        if type(leaf) is concrete or eqx.is_array(leaf):
            dynamic.append(leaf)
            keys.append(ARRAY)
        elif isinstance(leaf, State):
            at = index.setdefault(leaf._cell, len(index))
            if at == len(states):
                states.append(leaf)
            keys.append((type(leaf), at, leaf._static_key()))
        else:
            key = static_key(leaf)
            if is_identity(key):
                raise Unhashable
            keys.append(key)
    return tuple(keys), dynamic, states


def _apart(
    arg: Any, visit: Callable[[Any], Any] | None = None
) -> tuple[Form, list[Any], list[State]]:
    """Takes an argument apart, and shows each of its nodes on the way."""
    leaves, treedef = jtu.tree_flatten(arg, is_leaf=visit)
    keys, dynamic, states = leaf_keys(leaves)
    return _intern(treedef, keys), dynamic, states


def take(arg: Any, dynamic: list[Any], states: list[State]) -> Any:
    """Takes an argument apart, from memory where possible.

    **Arguments:**

    - `arg`: an argument, or an item of a plain container that is one.
    - `dynamic`, `states`: its arrays and States are appended to these, in JAX's order.

    **Returns:** its key.
    """
    kind = type(arg)
    if kind is array_class():
        dynamic.append(arg)
        return ARRAY
    if kind is _BoundMethod:  # made anew at each access: its module is what lasts
        return kind, arg.__func__, take(arg.__self__, dynamic, states)
    if isinstance(arg, eqx.Module):
        return _take_module(arg, dynamic, states)
    if kind is tuple or kind is list or (isinstance(arg, tuple) and _is_named(arg)):
        return kind, tuple([take(x, dynamic, states) for x in arg])
    if kind is dict:
        names = sorted(arg)  # as JAX does
        items = tuple([take(arg[name], dynamic, states) for name in names])
        return kind, tuple(map(_name_key, names)), items
    if arg is None:
        return None
    if kind in _PLAIN:
        return static_key(arg)
    if eqx.is_array(arg):  # NumPy's, and tracers
        dynamic.append(arg)
        return ARRAY
    form, found, held = _apart(arg)
    dynamic += found
    states += held
    return form


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


class Plan(NamedTuple):
    """What of the modules of one form has to be looked at in every call."""

    # Lists, dicts and `__dict__`s of open modules, and tuples in one of these: an outer
    # one before those inside.
    watched: tuple[Path, ...]
    weak: tuple[int, ...]  # the arrays that are items of what is watched


class Watch(NamedTuple):
    """What was in a list, dict or tuple: the keys, and a reference to each item.

    None stands for an item that is watched itself.
    """

    path: Path
    kind: type
    names: Sequence[Any] | None
    items: Sequence[Callable[[], Any] | None]


class Memory(NamedTuple):
    """How a module came apart."""

    form: weakref.ref[Form]  # weak: its statics may refer to the module
    dynamic: list[Any]
    weak: Sequence[tuple[int, weakref.ref]]  # arrays that are held weakly
    states: Sequence[weakref.ref[State]]
    state_keys: Sequence[tuple[int, Any]]  # of those whose attributes may change
    watched: Sequence[Watch]


class _Entry(weakref.ref):
    """A module that was seen, and what is remembered about it."""

    __slots__ = ("key", "memory")

    def __init__(self, module: eqx.Module, callback: Any):
        super().__init__(module, callback)  # type: ignore[call-arg]
        self.key = id(module)
        self.memory: Memory | None = None


class _Guard(weakref.ref):
    """An item of a list or dict: when it dies, its arrays are to go, too."""

    __slots__ = ("key",)


# A callback of a weak reference may come between any two operations, so every change here
# is one operation on a dict, or one attribute that is set.
_entries: dict[int, _Entry] = {}


def _module_died(entry: Any) -> None:
    if _entries.get(entry.key) is entry:
        _entries.pop(entry.key, None)


def _item_died(guard: Any) -> None:
    entry = _entries.get(guard.key)
    if entry is not None:
        entry.memory = None


def _take_module(module: Any, dynamic: list[Any], states: list[State]) -> Form:
    if local.frame is not None or not at_top_level():
        form, found, held = _apart(module)
    else:
        entry = _entries.get(id(module))
        if entry is None or entry() is not module:
            entry = _Entry(module, _module_died)
            form, found, held = _apart(module)
            _entries[entry.key] = entry
        else:
            form = _recall(module, entry.memory, dynamic, states)
            if form is not None:
                return form
            nodes: list[Any] = []
            form, found, held = _apart(module, nodes.append)
            entry.memory = _remember(entry, module, form, found, held, nodes)
    dynamic += found
    states += held
    return form


def _recall(
    module: Any, memory: Memory | None, dynamic: list[Any], states: list[State]
) -> Form | None:
    """The form, if the module is as it was; its arrays and States are then appended."""
    form = memory and memory.form()
    if memory is None or form is None:
        return None
    arrays = memory.dynamic
    if memory.weak:
        arrays = arrays.copy()
        for i, ref in memory.weak:
            arrays[i] = ref()
    held: Any = [ref() for ref in memory.states]
    # An array or State that is gone was an item of what is watched.
    if not all(_is_as_it_was(module, watch) for watch in memory.watched):
        return None
    if any(held[i]._static_key() != key for i, key in memory.state_keys):
        return None
    dynamic += arrays
    states += held
    return form


def _find(module: Any, path: Path) -> Any:
    for is_attribute, name in path:
        # Equinox looks at every attribute on its way out, in Python.
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


def _remember(
    entry: _Entry,
    module: Any,
    form: Form,
    dynamic: Sequence[Any],
    states: Sequence[State],
    nodes: Sequence[Any],
) -> Memory | None:
    """What is to be remembered of a module as it has just been taken apart.

    **Arguments:**

    - `nodes`: all nodes inside.
    """
    if not form.steady:
        return None
    opened = [x for x in nodes if isinstance(x, eqx.Module) and _is_open(x)]
    plan = None if opened else form.plan
    if plan is None:
        plan = _plan(module, form, set(map(id, opened)))
        if plan is None:
            form.steady = False
            return None
        if not opened:
            form.plan = plan

    def guard(item: Any) -> Callable[[], Any]:
        try:
            ref: Any = _Guard(item, _item_died)
        except TypeError:  # a number, a string
            return lambda: item
        ref.key = entry.key
        return ref

    def watch(path: Path) -> Watch:
        node = _find(module, path)
        names = tuple(node) if type(node) is dict else None
        pairs = enumerate(node) if names is None else node.items()
        items = [
            None if (*path, (False, name)) in plan.watched else guard(item)
            for name, item in pairs
        ]
        return Watch(path, type(node), names, items)

    arrays, weak = list(dynamic), []
    for i in plan.weak:
        try:
            weak.append((i, weakref.ref(arrays[i])))
        except TypeError:  # a NumPy scalar
            continue
        arrays[i] = None
    return Memory(
        weakref.ref(form),
        arrays,
        weak,
        [weakref.ref(state) for state in states],
        [
            (i, state._static_key())
            for i, state in enumerate(states)
            if type(state) not in (State, Param)  # these have no attributes
        ],
        [watch(path) for path in plan.watched],
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


def _plan(module: Any, form: Form, opened: set[int]) -> Plan | None:
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
        items = jtu.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
        for i, (((key,), x), below) in enumerate(
            zip(items, treedef.children(), strict=True)
        ):
            name = key.name if is_module else key.key if kind is dict else i
            step = is_module and not loose, name
            if not visit(x, below, (*path, step), loose):
                return False
        return True

    if not visit(module, form.treedef, (), False):
        return None
    return Plan(tuple(watched), tuple(weak))


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
