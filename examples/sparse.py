"""What a long context loses when only some of its pages are read, or kept.

    python examples/sparse.py                               # SmolLM2-135M, 8,192 tokens
    python examples/sparse.py --model qwen2.5-coder-0.5b.gguf
    python examples/sparse.py --quick

A text (and prompts with a passkey in them) is read into 4-bit pages. Then every setting decodes the
same last tokens: all pages; the best 1/2, 1/4 and 1/8 for each kv head and step (`top_pages`); the
pages that `compress` keeps by each score, all in one batch of forked rows; and whole caches of 3
and 2 bits, for the same bytes. KL is against an fp32 cache.
"""

import argparse
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import gguf_model
import jax
import jax.numpy as jnp
import llama
import numpy as np
from charts import plot_sparse
from probes import passkey_prompt
from texts import TEXTS, read_text

import jaxkv
from jaxkv import paged
from jaxkv.stats import bytes_per_token

PAGE, TAIL, CHUNK, SEEN = 64, 128, 256, 32
SHARES = (2, 4, 8)
SCORES = ("recency", "random", "norm", "key_diversity", "attention", "expected")
PROTECT = paged.Protect(sinks=4, recent=2 * TAIL)
RESULTS = pathlib.Path(__file__).parent / "benchmarks" / "results"

State = Any


