"""Quantized key/value caches for decoding language models in JAX."""

from jaxkv.attend import attend
from jaxkv.config import KvCacheConfig, Migration, Precision, QuantSpec
from jaxkv.presets import PRESETS, exact_ends, init_layers, init_stack, preset
from jaxkv.scoring import Scoring
from jaxkv.state import CacheState, KvCacheStats, Status, gather, init, nbytes, stats
from jaxkv.update import append, clear, evict, migrate, prefill, rewind, take_rows

__all__ = [
    "PRESETS",
    "CacheState",
    "KvCacheConfig",
    "KvCacheStats",
    "Migration",
    "Precision",
    "QuantSpec",
    "Scoring",
    "Status",
    "append",
    "attend",
    "clear",
    "evict",
    "exact_ends",
    "gather",
    "init",
    "init_layers",
    "init_stack",
    "migrate",
    "nbytes",
    "prefill",
    "preset",
    "rewind",
    "stats",
    "take_rows",
]
