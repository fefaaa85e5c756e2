"""Train a LLaMA: pretraining, continual pretraining, fine-tuning; full rank, LoRA, MoRA, ReLoRA, ReMoRA.

    torchrun train.py                                                  the tiny MoRA model of configs/tiny_mora.py, 3 minutes on a laptop
    torchrun train.py configs/250m_mora.py --lr=1e-3                   one GPU, or plain `python train.py ...`
    torchrun --nproc_per_node=8 train.py configs/250m_mora.py          8 GPUs, the same experiment
    torchrun train.py configs/gsm8k_mora_r8.py --init_from=PATH        fine-tuning on prompts and responses (sft.py)
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 train.py configs/1.3b_mora.py

`--resume` goes on from the newest checkpoint of the run; `--help` lists the keys.
"""
import dataclasses
import inspect
import json
import math
import os
import platform
import signal
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import data
import mora
import tokenizer
from batches import Batches
from config import UserError, accumulation, command_line, differences, load, write_json
from evaluate import perplexity
from model import Llama, LlamaConfig
from optimizer import build_optimizer, learning_rate
from batches import SampleBatches
from shards import Samples, open_split


def distributed(cfg):
    """(rank, processes, device) of this process; joins torchrun's group if there is one."""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    kind = cfg.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() and world == 1 else "cpu"
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise UserError(f"process {local} of this machine has no GPU: {torch.cuda.device_count()} are here; lower --nproc_per_node, or "
                        "take --device=cpu")
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=device if kind == "cuda" else None)
    return int(os.environ.get("RANK", 0)), world, device


def open_data(cfg, rank, world):
    """The splits (train, val) as Tokens or Samples; the embedded corpus is prepared on the way."""
    folder = Path(cfg.data)
    if rank == 0 and folder.name == "stdlib" and not (folder / "manifest.json").exists():
        data.prepare_stdlib(folder)
    if world > 1:
        dist.barrier()
    return [open_split(folder, split, verify=rank == 0) for split in ("train", "val")]


def build_model(cfg, tokens):
    """(cfg, model without adapters): random weights by seed, or those of init_from, whose shape then replaces the config's."""
    if not cfg.init_from:
        return cfg, Llama(LlamaConfig(vocab_size=tokens.vocab_size, **cfg.model()), seed=cfg.seed)
    model, tok, path = checkpoint.load(cfg.init_from)
    tokens.must_suit(model, tok, path)
    if not tok and os.environ.get("RANK", "0") == "0":
        print(f"note: {path} does not say which tokenizer it speaks; {cfg.data} is written in {tokens.tokenizer}")
    model = mora.merge(model) if mora.adapted_layers(model) else model
    shape = {key: value for key, value in dataclasses.asdict(model.cfg).items() if hasattr(cfg, key)}
    return dataclasses.replace(cfg, **shape), model


def data_parallel(model, device):
    """DDP that leaves buffers alone: they are equal on all ranks, and a broadcast in forward would hang an evaluation."""
    names = inspect.signature(DistributedDataParallel.__init__).parameters  # torch 2.13 renames the argument
    leave = {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None, **leave)


def check_run_folder(cfg, rank):
    """The checkpoint to go on from, or None. Raises UserError rather than mix two runs in a folder, or change one half way."""
    newest = (checkpoint.steps_of(cfg.out) or [None])[-1]
    if newest and not cfg.resume:
        raise UserError(f"{cfg.out} holds a run that reached {newest.name}: go on with --resume, choose another --out=..., or remove it")
    if not newest:
        if cfg.resume and rank == 0:
            print(f"no checkpoint in {cfg.out} yet: starting at step 0")
        return None
    if rank == 0:
        checkpoint.verify(newest)
    before = checkpoint.read_state(newest)["config"]
    fixed = {*cfg.model(), *cfg.adapter(), "method", "seed", "data", "seq_len", "batch_size", "restart_every", "restart_steps",
             "lora_plus_ratio"}
    fixed.discard("max_position_embeddings")
    now = json.loads(json.dumps(dataclasses.asdict(cfg)))
    changed = [f"{key} was {before[key]!r}, now {now[key]!r}" for key in sorted(fixed) if before[key] != now[key]]
    if changed:
        raise UserError(f"{newest} is of another experiment: {'; '.join(changed)}")
    return newest


def prepare_model(cfg, model, device, cycle):
    """Adapters, device, precision, compilation, in this order and in place; returns the optimizer."""
    if cfg.adapter():
        try:
            mora.adapt(model, **cfg.adapter(), cycle=cycle)
        except ValueError as error:
            raise UserError(error)
    if cfg.base_dtype == "bfloat16":
        updates = {parameter for _, parameter in mora.adapter_parameters(model)}  # a frozen A among them
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter not in updates:
                parameter.data = parameter.data.bfloat16()
    model.to(device)
    half = cfg.dtype == "bfloat16" or cfg.dtype == "auto" and device.type == "cuda"
    model.compute_dtype = torch.bfloat16 if half else torch.float32
    if cfg.compile == "on" or cfg.compile == "auto" and device.type == "cuda":
        model.compile_parts()
    return build_optimizer(cfg, model, device)


