"""Quantized key/value caches for decoding language models in JAX."""

import importlib.metadata

from jaxkv.config import KvCacheConfig, Migration, Overflow
from jaxkv.devices import copy
from jaxkv.diagnose import Diagnosis, diagnose, exact_layers
from jaxkv.formats import Precision, QuantSpec
from jaxkv.grow import grow
from jaxkv.models.configs import layers_of
from jaxkv.models.layers import Layers, init_layers
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
from jaxkv.padding import valid_from_mask
from jaxkv.presets import PRESETS, exact_ends, preset
from jaxkv.rotary import Rotary
from jaxkv.scoring import Scoring
from jaxkv.signed import StorageError
from jaxkv.softmax import merge_outputs as merge
from jaxkv.state import CacheState, init
from jaxkv.stats import KvCacheStats, nbytes
from jaxkv.status import Status
from jaxkv.storage import load
from jaxkv.update import migrate
from jaxkv.verbs import (
    append,
    attend,
    clear,
    concatenate,
    evict,
    extend,
    gather,
    keep,
    load_layers,
    positions,
    prefill,
    replace_rows,
    rewind,
    save,
    stats,
    take_rows,
)
from jaxkv.view import draw

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
    "Diagnosis",
    "KvCacheConfig",
    "KvCacheError",
    "KvCacheStats",
    "KvMemoryPool",
    "LayerSpec",
    "Layers",
    "Migration",
    "OutOfMemoryError",
    "Overflow",
    "PoolStats",
    "PooledBuffer",
    "PooledKvBlock",
    "PooledKvCache",
    "PooledKvCacheStats",
    "Precision",
    "QuantSpec",
    "Rotary",
    "Scoring",
    "Status",
    "StorageError",
    "TwoTierKvCache",
    "append",
    "attend",
    "clear",
    "concatenate",
    "copy",
    "diagnose",
    "draw",
    "evict",
    "exact_ends",
    "exact_layers",
    "extend",
    "gather",
    "grow",
    "init",
    "init_layers",
    "keep",
    "layers_of",
    "load",
    "load_layers",
    "merge",
    "migrate",
    "nbytes",
    "positions",
    "prefill",
    "preset",
    "replace_rows",
    "rewind",
    "save",
    "stats",
    "take_rows",
    "valid_from_mask",
]
