"""Train a LLaMA: pretraining, fine-tuning; full rank, LoRA, MoRA, ReLoRA, ReMoRA.

    torchrun train.py                                    configs/tiny_mora.py: 2 minutes on 2 cores
    torchrun train.py configs/250m_mora.py --lr=1e-3     one GPU, or plain `python train.py ...`
    torchrun --nproc_per_node=8 train.py configs/250m_mora.py      8 GPUs, the same experiment
    torchrun train.py configs/gsm8k.py mora_r8 --init_from=PATH    fine-tuning, one of its variants

`--resume` continues a run from its newest checkpoint. `--help` lists the keys.
"""
import contextlib
import dataclasses
import datetime
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from pathlib import Path

import config  # first, so that Ctrl-C ends imports; isort: skip

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import data
import mora
import tokenizer
from batches import Batches, SampleBatches
from config import UserError, as_user_error, need
from evaluate import perplexity
from model import Llama, LlamaConfig, block_linears, fit_scales, keep_in_fp8, use_fp8
from optimizer import build_optimizer, learning_rate, optimizer_step
from shards import Samples, fingerprint, open_split

# keys that a resumed run may not change, beside the model's shape and the adapters' settings
FIXED = ("method", "seed", "seq_len", "batch_size", "init_from", "restart_every", "restart_steps",
         "lora_plus_ratio", "optimizer", "rest_lr", "residual_init", "base_dtype")


def train(cfg):
    """Run one experiment, or what is left of it; return the model."""
    rank, world, device = join_processes(cfg)
    tokens, val_tokens = open_data(cfg, rank, world)
    tok = tokenizer.load(tokens.tokenizer, tokens.folder)
    cfg, batches = make_batches(cfg, tokens, device, rank, world)

    # the model, new or as the newest checkpoint left it
    cfg, model = build_model(cfg, tokens)
    newest, cycle = check_run_folder(cfg, rank)
    if world > 1:  # machines with folders of their own would train on other steps or tokens
        mine, all_of_them = (cfg, str(newest), fingerprint(cfg.data)), [None] * world
        dist.all_gather_object(all_of_them, mine)
        need(len({*all_of_them}) == 1, "the processes differ in their keys, in the newest "
             f"checkpoint in {cfg.out} or in the tokens in {cfg.data}: share these folders")
    optimizer = prepare_model(cfg, model, device, cycle)
    first_step = checkpoint.resume(newest, model, optimizer)["step"] if newest else 0
    parallel = data_parallel(model) if world > 1 and not cfg.shard else model
    log = Log(cfg, rank, header(cfg, model, device, world, first_step, batches))
    signals, stopping = stop_on_signal(), False
    numbers, started = [], time.time()  # (loss, gradient norm) of the steps since the last log line

    # one round more than there are steps, so that the last save and evaluation are ordinary ones
    for step in range(first_step, cfg.steps + 1):
        last, paused, scores = step == cfg.steps, time.time(), {}
        if last or step % cfg.eval_every == 0 and (cfg.keep_best or not stopping):
            checkpoint.must_be_finite(model.state_dict(), checkpoint.diverged, cfg, step)
            scores = perplexity(model, val_tokens, cfg.seq_len, batches.micro_batch, rank, world,
                                cfg.eval_tokens)
            log.scores(step, scores)
        if step > first_step and (step % cfg.save_every == 0 or last or stopping):
            checkpoint.save(cfg, step, cycle, model, optimizer, tok, scores.get("loss"))
        if last or stopping:
            break

        # ReLoRA, ReMoRA: a cycle is over, its update joins the weights
        if cfg.cycle(step)[0] > cycle:
            cycle = cfg.cycle(step)[0]
            report = mora.restart(model, optimizer, cycle, cfg.seed, cfg.restart_keep)
            log.restart(step, cycle, report)
            fit_scales(model)
        started += time.time() - paused  # so that tokens/s are those of training alone

        if cfg.dropout:  # masks are a function of the step, so a resumed run draws the same
            torch.manual_seed((cfg.seed * 1_000_003 + step) * world + rank)
        rate, done = learning_rate(step, cfg), step + 1
        numbers.append(optimizer_step(parallel, optimizer, batches(step), rate, cfg.grad_clip))
        if done % 10 == 0:  # long before a weight outgrows its FP8 scale
            fit_scales(model, only_if_tight=True)

        # read the numbers now and then, always before a save; all ranks read and stop alike
        if (done % cfg.log_every == 0 or done % cfg.save_every == 0 or done == cfg.steps
                or world == 1 and signals):
            losses, norms, stopping = agree(numbers, bool(signals), world, done, cfg)
            log.steps(done, losses, norms, rate, time.time() - started, batches)
            numbers, started = [], time.time()
    log.close(step, stopping, tokens.manifest["kind"])
    return model


