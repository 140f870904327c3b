"""Prompts of different lengths in one batch: which tokens are none, on either side or in the
middle, and which positions the others get."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxkv.checks import as_layer
from jaxkv.state import CacheState
from jaxkv.tiers.place import Index


@dataclasses.dataclass(frozen=True)
class Padding:
    """The order that brings the valid ones of T tokens to the front of each row, and how many they
    are."""

    order: jax.Array  # [B, T] int32
    lengths: jax.Array  # [B] int32

    @classmethod
    def of(cls, valid: ArrayLike, batch: int, size: int) -> Padding:
        """The padding of `valid` [B, T] bool.

        Raises:
          ValueError: another shape or dtype.
        """
        valid = as_valid(valid, batch, size)
        order = jnp.argsort(~valid, axis=1, stable=True).astype(jnp.int32)
        return cls(order, valid.sum(1, dtype=jnp.int32))

    def together(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """[B, ..., T, ...] with the valid ones first."""
        return _taken(x, self.order, axis)

    def apart(self, x: jax.Array) -> jax.Array:
        """The inverse of `together`, for [B, T, ...]."""
        return _taken(x, jnp.argsort(self.order, axis=1), 1)


def _taken(x: jax.Array, order: jax.Array, axis: int) -> jax.Array:
    if order.shape[1] == 1:
        return x
    shape = [1] * x.ndim
    shape[0], shape[axis] = order.shape
    x = jnp.broadcast_to(x, (order.shape[0], *x.shape[1:]))
    return jnp.take_along_axis(x, order.reshape(shape), axis=axis)


def as_valid(valid: ArrayLike, batch: int, size: int) -> jax.Array:
    """`valid` as a JAX array, which must be bool [B, T]."""
    given: Any = valid if isinstance(valid, jax.Array) else np.asarray(valid)
    if given.shape != (batch, size) or given.dtype != jnp.bool_:
        raise ValueError(
            f"valid has shape {given.shape} and dtype {given.dtype}: must be bool [B, T] = "
            f"[{batch}, {size}], True for the tokens that are no padding"
        )
    return jnp.asarray(given)


def positions(
    state: CacheState, size: int, valid: ArrayLike | None = None, *, layer: Index = None
) -> jax.Array:
    """The positions [B, size] int32 that the next `size` tokens of each row will get, for the
    rotary embedding.

    Args:
      valid: [B, size] bool, as for `extend`: only valid tokens are counted. Others get the position
        of the valid one before them (or the row's next one), which harms nothing.
      layer: of a state with layers; None: the one that has come furthest, so that layers which keep
        nothing do not matter. Ask before the first layer appends.
    """
    layer, _ = (None, True) if layer is None else as_layer(layer, state.num_layers)
    end = state.end if state.num_layers is None else state.end.max(0)
    end = end if layer is None else state.end[layer]
    if valid is None:
        return end[:, None] + jnp.arange(size, dtype=jnp.int32)
    counted = jnp.cumsum(as_valid(valid, state.batch_size, size), axis=1, dtype=jnp.int32)
    return end[:, None] + jnp.maximum(counted - 1, 0)


def valid_from_mask(
    mask: ArrayLike, state: CacheState, *, first: ArrayLike | None = None, layer: Index = None
) -> jax.Array:
    """Which of T tokens are no padding [B, T] bool, for models that carry a mask over the slots of
    a padded cache.

    Args:
      mask: [B, T, S] or [B, 1, T, S] bool, True where query t may look at slot s.
      first: the slot of the first of the T tokens, where the model knows it, an int or [B]: a token
        is valid if its query sees itself. None: found from a causal mask without a window: a token
        is valid if its query sees one token more than those before it, and more than the row holds.

    Raises:
      ValueError: a mask of another shape or dtype.
    """
    given: Any = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    given = given[:, 0] if given.ndim == 4 and given.shape[1] == 1 else given
    if given.ndim != 3 or given.shape[0] != state.batch_size or given.dtype != jnp.bool_:
        raise ValueError(
            f"mask has shape {given.shape} and dtype {given.dtype}: must be bool [B, T, S] or "
            f"[B, 1, T, S] with B={state.batch_size}"
        )
    table = jnp.asarray(given)
    if first is not None:
        slot = jnp.broadcast_to(jnp.asarray(first, jnp.int32), (len(table),))[:, None]
        slot = slot + jnp.arange(table.shape[1], dtype=jnp.int32)
        return jnp.take_along_axis(table, slot[..., None], axis=2, mode="clip")[..., 0]
    seen = table.sum(2, dtype=jnp.int32)
    held = positions(state, 1, layer=layer)
    before = jax.lax.cummax(jnp.concatenate([held, seen[:, :-1]], axis=1), axis=1)
    return seen > before
