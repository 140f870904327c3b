"""Quantized key/value caches for decoding language models in JAX."""

import importlib.metadata

from jaxkv.attend import attend
from jaxkv.batch import concatenate, replace_rows, take_rows
from jaxkv.config import KvCacheConfig, Migration
from jaxkv.drop import clear, evict, rewind
from jaxkv.formats import Precision, QuantSpec
from jaxkv.models.configs import layers_of
from jaxkv.models.spec import LayerSpec
from jaxkv.objects import (
    AlignedBuffer,
    BufferPool,
    BufferPoolStats,
    BufferSize,
    CacheQuantization,
    CacheTier,
    KvCacheError,
    KvMemoryPool,
    OutOfMemoryError,
    PooledBuffer,
    PooledKvBlock,
    PooledKvCache,
    PooledKvCacheStats,
    PoolStats,
    TwoTierKvCache,
)
from jaxkv.presets import PRESETS, exact_ends, init_layers, init_stack, preset
from jaxkv.scoring import Scoring
from jaxkv.signed import StorageError
from jaxkv.state import CacheState, KvCacheStats, gather, init, nbytes, stats
from jaxkv.status import Status
from jaxkv.storage import load, save
from jaxkv.update import append, migrate, prefill
from jaxkv.view.draw import draw

__version__ = importlib.metadata.version("jaxkv")

__all__ = [
    "PRESETS",
    "AlignedBuffer",
    "BufferPool",
    "BufferPoolStats",
    "BufferSize",
    "CacheQuantization",
    "CacheState",
    "CacheTier",
    "KvCacheConfig",
    "KvCacheError",
    "KvCacheStats",
    "KvMemoryPool",
    "LayerSpec",
    "Migration",
    "OutOfMemoryError",
    "PoolStats",
    "PooledBuffer",
    "PooledKvBlock",
    "PooledKvCache",
    "PooledKvCacheStats",
    "Precision",
    "QuantSpec",
    "Scoring",
    "Status",
    "StorageError",
    "TwoTierKvCache",
    "append",
    "attend",
    "clear",
    "concatenate",
    "draw",
    "evict",
    "exact_ends",
    "gather",
    "init",
    "init_layers",
    "init_stack",
    "layers_of",
    "load",
    "migrate",
    "nbytes",
    "prefill",
    "preset",
    "replace_rows",
    "rewind",
    "save",
    "stats",
    "take_rows",
]
