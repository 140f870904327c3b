"""Dataclasses as pytrees that also travel: a function exported with `jax.export` may take and give
them, be serialized, and be run by another process."""

from __future__ import annotations

import dataclasses
import enum
import json
import typing
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def node(kind: type[T]) -> type[T]:
    """Registers a dataclass as a pytree, its static fields, which must be made of dataclasses,
    enums, tuples and what JSON knows, as part of the tree's structure."""
    static = [field.name for field in _fields(kind) if field.metadata.get("static")]
    data = [field.name for field in _fields(kind) if field.name not in static]

    def read(text: bytes | bytearray) -> tuple[Any, ...]:
        hints = typing.get_type_hints(kind) if static else {}
        values = zip(static, json.loads(text), strict=True)
        return tuple(typed(hints[name], value) for name, value in values)

    def build(aux_data: Any, children: Any) -> Any:
        named = zip((*data, *static), (*children, *aux_data), strict=True)
        return kind(**dict(named))

    jax.tree_util.register_dataclass(kind)
    jax.export.register_pytree_node_serialization(
        kind,
        serialized_name=f"{kind.__module__}.{kind.__qualname__}",
        serialize_auxdata=lambda values: json.dumps(plain(list(values))).encode(),
        deserialize_auxdata=read,
        from_children=build,
    )
    return kind


def _fields(kind: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)


def plain(value: Any) -> Any:
    """A static value as JSON has it."""
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in _fields(value)}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def typed(hint: Any, value: Any) -> Any:
    """The inverse of `plain`, for a value of the type `hint`."""
    options = typing.get_args(hint) or (hint,)
    if isinstance(value, list):
        return tuple(typed(options[0], item) for item in value)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            hints = typing.get_type_hints(option)
            return typing.cast(Any, option)(
                **{name: typed(hints[name], item) for name, item in value.items()}
            )
        if isinstance(option, type) and issubclass(option, enum.Enum) and value is not None:
            return option(value)
    return value
