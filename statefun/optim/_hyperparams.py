"""The hyperparameters that `optax.inject_hyperparams` keeps in the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._errors import StateValueError, message
from .._state.state import State


def _is_injected(x: Any) -> bool:
    return isinstance(x, tuple) and hasattr(x, "hyperparams")


class Hyperparams(Mapping[str, jax.Array]):
    """The current hyperparameters of an optimizer, by name; they can be assigned.

    It is a view: reading returns what the optimizer's state holds now, and assigning
    writes to it. Shape and dtype stay, so that a compiled step is not retraced. Names
    are those of the arguments that `optax.inject_hyperparams` was given
    (`"learning_rate"`); where a name occurs more than once, the place in the state
    comes before it (`"inner_states['head'].inner_state.learning_rate"`).

    !!! example

        ```python
        import jax.numpy as jnp, optax, statefun as sf

        w = sf.Param(jnp.ones(3))
        tx = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
        optimizer = sf.Optimizer(tx, w)
        optimizer.hyperparams["learning_rate"] = 1e-4
        ```
    """

    def __init__(self, opt_state: State):
        self._opt_state = opt_state

    def _found(self) -> dict[str, tuple[str, str, Any]]:
        """For each hyperparameter by its key: the path of its dict, its name, the
        state."""
        places: list[tuple[str, str, Any]] = []
        _collect(self._opt_state.value, "", places)
        names = [name for _, name, _ in places]
        return {
            name if names.count(name) == 1 else f"{path}.{name}".lstrip("."): (
                path,
                name,
                state,
            )
            for path, name, state in places
        }

    def _at(self, key: str) -> tuple[str, str, Any]:
        found = self._found()
        if key not in found:
            raise KeyError(
                f"the optimizer has no hyperparameter {key!r}; it has "
                f"{sorted(found) or 'none'}. Only what `optax.inject_hyperparams` was "
                "given is kept in the optimizer's state."
            )
        return found[key]

    def __getitem__(self, key: str) -> jax.Array:
        _, name, state = self._at(key)
        return state.hyperparams[name]

    def __setitem__(self, key: str, value: Any) -> None:
        path, name, state = self._at(key)
        if name in getattr(state, "hyperparams_states", {}):
            raise StateValueError(
                message(
                    f"the hyperparameter {key!r} was assigned, but a schedule sets it.",
                    "the schedule is evaluated at every update, and the assigned value "
                    "would be overwritten.",
                    "give `optax.inject_hyperparams` a number in place of the schedule "
                    "and assign at every step, or change the schedule.",
                )
            )
        old = state.hyperparams[name]
        new = jnp.asarray(value).astype(old.dtype)
        if new.shape != old.shape:
            raise StateValueError(
                message(
                    f"the hyperparameter {key!r} has shape {old.shape}, and a value of "
                    f"shape {new.shape} was assigned.",
                    "shape and dtype stay, so that a compiled step is not retraced.",
                    f"assign a value of shape {old.shape}.",
                )
            )
        self._opt_state.value = _replaced(self._opt_state.value, "", path, name, new)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())

    def __repr__(self) -> str:
        return f"Hyperparams({dict(self)})"


def _level(node: Any) -> tuple[list[tuple[str, Any]], Any] | None:
    """The children of a node of a pytree by key, and how to put it together again."""
    if node is None or jtu.all_leaves([node]):
        return None
    children, treedef = jtu.tree_flatten_with_path(
        node, is_leaf=lambda x: x is not node
    )
    return [(jtu.keystr(key), child) for key, child in children], treedef


def _collect(node: Any, path: str, places: list[tuple[str, str, Any]]) -> None:
    if _is_injected(node):
        places.extend((path, name, node) for name in node.hyperparams)
    level = _level(node)
    for key, child in level[0] if level else ():
        _collect(child, path + key, places)


def _replaced(node: Any, path: str, where: str, name: str, new: Any) -> Any:
    if path == where and _is_injected(node):
        return node._replace(hyperparams={**node.hyperparams, name: new})
    level = _level(node)
    if level is None or not where.startswith(path):
        return node
    children, treedef = level
    return treedef.unflatten(
        [_replaced(child, path + key, where, name, new) for key, child in children]
    )
