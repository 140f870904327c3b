"""A float32 cache in host memory whose blocks come from a `BufferPool`."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from jaxkv.objects.arrays import Form, check_pair
from jaxkv.objects.buffer_pool import BufferPool, BufferPoolStats, OnLoan, PooledBuffer
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


class PooledKvBlock(OnLoan):
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
        heads, head_dim = self._shape
        keys, values, size, _ = check_pair(keys, values, heads, (head_dim, head_dim))
        size = min(size, self.remaining_tokens())
        self._token_count = self._write(keys, values, size)
        return size

    def _write(self, keys: Any, values: Any, size: int) -> int:
        """Writes tokens behind those held -> how many there would be if these were held too."""
        start, stop = self._token_count * self._stride, (self._token_count + size) * self._stride
        for buffer, new in ((self._keys, keys), (self._values, values)):
            numbers = np.asarray(new, np.float32).reshape(-1)
            buffer.as_slice_mut()[start:stop] = numbers[: stop - start]
        return self._token_count + size

    def extended(self, keys: Any, values: Any) -> PooledKvBlock:
        """A block in the same buffers that holds as many tokens more as there is room for; this one
        does not see them."""
        size = min(keys.size // self._stride, self.remaining_tokens())
        other = PooledKvBlock(self._keys, self._values, *self._shape)
        other._token_count = self._write(keys, values, size)
        return other

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

    Raises:
      KvCacheError: no tokens per block, or values that are not of the keys' size.
    """

    def __init__(self, config: Sizes, pool: BufferPool, tokens_per_block: int) -> None:
        if tokens_per_block < 1:
            raise KvCacheError(f"{tokens_per_block=}: must be at least 1")
        _check_values(config)
        self.config = config
        self._pool, self._tokens_per_block = pool, tokens_per_block
        # One attribute, set once in a call: an interrupt at any point leaves all of it as it was.
        # What it may leave acquired or no longer needed goes back when it is collected.
        self._held: tuple[tuple[PooledKvBlock, ...], Form] = (), Form()
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
        keys, values, size, form = check_pair(keys, values, heads, (head_dim, head_dim))
        new = [np.asarray(x, np.float32).reshape(-1) for x in (keys, values)]
        with self._lock:
            blocks, _ = self._held
            found = list(blocks[:-1])
            for block in [*blocks[-1:], *self._blocks_for(size, blocks)]:
                found.append(block.extended(*new))
                written = found[-1].token_count() - block.token_count()
                new = [x[written * heads * head_dim :] for x in new]
            evicted = self._overdue(found)
            self._held = tuple(found[evicted:]), form
            _release(found[:evicted])

    def _blocks_for(self, size: int, blocks: Sequence[PooledKvBlock]) -> list[PooledKvBlock]:
        """Blocks for what of `size` tokens does not fit into the last one. All are acquired before
        anything is written."""
        size -= blocks[-1].remaining_tokens() if blocks else 0
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

    def _overdue(self, blocks: Sequence[PooledKvBlock]) -> int:
        """How many of the oldest blocks hold more than fits."""
        held, count = _total(blocks), 0
        while held > self.config.max_tokens:
            held -= blocks[count].token_count()
            count += 1
        return count

    def get_all_kv(self) -> tuple[Any, Any]:
        """All keys and values, oldest first, in the form of the last append (flat NumPy before the
        first)."""
        keys, values, form = self._contents()
        shape = (-1, self.config.num_kv_heads, self.config.head_dim)
        return form.write(keys.reshape(shape)), form.write(values.reshape(shape))

    def stats(self) -> PooledKvCacheStats:
        with self._lock:
            blocks, _ = self._held
            total = _total(blocks)
            size = total * self.config.num_kv_heads * self.config.head_dim * 4 * 2
            return PooledKvCacheStats(
                total, len(blocks), self._tokens_per_block, size, self._pool.stats()
            )

    def clear(self) -> None:
        """Forgets all tokens and gives the blocks back."""
        with self._lock:
            blocks, form = self._held
            self._held = (), form
            _release(blocks)

    def pool(self) -> BufferPool:
        return self._pool

    def clone(self) -> PooledKvCache:
        """A cache with the same tokens in blocks of its own from the same pool. `copy.copy` and
        `copy.deepcopy` give it too; a pickled cache comes back with another pool."""
        return _cache_of(self.config, self._pool, self._tokens_per_block, *self._contents())

    def _contents(self) -> tuple[NDArray[np.float32], NDArray[np.float32], Form]:
        with self._lock:
            blocks, form = self._held
            empty = [np.empty(0, np.float32)]
            keys, values = (
                np.concatenate(empty + [half(block) for block in blocks])
                for half in (PooledKvBlock.keys, PooledKvBlock.values)
            )
            return keys, values, form

    def __copy__(self) -> PooledKvCache:
        return self.clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> PooledKvCache:
        return self.clone()

    def __reduce__(self) -> Any:
        return _cache_of, (self.config, self._pool, self._tokens_per_block, *self._contents())

    def __len__(self) -> int:
        """Tokens held."""
        return _total(self._held[0])

    def __bool__(self) -> bool:
        return True  # a cache is there even if it is empty

    def __repr__(self) -> str:
        heads = f"{self.config.num_kv_heads} kv heads of {self.config.head_dim}"
        return f"PooledKvCache: {len(self):,} of {self.config.max_tokens:,} tokens, {heads}, fp32"


def _cache_of(
    config: Sizes,
    pool: BufferPool,
    tokens_per_block: int,
    keys: NDArray[np.float32],
    values: NDArray[np.float32],
    form: Form,
) -> PooledKvCache:
    cache = PooledKvCache(config, pool, tokens_per_block)
    if keys.size:
        cache.append(keys, values)
    cache._held = cache._held[0], form
    return cache


def _total(blocks: Sequence[PooledKvBlock]) -> int:
    return sum(block.token_count() for block in blocks)


def _release(blocks: Sequence[PooledKvBlock]) -> None:
    for block in blocks:
        block.release()


def _check_values(config: Sizes) -> None:
    """A block has two buffers of one size."""
    for name in ("value_dim", "values_from_keys"):
        size = getattr(config, name, None)
        if size not in (None, config.head_dim):
            raise KvCacheError(
                f"{name}={size}: a pooled cache stores values like keys, with head_dim="
                f"{config.head_dim}; use TwoTierKvCache or jaxkv.paged"
            )
