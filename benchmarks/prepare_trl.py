"""What TRL does to prepare a data set for supervised fine-tuning: run by benchmarks/prepare.py with TRL's own Python.

`SFTTrainer` renders, masks, truncates and packs the data when it is made; nothing is trained. With --data none only the
imports and the model are there, which TRL needs and preparation does not.
"""

import argparse
import json
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--template", required=True)
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--num-processes", type=int, required=True)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.chat_template = Path(options.template).read_text()
    model = AutoModelForCausalLM.from_pretrained(options.model)
    if options.data != "none":
        config = SFTConfig(
            output_dir=options.output,
            max_length=options.max_length,
            packing=True,
            packing_strategy="bfd",
            assistant_only_loss=True,
            dataset_num_proc=options.num_processes,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        data = load_dataset("json", data_files=options.data, split="train")
        data = data.select_columns(["messages"])
        trainer = SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
        packs = trainer.train_dataset
        tokens = sum(map(len, packs["input_ids"]))
        masks = "assistant_masks" if "assistant_masks" in packs.column_names else "labels"
        targets = sum(sum(value not in (0, -100) for value in row) for row in packs[masks])
        print(json.dumps({"packs": len(packs), "tokens": tokens, "targets": targets, "columns": packs.column_names}))
