"""What each layer of a model caches, read from the fields of public config files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxkv
from jaxkv import Rotary
from jaxkv.cli import main
from jaxkv.models.configs import layers_of, model_shape
from jaxkv.models.spec import Kind, LayerSpec
from jaxkv.plan import plan

FULL, SLIDING = Kind.FULL, Kind.SLIDING

LLAMA = dict(
    model_type="llama",
    hidden_size=4096,
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rope_theta=500000.0,
    rope_scaling=dict(factor=8.0, rope_type="llama3", original_max_position_embeddings=8192),
)
QWEN2 = dict(
    model_type="qwen2",
    hidden_size=3584,
    num_attention_heads=28,
    num_hidden_layers=28,
    num_key_value_heads=4,
    max_position_embeddings=32768,
    sliding_window=131072,
    use_sliding_window=False,
    max_window_layers=28,
    rope_theta=1e6,
)
QWEN3 = dict(
    model_type="qwen3",
    hidden_size=1024,
    head_dim=128,
    num_attention_heads=16,
    num_hidden_layers=28,
    num_key_value_heads=8,
    max_position_embeddings=40960,
    sliding_window=None,
    use_sliding_window=False,
    max_window_layers=28,
    rope_theta=1e6,
)
GEMMA3 = dict(
    model_type="gemma3",
    text_config=dict(
        model_type="gemma3_text",
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=34,
        sliding_window=1024,
        rope_scaling=dict(factor=8.0, rope_type="linear"),
    ),
    vision_config=dict(hidden_size=1152, num_attention_heads=16, num_hidden_layers=27),
)
GEMMA3N = dict(
    model_type="gemma3n",
    text_config=dict(
        model_type="gemma3n_text",
        hidden_size=2048,
        head_dim=256,
        layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 7,
        max_position_embeddings=32768,
        num_attention_heads=8,
        num_hidden_layers=35,
        num_key_value_heads=2,
        num_kv_shared_layers=15,
        rope_local_base_freq=10000.0,
        rope_theta=1000000.0,
        sliding_window=512,
    ),
)
GPT_OSS = dict(
    model_type="gpt_oss",
    head_dim=64,
    hidden_size=2880,
    layer_types=["sliding_attention", "full_attention"] * 12,
    max_position_embeddings=131072,
    num_attention_heads=64,
    num_hidden_layers=24,
    num_key_value_heads=8,
    sliding_window=128,
    rope_theta=150000,
)
MISTRAL = dict(
    model_type="mistral",
    hidden_size=4096,
    max_position_embeddings=32768,
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=8,
    rope_theta=10000.0,
    sliding_window=4096,
)
DEEPSEEK = dict(
    model_type="deepseek_v3",
    hidden_size=7168,
    kv_lora_rank=512,
    max_position_embeddings=163840,
    num_attention_heads=128,
    num_hidden_layers=61,
    num_key_value_heads=128,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rope_theta=10000,
    rope_scaling=dict(factor=40, mscale=1.0, mscale_all_dim=1.0, type="yarn"),
)
# Name -> its fields, and the elements of keys and values that 32,768 tokens take, by hand.
CONTEXT = 32768
REAL: dict[str, tuple[dict[str, Any], int]] = {
    "Llama 3.1 8B": (LLAMA, 32 * CONTEXT * 2 * 8 * 128),
    "Qwen 2.5 7B": (QWEN2, 28 * CONTEXT * 2 * 4 * 128),
    "Qwen 3 0.6B": (QWEN3, 28 * CONTEXT * 2 * 8 * 128),
    "Gemma 3 4B": (GEMMA3, (5 * CONTEXT + 29 * 1024) * 2 * 4 * 256),
    "Gemma 3n E4B": (GEMMA3N, (4 * CONTEXT + 16 * 512) * 2 * 2 * 256),
    "gpt-oss 20B": (GPT_OSS, (12 * CONTEXT + 12 * 128) * 2 * 8 * 64),
    "Mistral 7B 0.1": (MISTRAL, 32 * 4096 * 2 * 8 * 128),
    "DeepSeek V3": (DEEPSEEK, 61 * CONTEXT * 576),
}
real = pytest.mark.parametrize(("fields", "elements"), REAL.values(), ids=REAL)


@real
@pytest.mark.parametrize("preset", ["fp16", "q4", "q8", "q4_sinks"])
def test_plan_counts_what_is_held(fields: dict[str, Any], elements: int, preset: str) -> None:
    """The states' own bytes, and the elements counted by hand."""
    layers = layers_of(fields, preset, CONTEXT)
    found = plan(layers, batch_size=2)
    held = sum(
        leaf.size * leaf.dtype.itemsize
        for layer in layers
        if layer.config is not None
        for leaf in jax.tree.leaves(jax.eval_shape(lambda c=layer.config: jaxkv.init(c, 2)))
    )
    assert found.total_bytes == held
    assert found.fp16_bytes == 2 * 2 * elements
    if preset == "fp16":
        assert abs(found.total_bytes / found.fp16_bytes - 1) < 0.01


