"""`jaxkv plan`: memory per token, per tier and per device, and what fits."""

from __future__ import annotations

import argparse
import json
from typing import Any

from jaxkv.cli.auto import Choice, choose
from jaxkv.cli.common import add_config, fields_of, human, in_bytes
from jaxkv.models.configs import ModelShape, model_shape
from jaxkv.models.spec import LayerSpec
from jaxkv.plan import Plan, StackPlan, plan


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
    _add_auto(command)
    add_config(command, with_model=True)
    command.set_defaults(preset=None)


def _add_auto(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--auto",
        action="store_true",
        help="choose the preset: give two of --context, --memory and --quality",
    )
    command.add_argument(
        "--quality",
        type=float,
        help="with --auto: the most that may be lost, as a KL; 0.003 is Q4's, 0 exact",
    )


def _devices(text: str) -> dict[str, int]:
    try:
        return {name: int(number) for name, number in (item.split("=") for item in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"invalid mesh {text!r}: write it as batch=2,heads=4"
        ) from None


def run(options: argparse.Namespace) -> None:
    """Prints a plan."""
    if options.quality is not None and not options.auto:
        raise ValueError("--quality is for --auto, which chooses a preset by it")
    shape = _shape(options)
    if options.auto:
        _print_choice(choose(shape, options), options.json)
        return
    layers = shape.sized(options.preset or "q4", options.context, **fields_of(options))
    found = plan(layers, options.batch, options.mesh, options.memory, shape.notes)
    print(json.dumps(found.as_dict(), indent=2) if options.json else table(found))


def _print_choice(choice: Choice, as_json: bool) -> None:
    if as_json:
        chosen = {"preset": choice.preset, "loss": choice.loss, **choice.made.as_dict()}
        print(json.dumps(chosen, indent=2))
        return
    sequences = f"{choice.made.batch_size} x {choice.made.max_tokens:,} tokens"
    print(f"{choice.preset}: {sequences} in {human(choice.size)} per device")
    print(f"loses a KL of {choice.loss:g} (SmolLM2-135M; measure yours: examples/quality.py)\n")
    print(table(choice.made))


def _shape(options: argparse.Namespace) -> ModelShape:
    if options.model is not None:
        return model_shape(options.model)
    if None in (options.layers, options.kv_heads, options.head_dim):
        raise ValueError("give --model, or all of --layers, --kv-heads and --head-dim")
    layer = LayerSpec(num_kv_heads=options.kv_heads, head_dim=options.head_dim)
    return ModelShape((layer,) * options.layers)


def table(found: Plan) -> str:
    """A plan for people."""
    tokens = found.batch_size * found.max_tokens
    devices = (
        ", ".join(f"{name} {number}" for name, number in found.devices.items() if number > 1) or "1"
    )
    sequences = f"{found.batch_size} x {found.max_tokens:,} tokens"
    lines = [f"{found.num_layers} layers; {sequences}; devices: {devices}"]
    for stack in found.stacks:
        lines += ["", *_stack_lines(stack)]
    lines += [
        "",
        _line("all", found.total_bytes / tokens, found.total_bytes)
        + f"  {found.total_bytes / found.fp16_bytes:.1%} of fp16",
        _line("fp16", found.fp16_bytes / tokens, found.fp16_bytes),
        f"{'per device':42}{human(found.bytes_per_device):>12}",
    ]
    if found.fits is not None:
        f = found.fits
        lines += [
            "",
            f"{human(f.memory)} per device hold {found.batch_size} x {f.tokens:,} tokens (fp16: "
            f"{f.fp16_tokens:,}),",
            f"or {f.sequences:,} x {found.max_tokens:,} tokens (fp16: {f.fp16_sequences:,})",
        ]
    return "\n".join([*lines, *(f"note: {note}" for note in found.notes)])


def _stack_lines(stack: StackPlan) -> list[str]:
    config = stack.config
    window = f", a window of {config.window:,}" if config.window else ""
    lines = [
        f"{stack.num_layers} layers with {config.num_kv_heads} kv heads of {config.head_dim}"
        f"{window}",
        f"{'tier':8}{'tokens':>10}{'slots':>10}{'bytes/token':>14}{'bytes':>12}  keys | values",
    ]
    for t in stack.tiers:
        row = f"{t.name:8}{t.tokens:10,}{t.slots:10,}{t.bytes_per_token:14,.0f}{human(t.bytes):>12}"
        lines.append(f"{row}  {t.keys}" if t.keys == t.values else f"{row}  {t.keys} | {t.values}")
    return lines


def _line(name: str, per_token: float, total: int) -> str:
    return f"{name:28}{per_token:14,.0f}{human(total):>12}"
