"""Attention of packed rows: equal to each conversation alone for every family, one graph when compiled.

The oracle of the kernel is a softmax written out token by token in float64; that of models is plain transformers with
eager attention, one conversation at a time.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import moe

from sft_dist.errors import ConfigError
from sft_dist.model import attention, kernels, layers
from sft_dist.model.attention import FLASH, SPLIT, VARLEN, Choice, Demands, choose_attention, decide
from sft_dist.model.varlen import FlashAttention, flash_keywords, varlen_call
from tests.model.test_trees import bounds, written_out

HEADS, HEAD_DIM = 4, 8
LENGTHS = (9, 1, 17, 4, 1, 6)  # longer and shorter than the windows below, and single tokens
WINDOW = 5

# model_type -> what of its config matters here
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "head_dim": 8},
    "mistral": {"sliding_window": WINDOW, "head_dim": 8},
    "ministral": {"sliding_window": WINDOW, "head_dim": 8},
    "gemma2": {"sliding_window": WINDOW, "head_dim": 16, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 0.8},
    "gemma3_text": {"sliding_window": WINDOW, "head_dim": 16, "query_pre_attn_scalar": 5, "sliding_window_pattern": 2},
    "phi3": {"sliding_window": WINDOW, "pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "scale_attn_by_inverse_layer_idx": True},
    "gpt_oss": {"sliding_window": WINDOW, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
    },
    "olmo3": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": {"sliding_window": WINDOW, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "exaone4": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "pad_token_id": 0,
    },
    "starcoder2": {"sliding_window": WINDOW},
    "afmoe": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_dense_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}


def model_config(model_type: str) -> Any:
    common = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if model_type == "gpt2":
        common = {"vocab_size": 97, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}
    return AutoConfig.for_model(model_type, **common | FAMILIES[model_type])


def build(
    model_type: str, implementation: str, *, experts: str | None = "eager", num_layers: int | None = None
) -> torch.nn.Module:
    """A random model in float64, in which the default `experts` do not compute."""
    attention.register()
    torch.manual_seed(0)
    config = model_config(model_type)
    if num_layers is not None:
        config = type(config)(**config.to_dict() | {"num_hidden_layers": num_layers, "layer_types": None})
    model: torch.nn.Module = AutoModelForCausalLM.from_config(
        config,
        attn_implementation=implementation,
        experts_implementation=experts,
        dtype=torch.float64,
    ).eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter)
    return model


def row_of(lengths: Sequence[int]) -> dict[str, Any]:
    """What a packed row hands to a model of transformers."""
    generator = torch.Generator().manual_seed(sum(lengths))
    cu_seqlens = bounds(tuple(lengths))
    return {
        "input_ids": torch.randint(1, 97, (1, sum(lengths)), generator=generator),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seqlens": cu_seqlens,
        "host_cu_seqlens": cu_seqlens,
        "max_seqlen": max(lengths),
        "use_cache": False,
    }


def logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Of every token but the first of one conversation."""
    return logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_packed_row_of_any_family_equals_each_conversation_alone(model_type: str) -> None:
    row = row_of(LENGTHS)
    assert choose_attention(model_config(model_type), "auto", max(LENGTHS)).name == SPLIT
    packed_model, alone_model = build(model_type, SPLIT), build(model_type, "eager")
    logits = packed_model(**row).logits
    conversations = row["input_ids"].split(LENGTHS, 1)
    packed = torch.cat([logprobs(*pair) for pair in zip(logits.split(LENGTHS, 1), conversations, strict=True)])
    alone = torch.cat([logprobs(alone_model(input_ids=ids, use_cache=False).logits, ids) for ids in conversations])
    # Norms and eager's softmax compute in float32 whatever the model's precision.
    assert torch.allclose(packed, alone, atol=2e-5), float((packed - alone).abs().max())
    factors = torch.linspace(0.5, 1.5, len(packed), dtype=torch.float64)
    (packed * factors).sum().backward()
    (alone * factors).sum().backward()
    expected = dict(alone_model.named_parameters())
    for name, parameter in packed_model.named_parameters():
        if expected[name].grad is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        scale = float(expected[name].grad.abs().max())
        assert torch.allclose(parameter.grad, expected[name].grad, rtol=1e-4, atol=2e-5 * max(scale, 1)), name


