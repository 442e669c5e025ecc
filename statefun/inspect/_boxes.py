"""Which transforms a jaxpr is made of: boxes inside of boxes.

Loops, branches, `jit` and the like are equations with jaxprs inside. `grad` and `vmap`
leave no equation behind, only a mark in the name stack of the equations they made:

    transpose(jvp(vmap()))
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax.extend.core as jec


@dataclasses.dataclass(frozen=True)
class Box:
    """A transform, and what is inside.

    **Attributes:**

    - `label`: what it is called: `scan of 12`, `jit relu`, `vmap`, …
    - `equations`: how many there are in it, at all depths.
    - `inside`: the boxes in it. Equal boxes are merged.
    - `times`: how many equal boxes this one stands for.
    """

    label: str
    equations: int
    inside: tuple[Box, ...] = ()
    times: int = 1

    def to_dict(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "equations": self.equations,
            "times": self.times,
            "inside": [box.to_dict() for box in self.inside],
        }


def count(jaxpr: Any) -> Counter[str]:
    """How often each primitive occurs, at all depths."""
    found = Counter(eqn.primitive.name for eqn in jaxpr.eqns)
    for eqn in jaxpr.eqns:
        for sub in jec.jaxprs_in_params(eqn.params):
            found += count(sub)
    return found


def box_of(name: str, jaxpr: Any) -> Box:
    """The box of a whole function."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return Box(name, sum(count(jaxpr).values()), _inside(jaxpr, ()))


def _inside(jaxpr: Any, around: tuple[str, ...]) -> tuple[Box, ...]:
    """The boxes in a jaxpr whose equation stands in the transforms `around`."""
    marked = [(_below(around, _marks(eqn)), eqn) for eqn in jaxpr.eqns]
    return _group(marked, around)


def _group(
    marked: list[tuple[tuple[str, ...], Any]], around: tuple[str, ...]
) -> tuple[Box, ...]:
    """Boxes for equations with the transforms each of them is still inside of."""
    boxes: list[Box] = []
    groups: dict[str, list[tuple[tuple[str, ...], Any]]] = {}
    order: list[str | Box] = []
    for marks, eqn in marked:
        if marks:
            if marks[0] not in groups:
                groups[marks[0]] = []
                order.append(marks[0])
            groups[marks[0]].append((marks[1:], eqn))
        else:
            box = _box(eqn, around)
            if box is not None:
                order.append(box)
    for item in order:
        if isinstance(item, Box):
            boxes.append(item)
            continue
        members = groups[item]
        n = sum(1 + _size(eqn) for _, eqn in members)
        boxes.append(Box(item, n, _group(members, (*around, item))))
    return _merged(boxes)


def _size(eqn: Any) -> int:
    subs = jec.jaxprs_in_params(eqn.params)
    return sum(sum(count(sub).values()) for sub in subs)


def _box(eqn: Any, around: tuple[str, ...]) -> Box | None:
    """The box of an equation that has jaxprs inside."""
    subs = [getattr(sub, "jaxpr", sub) for sub in jec.jaxprs_in_params(eqn.params)]
    if not subs:
        return None
    if not _size(eqn):  # what is left of a function when only its result is used
        return None
    inside = [box for sub in subs for box in _inside(sub, around)]
    return Box(_label(eqn, len(subs)), _size(eqn), _merged(inside))


def _label(eqn: Any, branches: int) -> str:
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return f"scan of {params.get('length', '?')}"
    if name == "cond":
        return f"cond of {branches} branches"
    inner = params.get("name")
    if isinstance(inner, str) and inner:
        return f"{name} {inner}"
    return "while_loop" if name == "while" else str(name)


def _merged(boxes: Iterable[Box]) -> tuple[Box, ...]:
    """Each kind of box once, in order, with how often it occurs."""
    times: dict[Box, int] = {}
    for box in boxes:
        one = dataclasses.replace(box, times=1)
        times[one] = times.get(one, 0) + box.times
    return tuple(dataclasses.replace(box, times=n) for box, n in times.items())


_TRANSFORM = re.compile(r"(transpose\(jvp|jvp|vmap)\(")
_NAMES = {"transpose(jvp": "grad, backward", "jvp": "grad, forward", "vmap": "vmap"}


def _marks(eqn: Any) -> tuple[str, ...]:
    """The transforms that made an equation, outermost first."""
    stack = str(getattr(eqn.source_info, "name_stack", ""))
    return tuple(_NAMES[found] for found in _TRANSFORM.findall(stack))


def _below(around: tuple[str, ...], marks: tuple[str, ...]) -> tuple[str, ...]:
    """The marks of an equation beyond those of the boxes around."""
    n = 0
    while n < min(len(around), len(marks)) and around[n] == marks[n]:
        n += 1
    return marks[n:]
