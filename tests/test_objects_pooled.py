"""The pooled cache: its blocks come from the pool and go back on clear, on eviction and when
garbage-collected."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import KvCacheConfig
from jaxkv.objects import (
    BufferPool,
    BufferSize,
    KvCacheError,
    OutOfMemoryError,
    PooledKvBlock,
    PooledKvCache,
)

CONFIG = KvCacheConfig(
    tail_length=4, max_tokens=40, num_kv_heads=2, head_dim=8
)  # 64 bytes a token: 16 in 1 KiB
IN_BLOCK = 16


def tokens(count: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Keys [T, 2, 8] whose token t is first + t everywhere, and values that are their negatives."""
    keys = np.broadcast_to(
        np.arange(first, first + count, dtype=np.float32)[:, None, None], (count, 2, 8)
    )
    return keys, -keys


def numbers(cache: PooledKvCache) -> list[float]:
    keys, values = cache.get_all_kv()
    np.testing.assert_array_equal(keys, -np.asarray(values))
    return np.asarray(keys).reshape(-1, 16)[:, 0].tolist()


def test_tokens_come_back_in_order() -> None:
    """Through the middle of blocks, whatever the sizes of the appends."""
    cache, first = PooledKvCache.with_new_pool(CONFIG, 2), 0
    for count in (1, 5, 20, 0, 3):
        cache.append(*tokens(count, first))
        first += count
    assert numbers(cache) == list(range(29))
    stats = cache.stats()
    assert (stats.total_tokens, stats.block_count, stats.tokens_per_block, stats.total_bytes) == (
        29,
        2,
        2,
        29 * 128,
    )


def test_eviction_gives_whole_blocks_back() -> None:
    """The 41st token drops the oldest block of 16."""
    cache = PooledKvCache.with_new_pool(CONFIG, IN_BLOCK)
    cache.append(*tokens(40))
    assert cache.pool().stats().returns == 0
    cache.append(*tokens(1, 40))
    assert numbers(cache) == list(range(16, 41))
    stats = cache.stats()
    assert (stats.block_count, stats.pool_stats.misses, stats.pool_stats.returns) == (2, 6, 2)
    cache.append(*tokens(10, 41))
    assert cache.stats().pool_stats.hits == 2


def test_clear_gives_all_blocks_back() -> None:
    cache = PooledKvCache.with_new_pool(CONFIG, IN_BLOCK)
    cache.append(*tokens(40))
    cache.clear()
    stats = cache.stats()
    assert (stats.total_tokens, stats.block_count, stats.total_bytes, stats.pool_stats.returns) == (
        0,
        0,
        0,
        6,
    )
    assert numbers(cache) == []


def test_collected_cache_gives_all_blocks_back() -> None:
    pool = BufferPool()
    cache = PooledKvCache.new(CONFIG, pool, IN_BLOCK)
    cache.append(*tokens(40))
    del cache
    gc.collect()
    assert pool.stats().returns == 6


def test_caches_share_a_pool() -> None:
    pool = BufferPool()
    one, other = (PooledKvCache.new(CONFIG, pool, IN_BLOCK) for _ in range(2))
    one.append(*tokens(3))
    one.clear()
    other.append(*tokens(2))
    assert pool.stats().hits == 2
    assert numbers(other) == [0, 1]


def test_what_is_read_is_a_copy() -> None:
    """Clearing the cache and reusing its blocks does not reach it."""
    cache = PooledKvCache.with_new_pool(CONFIG, IN_BLOCK)
    cache.append(*tokens(3))
    keys, _ = cache.get_all_kv()
    cache.clear()
    cache.append(*tokens(3, 7))
    assert keys[:, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("shape", [(-1,), (-1, 2, 8)])
def test_same_kind_and_shape_out(kind: type, shape: tuple[int, ...]) -> None:
    cache = PooledKvCache.with_new_pool(CONFIG, IN_BLOCK)
    cache.append(*(kind(x.reshape(shape)) for x in tokens(3)))
    for found in cache.get_all_kv():
        assert isinstance(found, jax.Array if kind is jnp.asarray else np.ndarray)
        assert found.ndim == len(shape) and found.size == 48


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        (np.zeros(16), np.zeros(32), "must match"),
        (np.zeros(17), np.zeros(17), "multiple of 16"),
        (np.zeros((1, 4, 4)), np.zeros((1, 4, 4)), r"\[T, 2, 8\]"),
        (np.zeros(16, int), np.zeros(16, int), "float"),
    ],
)
def test_bad_input_changes_nothing(keys: np.ndarray, values: np.ndarray, message: str) -> None:
    cache = PooledKvCache.with_new_pool(CONFIG, IN_BLOCK)
    cache.append(*tokens(3))
    before = cache.stats()
    with pytest.raises(KvCacheError, match=message):
        cache.append(keys, values)
    assert cache.stats() == before and numbers(cache) == [0, 1, 2]


def test_failed_allocation_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of three blocks, of which the second cannot be had: the first goes back, nothing is
    written."""
    cache = PooledKvCache.with_new_pool(CONFIG, IN_BLOCK)
    cache.append(*tokens(3))
    acquire, left = BufferPool.acquire, [2]

    def scarce(pool: BufferPool, size: BufferSize) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise OutOfMemoryError("none left")
        return acquire(pool, size)

    with monkeypatch.context() as patch:
        patch.setattr(BufferPool, "acquire", scarce)
        with pytest.raises(OutOfMemoryError, match="KV block"):
            cache.append(*tokens(40, 3))
    assert numbers(cache) == [0, 1, 2]
    assert (cache.stats().block_count, cache.pool().stats().returns) == (1, 2)
    cache.append(*tokens(2, 3))
    assert numbers(cache) == [0, 1, 2, 3, 4]


def test_block_beyond_the_largest_class() -> None:
    with pytest.raises(OutOfMemoryError):
        PooledKvCache.with_new_pool(CONFIG, 262144 // 64 + 1).append(*tokens(1))
    with pytest.raises(KvCacheError, match="tokens_per_block=0"):
        PooledKvCache.with_new_pool(CONFIG, 0)


def test_block_takes_what_fits() -> None:
    """Of 20 tokens 16; the block says how many."""
    block = PooledKvBlock.new(BufferPool(), 2, 2, 8)
    assert block is not None and block.remaining_tokens() == block.capacity_tokens() == IN_BLOCK
    assert block.append(*tokens(20)) == 16 and block.is_full() and block.append(*tokens(1)) == 0
    assert (
        block.keys().reshape(16, 16)[:, 5].tolist() == list(range(16)) and block.values()[-1] == -15
    )
    block.clear()
    assert block.token_count() == 0 and block.keys().size == 0


@pytest.mark.parametrize("name", ["value_dim", "values_from_keys"])
def test_values_of_another_size_are_refused(name: str) -> None:
    """Before anything is stored, by the name of the option."""
    config = KvCacheConfig(num_kv_heads=1, head_dim=16, max_tokens=300, **{name: 8})
    with pytest.raises(KvCacheError, match=f"{name}=8: a pooled cache stores values like keys"):
        PooledKvCache.with_new_pool(config, 4)