# Families whose classes call no kernel but their own, or do not hand it what it needs: split is none for them.
UNFLAGGED = {
    "stablelm": {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "nemotron": {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2},
    "granite_swa": {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "sliding_window": 5},
}


@pytest.mark.parametrize("model_type", UNFLAGGED)
def test_auto_gives_a_family_a_kernel_that_its_class_calls(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, vocab_size=97, **UNFLAGGED[model_type])
    choice = choose_attention(config, "auto", max(LENGTHS))
    expected = "sdpa" if model_type in ("stablelm", "nemotron") else "eager"
    assert choice.name == expected and choice.reason is not None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=choice.name).eval()
    row = row_of(LENGTHS)
    conversations = row["input_ids"].split(LENGTHS, 1)
    with torch.no_grad():
        packed = model(**row).logits
        alone = torch.cat([model(input_ids=ids, use_cache=False).logits for ids in conversations], 1)
    assert torch.allclose(packed, alone, atol=1e-5)


@pytest.mark.parametrize(("model_type", "kernel"), [("gpt_oss", "eager"), ("afmoe", "sdpa"), ("afmoe", "eager")])
def test_a_mask_made_without_positions_is_refused_by_name(model_type: str, kernel: str) -> None:
    with pytest.raises(ConfigError, match=rf"{kernel} cannot honour packed rows \({model_type} makes its mask"):
        choose_attention(model_config(model_type), kernel, 32)
    assert attention.for_generation(model_config(model_type)) == "eager"


def test_a_model_whose_layers_have_heads_of_their_own_sizes_gets_a_kernel_for_all() -> None:
    config = AutoConfig.for_model("gemma4_text")
    assert choose_attention(config, "auto", config.sliding_window).name == SPLIT
    with pytest.raises(ConfigError, match=r"varlen cannot honour heads of several sizes \(256, 512\)"):
        choose_attention(config, "varlen", 512, device_type="cuda", dtype=torch.bfloat16)


def test_what_a_class_does_not_call_is_refused_by_name() -> None:
    config = AutoConfig.for_model("gptj", **UNFLAGGED["gptj"])
    for kernel in ("split", "sdpa"):
        with pytest.raises(ConfigError, match=f"{kernel} cannot honour the model's class"):
            choose_attention(config, kernel, 32)
    assert attention.for_generation(config) == "eager"


def test_families_with_windows_softcaps_or_sinks_would_differ_without_them() -> None:
    """The cases above reach what they should: each option changes what its model answers."""
    row = row_of(LENGTHS)
    for model_type, changed in [
        ("mistral", {"sliding_window": None}),
        ("qwen3", {"sliding_window": 64}),
        ("gemma2", {"attn_logit_softcapping": 50.0}),
        ("gemma2", {"sliding_window": 64}),
        ("gemma3_text", {"sliding_window": 64}),
        ("gpt_oss", {"sliding_window": 64}),
    ]:
        model, other = build(model_type, SPLIT), build(model_type, SPLIT)
        for module in other.modules():
            for name, value in changed.items():
                if getattr(module, name, None) is not None:
                    setattr(module, name, value)
        vars(other.config).update(changed)
        with torch.no_grad():
            assert not torch.allclose(model(**row).logits, other(**row).logits, atol=1e-2), (model_type, changed)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([HEAD_DIM, 5]),
    st.sampled_from([None, 1, 4, 7]),
    st.sampled_from([None, 0.7]),
    st.booleans(),
    st.sampled_from([3, 512]),
)
@example([5, 4, 1, 12], 2, HEAD_DIM, 4, None, False, 3)  # one token longer than the window, and as long
@example([5, 4, 1, 12], 1, HEAD_DIM, 4, None, True, 512)
def test_the_operation_is_attention_written_out(
    lengths: list[int],
    kv_heads: int,
    value_dim: int,
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
    block_queries: int,
) -> None:
    torch.manual_seed(sum(lengths))
    num_tokens = sum(lengths)

    def laid_out_as_models_do(heads: int, dim: int) -> Tensor:
        projected = torch.randn(1, num_tokens, heads, dim, dtype=torch.float64)
        return projected.transpose(1, 2).requires_grad_()

    inputs = [
        laid_out_as_models_do(*shape) for shape in ((HEADS, HEAD_DIM), (kv_heads, HEAD_DIM), (kv_heads, value_dim))
    ]
    sinks = torch.randn(HEADS, dtype=torch.float64, requires_grad=True) if has_sinks else None
    inputs += [sinks] if sinks is not None else []
    q, k, v = inputs[:3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_BLOCK_QUERIES", block_queries)
        found, _ = kernels.packed_attention(q, k, v, bounds(tuple(lengths)), HEAD_DIM**-0.5, window, softcap, sinks)
        direction = torch.randn_like(found)
        grads = torch.autograd.grad((found * direction).sum(), inputs)
    options = {"sliding_window": window, "softcap": softcap, "s_aux": sinks}
    expected = written_out(q, k, v, tuple(lengths), (-1,) * len(lengths), **options)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-11)
    expected_grads = torch.autograd.grad((expected * direction).sum(), inputs)
    for one, other in zip(grads, expected_grads, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", [(None, None, False), (4, None, False), (None, 0.7, True), (None, None, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_stays_near_and_the_operation_is_well_formed(
    options: tuple[int | None, float | None, bool], dtype: torch.dtype
) -> None:
    window, softcap, has_sinks = options
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 30, HEAD_DIM, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
    sinks = torch.randn(HEADS, dtype=dtype, requires_grad=True) if has_sinks else None
    arguments = (q, k, v, bounds((9, 1, 20)), 0.3, window, softcap, sinks)
    found, _ = kernels.packed_attention(*arguments)
    exact = [
        x.detach().double().requires_grad_() if isinstance(x, Tensor) and x.requires_grad else x for x in arguments
    ]
    reference, _ = kernels.packed_attention(*exact)
    assert found.dtype is dtype
    bound = 1e-5 if dtype is torch.float32 else 3e-2
    assert torch.allclose(found.double(), reference, atol=bound)
    grads = torch.autograd.grad(found.sum(), q)[0], torch.autograd.grad(reference.sum(), exact[0])[0]
    assert torch.allclose(grads[0].double(), grads[1], atol=bound)
    if dtype is torch.float32:
        torch.library.opcheck(kernels.packed_attention, arguments)


