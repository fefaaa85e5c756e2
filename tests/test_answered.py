"""results/answered.py: which answers are right, and where a run of UUIDs ends; nothing trains."""
import copy
import json
import lzma
import signal
from types import SimpleNamespace

import answered
import pytest
import torch

import evaluate
import mora
import train

EVALUATION = "the model", "samples", 64, 4, 0, 1, 1000  # arguments of perplexity


@pytest.fixture
def stubs(monkeypatch):
    """No data, and answers whose share of right digits is the next of stubs.shares; the counts of
    questions are in stubs.asked, signals in stubs.sent."""
    found = SimpleNamespace(shares=[], asked=[], sent=[])

    def share(model, samples, pairs):
        found.asked.append(pairs)
        return found.shares.pop(0)

    monkeypatch.setattr(answered, "open_split", lambda folder, split, **_: SimpleNamespace(
        format="prompt", split=split))
    monkeypatch.setattr(answered, "share", share)
    monkeypatch.setattr(evaluate, "perplexity", lambda *arguments: {EVALUATION: {"loss": 2.0}}[
        arguments])
    monkeypatch.setattr(answered.os, "kill", lambda pid, number: found.sent.append(number))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    train.stop_on_signal()
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run_of(stubs, tmp_path):
    """What train.train(cfg) does for during(): losses at step 0, each `every` and the last."""
    steps, every = 35, 10

    def trained(cfg):
        for _ in [*range(0, cfg.steps, cfg.eval_every), cfg.steps]:
            assert train.perplexity(*EVALUATION) == {"loss": 2.0}
            if stubs.sent:
                raise SystemExit(128 + stubs.sent[0])
        return "model"
    return trained, SimpleNamespace(steps=steps, eval_every=every, out=str(tmp_path))


def test_an_answer_is_right_if_its_number_is_the_references(stubs, tmp_path, monkeypatch):
    texts = [("so #### 2", "1 + 1\n#### 2"), ("#### 3", "#### 2"), ("no idea", "#### 5"),
             ("#### 1,000.0", "#### 1000"), ("#### 7", "#### -7"), ("none", "####")]
    records = [{"question": "?", "answer": a, "reference": b} for a, b in texts]
    monkeypatch.setattr(answered, "answers", lambda model, samples: {"val": records}[samples.split])
    monkeypatch.setattr(train, "train", lambda cfg: "model")
    cfg = SimpleNamespace(data="data", out=str(tmp_path / "runs" / "name"))
    with answered.at_the_end("name") as found:
        assert train.train(cfg) == "model"
    assert found["right"] == "100100" and found["numbers"] == 1 / 3
    assert found["answers"] == ["2", "3", None, "1000.0", "7", None]
    assert 0 <= found["answer_seconds"] < 60
    lines = lzma.open(tmp_path / "answers-name.jsonl.xz", "rt").read().splitlines()
    assert [json.loads(line) for line in lines] == records
    assert train.train(cfg) == "model"


def test_a_model_in_training_is_not_changed_by_its_answers(monkeypatch):
    model = mora.adapt(torch.nn.ModuleDict({"layer": torch.nn.Linear(4, 4, bias=False)}), rank=1,
                       targets=("layer",))
    model.compute_dtype = torch.float32  # as a Llama on a CPU has
    torch.nn.init.ones_(model["layer"].update.M)
    before, layer, seen = copy.deepcopy(dict(model.named_parameters())), model["layer"], []
    monkeypatch.setattr(answered.tokenizer, "load", lambda *names: None)
    monkeypatch.setattr(evaluate, "answers", lambda model, tok, samples, batch, limit: seen.extend(
        (model, batch, limit)))
    answered.answers(model, SimpleNamespace(tokenizer="bytes", folder="data"), 3, batch=5)
    after = dict(model.named_parameters())
    assert model["layer"] is layer and model.training and after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert seen[0]["layer"] is not layer and not hasattr(seen[0]["layer"], "update")
    assert seen[1:] == [5, 3]


