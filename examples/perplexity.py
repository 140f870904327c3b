"""What a cache costs in quality: SmolLM2-135M reads a text through it, against an fp32 cache.

    python examples/perplexity.py --text technical --tokens 8192 --store q4 --tail 128 --json

The text is cut into windows of 2,048 tokens. Each is fed in chunks: a chunk's tokens are appended,
then its queries attend over tail and store, as in decoding. The second half of each window is
scored. The first query of a chunk of T tokens sees a tail that is T - 1 tokens shorter than in
decoding, so that the loss comes out a little too high; `--chunk 1` is decoding itself.
"""

import argparse
import dataclasses
import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import llama
import numpy as np
import smollm2
from generate import add_cache_options, cache_config
from texts import TEXTS, read_text
from tqdm import tqdm

import jaxkv


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
) -> dict[str, float]:
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
    # One row of logits is 200 kB: a few hundred at a time.
    parts = [array.reshape(-1, 256, *array.shape[2:]) for array in (hidden, baseline, targets)]
    scores = [compare(params, *part) for part in zip(*parts, strict=True)]
    mean = {
        name: float(np.mean([score[name] for score in scores], dtype=np.float64))
        for name in scores[0]
    }
    return {
        "perplexity": math.exp(mean["loss"]),
        "baseline_perplexity": math.exp(mean["baseline_loss"]),
        "kl": mean["kl"],
        "top1": mean["top1"],
        "bits_per_element": bits_per_element(config),
        "tokens": targets.size,
    }


def fp32_config(model: llama.LlamaConfig, length: int) -> jaxkv.KvCacheConfig:
    """A cache that loses nothing."""
    exact = jaxkv.Precision.FP32
    return jaxkv.KvCacheConfig(length, exact, exact, length, model.num_kv_heads, model.head_dim)


def bits_per_element(config: jaxkv.KvCacheConfig) -> float:
    """Bits of memory, metadata included, that one more element of the last tier takes."""
    more = 1024
    tail_more = more if config.tail_length == config.max_tokens else 0
    longer = dataclasses.replace(
        config, max_tokens=config.max_tokens + more, tail_length=config.tail_length + tail_more
    )
    added = jaxkv.nbytes(jaxkv.init(longer)) - jaxkv.nbytes(jaxkv.init(config))
    return 8 * added / (2 * more * config.num_kv_heads * config.head_dim)


def cut_windows(tokens: list[int], num_scored: int, length: int) -> np.ndarray:
    """Windows [W, length] of a text whose second halves have `num_scored` tokens, or a little
    more."""
    num_windows = -(-num_scored // (length // 2))
    if len(tokens) < num_windows * length:
        raise ValueError(
            f"the text has {len(tokens):,} tokens; to score {num_scored:,} in windows of "
            f"{length:,} takes "
            f"{num_windows * length:,}: lower --tokens or give a longer text"
        )
    return np.asarray(tokens[: num_windows * length], np.int32).reshape(num_windows, length)


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
    add_cache_options(parser)
    args = parser.parse_args(argv)
    if args.quick:
        args.tokens, args.window = 512, 512
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_options(argv)
    model, params = smollm2.load_config(), llama.stack_layers(smollm2.load_params())
    tokens = smollm2.load_tokenizer().encode(read_text(args.text)).ids
    windows = cut_windows(tokens, args.tokens, args.window)
    config = cache_config(args, model, args.window)
    result = evaluate(model, params, config, windows, chunk=args.chunk, batch_size=args.batch_size)
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
