"""Attention over parts, merged; rows that refuse to overflow."""

from __future__ import annotations

import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import KvCacheConfig, Overflow, Precision, Status, reference
from jaxkv.objects import KvCacheError, TwoTierKvCache

B, T, K, N, H = 2, 3, 2, 4, 16
RNG = np.random.default_rng(0)
QUERY = RNG.normal(size=(B, T, N, H)).astype(np.float32)
KEYS, VALUES = RNG.normal(size=(2, B, 24, K, H)).astype(np.float32)
EXACT = KvCacheConfig(24, Precision.FP32, max_tokens=24, num_kv_heads=K, head_dim=H)


def attention(first: int, stop: int, **options: Any) -> tuple[jax.Array, jax.Array]:
    """Over the tokens [first, stop) alone, all visible."""
    state = jaxkv.init(EXACT, B)
    if stop > first:
        state = jaxkv.append(state, KEYS[:, first:stop], VALUES[:, first:stop])
    found: tuple[jax.Array, jax.Array] = jaxkv.attend(
        state, QUERY, causal=False, return_lse=True, **options
    )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [(0, 24), (0, 7, 24), (0, 0, 1, 9, 9, 24, 24)], ids=str)
@pytest.mark.parametrize("sinks", [None, np.linspace(-2, 3, N)], ids=["no_sinks", "sinks"])
def test_merge(cuts: tuple[int, ...], sinks: Any) -> None:
    """Parts, some of them empty, and the learned logits once, are attention over all."""
    parts = [attention(a, b) for a, b in itertools.pairwise(cuts)]
    outs, lses = zip(*parts, strict=True)
    options = {} if sinks is None else {"sink_logits": sinks}
    wanted = attention(0, 24, **options)
    for merge in (jaxkv.merge, jax.jit(jaxkv.merge)):
        chex.assert_trees_all_close(merge(outs, lses, sinks), wanted, atol=2e-6)


def test_merge_of_nothing() -> None:
    """Zeros and minus infinity, whatever the empty parts hold; with learned logits, these."""
    nothing = jnp.full((B, T, N, H), jnp.nan, jnp.bfloat16), jnp.full((B, T, N), -jnp.inf)
    out, lse = jaxkv.merge([nothing[0]] * 2, [nothing[1]] * 2)
    assert out.dtype == jnp.bfloat16 and not np.asarray(out, np.float32).any()
    assert (np.asarray(lse) == -np.inf).all()
    out, lse = jaxkv.merge([nothing[0]], [nothing[1]], np.arange(N))
    assert not np.asarray(out, np.float32).any()
    np.testing.assert_allclose(lse, np.broadcast_to(np.arange(N), lse.shape), rtol=1e-6)


