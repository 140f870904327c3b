"""What a cache costs in quality: a model reads a text through it, against an fp32 cache.

    python examples/perplexity.py --text technical --tokens 8192 --store q4 --tail 128 --json
    python examples/perplexity.py --model qwen2.5-0.5b.gguf    # SmolLM2-135M is the default

The text is cut into windows of 2,048 tokens. Each is fed in chunks: a chunk's tokens are appended,
then its queries attend over tail and store, as in decoding. The second half of each window is
scored. The first query of a chunk of T tokens sees a tail that is T - 1 tokens shorter than in
decoding, so that the loss comes out a little too high; `--chunk 1` is decoding itself.
"""

import argparse
import json
import math
from functools import partial
from typing import Any

import gguf_model
import jax
import jax.numpy as jnp
import llama
import numpy as np
from generate import add_cache_options, cache_config
from texts import TEXTS, read_text
from tqdm import tqdm

import jaxkv
from jaxkv.stats import bytes_per_token

WORST = 32
"""The largest divergences that a score keeps: enough for the 99.9 % quantile of 16,384 tokens or
more, whatever parts they come in."""


@partial(jax.jit, static_argnames="model", donate_argnames="state")
def read_chunk(
    model: llama.LlamaConfig, params: llama.Params, state: jaxkv.CacheState, tokens: jax.Array
) -> tuple[jaxkv.CacheState, jax.Array]:
    """tokens [B, T] -> state, hidden [B, T, D]"""
    return llama.forward(model, params, state, tokens, llama.cached)


