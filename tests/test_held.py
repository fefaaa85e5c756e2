"""results/continual/held.py: the part of a matrix that lies in the space of the updates."""
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import mora

HELD = Path(mora.__file__).parent / "results" / "continual" / "held.py"


@pytest.mark.parametrize("operator, groups", [("truncate", "strided"), ("truncate", "gradient"),
                                              ("share", "strided"), ("share", "permute")])
def test_held_is_the_part_of_a_matrix_in_the_space_of_the_updates(operator, groups):
    """Against least squares with a basis of the space."""
    script = runpy.run_path(str(HELD))
    layer = mora.adapt(nn.ModuleDict({"q": nn.Linear(11, 17)}), rank=1, operator=operator,
                       targets=("q",), groups="permute" if groups == "gradient" else groups)["q"]
    if groups == "gradient":
        script["sort_features"](layer.update, torch.randn(17, 11))
    basis = []
    for entry in layer.update.M.flatten().new_ones(len(layer.update.M) ** 2).diag():
        layer.update.M.data.copy_(entry.view_as(layer.update.M))
        basis.append(layer.update.delta().detach().flatten())
    matrix = torch.randn(17, 11)
    inside = torch.linalg.qr(torch.stack(basis).T)[0].T @ matrix.flatten()
    expected = inside.square().sum() / matrix.square().sum()
    torch.testing.assert_close(script["held"](layer.update, matrix), expected)
    torch.testing.assert_close(script["held"](layer.update, basis[3].view(17, 11)),
                               torch.tensor(1.0))


def test_held_by_the_best_lora_is_the_part_of_the_largest_singular_values():
    measure = runpy.run_path(str(HELD))["measure"]
    measure.__globals__["KINDS"] = ()
    half = torch.diag(torch.tensor([2.0] * 8 + [1.0] * 32))
    numbers = measure(None, {}, {"change": {"a": half, "b": torch.eye(40)}})
    assert numbers == {"lora_best_r8.change": (0.5 + 0.2) / 2,
                       "lora_best_r32.change": (56 / 64 + 0.8) / 2}


def test_truncate_holds_the_features_of_the_largest_gradients():
    """Layers that share the fold of their input have orders of their own."""
    script, generator = runpy.run_path(str(HELD)), torch.Generator().manual_seed(0)
    model = nn.ModuleDict({"q": nn.Linear(11, 17), "k": nn.Linear(11, 17)})
    mora.adapt(model, rank=1, operator="truncate", targets=("q", "k"), groups="permute")
    gradients = {}
    for name, layer in model.items():
        gradients[name] = torch.zeros(17, 11)
        gradients[name][3:8, torch.randperm(11, generator=generator)[:5]] = 1.0  # r^ is 5
        script["sort_features"](layer.update, gradients[name])
    for name, layer in model.items():
        torch.testing.assert_close(script["held"](layer.update, gradients[name]), torch.tensor(1.0))
