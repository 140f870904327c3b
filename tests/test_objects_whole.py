"""Objects and states that are copied, pickled, printed or interrupted (Ctrl-C) stay whole."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import BufferPool, CacheQuantization, KvCacheConfig, KvMemoryPool, Precision
from jaxkv.objects import AlignedBuffer, KvCacheError, PooledKvBlock, PooledKvCache, TwoTierKvCache

FP32 = Precision.FP32
EXACT = KvCacheConfig(8, FP32, FP32, 24, 1, 8, sink_tokens=2, rewind_length=4)
KINDS: dict[str, Callable[[], Any]] = {
    "two_tier": lambda: TwoTierKvCache(EXACT),
    "pooled": lambda: PooledKvCache.with_new_pool(EXACT, 4),
}


def tokens(first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys [T, 1, 8] that say which they are, and values that say the same, negated."""
    keys = np.broadcast_to(np.arange(first, first + count, dtype=np.float32), (8, count)).T
    return keys[:, None].copy(), -keys[:, None]


def held(cache: Any) -> list[int]:
    """Which tokens a cache holds."""
    keys, values = (np.asarray(x).reshape(-1, 8) for x in cache.get_all_kv())
    np.testing.assert_array_equal(keys, -values)
    assert (keys == keys[:, :1]).all()
    return [int(key) for key in keys[:, 0]]


# Interrupts.


def interrupted(call: Callable[[], None], after: float) -> bool:
    """Whether a Ctrl-C that comes `after` seconds stopped the call."""
    try:
        signal.setitimer(signal.ITIMER_REAL, after)
        call()
        signal.setitimer(signal.ITIMER_REAL, 0)
        return False
    except (KeyboardInterrupt, ValueError):
        return True  # JAX makes an error of its own of one that comes while it compares configs
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.fixture
def ctrl_c() -> Any:
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGALRM, old)


def calls(cache: Any, rng: np.random.Generator, first: int) -> list[Callable[[], None]]:
    """Calls that change a cache which holds at least six tokens besides sinks, and some that do
    not."""
    size = int(rng.integers(1, 4))
    found = [
        lambda: cache.append(*tokens(first, size)),
        cache.clear,
        cache.stats,
        lambda: held(cache),
    ]
    if isinstance(cache, TwoTierKvCache):
        policies = (
            CacheQuantization.Hybrid(8, FP32, FP32),
            CacheQuantization.HighPrecisionTail(12, FP32),
        )
        policy = policies[int(rng.integers(2))]
        found += [
            lambda: cache.evict(size),
            lambda: cache.rewind(size),
            lambda: cache.update_policy(policy),
            lambda: cache.attend(np.ones(8, np.float32)),
        ]
    return found


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="timers that raise")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_interrupts_at_any_point(kind: str, ctrl_c: None) -> None:
    """After each of 400 calls, most of them interrupted, the cache holds what it held before, or
    what it would hold after; or it says that it lost its tokens, and is empty. Then it goes on."""
    rng, cache, hits, lost = np.random.default_rng(0), KINDS[kind](), 0, 0
    longest = 3e-4 if kind == "two_tier" else 1e-4
    for round in range(-20, 400):
        if len(cache) < 12:
            cache.append(*tokens(round, 6))
            cache.append(*tokens(round + 6, 6))
        before = held(cache)
        seed = int(rng.integers(2**31))
        other = cache.clone()
        index = int(rng.integers(100))
        for one in (other, cache):
            options = calls(one, np.random.default_rng(seed), 1000 * (round + 30))
            call = options[index % len(options)]
            if one is other or round < 0:  # to know what comes of it, and to compile
                call()
            elif interrupted(call, float(rng.uniform(1e-6, longest))):
                hits += 1
                try:
                    assert held(cache) in (before, held(other))
                except KvCacheError as error:
                    assert "interrupted with the cache's only copy in hand" in str(error)
                    assert held(cache) == [] and len(cache) == 0
                    lost += 1
    print(f"{hits} interrupts, {lost} lost")
    assert hits >= 50
    assert lost <= hits / 10


def test_a_lost_state_is_said_and_made_anew() -> None:
    """The only copy is gone: whichever call comes next says so, once."""
    for call in (
        lambda c: c.stats(), lambda c: c.get_all_kv(), lambda c: c.attend(np.ones(8)),
        lambda c: c.append(*tokens(0, 1)), lambda c: c.clear(), lambda c: c.evict(1), copy.copy,
        pickle.dumps, lambda c: c.tiers(), lambda c: c.update_policy(CacheQuantization.Hybrid(4)),
    ):  # fmt: skip
        cache = TwoTierKvCache(EXACT)
        cache.append(*tokens(0, 5))
        jax.tree.map(lambda leaf: leaf.delete(), cache._record.state)
        assert "deleted" in repr(cache)
        with pytest.raises(KvCacheError, match="only copy in hand; it is empty now"):
            call(cache)
        assert len(cache) == 0
        cache.append(*tokens(7, 2))
        assert held(cache) == [7, 8]


