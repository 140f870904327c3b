"""`Layers` on disk: one file, with what each layer is, every stack as `storage` writes it, and the
states of other kinds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import storage, trees
from jaxkv.models.layers import Layers, check_own, stacked
from jaxkv.models.spec import LayerSpec
from jaxkv.signed import MALFORMED, SignedFile, StorageError
from jaxkv.state import CacheState


def save(path: str | os.PathLike[str], layers: Layers) -> None:
    """`jaxkv.save` of all layers to one file."""
    arrays: dict[str, np.ndarray] = {}
    for i, held in enumerate(layers.stacks):
        arrays |= {f"stacks/{i}/{name}": array for name, array in storage.arrays_of(held).items()}
    for number, own in enumerate(layers.own):
        leaves = jax.tree.leaves(own)
        arrays |= {f"own/{number}/{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
    description = {
        "stacks": [storage.description_of(held) for held in layers.stacks],
        "layers": trees.plain(layers.specs),
        "own": [i for i, own in enumerate(layers.own) if own is not None],
    }
    storage.write(path, arrays, description)


def load(
    path: str | os.PathLike[str],
    *,
    layers: Sequence[LayerSpec] | None = None,
    own: Mapping[int, Any] | None = None,
    rows: int | Sequence[int] | None = None,
    mmap: bool = True,
) -> Layers:
    """The `Layers` that `save` wrote to a file; they go on bit for bit as the saved ones.

    Args:
      layers: the layers that the file has to be of, as `layers_of` gives them; None takes any.
      own: layer number -> a tree like the state of its own kind (of any arrays), for every layer
        that had one: what is taken from the file is put in its leaves' places.
      rows, mmap: as for `jaxkv.load`.

    Raises:
      StorageError: as `jaxkv.load`; or the file is of other layers.
      ValueError: rows that the file does not have; trees for own states are missing.
    """
    file = SignedFile.open(path, mmap)
    description = file.metadata("cache")
    try:
        described, numbers = list(description["stacks"]), list(description["own"])
        fields = description["layers"]
    except MALFORMED as error:
        raise StorageError(f"{file.path} holds no Layers ({error!r}): use jaxkv.load") from None
    if set(numbers) != set(own or {}):
        raise ValueError(f"own={sorted(own or {})}: the file has states of layers {numbers}")
    stacks = tuple(
        storage.read(file, one, f"stacks/{i}/", rows=rows) for i, one in enumerate(described)
    )
    try:
        held = _layers(stacks, fields)
    except MALFORMED as error:
        raise file.malformed(error) from None
    if layers is not None and held.specs != tuple(layers):
        raise StorageError(f"{file.path} is of other layers: pass those, or None")
    for number, like in (own or {}).items():
        value = _own(file, number, like, described[0]["batch_size"], rows)
        check_own(number, value, held.num_layers, held.batch_size)
        held = held.with_own(number, value)
    return held


def _own(file: SignedFile, number: int, like: Any, batch_size: int, rows: Any) -> Any:
    leaves, tree = jax.tree.flatten(like)
    chosen = storage.chosen(rows, batch_size)
    shapes = [(batch_size, *jnp.shape(leaf)[1:]) for leaf in leaves]
    names = [f"own/{number}/{i}" for i in range(len(leaves))]
    found = [
        jnp.asarray(np.take(file.array(name, shape, leaf.dtype), chosen, axis=0))
        for name, shape, leaf in zip(names, shapes, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, found)


def _layers(stacks: tuple[CacheState, ...], described: Any) -> Layers:
    specs = trees.typed(tuple[LayerSpec, ...], described)
    if stacked(specs) != [(held.config, held.num_layers) for held in stacks]:
        raise ValueError("its layers are not those of its stacks")
    return Layers(stacks, (None,) * len(specs), specs)
