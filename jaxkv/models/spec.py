"""What one layer of a model caches, and the cache that this takes."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from jaxkv.config import KvCacheConfig
from jaxkv.presets import preset as preset_config
from jaxkv.rotary import Rotary


class Kind(enum.StrEnum):
    """How a layer looks back.

    FULL: at every token. SLIDING: at the newest `window` tokens. CHUNKED: at the tokens of its own
    chunk of `window` positions (Llama 4). OWN: through a state of its own kind (linear attention,
    convolution). NONE: not at all.
    """

    FULL = "full"
    SLIDING = "sliding"
    CHUNKED = "chunked"
    OWN = "own"
    NONE = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer: how it looks back, at what, and where that is kept.

    Attributes:
      num_kv_heads, head_dim, value_dim, values_from_keys: as in `KvCacheConfig`; 0 heads where the
        layer caches no keys.
      window: SLIDING: positions that a query sees, its own included. CHUNKED: positions of a chunk.
      shares: the number of the earlier layer whose cache this one looks at; it keeps none itself.
      scale: of the scores; None: head_dim ** -0.5.
      soft_cap: of the scores.
      sink_logits: the model learns a logit per head, to be passed as `sink_logits=`.
      decay: rates [N] of ALiBi.
      rotary: where the config says (of latents: of their last elements); None: no rotary embedding
        in this layer, or not known.
      key_bias: something is added to all keys before they are turned: a quantized store has to know
        `rotary` (Qwen2.5-Coder-0.5B with Q4: KL 0.13 without it).
      config: what it caches, once it has a size; None where it keeps no tokens of its own.
    """

    kind: Kind = Kind.FULL
    num_kv_heads: int = 0
    head_dim: int = 0
    value_dim: int | None = None
    values_from_keys: int | None = None
    window: int | None = None
    shares: int | None = None
    scale: float | None = None
    soft_cap: float | None = None
    sink_logits: bool = False
    decay: tuple[float, ...] | None = None
    rotary: Rotary | None = None
    key_bias: bool = False
    config: KvCacheConfig | None = None

    @property
    def looks(self) -> bool:
        """Whether the layer attends to cached tokens, its own or another layer's."""
        return self.kind in (Kind.FULL, Kind.SLIDING, Kind.CHUNKED)

    @property
    def keeps(self) -> bool:
        """Whether it keeps tokens of its own."""
        return self.looks and self.shares is None

    def options(self) -> dict[str, Any]:
        """What `attend` is to be told besides the config's window."""
        named = {"scale": self.scale, "soft_cap": self.soft_cap, "decay": self.decay}
        return {name: value for name, value in named.items() if value is not None}

    def sized(self, preset: str, max_tokens: int, **fields: Any) -> LayerSpec:
        """The layer with the config that holds what it may look at, of `max_tokens` tokens: a
        sliding layer keeps its window, and no sinks."""
        if not self.keeps:
            return self
        given: dict[str, Any] = {"num_kv_heads": self.num_kv_heads, "head_dim": self.head_dim}
        if self.key_bias:
            given["rotary"] = self.rotary
        given |= fields
        for name in ("value_dim", "values_from_keys"):
            if getattr(self, name) is not None:
                given[name] = getattr(self, name)
        if self.window is None:
            return dataclasses.replace(
                self, config=preset_config(preset, max_tokens=max_tokens, **given)
            )
        room = min(max_tokens, self.window)
        for name in ("warm_length", "tail_length"):
            if name in given:
                given[name] = min(
                    given[name], room - given.get("warm_length", 0) * (name[0] == "t")
                )
        if self.kind is Kind.SLIDING:
            given["window"] = self.window
        given["sink_tokens"] = 0
        return dataclasses.replace(self, config=preset_config(preset, max_tokens=room, **given))
