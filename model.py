"""A LLaMA-like transformer: RMSNorm, SwiGLU, RoPE, grouped-query attention, products in FP8.

Its state dict is that of Hugging Face's LlamaForCausalLM, so a checkpoint IS a Hugging Face one.
Parameters are float32 (frozen ones may be smaller); the computation runs in `model.compute_dtype`
(bfloat16 on a GPU), norms and losses in float32.

Letters in shape comments: B sequences, T positions, D hidden_size, H heads, Hk key/value heads,
Dh head size, V vocabulary.
"""
import math
from dataclasses import dataclass

import torch
import torch._functorch.config
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 4096  # tokens of the loss head: at a vocabulary of 50k, 400 MB of bfloat16 logits
E4M3_MAX = 448.0  # the largest number of e4m3
ROOM = 32.0       # the factor by which weights can grow, at least, after an FP8 scale is set
TIGHT = 4.0       # the scale is set again when weights can grow by less than this factor


@dataclass(frozen=True)
class LlamaConfig:
    """A model's shape, under the names of Hugging Face's config.json."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    rope_scaling: dict | None = None  # LLaMA-3's, under the names of config.json; None: plain RoPE

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads


class RMSNorm(nn.RMSNorm):  # torch's own has no fused kernel for bfloat16 with float32 weights
    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * wide).to(x.dtype)


class Linear(nn.Linear):
    """A linear layer without bias, in its input's dtype. products: None, or Float8Products."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)
        self.products = None

    def forward(self, x):
        if self.products is not None and torch.is_grad_enabled():
            return self.products(x, self.weight)
        return F.linear(x, self.weight.to(x.dtype))


