"""What a network or a module costs under a plan."""

from fused_inception.cost.compiled import Compiled
from fused_inception.cost.eager import Eager
from fused_inception.cost.fused import Fused
from fused_inception.cost.layers import Aux, Conv, Module, Network, Pool
from fused_inception.cost.ops import Cost
from fused_inception.cost.plan import IMAGE, Plan
from fused_inception.geometry import InceptionDims

PLANS: dict[str, type[Plan]] = {"eager": Eager, "compiled": Compiled, "fused": Fused}
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


def network(
    variant: str = "paper",
    *,
    batch: int = 1,
    image_size: int = 224,
    dtype: str = "bfloat16",
    plan: str = "fused",
    training: bool = True,
    aux_logits: bool = True,
    num_classes: int = 1000,
) -> Cost:
    """One pass through GoogLeNet: in training forward and backward, else forward alone.

    The loss and the optimiser are not part of it. Activations and parameters are in `dtype`,
    activations channels last; float32 is multiplied as TF32, PyTorch's default in convolutions.

    Args:
        variant: "paper", "torchvision" or "torchvision5x5".
        batch: images.
        image_size: side of the square images.
        dtype: "float32", "float16" or "bfloat16".
        plan: "eager" (PyTorch's operators one by one), "compiled" (torch.compile) or "fused" (this
            library).
        training: gradients of all parameters, with the auxiliary classifiers.
        aux_logits: the network has them.
        num_classes: outputs of each classifier.

    Raises:
        ValueError: an unknown name, or images that are too small.
    """
    layers = Network(variant, image_size=image_size, aux_logits=aux_logits, num_classes=num_classes)
    recorder = _recorder(plan, batch, dtype, training)
    recorder.network(layers)
    return recorder.cost()


def inception(
    dims: InceptionDims,
    *,
    batch: int,
    height: int,
    width: int,
    dtype: str = "bfloat16",
    plan: str = "fused",
    training: bool = True,
    norm: bool = False,
    name: str = "module",
) -> Cost:
    """One Inception module, bias mode or with `norm` BatchNorm; in training every gradient, that of
    the input too.

    Raises:
        ValueError: an unknown name.
    """
    recorder = _recorder(plan, batch, dtype, training)
    x = recorder.tensor("x", height * width, dims.in_channels)
    recorder.module(Module(name, dims, height * width, norm), x)
    return recorder.cost()


def block(
    layer: Conv | Pool | Module | Aux,
    *,
    batch: int,
    dtype: str = "bfloat16",
    plan: str = "fused",
    training: bool = True,
    image: bool = False,
) -> Cost:
    """One layer of a network; the input of an `image` needs no gradient.

    Raises:
        ValueError: an unknown name.
    """
    recorder = _recorder(plan, batch, dtype, training)
    name = IMAGE if image else "x"
    match layer:
        case Conv():
            recorder.conv(layer, recorder.tensor(name, layer.inputs, layer.c_in))
        case Pool():
            recorder.pool(layer, recorder.tensor(name, layer.inputs, layer.channels))
        case Module():
            recorder.module(layer, recorder.tensor(name, layer.pixels, layer.dims.in_channels))
        case Aux():
            if training:  # inference does not run it
                recorder.aux(layer, recorder.tensor(name, layer.inputs, layer.conv.c_in))
    return recorder.cost()


def _recorder(plan: str, batch: int, dtype: str, training: bool) -> Plan:
    for what, value, known in (("plan", plan, PLANS), ("dtype", dtype, ITEMSIZE)):
        if value not in known:
            raise ValueError(f"{what} must be one of {', '.join(known)}, got {value!r}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    return PLANS[plan](batch, ITEMSIZE[dtype], training=training)
