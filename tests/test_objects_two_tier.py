"""The two-tier cache as an object: what goes in comes out, errors change nothing, sizes are
bucketed, attention is NumPy's."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.errors import JaxRuntimeError

import jaxkv
from jaxkv import KvCacheConfig, Precision
from jaxkv.objects import (
    AlignedBuffer,
    CacheTier,
    KvCacheError,
    KvMemoryPool,
    OutOfMemoryError,
    TwoTierKvCache,
    compiled,
    two_tier,
)

HEADS, HEAD_DIM = 2, 16
CONFIG = KvCacheConfig(8, Precision.FP32, Precision.Q8, 48, HEADS, HEAD_DIM, sink_tokens=2)


def tokens(
    rng: np.random.Generator, count: int, dtype: Any = np.float32
) -> tuple[np.ndarray, np.ndarray]:
    keys, values = rng.normal(size=(2, count, HEADS, HEAD_DIM)).astype(dtype)
    return keys, values


def attention(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float, decay: Any = 0.0
) -> np.ndarray:
    """Of the newest token, query [N, H] over keys and values [T, K, H], with a rate of decay or one
    per head [N]."""
    group = len(query) // keys.shape[1]
    keys, values = (np.repeat(np.float64(x), group, axis=1) for x in (keys, values))
    age = np.arange(len(keys))[::-1]
    scores = np.einsum("nh,tnh->nt", query, keys) * scale - np.reshape(decay, (-1, 1)) * age
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nt,tnh->nh", weights / weights.sum(-1, keepdims=True), values)


# What goes in comes out.


@pytest.mark.slow
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("shape", [(-1,), (-1, HEADS, HEAD_DIM)])
def test_same_kind_and_shape_out(
    rng: np.random.Generator, kind: Any, shape: tuple[int, ...]
) -> None:
    """NumPy or JAX, flat or [T, K, H]: all the same tokens."""
    cache, pair = TwoTierKvCache.new(CONFIG), tokens(rng, 5)
    cache.append(*(kind(x.reshape(shape)) for x in pair))
    for found, given in zip(cache.get_all_kv(), pair, strict=True):
        assert isinstance(found, jax.Array if kind is jnp.asarray else np.ndarray)
        np.testing.assert_array_equal(found, given.reshape(shape))
    query = kind(
        rng.normal(size=(4, HEAD_DIM))
        .astype(np.float32)
        .reshape(shape if len(shape) == 1 else (4, HEAD_DIM))
    )
    out = cache.attend(query)
    assert isinstance(out, type(query)) and out.shape == query.shape and out.dtype == query.dtype


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_other_float_dtypes(rng: np.random.Generator, dtype: Any) -> None:
    cache, (keys, values) = TwoTierKvCache(CONFIG), tokens(rng, 3, dtype)
    cache.append(keys, values)
    np.testing.assert_array_equal(cache.get_all_kv()[0], keys.astype(np.float32))
    assert cache.attend(keys[0]).dtype == dtype


@pytest.mark.slow
def test_matches_the_pure_functions(rng: np.random.Generator) -> None:
    """Bit for bit, past the wrap, whatever the sizes of the appends."""
    cache, state = TwoTierKvCache(CONFIG), jaxkv.init(CONFIG)
    keys, values = tokens(rng, 70)
    for first, last in ((0, 1), (1, 4), (4, 37), (37, 70)):
        cache.append(keys[first:last], values[first:last])
    state = jax.jit(jaxkv.append)(state, keys[None], values[None])
    for found, wanted in zip(cache.get_all_kv(), jax.jit(jaxkv.gather)(state)[:2], strict=True):
        np.testing.assert_array_equal(found, wanted[0])
    wanted = {name: np.asarray(x).item() for name, x in vars(jax.jit(jaxkv.stats)(state)).items()}
    assert dataclasses.asdict(cache.stats()) == wanted
    assert cache.tiers() == {CacheTier.HOT: 8, CacheTier.COLD: 38}


def test_prompt_in_several_pieces(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An append longer than a piece is as good as one of a piece, and a failure on the way leaves
    nothing of it."""
    for module in (two_tier, jaxkv.objects.arrays):
        monkeypatch.setattr(module, "PIECE", 16)
    append = compiled.append

    def last_fails(*args: Any) -> Any:
        return append(*args) if args[-1][0] == 16 else failing()

    keys, values = tokens(rng, 50)
    whole, cache = TwoTierKvCache(CONFIG), TwoTierKvCache(CONFIG)
    for first in range(0, 50, 10):
        whole.append(keys[first : first + 10], values[first : first + 10])
    cache.append(keys[:10], values[:10])
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "append", last_fails)
        with pytest.raises(KvCacheError, match="the device is gone"):
            cache.append(keys[10:], values[10:])
    assert cache.stats().total_tokens == 10
    cache.append(keys[10:], values[10:])
    for found, wanted in zip(cache.get_all_kv(), whole.get_all_kv(), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_callers_array_may_be_overwritten(rng: np.random.Generator, size: int) -> None:
    """What the device is given, and may read after `append` has returned, is no view of it."""
    cache, (keys, values) = TwoTierKvCache(CONFIG), tokens(rng, size)
    (given,) = jaxkv.objects.arrays.pieces(keys, size, (HEADS, HEAD_DIM))
    assert not np.shares_memory(given, keys)
    wanted = keys.copy()
    cache.append(keys, values)
    keys[:] = np.nan
    np.testing.assert_array_equal(cache.get_all_kv()[0], wanted)


# Attention.


@pytest.mark.slow
@pytest.mark.parametrize("decay", [None, 0.3, [0.0, 0.1, 0.5, 2.0]])
def test_attend_with_decay(rng: np.random.Generator, decay: Any) -> None:
    """One rate or one per head; 60 tokens, of which 48 are held over three tiers."""
    config = dataclasses.replace(CONFIG, sink_tokens=0, warm_length=10)
    cache = TwoTierKvCache(config)
    cache.append(*tokens(rng, 60))
    query = rng.normal(size=(4, HEAD_DIM)).astype(np.float32)
    held = cache.get_all_kv()
    wanted = attention(query, *held, 0.7, 0.0 if decay is None else decay)
    bound = cases.attention_bound(query, np.stack(held, axis=1), 0.7)
    assert bound < 1e-3
    np.testing.assert_allclose(cache.attend(query, 0.7, decay=decay), wanted, rtol=0, atol=bound)


@pytest.mark.slow
def test_attend_of_several_queries_is_causal(rng: np.random.Generator) -> None:
    """Three queries, filled up to four, see what queries of one token saw."""
    cache, singles = TwoTierKvCache(CONFIG), []
    keys, values = tokens(rng, 6)
    query = rng.normal(size=(3, 4, HEAD_DIM)).astype(np.float32)
    cache.append(keys[:3], values[:3])
    for i in range(3):
        cache.append(keys[3 + i : 4 + i], values[3 + i : 4 + i])
        singles.append(cache.attend(query[i]))
    for given in (query, jnp.asarray(query)):
        np.testing.assert_allclose(cache.attend(given), singles, atol=1e-5)


def test_empty_cache_gives_zeros() -> None:
    cache = TwoTierKvCache(CONFIG)
    assert not cache.attend(np.ones((4, HEAD_DIM))).any()
    assert [x.shape for x in cache.get_all_kv()] == [(0,), (0,)]
    assert cache.stats().total_tokens == 0


# Errors leave the cache as it was.


def failing(*_: Any) -> None:
    raise JaxRuntimeError("INTERNAL: the device is gone")


def exhausted(*_: Any) -> None:
    raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")


BAD_CALLS = {
    "lengths": lambda c: c.append(np.zeros(32), np.zeros(64)),
    "stride": lambda c: c.append(np.zeros(33), np.zeros(33)),
    "shape": lambda c: c.append(np.zeros((1, 4, 8)), np.zeros((1, 4, 8))),
    "dtype": lambda c: c.append(np.zeros(32, int), np.zeros(32, int)),
    "query": lambda c: c.attend(np.zeros((3, HEAD_DIM))),
    "query_dim": lambda c: c.attend(np.zeros(HEAD_DIM + 1)),
    "decay": lambda c: c.attend(np.zeros((4, HEAD_DIM)), decay=[1.0, 2.0, 3.0]),
    "decay_type": lambda c: c.attend(np.zeros((4, HEAD_DIM)), decay="much"),
    "scale": lambda c: c.attend(np.zeros((4, HEAD_DIM)), "large"),
    "evict": lambda c: c.evict(19),
    "rewind": lambda c: c.rewind(100),
    "count": lambda c: c.evict(-1),
    "policy": lambda c: c.update_policy("hybrid"),
    "policy_size": lambda c: c.update_policy(
        jaxkv.objects.CacheQuantization.HighPrecisionTail(1000)
    ),
    "traced": lambda c: jax.jit(lambda x: c.append(x, x))(jnp.zeros(32)),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_errors_change_nothing(rng: np.random.Generator, call: Any) -> None:
    cache = TwoTierKvCache(CONFIG)
    cache.append(*tokens(rng, 20))
    stats, policy, held = cache.stats(), cache.policy(), cache.get_all_kv()
    with pytest.raises(KvCacheError):
        call(cache)
    assert cache.stats() == stats and cache.policy() == policy
    for found, before in zip(cache.get_all_kv(), held, strict=True):
        np.testing.assert_array_equal(found, before)
    cache.append(*tokens(rng, 1))
    assert cache.stats().total_tokens == 21


def test_out_of_memory_changes_nothing(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TwoTierKvCache(CONFIG)
    cache.append(*tokens(rng, 20))
    with monkeypatch.context() as patch:
        for name in ("append", "attend", "move"):
            patch.setattr(compiled, name, exhausted)
        for call in (
            lambda: cache.append(*tokens(rng, 1)),
            lambda: cache.attend(np.zeros((4, HEAD_DIM))),
            lambda: cache.update_policy(jaxkv.objects.CacheQuantization.HighPrecisionTail(9)),
        ):
            with pytest.raises(OutOfMemoryError):
                call()
    assert cache.stats().total_tokens == 20


# No retrace, whatever the number of tokens per append.


@pytest.mark.slow
def test_few_programs_for_many_sizes(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Appends of 1 to 16 tokens in any order, queries of 1 to 4, fill and wrap: a program per power
    of two, and none after."""
    config = dataclasses.replace(CONFIG, max_tokens=47)  # a configuration of this test alone
    traced: list[str] = []
    for name in ("append", "attend"):
        function = getattr(compiled, name).__wrapped__

        def counted(*args: Any, name: str = name, function: Any = function) -> Any:
            traced.append(name)
            return function(*args)

        monkeypatch.setattr(
            compiled,
            name,
            jax.jit(counted, static_argnums=0, donate_argnums=1)
            if name == "append"
            else jax.jit(counted),
        )
    cache = TwoTierKvCache(config)

    def use() -> None:
        for size in rng.permutation(np.arange(1, 17)):
            cache.append(*tokens(rng, size))
            cache.attend(rng.normal(size=(1 + size % 4, 4, HEAD_DIM)), 0.5)

    use()
    assert (traced.count("append"), traced.count("attend")) == (5, 3)
    for _ in range(5):
        use()
    assert len(traced) == 8


# Reads through the memory pool.


def test_aligned_reads_use_the_pool(rng: np.random.Generator) -> None:
    """Buffers come from the pool, hold all tokens, and go back to it."""
    pool = KvMemoryPool(HEADS * HEAD_DIM * 8, 4)
    cache = TwoTierKvCache.with_pool(CONFIG, pool)
    assert cache.memory_pool() is pool and cache.pool_stats().total_allocated == 0
    cache.append(*tokens(rng, 20))
    keys, values = cache.get_all_kv_aligned()
    assert isinstance(keys, AlignedBuffer) and keys.as_ptr() % 64 == 0
    for buffer, held in zip((keys, values), cache.get_all_kv(), strict=True):
        np.testing.assert_array_equal(buffer.as_slice(), held.reshape(-1))
    assert cache.pool_stats().total_allocated == 2
    address = keys.as_ptr()
    pool.return_key_buffer(keys)
    pool.return_value_buffer(values)
    assert (cache.pool_stats().key_pool_size, cache.pool_stats().value_pool_size) == (1, 1)
    del keys, values, buffer
    assert cache.get_all_kv_aligned()[0].as_ptr() == address
    gc.collect()
    assert cache.pool_stats().total_allocated == 0  # neither given back nor held by anyone


def test_own_pool_is_warm() -> None:
    stats = TwoTierKvCache(CONFIG).pool_stats()
    assert (stats.key_pool_size, stats.value_pool_size, stats.total_allocated) == (2, 2, 4)
    assert stats.block_size_bytes == 8 * HEADS * HEAD_DIM * 4


# The rest.


def test_stats_are_the_devices_bytes(rng: np.random.Generator) -> None:
    """Per token: 2 x 32 float32 numbers in the tail; in Q8, 2 x (32 codes and two 16-bit numbers
    for each of two heads)."""
    cache = TwoTierKvCache(dataclasses.replace(CONFIG, sink_tokens=0))
    cache.append(*tokens(rng, 20))
    stats = cache.stats()
    assert (stats.tail_bytes, stats.store_bytes) == (8 * 256, 12 * 80)
    assert stats.compression_ratio == pytest.approx(20 * 128 / (8 * 256 + 12 * 80))


def test_clear_evict_rewind(rng: np.random.Generator) -> None:
    cache, (keys, values) = (
        TwoTierKvCache(dataclasses.replace(CONFIG, sink_tokens=0)),
        tokens(rng, 8),
    )
    cache.append(keys, values)
    cache.evict(3)
    cache.rewind(2)
    np.testing.assert_array_equal(cache.get_all_kv()[0], keys[3:6])
    cache.clear()
    assert cache.stats().total_tokens == 0
    cache.append(keys[:1], values[:1])
    np.testing.assert_array_equal(cache.get_all_kv()[1], values[:1])
