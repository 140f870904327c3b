"""Pictures to look at before one trusts a cache, made from a real decode.

    python examples/see.py            # writes results/see_run.png and results/see_errors.png
    python examples/see.py --quick    # a short run; its pictures are thrown away

The left of the first picture shows how tokens move from tier to tier, its right what the cache
takes against fp16. The second shows where the error of stored keys and values is, by layer and
head, and how much attention the last token pays to tokens of each age.
"""

import argparse
import pathlib
import tempfile
from functools import partial
from typing import Any, NamedTuple

import gguf_model
import jax
import jax.numpy as jnp
import llama
import numpy as np
from texts import read_text
from tqdm import tqdm

import jaxkv
from jaxkv.plan import plan

RESULTS = pathlib.Path(__file__).parent / "benchmarks" / "results"
AGES = (0, 4, 16, 64, 256, 1024)
"""Where the intervals of a token's age begin, in tokens."""

COLORS = {"hot": "#d1495b", "warm": "#edae49", "cold": "#00798c", "sinks": "#30638e"}


class Looking(NamedTuple):
    """A cache, and how the last query's weight was divided among ages."""

    cache: jaxkv.CacheState
    shares: jax.Array  # [L, N, ages]

    @property
    def end(self) -> jax.Array:
        return self.cache.end

    @property
    def num_layers(self) -> int | None:
        return self.cache.num_layers


def looking(
    state: Looking,
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    layer: Any,
    **options: Any,
) -> tuple[Looking, jax.Array]:
    """Append and attend; the weight of an interval is what the denominator would be without the
    others."""
    cache = jaxkv.append(state.cache, keys, values, layer=layer)
    attend = partial(jaxkv.attend, cache, query, layer=layer, return_lse=True, **options)
    out, all_of_it = attend()
    age = cache.end[layer][:, None] - 1 - jnp.arange(cache.config.max_tokens)  # [B, P]
    shares = []
    for first, stop in zip(AGES, (*AGES[1:], cache.config.max_tokens), strict=True):
        inside = ((age >= first) & (age < stop))[:, None, None]
        _, part = attend(mask=inside)
        shares.append(jnp.exp(part - all_of_it)[0, 0])
    return Looking(cache, state.shares.at[layer].set(jnp.stack(shares, axis=-1))), out


def read(
    model: gguf_model.Model, config: jaxkv.KvCacheConfig, tokens: np.ndarray, chunk: int
) -> tuple[jaxkv.CacheState, list[dict[str, int]]]:
    """The cache after a text, and the tokens in each tier after each chunk."""
    params, counts = model.stacked, []
    state = jaxkv.init(config, num_layers=model.config.num_layers)
    for start in tqdm(range(0, len(tokens), chunk), f"reading, {config.chain[0].key} tail"):
        piece = jnp.asarray(tokens[None, start : start + chunk])
        state, _ = llama.prefill(model.config, params, state, piece, attention=llama.cached)
        held = jaxkv.stats(state)
        names = {"sinks": "sink", "hot": "tail", "warm": "warm", "cold": "store"}
        counts.append({t: int(getattr(held, f"{n}_tokens")[0, 0]) for t, n in names.items()})
    return state, counts


def errors(state: jaxkv.CacheState, exact: jaxkv.CacheState) -> tuple[np.ndarray, np.ndarray]:
    """The relative error of stored keys and values [L, K], over the tokens of the last tier."""
    stored = int(jaxkv.stats(state).store_tokens[0, 0])
    found = []
    for held, true in zip(jaxkv.gather(state)[:2], jaxkv.gather(exact)[:2], strict=True):
        first = state.config.sink_tokens
        held, true = (np.asarray(x[:, 0, first : first + stored]) for x in (held, true))
        found.append(np.sqrt(((held - true) ** 2).sum((1, 3)) / (true**2).sum((1, 3))))
    return found[0], found[1]