def test_some_pairs_at_each_evaluation_and_all_at_the_last_step(stubs, run_of, monkeypatch):
    trained, cfg = run_of
    monkeypatch.setattr(train, "train", trained)
    stubs.shares = [0.1, 0.2, 0.3, 0.4, 0.45]
    with answered.during("name") as found:
        assert train.train(cfg) == "model"
    assert found["curve"] == [[10, 0.1, 1000], [20, 0.2, 1000], [30, 0.3, 1000],
                              [35, 0.45, 10000]]  # the last: of all pairs
    assert stubs.asked == [1000, 1000, 1000, 1000, 10000] and not stubs.sent


@pytest.mark.parametrize("of_all", (0.999, 0.9985))
def test_a_run_ends_once_all_pairs_are_right_and_goes_on_if_only_some_are(
        stubs, run_of, monkeypatch, of_all):
    trained, cfg = run_of
    monkeypatch.setattr(train, "train", trained)
    stubs.shares = [0.998, 0.999, of_all, 0.5, 0.6, 0.7]
    with answered.during("name") as found:
        model = train.train(cfg)
    assert found["curve"][:2] == [[10, 0.998, 1000], [20, of_all, 10000]]
    if of_all == 0.999:
        assert (model, stubs.sent, len(found["curve"])) == ("the model", [signal.SIGTERM], 2)
    else:
        assert (model, stubs.sent, len(found["curve"])) == ("model", [], 4)


def test_a_run_that_is_stopped_in_its_last_evaluation_is_not_killed(stubs, tmp_path, monkeypatch):
    """train.py's handler takes one signal; the next one, at 99.9 %, would kill the process."""
    def trained(cfg):
        train.perplexity(*EVALUATION)  # that of step 0
        signal.raise_signal(signal.SIGTERM)       # from another process
        train.perplexity(*EVALUATION)
        raise SystemExit(130)

    monkeypatch.setattr(train, "train", trained)
    stubs.shares = [0.999, 0.9995]
    with answered.during("name") as found:
        cfg = SimpleNamespace(steps=35, eval_every=10, out=str(tmp_path))
        assert train.train(cfg) == "the model"
    assert found["curve"] == [[10, 0.9995, 10000]] and not stubs.sent


def test_a_stop_from_outside_ends_the_sweep(stubs, tmp_path, monkeypatch):
    def trained(cfg):
        raise SystemExit(143)

    monkeypatch.setattr(train, "train", trained)
    with answered.during("name"), pytest.raises(SystemExit):
        train.train(SimpleNamespace(steps=35, eval_every=10, out=str(tmp_path)))


@pytest.mark.parametrize("step, evaluations, kept", [
    (1, 1, []), (9, 1, []), (10, 1, []), (11, 2, [10]), (20, 2, [10]), (29, 3, [10, 20])])
def test_a_run_that_goes_on_evaluates_next_at_or_after_its_checkpoint(tmp_path, step, evaluations,
                                                                      kept):
    cfg = SimpleNamespace(out=tmp_path, eval_every=10)
    assert answered.evaluated(cfg) == (0, [])
    (tmp_path / f"step-{step:08d}").mkdir()
    state = {"step": step, "cycle": 0, "config": {}, "corpus": "", "files": {}, "fp8_scales": {}}
    (tmp_path / f"step-{step:08d}" / "state.json").write_text(json.dumps(state))
    curve = [[at, 0.5, 1000] for at in (10, 20) if at <= step]
    (tmp_path / "curve.json").write_text(json.dumps(curve))
    assert answered.evaluated(cfg) == (evaluations, [line for line in curve if line[0] in kept])


def test_the_share_of_right_digits_of_the_first_pairs(monkeypatch):
    def answers(model, samples, limit, batch):
        return [{"answer": "12-34", "reference": "12-44"}] * limit

    monkeypatch.setattr(answered, "answers", answers)
    assert answered.share("model", "samples", 3) == 0.75
