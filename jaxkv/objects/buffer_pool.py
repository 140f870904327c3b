"""Byte buffers in five size classes, lent and taken back."""

from __future__ import annotations

import collections
import dataclasses
import enum
import threading
import weakref
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from jaxkv.objects.buffers import aligned_memory
from jaxkv.objects.errors import KvCacheError


class BufferSize(enum.IntEnum):
    """The size classes, in bytes."""

    KB1 = 1 << 10
    KB4 = 4 << 10
    KB16 = 16 << 10
    KB64 = 64 << 10
    KB256 = 256 << 10

    def bytes(self) -> int:
        return int(self)

    @classmethod
    def for_size(cls, size: int) -> BufferSize | None:
        """The smallest class that holds `size` bytes; None above the largest."""
        return next((member for member in cls if member >= size), None)


@dataclasses.dataclass(frozen=True)
class BufferPoolStats:
    """What a pool has done: buffers reused (hits) and allocated on demand (misses), taken back
    (returns) and freed because their class was full (drops). `free_buffers` counts those at rest,
    smallest class first."""

    hits: int = 0
    misses: int = 0
    returns: int = 0
    drops: int = 0
    free_buffers: tuple[int, ...] = (0,) * len(BufferSize)

    @property
    def hit_rate(self) -> float:
        """Share of requests served from the pool, 0 before the first."""
        return self.hits / max(self.hits + self.misses, 1)


class OnLoan:
    """What has one holder, and can neither be copied nor pickled."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"a {type(self).__name__} is on loan from its pool and has one holder: copy what is in "
            "it, with np.array, or acquire another"
        )


class PooledBuffer(OnLoan):
    """A buffer on loan. It goes back when released or garbage-collected; slices of it keep it from
    being collected."""

    def __init__(self, size_class: BufferSize, memory: NDArray[np.uint8], pool: BufferPool) -> None:
        self._size_class, self._memory = size_class, memory
        self._give_back = weakref.finalize(self, pool._take_back, size_class, memory)
        self._give_back.atexit = False

    @property
    def __array_interface__(self) -> dict[str, Any]:
        # Through it NumPy makes views whose base is this object.
        return self._memory.__array_interface__

    def as_slice(self, dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """The whole buffer, read-only."""
        view = self.as_slice_mut(dtype)
        view.flags.writeable = False
        return view

    def as_slice_mut(self, dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """The whole buffer.

        Raises:
          KvCacheError: it was released.
        """
        if not self._give_back.alive:
            raise KvCacheError(
                "the buffer was released and may be in use elsewhere; acquire another"
            )
        return np.asarray(self).view(dtype)

    def capacity(self) -> int:
        """Bytes."""
        return int(self._memory.size)

    def size_class(self) -> BufferSize:
        return self._size_class

    def as_ptr(self) -> int:
        """The address of the first byte, a multiple of 64."""
        return int(self._memory.ctypes.data)

    def release(self) -> None:
        """Gives the buffer back now; a second time does nothing."""
        self._give_back()


class BufferPool:
    """Lends buffers of five size classes and keeps up to `max_buffers_per_class` at rest in each.
    Safe to share between threads. A copied or pickled pool comes back empty."""

    def __init__(self, max_buffers_per_class: int = 32) -> None:
        self._max_buffers = max_buffers_per_class
        self._free: dict[BufferSize, list[NDArray[np.uint8]]] = {size: [] for size in BufferSize}
        self._counts: collections.Counter[str] = collections.Counter()
        # Reentrant, since a garbage collection may give a buffer back in the middle of any line
        # below.
        self._lock = threading.RLock()

    @classmethod
    def new(cls) -> BufferPool:
        """The constructor, by the original's name."""
        return cls()

    @classmethod
    def with_capacity(cls, max_buffers_per_class: int) -> BufferPool:
        return cls(max_buffers_per_class)

    def __reduce__(self) -> Any:
        return BufferPool, (self._max_buffers,)

    def acquire(self, size_class: BufferSize) -> PooledBuffer:
        """A buffer of a class, from the pool or new.

        Raises:
          OutOfMemoryError: there is no memory for a new one.
        """
        with self._lock:
            free = self._free[size_class]
            outcome = "hits" if free else "misses"
            memory = free.pop() if free else aligned_memory(size_class)
            self._counts[outcome] += 1
        return PooledBuffer(size_class, memory, self)

    def acquire_for_size(self, size: int) -> PooledBuffer | None:
        """A buffer of at least `size` bytes; None above the largest class."""
        size_class = BufferSize.for_size(size)
        return None if size_class is None else self.acquire(size_class)

    def prewarm(self, size_class: BufferSize, count: int) -> None:
        """Puts `count` new buffers at rest, but no more than fit."""
        with self._lock:
            room = self._max_buffers - len(self._free[size_class])
            self._free[size_class].extend(
                aligned_memory(size_class) for _ in range(min(count, room))
            )

    def prewarm_all(self, count: int) -> None:
        """`prewarm` of every class."""
        for size_class in BufferSize:
            self.prewarm(size_class, count)

    def stats(self) -> BufferPoolStats:
        with self._lock:
            return BufferPoolStats(
                **self._counts, free_buffers=tuple(len(self._free[size]) for size in BufferSize)
            )

    def clear(self) -> None:
        """Frees the buffers at rest."""
        with self._lock:
            for free in self._free.values():
                free.clear()

    def _take_back(self, size_class: BufferSize, memory: NDArray[np.uint8]) -> None:
        with self._lock:
            has_room = len(self._free[size_class]) < self._max_buffers
            self._counts["returns" if has_room else "drops"] += 1
            if has_room:
                self._free[size_class].append(memory)
