"""Why a function had to be traced: what is different from what was traced before."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.tree_util as jtu

from .._call.args import Signature, Static, Weak
from .._call.compiled import Trace
from .._call.keys import jax_configuration
from .._call.site import Site
from .._state import access
from .._state.cell import UNSET, Cell, Value
from .._state.fingerprint import fingerprint
from .._state.state import State
from .._state.static import static_key
from .._state.structure import ARRAY, Structure, leaves_of
from .._trace.names import Parameters
from ._names import Captured

Kind = Literal[
    "first call",
    "argument",
    "static",
    "structure",
    "state",
    "configuration",
    "cache full",
    "cleared",
    "gone",
    "failed",
    "tracer",
    "sharing",
]


@dataclasses.dataclass(frozen=True)
class Cause:
    """One reason for a trace; `str` makes a phrase of it.

    **Attributes:**

    - `kind`: one of "first call", "argument" (other shape, dtype, weak type or sharding
        of an array), "static" (other value of a non-array leaf), "structure" (of the
        arguments), "state", "configuration" (of jax), "cache full", "cleared", "gone"
        (a State that was closed over), "failed" (the trace before raised), "tracer"
        (the function closes over a value of another trace), "sharing" (of States).
    - `where`: the path of the argument, the name of the State or of the option.
    - `what`: what is different about it: "shape", "dtype", …
    - `old`, `new`: as text.
    """

    kind: Kind
    where: str = ""
    what: str = ""
    old: str = ""
    new: str = ""

    def __str__(self) -> str:
        change = f" ({self.old} → {self.new})" if self.old or self.new else ""
        where = self.where
        if self.kind == "structure":
            where = f" `{where}`" if where else "s"
        return _PHRASES[self.kind].format(where=where, what=self.what) + change


_PHRASES: dict[str, str] = {
    "first call": "first call",
    "argument": "other {what} of argument `{where}`",
    "static": "other static value at `{where}`",
    "structure": "other structure of argument{where}",
    "state": "State `{where}` changed {what}",
    "configuration": "other jax configuration: {where}",
    "cache full": "cache full: this trace was dropped for newer ones",
    "cleared": "the cache was cleared",
    "gone": "State `{where}` is gone, which the function used",
    "failed": "the trace before it raised",
    "tracer": "the function closes over a value of the trace around it",
    "sharing": "States are shared in another way among the arguments and the closure",
}


class Present:
    """What a function is about to be traced for."""

    def __init__(self, site: Site, dynamic: Sequence[Any], known: Mapping[Cell, Value]):
        self.site = site
        self.known = known
        self.avals = tuple(jax.typeof(x) for x in dynamic)
        self.key = site.cache_key(self.avals)
        self.configuration = configuration()
        self._context = jax_configuration()
        self.parameters = Parameters(site.calls.fun)
        self._captured: Captured | None = None
        self._avals: dict[Cell, tuple] = {}
        # In another site, the State at the same place of the arguments.
        self._by_path = {cell.path: cell for cell in site.arg_cells}

    def name(self, cell: Cell) -> str:
        if cell.path:
            return cell.path
        if self._captured is None:
            # What is passed may be a function, too: the body of a scan.
            arguments = [
                (self.parameters.path(keys), leaf)
                for keys, leaf in leaves_with_path(self.site.signature)
                if not isinstance(leaf, State)
            ]
            self._captured = Captured(self.site.calls.fun, arguments)
        return self._captured.states.get(cell) or cell.name or cell.describe()

    def current(self, cell: Cell) -> Value:
        return self.known.get(cell) or access.current(cell)

    def distance(self, site: Site, trace: Trace) -> int:
        """Roughly how many differences there are to an earlier trace; fast."""
        n = int(trace.configuration is not self._context)
        old = trace.key
        for a, b in (
            (old.static_args, self.key.static_args),
            (old.static_kwargs, self.key.static_kwargs),
            (old.dyn_args, self.key.dyn_args),
            (old.dyn_kwargs, self.key.dyn_kwargs),
        ):
            n += _count(a, b)
        for cell, structure, avals in trace.program.reads_with_avals():
            here = self._here(site, cell)
            if here is not None:
                flat, present = self.current(here)
                if present is not structure:
                    n += 1
                elif flat is not UNSET:
                    n += _count(avals, self._state_avals(here, flat, structure))
        return n

    def _here(self, site: Site, cell: Cell) -> Cell | None:
        return self._by_path.get(cell.path) if cell in site.arg_cells else cell

    def _state_avals(self, cell: Cell, flat: Any, structure: Structure) -> tuple:
        found = self._avals.get(cell)
        if found is None:
            found = tuple(jax.typeof(x) for x in leaves_of(flat, structure))
            self._avals[cell] = found
        return found

    def differences(self, site: Site, trace: Trace, before: dict) -> list[Cause]:
        """What is different from an earlier trace."""
        return [
            *self._static(site),
            *self._arguments(site, trace),
            *self._states(site, trace),
            *self._configuration(trace, before),
        ]

    def _configuration(self, trace: Trace, before: dict) -> Iterator[Cause]:
        causes = list(_configurations(before, self.configuration))
        if not causes and trace.configuration is not self._context:
            # Something that is part of JAX's cache keys, but has no name.
            causes = [Cause("configuration", "a user context, or its caches cleared")]
        yield from causes

    def _static(self, site: Site) -> Iterator[Cause]:
        old, new = site.signature, self.site.signature
        if old is new or site.cache_key(()) == self.site.cache_key(()):
            return
        causes = list(_compare_calls(old, new, self.parameters))
        yield from causes or [Cause("sharing")]

    def _arguments(self, site: Site, trace: Trace) -> Iterator[Cause]:
        if trace.program.in_avals == self.avals and site is self.site:
            return
        old = dict(zip(_places(site.signature), trace.program.in_avals, strict=True))
        new = zip(_places(self.site.signature), self.avals, strict=True)
        for keys, aval in new:
            before = old.get(keys)
            if before is not None and before != aval:
                yield Cause(
                    "argument", self.parameters.path(keys), *aval_change(before, aval)
                )

    def _states(self, site: Site, trace: Trace) -> Iterator[Cause]:
        for cell, structure, avals in trace.program.reads_with_avals():
            here = self._here(site, cell)
            if here is None:
                continue
            change = state_change(self.current(here), structure, avals)
            if change is not None:
                name = self.name(cell)
                if cell in site.arg_cells:
                    name = self._argument_name(here)
                yield Cause("state", name, *change)

    def _argument_name(self, cell: Cell) -> str:
        signature = self.site.signature
        for keys, leaf in leaves_with_path(signature):
            if isinstance(leaf, State) and leaf._cell is cell:
                return self.parameters.path(keys)
        return cell.path or cell.describe()


def _count(a: Any, b: Any) -> int:
    """In how many places two nested tuples differ."""
    if a is b:
        return 0
    if type(a) is tuple and type(b) is tuple and len(a) == len(b):
        return sum(_count(x, y) for x, y in zip(a, b, strict=True) if x is not y)
    try:
        return int(bool(a != b)) if type(a) is not tuple else 8
    except Exception:  # an `==` of the user's that raises
        return 1


def configuration() -> dict[str, Any]:
    """The named part of JAX's configuration that a trace may depend on."""
    mesh = str(jax.sharding.get_abstract_mesh())
    return {**jax.config.values, "the mesh": mesh}


