"""The command line: `python -m jaxkv plan` says what a cache takes, `python -m jaxkv bench` how
fast it is here."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jaxkv
from jaxkv.plan import ModelShape, Plan, plan, state_bytes

UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; 2 where what was asked for cannot be."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jaxkv", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="{plan,bench}")
    planning = commands.add_parser(
        "plan", help="memory: per token, per tier, per device, and what fits"
    )
    planning.set_defaults(run=_plan)
    planning.add_argument(
        "--model",
        help="a Hugging Face config.json, or its folder, instead of the three sizes below",
    )
    planning.add_argument("--layers", type=int)
    planning.add_argument(
        "--memory", type=_bytes, help="of one device, for the cache: what fits? 80GB, 24GiB"
    )
    planning.add_argument(
        "--mesh", type=_devices, default={}, help="devices that split it: batch=2,heads=4,context=1"
    )
    timing = commands.add_parser("bench", help="milliseconds per append and attend on this device")
    timing.set_defaults(run=_bench)
    timing.add_argument("--heads", type=int, help="query heads; default four per kv head")
    timing.add_argument("--repeats", type=int, default=30)
    for command in (planning, timing):
        command.add_argument("--kv-heads", type=int, default=None if command is planning else 8)
        command.add_argument("--head-dim", type=int, default=None if command is planning else 128)
        command.add_argument(
            "--context",
            type=int,
            default=None if command is planning else 4096,
            help="tokens that a sequence may hold",
        )
        command.add_argument("--batch", type=int, default=1, help="sequences")
        command.add_argument(
            "--preset",
            default="q4",
            help=f"one of {', '.join(jaxkv.PRESETS)}; what follows overrides it",
        )
        _add_config(command)
        command.add_argument("--json", action="store_true", help="JSON instead of a table")
    return parser


CONFIG_FLAGS = {
    "tail_length": "--tail",
    "tail_precision": "--tail-precision",
    "store_precision": "--store",
    "warm_length": "--warm",
    "warm_precision": "--warm-precision",
    "sink_tokens": "--sinks",
    "rewind_length": "--rewind",
}


def _add_config(command: argparse.ArgumentParser) -> None:
    precisions = [precision.value for precision in jaxkv.Precision]
    for field, flag in CONFIG_FLAGS.items():
        kind: dict[str, Any] = (
            {"choices": precisions} if field.endswith("precision") else {"type": int}
        )
        command.add_argument(flag, dest=field, help=f"KvCacheConfig.{field}", **kind)


def _config(options: argparse.Namespace, shape: ModelShape) -> jaxkv.KvCacheConfig:
    context = options.context or shape.max_context
    if context is None:
        raise ValueError(
            "no --context, and the model does not say how much it was made for: give --context"
        )
    given = {
        field: getattr(options, field)
        for field in CONFIG_FLAGS
        if getattr(options, field) is not None
    }
    given = {
        "max_tokens": context,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        **given,
    }
    return jaxkv.preset(options.preset, **given)


def _bytes(text: str) -> int:
    number = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    try:
        return int(float(number) * UNITS[text[len(number) :].strip().lower()])
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(
            f"invalid size {text!r}: write it as 80GB or 24GiB"
        ) from None


def _devices(text: str) -> dict[str, int]:
    try:
        return {name: int(number) for name, number in (item.split("=") for item in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"invalid mesh {text!r}: write it as batch=2,heads=4"
        ) from None


# plan


def _plan(options: argparse.Namespace) -> None:
    sizes = (options.layers, options.kv_heads, options.head_dim)
    if options.model is None and None in sizes:
        raise ValueError("give --model, or all of --layers, --kv-heads and --head-dim")
    shape = (
        ModelShape(*sizes) if options.model is None else ModelShape.from_hugging_face(options.model)
    )
    found = plan(
        _config(options, shape), shape.num_layers, options.batch, options.mesh, options.memory
    )
    print(json.dumps(found.as_dict(), indent=2) if options.json else table(found))


def table(found: Plan) -> str:
    """A plan for people."""
    config, tokens = found.config, found.batch_size * found.config.max_tokens
    devices = (
        ", ".join(f"{name} {number}" for name, number in found.devices.items() if number > 1) or "1"
    )
    model = f"{found.num_layers} layers, {config.num_kv_heads} kv heads of {config.head_dim}"
    lines = [
        f"{model}; {found.batch_size} x {config.max_tokens:,} tokens; devices: {devices}",
        "",
        f"{'tier':8}{'tokens':>10}{'slots':>10}{'bytes/token':>14}{'bytes':>12}  keys | values",
    ]
    for t in found.tiers:
        row = f"{t.name:8}{t.tokens:10,}{t.slots:10,}{t.bytes_per_token:14,.0f}{human(t.bytes):>12}"
        lines.append(f"{row}  {t.keys}" if t.keys == t.values else f"{row}  {t.keys} | {t.values}")
    share = found.total_bytes / found.fp16_bytes
    lines += [
        f"{'all':28}{found.total_bytes / tokens:14,.0f}{human(found.total_bytes):>12}  "
        f"{share:.1%} of fp16",
        f"{'fp16':28}{found.fp16_bytes / tokens:14,.0f}{human(found.fp16_bytes):>12}",
        f"{'per device':42}{human(found.bytes_per_device):>12}",
    ]
    if found.fits is not None:
        f = found.fits
        lines += [
            "",
            f"{human(f.memory)} per device hold {found.batch_size} x {f.tokens:,} tokens (fp16: "
            f"{f.fp16_tokens:,}),",
            f"or {f.sequences:,} x {config.max_tokens:,} tokens (fp16: {f.fp16_sequences:,})",
        ]
    return "\n".join(lines)


def human(number: int) -> str:
    """Bytes in a unit that fits."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            break
        number /= 1000  # type: ignore[assignment]
    return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.2f} {unit}"