def rope(first, length, cfg, device):
    """Cosines and sines, (length, Dh), float32, of the angles of positions first, first + 1, ..."""
    even = torch.arange(0, cfg.head_dim, 2, device=device, dtype=torch.float32)
    frequencies, scaling = cfg.rope_theta ** (-even / cfg.head_dim), cfg.rope_scaling
    if scaling:  # LLaMA-3: slow frequencies are divided by `factor`, others less or not
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = frequencies * scaling["original_max_position_embeddings"] / (2 * torch.pi)
        share = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (share + (1 - share) / scaling["factor"])
    positions = torch.arange(first, first + length, device=device, dtype=torch.float32)
    angles = (positions[:, None] * frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotate the pairs (j, j + Dh/2), Hugging Face's order of RoPE, of x (B, heads, T, Dh)."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Past:
    """A layer's keys and values so far: both, (2, B, Hk, T, Dh), T >= length."""
    length, both, room = 0, None, 128  # room for more tokens: appending one copies that one alone

    def append(self, k, v):
        """All keys and all values, (B, Hk, length, Dh) each, these being the last."""
        new, old_length = torch.stack((k, v)), self.length
        self.length = old_length + k.shape[2]
        both = new[:, :, :, :0] if self.both is None else self.both
        missing = self.length - both.shape[3]
        if missing > 0:
            self.both = F.pad(both, (0, 0, 0, missing + self.room))
        self.both[:, :, :, old_length:self.length] = new
        return self.both[:, :, :, :self.length]


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.grouped = cfg.num_key_value_heads != cfg.num_attention_heads
        self.q_proj = Linear(cfg.hidden_size, cfg.num_attention_heads * cfg.head_dim)
        self.k_proj = Linear(cfg.hidden_size, cfg.num_key_value_heads * cfg.head_dim)
        self.v_proj = Linear(cfg.hidden_size, cfg.num_key_value_heads * cfg.head_dim)
        self.o_proj = Linear(cfg.num_attention_heads * cfg.head_dim, cfg.hidden_size)

    def forward(self, x, cos, sin, past=None):
        """x (B, T, D) -> (B, T, D). `past`: the layer's key/value cache, read and extended by x."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, Dh)
                   for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is not None:
            k, v = past.append(k, v)
        if past is None or q.shape[2] > 1:  # whole sequences: a position attends to those before it
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        else:  # one new token attends to the whole cache; queries that share keys form a sequence
            shared = q.reshape(*k.shape[:2], -1, self.head_dim)  # so that no key is copied
            y = F.scaled_dot_product_attention(shared, k, v).reshape(q.shape)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):  # SwiGLU
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = Linear(cfg.hidden_size, cfg.intermediate_size)
        self.up_proj = Linear(cfg.hidden_size, cfg.intermediate_size)
        self.down_proj = Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, cos, sin, past=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, past)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, cfg, seed=None, residual_init=False):
        """Draw weights of deviation 0.02 with a generator of their own; seed None: torch's draws.
        residual_init: 0.02 / sqrt(2 layers) for o_proj and down_proj, which add to the residual."""
        super().__init__()
        self.cfg = cfg
        self.compute_dtype, self.loss_kernel = torch.float32, softmax_gradient
        self.checkpoint_blocks = False  # True: keep a block's input alone, compute the rest again
        # nn.Embedding draws with normal_, which on meta imports torch._dynamo: that takes 1.2 s
        weight = torch.randn(cfg.vocab_size, cfg.hidden_size)
        self.model = nn.ModuleDict({  # Hugging Face's name for all but the head
            "embed_tokens": nn.Embedding.from_pretrained(weight, freeze=False),
            "layers": nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers)),
            "norm": RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)})
        self.lm_head = None if cfg.tie_word_embeddings else Linear(cfg.hidden_size, cfg.vocab_size)
        if seed is None:
            return
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            is_residual = residual_init and ("o_proj" in name or "down_proj" in name)
            std = 0.02 / (2 * cfg.num_hidden_layers) ** 0.5 if is_residual else 0.02
            if parameter.ndim == 2:
                nn.init.normal_(parameter, 0.0, std, generator=generator)

    def forward(self, ids, targets=None, cache=None):
        """Return logits (B, T, V) in float32 of ids (B, T), or the mean cross-entropy in nats of
        targets (B, T), of which -100 does not count. `cache` (see new_cache) holds what came before
        ids, and is extended by them: whole sequences while it is empty, then single tokens."""
        x = self.hidden(ids, cache)
        if targets is None:
            return self.logits(x)
        return cross_entropy(x.flatten(0, 1), self.head(), targets.flatten(), self.loss_kernel)

    def hidden(self, ids, cache=None):
        """Return the last hidden states, (B, T, D), of ids (B, T)."""
        cos, sin = rope(cache[0].length if cache else 0, ids.shape[1], self.cfg, ids.device)
        x = self.model.embed_tokens(ids).to(self.compute_dtype)  # (B, T, D)
        if torch.is_grad_enabled() and x.is_leaf:  # frozen or not: all blocks are compiled alike
            x.requires_grad_()
        for i, block in enumerate(self.model.layers):
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, cache[i] if cache else None)
        return self.model.norm(x)

    def logits(self, x):
        """(..., D) -> (..., V), float32. The head is not `padded`: that would copy it per token."""
        return F.linear(x, self.head().to(x.dtype)).float()

    def head(self):
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def compile_parts(self, compute_again=False):
        """torch.compile each block and the loss's kernel, in place; one compilation serves all. The
        second sequence length makes torch compile once more, for every length. compute_again:
        backward computes the inputs of its products again, where torch would have kept them."""
        from torch._inductor import config as inductor_config  # here: it takes a second
        if hasattr(inductor_config, "inductor_choices_class"):  # not in torch 2.9
            inductor_config.inductor_choices_class = kernel_choices
        torch._functorch.config.ban_recompute_materialized_backward = not compute_again
        for block in self.model.layers:  # without checks of the groups' indices, which take time
            block.compile(options={"assert_indirect_indexing": False})
        self.loss_kernel = torch.compile(softmax_gradient)

    def new_cache(self):
        """An empty key/value cache, for forward(..., cache=...)."""
        return [Past() for _ in self.model.layers]


# ------------------------------------------------------------ the loss head
# The logits of all tokens never exist at once: at a vocabulary of 50,000 one step's outweigh a
# small model. A chunk's are turned into gradients in the forward pass: nothing is kept, nothing is
# computed twice. Targets of -100 (prompts, padding) cost nothing. N tokens.

def padded(weight, dtype):
    """(V, D) in dtype, with zero rows up to a multiple of 64, for matrix units (50257 -> 50304)."""
    weight, missing = weight.to(dtype), -len(weight) % 64
    return F.pad(weight, (0, 0, 0, missing)) if missing else weight  # F.pad of 0 rows copies too


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def softmax_gradient(logits, targets, vocab_size, scale):
    """Return (sum of a chunk's losses, scale * its gradient in the logits' dtype). Columns from
    vocab_size on are padding: no token."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    wide = at_least_float32(logits).masked_fill(columns >= vocab_size, -torch.inf)
    log_sum = wide.logsumexp(dim=-1)
    loss = (log_sum - wide.gather(1, targets[:, None])[:, 0]).sum()
    one_hot = (columns == targets[:, None]).to(wide)
    gradient = ((wide - log_sum[:, None]).exp() - one_hot) * scale
    return loss, gradient.to(logits.dtype)


class ChunkedCrossEntropy(torch.autograd.Function):  # chunks: tensors of row numbers of x
    @staticmethod
    def forward(ctx, x, weight, targets, chunks, kernel):
        w, loss = padded(weight, x.dtype), at_least_float32(x.new_zeros(()))
        scale = torch.full_like(loss, sum(map(len, chunks))).reciprocal()
        dx = torch.zeros_like(x)
        dw = torch.zeros_like(w, dtype=weight.dtype) if ctx.needs_input_grad[1] else None
        for positions in chunks:
            rows = x[positions]
            part, gradient = kernel(rows @ w.T, targets[positions], len(weight), scale)
            loss += part
            dx[positions] = gradient @ w
            if dw is not None and dw.is_cuda and dw.dtype != rows.dtype:  # float32 += bfloat16
                torch.addmm(dw, gradient.T, rows, out_dtype=dw.dtype, out=dw)
            elif dw is not None:
                dw += gradient.T @ rows
        ctx.gradients = dx, (None if dw is None else dw[:len(weight)])
        return loss * scale

    @staticmethod
    def backward(ctx, factor):
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss has its gradients once: compute it again")
        gradients, ctx.gradients = ctx.gradients, None
        dx, dw = (g if g is None else g.mul_(factor) for g in gradients)
        return dx, dw, None, None, None


def cross_entropy(x, weight, targets, kernel=softmax_gradient):
    """Return the mean loss in nats, float32: hidden states x (N, D), head (V, D), targets (N,), of
    which -100 does not count. kernel: softmax_gradient, or a compiled one."""
    chunks = (targets != -100).nonzero()[:, 0].split(CHUNK)  # nonzero() synchronizes with the GPU
    if torch.is_grad_enabled():
        return ChunkedCrossEntropy.apply(x, weight, targets, chunks, kernel)
    w, total = padded(weight, x.dtype), 0.0
    for positions in chunks:
        logits = at_least_float32((x[positions] @ w.T)[:, :len(weight)])
        total = total + F.cross_entropy(logits, targets[positions], reduction="sum")
    return total / sum(map(len, chunks))


# ------------------------------------------------------------ FP8
# In training, y = x W^T and dx = dy W of the blocks' linear layers in e4m3, W or W + dW (mora.py):
#     x, dy    one scale per token, from its largest entry; the cast fuses with the kernel before it
#     W        one scale per tensor, a power of two with room, so that no step needs a pass over W
# Gradients of weights and evaluation use the computation's dtype; checkpoints hold float32.
# A weight that outgrows its scale is not clipped but becomes NaN: train.py renews scales earlier.

class Float8Products(nn.Module):
    """The two large products of one layer. Compiled code keeps W in e4m3 between them."""

    def __init__(self, scale):
        super().__init__()
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x, weight):
        """y, differentiable in x, and in W if W trains."""
        return Float8Linear.apply(x, weight, self)

    def y(self, x, weight):
        """x W^T in x's dtype, (..., m): x (..., n), W (m, n)."""
        scaled = weight / self.scale
        scaled = torch.where(scaled.abs() <= E4M3_MAX, scaled, torch.nan)
        return multiply_fp8(x, scaled.to(torch.float8_e4m3fn), self.scale.expand(1, len(weight)))

    def dx(self, dy, weight):
        return self.y(dy, weight.T.contiguous())


