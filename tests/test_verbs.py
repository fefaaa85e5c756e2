"""The command lines of evaluate, sample, merge and bench."""
import io
import json
import shutil

import pytest
import torch
from test_sft import chat_folder
from test_tokenizer import small_bpe

import bench
import checkpoint
import data
import evaluate
import merge
import sample
import tokenizer
from config import UserError
from model import Llama, LlamaConfig

WORDS = {evaluate: ["model", "data"], sample: ["model"], bench: []}
NUMBERS = [
    (evaluate, "batch", ("-1", "1.5", "nan", "many", "99999999999")),
    (evaluate, "limit", ("-1",)), (evaluate, "tokens", ("-1",)), (evaluate, "seq_len", ("-8",)),
    (evaluate, "max_new_tokens", ("-3",)),
    (sample, "max_new_tokens", ("-1", "1.5")), (sample, "top_k", ("-1",)),
    (sample, "seed", ("-1", "99999999999999999999999")),
    (sample, "temperature", ("-0.5", "nan", "inf", "-inf", "warm")),
    (bench, "steps", ("0", "-1")), (bench, "repeats", ("0",)), (bench, "seq_len", ("0",)),
    (bench, "processes", ("0",)), (bench, "batch", ("-1",)), (bench, "rank", ("-1",)),
]
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("verb, key, values", NUMBERS,
                         ids=[f"{verb.__name__} {key}" for verb, key, _ in NUMBERS])
def test_numbers_out_of_range_are_refused_by_name(verb, key, values):
    for value in values:
        with pytest.raises(UserError, match=f"argument --{key}: must be a"):
            verb.main([*WORDS[verb], f"--{key}={value}"])


def write_model(folder, tok):
    """A directory with random weights for a tokenizer."""
    model = Llama(LlamaConfig(vocab_size=tok.vocab_size, **SHAPE), seed=1)
    checkpoint.write_hugging_face(folder, model.state_dict(), model, tok)
    return folder


def chat(folder, lines, monkeypatch, *words):
    """The ids that sample.py --chat continues for these lines of input, and its answers' texts."""
    prompts, answers = [], []
    generate = sample.generate

    def spy(model, ids, *arguments):
        prompts.append(ids)
        answers.append(list(generate(model, ids, *arguments)))
        yield from answers[-1]

    monkeypatch.setattr(sample, "generate", spy)
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    sample.main([str(folder), "--chat", "--max_new_tokens=6", "--temperature=5", *words])
    return prompts, answers


@pytest.mark.parametrize("system", ("", "Be kind <|im_end|>"))
def test_a_chat_gives_the_model_transformers_ids(tmp_path, monkeypatch, capsys, system):
    """At each turn, with the earlier ones; the template's special tokens are tokens."""
    from transformers import AutoTokenizer
    tok = chat_folder(tmp_path / "chat")
    write_model(tmp_path / "chat", tok)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "chat")
    words = [f"--system={system}"] if system else []
    prompts, answers = chat(tmp_path / "chat", "How are you?\n\n naïve\n", monkeypatch, *words)
    assert len(prompts) == 2
    messages = [{"role": "system", "content": system}] if system else []
    for line, ids, answer in zip(("How are you?", " naïve"), prompts, answers, strict=True):
        messages.append({"role": "user", "content": line})
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert ids.count(theirs.convert_tokens_to_ids("<|im_start|>")) == len(messages) + 1 + (
            not system)
        messages.append({"role": "assistant", "content": tok.decode(answer)})
    assert messages[-3]["content"] + "\n" in capsys.readouterr().out


def test_a_chat_without_a_template_is_that_of_training(tmp_path, monkeypatch):
    """Tulu's format, as `python data.py tulu` writes it for such a tokenizer."""
    tok = tokenizer.load("bytes")
    write_model(tmp_path / "model", tok)
    prompts, answers = chat(tmp_path / "model", "a\nb\n", monkeypatch)
    first = [tok.eos_id, *b"<|user|>\na\n<|assistant|>\n"]
    second = [*tok.decode(answers[0]).encode(), tok.eos_id, *b"\n<|user|>\nb\n<|assistant|>\n"]
    assert prompts == [first, first + second]


def test_text_beyond_the_trained_positions_is_noted_once(tmp_path, monkeypatch, capsys):
    tok = tokenizer.load("bytes")
    shape = LlamaConfig(vocab_size=tok.vocab_size, max_position_embeddings=24, **SHAPE)
    model = Llama(shape, seed=1)
    for name, seq_len, trained in (("short", 12, 24), ("long", 30, 30), ("any", None, 24)):
        folder = tmp_path / name
        checkpoint.write_hugging_face(folder, model.state_dict(), model, tok, seq_len)
        for tokens, count in ((trained - 2, 0), (trained - 1, 1)):  # the prompt has two
            capsys.readouterr()
            sample.main([str(folder), "--prompt=a", f"--max_new_tokens={tokens}"])
            noted = capsys.readouterr().err
            assert noted.count(f"note: the model was trained on {trained} positions") == count
    chat(tmp_path / "short", "a\nb\n", monkeypatch)
    assert capsys.readouterr().err.count("note: ") == 1


