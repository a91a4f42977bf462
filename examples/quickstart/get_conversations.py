"""Make the demo's conversations: chatterbot-corpus from PyPI and multi_turn.yml -> train.jsonl, heldout.jsonl.

Each line is {"id", "messages": [{"role", "content"}, ...]}. The result is the same on every machine. Nothing is
imported from the package: its wheel is read as the archive that it is.
"""

import argparse
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from wheels import fetch_wheel

NAME, VERSION = "chatterbot-corpus", "1.3.3"

# Left out: coding (bugs, near-duplicates), gossip and humor (many answers to few prompts), health, history, money,
# movies, politics, psychology (insults), science (wrong or broken answers), sports (shouted).
TOPICS = (
    *("ai", "botprofile", "computers", "conversations", "emotion", "food", "greetings", "literature"),
    *("tech_support", "trivia"),
)
# In these topics the lines after the prompt are not turns but other answers to it; the first one is taken.
TOPICS_OF_ALTERNATIVES = ("computers", "emotion")
# Rude, or about death in earnest, or recited line by line.
UNWANTED = {"bend over", "can you mate", "robots should die", "i hope that you die", "i do not want to die"}
UNWANTED |= {"complex is better than complicated"}
# A prompt is held out when its hash falls below this share; the rare conversations of several turns more often.
HELDOUT_SHARE, HELDOUT_SHARE_MULTI_TURN = 0.12, 0.25

ATTRIBUTION = f"""\
# Demo conversations
Made by examples/quickstart/get_conversations.py from
- {NAME} {VERSION} (PyPI; BSD licence; copyright Gunther Cox and contributors), English,
  topics {", ".join(TOPICS)}: the first answer to each prompt,
  white space joined, an unanswered last line left out, no word changed;
- examples/quickstart/multi_turn.yml of this repository (Apache-2.0).
"""


def normalise(text: str) -> str:
    """Lower-case words only: prompts that are equal in this form count as the same prompt."""
    return " ".join(re.findall(r"\w+", text.lower()))


def read_topics(wheel: Path) -> Iterator[tuple[str, list[Any]]]:
    """Yield (topic, entries) as written; an entry is a list of lines."""
    with zipfile.ZipFile(wheel) as archive:
        for topic in TOPICS:
            text = archive.read(f"chatterbot_corpus/data/english/{topic}.yml").decode("utf-8")
            yield topic, yaml.safe_load(text)["conversations"]
    text = (Path(__file__).parent / "multi_turn.yml").read_text(encoding="utf-8")
    yield "multi_turn", yaml.safe_load(text)["conversations"]


def conversations(wheel: Path, counts: dict[str, int]) -> Iterator[list[str]]:
    """Yield the lines of each conversation, user first and assistant last; `counts` gets what was left out."""
    seen: set[str] = set()
    for topic, entries in read_topics(wheel):
        for entry in entries:
            counts["entries"] += 1
            if not isinstance(entry, list):  # one entry of the corpus is not well-formed
                counts["malformed"] += 1
                continue
            lines = [" ".join(str(line).split()) for line in entry]
            lines = lines[:2] if topic in TOPICS_OF_ALTERNATIVES else lines[: len(lines) // 2 * 2]
            prompt = normalise(lines[0])
            if prompt in UNWANTED:
                counts["unwanted"] += 1
            elif prompt in seen:
                counts["repeated prompt"] += 1
            else:
                seen.add(prompt)
                yield lines


def is_heldout(lines: list[str]) -> bool:
    digest = hashlib.sha256(normalise(lines[0]).encode()).digest()
    share = HELDOUT_SHARE if len(lines) == 2 else HELDOUT_SHARE_MULTI_TURN
    return int.from_bytes(digest[:8], "big") < share * 2**64


def user_prompts(lines: list[str]) -> set[str]:
    return {normalise(line) for line in lines[::2]}


def record(lines: list[str]) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": line} for i, line in enumerate(lines)]
    return {"id": "quickstart-" + hashlib.sha256("\n".join(lines).encode()).hexdigest()[:10], "messages": messages}


def write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo/data"), help="folder to write (default: %(default)s)")
    parser.add_argument("--downloads", type=Path, default=Path("demo/downloads"), help="where the wheel is kept")
    args = parser.parse_args()

    counts = {"entries": 0, "malformed": 0, "unwanted": 0, "repeated prompt": 0}
    everything = list(conversations(fetch_wheel(NAME, VERSION, args.downloads), counts))
    heldout = [lines for lines in everything if is_heldout(lines)]
    asked_in_heldout = set[str]().union(*map(user_prompts, heldout))
    train = [lines for lines in everything if not is_heldout(lines) and not user_prompts(lines) & asked_in_heldout]
    counts["shares a later prompt with held-out"] = len(everything) - len(heldout) - len(train)

    args.output.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("heldout", heldout)):
        write(args.output / f"{name}.jsonl", "".join(json.dumps(record(x), ensure_ascii=False) + "\n" for x in part))
        multi_turn = sum(len(lines) > 2 for lines in part)
        turns = sum(len(lines) // 2 for lines in part)
        print(f"{args.output / name}.jsonl: {len(part)} conversations, {multi_turn} of several turns, {turns} turns")
    write(args.output / "README.md", ATTRIBUTION)
    entries = counts.pop("entries")
    print(f"from {entries:,} entries; left out: " + ", ".join(f"{n} {reason}" for reason, n in counts.items()))


if __name__ == "__main__":
    main()