def next_step(model, batch, accumulate, device):
    """Forward and backward of one step's micro-batches; returns the mean loss of this process, a tensor.

    batch: (inputs, targets) by micro-batch, or (inputs, targets, weights): of a mean over tokens that are not equally many.
    """
    loss = torch.zeros((), device=device)
    for i, (inputs, targets, *weight) in enumerate(zip(*batch)):
        model.require_backward_grad_sync = i == accumulate - 1  # DDP: gradients meet once, in the last micro-step
        part = model(inputs, targets) * (weight[0] if weight else 1) / accumulate
        part.backward()
        loss += part.detach()
    return loss


def stop_if_not_finite(losses, norms, step, cfg):
    """Raise UserError at the first step, of those that end with `step`, whose loss or gradient norm is not finite."""
    for i, (loss, norm) in enumerate(zip(losses, norms), step - len(losses) + 1):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            good = (checkpoint.steps_of(cfg.out) or ["none yet"])[-1]
            raise UserError(f"step {i}: loss {loss}, gradient norm {norm}. Stopped; the last good checkpoint is {good}. "
                            f"Go on from it with --resume and a lower --lr (now {cfg.lr:g}), a longer --warmup ({cfg.warmup}) or a "
                            f"smaller --grad_clip ({cfg.grad_clip:g})")


def train(cfg):
    rank, world, device = distributed(cfg)
    micro, accumulate = accumulation(cfg, world)
    tokens, val_tokens = open_data(cfg, rank, world)
    tok = tokenizer.load(tokens.tokenizer, tokens.folder)
    make = SampleBatches if isinstance(tokens, Samples) else Batches
    batches = make(tokens, cfg.seed, cfg.seq_len, cfg.batch_size, micro, device, rank, world)
    if cfg.epochs:
        cfg = dataclasses.replace(cfg, steps=max(1, round(cfg.epochs * batches.steps_an_epoch)))

    # the model, new or as the newest checkpoint left it
    cfg, model = build_model(cfg, tokens)
    newest = check_run_folder(cfg, rank)
    cycle = checkpoint.read_state(newest)["cycle"] if newest else 0
    optimizer = prepare_model(cfg, model, device, cycle)
    start = checkpoint.resume(newest, model, optimizer)["step"] if newest else 0
    parallel = data_parallel(model, device) if world > 1 else model
    trainable = [p for p in model.parameters() if p.requires_grad]

    log = Log(cfg, rank, header(cfg, model, device, world, micro, accumulate, start, batches))
    window, clock = [], time.time()
    asked, stopping = stop_on_signal(), False

    # one round more than there are steps, so that the last save and evaluation are the ordinary ones
    for step in range(start, cfg.steps + 1):
        done, pause = step == cfg.steps, time.time()
        if step > start and (step % cfg.save_every == 0 or done or stopping) and rank == 0:
            checkpoint.save(cfg, step, cycle, model, optimizer, tok)
        if stopping:
            break
        if step % cfg.eval_every == 0 or done:
            scores = perplexity(model, val_tokens, cfg.seq_len, micro, rank, world, cfg.eval_tokens)
            log(step, f"validation: loss {scores['loss']:.4f}   perplexity {scores['ppl']:.2f}   bits per byte {scores['bits_per_byte']:.4f}",
                **{f"val_{key}": value for key, value in scores.items()})
        if done:
            break

        # ReLoRA, ReMoRA: a cycle is over, its update joins the weights
        if cfg.cycle(step)[0] > cycle:
            cycle = cfg.cycle(step)[0]
            report = mora.restart(model, optimizer, cycle, cfg.seed, cfg.restart_keep)
            log(step, f"restart {cycle}: merged an update of norm {report['update_norm']:.4g}, {'pruned' if cfg.restart_keep else 'dropped'} "
                f"{report['states']} optimizer states", restart=cycle, **report)
        clock += time.time() - pause

        # one step at this step's learning rate
        if cfg.dropout:  # masks are a function of the step, so that a resumed run draws the same
            torch.manual_seed((cfg.seed * 1_000_003 + step) * world + rank)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg) * group["ratio"]
        loss = next_step(parallel, batches(step), accumulate, device)
        norm = torch.nn.utils.clip_grad_norm_(trainable, cfg.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        window.append(torch.stack((loss, norm)))

        # look at the numbers now and then, and always before they are saved; all ranks see the same and stop together
        now = step + 1
        if now % cfg.log_every == 0 or now % cfg.save_every == 0 or now == cfg.steps or world == 1 and asked.is_set():
            losses, norms, stopping = agreed(window, asked.is_set(), world)
            stop_if_not_finite(losses, norms, now, cfg)
            spent = time.time() - clock
            speed, left = sum(batches.size(now - 1 - i) for i in range(len(losses))) / spent, (cfg.steps - now) * spent / len(losses)
            mean, lr = sum(losses) / len(losses), learning_rate(step, cfg)
            log(now, f"loss {mean:.4f}   lr {lr:.2e}   norm {norms[-1]:.2f}   {speed:,.0f} tokens/s   {duration(left)} left",
                loss=mean, lr=lr, grad_norm=norms[-1], tokens_per_s=speed)
            window, clock = [], time.time()
    log.close(step, stopping, tokens.kind)


def agreed(window, asked, world):
    """(losses, gradient norms, stop?) of the steps in the window: means over ranks, and whether any rank was asked to stop.

    All ranks get the same.
    """
    numbers = torch.cat((torch.stack(window).T.flatten(), torch.full_like(window[0][:1], float(asked))))
    if world > 1:
        dist.all_reduce(numbers)
    *numbers, stopping = (numbers / world).tolist()
    return numbers[:len(window)], numbers[len(window):], stopping > 0


def stop_on_signal():
    """An event that Ctrl-C (or a cluster's SIGTERM) sets: the loop then saves and stops."""
    stop = threading.Event()
    if threading.current_thread() is threading.main_thread():
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda *_: stop.set())
    return stop


