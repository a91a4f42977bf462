"""The verb `verify`: a run's promises checked on its own model, template and data, in about a minute.

A few conversations of the training set are computed as a run computes them and once more another way: contexts by the
tokenizer's own apply_chat_template, packed log-probs by the model's forward on each sample alone, turns of one pass by
separate passes, the gradient of a step in two layouts. Takes no step, and writes nothing but prepared data.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sft_dist.config import RunConfig
from sft_dist.data import comparison, formats
from sft_dist.data.conversation import Conversation, Record
from sft_dist.data.manifest import summarise
from sft_dist.data.packing import Pack, best_fit_decreasing
from sft_dist.data.plan import Plan
from sft_dist.data.renderer import load_renderer
from sft_dist.data.selection import Example, Selection
from sft_dist.distributed.world import World, find_world
from sft_dist.errors import ExitCode
from sft_dist.preparation import share_of, training_set
from sft_dist.training import initial_weights

if TYPE_CHECKING:
    from torch import Tensor

    from sft_dist.model.engine import Engine

# Relative difference of a step's gradient between two layouts (L2 norm over all parameters), by dtype of the weights.
GRADIENT_ROUNDING = {"float32": 1e-3, "bfloat16": 5e-2}
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the answer. A difference that is no number (NaN) is a failure."""

    name: str
    compared: str
    difference: float
    bound: float
    unit: str
    findings: tuple[str, ...] = ()  # what differs, for people

    @property
    def is_ok(self) -> bool:
        return self.difference <= self.bound

    def line(self) -> str:
        verdict = "ok" if self.is_ok else "FAILED"
        number = f"{self.difference:.2g} {self.unit} (at most {self.bound:.2g})"
        return "\n".join([f"  {self.name:<14} {verdict:<7} {number:<40} {self.compared}", *self.findings])


def run(config: RunConfig, env: Mapping[str, str], *, num: int) -> ExitCode:
    """Check `num` conversations of data.train and print the largest differences; CONFIG where one is too large."""
    world = find_world(env)
    # Noise would differ between layouts on purpose.
    config = config.model_copy(update={"objective": config.objective.model_copy(update={"neftune_alpha": 0.0})})
    if config.anchor.kl_top_k is not None:  # what it compares with is read from files: no layout changes it
        config = config.model_copy(update={"anchor": config.anchor.model_copy(update={"kl": 0.0, "kl_top_k": None})})
    selection, _ = training_set(config, share_of(world, env))
    chosen = choose(selection, num)

    from sft_dist.distributed import collectives
    from sft_dist.model.engine import training_engine
    from sft_dist.session import close_session, open_session

    checks = []
    if world.is_main:
        print(_title(selection, chosen))
        checks = check_rendering(config, selection, chosen)
        _print(checks)
    with open_session(world, config.watchdog):
        engine = training_engine(config, world, initial_weights(config))
        checks += check_logprobs(engine, selection, chosen)
        checks.append(check_layout(engine, config, world, selection, chosen))
        if world.is_main:
            _print(checks[-3:])
        failed = [check.name for check in collectives.from_main(checks) if not check.is_ok]
    if world.is_main:
        dtype = str(engine.causal_lm.dtype).removeprefix("torch.")
        what = f"{engine.causal_lm.config.model_type} in {dtype} on {world.size} rank(s), dropout off"
        print(f"verify: {', '.join(failed)} FAILED; {what}" if failed else f"verify: all is as it must be; {what}")
    close_session()
    return ExitCode.CONFIG if failed else ExitCode.DONE


def choose(selection: Selection, num: int) -> list[int]:
    """Examples with targets: the longest, the shortest, most turns, one of a split conversation, evenly by length."""
    candidates = np.flatnonzero(selection.num_targets > 0)
    by_length = candidates[np.argsort(selection.lengths[candidates], kind="stable")]
    num_turns = selection.dataset.column("num_turns")[selection.samples[candidates]]
    _, conversation, counts = np.unique(selection.indices, return_inverse=True, return_counts=True)
    split = candidates[counts[conversation[candidates]] > 1]
    first = [by_length[-1], by_length[0], candidates[np.argmax(num_turns)], *split[:1]]
    spread = by_length[np.linspace(0, len(by_length) - 1, num).round().astype(int)]
    return sorted(list(dict.fromkeys(int(number) for number in [*first, *spread]))[:num])


