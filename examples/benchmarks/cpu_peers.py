"""Other systems' decode attention on the CPU: jax.nn, a hand-written einsum, torch, and llama.cpp's
ggml through its C interface."""

from __future__ import annotations

import ctypes
import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Call = Callable[[], Any]
GGML_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}
LONGEST = 16384  # tokens of all rows, for the slow ones
MOST = (
    2**18
)  # tokens of all rows; beyond, our Q4 and torch alone: the caches of all systems together would need 30 GB


def device_name() -> str:
    """The processor's own name where JAX says only "cpu"."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        jax.devices()[0].device_kind,
    )


SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "device": device_name(),
        "instruction_sets": instruction_sets(),
        "jax": jax.__version__,
    }


def machine_line(found: dict[str, Any]) -> str:
    return f"{found['device']} ({', '.join(found['instruction_sets'])}), jax {found['jax']}"


def instruction_sets() -> list[str]:
    """Those that XLA and torch choose between, as far as the processor has them: figures with AMX
    and without are of different machines."""
    info = pathlib.Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return [name for name in SETS if name in flags]


def peers_of(
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    lengths: np.ndarray,
    threads: int,
    ggml: str | None,
) -> dict[str, Call]:
    """Calls by name. Peers without ragged rows compute all rows to the longest, with a mask where
    they take one."""
    shape = batch, heads, kv_heads, head_dim, int(lengths.max())
    calls = with_jax(*shape) if batch * shape[-1] <= MOST else {}
    if importlib.util.find_spec("torch"):
        calls |= with_torch(*shape, lengths, threads)
    folder = ggml or installed_ggml()
    if folder:
        calls |= with_ggml(pathlib.Path(folder), *shape, threads)
    return calls


def with_jax(batch: int, heads: int, kv_heads: int, head_dim: int, length: int) -> dict[str, Call]:
    group = heads // kv_heads

    def einsum(query: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        scores = (
            jnp.einsum("bkgh,bksh->bkgs", query, keys, preferred_element_type=jnp.float32)
            * head_dim**-0.5
        )
        return jnp.einsum(
            "bkgs,bksh->bkgh",
            jax.nn.softmax(scores).astype(keys.dtype),
            values,
            preferred_element_type=jnp.float32,
        )

    calls: dict[str, Call] = {}
    keys, values = (
        jax.random.normal(jax.random.key(i), (batch, kv_heads, length, head_dim), jnp.bfloat16)
        for i in (1, 2)
    )
    query = jax.random.normal(jax.random.key(3), (batch, kv_heads, group, head_dim), jnp.bfloat16)
    compiled = jax.jit(einsum)
    calls["JAX einsum bf16"] = lambda: compiled(query, keys, values)
    if batch * length <= LONGEST:
        by_token = [jnp.moveaxis(x, 1, 2) for x in (keys, values)]
        flat, attend = (
            query.reshape(batch, 1, heads, head_dim),
            jax.jit(jax.nn.dot_product_attention),
        )
        calls["jax.nn bf16"] = lambda: attend(flat, *by_token)
    return calls


def with_torch(
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    length: int,
    lengths: np.ndarray,
    threads: int,
) -> dict[str, Call]:
    """torch's SDPA with the group folded into the queries, its fastest way here."""
    import torch

    torch.set_num_threads(threads)
    query = torch.randn(batch, kv_heads, heads // kv_heads, head_dim).bfloat16()
    keys, values = (torch.randn(batch, kv_heads, length, head_dim).bfloat16() for _ in range(2))
    mask = None if batch == 1 else torch.tensor(np.arange(length) < lengths[:, None])[:, None, None]
    attend = torch.nn.functional.scaled_dot_product_attention
    return {"torch bf16": lambda: attend(query, keys, values, attn_mask=mask)}


def installed_ggml() -> str | None:
    found = importlib.util.find_spec("llama_cpp")
    folder = pathlib.Path(found.origin).parent / "lib" if found and found.origin else None
    return str(folder) if folder and (folder / "libggml-cpu.so").exists() else None


class InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class ComputePlan(ctypes.Structure):
    _fields_ = (
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("rest", ctypes.c_char * 96),
    )


def with_ggml(
    folder: pathlib.Path,
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    length: int,
    threads: int,
) -> dict[str, Call]:
    """ggml's flash attention over its own cache types; llama.cpp runs this in every layer."""
    if batch * length > LONGEST:
        return {}
    base, cpu = (
        ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
        for name in ("libggml-base.so", "libggml-cpu.so")
    )
    pointer, whole, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    base.ggml_init.argtypes, base.ggml_init.restype = [InitParams], pointer
    base.ggml_new_tensor_4d.argtypes, base.ggml_new_tensor_4d.restype = (
        [pointer, ctypes.c_int, whole, whole, whole, whole],
        pointer,
    )
    base.ggml_flash_attn_ext.argtypes, base.ggml_flash_attn_ext.restype = (
        [pointer] * 5 + [number] * 3,
        pointer,
    )
    base.ggml_new_graph.argtypes, base.ggml_new_graph.restype = [pointer], pointer
    base.ggml_build_forward_expand.argtypes = [pointer, pointer]
    base.ggml_nbytes.argtypes, base.ggml_nbytes.restype = [pointer], ctypes.c_size_t
    base.ggml_get_data.argtypes, base.ggml_get_data.restype = [pointer], pointer
    cpu.ggml_graph_plan.argtypes, cpu.ggml_graph_plan.restype = (
        [pointer, ctypes.c_int, pointer],
        ComputePlan,
    )
    cpu.ggml_graph_compute.argtypes = [pointer, ctypes.POINTER(ComputePlan)]
    cpu.ggml_cpu_init()

    def call(kind: int) -> Call:
        context = base.ggml_init(
            InitParams(5 * batch * kv_heads * length * head_dim + 2**26, None, False)
        )
        query = base.ggml_new_tensor_4d(context, 0, head_dim, 1, heads, batch)
        keys, values = (
            base.ggml_new_tensor_4d(context, kind, head_dim, length, kv_heads, batch)
            for _ in range(2)
        )
        for tensor in (query, keys, values):
            ctypes.memset(
                base.ggml_get_data(tensor), 17, base.ggml_nbytes(tensor)
            )  # small finite numbers in every type
        graph = base.ggml_new_graph(context)
        base.ggml_build_forward_expand(
            graph,
            base.ggml_flash_attn_ext(context, query, keys, values, None, head_dim**-0.5, 0.0, 0.0),
        )
        plan = cpu.ggml_graph_plan(graph, threads, None)
        work = ctypes.create_string_buffer(plan.work_size + 64)
        plan.work_data = ctypes.addressof(work)
        return lambda _keep=work: cpu.ggml_graph_compute(graph, ctypes.byref(plan))

    return {f"llama.cpp {name}": call(kind) for name, kind in GGML_TYPES.items()}
