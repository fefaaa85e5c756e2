"""FP8 products of linear layers: y = x W^T and dx = dy W in 8-bit floating point (e4m3).

    x, dy    one scale per token, from its largest entry; the cast fuses with the kernel before it
    W        one scale per tensor, a power of two with room, so that no step needs a pass over W

A frozen W needs no weight gradient, so the adapters' large products are these two alone. The gradients
of an update, and dW in full-rank training, stay in the computation's dtype. Layers whose sizes are
no multiples of 16 stay as they are.

A weight that outgrows its scale is never clipped: the entry becomes NaN, and so does the loss.
fit_scales(model, only_if_tight=True), every few steps, renews scales long before that.
"""
import math

import torch
from torch import nn

from config import UserError
from mora import AdaptedLinear, replace

LARGEST = 448.0  # of e4m3
ROOM = 8.0       # a scale's largest weight over the weight's largest entry when the scale is set;
TIGHT = 2.0      # a scale is renewed when less than this is left


def must_have(device):
    """Raise UserError if a device has no FP8 products."""
    if device.type == "mps" or (device.type == "cuda"
                                and torch.cuda.get_device_capability(device) < (8, 9)):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise UserError(f"matmul fp8 needs an Ada or Hopper GPU or newer (compute capability 8.9), "
                        f"this is {name}: take --matmul=bf16")


def quantize_rows(x):
    """Return (x / scale in e4m3, scale (rows, 1) in float32) of x (rows, columns)."""
    wide = x.float()
    scale = wide.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / LARGEST
    return (wide / scale).to(torch.float8_e4m3fn), scale


def quantize_weight(weight, scale):
    """Return weight / scale in e4m3; entries beyond the largest number become NaN."""
    scaled = weight / scale
    return torch.where(scaled.abs() <= LARGEST, scaled, torch.nan).to(torch.float8_e4m3fn)


def multiply(x, weight, scale):
    """Return x @ (weight * scale)^T, in x's dtype: x (..., n), weight (m, n) in e4m3 -> (..., m)."""
    rows, row_scale = quantize_rows(x.flatten(0, -2))
    column_scale = scale.expand(1, len(weight)).contiguous()
    y = torch._scaled_mm(rows, weight.T, scale_a=row_scale, scale_b=column_scale,
                         out_dtype=torch.bfloat16, use_fast_accum=True)
    return y.to(x.dtype).unflatten(0, x.shape[:-1])


class Float8Products(nn.Module):
    """The two large products of one layer, beside mora.Products; `scale` is a power of two."""

    def __init__(self, device):
        super().__init__()
        self.register_buffer("scale", torch.ones((), device=device), persistent=False)

    def y(self, x, weight):
        """Return (y, None): dx quantizes W's transpose itself, so that no copy of W is kept."""
        return multiply(x, quantize_weight(weight, self.scale), self.scale), None

    def dx(self, dy, weight):
        transposed = quantize_weight(weight.T.contiguous(), self.scale)
        return multiply(dy, transposed, self.scale)


class Float8Linear(nn.Module):
    """A plain linear layer with FP8 products: full-rank training, or frozen without an update."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.products = linear.weight, Float8Products(linear.weight.device)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x):
        if torch.is_grad_enabled():
            return TrainedProduct.apply(x, self.weight, self.products)
        return nn.functional.linear(x, self.weight.to(x.dtype))


class TrainedProduct(torch.autograd.Function):
    """y = W x with FP8 products; dW in x's dtype, as in bfloat16 training."""

    @staticmethod
    def forward(ctx, x, weight, products):
        ctx.products = products
        ctx.save_for_backward(weight, x if weight.requires_grad else None)
        return products.y(x, weight)[0]

    @staticmethod
    def backward(ctx, dy):
        weight, x = ctx.saved_tensors
        dw = None
        if x is not None:
            dw = (dy.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype)
        return ctx.products.dx(dy, weight), dw, None


def linear_layers(model):
    """Return [(name, layer)] of the linear layers of the blocks, adapted or not."""
    kinds = (nn.Linear, AdaptedLinear, Float8Linear)
    return [(name, module) for name, module in model.named_modules()
            if isinstance(module, kinds) and not name.endswith("lm_head")]


def convert(model):
    """Give every linear layer of the blocks FP8 products, in place, where its sizes allow it."""
    for name, layer in linear_layers(model):
        if layer.weight.shape[0] % 16 or layer.weight.shape[1] % 16:
            continue
        if isinstance(layer, AdaptedLinear):
            layer.products = Float8Products(layer.weight.device)
        else:
            replace(model, name, Float8Linear(layer))
    fit_scales(model)


def converted(model):
    """Return [(name, layer)] of the layers with FP8 products."""
    return [(name, layer) for name, layer in linear_layers(model)
            if isinstance(getattr(layer, "products", None), Float8Products)]


@torch.no_grad()
def fit_scales(model, only_if_tight=False):
    """Set the scales of W + dW from its largest entry now; returns how many were set.

    only_if_tight: leave those alone that still have room. Costs a pass over the weights: for
    restarts, and every few steps.
    """
    layers = converted(model)
    if not layers:
        return 0
    largest = torch.stack([weight_of(layer).abs().max() for _, layer in layers]).tolist()
    before = torch.stack([layer.products.scale for _, layer in layers]).tolist()
    renewed = 0
    for (name, layer), entry, scale in zip(layers, largest, before, strict=True):
        if not math.isfinite(entry):
            raise UserError(f"{name}: a weight is {entry}, so it has no FP8 scale")
        if only_if_tight and entry * TIGHT <= LARGEST * scale:
            continue
        exponent = math.ceil(math.log2(max(entry, 1e-30) * ROOM / LARGEST))
        layer.products.scale.fill_(2.0 ** exponent)
        renewed += 1
    return renewed


def weight_of(layer):
    """Return the matrix that a layer multiplies by."""
    return layer.merged() if isinstance(layer, AdaptedLinear) else layer.weight


def scales(model):
    """Return {layer: scale}, exact as numbers in JSON, for a checkpoint's state.json."""
    return {name: float(layer.products.scale) for name, layer in converted(model)}


def load_scales(model, saved):
    """Take the scales of a checkpoint, so that a resumed run rounds as the run that was stopped."""
    for name, layer in converted(model):
        if name in saved:
            layer.products.scale.fill_(saved[name])
