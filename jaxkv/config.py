"""What a cache is: the configuration that fixes every shape, and the chain of tiers it makes."""

from __future__ import annotations

import dataclasses
import enum
import functools

from jaxkv.chain import TierSpec, capacity_of, check_group, store_formats
from jaxkv.checks import as_enum, as_int
from jaxkv.formats import LARGEST, LARGEST_FP16, Format, Precision, QuantSpec, format_of, unaligned
from jaxkv.rotary import Rotary


class Migration(enum.StrEnum):
    """When tokens leave a tier that is not the last one.

    EAGER: one by one, as soon as the tier holds more than its length (the original's counts).
    BATCHED: `migration_batch` at once, at positions divisible by it (counted from the end of the
    sinks), so that what is stored does not depend on how the tokens arrived. Needed by
    `axis="channel"`.
    """

    EAGER = "eager"
    BATCHED = "batched"


class Overflow(enum.StrEnum):
    """What becomes of an append to a row that is full.

    EVICT: the oldest tokens make room; how many have gone is `state.begin - config.sink_tokens`.
    REFUSE: the row stays as it is and gets `Status.FULL`.
    """

    EVICT = "evict"
    REFUSE = "refuse"


@dataclasses.dataclass(frozen=True)
class KvCacheConfig:
    """The static half of a cache. The first seven fields, their order and defaults are the
    original's (ruvllm).

    Attributes:
      tail_length: newest tokens kept in `tail_precision`; 0 quantizes everything at once.
      tail_precision: FP16 also for models in bfloat16: it holds every bfloat16 number of up to
        65,504 (normal, that is from 2**-14 on) exactly. BF16 for the few models with larger ones;
        `Status.SATURATED` tells.
      max_tokens: the most tokens a row holds, sinks included; older ones are evicted.
      migration_batch: tokens that move together under `Migration.BATCHED`.
      sink_tokens: the first positions of a row, kept in a float precision for ever (StreamingLLM).
      warm_length: tokens of an optional tier between tail and store, in `warm_precision`.
      key_quant, value_quant: recipes of the store that replace `store_precision`'s own.
      value_dim: elements of a value head, and so of an output head; None: `head_dim`.
      values_from_keys: V, where the values are the first V elements of the keys (the latents of
        DeepSeek's models: one head of 512 + 64): they are stored once, and every verb takes
        `values=None`.
      migration: when tokens leave a tier.
      window: the default `window` of attention: queries see this many of the newest positions, and
        the sinks.
      window_sinks: the default `window_sinks`: whether sinks are seen through a window.
      rewind_length: how many of the newest tokens `rewind` takes back without a trace (spare slots
        in every ring).
      rotary: the model's rotary embedding, by the cache's own positions. With it the store takes
        the mean of the keys before the embedding out of them, where that pays (a large key bias).
      overflow: what becomes of an append to a row that is full.
    """

    tail_length: int = 256
    tail_precision: Precision = Precision.FP16
    store_precision: Precision = Precision.Q4
    max_tokens: int = 4096
    num_kv_heads: int = 8
    head_dim: int = 128
    migration_batch: int = 64
    _: dataclasses.KW_ONLY
    sink_tokens: int = 0
    warm_length: int = 0
    warm_precision: Precision = Precision.Q8
    key_quant: QuantSpec | None = None
    value_quant: QuantSpec | None = None
    value_dim: int | None = None
    values_from_keys: int | None = None
    migration: Migration = Migration.EAGER
    rewind_length: int = 0
    window: int | None = None
    window_sinks: bool = True
    rotary: Rotary | None = None
    overflow: Overflow = Overflow.EVICT

    def __post_init__(self) -> None:
        for name in ("tail_precision", "store_precision", "warm_precision"):
            object.__setattr__(self, name, as_enum(Precision, name, getattr(self, name)))
        object.__setattr__(self, "migration", as_enum(Migration, "migration", self.migration))
        object.__setattr__(self, "overflow", as_enum(Overflow, "overflow", self.overflow))
        _check_sizes(self)
        if self.rotary is not None:
            if not isinstance(self.rotary, Rotary):
                raise ValueError(f"rotary={self.rotary!r}: must be a jaxkv.Rotary, or None")
            self.rotary.check(self.head_dim)
        _check_groups(self)

    @property
    def output_dim(self) -> int:
        """V: elements of a value, and of an output."""
        return self.values_from_keys or self.value_dim or self.head_dim

    @property
    def side_dims(self) -> tuple[int, ...]:
        """The elements of a head of what is stored: keys, and values unless a part of them."""
        stored_once = self.values_from_keys is not None
        return (self.head_dim,) if stored_once else (self.head_dim, self.output_dim)

    @property
    def room(self) -> int:
        """The most tokens the chain holds: `max_tokens` without the sinks."""
        return self.max_tokens - self.sink_tokens

    @property
    def step(self) -> int:
        """Boundaries between tiers lie at multiples of this many tokens (counted from the end of
        the sinks)."""
        return self.migration_batch if self.migration is Migration.BATCHED else 1

    @property
    def sink_precision(self) -> Precision:
        return Precision.FP16 if self.tail_precision.is_quantized else self.tail_precision

    @property
    def sink_spec(self) -> TierSpec:
        """The sinks as a tier: they never leave it."""
        size, precision = self.sink_tokens, self.sink_precision
        value = None if self.values_from_keys else precision
        return TierSpec("sinks", size, size, 0, precision, value, value_dim=self.output_dim)

    @property
    def largest(self) -> float:
        """The largest magnitude that every tier and the sinks hold; tokens enter within it."""
        formats = [fmt for tier in self.chain for fmt in tier.formats]
        formats += [self.sink_precision] if self.sink_tokens else []
        return LARGEST_FP16 if Precision.FP16 in formats else LARGEST

    @functools.cached_property
    def chain(self) -> tuple[TierSpec, ...]:
        """The tiers, newest first. A tier that can hold nothing is left out."""
        store_length = self.room - self.tail_length - self.warm_length

        # Only the last tier aligns: what leaves a tier must have the same bits in every program,
        # and a general reflection has not.
        def sides(precision: Precision, *quants: QuantSpec | None) -> list[Format]:
            given = zip(quants, self.side_dims, strict=False)
            return [format_of(precision, quant, dim) for quant, dim in given]

        tail, warm = (
            [unaligned(fmt) for fmt in sides(precision, None, None)]
            for precision in (self.tail_precision, self.warm_precision)
        )
        store = sides(self.store_precision, self.key_quant, self.value_quant)
        store = store_formats(store, self.warm_length or self.tail_length, self.rotary)
        wanted = [
            ("hot", self.tail_length, tail),
            ("warm", self.warm_length, warm),
            ("cold", store_length, store),
        ]
        held = [tier for tier in wanted if tier[1] > 0]
        last = len(held) - 1
        return tuple(
            TierSpec(
                name,
                length,
                capacity_of(
                    length,
                    formats,
                    self.step,
                    self.rewind_length,
                    is_first=i == 0,
                    is_last=i == last,
                ),
                self.sink_tokens,
                formats[0],
                formats[1] if len(formats) > 1 else None,
                self.rotary
                if isinstance(formats[0], QuantSpec) and formats[0].turned_mean
                else None,
                self.output_dim,
            )
            for i, (name, length, formats) in enumerate(held)
        )


