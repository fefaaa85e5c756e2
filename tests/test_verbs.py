"""The command lines of evaluate, sample, merge and bench."""
import pytest

import bench
import evaluate
import sample

WORDS = {evaluate: ["model", "data"], sample: ["model"], bench: []}
NUMBERS = [
    (evaluate, "batch", ("-1", "1.5", "nan", "many", "99999999999")),
    (evaluate, "limit", ("-1",)), (evaluate, "tokens", ("-1",)), (evaluate, "seq_len", ("-8",)),
    (evaluate, "max_new_tokens", ("-3",)),
    (sample, "max_new_tokens", ("-1", "1e3")), (sample, "top_k", ("-1",)),
    (sample, "seed", ("-1", "99999999999999999999999")),
    (sample, "temperature", ("-0.5", "nan", "inf", "-inf", "warm")),
    (bench, "steps", ("0", "-1")), (bench, "repeats", ("0",)), (bench, "seq_len", ("0",)),
    (bench, "processes", ("0",)), (bench, "batch", ("-1",)), (bench, "rank", ("-1",)),
]


@pytest.mark.parametrize("verb, key, values", NUMBERS,
                         ids=[f"{verb.__name__} {key}" for verb, key, _ in NUMBERS])
def test_numbers_out_of_range_are_refused_by_name(verb, key, values, capsys):
    for value in values:
        with pytest.raises(SystemExit) as caught:
            verb.main([*WORDS[verb], f"--{key}={value}"])
        error = capsys.readouterr().err.splitlines()[-1]
        assert caught.value.code == 2 and f"argument --{key}: must be a" in error, error
