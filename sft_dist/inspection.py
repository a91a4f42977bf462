"""The verb `inspect`: tokens as people see them, trained ones marked, with the statistics of the whole set."""

import json
import sys
from typing import TextIO

from sft_dist.config import RunConfig
from sft_dist.data.prepare import prepare
from sft_dist.data.renderer import load_renderer
from sft_dist.data.sample import Sample
from sft_dist.data.selection import Example, Selection
from sft_dist.errors import ConfigError, DataError, ExitCode
from sft_dist.preparation import describe, policy, with_labels

_GREEN, _GREY, _RESET = "\x1b[1;32m", "\x1b[90m", "\x1b[0m"


def run(config: RunConfig, *, conversation_id: str | None, num: int, out: TextIO = sys.stdout) -> ExitCode:
    """Print `num` conversations (or the one named) with target tokens marked, then counts, lengths and pack fill."""
    config = with_labels(config)
    sources = config.data.train or config.data.heldout
    if not sources:
        raise ConfigError("data.train and data.heldout are both empty: nothing to inspect")
    selection = Selection(prepare(sources, config.model, config.data), policy(config, sources))
    renderer = load_renderer(config.model, config.data)
    backend = renderer.tokenizer.backend_tokenizer
    marks = (_GREEN, _RESET) if out.isatty() else ("⟦", "⟧")
    for example in _chosen(selection, conversation_id, num):
        sample, turns = example.sample, example.turns
        trained = int((turns >= 0).sum())
        label = f", label {sample.label}" if example.label_weight else ""
        print(
            f"── {sample.conversation_id} ({sample.source}): {len(sample.ids):,} tokens, {trained:,} trained{label}",
            file=out,
        )
        print(_marked(backend, sample, turns >= 0, marks, grey=out.isatty()), file=out)
        for span in sample.spans:
            own = int((turns == span.message).sum())
            print(f"   message {span.message + 1} {span.role}: tokens {span.start}-{span.end}, {own} trained", file=out)
    print(
        f"trained tokens are marked {'green' if out.isatty() else json.dumps(''.join(marks), ensure_ascii=False)}",
        file=out,
    )
    print(describe(selection, config), file=out)
    return ExitCode.DONE


def _chosen(selection: Selection, conversation_id: str | None, num: int) -> list[Example]:
    if conversation_id is None:
        return [selection[number] for number in range(min(num, len(selection)))]
    found = [
        selection[number]
        for number, sample in enumerate(selection.samples)
        if selection.dataset[int(sample)].conversation_id == conversation_id
    ]
    if not found:
        raise DataError(f"--id {conversation_id}: no verified conversation that fits and has a target has this id")
    return found


def _marked(backend: object, sample: Sample, trained: object, marks: tuple[str, str], *, grey: bool) -> str:
    """The decoded text, runs of trained tokens between the marks."""
    parts = []
    start = 0
    flags = list(trained)  # type: ignore[call-overload]
    for end in range(1, len(flags) + 1):
        if end < len(flags) and flags[end] == flags[start]:
            continue
        text = backend.decode(sample.ids[start:end].tolist(), skip_special_tokens=False)  # type: ignore[attr-defined]
        before, after = marks if flags[start] else (_GREY, _RESET) if grey else ("", "")
        parts.append(before + text + after)
        start = end
    return "".join(parts)