def test_a_gradient_without_strides_of_its_own_is_read_right() -> None:
    """The gradient of a sum is one number, expanded."""
    torch.manual_seed(0)
    q = torch.randn(1, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    out, _ = kernels.packed_attention(q, q, q, bounds((5, 3)), 0.5, None, None, None)
    (expanded,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
    (dense,) = torch.autograd.grad(out, q, torch.ones_like(out))
    assert torch.allclose(expanded, dense, rtol=1e-12)


def test_bounds_that_do_not_cover_the_row_are_an_error() -> None:
    q = torch.zeros(1, 2, 8, 8)
    with pytest.raises(ValueError, match="from 0 to 6, but the row has 8"):
        kernels.packed_attention(q, q, q, bounds((4, 2)), 1.0, None, None, None)


def test_dropout_is_drawn_and_keeps_conversations_apart() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 12, 8) for _ in "qkv")
    options: dict[str, Any] = {"host_cu_seqlens": bounds((5, 7)), "sliding_window": 3, "softcap": 2.0}
    module = torch.nn.Module()
    mean = torch.stack([attention.split_attention(module, q, k, v, None, 0.3, **options)[0] for _ in range(1500)]).mean(
        0
    )
    plain, _ = attention.split_attention(module, q, k, v, None, **options)
    assert torch.allclose(mean, plain, atol=0.2)
    seen = [attention.split_attention(module, q, k, v, None, 0.3, **options)[0] for _ in range(2)]
    assert not torch.allclose(*seen)
    v[:, :, :5] += 100
    torch.manual_seed(3)
    one = attention.split_attention(module, q, k, v, None, 0.3, **options)[0]
    v[:, :, :5] -= 50
    torch.manual_seed(3)
    other = attention.split_attention(module, q, k, v, None, 0.3, **options)[0]
    assert torch.equal(one[:, 5:], other[:, 5:]) and not torch.equal(one[:, :5], other[:, :5])


PACKS = [(9, 4), (3, 5, 2, 8), (20, 3, 4), (6, 2, 2, 2, 7, 5)]


