"""Published fine-tuning numbers come from results/runner.py, which keeps models and copies weights: it must train as train.py does."""
import sys
import time
from pathlib import Path

import pytest
from test_train import records

sys.path.insert(0, str(Path(__file__).parent.parent / "results"))
import runner


@pytest.mark.parametrize("method", ["lora", "mora"])
def test_runs_that_share_a_model_are_train_pys_runs(fit, pairs, config, tmp_path, method):
    base, words = fit("--steps=2", "--method=full"), [f"--method={method}", "--train_rest=false", "--steps=7"]
    out = tmp_path / "many"
    out.mkdir()
    place = runner.Place(out, base, time.time() + 1e6, [str(config), f"--data={pairs}", "--seq_len=64"], {method: words, "base": words}, (8,))
    for seed, lr in ((1, 1e-3), (2, 1e-2)):
        for until in (4, 10 ** 9):  # the second time from its state, after another model's weights
            row = place.advance(runner.Task(0, method, lr, seed, until), place.model(method, seed), lambda *_, last: False, 10 ** 9)
            place.model(method, 3)
        alone = fit(*words, f"--init_from={base}", f"--seed={seed}", f"--lr={lr}", f"--out={tmp_path / str(seed)}")
        assert dict(row["loss"]) == records(alone) and row["step"] == 7
    looks = []
    enough = lambda place, model, step, row, last: looks.append(step) or step == 4
    row = place.advance(runner.Task(0, method, 1e-3, 4, 10 ** 9), place.model(method, 4), enough, 2)
    assert (row["status"], row["step"], looks) == ("reached", 4, [2, 4])


def test_a_search_ends_between_worse_rates():
    def ends(score, first=(3e-4, 1e-3)):
        scores = {}
        while True:
            tried, best = runner.search(first, scores)
            if best:
                return sorted(tried), best
            scores |= {lr: score(lr) for lr in tried}

    assert ends(lambda lr: abs(lr - 1e-3)) == ([3e-4, 1e-3, 3e-3], 1e-3)
    assert ends(lambda lr: abs(lr - 1e-4)) == ([3e-5, 1e-4, 3e-4, 1e-3], 1e-4)
    assert ends(lambda lr: -lr) == ([3e-4, 1e-3, 3e-3, 1e-2, 3e-2], 3e-2)  # at the grid's or the search's end
    assert runner.search((3e-4, 1e-3), {3e-4: 1.0}) == ([3e-4, 1e-3], None)
