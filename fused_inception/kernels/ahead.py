"""Compilation ahead of the first launch: what a script would launch, and its compilation in other
processes, which leave it in Triton's cache on disk.

    python -m fused_inception.kernels.ahead

is such a process: it reads pickled specialisations from its standard input and answers each with a
line.
"""

import contextlib
import hashlib
import importlib
import json
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import TritonError, knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, get_cache_key, make_backend
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

# of a process's answers; what kernels print while they are compiled goes elsewhere
MARK = "ahead:"


@dataclass(frozen=True)
class Specialisation:
    """All that determines one compilation."""

    module: str
    kernel: str
    target: tuple[str, int | str, int]  # backend, architecture, threads of a warp
    signature: tuple[tuple[str, str], ...]  # (argument, "*bf16", "i32", "constexpr", ...)
    constants: tuple[tuple[tuple[int, ...], Any], ...]  # place in the signature -> value
    attributes: tuple[tuple[tuple[int, ...], tuple[tuple[str, int], ...]], ...]
    options: tuple[tuple[str, Any], ...]  # num_warps and all others

    def source(self) -> ASTSource:
        """What Triton compiles, exactly as a launch would have it."""
        kernel = getattr(importlib.import_module(self.module), self.kernel)
        attributes = {path: [list(pair) for pair in pairs] for path, pairs in self.attributes}
        return ASTSource(kernel, dict(self.signature), dict(self.constants), attributes)

    def compile(self) -> Any:
        """Compile it, or load it from the cache on disk."""
        return compile(self.source(), target=GPUTarget(*self.target), options=dict(self.options))

    def compile_for_launch(self) -> None:
        """`compile`, and what else the first launch would wait for."""
        kernel = self.compile()
        if self.target[0] == "cuda" and triton.__version__.startswith("3.6."):
            # later ones have a single launcher; this one's C compiler takes 0.4 s a signature
            from triton.backends.nvidia.driver import CudaLauncher

            # what is missing here is told at the launch
            with contextlib.suppress(Exception):
                CudaLauncher(kernel.src, kernel.metadata)

    def fits(self) -> bool:
        """Whether the GPU that it is for, the current one, has registers and shared memory for it:
        it runs and does not spill."""
        kernel = self.compile()
        try:
            kernel._init_handles()
        except TritonError:
            return False
        return kernel.n_spills == 0

    def on_disk(self) -> bool:
        """Whether Triton's cache has it, so that a launch takes milliseconds."""
        source = self.source()
        backend = make_backend(GPUTarget(*self.target))
        options = backend.parse_options(dict(self.options))
        key = get_cache_key(source, backend, options, env_vars=get_cache_invalidating_env_vars())
        manager = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
        return manager.has_file(f"{source.name[:150]}.json")


@contextlib.contextmanager
def recorded() -> Iterator[dict[Specialisation, None]]:
    """Inside the block, what this thread would have to compile for its launches is kept in order,
    without repeats, and nothing is compiled.

    A kernel that this process has compiled before is not among it.
    """
    found: dict[Specialisation, None] = {}
    thread, before = threading.get_ident(), knobs.runtime.jit_cache_hook

    def hook(**facts: Any) -> bool | None:
        if threading.get_ident() != thread:
            return before(**facts) if before is not None else None
        found[_specialisation(**facts)] = None
        return True  # stop here

    knobs.runtime.jit_cache_hook = hook
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = before


def _specialisation(*, fn: Any, compile: dict[str, Any], **_: Any) -> Specialisation:
    options = json.loads(compile["specialization_data"])["options"]
    # Triton 3.6 does not tell it among the data
    target = driver.active.get_current_target()
    return Specialisation(
        module=fn.module,
        kernel=fn.name,
        target=(target.backend, target.arch, target.warp_size),
        signature=tuple(compile["signature"].items()),
        constants=tuple(compile["constants"].items()),
        attributes=tuple(
            (path, tuple((name, value) for name, value in pairs))
            for path, pairs in compile["configs"][0].items()
        ),
        options=tuple((name, _frozen(value)) for name, value in options.items()),
    )


def _frozen(value: Any) -> Any:
    return tuple(_frozen(part) for part in value) if isinstance(value, list) else value


def compile_all(
    specs: Sequence[Specialisation],
    workers: int,
    done: Callable[[Specialisation, str | None], object],
) -> None:
    """Compile `specs` in `workers` other processes; `done(spec, error)` is called in this thread as
    they come.

    The processes are new and import this library alone, never the caller's main module, so that no
    script needs a guard against being imported again; they use no GPU.
    """
    todo: queue.SimpleQueue[Specialisation] = queue.SimpleQueue()
    results: queue.SimpleQueue[tuple[Specialisation, str | None]] = queue.SimpleQueue()
    for spec in specs:
        todo.put(spec)
    threads = [
        threading.Thread(target=_serve, args=(todo, results), daemon=True)
        for _ in range(min(workers, len(specs)))
    ]
    for thread in threads:
        thread.start()
    for _ in specs:
        done(*results.get())
    for thread in threads:
        thread.join()


def _serve(
    todo: "queue.SimpleQueue[Specialisation]",
    results: "queue.SimpleQueue[tuple[Specialisation, str | None]]",
) -> None:
    """Feed one process until nothing is left; one that dies is replaced by another."""
    process = None
    while True:
        try:
            spec = todo.get_nowait()
        except queue.Empty:
            break
        if process is None:
            process = _process()
        error: str | None = "the process that compiled it ended"
        with contextlib.suppress(BrokenPipeError):
            pickle.dump(spec, process.stdin)
            process.stdin.flush()
            for line in process.stdout:
                text = line.decode(errors="replace").strip()
                if text.startswith(MARK):
                    error = json.loads(text.removeprefix(MARK))
                    break
            else:
                process.wait()
                process = None
        results.put((spec, error))
    if process is not None:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def _process() -> Any:
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "fused_inception.kernels.ahead"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )


def _answer() -> None:
    while True:
        try:
            spec = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        error = None
        try:
            spec.compile_for_launch()
        except Exception as problem:
            # whatever the compiler says is the answer
            error = f"{type(problem).__name__}: {problem}"
        print(f"{MARK}{json.dumps(error)}", flush=True)


if __name__ == "__main__":
    _answer()
