"""The rotary embedding of a model, described once: which pairs of a head turn, and how fast."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

PAIRINGS = ("halves", "interleaved")


@dataclasses.dataclass(frozen=True)
class Rotary:
    """How keys (and queries) were turned by their position before they come to the cache.

    Attributes:
      base: pair i of `dim // 2` turns by `position * base**(-2 i / dim)` radians.
      pairing: "halves" pairs element i with `i + dim // 2` (Hugging Face, NeoX); "interleaved"
        pairs 2 i with 2 i + 1 (Meta's Llama, GGUF files of it).
      scaling: [dim // 2] factors of those frequencies (YaRN, Llama 3), or None.
      dim: the first elements of a head that turn at all; None: the whole head.
      layer_bases: the base of each layer of a state with layers, where they differ (Gemma 3).
    """

    base: float = 1e4
    pairing: str = "halves"
    scaling: tuple[float, ...] | None = None
    dim: int | None = None
    layer_bases: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("scaling", "layer_bases"):
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, tuple(float(x) for x in given))
        if self.pairing not in PAIRINGS:
            raise ValueError(f"pairing={self.pairing!r}: must be one of {', '.join(PAIRINGS)}")
        if any(not base > 0 for base in (self.base, *(self.layer_bases or ()))):
            raise ValueError(f"base={self.base}, layer_bases={self.layer_bases}: must be positive")

    def check(self, head_dim: int) -> None:
        """Refuses what does not fit heads of `head_dim`."""
        dim = self.dim_of(head_dim)
        if dim % 2 or not 0 < dim <= head_dim:
            raise ValueError(f"dim={dim}: must be even, and at most head_dim={head_dim}")
        if self.scaling is not None and len(self.scaling) != dim // 2:
            raise ValueError(
                f"scaling has {len(self.scaling)} factors: must be dim // 2 = {dim // 2}"
            )

    def dim_of(self, head_dim: int) -> int:
        return head_dim if self.dim is None else self.dim

    def turns(self, head_dim: int) -> NDArray[np.uint32]:
        """What each pair turns by per position, in 2**-32 of a whole turn: [dim // 2], or [L, dim
        // 2] with `layer_bases`.

        Times a position, modulo 2**32, they are angles, exact at every position.
        """
        dim = self.dim_of(head_dim)
        bases = np.asarray(self.base if self.layer_bases is None else self.layer_bases, np.float64)
        radians = bases[..., None] ** (-np.arange(0, dim, 2) / dim)
        radians = radians * (1.0 if self.scaling is None else np.asarray(self.scaling))
        return np.rint(radians / (2 * np.pi) * 2.0**32).astype(np.uint64).astype(np.uint32)