def _check_sizes(config: KvCacheConfig) -> None:
    positive = ("max_tokens", "num_kv_heads", "head_dim", "migration_batch")
    for name in (*positive, "tail_length", "sink_tokens", "warm_length", "rewind_length"):
        value = as_int(name, getattr(config, name), least=int(name in positive))
        object.__setattr__(config, name, value)
    if config.window is not None:
        object.__setattr__(config, "window", as_int("window", config.window, least=1))
    for name in ("value_dim", "values_from_keys"):
        if getattr(config, name) is not None:
            object.__setattr__(config, name, as_int(name, getattr(config, name), least=1))
    if config.values_from_keys is not None:
        if config.values_from_keys > config.head_dim:
            raise ValueError(
                f"values_from_keys={config.values_from_keys}: keys have head_dim={config.head_dim} "
                "elements; give at most as many"
            )
        if config.value_dim is not None or config.value_quant is not None:
            raise ValueError(
                "values_from_keys: values are a part of the keys; leave value_dim and value_quant "
                "out"
            )
    least = config.tail_length + config.warm_length + config.sink_tokens
    if config.max_tokens < least:
        raise ValueError(
            f"max_tokens={config.max_tokens} cannot hold tail_length={config.tail_length} + "
            f"warm_length={config.warm_length} + sink_tokens={config.sink_tokens}: raise it to "
            f"{least} or shorten a tier"
        )
    if config.max_tokens == config.sink_tokens:
        raise ValueError(
            f"max_tokens={config.max_tokens} are all sinks: leave room for at least one more token"
        )


def _check_groups(config: KvCacheConfig) -> None:
    for index, tier in enumerate(config.chain):
        value = "head_dim" if config.value_dim is None else "value_dim"
        sizes = zip(("head_dim", value), config.side_dims, strict=False)
        for side, fmt, size in zip(("keys", "values"), tier.formats, sizes, strict=False):
            if not isinstance(fmt, QuantSpec):
                continue
            where = f"{tier.name} {side}"
            check_group(where, fmt, size, config.num_kv_heads, is_first=index == 0)
            if fmt.axis == "channel" and config.step % (fmt.group_size or 1):
                raise ValueError(
                    f"axis='channel' with group_size={fmt.group_size} for the {where}: tokens must "
                    "arrive in whole groups; set migration='batched' and migration_batch (now "
                    f"{config.migration_batch}) to a multiple of {fmt.group_size}"
                )
