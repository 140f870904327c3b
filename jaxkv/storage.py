"""A cache on disk: one safetensors file that is whole or absent, and is refused if a single byte of
it has changed.

    tensors   the state's arrays by path (`tiers/1/keys/data`), of rings that are not full only the
              slots in use
    metadata  jaxkv_version; sha256 of the file, taken with 64 zeros in its place; cache: JSON of
    config, chain of tiers, and batch

`save` needs the package safetensors; any safetensors reader opens the file. `load` reads it by
itself, so that the bytes that it has verified are the bytes that it uses. States on several hosts
are for a checkpoint library: they are pytrees.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import mmap as memory_map
import os
import re
import uuid
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.config import KvCacheConfig
from jaxkv.formats import Format, QuantSpec
from jaxkv.state import CacheState, Tier, init
from jaxkv.tiers import tokens
from jaxkv.tiers.tokens import Tokens

VERSION = 2
"""Raised when the layout of a file, or the meaning of what is in it, changes."""

_NO_DIGEST = "0" * 64


class StorageError(ValueError):
    """A file is not what `load` was asked for: cut short, altered, or of another version or config.
    Nothing was changed."""


def save(path: str | os.PathLike[str], state: CacheState) -> None:
    """Writes a state to a file. A process killed at any time leaves the old file or the new one at
    `path`, never a part of one.

    Raises:
      ImportError: the package safetensors is missing.
      ValueError: the state's arrays are on other hosts too.
    """
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
        "sha256": _NO_DIGEST,
        "cache": json.dumps(_description(state)),
    }
    try:
        save_file(_arrays(state), temporary, metadata=metadata)
        with open(temporary, "r+b") as file:
            _sign(file.fileno())
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
      config: the config that the state has to have; None takes any.
      rows: which rows of the batch to load, one or several; None: all.
      mmap: map the file instead of reading it, so that it takes no memory besides the arrays.

    Raises:
      StorageError: the file is not a whole, unaltered file of this version, or is for another
        config.
      ValueError: rows that the file does not have.
    """
    with open(path, "rb") as file:
        is_empty = os.fstat(file.fileno()).st_size == 0
        buffer = (
            memory_map.mmap(file.fileno(), 0, access=memory_map.ACCESS_READ)
            if mmap and not is_empty
            else file.read()
        )
    header, first = _verified(os.fspath(path), buffer)
    description = json.loads(header["__metadata__"]["cache"])
    held = _config_of(os.fspath(path), description)
    _check_config(os.fspath(path), held, config)
    batch_size, num_layers = description["batch_size"], description["num_layers"]
    chosen = _chosen(rows, batch_size)
    shapes = jax.eval_shape(lambda: init(held, len(chosen), num_layers))

    def read(where: Any, full: Any) -> jax.Array:
        entry = header[_name(where)]
        stored = np.frombuffer(
            buffer, full.dtype, int(np.prod(entry["shape"])), first + entry["data_offsets"][0]
        )
        part = np.take(stored.reshape(entry["shape"]), chosen, axis=0 if num_layers is None else 1)
        array = np.zeros(full.shape, full.dtype)
        array[tuple(slice(size) for size in part.shape)] = part
        return jnp.asarray(array)

    return jax.tree_util.tree_map_with_path(read, shapes)


def _description(state: CacheState) -> dict[str, Any]:
    # The chain follows from the config, but by rules that another version may change: it says how
    # to read the codes.
    chain = [dataclasses.asdict(tier) for tier in state.config.chain]
    return {
        "config": dataclasses.asdict(state.config),
        "chain": chain,
        "batch_size": state.batch_size,
        "num_layers": state.num_layers,
    }


