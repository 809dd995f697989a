"""What every operator here has in common: its registration, and the rules that are all alike."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_inception.backend import constant_when_compiled
from fused_inception.ops import filter_cache

NAMESPACE = "fused_inception"
# operator -> what it runs
IMPLEMENTATIONS: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
# operator -> the same with its gradient, for eager calls
_FUNCTIONS: dict[torch._ops.OpOverload, type[torch.autograd.Function]] = {}

# operator -> of each argument, or of what its lists hold, the types that it is, or tensors
_KINDS: dict[torch._ops.OpOverload, list[set[type]]] = {}
_SIZES = (tuple, torch.Size)
_TYPES = {"Tensor": torch.nn.Parameter, "int": int, "float": float, "bool": bool, "str": str}
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)

# registrations live as long as this object
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(
    name: str, schema: str, *, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> torch._ops.OpOverload:
    """Define `fused_inception::name`, with one implementation for every device, and return it.

    Those of `pooling` choose between ATen and Triton by their argument `impl`; all others exist on
    the Triton path alone, beside the functions of `plain`.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema, lib=_library, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "default", implementation, lib=_library)
    torch.library.register_fake(qualified, fake, lib=_library)
    # PyTorch's own way of batching, one by one, does without lists
    if "Tensor[]" in schema:
        _library.impl(qualified, _no_vmap(qualified), "FuncTorchBatched")
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    IMPLEMENTATIONS[op] = implementation
    _KINDS[op] = [
        {type(None), *(kind for name, kind in _TYPES.items() if name in str(argument.type))}
        for argument in op._schema.arguments
    ]
    return op


def register_with_backward(
    name: str,
    schema: str,
    backward_schema: str,
    *,
    forward: Callable[..., Any],
    forward_fake: Callable[..., Any],
    backward: Callable[..., Any],
    backward_fake: Callable[..., Any],
    cast_first: bool,
) -> tuple[torch._ops.OpOverload, torch._ops.OpOverload]:
    """Define an operator and, as `name_backward`, that of its gradients, which has none itself;
    `cast_first` as in `register_autocast`."""
    op = register(name, schema, implementation=forward, fake=forward_fake)
    backward_op = register(
        f"{name}_backward", backward_schema, implementation=backward, fake=backward_fake
    )
    refuse_double_backward(backward_op, f"fused_inception.reference.{name}")
    register_autocast(op, cast_first=cast_first)
    register_autocast(backward_op, cast_first=False)
    return op, backward_op


