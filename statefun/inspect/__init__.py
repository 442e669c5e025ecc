"""What a function does, and why it was traced."""

from ._causes import Cause as Cause
from ._explain import explain as explain
from ._report import Report as Report
from ._retraces import (
    Retrace as Retrace,
)
from ._retraces import (
    TraceLimitError as TraceLimitError,
)
from ._retraces import (
    log_retraces as log_retraces,
)
from ._retraces import (
    max_traces as max_traces,
)
