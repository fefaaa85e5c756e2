"""The chunked loss is torch's cross-entropy, value and gradients."""
import pytest
import torch
from torch.nn import functional as F

import model as loss


@pytest.mark.parametrize("vocab, tokens, chunk", ((65, 30, 7), (64, 16, 16), (10, 5, 100)))
def test_value_and_gradients_are_torchs(monkeypatch, vocab, tokens, chunk):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    x = torch.randn(tokens, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab, 12, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(vocab, (tokens,))
    targets[::3] = -100
    ours = loss.cross_entropy(x, weight, targets)
    (3 * ours).backward()  # a factor, as accumulation has
    gradients = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    theirs = F.cross_entropy(x @ weight.T, targets, ignore_index=-100)
    (3 * theirs).backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, (x.grad, weight.grad), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        without_graph = loss.cross_entropy(x, weight, targets)
    torch.testing.assert_close(without_graph, theirs, rtol=1e-12, atol=1e-12)


def test_the_head_sees_what_counts_alone():
    targets, seen = torch.tensor([3, -100, -100, 1, -100]), []

    def kernel(logits, *rest):
        seen.append(len(logits))
        return loss.softmax_gradient(logits, *rest)

    x = torch.randn(5, 12, requires_grad=True)
    loss.cross_entropy(x, torch.randn(20, 12), targets, kernel).backward()
    assert seen == [2] and (x.grad.abs().sum(1) > 0).tolist() == [True, False, False, True, False]


def test_a_frozen_head_gets_no_gradient_and_a_second_backward_is_refused():
    x, weight = torch.randn(9, 12, requires_grad=True), torch.randn(20, 12)
    value = loss.cross_entropy(x, weight, torch.randint(20, (9,)))
    value.backward(retain_graph=True)
    assert x.grad is not None and weight.grad is None
    with pytest.raises(RuntimeError, match="once"):
        value.backward()


def test_huge_logits_stay_finite():
    x = torch.full((4, 2), 300.0, requires_grad=True)
    weight = torch.tensor([[200.0, 0], [-200, 0], [0, 0]])
    value = loss.cross_entropy(x, weight, torch.tensor([0, 1, 2, 0]))
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(x.grad).all()


def test_in_bfloat16_losses_and_sums_over_chunks_are_float32(monkeypatch):
    """The products alone are rounded, in training and without gradients alike."""
    x, weight = torch.randn(640, 32).bfloat16().requires_grad_(), torch.randn(65, 32)
    weight, targets = weight.requires_grad_(), torch.randint(65, (640,))
    logits = (x @ weight.bfloat16().T).float()
    wanted = F.cross_entropy(logits, targets)
    value = loss.cross_entropy(x, weight, targets)
    value.backward()
    whole, weight.grad = weight.grad, None
    monkeypatch.setattr(loss, "CHUNK", 5)
    in_chunks = loss.cross_entropy(x, weight, targets)
    in_chunks.backward()
    assert weight.grad.dtype == torch.float32
    assert (weight.grad - whole).norm() < 3e-3 * whole.norm()
    with torch.no_grad():
        values = value, in_chunks, loss.cross_entropy(x, weight, targets)
    torch.testing.assert_close(values, (wanted,) * 3, rtol=1e-5, atol=0)
