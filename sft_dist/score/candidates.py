"""Scores of given candidate answers to one prompt: p(y | x) of each, the prompt computed once.

The records are those of score/questions.py. Where the tokens before the answer are the same for all candidates
(they are, unless a template looks ahead), the candidates branch off one prompt; otherwise each is computed on its own.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from sft_dist.config import DataConfig, SourceConfig
from sft_dist.data import formats
from sft_dist.data.renderer import Renderer
from sft_dist.distributed import collectives
from sft_dist.errors import ConfigError, DataError
from sft_dist.model import probe
from sft_dist.model.attention import can_share_prompts
from sft_dist.model.batch import Tree, collate_trees
from sft_dist.model.engine import Engine
from sft_dist.score.forwards import Layout, Logprobs, logprobs
from sft_dist.score.questions import Question, Rendered, read_questions, render_question
from sft_dist.score.summary import Tally
from sft_dist.score.tokens import TokenTexts
from sft_dist.train.evaluate import turn_logprobs

_NAMED_FAULTS = 10
# Of a prompt, when the tree layout is checked against the model's own forward.
_PROBED_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Block:
    """Records in input order."""

    first: int
    questions: tuple[Question, ...]

    @property
    def end(self) -> int:
        return self.first + len(self.questions)


@dataclass(frozen=True, slots=True)
class _Item:
    """One row: some neighbouring candidates of one question."""

    question: int  # number in the block
    first_candidate: int
    tree: Tree


class Candidates:
    """Prompts with candidates as a scoring job."""

    unit = "prompts"

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        data: DataConfig,
        renderer: Renderer,
        *,
        texts: TokenTexts | None,
    ) -> None:
        """Reads all once. Raises DataError for bad records as data.on_bad_record and data.max_refused say."""
        formats.check_sources(sources)
        self._sources = sources
        self._renderer = renderer
        self._texts = texts
        self._max_length = data.max_length
        self._refuses = data.on_bad_record == "refuse"
        # Before the records are counted: what comes in between is a change that check_unchanged sees.
        self.identity = {"data": self._data_identity(), "roles": "candidates"}
        self.num_items = num_faults = 0
        faults: list[str] = []
        for question in read_questions(self._sources):
            self.num_items += 1
            if question.fault is not None:
                num_faults += 1
                if len(faults) <= _NAMED_FAULTS:
                    faults.append(f"{question.row.where}: {question.fault}")
        if not self.num_items:
            raise DataError(f"{self._paths}: no records")
        self._complain(faults)
        if num_faults > data.max_refused * self.num_items:
            raise DataError(
                f"{num_faults:,} of {self.num_items:,} records cannot be scored, more than data.max_refused "
                f"({data.max_refused:.1%}):\n{_named(faults)}\n"
                "  mend them, or raise data.max_refused to go on without them"
            )

    def check_unchanged(self) -> None:
        if self._data_identity() != self.identity["data"]:
            raise self._changed()

    def blocks(self, first: int, num_items: int) -> Iterator[Block]:
        """The records from `first` on, as many at a time as have about `num_items` candidates."""
        questions: list[Question] = []
        num_candidates = 0
        # Records that were added meanwhile are not asked for: ranks that see them would be alone.
        for question in islice(read_questions(self._sources), first, self.num_items):
            questions.append(question)
            num_candidates += max(len(question.candidates), 1)
            if num_candidates >= num_items:
                yield Block(first, tuple(questions))
                first += len(questions)
                questions, num_candidates = [], 0
        if questions:
            yield Block(first, tuple(questions))
            first += len(questions)
        if first < self.num_items:
            raise self._changed()

    def check(self, engine: Engine, block: Block) -> str | None:
        """Raise ConfigError unless candidates on one prompt score as the model's own forward does. A collective."""
        renders = (render_question(self._renderer, question) for question in block.questions)
        rendered = next((r for r in renders if isinstance(r, Rendered) and r.longest <= self._max_length), None)
        if rendered is None:
            return None
        prompt = rendered.prompt(0)[-_PROBED_TOKENS:]
        outputs = tuple(output[:_PROBED_TOKENS] for output in rendered.outputs[:2])
        trees = [Tree(prompt, outputs)] if _is_split(engine) else [Tree(prompt, (output,)) for output in outputs]
        found = [value for _, _, values in turn_logprobs(engine, collate_trees(trees)) for value in values.tolist()]
        alone = [
            value
            for output in outputs
            for value in probe.plain_logprobs(engine.causal_lm, np.concatenate([prompt, output]))[len(prompt) - 1 :]
        ]
        difference = float(np.abs(np.array(found) - np.array(alone)).max())
        bound = probe.ROUNDING[engine.causal_lm.dtype]
        if not difference <= bound:
            raise ConfigError(
                f"model.path: candidates on a shared prompt score differently from the model's own forward, by "
                f"{difference:.3g} (at most {bound:.3g} is rounding); set model.attention: eager, under which each "
                "candidate is computed on its own"
            )
        how = f"log-probs of candidates equal the model's own, one at a time, to {difference:.1e}"
        if _is_split(engine):
            return how
        return f"{how}; this model's attention cannot share a prompt: each candidate is computed on its own"

    def score(
        self, engine: Engine, layout: Layout, block: Block, advance: Callable[[float], None]
    ) -> tuple[list[dict[str, Any]], Tally]:
        """The lines of a block in input order, and their sums. A collective; only rank 0 makes lines."""
        rendered = self._render_together(block.questions, layout)
        items = list(self._items(rendered, can_share=_is_split(engine)))
        answers = logprobs(
            engine,
            layout,
            [item.tree.num_tokens for item in items],
            lambda pack: collate_trees([items[number].tree for number in pack]),
            advance,
        )
        if not layout.world.is_main:
            return [], Tally()
        found: Logprobs = {
            (items[item].question, items[item].first_candidate + branch): values
            for (item, branch), values in answers.items()
        }
        lines = [
            self._line(question, answer, [found.get((number, i)) for i in range(len(question.candidates))])
            for number, (question, answer) in enumerate(zip(block.questions, rendered, strict=True))
        ]
        return lines, self._tally(rendered, items, lines)

    def summary(self, names: Sequence[str], tallies: Sequence[Tally]) -> Iterator[str]:
        counts = tallies[0].counts
        yield f"scored {counts['candidates']:,} candidates of {counts['prompts']:,} prompts"
        for name, tally in zip(names, tallies, strict=True):
            computed, separate = tally.counts["tokens computed"], tally.counts["tokens of separate passes"]
            yield f"  {name}: {computed:,} tokens computed; one pass for each candidate would take {separate:,}"
        if apart := counts["prompts that differ"]:
            yield f"  {apart:,} prompts read differently before different candidates: those were computed separately"

    def left_out(self, tally: Tally) -> dict[str, int]:
        reasons = {name: tally.counts[name] for name in ("too long", "bad record")}
        return {name: count for name, count in reasons.items() if count}

    def _complain(self, faults: Sequence[str]) -> None:
        if faults and not self._refuses:
            raise DataError(
                f"records that cannot be scored:\n{_named(faults)}\n"
                "  mend them, or set data.on_bad_record: refuse to leave such records out, counted and named"
            )

    @property
    def _paths(self) -> str:
        return ", ".join(source.path for source in self._sources)

    def _data_identity(self) -> str:
        """Of the content of the files and of how it becomes tokens."""
        content = [[formats.source_name(source), formats.source_fingerprint(source)] for source in self._sources]
        key = json.dumps([self._renderer.fingerprint, content])
        return hashlib.sha256(key.encode()).hexdigest()[:16]

    def _changed(self) -> DataError:
        return DataError(f"{self._paths}: changed while it was scored; score it again, to another output")

    def _render_together(self, questions: Sequence[Question], layout: Layout) -> list[Rendered | str]:
        """The tokens of every question, or why there are none. A collective: each rank renders its share."""
        world = layout.world
        mine = [render_question(self._renderer, question) for question in questions[world.rank :: world.size]]
        parts = [iter(part) for part in collectives.gather(mine)]
        rendered = [next(parts[number % world.size]) for number in range(len(questions))]
        self._complain(
            [
                f"{question.row.where}: {answer}"
                for question, answer in zip(questions, rendered, strict=True)
                if isinstance(answer, str)
            ]
        )
        return rendered

    def _items(self, rendered: Sequence[Rendered | str], *, can_share: bool) -> Iterator[_Item]:
        for number, question in enumerate(rendered):
            if isinstance(question, str) or question.longest > self._max_length:
                continue
            if can_share and question.is_shared:
                for first, end in _rows(question, self._max_length):
                    yield _Item(number, first, Tree(question.prompts[0], question.outputs[first:end]))
                continue
            for candidate, output in enumerate(question.outputs):
                yield _Item(number, candidate, Tree(question.prompt(candidate), (output,)))

    def _line(self, question: Question, rendered: Rendered | str, values: Sequence[Any]) -> dict[str, Any]:
        line: dict[str, Any] = {"id": question.id, "index": question.row.index, "source": question.row.source}
        if isinstance(rendered, str):
            return line | {"left_out": rendered, "candidates": []}
        if rendered.longest > self._max_length:
            limit = f"{rendered.longest:,} tokens, data.max_length is {self._max_length:,}"
            return line | {"left_out": limit, "candidates": []}
        sums = np.array([float(part.sum(dtype=np.float64)) for part in values])  # nats [K]
        ranks = np.empty(len(sums), np.int64)
        ranks[np.argsort(-sums, kind="stable")] = np.arange(1, len(sums) + 1)
        shares = np.exp(sums - sums.max())
        shares /= shares.sum()
        entries = []
        for output, part, total, place, share in zip(rendered.outputs, values, sums, ranks, shares, strict=True):
            entry: dict[str, Any] = {
                "num_tokens": len(output),
                "logprob": float(total),
                "rank": int(place),
                "posterior": float(share),
            }
            if self._texts is not None:
                entry["tokens"] = self._texts.described(output, part)
            entries.append(entry)
        return line | {"num_prompt_tokens": max(map(len, rendered.prompts)), "candidates": entries}

    def _tally(
        self, rendered: Sequence[Rendered | str], items: Sequence[_Item], lines: Sequence[dict[str, Any]]
    ) -> Tally:
        scored = [
            answer
            for answer, line in zip(rendered, lines, strict=True)
            if isinstance(answer, Rendered) and "left_out" not in line
        ]
        bad = sum(isinstance(answer, str) for answer in rendered)
        return Tally(
            {
                "prompts": len(scored),
                "candidates": sum(len(answer.outputs) for answer in scored),
                "tokens computed": sum(item.tree.num_tokens for item in items),
                "tokens of separate passes": sum(
                    len(answer.prompt(number)) + len(output) - 1
                    for answer in scored
                    for number, output in enumerate(answer.outputs)
                ),
                "prompts that differ": sum(not answer.is_shared for answer in scored),
                "too long": len(lines) - len(scored) - bad,
                "bad record": bad,
            }
        )


def _named(faults: Sequence[str]) -> str:
    named = "\n".join(f"  {fault}" for fault in faults[:_NAMED_FAULTS])
    return named + ("\n  and more" if len(faults) > _NAMED_FAULTS else "")


def _rows(question: Rendered, max_length: int) -> Iterator[tuple[int, int]]:
    """Ranges of candidates that fit into one row with the prompt before them."""
    first, used = 0, len(question.prompts[0]) - 1
    for candidate, output in enumerate(question.outputs):
        if candidate > first and used + len(output) > max_length:
            yield first, candidate
            first, used = candidate, len(question.prompts[0]) - 1
        used += len(output)
    yield first, len(question.outputs)


def _is_split(engine: Engine) -> bool:
    return can_share_prompts(engine.causal_lm.config._attn_implementation)
