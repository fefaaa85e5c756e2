"""A LLaMA-like transformer: RMSNorm, SwiGLU, RoPE, grouped-query attention. It has never heard of adapters.

Names and shapes of its state dict are those of Hugging Face's LlamaForCausalLM, so a checkpoint IS a Hugging Face
checkpoint. Parameters stay in float32; the computation runs in `model.compute_dtype` (set it to bfloat16 on a GPU),
norms and losses in float32.

Letters in shape comments: B sequences, T positions, D hidden_size, H heads, Hk key/value heads, Dh head size, V vocabulary.
"""
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

CHUNK = 4096  # tokens: at a vocabulary of 50k, 400 MB of bfloat16 logits


def padded(weight, dtype):
    """(V, D) -> (V rounded up to a multiple of 64, D) in dtype: matrix units want it (50257 -> 50304), the parameter does not change."""
    missing = -len(weight) % 64
    return F.pad(weight.to(dtype), (0, 0, 0, missing)) if missing else weight.to(dtype)  # F.pad copies even when there is nothing to add


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def counting(targets):
    """Positions of the targets that count, chunk by chunk. How many there are the device is asked, and the head sees no others."""
    return (targets != -100).nonzero()[:, 0].split(CHUNK)


def softmax_gradient(logits, targets, vocab_size, scale):
    """(sum of the chunk's losses, scale * its gradient in the logits' dtype); columns from vocab_size on are no tokens."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    wide = at_least_float32(logits).masked_fill(columns >= vocab_size, -torch.inf)
    log_sum = wide.logsumexp(dim=-1)
    loss = (log_sum - wide.gather(1, targets[:, None])[:, 0]).sum()
    gradient = ((wide - log_sum[:, None]).exp() - (columns == targets[:, None]).to(wide)) * scale
    return loss, gradient.to(logits.dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, kernel):
        wants_dx, wants_dw = ctx.needs_input_grad[:2]
        w, chunks = padded(weight, x.dtype), counting(targets)
        loss = torch.zeros((), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        scale = torch.full_like(loss, sum(map(len, chunks))).reciprocal()
        dx = torch.zeros_like(x) if wants_dx else None
        dw = torch.zeros(w.shape, device=x.device, dtype=weight.dtype) if wants_dw else None
        for at in chunks:
            rows = x[at]
            part, gradient = kernel(rows @ w.T, targets[at], len(weight), scale)
            loss += part
            if wants_dx:
                dx[at] = gradient @ w
            if wants_dw and dw.is_cuda and dw.dtype != w.dtype:  # the sum over chunks in the product itself, in float32
                torch.addmm(dw, gradient.T, rows, out_dtype=dw.dtype, out=dw)
            elif wants_dw:
                dw += gradient.T @ rows
        ctx.gradients = dx, dw[:len(weight)] if wants_dw else None
        return loss * scale

    @staticmethod
    def backward(ctx, factor):
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss gives its gradients away once: call backward once, or compute the loss again")
        (dx, dw), ctx.gradients = ctx.gradients, None
        return dx.mul_(factor) if dx is not None else None, dw.mul_(factor) if dw is not None else None, None, None


def cross_entropy(x, weight, targets, kernel=softmax_gradient):
    """Mean loss in nats, float32, of hidden states x (N, D), head weight (V, D) and targets (N,); a target of -100 does not count.

    kernel: softmax_gradient, or a compiled one.
    """
    if torch.is_grad_enabled():
        return ChunkedCrossEntropy.apply(x, weight, targets, kernel)
    w, chunks = padded(weight, x.dtype), counting(targets)
    parts = [F.cross_entropy(at_least_float32((x[at] @ w.T)[:, :len(weight)]), targets[at], reduction="sum") for at in chunks]
    return torch.stack(parts).sum() / sum(map(len, chunks))


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


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * wide).to(x.dtype)


class Linear(nn.Linear):
    """A linear layer without bias that computes in its input's dtype; its weight stays in float32."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def rope(start, length, cfg, device):
    """Cosines and sines of the rotary angles of positions start ... start + length - 1: two (length, Dh), float32."""
    frequencies = cfg.rope_theta ** (-torch.arange(0, cfg.head_dim, 2, device=device, dtype=torch.float32) / cfg.head_dim)
    if cfg.rope_scaling:
        frequencies = stretch(frequencies, **cfg.rope_scaling)
    angles = torch.arange(start, start + length, device=device, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def stretch(frequencies, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    """LLaMA-3's rope scaling: slow frequencies are divided by `factor`, fast ones stay, those between are blended."""
    turns = frequencies * original_max_position_embeddings / (2 * torch.pi)  # full turns within the original context
    share = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequencies * (share + (1 - share) / factor)


def rotate(x, cos, sin):
    """Rotate the pairs (j, j + Dh/2) of every head: Hugging Face's order of RoPE. x is (B, heads, T, Dh)."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Past:
    """A layer's keys and values so far, (B, Hk, T, Dh) each, with room for more: appending one token copies that token alone."""
    room = 128

    def __init__(self):
        self.length, self.both = 0, None

    def append(self, k, v):
        """All keys and all values, these being the last."""
        start, self.length = self.length, self.length + k.shape[2]
        if not start or self.length > self.both.shape[3]:
            before, self.both = self.both, k.new_empty(2, *k.shape[:2], self.length + self.room, k.shape[3])
            if start:
                self.both[:, :, :, :start] = before[:, :, :, :start]
        self.both[0, :, :, start:self.length], self.both[1, :, :, start:self.length] = k, v
        return self.both[:, :, :, :self.length]

    def keep(self, rows):
        """Forget all sequences but these."""
        self.both = self.both[:, rows]


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
        """x (B, T, D) -> (B, T, D). `past` is the layer's key/value cache: read, and extended by x."""
        def heads(y):  # (B, T, heads * Dh) -> (B, heads, T, Dh)
            return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q = rotate(heads(self.q_proj(x)), cos, sin)
        k = rotate(heads(self.k_proj(x)), cos, sin)
        v = heads(self.v_proj(x))
        if past is not None:
            k, v = past.append(k, v)
        if past is None or q.shape[2] > 1:  # a whole sequence: each position sees what lies before it
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        else:  # one new token sees all that is cached; as a sequence of the queries that share keys, so that no key is copied
            y = F.scaled_dot_product_attention(q.reshape(*k.shape[:2], -1, self.head_dim), k, v).reshape(q.shape)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

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


class Body(nn.Module):
    """Embeddings, blocks and the last norm: the part that Hugging Face calls `model`."""

    def __init__(self, cfg):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)


class Llama(nn.Module):
    def __init__(self, cfg, seed=None, residual_init=False):
        """Weights are drawn from N(0, 0.02) with a generator of its own (seed), or left as torch draws them (None).

        residual_init: o_proj and down_proj, which write into the residual stream, from N(0, 0.02 / sqrt(2 layers)).
        """
        super().__init__()
        self.cfg = cfg
        self.compute_dtype, self.loss_kernel = torch.float32, softmax_gradient
        self.model = Body(cfg)
        self.lm_head = None if cfg.tie_word_embeddings else Linear(cfg.hidden_size, cfg.vocab_size)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            for name, weight in self.named_parameters():
                std = 0.02
                if residual_init and ("o_proj" in name or "down_proj" in name):
                    std = 0.02 / (2 * cfg.num_hidden_layers) ** 0.5
                if weight.ndim == 2:
                    nn.init.normal_(weight, 0.0, std, generator=generator)

    def forward(self, ids, targets=None, cache=None):
        """Logits (B, T, V) in float32 of ids (B, T), or with targets (B, T) their mean cross-entropy in nats.

        A target of -100 does not count. The product with the vocabulary is padded for speed, the parameter is not (loss.padded): a
        token that does not exist has no logit, no share of the softmax and no row in a checkpoint. `cache` (see new_cache) holds
        what came before ids, and is extended by them: whole sequences when it is empty, one token at a time afterwards.
        """
        x = self.hidden(ids, cache)
        if targets is None:
            return self.logits(x)
        return cross_entropy(x.flatten(0, 1), self.head(), targets.flatten(), self.loss_kernel)

    def hidden(self, ids, cache=None):
        """What the head sees, (B, T, D)."""
        cos, sin = rope(cache[0].length if cache else 0, ids.shape[1], self.cfg, ids.device)
        x = self.model.embed_tokens(ids).to(self.compute_dtype)  # (B, T, D)
        for i, block in enumerate(self.model.layers):
            x = block(x, cos, sin, cache[i] if cache is not None else None)
        return self.model.norm(x)

    def logits(self, x):
        """(..., D) -> (..., V), float32."""
        return F.linear(x, padded(self.head(), x.dtype))[..., :self.cfg.vocab_size].float()

    def head(self):
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def compile_parts(self):
        """torch.compile each block and the loss's kernel, in place. Blocks are alike: one compilation serves all.

        The first length of sequences is compiled as it is; when another comes, as samples bring it, one more compilation serves every length.
        """
        for block in self.model.layers:
            block.compile()
        self.loss_kernel = torch.compile(softmax_gradient)
        # the first block's input gets a gradient as the others' do, or with frozen embeddings it would be compiled for itself
        self.model.embed_tokens.register_forward_hook(lambda _, ids, x: x.requires_grad_() if torch.is_grad_enabled() and x.is_leaf else x)

    def new_cache(self):
        """An empty key/value cache, for forward(..., cache=...)."""
        return [Past() for _ in self.model.layers]