# bench


def _bench(options: argparse.Namespace) -> None:
    shape = ModelShape(1, options.kv_heads, options.head_dim)
    config, heads = _config(options, shape), options.heads or 4 * options.kv_heads
    exact, eager = jaxkv.Precision.FP16, jaxkv.Migration.EAGER
    fp16 = dataclasses.replace(
        config,
        store_precision=exact,
        tail_precision=exact,
        warm_length=0,
        key_quant=None,
        value_quant=None,
        migration=eager,
    )
    rows = {
        name: time_step(c, heads, options.batch, options.repeats)
        for name, c in ((options.preset, config), ("fp16", fp16))
    }
    if options.json:
        print(
            json.dumps(
                {"device": str(jax.devices()[0]), "jax": jax.__version__, "caches": rows}, indent=2
            )
        )
        return
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {options.batch} x "
        f"{config.max_tokens:,} tokens, full; medians\n"
    )
    print(
        f"{'cache':10}{'bytes':>12}{'append ms':>12}{'attend ms':>12}{'both ms':>12}"
        f"{'compile s':>12}"
    )
    for name, row in rows.items():
        print(
            f"{name:10}{human(row['bytes']):>12}{row['append']:12.3f}{row['attend']:12.3f}"
            f"{row['both']:12.3f}{row['compile']:12.1f}"
        )


def time_step(config: jaxkv.KvCacheConfig, heads: int, batch: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of a step of decoding on a full cache of one layer, seconds to compile it."""
    key, sizes = jax.random.key(0), (batch, 1, config.num_kv_heads, config.head_dim)
    new = jax.random.normal(key, sizes)
    query = jax.random.normal(key, (batch, 1, heads, config.head_dim))
    chunk = jax.random.normal(key, (batch, min(512, config.max_tokens), *sizes[2:]))
    fill = jax.jit(jaxkv.append, donate_argnums=0)
    state = jaxkv.init(config, batch)
    for _ in range(-(-config.max_tokens // chunk.shape[1])):
        state = fill(state, chunk, chunk)

    def both(state: jaxkv.CacheState) -> Any:
        state = jaxkv.append(state, new, new)
        return state, jaxkv.attend(state, query)

    steps = {
        "append": jax.jit(
            lambda state: (jaxkv.append(state, new, new), jnp.zeros(())), donate_argnums=0
        ),
        "attend": jax.jit(lambda state: (state, jaxkv.attend(state, query)), donate_argnums=0),
        "both": jax.jit(both, donate_argnums=0),
    }
    found: dict[str, Any] = {"bytes": state_bytes(config, None, batch)}
    for name, step in steps.items():
        start = time.perf_counter()
        compiled = step.lower(state).compile()
        found["compile"] = time.perf_counter() - start
        found[name], state = _median(compiled, state, repeats)
    return found


def _median(
    step: Callable[..., Any], state: jaxkv.CacheState, repeats: int
) -> tuple[float, jaxkv.CacheState]:
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[3:]), state


if __name__ == "__main__":
    sys.exit(main())
