"""How the parameters learn: groups, the learning rate, AdamW and Muon, one optimizer step.

    matrices    the update's (M; LoRA's A and B), in full rank the blocks': rate lr, AdamW or Muon
    the rest    embeddings, head, norms: rate rest_lr (0: lr), always by AdamW (DoRA's lengths: lr)

Every rate follows one schedule, learning_rate(step, cfg), a pure function. A group has a fixed
ratio to it: rest_lr / lr for the rest, lora_plus_ratio for LoRA's B (LoRA+, arXiv 2402.12354).
"""
import math

import torch
from torch.nn import functional as F

import mora

MUON_MOMENTUM = 0.95
BATCH_ELEMENTS = 2 ** 26  # largest batch of matrices that is orthogonalized at once


def learning_rate(step, cfg):
    """Return the learning rate of a step: warm-up, then a cosine or a line to min_lr_ratio * lr;
    after a later restart a short linear one from near 0 back to that curve (ReLoRA's schedule)."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    rise, restarted = 1.0, cfg.cycle(step)[1]
    if restarted >= max(1, cfg.warmup) and step - restarted < cfg.restart_warmup:
        rise = (step - restarted + 1) / cfg.restart_warmup
        step = restarted + cfg.restart_warmup  # the line ends where the curve goes on
    progress = min(1.0, (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))
    curve = 1 - progress if cfg.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return cfg.lr * rise * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * curve)


def build_optimizer(cfg, model, device):
    """Return the optimizer of all parameters that require a gradient. Its parameter groups have two
    keys that torch does not know: "ratio", to the schedule's rate, and "muon"."""
    groups, uses_muon = {}, cfg.optimizer == "muon"
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_vector, is_update = parameter.ndim < 2, ".update." in name
        has_own_ratio = is_update and name.endswith(".B") and cfg.lora_plus_ratio != 1  # LoRA's B
        is_rest = not is_update and (is_vector or "embed_tokens" in name or "lm_head" in name)
        ratio = cfg.lora_plus_ratio if has_own_ratio else 1.0
        if is_rest and cfg.rest_lr:
            ratio = cfg.rest_lr / cfg.lr
        settings = {"weight_decay": 0.0 if is_vector else cfg.weight_decay, "ratio": ratio,
                    "muon": uses_muon and not is_rest and not is_vector}
        # rates may become equal in a resumed run: they choose no group, so optimizer.pt still fits
        key = (is_vector, has_own_ratio, is_rest and (cfg.rest_lr > 0 or uses_muon))
        groups.setdefault(key, {"params": [], **settings})["params"].append(parameter)
    return AdamWMuon([groups[key] for key in sorted(groups)], lr=cfg.lr,  # optimizer.pt's order
                     betas=(cfg.beta1, cfg.beta2), fused=device.type == "cuda")


class AdamWMuon(torch.optim.AdamW):
    """AdamW, but groups with muon = True take Muon's step (Keller Jordan, 2024): Nesterov momentum,
    then orthogonalization. An update is scaled by 0.2 sqrt(max(rows, columns)), so that its root
    mean square is AdamW's (Moonlight, arXiv 2502.16982) and both take the same rates. The step is
    torch.optim.Muon's with match_rms_adamw; matrices of one shape are one batch, for speed."""

    @torch.no_grad()
    def step(self):
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self.muon_step(group)

    def muon_step(self, group):
        parameters = [p for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        for p in parameters:
            self.state[p] = self.state[p] or {"momentum": torch.zeros_like(p)}
        momenta = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MUON_MOMENTUM)
        torch._foreach_lerp_(gradients, momenta, MUON_MOMENTUM)  # now the steps' directions
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        shapes = {}
        for p in parameters:
            shapes.setdefault(p.shape, []).append(p)
        for shape, alike in shapes.items():
            scale, count = 0.2 * max(shape) ** 0.5, max(1, BATCH_ELEMENTS // shape.numel())
            for first in range(0, len(alike), count):
                batch = alike[first:first + count]
                updates = orthogonalize([mora.whole(p.grad) for p in batch])
                updates = [mora.as_sharded(u, p) for u, p in zip(updates, batch, strict=True)]
                torch._foreach_add_(batch, updates, alpha=-group["lr"] * scale)


def orthogonalize(matrices):
    """Return matrices of one shape with their singular values moved to about 1, in float32.
    Five Newton-Schulz steps, in bfloat16 on a GPU (float32 elsewhere, where equal runs must agree
    to rounding). Rows and columns are padded with zeros to multiples of 8, for matrix units."""
    rows, columns = matrices[0].shape
    x = torch.stack(matrices)
    x = x.bfloat16() if x.is_cuda else x
    x = F.pad(x, (0, -columns % 8, 0, -rows % 8))
    x = x.mT if rows > columns else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    a, b, c = 3.4445, -4.7750, 2.0315  # Keller Jordan's quintic, torch.optim.Muon's default
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    x = x.mT if rows > columns else x
    return list(x[:, :rows, :columns].to(matrices[0].dtype))


def optimizer_step(model, optimizer, batch, rate, grad_clip=0.0):
    """Take one step at a learning rate; return (loss, gradient norm before clipping), a tensor.
    batch: see batches.py. The loss is this process's mean. grad_clip 0: no clipping."""
    loss = accumulate_gradients(model, batch)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = mora.whole(torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf))
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]
    optimizer.step()
    optimizer.zero_grad()
    return torch.stack((loss, norm))


def accumulate_gradients(model, batch):
    """Run forward and backward of every micro-batch; return the mean loss, a tensor.
    batch: see batches.py. DDP all-reduces the gradients once, in the last micro-batch. FSDP
    scatters those of each: their sum would be whole on every rank."""
    count, loss = len(batch[0]), 0.0
    for i, (inputs, targets, *weight) in enumerate(zip(*batch, strict=True)):
        model.require_backward_grad_sync = i == count - 1
        part = model(inputs, targets) / count * (weight[0] if weight else 1)
        part.backward()
        loss = loss + part.detach()
    return loss
