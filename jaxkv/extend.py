"""A model's attention in one verb: what new tokens look at, and the cache with them in it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkv.attend import (
    Wanted,
    attention,
    finish,
    raw_segments,
    scoring_of,
    seen_singly,
)
from jaxkv.checks import (
    as_counts,
    as_layer,
    check_either,
    check_new_tokens,
    check_query,
    in_range,
)
from jaxkv.kernels import dispatch
from jaxkv.kernels.segments import over_segments
from jaxkv.kernels.traced import once
from jaxkv.padding import Padding
from jaxkv.scoring import Scoring
from jaxkv.state import CacheState, segments
from jaxkv.tiers.place import Index
from jaxkv.update import append, fitting


@once
def extend(
    state: CacheState,
    query: jax.Array,
    keys: jax.Array | None,
    values: jax.Array | None,
    valid: ArrayLike | None = None,
    *,
    lengths: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    layer: Index = None,
    return_lse: bool = False,
    top_pages: int | None = None,
    implementation: dispatch.Implementation = None,
    **options: Any,
) -> tuple[CacheState, Any]:
    """The attention of T new tokens, and the cache with them appended: a prompt, a chunk of one, or
    a decoded token.

    Several tokens attend to their own raw keys and values and to what the cache held before: exact
    on the prompt, and each sees the positions that it would have seen had they come one by one,
    also where the cache is full. One token is appended first and then attends, since a step should
    read one cache and nothing besides; so it sees itself as the cache holds it (exactly but for the
    tail's rounding; quantized where there is no tail). `prefill` does the same.

    Args:
      query: [B, T, N, H]; keys: [B, T, K, H]; values: [B, T, K, V], or None where they are a part
        of the keys. Both None for layers that only look at what another layer has appended (shared
        caches): then the queries are those of the newest T tokens, and `attend` says what they see.
      valid: [B, T] bool, False for padding, on either side or in the middle: it never enters the
        cache, and gets zeros. Outputs, masks, biases and windows are in the caller's order.
      lengths: [B], instead of valid: the first lengths[b] tokens of row b are valid.
      top_pages: as for `attend`, for one token and for layers that only look. Several tokens read
        all that they may see.
      scale, layer, return_lse, implementation, **options: as for `attend`. Masks and biases are by
        position in the cache, where padding has none.

    Returns:
      The new state, and what `attend` returns.

    Raises:
      ValueError: as `append` and `attend`.
    """
    config, size = state.config, jnp.shape(query)[1] if jnp.ndim(query) > 1 else 0
    query = check_query(query, state.batch_size, config.num_kv_heads, config.head_dim)
    scoring = scoring_of(config, query, scale, options)
    wanted = Wanted(return_lse, False, top_pages).checked(state, implementation)
    check_either(lengths, valid)
    if size == 0:
        return state, attention(state, query, None, scoring, layer, wanted, implementation)
    sides: tuple[jax.Array, ...] = ()
    if keys is not None or values is not None:
        sides = check_new_tokens(
            keys, values, state.batch_size, config.num_kv_heads, config.side_dims, size
        )
    padding = None
    if valid is not None:
        padding = Padding.of(valid, state.batch_size, size)
        query, lengths = padding.together(query), padding.lengths
        sides = tuple(map(padding.together, sides))
        scoring = scoring.reordered(padding.together)
    taken = fitting(state, lengths, size, layer) if sides else lengths

    def appended() -> CacheState:
        pair = sides[0], sides[1] if len(sides) > 1 else None
        return append(state, *pair, lengths, layer=layer, implementation=implementation)

    if not sides or size == 1:
        state = appended() if sides else state
        out = attention(state, query, taken, scoring, layer, wanted, implementation)
    else:
        state, out = _of_prompt(state, query, sides, taken, scoring, layer, wanted, implementation)
        state = appended()
    return state, out if padding is None else jax.tree.map(padding.apart, out)


@once
def prefill(
    state: CacheState,
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array | None,
    lengths: ArrayLike | None = None,
    **options: Any,
) -> tuple[CacheState, Any]:
    """`extend` with the lengths of the rows: [B], the first of whose tokens are valid."""
    return extend(state, query, keys, values, lengths=lengths, **options)


def _of_prompt(
    state: CacheState,
    query: jax.Array,
    sides: tuple[jax.Array, ...],
    lengths: ArrayLike | None,
    scoring: Scoring,
    layer: Index,
    wanted: Wanted,
    implementation: dispatch.Implementation,
) -> tuple[CacheState, Any]:
    """Attention over the tokens' own raw keys and values and all that the cache holds without them;
    with the state, ready to be written to."""
    config, size = state.config, query.shape[1]
    layer, exists = as_layer(layer, state.num_layers)
    count = in_range(as_counts("lengths", lengths, state.batch_size, size), size, exists)
    end = state.end if layer is None else state.end[layer]
    index = jnp.arange(size, dtype=jnp.int32)[None]
    position = jnp.where(index < count[:, None], end[:, None] + index, -1)
    sinks = config.sink_tokens if scoring.window_sinks else 0

    parts = [*segments(state, layer), *raw_segments(config, sides, count, end)]
    found = over_segments(
        lambda at: [seen_singly(config, part, at + 1) for part in parts],
        query,
        position,
        scoring,
        sinks,
        implementation,
    )
    # A sum is never less than 0, which XLA cannot foresee: what is written waits for what was read,
    # and the cache needs no copy for it.
    after = jnp.where(found.sum[:, 0, 0].min() < 0, 0, state.end)
    out = finish([found], scoring, query, wanted.lse)
    if wanted.lse and wanted.top_pages is not None:
        out = *out, jnp.zeros_like(out[1])  # nothing was left out
    return dataclasses.replace(state, end=after), out
