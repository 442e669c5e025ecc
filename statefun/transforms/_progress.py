"""Progress bars for loops, by jax-tqdm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp


def with_progress(
    progress: bool | str,
    n: int,
    body: Callable[..., Any],
    x: Sequence[Any],
    reverse: bool = False,
) -> tuple[Callable[..., Any], Any]:
    """Adds a progress bar, drawn by the host, to a scan body and what it is scanned
    over.

    **Arguments:**

    - `progress`: False for no bar, True for a bar, or the description to show with it.
    - `n`: how many steps there are.

    **Raises:** `ImportError` that names the extra to install.
    """
    if progress is False:
        return body, x
    try:
        import jax_tqdm
    except ImportError as error:
        raise ImportError(
            "`progress=` needs jax-tqdm: `pip install statefun[progress]`."
        ) from error
    title = {"desc": progress} if isinstance(progress, str) else {}
    wrap = jax_tqdm.scan_tqdm(n, **title)  # type: ignore
    # jax-tqdm requires the steps to be numbered in the order in which they run.
    numbers = jnp.arange(n)
    counted = (numbers[::-1] if reverse else numbers), x
    return wrap(lambda carry, step: body(carry, step[1])), counted
