"""The decoder layers of a causal language model, found by themselves, and compiled one by one.

A decoder layer is the natural unit of ZeRO-3: gathered in one collective, compiled as one graph, recomputed as one
piece. Nothing here knows names of model families.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from sft_dist.model import zero

_MOST_GRAPHS = 64


def decoder_layers(causal_lm: Any) -> list[nn.Module]:
    """The repeated blocks of a causal language model, in the order it holds them; empty where it has none.

    Of the outermost nn.ModuleLists of the backbone whose items are blocks (modules with parameters in several parts),
    the one with the most parameters, with every other list of the same classes. Lists inside a block (experts) belong
    to it. Blocks that share parameters with each other, or with what is outside them, are none: they cannot be
    gathered and released one by one.
    """
    lists = [items for items in _outermost_lists(causal_lm.base_model) if all(_is_block(item) for item in items)]
    if not lists:
        return []
    largest = max(
        lists, key=lambda items: sum(zero.numel(parameter) for item in items for parameter in item.parameters())
    )
    classes = {type(item) for item in largest}
    chosen = [item for items in lists if {type(item) for item in items} & classes for item in items]
    return [] if _share_parameters(causal_lm, chosen) else chosen


def compile_layers(layers: Sequence[nn.Module], *, backend: str = "inductor") -> None:
    """Compile each layer's forward, for rows of any length. One graph serves all layers that compute the same.

    The layers have to be ZeRO-3 leaf modules: hooks inside a graph would break it at every small module.
    """
    # All layers have one code object: window or none, frozen or not, with gradients or without multiply to more than
    # the 8 graphs after which dynamo leaves every further kind uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
    for layer in layers:
        setattr(layer, "forward", torch.compile(layer.forward, dynamic=True, backend=backend))  # noqa: B010


def ask_for_input_gradients(layers: Sequence[nn.Module]) -> None:
    """Let the input of every layer with trained parameters need a gradient, even where all before it is frozen.

    DeepSpeed learns from that gradient when the backward of a layer is over. Without one it takes the layer's weights
    away before or while they are needed. To call before ZeRO-3 has hooks of its own.
    """
    for layer in layers:
        if any(parameter.requires_grad for parameter in layer.parameters()):
            layer.register_forward_pre_hook(_ask_for_input_gradient, with_kwargs=True)


def _ask_for_input_gradient(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """The hidden states come first, or by their name."""
    hidden = arguments[0] if arguments else named.get("hidden_states")
    if torch.is_grad_enabled() and isinstance(hidden, torch.Tensor) and not hidden.requires_grad:
        hidden.requires_grad_()


def _outermost_lists(module: nn.Module) -> Iterator[list[nn.Module]]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            if len(child):
                yield list(child)
        else:
            yield from _outermost_lists(child)


def _is_block(module: nn.Module) -> bool:
    """Several modules with parameters of their own, so not a Linear or a norm that happens to stand in a list."""
    return sum(any(True for _ in part.parameters(recurse=False)) for part in module.modules()) > 1


def _share_parameters(causal_lm: nn.Module, layers: Sequence[nn.Module]) -> bool:
    inside = [id(parameter) for layer in layers for parameter in layer.parameters()]
    own = {id(layer) for layer in layers}

    def outside(module: nn.Module) -> Iterator[int]:
        if id(module) not in own:
            yield from map(id, module.parameters(recurse=False))
            for child in module.children():
                yield from outside(child)

    return len(set(inside)) < len(inside) or not set(inside).isdisjoint(outside(causal_lm))
