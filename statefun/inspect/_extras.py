"""Libraries that only some users have."""

from __future__ import annotations

from .._errors import message


def missing(library: str, extra: str, for_what: str) -> ImportError:
    return ImportError(
        message(
            f"{library} is needed to {for_what}.",
            "it is not among what statefun installs by itself.",
            f"`python3 -m pip install 'statefun[{extra}]'`.",
        )
    )
