"""Compiles one specialisation ahead of time. In a process where kernels are not interpreted."""

import importlib
import re
import time
from dataclasses import dataclass

import triton
from triton.compiler import ASTSource

from tests.compiled.collect import Specialisation, gpu_target
from tests.compiled.machine_code import MachineCode, read_amd, read_nvidia, source_file


@dataclass(frozen=True)
class Build:
    """One compiled kernel; `code` is missing where the compiler failed with `error`."""

    spec: Specialisation
    seconds: float  # less where Triton's cache on disk has it
    error: str = ""
    code: MachineCode | None = None
    shared: int = 0  # bytes of one program
    # (file, line) of each load of a tile of floats -> bytes of its smallest tile for one thread
    tiles: tuple[tuple[tuple[str, int], int], ...] = ()


def build(spec: Specialisation) -> Build:
    """Compile `spec` and read what became of it."""
    kernel = getattr(importlib.import_module(spec.module), spec.kernel)
    if not hasattr(kernel, "arg_names"):
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET")
    source = ASTSource(
        fn=kernel,
        signature=dict(spec.signature),
        constexprs=dict(spec.constants),
        attrs={
            (at,) if isinstance(at, int) else at: [list(pair) for pair in pairs]
            for at, pairs in spec.attributes
        },
    )
    target = gpu_target(spec.target)
    start = time.perf_counter()
    try:
        compiled = triton.compile(source, target=target, options={"num_warps": spec.num_warps})
    except Exception as error:
        # what the compiler says, whatever it is, is the result
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        return Build(spec, time.perf_counter() - start, f"{type(cause).__name__}: {cause}")
    seconds = time.perf_counter() - start
    if target.backend == "cuda":
        code = read_nvidia(compiled.asm["cubin"], compiled.asm["ptx"])
    else:
        code = read_amd(compiled.asm["amdgcn"])
    threads = spec.num_warps * target.warp_size
    tiles = _loaded_tiles(compiled.asm["ttgir"], threads)
    return Build(spec, seconds, "", code, compiled.metadata.shared, tuple(tiles.items()))


def _loaded_tiles(ttgir: str, threads: int) -> dict[tuple[str, int], int]:
    """Bytes for one thread of the smallest tile of floats that each source line loads."""
    locations = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttgir, re.MULTILINE))

    def leaf(name: str) -> tuple[str, int] | None:
        """File and line of a location: behind names, innermost of the inlined calls."""
        while name:
            text = locations.get(name, "")
            if m := re.match(r'"([^"]+)":(\d+):', text):
                return source_file(m[1]), int(m[2])
            m = re.search(r"#loc\d*", text)
            name = m[0] if m else ""
        return None

    # tt.load and its kin: ... tensor<128x64x!tt.ptr<bf16>, #blocked> ... loc(#loc12)
    operation = re.compile(
        r"= (?:tt\.load|ttg\.async_copy_global_to_local|amdg?\w*\.buffer_load\w*) .*?"
        r"tensor<((?:\d+x){2,})(?:!tt\.ptr<)?(bf16|f16|f32).*loc\((#loc\d*)\)"
    )
    smallest: dict[tuple[str, int], int] = {}
    for text in ttgir.splitlines():
        m = operation.search(text)
        where = leaf(m[3]) if m else None
        if m is None or where is None:
            continue
        size = 4 if m[2] == "f32" else 2
        for extent in m[1].rstrip("x").split("x"):
            size *= int(extent)
        smallest[where] = min(size // threads, smallest.get(where, size))
    return smallest