class Float8Base(Float8Products):
    """The products, in evaluation too, of a frozen weight in e4m3; scale (1, m): per output."""

    def y(self, x, weight):
        return multiply_fp8(x, weight, self.scale)

    def dx(self, dy, weight):
        ones = self.scale.new_ones(1, weight.shape[1])  # dy takes W's scales: they are per output
        return multiply_fp8(dy * self.scale.to(dy.dtype), weight.T.contiguous(), ones)


def quantize_rows(x):
    """(x / scale in e4m3, scale (rows, 1) in float32) of x (rows, columns)."""
    x = x.float()
    scale = x.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / E4M3_MAX
    return (x / scale).to(torch.float8_e4m3fn), scale


def multiply_fp8(x, weight, scale):
    """(..., m) in x's dtype: x (..., n), weight (m, n) in e4m3, scale (1, m) of its rows."""
    rows, row_scale = quantize_rows(x.flatten(0, -2))
    y = torch._scaled_mm(rows, weight.T, scale_a=row_scale, scale_b=scale.contiguous(),
                         out_dtype=torch.bfloat16, use_fast_accum=True)
    return y.to(x.dtype).unflatten(0, x.shape[:-1])


class Float8Linear(torch.autograd.Function):  # y = W x; dW, if W trains, in x's dtype
    @staticmethod
    def forward(ctx, x, weight, products):
        ctx.products = products
        ctx.save_for_backward(weight, x if weight.requires_grad else None)
        return products.y(x, weight)

    @staticmethod
    def backward(ctx, dy):
        (weight, x), dw = ctx.saved_tensors, None
        if x is not None:
            dw = (dy.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype)
        return ctx.products.dx(dy, weight), dw, None