def _configurations(before: dict, now: dict) -> Iterator[Cause]:
    for name, value in now.items():
        old = before.get(name)
        if old is not value and old != value:
            yield Cause("configuration", name, "value", text(old), text(value))


# -- arrays and States --------------------------------------------------------------


def aval_text(aval: Any) -> str:
    shape = ",".join(map(str, getattr(aval, "shape", ())))
    return f"{getattr(aval, 'dtype', aval)}[{shape}]"


def aval_change(old: Any, new: Any) -> tuple[str, str, str]:
    """What is different, and both as text."""
    what = [
        part for part in ("shape", "dtype") if getattr(old, part) != getattr(new, part)
    ]
    if what:
        return " and ".join(what), aval_text(old), aval_text(new)
    weak = ["weak" if getattr(a, "weak_type", False) else "strong" for a in (old, new)]
    if weak[0] != weak[1]:
        both = [f"{word} {aval_text(new)}" for word in weak]
        return "weak type", both[0], both[1]
    both = [text(getattr(a, "sharding", a)) for a in (old, new)]
    return "sharding", both[0], both[1]


def state_change(
    value: Value, structure: Structure, avals: tuple
) -> tuple[str, str, str] | None:
    """What is different about a State's value; None if nothing is."""
    flat, present = value
    if flat is UNSET:
        return None
    if present is not structure:
        trees = [s.treedef.unflatten(s.statics) for s in (structure, present)]
        for cause in _compare(trees[0], trees[1], ""):
            return f"structure{_at(cause.where)}", cause.old, cause.new
        return "structure", text(structure.treedef), text(present.treedef)
    now = [jax.typeof(x) for x in leaves_of(flat, structure)]
    for path, new, old in zip(structure.paths(), now, avals, strict=True):
        if new != old:
            what, before, after = aval_change(old, new)
            return f"{what}{_at(path)}", before, after
    return None


def _at(path: str) -> str:
    return f" at `{path}`" if path else ""


# -- what is static -----------------------------------------------------------------


def leaves_with_path(signature: Signature) -> list[tuple[tuple, Any]]:
    """The leaves of a call. Of a leaf held weakly the object itself, while it lives."""
    tree = signature.treedef.unflatten(range(len(signature.leaves)))
    leaves = [
        (leaf.peek() or leaf) if type(leaf) is Weak else leaf
        for leaf in signature.leaves
    ]
    return [(keys, leaves[i]) for keys, i in jtu.tree_leaves_with_path(tree)]


def _places(signature: Signature) -> list[tuple]:
    """The places of the arrays."""
    return [keys for keys, leaf in leaves_with_path(signature) if leaf is ARRAY]


