"""A config says what it means, or one line says what is wrong."""
import subprocess
import sys
from pathlib import Path

import pytest

from config import Config, UserError, accumulation, load

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.py"))


def write(tmp_path, text):
    (tmp_path / "c.py").write_text(text)
    return str(tmp_path / "c.py")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_loads(name):
    cfg = load([str(ROOT / "configs" / name)], None)
    assert cfg.out == f"out/{name.removesuffix('.py')}"
    accumulation(cfg, 1), accumulation(cfg, 8)


def test_the_papers_ten_experiments_are_there():
    for size, shape in (("250m", (768, 2560, 24, 16)), ("1.3b", (2048, 5461, 24, 32))):
        for method in ("full", "lora", "relora", "mora", "remora"):
            cfg = load([str(ROOT / "configs" / f"{size}_{method}.py")], None)
            assert (cfg.hidden_size, cfg.intermediate_size, cfg.num_hidden_layers, cfg.num_attention_heads) == shape
            assert cfg.method == method.removeprefix("re")
            assert bool(cfg.restart_every) == method.startswith("re") and cfg.steps * cfg.batch_size * cfg.seq_len == 5_242_880_000


def test_appendix_a_is_there():
    """{data: (epochs, warm-up, schedule, {method: rates})}; every rate is one that the paper searched."""
    maths = {"fft": (2e-5,), "lora_r8": (1e-4, 2e-4), "lora_r256": (1e-4, 2e-4), "mora_r8": (2e-4, 3e-4), "mora_r256": (3e-5, 5e-5)}
    texts = {"fft": (3e-5,), "lora_r8": (3e-4, 4e-4), "lora_r256": (3e-4, 4e-4), "mora_r8": (4e-4, 5e-4), "mora_r256": (5e-5, 7e-5)}
    pairs = {"fft": (3e-5,), "lora_r8": (1e-4, 2e-4, 3e-4), "lora_r256": (1e-4, 2e-4, 3e-4), "mora_r8": (5e-5, 1e-4, 2e-4), "mora_r256": (5e-5, 1e-4, 2e-4)}
    table = {"tulu": (2, 500, "cosine", maths), "metamath": (3, 300, "cosine", maths), "continual": (3, 150, "linear", texts), "uuid": (100, 0, "cosine", pairs)}
    for data, (epochs, warmup, schedule, rates) in table.items():
        for name, searched in rates.items():
            cfg = load([str(ROOT / "configs" / f"{data}_{name}.py")], None)
            method, rank = (name.split("_r") + ["0"])[:2]
            assert (cfg.epochs, cfg.warmup, cfg.schedule, cfg.batch_size) == (epochs, warmup, schedule, 1000 if data == "uuid" else 128)
            assert cfg.lr in searched and cfg.method == method.replace("fft", "full") and cfg.init_from
            assert method == "fft" or (cfg.rank, cfg.train_rest) == (int(rank), False)
            assert cfg.alpha == {"lora_r8": 16, "lora_r256": 128}.get(name, 0)
            assert cfg.operator == ("" if method != "mora" else "rotate" if rank == "8" and data != "uuid" else "share")


def test_files_import_files_and_the_command_line_wins(tmp_path):
    cfg = load([write(tmp_path, "from configs.c4_250m import *\nimport math\n_half = 32\nrank = _half * 2\nlr = 1\n"),
                "--steps=1e4", "--targets=q_proj,v_proj", "--train_rest=false", "--resume", "--out=1"], None)
    assert (cfg.rank, cfg.lr, cfg.steps, cfg.targets, cfg.train_rest, cfg.resume, cfg.out) == \
        (64, 1.0, 10000, ("q_proj", "v_proj"), False, True, "1")
    assert cfg.hidden_size == 768 and isinstance(cfg.lr, float) and cfg.operator == "share"
    assert load([str(tmp_path / "c.py"), "--method=full"], None).adapter() == {}
    path = write(tmp_path, "steps = 7\nepochs = 3")
    assert load([path], None).epochs == 3 and load([path, "--steps=5"], None).epochs == 0  # given last, steps count


