"""The cache as an object: it owns a state of one row and calls the pure functions on it, with
donation, under a lock."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.errors import JaxRuntimeError
from jax.typing import ArrayLike
from numpy.typing import NDArray

from jaxkv.checks import as_int
from jaxkv.config import KvCacheConfig, Overflow
from jaxkv.devices import copy, settled
from jaxkv.objects import compiled
from jaxkv.objects.arrays import PIECE, Form, bucket, check_pair, check_query, cut, fill, pieces
from jaxkv.objects.buffers import AlignedBuffer, KvMemoryPool, PoolStats
from jaxkv.objects.errors import KvCacheError, OutOfMemoryError
from jaxkv.objects.holder import Holder, Record
from jaxkv.objects.policy import CacheQuantization, CacheTier, QuantizedStore
from jaxkv.stats import KvCacheStats
from jaxkv.status import Status


class TwoTierKvCache(Holder):
    """A cache of one sequence. Safe to use from many threads: each call sees, or makes, one whole
    state.

    Keys and values are flat or [T, K, H], NumPy or JAX. Calls with JAX arrays return before the
    device is done; calls with NumPy arrays, and those that count, wait for it. Appends of any
    number of tokens use few compiled programs: sizes are filled up to the next power of two, up to
    `PIECE` = 1,024 tokens, and longer ones come in pieces of that. All caches of one configuration
    share the programs.

    The lock is held while work is handed to the device, not while the device does it. An append
    donates the state's arrays; the device lets the reads that were handed to it before finish
    first.
    """

    def __init__(self, config: KvCacheConfig, pool: KvMemoryPool | None = None) -> None:
        """A cache with a memory pool of its own, warmed up for two reads at a time, or with a given
        one."""
        if pool is None:
            block = config.num_kv_heads * config.head_dim * max(config.tail_length, 1)
            pool = KvMemoryPool(block, max(config.max_tokens // max(config.tail_length, 1), 4))
            pool.prewarm(2)
        super().__init__(config, pool)

    @classmethod
    def new(cls, config: KvCacheConfig) -> TwoTierKvCache:
        """The constructor, by the original's name."""
        return cls(config)

    @classmethod
    def with_pool(cls, config: KvCacheConfig, pool: KvMemoryPool) -> TwoTierKvCache:
        """A cache whose aligned reads use a given pool."""
        return cls(config, pool)

    def append(self, keys: Any, values: Any = None) -> None:
        """Appends tokens, flat or [T, K, H] (values [T, K, V], or None where they are a part of the
        keys); the oldest leave each tier, and at last the cache.

        Raises:
          KvCacheError: keys and values differ in shape, are not whole tokens, or not floats; or the
            cache has no room for them and its config says overflow="refuse".
        """
        keys, values, size, form = check_pair(
            keys, values, self.config.num_kv_heads, self.config.side_dims
        )
        if size == 0:
            return
        heads, config = self.config.num_kv_heads, self.config
        key_pieces = pieces(keys, size, (heads, config.head_dim))
        value_pieces: list[Any] = [None] * len(key_pieces)
        if values is not None:
            value_pieces = pieces(values, size, (heads, config.output_dim))
        with self._lock:
            record = self._whole()
            if isinstance(keys, jax.Array) and keys.committed and not record.state.end.committed:
                # A cache lives where its first tokens were put.
                record = record._replace(state=settled(record.state, keys.device))
                self._record = record
            self._check_room(record, size)
            self._append(record._replace(form=form), key_pieces, value_pieces, size)

    def _check_room(self, record: Record, size: int) -> None:
        config = record.state.config
        if config.overflow is Overflow.REFUSE:
            held = int(compiled.stats(record.state).total_tokens[0])
            if held + size > config.max_tokens:
                raise KvCacheError(
                    f"{held} of {config.max_tokens} tokens are held, and overflow='refuse': evict "
                    f"or clear before {size} more"
                )

    def _append(self, record: Record, keys: list[Any], values: list[Any], size: int) -> None:
        lengths = [
            None if size == 1 else jax.device_put(np.array([min(size - first, PIECE)], np.int32))
            for first in range(0, size, PIECE)
        ]
        *first, last = zip(keys, values, lengths, strict=True)
        try:
            if first:  # to a copy, so that the cache is whole if a later piece fails
                leaves, structure = jax.tree.flatten(copy(record.state))
                for piece in first:
                    leaves = compiled.append(structure, leaves, *piece)
                record = record._replace(state=jax.tree.unflatten(structure, leaves))
            self._donate(record, compiled.append, *last)
        except (ValueError, JaxRuntimeError) as error:
            message = str(error)
            if self._record.state.end.is_deleted():
                self._lose()
                lost = "the device failed with the cache's only copy in hand; it is empty now"
                message = f"{lost}: {message}"
            raise _translated(message) from error

    def attend(
        self, query: Any, scale: float | None = None, *, decay: ArrayLike | None = None
    ) -> Any:
        """Attention over all tiers, per head.

        Args:
          query: [N * H] or [N, H] of the newest token, or [T, N, H] of the newest T (causal among
            them); N a multiple of K.
          scale: of the scores; default H**-0.5.
          decay: a rate, or one per query head [N]: what is `age` tokens old scores `rate * age`
            lower (ALiBi).

        Returns:
          Like `query`, in its dtype. An empty cache gives zeros.

        Raises:
          KvCacheError: a query, scale or decay of the wrong shape or dtype.
        """
        query = check_query(query, self.config.num_kv_heads, self.config.head_dim)
        is_jax, size = isinstance(query, jax.Array), query.shape[0] if query.ndim == 3 else 1
        lengths = None if size == 1 else jax.device_put(np.array([size], np.int32))
        given = (
            fill(query, bucket(size))
            if size != bucket(size)
            else query
            if is_jax
            else query.astype(np.float32)
        )
        try:
            numbers = [_on_device(x) for x in (scale, decay)]
            with self._lock:
                out = compiled.attend(self._whole().state, given, *numbers, lengths)
            if not is_jax:
                out = np.asarray(out).astype(query.dtype)
                return out[:size] if query.ndim == 3 else out
            return out if size == bucket(size) else cut(out, size)
        except (TypeError, ValueError, JaxRuntimeError) as error:
            raise _translated(str(error)) from error

    def get_all_kv(self) -> tuple[Any, Any]:
        """All keys and values held, dequantized, oldest first (sinks before all), in the form of
        the last append (flat NumPy before it)."""
        keys, values, form = self._held()
        return form.write(keys.copy()), form.write(values.copy())

    def get_all_kv_aligned(self) -> tuple[AlignedBuffer, AlignedBuffer]:
        """All keys and values held, flat, in buffers lent by `memory_pool`; give them back to it
        with `return_key_buffer` and `return_value_buffer`."""
        keys, values, _ = self._held()
        found = self._pool.get_key_buffer(keys.size), self._pool.get_value_buffer(values.size)
        for buffer, held in zip(found, (keys, values), strict=True):
            buffer.extend_from_slice(held)
        return found

    def _held(self) -> tuple[NDArray[np.float32], NDArray[np.float32], Form]:
        """Keys and values [T, K, H], read-only, and the form to give them in."""
        with self._lock:
            record = self._whole()
            found = compiled.gather(record.state)
        keys, values, positions = (np.asarray(array)[0] for array in found)
        size = (positions >= 0).sum()
        return keys[:size], values[:size], record.form

    def memory_pool(self) -> KvMemoryPool:
        """Where the buffers of `get_all_kv_aligned` come from."""
        return self._pool

    def pool_stats(self) -> PoolStats:
        return self._pool.stats()

    def stats(self) -> KvCacheStats:
        """Counts, bytes and compression of the tokens held, as Python numbers."""
        with self._lock:
            found = compiled.stats(self._whole().state)
        numbers = {name: np.asarray(value).item() for name, value in vars(found).items()}
        ratio = numbers.pop("compression_ratio")
        return KvCacheStats(
            **{name: int(number) for name, number in numbers.items()}, compression_ratio=ratio
        )

    def tiers(self) -> dict[CacheTier, int]:
        """Tokens in each tier that the policy has, newest tier first."""
        with self._lock:
            state = self._whole().state
            chain, found = state.config.chain, compiled.stats(state)
        counts = {"hot": found.tail_tokens, "warm": found.warm_tokens, "cold": found.store_tokens}
        return {CacheTier(spec.name): int(counts[spec.name][0]) for spec in chain}

    def clear(self) -> None:
        """Forgets all tokens; the arrays stay."""
        with self._lock:
            self._donate(self._whole(), compiled.clear)

    def evict(self, count: int) -> None:
        """Drops the `count` oldest tokens; sinks stay.

        Raises:
          KvCacheError: fewer are held.
        """
        self._drop(compiled.evict, count)

    def rewind(self, count: int) -> None:
        """Drops the `count` newest tokens (see `jaxkv.rewind`).

        Raises:
          KvCacheError: fewer are held, or the rewind would cut a group of channel codes.
        """
        self._drop(compiled.rewind, count)

    def _drop(self, verb: Any, count: int) -> None:
        try:
            count = as_int("count", count, 0)
        except ValueError as error:
            raise KvCacheError(str(error)) from None
        with self._lock:
            asked = jax.device_put(np.int32(min(count, self.config.max_tokens + 1)))
            [bits] = self._donate(self._whole(), verb, asked)
        status = Status(np.asarray(bits).item())
        if status:
            raise KvCacheError(f"{count=}: refused, {status.name}; ask for fewer tokens")

    def policy(self) -> CacheQuantization:
        """The policy in force."""
        (state, policy, _) = self._record
        return policy.achieved_by(state.config) if isinstance(policy, QuantizedStore) else policy

    def update_policy(self, policy: CacheQuantization) -> None:
        """Moves the tokens held into the tiers of another policy, at their positions; of more than
        fit, the newest.

        What leaves a quantized tier is dequantized and quantized anew; nothing else changes.
        `config` still bounds the cache.

        Raises:
          KvCacheError: a policy that the cache's configuration rules out.
        """
        if not isinstance(policy, CacheQuantization):
            raise KvCacheError(
                f"{policy=}: must be a CacheQuantization, such as CacheQuantization.Hybrid()"
            )
        with self._lock:
            record = self._whole()
            try:
                config, state = policy.applied_to(self.config), record.state
                moved = state if config == state.config else compiled.move(state, config)
            except (TypeError, ValueError, JaxRuntimeError) as error:
                raise _translated(str(error)) from error
            self._record = record._replace(state=moved, policy=policy)

    def __len__(self) -> int:
        """Tokens held."""
        return self.stats().total_tokens

    def __bool__(self) -> bool:
        return True  # a cache is there even if it is empty


def _on_device(number: Any) -> Any:
    if number is None or isinstance(number, jax.Array):
        return number
    return jax.device_put(np.array(number, np.float32))


def _translated(message: str) -> Exception:
    """What to raise for an error of the pure functions or of the device."""
    return OutOfMemoryError(message) if "RESOURCE_EXHAUSTED" in message else KvCacheError(message)
