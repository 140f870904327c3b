"""The object API: caches, buffers and pools with the original's names, over the pure functions of
`jaxkv`."""

from jaxkv.objects.buffer_pool import BufferPool, BufferPoolStats, BufferSize, PooledBuffer
from jaxkv.objects.buffers import AlignedBuffer, KvMemoryPool, PoolStats
from jaxkv.objects.errors import KvCacheError, OutOfMemoryError
from jaxkv.objects.policy import CacheQuantization, CacheTier
from jaxkv.objects.pooled import PooledKvBlock, PooledKvCache, PooledKvCacheStats
from jaxkv.objects.serde import from_dict, to_dict
from jaxkv.objects.two_tier import TwoTierKvCache

__all__ = [
    "AlignedBuffer",
    "BufferPool",
    "BufferPoolStats",
    "BufferSize",
    "CacheQuantization",
    "CacheTier",
    "KvCacheError",
    "KvMemoryPool",
    "OutOfMemoryError",
    "PoolStats",
    "PooledBuffer",
    "PooledKvBlock",
    "PooledKvCache",
    "PooledKvCacheStats",
    "TwoTierKvCache",
    "from_dict",
    "to_dict",
]
