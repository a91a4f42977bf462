"""The models that are asked: from names on the command line to run files, weights, and an identity of both."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sft_dist.config import RunConfig
from sft_dist.data.renderer import Renderer, load_renderer
from sft_dist.distributed import collectives
from sft_dist.distributed.world import World
from sft_dist.errors import ConfigError, UsageError, say
from sft_dist.model import engine as engines
from sft_dist.model import loading
from sft_dist.train import checkpoint as checkpoints
from sft_dist.train import contract, rundir
from sft_dist.train.checkpoint import Checkpoint

# Of a model folder: what the function depends on, besides the tokenizer.
_FILES = ("*.safetensors", "config.json", "*.py")


@dataclass(frozen=True, slots=True)
class Scorer:
    """One model under the name it was asked for by."""

    name: str
    config: RunConfig  # with this model's section
    checkpoint: Checkpoint | None  # whose weights replace those of the section

    @property
    def weights(self) -> Path | None:
        return None if self.checkpoint is None else self.checkpoint.folder


def resolve(config: RunConfig, names: Sequence[str], which: str, world: World) -> tuple[list[Scorer], Renderer]:
    """The models in the order given (default: that of the run file) and the renderer that all of them share.

    A run folder brings the model section it was trained with. Raises ConfigError for a model that is not there, and
    where tokenizers or templates differ: scores of different token sequences cannot stand side by side.
    """
    if len(set(names)) < len(names):
        raise UsageError("--model: the same name is given twice, so their scores could not be told apart")
    scorers = [_scorer(config, name, which) for name in names] or [Scorer(config.model.path, config, None)]
    renderers = [load_renderer(scorer.config.model, scorer.config.data) for scorer in scorers]
    for scorer, renderer in zip(scorers, renderers, strict=True):
        if renderer.fingerprint != renderers[0].fingerprint:
            raise ConfigError(
                f"--model: {scorer.name} has another tokenizer or chat template than {scorers[0].name}, so they would "
                "score different tokens; set data.chat_template where only the templates differ, or score them apart"
            )
        loading.load_config(scorer.config.model, scorer.config.data.max_length)
        found = scorer.checkpoint
        if world.is_main and found is not None and found.manifest["template"] != renderer.template:
            say(f"note: {scorer.name} was trained with another chat template than the one it is scored with")
    return scorers, renderers[0]


def _scorer(config: RunConfig, name: str, which: str) -> Scorer:
    if not rundir.is_run_dir(name):
        section = config.model.model_copy(update={"path": name})
        return Scorer(name, config.model_copy(update={"model": section}), None)
    saved = rundir.saved_config(Path(name))
    contract.check_language_model(saved, name)
    found = checkpoints.find(Path(name), which)
    contract.check_base(saved, found)
    update = {"model": saved.model, "adapter": saved.adapter, "head": saved.head}
    return Scorer(name, config.model_copy(update=update), found)


def of_main(scorers: Sequence[Scorer]) -> list[Scorer]:
    """The models with the checkpoints that rank 0 found: a run may publish one while ranks look. A collective."""
    found = collectives.from_main({scorer.name: scorer.checkpoint for scorer in scorers})
    return [replace(scorer, checkpoint=found.get(scorer.name, scorer.checkpoint)) for scorer in scorers]


def settings(scorer: Scorer) -> dict[str, Any]:
    """What decides the model's answers besides its files."""
    section = scorer.config.model
    return {"name": scorer.name, "dtype": str(engines.compute_dtype(section)), "attention": section.attention}


def identity(scorer: Scorer, world: World) -> str:
    """What decides the model's answers, in 16 hex digits: the content of its files. A collective: ranks share the work.

    Of a checkpoint its manifest, which holds the sha256 of every shard; of a Hub id the commit.
    """
    if scorer.checkpoint is not None:
        content = (scorer.checkpoint.folder / checkpoints.MANIFEST).read_bytes()
        return hashlib.sha256(content).hexdigest()[:16]
    folder = Path(scorer.config.model.path)
    if not folder.is_dir():
        config = loading.load_config(scorer.config.model, scorer.config.data.max_length)
        return str(getattr(config, "_commit_hash", None) or scorer.config.model.path)
    files = sorted(path for pattern in _FILES for path in folder.glob(pattern))
    mine = []
    for path in files[world.rank :: world.size]:
        with open(path, "rb") as file:
            mine.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
    every = sorted(item for part in collectives.gather(mine) for item in part)
    return hashlib.sha256(repr(every).encode()).hexdigest()[:16]
