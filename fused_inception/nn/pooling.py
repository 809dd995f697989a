"""Max pooling and local response normalisation, alone and in pairs."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fused_inception import functional
from fused_inception.geometry import Window, why_no_norm_kernel, why_no_pool_kernel
from fused_inception.nn.conv_block import FUSED, aten_path, change_of, global_hook


class _Layer(nn.Module):
    """What pools and norms say of themselves."""

    # of one that does not pool, or normalise
    kernel_size: Any = 1
    size = 1

    def _no_kernel(self) -> str | None:
        """Why the operator runs through ATen everywhere; None where there is a kernel."""
        window: int | tuple[int, int] = self.kernel_size
        side = window if isinstance(window, int) else max(window)
        return why_no_pool_kernel(side) or why_no_norm_kernel(self.size)

    @property
    def path(self) -> str:
        """For `print`."""
        return self._obstacle() or aten_path(self._no_kernel()) or FUSED

    def _obstacle(self) -> str | None:
        """Why PyTorch's own function runs instead of the operator."""
        return None


class MaxPool2d(_Layer):
    """Maximum over square windows, `functional.max_pool2d`.

    Args:
        kernel_size, stride, padding, ceil_mode: as torch's; no stride means one window beside the
            other. Windows, strides and paddings that differ between height and width raise
            ValueError in forward.

    One that `fuse_` has made of torch's layer runs as that where `dilation` or `return_indices` has
    been set since.
    """

    dilation: int | tuple[int, int] = 1
    return_indices = False

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.ceil_mode = ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H_out, W_out]."""
        if self._obstacle() is not None:
            pool: Any = F.max_pool2d  # of indices, too, a tuple
            window = self.kernel_size, self.stride, self.padding, self.dilation
            return pool(x, *window, self.ceil_mode, self.return_indices)
        return functional.max_pool2d(
            x, self.kernel_size, self.stride, self.padding, ceil_mode=self.ceil_mode
        )

    def _obstacle(self) -> str | None:
        change = change_of_pool(self)
        return change and f"plain PyTorch: {change}"

    def extra_repr(self) -> str:
        """Window and path, for `print`."""
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"ceil_mode={self.ceil_mode}, {self.path}"
        )


class LocalResponseNorm(_Layer):
    """Local response normalisation across channels, `functional.local_response_norm`.

    Args:
        size: channels of a window.
        alpha, beta, k: the constants of the formula.
    """

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> None:
        super().__init__()
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        return functional.local_response_norm(x, self.size, self.alpha, self.beta, self.k)

    def extra_repr(self) -> str:
        """Constants and path, for `print`."""
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}, {self.path}"


class _NormAndPool(_Layer):
    """The options of both; subclasses say which comes first."""

    _function: Any

    def __init__(
        self,
        size: int,
        kernel_size: int,
        stride: int,
        *,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        padding: int = 0,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        self.size = size
        self.kernel_size = kernel_size
        self.stride = stride
        self.alpha = alpha
        self.beta = beta
        self.k = k
        self.padding = padding
        self.ceil_mode = ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H_out, W_out]."""
        return self._function(
            x,
            self.size,
            self.kernel_size,
            self.stride,
            alpha=self.alpha,
            beta=self.beta,
            k=self.k,
            padding=self.padding,
            ceil_mode=self.ceil_mode,
        )

    def extra_repr(self) -> str:
        """Constants, window and path, for `print`."""
        return (
            f"{self.size}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"alpha={self.alpha}, beta={self.beta}, k={self.k}, padding={self.padding}, "
            f"ceil_mode={self.ceil_mode}, {self.path}"
        )


class LRNMaxPool2d(_NormAndPool):
    """Local response normalisation, then a max pool, `functional.lrn_max_pool2d`; arguments are
    those of `LocalResponseNorm` and `MaxPool2d`."""

    _function = staticmethod(functional.lrn_max_pool2d)


class MaxPoolLRN2d(_NormAndPool):
    """A max pool, then local response normalisation, `functional.max_pool2d_lrn`; arguments are
    those of `LocalResponseNorm` and `MaxPool2d`."""

    _function = staticmethod(functional.max_pool2d_lrn)


def change_of_pool(pool: Any) -> str | None:
    """Options of torch's max pool that no fused operator has."""
    if pool.return_indices:
        return "returns indices"
    if pool.dilation not in (1, (1, 1)):
        return f"has dilation {pool.dilation}"
    return None


def why_no_window(pool: Any) -> str | None:
    """What keeps a `MaxPool2d` from being a fused operator with one `Window`; None where it is."""
    change = change_of_pool(pool)
    if change is not None:
        return change
    sizes = (pool.kernel_size, pool.stride, pool.padding)
    if all(isinstance(size, int) for size in sizes):
        return None
    return "has a size for each direction"


def square_window(pool: Any) -> Window:
    """The window of a `MaxPool2d` whose sizes are numbers."""
    return Window(pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)


def pool_then_norm(x: Tensor, pool: nn.Module, norm: nn.Module | None) -> Tensor:
    """`norm(pool(x))`, in one kernel where both are our own and nothing looks in between."""
    if norm is None:
        return pool(x)
    if _is_pair(pool, norm):
        return functional.max_pool2d_lrn(x, *_window_of(pool, norm), **_options_of(pool, norm))
    return norm(pool(x))


def norm_then_pool(x: Tensor, norm: nn.Module | None, pool: nn.Module) -> Tensor:
    """`pool(norm(x))`, in one kernel where both are our own and nothing looks in between."""
    if norm is None:
        return pool(x)
    if _is_pair(pool, norm):
        return functional.lrn_max_pool2d(x, *_window_of(pool, norm), **_options_of(pool, norm))
    return pool(norm(x))


def _is_pair(pool: nn.Module, norm: nn.Module) -> bool:
    changes = global_hook() or change_of(pool, MaxPool2d) or change_of(norm, LocalResponseNorm)
    return changes is None and change_of_pool(pool) is None


def _window_of(pool: nn.Module, norm: nn.Module) -> tuple[Any, Any, Any]:
    return norm.size, pool.kernel_size, pool.stride


def _options_of(pool: nn.Module, norm: nn.Module) -> dict[str, Any]:
    return {
        "alpha": norm.alpha,
        "beta": norm.beta,
        "k": norm.k,
        "padding": pool.padding,
        "ceil_mode": pool.ceil_mode,
    }
