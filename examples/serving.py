"""Continuous batching and speculative decoding over one quantized cache.

    python examples/serving.py            # 24 requests through 4 rows
    python examples/serving.py --quick

A toy model of random weights decodes greedily. Requests of different lengths share one batch: when
one ends, the next takes its row (`replace_rows`), and nothing is compiled anew. Every step drafts
tokens by looking up what followed the last token earlier in the sequence, checks all of them in one
pass, and rewinds the cache by what was rejected, row by row. At the end each request is decoded
again, alone and token by token, to show that all of this changed nothing.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from jaxkv.batch import replace_rows

VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 96, 128, 2, 8, 2, 32
ROWS, DRAFT, PROMPT = 4, 4, 32  # rows of the batch; tokens drafted per step; the longest prompt
CONFIG = jaxkv.preset(
    "q8",
    tail_length=32,
    max_tokens=512,
    num_kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    rewind_length=DRAFT,
)

Params = dict[str, jax.Array]


def init_params() -> Params:
    """Random weights; every layer's on a leading axis."""
    shapes = {
        "embed": (VOCABULARY, WIDTH),
        "query": (LAYERS, WIDTH, HEADS, HEAD_DIM),
        "key": (LAYERS, WIDTH, KV_HEADS, HEAD_DIM),
        "value": (LAYERS, WIDTH, KV_HEADS, HEAD_DIM),
        "out": (LAYERS, HEADS, HEAD_DIM, WIDTH),
        "unembed": (WIDTH, VOCABULARY),
    }
    keys = jax.random.split(jax.random.key(1), len(shapes))
    return {
        name: jax.random.normal(key, shape) * WIDTH**-0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def forward(
    params: Params, state: jaxkv.CacheState, tokens: jax.Array, lengths: jax.Array
) -> tuple[jaxkv.CacheState, jax.Array]:
    """Appends the first lengths[b] of tokens [B, T] to row b; the state, and the likeliest token
    after each, [B, T]."""
    x = params["embed"][tokens]
    for layer in range(LAYERS):
        h = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True))
        q, k, v = (
            jnp.einsum("btd,dnh->btnh", h, params[name][layer])
            for name in ("query", "key", "value")
        )
        state = jaxkv.append(state, k, v, lengths, layer=layer)
        out = jaxkv.attend(state, q, lengths=lengths, layer=layer)
        x = x + jnp.einsum("btnh,nhd->btd", out, params["out"][layer])
    return state, jnp.argmax(x @ params["unembed"], -1)


@jax.jit
def prefill(
    params: Params, prompt: jax.Array, length: jax.Array
) -> tuple[jaxkv.CacheState, jax.Array]:
    """A row of its own for a prompt [PROMPT], and the token that follows."""
    state, found = forward(params, jaxkv.init(CONFIG, 1, LAYERS), prompt[None], length[None])
    return state, found[0, length - 1]


@jax.jit
def check(
    params: Params, state: jaxkv.CacheState, tokens: jax.Array, active: jax.Array
) -> tuple[jaxkv.CacheState, jax.Array, jax.Array]:
    """Takes in each row's last token and its draft, [B, 1 + DRAFT]; keeps what the model itself
    would have said.

    Returns the state, the model's tokens [B, 1 + DRAFT] and how many of them are good [B]; 0 in
    rows that are not active.
    """
    state, found = forward(params, state, tokens, jnp.where(active, 1 + DRAFT, 0))
    accepted = jnp.cumprod(found[:, :-1] == tokens[:, 1:], axis=1).sum(1)
    state = jaxkv.rewind(state, jnp.where(active, DRAFT - accepted, 0))
    return state, found, jnp.where(active, accepted + 1, 0)


admit = jax.jit(replace_rows, donate_argnums=0)


@dataclass
class Request:
    prompt: list[int]
    wanted: int  # tokens to decode
    decoded: list[int] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.decoded) >= self.wanted

    def draft(self) -> list[int]:
        """What followed the last two tokens when they were last seen."""
        text = self.prompt + self.decoded
        seen = (i + 2 for i in range(len(text) - 3, -1, -1) if text[i : i + 2] == text[-2:])
        follows = text[next(seen, len(text)) :][:DRAFT]
        return follows + [0] * (DRAFT - len(follows))


def start(params: Params, request: Request) -> jaxkv.CacheState:
    """The row of a request whose prompt has been read; its first token is decoded."""
    prompt = np.pad(request.prompt, (0, PROMPT - len(request.prompt)))
    state, token = prefill(params, prompt, np.int32(len(request.prompt)))
    request.decoded = [int(token)]
    return state


def serve(params: Params, requests: list[Request]) -> Iterator[int]:
    """Decodes all requests; yields the number of tokens that each step gave."""
    state, waiting = jaxkv.init(CONFIG, ROWS, LAYERS), list(requests)
    rows: list[Request | None] = [None] * ROWS
    while waiting or any(rows):
        for row, request in enumerate(rows):
            if request is None and waiting:
                rows[row] = waiting.pop(0)
                state = admit(state, np.int32(row), start(params, rows[row]))
        tokens = np.array([[r.decoded[-1], *r.draft()] if r else [0] * (1 + DRAFT) for r in rows])
        state, found, good = check(params, state, tokens, np.array([r is not None for r in rows]))
        for row, request in enumerate(rows):
            if request is not None:
                request.decoded += [int(token) for token in found[row, : good[row]]]
                rows[row] = None if request.is_done else request
        yield int(good.sum())


def alone(params: Params, request: Request) -> list[int]:
    """The same request without company or drafts."""
    one = Request(request.prompt, request.wanted)
    state, step = start(params, one), jax.jit(forward)
    while not one.is_done:
        state, found = step(params, state, np.array([[one.decoded[-1]]]), np.ones(1, np.int32))
        one.decoded.append(int(found[0, 0]))
    return one.decoded


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer and shorter requests")
    quick = parser.parse_args().quick
    rng, params = np.random.default_rng(0), init_params()
    count, longest = (6, 60) if quick else (24, 300)
    requests = [
        Request(
            rng.integers(0, VOCABULARY, rng.integers(4, PROMPT)).tolist(),
            int(rng.integers(20, longest)),
        )
        for _ in range(count)
    ]
    begin = time.perf_counter()
    per_step = list(serve(params, requests))
    seconds, total = time.perf_counter() - begin, sum(per_step)
    print(
        f"{count} requests, {total} tokens in {len(per_step)} steps of {ROWS} rows: "
        f"{total / len(per_step):.1f} a step, {seconds:.1f} s"
    )
    same = sum(alone(params, request) == request.decoded[: request.wanted] for request in requests)
    print(
        f"{same} of {count} requests are what they are alone, token by token; check was compiled "
        f"{check._cache_size()} time"
    )
    assert same == count


if __name__ == "__main__":
    main()
