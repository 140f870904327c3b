"""What commands share: flags that choose a cache, sizes in a person's units, and progress."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import jaxkv

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


CONFIG_FLAGS = {
    "tail_length": "--tail",
    "tail_precision": "--tail-precision",
    "store_precision": "--store",
    "warm_length": "--warm",
    "warm_precision": "--warm-precision",
    "sink_tokens": "--sinks",
    "rewind_length": "--rewind",
}


def add_config(command: argparse.ArgumentParser, with_model: bool) -> None:
    """The flags that choose a cache; where a model may say them, sizes have no defaults."""
    command.add_argument("--kv-heads", type=int, default=None if with_model else 8)
    command.add_argument("--head-dim", type=int, default=None if with_model else 128)
    command.add_argument(
        "--context",
        type=int,
        default=None if with_model else 4096,
        help="tokens that a sequence may hold",
    )
    command.add_argument("--batch", type=int, default=1, help="sequences")
    command.add_argument(
        "--preset",
        default="q4",
        help=f"one of {', '.join(jaxkv.PRESETS)}; what follows overrides it",
    )
    command.add_argument("--json", action="store_true", help="JSON instead of a table")
    precisions = [precision.value for precision in jaxkv.Precision]
    for field, flag in CONFIG_FLAGS.items():
        kind: dict[str, Any] = (
            {"choices": precisions} if field.endswith("precision") else {"type": int}
        )
        command.add_argument(flag, dest=field, help=f"KvCacheConfig.{field}", **kind)


def fields_of(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of `KvCacheConfig` that the flags give."""
    given = {field: getattr(options, field) for field in CONFIG_FLAGS}
    return {field: value for field, value in given.items() if value is not None}


def states_in(path: str) -> list[jaxkv.CacheState]:
    """The state in a file, or the stacks of the `Layers` in it."""
    try:
        return [jaxkv.load(path)]
    except jaxkv.StorageError as error:
        try:
            return list(jaxkv.load_layers(path).stacks)
        except jaxkv.StorageError:
            raise error from None  # of a state, the likelier one


def in_bytes(text: str) -> int:
    """A size such as 80GB or 24GiB, as an argparse type."""
    number = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    try:
        return int(float(number) * UNITS[text[len(number) :].strip().lower()])
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(
            f"invalid size {text!r}: write it as 80GB or 24GiB"
        ) from None


def human(number: int) -> str:
    """Bytes in a unit that fits."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            break
        number /= 1000  # type: ignore[assignment]
    return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.2f} {unit}"


def progress(text: str) -> None:
    """What is going on, on stderr; in a terminal each line takes the place of the one before."""
    end = "\r" if sys.stderr.isatty() else "\n"
    print(f"{text:60}" if end == "\r" else text, end=end, file=sys.stderr, flush=True)
