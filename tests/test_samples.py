"""Training on samples: none sees another, and how they are split over micro-batches and processes changes nothing."""
import json

import numpy as np
import pytest
import torch
from conftest import prompts
from test_train import records, same, torchrun

import checkpoint
import data
import evaluate
import sample
import mora
import tokenizer
import train
from config import UserError
from model import Llama, LlamaConfig
from batches import SampleBatches, every_sample_once
from shards import open_split


def tiny(**options):
    return Llama(LlamaConfig(vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2), **options)


def test_a_samples_loss_does_not_depend_on_its_neighbours(pairs):
    samples, model = open_split(pairs, "train"), tiny(seed=1)
    which = [0, 5, 50, 3]
    inputs, targets = samples.rows(which, 64)
    nats, count = 0.0, 0
    for row, i in enumerate(which):
        ids, learned = (torch.from_numpy(part) for part in samples.sample(i))
        length = len(ids) - 1
        alone = model(ids[None, :-1])[0]
        torch.testing.assert_close(model(inputs)[row, :length], alone, rtol=0, atol=1e-6)
        wanted = torch.where(learned, ids, -100)[1:]
        assert targets[row, :length].tolist() == wanted.tolist() and (targets[row, length:] == -100).all()
        nats, count = nats + torch.nn.functional.cross_entropy(alone, wanted, reduction="sum").item(), count + int(learned.sum())
    assert model(inputs, targets).item() == pytest.approx(nats / count, rel=1e-6)