def block_linears(model):
    """{name: layer} of the blocks' linear layers, adapted (mora.py) or not."""
    return {name: module for name, module in model.model.layers.named_modules()
            if hasattr(module, "products")}


def fp8_scales(model):
    """{name: scale, a tensor} of the layers that use_fp8 gave FP8 products."""
    return {name: layer.products.scale for name, layer in block_linears(model).items()
            if type(layer.products) is Float8Products}


def use_fp8(model):
    """Give the blocks' linear layers whose sizes are multiples of 16 FP8 products, in place."""
    for layer in block_linears(model).values():
        if all(size % 16 == 0 for size in layer.weight.shape):
            layer.products = Float8Products(torch.ones((), device=layer.weight.device))
    fit_scales(model)


@torch.no_grad()
def keep_in_fp8(model):
    """Round the blocks' adapted weights to e4m3, with a scale per row, in place: a byte per number.
    Layers whose sizes are no multiples of 16 keep their weights."""
    for layer in block_linears(model).values():
        if hasattr(layer, "merged") and all(size % 16 == 0 for size in layer.weight.shape):
            layer.weight.data, scale = quantize_rows(layer.weight)
            layer.products = Float8Base(scale.T)


@torch.no_grad()
def fit_scales(model, only_if_tight=False):
    """Set the FP8 scales from the largest entries of W + dW. A weight that is not finite gets no
    scale. only_if_tight: leave those alone that still have room."""
    layers, scales, largest = block_linears(model), fp8_scales(model), []
    for name in scales:
        weight = layers[name].merged() if hasattr(layers[name], "merged") else layers[name].weight
        largest.append(weight.abs().max())
    numbers = torch.stack([*scales.values(), *largest]).view(2, -1).T.tolist() if scales else []
    for scale, (before, entry) in zip(scales.values(), numbers, strict=True):  # synchronized once
        is_tight = entry * TIGHT > E4M3_MAX * before
        if math.isfinite(entry) and (is_tight or not only_if_tight):
            scale.fill_(2.0 ** math.ceil(math.log2(max(entry, 1e-2) * ROOM / E4M3_MAX)))


def kernel_choices():
    """torch.compile's choices, but rows of up to 16,384 numbers stay in registers, not 1,024. A
    cast to FP8 reads a row for its largest entry and again to scale it (3.5 % of a 1.3b step)."""
    from torch._inductor.choices import InductorChoices  # here: they load the compiler
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    class LongRows(InductorChoices):
        def uuid(self):
            return "rows of up to 16,384 numbers"  # for the key of torch's cache of kernels

        @staticmethod
        def should_use_persistent_reduction(features, *others):
            is_short = V.graph.sizevars.statically_known_leq(features.reduction_numel, 16_384)
            return (is_short and features.get_reduction_hint() == ReductionHint.INNER
                    or InductorChoices.should_use_persistent_reduction(features, *others))

    return LongRows()