def read_windows(
    model: llama.LlamaConfig,
    params: llama.Params,
    config: jaxkv.KvCacheConfig,
    windows: np.ndarray,
    *,
    chunk: int = 16,
    batch_size: int = 4,
) -> np.ndarray:
    """Reads windows [W, S] through the cache: the hidden states that predict each second half, [W,
    S / 2, D].

    Hidden states and not logits, which are 85 times their size.
    """
    num_windows, length = windows.shape
    hidden = []
    with tqdm(
        total=windows.size,
        desc=f"{config.store_precision.value} cache",
        unit="token",
        mininterval=1,
    ) as progress:
        for rows in np.split(windows, range(batch_size, num_windows, batch_size)):
            state = jaxkv.init(config, len(rows), num_layers=model.num_layers)
            outputs = []
            for tokens in np.split(rows, range(chunk, length, chunk), axis=1):
                state, output = read_chunk(model, params, state, tokens)
                outputs.append(np.asarray(output))
                progress.update(tokens.size)
            hidden.append(np.concatenate(outputs, axis=1)[:, length // 2 - 1 : -1])
    return np.concatenate(hidden)


@jax.jit
def compare(
    params: llama.Params, hidden: jax.Array, baseline: jax.Array, targets: jax.Array
) -> dict[str, jax.Array]:
    """Per token, [T]: both losses, the KL divergence, and whether both caches prefer the same
    token."""
    ours = jax.nn.log_softmax(llama.logits(params, hidden))
    theirs = jax.nn.log_softmax(llama.logits(params, baseline))
    pick = jnp.arange(len(targets)), targets
    return {
        "loss": -ours[pick],
        "baseline_loss": -theirs[pick],
        "kl": jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1),
        "top1": ours.argmax(-1) == theirs.argmax(-1),
    }


def evaluate(
    model: llama.LlamaConfig,
    params: llama.Params,
    config: jaxkv.KvCacheConfig,
    windows: np.ndarray,
    baseline: np.ndarray | None = None,
    **reading: int,
) -> dict[str, Any]:
    """Scores the second half of each window [W, S] read through a cache of `config`.

    `baseline` is `read_windows` with `fp32_config`, to be kept where many configs read the same
    windows; `reading` are the options of `read_windows`.
    """
    if baseline is None:
        baseline = read_windows(
            model, params, fp32_config(model, windows.shape[1]), windows, **reading
        )
    hidden = read_windows(model, params, config, windows, **reading)
    targets = windows[:, windows.shape[1] // 2 :]
    return summary(params, hidden, baseline, targets) | {
        "bits_per_element": bits_per_element(config)
    }


def summary(
    params: llama.Params, hidden: np.ndarray, baseline: np.ndarray, targets: np.ndarray
) -> dict[str, Any]:
    """What hidden states [W, S, D] lose against those of the baseline; targets [W, S]."""
    # One row of logits is 200 kB to 1 MB: a few dozen to hundreds at a time.
    size = 2**24 // len(params.embedding) if len(params.embedding) > 2**16 else 256
    size = math.gcd(1 << size.bit_length() - 1, targets.size)
    parts = [array.reshape(-1, size, *array.shape[2:]) for array in (hidden, baseline, targets)]
    scores = [compare(params, *part) for part in zip(*parts, strict=True)]
    score = {name: np.concatenate([each[name] for each in scores]) for name in scores[0]}
    mean = {name: float(np.mean(each, dtype=np.float64)) for name, each in score.items()}
    return {
        "perplexity": math.exp(mean["loss"]),
        "baseline_perplexity": math.exp(mean["baseline_loss"]),
        "kl": mean["kl"],
        "kl_worst": np.sort(score["kl"])[: -WORST - 1 : -1].tolist(),
        "top1": mean["top1"],
        "tokens": targets.size,
    }


def high_quantile(worst: list[float], tokens: int) -> float:
    """The 99.9 % quantile of `tokens` numbers of which the largest are `worst`, in falling order."""
    return worst[min(tokens // 1000, len(worst) - 1)]


def fp32_config(model: llama.LlamaConfig, length: int) -> jaxkv.KvCacheConfig:
    """A cache that loses nothing."""
    exact = jaxkv.Precision.FP32
    return jaxkv.KvCacheConfig(length, exact, exact, length, model.num_kv_heads, model.head_dim)


def bits_per_element(config: jaxkv.KvCacheConfig) -> float:
    """Bits of memory, metadata included, that one more element of the last tier takes."""
    elements = config.num_kv_heads * sum(config.side_dims)
    return 8 * bytes_per_token(config, config.chain[-1]) / elements


def cut_windows(
    tokens: list[int], num_scored: int, length: int, start: int | None = None
) -> np.ndarray:
    """Windows [W, length] of a text whose second halves have `num_scored` tokens, or a little
    more; each begins with the token `start`, if any."""
    num_windows = -(-num_scored // (length // 2))
    own = length - (start is not None)  # tokens of the text in a window
    if len(tokens) < num_windows * own:
        raise ValueError(
            f"the text has {len(tokens):,} tokens; to score {num_scored:,} in windows of "
            f"{length:,} takes "
            f"{num_windows * own:,}: lower --tokens or give a longer text"
        )
    windows = np.asarray(tokens[: num_windows * own], np.int32).reshape(num_windows, own)
    first = np.full((num_windows, length - own), start or 0, np.int32)
    return np.concatenate([first, windows], axis=1)


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--text", default="technical", help=f"a file, or one of {', '.join(TEXTS)}")
    parser.add_argument("--tokens", type=int, default=4096, help="how many to score")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=16, help="tokens appended at once")
    parser.add_argument("--batch-size", type=int, default=4, help="windows read at once")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="512 tokens in two short windows")
    gguf_model.add_model_option(parser)
    add_cache_options(parser)
    args = parser.parse_args(argv)
    if args.quick:
        args.tokens, args.window = 512, 512
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_options(argv)
    model = gguf_model.load(args.model)
    tokens = model.encode(read_text(args.text))
    windows = cut_windows(tokens, args.tokens, args.window, model.start_token)
    config = cache_config(args, model.config, args.window)
    reading = {"chunk": args.chunk, "batch_size": args.batch_size}
    result = evaluate(model.config, model.stacked, config, windows, **reading)
    result["kl_99.9"] = high_quantile(result.pop("kl_worst"), result["tokens"])
    if args.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(
                f"{name:<20}{value:>12,.5g}"
                if isinstance(value, float)
                else f"{name:<20}{value:>12,}"
            )


if __name__ == "__main__":
    main()
