"""What a state holds."""

from __future__ import annotations

import numpy as np

from jaxkv.reference.cache import ReferenceState
from jaxkv.reference.formats import Array
from jaxkv.reference.row import starts_of


def held(state: ReferenceState, row: int, end: int | None = None) -> dict[int, Array]:
    """Key and value [2, K, H] of every token that a row holds, by position, oldest first; or of
    what it held when it ended at an earlier `end`, as far as that is still there."""
    tokens = state.rows[row].tokens[:end]
    starts = starts_of(state.config, state.rows[row], end)
    found = {
        position: tokens[position][1]
        for position in range(min(len(tokens), state.config.sink_tokens))
    }
    for position in range(starts[-1], len(tokens)):
        tier = next(i for i, start in enumerate(starts) if position >= start)
        found[position] = tokens[position][1 + tier]
    return found


def gather(state: ReferenceState) -> tuple[Array, Array, Array]:
    """Keys and values [B, max_tokens, K, H or V] and positions [B, max_tokens], oldest first, -1
    where empty."""
    config = state.config
    shape = (len(state.rows), config.max_tokens)
    width = max(config.head_dim, config.output_dim)
    pairs = np.zeros((*shape, 2, config.num_kv_heads, width), np.float32)
    positions = np.full(shape, -1, np.int32)
    for b in range(len(state.rows)):
        for slot, (position, pair) in enumerate(held(state, b).items()):
            pairs[b, slot], positions[b, slot] = pair, position
    keys, values = pairs[:, :, 0, :, : config.head_dim], pairs[:, :, 1, :, : config.output_dim]
    return keys, values, positions


def counts(state: ReferenceState, name: str) -> Array:
    """Tokens of each row [B] int32 in a tier ("hot", "warm", "cold"), in "sinks", or in "total"."""
    config, found = state.config, []
    for row in state.rows:
        starts = starts_of(config, row)
        tops = [max(row.end, config.sink_tokens), *starts]
        here = {tier.name: tops[i] - starts[i] for i, tier in enumerate(config.chain)}
        here["sinks"] = min(row.end, config.sink_tokens)
        found.append(sum(here.values()) if name == "total" else here.get(name, 0))
    return np.array(found, np.int32)