def kinds(fields: dict[str, Any]) -> dict[str, int]:
    return Counter(
        "shares" if layer.shares is not None else str(layer.kind)
        for layer in model_shape(fields).layers
    )


def small(model_type: str, **fields: Any) -> dict[str, Any]:
    sizes = {"num_hidden_layers": 12, "num_attention_heads": 8, "hidden_size": 512}
    return {"model_type": model_type, **sizes, **fields}


KINDS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "gemma2": (small("gemma2"), {"sliding": 6, "full": 6}),
    "gemma3n": (GEMMA3N, {"sliding": 16, "full": 4, "shares": 15}),
    "gemma4": (
        {"model_type": "gemma4", "text_config": small("gemma4_text", num_kv_shared_layers=4)},
        {"sliding": 7, "full": 1, "shares": 4},
    ),
    "mistral, v0.3": (small("mistral", sliding_window=None), {"full": 12}),
    "mistral, left out": (small("mistral"), {"sliding": 12}),
    "phi3 mini": (small("phi3", sliding_window=2047), {"sliding": 12}),
    "qwen2, on": (
        small("qwen2", sliding_window=128, use_sliding_window=True, max_window_layers=8),
        {"full": 8, "sliding": 4},
    ),
    "llama4": (
        {"model_type": "llama4", "text_config": small("llama4_text")},
        {"chunked": 9, "full": 3},
    ),
    "qwen3_next": (small("qwen3_next", full_attention_interval=4), {"own": 9, "full": 3}),
    "jamba": (small("jamba", attn_layer_period=4, attn_layer_offset=1), {"own": 9, "full": 3}),
    "nemotron_h": (small("nemotron_h", hybrid_override_pattern="M-M*E"), {"own": 2, "none": 2, "full": 1}),
    "kimi_linear": (
        small("kimi_linear", linear_attn_config={"full_attn_layers": [4, 8, 12]}),
        {"own": 9, "full": 3},
    ),
    "minimax": (small("minimax", attn_type_list=[0, 0, 1] * 4), {"own": 8, "full": 4}),
    "lfm2": (small("lfm2", full_attn_idxs=[2, 5]), {"own": 10, "full": 2}),
    "exaone4": (
        small("exaone4", sliding_window=64, sliding_window_pattern="LLLG"),
        {"sliding": 9, "full": 3},
    ),
    "recurrent_gemma": (small("recurrent_gemma"), {"own": 8, "sliding": 4}),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "expected"), KINDS.values(), ids=KINDS)
def test_kinds(fields: dict[str, Any], expected: dict[str, int]) -> None:
    assert kinds(fields) == expected


