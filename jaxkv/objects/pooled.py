"""A float32 cache in host memory whose blocks come from a `BufferPool`."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from jaxkv.objects.arrays import Form, check_pair
from jaxkv.objects.buffer_pool import BufferPool, BufferPoolStats, PooledBuffer
from jaxkv.objects.errors import KvCacheError, OutOfMemoryError


class Sizes(Protocol):
    """What a pooled cache has to know: a `KvCacheConfig`, or anything else with these three, for
    heads that no tier would take."""

    @property
    def max_tokens(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...


class PooledKvBlock:
    """Keys and values of consecutive tokens in two pooled buffers, as many as their size class
    holds. For one thread at a time."""

    def __init__(
        self, keys: PooledBuffer, values: PooledBuffer, num_heads: int, head_dim: int
    ) -> None:
        self._keys, self._values, self._shape = keys, values, (num_heads, head_dim)
        self._stride, self._token_count = num_heads * head_dim, 0

    @classmethod
    def new(
        cls, pool: BufferPool, max_tokens: int, num_heads: int, head_dim: int
    ) -> PooledKvBlock | None:
        """A block for at least `max_tokens` tokens; None if the pool has no class or no memory for
        them."""
        size = max_tokens * num_heads * head_dim * 4
        try:
            keys, values = pool.acquire_for_size(size), pool.acquire_for_size(size)
        except OutOfMemoryError:
            return None
        return None if keys is None or values is None else cls(keys, values, num_heads, head_dim)

    def append(self, keys: Any, values: Any) -> int:
        """Appends tokens, flat or [T, K, H], as long as there is room -> how many.

        Raises:
          KvCacheError: keys and values differ in shape or are not whole tokens. Nothing is written.
        """
        keys, values, size, _ = check_pair(keys, values, *self._shape)
        size = min(size, self.remaining_tokens())
        start, stop = self._token_count * self._stride, (self._token_count + size) * self._stride
        for buffer, new in ((self._keys, keys), (self._values, values)):
            buffer.as_slice_mut()[start:stop] = np.asarray(new, np.float32).reshape(-1)[
                : stop - start
            ]
        self._token_count += size
        return size

    def keys(self) -> NDArray[np.float32]:
        """The keys, flat, read-only: a view, valid until the block is cleared or released."""
        return self._keys.as_slice()[: self._token_count * self._stride]

    def values(self) -> NDArray[np.float32]:
        """As `keys`."""
        return self._values.as_slice()[: self._token_count * self._stride]

    def token_count(self) -> int:
        return self._token_count

    def capacity_tokens(self) -> int:
        return self._keys.capacity() // (self._stride * 4)

    def remaining_tokens(self) -> int:
        return self.capacity_tokens() - self._token_count

    def is_full(self) -> bool:
        return self.remaining_tokens() == 0

    def clear(self) -> None:
        """Forgets the tokens; the buffers stay."""
        self._token_count = 0

    def release(self) -> None:
        """Gives the buffers back to their pool."""
        self._keys.release()
        self._values.release()


@dataclasses.dataclass(frozen=True)
class PooledKvCacheStats:
    """What a pooled cache holds; `total_bytes` are those of the tokens, not of the blocks."""

    total_tokens: int
    block_count: int
    tokens_per_block: int
    total_bytes: int
    pool_stats: BufferPoolStats


class PooledKvCache:
    """Unquantized tokens in blocks from a shared pool. Past `config.max_tokens` the oldest blocks
    are evicted, whole.

    Of the configuration only `max_tokens`, `num_kv_heads` and `head_dim` are used. Safe to use from
    many threads.
    """

    def __init__(self, config: Sizes, pool: BufferPool, tokens_per_block: int) -> None:
        if tokens_per_block < 1:
            raise KvCacheError(f"{tokens_per_block=}: must be at least 1")
        self.config = config
        self._pool, self._tokens_per_block = pool, tokens_per_block
        self._blocks: list[PooledKvBlock] = []
        self._form = Form()
        self._lock = threading.Lock()

    @classmethod
    def new(cls, config: Sizes, pool: BufferPool, tokens_per_block: int) -> PooledKvCache:
        """The constructor, by the original's name."""
        return cls(config, pool, tokens_per_block)

    @classmethod
    def with_new_pool(cls, config: Sizes, tokens_per_block: int) -> PooledKvCache:
        """A cache with a pool of its own."""
        return cls(config, BufferPool(), tokens_per_block)

    def append(self, keys: Any, values: Any) -> None:
        """Appends tokens, flat or [T, K, H], NumPy or JAX, then evicts the oldest blocks.

        Raises:
          KvCacheError: keys and values differ in shape, or are not whole tokens.
          OutOfMemoryError: no block to be had.
        """
        heads, head_dim = self.config.num_kv_heads, self.config.head_dim
        keys, values, size, form = check_pair(keys, values, heads, head_dim)
        new = [np.asarray(x, np.float32).reshape(-1) for x in (keys, values)]
        with self._lock:
            added = self._blocks_for(size)
            open_blocks = [*self._blocks[-1:], *added]
            self._blocks += added
            self._form = form
            for block in open_blocks:
                written = block.append(*new)
                new = [x[written * heads * head_dim :] for x in new]
            self._evict()

    def _blocks_for(self, size: int) -> list[PooledKvBlock]:
        """Blocks for what of `size` tokens does not fit into the last one. All are acquired before
        anything is written."""
        size -= self._blocks[-1].remaining_tokens() if self._blocks else 0
        found: list[PooledKvBlock] = []
        while size > 0:
            block = PooledKvBlock.new(
                self._pool, self._tokens_per_block, self.config.num_kv_heads, self.config.head_dim
            )
            if block is None:
                _release(found)
                raise OutOfMemoryError("Failed to allocate KV block from pool")
            found.append(block)
            size -= block.capacity_tokens()
        return found

    def _evict(self) -> None:
        held = self._total_tokens()
        while held > self.config.max_tokens:
            block = self._blocks.pop(0)
            held -= block.token_count()
            block.release()

    def _total_tokens(self) -> int:
        return sum(block.token_count() for block in self._blocks)

    def get_all_kv(self) -> tuple[Any, Any]:
        """All keys and values, oldest first, in the form of the last append (flat NumPy before the
        first)."""
        with self._lock:
            both = [
                [half(block) for block in self._blocks]
                for half in (PooledKvBlock.keys, PooledKvBlock.values)
            ]
            shape = (-1, self.config.num_kv_heads, self.config.head_dim)
            keys, values = (
                np.concatenate([np.empty(0, np.float32), *parts]).reshape(shape) for parts in both
            )
            return self._form.write(keys), self._form.write(values)

    def stats(self) -> PooledKvCacheStats:
        with self._lock:
            total = self._total_tokens()
            size = total * self.config.num_kv_heads * self.config.head_dim * 4 * 2
            return PooledKvCacheStats(
                total, len(self._blocks), self._tokens_per_block, size, self._pool.stats()
            )

    def clear(self) -> None:
        """Forgets all tokens and gives the blocks back."""
        with self._lock:
            _release(self._blocks)
            self._blocks.clear()

    def pool(self) -> BufferPool:
        return self._pool


def _release(blocks: list[PooledKvBlock]) -> None:
    for block in blocks:
        block.release()