def _compare_calls(
    old: Signature, new: Signature, parameters: Parameters
) -> Iterator[Cause]:
    (old_args, old_kwargs), (new_args, new_kwargs) = (
        s.treedef.unflatten([leaf for _, leaf in leaves_with_path(s)])
        for s in (old, new)
    )
    for i, (a, b) in enumerate(zip(old_args, new_args, strict=False)):
        yield from _compare(a, b, parameters.positional(i))
    for name in old_kwargs.keys() & new_kwargs.keys():
        yield from _compare(old_kwargs[name], new_kwargs[name], name)
    given = [
        [parameters.positional(i) for i in range(len(args))] + sorted(kwargs)
        for args, kwargs in ((old_args, old_kwargs), (new_args, new_kwargs))
    ]
    if given[0] != given[1] or len(old_args) != len(new_args):
        texts = [", ".join(names) or "none" for names in given]
        if texts[0] == texts[1]:  # the same ones, but by position or by name
            texts = [f"{len(a)} by position" for a in (old_args, new_args)]
        yield Cause("structure", "", "structure", texts[0], texts[1])


def _compare(a: Any, b: Any, path: str) -> Iterator[Cause]:
    """Where two trees differ in what is static."""
    a, b = (x.value if type(x) is Static else x for x in (a, b))
    if a is b:
        return
    leaves = _is_leaf(a), _is_leaf(b)
    special = any(x is ARRAY or isinstance(x, State) for x in (a, b))
    if type(a) is not type(b) and not all(leaves):
        yield _other_kind(a, b, path)
    elif special:
        if type(a) is not type(b):
            yield _other_kind(a, b, path)
        elif isinstance(a, State):
            yield from _compare_states(a, b, path)
    elif type(a) is type(b) and dataclasses.is_dataclass(a):
        # The configuration that users pass: its fields say more than its repr. Of a
        # module only the static fields are looked at here, the others are its children.
        for field in dataclasses.fields(a):
            if leaves[0] or field.metadata.get("static", False):
                fields = [getattr(x, field.name, None) for x in (a, b)]
                yield from _compare(fields[0], fields[1], f"{path}.{field.name}")
        if not leaves[0]:
            yield from _compare_children(a, b, path)
    elif leaves[0]:
        if not _same(a, b):
            yield Cause("static", path, "value", *_both(a, b))
    else:
        yield from _compare_children(a, b, path)


def _compare_states(a: State, b: State, path: str) -> Iterator[Cause]:
    """What a traced function can see of two States of one kind beside their values."""
    if a.name != b.name:
        yield Cause("state", path, "name", text(a.name), text(b.name))
    ours, theirs = a._shell().attributes, b._shell().attributes
    for name in ours | theirs:
        both = [fingerprint(x[name]) if name in x else _NONE for x in (ours, theirs)]
        if both[0] != both[1]:
            shown = _both(ours.get(name, _NONE), theirs.get(name, _NONE))
            yield Cause("state", path, f"attribute `{name}`", *shown)


_NONE: Any = type("_None", (), {"__repr__": lambda self: "none"})()


def _other_kind(a: Any, b: Any, path: str) -> Cause:
    return Cause("structure", path, "structure", _kind(a), _kind(b))


def _compare_children(a: Any, b: Any, path: str) -> Iterator[Cause]:
    ours, theirs = _children(a), _children(b)
    if ours.keys() != theirs.keys():
        sizes = [f"{_kind(x)} of {len(c)}" for x, c in ((a, ours), (b, theirs))]
        if sizes[0] == sizes[1]:
            sizes = [", ".join(c) for c in (ours, theirs)]
        yield Cause("structure", path, "structure", *map(shorten, sizes))
        return
    for key in ours:
        yield from _compare(ours[key], theirs[key], path + key)


def _is_leaf(x: Any) -> bool:
    return x is not None and jtu.all_leaves([x])


def _children(node: Any) -> dict[str, Any]:
    if node is None:
        return {}
    level = jtu.default_registry.flatten_one_level_with_keys(node)
    return {jtu.keystr((key,)): child for key, child in level[0]}


def _same(a: Any, b: Any) -> bool:
    try:
        return bool(static_key(a) == static_key(b))
    except Exception:  # an `==` of the user's that raises
        return False


def _both(a: Any, b: Any) -> tuple[str, str]:
    old, new = text(a), text(b)
    if old != new:
        return old, new
    # A lambda that is created at every call looks like the one before.
    return old, f"another {type(b).__name__} that looks the same"


def _kind(x: Any) -> str:
    if x is ARRAY or eqx.is_array(x):
        return "an array"
    if x is None or (_is_leaf(x) and not isinstance(x, State)):
        return text(x)
    return type(x).__name__


def text(x: Any) -> str:
    """An object on one line."""
    if isinstance(x, types.FunctionType):
        code = x.__code__
        file = code.co_filename.rpartition("/")[2]
        return f"{x.__qualname__} at {file}:{code.co_firstlineno}"
    try:
        return shorten(repr(x))
    except Exception:  # a `__repr__` of the user's that raises
        return f"<{type(x).__name__}>"


def shorten(shown: str, width: int = 60) -> str:
    shown = " ".join(shown.split())
    return shown if len(shown) <= width else shown[: width - 1] + "…"
