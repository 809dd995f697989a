"""What `bench` measures: rows of models and of their blocks."""

from dataclasses import dataclass

# what is timed of a block in a mode of the model: forward without gradients; forward and backward
# with all of them
BLOCK_MODES = {"inference": "forward", "step": "step"}


@dataclass(frozen=True)
class Result:
    """One provider in one mode at one batch size; times are those of one call."""

    batch: int
    mode: str
    provider: str
    milliseconds: float
    p20: float
    p80: float
    images_per_second: float
    times_as_fast: float  # as eager
    peak_bytes: int | None  # beyond model and batch; None on a CPU
    first_call_seconds: float  # compilation, algorithm search


@dataclass(frozen=True)
class BlockResult:
    """One block in one mode at one batch size; times are those of one call, measured.

    `flops` and `bytes` are counts of the fused block, from shapes: operands of each launch once.
    """

    batch: int
    mode: str
    block: str
    kind: str
    fused_milliseconds: float
    eager_milliseconds: float
    flops: int | None
    bytes: int | None

    @property
    def times_as_fast(self) -> float:
        """The fused block, as the plain one."""
        return self.eager_milliseconds / self.fused_milliseconds
