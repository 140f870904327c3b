"""`jaxkv plan --auto`: of context, memory and quality two are given, and this finds the third with
the preset that does it."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from jaxkv.cli.common import fields_of, human
from jaxkv.models.configs import ModelShape
from jaxkv.plan import Plan, plan

LOSS = {
    "FP16": 0.0,
    "Q8": 0.00003,
    "Q4_BIAS": 0.0015,
    "Q4_SINKS": 0.0018,
    "Q4K": 0.0020,
    "Q4": 0.0027,
    "K4V2": 0.0086,
    "Q2": 0.0496,
}
"""Preset -> mean KL of the next token's distribution from the exact cache's, best first:
SmolLM2-135M, 16,384 tokens (`python examples/quality.py`). Models differ; the order hardly does."""

SHORT = 4096
"""A context for the first plan where one is looked for; the plan then says what fits."""


class Choice(NamedTuple):
    """A preset and its plan."""

    preset: str
    made: Plan

    @property
    def size(self) -> int:
        return self.made.bytes_per_device

    @property
    def loss(self) -> float:
        return LOSS[self.preset]


def choose(shape: ModelShape, options: argparse.Namespace) -> Choice:
    """The preset for two of `--context`, `--memory` and `--quality`.

    Raises:
      ValueError: not two of them, a preset besides, or nothing that does it.
    """
    if options.preset is not None:
        raise ValueError("--auto chooses the preset: leave out --preset or --auto")
    given = [options.context is not None, options.memory is not None, options.quality is not None]
    if sum(given) != 2:
        raise ValueError("--auto wants two of --context, --memory and --quality, to find the third")
    if options.quality is None:
        return _best(shape, options)
    good = [name for name, loss in LOSS.items() if loss <= options.quality]
    if not good:
        raise ValueError(f"--quality {options.quality:g}: must be a KL of at least 0")
    if options.memory is None:
        return min(
            (_planned(shape, options, name) for name in good), key=lambda choice: choice.size
        )
    return _longest(shape, options, good)


def _planned(
    shape: ModelShape, options: argparse.Namespace, name: str, context: Any = None
) -> Choice:
    layers = shape.sized(name, context or options.context, **fields_of(options))
    return Choice(name, plan(layers, options.batch, options.mesh, options.memory, shape.notes))


def _best(shape: ModelShape, options: argparse.Namespace) -> Choice:
    """The least loss in a memory."""
    for name in LOSS:
        choice = _planned(shape, options, name)
        if choice.size <= options.memory:
            return choice
    raise ValueError(
        f"nothing fits {human(options.memory)}: {choice.preset} takes {human(choice.size)} per "
        "device; give a shorter --context, a smaller --batch or more devices (--mesh)"
    )


def _longest(shape: ModelShape, options: argparse.Namespace, good: list[str]) -> Choice:
    """The longest context in a memory."""
    lengths = {}
    for name in good:
        fits = _planned(shape, options, name, SHORT).made.fits
        lengths[name] = 0 if fits is None else fits.tokens
    name = max(good, key=lengths.__getitem__)
    if not lengths[name]:
        raise ValueError(f"{human(options.memory)} do not even hold the exact tokens of {name}")
    return _planned(shape, options, name, lengths[name])
