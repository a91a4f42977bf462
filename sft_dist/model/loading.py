"""The pre-trained model θ̂, loaded whole or sharded, with nothing newly initialised in silence."""

import fnmatch
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sft_dist.config import ModelConfig
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.errors import ConfigError
from sft_dist.model import attention, zero

_NAMED_PARAMETERS = 5
# Of a file with weights is read: its header, and this many bytes in the middle of each tensor, of at most so many.
_SAMPLE_BYTES = 4096
_MAX_SAMPLES = 4096
_HEAD_BESIDE = ("score.weight", "score.bias")


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Control tokens that the tokenizer in the model's folder lacks."""

    texts: tuple[str, ...]
    ids: tuple[int, ...]  # of the texts
    old_ids: tuple[int, ...]  # all ids of the tokenizer as it is in the folder, ascending

    def num_rows(self, model_config: Any) -> int:
        """Rows that the model's embeddings need: those they have, or more."""
        return max(model_config.get_text_config().vocab_size, *(i + 1 for i in self.ids))

    def describe(self, model_config: Any) -> str:
        """One line for people; `model_config` is that of the model's folder."""
        before, after = model_config.get_text_config().vocab_size, self.num_rows(model_config)
        rows = f"{before:,} -> {after:,} rows, new rows" if after > before else f"keep {before:,} rows, the new tokens'"
        num = len(self.ids)
        return (
            f"added {num} control token{'s' if num > 1 else ''} ({', '.join(self.texts)}): embeddings {rows} are the "
            f"mean of the {len(self.old_ids):,} old ones"
        )


def new_tokens(model: ModelConfig) -> NewTokens | None:
    """What model.control_tokens adds to the tokenizer in the model's folder; None where that is nothing."""
    if not model.control_tokens:
        return None
    old = load_tokenizer(model.model_copy(update={"control_tokens": ()})).get_vocab()
    new = {text: i for text, i in load_tokenizer(model).get_vocab().items() if text not in old}
    if not new:
        return None
    texts = sorted(new, key=lambda text: new[text])
    return NewTokens(tuple(texts), tuple(new[text] for text in texts), tuple(sorted(set(old.values()))))


def load_config(model: ModelConfig, max_length: int) -> Any:
    """The model's configuration. Raises ConfigError where it is missing or its context is shorter than max_length."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except Exception as error:
        raise ConfigError(f"model.path: {model.path}: no model configuration there: {_why(error)}") from error
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and max_length > context:
        raise ConfigError(
            f"data.max_length ({max_length:,}) is longer than the model's context "
            f"({context:,}; config.json max_position_embeddings)"
        )
    return config


def folder_of(path: str) -> Path:
    """The folder that holds a model's files: the path itself, or of a Hub id where it was downloaded to."""
    from transformers.utils import cached_file

    if Path(path).is_dir():
        return Path(path)
    return Path(cached_file(path, "config.json", local_files_only=True)).parent


def weights_fingerprint(path: str, model_config: Any) -> str:
    """Identity of a model folder's weights, without reading all of them; of a Hub id its commit.

    Names, shapes, sizes, and a sample of every tensor: training changes all of them. A flipped bit is not found.
    Raises ConfigError.
    """
    folder = Path(path)
    if not folder.is_dir():
        return str(getattr(model_config, "_commit_hash", None) or path)
    digest = hashlib.sha256()
    try:
        for file in sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin"))):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with open(file, "rb") as content:
                for place in _sampled_places(content, size):
                    content.seek(place)
                    digest.update(content.read(_SAMPLE_BYTES))
    except OSError as error:
        raise ConfigError(f"model.path: {path}: the weights cannot be read: {error}") from error
    return digest.hexdigest()[:16]


