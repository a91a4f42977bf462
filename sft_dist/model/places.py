"""Where a parameter stands in a causal language model: its layer, its depth, and what kind of weight it is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

Kind = Literal["embeddings", "attention", "mlp", "norms", "head", "other"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Parts of module names that tell what a weight is for, where its class does not.
_ATTENTION = ("attn", "attention")
_MLP = ("mlp", "feed_forward", "ffn", "expert", "moe", "router")


@dataclass(frozen=True, slots=True)
class Place:
    """`layer` counts decoder layers from 0; None is outside of them."""

    layer: int | None
    kind: Kind


def places_of(causal_lm: Any, layers: Sequence[nn.Module]) -> dict[str, Place]:
    """The place of every parameter by its name; a head that is tied counts as embeddings."""
    numbers = {id(parameter): number for number, layer in enumerate(layers) for parameter in layer.parameters()}
    head = causal_lm.get_output_embeddings()
    found: dict[str, Place] = {}
    for path, module, name, parameter in _owned(causal_lm):
        kind = "head" if module is head else _kind(path, module)
        found[name] = Place(numbers.get(id(parameter)), kind)
    return found


def depths_of(causal_lm: Any, layers: Sequence[nn.Module]) -> dict[str, int]:
    """Depth of every parameter by its name: embeddings 0, decoder layers 1 to n, the head n + 1.

    What else is outside the layers has the depth of its side: 0 if the model holds it before its first layer, n + 1
    after it (the last norm).
    """
    depths: dict[str, int] = {}
    seen_layer = False
    head = causal_lm.get_output_embeddings()
    numbers = {id(parameter): number for number, layer in enumerate(layers, 1) for parameter in layer.parameters()}
    for _, module, name, parameter in _owned(causal_lm):
        number = numbers.get(id(parameter))
        seen_layer = seen_layer or number is not None
        if number is not None:
            depths[name] = number
        elif module is head:
            depths[name] = len(layers) + 1
        else:
            depths[name] = len(layers) + 1 if seen_layer and not isinstance(module, nn.Embedding) else 0
    return depths


def _owned(causal_lm: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(path of the module that holds it, that module, name, parameter), each parameter once, under its first name."""
    modules = dict(causal_lm.named_modules())
    for name, parameter in causal_lm.named_parameters():
        path = name.rpartition(".")[0]
        yield path, modules[path], name, parameter


def _kind(path: str, module: nn.Module) -> Kind:
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if "norm" in type(module).__name__.lower():
        return "norms"
    names = path.lower()
    if any(word in names for word in _ATTENTION):
        return "attention"
    return "mlp" if any(word in names for word in _MLP) else "other"