HEADS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "gpt2": ({"model_type": "gpt2", "n_layer": 2, "n_head": 12, "n_embd": 768}, (12, 64)),
    "falcon 7B": (small("falcon", multi_query=True, num_kv_heads=8), (1, 64)),
    "falcon 40B": (small("falcon", new_decoder_architecture=True, num_kv_heads=4), (4, 64)),
    "starcoder": (small("gpt_bigcode"), (1, 64)),
    "chatglm": (small("glm", multi_query_group_num=2, kv_channels=128), (2, 128)),
    "deepseek_v2": (small("deepseek_v2"), (1, 576)),
    "gemma 4, full": (small("gemma4_text", attention_k_eq_v=True, num_global_key_value_heads=2), (2, 512)),
    "transformers 5": (small("gemma4_text", per_layer_config={"11": {"head_dim": 96}}), (4, 96)),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "expected"), HEADS.values(), ids=HEADS)
def test_heads_of_the_last_layer(fields: dict[str, Any], expected: tuple[int, int]) -> None:
    last = model_shape(fields).layers[-1]
    assert (last.num_kv_heads, last.head_dim) == expected


def test_shared_layers_look_at_the_last_of_their_kind() -> None:
    layers = model_shape(GEMMA3N).layers
    assert {layers[i].shares for i in range(20, 35) if layers[i].kind is FULL} == {19}
    assert {layers[i].shares for i in range(20, 35) if layers[i].kind is SLIDING} == {18}


def test_scores() -> None:
    """Scale, soft cap, ALiBi's rates and learned sinks."""
    assert model_shape(small("gemma2")).layers[0].options() == {"scale": 0.0625, "soft_cap": 50.0}
    assert model_shape(GPT_OSS).layers[0].sink_logits
    stretched = 0.1 * 3.6888794541139363 + 1
    assert model_shape(DEEPSEEK).layers[0].scale == pytest.approx(192**-0.5 * stretched**2)
    rates = model_shape(small("bloom", num_attention_heads=3)).layers[0].decay
    assert rates == (1 / 16, 1 / 256, 1 / 4)


def test_rotary() -> None:
    assert model_shape(GEMMA3).layers[0].rotary == Rotary(1e4)
    assert model_shape(GEMMA3).layers[5].rotary == Rotary(1e6, scaling=(1 / 8,) * 128)
    partial = small("phi", partial_rotary_factor=0.5, rope_theta=1e4)
    assert model_shape(partial).layers[0].rotary == Rotary(1e4, dim=32)
    assert model_shape(small("cohere", rope_theta=1e4)).layers[0].rotary == Rotary(
        1e4, "interleaved"
    )
    flags = model_shape(small("smollm3", no_rope_layers=[1, 1, 0] * 4, rope_theta=1e6)).layers
    assert [layer.rotary is None for layer in flags[:3]] == [False, False, True]
    longer = dict(rope_type="longrope", short_factor=[1.0] * 32)
    assert model_shape(small("phi3", rope_theta=1e4, rope_scaling=longer)).layers[0].rotary is None


def test_stretched_frequencies() -> None:
    """Fast pairs are left alone, slow ones divided by the factor, with a ramp between."""
    yarn = dict(rope_type="yarn", factor=32.0, original_max_position_embeddings=4096)
    stretched = small("gpt_oss", head_dim=64, rope_theta=150000, rope_scaling=yarn)
    for model, factor in ((LLAMA, 8.0), (stretched, 32.0)):
        rotary = model_shape(model).layers[0].rotary
        assert rotary is not None and rotary.scaling is not None
        factors = np.array(rotary.scaling)
        assert (factors[:8] == 1).all() and (factors[-4:] == 1 / factor).all()
        assert (np.diff(factors) <= 0).all() and ((factors > 1 / factor) & (factors < 1)).any()


def test_caches_of_biased_keys_know_the_embedding() -> None:
    """And no others: where a head has no mean to take out, its score would only cost."""
    for preset in ("q4", "q4_bias", "k4v2"):
        found = {layer.config.rotary for layer in layers_of(QWEN2, preset) if layer.config}
        assert found == {Rotary(1e6)}
    assert all(layer.config.rotary is None for layer in layers_of(LLAMA, "q4") if layer.config)
    assert all(x.config.rotary is None for x in layers_of(QWEN2, rotary=None) if x.config)
    biased = small("llama", attention_bias=True, rope_theta=1e4)
    assert layers_of(biased, max_tokens=512)[0].config.rotary == Rotary(1e4)


