"""Optional libraries."""

from __future__ import annotations

from .._errors import message


def missing(library: str, extra: str, for_what: str) -> ImportError:
    return ImportError(
        message(
            f"{library} is needed to {for_what}.",
            "statefun doesn't install it by default.",
            f"`python3 -m pip install 'statefun[{extra}]'`.",
        )
    )
