"""The exceptions of statefun, and how they speak about a State.

Every message has the same four parts: what happened, to which State (name, path, where
it was created), why, and what to write instead. Tests match the first line.
"""

from __future__ import annotations

import inspect


class StateError(Exception):
    """Base class of the errors that are about a State.

    Errors that Python has a class for (a wrong type, a wrong value) are raised as
    `StateTypeError` and `StateValueError`, which are also a `TypeError` and a
    `ValueError`.
    """


class StateTraceError(StateError, RuntimeError):
    """A State was read or written where JAX's tracing makes that impossible."""


class StateTypeError(StateError, TypeError):
    """A State was used where it cannot be, or given a value of the wrong type."""


class StateValueError(StateError, ValueError):
    """A State's value doesn't fit: another structure, shape or dtype was expected."""


_SKIPPED = ("statefun", "equinox", "jax", "jaxtyping", "beartype", "dataclasses")


def caller(made: object = None) -> str:
    """`file:line` of the nearest frame that is the user's.

    **Arguments:**

    - `made`: an object that is being made: `__init__`s of its subclasses don't count.
    """
    frame = inspect.currentframe()
    assert frame is not None, "this Python has no frames"
    while frame.f_back is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        code = frame.f_code
        # The `__init__` of a dataclass is made from a string.
        generated = code.co_filename.startswith("<") and code.co_name == "__init__"
        own = (
            code.co_name == "__init__"
            and code.co_argcount > 0
            and frame.f_locals.get(code.co_varnames[0]) is made
        )
        if package not in _SKIPPED and not generated and not own:
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def lesson(what: str, why: str, instead: str) -> str:
    return f"{what}\n\nWhy: {why}\n\nInstead: {instead}"
