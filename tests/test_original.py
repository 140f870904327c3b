"""What the original answered to random scripts (`golden/original.json`), and its own unit tests.

Not compared, because wrong or simplified there: `tail_bytes` (4 bytes an element whatever the
precision), stored values where they are not the keys (quantized with the keys' scale), attention of
several heads (added into one softmax).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from laws import marked

from jaxkv import KvCacheConfig, Precision, QuantSpec, reference
from jaxkv.objects import BufferPool, BufferSize, PooledKvCache, TwoTierKvCache

SCRIPTS = json.loads((pathlib.Path(__file__).parent / "golden" / "original.json").read_text())
LEVELS = {"q8": 255, "q4": 15, "q4k": 15}  # the original's Q4K is its Q4


def scripts(kind: str) -> list[Any]:
    """The scripts of a kind. Of those of two tiers, which are compiled, CI takes one in ten."""
    return [
        pytest.param(
            script,
            id=str(script["seed"]),
            marks=marked(script["seed"] % 10, (), [0]) if kind == "two" else (),
        )
        for script in SCRIPTS
        if script["kind"] == kind
    ]


@pytest.fixture(scope="module")
def plain_ranges() -> Iterator[None]:
    """Scales from a group's smallest and largest element, as the original's. Ours are searched for
    and lose less, in other codes."""
    quantize = importlib.import_module("jaxkv.codec.quantize")  # the package has its function
    with pytest.MonkeyPatch.context() as patch:
        jax.clear_caches()
        patch.setattr(quantize, "CUT", dict.fromkeys(quantize.CUT, 0.0))
        patch.setattr(quantize, "FITS", dict.fromkeys(quantize.FITS, 0))
        yield
    jax.clear_caches()


@dataclasses.dataclass(frozen=True)
class Heads:
    """The original's heads, whose tokens are flat."""

    num: int
    dim: int

    def tokens(self, flat: list[float]) -> np.ndarray:
        return np.reshape(np.float32(flat), (-1, self.num, self.dim))

    def query(self, flat: list[float]) -> np.ndarray:
        return np.reshape(np.float32(flat), (self.num, self.dim))


def two_tier(config: dict[str, Any], heads: Heads) -> TwoTierKvCache:
    spec = QuantSpec(
        8 if config["store_precision"] == "q8" else 4,
        group_size=heads.num * heads.dim,
    )
    return TwoTierKvCache(
        KvCacheConfig(**config, tail_precision=Precision.FP32, key_quant=spec, value_quant=spec)
    )


def assert_stored_alike(ours: np.ndarray, theirs: np.ndarray, raw: np.ndarray, levels: int) -> None:
    """Stored tokens [T, K, H] agree to 0.5 % of their range; also to one step more where an element
    has another code with our scale, rounded up to 9 bits, or lies near a tie: of theirs, or of ours,
    whose zero point is rounded too."""
    low, high = raw.min((1, 2), keepdims=True), raw.max((1, 2), keepdims=True)
    step = (high - low) / levels
    rounded = reference.as_scale(np.maximum(step, np.abs(low) * np.float32(2.0**-15)))
    quotient, our_quotient = ((raw - low) / np.maximum(size, 1e-8) for size in (step, rounded))
    near_tie = np.abs(np.stack([quotient, our_quotient]) % 1 - 0.5).min(0) < 0.02
    other_code = np.floor(quotient + 0.5) != np.floor(our_quotient + 0.5)
    allowed = 0.005 * (high - low) + np.where(near_tie | other_code, step, 0)
    assert np.all(np.abs(ours - theirs) <= allowed)


def stored_by_original(raw: np.ndarray, levels: int) -> np.ndarray:
    """Tokens [T, K, H] as the original's store gives them back: one scale, in 32 bits, for all
    heads."""
    low, high = raw.min((1, 2), keepdims=True), raw.max((1, 2), keepdims=True)
    scale = np.maximum((high - low) / np.float32(levels), np.float32(1e-8))
    return np.floor((raw - low) / scale + np.float32(0.5)) * scale + low


