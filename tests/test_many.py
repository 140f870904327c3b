"""Counts and positions beyond what int32 sums hold."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, random_query, random_tokens
from laws import append, evict, extend, gather, held, rewind, start

import jaxkv
from jaxkv import Status, ring

pytestmark = pytest.mark.slow


def test_stats_of_a_large_cache() -> None:
    """64 layers x 48 rows x 2**20 tokens are counted in floats: their bytes, and their ratio."""
    config = jaxkv.preset("Q4", max_tokens=2**20, num_kv_heads=1, head_dim=8)
    shapes = jax.eval_shape(lambda: jaxkv.init(config, 48, num_layers=64))

    def many(end: jax.Array) -> jaxkv.KvCacheStats:
        tiers = jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), shapes.tiers)
        return jaxkv.stats(dataclasses.replace(
            shapes, tiers=tiers, end=end, lost=jnp.zeros(shapes.lost.shape, jnp.int32)))  # fmt: skip

    found = jax.jit(many)(jnp.full((64, 48), 2**20, jnp.int32))
    one = jaxkv.stats(_filled(config))
    total = float(found.tail_bytes + found.store_bytes)
    expected = float(one.tail_bytes + one.store_bytes) * 64 * 48
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(found.compression_ratio, one.compression_ratio, rtol=1e-5)


def _filled(config: jaxkv.KvCacheConfig) -> jaxkv.CacheState:
    state = jaxkv.init(config, 1)
    return dataclasses.replace(state, end=jnp.full((1,), 2**20, jnp.int32))


def test_positions_end(rng: np.random.Generator) -> None:
    """An append past the last position is refused: an error, or a bit and a row that stays; the
    last ones are right."""
    case = dataclasses.replace(CASES["bf16_q4_all_heads"], batch_size=2)
    state = start(case)
    state = dataclasses.replace(
        state, end=jnp.full((2,), ring.MOST - 14, jnp.int32),
        lost=jnp.full(state.lost.shape, ring.MOST - 14, jnp.int32),
    )  # fmt: skip
    state = extend(state, *random_tokens(rng, case, 10))
    query = random_query(rng, case, 1)
    assert np.isfinite(jaxkv.attend(state, query)).all() and not state.status.any()
    new = random_tokens(rng, case, 5)
    after = append(state, *new, np.array([5, 4], np.int32))
    np.testing.assert_array_equal(after.status, [Status.OUT_OF_POSITIONS, 0])
    np.testing.assert_array_equal(after.end, [ring.MOST - 4, ring.MOST])
    chex.assert_trees_all_equal(held(gather(after), 0), held(gather(state), 0))
    assert np.asarray(gather(after)[2])[1].max() == ring.MOST - 1
    with pytest.raises(ValueError, match="would pass the last position"):
        jaxkv.append(state, *new)


@pytest.mark.parametrize("name", ["fp32", "fp16_q4", "bf16_q8_q4_batched_sinks"])
def test_a_refused_row_keeps_all_it_holds(name: str, rng: np.random.Generator) -> None:
    """Without lengths, too: every slot of a full row stays, and the row beside it goes on."""
    case = dataclasses.replace(CASES[name], batch_size=2)
    state = extend(start(case), *random_tokens(rng, case, 40))
    ends = jnp.array([ring.MOST, 40], jnp.int32)
    lost = state.lost.at[0].add(ring.MOST - 40)
    state = dataclasses.replace(state, end=ends, lost=lost)
    after = jax.jit(jaxkv.append)(state, *random_tokens(rng, case, 1))
    np.testing.assert_array_equal(after.status, [Status.OUT_OF_POSITIONS, 0])
    np.testing.assert_array_equal(after.end, [ring.MOST, 41])
    kept, held_before = (jaxkv.take_rows(x, jnp.array([0])) for x in (after, state))
    chex.assert_trees_all_equal((kept.tiers, kept.sinks), (held_before.tiers, held_before.sinks))


def test_layers_that_hold_nothing(rng: np.random.Generator) -> None:
    """rewind and evict of a stack leave layers alone that have never held a token; a row that is
    empty in every layer is refused as ever."""
    case = CASES["fp16_q4"]
    stack = jaxkv.init(case.config, 3, num_layers=3)
    lengths = np.array([5, 5, 0], np.int32)
    for layer in (0, 2):
        stack = jaxkv.append(stack, *random_tokens(rng, case, 5), lengths, layer=layer)
    for verb, bit in ((rewind, Status.REWIND_TOO_MANY), (evict, Status.EVICT_TOO_MANY)):
        after = verb(stack, np.array([2, 0, 1], np.int32))
        np.testing.assert_array_equal(after.status, [[0, 0, bit]] * 3)
        np.testing.assert_array_equal(
            jaxkv.stats(after).total_tokens, [[3, 5, 0], [0, 0, 0], [3, 5, 0]]
        )
    chex.assert_trees_all_equal(
        gather(jaxkv.rewind(jaxkv.take_rows(stack, [0, 1]), 5))[2], np.full((3, 2, 16), -1)
    )
