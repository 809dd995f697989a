"""What every operator here has in common: its registration, and the rules that are all alike."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from fused_inception.backend import constant_when_compiled

NAMESPACE = "fused_inception"
# operator -> what it runs
IMPLEMENTATIONS: dict[torch._ops.OpOverload, Callable[..., Any]] = {}

# registrations live as long as this object
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(
    name: str, schema: str, *, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> torch._ops.OpOverload:
    """Define `fused_inception::name`, with one implementation for every device, and return it.

    The implementation chooses between ATen and Triton by the operator's argument `impl`.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema, lib=_library, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "default", implementation, lib=_library)
    torch.library.register_fake(qualified, fake, lib=_library)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    IMPLEMENTATIONS[op] = implementation
    return op


def register_autograd(
    op: torch._ops.OpOverload, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Give `op` its gradient."""
    torch.library.register_autograd(op._name, backward, setup_context=setup_context, lib=_library)


def refuse_double_backward(op: torch._ops.OpOverload, reference: str) -> None:
    """Make the gradient of the backward operator `op` an error."""

    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            f"double backward is not implemented for {op._name}; "
            f"{reference} has gradients of any order"
        )

    torch.library.register_autograd(op._name, backward, lib=_library)


def register_autocast(op: torch._ops.OpOverload, *, cast_first: bool) -> None:
    """Run `op` with autocast off inside; with `cast_first` its first tensor is cast before.

    Filters are cast by the implementation while it packs them, so that their gradients come back
    in their own dtype; biases stay as they are. float64 is left alone, as torch's autocast does.
    """
    for key, device_type in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
        _library.impl(op._name, _autocast_rule(op, device_type, cast_first), key)


def _autocast_rule(
    op: torch._ops.OpOverload, device_type: str, cast_first: bool
) -> Callable[..., Any]:
    def rule(x: Tensor, *args: Any) -> Any:
        if cast_first:
            x = autocast(x)
        with torch.autocast(device_type, enabled=False):
            return op(x, *args)

    return rule


def autocasts(x: Tensor) -> bool:
    """Whether autocast casts `x`: it is on for the device, and `x` is floating but not float64."""
    device_type = x.device.type
    return (
        x.is_floating_point()
        and x.dtype != torch.float64
        and _has_autocast(device_type)
        and torch.is_autocast_enabled(device_type)
    )


@constant_when_compiled
def _has_autocast(device_type: str) -> bool:
    # torch.compile of torch 2.11 cannot trace it
    return torch.amp.is_autocast_available(device_type)


def autocast(x: Tensor) -> Tensor:
    """`x` in the dtype that autocast gives it; `x` itself where autocast is off."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if autocasts(x) else x