def register_autograd(
    op: torch._ops.OpOverload, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Give `op` its gradient, for calls through `torch.ops` and through `call`."""
    torch.library.register_autograd(op._name, backward, setup_context=setup_context, lib=_library)
    _FUNCTIONS[op] = _function(op, backward, setup_context)


def call(op: torch._ops.OpOverload, *arguments: Any) -> Any:
    """`op(*arguments)`, its gradient recorded by a plain `torch.autograd.Function`.

    What `torch.library.register_autograd` makes flattens and restores lists of tensors as trees,
    four times a step. It serves compilers, and whoever calls `torch.ops` directly. Here the first
    tensor is as autocast wants it: the operator's own rule runs below the gradient.
    """
    if torch.compiler.is_compiling():
        return op(*arguments)
    refuse_tangents(op, arguments)
    if not torch.is_grad_enabled():
        return call_below_autograd(op, *arguments)
    tensors = [t for argument in arguments for t in _tensors(argument)]
    if not any(t.requires_grad for t in tensors):
        return op(*arguments)
    begin_gradients(op._name)
    shape_of_output: list[int | None] = []
    flat = iter(_FUNCTIONS[op].apply(arguments, shape_of_output, *tensors))
    output = _restored(flat, shape_of_output)
    return output[0] if len(output) == 1 else tuple(output)


def call_below_autograd(op: torch._ops.OpOverload, *arguments: Any) -> Any:
    """`op(*arguments)`, where its gradient is somebody else's or there is none; the first tensor is
    as autocast wants it.

    On its way to an implementation in Python the dispatcher boxes each tensor of each list twice,
    which takes up to 100 us a call. Where nobody waits on that way, the implementation is called
    itself.
    """
    if torch.compiler.is_compiling() or _is_awaited() or not _are_plain(op, arguments):
        return op(*arguments)
    if torch._C._is_any_autocast_enabled():
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return IMPLEMENTATIONS[op](*arguments)
    return IMPLEMENTATIONS[op](*arguments)


def needed_gradients(
    backward_op: torch._ops.OpOverload, *arguments: Any, needs: list[bool]
) -> list[Tensor | None]:
    """What `backward_op(*arguments, needs)` gives; None where not needed."""
    gradients = call_below_autograd(backward_op, *arguments, needs)
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


def refuse_unsaved(saves: bool) -> None:
    """The gradient of a call that was told not to save for it.

    Raises:
        RuntimeError: it was.
    """
    if not saves:
        raise RuntimeError("the operator ran with save=False and kept nothing for its backward")


def _is_awaited() -> bool:
    """Whether anything between an operator and its implementation acts, or wants to see it."""
    return bool(
        torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or torch._C._autograd._profiler_enabled()
    )


def _are_plain(op: torch._ops.OpOverload, arguments: Sequence[Any]) -> bool:
    """Whether tensors are what they seem (no subclass, with data, not negated on reading), and all
    else of the types that the schema has, so that there is nothing to convert."""
    for kinds, argument in zip(_KINDS[op], arguments, strict=True):
        are_parts = isinstance(argument, list) or (type(argument) in _SIZES and int in kinds)
        parts = argument if are_parts else (argument,)
        # a set of all, as up to 60 are parameters
        others = {*map(type, parts)} - kinds
        if others and (others != {Tensor} or any(map(_is_no_memory, parts))):
            return False
    return True


def _is_no_memory(part: Any) -> bool:
    return type(part) is Tensor and (part.is_meta or part.is_neg())


def refuse_tangents(op: torch._ops.OpOverload, arguments: Sequence[Any]) -> None:
    """An operator would drop the tangents of forward-mode differentiation.

    Raises:
        RuntimeError: an argument has one.
    """
    if forward_ad._current_level < 0:
        return
    for t in (t for argument in arguments for t in _tensors(argument)):
        if forward_ad.unpack_dual(t).tangent is not None:
            raise _refusal("forward-mode differentiation is", op._name)


def begin_gradients(name: str) -> None:
    """Gradients are recorded from here on, PyTorch's own alone. They change parameters, be it by
    writes through `.data`, so nothing that was made of parameters is kept.

    Raises:
        RuntimeError: one of torch.func is being taken.
    """
    if torch._C._are_functorch_transforms_active():
        raise _refusal("torch.func's transforms, such as grad and vmap, are", name)
    filter_cache.clear()


def _no_vmap(name: str) -> Callable[..., NoReturn]:
    def refuse(*arguments: Any) -> NoReturn:
        raise _refusal("vmap is", name)

    return refuse


def _refusal(what: str, name: str) -> RuntimeError:
    return RuntimeError(
        f"{what} not implemented for {name}; unfuse_ the model first, or take the functions of "
        "fused_inception.reference"
    )


def _function(
    op: torch._ops.OpOverload, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> type[torch.autograd.Function]:
    """`op` as a function of its arguments, a list for the shape of its output, and of the tensors
    among its arguments, one by one, as autograd wants them."""

    def forward(ctx: Any, arguments: Any, shape: list[int | None], *_: Tensor) -> Any:
        output = call_below_autograd(op, *arguments)
        setup_context(ctx, arguments, output)
        outputs = output if isinstance(output, tuple) else (output,)
        shape += map(_length, outputs)
        ctx.shape_of_output = shape
        ctx.shape_of_input = [_length(argument) for argument in arguments]
        return tuple(t for part in outputs for t in _tensors(part))

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        shape, flat_needs = ctx.shape_of_input, ctx.needs_input_grad
        ctx.needs_input_grad = _restored(iter(flat_needs[2:]), shape, False)
        try:
            results = backward(ctx, *_restored(iter(grads), ctx.shape_of_output))
        finally:
            ctx.needs_input_grad = flat_needs
        results = results if isinstance(results, tuple) else (results,)
        flat = [None, None]
        for result, length in zip(results, shape, strict=True):
            if length is None:
                flat.append(result)
            elif length > 0:
                flat += result
        return tuple(flat)

    name = f"{op._opname}_function"
    members = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    return type(name, (torch.autograd.Function,), members)


def _tensors(argument: Any) -> Iterable[Tensor]:
    """The tensors of one argument."""
    if isinstance(argument, Tensor):
        return (argument,)
    return argument if _length(argument) else ()


def _length(argument: Any) -> int | None:
    """How many tensors an argument has: None for a tensor, 0 for a list of none and for options."""
    if isinstance(argument, Tensor):
        return None
    are_tensors = isinstance(argument, list) and argument and isinstance(argument[0], Tensor)
    return len(argument) if are_tensors else 0


def _restored(flat: Iterator[Any], shape: Sequence[int | None], none: Any = ()) -> list[Any]:
    """What was flattened, again in lists; `none` where there was nothing."""
    return [
        next(flat) if length is None else [next(flat) for _ in range(length)] if length else none
        for length in shape
    ]


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
        if cast_first and autocasts(x):
            x = autocast(x)
        with torch.autocast(device_type, enabled=False):
            return op(x, *args)

    return rule


def autocasts(x: Tensor) -> bool:
    """Whether autocast casts `x`: it is on for the device, and `x` is floating but not float64."""
    if not torch._C._is_any_autocast_enabled():
        return False
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
    """`x` in the dtype that autocast gives it, where it `autocasts`."""
    return x.to(torch.get_autocast_dtype(x.device.type))
