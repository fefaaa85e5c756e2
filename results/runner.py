"""Many short fine-tuning runs on the GPUs of one machine, by processes that work through the same plan. Used by uuid/ and gsm8k/.

A run is (method, rate, seed). It is taken further in tasks (stage, method, rate, seed, until which step); a task is claimed by creating a
file. What a task reaches is a line of OUT/results.jsonl, and the run's state a file, so that a later task, or the same command started
again, goes on from it.

A GPU has several processes and one or two of them at a time: while these train and answer, the others compile. A process keeps one model a
method, compiled once; other rates and seeds copy the first weights back into it (nothing is compiled again: torch guards on shapes, dtypes
and code, not on the module). Imports, the base model and the data are read once.
"""
import contextlib
import dataclasses
import fcntl
import gc
import json
import math
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections import namedtuple
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import config
import mora
import samples
import tokenizer
import train

RESERVE = 15  # seconds before the end at which a run is cut: its last look and its state must still be written
SEED = 1337
GRID = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # rates
Task = namedtuple("Task", "stage method lr seed until")


def rows(out):
    """All lines of OUT/results.jsonl."""
    file = Path(out) / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def latest(lines):
    """{(method, rate, seed): its line that went furthest}; failed ones only where there is no other."""
    found = {}
    for row in lines:
        key = row["method"], row["lr"], row["seed"]
        if key not in found or (row["status"] != "failed", row["step"]) >= (found[key]["status"] != "failed", found[key]["step"]):
            found[key] = row
    return found


def search(rates, scores, most=5):
    """(rates to try, the best or None while a score is missing): from two neighbours on the grid outwards, until the best has worse ones on
    both sides or there are `most`. scores: {rate: the lower the better}."""
    tried = list(rates)
    while all(rate in scores for rate in tried):
        best = min(tried, key=scores.get)
        at = GRID.index(best) + (best == max(tried)) - (best == min(tried))
        if len(tried) == most or GRID[at] in tried:
            return tried, best
        tried.append(GRID[at])
    return tried, None


class Place:
    """One process: the data, the base model's weights, and a model of every method that was asked for."""

    def __init__(self, out, base, deadline, common, methods, lengths):
        """lengths: of two rows, to compile for: the first as it is, and all others."""
        self.out, self.base, self.deadline, self.common, self.methods, self.lengths = Path(out), base, deadline, common, methods, lengths
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.models, self.method = {}, None
        cfg = self.cfg("base", 1.0)
        self.train, self.val = (samples.open_split(cfg.data, split, verify=False) for split in ("train", "val"))
        self.tok = tokenizer.load(self.val.tokenizer, self.val.folder)
        torch._dynamo.config.recompile_limit = 64  # of blocks: two lengths, with gradients and without, for every method

    def cfg(self, method, lr, seed=SEED):
        words = [f"--init_from={self.base}", f"--lr={lr}", f"--seed={seed}", *os.environ.get("MORE", "").split()]
        return config.load([*self.common, *self.methods[method], *words], "")

    def model(self, method, seed=SEED):
        """A method's model as it starts: built and compiled at the first call."""
        if method not in self.models:
            cfg, model = train.build_model(self.cfg(method, 1.0), self.train)
            self.shape = cfg.model()
            train.prepare_model(cfg, model, self.device, 0)
            self.models[method] = model, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            for length in self.lengths:
                ids = torch.ones(cfg.micro_batch, length, dtype=torch.long, device=self.device)
                model(ids, ids).backward()
            empty()
        model, first = self.models[method]
        restore(model, first)
        mora.start(mora.adapted_layers(model), seed, 0)
        return model

    @contextlib.contextmanager
    def gpu(self):
        """A turn on the GPU, by a file's lock; yields whether it came before the end. TURNS of the environment: at a time, 1 where seconds count;
        2 where one that answers waits for the host while another could train."""
        with contextlib.ExitStack() as stack:
            names = [self.out / f"gpu_{os.environ.get('CUDA_VISIBLE_DEVICES', '0')}_{n}.lock" for n in range(int(os.environ.get("TURNS", 1)))]
            locks = [stack.enter_context(open(name, "w")) for name in names]
            while time.time() < self.deadline - RESERVE and not any(map(locked, locks)):
                time.sleep(0.1)
            yield time.time() < self.deadline - RESERVE
            empty()

    def advance(self, task, model, look, look_every):
        """Take a run on to step task.until, to what `look` calls enough, or to the deadline; returns its row.

        look(place, model, step, row, last) -> is it enough?; called every look_every steps and at the end; it writes numbers into the row.
        """
        cfg = self.cfg(*task[1:4])
        batches = samples.SampleBatches(self.train, cfg.seed, cfg.seq_len, cfg.batch_size, cfg.micro_batch, self.device)
        cfg = dataclasses.replace(cfg, steps=max(1, round(cfg.epochs * batches.steps_an_epoch))) if cfg.epochs else cfg
        until, optimizer = min(task.until, cfg.steps), train.build_optimizer(cfg, model, self.device)
        trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
        row = {"method": task.method, "lr": task.lr, "seed": task.seed, "step": 0, "loss": [], "seconds": 0.0, "tokens": 0,
               "padding": batches.padding, "trainable_parameters": sum(map(torch.numel, trains.values())), "torch": str(torch.__version__),
               "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu", "config": dataclasses.asdict(cfg) | self.shape}
        state = self.out / "state" / f"{name_of(*task[1:4])}.pt"
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
        if row["status"] in ("done", "cut"):  # what has reached enough was looked at just now
            look(self, model, row["step"], row, last=True)
        if row["status"] != "diverged":
            state.parent.mkdir(exist_ok=True)
            weights = {name: p.detach() for name, p in trains.items()}
            torch.save({"weights": weights, "optimizer": optimizer.state_dict(), "row": json.dumps(row)}, f"{state}.tmp")
            os.replace(f"{state}.tmp", state)
        return row