def _sampled_places(content: BinaryIO, size: int) -> list[int]:
    """Where to read in a file of weights; of one that is not safetensors, at even distances."""
    try:
        header_bytes = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(header_bytes) if header_bytes < size else b"")
        header.pop("__metadata__", None)
        offsets = [8 + header_bytes + sum(tensor["data_offsets"]) // 2 for tensor in header.values()]
        starts = range(8, 8 + header_bytes, _SAMPLE_BYTES)
    except (ValueError, LookupError, TypeError, AttributeError):
        offsets, starts = list(range(0, size, max(size // 64, 1))), range(0)
    step = max(-(-len(offsets) // _MAX_SAMPLES), 1)
    return [*starts, *sorted(offsets)[::step]]


def check_ids(model_config: Any, largest_id: int) -> None:
    """Raises ConfigError for a token that the model has no embedding for: a GPU would only say that it crashed."""
    num_rows = model_config.get_text_config().vocab_size
    if largest_id >= num_rows:
        raise ConfigError(
            f"model.path: the data hold token id {largest_id:,}, but the model has embeddings for {num_rows:,} tokens "
            "(config.json vocab_size): this tokenizer was made for another model, or tokens were added to it after "
            "training; name those in model.control_tokens with the original tokenizer, and embeddings are added"
        )


def load_causal_lm(
    model: ModelConfig,
    config: Any,
    *,
    added: NewTokens | None,
    dtype: torch.dtype,
    max_length: int,
    seed: int | None,
    quantisation: Any = None,
    implementation: str | None = None,
) -> Any:
    """A causal language model with its pre-trained weights, in `dtype`, and rows for the tokens that are `added`.

    Sharded by ZeRO-3 when model/engine.py has announced it. Raises ConfigError for parameters that the files do not
    hold, unless their names match model.allow_new_parameters: those start from `seed`, the same for every rank and
    number of ranks. Without a seed they are refused as well: no training and no checkpoint would give them values.
    `quantisation`: of adapters.quantisation. `implementation` of attention, as transformers names it: where rows are
    not packed; else it is chosen.
    """
    from transformers import AutoModelForCausalLM

    attention.register()
    if implementation is None:
        implementation = attention.choose_attention(
            config, model.attention, max_length, device_type=device_type(), dtype=dtype
        ).name
    if seed is not None:
        torch.manual_seed(seed % 2**63)  # all that torch takes
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            model.path,
            config=config,
            dtype=dtype,
            attn_implementation=implementation,
            output_loading_info=True,
            trust_remote_code=model.trust_remote_code,
            use_safetensors=None if model.trust_remote_code else True,
            **({} if quantisation is None else {"quantization_config": quantisation}),
        )
    except Exception as error:
        raise ConfigError(f"model.path: {model.path}: the weights cannot be loaded: {_why(error)}") from error
    _check_report(model, report, may_start_new=seed is not None)
    if added is not None:
        _add_tokens(loaded, added)
    return loaded


def device_type() -> str:
    """Where models compute."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _add_tokens(causal_lm: Any, added: NewTokens) -> None:
    """Give new tokens rows in the embeddings and the head: the mean of those of the old tokens.

    transformers' resize_token_embeddings draws new rows at random, and under ZeRO-3 leaves them outside the shards.
    """
    num_rows = added.num_rows(causal_lm.config)
    embeddings, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    if not isinstance(embeddings, torch.nn.Embedding) or not isinstance(head, torch.nn.Linear):
        raise ConfigError(
            f"model.control_tokens: {causal_lm.config.model_type} has no plain embeddings and head to add tokens to"
        )
    for parameter in parameters_of_tokens(causal_lm):
        zero.extend_rows(causal_lm, parameter, num_rows, new=added.ids, mean_of=added.old_ids)
    embeddings.num_embeddings = head.out_features = num_rows
    causal_lm.vocab_size = causal_lm.config.get_text_config().vocab_size = num_rows


def parameters_of_tokens(causal_lm: Any) -> list[torch.nn.Parameter]:
    """The parameters with one row a token, tied ones once."""
    embeddings, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    found = (embeddings.weight, getattr(head, "weight", None), getattr(head, "bias", None))
    return list({id(p): p for p in found if isinstance(p, torch.nn.Parameter)}.values())


def _check_report(model: ModelConfig, report: dict[str, Any], *, may_start_new: bool) -> None:
    mismatched = [item[0] if isinstance(item, tuple) else item for item in report.get("mismatched_keys") or ()]
    new = sorted({*report["missing_keys"], *mismatched})
    if new and not may_start_new:
        raise ConfigError(
            f"model.path: {model.path}: {len(new)} parameter(s) are not in its files and would be random: "
            f"{', '.join(new[:_NAMED_PARAMETERS])}; name a run folder with a checkpoint that holds them, or its export"
        )
    refused = [name for name in new if not any(fnmatch.fnmatch(name, p) for p in model.allow_new_parameters)]
    if refused:
        raise ConfigError(
            f"model.path: {model.path}: {len(refused)} parameter(s) are not in its files and would start at random: "
            f"{', '.join(refused[:_NAMED_PARAMETERS])}; name them in model.allow_new_parameters if that is meant"
        )
    # A prediction head beside the language model's (model/beside.py), by those who want it taken from the files.
    if names := sorted(name for name in report["unexpected_keys"] if name not in _HEAD_BESIDE):
        raise ConfigError(
            f"model.path: {model.path}: its files hold {len(names)} parameter(s) that the model has no place for: "
            f"{', '.join(names[:_NAMED_PARAMETERS])}"
        )


def _why(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    # What transformers says of it comes lines later, and names an argument of its own.
    hint = "; model.trust_remote_code: true runs that code, for authors you trust" if "custom code" in text else ""
    return text.splitlines()[0] + hint