EXPERTS_IN_ONE_GRAPH = pytest.mark.skipif(
    not hasattr(moe, "_grouped_mm_fallback_bwd"),
    reason="the experts of this transformers read sizes in their backward where a grouped product is not at hand",
)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", pytest.param("gpt_oss", marks=EXPERTS_IN_ONE_GRAPH)])
def test_a_compiled_layer_is_one_graph_whatever_the_pack(model_type: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    model = build(model_type, SPLIT, experts=None).float()
    # Layers of one kind share a graph; windowed and full ones differ by what they ask for.
    layer = model.model.layers[0]
    plain = layer.forward
    layer.forward = torch.compile(plain, dynamic=True, backend="aot_eager", fullgraph=True)
    for lengths in PACKS:
        row = row_of(lengths)
        found = model(**row).logits
        found.square().mean().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        compiled, layer.forward = layer.forward, plain
        expected = model(**row).logits
        expected.square().mean().backward()
        layer.forward = compiled
        assert torch.allclose(found, expected, atol=1e-4)
        for name, grad in grads.items():
            assert torch.allclose(grad, dict(model.named_parameters())[name].grad, rtol=1e-3, atol=1e-4), name
        model.zero_grad()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"] and not counters["recompiles"]


@torch._dynamo.config.patch(recompile_limit=8)
def test_every_kind_of_layer_is_compiled_however_many_there_are() -> None:
    """Windowed or not, frozen or not, trained, evaluated, unpacked: more graphs than dynamo makes unasked."""
    torch._dynamo.reset()
    counters.clear()
    model = build("gemma2", SPLIT, num_layers=4).float()
    decoder = layers.decoder_layers(model)
    model.get_input_embeddings().requires_grad_(False)
    for layer in decoder[:2]:
        layer.requires_grad_(False)
    layers.ask_for_input_gradients(decoder)
    layers.compile_layers(decoder, backend="eager")
    with torch.no_grad():
        model(**row_of((5, 6)))
        model(input_ids=torch.arange(7)[None], use_cache=False)
    model.train()
    for lengths in PACKS:
        model(**row_of(lengths)).logits.sum().backward()
    assert counters["stats"]["unique_graphs"] > 8
    assert counters["frames"]["ok"] == counters["frames"]["total"]


def test_attention_dropout_stays_outside_the_graphs() -> None:
    torch._dynamo.reset()
    counters.clear()
    model = build("gpt2", SPLIT).float().train()
    for layer in (decoder := layers.decoder_layers(model)):
        layer.attn.attn_dropout.p = 0.5
    layers.compile_layers(decoder, backend="eager")
    found = []
    for lengths in PACKS:
        model(**row_of(lengths)).logits.sum().backward()
        found.append(counters["stats"]["unique_graphs"])
    assert found[0] == found[-1] and len(counters["graph_break"]) == 1


# The arguments of kernels that run on a GPU only

TORCH_2_11 = frozenset(
    ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "return_aux", "scale", "window_size"]
)
TORCH_2_13 = TORCH_2_11 | {"enable_gqa", "seqused_k", "block_table", "num_splits"}


@pytest.mark.parametrize("takes", [TORCH_2_11, TORCH_2_13])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("is_grouped", [False, True])
def test_varlen_gets_arguments_it_takes(takes: frozenset[str], window: int | None, is_grouped: bool) -> None:
    call = varlen_call(takes, scale=0.5, window=window, is_grouped=is_grouped)
    assert set(call.keywords) <= takes
    assert call.keywords["window_size"] == ((-1, 0) if window is None else (4, 0)) and call.keywords["scale"] == 0.5
    assert is_grouped == (call.repeat_heads or call.keywords.get("enable_gqa", False))
    assert not (call.repeat_heads and call.keywords.get("enable_gqa"))


