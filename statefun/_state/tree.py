"""Trees of States: find them, take their values out, put values back, copy them.

A State may sit in another State's value. Key paths then go through `.value`:
`.net.value.norm.mean` is the State `mean` inside the value of the State `net`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu

from .._errors import StateValueError, message
from . import access
from .cell import Cell, Value
from .numbers import normalise
from .state import State, held
from .static import TreeKey, exact_key, static_key, treedef_key
from .structure import ARRAY, Structure, flatten, leaves_of, same, with_shapes

T = TypeVar("T")


def _walk(tree: Any, path: str = "") -> Iterator[tuple[str, State]]:
    """Every place where a State stands, outer ones before those in their values."""
    for keys, leaf in jtu.tree_leaves_with_path(tree):
        if isinstance(leaf, State):
            here = path + jtu.keystr(keys)
            yield here, leaf
            yield from _walk(held(leaf), here + ".value")


def states(tree: Any, kind: type[State] = State) -> dict[str, State]:
    """Finds the States of a tree, those in other States' values included.

    **Arguments:**

    - `tree`: any pytree.
    - `kind`: only States of this class.

    **Returns:** a dict from key path (as of `jax.tree_util.keystr`) to State, each State
    once, under the first of its paths, in the order of the tree.

    !!! example

        ```python
        import equinox as eqx, jax, statefun as sf

        model = {"net": sf.Param(eqx.nn.Linear(2, 2, key=jax.random.key(0)))}
        sf.states(model)  # {"['net']": Param(…)}
        ```
    """
    found: dict[str, State] = {}
    seen: set[Cell] = set()
    for path, state in _walk(tree):
        if state._cell not in seen:
            seen.add(state._cell)
            state._cell.path = path or None
            if isinstance(state, kind):
                found[path] = state
    return found


def values(tree: T, kind: type[State] = State) -> T:
    """The tree with each State of a kind replaced by its value, and None elsewhere.

    **Arguments:**

    - `tree`: any pytree.
    - `kind`: which States; the leaves that are not, or hold none, become `None`. A State
        inside the value of another one is replaced by its value if it is of the kind,
        and becomes `None` otherwise.

    **Returns:** an ordinary pytree of the same structure, to be given to `update`.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        model = {"w": sf.Param(jnp.ones(2)), "n": sf.State(0), "act": "relu"}
        sf.values(model, sf.Param)  # {"w": Array([1., 1.]), "n": None, "act": None}
        ```
    """

    def replace(leaf: Any) -> Any:
        if isinstance(leaf, kind):
            return inside(held(leaf))
        if isinstance(leaf, State) and states(held(leaf), kind):
            return jtu.tree_map(replace, held(leaf))
        return None

    def inside(value: Any) -> Any:
        return jtu.tree_map(lambda x: replace(x) if isinstance(x, State) else x, value)

    return jtu.tree_map(replace, tree)


def freeze(tree: T) -> T:
    """The tree with every State replaced by its value: an ordinary Equinox pytree.

    What knows nothing of States can work on it: `eqx.tree_serialise_leaves` (which
    skips a State without a word), `jax.tree.map`, raw JAX transforms. A State that
    occurs twice leaves the same arrays in both places. `update` writes back.

    **Arguments:**

    - `tree`: any pytree.

    **Returns:** the tree, with values in the place of States.

    !!! example

        ```python
        import equinox as eqx, jax, statefun as sf

        model = sf.Param(eqx.nn.Linear(2, 2, key=jax.random.key(0)))
        eqx.tree_pprint(sf.freeze(model))
        ```
    """
    return jtu.tree_map(lambda x: freeze(held(x)) if isinstance(x, State) else x, tree)


def update(tree: T, values: Any) -> T:
    """Writes values back into the States of a tree: all of them, or none.

    A State that holds shapes (`jax.ShapeDtypeStruct`, as `filter_eval_shape` leaves them)
    takes arrays of these shapes.

    **Arguments:**

    - `tree`: any pytree.
    - `values`: what `freeze` or `values` returned for such a tree, with other arrays in
        it. `None` in the place of a State leaves it as it is.

    **Returns:** the tree. Where shapes stand outside of its States, which can't be
    written, it is a new one with the same States and with arrays in their place.

    **Raises:** `statefun.StateValueError`, and changes nothing, if a value has another
    structure, shape or dtype than the State it is for, if two values for one State
    differ, or if an array outside of the States has changed (which would be lost). It
    names the path.

    !!! example

        ```python
        import jax, jax.numpy as jnp, statefun as sf

        model = {"w": sf.Param(jnp.ones(2))}
        sf.update(model, jax.tree.map(lambda x: 2 * x, sf.freeze(model)))
        ```
    """
    writes: dict[Cell, Value] = {}
    given: dict[Cell, str] = {}
    for path, state, value in _pair(tree, values, ""):
        cell = state._cell
        flat, structure = _fitting(path, cell, value)
        if cell in writes:
            pairs = zip(
                leaves_of(*writes[cell]), leaves_of(flat, structure), strict=True
            )
            try:
                differs = not all(same(a, b) for a, b in pairs)
            except TypeError as error:
                raise _misfit(
                    path,
                    cell,
                    f"a traced value beside that of `{given[cell]}`",
                    f"one State stands in both places and can hold one value; {error}. "
                    "Give `None` in one of them",
                ) from error
            if differs:
                raise _misfit(
                    path,
                    cell,
                    f"another value than `{given[cell]}`",
                    "one State stands in both places and can hold one value.",
                )
        writes[cell], given[cell] = (flat, structure), path
    filled = _filled(tree, values)
    access.write(writes)
    return filled


def _filled(tree: T, values: Any) -> T:
    """The tree with arrays in place of shapes; the tree itself if there are none."""
    if not any(isinstance(x, jax.ShapeDtypeStruct) for x in jtu.tree_leaves(tree)):
        return tree
    pairs = [(leaf, part) for _, leaf, part in _zip(tree, values, "")]
    return jtu.tree_structure(tree).unflatten(
        part if _takes(leaf, part) else leaf for leaf, part in pairs
    )


def _takes(leaf: Any, part: Any) -> bool:
    """Whether it is a shape, and the other an array of that shape and dtype."""
    if not isinstance(leaf, jax.ShapeDtypeStruct) or not eqx.is_array(part):
        return False
    return (leaf.shape, leaf.dtype) == (part.shape, part.dtype)


def _pair(tree: Any, values: Any, path: str) -> Iterator[tuple[str, State, Any]]:
    """Each State of a tree with the value for it."""
    for here, leaf, part in _zip(tree, values, path):
        if isinstance(leaf, State):
            if part is not None:
                yield from _pair_state(here, leaf, part)
        elif not (part is None or _takes(leaf, part) or _unchanged(leaf, part)):
            raise StateValueError(
                message(
                    f"the values given to `update` change `{here}`, which is no State.",
                    "a leaf outside of the States can't be written: the change would "
                    "be lost.",
                    "hold the leaf in a State (`sf.Param`), or build a new tree with "
                    "`eqx.tree_at`.",
                )
            )


def _unchanged(leaf: Any, part: Any) -> bool:
    try:
        return same(leaf, part)
    except TypeError:  # a traced array in the place of another one
        return False


def _pair_state(
    path: str, state: State, value: Any
) -> Iterator[tuple[str, State, Any]]:
    """The State itself, and the States in its value, which are written by themselves."""
    old = held(state)
    if any(isinstance(leaf, State) for leaf in jtu.tree_leaves(old)):
        own = []
        for here, leaf, part in _zip(old, value, path + ".value"):
            if isinstance(leaf, State) and part is not None and part is not leaf:
                yield from _pair_state(here, leaf, part)
            own.append(leaf if isinstance(leaf, State) or part is None else part)
        value = jtu.tree_unflatten(jtu.tree_structure(old), own)
    yield path, state, value


def _zip(tree: Any, values: Any, path: str) -> list[tuple[str, Any, Any]]:
    """The leaves of a tree, each with its path and its part of `values`."""
    leaves = jtu.tree_leaves_with_path(tree)
    try:
        parts = jtu.tree_structure(tree).flatten_up_to(values)
    except Exception as error:  # static fields may raise anything when compared
        parts = _parts(tree, values)
        if parts is None:
            raise StateValueError(
                message(
                    "the values given to `update` have another structure than the tree, "
                    f"first at `{(path + first_difference(tree, values)) or 'its root'}`.",
                    f"{error}",
                    "pass what `sf.freeze` or `sf.values` returns for this tree.",
                )
            ) from error
    return [
        (path + jtu.keystr(keys), leaf, part)
        for (keys, leaf), part in zip(leaves, parts, strict=True)
    ]


def _parts(tree: Any, values: Any) -> list[Any] | None:
    """As `flatten_up_to`, for static fields that can't be compared with `==`: an array
    in the copy of a module is another object. None if the structures differ."""
    if tree is not None and jtu.all_leaves([tree]):
        return [values]
    if type(tree) is not type(values):
        return None
    if tree is None:
        return []
    ours, our_static = jtu.default_registry.flatten_one_level(tree)
    theirs, their_static = jtu.default_registry.flatten_one_level(values)
    ours, theirs = list(ours), list(theirs)
    if len(ours) != len(theirs) or exact_key(our_static) != exact_key(their_static):
        return None
    found = []
    for a, b in zip(ours, theirs, strict=True):
        parts = _parts(a, b)
        if parts is None:
            return None
        found.extend(parts)
    return found


def tree_key(tree: Any) -> TreeKey:
    return treedef_key(jtu.tree_structure(tree))


def first_difference(tree: Any, values: Any) -> str:
    """The path of the first node of `values` that is not like that of `tree`."""
    ours, theirs = _children(tree), _children(values)
    if ours is None or theirs is None or type(tree) is not type(values):
        return ""
    statics = [jtu.default_registry.flatten_one_level(x)[1] for x in (tree, values)]
    if ours.keys() == theirs.keys() and exact_key(statics[0]) != exact_key(statics[1]):
        return ""
    for key in {**ours, **theirs}:
        if key not in ours or key not in theirs:
            return key
        if tree_key(ours[key]) != tree_key(theirs[key]):
            return key + first_difference(ours[key], theirs[key])
    return ""


def _structures_differ(
    present: Any, value: Any, old: Structure, new: Structure
) -> tuple[str, str]:
    """Where two values of different structure differ first, and in what."""
    if treedef_key(old.treedef) != treedef_key(new.treedef):
        at = first_difference(present, value)
        return at, f"a value of structure {new.treedef}, in place of {old.treedef}"
    tree = old.treedef.unflatten(range(len(old.statics)))
    for keys, i in jtu.tree_leaves_with_path(tree):
        a, b = old.statics[i], new.statics[i]
        if static_key(a) != static_key(b):
            show = ["an array" if x is ARRAY else repr(x) for x in (b, a)]
            what = f"another structure, {show[0]} in place of {show[1]}"
            return jtu.keystr(keys), what
    return "", f"static fields that differ: {new.treedef} in place of {old.treedef}"


def _children(tree: Any) -> dict[str, Any] | None:
    """The subtrees of a node by key; None for a leaf."""
    if tree is None or jtu.all_leaves([tree]):
        return None
    level = jtu.default_registry.flatten_one_level_with_keys(tree)
    return {jtu.keystr((key,)): child for key, child in level[0]}


def _fitting(path: str, cell: Cell, value: Any) -> Value:
    """The value, flat, if it has the structure, shapes and dtypes of the present one."""
    old_flat, old = access.read(cell)
    try:
        flat, structure = flatten(normalise(value, lambda: old.unflatten(old_flat)))
    except TypeError as error:
        raise _misfit(path, cell, str(error), "its dtype has to stay.") from error
    old_leaves, shaped = with_shapes(old_flat, old)
    if structure is not old and structure is not shaped:
        at, what = _structures_differ(old.unflatten(old_flat), value, old, structure)
        raise _misfit(
            path + (".value" + at if at else ""),
            cell,
            what,
            "`update` changes arrays, not the structure or the static leaves around them.",
        )
    if structure is old:
        old_leaves = leaves_of(old_flat, old)
    new_leaves = leaves_of(flat, structure)
    for key, new, present in zip(
        structure.paths(), new_leaves, old_leaves, strict=True
    ):
        new, present = jax.typeof(new), jax.typeof(present)
        if (new.shape, new.dtype) != (present.shape, present.dtype):
            raise _misfit(
                path + (".value" + key if key else ""),
                cell,
                f"{new.str_short()} in place of {present.str_short()}",
                "`update` keeps shapes and dtypes.",
            )
    return flat, structure


def _misfit(path: str, cell: Cell, what: str, why: str) -> StateValueError:
    return StateValueError(
        message(
            f"`update` was given{f', at `{path}`,' if path else ''} a value that does "
            f"not fit {cell.describe()}: {what}.",
            why,
            "convert the value first; to change what a State holds, assign to its "
            "`.value`.",
        )
    )


def clone(tree: T) -> T:
    """A copy of a tree with new States in the place of the old ones.

    The copies hold the same arrays (which are immutable). A State that occurs twice is
    one State in the copy; States in the values of States are copied, too.

    **Arguments:**

    - `tree`: any pytree.

    **Returns:** a tree of the same structure.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        model = {"w": sf.Param(jnp.ones(2))}
        teacher = sf.clone(model)
        model["w"].value += 1  # the teacher keeps its own
        ```
    """
    made: dict[Cell, State] = {}

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, State):
            return leaf
        if leaf._cell not in made:
            flat, structure = flatten(jtu.tree_map(copied, held(leaf)))
            made[leaf._cell] = leaf._like((flat, structure))
        return made[leaf._cell]

    return jtu.tree_map(copied, tree)