class Reader:
    """A model that reads into pools and caches, and decodes from them."""

    def __init__(self, model: gguf_model.Model, length: int) -> None:
        self.model, self.config, self.params = model, model.config, model.stacked
        self.length = length

    def cache(self, store: str) -> jaxkv.KvCacheConfig:
        config = self.config
        rotary = config.rotary if config.window is None else None
        return jaxkv.preset(
            store,
            max_tokens=self.length + CHUNK,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            tail_length=TAIL,
            **({} if rotary is None or store == "fp32" else {"rotary": rotary}),
        )

    def pool(self, rows: int, store: str = "q4") -> State:
        config = self.cache(store)
        pages = -(-config.max_tokens // PAGE) + 2 + 8 * rows
        layers = self.config.num_layers
        return paged.init(config, pages, rows, PAGE, layers, summaries=True)

    def read(self, state: State, tokens: list[int]) -> tuple[State, Any, Any]:
        """All tokens but the last into a state of one row; of a pool, what its last `SEEN` of them
        looked at (`mass`) and looked with (`queries`)."""
        body = np.array(tokens[:-1], np.int32)
        cut = len(body) - SEEN
        for start in range(0, cut, CHUNK):
            state = _read(self.config, self.params, state, body[None, start:cut][:, :CHUNK])
        if state.pages is None:
            return _read(self.config, self.params, state, body[None, cut:]), None, None
        return _observed(self.config, self.params, state, body[None, cut:])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(config: llama.LlamaConfig, params: llama.Params, state: State, tokens: Any) -> State:
    state = _ready(state, tokens.shape[1])
    return llama.forward(config, params, state, tokens, llama.prefilled)[0]


def _ready(state: State, count: int) -> State:
    return state if state.pages is None else paged.reserve(state, count)[0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _observed(
    config: llama.LlamaConfig, params: llama.Params, state: State, tokens: Any
) -> tuple[State, Any, Any]:
    size, layers = tokens.shape[1], config.num_layers
    shape = (layers, state.batch_size)
    mass = jnp.zeros((*shape, config.num_kv_heads, state.pages.table.shape[1]))
    queries = jnp.zeros((*shape, size, config.num_heads, config.head_dim))

    def attention(carry, query, keys, values, *, layer, **options):  # type: ignore[no-untyped-def]
        state, mass, queries = carry
        state = jaxkv.append(state, keys, values, layer=layer)
        out, found = jaxkv.attend(state, query, layer=layer, return_mass=True, **options)
        return (state, mass.at[layer].set(found), queries.at[layer].set(query)), out

    at = jaxkv.positions(state, size)
    carry = _ready(state, size), mass, queries
    return llama.forward(config, params, carry, tokens, attention, at)[0]


@functools.cache
def reading(top_pages: int | None) -> Callable[..., Any]:
    """Attention of a decoding step that reads so many pages for each kv head."""

    def attention(state, query, keys, values, *, layer, **options):  # type: ignore[no-untyped-def]
        state = jaxkv.append(state, keys, values, layer=layer)
        if top_pages is not None:
            options["top_pages"] = top_pages
        return state, jaxkv.attend(state, query, layer=layer, **options)

    return attention


@functools.partial(jax.jit, static_argnums=(0, 1))
def decoded(
    config: llama.LlamaConfig,
    attention: Any,
    params: llama.Params,
    state: State,
    tokens: jax.Array,
    baseline: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Tokens [T] one by one through all rows; -1: the likeliest after the one before. The tokens
    [T, R] that the rows prefer, and without a baseline the log-probabilities [T, R, V], with one
    [T, V] the KL divergence [T, R] from it."""

    def step(carry: Any, given: Any) -> Any:
        state, last = carry
        token, expected = given
        token = jnp.where(token < 0, last, token)
        state = _ready(state, 1)
        state, hidden = llama.forward(config, params, state, token[:, None], attention)
        logs = jax.nn.log_softmax(llama.logits(params, hidden[:, 0]))
        best = logs.argmax(-1).astype(jnp.int32)
        if expected is None:
            return (state, best), (best, logs)
        return (state, best), (best, (jnp.exp(expected) * (expected - logs)).sum(-1))

    first = jnp.zeros(state.batch_size, jnp.int32)
    _, found = jax.lax.scan(step, (state, first), (tokens, baseline))
    return found


def forked(reader: Reader, prompt: list[int], args: argparse.Namespace) -> tuple[Any, ...]:
    """After a prompt: how to get a pool of one row, and one whose rows keep what each score of each
    share says, the first all of it; their names; and how many pages a row fills."""
    state, mass, queries = reader.read(reader.pool(1), prompt)
    pages = int(paged.rows.last_positions(state)[1][0]) // PAGE
    given: dict[str, dict[str, Any]] = {
        "random": {"key": jax.random.key(0)},
        "attention": {"mass": mass},
        "expected": {"queries": queries},
    }
    kept = [(name, share) for name in args.scores for share in args.shares]
    by = {name: paged.scores(state, name, **given.get(name, {}))[0] for name in args.scores}
    scores = jnp.stack([by[name] for name, _ in [kept[0], *kept]])
    budgets = np.array([pages + 1, *(pages // share for _, share in kept)], np.int32)
    _, parked = paged.offload(state, 0)

    def one() -> State:
        return paged.restore(reader.pool(1), 0, parked)[0]

    def many() -> State:
        state, _ = paged.restore(reader.pool(len(budgets)), 0, parked)
        others = np.arange(1, len(budgets), dtype=np.int32)
        state = jax.jit(paged.fork, donate_argnums=0)(state, others * 0, others)
        return jax.jit(paged.compress, donate_argnums=0)(state, scores, budgets, PROTECT)

    return one, many, ["all pages", *(f"{name} 1/{share}" for name, share in kept)], pages


def bytes_read(reader: Reader, store: str, pages: int, summarized: int) -> float:
    """Bytes of keys, values and summaries that a step reads in one layer."""
    config = reader.cache(store)
    hot, cold = (bytes_per_token(config, spec) for spec in config.chain)
    summary = config.num_kv_heads * (4 * config.head_dim + 8)
    return TAIL * hot + pages * PAGE * cold + summarized * summary


def measure(
    reader: Reader, prompt: list[int], tokens: np.ndarray, scored: bool, args: argparse.Namespace
) -> dict[str, Any]:
    """Each setting's preferred tokens after a prompt, and its KL if scored; bytes besides."""
    config, params, dense = reader.config, reader.params, llama.cached
    baseline, begun = None, time.perf_counter()
    found: dict[str, Any] = {}
    if scored:
        exact, *_ = reader.read(jaxkv.init(reader.cache("fp32"), 1, config.num_layers), prompt)
        baseline = decoded(config, dense, params, exact, tokens, None)[1][:, 0]

    def add(names: list[str], nbytes: list[float], state: State, attention: Any) -> None:
        best, kl = decoded(config, attention, params, state, tokens, baseline)
        for row, (name, size) in enumerate(zip(names, nbytes, strict=True)):
            found[name] = {"tokens": best[:, row], "bytes": size}
            found[name] |= {"kl": float(kl[:, row].mean())} if scored else {}
        print(f"  {names[-1]}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)

    one, many, names, pages = forked(reader, prompt, args)
    shares = [1, *(int(name.split("/")[1]) for name in names[1:])]
    sizes = [bytes_read(reader, "q4", pages // share, 0) for share in shares]
    add(names, sizes, many(), reading(None))
    for share in args.shares:
        size = bytes_read(reader, "q4", pages // share, pages)
        add([f"top 1/{share}"], [size], one(), reading(pages // share))
    for store in args.stores if scored else ():
        state, *_ = reader.read(jaxkv.init(reader.cache(store), 1, config.num_layers), prompt)
        add([store.upper()], [bytes_read(reader, store, pages, 0)], state, dense)
    return found


def run(args: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """What was found; saved after every text and passkey, since each takes minutes."""
    model = gguf_model.load(args.model)
    reader, results = Reader(model, args.tokens), {}
    sizes = {"tokens": args.tokens, "scored": 0, "page": PAGE}
    report: dict[str, Any] = {"model": model.path.stem, **sizes, "rows": results}
    for text in TEXTS[: args.texts]:
        print(f"{text}: {args.tokens} tokens", file=sys.stderr)
        start = [] if model.start_token is None else [model.start_token]
        ids = (start + model.encode(read_text(text)))[: args.tokens]
        prompt, rest = ids[: -args.scored + 1], np.array(ids[-args.scored :], np.int32)
        for name, row in measure(reader, prompt, rest, True, args).items():
            own = results.setdefault(name, {"kl": [], "found": [], "bytes": row.get("bytes")})
            own["kl"].append(row["kl"])
        report["scored"] += args.scored
        save(report)
    for trial in range(args.passkeys):
        key, depth = str(10_000 + 7919 * (trial + 1) % 90_000), (trial + 0.5) / args.passkeys
        print(f"passkey {key} at depth {depth:.2f}", file=sys.stderr)
        prompt = passkey_prompt(model, args.tokens - 16, depth, key)
        tokens = np.array([prompt[-1], *[-1] * 11], np.int32)
        for name, row in measure(reader, prompt, tokens, False, args).items():
            found = key in model.tokenizer.decode([int(t) for t in row["tokens"]])
            own = results.setdefault(name, {"kl": [], "found": [], "bytes": row["bytes"]})
            own["found"].append(found)
        save(report)
    return report


def save(report: dict[str, Any]) -> None:
    path = RESULTS / f"sparse_{report['model']}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    files = sorted(RESULTS.glob("sparse_*.json"))
    plot_sparse([json.loads(file.read_text()) for file in files], RESULTS / "sparse.png")


def show(found: dict[str, Any]) -> None:
    most = found["rows"]["all pages"]["bytes"]
    print(f"{found['model']}, {found['tokens']} tokens, pages of {found['page']}")
    print(f"{'setting':<20}{'bytes read':>12}{'KL':>10}{'passkeys':>10}")
    for name, row in found["rows"].items():
        kl = f"{np.mean(row['kl']):.4f}" if row["kl"] else "-"
        share = f"{row['bytes'] / most:.2f}" if row["bytes"] else "-"
        print(f"{name:<20}{share:>12}{kl:>10}{sum(row['found']):>7}/{len(row['found'])}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gguf_model.add_model_option(parser)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--scored", type=int, default=128, help="tokens scored of each text")
    parser.add_argument("--texts", type=int, default=len(TEXTS))
    parser.add_argument("--passkeys", type=int, default=4)
    parser.add_argument("--save", action="store_true", help="to benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="1,024 tokens, one text, no passkeys")
    args = parser.parse_args(argv)
    args.shares, args.scores, args.stores = SHARES, SCORES, ("k3v2", "q2")
    if args.quick:
        args.tokens, args.scored, args.texts, args.passkeys = 1024, 16, 1, 0
        args.shares, args.scores, args.stores = (8,), ("recency", "attention"), ()
    found = run(args, save if args.save else lambda report: None)
    show(found)
    if args.quick:
        all_pages, few = (found["rows"][name]["kl"] for name in ("all pages", "attention 1/8"))
        assert all_pages <= few, "fewer pages cannot be better"


if __name__ == "__main__":
    main()
