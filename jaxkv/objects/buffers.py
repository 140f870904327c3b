"""Aligned host memory: buffers that JAX on the CPU takes without a copy, and a pool that lends
them."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxkv.objects.errors import KvCacheError, OutOfMemoryError

ALIGNMENT = 64
"""Bytes: a cache line, and what XLA:CPU asks of memory that it is to use in place."""


def aligned_memory(size: int) -> NDArray[np.uint8]:
    """`size` bytes of zeros whose address is a multiple of `ALIGNMENT`.

    Raises:
      OutOfMemoryError: there is not that much.
    """
    try:
        raw = np.zeros(size + ALIGNMENT, np.uint8)
    except MemoryError as error:
        raise OutOfMemoryError(f"Failed to allocate buffer of {size} bytes") from error
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start:][:size]  # in one slice, an empty one would start at the beginning


class AlignedBuffer:
    """Up to `capacity` float32 numbers in memory aligned to 64 bytes.

    Slices are views, and keep the buffer alive. `jax.device_put(buffer.as_slice())` on the CPU is a
    view too: do not write to the buffer, or give it back to a pool, while such an array is in use.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 0:
            raise KvCacheError(f"{capacity=}: must not be negative")
        self._memory = aligned_memory(capacity * 4).view(np.float32)
        self._len = 0

    @classmethod
    def new(cls, capacity: int) -> AlignedBuffer:
        """The constructor, by the original's name."""
        return cls(capacity)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        # Through it NumPy makes views whose base is this object.
        return self._memory.__array_interface__

    def as_slice(self) -> NDArray[np.float32]:
        """What is held, read-only, [len] float32."""
        view = self.as_mut_slice()
        view.flags.writeable = False
        return view

    def as_mut_slice(self) -> NDArray[np.float32]:
        """What is held, [len] float32."""
        return np.asarray(self)[: self._len]

    def extend_from_slice(self, data: Any) -> None:
        """Adds numbers at the end.

        Raises:
          KvCacheError: they do not fit. Nothing is written.
        """
        data = np.asarray(data, np.float32).reshape(-1)
        end = self._len + data.size
        if end > self._memory.size:
            raise KvCacheError(f"Buffer overflow: {end} > {self._memory.size}")
        self._memory[self._len : end] = data
        self._len = end

    def clear(self) -> None:
        """Forgets what is held; the memory stays."""
        self._len = 0

    def as_ptr(self) -> int:
        """The address of the first number, a multiple of 64."""
        return int(self._memory.ctypes.data)

    def capacity(self) -> int:
        return int(self._memory.size)

    def len(self) -> int:
        return self._len

    def is_empty(self) -> bool:
        return self._len == 0

    def __len__(self) -> int:
        return self._len

    def clone(self) -> AlignedBuffer:
        """A buffer of the same capacity with the same numbers, aligned as well; `copy.copy` and
        `copy.deepcopy` give it too."""
        other = AlignedBuffer(self.capacity())
        other.extend_from_slice(self.as_slice())
        return other

    def __copy__(self) -> AlignedBuffer:
        return self.clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> AlignedBuffer:
        return self.clone()

    def __reduce__(self) -> Any:
        return _buffer_of, (self.capacity(), np.array(self.as_slice()))


def _buffer_of(capacity: int, numbers: NDArray[np.float32]) -> AlignedBuffer:
    buffer = AlignedBuffer(capacity)
    buffer.extend_from_slice(numbers)
    return buffer


@dataclasses.dataclass(frozen=True)
class PoolStats:
    """Buffers at rest in the pool, buffers that exist at all (at rest or lent), and the size of
    one."""

    key_pool_size: int = 0
    value_pool_size: int = 0
    total_allocated: int = 0
    block_size_bytes: int = 0


class KvMemoryPool:
    """Lends aligned buffers for keys and values and takes them back. Safe to share between threads
    and caches.

    A buffer that is never given back is freed when it is garbage-collected, and is then no longer
    counted. A copied or pickled pool comes back empty.
    """

    def __init__(self, block_size: int, max_blocks: int) -> None:
        """Args: block_size: floats of a buffer; max_blocks: buffers kept at rest, for keys and for
        values each."""
        if block_size < 1 or max_blocks < 0:
            raise KvCacheError(
                f"{block_size=}, {max_blocks=}: a block holds at least one float, and there are "
                "no fewer than 0 blocks"
            )
        self._block_size, self._max_blocks = block_size, max_blocks
        self._keys: list[AlignedBuffer] = []
        self._values: list[AlignedBuffer] = []
        self._lent: weakref.WeakSet[AlignedBuffer] = weakref.WeakSet()
        self._lock = threading.Lock()

    @classmethod
    def new(cls, block_size: int, max_blocks: int) -> KvMemoryPool:
        """The constructor, by the original's name."""
        return cls(block_size, max_blocks)

    def __reduce__(self) -> Any:
        return KvMemoryPool, (self._block_size, self._max_blocks)

    def get_key_buffer(self, capacity: int | None = None) -> AlignedBuffer:
        """An empty buffer: one at rest, else a new one of as many blocks as `capacity` floats
        (default one block) take."""
        return self._take(self._keys, capacity)

    def get_value_buffer(self, capacity: int | None = None) -> AlignedBuffer:
        """As `get_key_buffer`, from the buffers for values."""
        return self._take(self._values, capacity)

    def return_key_buffer(self, buffer: AlignedBuffer) -> None:
        """Takes a lent buffer back; dropped where `max_blocks` are at rest already.

        Raises:
          KvCacheError: it is not lent by this pool, or was given back before.
        """
        self._put(self._keys, buffer)

    def return_value_buffer(self, buffer: AlignedBuffer) -> None:
        """As `return_key_buffer`, to the buffers for values."""
        self._put(self._values, buffer)

    def prewarm(self, count: int) -> None:
        """Allocates `count` buffers for keys and `count` for values, but no more than fit."""
        with self._lock:
            for shelf in (self._keys, self._values):
                room = self._max_blocks - len(shelf)
                shelf.extend(AlignedBuffer(self._block_size) for _ in range(min(count, room)))

    def stats(self) -> PoolStats:
        with self._lock:
            at_rest = len(self._keys) + len(self._values)
            return PoolStats(
                len(self._keys), len(self._values), at_rest + len(self._lent), self._block_size * 4
            )

    def _take(self, shelf: list[AlignedBuffer], capacity: int | None) -> AlignedBuffer:
        wanted = capacity or self._block_size
        with self._lock:
            fitting = [index for index, buffer in enumerate(shelf) if buffer.capacity() >= wanted]
            buffer = (
                shelf.pop(fitting[-1])
                if fitting
                else AlignedBuffer(-(-wanted // self._block_size) * self._block_size)
            )
            self._lent.add(buffer)
            return buffer

    def _put(self, shelf: list[AlignedBuffer], buffer: AlignedBuffer) -> None:
        with self._lock:
            if buffer not in self._lent:
                raise KvCacheError(
                    "the buffer is not lent by this pool; give back each buffer once, to the pool "
                    "that it came from"
                )
            self._lent.discard(buffer)
            buffer.clear()
            if len(shelf) < self._max_blocks:
                shelf.append(buffer)
