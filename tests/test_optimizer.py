"""AdamW is torch's and transformers' training loop; Muon is torch's; groups, rates, resume."""
import copy
import dataclasses
import math

import pytest
import torch
from conftest import stopped_copy
from test_model import ours, theirs
from test_train import records, same
from torch.nn import functional as F

import checkpoint
import mora
import optimizer
from config import Config, UserError, schedule_warnings
from model import Llama, LlamaConfig
from train import prepare_model

SHAPES = [(16, 16), (24, 40), (40, 24), (13, 13), (7, 30), (16, 16)]
MUON_RUN = ["--optimizer=muon", "--rest_lr=2e-2", "--groups=permute", "--restart_every=7",
            "--micro_batch=4"]


def tiny(**settings):
    """(cfg, model) of a small run, adapted as the Config's keys say."""
    cfg = Config(**{"operator": "share", "rank": 4, "hidden_size": 16, "intermediate_size": 24,
                    "num_hidden_layers": 2, "num_attention_heads": 2, **settings})
    shape = LlamaConfig(vocab_size=65, **cfg.model())
    model = Llama(shape, seed=0)
    if cfg.adapter():
        mora.adapt(model, **cfg.adapter())
    return cfg, model


def batch_of(generator, tokens=8):
    ids = torch.randint(65, (2, tokens + 1), generator=generator)
    return ids[None, :, :-1], ids[None, :, 1:]


# ------------------------------------------------------------
# Muon