def test_varlen_of_the_installed_torch_takes_what_it_gets() -> None:
    """With tensors that have shapes only: the kernel runs on a GPU alone, its signature and shapes are here."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k = (torch.empty(1, heads, 30, 64, dtype=torch.bfloat16, requires_grad=True) for heads in (8, 2))
        options = {"cu_seqlens": torch.empty(4, dtype=torch.int32), "max_seqlen": 20, "sliding_window": 7}
        out, _ = attention.varlen_attention(torch.nn.Module(), q, k, k, None, scaling=0.3, **options)
        assert out.shape == (1, 30, 8, 64) and out.dtype is torch.bfloat16 and out.requires_grad


def test_varlen_is_one_graph_whatever_the_longest_conversation() -> None:
    """Captured, not run: a backend that counts graphs and answers with an empty tensor."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def capture(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return lambda *inputs: [next(x for x in inputs if isinstance(x, Tensor) and x.dim() == 4).transpose(1, 2)]

    def attend(q: Tensor, k: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        options = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        return attention.varlen_attention(torch.nn.Module(), q, k, k, None, scaling=0.3, **options)[0]

    compiled = torch.compile(attend, dynamic=True, fullgraph=True, backend=capture)
    for lengths in PACKS:
        q, k = (torch.empty(1, heads, sum(lengths), 64, dtype=torch.bfloat16) for heads in (8, 2))
        compiled(q, k, bounds(lengths), max(lengths))
    assert len(graphs) == 1 and "_varlen_attn" in graphs[0].code


def written_out_package() -> FlashAttention:
    """What stands in for a FlashAttention package: its arguments and layout, computed by the operation of the CPU."""

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        assert causal and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == int(cu_seqlens_q.diff().max())
        window = None if window_size == (-1, -1) else window_size[0] + 1
        rows = (x.transpose(0, 1)[None] for x in (q, k, v))
        out, normaliser = kernels.packed_attention(*rows, cu_seqlens_q, softmax_scale, window, softcap or None, None)
        return out[0], normaliser

    return FlashAttention(3, flash_attn_varlen_func, frozenset(inspect.signature(flash_attn_varlen_func).parameters))


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (4, 0.7)])
def test_a_flash_package_is_called_as_it_wants(window: int | None, softcap: float | None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 14, 8, dtype=torch.float64) for heads in (4, 2, 2))
    row = {"cu_seqlens": bounds((9, 5)), "host_cu_seqlens": bounds((9, 5)), "max_seqlen": 9}
    options = {"sliding_window": window, "softcap": softcap}
    attend = attention.flash_attention(written_out_package())
    found, _ = attend(torch.nn.Module(), q, k, v, None, **row, **options)
    assert torch.allclose(found, written_out(q, k, v, (9, 5), (-1, -1), **options), rtol=1e-9)


def test_flash_packages_get_arguments_they_take() -> None:
    cu_seqlens = bounds((3, 4))
    common = {"cu_seqlens": cu_seqlens, "max_seqlen": 4, "scale": 0.5}
    both = frozenset({"max_seqlen_q", "max_seqlen_k"})
    plain = flash_keywords(both, **common, window=None, softcap=None)
    assert set(plain) == {"cu_seqlens_q", "cu_seqlens_k", "softmax_scale", "causal", *both} and plain["causal"] is True
    assert plain["cu_seqlens_q"] is plain["cu_seqlens_k"]
    full = flash_keywords(frozenset(), **common, window=5, softcap=30.0)
    assert full["window_size"] == (4, 0) and full["softcap"] == 30.0 and "max_seqlen_q" not in full


# The choice


def config(model_type: str, **values: object) -> Any:
    return AutoConfig.for_model(model_type, **values)


def test_on_the_cpu_conversations_are_computed_one_by_one_where_options_reach_the_kernel() -> None:
    for model_type in FAMILIES:
        assert choose_attention(model_config(model_type), "auto", 64) == Choice(SPLIT)
    assert choose_attention(config("qwen2", use_sliding_window=False, sliding_window=8), "auto", 4096).name == SPLIT
    name, reason = choose_attention(config("qwen2_moe", use_sliding_window=True, sliding_window=512), "auto", 4096)
    assert name == "sdpa" and reason is not None and "sliding_window" in reason
    assert choose_attention(config("qwen2_moe", use_sliding_window=True, sliding_window=512), "auto", 512).name == SPLIT
    name, reason = choose_attention(config("vaultgemma"), "auto", 64)
    assert name == "eager" and reason is not None and "attn_logit_softcapping" in reason
    assert choose_attention(config("llama"), "eager", 64).name == "eager"


