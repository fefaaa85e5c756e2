"""A run that is killed at any moment and resumed ends with the checkpoint of an unbroken run."""
import random
import signal
import time

from conftest import finish
from test_train import same

WORDS = ["--steps=8", "--save_every=2", "--eval_every=3", "--restart_every=3", "--groups=permute",
         "--keep=2", "--micro_batch=8", "--eval_tokens=32"]
LAST = "step-00000008"


def test_a_dozen_kills(group, config):
    def train(out, *words, **options):
        processes = group(1, *WORDS, f"--out={out}", *words, **options)
        begun = time.time()
        return *finish(processes)[0], time.time() - begun

    train(config.parent / "warm_up")
    whole, moments, killed = config.parent / "whole", random.Random(0), 0
    status, seconds = train(whole)
    assert status == 0
    for i in range(12):
        out, moment = config.parent / f"killed{i}", moments.uniform(0, seconds)
        status, taken = train(out, kill_after=moment)
        assert status in (0, -signal.SIGALRM)
        if status:
            killed += 1
        else:  # runs have become faster: the next ones are killed earlier
            seconds = min(seconds, taken)
        assert train(out, "--resume")[0] == 0, moment
        assert same(whole / LAST, out / LAST), moment
        assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    assert killed >= 6
