"""A cache on disk: one safetensors file that is whole or absent, and is refused if a single byte of
it has changed.

    tensors   the state's arrays by path (`tiers/1/keys/data`), of rings that are not full only the
              slots in use
    metadata  jaxkv_version; sha256 of the file, taken with 64 zeros in its place; cache: JSON of
    config, chain of tiers, and batch

`save` needs the package safetensors; any safetensors reader opens the file. `load` reads it by
itself (`signed`), so that the bytes that it has verified are the bytes that it uses. States on
several hosts are for a checkpoint library: they are pytrees.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import uuid
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import ring
from jaxkv.config import KvCacheConfig
from jaxkv.devices import settled
from jaxkv.formats import Format, QuantSpec
from jaxkv.rotary import Rotary
from jaxkv.signed import MALFORMED, NO_DIGEST, VERSION, SignedFile, StorageError, sign
from jaxkv.state import CacheState, check_rows_apart, init
from jaxkv.tiers import tokens
from jaxkv.tiers.segment import Tier
from jaxkv.tiers.tokens import Tokens


def save(path: str | os.PathLike[str], state: CacheState) -> None:
    """Writes a state to a file. A process killed at any time leaves the old file or the new one at
    `path`, never a part of one.

    Raises:
      ImportError: the package safetensors is missing.
      ValueError: the state's arrays are on other hosts too, or its positions are none that a verb
        leaves.
    """
    check_rows_apart(state, "save")
    write(path, arrays_of(state), description_of(state))


def write(
    path: str | os.PathLike[str], arrays: dict[str, np.ndarray], description: dict[str, Any]
) -> None:
    """Writes arrays by name, and what they are, to a file that is whole or absent."""
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ImportError(
            "jaxkv.save needs the package safetensors: pip install 'jaxkv[storage]'"
        ) from error
    path = os.fspath(path)
    temporary = f"{path}.{uuid.uuid4().hex}.partial"
    metadata = {
        "jaxkv_version": str(VERSION),
        "sha256": NO_DIGEST,
        "cache": json.dumps(description),
    }
    try:
        save_file(arrays, temporary, metadata=metadata)
        with open(temporary, "r+b") as file:
            sign(file.fileno())
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(os.path.dirname(path) or ".")


def load(
    path: str | os.PathLike[str],
    *,
    config: KvCacheConfig | None = None,
    rows: int | Sequence[int] | None = None,
    mmap: bool = True,
) -> CacheState:
    """The state that `save` wrote to a file, on the default device. It goes on bit for bit as the
    saved one.

    Args:
      config: the config that the state has to have; None takes any, and as much memory as the
        file says.
      rows: which rows of the batch to load, one or several; None: all.
      mmap: map the file instead of reading it, so that it takes no memory besides the arrays.

    Raises:
      StorageError: the file is not a whole, unaltered file of this version, is for another config,
        or for more memory than the machine has.
      ValueError: rows that the file does not have.
    """
    file = SignedFile.open(path, mmap)
    try:
        description = file.metadata("cache")
    except MALFORMED as error:
        raise file.malformed(error) from None
    return read(file, description, config=config, rows=rows)


def read(
    file: SignedFile,
    description: Any,
    prefix: str = "",
    *,
    config: KvCacheConfig | None = None,
    rows: int | Sequence[int] | None = None,
) -> CacheState:
    """A state of a file, as it is described there, whose arrays' names begin with `prefix`."""
    held, batch_size, num_layers = described(file, description)
    _check_config(file.path, held, config)
    try:
        whole = jax.eval_shape(lambda: init(held, batch_size, num_layers))
    except MALFORMED as error:
        raise file.malformed(error) from None
    end, lost = (
        file.array(prefix + n, leaf.shape, leaf.dtype) for n, leaf in _positions(whole).items()
    )
    if not ring.is_sound(held, end, lost).all():
        raise StorageError(f"{file.path} has positions that no verb leaves: save the state anew")
    taken, axis = chosen(rows, batch_size), end.ndim - 1
    wanted = jax.eval_shape(lambda: init(held, len(taken), num_layers))
    check_memory(file.path, wanted)

    def array(where: Any, stored: Any, full: Any) -> jax.Array:
        found = file.array(prefix + _name(where), stored.shape, stored.dtype)
        part = np.take(found, taken, axis=axis)
        whole_array = np.zeros(full.shape, full.dtype)
        whole_array[tuple(slice(size) for size in part.shape)] = part
        return jnp.asarray(whole_array)

    return settled(jax.tree_util.tree_map_with_path(array, _trimmed(whole, end), wanted))


def description_of(state: CacheState) -> dict[str, Any]:
    """What `read` must know of a state, as JSON."""
    # The chain follows from the config, but by rules that another version may change: it says how
    # to read the codes.
    chain = [dataclasses.asdict(tier) for tier in state.config.chain]
    return {
        "config": dataclasses.asdict(state.config),
        "chain": chain,
        "batch_size": state.batch_size,
        "num_layers": state.num_layers,
    }


