"""`Shards` on disk: one file with every device's arrays as they are, and how they were dealt out.

All of a ring is written, full or not. A mesh of the same sizes reads the file; rows may be split
among other numbers of devices.
"""

from __future__ import annotations

import dataclasses
import os

import jax
import numpy as np
from jax.sharding import Mesh

from jaxkv import ring, storage, trees
from jaxkv.checks import as_int
from jaxkv.config import KvCacheConfig
from jaxkv.dealing import Shards, empty
from jaxkv.sharding import Axes, check_divides, shardings, size
from jaxkv.signed import MALFORMED, SignedFile, StorageError


def save(path: str | os.PathLike[str], shards: Shards) -> None:
    """`jaxkv.save`, outside `shard_map`; `load` reads it.

    Raises:
      ValueError: the arrays are on other hosts too, or the positions are none that a verb leaves.
    """
    leaves = storage.leaves_by_name(shards)
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in leaves.items()}
    if not _is_sound(shards.cache.config, arrays):
        raise ValueError("the shards have positions that no verb leaves: they are broken")
    config, cache = shards.cache.config, shards.cache
    description = {
        "shards": storage.description_of(dataclasses.replace(cache, end=cache.end[0])),
        "axes": trees.plain(shards.axes),
        "heads": cache.changed.shape[-1] // config.num_kv_heads,
        "context": cache.end.shape[0],
    }
    storage.write(path, arrays, description)


def load(path: str | os.PathLike[str], *, mesh: Mesh, mmap: bool = True) -> Shards:
    """The shards that `save` wrote, on a mesh; they go on bit for bit as the saved ones.

    Raises:
      StorageError: as `jaxkv.load`; or the file holds no shards.
      ValueError: the mesh lacks an axis, or divides heads or positions among another number of
        devices.
    """
    file = SignedFile.open(path, mmap)
    try:
        description = file.metadata("cache")
        config, batch_size, num_layers = storage.described(file, description["shards"])
        axes = Axes(**description["axes"])
        heads, context = (as_int(name, description[name], 1) for name in ("heads", "context"))
        like = jax.eval_shape(lambda: empty(config, batch_size, num_layers, axes, heads, context))
    except MALFORMED as error:
        raise file.malformed(error) from None
    storage.check_memory(file.path, like)
    arrays = {
        name: file.array(name, leaf.shape, leaf.dtype)
        for name, leaf in storage.leaves_by_name(like).items()
    }
    if not _is_sound(config, arrays):
        raise StorageError(f"{file.path} has positions that no verb leaves: save the shards anew")
    for name, axis, wanted in (("heads", axes.heads, heads), ("context", axes.context, context)):
        if size(mesh, axis) != wanted:
            raise ValueError(
                f"mesh axis {axis!r} has {size(mesh, axis)} devices for {name}, and the shards of "
                f"{file.path} had {wanted}: load them on a mesh of the same sizes"
            )
    check_divides("batch_size", batch_size, mesh, axes.batch)
    read = jax.tree.unflatten(jax.tree.structure(like), map(np.array, arrays.values()))
    found: Shards = jax.device_put(read, shardings(like.specs, mesh))
    return found


def _is_sound(config: KvCacheConfig, arrays: dict[str, np.ndarray]) -> bool:
    """Whether every device's positions are such as the verbs leave, and together the whole's."""
    own, end = arrays["cache/end"], arrays["end"].astype(np.int64)
    parts = len(own)
    dealt = [(end - part + parts - 1) // parts for part in range(parts)]
    sound = ring.is_sound(config, own, arrays["cache/lost"])
    return bool(sound.all() and (own == np.stack(dealt)).all())
