"""Policies that take effect on a cache that holds tokens, and everything as dictionaries."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

import jaxkv
from jaxkv import KvCacheConfig, KvCacheStats, Migration, Precision, QuantSpec
from jaxkv.objects import (
    BufferPool,
    BufferPoolStats,
    BufferSize,
    CacheQuantization,
    CacheTier,
    KvCacheError,
    PooledKvCache,
    PooledKvCacheStats,
    PoolStats,
    TwoTierKvCache,
    from_dict,
    to_dict,
)

HighPrecisionTail, QuantizedStore, Hybrid = (
    CacheQuantization.HighPrecisionTail,
    CacheQuantization.QuantizedStore,
    CacheQuantization.Hybrid,
)
FP32, Q8, Q4 = Precision.FP32, Precision.Q8, Precision.Q4
CONFIG = KvCacheConfig(8, FP32, Q8, 32, 1, 16, 4, sink_tokens=2)
HOT, WARM, COLD = CacheTier.HOT, CacheTier.WARM, CacheTier.COLD


def filled(
    config: KvCacheConfig, count: int, rng: np.random.Generator
) -> tuple[TwoTierKvCache, np.ndarray]:
    """A cache with `count` tokens of mean 5, and those."""
    x = (5 + rng.normal(size=(count, config.num_kv_heads, config.head_dim))).astype(np.float32)
    cache = TwoTierKvCache(config)
    for part in np.split(x, range(5, count, 5)):  # few sizes, few programs to compile
        cache.append(part, -part)
    return cache, x


def errors(cache: TwoTierKvCache, x: np.ndarray) -> np.ndarray:
    """How far each token held is from what it should be: the sinks and the newest of x, keys and
    values alike."""
    keys, values = cache.get_all_kv()
    sinks = cache.config.sink_tokens
    wanted = np.concatenate([x[:sinks], x[len(x) - len(keys) + sinks :]])
    return np.maximum(np.abs(keys - wanted), np.abs(-values - wanted)).max((1, 2))


POLICIES = [
    (HighPrecisionTail(30, FP32), {HOT: 30}),
    (HighPrecisionTail(6, FP32), {HOT: 6}),
    (QuantizedStore(Q8), {COLD: 30}),
    (Hybrid(3, FP32, Q8), {HOT: 3, COLD: 27}),
    (Hybrid(20, FP32, Q4), {HOT: 20, COLD: 10}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "tiers"), POLICIES, ids=str)
@pytest.mark.parametrize("count", [20, 75])
def test_policy_takes_effect(
    rng: np.random.Generator, policy: CacheQuantization, tiers: dict[CacheTier, int], count: int
) -> None:
    """Newest first, at their positions; what fits stays, what was exact and stays in a tail is
    exact; it can be read back."""
    cache, x = filled(CONFIG, count, rng)
    assert cache.policy() == Hybrid(8, FP32, Q8)
    cache.update_policy(policy)
    assert cache.policy() == policy
    held, end = min(count - 2, sum(tiers.values())), np.asarray(cache._record.state.end)[0]
    assert (
        list(cache.tiers()) == list(tiers) and sum(cache.tiers().values()) == held and end == count
    )
    if count == 75:
        assert cache.tiers() == tiers
    found = errors(cache, x)
    exact = min(8, cache.tiers().get(HOT, 0))
    assert len(found) == held + 2 and not found[:2].any() and not found[len(found) - exact :].any()
    assert found.max() < {Q8: 0.05, Q4: 0.5}[getattr(policy, "store_precision", Q8)]
    more = x[:5] + 1
    cache.append(more, -more)
    assert cache.stats().total_tokens == 2 + min(count + 3, sum(tiers.values()))
    assert errors(cache, np.concatenate([x, more])).max() < 0.5


@pytest.mark.slow
def test_changes_and_back(rng: np.random.Generator) -> None:
    """Tokens in float32 pass through a wider policy unchanged; those in Q8 keep their codes' values
    but for rounding."""
    cache, x = filled(CONFIG, 75, rng)
    before = errors(cache, x)
    cache.update_policy(HighPrecisionTail(30, FP32))
    np.testing.assert_array_equal(errors(cache, x), before)
    cache.update_policy(Hybrid(8, FP32, Q8))
    np.testing.assert_allclose(errors(cache, x), before, atol=0.03)
    assert cache.tiers() == {HOT: 8, COLD: 22}


@pytest.mark.slow
def test_warm_tier(rng: np.random.Generator) -> None:
    """The configuration's warm tier stays between tail and store, and has no place where there is
    no hybrid."""
    cache, x = filled(dataclasses.replace(CONFIG, warm_length=6), 75, rng)
    assert cache.tiers() == {HOT: 8, WARM: 6, COLD: 16}
    cache.update_policy(Hybrid(4, FP32, Q4))
    assert cache.tiers() == {HOT: 4, WARM: 6, COLD: 20} and errors(cache, x).max() < 0.5
    cache.update_policy(QuantizedStore(Q8))
    assert cache.tiers() == {COLD: 30}


@pytest.mark.slow
def test_aligned_store_learns_from_what_is_held(rng: np.random.Generator) -> None:
    """Q4 reflects the tokens' mean away. Moved in past the wrap, it must do so as well as from the
    start."""
    config = KvCacheConfig(16, FP32, Q4, 128, 1, 64)
    x = (10 * rng.normal(size=64) + rng.normal(size=(300, 1, 64))).astype(np.float32)
    fresh, moved = TwoTierKvCache(config), TwoTierKvCache(config)
    moved.update_policy(HighPrecisionTail(128, FP32))
    for cache in (fresh, moved):
        cache.append(x, -x)
    moved.update_policy(Hybrid(16, FP32, Q4))
    assert np.square(errors(moved, x)).mean() < 1.2 * np.square(errors(fresh, x)).mean()


@pytest.mark.slow
def test_channel_groups_cut_by_eviction(rng: np.random.Generator) -> None:
    """The oldest tokens held are a part of a group of 8; its scale spans them alone, not zeros for
    those evicted."""
    config = KvCacheConfig(
        4,
        FP32,
        Q4,
        25,
        1,
        16,
        8,
        migration=Migration.BATCHED,
        key_quant=QuantSpec(4, 8, axis="channel"),
    )
    cache, x = TwoTierKvCache(config), (5 + rng.normal(size=(42, 1, 16))).astype(np.float32)
    cache.update_policy(HighPrecisionTail(25, FP32))
    cache.append(x, -x)
    cache.update_policy(Hybrid(4, FP32, Q4))
    assert np.abs(cache.get_all_kv()[0] - x[-25:]).max() < 0.5 * (x.max() - x.min()) / 15 * 1.05


def test_policies_of_configurations() -> None:
    """What a configuration amounts to, and the ratio that a store achieves: 16 bits to 8 + 2 x 16 /
    16."""
    assert TwoTierKvCache(KvCacheConfig()).policy() == CacheQuantization.Hybrid()
    assert TwoTierKvCache(KvCacheConfig(8, FP32, Q8, 8, 1, 16)).policy() == HighPrecisionTail(
        8, FP32
    )
    policy: Any = TwoTierKvCache(KvCacheConfig(0, FP32, Q8, 8, 1, 16)).policy()
    assert policy == QuantizedStore(Q8) and policy.compression_ratio == pytest.approx(1.6)


# Dictionaries.

VALUES = [
    CONFIG,
    KvCacheConfig(
        8,
        FP32,
        Q4,
        40,
        2,
        16,
        8,
        migration=Migration.BATCHED,
        key_quant=QuantSpec(4, 8, axis="channel"),
        window=7,
    ),
    HighPrecisionTail(9, FP32),
    QuantizedStore(Q8, 1.5),
    Hybrid(),
    CacheTier.WARM,
    BufferSize.KB16,
    KvCacheStats(3, 2, 1, 64, 20, 1.5, 0, 0),
    PoolStats(1, 2, 3, 64),
    BufferPoolStats(1, 2, 3, 4, (1, 0, 0, 0, 2)),
    PooledKvCacheStats(1, 2, 3, 4, BufferPoolStats(5)),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_round_trip_through_json(value: Any) -> None:
    data = json.loads(json.dumps(to_dict(value)))
    for kind in {
        type(value),
        CacheQuantization if isinstance(value, CacheQuantization) else type(value),
    }:
        found = from_dict(kind, data)
        assert found == value and type(found) is type(value)
        assert to_dict(found) == to_dict(value)


def test_statistics_of_caches_are_json(rng: np.random.Generator) -> None:
    cache, _ = filled(CONFIG, 20, rng)
    pooled = PooledKvCache.new(CONFIG, BufferPool(), 4)
    for stats in (
        cache.stats(),
        cache.pool_stats(),
        pooled.stats(),
        jaxkv.stats(cache._record.state),
    ):
        json.dumps(to_dict(stats), allow_nan=False)
    assert from_dict(KvCacheStats, to_dict(cache.stats())) == cache.stats()


def test_the_originals_spelling() -> None:
    """Its serde writes variants by their names."""
    assert from_dict(CacheTier, "Hot") is CacheTier.HOT
    given = {"Hybrid": {"tail_length": 256, "tail_precision": "FP16", "store_precision": "Q4"}}
    assert from_dict(CacheQuantization, given) == CacheQuantization.Hybrid()
    assert from_dict(KvCacheConfig, {"store_precision": "Q8"}) == KvCacheConfig(store_precision=Q8)


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (KvCacheConfig, {"tail": 3}, "unknown keys"),
        (KvCacheConfig, {"tail_length": "3"}, "must be of type int"),
        (KvCacheConfig, {"tail_length": True}, "must be of type int"),
        (KvCacheConfig, {"store_precision": "q5"}, "must be one of"),
        (KvCacheConfig, {"max_tokens": 3}, "cannot hold"),
        (KvCacheConfig, {"key_quant": {"bits": 4, "size": 3}}, "unknown keys"),
        (KvCacheConfig, [], "dictionary"),
        (CacheQuantization, {"Other": {}}, "one key"),
        (CacheQuantization, {"Hybrid": {"length": 3}}, "unknown keys"),
        (HighPrecisionTail, {"Hybrid": {}}, "one key"),
        (PoolStats, {"hits": 3}, "unknown keys"),
        (BufferPoolStats, {"free_buffers": 3}, "BufferPoolStats"),
        (PooledKvCacheStats, {}, "missing"),
    ],
)
def test_wrong_dictionaries_are_refused(kind: Any, data: Any, message: str) -> None:
    with pytest.raises(KvCacheError, match=message):
        from_dict(kind, data)
