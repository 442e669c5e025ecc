"""Which optax transformations do the same thing?

An `optax.GradientTransformation` is a pair of closures, which Python compares by
identity: a second `optax.adam(1e-3)` would be another static argument, and a compiled
step would be retraced.
"""

from __future__ import annotations

from typing import Any

import optax

from .._state.fingerprint import fingerprint


class SameWork:
    """A transformation, equal to every other one that does the same.

    Pickled is what the user gave: what optax makes of it is always closures.
    """

    __slots__ = ("_given", "_hash", "_key", "tx")

    def __init__(self, tx: optax.GradientTransformation | optax.MultiSteps):
        self._given = tx
        if isinstance(tx, optax.MultiSteps):
            tx = tx.gradient_transformation()
        self.tx = optax.with_extra_args_support(tx)
        self._key = fingerprint(self.tx)
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
        return SameWork, (self._given,)
