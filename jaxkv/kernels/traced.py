"""Verbs that are traced once for all layers that are alike."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import jax

from jaxkv import platform
from jaxkv.checks import is_concrete

Verb = TypeVar("Verb", bound=Callable[..., Any])
PLAIN = (bool, int, float, str)


def once(verb: Verb) -> Verb:
    """The verb, a nested `jax.jit` wherever its arguments are traced or plain Python values.

    A model that unrolls its layers calls a verb with the same shapes again and again: the second
    call costs nothing to trace, and to lower but a call. Where an argument is an array that can be
    looked at, it is looked at: such calls, and those outside of any trace, go straight through.
    """

    @functools.wraps(verb)
    def nested(*args: Any, **named: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, named))
        traced = [leaf for leaf in leaves if not is_concrete(leaf)]
        plain = [leaf for leaf in leaves if is_concrete(leaf)]
        if not traced or not all(isinstance(leaf, PLAIN) for leaf in plain):
            return verb(*args, **named)
        fixed = tuple(None if not is_concrete(x) else (type(x), x) for x in leaves)
        return called(_Call(verb, tree, fixed, _setting()), traced)

    return cast(Verb, nested)


@dataclasses.dataclass(frozen=True)
class _Call:
    """All of a call that is not traced; two that are equal have one trace."""

    verb: Callable[..., Any]
    tree: Hashable
    fixed: tuple[tuple[type, Any] | None, ...]  # None where a traced value stands
    setting: tuple[Any, ...]


def _setting() -> tuple[Any, ...]:
    """What a trace asks about the platform."""
    return platform.name(), platform.no_gpu(), platform.visits_rows()


@functools.partial(jax.jit, static_argnums=0)
def called(call: _Call, traced: list[jax.Array]) -> Any:
    given = iter(traced)
    leaves = [next(given) if leaf is None else leaf[1] for leaf in call.fixed]
    args, named = jax.tree.unflatten(call.tree, leaves)
    return call.verb(*args, **named)