def check_rendering(config: RunConfig, selection: Selection, chosen: Sequence[int]) -> list[Check]:
    """Contexts of the chosen samples against apply_chat_template, and what their answers decode to."""
    renderer = load_renderer(config.model, config.data)
    samples = [selection.dataset[int(selection.samples[number])] for number in chosen]
    records = _records(config, {sample.index for sample in samples})
    outcomes: Counter[str] = Counter()
    contexts: list[str] = []
    answers: list[str] = []
    num_answers = 0
    for sample in samples:
        record = records[sample.index]
        for span in (span for span in sample.spans if span.turn and span.is_owned):
            outcome, expected = comparison.compare_context(
                renderer, record, sample, span, date=config.data.date, template_kwargs=config.data.template_kwargs
            )
            outcomes[outcome] += 1
            where = f"    {record.where}: message {span.message + 1}: "
            if outcome == comparison.DIFFERENT:
                contexts.append(
                    where + comparison.difference(renderer, sample.ids[: span.output_start].tolist(), expected)
                )
            if isinstance(record, Conversation):
                num_answers += 1
                fault = comparison.answer_fault(renderer, record.messages[span.message], sample, span)
                answers += [where + fault] if fault else []
    compared = f"contexts against apply_chat_template: {summarise(outcomes)}"
    spans = f"answers that decode to what was written and end in a control token, of {num_answers:,}"
    return [
        Check("rendering", compared, len(contexts), 0, "unexplained", tuple(contexts[:_NAMED])),
        Check("spans", spans, len(answers), 0, "wrong", tuple(answers[:_NAMED])),
    ]


def _records(config: RunConfig, wanted: set[int]) -> dict[int, Record]:
    """The records of these places in the input order, read again."""
    found: dict[int, Record] = {}
    index = 0
    for source in config.data.train:
        for row in formats.read_rows(source, index):
            index = row.index + 1
            if row.index in wanted:
                found[row.index] = formats.to_record(row)
            if len(found) == len(wanted):
                return found
    raise AssertionError("the sources hold fewer records than were prepared")


def check_logprobs(engine: "Engine", selection: Selection, chosen: Sequence[int]) -> list[Check]:
    """Packing and decomposition: log-probs of packs against plain forwards. A collective."""
    import torch

    from sft_dist.model.batch import collate
    from sft_dist.model.probe import ROUNDING, plain_logprobs

    engine.train(False)
    causal_lm, bound = engine.causal_lm, ROUNDING[engine.causal_lm.dtype]
    packs = _packs(selection, chosen)
    from_packs: list[Tensor] = []
    alone: list[Tensor] = []
    turns_from_packs: list[Tensor] = []
    turns_alone: list[Tensor] = []
    for pack in packs:
        examples = [_all_targets(selection[number]) for number in pack]
        with torch.no_grad():
            row = engine.logprobs(collate(examples)).cpu().double()
        for example, own in zip(examples, row.split([len(e.sample.ids) - 1 for e in examples]), strict=True):
            ids = example.sample.ids
            from_packs.append(own)
            alone.append(torch.tensor(plain_logprobs(causal_lm, ids), dtype=torch.float64))
            for span in (s for s in example.sample.spans if s.turn and s.is_owned and s.output_end > s.output_start):
                first = max(span.output_start, 1)
                turns_from_packs.append(own[first - 1 : span.output_end - 1])
                separate = plain_logprobs(causal_lm, ids[: span.output_end])[first - 1 :]
                turns_alone.append(torch.tensor(separate, dtype=torch.float64))
    shared = sum(len(pack) > 1 for pack in packs)
    num_tokens = sum(len(values) for values in alone)
    sums = [abs(float((a - b).sum())) for a, b in zip(turns_from_packs, turns_alone, strict=True)]
    return [
        Check(
            "packing",
            f"{num_tokens:,} tokens in {len(packs)} packs ({shared} with several samples) against each sample alone",
            _largest(from_packs, alone),
            bound,
            "nats a token",
        ),
        Check(
            "decomposition",
            f"{len(sums):,} turns from one pass against {len(sums):,} passes of their own; sums differ by at most "
            f"{max(sums, default=0.0):.2g}",
            _largest(turns_from_packs, turns_alone),
            bound,
            "nats a token",
        ),
    ]


