"""What an optimizer trains: the inexact arrays of the Params in a tree, each once."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu

from .._errors import StateTypeError, StateValueError, message
from .._state.cell import Cell
from .._state.state import Param, State, held
from .._state.static import TreeKey, treedef_key
from .._state.structure import flatten
from .._state.tree import _children, first_difference, states


class Trained:
    """The Params of a tree, as optax wants them: a tree of arrays.

    **Arguments:**

    - `tree`: any pytree. Leaves other than Params, and Params that have occurred
        before, are None in the arrays.

    **Raises:** `statefun.StateTypeError` if there is nothing to train, or if a Param
    stands in the value of another State, which is not trained with it.
    """

    def __init__(self, tree: Any):
        self._tree = tree
        leaves, self._treedef = jtu.tree_flatten_with_path(tree)
        self._paths = [jtu.keystr(path) for path, _ in leaves]
        seen: set[Cell] = set()
        self._places: list[Param | None] = []
        for _, leaf in leaves:
            here = isinstance(leaf, Param) and leaf._cell not in seen
            self._places.append(leaf if here else None)
            if here:
                seen.add(leaf._cell)
        self._cells = seen

    def check(self) -> None:
        """Raises as the class says. It reads all States of the tree, so it is done
        once."""
        for path, state in states(self._tree, Param).items():
            if state._cell not in self._cells:
                raise _hidden(path, state)
        if not self._cells:
            raise StateTypeError(
                message(
                    "Optimizer was given a `wrt` without any Param in it.",
                    "an optimizer writes the Params that it finds there; plain arrays "
                    "and other States are left alone.",
                    "`model = sf.Param(model)`, or Params as the fields of the module.",
                )
            )

    def arrays(self) -> Any:
        """The present values."""
        return self._treedef.unflatten(
            [
                None if p is None else eqx.filter(held(p), eqx.is_inexact_array)
                for p in self._places
            ]
        )

    def parts(self, arrays: Any) -> list[tuple[Param, Any]]:
        """Each Param with its part of a tree like `arrays()`."""
        parts = self._treedef.flatten_up_to(arrays)
        pairs = zip(self._places, parts, strict=True)
        return [(param, part) for param, part in pairs if param is not None]

    def write(self, arrays: Any) -> None:
        for param, part in self.parts(arrays):
            State.value.fset(param, _combined(param, part))  # type: ignore[attr-defined]

    def values(self, arrays: Any) -> dict[Cell, Any]:
        """What the Params would hold if `arrays` were written."""
        return {p._cell: flatten(_combined(p, part)) for p, part in self.parts(arrays)}

    def of_gradient(self, grads: Any) -> Any:
        """The part of a gradient that belongs to `arrays()`, in its structure.

        **Raises:** `statefun.StateValueError` if there is none, and names the path.
        """
        try:
            parts = self._treedef.flatten_up_to(grads)
        except (ValueError, TypeError) as error:
            at = _differs_at(self._tree, grads) or ""
            raise _misfit(at, "the structure is not that of `wrt`") from error
        found = []
        for path, param, part in zip(self._paths, self._places, parts, strict=True):
            found.append(None)
            if param is None:
                continue
            like = eqx.filter(held(param), eqx.is_inexact_array)
            part = _own(param, part)
            if _key(part) != _key(like):
                at = path + first_difference(like, part)
                raise _misfit(at, "the structure is not that of the Param's arrays")
            _check_shapes(path, like, part)
            found[-1] = part
        return self._treedef.unflatten(found)


def _key(tree: Any) -> TreeKey:
    return treedef_key(jtu.tree_structure(tree))


def _own(param: State, part: Any) -> Any:
    """The gradient of a Param without those of the Params in its value."""
    leaves, treedef = jtu.tree_flatten(held(param))
    if not any(isinstance(leaf, State) for leaf in leaves):
        return part
    try:
        parts = treedef.flatten_up_to(part)
    except (ValueError, TypeError):  # the caller says where it differs
        return part
    return treedef.unflatten(
        None if isinstance(leaf, State) else x
        for leaf, x in zip(leaves, parts, strict=True)
    )


def _combined(param: State, part: Any) -> Any:
    return eqx.combine(part, held(param))


def _differs_at(tree: Any, grads: Any) -> str | None:
    """The first node of `grads` that differs from that of `tree`; a leaf matches
    any."""
    ours, theirs = _children(tree), _children(grads)
    if ours is None and tree is not None:
        return None
    if ours is None or theirs is None or type(tree) is not type(grads):
        return ""
    for key in {**ours, **theirs}:
        if key not in ours or key not in theirs:
            return key
        found = _differs_at(ours[key], theirs[key])
        if found is not None:
            return key + found
    return None


def _check_shapes(path: str, like: Any, part: Any) -> None:
    pairs = zip(jtu.tree_leaves_with_path(like), jtu.tree_leaves(part), strict=True)
    for (keys, old), new in pairs:
        if not eqx.is_array_like(new) or jax.numpy.shape(new) != old.shape:
            shape = jax.numpy.shape(new) if eqx.is_array_like(new) else new
            raise _misfit(
                path + jtu.keystr(keys),
                f"it has shape {shape}, and the Param {old.shape}",
            )


def _misfit(path: str, why: str) -> StateValueError:
    at = f"first at `{path}`" if path else "at its root"
    return StateValueError(
        message(
            f"the gradients given to `update` don't fit what the optimizer trains, {at}.",
            f"{why}.",
            "take them with respect to what the optimizer was given: "
            "`sf.filter_grad(loss, wrt=optimizer.wrt)`.",
        )
    )


def _hidden(path: str, state: State) -> StateTypeError:
    return StateTypeError(
        message(
            f"Optimizer was given `{path}`, a Param inside the value of another State.",
            "an optimizer trains the Params of a tree, and not those in the values of "
            "other States: this Param would stay as it is.",
            f"leave out the outer State, or list both: `wrt=(outer, {state.name or '…'})`.",
        )
    )
