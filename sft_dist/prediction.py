"""The verb `predict`: a prediction head's answer to every record of a file, as JSON Lines in the order of the file.

Records need no label. Those that cannot be read or do not fit have a line all the same, which says why, and are counted
at the end. The output appears when all of it is there; several ranks give the same lines as one.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sft_dist.config import RunConfig, SourceConfig, load_config
from sft_dist.data.labels import LabelSet
from sft_dist.data.manifest import summarise
from sft_dist.data.prepare import prepare
from sft_dist.data.sample import Sample
from sft_dist.data.selection import Policy, Selection
from sft_dist.data.store import REFUSED
from sft_dist.distributed.world import World, find_world
from sft_dist.errors import ConfigError, ExitCode, StorageError, say
from sft_dist.preparation import share_of
from sft_dist.train import rundir

_NAMED = 10


def run(source: Path, file: Path, output: Path, env: Mapping[str, str], *, which: str) -> ExitCode:
    """Answer the records of `file` with a checkpoint of a run (its folder or run file); write `output`.

    Raises ConfigError for a run without a head.
    """
    from sft_dist.session import close_session, open_session

    world = find_world(env)
    run_dir = Path(load_config(source).run_dir) if source.is_file() else source
    config = rundir.saved_config(run_dir)
    if config.head.kind == "none":
        raise ConfigError(f"{run_dir}: a language model, which has no prediction head (head.kind); see score, generate")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ConfigError(f"--output: {output}: not a file in a folder that exists")
    labels = LabelSet(config.head.kind, config.head.labels, is_read=False)
    is_beside = config.head.is_beside
    records = SourceConfig(path=str(file), format="labelled_chat" if is_beside else "labelled")
    data = config.data.model_copy(update={"on_bad_record": "refuse", "max_refused": 1.0})
    dataset = prepare((records,), config.model, data, share_of(world, env), may_be_empty=True)
    selection = Selection(dataset, Policy(config.data.max_length, labels=labels, is_beside=is_beside))
    with open_session(world, config.watchdog) as watchdog:
        watchdog.enter("predicting")
        logits = _logits(config, world, selection, run_dir, which)
        if world.is_main:
            _publish(output, list(_lines(selection, labels, logits)))
        close_session()
    return ExitCode.DONE


def _logits(config: RunConfig, world: World, selection: Selection, run_dir: Path, which: str) -> Any:
    """float64 [n, C] of all samples, on every rank. A collective."""
    import torch

    from sft_dist.data.plan import distribute
    from sft_dist.distributed import collectives
    from sft_dist.model import engine as engines
    from sft_dist.model.batch import collate
    from sft_dist.train import checkpoint
    from sft_dist.train.classification import Answers
    from sft_dist.train.evaluate import scoring_packs

    found = collectives.on_main(lambda: checkpoint.find(run_dir, which))
    if not len(selection):  # every record is refused
        return np.zeros((0, len(config.head.labels)))
    engine = engines.inference_engine(config, world, found.folder)
    answers = Answers()
    for pack in distribute(scoring_packs(selection), world.rank, world.size, config.batch.packs_per_micro_batch):
        with torch.no_grad():
            answers.add(pack, engine.logits(collate([selection[number] for number in pack])))
    answers.reduce()
    return answers.logits


def _lines(selection: Selection, labels: LabelSet, logits: Any) -> Iterator[dict[str, Any]]:
    """One entry a record of the file, in its order: an answer, or why there is none."""
    from sft_dist.train.classification import probabilities

    dataset = selection.dataset
    is_beside = selection.policy.is_beside
    without: list[Sample] = []  # texts, and all but the last samples of conversations, which have answers of their own
    answers: dict[int, dict[str, Any]] = {}  # by the record's place in the file
    for number, shares in enumerate(probabilities(labels.kind, logits)):
        sample = selection[number].sample
        answers[sample.index] = {"id": sample.conversation_id} | _answer(labels, shares.tolist())
    for left in selection.left_out.listed():
        sample = dataset[left.sample]
        if is_beside and not sample.label:
            without.append(sample)
            continue
        detail = f"{len(sample.ids):,} tokens, data.max_length is {selection.policy.max_length:,}"
        answers[sample.index] = {"id": sample.conversation_id, "refused": left.reason, "detail": detail}
    for sample in without:
        told = {"refused": "no conversation", "detail": "the head beside the language model's answers to `messages`"}
        answers.setdefault(sample.index, {"id": sample.conversation_id} | told)
    with open(dataset.folder / REFUSED, encoding="utf-8") as file:
        refused = map(json.loads, file)  # in the order of the file, as all its records are numbered
        for index in range(dataset.manifest["num_records"]):
            if index in answers:
                yield answers[index]
            else:
                item = next(refused)
                yield {"id": item["id"], "refused": item["reason"], "detail": f"{item['where']}: {item['detail']}"}


def _answer(labels: LabelSet, shares: list[float]) -> dict[str, Any]:
    named = dict(zip(labels.names, shares, strict=True))
    match labels.kind:
        case "single_label":
            return {"label": labels.names[int(np.argmax(shares))], "probabilities": named}
        case "multi_label":
            return {"label": [name for name, share in named.items() if share > 0.5], "probabilities": named}
        case "regression":
            return {"values": named}


def _publish(output: Path, lines: list[dict[str, Any]]) -> None:
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        os.replace(temporary, output)
    except OSError as error:
        raise StorageError(f"--output: {output}: cannot be written: {error.strerror or error}") from error
    refused = [line for line in lines if "refused" in line]
    say(f"{len(lines) - len(refused):,} of {len(lines):,} records answered in {output}")
    if refused:
        say(f"refused {len(refused):,}: {summarise(Counter(line['refused'] for line in refused))}")
        for line in refused[:_NAMED]:
            say(f"  {line['id']}: {line['refused']}: {line['detail']}")
