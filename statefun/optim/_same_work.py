"""Which optax transformations do the same thing?

An `optax.GradientTransformation` is a pair of closures, which Python compares by
identity: a second `optax.adam(1e-3)` would be another static argument, and a compiled
step would be retraced.
"""

from __future__ import annotations

from typing import Any

from .._state.fingerprint import fingerprint


class SameWork:
    """A transformation that is equal to every other one that does the same."""

    __slots__ = ("_hash", "_key", "tx")

    def __init__(self, tx: Any):
        self.tx = tx
        self._key = fingerprint(tx)
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SameWork):
            return NotImplemented
        return self is other or (self._hash == other._hash and self._key == other._key)

    def __repr__(self) -> str:
        return type(self.tx).__name__

    def __reduce__(self) -> Any:
        return SameWork, (self.tx,)
