"""The tiers of a cache: what each holds, in which formats and how many slots."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from jaxkv.formats import Format, QuantSpec, channel_group, learns, of_values
from jaxkv.rotary import Rotary

LEAST_LEARNT = 16
"""Tokens that a balance or a mean before the rotary embedding takes to learn; of fewer it is
chance."""

LONG_RING, LANES = 2048, 128
"""Rings of so many slots or more are whole multiples of a TPU vector's lanes: XLA:TPU writes packed
codes in place only where it can prove that a window of them is aligned."""


@dataclasses.dataclass(frozen=True)
class TierSpec:
    """One tier: it holds up to `length` tokens in a ring of `capacity` slots; position `offset`
    lives in slot 0."""

    name: str
    length: int
    capacity: int
    offset: int
    key: Format
    value: Format | None  # None: values are a part of the keys
    rotary: Rotary | None = None  # of the model, where the keys' format asks for it
    value_dim: int | None = None  # elements of a value; None: as many as a key has

    @property
    def formats(self) -> tuple[Format, ...]:
        """Of what is stored: the keys, and the values unless they are a part of them."""
        return (self.key,) if self.value is None else (self.key, self.value)

    @property
    def group(self) -> int:
        """Tokens that must enter this tier together."""
        return max(channel_group(fmt) for fmt in self.formats)


def store_formats(formats: Sequence[Format], above: int, rotary: Rotary | None) -> list[Format]:
    """The store's formats with what each can learn, below a tier of `above` tokens: from a handful,
    nothing."""
    if len(formats) == 1:  # what is only for keys cannot be undone in a sum of values
        return [of_values(formats[0])]
    key, value = formats
    if above < LEAST_LEARNT:
        key = of_values(key)
    elif rotary is None and isinstance(key, QuantSpec):
        key = dataclasses.replace(key, turned_mean=False)
    return [key, of_values(value)]


def capacity_of(
    length: int,
    formats: Sequence[Format],
    step: int,
    rewind_length: int,
    *,
    is_first: bool,
    is_last: bool,
) -> int:
    """The slots of a tier's ring; tokens pass `step` at once from tier to tier."""
    # A tier that passes tokens on is written before it is read, so it needs slots for what arrives
    # at once besides what is due; a rewind moves the boundary above it by whole arrivals.
    arrival = 1 if is_first else step
    rewound = -(-rewind_length // arrival) * arrival
    # A tier that aligns learns its basis when its ring holds nothing: one slot more, so that no
    # exact rewind leaves it so.
    learning = rewind_length > 0 and any(map(learns, formats))
    spare = rewind_length + learning if is_last else step - 1 + max(arrival, rewound)
    unit = max(channel_group(fmt) for fmt in formats)
    if length >= LONG_RING:
        unit = math.lcm(unit, LANES)
    return -(-(length + spare) // unit) * unit


def check_group(
    where: str, spec: QuantSpec, size: tuple[str, int], heads: int, *, is_first: bool
) -> None:
    """Refuses groups of `where` that heads of `size` (its field's name and value) do not divide
    into, or groups of tokens that no tier collects."""
    group, (name, dim) = spec.group_size, size
    assert group is not None
    if spec.axis == "token" and dim % group and group != dim * heads:
        raise ValueError(
            f"group_size={group} for the {where}: must divide {name}={dim}, "
            f"or be num_kv_heads * {name} = {dim * heads} for one group per token"
        )
    if spec.axis == "channel" and is_first:
        raise ValueError(
            f"axis='channel' for the {where}: groups of tokens need a tier before it; set "
            "tail_length >= 1"
        )