def test_mistakes_of_sample_are_named(tmp_path, monkeypatch):
    write_model(tmp_path / "small", tokenizer.load("bytes"))
    small_bpe().export_files(tmp_path)
    for words, line in ((["--chat", "--prompt=x"], "leave out --prompt"),
                        (["--system=x"], "add --chat"),
                        (["--prompt=日本語", f"--tokenizer={tmp_path}"], "the id .* 257 tokens")):
        with pytest.raises(UserError, match=line):
            sample.main([str(tmp_path / "small"), *words])
    with pytest.raises(UserError, match="the path of the checkpoint is empty"):
        sample.main([""])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    with pytest.raises(UserError, match="standard input is no text"):
        sample.main([str(tmp_path / "small"), "--chat"])


def test_answers_are_kept_with_their_questions_and_references(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i} + 1 = ", "response": f"é{i + 1}"} for i in range(20)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy("sums.jsonl", "same.jsonl")
    data.main(["sft", "sums", "sums.jsonl", "--val", "same.jsonl", "--tokenizer=bytes"])
    write_model(tmp_path / "model", tokenizer.load("bytes"))
    evaluate.main(["model", "data/sums", "--answers", "--out=answers.jsonl", "--limit=7"])
    records = [json.loads(line) for line in open("answers.jsonl", encoding="utf-8")]
    assert [record["question"] for record in records] == [row["prompt"] for row in rows[:7]]
    assert [record["reference"] for record in records] == [row["response"] for row in rows[:7]]
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    exact = [record["answer"].strip() == record["reference"] for record in records]
    assert result["answers"] == 7 and result["exact"] == sum(exact) / 7
    assert all(isinstance(record["answer"], str) and record["answer"] for record in records)
    evaluate.main(["model", "data/sums", "--answers", "--out=short.jsonl", "--max_new_tokens=2"])
    shortened = [json.loads(line)["answer"] for line in open("short.jsonl", encoding="utf-8")]
    assert len(shortened) == 20 and max(map(len, shortened)) == 2
    for words, line in ((["--out=x"], "add --answers"),
                        (["--answers", "--tokens=5"], "are of losses: leave them out, or --ans"),
                        (["--answers", "--seq_len=5"], "--seq_len and --tokens are of losses"),
                        (["--answers", "--out=absent/x"], "absent/x"),
                        (["--answers", "--out=/dev/full"], "^/dev/full cannot be written; free")):
        with pytest.raises((UserError, FileNotFoundError), match=line):
            evaluate.main(["model", "data/sums", *words])


def test_a_merged_directory_keeps_special_tokens_and_generation_config(run, tmp_path):
    """bos, eos and pad of the directory that the run started from, through its checkpoints."""
    import transformers
    values = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 4}
    config = transformers.LlamaConfig(vocab_size=257, **SHAPE, **values)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(**values, do_sample=True, top_p=0.9)
    model.save_pretrained(tmp_path / "hf")
    out = run(f"--init_from={tmp_path / 'hf'}", "--train_rest=false", "--steps=10")
    run(f"--init_from={tmp_path / 'hf'}", "--train_rest=false", "--steps=12", "--resume")
    step = checkpoint.steps_of(out)[-1]
    merge.main([str(out)])
    merge.main([str(step / "adapter"), str(out / "second"), f"--base={tmp_path / 'hf'}"])
    for folder in (step / "base", out / "merged", out / "second"):
        kept = transformers.AutoConfig.from_pretrained(folder)
        assert {key: getattr(kept, key) for key in values} == values, folder
        generation = transformers.GenerationConfig.from_pretrained(folder)
        assert generation.to_diff_dict() == model.generation_config.to_diff_dict(), folder
    (tmp_path / "hf" / "generation_config.json").write_text("[]")
    with pytest.raises(UserError, match="generation_config.json must hold a JSON object"):
        checkpoint.load(tmp_path / "hf")


@pytest.mark.parametrize("make", (small_bpe, lambda: tokenizer.load("bytes")),
                         ids=("small", "bytes"))
def test_transformers_pads_with_a_written_tokenizer(tmp_path, make):
    from transformers import AutoTokenizer
    tok = make()
    tok.export_files(tmp_path)
    batch = AutoTokenizer.from_pretrained(tmp_path)(["a", "a longer text"], padding=True)
    lengths = [len(tok.encode(text)) for text in ("a", "a longer text")]
    assert [sum(mask) for mask in batch.attention_mask] == lengths
    assert batch.input_ids[0][lengths[0]:] == [tok.eos_id] * (lengths[1] - lengths[0])


class Constant(torch.nn.Module):
    """The same probabilities of four tokens after every text."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.4, 0.3, 0.2, 0.1]).log())

    def new_cache(self):
        return []

    def hidden(self, ids, cache):
        return ids[..., None]

    def logits(self, x):
        return self.weight


def test_draws_follow_the_temperature_among_the_likeliest():
    generator = torch.Generator().manual_seed(0)
    tokens = [*sample.generate(Constant(), [0], 4, 2000, 0.5, 3, generator=generator)]
    shares = torch.bincount(torch.tensor(tokens), minlength=4) / 2000
    expected = torch.tensor([0.16, 0.09, 0.04, 0.0]) / 0.29
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.04)
    assert shares[3] == 0