@pytest.mark.parametrize("text, words, says", [
    ("", ["--hiden_size=8"], "did you mean hidden_size"),
    ("larning_rate = 1", [], "unknown key 'larning_rate' in"),
    ("", ["--rank"], "--rank needs a value: --rank=8"),
    ("", ["--rank=1.5"], "a whole number, got 1.5"),
    ("", ["--steps=1e999"], "a whole number"),
    ("rank = '8'", [], "a whole number, got '8'"),
    ("", ["--train_rest=maybe"], "True or False, got 'maybe'"),
    ("", ["--epochs=-1"], "epochs must not be negative, got -1.0"),
    ("", ["--schedule=lineal"], "did you mean linear"),
    ("", ["--rank=0"], "at least 1 for method mora, got 0"),
    ("", ["--method=lora", "--operator=rotate"], "lora takes no operator, got 'rotate'"),
    ("", ["--operator=rotat"], "did you mean rotate"),
    ("", ["--method=full", "--restart_every=5"], "no update to restart"),
    ("", ["--restart_every=5", "--restart_steps=7,9"], "give one of them"),
    ("", ["--restart_steps=9,7"], "restart_steps must rise"),
    ("", ["--restart_steps=a"], "whole numbers with commas between, got"),
    ("targets = 'q_proj'", [], "names with commas between, got 'q_proj'"),
    ("", ["--alpha=5"], "mora takes no alpha"),
    ("", ["--lora_A=frozen"], "mora takes no lora_A, got 'frozen'"),
    ("", ["--method=full", "--lora_plus_ratio=4"], "full takes no lora_plus_ratio, got 4.0"),
    ("", ["--method=lora", "--lora_plus_ratio=0"], "lora_plus_ratio must be above 0"),
    ("", ["--method=lora", "--rslora"], "give it an alpha"),
    ("", ["--method=lora", "--lora_A=orthogonl"], "did you mean orthogonal"),
    ("", ["--method=frozen", "--dora"], "frozen takes no dora"),
    ("", ["--dora", "--base_dtype=bfloat16"], "dora rescales rows by a little"),
    ("", ["--targets=q_proj,lm_head"], "may not name lm_head"),
    ("", ["--num_key_value_heads=3"], "heads 8 must be a multiple of num_key_value_heads 3"),
    ("", ["--hidden_size=60"], "hidden_size 60"),
    ("rank = 1 +", [], "line 1: SyntaxError"),
    ("\nrank = 1 / 0", [], "line 2: ZeroDivisionError"),
    ("", ["other.py"], "one config file at a time"),
])
def test_mistakes_are_one_clear_line(tmp_path, text, words, says):
    with pytest.raises(UserError, match=says.replace("(", r"\(")) as caught:
        load([write(tmp_path, text), *words], None)
    assert "\n" not in str(caught.value)


def test_restarts_by_period_and_by_list_are_counted_alike():
    every, listed = Config(restart_every=7), Config(restart_steps=(7, 14, 21))
    assert [every.cycle(step) for step in range(28)] == [listed.cycle(step) for step in range(28)]
    assert [listed.cycle(step) for step in (0, 6, 7, 20, 21, 100)] == [(0, 0), (0, 0), (1, 7), (2, 14), (3, 21), (3, 21)]


def test_unknown_file_suggests():
    with pytest.raises(UserError, match="did you mean .*250m_mora.py"):
        load([str(ROOT / "configs" / "250m_moar.py")], None)


def test_batch_must_divide():
    assert accumulation(Config(batch_size=64, micro_batch=4), 8) == (4, 2)
    assert accumulation(Config(batch_size=64), 8) == (8, 1)
    with pytest.raises(UserError, match="batch_size 64 does not divide among 3"):
        accumulation(Config(batch_size=64), 3)
    with pytest.raises(UserError, match="8 sequences each, which micro_batch 3"):
        accumulation(Config(batch_size=64, micro_batch=3), 8)


def test_a_mistake_ends_with_status_2_and_no_traceback():
    done = subprocess.run([sys.executable, "train.py", "configs/250m_mora.py"], cwd=ROOT, capture_output=True, text=True)
    if (ROOT / "data" / "c4" / "manifest.json").exists():
        pytest.skip("C4 is prepared here")
    assert done.returncode == 2 and done.stderr == "error: no token shards in data/c4: prepare them with `python data.py c4`\n"
