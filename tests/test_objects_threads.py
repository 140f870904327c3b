"""The objects under many threads, and over many appends."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxkv import KvCacheConfig, Precision
from jaxkv.objects import KvCacheError, KvMemoryPool, PooledKvCache, TwoTierKvCache

HEAD_DIM = 8


def tokens(writer: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys [T, 1, 8] that say who wrote them and as which, and values that say the same, negated
    but for a last element of 1."""
    keys = np.zeros((count, 1, HEAD_DIM), np.float32)
    keys[..., 0], keys[:, 0, 1], keys[..., -1] = writer, np.arange(first, first + count), -1
    return keys, -keys


def exact(max_tokens: int, tail_length: int) -> KvCacheConfig:
    """Two tiers, both in float32, so that a token can be told by its numbers."""
    return KvCacheConfig(tail_length, Precision.FP32, Precision.FP32, max_tokens, 1, HEAD_DIM)


def run(*jobs: Callable[[], None]) -> None:
    """All at once, each in a thread of its own."""
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as threads:
        for job in [threads.submit(job) for job in jobs]:
            job.result()


def by_writer(keys: Any, values: Any) -> dict[int, np.ndarray]:
    """What each writer's tokens are, in the order held; a key without its value is a torn token."""
    found, values = np.asarray(keys).reshape(-1, HEAD_DIM), np.asarray(values).reshape(-1, HEAD_DIM)
    np.testing.assert_array_equal(found, -values)
    return {int(writer): found[found[:, 0] == writer, 1] for writer in np.unique(found[:, 0])}


@pytest.mark.slow
def test_8_writers_and_4_readers() -> None:
    """20,000 operations: nothing lost, doubled or torn, each writer's order kept, every read one
    whole state."""
    appends, reads, writers = 2_000, 1_000, range(1, 9)
    cache = TwoTierKvCache(exact(max_tokens=32_768, tail_length=256))

    def write(writer: int) -> None:
        first = 0
        for _, count in zip(range(appends), itertools.cycle((1, 1, 1, 2)), strict=False):
            cache.append(*tokens(writer, first, count))
            first += count

    def read() -> None:
        seen = 0
        for index in range(reads):
            if index % 40 == 0:
                lines = by_writer(*cache.get_all_kv())
                for line in lines.values():
                    np.testing.assert_array_equal(line, np.arange(len(line)))
                now = sum(map(len, lines.values()))
            elif index % 40 == 1:
                with pytest.raises(KvCacheError):
                    cache.attend(np.ones((1, HEAD_DIM)), decay=[1.0, 2.0, 3.0])
                continue
            elif index % 4 == 2:
                # Weights add up to 1 over any whole state, and to nothing over an empty one.
                out = cache.attend(np.ones((1, HEAD_DIM), np.float32), 0.0)[0, -1]
                assert abs(out - 1) < 1e-5 or (seen == 0 and out == 0)
                continue
            else:
                stats = cache.stats()
                now = stats.total_tokens
                assert now == stats.tail_tokens + stats.store_tokens and stats.tail_tokens == min(
                    now, 256
                )
            assert now >= seen
            seen = now

    run(*(lambda writer=writer: write(writer) for writer in writers), *[read] * 4)
    lines = by_writer(*cache.get_all_kv())
    assert sorted(lines) == list(writers)
    for line in lines.values():
        np.testing.assert_array_equal(line, np.arange(appends // 4 * 5))


@pytest.mark.parametrize(
    "kind", [TwoTierKvCache, lambda config: PooledKvCache.with_new_pool(config, 4)]
)
def test_threads_past_the_wrap(kind: Callable[[KvCacheConfig], Any]) -> None:
    """While tokens are evicted, each writer's that are left are its newest, without a gap."""
    cache = kind(exact(max_tokens=64, tail_length=16))

    def write(writer: int) -> None:
        for first in range(0, 200, 2):
            cache.append(*tokens(writer, first, 2))

    def read() -> None:
        for _ in range(50):
            lines = by_writer(*cache.get_all_kv())
            assert sum(map(len, lines.values())) <= 64
            for line in lines.values():
                np.testing.assert_array_equal(np.diff(line), 1)

    run(*(lambda writer=writer: write(writer) for writer in range(1, 5)), read, read)
    left = by_writer(*cache.get_all_kv())
    assert 32 <= sum(map(len, left.values())) <= 64
    assert max(line[-1] for line in left.values()) == 199


def test_threads_share_a_memory_pool() -> None:
    """No buffer is lent twice, and all come back."""
    pool = KvMemoryPool(16, 4)

    def use(number: int) -> None:
        for _ in range(500):
            buffer = pool.get_key_buffer()
            buffer.extend_from_slice(np.full(16, number))
            assert (buffer.as_slice() == number).all()
            pool.return_key_buffer(buffer)

    run(*(lambda number=number: use(number) for number in range(8)))
    stats = pool.stats()
    assert stats.key_pool_size == stats.total_allocated <= 4


APPENDS = """
import json, psutil, numpy as np
from jaxkv import KvCacheConfig
from jaxkv.objects import TwoTierKvCache

cache = TwoTierKvCache(KvCacheConfig(tail_length=64, max_tokens=1024, num_kv_heads=2, head_dim=64))
token = np.ones((1, 2, 64), np.float32)
sizes = []
for index in range(50_000):
    cache.append(token, token)
    if index % 1000 == 999:
        cache.attend(token)
        cache.stats()
        keys, values = cache.get_all_kv_aligned()
        cache.memory_pool().return_key_buffer(keys)
        cache.memory_pool().return_value_buffer(values)
    if index % 5000 == 4999:
        sizes.append(psutil.Process().memory_info().rss)
print(json.dumps([cache.stats().total_tokens, sizes]))
"""


@pytest.mark.slow
def test_memory_does_not_grow() -> None:
    """50,000 appends, most of them past the wrap: the process stays within 5 % of its size after
    the first 5,000."""
    root = str(pathlib.Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(
        [sys.executable, "-c", APPENDS], env=environment, capture_output=True, text=True, check=True
    )
    held, (first, *later) = json.loads(ran.stdout)
    assert held == 1024
    assert max(later) <= 1.05 * first
