"""Our model is transformers' LlamaForCausalLM, to rounding."""
import pytest
import torch
from torch.nn import functional as F

import sample
from model import Llama, LlamaConfig, RMSNorm

SHAPES = {"multi-head": (4, False), "grouped-query": (2, False), "tied": (1, True)}


def ours(kv_heads, tied, vocab=97):
    cfg = LlamaConfig(vocab_size=vocab, hidden_size=32, intermediate_size=88, num_hidden_layers=2,
                      num_attention_heads=4, num_key_value_heads=kv_heads, rope_theta=5000.0,
                      tie_word_embeddings=tied, rms_norm_eps=1e-5)
    model = Llama(cfg, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at the start, so that a mistake shows
            parameter.mul_(5).add_(torch.randn(parameter.shape) * 0.05)
    return model


def theirs(model):
    from transformers import LlamaConfig as Config
    from transformers import LlamaForCausalLM
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "rope_theta", "rms_norm_eps",
            "tie_word_embeddings")
    return LlamaForCausalLM(Config(**{key: getattr(model.cfg, key) for key in keys})).eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_match_hugging_face_both_ways(shape):
    model = ours(*SHAPES[shape])
    other = theirs(model)
    ids = torch.randint(97, (2, 33))
    with torch.no_grad():
        weights = other.state_dict()
        if model.cfg.tie_word_embeddings:
            del weights["lm_head.weight"]
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        model.load_state_dict(weights)  # their weights in our model
        torch.testing.assert_close(model(ids), other(ids).logits, rtol=0, atol=1e-4)
        model.load_state_dict(before)   # our weights in theirs
        missing = other.load_state_dict(before, strict=False)
        assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}
        other.tie_weights()
        difference = model(ids) - other(ids).logits
        assert difference.abs().max() < 1e-4 and model(ids).std() > 0.1
        targets = ids.roll(-1, 1)
        expected = F.cross_entropy(other(ids).logits.flatten(0, 1), targets.flatten())
        assert abs(model(ids, targets) - expected) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cache_changes_nothing(shape):
    model, ids = ours(*SHAPES[shape]), torch.randint(97, (3, 20))
    cache = model.new_cache()
    for past in cache:
        past.room = 3  # it has to grow
    with torch.no_grad():
        parts = [model(ids[:, :7], cache=cache)]
        parts += [model(ids[:, i:i + 1], cache=cache) for i in range(7, 20)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=0, atol=1e-3)


def test_the_future_is_not_seen():
    model, ids = ours(2, False), torch.randint(97, (1, 12))
    changed = ids.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % 97
    with torch.no_grad():
        assert torch.equal(model(ids)[0, :8], model(changed)[0, :8])
        assert not torch.equal(model(ids)[0, 8], model(changed)[0, 8])


def test_targets_of_minus_100_do_not_count():
    model, ids = ours(2, False), torch.randint(97, (1, 12))
    targets = ids.clone()
    targets[0, 6:] = -100
    expected = F.cross_entropy(model(ids)[0, :6], ids[0, :6])
    torch.testing.assert_close(model(ids, targets), expected)


def test_padding_the_vocabulary_adds_no_token():
    model = ours(2, False, vocab=65)  # 128 rows in the product
    ids = torch.randint(65, (2, 5))
    assert model(ids).shape == (2, 5, 65) and model.lm_head.weight.shape == (65, 32)
    # a checkpoint may have more rows than its tokenizer has tokens: those are never drawn
    with torch.no_grad():
        model.lm_head.weight[60:] = 100 * model.lm_head.weight[3]
    generator = torch.Generator().manual_seed(0)
    drawn = list(sample.generate(model, [1], 60, 50, temperature=5.0, generator=generator))
    assert max(drawn) < 60 and len(drawn) == 50
    greedy = list(sample.generate(model, [1], 60, 3, temperature=0.0))
    assert greedy == list(sample.generate(model, [1], 60, 3, top_k=1))


def test_compute_dtype_is_chosen_and_parameters_stay_float32():
    model, ids = ours(2, False), torch.randint(97, (2, 16))
    exact = model(ids, ids)
    model.compute_dtype = torch.bfloat16
    loss = model(ids, ids)
    loss.backward()
    assert model(ids).dtype == torch.float32
    assert loss.dtype == torch.float32 and 0 < (loss - exact).abs() < 0.1
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_norm_in_bfloat16_is_rounded_once():
    norm, x = RMSNorm(64, 1e-6), 3 * torch.randn(50, 64).bfloat16()
    torch.nn.init.normal_(norm.weight)
    exact = norm.weight * F.rms_norm(x.double(), (64,), eps=1e-6)
    error, rounding = (norm(x) - exact).norm(), (exact.bfloat16() - exact).norm()
    assert norm(x).dtype == torch.bfloat16 and error < 1.001 * rounding


@pytest.mark.parametrize("residual_init", (False, True))
def test_the_first_weights_have_the_deviation_of_their_kind(residual_init):
    """0.02, with residual_init 0.02 / sqrt(2 layers) for what adds to the residual; norms 1."""
    cfg = LlamaConfig(vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                      num_attention_heads=4, num_key_value_heads=4)
    for name, weight in Llama(cfg, 1, residual_init).named_parameters():
        adds = residual_init and name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / 6 ** 0.5 if adds else 0.02
        if weight.ndim == 1:
            assert (weight == 1).all()
        else:
            assert weight.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(weight.mean()) < 0.1 * std


def test_golden_losses():
    """A fixed seed gives a fixed model: what a refactor must not change."""
    cfg = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=88, num_hidden_layers=2,
                      num_attention_heads=4, num_key_value_heads=2)
    ids = torch.arange(64).reshape(2, 32) % 97
    loss = Llama(cfg, seed=7)(ids, ids + 1).item()
    assert loss == pytest.approx(4.58458948, abs=1e-5)
