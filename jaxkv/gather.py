"""All tokens held, dequantized: for looking and exporting."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxkv import ring
from jaxkv.checks import as_layer
from jaxkv.formats import Format
from jaxkv.state import CacheState, segments
from jaxkv.tiers import tokens
from jaxkv.tiers.place import Index
from jaxkv.tiers.segment import Segment
from jaxkv.tiers.tokens import Tokens


def gather(state: CacheState, *, layer: Index = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All tokens held, dequantized, sinks first, then oldest to newest. For looking and exporting:
    it unpacks the whole cache.

    Returns:
      keys [B, P, K, H], values [B, P, K, V] float32, zeros where empty; P = max_tokens.
      positions: [B, P] int32, -1 where empty, also in place of what was compressed away.
      With several layers and no `layer`, each has a leading axis L.
    """
    if layer is None and state.num_layers is not None:
        return jax.vmap(lambda layer: gather(state, layer=layer))(
            jnp.arange(state.num_layers, dtype=jnp.int32)
        )
    layer, exists = as_layer(layer, state.num_layers)
    parts = segments(state, layer)
    index = jnp.arange(state.config.max_tokens, dtype=jnp.int32)[None]
    sinks_held = jnp.zeros_like(parts[-1].low) if state.sinks is None else parts[0].high
    position = jnp.where(
        index < sinks_held[:, None], index, (parts[-1].low - sinks_held)[:, None] + index
    )
    end = jnp.maximum(sinks_held, parts[0 if state.sinks is None else 1].high)
    position = jnp.where((position < end[:, None]) & exists, position, -1)
    config, shape = state.config, (*position.shape, state.config.num_kv_heads)
    sides = [jnp.zeros((*shape, dim), jnp.float32) for dim in config.side_dims]
    held = jnp.zeros(position.shape, bool)
    for part in parts:
        inside = part.holds(position)
        held |= inside
        found = [
            _tokens_at(part, held, fmt, position, layer)
            for held, fmt in zip(part.tier.sides, part.spec.formats, strict=True)
        ]
        turned = tokens.turned_mean_of(part.tier.keys, part.spec.rotary, layer)
        found[0] = found[0] if turned is None else found[0] + turned.at(position)
        sides = [
            jnp.where(inside[..., None, None], new, old)
            for old, new in zip(sides, found, strict=True)
        ]
    keys, values = sides[0], sides[-1][..., : config.output_dim]
    return keys, values, jnp.where(held, position, -1)


def _tokens_at(
    part: Segment, held: Tokens, fmt: Format, position: jax.Array, layer: Index
) -> jax.Array:
    """The tokens [B, P, K, H] in the slots of `position` [B, P]; what is no position of the tier
    gives anything."""
    capacity = part.spec.capacity if part.pages is None else part.pages.capacity
    every = jnp.arange(capacity, dtype=jnp.int32)[None]
    every = jnp.broadcast_to(every, (position.shape[0], capacity))
    slots = ring.slot_of(position, part.spec.offset, capacity)
    found = tokens.read(held, fmt, every, layer, part.pages)
    return jnp.take_along_axis(found, slots[..., None, None], axis=1)
