"""Many short fine-tuning runs on the GPUs of one machine: a process a GPU, each working through the same plan. Used by uuid/ and gsm8k/.

A run is (method, rate). It is taken further in tasks (method, rate, until which step); a task is claimed by creating a file. What a task
reaches is a line of OUT/results.jsonl, and the run's state a file, so that a later task, or the same command started again, goes on from it.

A process keeps one model a method. Its blocks are compiled once; other rates copy the first weights back into it (nothing is compiled
again: torch guards on shapes, dtypes and code, not on the module). Imports, the base model and the data are read once.
"""
import dataclasses
import gc
import json
import math
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import checkpoint
import config
import samples
import tokenizer
import train

RESERVE = 15  # seconds before the end at which a run is cut: its last look and its state must still be written


def rows(out):
    """All lines of OUT/results.jsonl."""
    file = Path(out) / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def latest(lines):
    """{(method, rate): its line that went furthest}; failed ones only where there is no other."""
    found = {}
    for row in lines:
        key = row["method"], row["lr"]
        if key not in found or (row["status"] != "failed", row["step"]) >= (found[key]["status"] != "failed", found[key]["step"]):
            found[key] = row
    return found


class Place:
    """One GPU: the data, the base model's weights, and a model of every method that was asked for."""

    def __init__(self, out, base, deadline, common, methods, lengths):
        self.out, self.base, self.deadline, self.common, self.methods, self.lengths = Path(out), base, deadline, common, methods, lengths
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.models, self.method = {}, None
        self.val = samples.open_split(self.cfg("base", 1.0).data, "val", verify=False)
        self.train = samples.open_split(self.cfg("base", 1.0).data, "train", verify=False)
        self.tok = tokenizer.load(self.val.tokenizer, self.val.folder)

    def cfg(self, method, lr):
        return config.load([*self.common, *self.methods[method], f"--init_from={self.base}", f"--lr={lr}", *os.environ.get("MORE", "").split()], "")

    def model(self, method):
        """(model, its first trainable weights): built and compiled at the first call, the first weights in place at every call."""
        if method not in self.models:
            cfg, model = train.build_model(self.cfg(method, 1.0), self.train)
            train.prepare_model(cfg, model, self.device, 0)
            if cfg.method != "full":  # the first block's input gets a gradient as the others' do: else it is compiled for itself
                model.model.embed_tokens.register_forward_hook(lambda _, ids, x: x.requires_grad_() if torch.is_grad_enabled() else x)
            self.models[method] = model, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        model, first = self.models[method]
        restore(model, first)
        return model

    def advance(self, method, lr, until, look, look_every):
        """Take a run on to step `until`, to what `look` calls enough, or to the deadline; returns its row.

        look(place, model, step, row, last) -> is it enough?; called every look_every steps and at the end; it writes numbers into the row.
        """
        model, cfg = self.model(method), self.cfg(method, lr)
        batches = samples.SampleBatches(self.train, cfg.seed, cfg.seq_len, cfg.batch_size, cfg.micro_batch, self.device, lengths=self.lengths)
        cfg = dataclasses.replace(cfg, steps=max(1, round(cfg.epochs * batches.steps_an_epoch))) if cfg.epochs else cfg
        until, optimizer = min(until, cfg.steps), train.build_optimizer(cfg, model, self.device)
        trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
        row = {"method": method, "lr": lr, "step": 0, "loss": [], "seconds": 0.0, "tokens": 0, "padding": batches.padding,
               "trainable_parameters": sum(map(torch.numel, trains.values())), "torch": str(torch.__version__),
               "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu", "config": dataclasses.asdict(cfg)}
        state = self.out / "state" / f"{method}_{lr:g}.pt"
        if state.exists():
            kept = torch.load(state, map_location=self.device, weights_only=True)
            restore(model, kept["weights"])
            optimizer.load_state_dict(kept["optimizer"])
            row |= json.loads(kept["row"])
        row["status"], window, clock, late = "done", [], time.time(), lambda: time.time() > self.deadline - RESERVE
        for step in range(row["step"], until):
            for group in optimizer.param_groups:
                group["lr"] = train.learning_rate(step, cfg) * group["ratio"]
            loss = train.next_step(model, batches(step), cfg.batch_size // cfg.micro_batch, self.device)
            torch.nn.utils.clip_grad_norm_(trains.values(), cfg.grad_clip or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            window.append(loss)
            row["step"], row["tokens"] = step + 1, row["tokens"] + batches.size(step)
            if len(window) == cfg.log_every or step + 1 == until or (step + 1) % look_every == 0:
                mean, spent, window = torch.stack(window).mean().item(), time.time() - clock, []  # waits for the GPU
                row["loss"].append([step + 1, mean])
                row["seconds"], clock = row["seconds"] + spent, time.time()
                if not math.isfinite(mean):
                    row["status"] = "diverged"
                    break
                if late():
                    row["status"] = "cut"
                    break
                if (step + 1) % look_every == 0 and step + 1 < until:
                    enough, clock = look(self, model, step + 1, row, last=False), time.time()
                    if enough:
                        row["status"] = "reached"
                        break
        for ahead in batches.ahead.values():
            ahead.result()
        batches.pool.shutdown()
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2 ** 30 if self.device.type == "cuda" else 0.0
        if row["status"] != "diverged":
            look(self, model, row["step"], row, last=True)
            state.parent.mkdir(exist_ok=True)
            weights = {name: p.detach() for name, p in trains.items()}
            torch.save({"weights": weights, "optimizer": optimizer.state_dict(), "row": json.dumps(row)}, f"{state}.tmp")
            os.replace(f"{state}.tmp", state)
        return row


@torch.no_grad()
def restore(model, weights):
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])
            parameter.grad = None


