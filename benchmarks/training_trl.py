"""TRL's SFTTrainer under ZeRO-3 on given packs: one rank, started by benchmarks/training.py with TRL's own Python.

The packs are those of ours, in our order, so losses must agree step by step; TRL's own preparation and packing
(benchmarks/prepare.py measures them) take no part. Everything else is its default: padding-free rows with sequence
lengths, its attention, its loss and its statistics.
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import deepspeed
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

IGNORE = -100


def packed(pack: list[dict[str, list[int]]]) -> dict[str, list[int]]:
    ids = [token for row in pack for token in row["ids"]]
    is_target = [flag for row in pack for flag in row["is_target"]]
    labels = [token if flag else IGNORE for token, flag in zip(ids, is_target, strict=True)]
    return {"input_ids": ids, "labels": labels, "seq_lengths": [len(row["ids"]) for row in pack]}


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds from the begin to the end of each optimizer step: loading of data and logging are left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--batches", type=Path, required=True)
    parser.add_argument("--deepspeed", type=Path, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # the same transport as every other way
    steps = json.loads(options.batches.read_text())["steps"]
    # Made before the model: transformers shards while loading once it knows the DeepSpeed settings.
    config = SFTConfig(
        output_dir=str(options.output.parent / "trl"),
        packing=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(steps[0]) // size,
        max_steps=len(steps),
        train_sampling_strategy="sequential",
        shuffle_dataset=False,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        gradient_checkpointing=options.recompute,
        deepspeed=json.loads(options.deepspeed.read_text()),
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    data = Dataset.from_list([packed(pack) for step in steps for pack in step])
    clock = Clock()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    trainer = SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[clock])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    members = [[row for pack in step for row in pack] for step in steps]
    tokens = [sum(len(row["ids"]) for row in rows) for rows in members]
    targets = [sum(sum(row["is_target"][1:]) for row in rows) for rows in members]
    rows = [
        {"seconds": s, "loss": loss, "tokens": t, "targets": n, "computed": t}
        for s, loss, t, n in zip(clock.seconds, losses, tokens, targets, strict=True)
    ]
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    answer = {"first_loss": losses[0], "steps": rows, "peak_gib": peak_gib}
    options.output.with_suffix(f".{rank}.json").write_text(json.dumps(answer))
    trainer.accelerator.wait_for_everyone()
    os._exit(0)  # gloo groups abort now and then in the interpreter's shutdown


if __name__ == "__main__":
    main()
