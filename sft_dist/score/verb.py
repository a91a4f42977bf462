"""The order of things: resolve the models, read the data, then for each model block after block, and publish."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sft_dist.config import RunConfig, SourceConfig
from sft_dist.data.conversation import ROLES
from sft_dist.data.manifest import summarise
from sft_dist.data.prepare import Share, prepare
from sft_dist.data.progress import duration
from sft_dist.data.renderer import Renderer
from sft_dist.distributed import collectives
from sft_dist.distributed.watchdog import Watchdog
from sft_dist.distributed.world import World, find_world
from sft_dist.errors import ConfigError, ExitCode, say
from sft_dist.model import engine as engines
from sft_dist.preparation import share_of
from sft_dist.score import models
from sft_dist.score.candidates import Candidates
from sft_dist.score.conversations import Conversations, check_roles
from sft_dist.score.forwards import Layout
from sft_dist.score.job import Block, Job
from sft_dist.score.models import Scorer
from sft_dist.score.output import GrowingOutput, Part, check_writable
from sft_dist.score.questions import is_candidates
from sft_dist.score.summary import Tally
from sft_dist.score.tokens import TokenTexts
from sft_dist.session import close_session, open_session, print_from_main

# Samples (or candidates) between two journal entries: what a kill costs at most, and what is in memory at a time.
BLOCK_ITEMS = 2_048
_ANSWERS = ("assistant", "text")
_SAY_EVERY_S = 2.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def run(
    config: RunConfig,
    env: Mapping[str, str],
    *,
    names: Sequence[str],
    checkpoint: str,
    sources: Sequence[str],
    output: Path,
    roles: Sequence[str],
    with_tokens: bool,
    block_items: int = BLOCK_ITEMS,
) -> ExitCode:
    """Score `sources` (default data.heldout) with each of the models `names` (default model.path); write `output`."""
    world = find_world(env)
    chosen = tuple(SourceConfig(path=path) for path in sources) or config.data.heldout
    if not chosen:
        raise ConfigError("nothing to score: data.heldout is empty and no --data is given")
    wanted = check_roles(roles, ROLES) if roles else frozenset(_ANSWERS)
    if world.is_main:
        check_writable(output)
    scorers, renderer = models.resolve(config, names, checkpoint, world)
    share = share_of(world, env)
    job = _job(scorers[0].config, chosen, renderer, share, roles=wanted, with_tokens=with_tokens, is_asked=bool(roles))
    with open_session(world, config.watchdog) as watchdog:
        _score(job, scorers, world, output, watchdog, with_tokens=with_tokens, block_items=block_items)
        close_session()
    return ExitCode.DONE


def _job(
    config: RunConfig,
    sources: Sequence[SourceConfig],
    renderer: Renderer,
    share: Share,
    *,
    roles: frozenset[str],
    with_tokens: bool,
    is_asked: bool,
) -> Job[Any]:
    texts = TokenTexts(renderer) if with_tokens else None
    if is_candidates(sources):
        if is_asked:
            raise ConfigError("--roles: prompts with candidates have their candidates scored, whatever the role")
        return Candidates(sources, config.data, renderer, texts=texts)
    dataset = prepare(sources, config.model, config.data, share)
    return Conversations(dataset, roles=roles, max_length=config.data.max_length, texts=texts)


def _score(
    job: Job[Any],
    scorers: Sequence[Scorer],
    world: World,
    output: Path,
    watchdog: Watchdog,
    *,
    with_tokens: bool,
    block_items: int,
) -> None:
    _leave_on_signals(f"what is scored so far is kept beside {output}; the same command goes on from there", world)
    say_once = print_from_main(world)
    scorers = models.of_main(scorers)
    settings = _settings(job, scorers, world, with_tokens=with_tokens, block_items=block_items)
    dtypes = {model["name"]: model["dtype"] for model in settings["models"]}
    if len(set(dtypes.values())) > 1:
        said = ", ".join(f"{name} in {dtype.removeprefix('torch.')}" for name, dtype in dtypes.items())
        say_once(f"note: the models compute in different precisions, which is part of their difference: {said}")
    growing: list[GrowingOutput] = []  # on rank 0

    def begin() -> list[Part]:
        growing.append(GrowingOutput(output, settings, len(scorers)))
        if growing[0].is_published:
            say("all is scored and in place already")
        return growing[0].parts

    parts = collectives.on_main(begin)
    for number, (scorer, part) in enumerate(zip(scorers, parts, strict=True)):
        if part.is_whole:
            continue
        if part.num_done:
            say_once(
                f"{scorer.name}: {part.num_done:,} of {job.num_items:,} {job.unit} are scored; going on from there"
            )
        watchdog.enter(f"scoring with {scorer.name}")
        grows = growing[0] if growing else None
        _score_model(job, scorer, world, part, grows, number, watchdog, block_items=block_items)
    names = [scorer.name for scorer in scorers]
    collectives.on_main(partial(_publish, job, growing, names))
    if world.is_main:
        tallies = [part.tally for part in growing[0].parts]
        print("\n".join(job.summary(names, tallies)))
        if reasons := job.left_out(tallies[0]):
            say(f"left out: {summarise(Counter(reasons))}")
        print(f"written to {output}")


def _settings(
    job: Job[Any], scorers: Sequence[Scorer], world: World, *, with_tokens: bool, block_items: int
) -> dict[str, Any]:
    """What decides the output. A collective; raises ClusterError where it is not the same on all ranks."""
    described = [models.settings(scorer) for scorer in scorers]
    settings = {
        **job.identity,
        "tokens": with_tokens,
        "data.max_length": scorers[0].config.data.max_length,
        "models": described,
    }
    # First what is known without the others: which models' files the ranks read together depends on it.
    collectives.check_same(settings | {job.unit: job.num_items, "--block-items": block_items})
    found = [model | {"content": models.identity(s, world)} for model, s in zip(described, scorers, strict=True)]
    collectives.check_same({"models": found})
    return settings | {"models": found}


def _publish(job: Job[Any], growing: Sequence[GrowingOutput], names: Sequence[str]) -> None:
    if not growing[0].is_published:
        job.check_unchanged()
    growing[0].publish(names)


def _score_model(
    job: Job[Any],
    scorer: Scorer,
    world: World,
    part: Part,
    growing: GrowingOutput | None,
    number: int,
    watchdog: Watchdog,
    *,
    block_items: int,
) -> None:
    """Everything that one model has not scored yet. A collective."""
    say_once = print_from_main(world)
    engine = engines.inference_engine(scorer.config, world, scorer.weights)
    engine.on_forward(watchdog.move)
    layout = Layout(world, scorer.config.data.max_length, scorer.config.batch.packs_per_micro_batch)
    progress = _Progress(scorer.name, job.num_items, part.num_done, job.unit, say_once)
    is_checked = part.num_done == job.num_items
    for block in job.blocks(part.num_done, block_items):
        if not is_checked and (agreement := job.check(engine, block)) is not None:
            say_once(agreement)
            is_checked = True
        lines, tally = job.score(engine, layout, block, partial(progress.advance, block))
        collectives.on_main(partial(_append, growing, number, lines, tally, block.end))
    if not is_checked:
        say_once(f"{scorer.name}: nothing that fits was there by which the model could be checked")
    collectives.on_main(lambda: growing.finish(number) if growing else None)
    engine.close()


def _append(
    growing: GrowingOutput | None, number: int, lines: Sequence[dict[str, Any]], tally: Tally, num_done: int
) -> None:
    if growing is not None:
        growing.append(number, lines, tally, num_done=num_done)


class _Progress:
    """How far it is, how fast and for how long, every two seconds."""

    def __init__(self, name: str, num_items: int, first: int, unit: str, say_once: Callable[[str], None]) -> None:
        self._name, self._num_items, self._first, self._unit = name, num_items, first, unit
        self._say = say_once
        self._started = self._last = time.monotonic()

    def advance(self, block: Block, share: float) -> None:
        """Called when this share of a block is done."""
        num_done = block.first + share * (block.end - block.first)
        now = time.monotonic()
        if now - self._last < _SAY_EVERY_S:
            return
        self._last = now
        rate = (num_done - self._first) / (now - self._started)
        eta = duration((self._num_items - num_done) / rate) if rate > 0 else "-"
        self._say(f"score {self._name}  {int(num_done):,}/{self._num_items:,} {self._unit}  {rate:,.1f}/s  eta {eta}")


def _leave_on_signals(message: str, world: World) -> None:
    """From now on a signal ends this process at once with 128 + its number, wherever the main thread is.

    Nothing is lost by that (score/output.py), and a rank that waits in a collective for one that has left would not
    come back to Python: hence a thread, woken by the byte that the interpreter's own handler writes.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)

    def leave() -> None:
        while (number := os.read(reading, 1)[0]) not in _SIGNALS:
            pass
        if world.is_main:
            say(f"{signal.Signals(number).name}: {message}")
        os._exit(128 + number)

    threading.Thread(target=leave, daemon=True).start()
