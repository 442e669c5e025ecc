"""Layers that change while they are used.

All others are in `equinox.nn`; layers of the same name stand in for Equinox's.
"""

from ._attention import (
    Cache as Cache,
    KVCache as KVCache,
)
from ._batch_norm import BatchNorm as BatchNorm
from ._dropout import Dropout as Dropout
from ._ema import EMA as EMA
from ._equinox import (
    FromEquinox as FromEquinox,
    from_equinox as from_equinox,
    to_equinox as to_equinox,
)
from ._mode import (
    InMode as InMode,
    inference_mode as inference_mode,
    train_mode as train_mode,
)
from ._recurrent import Recurrent as Recurrent
from ._spectral_norm import SpectralNorm as SpectralNorm
from ._stack import (
    Part as Part,
    Stack as Stack,
)