def join_processes(cfg):
    """Join torchrun's group if there is one; return (rank, number of processes, device)."""
    rank, local, world = (
        config.number(name, config.to_number(os.environ.get(name, least)), int, least)
        for name, least in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    need(rank < world, f"RANK {rank} is not below WORLD_SIZE {world}: unset both or use torchrun")
    gpus, mps = torch.cuda.device_count(), torch.backends.mps.is_available() and world == 1
    kind = cfg.device.replace("auto", "cuda" if gpus else ("mps" if mps else "cpu"))
    if cfg.shard and world == 1:
        print("note: shard has no effect on one process: start more with torchrun --nproc_per_node")
    need(kind != "mps" or mps, "device mps is one process on a Mac: take --device=cpu or another")
    device, gpu = torch.device(kind), None
    if kind == "cuda":
        need(local < gpus, f"process {local} of this machine has no GPU, it has {gpus}: lower "
             "--nproc_per_node, or take --device=cpu")
        device = gpu = torch.device(kind, local)
        torch.cuda.set_device(device)
    if world > 1:
        with as_user_error(f"the {world} processes cannot meet", ValueError, dist.DistError):
            dist.init_process_group("nccl" if gpu else "gloo", device_id=gpu)
    return rank, world, device


def open_data(cfg, rank, world):
    """Return the splits (train, val); prepares data/stdlib if it is missing."""
    folder = Path(cfg.data)
    if rank == 0 and folder.name == "stdlib" and not (folder / "manifest.json").exists():
        data.prepare_stdlib(folder)
    if world > 1:
        dist.barrier()
    return [open_split(folder, split, verify=rank == 0) for split in ("train", "val")]


def make_batches(cfg, tokens, device, rank, world):
    """Return (cfg with epochs turned into steps, batches); print what is odd in the schedule."""
    micro_batch = config.micro_batch_size(cfg, world)
    kind = SampleBatches if isinstance(tokens, Samples) else Batches
    batches = kind(tokens, cfg.seed, cfg.seq_len, cfg.batch_size, micro_batch, device, rank, world)
    if cfg.epochs:
        cfg = dataclasses.replace(cfg, steps=max(1, round(cfg.epochs * batches.steps_per_epoch)))
    for note in (config.schedule_warnings(cfg) if rank == 0 else ()):
        print(f"note: {note}")
    return cfg, batches


def build_model(cfg, tokens):
    """Return (cfg, model without adapters): random weights by seed, or those of init_from."""
    if not cfg.init_from:
        shape = LlamaConfig(vocab_size=tokens.vocab_size, **cfg.model())
        return cfg, Llama(shape, cfg.seed, cfg.residual_init)
    model, tok, path = checkpoint.load(cfg.init_from)
    tokens.must_suit(model, tok, path)
    model = mora.merge(model) if mora.adapted_layers(model) else model
    shape = {k: v for k, v in dataclasses.asdict(model.cfg).items() if hasattr(cfg, k)}
    notes = [f"{key} {value}" for key, value in shape.items()
             if getattr(cfg, key) not in (value, config.FIELDS[key].default)]
    if cfg.seq_len > model.cfg.max_position_embeddings:
        notes.append(f"{model.cfg.max_position_embeddings} positions, seq_len is {cfg.seq_len}")
    if not tok:
        notes.append(f"no name of its tokenizer, {cfg.data} has {tokens.tokenizer}")
    if notes and os.environ.get("RANK", "0") == "0":
        print(f"note: the model in {path} has {'; '.join(notes)}")
    return dataclasses.replace(cfg, **shape), model


def check_run_folder(cfg, rank):
    """Return (checkpoint to continue from, its cycle) or (None, 0); refuse to mix two runs."""
    for leftover in (Path(cfg.out).glob(".*ing-step-*") if rank == 0 else ()):
        shutil.rmtree(leftover)  # a process was killed while it saved or removed a step
    steps = checkpoint.steps_of(cfg.out)
    if not steps:
        need(not list(Path(cfg.out).glob("model.safetensors*")), f"{cfg.out} holds a model, whose "
             "config.json the run would replace: choose another --out=...")
        for path in Path(cfg.out, "_").resolve().parents:  # out itself and the folders around it
            need(path not in checkpoint.steps_of(path.parent), f"{cfg.out} lies in {path}, which "
                 "its own run may remove (see --keep): choose another --out=...")
        if cfg.resume and rank == 0:
            print(f"no checkpoint in {cfg.out} yet: starting at step 0")
        return None, 0
    newest = steps[-1]
    need(cfg.resume, f"{cfg.out} holds a run that reached {newest.name}: continue it with "
         "--resume, choose another --out=..., or remove it")
    if rank == 0:
        checkpoint.verify(newest)
    state = checkpoint.read_state(newest)
    before, now = state["config"], json.loads(json.dumps(dataclasses.asdict(cfg)))
    with contextlib.suppress(OSError):  # one folder has many names; "" is none
        if os.path.samefile(before["init_from"], now["init_from"]):
            now["init_from"] = before["init_from"]
    fixed = {*FIXED, *cfg.model(), *cfg.adapter(), *(["eval_tokens"] if cfg.keep_best else [])}
    changes = {key: f"{key} was {before[key]!r}, now {now[key]!r}" for key in sorted(now)
               if now[key] != before[key] and key not in ("out", "resume")}
    changed = [change for key, change in changes.items() if key in fixed]
    if state["corpus"] != fingerprint(cfg.data):  # the folder's name may be spelled in many ways
        changed.append(changes.get("data", f"the tokens in {cfg.data} changed since"))
    need(not changed, f"{newest} is of another experiment: {'; '.join(changed)}")
    need(state["step"] <= cfg.steps, f"{newest} is past the last step: steps is {cfg.steps}; take "
         f"--steps={state['step']} or more")
    if changes and rank == 0:
        print(f"note: since {newest.name} {'; '.join(changes.values())}")
    return newest, state["cycle"]


def prepare_model(cfg, model, device, cycle):
    """Adapt, set dtypes, shard, move, set FP8, compile, in this order; return the optimizer."""
    on_gpu, options = device.type == "cuda", cfg.adapter()
    half = cfg.dtype == "bfloat16" or cfg.dtype == "auto" and on_gpu
    model.compute_dtype = torch.bfloat16 if half else torch.float32
    with as_user_error(f"method {cfg.method}", ValueError):
        if options:
            mora.adapt(model, **options, cycle=cycle)
    model.checkpoint_blocks = cfg.checkpoint_blocks
    if cfg.matmul == "fp8" or cfg.base_dtype == "float8":  # a CPU emulates it, for tests
        has_fp8 = not on_gpu or torch.cuda.get_device_capability(device) >= (8, 9)
        need(has_fp8 and device.type != "mps", "FP8 needs a GPU of compute capability 8.9 or more "
             f"(Ada, Hopper), {device} has less: leave out --matmul=fp8, --base_dtype=float8")
    if cfg.base_dtype == "float8":
        keep_in_fp8(model)
    for name, parameter in model.named_parameters():
        is_base = not parameter.requires_grad and ".update." not in name  # A may be frozen too
        if is_base and cfg.base_dtype != "float32" and parameter.dtype == torch.float32:
            parameter.data = parameter.data.bfloat16()
    if cfg.shard and dist.is_initialized():  # a part of every parameter per rank; gradients follow
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        for module in (*model.model.layers, model):  # a block is whole, in float32, in its forward
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    model.to(device)
    for module in model.modules():
        if isinstance(module, mora.Fold):
            module.narrow()  # data_parallel broadcasts no buffers
    if cfg.matmul == "fp8":
        use_fp8(model)
    if cfg.compile == "on" or cfg.compile == "auto" and on_gpu:
        model.compile_parts(compute_again=cfg.method != "full")  # LoRA and MoRA lose no speed
    return build_optimizer(cfg, model, device)


def data_parallel(model):
    """Wrap a model in DDP without its broadcast of buffers, which would make an evaluation hang,
    and of weights in 8 bits, which gloo refuses. All of them are equal on all ranks."""
    ignored = [name for name, _ in model.named_buffers()]
    ignored += [n for n, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    return DistributedDataParallel(model)


def agree(numbers, stop_requested, world, done, cfg):
    """Return (losses, norms, stop?) of [tensor (loss, norm)] of the steps up to number `done`:
    means of all ranks, equal on all. Raises UserError for a number that is not finite."""
    rows = torch.stack([*numbers, torch.full_like(numbers[0], float(stop_requested))])
    if world > 1:
        dist.all_reduce(rows)
    *pairs, (stopping, _) = (rows / world).tolist()
    for step, (loss, norm) in enumerate(pairs, done - len(pairs) + 1):
        if not math.isfinite(loss + norm):
            raise checkpoint.diverged(cfg, step, f"loss {loss}, gradient norm {norm}")
    return *zip(*pairs, strict=True), stopping > 0


def stop_on_signal():
    """Return a list that Ctrl-C, SIGTERM or SIGHUP fills: the loop saves and stops. A second Ctrl-C
    or SIGTERM kills. A second SIGHUP does nothing: a terminal that closes may send two."""
    received = []

    def handle(number, _):
        received.append(number)
        signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)

    is_under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    for number in (signal.SIGINT, signal.SIGTERM, *([] if is_under_nohup else [signal.SIGHUP])):
        signal.signal(number, handle)
    return received


def header(cfg, model, device, world, first_step, batches):
    """Return the first record of a run in log.jsonl: what ran where."""
    parameters, linears = [*model.parameters()], block_linears(model).values()
    name = (torch.cuda.get_device_name(device) if device.type == "cuda"
            else f"{device.type}, {torch.get_num_threads()} threads")
    return {"config": dataclasses.asdict(cfg), "start": first_step,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"), "torch": torch.__version__,
            "python": platform.python_version(), "processes": world, "device": name,
            "micro_batch": batches.micro_batch, "passes": cfg.steps / batches.steps_per_epoch,
            "accumulate": cfg.batch_size // (world * batches.micro_batch),
            "dtype": str(model.compute_dtype).removeprefix("torch."),
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "parameters": sum(p.numel() for p in parameters),
            "fp8_layers": sum(layer.products is not None for layer in linears),
            "linear_layers": len(linears),
            "tokens_per_step": batches.tokens_per_step, "step_is": batches.description}


class Log:
    """Each record as one line for people and as JSON in log.jsonl and to log_to; rank 0 alone."""

    def __init__(self, cfg, rank, head):
        self.cfg, self.is_open = cfg, rank == 0
        if not self.is_open:
            return
        out = Path(cfg.out)
        out.mkdir(parents=True, exist_ok=True)
        file = out / "log.jsonl"
        if head["start"] and file.exists():  # a full disk leaves half a line: cut it off
            os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
        self.file = open(file, "a" if head["start"] else "w", buffering=1)
        with as_user_error(f"{out} cannot be written; free some space", OSError):
            config.write_json(out / "config.json", head["config"])
            self.file.write(json.dumps(head) + "\n")
        changed = [f"{name}={getattr(cfg, name)}" for name, field in config.FIELDS.items()
                   if getattr(cfg, name) != field.default]
        print(f"{cfg.out}: {', '.join(changed)}")
        print("{trainable_parameters:,} of {parameters:,} parameters train on {processes} x "
              "{device}, {dtype}; a step is {step_is} in {accumulate} x {micro_batch} sequences "
              "per process; {passes:.3g} passes over the data".format(**head))
        if cfg.matmul == "fp8" or cfg.base_dtype == "float8":
            print("{fp8_layers} of {linear_layers} linear layers of the blocks run in FP8"
                  .format(**head))
        self.send = tracker(cfg, head["config"]) if cfg.log_to else lambda *number: None

    def __call__(self, step, line, **values):
        if self.is_open:
            try:
                print(f"{step:>{len(str(self.cfg.steps))}}/{self.cfg.steps}   {line}", flush=True)
            except OSError:  # the terminal or `| tee` is gone: a run that was stopped still saves
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            with as_user_error(f"{self.file.name} cannot be written; free some space", OSError):
                self.file.write(json.dumps({"step": step, **values}) + "\n")
            for key, value in values.items():
                self.send(key, value, step)

    def scores(self, step, scores):
        self(step, f"validation: loss {scores['loss']:.4f}   perplexity {scores['ppl']:.2f}   "
             f"bits per byte {scores['bits_per_byte']:.4f}",
             **{f"val_{key}": value for key, value in scores.items()})

    def restart(self, step, cycle, report):
        action = "pruned" if self.cfg.restart_keep else "dropped"
        self(step, f"restart {cycle}: merged an update of norm {report['update_norm']:.4g}, "
             f"{action} {report['states']} optimizer states", restart=cycle, **report)

    def steps(self, done, losses, norms, rate, seconds, batches):
        """Log the steps since the last line; `done` is how many the run has taken."""
        speed = sum(map(batches.count_tokens, range(done - len(losses), done))) / seconds
        left = datetime.timedelta(seconds=int((self.cfg.steps - done) * seconds / len(losses)))
        mean = sum(losses) / len(losses)
        self(done, f"loss {mean:.4f}   lr {rate:.2e}   norm {norms[-1]:.2f}   "
             f"{speed:,.0f} tokens/s   {left} left",
             loss=mean, lr=rate, grad_norm=norms[-1], tokens_per_s=speed)

    def close(self, step, stopped, data_kind):
        """Print what comes next; exit with status 130 if the run was stopped before its end."""
        if not self.is_open:
            return
        self.file.close()
        if stopped and step < self.cfg.steps:
            print(f"stopped and saved at step {step}: continue with the same command and --resume")
            raise SystemExit(130)
        print("\ndone; next:")
        model = self.cfg.out
        if self.cfg.method in config.ADAPTERS:
            print(f"  python merge.py {model}")
            model += "/merged"
        if data_kind == "samples":
            print(f"  python evaluate.py {model} {self.cfg.data} --answers")
        else:
            prompt = "def " if Path(self.cfg.data).name == "stdlib" else "The"
            print(f'  python sample.py {model} --prompt="{prompt}"')


def tracker(cfg, settings):
    """Return a function (key, value, step) that sends a number to wandb or TensorBoard."""
    with as_user_error(f"log_to={cfg.log_to} needs pip install {cfg.log_to}", ImportError):
        if cfg.log_to == "wandb":
            import wandb
            wandb.init(project="mora", name=Path(cfg.out).name, config=settings, dir=cfg.out)
            return lambda key, value, step: wandb.log({key: value}, step=step)
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(cfg.out).add_scalar


def main(argv):
    cfg = config.load(argv, default=config.ROOT / "configs" / "tiny_mora.py")
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        with config.lock(cfg.out, "the run") if is_first else contextlib.nullcontext():
            train(cfg)
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        raise UserError("another process of the run has ended, its own output says why; "
                        f"{checkpoint.last_good(cfg.out)}") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    config.command_line(main)
