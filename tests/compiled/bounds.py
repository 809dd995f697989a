"""What a compiled kernel must be; each rule says in words how a kernel breaks it."""

import re
from collections.abc import Iterator

from fused_inception.tuning.targets import TARGETS
from tests.compiled.build import Build
from tests.compiled.collect import Specialisation
from tests.compiled.machine_code import Load

# the tensor-core instruction of each target's products, and none of another kind beside it
TENSOR_CORES = {
    "sm_80": r"HMMA",
    "sm_89": r"HMMA",
    "sm_90": r"HGMMA",
    "sm_100": r"UTC\w*MMA",
    "sm_120": r"HMMA",
    "gfx942": r"MFMA",
}
VECTOR_BYTES = 16
OUT_OF_REGISTERS = 255
# element by element: pixels of an image
GATHERS = re.compile(r"image_offs")
# on AMD the compiler leaves out the first 4 of 16 bytes, elements that are cleared behind the load
CLEARED, CLEARED_BYTES = re.compile(r"first_tile ="), 12
# TF32 tensor cores of sm_90 and sm_100 take tiles that are contiguous along the reduction; these
# are not, and are turned element by element on their way to shared memory. For the other targets
# Triton turns the left one alone
TURNED = re.compile(r"(x|dz)_tile =")
TURNED_LEFT = re.compile(r"x_tile =")
TURNING = (
    "_gradients_kernel",
    "_conv2d_wgrad_kernel",
    "_naive_wgrad_kernel",
    "_stem_wgrad_kernel",
    "_packed_wgrad_kernel",
)
# kernels that move parameters or partial sums, or single elements of an image
SCATTERED = (
    "_pack_kernel",
    "_finish_kernel",
    "_stem_pack_kernel",
    "_stem_finish_kernel",
    "_image_conv_fwd_kernel",
    "_image_conv_dgrad_kernel",
    "_image_conv_wgrad_kernel",
)


def is_nvidia(spec: Specialisation) -> bool:
    """Whether the target is one of NVIDIA's."""
    return spec.target.startswith("sm_")


def violations(build: Build) -> list[str]:
    """Each bound that the kernel breaks; empty if it is as it should be."""
    return list(_violations(build))


def _violations(build: Build) -> Iterator[str]:
    spec, code = build.spec, build.code
    if code is None:
        yield f"does not compile: {build.error}"
        return
    spills = sum(loop.spills for loop in code.loops)
    # registers to spare and no loop touched: a value was parked so that more programs fit
    if code.stack and (spills or code.registers >= OUT_OF_REGISTERS or not is_nvidia(spec)):
        yield (
            f"{code.stack} bytes of stack with {code.registers} registers, "
            f"{spills} spill instructions in loops"
        )
    limit = TARGETS[spec.target].shared_bytes
    if build.shared > limit:
        yield f"{build.shared} bytes of shared memory, {spec.target} has {limit}"
    if spec.constant("PRECISION") is not None:
        yield from _wrong_products(build, code.tensor_cores)
    for load, load_bytes, thread_bytes in tile_loads(build):
        vector = CLEARED_BYTES if CLEARED.match(load.text) else VECTOR_BYTES
        if load_bytes < min(vector, thread_bytes) and not _is_turned(build, load):
            yield (
                f"`{load.text}` loads {load_bytes} bytes at a time, "
                f"a thread has {thread_bytes} of the smallest tile"
            )


def tile_loads(build: Build) -> Iterator[tuple[Load, int, int]]:
    """Each load of tiles of activations and filters; bytes of an instruction, bytes of a thread."""
    spec = build.spec
    if build.code is None or spec.kernel in SCATTERED:
        return
    # kernels of whole vectors share one `tl.load`, which also reads winning taps, a byte a channel,
    # and what one channel needs of its neighbours
    shared = spec.constant("LANES") is not None
    tiles = dict(build.tiles)
    for load in build.code.loads:
        thread_bytes = tiles.get((load.file, load.line))
        if thread_bytes is not None and not GATHERS.search(load.text):
            yield load, load.widest if shared else load.narrowest, thread_bytes


def _precision(build: Build) -> str:
    """Of the products: "tf32", "ieee", or "16-bit"."""
    spec = build.spec
    return str(spec.constant("PRECISION")) if spec.signature[0][1] == "*fp32" else "16-bit"


def _is_turned(build: Build, load: Load) -> bool:
    tf32 = is_nvidia(build.spec) and _precision(build) == "tf32"
    turned = TURNED if build.spec.target in ("sm_90", "sm_100") else TURNED_LEFT
    return tf32 and build.spec.kernel in TURNING and turned.match(load.text) is not None


def _wrong_products(build: Build, found: dict[str, int]) -> Iterator[str]:
    spec = build.spec
    # AMD's matrix cores multiply fp32 exactly
    if _precision(build) == "ieee" and is_nvidia(spec):
        if found:
            yield f"exact fp32 on tensor cores: {found}"
        return
    wanted = re.compile(TENSOR_CORES[spec.target])
    others = {name: n for name, n in found.items() if not wanted.fullmatch(name)}
    if others:
        yield f"{others}: a tile is too small for {wanted.pattern}"
    if len(others) == len(found):
        yield f"no {wanted.pattern}"
