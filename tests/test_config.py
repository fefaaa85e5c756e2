"""A config means what it states, or one line explains what is wrong."""
import dataclasses
import inspect
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest

import lora
import mora
from config import (
    Config,
    UserError,
    check,
    experiments_text,
    help_text,
    load,
    micro_batch_size,
    read_file,
    schedule_warnings,
)
from model import LlamaConfig

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "configs").glob("*.py"))
EXPERIMENTS = [(path.stem, variant) for path in FILES for variant in read_file(path)[2] or [None]]


def write(tmp_path, text):
    (tmp_path / "c.py").write_text(text)
    return str(tmp_path / "c.py")


def shipped(name, *words):
    """The Config of configs/<name>.py."""
    return load([str(ROOT / "configs" / f"{name}.py"), *words], None)


def refused(words):
    """The one line that a command line ends with."""
    with pytest.raises(UserError) as caught:
        load(words, None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the shipped configs

@pytest.mark.parametrize("name, variant", EXPERIMENTS)
def test_every_experiment_loads(name, variant):
    cfg = shipped(name, *([variant] if variant else []))
    assert cfg.out == (f"out/{name}_{variant}" if variant else f"out/{name}")
    for processes in (1, 8):
        assert cfg.batch_size % (micro_batch_size(cfg, processes) * processes) == 0


def test_the_papers_ten_experiments_are_there():
    shapes = {"250m": (768, 2560, 24, 16), "1.3b": (2048, 5461, 24, 32)}
    for size, method in itertools.product(shapes, ("full", "lora", "relora", "mora", "remora")):
        cfg = shipped(f"{size}_{method}")
        assert (cfg.hidden_size, cfg.intermediate_size, cfg.num_hidden_layers,
                cfg.num_attention_heads) == shapes[size]
        assert cfg.method == method.removeprefix("re")
        restarts = (2000, 50) if method.startswith("re") else (0, 50)
        assert (cfg.restart_every, cfg.restart_warmup) == restarts
        assert cfg.steps * cfg.batch_size * cfg.seq_len == 5_242_880_000


# Appendix A and section 5.1: the rates that the paper searched
MATHS = {"fft": {2e-5}, "lora_r8": {1e-4, 2e-4}, "lora_r256": {1e-4, 2e-4},
         "mora_r8": {2e-4, 3e-4}, "mora_r256": {3e-5, 5e-5}}
TEXTS = {"fft": {3e-5}, "lora_r8": {3e-4, 4e-4}, "lora_r256": {3e-4, 4e-4},
         "mora_r8": {4e-4, 5e-4}, "mora_r256": {5e-5, 7e-5}}
PAIRS = {"fft": {3e-5}, "lora_r8": {1e-4, 2e-4, 3e-4}, "lora_r256": {1e-4, 2e-4, 3e-4},
         "mora_r8": {5e-5, 1e-4, 2e-4}, "mora_r256": {5e-5, 1e-4, 2e-4}}
PROTOCOLS = {"tulu": (2, 500, "cosine", 128, MATHS), "metamath": (3, 300, "cosine", 128, MATHS),
             "continual": (3, 150, "linear", 128, TEXTS), "uuid": (100, 0, "cosine", 1000, PAIRS)}


@pytest.mark.parametrize("task", PROTOCOLS)
def test_fine_tuning_follows_appendix_a(task):
    *protocol, rates = PROTOCOLS[task]
    for variant, searched in rates.items():
        cfg = shipped(task, variant)
        assert [cfg.epochs, cfg.warmup, cfg.schedule, cfg.batch_size] == protocol
        assert cfg.lr == max(searched) and cfg.init_from == "models/base"
        half = variant != "fft" and task != "uuid"
        assert cfg.base_dtype == ("bfloat16" if half else "float32")
        if variant == "fft":
            assert cfg.method == "full"
            continue
        method, rank = variant.split("_r")
        assert (cfg.method, cfg.rank, cfg.train_rest) == (method, int(rank), False)
        assert cfg.alpha == {"lora_r8": 16, "lora_r256": 128}.get(variant, 0)
        operator = "rotate" if rank == "8" and task != "uuid" else "share"
        assert cfg.operator == (operator if method == "mora" else "share")


def test_metamath_has_the_operators_of_table_4():
    for rank, main in ((8, "rotate"), (256, "share")):
        for operator in mora.OPERATORS:
            variant = f"mora_r{rank}" if operator == main else f"{operator}_r{rank}"
            cfg, same = shipped("metamath", variant), shipped("metamath", f"mora_r{rank}")
            assert cfg == dataclasses.replace(same, operator=operator, out=cfg.out)


def test_a_variant_is_the_same_config_as_its_settings_written_out():
    """metamath mora_r8, key by key: what a run of it resolves to must not move."""
    assert shipped("metamath", "mora_r8") == Config(
        out="out/metamath_mora_r8", data="data/metamath", init_from="models/base", seq_len=512,
        batch_size=128, micro_batch=16, epochs=3.0, warmup=300, min_lr_ratio=0.0, eval_every=500,
        save_every=500, method="mora", rank=8, operator="rotate", train_rest=False, lr=3e-4,
        base_dtype="bfloat16")


def test_configs_are_few_and_do_not_repeat_each_other():
    """No two files share six lines in a row, blank lines, comments and alignment aside."""
    assert len(FILES) <= 24
    runs = {}
    for path in FILES:
        stripped = [" ".join(line.split("#")[0].split()) for line in path.read_text().splitlines()]
        lines = [line for line in stripped if line]
        for i in range(len(lines) - 5):
            run = tuple(lines[i:i + 6])
            assert runs.setdefault(run, path) == path, f"{path.name}, {runs[run].name}: {run}"


def test_configs_lists_every_experiment_with_its_first_line(capsys):
    with pytest.raises(SystemExit) as caught:
        load(["--configs"], None)
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for path in FILES:
        first = path.read_text().splitlines()[0].removeprefix('"""').removesuffix('"""')
        assert [line for line in lines if f"configs/{path.name}" in line and line.endswith(first)]
    for variant, tasks in (("fft", 5), ("mora_r256", 4)):
        assert sum(line.split()[:1] == [variant] for line in lines) == tasks
    assert "    mora_r8                   method=mora rank=8 operator=rotate" in experiments_text()


# ---- files, variants and the command line

def test_files_import_files_and_the_command_line_wins(tmp_path):
    path = write(tmp_path, "from configs.c4_250m import *\nimport math\n_half = 32\n"
                 "rank = _half * 2\nlr = 1\n")
    cfg = load([path, "--steps=1e4", "--targets=q_proj,v_proj", "--train_rest=false", "--resume",
                "--out=1"], None)
    assert (cfg.rank, cfg.lr, cfg.steps, cfg.hidden_size) == (64, 1.0, 10000, 768)
    assert (cfg.targets, cfg.train_rest, cfg.resume) == (("q_proj", "v_proj"), False, True)
    assert (cfg.out, cfg.operator) == ("1", "share") and isinstance(cfg.lr, float)
    assert load([path, "--method=full"], None).adapter() == {}
    assert load([path, "--out="], None).out == "out/c"


def test_steps_given_last_replace_epochs(tmp_path):
    path = write(tmp_path, "steps = 7\nepochs = 3\nvariants = {'a': {}, 'b': dict(steps=9)}")
    assert load([path, "a"], None).epochs == 3
    assert load([path, "a", "--steps=5"], None).epochs == 0
    assert (load([path, "b"], None).epochs, load([path, "b"], None).steps) == (0, 9)


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cfg = load([write(tmp_path, "data = '~/data'"), "--out=~/run"], None)
    assert (cfg.out, cfg.data) == ("/home/me/run", "/home/me/data")


def test_the_command_line_overrides_the_variant_overrides_the_file(tmp_path):
    path = write(tmp_path, "rank = 1\nlr = 1\nseed = 1\nvariants = {'a': dict(rank=2, lr=2)}")
    cfg = load(["--lr=3", path, "a"], None)
    assert (cfg.seed, cfg.rank, cfg.lr, cfg.out) == (1, 2, 3.0, "out/c_a")


TABLE = "variants = {'fft': dict(method='full'), 'mora_r8': dict(rank=8), 'mora_r256': {}}"


@pytest.mark.parametrize("text, words, line", [
    (TABLE, [], "c.py has variants, name one of fft, mora_r8, mora_r256: torchrun train.py {path}"),
    (TABLE, ["--rank=8"], "name one of fft, mora_r8, mora_r256"),
    (TABLE, ["mora_8"], "{path} NAME, got mora_8; did you mean mora_r8?"),
    (TABLE, ["ftf"], "got ftf; did you mean fft?"),
    (TABLE, ["mora_r8", "fft"], "one config file and one variant at a time"),
    ("rank = 4", ["mora_r8"], "c.py has no variants, so it takes no second word, got 'mora_r8'"),
    ("rank = 4", ["other.py"], "takes no second word, got 'other.py'"),
    ("variants = {'a': dict(rnk=4)}", ["a"], "unknown key 'rnk' in variant 'a' of"),
    ("variants = {'a': dict(rank='4')}", ["a"], "must be a whole number from 1 to {most}, got '4'"),
    ("variants = {'a': 4}", ["a"], 'must be {"name": dict(key=value, ...), ...}'),
    ("variants = 4", ["a"], 'must be {"name": dict(key=value, ...), ...}'),
    ("variants = {4: {}}", ["4"], 'must be {"name": dict(key=value, ...), ...}'),
    ("", ["--variants=4"], "unknown key 'variants' on the command line"),
])
def test_mistakes_with_variants_are_one_clear_line(tmp_path, text, words, line):
    path = write(tmp_path, text)
    assert line.replace("{path}", path).replace("{most}", "4294967295") in refused([path, *words])


@pytest.mark.parametrize("name", ["metamath_mora_r8", "metamath_fft", "tulu_lora_r256", "uuid_fft",
                                  "continual_mora_r256", "gsm8k_lora_r8"])
def test_a_former_name_gets_the_new_command(name):
    task, _, variant = name.partition("_")
    line = refused([str(ROOT / "configs" / f"{name}.py"), "--rank=4"])
    assert line.endswith(f"configs/{task}.py {variant}?") and "did you mean" in line


@pytest.mark.parametrize("name, line", [
    ("250m_moar", "did you mean configs/250m_mora.py?"),
    ("metamat", "did you mean configs/metamath.py?"),
    ("metamath_mora_r7", "did you mean configs/metamath.py mora_r8?"),
    ("zzz", "--configs lists them"),
])
def test_an_unknown_file_gets_a_hint(monkeypatch, name, line):
    monkeypatch.chdir(ROOT)
    assert line in refused([f"configs/{name}.py"])
    assert line in refused([name])


def test_a_file_of_data_is_no_config_file(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n' * 2)
    assert "no config file" in refused([str(tmp_path / "train.jsonl")])


# ---- keys

@pytest.mark.parametrize("text, words, line", [
    ("", ["--hiden_size=8"], "did you mean hidden_size"),
    ("larning_rate = 1", [], "unknown key 'larning_rate' in"),
    ("", ["--rank"], "--rank needs a value: --rank=8"),
    ("", ["--rank", "4"], "--rank needs a value: --rank=8"),
    ("", ["--rank=1.5"], "rank must be a whole number from 1 to 4294967295, got 1.5"),
    ("", ["--steps=1e999"], "steps must be a whole number from 1 to 4294967295, got inf"),
    ("", ["--seed=1e10"], "seed must be a whole number from 0 to 4294967295, got 10000000000"),
    ("", [f"--seed=1{'0' * 500}"], "seed must be a whole number from 0 to 4294967295, got 1000"),
    ("rank = '8'", [], "c.py must be a whole number from 1 to 4294967295, got '8'"),
    ("rank = True", [], "c.py must be a whole number from 1 to 4294967295, got True"),
    ("", ["--train_rest=maybe"], "train_rest must be True or False, got 'maybe'"),
    ("", ["--lr=1e39"], "lr must be a number from 1e-30 to 4294967295, got 1e+39"),
    ("", ["--lr=1e-50"], "lr must be a number from 1e-30 to 4294967295, got 1e-50"),
    ("", ["--beta2=1"], "beta2 must be a number from 0 to 0.999999, got 1"),
    ("", ["--epochs=-1"], "epochs must be a number from 0 to 4294967295, got -1"),
    ("", ["--restart_warmup=-1"], "restart_warmup must be a whole number from 0 to {most}, got -1"),
    ("", ["--rank=-1", "--method=full"], "rank must be a whole number from 1 to {most}, got -1"),
    ("", ["--rope_theta=0"], "rope_theta must be a number from 1e-30 to 4294967295, got 0"),
    ("", ["--rms_norm_eps=-1"], "rms_norm_eps must be a number from 0 to 4294967295, got -1"),
    ("", ["--schedule=lineal"], "did you mean linear"),
    ("", ["--rank=0"], "rank must be a whole number from 1 to {most}, got 0"),
    ("", ["--seq_len=0"], "seq_len must be a whole number from 1 to 4294967295, got 0"),
    ("", ["--method=lora", "--operator=rotate"], "method lora takes no operator, got 'rotate'"),
    ("", ["--operator=rotat"], "did you mean rotate"),
    ("", ["--method=full", "--restart_every=5"], "no update to restart"),
    ("", ["--method=full", "--rank=8"], "method full takes no rank, got 8; only lora and mora can"),
    ("method = 'frozen'", ["--rank=4"], "method frozen takes no rank, got 4; only lora and mora"),
    ("", ["--restart_every=5", "--restart_steps=7,9"], "give one of them"),
    ("", ["--restart_steps=9,7"], "restart_steps must rise"),
    ("", ["--restart_steps=a"], "whole numbers with commas between, got"),
    ("", ["--restart_every=5", "--base_dtype=bfloat16"], "restarts merge small updates"),
    ("targets = 'q_proj'", [], "names with commas between, got 'q_proj'"),
    ("", ["--alpha=5"], "method mora takes no alpha"),
    ("", ["--lora_A=frozen"], "method mora takes no lora_A, got 'frozen'"),
    ("", ["--method=full", "--lora_plus_ratio=4"], "method full takes no lora_plus_ratio, got 4.0"),
    ("", ["--method=lora", "--lora_plus_ratio=0"], "lora_plus_ratio must be a number from 1e-30"),
    ("", ["--method=lora", "--rslora"], "give it an alpha"),
    ("", ["--method=lora", "--lora_A=orthogonl"], "did you mean orthogonal"),
    ("", ["--method=frozen", "--dora"], "method frozen takes no dora"),
    ("", ["--method=full", "--dropout=0.1"], "method full takes no dropout, got 0.1; only"),
    ("", ["--dora", "--base_dtype=bfloat16"], "dora rescales rows by a little"),
    ("", ["--method=full", "--base_dtype=bfloat16"], "method full freezes nothing"),
    ("", ["--targets=q_proj,lm_head"], "may not name lm_head"),
    ("", ["--targets="], "targets names no layer"),
    ("", ["--method=lora", "--groups=permute"], "method lora takes no groups, got 'permute'"),
    ("", ["--groups=gradient"], "groups must be one of strided, contiguous, alternate, permute"),
    ("", ["--num_key_value_heads=3"], "heads 8 must be a multiple of num_key_value_heads 3"),
    ("", ["--hidden_size=60"], "hidden_size 60"),
    ("", ["--rest_lr=-1"], "rest_lr must be a number from 0 to 4294967295, got -1"),
    ("", ["--rest_lr=1e-3", "--train_rest=false"], "rest_lr 0.001 has no effect with train_rest"),
    ("", ["--optimizer=moun"], "did you mean muon"),
    ("", ["--optimizer=muon", "--method=frozen"], "muon has no matrix to train with method frozen"),
    ("", ["--method=frozen", "--train_rest=false"], "frozen without train_rest trains nothing"),
    ("", ["--optimizer=muon", "--restart_every=5", "--restart_keep=.1"], "needs optimizer adamw"),
    ("", ["--restart_keep=.1"], "restart_keep 0.1 has no effect without restart_every or restart"),
    ("", ["--keep_best", "--eval_every=2", "--save_every=4"], "2 is no multiple of save_every 4"),
    ("", ["--residual_init", "--init_from=x"], "init_from x loads them"),
    ("", ["--matmul=fp16"], "matmul must be one of bf16, fp8, got 'fp16'"),
    ("", ["--matmul=fp8", "--dropout=0.1"], "dropout 0.1 computes them apart"),
    ("", ["--matmul=fp8", "--base_dtype=bfloat16"], "matmul fp8 needs float32 weights"),
    ("rank = 1 +", [], "line 1: SyntaxError"),
    ("\nrank = 1 / 0", [], "line 2: ZeroDivisionError"),
    ("rank = 1\0", [], ".py, line None: SyntaxError: source code string cannot contain null"),
    ("raise ValueError('two\\nlines')", [], "line 1: ValueError: two lines"),
])
def test_mistakes_are_one_clear_line(tmp_path, text, words, line):
    assert line.replace("{most}", "4294967295") in refused([write(tmp_path, text), *words])


def test_no_number_is_nan_or_infinite(tmp_path):
    names = [field.name for field in dataclasses.fields(Config) if field.type is float]
    assert {"lr", "rest_lr", "epochs", "weight_decay", "rms_norm_eps"} <= {*names}
    for name, bad in itertools.product(names, (math.nan, math.inf, -math.inf)):
        with pytest.raises(UserError, match=f"^{name} must be a number from .* to .*, got {bad}$"):
            check(dataclasses.replace(Config(), **{name: bad}))
    path = write(tmp_path, "lr = float('nan')")
    assert refused([path]) == f"lr in {path} must be a number from 1e-30 to 4294967295, got nan"
    for word in ("nan", "inf", "1e999"):
        assert "lr must be a number from 1e-30" in refused([write(tmp_path, ""), f"--lr={word}"])


def test_a_rank_of_the_file_does_not_stop_another_method(tmp_path):
    assert load([write(tmp_path, "rank = 128"), "--method=full"], None).rank == 128


@pytest.mark.parametrize("words", [
    ["--rest_lr=1e-2"], ["--rest_lr=1e-2", "--method=full"], ["--rest_lr=1e-2", "--method=frozen"],
    ["--optimizer=muon"], ["--optimizer=muon", "--method=full"],
    ["--optimizer=muon", "--method=lora", "--lora_plus_ratio=4"],
    ["--optimizer=muon", "--restart_every=5"], ["--residual_init"],
    ["--matmul=fp8"], ["--matmul=fp8", "--method=frozen"],
])
def test_the_new_keys_combine(tmp_path, words):
    cfg = load([write(tmp_path, ""), *words], None)
    name, _, text = words[0].removeprefix("--").partition("=")
    assert str(getattr(cfg, name)) in (text, "0.01", "True")


def test_choices_are_those_of_the_code_that_takes_them():
    choices = {field.name: field.metadata["allowed"] for field in dataclasses.fields(Config)}
    assert choices["method"] == ("full", *mora.METHODS)
    assert choices["operator"] == mora.OPERATORS
    assert (choices["groups"], choices["lora_A"]) == (mora.GROUPS, lora.KINDS_OF_A)


def test_models_and_adapters_get_all_of_their_keys():
    values = {"hidden_size": 96, "intermediate_size": 24, "num_hidden_layers": 3,
              "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True,
              "rope_theta": 5e5, "rms_norm_eps": 1e-5}
    shape = LlamaConfig(vocab_size=7, **Config(seq_len=40, **values).model())
    assert dataclasses.asdict(shape) == values | {
        "vocab_size": 7, "max_position_embeddings": 40, "rope_scaling": None}
    arguments = inspect.signature(mora.adapt).parameters.keys() - {"model", "cycle"}
    assert Config().adapter() == {name: getattr(Config, name) for name in arguments}


def test_help_lists_every_key_with_default_and_explanation():
    text = help_text()
    in_one_line = " ".join(text.split())
    for field in dataclasses.fields(Config):
        assert f"--{field.name}=" in text and field.metadata["explanation"] in in_one_line
    for part in ("--lr=0.0005 ", "--dora=false ", "--targets=q_proj,k_proj,", "\nmodel (names",
                 "[cosine, linear]", "VARIANT"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 100


# ---- what a run will do

def test_restarts_by_period_and_by_list_are_counted_alike():
    every, listed = Config(restart_every=7), Config(restart_steps=(7, 14, 21))
    assert [every.cycle(step) for step in range(28)] == [listed.cycle(step) for step in range(28)]
    expected = {0: (0, 0), 6: (0, 0), 7: (1, 7), 20: (2, 14), 21: (3, 21), 100: (3, 21)}
    assert {step: listed.cycle(step) for step in expected} == expected


@pytest.mark.parametrize("values, lines", [
    (dict(steps=1000, warmup=999, restart_every=300, restart_warmup=50), []),
    (dict(steps=1000, warmup=1000, lr=1e-3),
     ["warmup 1000 is not below steps 1000: the learning rate ends at 0.001 (lr is 0.001)"]),
    (dict(steps=10, warmup=1000, lr=1e-3),
     ["warmup 1000 is not below steps 10: the learning rate ends at 1e-05 (lr is 0.001)"]),
    (dict(steps=1000, warmup=0, restart_every=1000),
     ["restarts at 1000 are not below steps 1000: 1 of 1 do not happen"]),
    (dict(steps=1000, warmup=0, restart_steps=(500, 1000, 2000)),
     ["restarts at 1000, 2000 are not below steps 1000: 2 of 3 do not happen"]),
    (dict(steps=1001, warmup=0, restart_every=50, restart_warmup=50),
     ["restart_warmup 50 is not below the 50 steps after the restart at step 50: 20 of 20 "
      "restarts are followed by warm-up alone"]),
    (dict(steps=110, warmup=0, restart_steps=(50, 100), restart_warmup=20),
     ["restart_warmup 20 is not below the 10 steps after the restart at step 100: 1 of 2 restarts "
      "are followed by warm-up alone"]),
])
def test_restarts_and_warm_ups_that_do_not_fit_are_named(values, lines):
    assert [*schedule_warnings(Config(**values))] == lines


def test_a_short_trial_of_remora_is_noted_and_allowed():
    notes = schedule_warnings(shipped("250m_remora", "--steps=1000"))
    assert [note.split(":")[0] for note in notes] == [
        "warmup 1000 is not below steps 1000", "restarts at 2000 are not below steps 1000"]


@pytest.mark.parametrize("name", [path.stem for path in FILES if not read_file(path)[2]])
def test_no_pretraining_config_is_noted_as_it_stands(name):
    assert [*schedule_warnings(shipped(name))] == []


def test_batch_must_divide():
    assert micro_batch_size(Config(batch_size=64, micro_batch=4), 8) == 4
    assert micro_batch_size(Config(batch_size=64), 8) == 8
    with pytest.raises(UserError, match="batch_size 64 does not divide among 3"):
        micro_batch_size(Config(batch_size=64), 3)
    with pytest.raises(UserError, match="8 sequences each, which micro_batch 3"):
        micro_batch_size(Config(batch_size=64, micro_batch=3), 8)


def test_a_mistake_ends_with_status_2_and_no_traceback(tmp_path):
    command = [sys.executable, "train.py", "configs/250m_mora.py", f"--data={tmp_path / 'none'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"error: no token shards in {tmp_path / 'none'}")
    assert done.stderr.count("\n") == 1
