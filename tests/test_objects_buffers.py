"""Aligned buffers, and the pools that lend buffers: addresses, capacities, counts, and who gives
what back."""

from __future__ import annotations

import copy
import gc
from typing import Any

import jax
import numpy as np
import pytest

from jaxkv.objects import (
    AlignedBuffer,
    BufferPool,
    BufferPoolStats,
    BufferSize,
    KvCacheError,
    KvMemoryPool,
    OutOfMemoryError,
    PoolStats,
    buffer_pool,
    buffers,
)

# AlignedBuffer


@pytest.mark.parametrize("capacity", [0, 1, 15, 16, 17, 1000])
def test_buffer_is_aligned(capacity: int) -> None:
    """Several at a time, so that the allocator cannot be right by chance."""
    several = [AlignedBuffer.new(capacity) for _ in range(8)]
    assert all(
        buffer.as_ptr() % 64 == 0 and buffer.capacity() == capacity and buffer.is_empty()
        for buffer in several
    )


def test_jax_takes_a_buffer_without_a_copy() -> None:
    """The JAX array lies at the buffer's address, and keeps the memory alive."""
    buffer = AlignedBuffer(100)
    buffer.extend_from_slice(np.arange(37.0))
    array = jax.device_put(buffer.as_slice())
    assert array.unsafe_buffer_pointer() == buffer.as_ptr() == buffer.as_slice().ctypes.data
    del buffer
    gc.collect()
    np.testing.assert_array_equal(array, np.arange(37.0))


def test_overflow_raises_and_writes_nothing() -> None:
    buffer = AlignedBuffer(5)
    buffer.extend_from_slice([1.0, 2.0, 3.0])
    with pytest.raises(KvCacheError, match="overflow: 6 > 5"):
        buffer.extend_from_slice([7.0, 8.0, 9.0])
    np.testing.assert_array_equal(buffer.as_slice(), [1, 2, 3])
    buffer.extend_from_slice([4.0, 5.0])
    np.testing.assert_array_equal(buffer.as_slice(), [1, 2, 3, 4, 5])
    assert len(buffer) == buffer.len() == buffer.capacity()


def test_slices_are_views() -> None:
    """A mutable one writes to the buffer, a read-only one cannot."""
    buffer = AlignedBuffer(4)
    buffer.extend_from_slice([1.0, 2.0])
    buffer.as_mut_slice()[0] = 9
    np.testing.assert_array_equal(buffer.as_slice(), [9, 2])
    with pytest.raises(ValueError, match="read-only"):
        buffer.as_slice()[0] = 1
    address = buffer.as_ptr()
    buffer.clear()
    assert buffer.is_empty() and buffer.as_ptr() == address


@pytest.mark.parametrize("clone", [AlignedBuffer.clone, copy.copy, copy.deepcopy])
def test_clone_is_aligned_and_apart(clone: Any) -> None:
    buffer = AlignedBuffer(7)
    buffer.extend_from_slice([1.0, 2.0])
    other = clone(buffer)
    buffer.as_mut_slice()[0] = 9
    np.testing.assert_array_equal(other.as_slice(), [1, 2])
    assert other.capacity() == 7 and other.as_ptr() % 64 == 0


def test_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(buffers.np, "zeros", fail)
    with pytest.raises(OutOfMemoryError, match="400 bytes"):
        AlignedBuffer(100)


def test_negative_capacity_is_refused() -> None:
    with pytest.raises(KvCacheError, match="capacity=-1"):
        AlignedBuffer(-1)


# KvMemoryPool


def test_memory_pool_lends_and_takes_back() -> None:
    """Counts: at rest for keys, at rest for values, existing at all."""
    pool = KvMemoryPool.new(16, 2)
    pool.prewarm(5)
    assert pool.stats() == PoolStats(2, 2, 4, 64)
    lent = [pool.get_key_buffer() for _ in range(3)]
    assert pool.stats() == PoolStats(0, 2, 5, 64)
    lent[0].extend_from_slice([1.0])
    for buffer in lent:
        pool.return_key_buffer(buffer)
    assert pool.stats() == PoolStats(2, 2, 4, 64)  # the third found no room
    assert pool.get_key_buffer().is_empty()


