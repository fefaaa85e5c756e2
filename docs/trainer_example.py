"""MoRA in the Hugging Face Trainer: train, save the adapter, load it, merge, save the whole model.

    python docs/trainer_example.py [folder] [--steps=20]       a tiny random Qwen2, on the CPU
"""
import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parent.parent))  # mora.py, lora.py, adapters.py, config.py
import adapters
import mora


def main(folder, steps):
    config = Qwen2Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")

    # train: the updates alone require a gradient
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    mora.adapt(model, rank=4, operator="rotate", targets="all-linear")
    first_ids = torch.randint(64, (128, 1), generator=torch.Generator().manual_seed(0))
    ids = (first_ids + torch.arange(16)) % 64  # rows that count upwards
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(folder / "trainer", max_steps=steps, learning_rate=3e-2,
                                  per_device_train_batch_size=16, logging_steps=5, use_cpu=True,
                                  save_strategy="no", report_to="none")
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    model.eval()

    # save the adapter, and load it on a fresh base
    adapters.save(model, folder / "adapter")
    again = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    adapters.load(again, folder / "adapter")

    # merge: a plain Qwen2 that every tool loads
    mora.merge(again).save_pretrained(folder / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    with torch.no_grad():
        difference = (model(ids[:4]).logits - merged(ids[:4]).logits).abs().max()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, trained and merged logits differ by "
          f"{difference:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="out/trainer_example", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    main(**vars(parser.parse_args()))
