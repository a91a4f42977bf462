"""How far θ is from θ̂: ‖θ - θ̂‖ / ‖θ̂‖ of the whole model, of its layers and of its kinds of weight.

docs/objective.md, section 8. Each rank sums squares over its own shards in float64; one sum over ranks makes them those
of the model.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from sft_dist.config import RunConfig
from sft_dist.distributed import collectives
from sft_dist.errors import StorageError
from sft_dist.model import anchor
from sft_dist.model.engine import Engine
from sft_dist.model.layers import decoder_layers
from sft_dist.model.places import KINDS, Kind, Place, places_of
from sft_dist.train.metrics import Metrics

Squares = tuple[float, float]  # Σ (θ - θ̂)², Σ θ̂²
_MAX_ROWS = 24  # of the table; more layers share rows


class DriftMeter:
    """One for a run. `pretrained` is None where θ̂ is not known or nobody wants to know the drift: nothing is measured.

    Its methods are called by all ranks at the same line.
    """

    def __init__(
        self, engine: Engine, metrics: Metrics, pretrained: anchor.Pretrained | None, *, at_evaluations: bool
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._pretrained = pretrained
        self._at_evaluations = at_evaluations
        own = {part.name for part in engine.own_parts()} if pretrained else set()
        places = places_of(engine.causal_lm, decoder_layers(engine.causal_lm)) if pretrained else {}
        self._places = {name: place for name, place in places.items() if name in own}
        if pretrained is not None and pretrained.num_bytes:
            metrics.say(f"θ̂ takes {pretrained.num_bytes / 2**30:.2f} GiB of each rank's memory")
        self._last: tuple[int, dict[Place, Squares]] | None = None

    @property
    def last(self) -> float | None:
        """Of the whole model, when it was last measured."""
        return None if self._last is None else ratio(self._last[1].values())

    def after_evaluation(self, step: int) -> None:
        """Measure and record, where evaluations are to tell."""
        if self._at_evaluations and (squares := self._measure(step)) is not None:
            by_kind = "  ".join(f"{kind} {_shown(of_kind)}" for kind, of_kind in _by_kind(squares).items() if of_kind)
            self._metrics.say(f"drift     step {step:,}  {_shown(squares.values())} of the norm of θ̂  {by_kind}")

    def at_end(self, step: int, *, is_new: bool) -> None:
        """Print the table; measure unless that was done after this step, and record if nobody has (`is_new`)."""
        last = self._last
        found = last[1] if last is not None and last[0] == step else self._measure(step, is_new=is_new)
        for line in table(found) if found is not None else ():
            self._metrics.say(line)

    def _measure(self, step: int, *, is_new: bool = True) -> dict[Place, Squares] | None:
        if self._pretrained is None:
            return None
        try:
            own = anchor.squares(self._engine.own_parts(), self._pretrained, self._places)
            problem = ""
        except StorageError as error:
            own, problem = {}, str(error)
        problems = [text for text in collectives.gather(problem) if text]
        places = list(dict.fromkeys(self._places.values()))
        sums = collectives.all_sum([number for place in places for number in own.get(place, (0.0, 0.0))])
        if problems:
            self._metrics.say(f"warning: the drift is not known: {problems[0]}")
            return None
        squares = {place: (sums[2 * n], sums[2 * n + 1]) for n, place in enumerate(places)}
        self._last = step, squares
        if is_new:
            self._metrics.record("drift", step, **as_dict(squares))
        return squares


def start_to_measure(
    engine: Engine, config: RunConfig, initial: Path | None, say_once: Callable[[str], None]
) -> anchor.Pretrained | None:
    """θ̂ of an engine whose weights are those of the files, or of the checkpoint `initial`. A collective.

    None where these cannot be read: that nothing is measured is no reason to end a training.
    """
    found, problem = None, ""
    try:
        found = engine.pretrained(config, initial)
    except StorageError as error:
        problem = str(error)
    problems = [text for text in collectives.gather(problem) if text]
    if not problems:
        return found
    say_once(f"warning: the drift is not measured: {problems[0]}")
    return None


def ratio(squares: Iterable[Squares]) -> float | None:
    """‖θ - θ̂‖ / ‖θ̂‖ of parts together; None of nothing, and where θ̂ is zero and θ is not."""
    pairs = list(squares)
    moved, norm = (math.fsum(pair[i] for pair in pairs) for i in (0, 1))
    if not pairs or (not norm and moved):
        return None
    return math.sqrt(moved / norm) if moved else 0.0


def as_dict(squares: Mapping[Place, Squares]) -> dict[str, object]:
    """{"all": ..., "kinds": {kind: ...}, "layers": {"outside" or number: {"all": ..., kind: ...}}}"""
    layers: dict[str, dict[str, float | None]] = {}
    for place, pair in squares.items():
        layers.setdefault(_layer(place), {})[place.kind] = ratio([pair])
    for name, of_layer in layers.items():
        of_layer["all"] = ratio(pair for place, pair in squares.items() if _layer(place) == name)
    kinds = {kind: ratio(pairs) for kind, pairs in _by_kind(squares).items() if pairs}
    return {"all": ratio(squares.values()), "kinds": kinds, "layers": layers}


def table(squares: Mapping[Place, Squares]) -> list[str]:
    """For people: a row for each layer, or for a few together, and a column for each kind of weight there is."""
    kinds = [kind for kind in KINDS if any(place.kind == kind for place in squares)]
    numbers = sorted({place.layer for place in squares if place.layer is not None})
    together = -(-len(numbers) // _MAX_ROWS) or 1
    bands: list[Sequence[int | None]] = [[None]]
    bands += [numbers[begin : begin + together] for begin in range(0, len(numbers), together)]
    rows = [("layer", [*kinds, "all"])]
    for band in bands:
        name = "outside" if band == [None] else str(band[0]) if len(band) == 1 else f"{band[0]}-{band[-1]}"
        rows.append((name, _row({place: pair for place, pair in squares.items() if place.layer in band}, kinds)))
    rows.append(("all", _row(squares, kinds)))
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:>{width}}" + "".join(f"{cell:>12}" for cell in cells) for name, cells in rows]
    return ["drift: how far the weights are from where they started, as a share of their norm there", *lines]


def _row(squares: Mapping[Place, Squares], kinds: Iterable[Kind]) -> list[str]:
    by_kind = _by_kind(squares)
    return [*(_shown(by_kind[kind]) for kind in kinds), _shown(squares.values())]


def _by_kind(squares: Mapping[Place, Squares]) -> dict[Kind, list[Squares]]:
    return {kind: [pair for place, pair in squares.items() if place.kind == kind] for kind in KINDS}


def _layer(place: Place) -> str:
    return "outside" if place.layer is None else str(place.layer)


def _shown(squares: Iterable[Squares]) -> str:
    share = ratio(squares)
    return "-" if share is None else f"{share:.2e}"