@pytest.mark.parametrize(
    ("outs", "lses", "sinks", "message"),
    [
        ([], [], None, "0 outs and 0 lses"),
        ([np.zeros((1, N, H))], [], None, "1 outs and 0 lses"),
        ([np.zeros((1, N, H))], [np.zeros((1, N, H))], None, r"must be as many, at least one"),
        ([np.zeros((1, N, H)), np.zeros((2, N, H))], [np.zeros((1, N))] * 2, None, "alike"),
        ([np.zeros((1, N, H))], [np.zeros((1, N))], np.zeros(K), r"must be \[N\] = \[4\]"),
    ],
)
def test_merge_refuses(outs: Any, lses: Any, sinks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jaxkv.merge(outs, lses, sinks)


# Overflow.


FULL = KvCacheConfig(4, "fp32", "q8", 12, K, H, sink_tokens=2, rewind_length=2, overflow="refuse")


@pytest.mark.slow
@pytest.mark.parametrize("num_layers", [None, 2])
def test_full_rows_refuse(num_layers: int | None) -> None:
    """A row without room for all new tokens stays as it is and says so; its neighbours do not
    mind. What has been evicted makes room."""
    layer = None if num_layers is None else jnp.int32(1)
    append = jax.jit(lambda s, x, n: jaxkv.append(s, x, x, n, layer=layer))
    state = jaxkv.init(FULL, B, num_layers)
    state = append(state, KEYS[:, :10], np.array([10, 7]))
    before = jaxkv.gather(state)
    after = append(state, KEYS[:, :4], np.array([4, 4]))

    def own(x: Any) -> Any:
        return np.asarray(x if num_layers is None else x[1])

    np.testing.assert_array_equal(own(after.status), [Status.FULL, 0])
    np.testing.assert_array_equal(own(after.end), [10, 11])
    for now, then in zip(jaxkv.gather(after), before, strict=True):
        np.testing.assert_array_equal(own(now)[0], own(then)[0])
    room = append(jax.jit(jaxkv.evict)(after, 3), KEYS[:, :4], np.array([4, 4]))
    np.testing.assert_array_equal(own(room.end), [14, 15])
    np.testing.assert_array_equal(own(room.begin), [5, 5])
    assert own(append(state, KEYS[:, :10], np.array([99, 0])).status).tolist() == [8, 0]


@pytest.mark.slow
def test_refused_prompts_attend_to_nothing() -> None:
    """prefill refuses alike; the row's outputs are zeros."""
    state = jaxkv.init(FULL, B)
    state = jaxkv.append(state, KEYS[:, :10], VALUES[:, :10], np.array([10, 2]))
    after, out = jax.jit(jaxkv.prefill)(state, QUERY, KEYS[:, :T], VALUES[:, :T])
    np.testing.assert_array_equal(after.status, [Status.FULL, 0])
    np.testing.assert_array_equal(np.asarray(out).any((1, 2, 3)), [False, True])
    with pytest.raises(ValueError, match=r"rows \[0\] hold \[8\] tokens of 10 .* evict or clear"):
        jaxkv.append(state, KEYS[:, :3], VALUES[:, :3])


@pytest.mark.slow
def test_like_the_twin() -> None:
    """Random appends, evictions and rewinds."""
    append, rng = jax.jit(jaxkv.append), np.random.default_rng(1)
    state, twin = jaxkv.init(FULL, B), reference.init(FULL, B)
    for _ in range(30):
        new, lengths = KEYS[:, :3], rng.integers(0, 4, B)
        state = append(state, new, new, lengths)
        twin = reference.append(twin, new, new, lengths)
        count = np.minimum(rng.integers(0, 3, B), np.maximum(state.end - state.begin, 0))
        state, twin = jaxkv.evict(state, count), reference.evict(twin, count)
        np.testing.assert_array_equal(jaxkv.gather(state)[2], reference.gather(twin)[2])
    assert (np.asarray(state.status) == Status.FULL).all()


@pytest.mark.slow
def test_evictions_can_be_counted() -> None:
    """Under "evict", `begin` says how many tokens have gone."""
    config = KvCacheConfig(4, "fp32", "q8", 12, K, H, sink_tokens=2, overflow=Overflow.EVICT)
    state = jaxkv.append(jaxkv.init(config, B), KEYS, VALUES, np.array([24, 12]))
    np.testing.assert_array_equal(state.begin - config.sink_tokens, [12, 0])
    assert not np.asarray(state.status).any()


@pytest.mark.slow
def test_objects_refuse() -> None:
    """As an error, before anything is changed; a policy with less room keeps the newest."""
    cache = TwoTierKvCache(FULL)
    cache.append(KEYS[0, :10], VALUES[0, :10])
    with pytest.raises(KvCacheError, match="10 of 12 tokens are held, and overflow='refuse'"):
        cache.append(KEYS[0, :3], VALUES[0, :3])
    assert len(cache) == 10
    cache.evict(1)
    cache.append(KEYS[0, :3], VALUES[0, :3])
    cache.update_policy(jaxkv.CacheQuantization.HighPrecisionTail(5, Precision.FP32))
    assert len(cache) == 7
    with pytest.raises(KvCacheError, match="overflow='refuse'"):
        cache.append(KEYS[0, :1], VALUES[0, :1])