def test_memory_pool_lends_the_same_memory_again() -> None:
    pool = KvMemoryPool(16, 2)
    buffer = pool.get_value_buffer()
    pool.return_value_buffer(buffer)
    assert pool.get_value_buffer() is buffer


def test_memory_pool_fits_the_request() -> None:
    """Whole blocks, and none at rest that is too small."""
    pool = KvMemoryPool(16, 2)
    pool.prewarm(1)
    assert pool.get_key_buffer(33).capacity() == 48
    assert pool.stats() == PoolStats(1, 1, 2, 64)  # what was lent is collected: nobody holds it


def test_memory_pool_refuses_what_it_did_not_lend() -> None:
    pool = KvMemoryPool(16, 2)
    buffer = pool.get_key_buffer()
    pool.return_key_buffer(buffer)
    for wrong in (buffer, AlignedBuffer(16)):
        with pytest.raises(KvCacheError, match="not lent by this pool"):
            pool.return_key_buffer(wrong)
    assert pool.stats() == PoolStats(1, 0, 1, 64)


def test_memory_pool_sizes_are_checked() -> None:
    with pytest.raises(KvCacheError, match="block_size=0"):
        KvMemoryPool(0, 1)


# BufferPool


def test_size_classes() -> None:
    """1, 4, 16, 64 and 256 KiB; a request gets the smallest that holds it."""
    assert [size.bytes() for size in BufferSize] == [1024 * 4**i for i in range(5)]
    assert [BufferSize.for_size(size) for size in (0, 1024, 1025, 262144, 262145)] == [
        BufferSize.KB1,
        BufferSize.KB1,
        BufferSize.KB4,
        BufferSize.KB256,
        None,
    ]
    assert BufferPool().acquire_for_size(262145) is None


def test_hits_misses_returns_drops() -> None:
    pool = BufferPool.with_capacity(2)
    lent = [pool.acquire(BufferSize.KB1) for _ in range(3)]
    assert pool.stats() == BufferPoolStats(misses=3)
    for buffer in lent:
        buffer.release()
        buffer.release()  # a second time does nothing
    assert pool.stats() == BufferPoolStats(
        misses=3, returns=2, drops=1, free_buffers=(2, 0, 0, 0, 0)
    )
    assert (
        pool.acquire_for_size(1000).size_class() is BufferSize.KB1
    )  # comes back at once: nobody holds it
    assert pool.stats() == BufferPoolStats(1, 3, 3, 1, (2, 0, 0, 0, 0))
    assert pool.stats().hit_rate == 0.25


def test_prewarm_and_clear() -> None:
    pool = BufferPool()
    pool.prewarm_all(3)
    pool.prewarm(BufferSize.KB4, 100)
    assert pool.stats() == BufferPoolStats(free_buffers=(3, 32, 3, 3, 3))
    pool.clear()
    assert pool.stats() == BufferPoolStats()


def test_slices_keep_a_buffer_on_loan() -> None:
    """It goes back when the last view of it is collected, not before."""
    pool = BufferPool()
    buffer = pool.acquire(BufferSize.KB1)
    view = buffer.as_slice_mut()
    assert (
        view.shape == (256,) and buffer.as_ptr() == view.ctypes.data and view.ctypes.data % 64 == 0
    )
    del buffer
    gc.collect()
    assert pool.stats().returns == 0
    del view
    gc.collect()
    assert pool.stats().returns == 1


def test_released_buffer_is_not_handed_out() -> None:
    buffer = BufferPool().acquire(BufferSize.KB1)
    buffer.release()
    with pytest.raises(KvCacheError, match="released"):
        buffer.as_slice()


def test_failed_allocation_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(size: int) -> None:
        raise OutOfMemoryError(f"{size}")

    monkeypatch.setattr(buffer_pool, "aligned_memory", fail)
    pool = BufferPool()
    with pytest.raises(OutOfMemoryError):
        pool.acquire(BufferSize.KB1)
    assert pool.stats() == BufferPoolStats()
