"""The verb `score`: log Pr of every assistant turn given all before it, one forward per conversation, packed.

Runs over any number of ranks; the answer is one JSON line a conversation, in input order, whatever the layout.
"""

import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sft_dist.config import RunConfig, SourceConfig
from sft_dist.data.prepare import prepare, summarise
from sft_dist.data.store import PreparedDataset
from sft_dist.distributed.world import World, find_world
from sft_dist.errors import ConfigError, ExitCode, StorageError
from sft_dist.preparation import share_of

_SAY_EVERY_S = 2.0


def run(
    config: RunConfig,
    env: Mapping[str, str],
    *,
    model: str | None,
    checkpoint: str,
    sources: tuple[str, ...],
    output: Path,
) -> ExitCode:
    """Score `sources` (default data.heldout) with a model folder, Hub id or run folder; write `output`."""
    world = find_world(env)
    chosen = tuple(SourceConfig(path=path) for path in sources) or config.data.heldout
    if not chosen:
        raise ConfigError("nothing to score: data.heldout is empty and no --data is given")
    if world.is_main:
        _check_writable(output)
    config, weights = _resolve_model(config, model, checkpoint)
    dataset = prepare(chosen, config.model, config.data, share_of(world, env))
    lines = _score(config, world, weights, dataset)
    if world.is_main:
        _write(output, lines)
        _say_summary(dataset, lines, output)
    from sft_dist.session import close_session

    close_session()
    return ExitCode.DONE


def _resolve_model(config: RunConfig, model: str | None, which: str) -> tuple[RunConfig, Path | None]:
    """The run file with its model replaced, and the checkpoint to take weights from (run folders only)."""
    from sft_dist.train import checkpoint, rundir

    if model is None:
        return config, None
    if not rundir.is_run_dir(model):
        return config.model_copy(update={"model": config.model.model_copy(update={"path": model})}), None
    saved = rundir.saved_config(Path(model))
    found = checkpoint.find(Path(model), which)
    return config.model_copy(update={"model": saved.model}), found.folder


def _score(config: RunConfig, world: World, weights: Path | None, dataset: PreparedDataset) -> list[dict[str, Any]]:
    """The records of all conversations in input order, on rank 0; [] elsewhere. A collective."""
    from sft_dist.data.plan import distribute
    from sft_dist.data.selection import Policy, Selection
    from sft_dist.distributed import collectives
    from sft_dist.model import engine as engines
    from sft_dist.model import probe
    from sft_dist.session import open_session, print_from_main
    from sft_dist.train.evaluate import TurnScore, score_pack, scoring_packs

    open_session(world)
    say = print_from_main(world)
    engine = engines.inference_engine(config, world, weights)
    difference = probe.check(engine, probe.choose(dataset, config.data.max_length))
    say(f"packed log-probs equal the model's own, unpacked, to {difference:.1e}")
    policy = Policy(config.data.max_length, roles=frozenset(("assistant", "text")))
    selection = Selection(dataset, policy)
    packs = scoring_packs(selection)
    mine: list[TurnScore] = []
    forwards = distribute(packs, world.rank, world.size, config.batch.packs_per_micro_batch)
    last_said = time.monotonic()
    for number, pack in enumerate(forwards, start=1):
        mine += score_pack(engine, selection, pack)
        if time.monotonic() - last_said > _SAY_EVERY_S:
            last_said = time.monotonic()
            say(f"score  {number:,}/{len(forwards):,} forwards")
    gathered = collectives.gather(mine)
    if not world.is_main:
        return []
    turns: dict[int, list[TurnScore]] = defaultdict(list)
    for scores in gathered:
        for score in scores:
            turns[int(selection.samples[score.example])].append(score)
    return list(_records(dataset, turns, config.data.max_length))


def _records(dataset: PreparedDataset, turns: Mapping[int, list[Any]], max_length: int) -> Iterator[dict[str, Any]]:
    for number, sample in enumerate(dataset):
        head = {"id": sample.conversation_id, "index": sample.index, "source": sample.source}
        if len(sample.ids) > max_length:
            yield head | {"left_out": f"{len(sample.ids):,} tokens, data.max_length is {max_length:,}", "turns": []}
            continue
        scores = sorted(turns[number], key=lambda score: score.message)
        entries = [
            {
                "turn": turn,
                "message": score.message + 1,
                "role": "assistant",
                "num_tokens": score.num_tokens,
                "logprob": score.logprob,
            }
            for turn, score in enumerate(scores, start=1)
        ]
        yield head | {
            "num_tokens": sum(score.num_tokens for score in scores),
            "logprob": sum(score.logprob for score in scores),
            "turns": entries,
        }


def _check_writable(output: Path) -> None:
    if output.is_dir():
        raise StorageError(f"--output: {output}: is a folder; name a file")
    temporary = output.with_name(output.name + ".tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise StorageError(f"--output: {output}: cannot be written: {error.strerror or error}") from error


def _write(output: Path, lines: list[dict[str, Any]]) -> None:
    temporary = output.with_name(output.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        os.replace(temporary, output)
    except OSError as error:
        raise StorageError(f"--output: {output}: cannot be written: {error.strerror or error}") from error


def _say_summary(dataset: PreparedDataset, lines: list[dict[str, Any]], output: Path) -> None:
    by_turn: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for line in lines:
        for entry in line["turns"]:
            by_turn[entry["turn"]][0] -= entry["logprob"]
            by_turn[entry["turn"]][1] += entry["num_tokens"]
    nll = sum(total for total, _ in by_turn.values())
    tokens = sum(count for _, count in by_turn.values())
    left_out = sum("left_out" in line for line in lines)
    print(
        f"scored {len(lines) - left_out:,} conversations, {int(tokens):,} tokens: "
        f"NLL {nll / max(tokens, 1):.4f} per token"
    )
    for turn, (total, count) in sorted(by_turn.items())[:5]:
        print(f"  turn {turn}: {int(count):,} tokens, NLL {total / count:.4f}")
    reasons = dict(dataset.manifest["num_refused"]) | ({"too long": left_out} if left_out else {})
    if reasons:
        print(f"left out: {summarise(Counter(reasons))}", file=sys.stderr)
    print(f"written to {output}")