def _arrays(state: CacheState) -> dict[str, np.ndarray]:
    """The state's arrays by name, without the slots at the end of a ring that have never been
    written."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    if not all(leaf.is_fully_addressable for _, leaf in leaves if isinstance(leaf, jax.Array)):
        raise ValueError(
            "the state is spread over several hosts: save it with a checkpoint library, such as "
            "Orbax"
        )
    config, used = state.config, max(int(np.max(state.end)) - state.config.sink_tokens, 0)

    def cut(held: Tokens, fmt: Format, capacity: int) -> Tokens:
        def array(leaf: Any, wanted: Any) -> np.ndarray:
            index: tuple[Any, ...] = (..., *map(slice, wanted.shape))
            return np.asarray(leaf)[index]

        return jax.tree.map(
            array, held, tokens.shapes(fmt, config.num_kv_heads, capacity, config.head_dim)
        )

    tiers = []
    for tier, spec in zip(state.tiers, config.chain, strict=True):
        capacity = min(spec.capacity, -(-used // spec.group) * spec.group)
        tiers.append(
            Tier(cut(tier.keys, spec.key, capacity), cut(tier.values, spec.value, capacity))
        )
    trimmed = jax.tree_util.tree_leaves_with_path(dataclasses.replace(state, tiers=tuple(tiers)))
    return {_name(where): np.ascontiguousarray(leaf) for where, leaf in trimmed}


def _name(where: Any) -> str:
    return jax.tree_util.keystr(where, simple=True, separator="/")


def _sign(descriptor: int) -> None:
    """Writes a file's digest into the place kept for it."""
    with memory_map.mmap(descriptor, 0) as buffer:
        place, _ = _field(buffer, "sha256")
        buffer[place : place + len(_NO_DIGEST)] = _digest(buffer, place).encode()
        buffer.flush()


def _sync_folder(folder: str) -> None:
    if os.name == "posix":  # elsewhere folders cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _verified(path: str, buffer: Any) -> tuple[dict[str, Any], int]:
    """The header of a file and where its data begin, once every byte has been found to be as it was
    written."""
    try:
        _, version = _field(buffer, "jaxkv_version")
        place, digest = _field(buffer, "sha256")
    except ValueError:
        raise StorageError(
            f"{path} is no jaxkv file, or is cut short: save the state anew"
        ) from None
    if version != str(VERSION):
        raise StorageError(
            f"{path} has version {version}, this jaxkv reads version {VERSION}: load it with the "
            "one that saved it"
        )
    if digest != _digest(buffer, place):
        raise StorageError(
            f"{path} is cut short or altered (its checksum differs): save the state anew"
        )
    end = _header_end(buffer)
    return json.loads(buffer[8:end]), end


def _field(buffer: Any, name: str) -> tuple[int, str]:
    """Where in the header the value of a metadata field is, and the value."""
    found = re.search(rb'"%s":"([^"]*)"' % name.encode(), buffer[8 : _header_end(buffer)])
    if found is None:
        raise ValueError(f"no field {name}")
    return 8 + found.start(1), found[1].decode(errors="replace")


def _header_end(buffer: Any) -> int:
    return 8 + int.from_bytes(buffer[:8], "little")


def _digest(buffer: Any, place: int) -> str:
    """The SHA-256 of a file with zeros for the digest at `place`."""
    found, view = hashlib.sha256(), memoryview(buffer)
    for part in (view[:place], _NO_DIGEST.encode(), view[place + len(_NO_DIGEST) :]):
        found.update(part)
        if isinstance(part, memoryview):
            part.release()
    view.release()
    return found.hexdigest()


def _config_of(path: str, description: dict[str, Any]) -> KvCacheConfig:
    """The config in a file, if it means here what it meant there."""
    fields = dict(description["config"])
    try:
        for name in ("key_quant", "value_quant"):
            fields[name] = fields[name] and QuantSpec(**fields[name])
        config = KvCacheConfig(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(
            f"{path} has a config that this jaxkv does not know ({error}): load it with the one "
            "that saved it"
        ) from None
    if (
        json.loads(json.dumps([dataclasses.asdict(tier) for tier in config.chain]))
        != description["chain"]
    ):
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


def _chosen(rows: int | Sequence[int] | None, batch_size: int) -> np.ndarray:
    chosen = np.arange(batch_size) if rows is None else np.atleast_1d(np.asarray(rows))
    if (
        chosen.ndim != 1
        or not len(chosen)
        or chosen.dtype.kind != "i"
        or (chosen < 0).any()
        or (chosen >= batch_size).any()
    ):
        raise ValueError(f"rows={rows}: must be rows of the file, 0 .. {batch_size - 1}")
    return chosen
