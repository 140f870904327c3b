"""Quantized key/value caches for decoding language models in JAX."""

from jaxkv.attend import attend
from jaxkv.config import KvCacheConfig, Migration, Precision, QuantSpec
from jaxkv.state import CacheState, KvCacheStats, Status, gather, init, nbytes, stats
from jaxkv.update import append, clear, evict, migrate, prefill, rewind, take_rows

__all__ = [
    "CacheState",
    "KvCacheConfig",
    "KvCacheStats",
    "Migration",
    "Precision",
    "QuantSpec",
    "Status",
    "append",
    "attend",
    "clear",
    "evict",
    "gather",
    "init",
    "migrate",
    "nbytes",
    "prefill",
    "rewind",
    "stats",
    "take_rows",
]
