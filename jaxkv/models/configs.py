"""From a Hugging Face config to the layers of a model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxkv.models.embeddings import has_key_bias, rotary_of
from jaxkv.models.families import KNOWN, Fields, ModelConfig, read, required
from jaxkv.models.kinds import kinds_of
from jaxkv.models.spec import Kind, LayerSpec


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The layers of a model, and what its config does not say."""

    layers: tuple[LayerSpec, ...]
    max_context: int | None = None
    notes: tuple[str, ...] = ()

    def sized(
        self, preset: str, max_tokens: int | None = None, **fields: Any
    ) -> tuple[LayerSpec, ...]:
        """The layers with their caches' configs; see `layers_of`."""
        if max_tokens is None and self.max_context is None:
            raise ValueError(
                "the config does not say how long a context is: give max_tokens, or --context"
            )
        length = max_tokens or self.max_context
        assert length is not None
        return tuple(spec.sized(preset, length, **fields) for spec in self.layers)


def layers_of(
    model_config: ModelConfig,
    preset: str = "q4",
    max_tokens: int | None = None,
    **fields: Any,
) -> tuple[LayerSpec, ...]:
    """What each layer of a model caches, from its Hugging Face config. Where keys have a bias,
    their caches are told of the rotary embedding.

    Args:
      model_config: the fields of a config.json, its path or its folder's, or an object with
        `to_dict`.
      preset: of every layer; see `jaxkv.preset`.
      max_tokens: that full layers hold; None: as many as the model was made for.
      **fields: of every layer's `KvCacheConfig`, over the preset's (`rotary=None`: tell none). A
        sliding layer keeps its window: where T tokens are appended before they attend (drafts; and
        prompts, where layers share), set rewind_length to T - 1. `extend` needs none for a prompt
        of a layer's own.

    Raises:
      ValueError: the config lacks a field, which is named, or has layers that are not known.
    """
    return model_shape(model_config).sized(preset, max_tokens, **fields)


def model_shape(model_config: ModelConfig) -> ModelShape:
    """The layers of a model without a size; see `layers_of`."""
    fields = read(model_config)
    named = fields.get("layers_block_type") or fields.get("hybrid_override_pattern") or ()
    count = len(named) or required(fields, "num_hidden_layers")
    kinds, notes = kinds_of(fields, count)
    model_type = fields.get("model_type")
    if model_type not in KNOWN:
        notes = [f"model_type {model_type!r} is not known here: read by its fields alone", *notes]
    specs = [_spec(fields, kind, i, count) for i, kind in enumerate(kinds)]
    specs = _share(specs, fields.get("num_kv_shared_layers") or 0)
    own = sum(kind is Kind.OWN for kind in kinds) if model_type != "falcon_h1" else count
    if own:
        notes = [
            *notes,
            f"states of their own kind (linear attention) are not counted: {own} layers",
        ]
    return ModelShape(tuple(specs), fields.get("max_position_embeddings"), tuple(notes))


def _spec(fields: Fields, kind: Kind, index: int, count: int) -> LayerSpec:
    """Layer number `index`, as if it shared nothing."""
    spec = LayerSpec(kind=kind)
    if not spec.looks:
        return spec
    fields = {**fields, **_overrides(fields, kind, index)}
    windows = {Kind.SLIDING: "sliding_window", Kind.CHUNKED: "attention_chunk_size"}
    window = required(fields, windows[kind]) if kind in windows else None
    heads = required(fields, "num_attention_heads")
    spec = dataclasses.replace(
        spec,
        window=window,
        scale=_scale(fields),
        soft_cap=fields.get("attn_logit_softcapping"),
        sink_logits=fields.get("model_type") == "gpt_oss",
        decay=_slopes(heads) if _has_alibi(fields) else None,
    )
    if rank := fields.get("kv_lora_rank"):
        turned = fields["qk_rope_head_dim"]
        return dataclasses.replace(
            spec,
            num_kv_heads=1,
            head_dim=rank + turned,
            values_from_keys=rank,
            scale=_latent_scale(fields),
            rotary=rotary_of(fields, kind, index, turned),
        )
    head_dim = fields.get("head_dim") or required(fields, "hidden_size") // heads
    return dataclasses.replace(
        spec,
        num_kv_heads=_kv_heads(fields, heads),
        head_dim=head_dim,
        key_bias=has_key_bias(fields),
        rotary=rotary_of(fields, kind, index, head_dim),
    )


def _overrides(fields: Fields, kind: Kind, index: int) -> dict[str, Any]:
    """Fields of this layer alone: Gemma 4's full layers have larger heads, and fewer of them."""
    if "per_layer_config" in fields:
        given = fields["per_layer_config"] or {}
        return dict(given.get(str(index), given.get(index, {})))
    found = {}
    if kind is Kind.FULL and fields.get("global_head_dim"):
        found["head_dim"] = fields["global_head_dim"]
        if fields.get("attention_k_eq_v") and fields.get("num_global_key_value_heads"):
            found["num_key_value_heads"] = fields["num_global_key_value_heads"]
    return found


def _kv_heads(fields: Fields, heads: int) -> int:
    if fields.get("model_type") == "falcon" and fields.get("new_decoder_architecture"):
        return fields.get("num_key_value_heads") or heads
    if fields.get("multi_query"):
        return 1
    return fields.get("num_key_value_heads") or heads


def _scale(fields: Fields) -> float | None:
    """Of the scores, where it is not head_dim ** -0.5."""
    if (multiplier := fields.get("attention_multiplier")) is not None:
        return float(multiplier)
    scalar = fields.get("query_pre_attn_scalar")
    return None if scalar is None else float(scalar) ** -0.5


def _latent_scale(fields: Fields) -> float:
    """Of the scores over latents: by the head dim before it was compressed, and YaRN's factor."""
    recipe = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    factor, weight = recipe.get("factor", 1.0), recipe.get("mscale_all_dim", 0.0)
    stretched = 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
    width = (fields.get("qk_nope_head_dim") or 0) + fields["qk_rope_head_dim"]
    return float(width**-0.5 * stretched**2)


def _has_alibi(fields: Fields) -> bool:
    return bool(fields.get("alibi") or (fields.get("attn_config") or {}).get("alibi"))


def _slopes(heads: int) -> tuple[float, ...]:
    """ALiBi's rates (Press et al. 2022): powers of two for a power of two of heads; for others
    those of the power below, then every other one of the power above."""
    whole = 2 ** math.floor(math.log2(heads))
    rates = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    rates += [2 ** (-4 * (2 * i + 1) / whole) for i in range(heads - whole)]
    return tuple(rates)


def _share(specs: list[LayerSpec], shared: int) -> list[LayerSpec]:
    """The last `shared` layers look at the cache of the last layer of their kind before them."""
    first = len(specs) - shared

    def source(kind: Kind) -> int:
        alike = [i for i in range(first) if specs[i].kind is kind]
        if not alike:
            raise ValueError(
                f"num_kv_shared_layers={shared}: no {kind.value} layer before them keeps a cache"
            )
        return alike[-1]

    return [
        dataclasses.replace(spec, shares=source(spec.kind)) if i >= first and spec.looks else spec
        for i, spec in enumerate(specs)
    ]