def locked(file):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def empty():
    """Give memory back to the GPU's other processes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def restore(model, weights):
    for name, parameter in model.named_parameters():
        parameter.grad = None
        if name in weights:
            parameter.copy_(weights[name])


def name_of(method, lr, seed):
    return f"{method}_{lr:g}_{seed}"


def work(place, plan, look, look_every):
    """Claim and do tasks of plan(rows) until none is left, or time is over. Of what the plan lists the first counts, the method at hand before
    others of the same stage. plan: the rows so far -> [Task], a list that only grows."""
    claim_of = lambda task: place.out / "claims" / f"{name_of(*task[1:4])}_{task.until}"
    while time.time() < place.deadline - RESERVE:
        tasks = sorted(plan(rows(place.out)), key=lambda task: (task.stage, task.method != place.method))
        task = next((t for t in tasks if claim(claim_of(t))), None)
        if task is None:
            if all(claim_of(t).read_text() for t in tasks) and len(plan(rows(place.out))) == len(tasks):
                return
            time.sleep(0.5)  # another process may add to the plan by what it finds
            continue
        try:
            model, place.method = place.model(task.method, task.seed), task.method
            with place.gpu() as in_time:
                if not in_time:
                    claim_of(task).unlink()
                    return
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                row = place.advance(task, model, look, look_every) if task.until else look(place, model)
        except Exception as error:  # of one run: the others go on
            traceback.print_exc()
            row = {"method": task.method, "lr": task.lr, "seed": task.seed, "step": 0, "status": "failed", "error": f"{type(error).__name__}: {error}"[:500]}
        row["until"] = task.until
        with open(place.out / "results.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        claim_of(task).write_text(row["status"])
        shown = {key: value for key, value in row.items() if key not in ("loss", "config", "curve", "torch", "device")}
        print(json.dumps(shown), flush=True)


def claim(path):
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False


def launch(script, out, base, seconds):
    """Three processes a GPU (one without GPUs; WORKERS of the environment: in all), output in OUT/worker_N.txt; waits for all, and ends those that
    outlast SECONDS. What OUT/results.jsonl calls finished stays finished; what was cut or failed is done again, from its state if that is there."""
    out, gpus = Path(out), torch.cuda.device_count()
    shutil.rmtree(out / "claims", ignore_errors=True)
    (out / "claims").mkdir(parents=True)
    for row in rows(out):
        if row["status"] in ("done", "reached", "diverged"):
            (out / "claims" / f"{name_of(row['method'], row['lr'], row['seed'])}_{row['until']}").write_text(row["status"])
    deadline, workers = time.time() + seconds, []
    for n in range(int(os.environ.get("WORKERS", 3 * gpus or 1))):
        environment = {"OMP_NUM_THREADS": "4", "PYTORCH_ALLOC_CONF": "expandable_segments:True", **os.environ,
                       "CUDA_VISIBLE_DEVICES": str(n % max(1, gpus)), "PYTHONUNBUFFERED": "1"}
        workers.append(subprocess.Popen([sys.executable, script, "work", str(out), base, str(deadline)], env=environment, cwd=ROOT,
                                        stdout=open(out / f"worker_{n}.txt", "a"), stderr=subprocess.STDOUT))
    for worker in workers:
        try:
            worker.wait(max(1, deadline + 5 - time.time()))
        except subprocess.TimeoutExpired:
            worker.kill()
    for row in rows(out):
        print(json.dumps({key: row.get(key) for key in ("method", "lr", "seed", "step", "status", "seconds", "digits", "dev_loss", "numbers")}))
