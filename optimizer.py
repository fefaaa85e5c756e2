"""Which parameter learns how, and at which rate: parameter groups, schedule, one optimizer step."""
import math

import torch

import mora


def learning_rate(step, cfg):
    """The rate of a step, a pure function: warm-up, then a cosine or a line to min_lr_ratio * lr; after a restart, a short warm-up back to it."""
    def long(at):
        progress = (at - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
        if cfg.schedule == "linear":
            return 1 - (1 - cfg.min_lr_ratio) * progress
        return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) / 2 * (1 + math.cos(math.pi * progress))

    _, restarted = cfg.cycle(step)
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    if restarted and step - restarted < cfg.restart_warmup:
        return cfg.lr * (step - restarted + 1) / cfg.restart_warmup * long(restarted + cfg.restart_warmup)
    return cfg.lr * long(step)


def build_optimizer(cfg, model, device):
    """AdamW over what trains; weight decay on matrices only. A group learns at `ratio` times the rate of the step: LoRA+'s is B's."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    faster = {p for name, p in mora.adapter_parameters(model) if name.endswith(".B") and cfg.lora_plus_ratio != 1}
    groups = [{"params": [p for p in parameters if p.ndim >= 2 and p not in faster], "weight_decay": cfg.weight_decay, "ratio": 1.0},
              {"params": [p for p in parameters if p in faster], "weight_decay": cfg.weight_decay, "ratio": cfg.lora_plus_ratio},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, "ratio": 1.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=device.type == "cuda")
