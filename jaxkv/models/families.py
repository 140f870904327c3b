"""The fields of a Hugging Face config under one name each, with what its family leaves out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

Fields = Mapping[str, Any]

ModelConfig = Mapping[str, Any] | str | os.PathLike[str] | Any
"""The fields of a config.json, its path or its folder's, or an object with `to_dict`."""

_ALIASES = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv", "multi_query_group_num"),
    "hidden_size": ("n_embd", "n_embed", "d_model"),
    "head_dim": ("kv_channels", "attention_head_dim"),
    "max_position_embeddings": ("n_positions", "n_ctx", "max_seq_len", "seq_length"),
    "sliding_window": ("attention_window_size",),
}
"""Our names of fields, which are most models', and others' for the same."""

_GEMMA = dict(num_attention_heads=8, head_dim=256, query_pre_attn_scalar=256)
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": _GEMMA | dict(attn_logit_softcapping=50.0, sliding_window=4096),
    "gemma3_text": _GEMMA
    | dict(num_key_value_heads=4, sliding_window=4096, max_position_embeddings=131072)
    | dict(num_hidden_layers=26, rope_theta=1e6, rope_local_base_freq=1e4),
    "gemma3n_text": _GEMMA
    | dict(num_key_value_heads=2, sliding_window=512, max_position_embeddings=32768)
    | dict(num_hidden_layers=35, num_kv_shared_layers=15, query_pre_attn_scalar=1)
    | dict(rope_theta=1e6, rope_local_base_freq=1e4),
    "gemma4_text": _GEMMA
    | dict(num_key_value_heads=4, sliding_window=512, max_position_embeddings=131072)
    | dict(num_hidden_layers=30, global_head_dim=512, query_pre_attn_scalar=1),
    "gpt_oss": dict(num_key_value_heads=8, head_dim=64, sliding_window=128),
    "llama4_text": dict(attention_chunk_size=8192),
    "mistral": dict(num_key_value_heads=8, sliding_window=4096),
    "cohere2": dict(sliding_window=4096),
    "olmo3": dict(sliding_window=4096),
    "exaone4": dict(sliding_window=4096),
    "qwen3_next": dict(num_attention_heads=16, num_key_value_heads=2, head_dim=256),
    "recurrent_gemma": dict(sliding_window=2048, block_types=["recurrent"] * 2 + ["attention"]),
    "deepseek_v2": dict(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128),
    "deepseek_v3": dict(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128),
    "bloom": dict(alibi=True),
    "gpt_bigcode": dict(multi_query=True),
    "jamba": dict(attn_layer_period=8, attn_layer_offset=4),
}
"""Fields that files leave out because they have the family's default."""

KNOWN = {
    *_DEFAULTS,
    *("llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_5_text", "qwen3_5_moe_text"),
    *("gemma", "mixtral", "ministral", "phi", "phi3", "phimoe", "glm", "glm4", "glm4_moe", "gpt2"),
    *("gpt_neox", "gptj", "falcon", "mpt", "cohere", "olmo", "olmo2", "smollm3", "granite"),
    *("granitemoe", "granitemoehybrid", "bamba", "lfm2", "kimi_linear", "minimax", "minimax_m2"),
    *("exaone4", "starcoder2", "stablelm", "opt", "nemotron", "nemotron_h", "falcon_h1"),
    *("deepseek_v32", "glm_moe_dsa", "phi4_multimodal", "smollm"),
}
"""Families whose rules are known here."""


def read(model_config: ModelConfig) -> dict[str, Any]:
    """The fields of the language model under our names, with its family's defaults."""
    if isinstance(model_config, str | os.PathLike):
        path = os.fspath(model_config)
        path = os.path.join(path, "config.json") if os.path.isdir(path) else path
        with open(path, encoding="utf-8") as file:
            model_config = json.load(file)
    elif not isinstance(model_config, Mapping):
        if not hasattr(model_config, "to_dict"):
            raise ValueError(
                f"model_config is a {type(model_config).__name__}: pass the fields of a "
                "config.json, its path, or an object with to_dict"
            )
        model_config = model_config.to_dict()
    fields = dict(model_config)
    for nested in ("text_config", "llm_config", "language_config"):
        if isinstance(fields.get(nested), Mapping):
            outer = f"{fields.get('model_type')}_text"
            fields |= {"model_type": outer, **fields[nested]}
    if fields.get("is_encoder_decoder"):
        raise ValueError(
            "an encoder-decoder caches its encoder's tokens besides: make its configs by hand"
        )
    for name, others in _ALIASES.items():
        found = [fields[other] for other in others if fields.get(other) is not None]
        if fields.get(name) is None and found:
            fields[name] = found[0]
    defaults = _DEFAULTS.get(str(fields.get("model_type")), {})
    return {**defaults, **fields}


def required(fields: Fields, name: str) -> Any:
    if fields.get(name) is None:
        others = ", ".join(_ALIASES.get(name, ()))
        raise ValueError(f"the config has no {name!r} (nor {others}): give it as a field")
    return fields[name]
