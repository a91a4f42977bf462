"""Conversations for tests: multi-turn, of many lengths, the same for the same seed."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_WORDS = ["the", "weather", "in", "Paris", "is", "fine", "but", "please", "tell", "a", "joke", "42"]
_WORDS += ["rain", "dogs", "ü", "¿", "日本", "🙂"]


def make_records(num: int, *, seed: int = 0, max_turns: int = 4, max_words: int = 12) -> list[dict[str, Any]]:
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choices(_WORDS, k=rng.randint(1, max_words)))

    records = []
    for number in range(num):
        messages = [{"role": "system", "content": text()}] if rng.random() < 0.3 else []
        for _ in range(rng.randint(1, max_turns)):
            messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        records.append({"id": f"c{number}", "messages": messages})
    return records


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path