def test_every_sample_once_an_epoch_with_little_padding(pairs):
    samples = open_split(pairs, "train")
    batches = SampleBatches(samples, seed=1, seq_len=64, batch_size=8, micro_batch=4)
    assert batches.steps_an_epoch == 12  # and a rest of 7
    epochs = [np.concatenate([batches.step(epoch * 12 + step) for step in range(12)]) for epoch in range(2)]
    assert all(len(set(epoch)) == 96 for epoch in epochs) and set(epochs[0]) != set(epochs[1])
    padded = sum(inputs.numel() for step in range(12) for inputs in batches(step)[0])
    real = sum(int(samples.lengths[i]) - 1 for i in epochs[0])
    assert real == sum(batches.size(step) for step in range(12)) == round(batches.tokens_a_step * 12)
    unsorted = 1 - real / (96 * (samples.lengths.max() - 1))
    assert batches.padding == pytest.approx(1 - real / padded) and batches.padding < unsorted / 2
    longest = [int(samples.lengths[batches.step(step)].max()) for step in range(12)]
    assert longest != sorted(longest)  # short and long batches are mixed
    for step in range(24):  # a row is padded to the longest of its micro-batch, rounded up to a multiple of 8
        longest = samples.lengths[batches.step(step)].reshape(-1, 4).max(1) - 1
        assert [inputs.shape[1] for inputs in batches(step)[0]] == [-(-length // 8) * 8 for length in longest]


@pytest.mark.parametrize("micro", (1, 2, 4))
def test_batches_are_a_pure_function_of_the_step_for_any_number_of_processes(pairs, micro):
    samples = open_split(pairs, "train")
    whole = SampleBatches(samples, 1, 64, 8, 8)
    strip = lambda row: [token for token in row.tolist() if token != -100]
    for world in (1, 2):
        for step in (5, 0, 1, 2, 13):
            parts = [SampleBatches(samples, 1, 64, 8, micro, rank=rank, world=world)(step) for rank in range(world)]
            found = sorted(strip(row) for _, targets, _ in parts for micros in targets for row in micros)
            assert found == sorted(strip(row) for row in whole(step)[1][0])
            assert np.mean([weight for *_, weights in parts for weight in weights]) == pytest.approx(1)


def test_accumulation_and_two_processes_equal_one_big_batch(fit, pairs, config):
    words = ("--micro_batch=8", "--steps=8", "--eval_every=4")
    big = fit(*words)
    small = fit("--micro_batch=1", *words[1:], f"--out={big.with_name('small')}")
    two = big.with_name("two")
    done = torchrun(config, f"--data={pairs}", "--seq_len=64", "--micro_batch=2", *words[1:], f"--out={two}")
    assert done.returncode == 0, done.stderr
    for key in ("loss", "grad_norm", "val_loss"):
        for other in (small, two):
            assert records(other, key) == pytest.approx(records(big, key), rel=1e-4), key
    assert "of padding, in 1 x 8 sequences" not in done.stdout and "of padding, in 2 x 2 sequences a process" in done.stdout


@pytest.mark.filterwarnings("ignore:dropout")
def test_resume_is_bitwise_identical(fit):
    words = ("--method=lora", "--dropout=0.1", "--epochs=1.5", "--schedule=linear", "--save_every=7")
    whole = fit(*words)
    out = whole.with_name("parts")
    fit(*words, f"--out={out}")
    assert [step.name for step in checkpoint.steps_of(out)] == ["step-00000007", "step-00000014", "step-00000018"]  # 12 steps an epoch
    for step in checkpoint.steps_of(out)[1:]:
        step.rename(step.with_name(".lost" + step.name))
    fit(*words, f"--out={out}", "--resume")
    assert same(whole / "step-00000018", out / "step-00000018") and records(whole) == records(out)


def test_epochs_are_steps_of_a_text_too(run, corpus):
    windows = train.Batches(open_split(corpus, "train"), 1, 16, 64, 64).windows
    out = run("--epochs=0.5", "--batch_size=64", "--micro_batch=64", "--save_every=1000", "--eval_every=1000")
    assert max(records(out)) == round(windows / 128)
    assert max(records(run("--steps=3", f"--out={out.with_name('three')}"))) == 3


def test_a_seq_len_below_the_longest_sample_is_an_error_with_the_number(fit, pairs):
    longest = open_split(pairs, "train").lengths.max()
    with pytest.raises(UserError, match=f"a train sample of {longest} tokens, seq_len is 30: take --seq_len={longest}"):
        fit("--seq_len=30")
    with pytest.raises(UserError, match="fewer than batch_size 104"):
        fit("--batch_size=104", "--micro_batch=104")


@pytest.mark.parametrize("world", (1, 3))
@pytest.mark.parametrize("limit", (0, 500))
def test_evaluation_counts_every_learned_token_once(pairs, world, limit):
    samples = open_split(pairs, "train")
    count = int(np.searchsorted(np.cumsum(samples.lengths), limit, "right")) if limit else len(samples.lengths)
    batches = [batch for rank in range(world) for batch in every_sample_once(samples, 64, 4, rank, world, limit)]
    found = sorted(token for _, targets in batches for token in targets[targets != -100].tolist())
    assert found == sorted(token for i in range(count) for token in samples.sample(i)[0][samples.sample(i)[1]].tolist())
    assert all(inputs.shape == targets.shape and len(inputs) == 4 for inputs, targets in batches)


def test_the_loss_is_the_mean_over_learned_tokens(pairs):
    samples, model = open_split(pairs, "val"), tiny(seed=1)
    losses = []
    for i in range(len(samples.lengths)):
        ids, learned = (torch.from_numpy(part) for part in samples.sample(i))
        losses += torch.nn.functional.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")[learned[1:]].tolist()
    result = evaluate.perplexity(model, samples, 64, 4)
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-5) and result["tokens"] == len(losses) == samples.learned.sum()
    responses = sum(len(row["response"]) for row in next(prompts())[::10])
    assert result["bits_per_byte"] == pytest.approx(sum(losses) / np.log(2) / responses, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit")  # torch's own, when its compiler is imported
@pytest.mark.parametrize("method", ("full", "lora", "mora"))
def test_all_lengths_take_two_compilations(monkeypatch, method):
    """The first length as it is, the second for all; each with gradients and without."""
    model, whole = tiny(seed=1), torch.compile
    if method != "full":
        mora.adapt(model, method=method, rank=2)  # frozen embeddings: the first block's input alone would have no gradient
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda *args, **options: whole(*args, **options, backend="aot_eager", fullgraph=True))
    model.compile_parts()
    for length in (24, 16, 40, 8, 56):
        ids = torch.randint(250, (4, length), generator=torch.Generator().manual_seed(length))
        targets = ids.masked_fill(torch.arange(length) < length // 2, -100)
        with torch._dynamo.config.patch(error_on_recompile=length in (40, 8, 56)):
            model(ids, targets).backward()
            with torch.no_grad():
                ours = model(ids, targets)
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            torch.testing.assert_close(ours, model(ids, targets))


@pytest.mark.filterwarnings("ignore:.torch.jit")  # torch's own, when its compiler is imported
def test_many_prompts_at_once_give_what_each_gives_alone():
    """Different lengths, batches that do not divide, rows that end early and are dropped; grouped-query attention."""
    torch.manual_seed(0)
    model, draw = tiny(seed=3), np.random.default_rng(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4).add_(torch.randn(parameter.shape) * 0.1)
    prompts = [draw.integers(0, 250, draw.integers(1, 20)).tolist() for _ in range(23)]
    alone = [list(sample.generate(model, prompt, 250, 40, temperature=0.0)) for prompt in prompts]
    stop = max(set(sum(alone, [])), key=lambda token: sum(token in answer for answer in alone))  # as many as possible end
    alone = [list(sample.generate(model, prompt, 250, 40, temperature=0.0, stop=stop)) for prompt in prompts]
    assert len({len(answer) for answer in alone}) > 3 and max(map(len, alone)) == 40 and min(map(len, alone)) < 12
    for batch in (1, 7, 23):
        assert sample.greedy(model, prompts, 250, 40, stop, batch) == alone
    model.compile_parts()  # as in a run on a GPU: generating compiles nothing
    torch._dynamo.utils.counters.clear()
    assert sample.greedy(model, prompts, 250, 40, stop) == alone and not torch._dynamo.utils.counters["frames"]


def test_pairs_are_learned_by_heart_and_the_answers_say_so(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data.main(["uuid", "--pairs=4", "--tokenizer=bytes"])
    words = ("--method=full", "--hidden_size=64", "--intermediate_size=96", "--lr=0.01", "--batch_size=4", "--micro_batch=4", "--data=data/uuid", "--seq_len=80",
             "--epochs=150", "--log_every=50", "--eval_every=200", "--save_every=200", "--warmup=10")
    out = run(*words)
    assert f"evaluate.py {out} data/uuid --answers" in capsys.readouterr().out
    evaluate.main([str(out), "data/uuid", "--answers", "--batch=3"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) | {"checkpoint": ""} == {"checkpoint": "", "data": "data/uuid", "split": "val", "answers": 4, "exact": 1.0, "digits": 1.0}
    model = tiny(seed=1).train()
    result = evaluate.answers(model, tokenizer.load("bytes"), open_split("data/uuid", "train"), limit=2)
    assert result["answers"] == 2 and result["exact"] == 0 and result["digits"] < 0.3 and model.training


def test_answers_need_samples(run, corpus):
    out = run("--steps=2", "--warmup=1")
    with pytest.raises(UserError, match="is text: answers need the prompts"):
        evaluate.main([str(out), str(corpus), "--answers"])


def test_digits_are_counted_at_their_position():
    wanted = "01234567-89ab-4def-8123-456789abcdef"
    for found, right in ((wanted, 32), (f" {wanted}\n", 32), (wanted.replace("-", ""), 32), (wanted[:8], 8), ("", 0), ("x" + wanted[1:], 31),
                         ("x" + wanted, 0), (wanted + "0", 32), ("f" * 36, 1 + 1)):
        assert evaluate.right_digits(found, wanted) == right / 32, found
    assert evaluate.scores([wanted, wanted[:8]], [wanted, wanted], "uuid") == {"answers": 2, "exact": 0.5, "digits": 0.625}


def test_numbers_are_equal_however_they_are_written():
    for text in ("#### 1234", "####1,234", "so\n#### $1,234.", "#### $ 1234.00\n", "#### 7\n#### 1234 dollars", "The answer is: 1,234.", "#### 1234\nThe answer is: 5"):
        assert evaluate.number(text) == 1234, text
    for text, value in (("#### -5", -5), ("#### -$5", -5), ("#### $-5", -5), ("#### .5", 0.5), ("#### 0.50", 0.5), ("no", None), ("####", None), ("#### x 5", None), ("12", None)):
        assert evaluate.number(text) == value, text
    assert evaluate.scores(["a #### 18.", "none", "#### 1"], ["b #### 18", "#### 2", "#### 1"], "question") == {"answers": 3, "exact": 1 / 3, "numbers": 2 / 3}
    assert "numbers" not in evaluate.scores(["a"], ["a"], "prompt")
