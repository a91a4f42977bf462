"""The kernels of a GPU against the operation written out, which the CPU's tests hold against its definition."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sft_dist.model import attention, kernels, varlen
from tests.model.test_attention import FAMILIES, PACKS, build, logprobs, row_of
from tests.model.test_trees import bounds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

LENGTHS = (700, 1, 130, 64, 1, 400)
NEEDS_FLASH = pytest.mark.skipif(varlen.newest_flash() is None, reason="needs a flash-attn package")


def random_inputs(heads: int, kv_heads: int, head_dim: int, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Query, key and value as a projection leaves them, in bfloat16 on the GPU."""
    torch.manual_seed(0)
    shapes = ((heads, head_dim), (kv_heads, head_dim), (kv_heads, head_dim))
    rows = [torch.randn(1, sum(lengths), *shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    return [row.transpose(1, 2).requires_grad_() for row in rows]


def to_gpu(row: dict[str, Any]) -> dict[str, Any]:
    """As `Batch.to` moves it."""
    return {k: v.cuda() if isinstance(v, Tensor) and k != "host_cu_seqlens" else v for k, v in row.items()}


def assert_equal_to_exact(name: str, inputs: list[Tensor], *, window: int | None, softcap: float | None) -> None:
    """Output and gradients within the rounding of bfloat16 of those of the same numbers in float32."""
    cu_seqlens = bounds(LENGTHS)
    options: dict[str, Any] = {"sliding_window": window} | ({} if softcap is None else {"softcap": softcap})
    package = varlen.newest_flash()
    function = attention.varlen_attention
    if name == "flash":
        assert package is not None
        function = attention.flash_attention(package)
    row = {"cu_seqlens": cu_seqlens.cuda(), "host_cu_seqlens": cu_seqlens, "max_seqlen": max(LENGTHS)}
    found, _ = function(torch.nn.Module(), *inputs, None, scaling=0.11, **row, **options)
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    expected, _ = kernels.packed_attention(*exact, cu_seqlens, 0.11, window, softcap, None)
    direction = torch.randn_like(expected)
    grads = torch.autograd.grad((found.float() * direction).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * direction).sum(), exact)
    for one, other in zip([found, *grads], [expected, *expected_grads], strict=True):
        assert (one.float() - other).norm() / other.norm() < 0.02


@pytest.mark.parametrize("window", [None, 100, 1024])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_varlen_equals_the_operation_written_out(heads: int, kv_heads: int, head_dim: int, window: int | None) -> None:
    assert_equal_to_exact("varlen", random_inputs(heads, kv_heads, head_dim), window=window, softcap=None)


@NEEDS_FLASH
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_flash_equals_the_operation_written_out(head_dim: int, window: int | None, softcap: float | None) -> None:
    assert_equal_to_exact("flash", random_inputs(8, 2, head_dim), window=window, softcap=softcap)


@pytest.mark.parametrize("options", [(None, None, False), (100, None, True), (None, 0.7, False)])
def test_the_operation_is_the_same_on_both_devices(options: tuple[int | None, float | None, bool]) -> None:
    window, softcap, has_sinks = options
    on_gpu = [tensor.detach().double().requires_grad_() for tensor in random_inputs(4, 2, 32)]
    sinks = torch.randn(4, dtype=torch.float64, device="cuda", requires_grad=True) if has_sinks else None
    on_gpu += [] if sinks is None else [sinks]
    on_cpu = [tensor.detach().cpu().requires_grad_() for tensor in on_gpu]
    outs = []
    for tensors in (on_gpu, on_cpu):
        of_sinks = tensors[3] if has_sinks else None
        out, _ = kernels.packed_attention(*tensors[:3], bounds(LENGTHS), 0.2, window, softcap, of_sinks)
        outs.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for one, other in zip(*outs, strict=True):
        assert torch.allclose(one.cpu(), other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name not in ("gemma2", "gpt_oss")])
def test_log_probs_of_a_packed_row_equal_those_of_each_conversation_alone(model_type: str) -> None:
    lengths = (9, 1, 17, 4, 1, 6)
    row = to_gpu(row_of(lengths))
    name = attention.SPLIT if model_type == "qwen2_moe" else attention.VARLEN
    packed_model = build(model_type, name, experts=None).to("cuda", torch.bfloat16)
    alone_model = build(model_type, "eager").to("cuda")
    ids = row["input_ids"].split(lengths, 1)
    with torch.no_grad():
        logits = packed_model(**row).logits.double()
        packed = torch.cat([logprobs(*pair) for pair in zip(logits.split(lengths, 1), ids, strict=True)])
        alone = torch.cat([logprobs(alone_model(input_ids=one, use_cache=False).logits, one) for one in ids])
    # bfloat16 rounds; a conversation that saw another one, or a window too many, is off by much more.
    assert (packed - alone).abs().median() < 0.2


def test_no_layer_waits_for_the_device() -> None:
    inputs = random_inputs(8, 2, 64)
    cu_seqlens = bounds(LENGTHS)
    row = {"cu_seqlens": cu_seqlens.cuda(), "host_cu_seqlens": cu_seqlens, "max_seqlen": max(LENGTHS)}
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = attention.varlen_attention(torch.nn.Module(), *inputs, None, **row)
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_compiled_layer_is_one_graph_whatever_the_pack() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build("llama", attention.VARLEN).to("cuda", torch.bfloat16)
    layer = model.model.layers[0]
    layer.forward = torch.compile(layer.forward, dynamic=True, fullgraph=True)
    for lengths in PACKS:
        model(**to_gpu(row_of(lengths))).logits.square().mean().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_trees_are_computed_on_a_gpu_too() -> None:
    lengths, parents = (30, 9, 4, 200), (-1, 0, 0, -1)
    inputs = [tensor.detach().float() for tensor in random_inputs(4, 2, 32, lengths)]
    cu_seqlens = bounds(lengths)
    row = {
        "cu_seqlens": cu_seqlens.cuda(),
        "host_cu_seqlens": cu_seqlens,
        "max_seqlen": 200,
        "segment_parents": parents,
    }
    module = torch.nn.Module()
    on_gpu, _ = attention.varlen_attention(module, *inputs, None, **row)
    on_cpu, _ = attention.split_attention(module, *(x.cpu() for x in inputs), None, **row)
    assert torch.allclose(on_gpu.cpu(), on_cpu, atol=1e-4)
