"""Harder questions to a cache than perplexity: a model with a key bias, greedy decoding, and a
passkey hidden in a long prompt."""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import gguf_model
import jax
import jax.numpy as jnp
import llama
import numpy as np
import perplexity
from generate import PREFILL_CHUNK, prefill
from texts import read_text
from tokenizers import Tokenizer
from tqdm import tqdm

import jaxkv

Caches = dict[str, jaxkv.KvCacheConfig]
Once = Callable[
    [str, str, Callable[[], Any]], Any
]  # once(section, name, measure) keeps what measure() returns

BIASED_LAYERS = 3  # every third layer, from the first
NUM_GREEDY = 128
PASSKEY_LENGTHS = (1536, 3584, 5632, 7168)  # whole prefill chunks, so that each compiles once
NUM_DEPTHS = 8


@dataclasses.dataclass(frozen=True)
class BiasedKeys:
    """Attention of a model whose key projection has a bias of this norm in some layers, as Qwen2's
    has.

    After the rotary embedding a bias adds the same to all scores of a query, and softmax does not
    see it; before, it is a different model. A bias that is kept out of the cache enters as what it
    adds to the scores.
    """

    model: llama.LlamaConfig
    norm: float
    before_rotary: bool
    kept_out: bool = False

    def __call__(
        self,
        state: llama.State,
        query: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        *,
        layer: llama.Index,
    ) -> llama.Attended:
        if not self.kept_out:
            positions = state.end[layer][:, None] + jnp.arange(keys.shape[1])
            return llama.cached(
                state, query, keys + self.at(positions, keys.shape[2], layer), values, layer=layer
            )
        held = self.at(jnp.arange(state.config.max_tokens)[None], keys.shape[2], layer)[
            0
        ]  # [P, K, H]
        by_head = query.reshape(*query.shape[:2], keys.shape[2], -1, query.shape[-1])
        scores = (
            jnp.einsum("btkgh,pkh->bkgtp", by_head, held, precision="highest")
            * query.shape[-1] ** -0.5
        )
        state = jaxkv.append(state, keys, values, layer=layer)
        return state, jaxkv.attend(
            state, query, layer=layer, bias=scores.reshape(len(query), -1, *scores.shape[3:])
        )

    def at(self, positions: jax.Array, heads: int, layer: llama.Index) -> jax.Array:
        """The bias of a layer's keys at positions [B, T], as [B, T, K, H]."""
        bias = jax.random.normal(
            jax.random.fold_in(jax.random.key(0), layer), (heads, self.model.head_dim)
        )
        bias *= (
            self.norm / jnp.linalg.norm(bias, axis=-1, keepdims=True) * (layer % BIASED_LAYERS == 0)
        )
        every = jnp.broadcast_to(bias, (*positions.shape, *bias.shape))
        return (
            llama.rotate(every, llama.rotary_angles(self.model, positions), self.model.rope_halves)
            if self.before_rotary
            else every
        )


@partial(jax.jit, static_argnames=("model", "attention"), donate_argnames="state")
def read_chunk(
    model: llama.LlamaConfig,
    params: llama.Params,
    state: jaxkv.CacheState,
    tokens: jax.Array,
    attention: llama.Attention,
) -> tuple[jaxkv.CacheState, jax.Array]:
    return llama.forward(model, params, state, tokens, attention)