def test_sliding_layers_hold_their_window() -> None:
    """Never sinks; a tail no longer than that; spare slots for drafts."""
    first, *_, last = layers_of(GPT_OSS, "q4_sinks", 4096, rewind_length=4)
    assert first.config is not None and last.config is not None
    assert (first.config.max_tokens, first.config.window, first.config.sink_tokens) == (128, 128, 0)
    assert [tier.capacity for tier in first.config.chain] == [132]
    assert (last.config.max_tokens, last.config.window, last.config.sink_tokens) == (4096, None, 64)
    short = layers_of(GPT_OSS, "q4", 64, tail_length=48, warm_length=8)[0].config
    assert short is not None and (short.max_tokens, short.tail_length) == (64, 48)


def test_a_preset_fits_its_tail() -> None:
    assert jaxkv.preset("q4", max_tokens=64).tail_length == 64
    assert jaxkv.preset("q4_sinks", max_tokens=128).tail_length == 64
    assert jaxkv.preset("q4", max_tokens=8192).tail_length == 256
    assert {tier.key for tier in jaxkv.preset("fp32").chain} == {jaxkv.Precision.FP32}


def test_an_object_with_to_dict(tmp_path: Path) -> None:
    class Config:
        def to_dict(self) -> dict[str, Any]:
            return QWEN3

    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    wanted = layers_of(QWEN3, "q8")
    assert layers_of(Config(), "q8") == layers_of(tmp_path, "q8") == wanted
    assert wanted[0].config is not None and wanted[0].config.max_tokens == 40960


def test_what_is_not_known_is_said() -> None:
    shape = model_shape(small("brand_new", sliding_window=64))
    assert {layer.kind for layer in shape.layers} == {FULL}
    assert "'brand_new' is not known" in shape.notes[0]
    assert "sliding_window=64 does not say in which layers" in shape.notes[1]
    assert "9 layers" in model_shape(small("qwen3_next")).notes[-1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (3, "model_config is a int: pass"),
        ({"model_type": "llama"}, "has no 'num_hidden_layers'"),
        (small("llama", hidden_size=None), "has no 'hidden_size'"),
        (small("t5", is_encoder_decoder=True), "encoder-decoder"),
        (small("llama", layer_types=["wavelet"] * 12), r"layers of types \['wavelet'\]"),
        (small("llama", layer_types=["full_attention"] * 3), "names 3 layers and counts 12"),
        (small("bamba"), "bamba mixes layers"),
        (small("gemma2", num_kv_shared_layers=12), "no sliding layer before them"),
    ],
)
def test_refusals(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_shape(fields)


def test_no_context() -> None:
    with pytest.raises(ValueError, match="give max_tokens"):
        layers_of(small("llama"))
    with pytest.raises(ValueError, match="no layer keeps tokens"):
        plan([LayerSpec(kind=Kind.OWN)])


@pytest.mark.slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both kinds of layers in the table, with what is not known; what fits at both lengths."""
    fields = small("brand_new", layer_types=["sliding_attention", "full_attention"] * 6)
    fields |= {"sliding_window": 512, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert main(["plan", "--model", str(tmp_path), "--memory", "100MB"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("12 layers; 1 x 4,096 tokens; devices: 1\n")
    assert "6 layers with 8 kv heads of 64, a window of 512" in out
    assert "note: model_type 'brand_new' is not known" in out
    assert main(["plan", "--model", str(tmp_path), "--memory", "100MB", "--json"]) == 0
    fits = json.loads(capsys.readouterr().out)["fits"]

    def at(tokens: int) -> int:
        return plan(layers_of(fields, "q4", tokens)).total_bytes

    assert at(fits["tokens"]) <= 100_000_000 < at(fits["tokens"] + 1)
    held = 2 * 2 * 8 * 64 * 6
    assert fits["fp16_tokens"] == 100_000_000 // held - 512
