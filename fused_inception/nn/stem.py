"""What precedes the first Inception module, but for its convolutions and pools."""

from torch import Tensor, nn

from fused_inception import reference
from fused_inception.nn.conv_block import PLAIN


class LocalResponseNorm(nn.Module):
    """Local response normalisation across channels. Plain PyTorch.

    y[c] = x[c] / (k + alpha/size * sum of x[c']**2 over the `size` channels centred on c) ** beta

    Source: Krizhevsky et al. 2012, section 3.3, with PyTorch's and Caffe's division by `size`.

    Args:
        size: channels in the window.
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
        return reference.local_response_norm(x, self.size, self.alpha, self.beta, self.k)

    def extra_repr(self) -> str:
        """Constants and path, for `print`."""
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}, {PLAIN}"
