"""The straight line from the pre-trained weights θ̂ to the tuned ones θ̃: θ̂ + a (θ̃ − θ̂), one parameter at a time.

In: a model folder or Hub id as a run started from it, and tuned parameters by name. Out: parameters between the two.
Never holds two models: both sides are read tensor by tensor.

Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (arXiv 2109.01903), section 3: weight-space ensembles.
"""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sft_dist.config import ModelConfig
from sft_dist.errors import ConfigError, say
from sft_dist.model import loading, zero
from sft_dist.model.stored import INDEX, WEIGHTS


class Pretrained:
    """θ̂ by the names of the model's parameters, as step 0 of a run had it.

    A row of a token that the run added (model.control_tokens) has no pre-trained value: it is the mean of the old
    rows, where it started. So is any other start value: parameters that the files do not hold under the model's names
    (newly started ones, or families that transformers stores in another layout) are those of the whole model, loaded
    once when the first of them is asked for, which is said.
    """

    def __init__(self, model: ModelConfig, *, seed: int) -> None:
        self._model, self._seed = model, seed
        self._config = loading.load_config(model, max_length=2)
        self._file_of = _files(model.path, getattr(self._config, "_commit_hash", None))
        self._added = loading.new_tokens(model)
        with torch.device("meta"):
            skeleton = _skeleton(self._config, model)
        self._prefix = f"{skeleton.base_model_prefix}."
        self._shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters(remove_duplicate=False)}
        of_tokens = loading.parameters_of_tokens(skeleton)
        self._of_tokens = {name for name, p in skeleton.named_parameters() if any(p is own for own in of_tokens)}
        self._is_said = False

    def __getitem__(self, name: str) -> Tensor:
        """Raises ConfigError for a name that the model has not."""
        if name not in self._shapes:
            raise ConfigError(f"model.path: {self._model.path}: has no parameter {name}, which the checkpoint holds")
        stored = self._stored(name)
        if stored is None:
            return self._whole[name]
        if self._added is None or name not in self._of_tokens:
            return stored
        return zero.with_rows(
            stored.float(), self._added.num_rows(self._config), new=self._added.ids, mean_of=self._added.old_ids
        )

    def _stored(self, name: str) -> Tensor | None:
        """The tensor of this name and shape in the files; some name them without what the base model is called."""
        for key in (name, name.removeprefix(self._prefix)):
            if key in self._file_of:
                try:
                    with safe_open(self._file_of[key], framework="pt") as file:
                        value: Tensor = file.get_tensor(key)
                except (OSError, SafetensorError) as error:
                    raise ConfigError(f"model.path: {self._file_of[key]}: {key} cannot be read: {error}") from error
                return value if tuple(value.shape) == self._shapes[name] else None
        return None

    @cached_property
    def _whole(self) -> dict[str, Tensor]:
        say(f"note: {self._model.path} stores parameters in another layout than the model's: it is loaded whole")
        dtype = self._config.dtype if isinstance(self._config.dtype, torch.dtype) else torch.float32
        model = loading.load_causal_lm(
            self._model, self._config, added=self._added, dtype=dtype, max_length=2, seed=self._seed
        )
        return {name: parameter.detach() for name, parameter in model.named_parameters()}


def between(pretrained: Tensor, tuned: Tensor, coefficient: float) -> Tensor:
    """θ̂ + coefficient (θ̃ − θ̂), computed in float32; at 0 and 1 the bits of θ̂ and θ̃, in their own precision."""
    if coefficient == 0.0:
        return pretrained
    if coefficient == 1.0:
        return tuned
    # torch.lerp counts from the nearer end, so that it is exact at both.
    return torch.lerp(pretrained.float(), tuned.float(), coefficient)


def interpolated(
    pretrained: Pretrained, tuned: Iterator[tuple[str, Tensor]], coefficient: float
) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of every tuned parameter, moved to its place on the line; float32 between the ends."""
    for name, value in tuned:
        yield name, between(pretrained[name], value, coefficient)


def _skeleton(config: Any, model: ModelConfig) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)


def _files(path: str, revision: str | None) -> dict[str, Path]:
    """Tensor -> safetensors file of a model folder or Hub id. Raises ConfigError where there is none."""
    index = _file(path, INDEX, revision)
    if index is not None:
        try:
            names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            found = {file: _file(path, file, revision) for file in sorted(set(names.values()))}
        except (OSError, ValueError, LookupError, AttributeError) as error:
            raise ConfigError(f"model.path: {index}: not a readable index of weights: {error}") from error
        if absent := [file for file, place in found.items() if place is None]:
            raise ConfigError(f"model.path: {index} names {absent[0]}, which is not there")
        return {name: place for name, file in names.items() if (place := found[file]) is not None}
    single = _file(path, WEIGHTS, revision)
    if single is None:
        raise ConfigError(f"model.path: {path}: has no {WEIGHTS} and no {INDEX}; pre-trained weights are read from it")
    try:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model.path: {single}: not a readable safetensors file: {error}") from error


def _file(path: str, name: str, revision: str | None) -> Path | None:
    """A file of a model folder or Hub id (of this commit), None where it has none."""
    if Path(path).is_dir():
        return Path(path) / name if (Path(path) / name).exists() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(path, name, revision=revision))
    except Exception as error:
        # Offline, a file that was never cached because the commit lacks it looks like one that cannot be fetched.
        if isinstance(error, (EntryNotFoundError, LocalEntryNotFoundError)):
            return None
        raise ConfigError(f"model.path: {path}: {name} cannot be had from the Hub: {error}") from error