@pytest.mark.parametrize(
    ("model_type", "values", "flash_version", "expected"),
    [
        ("llama", {}, None, VARLEN),
        ("llama", {}, 2, VARLEN),
        ("llama", {}, 3, FLASH),
        ("llama", {"head_dim": 128}, 4, FLASH),
        ("llama", {"head_dim": 192}, 4, VARLEN),
        ("llama", {"head_dim": 100}, 3, SPLIT),
        ("llama", {"head_dim": 512}, 3, SPLIT),
        ("mistral", {"sliding_window": 512}, None, VARLEN),
        ("gemma2", {"head_dim": 256}, None, SPLIT),
        ("gemma2", {"head_dim": 256}, 2, FLASH),
        ("gemma3_text", {}, None, VARLEN),
        ("phi3", {}, None, VARLEN),
        ("gpt2", {}, None, VARLEN),
        ("gpt_oss", {}, 3, SPLIT),
        ("mixtral", {}, None, VARLEN),
        ("qwen3_moe", {}, None, VARLEN),
        ("deepseek_v3", {}, 3, SPLIT),
        ("llama4_text", {}, None, "sdpa"),
    ],
)
def test_on_a_gpu_the_fastest_kernel_that_honours_all_options_is_taken(
    model_type: str, values: dict[str, Any], flash_version: int | None, expected: str
) -> None:
    demands = Demands.of(config(model_type, **values), 100_000)
    choice = decide(demands, "auto", "cuda", torch.bfloat16, flash_version)
    assert choice.name == expected
    assert (choice.reason is None) == (expected in (VARLEN, FLASH))


def test_float32_on_a_gpu_is_computed_conversation_by_conversation() -> None:
    choice = decide(Demands.of(config("llama"), 64), "auto", "cuda", torch.float32, None)
    assert choice.name == SPLIT and choice.reason is not None and "float32" in choice.reason


@pytest.mark.parametrize(
    ("model_type", "values", "wanted", "named"),
    [
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 16}, "split", "sliding_window"),
        ("gemma2", {}, "varlen", "attn_logit_softcapping"),
        ("gemma2", {}, "sdpa", "attn_logit_softcapping"),
        ("gpt_oss", {}, "flash", "sinks"),
        ("gpt_oss", {}, "sdpa", "sinks"),
        ("llama", {"head_dim": 100}, "varlen", "head_dim 100"),
    ],
)
def test_what_a_wanted_kernel_cannot_honour_is_refused_by_name(
    model_type: str, values: dict[str, Any], wanted: str, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        decide(Demands.of(config(model_type, **values), 64), wanted, "cuda", torch.bfloat16, 3)


def test_kernels_that_are_not_there_are_refused() -> None:
    demands = Demands.of(config("llama"), 64)
    with pytest.raises(ConfigError, match="flash-attn"):
        decide(demands, "flash", "cuda", torch.bfloat16, None)
    with pytest.raises(ConfigError, match="GPU"):
        decide(demands, "varlen", "cpu", torch.float32, None)


def test_models_that_cannot_be_packed_are_refused() -> None:
    with pytest.raises(ConfigError, match="linear_attention"):
        choose_attention(config("qwen3_next"), "auto", 64)
    with pytest.raises(ConfigError, match="use_bidirectional_attention"):
        choose_attention(config("gemma3_text", use_bidirectional_attention=True), "auto", 64)


def test_what_a_layer_asks_for_and_a_kernel_cannot_do_is_an_error_that_names_it() -> None:
    q = torch.zeros(1, 2, 4, 8)
    row = {"cu_seqlens": bounds((4,)), "host_cu_seqlens": bounds((4,)), "max_seqlen": 4}
    module = torch.nn.Module()
    for function, options in [
        (attention.split_attention, {"position_bias": q}),
        (attention.split_attention, {"is_causal": False}),
        (attention.varlen_attention, {"softcap": 1.0}),
        (attention.varlen_attention, {"s_aux": q}),
        (attention.flash_attention(written_out_package()), {"s_aux": q}),
    ]:
        with pytest.raises(ConfigError, match=next(iter(options))):
            function(module, q, q, q, None, **row, **options)


def test_a_batch_says_where_its_conversations_begin_once_for_every_device() -> None:
    from sft_dist.model.batch import Tree, collate, collate_trees

    tree = Tree(np.arange(5, dtype=np.int32), (np.array([7, 8], np.int32), np.array([9], np.int32)))
    for batch in (collate([]), collate_trees([tree])):
        assert batch.cu_seqlens is batch.host_cu_seqlens
        assert batch.cu_seqlens.tolist() == [0, *np.cumsum(batch.lengths)] and batch.max_length == max(batch.lengths)
        moved = batch.to(torch.device("meta"))
        assert moved.cu_seqlens.device.type == "meta" and moved.host_cu_seqlens is batch.host_cu_seqlens