def draw_run(counts: list[dict[str, int]], chunk: int, config: Any, path: pathlib.Path) -> None:
    """Tokens per tier over the run; bytes over the context against fp16."""
    import matplotlib.pyplot as plt  # optional: the extra `bench`

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    names = [name for name in COLORS if any(count[name] for count in counts)]
    steps = np.arange(1, len(counts) + 1) * chunk
    stacked = [[count[name] for count in counts] for name in names]
    left.stackplot(steps, stacked, labels=names, colors=[COLORS[name] for name in names])
    left.set(xlabel="tokens read", ylabel="tokens held", title="Where the tokens are")
    left.legend(loc="upper left")
    contexts = 2 ** np.arange(9, 16)
    sizes = dict(num_kv_heads=config.num_kv_heads, head_dim=config.head_dim)
    for name, color in (
        ("FP16", "#777777"),
        ("Q8", "#edae49"),
        ("Q4", "#00798c"),
        ("Q2", "#d1495b"),
    ):
        plans = [plan([jaxkv.preset(name, max_tokens=int(n), **sizes)]) for n in contexts]
        right.plot(
            contexts, [found.total_bytes / 1e6 for found in plans], "o-", label=name, color=color
        )
    right.set_xscale("log", base=2)
    right.set_yscale("log", base=2)
    sizes_shown = 2.0 ** np.arange(-2, 6)
    right.set_yticks(sizes_shown, labels=[f"{size:g}" for size in sizes_shown])
    right.grid(alpha=0.3)
    right.set_xticks(contexts, labels=[f"{n:,}" for n in contexts], fontsize=8)
    right.set(xlabel="context, tokens", ylabel="MB a layer", title="What it takes")
    right.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_errors(
    found: tuple[np.ndarray, np.ndarray], shares: np.ndarray, path: pathlib.Path
) -> None:
    """Errors by layer and head as maps; attention by layer and age as bars."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    most = max(side.max() for side in found)
    for panel, side, name in zip(panels, found, ("keys", "values"), strict=False):
        image = panel.imshow(side.T, aspect="auto", vmin=0, vmax=most, cmap="viridis")
        panel.set(xlabel="layer", ylabel="kv head", title=f"relative error of stored {name}")
        panel.set_yticks(range(side.shape[1]))
    figure.colorbar(image, ax=panels[:2], shrink=0.8)
    below, colors = np.zeros(len(shares)), plt.get_cmap("viridis")(np.linspace(0, 1, len(AGES)))
    for index, (first, stop) in enumerate(zip(AGES, (*AGES[1:], None), strict=True)):
        part = shares.mean(1)[:, index]
        label = f"{first:,} or more" if stop is None else f"{first:,} to {stop - 1:,}"
        panels[2].bar(range(len(part)), part, 0.9, below, label=label, color=colors[index])
        below += part
    panels[2].set(xlabel="layer", ylabel="share", title="attention of the last token, by age")
    panels[2].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, title="tokens back")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gguf_model.add_model_option(parser)
    parser.add_argument("--preset", default="Q4")
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument(
        "--quick", action="store_true", help="a short run that shows that all works"
    )
    args = parser.parse_args(argv)
    length, chunk = (192, 64) if args.quick else (args.tokens, 64)
    model = gguf_model.load(args.model)
    tokens = np.asarray(model.encode(read_text("technical"))[:length], np.int32)
    sizes = dict(num_kv_heads=model.config.num_kv_heads, head_dim=model.config.head_dim)
    config = jaxkv.preset(args.preset, max_tokens=length + chunk, tail_length=chunk, **sizes)
    exact = jaxkv.KvCacheConfig(length + chunk, "fp32", max_tokens=length + chunk, **sizes)
    state, counts = read(model, config, tokens, chunk)
    found = errors(state, read(model, exact, tokens, chunk)[0])
    shares = jnp.zeros((model.config.num_layers, model.config.num_heads, len(AGES)))
    last = jnp.asarray(tokens[None, -1:])
    seen, _ = llama.prefill(
        model.config, model.stacked, Looking(state, shares), last, attention=looking
    )
    with tempfile.TemporaryDirectory() as thrown_away:
        folder = pathlib.Path(thrown_away) if args.quick else RESULTS
        draw_run(counts, chunk, config, folder / "see_run.png")
        draw_errors(found, np.asarray(seen.shares), folder / "see_errors.png")
    for name, side in zip(("keys", "values"), found, strict=True):
        layer, head = np.unravel_index(side.argmax(), side.shape)
        worst = f"worst {side.max():.3f} in layer {layer}, head {head}"
        print(f"relative error of stored {name}: median {np.median(side):.3f}, {worst}")


if __name__ == "__main__":
    main()