@pytest.mark.parametrize("elements", (2 ** 26, 300, 1))
def test_muon_is_torchs(monkeypatch, elements):
    """torch orthogonalizes in bfloat16, so the steps are equal to about its rounding.
    elements: the two matrices of one shape are one batch, or two."""
    monkeypatch.setattr(optimizer, "BATCH_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    a = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    b = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    group = {"params": a, "ratio": 1.0, "muon": True, "weight_decay": 0.1}
    us = optimizer.AdamWMuon([group], lr=1e-2)
    them = torch.optim.Muon(b, lr=1e-2, weight_decay=0.1, momentum=0.95, nesterov=True,
                            adjust_lr_fn="match_rms_adamw")
    for rate in (1e-3, 1e-2, 5e-2, 2e-2, 4e-2):
        us.param_groups[0]["lr"] = them.param_groups[0]["lr"] = rate
        for p, q in zip(a, b, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        us.step()
        them.step()
    for p, q, before in zip(a, b, start, strict=True):
        update = q.detach() - before
        assert (p - q).norm() < 1e-2 * update.norm(), p.shape


def test_a_matrix_without_a_gradient_stays():
    still, moved = (torch.nn.Parameter(torch.randn(4, 6)) for _ in range(2))
    group = {"params": [still, moved], "ratio": 1.0, "muon": True, "weight_decay": 0.1}
    steps, before = optimizer.AdamWMuon([group], lr=1e-2), still.detach().clone()
    moved.grad = torch.randn(4, 6)
    steps.step()
    assert torch.equal(still, before) and list(steps.state) == [moved]


@pytest.mark.parametrize("shape", sorted(set(SHAPES)))
def test_singular_values_move_to_about_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    result, = optimizer.orthogonalize([matrix])
    u, values, v = torch.linalg.svd(result, full_matrices=False)
    assert 0.6 < values.min() and values.max() < 1.3
    turned = u.T @ matrix @ v.T  # diagonal: the singular vectors stay
    assert (turned - turned.diagonal().diag()).norm() < 1e-3 * matrix.norm()


def test_a_gradient_of_zeros_moves_nothing():
    """As that of LoRA's A in the first step; others in its batch are what they are alone."""
    zeros, other = torch.zeros(6, 9), torch.randn(6, 9)
    results = optimizer.orthogonalize([zeros, other, 1e3 * other])
    assert torch.equal(results[0], zeros)
    torch.testing.assert_close(results[1:], [optimizer.orthogonalize([other])[0]] * 2)


@pytest.mark.parametrize("shape", sorted(set(SHAPES)))
def test_padding_to_multiples_of_8_changes_nothing(shape):
    generator = torch.Generator().manual_seed(2)
    matrices = [torch.randn(shape, generator=generator) for _ in range(3)]
    a, b, c = 3.4445, -4.7750, 2.0315
    for matrix, result in zip(matrices, optimizer.orthogonalize(matrices), strict=True):
        x = matrix / matrix.norm()
        for _ in range(5):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        assert result.shape == shape
        torch.testing.assert_close(result, x, rtol=0, atol=1e-5)


def test_a_restart_forgets_the_momentum():
    cfg, model = tiny(optimizer="muon")
    steps = optimizer.build_optimizer(cfg, model, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        optimizer.optimizer_step(model, steps, batch_of(generator), 1e-2)
    matrices = [p for _, p in mora.adapter_parameters(model)]
    rest = [p for p in model.parameters() if p.requires_grad and p not in set(matrices)]
    assert all(steps.state[p]["momentum"].norm() > 0 for p in matrices)
    assert mora.restart(model, steps, cycle=1)["states"] == len(matrices) == 14
    assert not any(steps.state.get(p) for p in matrices)
    assert all(steps.state[p]["step"] == 3 for p in rest)

    batch = batch_of(generator)
    optimizer.accumulate_gradients(model, batch)
    gradients = [p.grad.clone() for p in matrices]
    model.zero_grad()
    optimizer.optimizer_step(model, steps, batch, 1e-2)
    for p, gradient in zip(matrices, gradients, strict=True):
        torch.testing.assert_close(steps.state[p]["momentum"], 0.05 * gradient)


def test_resume_with_muon_is_bitwise_identical(run):
    whole = run(*MUON_RUN)
    assert records(whole, "val_loss")[20] == pytest.approx(3.61230, rel=1e-4)
    out = stopped_copy(whole, 10, whole.with_name("parts"))
    run(*MUON_RUN, f"--out={out}", "--resume")
    assert same(whole / "step-00000020", out / "step-00000020")
    losses = records(whole)
    assert records(out) == {step: losses[step] for step in range(11, 21)}
    assert records(whole, "restart") == {7: 1, 14: 2}


# ------------------------------------------------------------
# groups and rates

REST = ("embed_tokens", "lm_head", "norm")
METHODS = {"full": {"method": "full"}, "mora": {},
           "lora": {"method": "lora"},
           "lora+": {"method": "lora", "lora_plus_ratio": 4.0},
           "dora": {"dora": True}}


def settings_by_name(cfg, model):
    """{name of a parameter: its group}."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    steps = optimizer.build_optimizer(cfg, model, torch.device("cpu"))
    return {names[p]: group for group in steps.param_groups for p in group["params"]}


@pytest.mark.parametrize("kind", ("adamw", "muon"))
@pytest.mark.parametrize("method", METHODS)
def test_rest_lr_is_of_embeddings_head_and_norms_alone(method, kind):
    cfg, model = tiny(lr=1e-3, rest_lr=5e-3, weight_decay=0.1, optimizer=kind, **METHODS[method])
    groups = settings_by_name(cfg, model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert groups.keys() == trained
    for name, group in groups.items():
        is_rest = "update" not in name and any(word in name for word in REST)
        ratio = 1.0
        if is_rest:
            ratio = 5.0
        elif name.endswith(".B") and method == "lora+":
            ratio = 4.0
        is_vector = model.get_parameter(name).ndim == 1
        assert group["ratio"] == pytest.approx(ratio), name
        assert group["weight_decay"] == (0.0 if is_vector else 0.1), name
        assert group["muon"] == (kind == "muon" and not is_rest and not is_vector), name
    assert {name for name in groups if groups[name]["ratio"] == pytest.approx(5.0)}


@pytest.mark.parametrize("lr", (5e-3, 1e-2))
def test_rates_that_become_equal_or_differ_do_not_stop_a_resumed_run(run, lr):
    """Groups that depended on lr = rest_lr ordered optimizer.pt otherwise than the new lr does."""
    run(f"--lr={lr}", "--rest_lr=5e-3", "--steps=4")
    out = run("--lr=2e-2" if lr == 5e-3 else "--lr=5e-3", "--rest_lr=5e-3", "--steps=5", "--resume")
    assert checkpoint.read_state(checkpoint.steps_of(out)[-1])["step"] == 5
    with pytest.raises(UserError, match="another experiment: rest_lr was 0.005, now 0.0$"):
        run("--lr=5e-3", "--steps=5", "--resume")


def test_a_step_takes_the_rates_of_the_groups():
    cfg, model = tiny(lr=1e-3, rest_lr=5e-3, **METHODS["lora+"])
    steps = optimizer.build_optimizer(cfg, model, torch.device("cpu"))
    optimizer.optimizer_step(model, steps, batch_of(torch.Generator().manual_seed(0)), 2e-4)
    rates = {group["ratio"]: group["lr"] for group in steps.param_groups}
    assert rates == pytest.approx({1.0: 2e-4, 4.0: 8e-4, 5.0: 1e-3})


@pytest.mark.parametrize("clip", (0.0, 1e-3))
def test_a_step_returns_the_mean_loss_and_the_norm_before_clipping(clip):
    cfg, model = tiny(method="full")
    generator, before = torch.Generator().manual_seed(0), copy.deepcopy(model)
    ids, targets = (torch.cat(parts) for parts in zip(
        *[batch_of(generator) for _ in range(3)], strict=True))
    steps = optimizer.build_optimizer(cfg, model, torch.device("cpu"))
    loss, norm = optimizer.optimizer_step(model, steps, (ids, targets), 1e-3, clip).tolist()
    expected = before(ids.flatten(0, 1), targets.flatten(0, 1))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    gradient = torch.cat([p.grad.flatten() for p in before.parameters()])
    assert norm == pytest.approx(gradient.norm().item(), rel=1e-5) and norm > 10 * 1e-3
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_blocks_have_the_same_gradients(method):
    """And compute twice: a block runs again in the backward pass, with the same dropout."""
    cfg, model = tiny(**METHODS[method])
    for _, layer in mora.adapted_layers(model):
        layer.dropout = 0.3 * (method == "lora+")
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, x: calls.append(module))
    batch, gradients = batch_of(torch.Generator().manual_seed(0)), []
    for model.checkpoint_blocks in (False, True):
        torch.manual_seed(1)
        optimizer.accumulate_gradients(model, batch)
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    assert len(calls) == 3
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_the_groups_of_old_checkpoints(method):
    """With AdamW and one rate: matrices, LoRA+'s B, vectors, each in the model's order."""
    cfg, model = tiny(weight_decay=0.1, **METHODS[method])
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    expected = {"matrices": [], "B": [], "vectors": []}
    for name, p in trained:
        kind = "matrices" if p.ndim == 2 else "vectors"
        if name.endswith(".B") and method == "lora+":
            kind = "B"
        expected[kind].append(name)
    names = {p: name for name, p in trained}
    groups = optimizer.build_optimizer(cfg, model, torch.device("cpu")).param_groups
    found = [[names[p] for p in group["params"]] for group in groups]
    assert found == [kind for kind in expected.values() if kind]
    assert len(found) == (3 if method == "lora+" else 2)


@pytest.mark.parametrize("kind", ("adamw", "muon"))
def test_a_resumed_state_keeps_the_settings_of_this_run(run, kind):
    step = checkpoint.steps_of(run(f"--optimizer={kind}", "--steps=3", "--weight_decay=0.1"))[0]
    before = torch.load(step / "optimizer.pt", weights_only=True)["state"]
    written = Config(**checkpoint.read_state(step)["config"])
    cfg = dataclasses.replace(written, weight_decay=0.3, beta1=0.8, beta2=0.95)
    model = Llama(LlamaConfig(vocab_size=257, **cfg.model()), cfg.seed)
    after = prepare_model(cfg, model, torch.device("cpu"), cycle=0)
    assert checkpoint.resume(step, model, after)["step"] == 3
    assert {group["weight_decay"] for group in after.param_groups} == {0.3, 0.0}
    assert {group["betas"] for group in after.param_groups} == {(0.8, 0.95)}
    state = after.state_dict()["state"]
    assert len(state) == sum(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(state, before, rtol=0, atol=0)


def test_no_rate_is_negative():
    """A restart whose warm-up would reach past the last step."""
    cfg = Config(lr=1.0, steps=1000, warmup=100, schedule="linear", min_lr_ratio=0.0,
                 restart_every=990, restart_warmup=50)
    rates = [optimizer.learning_rate(step, cfg) for step in range(cfg.steps)]
    assert min(rates) >= 0 and max(rates) == 1.0
    assert rates[989] == pytest.approx(11 / 900) and max(rates[990:]) <= rates[989]


def test_a_restart_in_the_warm_up_of_the_run_has_no_warm_up_of_its_own():
    """It would begin with a fall after the rate has risen to its peak."""
    cfg = Config(lr=1.0, steps=200, warmup=100, restart_steps=(90, 100), restart_warmup=50)
    rates = [optimizer.learning_rate(step, cfg) for step in (89, 90, 99, 100, 101)]
    assert rates[:3] == pytest.approx([0.9, 0.91, 1.0]) and 0 < rates[3] < rates[4] < 0.05
    cfg = Config(lr=1.0, steps=200, warmup=100, restart_steps=(90,), restart_warmup=50)
    plain = Config(lr=1.0, steps=200, warmup=100)
    for step in range(200):
        assert optimizer.learning_rate(step, cfg) == optimizer.learning_rate(step, plain)
    for restarts, notes in (((90, 120), 0), ((100, 120), 1)):
        cfg = Config(steps=200, warmup=100, restart_steps=restarts, restart_warmup=50)
        assert len(list(schedule_warnings(cfg))) == notes


# ------------------------------------------------------------
# five steps against transformers' model and torch's AdamW

LR, CLIP, DECAY = 1e-2, 1.0, 0.5
RATES = (0.5, 1.0, 1.0, 0.775, 0.325)  # warm-up of 2 of 5 steps, then a cosine to 0.1
MISTAKES = ("no clipping", "no decay", "decay of vectors", "constant rate", "one micro-batch",
            "unweighted micro-batches")


def five_batches():
    """[(ids, targets)] (3 micro-batches, 2, 12); they differ in how many targets count."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for i in range(5):
        ids = torch.randint(97, (3, 2, 12), generator=generator)
        targets = ids.roll(-1, -1)
        targets[1, :, 2 + i:] = -100
        batches.append((ids, targets))
    return batches


def project_loop(model):
    cfg = Config(method="full", lr=LR, steps=5, warmup=2, weight_decay=DECAY, beta2=0.95)
    steps = optimizer.build_optimizer(cfg, model, torch.device("cpu"))
    for step, (ids, targets) in enumerate(five_batches()):
        counts = (targets != -100).sum((1, 2))
        weights = counts * len(counts) / counts.sum()
        rate = optimizer.learning_rate(step, cfg)
        optimizer.optimizer_step(model, steps, (ids, targets, weights), rate, CLIP)


def reference_loop(model, mistake=None):
    """The same five steps of a transformers model, each batch in one piece."""
    vectors = [p for p in model.parameters() if p.ndim < 2]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    decay_of_matrices = 0.0 if mistake == "no decay" else DECAY
    decay_of_vectors = DECAY if mistake == "decay of vectors" else 0.0
    steps = torch.optim.AdamW([{"params": matrices, "weight_decay": decay_of_matrices},
                               {"params": vectors, "weight_decay": decay_of_vectors}],
                              betas=(0.9, 0.95))
    for rate, (ids, targets) in zip(RATES, five_batches(), strict=True):
        if mistake == "one micro-batch":
            ids, targets = ids[:1], targets[:1]
        logits = model(ids.flatten(0, 1)).logits.flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten())
        if mistake == "unweighted micro-batches":
            parts = zip(logits.chunk(3), targets.flatten().chunk(3), strict=True)
            loss = sum(F.cross_entropy(*part) for part in parts) / 3
        loss.backward()
        if mistake != "no clipping":
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in steps.param_groups:
            group["lr"] = LR * (1.0 if mistake == "constant rate" else rate)
        steps.step()
        steps.zero_grad()


def largest_difference(mistake):
    """Largest relative difference, over tensors, of what five steps changed."""
    torch.manual_seed(0)  # ours draws from it
    model = ours(2, False)
    other = theirs(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    other.load_state_dict(before)
    project_loop(model)
    reference_loop(other, mistake)
    after, expected = model.state_dict(), other.state_dict()
    differences = []
    for name, start in before.items():
        change = (expected[name] - start).norm()
        differences.append(((after[name] - expected[name]).norm() / change).item())
    return max(differences)


def test_five_steps_are_those_of_transformers_and_adamw():
    difference = largest_difference(None)
    assert math.isfinite(difference) and difference < 1e-3


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_part_of_a_step_shows(mistake):
    assert largest_difference(mistake) > 2e-2
