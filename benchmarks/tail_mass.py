"""Mass that a model has outside its k likeliest tokens, at answers of chat data: the scale of anchor.kl_top_k's bias.

    python benchmarks/tail_mass.py --model MODEL --data A.jsonl.gz B.jsonl.gz

Means over all tokens of the last answers of the first conversations of every file; written to results/tail_mass.json.
"""

import argparse
import gzip
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import __version__ as transformers_version

from sft_dist.model.fused_head import LinearHead, top_logprobs

KS = (1, 8, 16, 32, 64, 128, 256, 1024)
MAX_TOKENS = 768
ANSWER = "<|im_start|>assistant\n"


def measure(model: Any, tokenizer: Any, file: Path, num: int) -> dict[str, Any]:
    sums, num_targets, num_read = torch.zeros(len(KS), dtype=torch.float64), 0, 0
    with gzip.open(file, "rt") as lines:
        for line in lines:
            text = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
            at = text.rfind(ANSWER) + len(ANSWER)
            context, answer = (tokenizer(part).input_ids for part in (text[:at], text[at:]))
            if len(context) + len(answer) > MAX_TOKENS:
                continue
            with torch.no_grad():
                hidden = model.model(torch.tensor([context + answer])).last_hidden_state[0, len(context) - 1 : -1]
            kept = top_logprobs(hidden, LinearHead(model.lm_head.weight, None), max(KS))
            mass = kept.logprobs[:, :-1].double().exp().cumsum(-1)  # of the first 1, 2, ...
            sums += (1 - mass[:, [k - 1 for k in KS]]).clamp_min(0).sum(0)
            num_targets, num_read = num_targets + len(hidden), num_read + 1
            if num_read == num:
                break
    means = (sums / num_targets).tolist()
    return {
        "conversations": num_read,
        "targets": num_targets,
        "outside": {str(k): round(mean, 5) for k, mean in zip(KS, means, strict=True)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="JSON Lines of messages, gzip")
    parser.add_argument("--num", type=int, default=40, help="conversations of each file")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "tail_mass.json")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
    found = {file.name.split(".")[0]: measure(model, tokenizer, file, options.num) for file in options.data}
    for name, entry in found.items():
        print(f"{name}: {entry}")
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", "benchmarks/tail_mass.py", *(Path(word).name for word in sys.argv[1:])]),
        "parameters": model.num_parameters(),
        "vocabulary": model.config.vocab_size,
        "torch": torch.__version__,
        "transformers": transformers_version,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }
    options.output.write_text(json.dumps(facts | {"files": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