# Copies.


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "clone": lambda cache: cache.clone(),
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", COPIES)
def test_copies_of_objects(kind: str, way: str) -> None:
    """Each goes its own way, and both go on."""
    cache = KINDS[kind]()
    for first in range(0, 40, 4):
        cache.append(*tokens(first, 4))
    if kind == "two_tier":
        cache.update_policy(CacheQuantization.Hybrid(4, FP32, FP32))
    other, before = COPIES[way](cache), held(cache)
    assert held(other) == before
    cache.append(*tokens(100, 2))
    assert held(other) == before
    other.append(*tokens(100, 2))
    assert held(other) == held(cache) != before
    cache.clear()
    assert len(other) > len(cache) == 0
    if kind == "two_tier":
        assert other.policy() == cache.policy() == CacheQuantization.Hybrid(4, FP32, FP32)


@pytest.mark.parametrize("way", [jaxkv.copy, *list(COPIES.values())[:2], COPIES["pickle"]])
def test_copies_of_states(way: Callable[[Any], Any]) -> None:
    """A copy outlives a donated original, and the other way round."""
    append = jax.jit(jaxkv.append, donate_argnums=0)
    new = jnp.ones((1, 3, 1, 8))
    state = append(jaxkv.init(EXACT), new, new)
    other = way(state)
    chex.assert_trees_all_equal(other, state)
    after = append(state, new, new)
    assert state.end.is_deleted() and "deleted" in repr(state)
    chex.assert_trees_all_equal(append(other, new, new), after)


def test_aligned_buffers_stay_aligned_when_pickled() -> None:
    buffer = AlignedBuffer(100)
    buffer.extend_from_slice(np.arange(7))
    for _ in range(8):
        other = pickle.loads(pickle.dumps(buffer))
        assert other.as_ptr() % 64 == 0 and other.capacity() == 100
        np.testing.assert_array_equal(other.as_slice(), np.arange(7))
        other.extend_from_slice(np.arange(93))


def test_pools_come_back_empty_and_loans_are_refused() -> None:
    memory, pool = KvMemoryPool(16, 4), BufferPool(3)
    memory.prewarm(2)
    pool.prewarm_all(2)
    for way in (copy.copy, copy.deepcopy, COPIES["pickle"]):
        assert way(memory).stats().total_allocated == 0
        assert way(memory).get_key_buffer().capacity() == 16
        assert way(pool).stats().free_buffers == (0,) * 5
        block = PooledKvBlock.new(pool, 2, 1, 8)
        assert block is not None
        for loan in (pool.acquire_for_size(8), block):
            with pytest.raises(TypeError, match="on loan from its pool and has one holder"):
                way(loan)


# In words.


def test_reprs_are_short() -> None:
    """A line, and one for each tier, of arrays of any kind; objects too."""
    state = jaxkv.init(EXACT, 3, num_layers=2)
    lines = repr(state).splitlines()
    assert lines[0] == "CacheState: 2 layers, 3 rows, 1 kv heads of 8; next position 0"
    assert [line.split()[0] for line in lines[1:]] == ["sinks", "hot", "cold"]
    seen: list[str] = []
    jax.jit(lambda state: seen.append(repr(state)))(state)
    abstract = jax.eval_shape(lambda: jaxkv.init(EXACT))
    seen += [
        repr(abstract),
        repr(jax.tree.map(lambda _: None, state)),
        repr(jax.vmap(lambda s: s)(state)),
    ]
    seen += [repr(KINDS[kind]()) for kind in KINDS]
    assert "traced" in seen[0] and "abstract" in seen[1]
    assert all(len(text) < 400 for text in seen)
    pooled = PooledKvCache.with_new_pool(EXACT, 4)
    pooled.append(*tokens(0, 3))
    assert repr(pooled) == "PooledKvCache: 3 of 24 tokens, 1 kv heads of 8, fp32"


@pytest.mark.parametrize("kind", KINDS)
def test_len(kind: str) -> None:
    cache = KINDS[kind]()
    assert len(cache) == 0 and cache
    cache.append(*tokens(0, 5))
    assert len(cache) == 5


def test_copies_in_threads() -> None:
    """Clones made while others append are whole states."""
    cache = TwoTierKvCache(KvCacheConfig(8, FP32, FP32, 512, 1, 8))
    writer = threading.Thread(target=lambda: [cache.append(*tokens(i, 1)) for i in range(300)])
    writer.start()
    while writer.is_alive():
        found = held(cache.clone())
        assert found == list(range(len(found)))
    assert held(cache) == list(range(300))
