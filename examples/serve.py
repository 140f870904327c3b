"""A small server: many requests over one pool of quantized pages.

    python examples/serve.py            # 24 requests through 4 rows
    python examples/serve.py --first    # the first token of two requests that share 1,024 tokens
    python examples/serve.py --quick

Requests come with a system prompt that they share and questions of their own. They are decoded
together (continuous batching): a row reads its prompt in chunks between the decoding steps of the
others, and when it ends the next request takes it. What the first request computed of the shared
prompt, the others find in the index of prefixes. Every decoding step drafts tokens by looking up
what followed the last two earlier in the text, and rewinds what the model would not have said. When
the pool has no page left, prefixes that nobody uses go first; then the youngest request moves to
the host's memory and comes back later. Nothing is compiled anew as they come and go, and at the end
requests are decoded again, each alone, to show that none of this changed a token.
"""

import argparse
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import gguf_model
import jax
import jax.numpy as jnp
import llama
import numpy as np
from texts import read_text

import jaxkv
from jaxkv import paged

ROWS, DRAFT, PAGE = 4, 3, 32  # a page is a chunk of the prompt, and what a prefix is made of
QUESTIONS = (
    "What is a cache?",
    "Name three rivers of Europe and say where each of them ends.",
    "Write one sentence about the sea.",
    "Why do we sleep?",
    "How do I boil an egg? Answer in a list.",
    "Explain to a child what a prime number is.",
)


@dataclass
class Request:
    prompt: list[int]
    wanted: int
    decoded: list[int] = field(default_factory=list)
    read: int = 0  # tokens of the prompt that the cache holds
    prefix: paged.Prefix | None = None
    parked: paged.Parked | None = None
    begun: float = 0.0
    first: float = 0.0  # seconds to its first token

    @property
    def is_reading(self) -> bool:
        return self.read < len(self.prompt)

    def next_tokens(self) -> list[int]:
        """The last token and a draft of what follows: what did when the last two were last seen."""
        text = self.prompt + self.decoded
        seen = (i + 2 for i in range(len(text) - 3, -1, -1) if text[i : i + 2] == text[-2:])
        follows = text[next(seen, len(text)) :][:DRAFT]
        return [text[-1], *follows, *[0] * (DRAFT - len(follows))]


def advance(
    model: llama.LlamaConfig,
    params: llama.Params,
    state: jaxkv.CacheState,
    tokens: jax.Array,
    lengths: jax.Array,
) -> tuple[jaxkv.CacheState, jax.Array, jax.Array]:
    """The first lengths[r] of tokens [R, T] enter the rows that get pages for them: the state, the
    hidden [R, T, D], and how many entered each row."""
    state, granted = paged.reserve(state, lengths)
    lengths = jnp.where(granted, lengths, 0)

    def attention(state, query, keys, values, *, layer, **options):  # type: ignore[no-untyped-def]
        state = jaxkv.append(state, keys, values, lengths, layer=layer)
        return state, jaxkv.attend(state, query, lengths=lengths, layer=layer, **options)

    state, hidden = llama.forward(model, params, state, tokens, attention)
    return state, hidden, lengths


@partial(jax.jit, static_argnames="model", donate_argnames="state")
def read(model, params, state, tokens, lengths):  # type: ignore[no-untyped-def]
    """A chunk [R, PAGE] of some rows' prompts: the state, the token after it [R], what was read."""
    state, hidden, count = advance(model, params, state, tokens, lengths)
    last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], 1)[:, 0]
    return state, jnp.argmax(llama.logits(params, last), -1), count


@partial(jax.jit, static_argnames="model", donate_argnames="state")
def decode(model, params, state, tokens, lengths):  # type: ignore[no-untyped-def]
    """Takes in last tokens with their drafts, [R, 1 + DRAFT]: the state without what was wrong, the
    model's own tokens, and how many of them are good [R]."""
    state, hidden, count = advance(model, params, state, tokens, lengths)
    found = jnp.argmax(llama.logits(params, hidden), -1)
    good = 1 + jnp.cumprod(found[:, :-1] == tokens[:, 1:], axis=1).sum(1)
    state = jaxkv.rewind(state, jnp.where(count > 0, count - good, 0))
    return state, found, jnp.where(count > 0, good, 0)


