"""Which tiers a cache has, as a policy that can be changed while it holds tokens."""

from __future__ import annotations

import abc
import dataclasses
import enum
from typing import ClassVar

from jaxkv.config import KvCacheConfig
from jaxkv.formats import Precision
from jaxkv.stats import bytes_per_token


class CacheTier(enum.StrEnum):
    """The tiers of the chain, newest tokens first. Sinks are held besides."""

    HOT = "hot"
    WARM = "warm"
    COLD = "cold"


class CacheQuantization(abc.ABC):
    """The policies: `HighPrecisionTail`, `QuantizedStore` and `Hybrid`, the default."""

    HighPrecisionTail: ClassVar[type[HighPrecisionTail]]
    QuantizedStore: ClassVar[type[QuantizedStore]]
    Hybrid: ClassVar[type[Hybrid]]

    @abc.abstractmethod
    def applied_to(self, config: KvCacheConfig) -> KvCacheConfig:
        """The configuration of a cache made with `config`, under this policy.

        Raises:
          ValueError: the policy asks for more tokens than `config.max_tokens`, or for tiers that
            the rest of `config` rules out.
        """

    @staticmethod
    def of(config: KvCacheConfig) -> CacheQuantization:
        """The policy that `config` amounts to."""
        if config.tail_length + config.sink_tokens == config.max_tokens:
            return HighPrecisionTail(config.tail_length, config.tail_precision)
        if config.tail_length == config.warm_length == 0:
            return QuantizedStore(config.store_precision).achieved_by(config)
        return Hybrid(config.tail_length, config.tail_precision, config.store_precision)


@dataclasses.dataclass(frozen=True)
class HighPrecisionTail(CacheQuantization):
    """Only the newest `tail_length` tokens (and the sinks), in one precision."""

    tail_length: int = 256
    precision: Precision = Precision.FP16

    def applied_to(self, config: KvCacheConfig) -> KvCacheConfig:
        if self.tail_length + config.sink_tokens > config.max_tokens:
            raise ValueError(
                f"tail_length={self.tail_length}: the cache was made for "
                f"max_tokens={config.max_tokens}"
            )
        return dataclasses.replace(
            config,
            tail_length=self.tail_length,
            tail_precision=self.precision,
            warm_length=0,
            max_tokens=self.tail_length + config.sink_tokens,
        )


@dataclasses.dataclass(frozen=True)
class QuantizedStore(CacheQuantization):
    """Every token (but the sinks) in the store's precision.

    `compression_ratio` is what was achieved against fp16: an answer, filled in when the policy is
    read back from a cache. It is not part of what is asked for.
    """

    precision: Precision = Precision.Q4
    compression_ratio: float = dataclasses.field(default=0.0, compare=False)

    def applied_to(self, config: KvCacheConfig) -> KvCacheConfig:
        return _with_store(config, self.precision, tail_length=0, warm_length=0)

    def achieved_by(self, config: KvCacheConfig) -> QuantizedStore:
        """The same with the ratio of a cache of this configuration."""
        fp16 = 2 * config.num_kv_heads * sum(config.side_dims)
        return dataclasses.replace(
            self, compression_ratio=fp16 / bytes_per_token(config, config.chain[-1])
        )


@dataclasses.dataclass(frozen=True)
class Hybrid(CacheQuantization):
    """The newest `tail_length` tokens in one precision, older ones in another (with the
    configuration's warm tier between)."""

    tail_length: int = 256
    tail_precision: Precision = Precision.FP16
    store_precision: Precision = Precision.Q4

    def applied_to(self, config: KvCacheConfig) -> KvCacheConfig:
        return _with_store(
            config,
            self.store_precision,
            tail_length=self.tail_length,
            tail_precision=self.tail_precision,
        )


def _with_store(config: KvCacheConfig, precision: Precision, **rest: object) -> KvCacheConfig:
    """`config` with another store; its own recipes for keys and values hold for its own precision
    only."""
    own = precision == config.store_precision
    recipes = {} if own else {"key_quant": None, "value_quant": None}
    fields = {"store_precision": precision, **recipes, **rest}
    return dataclasses.replace(config, **fields)  # type: ignore[arg-type]


CacheQuantization.HighPrecisionTail = HighPrecisionTail
CacheQuantization.QuantizedStore = QuantizedStore
CacheQuantization.Hybrid = Hybrid