def arrays_of(state: CacheState) -> dict[str, np.ndarray]:
    """The state's arrays by name, without the slots at the end of a ring that have never been
    written."""
    leaves = leaves_by_name(state)
    end, lost = (np.asarray(leaf) for leaf in _positions(state).values())
    sound = ring.is_sound(state.config, end, lost)
    if not sound.all():
        raise ValueError(
            f"rows {np.argwhere(~sound).tolist()} have positions that no verb leaves (end="
            f"{end[~sound].tolist()}): the state is broken, clear these rows"
        )
    stored = jax.tree.leaves(_trimmed(state, end))
    return {
        name: np.ascontiguousarray(np.asarray(leaf)[tuple(map(slice, part.shape))])
        for (name, leaf), part in zip(leaves.items(), stored, strict=True)
    }


def leaves_by_name(tree: Any) -> dict[str, Any]:
    """A tree's arrays, or their shapes, by path.

    Raises:
      ValueError: some are on other hosts.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not all(leaf.is_fully_addressable for _, leaf in leaves if isinstance(leaf, jax.Array)):
        raise ValueError(
            "the state is spread over several hosts: save it with a checkpoint library, such as "
            "Orbax"
        )
    return {_name(where): leaf for where, leaf in leaves}


def _positions(state: CacheState) -> dict[str, Any]:
    return {"end": state.end, "lost": state.lost}


def _trimmed(state: CacheState, end: np.ndarray) -> CacheState:
    """Shapes and dtypes of what a file holds of a state: of a ring only the slots that have been
    written, rows being as long as `end` says."""
    config, lead = state.config, state.end.shape
    used = max(int(end.max()) - config.sink_tokens, 0)

    def cut(held: Tokens, fmt: Format, capacity: int, dim: int) -> Tokens:
        part = tokens.shapes(fmt, config.num_kv_heads, capacity, dim)
        return jax.tree.map(
            lambda _, leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype), held, part
        )

    tiers = []
    for tier, spec in zip(state.tiers, config.chain, strict=True):
        capacity = min(spec.capacity, -(-used // spec.group) * spec.group)
        sides = zip(tier.sides, spec.formats, config.side_dims, strict=True)
        tiers.append(Tier(*(cut(held, fmt, capacity, dim) for held, fmt, dim in sides)))
    return dataclasses.replace(state, tiers=tuple(tiers))


def _name(where: Any) -> str:
    return jax.tree_util.keystr(where, simple=True, separator="/")


def check_memory(path: str, wanted: Any) -> None:
    """Refuses a state that takes more memory than the machine has, where that can be known."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        leaves = jax.tree.leaves(wanted)
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
        if size > most:
            raise StorageError(
                f"{path} is for a state of {size:,} bytes, this machine has {most:,}: load fewer "
                "rows, or elsewhere"
            )


def _sync_folder(folder: str) -> None:
    if os.name == "posix":  # elsewhere folders cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def described(file: SignedFile, description: Any) -> tuple[KvCacheConfig, int, int | None]:
    """The config, rows and layers of a file, if they mean here what they meant there."""
    try:
        fields = dict(description["config"])
        chain, sizes = description["chain"], (description["batch_size"], description["num_layers"])
    except MALFORMED as error:
        raise file.malformed(error) from None
    return _config_of(file.path, fields, chain), *sizes


def _config_of(path: str, fields: dict[str, Any], chain: Any) -> KvCacheConfig:
    """The config in a file, if it means here what it meant there."""
    try:
        for name in ("key_quant", "value_quant"):
            fields[name] = fields[name] and QuantSpec(**fields[name])
        fields["rotary"] = fields["rotary"] and Rotary(**fields["rotary"])
        config = KvCacheConfig(**fields)
        own = json.loads(json.dumps([dataclasses.asdict(tier) for tier in config.chain]))
    except MALFORMED as error:
        raise StorageError(
            f"{path} has a config that this jaxkv does not know ({error}): load it with the one "
            "that saved it"
        ) from None
    if own != chain:
        raise StorageError(
            f"{path} has tiers in formats that this jaxkv would choose otherwise: load it with "
            "the one that saved it"
        )
    return config


def _check_config(path: str, held: KvCacheConfig, wanted: KvCacheConfig | None) -> None:
    if wanted is None or held == wanted:
        return
    names = [field.name for field in dataclasses.fields(held)]
    differing = [
        f"{n}={getattr(held, n)} (wanted {getattr(wanted, n)})"
        for n in names
        if getattr(held, n) != getattr(wanted, n)
    ]
    raise StorageError(
        f"{path} is for another config: {', '.join(differing)}; pass that config, or None"
    )


def chosen(rows: int | Sequence[int] | None, batch_size: int) -> np.ndarray:
    """The rows that are asked for, as an array; all for None."""
    found = np.arange(batch_size) if rows is None else np.atleast_1d(np.asarray(rows))
    if (
        found.ndim != 1
        or not len(found)
        or found.dtype.kind != "i"
        or (found < 0).any()
        or (found >= batch_size).any()
    ):
        raise ValueError(f"rows={rows}: must be rows of the file, 0 .. {batch_size - 1}")
    return found
