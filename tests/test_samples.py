"""Training on samples: none sees another, and the split over micro-batches and processes changes
nothing."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import finish, prompts, stopped_copy
from test_train import records, same

import checkpoint
import data
import evaluate
import mora
import sample
import sft
import shards
import tokenizer
import train
from batches import SampleBatches, every_sample_once
from config import UserError
from model import Llama, LlamaConfig
from shards import open_split


def tiny(**options):
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2}
    return Llama(LlamaConfig(vocab_size=257, **shape), **options)


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
        assert targets[row, :length].tolist() == wanted.tolist()
        assert (targets[row, length:] == -100).all()
        nats += torch.nn.functional.cross_entropy(alone, wanted, reduction="sum").item()
        count += int(learned.sum())
    assert model(inputs, targets).item() == pytest.approx(nats / count, rel=1e-6)


@pytest.fixture
def twelve_steps(pairs):
    """Batches of 12 steps per epoch; 7 of the 103 samples fill no batch."""
    samples = open_split(pairs, "train")
    batches = SampleBatches(samples, seed=1, seq_len=64, batch_size=8, micro_batch=4)
    assert batches.steps_per_epoch == 12
    return batches


def test_every_sample_at_most_once_per_epoch(twelve_steps):
    first, second = (set(twelve_steps.epoch_order(epoch).ravel()) for epoch in range(2))
    assert len(first) == len(second) == 96 and first != second
    assert set(twelve_steps.samples_of(13)) < second


def test_samples_of_similar_length_share_a_micro_batch(twelve_steps):
    batches, lengths = twelve_steps, twelve_steps.data.lengths
    padded = sum(inputs.numel() for step in range(12) for inputs in batches(step)[0])
    used = np.concatenate([batches.samples_of(step) for step in range(12)])
    real = int((lengths[used] - 1).sum())
    assert real == sum(batches.count_tokens(step) for step in range(12))
    assert real == round(batches.tokens_per_step * 12)
    unsorted = 1 - real / (96 * (lengths.max() - 1))
    assert batches.padding == pytest.approx(1 - real / padded) and batches.padding < unsorted / 2
    longest = [int(lengths[batches.samples_of(step)].max()) for step in range(12)]
    assert longest != sorted(longest)  # short and long batches are mixed


def test_processes_take_turns_so_that_none_waits_for_longer_samples(pairs):
    """The rows of a step are sorted by length."""
    samples = open_split(pairs, "train")
    parts = [SampleBatches(samples, 1, 64, 8, 2, rank=rank, world=2).own_rows(np.arange(8))
             for rank in range(2)]
    assert [part.tolist() for part in parts] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_a_row_is_padded_to_the_longest_of_its_micro_batch_and_a_multiple_of_8(twelve_steps):
    for step in range(24):
        which = twelve_steps.samples_of(step)
        longest = twelve_steps.data.lengths[which].reshape(-1, 4).max(1) - 1
        widths = [inputs.shape[1] for inputs in twelve_steps(step)[0]]
        assert widths == [-(-length // 8) * 8 for length in longest]


def test_the_samples_of_a_step_are_as_before(twelve_steps):
    """Golden: a resumed run continues the order of its first part."""
    assert [twelve_steps.samples_of(step).tolist() for step in (0, 11, 12)] == [
        [35, 7, 67, 25, 11, 21, 71, 10], [30, 86, 24, 84, 51, 5, 17, 8],
        [79, 26, 88, 36, 52, 48, 54, 90]]


def targets_of(batch):
    """The rows of targets of a batch without padding, sorted."""
    return sorted([token for token in row.tolist() if token != -100]
                  for targets in batch[1] for row in targets)


@pytest.mark.parametrize("micro_batch", (1, 2, 4))
def test_batches_are_a_pure_function_of_the_step_for_any_number_of_processes(pairs, micro_batch):
    samples = open_split(pairs, "train")
    whole = SampleBatches(samples, 1, 64, 8, 8)
    for world in (1, 2):
        every = [SampleBatches(samples, 1, 64, 8, micro_batch, rank=rank, world=world)
                 for rank in range(world)]
        for step in (5, 0, 1, 1, 2, 13):
            parts = [batches(step) for batches in every]
            rows = sorted(row for part in parts for row in targets_of(part))
            assert rows == targets_of(whole.load(step))
            weights = [weight for part in parts for weight in part[2]]
            assert np.mean(weights) == pytest.approx(1)


def test_accumulation_and_two_processes_equal_one_big_batch(fit, pairs, group):
    words = ("--steps=8", "--eval_every=4")
    big = fit("--micro_batch=8", *words)
    small = fit("--micro_batch=1", *words, f"--out={big.with_name('small')}")
    two = big.with_name("two")
    codes, outputs = finish(group(2, f"--data={pairs}", "--seq_len=64", "--micro_batch=2", *words,
                                  f"--out={two}"))
    assert codes == [0, 0], outputs
    assert "of padding, in 2 x 2 sequences" in outputs[0]
    for key in ("loss", "grad_norm", "val_loss"):
        for other in (small, two):
            assert records(other, key) == pytest.approx(records(big, key), rel=1e-4), (other, key)


@pytest.mark.parametrize("world", (1, 2))
def test_the_mean_over_processes_and_micro_batches_is_the_gradient_of_the_big_batch(pairs, world):
    """As the optimizer takes it: the weighted losses' mean, over micro-batches and processes."""
    samples, gradients = open_split(pairs, "train"), []
    for count, micro_batch in ((1, 8), (world, 2)):
        model = tiny(seed=1)
        for rank in range(count):
            parts = SampleBatches(samples, 1, 64, 8, micro_batch, rank=rank, world=count)(3)
            for inputs, targets, weight in zip(*parts, strict=True):
                (model(inputs, targets) * weight / (8 // micro_batch)).backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


def test_resume_is_bitwise_identical(fit):
    words = ("--method=lora", "--dropout=0.1", "--epochs=1.5", "--schedule=linear",
             "--save_every=7")
    whole = fit(*words)
    names = ["step-00000007", "step-00000014", "step-00000018"]  # 12 steps per epoch
    assert [step.name for step in checkpoint.steps_of(whole)] == names
    out = stopped_copy(whole, 7, whole.with_name("parts"))
    fit(*words, f"--out={out}", "--resume")
    assert same(whole / names[-1], out / names[-1])
    assert records(out) == {step: loss for step, loss in records(whole).items() if step > 7}


def test_epochs_are_steps_of_a_text_too(run, corpus):
    windows = train.Batches(open_split(corpus, "train"), 1, 16, 64, 64).windows
    out = run("--epochs=0.6", "--batch_size=64", "--micro_batch=64", "--save_every=1000",
              "--eval_every=1000")
    assert max(records(out)) == round(0.6 * windows / 64) > 0.6 * windows / 64
    assert max(records(run("--steps=3", f"--out={out.with_name('three')}"))) == 3


def test_a_seq_len_below_the_longest_sample_is_an_error_with_the_number(fit, pairs):
    longest = open_split(pairs, "train").lengths.max()
    for seq_len in (30, longest - 1):
        message = f"sample of {longest} tokens, seq_len is {seq_len}: take --seq_len={longest}"
        with pytest.raises(UserError, match=f"a train {message}"):
            fit(f"--seq_len={seq_len}")
    with pytest.raises(UserError, match="fewer than batch_size 104"):
        fit("--batch_size=104", "--micro_batch=104")


@pytest.mark.parametrize("world", (1, 3))
@pytest.mark.parametrize("limit", (0, 500))
def test_evaluation_counts_every_learned_token_once(pairs, world, limit):
    samples = open_split(pairs, "train")
    count = len(samples.lengths)
    if limit:
        count = int(np.searchsorted(np.cumsum(samples.lengths), limit, "right"))
    ranks = [list(every_sample_once(samples, 64, 4, rank, world, limit)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1  # all-gathers of sharded models
    batches = [batch for part in ranks for batch in part]
    targets = [token for _, targets in batches for token in targets[targets != -100].tolist()]
    wanted = []
    for i in range(count):
        ids, learned = samples.sample(i)
        wanted += ids[learned].tolist()
    assert sorted(targets) == sorted(wanted)
    assert all(inputs.shape == targets.shape and len(inputs) == 4 for inputs, targets in batches)


@pytest.mark.parametrize("training", (True, False))
def test_an_evaluation_drops_nothing_and_leaves_the_mode(pairs, training):
    samples, model = open_split(pairs, "val"), tiny(seed=1)
    mora.adapt(model, rank=4, dropout=0.5)
    for _, parameter in mora.adapter_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    expected = evaluate.perplexity(model.eval(), samples, 64, 4)
    model.train(training)
    assert evaluate.perplexity(model, samples, 64, 4) == pytest.approx(expected, rel=1e-5)
    assert model.training == training


def test_losses_of_many_batches_are_added_in_float64(monkeypatch):
    """Float32 holds no odd number above 2 ** 24: what is added to a large sum would be lost."""
    class Model(torch.nn.Linear):
        def forward(self, inputs, targets):
            return torch.tensor(next(losses))

    losses, batch = iter((2.0 ** 24, 1.0, 1.0)), (torch.zeros(1, 1), torch.zeros(1, 1))
    monkeypatch.setattr(evaluate, "every_token_once", lambda *settings: [batch] * 3)
    tokens = SimpleNamespace(totals={"tokens": 3, "bytes": 3})
    assert evaluate.perplexity(Model(1, 1), tokens, 1, 1)["loss"] == (2 ** 24 + 2) / 3


def test_a_limit_below_the_first_sample_is_that_sample(pairs):
    samples = open_split(pairs, "train")
    batches = list(every_sample_once(samples, 64, 4, limit=1))
    assert len(batches) == 1 and (batches[0][1] != -100).sum() == samples.learned[0]


def test_the_loss_is_the_mean_over_learned_tokens(pairs):
    samples, model = open_split(pairs, "val"), tiny(seed=1)
    losses = []
    for i in range(len(samples.lengths)):
        ids, learned = (torch.from_numpy(part) for part in samples.sample(i))
        logits = model(ids[None, :-1])[0]
        nats = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        losses += nats[learned[1:]].tolist()
    result = evaluate.perplexity(model, samples, 64, 4)
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result["tokens"] == len(losses) == samples.learned.sum()
    response_bytes = sum(len(row["response"]) for row in prompts()[::10])
    bits_per_byte = sum(losses) / np.log(2) / response_bytes
    assert result["bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit")  # torch's own, when its compiler is imported
@pytest.mark.parametrize("method, backend", (("full", "eager"), ("mora", "aot_eager")))
def test_all_lengths_take_two_compilations(monkeypatch, method, backend):
    """One for the first length, one for all others; each with gradients, full rank without, too.

    The backend "aot_eager" traces the backward pass as well, which takes longer.
    """
    model, compile_model = tiny(seed=1), torch.compile
    if method != "full":  # frozen embeddings: the first block's input alone has no gradient
        mora.adapt(model, method=method, rank=2, targets=("down_proj",))
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile_model(
        *args, **options, backend=backend, fullgraph=True))
    model.compile_parts()
    for length in (24, 16, 40):
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(250, (4, length), generator=generator)
        targets = ids.masked_fill(torch.arange(length) < length // 2, -100)
        with torch._dynamo.config.patch(error_on_recompile=length == 40):
            ours = [model(ids, targets)]
            ours[0].backward()
            with torch.no_grad():
                ours += [model(ids, targets)] if method == "full" else []
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            torch.testing.assert_close(ours, [model(ids, targets)] * len(ours))


@pytest.mark.filterwarnings("ignore:.torch.jit")  # torch's own, when its compiler is imported
def test_many_prompts_at_once_give_what_each_gives_alone():
    """Different lengths, incomplete batches, rows that end early, grouped-query attention."""
    torch.manual_seed(0)
    model, generator = tiny(seed=3), np.random.default_rng(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4).add_(torch.randn(parameter.shape) * 0.1)
    many = [generator.integers(0, 250, generator.integers(1, 20)).tolist() for _ in range(12)]

    def alone(**options):
        return [list(sample.generate(model, prompt, 250, 40, temperature=0.0, **options))
                for prompt in many]

    endless = alone()
    tokens = {token for answer in endless for token in answer}
    # the token that ends the most answers
    stop = max(tokens, key=lambda token: sum(token in answer for answer in endless))
    wanted = alone(stop=stop)
    lengths = [len(answer) for answer in wanted]
    assert len(set(lengths)) > 3 and max(lengths) == 40 and min(lengths) < 12
    for batch in (1, 5, 12):
        assert sample.greedy(model, many, 250, 40, stop, batch) == wanted
    model.compile_parts()  # as in a run on a GPU: generating compiles nothing
    torch._dynamo.utils.counters.clear()
    assert sample.greedy(model, many, 250, 40, stop) == wanted
    assert not torch._dynamo.utils.counters["frames"]


def test_pairs_are_learned_by_heart_and_the_answers_show_it(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data.main(["uuid", "--pairs=4", "--tokenizer=bytes"])
    out = run("--method=full", "--hidden_size=64", "--intermediate_size=96", "--lr=0.01",
              "--batch_size=4", "--micro_batch=4", "--data=data/uuid", "--seq_len=80",
              "--epochs=110", "--log_every=50", "--eval_every=200", "--save_every=200",
              "--warmup=10")
    assert f"evaluate.py {out} data/uuid --answers" in capsys.readouterr().out
    evaluate.main([str(out), "data/uuid", "--answers", "--batch=3"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    scores = {"data": "data/uuid", "split": "val", "answers": 4, "exact": 1.0, "digits": 1.0}
    assert {key: result[key] for key in scores} == scores
    tok, samples = tokenizer.load("bytes"), open_split("data/uuid", "train")
    result = evaluate.scores(evaluate.answers(tiny(seed=1), tok, samples, limit=2), "uuid")
    assert result["answers"] == 2 and result["exact"] == 0 and result["digits"] < 0.3


def test_a_sample_that_begins_with_its_answer_asks_nothing(tmp_path):
    words = np.array([5 | sft.FIRST | sft.LEARNED, 6 | sft.LEARNED], dtype=np.uint32)
    tok = tokenizer.load("bytes")
    shards.prepare(tmp_path / "d", tok, {}, [(lambda: [words], ["train"])],
                   encode=lambda tok, words: (words, {"bytes": 1, "learned": 2}),
                   facts={"kind": "samples", "format": "prompt"})
    assert open_split(tmp_path / "d", "train").learned.tolist() == [1]  # nothing predicts the first
    with pytest.raises(UserError, match="sample 0 has no prompt before its answer"):
        evaluate.answers(tiny(seed=1), tok, open_split(tmp_path / "d", "train"))


def test_every_id_and_any_number_of_tokens_can_be_learned(tmp_path):
    ids = np.arange(300, dtype=np.uint32) % 257
    words = ids | np.where(np.arange(300) % 7, sft.LEARNED, 0).astype(np.uint32)
    words[0] |= np.uint32(sft.FIRST)
    shards.prepare(tmp_path / "d", tokenizer.load("bytes"), {}, [(lambda: [words], ["train"])],
                   encode=lambda tok, words: (words, {"bytes": 1, "learned": 257}),
                   facts={"kind": "samples", "format": "prompt"})
    samples = open_split(tmp_path / "d", "train")
    assert samples.learned.tolist() == [257] and ids[257] == 0
    found, learned = samples.sample(0)
    assert found.tolist() == ids.tolist() and learned.tolist() == [i % 7 > 0 for i in range(300)]
    (inputs, targets), = every_sample_once(samples, 300, 1)  # it fits exactly
    assert (targets != -100).sum() == 257 and inputs.shape == (1, 300)


def test_rows_without_a_sample_count_nothing(pairs):
    inputs, targets = open_split(pairs, "train").rows([], 64, 4)
    assert inputs.shape == targets.shape == (4, 8) and (targets == -100).all()


def test_an_answer_may_be_longer_than_the_references_and_is_compared_with_the_first(
        tmp_path, monkeypatch):
    """By one token: with fewer, a text that goes on after the reference would be exact."""
    chat = [{"role": role, "content": content} for role, content in (
        ("user", "1?"), ("assistant", "one"), ("user", "2?"), ("assistant", "two, the longest"))]
    sft.prepare(tmp_path / "d", "bytes", {}, [(lambda: [{"messages": chat}], ["val"]),
                (lambda: [{"messages": chat[:2]}], ["train"])], "messages")
    calls, tok = [], tokenizer.load("bytes")

    def greedy(model, prompts, vocab_size, max_new_tokens, *rest):
        calls.append((vocab_size, max_new_tokens))
        return [[ord("x")] for _ in prompts]

    monkeypatch.setattr(evaluate, "greedy", greedy)
    samples = open_split(tmp_path / "d", "val")
    for vocab_size in (257, 300, 200):
        model = SimpleNamespace(cfg=SimpleNamespace(vocab_size=vocab_size))
        for most in (0, 9):
            record, = evaluate.answers(model, tok, samples, max_new_tokens=most)
    assert calls == [(257, 4), (257, 9), (257, 4), (257, 9), (200, 4), (200, 9)]
    assert record == {"question": "<|user|>\n1?\n<|assistant|>\n", "answer": "x",
                      "reference": "one"}


def test_evaluate_does_what_its_options_say(run, corpus, pairs, capsys):
    out, results = run("--steps=2", "--warmup=1"), {}
    for word in ("--seq_len=16", "--tokens=100", "--split=train", "--dtype=bfloat16"):
        capsys.readouterr()
        evaluate.main([str(out), str(corpus), word])
        results[word] = json.loads(capsys.readouterr().out)
    sizes = {split: len(open_split(corpus, split)) - 1 for split in ("train", "val")}
    assert [result["tokens"] for result in results.values()] == [
        sizes["val"], 100, sizes["train"], sizes["val"]]
    exact, rounded = (results[word]["loss"] for word in ("--seq_len=16", "--dtype=bfloat16"))
    assert exact != rounded == pytest.approx(exact, rel=1e-2)
    evaluate.main([str(out), str(pairs)])  # samples longer than the windows of its training
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    assert tokens == open_split(pairs, "val").learned.sum()


def test_windows_longer_than_those_of_training_are_noted(run, corpus, pairs, capsys):
    out = run("--steps=2", "--method=full")
    for path in (out, checkpoint.steps_of(out)[-1] / "base"):
        for words, seq_len in (([str(corpus)], 0), ([str(corpus), "--seq_len=16"], 0),
                               ([str(corpus), "--seq_len=17"], 17),
                               ([str(pairs)], open_split(pairs, "val").lengths.max())):
            capsys.readouterr()
            evaluate.main([str(path), *words])
            assert capsys.readouterr().err == (
                f"note: windows of {seq_len} tokens, training had 16: scores beyond that length "
                "are not comparable\n" if seq_len else "")


def test_answers_need_samples(run, corpus):
    out = run("--steps=2", "--warmup=1")
    with pytest.raises(UserError, match="--limit and --max_new_tokens are of answers"):
        evaluate.main([str(out), str(corpus), "--limit=3"])
    with pytest.raises(UserError, match="is text: answers need the prompts"):
        evaluate.main([str(out), str(corpus), "--answers"])


WANTED = "01234567-89ab-4def-8123-456789abcdef"


@pytest.mark.parametrize("answer, right", [
    (WANTED, 32), (f" {WANTED}\n", 32), (WANTED.replace("-", ""), 32), (WANTED[:8], 8), ("", 0),
    ("x" + WANTED[1:], 31), ("x" + WANTED, 0), (WANTED + "0", 32), ("f" * 36, 2),
])
def test_digits_are_counted_at_their_position(answer, right):
    assert evaluate.scores(records_of((answer, WANTED)), "uuid")["digits"] == right / 32


def records_of(*pairs):
    return [{"question": "?", "answer": answer, "reference": wanted} for answer, wanted in pairs]


def test_scores_of_uuids_are_means_over_the_answers():
    scores = evaluate.scores(records_of((WANTED, WANTED), (WANTED[:8], WANTED)), "uuid")
    assert scores == {"answers": 2, "exact": 0.5, "digits": 0.625}


@pytest.mark.parametrize("text, value", [
    ("#### 1234", 1234), ("####1,234", 1234), ("so\n#### $1,234.", 1234),
    ("#### $ 1234.00\n", 1234), ("#### 7\n#### 1234 dollars", 1234),
    ("The answer is: 1,234.", 1234), ("#### 1234\nThe answer is: 5", 1234), ("#### -5", -5),
    ("#### -$5", -5), ("#### $-5", -5), ("#### .5", 0.5), ("#### 0.50", 0.5), ("no", None),
    ("####", None), ("#### x 5", None), ("12", None), ("#### **5**", 5), ("#### 5km/h", 5),
    *((f"#### {text}", None) for text in ("1/2", "12 / 5", "2^3", "12:30", "1e3", "1.5e3")),
    ("#### 7\n#### 1/2", None),
])
def test_numbers_are_equal_in_any_notation(text, value):
    assert evaluate.number(text) == value


def test_scores_of_numbers_count_equal_numbers():
    pairs = (("a #### 18.", "b #### 18"), ("none", "#### 2"), ("#### 1", "#### 1"))
    scores = evaluate.scores(records_of(*pairs, ("####", "####")), "question")
    assert scores == {"answers": 4, "exact": 1 / 2, "numbers": 1 / 2}
    assert "numbers" not in evaluate.scores(records_of(("a", "a")), "prompt")
    assert "numbers" not in evaluate.scores(records_of(("#### (A)", "#### (A)")), "question")
    assert "numbers" not in evaluate.scores(records_of(("#### 1", "#### 1"), ("a", "a")), "prompt")
