"""`Optimizer`: an optax transformation, its state, and the Params it writes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import optax

from .._promotion import library_promotion, present_promotion, promotion
from .._state.state import State
from .._trace.frame import Overlay
from .._trace.transaction import transaction
from ._hyperparams import Hyperparams
from ._same_work import SameWork
from ._trained import Trained

_FUNCTIONS = ("value_fn", "grad_fn")


class Optimizer(eqx.Module):
    """Trains the Params of a tree with an optax transformation.

    The optimizer's own state is held in States, so that a training step returns nothing
    but its loss. It may be used in and outside of twins, in the closure of a step or as
    an argument of it. Two optimizers whose transformations have equal settings share
    one compiled step, even if each was made by a call of optax of its own.

    **Arguments:**

    - `tx`: any `optax.GradientTransformation`, or an `optax.MultiSteps`.
    - `wrt`: a [`statefun.Param`][], a module, or any pytree with Params in it. Their
        inexact arrays are trained; one Param in two places is one. For
        `optax.lookahead` give `optax.LookaheadParams(model, sf.clone(model))`.

    **Attributes:**

    - `opt_state`: a State, what optax calls the optimizer's state.
    - `step`: a State, the number of calls of `update`, an `int32` scalar. (With
        `MultiSteps` the Params change at every k-th call.)
    - `hyperparams`: see [`statefun.optim.Hyperparams`][].

    **Raises:** `statefun.StateTypeError` if there is no Param in `wrt`, or if one is
    inside the value of another State.

    !!! example

        ```python
        import equinox as eqx, jax, jax.numpy as jnp, optax, statefun as sf

        model = sf.Param(eqx.nn.Linear(2, 1, key=jax.random.key(0)))
        optimizer = sf.Optimizer(optax.adamw(1e-2), model)

        @sf.filter_jit
        def train_step(x, y):
            def loss():
                return jnp.mean((jax.vmap(model.value)(x) - y) ** 2)

            value, grads = sf.filter_value_and_grad(loss, wrt=model)()
            optimizer.update(grads, value=value)
            return value

        train_step(jnp.ones((8, 2)), jnp.ones((8, 1)))
        ```
    """

    wrt: Any
    opt_state: State
    step: State
    _tx: SameWork

    def __init__(self, tx: optax.GradientTransformation | optax.MultiSteps, wrt: Any):
        self._tx = SameWork(tx)
        self.wrt = wrt
        trained = Trained(wrt)
        trained.check()
        with library_promotion():
            opt_state = self.tx.init(trained.arrays())
        self.opt_state = State(opt_state, name="opt_state")
        self.step = State(jnp.array(0, jnp.int32), name="step")

    @property
    def tx(self) -> optax.GradientTransformationExtraArgs:
        """The transformation."""
        return self._tx.tx

    @property
    def hyperparams(self) -> Hyperparams:
        """What `optax.inject_hyperparams` keeps, to be read and assigned by name."""
        return Hyperparams(self.opt_state)

    def update(self, grads: Any, /, **extra_args: Any) -> None:
        """Writes the Params and the optimizer's state.

        The updates are applied by `optax.apply_updates`, so every Param keeps its dtype.

        **Arguments:**

        - `grads`: of the structure of `wrt`, as `sf.filter_grad(…, wrt=optimizer.wrt)`
            returns them (for `optax.lookahead`: of `wrt.fast`). What stands in the place
            of anything but a Param is ignored, and so is the gradient at the second
            place of a Param, which repeats the first.
        - `extra_args`: passed on to the transformation. A `grad` is, like `grads`, brought
            to the structure that the transformation works on. A `value_fn` and a
            `grad_fn` (of `optax.lbfgs`, `optax.contrib.sam`, …) don't take the
            parameters: they use the Params, which hold the trial values while they run,
            and what they write to States is dropped. They must be pure otherwise.

        **Raises:** `statefun.StateValueError` if the gradients have another structure or
        shape than the Params, naming the first path that differs. Nothing has changed
        then.

        !!! example

            ```python
            import jax.numpy as jnp, optax, statefun as sf

            w = sf.Param(jnp.ones(3))
            optimizer = sf.Optimizer(optax.sgd(0.1), w)
            optimizer.update(sf.filter_grad(lambda: jnp.sum(w.value**2), wrt=w)())
            ```
        """
        transaction(lambda: self._update(grads, extra_args))

    def _update(self, grads: Any, extra_args: dict[str, Any]) -> None:
        trained = Trained(self.wrt)
        # The transformation keeps a second set of Params; the first is what is
        # differentiated.
        ahead = isinstance(self.wrt, optax.LookaheadParams)
        moving = Trained(self.wrt.fast) if ahead else trained
        for name, extra in extra_args.items():
            if name == "grad":
                extra_args = {**extra_args, name: moving.of_gradient(extra)}
            elif name in _FUNCTIONS and extra is not None:
                at = _at(extra, moving, name == "grad_fn")
                extra_args = {**extra_args, name: at}
        params = trained.arrays()
        grads = moving.of_gradient(grads)
        with library_promotion():
            updates, opt_state = self.tx.update(
                grads, self.opt_state.value, params, **extra_args
            )
            new = optax.apply_updates(params, updates)
        trained.write(new)
        self.opt_state.value = opt_state
        self.step.value += 1


def _at(fun: Callable[..., Any], trained: Trained, gives_gradient: bool) -> Callable:
    """Turns a function that uses the Params into one of their arrays."""

    settings = present_promotion()

    @functools.wraps(fun)
    def at(params: Any, *args: Any, **kwargs: Any) -> Any:
        with Overlay(trained.values(params)), promotion(*settings):
            out = fun(*args, **kwargs)
        return trained.of_gradient(out) if gives_gradient else out

    return at