def read_biased(
    bias: BiasedKeys,
    params: llama.Params,
    config: jaxkv.KvCacheConfig,
    windows: np.ndarray,
    chunk: int,
) -> np.ndarray:
    """As `perplexity.read_windows`, all windows [W, S] at once and with biased keys."""
    num_windows, length = windows.shape
    state = jaxkv.init(config, num_windows, num_layers=bias.model.num_layers)
    outputs = []
    for tokens in np.split(windows, range(chunk, length, chunk), axis=1):
        state, output = read_chunk(bias.model, params, state, tokens, bias)
        outputs.append(np.asarray(output))
    return np.concatenate(outputs, axis=1)[:, length // 2 - 1 : -1]


def measure_bias(
    model: llama.LlamaConfig,
    params: llama.Params,
    caches: Caches,
    windows: np.ndarray,
    once: Once,
    chunk: int,
) -> None:
    """The loss of each cache without a bias and with biases of norm 50 and 500, against fp32 caches
    of the same model.

    Once more for the first cache with the bias kept out of it.
    """
    exact = perplexity.fp32_config(model, windows.shape[1])
    targets = windows[:, windows.shape[1] // 2 :]
    baselines: dict[BiasedKeys, np.ndarray] = {}

    def measure(bias: BiasedKeys, config: jaxkv.KvCacheConfig) -> dict[str, float]:
        plain = dataclasses.replace(bias, kept_out=False)
        if plain not in baselines:
            baselines[plain] = read_biased(plain, params, exact, windows, chunk)
        return score(
            params, read_biased(bias, params, config, windows, chunk), baselines[plain], targets
        )

    cases = {"no bias": (0.0, False)}
    cases |= {
        f"{norm:.0f} {'before' if before else 'after'} RoPE": (norm, before)
        for before in (False, True)
        for norm in (50.0, 500.0)
    }
    jobs = [
        (name, case, caches[name], BiasedKeys(model, *options))
        for name, (case, options) in itertools.product(caches, cases.items())
    ]
    first, config = next(iter(caches.items()))
    jobs += [
        (f"{first} without it", case, config, BiasedKeys(model, *options, kept_out=True))
        for case, options in cases.items()
    ]
    for name, case, config, bias in tqdm(jobs, "bias", unit="read"):
        once("bias", f"{name}, {case}", lambda config=config, bias=bias: measure(bias, config))


def score(
    params: llama.Params, hidden: np.ndarray, baseline: np.ndarray, targets: np.ndarray
) -> dict[str, float]:
    """hidden and baseline [W, S, D], targets [W, S]"""
    rows = zip(hidden, baseline, targets, strict=True)
    parts = [perplexity.compare(params, *row) for row in rows]
    mean = {
        name: float(np.mean([part[name] for part in parts], dtype=np.float64)) for name in parts[0]
    }
    return {
        "perplexity_increase_percent": 100 * float(np.expm1(mean["loss"] - mean["baseline_loss"])),
        "kl": mean["kl"],
        "top1": mean["top1"],
        "baseline_perplexity": float(np.exp(mean["baseline_loss"])),
        "tokens": targets.size,
    }


def measure_greedy(
    model: llama.LlamaConfig, params: llama.Params, caches: Caches, prompts: np.ndarray, once: Once
) -> None:
    """How many of 128 greedy tokens after each prompt [W, S] come before the first that differs
    from the fp32 cache's."""

    exact = perplexity.fp32_config(model, next(iter(caches.values())).max_tokens)

    def decode(config: jaxkv.KvCacheConfig) -> np.ndarray:
        state = jaxkv.init(config, len(prompts), num_layers=model.num_layers)
        state, logits = llama.prefill(model, params, state, jnp.asarray(prompts))
        token = logits.argmax(-1).astype(jnp.int32)
        inputs = token, jax.random.key(0), jnp.float32(0)
        return np.asarray(llama.decode(model, params, state, *inputs, length=NUM_GREEDY)[1])

    def agreement(config: jaxkv.KvCacheConfig) -> dict[str, Any]:
        same = decode(config) == np.asarray(expected)
        lengths = np.where(same.all(1), NUM_GREEDY, (~same).argmax(1))
        return {
            "mean": float(lengths.mean()),
            "median": float(np.median(lengths)),
            "each": lengths.tolist(),
        }

    expected = once("greedy_tokens", "FP32", lambda: decode(exact).tolist())
    for name, config in tqdm(caches.items(), "greedy", unit="cache"):
        once("greedy", name, lambda config=config: agreement(config))


def passkey_prompt(model: gguf_model.Model, length: int, depth: float, key: str) -> list[int]:
    """A chat of exactly `length` tokens: prose with the passkey hidden at `depth` (0 to 1), and the
    question for it."""
    encode, (before, after) = model.encode, model.chat.split("{prompt}")
    start = [] if model.start_token is None else [model.start_token]
    start += encode(f"{before}A pass key is hidden in the text below. Find it and remember it.\n\n")
    needle = encode(f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n")
    question = encode(f"\n\nWhat is the pass key?{after}The pass key is")
    filler = encode(read_text("prose"))[: length - len(start) - len(needle) - len(question)]
    cut = round(depth * len(filler))
    return [*start, *filler[:cut], *needle, *filler[cut:], *question]


def find_passkey(
    model: llama.LlamaConfig,
    params: llama.Params,
    config: jaxkv.KvCacheConfig,
    prompt: list[int],
    tokenizer: Tokenizer,
) -> str:
    """The twelve greedy tokens after the prompt."""
    state, logits = prefill(model, params, jaxkv.init(config, num_layers=model.num_layers), prompt)
    first = logits.argmax(-1).astype(jnp.int32)
    _, tokens = llama.decode(
        model, params, state, first, jax.random.key(0), jnp.float32(0), length=11
    )
    return tokenizer.decode([int(first[0]), *tokens[0].tolist()])


def measure_passkey(
    loaded: gguf_model.Model,
    quantized: Callable[[int], jaxkv.KvCacheConfig],
    num_trials: int,
    once: Once,
) -> None:
    """Hides passkeys at 8 depths of prompts of 1,500 to 7,200 tokens and asks for them, with fp32
    and with `quantized(max_tokens)`."""
    model, params, tokenizer = loaded.config, loaded.stacked, loaded.tokenizer

    def answers(length: int, depth: float, key: str) -> dict[str, Any]:
        prompt, room = passkey_prompt(loaded, length, depth, key), length + PREFILL_CHUNK
        caches = {"FP32": perplexity.fp32_config(model, room), "quantized": quantized(room)}
        texts = {
            name: find_passkey(model, params, config, prompt, tokenizer)
            for name, config in caches.items()
        }
        return {"key": key} | {
            name: {"found": key in text, "answer": text} for name, text in texts.items()
        }

    for trial in tqdm(passkey_trials()[:num_trials], "passkey", unit="prompt"):
        once(
            "passkey",
            "{} tokens, depth {:.2f}, key {}".format(*trial),
            lambda trial=trial: answers(*trial),
        )


def passkey_trials() -> list[tuple[int, float, str]]:
    """Length, depth and passkey of 32 trials; the first 8 already have every depth and every
    length."""
    keys = (
        np.random.default_rng(0)
        .integers(10_000, 100_000, len(PASSKEY_LENGTHS) * NUM_DEPTHS)
        .tolist()
    )
    pairs = [
        (turn + index, index) for turn in range(len(PASSKEY_LENGTHS)) for index in range(NUM_DEPTHS)
    ]
    return [
        (PASSKEY_LENGTHS[turn % len(PASSKEY_LENGTHS)], (index + 0.5) / NUM_DEPTHS, str(key))
        for (turn, index), key in zip(pairs, keys, strict=True)
    ]