def _all_targets(example: Example) -> Example:
    """The same sample with every token but the first as a target."""
    is_target = np.arange(len(example.sample.ids)) > 0
    return replace(example, turns=np.where(is_target, 0, -1).astype(np.int32), weights=is_target.astype(np.float32))


def _packs(selection: Selection, chosen: Sequence[int]) -> list[Pack]:
    """The chosen examples packed as a run packs them."""
    packs = best_fit_decreasing(selection.lengths[list(chosen)], selection.policy.max_length)
    return [tuple(chosen[place] for place in pack) for pack in packs]


def _largest(values: "Sequence[Tensor]", references: "Sequence[Tensor]") -> float:
    """The largest absolute difference, NaN if there is one."""
    import torch

    differences = [(a - b).abs().max() for a, b in zip(values, references, strict=True) if len(a)]
    return float(torch.stack(differences).max()) if differences else 0.0


def check_layout(
    engine: "Engine", config: RunConfig, world: World, selection: Selection, chosen: Sequence[int]
) -> Check:
    """The gradient of one step with the chosen examples, one sample a forward against the run's packs. A collective."""
    from sft_dist.distributed import collectives
    from sft_dist.train.gradient import accumulate_gradient

    _turn_off_dropout(engine.causal_lm)
    engine.train()
    single = config.model_copy(update={"batch": config.batch.model_copy(update={"packs_per_micro_batch": 1})})
    # To the plan of the first layout every sample fills a pack.
    full = np.full_like(selection.lengths, selection.policy.max_length)
    layouts = [(single, _plan(single, selection, chosen, full)), (config, _plan(config, selection, chosen, None))]
    engine.clear_gradients()
    accumulate_gradient(engine, selection, layouts[0][1], 0, single, world)
    reference = dict(engine.local_gradients())
    engine.clear_gradients()
    accumulate_gradient(engine, selection, layouts[1][1], 0, config, world)
    difference = norm = 0.0
    for name, gradient in engine.local_gradients():
        difference += float((gradient - reference[name]).double().square().sum())
        norm += float(reference[name].double().square().sum())
    engine.clear_gradients()
    difference, norm = collectives.all_sum([difference, norm])
    forwards = [
        len(
            plan.micro_batches(
                0, data_rank=0, data_size=world.size, packs_per_micro_batch=own.batch.packs_per_micro_batch
            )
        )
        for own, plan in layouts
    ]
    dtype = str(engine.causal_lm.dtype).removeprefix("torch.")
    return Check(
        "layout",
        f"gradient of a step: {forwards[0]} forwards a rank of one sample each against {forwards[1]} of packs",
        (difference / norm) ** 0.5 if norm else float("nan"),
        GRADIENT_ROUNDING[dtype],
        "of the L2 norm",
    )


def _plan(config: RunConfig, selection: Selection, chosen: Sequence[int], lengths: Any) -> Plan:
    """A plan whose first step holds exactly the chosen examples."""
    return Plan(
        selection.lengths if lengths is None else lengths,
        selection.num_targets,
        mass=selection.mass,
        repeats=np.isin(np.arange(len(selection)), list(chosen)).astype(np.float64),
        conversations=selection.indices,
        max_length=selection.policy.max_length,
        global_packs=len(chosen),
        seed=config.seed,
        epochs=1,
    )


def _turn_off_dropout(causal_lm: Any) -> None:
    """All of it, also probabilities that models keep as plain numbers; recomputation of layers stays on."""
    from torch.nn import Dropout

    for holder in (causal_lm.config.get_text_config(), *causal_lm.modules()):
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(holder, Dropout))):
                setattr(holder, name, 0.0)


def _title(selection: Selection, chosen: Sequence[int]) -> str:
    lengths = selection.lengths[list(chosen)]
    turns = selection.dataset.column("num_turns")[selection.samples[list(chosen)]]
    return (
        f"verify: {len(chosen)} of {len(selection):,} samples, {lengths.min():,} to {lengths.max():,} tokens, "
        f"{turns.min()} to {turns.max()} turns"
    )


def _print(checks: Sequence[Check]) -> None:
    for check in checks:
        print(check.line(), flush=True)
