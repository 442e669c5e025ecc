"""Optimizers whose state is held in States."""

from ._hyperparams import (
    Hyperparams as Hyperparams,
)
from ._optimizer import (
    Optimizer as Optimizer,
)