def attention(query: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """Of one head: query [H], keys and values [T, H]."""
    scores = np.float64(keys) @ query * scale
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum()


@dataclasses.dataclass
class Replay:
    """A script on our cache, and the tokens [T, K, H] appended since the last clear."""

    script: dict[str, Any]

    def __post_init__(self) -> None:
        config = self.script["config"]
        self.heads = Heads(config["num_kv_heads"], config["head_dim"])
        self.cache = two_tier(config, self.heads)
        self.levels = LEVELS[config["store_precision"]]
        self.alike = self.script["values_equal_keys"]
        self.new({})

    def new(self, op: dict[str, Any]) -> None:
        self.raw = [np.zeros((0, self.heads.num, self.heads.dim), np.float32)] * 2

    def append(self, op: dict[str, Any]) -> None:
        pair = [self.heads.tokens(op[name]) for name in ("keys", "values")]
        # Singly in two scripts of three: the same by a law of its own (test_laws), and three
        # programs fewer to compile.
        count = 1 if self.script["seed"] % 3 else len(pair[0])
        for start in range(0, len(pair[0]), count):
            self.cache.append(*(x[start : start + count] for x in pair))
        self.raw = [np.concatenate([old, new]) for old, new in zip(self.raw, pair, strict=True)]

    def clear(self, op: dict[str, Any]) -> None:
        self.cache.clear()
        self.new(op)

    def stats(self, op: dict[str, Any]) -> None:
        found, wanted = dataclasses.asdict(self.cache.stats()), op["result"]
        for name in ("total_tokens", "tail_tokens", "store_tokens"):
            assert found[name] == wanted[name]

    def held(self) -> tuple[list[np.ndarray], list[np.ndarray], int]:
        """Our keys and values [T, K, H], the raw ones, and how many of them are stored."""
        stats, ours = self.cache.stats(), self.cache.get_all_kv()
        raw = [x[len(x) - stats.total_tokens :] for x in self.raw]
        return list(ours), raw, stats.store_tokens

    def kv(self, op: dict[str, Any]) -> None:
        ours, raw, stored = self.held()
        for name, held, x in zip(("keys", "values"), ours, raw, strict=True):
            wanted = np.reshape(np.float32(op["result"][name]), held.shape)
            np.testing.assert_array_equal(held[stored:], wanted[stored:])
            if name == "keys" or self.alike:
                assert_stored_alike(held[:stored], wanted[:stored], x[:stored], self.levels)

    def attend(self, op: dict[str, Any]) -> None:
        ours, raw, stored = self.held()
        if self.heads.num > 1 or (stored and not self.alike):
            return
        out = self.cache.attend(self.heads.query(op["query"]), op["scale"])[0]
        wanted = np.float32(op["result"])
        if len(raw[0]):
            # What 16-bit scales and ties change in the tokens, they change in the output.
            query = np.float32(op["query"])
            theirs = [
                np.concatenate([stored_by_original(x[:stored], self.levels), x[stored:]])[:, 0]
                for x in raw
            ]
            wanted = (
                wanted
                + attention(query, ours[0][:, 0], ours[1][:, 0], op["scale"])
                - attention(query, *theirs, op["scale"])
            )
        np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("script", scripts("two"))
def test_two_tier_script(script: dict[str, Any], plain_ranges: None) -> None:
    """Counts and tail exactly, the store to 0.5 % of a token's range, attention of one head to
    1e-4."""
    replay = Replay(script)
    for op in script["ops"]:
        getattr(replay, op["op"])(op)


class Sizes(NamedTuple):
    """What a pooled cache has to know; heads of 4 are no tier's, but may be pooled."""

    max_tokens: int
    num_kv_heads: int
    head_dim: int


@pytest.mark.parametrize("script", scripts("pooled"))
def test_pooled_script(script: dict[str, Any]) -> None:
    """Everything exactly: tokens, blocks, and the pool's hits, misses, returns and drops."""
    config = dict(script["config"])
    tokens_per_block = config.pop("tokens_per_block")
    cache = PooledKvCache.with_new_pool(Sizes(**config), tokens_per_block)
    for op in script["ops"]:
        if op["op"] == "append":
            cache.append(np.float32(op["keys"]), np.float32(op["values"]))
        elif op["op"] == "clear":
            cache.clear()
        elif op["op"] == "stats":
            found = dataclasses.asdict(cache.stats())
            assert {**found, **found["pool_stats"]}.items() >= op["result"].items()
        elif op["op"] == "kv":
            for held, name in zip(cache.get_all_kv(), ("keys", "values"), strict=True):
                np.testing.assert_array_equal(held, np.float32(op["result"][name]))


# The original's unit tests, with heads of 8 where it has 4.

SMALL = KvCacheConfig(tail_length=4, num_kv_heads=2, head_dim=8, migration_batch=2, max_tokens=100)
STRIDE = 16


def test_kv_cache_append() -> None:
    cache = TwoTierKvCache.new(SMALL)
    cache.append([1.0] * STRIDE, [1.0] * STRIDE)
    stats = cache.stats()
    assert (stats.total_tokens, stats.tail_tokens, stats.store_tokens) == (1, 1, 0)


def test_kv_cache_migration() -> None:
    cache = TwoTierKvCache.new(dataclasses.replace(SMALL, tail_length=2, migration_batch=1))
    for _ in range(5):
        cache.append([1.0] * STRIDE, [1.0] * STRIDE)
    stats = cache.stats()
    assert (stats.total_tokens, stats.tail_tokens, stats.store_tokens) == (5, 2, 3)


def test_kv_cache_attend() -> None:
    """One token, so its values, whatever the query."""
    cache = TwoTierKvCache.new(dataclasses.replace(SMALL, num_kv_heads=1))
    cache.append([1.0, *[0.0] * 7], np.arange(1.0, 9.0))
    output = cache.attend([1.0, *[0.0] * 7], 1.0)
    np.testing.assert_allclose(output, np.arange(1.0, 9.0), rtol=1e-6)


def test_pooled_kv_cache_basic() -> None:
    cache = PooledKvCache.with_new_pool(SMALL, 16)
    cache.append([1.0] * STRIDE, [2.0] * STRIDE)
    assert (cache.stats().total_tokens, cache.stats().block_count) == (1, 1)


def test_pooled_kv_cache_multiple_blocks() -> None:
    """A block holds what its size class holds: 16 tokens of 64 bytes in 1 KiB, though 2 were asked
    for."""
    cache = PooledKvCache.with_new_pool(SMALL, 2)
    for index in range(17):
        cache.append([float(index)] * STRIDE, [2.0 * index] * STRIDE)
    assert (cache.stats().total_tokens, cache.stats().block_count) == (17, 2)
    keys, values = cache.get_all_kv()
    np.testing.assert_array_equal(keys.reshape(-1, STRIDE)[:, 0], np.arange(17))
    np.testing.assert_array_equal(values.reshape(-1, STRIDE)[:, 0], 2 * np.arange(17))


def test_pooled_kv_cache_pool_reuse() -> None:
    pool = BufferPool.new()
    pool.prewarm(BufferSize.KB1, 4)
    cache = PooledKvCache.new(SMALL, pool, 16)
    for _ in range(3):
        cache.append([1.0] * STRIDE, [2.0] * STRIDE)
        cache.clear()
    stats = cache.stats()
    assert stats.total_tokens == 0
    assert (stats.pool_stats.hits, stats.pool_stats.misses, stats.pool_stats.returns) == (6, 0, 6)