def duration(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def header(cfg, model, device, world, micro, accumulate, start, batches):
    """The first record of a run in log.jsonl: what ran where."""
    count = lambda parameters: sum(p.numel() for p in parameters)
    return {"config": dataclasses.asdict(cfg), "start": start, "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "torch": torch.__version__, "python": platform.python_version(), "processes": world, "micro_batch": micro, "accumulate": accumulate,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads",
            "dtype": str(model.compute_dtype).removeprefix("torch."),
            "trainable_parameters": count(p for p in model.parameters() if p.requires_grad),
            "parameters": count(model.parameters()), "tokens_per_step": batches.tokens_a_step, "step_is": batches.says}


class Log:
    """One call a line: aligned for people on rank 0, and as JSON in the run's log.jsonl (and to wandb or TensorBoard, if asked)."""

    def __init__(self, cfg, rank, head):
        self.cfg, self.speaks, self.also = cfg, rank == 0, None
        if not self.speaks:
            return
        out = Path(cfg.out)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "config.json", head["config"])
        self.file = open(out / "log.jsonl", "a", buffering=1)
        self.file.write(json.dumps(head) + "\n")
        print(f"{cfg.out}: {', '.join(f'{key}={value}' for key, value in differences(cfg).items())}")
        print(f"{head['trainable_parameters']:,} of {head['parameters']:,} parameters train on {head['processes']} x {head['device']}, "
              f"{head['dtype']}; a step is {head['step_is']} in "
              f"{head['accumulate']} x {head['micro_batch']} sequences a process")
        try:
            if cfg.log_to == "wandb":
                import wandb
                wandb.init(project="mora", name=out.name, config=head["config"], dir=cfg.out)
                self.also = wandb.log
            elif cfg.log_to == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter
                writer = SummaryWriter(cfg.out)
                self.also = lambda values, step: [writer.add_scalar(key, value, step) for key, value in values.items()]
        except ImportError:
            raise UserError(f"log_to={cfg.log_to} needs a package that is not installed: pip install {cfg.log_to}")

    def __call__(self, step, line, **values):
        if self.speaks:
            print(f"{step:>{len(str(self.cfg.steps))}}/{self.cfg.steps}   {line}", flush=True)
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            if self.also:
                self.also(values, step=step)

    def close(self, step, stopped, kind):
        """Say what comes next; a run that was stopped ends with exit status 130."""
        if not self.speaks:
            return
        self.file.close()
        if stopped and step < self.cfg.steps:
            print(f"stopped and saved at step {step}: the same command with --resume goes on")
            raise SystemExit(130)
        adapted = self.cfg.method in ("lora", "mora")
        model = f"{self.cfg.out}/merged" if adapted else self.cfg.out
        print("\ndone; next:")
        prompt = "def " if Path(self.cfg.data).name == "stdlib" else "The"
        then = f"evaluate.py {model} {self.cfg.data} --answers" if kind == "samples" else f'sample.py {model} --prompt="{prompt}"'
        print(f"  python merge.py {self.cfg.out}\n" * adapted + f"  python {then}")


def main(argv):
    try:
        train(load(argv, default=Path(__file__).parent / "configs" / "tiny_mora.py"))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    command_line(main)
