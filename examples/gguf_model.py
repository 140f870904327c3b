"""A model out of a GGUF file: sizes, weights and tokenizer of the architectures llama, qwen2, qwen3
and gemma3.

    model = gguf_model.load("qwen2.5-0.5b.gguf")    # None: SmolLM2-135M, see smollm2.py
"""

import argparse
import functools
import pathlib
from typing import Any, NamedTuple

import gguf
import gguf_tokenizer
import jax
import jax.numpy as jnp
import numpy as np
import smollm2
from llama import Layer, LlamaConfig, Params, stack_layers
from tokenizers import Tokenizer

# Field of `Layer` -> tensor name in the file, after "blk.<i>."; those at the end are optional.
TENSORS = {
    "attention_norm": "attn_norm.weight",
    "query": "attn_q.weight",
    "key": "attn_k.weight",
    "value": "attn_v.weight",
    "output": "attn_output.weight",
    "ffn_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "query_bias": "attn_q.bias",
    "key_bias": "attn_k.bias",
    "value_bias": "attn_v.bias",
    "query_norm": "attn_q_norm.weight",
    "key_norm": "attn_k_norm.weight",
    "attention_post_norm": "post_attention_norm.weight",
    "ffn_post_norm": "post_ffw_norm.weight",
}
# Token that ends a turn -> template of a chat, for the vocabularies that have it; else a plain text.
CHATS = {
    "<|im_end|>": "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
    "<end_of_turn>": "<start_of_turn>user\n{prompt}<end_of_turn>\n<start_of_turn>model\n",
    None: "{prompt}",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")


class Model(NamedTuple):
    path: pathlib.Path
    config: LlamaConfig
    params: Params  # unrolled
    tokenizer: Tokenizer
    start_token: int | None  # what every text begins with
    end_token: int | None  # what ends the model's turn in a chat
    chat: str  # the template of a chat, with {prompt}

    @property
    def stacked(self) -> Params:
        """The weights for a scan over layers: a copy, unless `load` gave them so."""
        return stack_layers(self.params)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without the start token."""
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids


def add_model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=pathlib.Path,
        metavar="FILE.gguf",
        help=f"{', '.join(ARCHITECTURES)}; default: SmolLM2-135M",
    )


@functools.cache
def load(path: pathlib.Path | None = None, stacked: bool = False) -> Model:
    """The model of a file; SmolLM2-135M, downloaded on the first call, if None. `stacked`: its
    weights for a scan over layers, and no others in memory.

    Raises:
      ValueError: an architecture or a tokenizer that is not known here.
    """
    file = File(smollm2.fetch() if path is None else path)
    starts = file.get("tokenizer.ggml.add_bos_token", False)
    config, tokenizer = read_config(file), gguf_tokenizer.read_tokenizer(file.get)
    params = read_params(file, config)
    end, chat = next(
        (end, chat) for end, chat in CHATS.items() if end is None or tokenizer.token_to_id(end)
    )
    return Model(
        file.path,
        config,
        stack_layers(params) if stacked else params,
        tokenizer,
        file.get("tokenizer.ggml.bos_token_id") if starts else None,
        file.get("tokenizer.ggml.eos_token_id") if end is None else tokenizer.token_to_id(end),
        smollm2.CHAT_TEMPLATE if path is None else chat,
    )


class File:
    """A GGUF file's metadata as Python objects, and its tensors in float32."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path, self.reader = path, gguf.GGUFReader(path)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}

    def get(self, name: str, default: Any = None) -> Any:
        field = self.reader.fields.get(name)
        return default if field is None else field.contents()

    def tensor(self, name: str) -> jax.Array | None:
        """float32, because at one row XLA:CPU widens bfloat16 weights before each product, which
        costs more than the bandwidth it saves."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        return jnp.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), jnp.float32)


def read_config(file: File) -> LlamaConfig:
    kind = file.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{file.path} has the architecture {kind!r}: it must be one of {', '.join(ARCHITECTURES)}"
        )

    def get(name: str, default: Any = None) -> Any:
        return file.get(f"{kind}.{name}", default)

    width, num_heads = get("embedding_length"), get("attention.head_count")
    factors = file.tensor("rope_freqs.weight")
    is_gemma = kind == "gemma3"
    return LlamaConfig(
        num_layers=get("block_count"),
        num_heads=num_heads,
        num_kv_heads=get("attention.head_count_kv", num_heads),
        head_dim=get("attention.key_length", width // num_heads),
        rope_base=get("rope.freq_base", 1e4),
        norm_eps=get("attention.layer_norm_rms_epsilon"),
        rope_halves=kind != "llama",  # a llama's rows are permuted for interleaved pairs
        rope_factors=None if factors is None else tuple(np.asarray(factors).tolist()),
        embedding_scale=width**0.5 if is_gemma else 1.0,
        gelu=is_gemma,
        window=get("attention.sliding_window") if is_gemma else None,
    )


def read_params(file: File, config: LlamaConfig) -> Params:
    """Every matrix [out, in], one `Layer` of arrays a layer."""

    def read_layer(index: int) -> Layer:
        found = {field: file.tensor(f"blk.{index}.{name}") for field, name in TENSORS.items()}
        return Layer(**found)  # type: ignore[arg-type]

    embedding, norm = file.tensor("token_embd.weight"), file.tensor("output_norm.weight")
    assert embedding is not None and norm is not None
    layers = tuple(read_layer(i) for i in range(config.num_layers))
    return Params(embedding, layers, norm, file.tensor("output.weight"))
