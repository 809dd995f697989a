"""The tensors of a layer, found quickly and wherever wrappers keep them."""

from torch import Tensor, nn


def tensor_of(layer: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer of `layer`, or what stands for it: replicas of DataParallel, and FSDP
    without `use_orig_params`, hold plain attributes in the place of parameters."""
    # not getattr: attributes that are parameters or buffers take ten times as long to find
    for group in (layer._parameters, layer._buffers, layer.__dict__):
        if name in group:
            return group[name]
    return None
