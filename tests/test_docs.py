"""docs/algebra.md states what mora.py computes."""
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import mora

TEXT = (Path(__file__).parent.parent / "docs" / "algebra.md").read_text()
LETTERS = dict(zip("abcdefgh", (1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 11.0, 14.0), strict=True))


def block(name):
    """The lines of the code block that opens with this line."""
    return re.search(rf"^```{re.escape(name)}\n(.*?)^```", TEXT, re.M | re.S)[1].splitlines()


def matrix(name):
    """The matrix of letters, sums of letters and numbers in a code block, with LETTERS put in."""
    rows = [line.strip("[] ").split() for line in block(name)]
    return torch.tensor([[sum(LETTERS[term] if term in LETTERS else float(term)
                              for term in entry.split("+")) for entry in row] for row in rows])


def table(header):
    """The rows of the table whose header line contains these words, as lists of strings."""
    lines = TEXT[TEXT.index(header):].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def adapted(in_features, out_features, **options):
    """A model with one adapted layer, rank 1."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(in_features, out_features, bias=False)})
    return mora.adapt(model, rank=1, targets=("layer",), **options)


def set_matrix(model, values):
    with torch.no_grad():
        model["layer"].update.M.copy_(values)


def rank(values):
    return int(torch.linalg.matrix_rank(values.double()))


# ---------------------------------------------------------------------------------------------
# the worked example

def test_the_example_has_the_update_of_mora():
    model = adapted(4, 4)
    assert model["layer"].update.M.shape == matrix("text M").shape
    set_matrix(model, matrix("text M"))
    assert torch.equal(model["layer"].update.delta(), matrix("text dW"))
    folded = model["layer"].update.fold_in(torch.eye(4)).flatten(1).T
    assert torch.equal(folded, matrix("text F_in"))


def test_the_numbers_of_the_example_are_those_of_mora():
    stated = dict(re.split(r"\s+=\s+", line) for line in block("text numbers"))

    def vector(name):
        return torch.tensor([float(word) for word in stated[name].split()])

    model = adapted(4, 4)
    set_matrix(model, matrix("text M"))
    update, x, dy = model["layer"].update, vector("x"), vector("dy")
    assert torch.equal(update.fold_in(x).flatten(), vector("F_in x"))
    assert torch.equal(update.M @ vector("F_in x"), vector("M F_in x"))
    assert torch.equal(update(x[None])[0], vector("dW x"))
    assert torch.equal(update.fold_out(dy).flatten(), vector("F_out dy"))
    model["layer"](x[None]).backward(dy[None])
    rows = [[float(word) for word in row.split()] for row in stated["dM"].split(";")]
    assert torch.equal(update.M.grad, torch.tensor(rows))


def test_the_restart_of_the_example_is_that_of_mora():
    model = adapted(4, 4, groups="alternate")
    layer, before = model["layer"], model["layer"].weight.detach().clone()
    optimizer = torch.optim.AdamW([layer.update.M])
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    set_matrix(model, matrix("text M"))
    x = torch.randn(5, 4)
    output = layer(x).detach()
    mora.restart(model, optimizer, cycle=1)
    torch.testing.assert_close(layer(x), output)
    set_matrix(model, torch.tensor([[LETTERS["e"], LETTERS["f"]], [LETTERS["g"], LETTERS["h"]]]))
    assert torch.equal(layer.update.delta(), matrix("text dW after the restart"))
    torch.testing.assert_close(layer.merged() - before, matrix("text sum"))


def test_parameters_and_ranks_of_the_example():
    lora, first, restarted = table("| | parameters | rank of ΔW |")
    model = adapted(4, 4, method="lora")
    with torch.no_grad():
        model["layer"].update.B.fill_(1.0)
    parameters = sum(parameter.numel() for _, parameter in mora.adapter_parameters(model))
    assert [int(cell) for cell in lora[1:]] == [parameters, rank(model["layer"].update.delta())]
    parameters = adapted(4, 4)["layer"].update.M.numel()
    assert [int(cell) for cell in first[1:]] == [parameters, rank(matrix("text dW"))]
    assert [int(cell) for cell in restarted[1:]] == [parameters, rank(matrix("text sum"))]
    total = matrix("text sum")
    assert torch.equal(total[0] + total[3], total[1] + total[2])


# ---------------------------------------------------------------------------------------------
# the rest of the page

@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("operator", ["truncate", "share", "decouple", "rotate"])
def test_the_pictures_of_the_operators_are_their_matrices(operator, side):
    pictures = [re.findall(r"\[(.*?)\]", line) for line in block(f"text {operator}")]
    column = 0 if side == "left" else 1
    squares = [line[column].split() for line in pictures if len(line) > column]
    width = 6  # r_hat of rank 1 for d = k = 3 r_hat and for d = 2 r_hat, k = 4 r_hat
    out_features, in_features = width * len(squares), width * len(squares[0])
    assert mora.r_hat(1, in_features, out_features) == width
    model = adapted(in_features, out_features, operator=operator)
    M = torch.randn(width, width)
    set_matrix(model, M)

    def expected(name):
        return M @ rotation(int(name.removeprefix("MR")), width) if "R" in name else M

    rows = [torch.cat([torch.zeros(width, width) if name == "0" else expected(name)
                       for name in row], dim=1) for row in squares]
    torch.testing.assert_close(model["layer"].update.delta(), torch.cat(rows), rtol=1e-5, atol=1e-6)


def rotation(piece, width):
    """R_p of the page: turn the pair (j, j + width / 2) by piece * 10000 ** (-2 j / width)."""
    result = torch.zeros(width, width)
    for j in range(width // 2):
        angle = torch.tensor(piece * 10000 ** (-2 * j / width))
        partner = j + width // 2
        result[j, j] = result[partner, partner] = angle.cos()
        result[partner, j] = angle.sin()
        result[j, partner] = -angle.sin()
    return result


def test_the_budgets_are_those_of_mora():
    rows = table("| d | k | r | LoRA parameters |")
    assert len(rows) == 4
    for row in rows:
        d, k, r, lora, width, parameters = (int(cell) for cell in row)
        assert lora == r * (d + k)
        assert width == mora.r_hat(r, k, d)
        assert parameters == width ** 2


@pytest.mark.parametrize(("side", "groups", "ranks"), [
    (36, "alternate", [8, 15, 15, 15]), (36, "permute", [8, 15, 22, 29]),
    (32, "alternate", [8, 14, 14, 14])])
def test_the_ranks_of_merged_cycles_are_those_of_the_page(side, groups, ranks):
    total = torch.zeros(side, side, dtype=torch.float64)
    for cycle, expected in enumerate(ranks):
        model = adapted(side, side, groups=groups, cycle=cycle)
        set_matrix(model, torch.randn(8, 8))
        total += model["layer"].update.delta().detach()
        assert rank(total) == expected


def test_the_layer_in_torch_is_that_of_mora():
    names = {}
    exec("\n".join(block("python")), names)
    for shape in ((64, 36), (36, 64)):
        model = adapted(*shape)
        layer = names["MoRALinear"](nn.Linear(*shape, bias=False), rank=1)
        layer.linear.weight = model["layer"].weight
        M = torch.randn_like(layer.M)
        set_matrix(model, M)
        layer.M.data.copy_(M)
        x = torch.randn(2, 3, shape[0])
        torch.testing.assert_close(layer(x), model["layer"](x))


def test_every_name_of_mora_on_the_page_exists():
    names = set(re.findall(r"`mora\.(\w+)`", TEXT)) - {"py"}
    assert {"merge", "adapt", "MergedLinear"} <= names
    assert [name for name in names if not hasattr(mora, name)] == []