def work(place, plan, look, look_every):
    """Claim and do tasks of plan(rows) until none is left, or time is over. Of what the plan lists the first counts, the method at hand before others
    of the same stage. plan: the rows so far -> [(stage, method, rate, until)], a list that only grows."""
    claims, name = place.out / "claims", os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    while time.time() < place.deadline - RESERVE:
        tasks = sorted(plan(rows(place.out)), key=lambda task: (task[0], task[1] != place.method))
        task = next((t for t in tasks if claim(claims / f"{t[1]}_{t[2]:g}_{t[3]}")), None)
        if task is None:
            if all((claims / f"{m}_{lr:g}_{until}").read_text() for _, m, lr, until in tasks) and len(plan(rows(place.out))) == len(tasks):
                return
            time.sleep(0.5)  # another process may add to the plan by what it finds
            continue
        _, method, lr, until = task
        place.method = method
        try:
            row = look(place) if method == "base" else place.advance(method, lr, until, look, look_every)
        except Exception as error:  # of one run: the others go on
            traceback.print_exc()
            row = {"method": method, "lr": lr, "step": 0, "status": "failed", "error": f"{type(error).__name__}: {error}"[:500]}
        row["until"] = until
        with open(place.out / "results.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        (claims / f"{method}_{lr:g}_{until}").write_text(row["status"])
        shown = {key: value for key, value in row.items() if key not in ("loss", "config", "curve")}
        print(f"[{name}] {json.dumps(shown)}", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def claim(path):
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False


def launch(script, out, base, seconds):
    """A process a GPU (one, without GPUs), output in OUT/worker_N.txt; waits for all, and ends those that outlast SECONDS. Finished tasks
    of an earlier call stay finished; those that were cut or failed are free again."""
    out = Path(out)
    (out / "claims").mkdir(parents=True, exist_ok=True)
    for stray in (out / "claims").iterdir():
        stray.read_text() in ("done", "reached", "diverged") or stray.unlink()
    deadline = time.time() + seconds
    processes = []
    for gpu in range(max(1, torch.cuda.device_count())):
        environment = {"OMP_NUM_THREADS": "4", **os.environ, "CUDA_VISIBLE_DEVICES": str(gpu), "PYTHONUNBUFFERED": "1"}
        processes.append(subprocess.Popen([sys.executable, script, "work", str(out), base, str(deadline)], env=environment, cwd=ROOT,
                                          stdout=open(out / f"worker_{gpu}.txt", "a"), stderr=subprocess.STDOUT))
    for process in processes:
        try:
            process.wait(max(1, deadline + 5 - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
    for row in rows(out):
        print(json.dumps({key: row.get(key) for key in ("method", "lr", "step", "status", "seconds", "digits", "numbers")}))