adopt = jax.jit(paged.adopt, donate_argnums=0)
release = jax.jit(paged.release, donate_argnums=0)
retain = jax.jit(paged.retain, donate_argnums=0)
drop = jax.jit(paged.drop, donate_argnums=0)
snapshot = jax.jit(paged.snapshot)


class Server:
    """Rows of one pool, and the requests that have them."""

    def __init__(
        self, model: gguf_model.Model, config: jaxkv.KvCacheConfig, pages: int, *, shares: bool
    ) -> None:
        self.model, self.params, self.shares = model, model.stacked, shares
        self.state = paged.init(config, pages, ROWS, PAGE, model.config.num_layers)
        self.index = paged.PrefixIndex(config, PAGE)
        self.rows: list[Request | None] = [None] * ROWS
        self.waiting: deque[Request] = deque()
        self.swaps = self.steps = self.tokens = 0

    @property
    def free(self) -> int:
        return int(self.state.pages.available)

    def run(self, requests: list[Request]) -> Iterator[None]:
        """Serves all of them, step by step."""
        self.waiting.extend(requests)
        for request in requests:
            request.begun = time.perf_counter()
        while self.waiting or any(self.rows):
            self.admit()
            self.read_chunks()
            self.decode_tokens()
            self.steps += 1
            yield

    def admit(self) -> None:
        """Gives free rows to requests, as long as the pool has pages for them."""
        for row, current in enumerate(self.rows):
            if current or not self.waiting:
                continue
            request = self.waiting[0]
            needed = request.parked.num_pages if request.parked else len(request.prompt) // PAGE
            if needed + ROWS > self.free and any(self.rows):
                return
            if request.parked is None:
                self.find_prefix(row, request)
            else:
                self.state, there = paged.restore(self.state, row, request.parked)
                if not there:
                    self.make_room()
                    return
                request.parked = None
            self.rows[row] = self.waiting.popleft()

    def find_prefix(self, row: int, request: Request) -> None:
        request.prefix = self.index.match(request.prompt) if self.shares else None
        if request.prefix is not None:
            self.state = adopt(self.state, row, request.prefix.row)
            request.read = request.prefix.length

    def read_chunks(self) -> None:
        """One chunk of each prompt that is being read."""
        tokens, lengths = np.zeros((ROWS, PAGE), np.int32), np.zeros(ROWS, np.int32)
        for row, request in enumerate(self.rows):
            if request and request.is_reading:
                chunk = request.prompt[request.read : request.read + PAGE]
                tokens[row, : len(chunk)], lengths[row] = chunk, len(chunk)
        if not lengths.any():
            return
        self.state, found, count = self.step(read, tokens, lengths)
        for row, request in enumerate(self.rows):
            if request is None or not count[row]:
                continue
            request.read += int(count[row])
            if request.read % PAGE == 0 and self.shares:
                self.remember(row, request.prompt[: request.read])
            if not request.is_reading:
                request.decoded.append(int(found[row]))
                request.first = time.perf_counter() - request.begun

    def remember(self, row: int, tokens: list[int]) -> None:
        held = snapshot(self.state, row)
        if self.index.insert(tokens, held.table, held):
            self.state = retain(self.state, held.table)

    def decode_tokens(self) -> None:
        tokens, lengths = np.zeros((ROWS, 1 + DRAFT), np.int32), np.zeros(ROWS, np.int32)
        for row, request in enumerate(self.rows):
            if request and not request.is_reading:
                tokens[row], lengths[row] = request.next_tokens(), 1 + DRAFT
        if not lengths.any():
            return
        self.state, found, good = self.step(decode, tokens, lengths)
        for row, request in enumerate(self.rows):
            if request is None or not lengths[row]:
                continue
            request.decoded += [int(token) for token in found[row, : good[row]]]
            self.tokens += int(good[row])
            if len(request.decoded) >= request.wanted:
                self.finish(row, request)

    def finish(self, row: int, request: Request) -> None:
        self.state, self.rows[row] = release(self.state, row), None
        if request.prefix is not None:
            self.index.release(request.prefix)

    def step(self, run, tokens, lengths):  # type: ignore[no-untyped-def]
        """One pass of the model; makes room where rows got no pages."""
        found = run(self.model.config, self.params, self.state, tokens, lengths)
        self.state, tokens, count = found[0], *map(np.asarray, found[1:])
        if (count[lengths > 0] == 0).any():
            self.make_room()
        return self.state, tokens, count

    def make_room(self) -> None:
        """Forgets what no request uses, or parks the request that came last."""
        ids = self.index.evict(2 * ROWS)
        if len(ids):
            padded = np.full(1024, -1, np.int32)
            padded[: len(ids)] = ids
            self.state = drop(self.state, padded)
            return
        busy = [row for row, request in enumerate(self.rows) if request]
        if len(busy) < 2:
            raise RuntimeError("the pool is too small for one request: give it more pages")
        row = max(busy, key=lambda row: self.rows[row].begun)  # type: ignore[union-attr]
        request = self.rows[row]
        assert request is not None
        self.state, request.parked = paged.offload(self.state, row)
        self.rows[row] = None
        self.waiting.appendleft(request)
        self.swaps += 1

    def line(self, seconds: float) -> str:
        pages, busy = self.state.pages, sum(request is not None for request in self.rows)
        return (
            f"{self.steps:6} {self.tokens / seconds:9.1f} {busy:5}/{ROWS} {len(self.waiting):8}"
            f" {pages.num_pages - self.free:5}/{pages.num_pages} {self.index.hits:6} {self.swaps:6}"
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gguf_model.add_model_option(parser)
    parser.add_argument("--store", default="q4", choices=[p.value for p in jaxkv.Precision])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter requests")
    parser.add_argument("--first", action="store_true", help="what a shared prompt saves")
    args = parser.parse_args(argv)
    model = gguf_model.load(args.model)
    count, shared, longest, pages = (6, 96, 24, 10) if args.quick else (24, 512, 128, 64)
    config = jaxkv.KvCacheConfig(
        tail_length=PAGE,
        store_precision=args.store,
        max_tokens=2048,
        num_kv_heads=model.config.num_kv_heads,
        head_dim=model.config.head_dim,
        rewind_length=DRAFT,
    )
    if args.first:
        first_tokens(model, config)
        return
    requests = make_requests(model, count, shared, longest)
    server, start = Server(model, config, pages, shares=True), time.perf_counter()
    print("compiling two steps: one that reads prompts, one that decodes", file=sys.stderr)
    print("  step  tokens/s    rows  waiting    pages   hits  swaps")
    shown = start
    for _ in server.run(requests):
        now = time.perf_counter()
        if now - shown > 2:
            print(server.line(now - start), flush=True)
            shown = now
    print(server.line(time.perf_counter() - start))
    firsts = [request.first for request in requests]
    print(f"seconds to the first token: {np.median(firsts):.2f} median, {max(firsts):.2f} at most")
    checked = requests[:: max(1, count // 4)]
    print(f"decoding {len(checked)} requests again, each alone", file=sys.stderr)
    same = sum(alone(model, config, pages, request) == request.decoded for request in checked)
    print(
        f"{same} of {len(checked)} requests are what they are alone, token by token; steps were "
        f"compiled {read._cache_size()} + {decode._cache_size()} times"
    )
    assert same == len(checked)


def make_requests(model: gguf_model.Model, count: int, shared: int, longest: int) -> list[Request]:
    """Questions behind the same `shared` tokens of prose."""
    rng = np.random.default_rng(0)
    system = model.encode(read_text("prose")[:20000])[:shared]
    return [
        Request(
            system + model.encode(model.chat.format(prompt=QUESTIONS[i % 6])),
            int(rng.integers(longest // 2, longest)),
        )
        for i in range(count)
    ]


def first_tokens(model: gguf_model.Model, config: jaxkv.KvCacheConfig) -> None:
    """One request after the other; before them one that shares nothing, while steps compile."""
    server = Server(model, config, 96, shares=True)
    unlike = Request(model.encode(read_text("technical")[:400]), 2)
    first, second = make_requests(model, 2, 1024, 4)
    for request in (unlike, first, second):
        for _ in server.run([request]):
            pass
    print(
        f"prompts of {len(first.prompt)} and {len(second.prompt)} tokens, 1,024 of them shared: "
        f"{first.first:.3f} and {second.first:.3f} s to the first token, "
        f"{first.first / second.first:.1f} times sooner"
    )


def alone(
    model: gguf_model.Model, config: jaxkv.KvCacheConfig, pages: int, request: Request
) -> list[int]:
    """The same request in an empty pool, without company and without a prefix to begin from."""
    one = Request(request.prompt, request.wanted)
    for _ in Server(model, config, pages, shares=False).run([one]):
        pass
    return one.decoded


if __name__ == "__main__":
    main()
