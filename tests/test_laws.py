"""README's laws on settings drawn at random; the suite has a few draws, the command any.

    python tests/test_laws.py 100 200        draws 100 to 199; prints the settings that break a law
"""
import contextlib
import io
import json
import random
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from conftest import stopped_copy, texts
from test_train import same

import adapters
import checkpoint
import data
import lora
import merge
import mora
import tokenizer
import train
from config import UserError, load
from evaluate import perplexity
from shards import open_split

COMMON = ["--device=cpu", "--compile=off", "--steps=6", "--save_every=2", "--eval_every=6",
          "--eval_tokens=100", "--log_every=1", "--seq_len=16", "--batch_size=4", "--micro_batch=2",
          "--keep=0"]


def adapter_settings(r, method):
    """Return {key: value} of an adapter; r: a random.Random."""
    drawn = {"rank": r.choice((r.randint(1, 12), r.randint(13, 99))), "dora": r.random() < 0.2,
             "dropout": r.choice((0.0, 0.0, 0.1)), "train_rest": r.random() < 0.6,
             "targets": ",".join(r.sample(mora.PROJECTIONS, r.randint(1, 7)))}
    if method == "mora":
        drawn |= {"operator": r.choice(mora.OPERATORS), "groups": r.choice(mora.GROUPS),
                  "lora_rank": 0 if drawn["dora"] else r.randrange(min(drawn["rank"], 6))}
    else:
        drawn |= {"alpha": r.choice((0.0, 7.5)), "rslora": r.random() < 0.3,
                  "lora_A": r.choice(lora.KINDS_OF_A), "lora_plus_ratio": r.choice((1.0, 4.0))}
    if r.random() < 0.5:
        drawn |= {"restart_every": r.randint(1, 4), "restart_keep": r.choice((0.0, 0.5))}
    return drawn


def settings(r):
    """Return {key: value}, perhaps of keys that exclude each other."""
    heads, method = r.choice((1, 2, 4)), r.choice(("full", "lora", "mora", "mora"))
    drawn = {"method": method, "seed": r.randint(0, 999), "num_hidden_layers": 2,
             "num_attention_heads": heads, "hidden_size": heads * r.choice((2, 6, 8)),
             "num_key_value_heads": r.choice((1, heads)), "intermediate_size": r.randint(1, 48),
             "tie_word_embeddings": r.random() < 0.3, "residual_init": r.random() < 0.3,
             "optimizer": r.choice(("adamw", "muon")), "schedule": r.choice(("cosine", "linear")),
             "lr": r.choice((3e-3, 3e-2)), "rest_lr": r.choice((0.0, 3e-3)),
             "weight_decay": r.choice((0.0, 0.1)), "grad_clip": r.choice((0.0, 0.1)),
             "warmup": r.randint(0, 3), "restart_warmup": r.randint(0, 2),
             "dtype": r.choice(("float32", "float32", "bfloat16"))}
    return drawn | (adapter_settings(r, method) if method != "full" else {})


def draw(number, config):
    """Return the words of a draw's run, as train.py takes them; config: a file with the data."""
    r = random.Random(number)
    while True:
        words = [*COMMON, *(f"--{key}={value}" for key, value in settings(r).items())]
        with contextlib.suppress(UserError):  # the keys exclude each other
            load([str(config), *words], None)
            return words


def check(config, words):
    """Assert the laws of one run; config: a file with `data`; `out` is run/ beside it."""
    whole, resumed, blocks = (config.parent / name for name in ("run", "resumed", "blocks"))
    train.main([str(config), *words])
    last = whole / "step-00000006"

    stopped_copy(whole, 2, resumed)
    train.main([str(config), *words, "--resume", f"--out={resumed}"])
    assert same(last, resumed / last.name)

    train.main([str(config), *words, "--checkpoint_blocks", f"--out={blocks}"])
    assert same(last, blocks / last.name)

    model, _, _ = checkpoint.load(whole)
    logged = json.loads((whole / "log.jsonl").read_text().splitlines()[-1])["val_loss"]
    tokens = open_split(load([str(config)], None).data, "val")
    loss = perplexity(model, tokens, 16, 3, limit=100)["loss"]
    assert loss == pytest.approx(logged, rel=1e-2 if "--dtype=bfloat16" in words else 1e-5)

    if mora.adapted_layers(model):
        ids = torch.arange(40).reshape(2, 20)
        plain, _, _ = checkpoint.load(last / "base")
        adapters.load(plain, last / "adapter", exclude=("lm_head",))
        with torch.no_grad():
            logits = model(ids)
            assert torch.equal(plain(ids), logits)  # the adapter's files hold all of the update
            _, difference = merge.merged_model(model, last)  # merged, and W x + U(x) by its maps
        assert difference <= 1e-5 * max(1.0, logits.abs().max())


@pytest.mark.filterwarnings("ignore:rank")  # an update of more entries than its weight
@pytest.mark.parametrize("number", range(5))
def test_laws_of_random_settings(config, number):
    check(config, draw(number, config))


def main(first=0, end=100):
    warnings.simplefilter("ignore")
    broken = 0
    for number in range(first, end):
        with tempfile.TemporaryDirectory() as folder:
            config, printed = Path(folder) / "tiny.py", io.StringIO()
            config.write_text(f"data, out = {folder + '/data'!r}, {folder + '/run'!r}\n")
            with contextlib.redirect_stdout(printed):
                data.prepare(Path(folder) / "data", tokenizer.load("bytes"), {"source": "test"},
                             [(texts, [])])
                words = draw(number, config)
            try:
                with contextlib.redirect_stdout(printed):
                    check(config, words)
            except Exception:
                broken += 1
                print(f"draw {number}: {traceback.format_exc(limit=-1)}  {' '.join(words)}")
    print(f"{end - first} draws, {broken} break a law")
    return broken > 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
