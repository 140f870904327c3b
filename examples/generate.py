"""Generates text with a model through a jaxkv cache, and tells what the cache costs.

    python examples/generate.py --prompt "Why is the sky blue?"
    python examples/generate.py --context 2048 --store fp32    # go on after 2,048 tokens of prose
    python examples/generate.py --model qwen2.5-0.5b.gguf

The first run without --model downloads SmolLM2-135M (98 MB); see smollm2.py.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gguf_model
import jax
import jax.numpy as jnp
import llama
from texts import read_text
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from tqdm import tqdm

import jaxkv
from jaxkv.plan import plan

BLOCK = 16  # tokens that one call decodes, and so are printed at once
PREFILL_CHUNK = 512  # prompt tokens that one call takes in
PRECISIONS = [precision.value for precision in jaxkv.Precision]
FLAGS = {"symmetric", "rotate", "align", "center", "balance", "turned_mean", "two_level"}

Decode = Callable[..., tuple[jaxkv.Layers, jax.Array]]


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cache")
    group.add_argument("--store", choices=PRECISIONS, default="q4")
    group.add_argument(
        "--tail", type=int, default=128, metavar="N", help="newest tokens, not in the store"
    )
    group.add_argument("--tail-precision", choices=PRECISIONS, default="fp16")
    group.add_argument(
        "--warm", type=int, default=0, metavar="N", help="tokens between tail and store"
    )
    group.add_argument("--warm-precision", choices=PRECISIONS, default="q8")
    group.add_argument(
        "--sinks", type=int, default=0, metavar="N", help="first tokens, never quantized"
    )
    group.add_argument(
        "--migration", choices=[mode.value for mode in jaxkv.Migration], default="eager"
    )
    recipe = "recipe of the store: bits, group size, then any of channel, symmetric, rotate, align, balance, turned_mean, two_level"
    group.add_argument("--keys", type=quant_spec, metavar="4,64,rotate", help=recipe)
    group.add_argument("--values", type=quant_spec, metavar="4,32", help="the same for values")


def quant_spec(recipe: str) -> jaxkv.QuantSpec:
    """Reads a recipe such as "4,64,rotate" or "2,32,channel"."""
    bits, group_size, *words = recipe.split(",")
    if unknown := set(words) - FLAGS - {"channel"}:
        raise argparse.ArgumentTypeError(
            f"{recipe!r} has {sorted(unknown)}, which mean nothing here"
        )
    flags = {flag: flag in words for flag in FLAGS}
    return jaxkv.QuantSpec(
        int(bits), int(group_size), "channel" if "channel" in words else "token", **flags
    )


def cache_fields(args: argparse.Namespace, max_tokens: int) -> dict[str, Any]:
    """The cache that the options describe; a floating-point store is a single tier, and needs no
    tail."""
    single = not jaxkv.Precision(args.store).is_quantized
    return dict(
        tail_length=max_tokens if single else args.tail,
        tail_precision=args.store if single else args.tail_precision,
        store_precision=args.store,
        sink_tokens=0 if single else args.sinks,
        warm_length=0 if single else args.warm,
        warm_precision=args.warm_precision,
        key_quant=args.keys,
        value_quant=args.values,
        migration=args.migration,
    )


def cache_config(
    args: argparse.Namespace, model: llama.LlamaConfig, max_tokens: int
) -> jaxkv.KvCacheConfig:
    """The same cache for every layer."""
    heads = {"num_kv_heads": model.num_kv_heads, "head_dim": model.head_dim}
    fields = {**heads, "rotary": model.rotary, **cache_fields(args, max_tokens)}
    return jaxkv.KvCacheConfig(max_tokens=max_tokens, **fields)


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--prompt", default="Explain in a few sentences how the tides come about.")
    parser.add_argument(
        "--context", type=positive, metavar="N", help="go on after N tokens of prose"
    )
    parser.add_argument(
        "--tokens", type=positive, default=256, help=f"to generate, in blocks of {BLOCK}"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--unroll", action="store_true", help="unroll the layers: compiles long, runs faster"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a short run that shows that all works"
    )
    gguf_model.add_model_option(parser)
    add_cache_options(parser)
    args = parser.parse_args(argv)
    if args.quick:
        args.tokens, args.tail = 2 * BLOCK, min(args.tail, BLOCK)
    return args


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def encode_prompt(args: argparse.Namespace, model: gguf_model.Model) -> list[int]:
    start = [] if model.start_token is None else [model.start_token]
    if not args.context:
        return start + model.encode(model.chat.format(prompt=args.prompt))
    return [*start, *model.encode(read_text("prose"))][: args.context]


def prefill(
    model: llama.LlamaConfig, params: llama.Params, state: jaxkv.Layers, prompt: list[int]
) -> tuple[jaxkv.Layers, jax.Array]:
    """Takes in the prompt chunk by chunk, and returns the state and the next token's logits [1,
    V]."""
    for start in tqdm(range(0, len(prompt), PREFILL_CHUNK), "prefill", unit="chunk"):
        chunk = jnp.asarray(prompt[start : start + PREFILL_CHUNK], jnp.int32)[None]
        state, logits = llama.prefill(model, params, state, chunk)
        logits.block_until_ready()
    return state, logits


def compile_decode(
    model: llama.LlamaConfig,
    params: llama.Params,
    state: jaxkv.Layers,
    attention: llama.Attention,
) -> Decode:
    """The loop over BLOCK tokens, compiled ahead, so that no timing includes it."""
    inputs = jnp.zeros(1, jnp.int32), jax.random.key(0), jnp.float32(0)
    lowered = llama.decode.lower(model, params, state, *inputs, length=BLOCK, attention=attention)
    return partial(lowered.compile(), params)


def timed(
    decode: Decode,
    state: jaxkv.Layers,
    token: jax.Array,
    key: jax.Array,
    temperature: float = 0.0,
) -> tuple[jaxkv.Layers, jax.Array, float]:
    """One block after token [1]: the state, the tokens [1, BLOCK], and the seconds it took."""
    start = time.perf_counter()
    state, tokens = decode(state, token, key, jnp.float32(temperature))
    tokens.block_until_ready()
    return state, tokens, time.perf_counter() - start


def generate(
    decode: Decode,
    state: jaxkv.Layers,
    token: jax.Array,
    keys: Sequence[jax.Array],
    temperature: float,
    tokenizer: Tokenizer,
    stop: int | None,
) -> tuple[jaxkv.Layers, list[float]]:
    """Prints token [1] and a block per key, up to `stop`; returns the state and the blocks'
    seconds."""
    text, seconds = DecodeStream(skip_special_tokens=True), []
    print(text.step(tokenizer, int(token[0])) or "", end="", flush=True)
    for key in keys:
        state, tokens, elapsed = timed(decode, state, token, key, temperature)
        seconds.append(elapsed)
        token = tokens[:, -1]
        new = tokens[0].tolist()
        for index in itertools.takewhile(lambda index: index != stop, new):
            print(text.step(tokenizer, index) or "", end="", flush=True)
        if stop in new:
            break
    print()
    return state, seconds


def cache_share(
    with_cache: Decode, without_cache: Decode, state: jaxkv.Layers, pairs: int
) -> float:
    """The share of a step that the cache takes: the same loop with and without it, in turns,
    medians."""
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(pairs):
        for decode, record in zip((with_cache, without_cache), seconds, strict=True):
            state, _, elapsed = timed(decode, state, jnp.zeros(1, jnp.int32), jax.random.key(0))
            record.append(elapsed)
    return 1 - statistics.median(seconds[1]) / statistics.median(seconds[0])


def report(layers: Sequence[jaxkv.LayerSpec], seconds: list[float], share: float) -> None:
    """Prints the table at the end; `seconds` are the times of the blocks."""
    found = plan(layers)
    ours, theirs = found.total_bytes, found.fp16_bytes
    rows = {
        "tokens generated": f"{BLOCK * len(seconds):,}",
        "tokens/s": f"{BLOCK * len(seconds) / sum(seconds):.1f}",
        "share of a step spent in the cache": f"{share:.0%}",
        f"bytes of the cache ({found.max_tokens:,} tokens)": f"{ours:,}",
        "the same in fp16": f"{theirs:,} ({theirs / ours:.2f}x)",
    }
    for name, value in rows.items():
        print(f"{name:<40}{value:>24}")


def main(argv: list[str] | None = None) -> None:
    args = parse_options(argv)
    loaded = gguf_model.load(args.model)
    model, params, tokenizer, stacked = (
        loaded.config,
        loaded.params,
        loaded.tokenizer,
        loaded.stacked,
    )
    prompt = encode_prompt(args, loaded)
    max_tokens = max(len(prompt) + args.tokens + BLOCK, args.sinks + args.warm + args.tail)
    layers = llama.caches_of(model, "q4", max_tokens, **cache_fields(args, max_tokens))
    state = jaxkv.init_layers(layers)

    print("compiling what reads a prompt: once for each length of a chunk", file=sys.stderr)
    state, logits = prefill(model, stacked, state, prompt)
    key, *keys = jax.random.split(jax.random.key(args.seed), 1 - args.tokens // -BLOCK)
    token = llama.sample(key, logits, jnp.float32(args.temperature))
    print("compiling the decode loop, with a cache and without one", file=sys.stderr)
    params = params if args.unroll else stacked
    decode = compile_decode(model, params, state, llama.cached)
    without_cache = compile_decode(model, params, state, llama.skipped)

    stop = None if args.context else loaded.end_token  # a text has no end
    state, seconds = generate(decode, state, token, keys, args.temperature, tokenizer, stop)
    share = cache_share(decode, without_cache, state, pairs=2 if args.quick else 5)
    report(layers, seconds, share)


if __name__ == "__main__":
    main()
