"""`Metric`: metrics of a library, accumulated in a State."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax.tree_util as jtu
import numpy as np

from .._compat import Tracer
from .._promotion import library_promotion
from .._state.state import State


@runtime_checkable
class LibraryMetric(Protocol):
    """What `Metric` requires of a library's metric: a pytree that can be merged.

    Metrics of metrax and of clu are like this.
    """

    @classmethod
    def empty(cls) -> LibraryMetric: ...

    @classmethod
    def from_model_output(cls, *args: Any, **kwargs: Any) -> LibraryMetric: ...

    def merge(self, other: Any) -> LibraryMetric: ...

    def compute(self) -> Any: ...


class Metric(eqx.Module):
    """A metric of a library, whose accumulators are the value of a State.

    **Arguments:**

    - `kind`: a class with `empty`, `from_model_output`, `merge` and `compute`, as those
        of metrax (`pip install statefun[metrics]`) and clu.

    **Attributes:**

    - `state`: the State. Its value is an instance of `kind`.

    !!! example

        ```python
        import jax.numpy as jnp, metrax, statefun as sf

        precision = sf.metrics.Metric(metrax.Precision)

        @sf.filter_jit
        def evaluate(predictions, labels):
            precision.update(predictions=predictions, labels=labels)

        evaluate(jnp.array([0.9, 0.8, 0.1]), jnp.array([1, 0, 1]))
        precision.compute()  # 0.5
        ```

    !!! info

        Where the accumulators of the empty metric have the shapes and dtypes of the full
        one, `update` keeps them, and can be used in `sf.scan`. Some have not (metrax's
        `AUCROC` learns its thresholds from the first batch); a compiled step is then
        traced a second time, and a scan wants one `update` before it.

    Source: [metrax](https://metrax.readthedocs.io).
    """

    state: State[Any]
    kind: Any = eqx.field(static=True)

    def __init__(self, kind: type[LibraryMetric]):
        wanted = ("empty", "from_model_output", "merge", "compute")
        missing = [name for name in wanted if not hasattr(kind, name)]
        if missing:
            raise TypeError(
                f"Metric was given {kind!r}, which has no {', '.join(missing)}; it takes "
                "a class like those of metrax."
            )
        self.kind = kind
        self.state = State(kind.empty(), name=kind.__name__)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Adds a batch.

        **Arguments:** those of the class's `from_model_output`.
        """
        old = self.state.value
        with library_promotion():
            new = old.merge(self.kind.from_model_output(*args, **kwargs))
        if jtu.tree_structure(new) == jtu.tree_structure(old):
            new = jtu.tree_map(_of_dtype, old, new)
        self.state.value = new

    def compute(self) -> Any:
        """The metric so far.

        **Returns:** what the library computes; without data, what it computes for its
        empty metric (metrax's `Precision` and `MSE` are 0 then).

        **Raises:** `ValueError` if there is no data and the library's metric has no
        value without.
        """
        value = self.state.value
        try:
            with library_promotion():
                return value.compute()
        except Exception as error:
            if not _same(value, self.kind.empty()):
                raise
            raise ValueError(
                f"{self.kind.__name__} can't be computed: it has no data. Call `update` "
                "first."
            ) from error

    def reset(self) -> None:
        """Resets the accumulators to those of the empty metric."""
        self.state.value = self.kind.empty()


def _same(a: Any, b: Any) -> bool:
    """Whether two metrics are known to hold the same values."""
    a, b = jtu.tree_leaves(a), jtu.tree_leaves(b)
    if any(isinstance(x, Tracer) for x in a) or len(a) != len(b):
        return False
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def _of_dtype(old: Any, new: Any) -> Any:
    both = eqx.is_array(old) and eqx.is_array(new)
    return new.astype(old.dtype) if both else new
