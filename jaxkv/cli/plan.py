"""`jaxkv plan`: memory per token, per tier and per device, and what fits."""

from __future__ import annotations

import argparse
import json
from typing import Any

from jaxkv.cli.common import add_config, config_of, human, in_bytes
from jaxkv.plan import ModelShape, Plan, plan


def add_to(commands: Any) -> None:
    """Adds the command and its flags."""
    command = commands.add_parser(
        "plan", help="memory: per token, per tier, per device, and what fits"
    )
    command.set_defaults(run=run)
    command.add_argument(
        "--model",
        help="a Hugging Face config.json, or its folder, instead of the three sizes below",
    )
    command.add_argument("--layers", type=int)
    command.add_argument(
        "--memory", type=in_bytes, help="of one device, for the cache: what fits? 80GB, 24GiB"
    )
    command.add_argument(
        "--mesh", type=_devices, default={}, help="devices that split it: batch=2,heads=4,context=1"
    )
    add_config(command, with_model=True)


def _devices(text: str) -> dict[str, int]:
    try:
        return {name: int(number) for name, number in (item.split("=") for item in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"invalid mesh {text!r}: write it as batch=2,heads=4"
        ) from None


def run(options: argparse.Namespace) -> None:
    """Prints a plan."""
    sizes = (options.layers, options.kv_heads, options.head_dim)
    if options.model is None and None in sizes:
        raise ValueError("give --model, or all of --layers, --kv-heads and --head-dim")
    shape = (
        ModelShape(*sizes) if options.model is None else ModelShape.from_hugging_face(options.model)
    )
    found = plan(
        config_of(options, shape), shape.num_layers, options.batch, options.mesh, options.memory
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
