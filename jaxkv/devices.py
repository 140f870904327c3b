"""Where the arrays of a state are: copied into memory of their own, settled on a device."""

from __future__ import annotations

from typing import Any, TypeVar

import jax

from jaxkv.checks import is_concrete

State = TypeVar("State")


def copy(state: State) -> State:
    """The same in memory of its own, so that one of the two can be donated. `copy.copy` of a state
    gives it too."""
    return jax.tree.map(lambda leaf: leaf.copy(), state)


def settled(state: State, device: Any = None) -> State:
    """A new state on a device (or sharding); None: where it is, for good if there is no other.

    What a program makes of arrays is committed to their device as soon as one of them is (those
    that `device_put` or a checkpoint has put there). A state that was not committed would then be
    other than the one that comes of it, and the second call of a step would compile it anew.
    """
    if device is None and jax.local_device_count() > 1:
        return state

    def put(leaf: Any) -> Any:
        if not is_concrete(leaf):
            return leaf
        return jax.device_put(leaf, leaf.sharding if device is None else device)

    return jax.tree.map(put, state)
