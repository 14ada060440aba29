import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from processors import attention
from processors.kernels import npu_attention
from processors.kernels.call import AttentionCall, AttentionInputs, describe
from processors.kernels.select import KERNELS, check_kernels, explain, kernel_names, select_kernel
from processors.kernels.sliced import sliced_attention

PROMPT, INFER, FUSION, TORCH, SLICED = (kernel.name for kernel in KERNELS)


def call(chip: str | None = "Ascend310P3", **changes: object) -> AttentionCall:
    """SD2.1's self-attention at 512 x 512 with guidance, on an NPU, with `changes`."""
    base = AttentionCall("npu", chip, torch.float16, 2, 5, 4096, 4096, 64)
    return base._replace(**changes)


@pytest.mark.parametrize(
    ("described", "name"),
    [
        # 310P: the prompt operator, or slices
        (call(), PROMPT),
        (call("Ascend310P1"), PROMPT),
        (call(key_length=77), PROMPT),
        (call(key_length=77, mask="bool"), SLICED),
        (call(mask="bool"), PROMPT),
        (call(query_length=77, key_length=77, mask="causal"), PROMPT),  # padded to 80
        (call(query_length=77, key_length=80, mask="causal"), SLICED),
        (call(mask="bool", mask_heads=5), SLICED),
        (call(mask="float"), SLICED),
        (call(heads=1, head_dim=512), PROMPT),
        (call(heads=1, head_dim=513), SLICED),
        (call(dtype=torch.float32), SLICED),
        (call(dtype=torch.bfloat16), SLICED),
        (call(batch=128), PROMPT),
        (call(batch=129), SLICED),
        (call(heads=257), SLICED),
        (call(query_length=65536), SLICED),
        # A2 and A3: the inference operator, then torch's attention, which is fused there
        (call("Ascend910B3"), INFER),
        (call("Ascend910_9392"), INFER),
        (call("Ascend910B3", dtype=torch.bfloat16), INFER),
        (call("Ascend910B3", key_length=77, mask="bool"), INFER),
        (call("Ascend910B3", query_length=77, key_length=77, mask="causal"), INFER),
        (call("Ascend910B3", dtype=torch.float32), TORCH),
        (call("Ascend910B3", dtype=torch.float32, head_dim=66), SLICED),
        (call("Ascend910B3", head_dim=40), TORCH),
        (call("Ascend910B3", head_dim=528), SLICED),
        (call("Ascend910B3", heads=257), TORCH),
        (call("Ascend910B3", mask="bool", mask_heads=5), TORCH),
        (call("Ascend910B3", mask="float"), SLICED),
        # a gradient is needed: of the fused operators only that for training has one, and 310P has none
        (call(needs_grad=True), SLICED),
        (call("Ascend910B3", needs_grad=True), FUSION),
        (call("Ascend910_9392", needs_grad=True, dtype=torch.float32), FUSION),
        (call("Ascend910B3", needs_grad=True, head_dim=40), FUSION),
        (call("Ascend910B3", needs_grad=True, key_length=77, mask="bool", mask_heads=5), FUSION),
        (call("Ascend910B3", needs_grad=True, mask="float"), SLICED),
        (call("Ascend910B3", needs_grad=True, heads=257), TORCH),
        (call("Ascend910A", needs_grad=True), SLICED),
        # the user's choice, in the table's order; the last resort is never ruled out
        (call(kernels=(TORCH,)), SLICED),
        (call("Ascend910B3", kernels=(TORCH,)), TORCH),
        (call("Ascend910B3", kernels=(INFER, TORCH)), INFER),
        (call("Ascend910B3", kernels=(INFER,), dtype=torch.float32), SLICED),
        (call(None, device_type="cpu", kernels=(SLICED,)), SLICED),
        # chips without either operator
        (call("Ascend910B"), SLICED),
        (call("Ascend950PR_9589"), TORCH),
        (call("Ascend910A"), SLICED),
        (call("Ascend310B4"), SLICED),
        (call(None), SLICED),
        # not an NPU
        (call(None, device_type="cpu", mask="float"), TORCH),
        (call(None, device_type="cuda", dtype=torch.float32, head_dim=1024), TORCH),
    ],
)
def test_each_chip_gets_the_best_kernel_that_allows_the_call(described: AttentionCall, name: str) -> None:
    assert select_kernel(described).name == name


@pytest.mark.parametrize("kernel", KERNELS[:3], ids=lambda kernel: kernel.name)
def test_every_limit_of_a_fused_operator_can_refuse_and_says_why(kernel) -> None:
    chip = "Ascend310P3" if kernel.name == PROMPT else "Ascend910B3"
    breaches = [
        call(chip, needs_grad=True, device_type="cpu"),
        call("Ascend310P3", needs_grad=True),
        call("Ascend910B3", dtype=torch.float32),
        call(chip, needs_grad=True, dtype=torch.float64),
        call(chip, needs_grad=True, batch=2_000_001),
        call(chip, needs_grad=True, heads=257),
        call(chip, needs_grad=True, head_dim=769),
        call(chip, needs_grad=True, query_length=1_000_001),
        call(chip, needs_grad=True, mask="float"),
        call(chip, device_type="cpu"),
        call(None),
        call(chip, dtype=torch.float32),
        call(chip, batch=65537),
        call(chip, heads=257),
        call(chip, head_dim=520),
        call(chip, query_length=65536),
        call(chip, mask="float"),
        call(chip, mask="bool", mask_heads=5),
        call(chip, key_length=77, mask="bool"),
    ]
    explained = "\n".join(explain(breach) for breach in breaches)
    for limit in kernel.limits:
        assert f"not {kernel.name}: {limit.reason} [{limit.source}]" in explained


def test_explanation_names_the_choice_and_the_limit_of_the_chip() -> None:
    text = explain(call(dtype=torch.bfloat16))
    assert text.startswith("sliced_attention for ")
    assert "not npu_prompt_flash_attention: 310P: float16 only [op-plugin docs" in text


def test_explanation_tells_the_limits_of_a_kernel_from_the_users_choice() -> None:
    text = explain(call("Ascend910B3", kernels=(PROMPT, TORCH)))
    assert text.startswith(f"{TORCH} for ")
    assert f"not {INFER}: not among the kernels asked for" in text
    assert f"not {PROMPT}: taken on Ascend310P alone" in text and f"not {PROMPT}: not among" not in text


def test_names_of_kernels_are_checked_and_put_into_the_tables_order() -> None:
    assert check_kernels(None) is None
    assert check_kernels(["sliced", "sdpa", PROMPT, "sdpa"]) == (PROMPT, TORCH, SLICED)
    assert check_kernels("sdpa") == (TORCH,)
    assert set(check_kernels(kernel_names()) or ()) == {kernel.name for kernel in KERNELS}
    with pytest.raises(ValueError, match="no attention kernel is called 'flash': choose from npu_prompt_flash_att"):
        check_kernels(["sdpa", "flash"])
    with pytest.raises(ValueError, match="names no attention kernel: choose from"):
        check_kernels([])


def test_a_gradient_is_needed_where_grad_mode_is_on_and_an_input_requires_one(monkeypatch) -> None:
    seen: list[AttentionCall] = []
    monkeypatch.setattr(
        "processors.kernels.attention.select_kernel", lambda call: seen.append(call) or select_kernel(call)
    )
    plain = torch.randn(1, 4, 8)
    for position in range(3):
        inputs = [plain.clone().requires_grad_() if position == index else plain for index in range(3)]
        attention(*inputs, heads=2).sum().backward()
        with torch.no_grad():
            attention(*inputs, heads=2)
    attention(plain, plain, plain, heads=2)
    assert [call.needs_grad for call in seen] == [True, False] * 3 + [False]


def test_kernels_asked_for_are_those_that_run() -> None:
    """Sliced attention holds less than all scores at once, which tells it from torch's."""
    query = torch.randn(1, 64, 8)
    with LargestTensor() as memory:
        sliced = attention(query, query, query, 2, kernels=(SLICED,))
    assert memory.largest >= 2 * 64 * 64 * 4
    with LargestTensor() as memory:
        whole = attention(query, query, query, 2)
    assert memory.largest < 2 * 64 * 64 * 4  # flash attention of the CPU
    torch.testing.assert_close(sliced, whole)


def test_call_is_described_by_shapes_alone() -> None:
    query, key = torch.empty(2, 10, 24, device="meta"), torch.empty(2, 7, 24, device="meta")
    mask = torch.empty(2, 3, 1, 7, device="meta")
    assert describe(AttentionInputs(query, key, key, 3, mask, False, None)) == AttentionCall(
        "meta", None, torch.float32, 2, 3, 10, 7, 8, "float", 3
    )


def reference(query, key, value, heads, mask=None, is_causal=False, scale=None):
    """Attention in float64, with every score at once; zeros for queries that see no key."""
    query, key, value = (t.double().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores + (
            torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
        )
    return (scores.softmax(-1).nan_to_num(0.0) @ value).transpose(1, 2).flatten(2)


def some_mask(kind: str | None, batch: int, heads: int, queries: int, keys: int) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(1)
    keep = torch.rand(batch, heads, queries, keys, generator=generator) > 0.3
    return {
        None: None,
        "bool": keep[:, :1],
        "bool of each head": keep,
        "keys": keep[:1, :1, :1],
        "two dimensions": keep[0, 0],
        "query without a key": keep[:, :1] & (torch.arange(queries) != 2)[:, None],
        "float": torch.randn(batch, heads, queries, keys, generator=generator),
        "float of keys": torch.randn(batch, 1, 1, keys, generator=generator),
        "minus infinity": torch.zeros(queries, keys).masked_fill(torch.arange(queries)[:, None] == 2, -torch.inf),
    }[kind]


MASKS = [
    None,
    "bool",
    "bool of each head",
    "keys",
    "two dimensions",
    "query without a key",
    "float",
    "float of keys",
    "minus infinity",
]


@pytest.mark.parametrize("mask", [*MASKS, "causal"])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (9, 5), (1, 7)])
@pytest.mark.parametrize("rows", [None, 4, 1])
def test_attention_equals_float64_math(mask: str | None, queries: int, keys: int, rows: int | None) -> None:
    """`rows` None is the kernel of the CPU, otherwise the sliced one with so many queries at a time."""
    batch, heads, head_dim = 2, 3, 4
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(batch, n, heads * head_dim, generator=generator) for n in (queries, keys, keys))
    causal = mask == "causal"
    tensor = None if causal else some_mask(mask, batch, heads, queries, keys)
    expected = reference(query, key, value, heads, tensor, causal, scale=0.3)
    if rows is None:
        actual = attention(query, key, value, heads, tensor, causal, scale=0.3)
    else:
        four_dimensional = tensor if tensor is None or tensor.ndim == 4 else tensor[None, None]
        inputs = AttentionInputs(query, key, value, heads, four_dimensional, causal, 0.3)
        actual = sliced_attention(inputs, score_bytes=rows * batch * heads * keys * 4)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-6)


def test_sliced_attention_in_half_precision_keeps_scores_that_half_precision_cannot_hold() -> None:
    query = torch.full((1, 2, 16), 100.0, dtype=torch.float16)  # scores of 16 * 100 * 100 exceed float16's 65504
    key = torch.stack([query[0, 0], query[0, 0] * 1.01])[None]
    value = torch.tensor([[[0.0] * 16, [1.0] * 16]], dtype=torch.float16)
    output = attention(query, key, value, 1, kernels=(SLICED,))
    assert output.dtype == torch.float16
    torch.testing.assert_close(output, torch.ones_like(output))


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that an operation returns while the mode is on."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return output


@pytest.mark.parametrize("mask", ["none", "causal", "keys"])
def test_sliced_attention_never_holds_more_scores_than_its_budget(mask: str) -> None:
    query, key, value = torch.randn(3, 2, 512, 16).unbind()
    keys = torch.rand(2, 1, 1, 512) > 0.5 if mask == "keys" else None
    all_scores = 2 * 2 * 512 * 512 * 4
    with LargestTensor() as memory:
        inputs = AttentionInputs(query, key, value, 2, keys, mask == "causal", None)
        output = sliced_attention(inputs, score_bytes=all_scores // 16)
    assert memory.largest <= all_scores // 16
    torch.testing.assert_close(output, attention(query, key, value, 2, keys, mask == "causal"), rtol=1e-5, atol=1e-6)


def test_mask_and_is_causal_together_are_refused() -> None:
    query = torch.randn(1, 4, 8)
    with pytest.raises(ValueError, match="not both"):
        attention(query, query, query, 2, torch.ones(4, 4, dtype=torch.bool), is_causal=True)


def test_npu_mask_of_causal_attention_hides_what_lies_above_the_diagonal() -> None:
    hidden = npu_attention.causal_mask(3, 4, torch.device("cpu"))
    assert hidden.tolist() == [[False, True, True, True], [False, False, True, True], [False, False, False, True]]


@pytest.mark.parametrize("shape", [(2, 1, 77, 77), (1, 1, 1, 77), (1, 1, 77, 77)])
def test_padding_to_80_tokens_leaves_masked_attention_as_it_was(shape: tuple[int, ...]) -> None:
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.4
    query, key, value = torch.randn(3, 2, 77, 12, generator=torch.Generator().manual_seed(1)).unbind()
    hidden = npu_attention.hide_padding(npu_attention.hidden_of(keep, 77, 77), 3)
    assert hidden.shape == (shape[0], 1, 80, 80) and hidden.is_contiguous()
    padded = [npu_attention.pad_tokens(tensor, 3) for tensor in (query, key, value)]
    actual = reference(*padded, heads=3, mask=~hidden)[:, :77]
    torch.testing.assert_close(actual, reference(query, key, value, 3, keep))


def test_padding_to_80_tokens_leaves_causal_attention_as_it_was() -> None:
    query, key, value = torch.randn(3, 2, 77, 12, generator=torch.Generator().manual_seed(1)).unbind()
    padded = [npu_attention.pad_tokens(tensor, 3) for tensor in (query, key, value)]
    hidden = npu_attention.causal_mask(80, 80, torch.device("cpu"))
    actual = reference(*padded, heads=3, mask=~hidden)[:, :77]
    torch.testing.assert_close(actual, reference(query, key, value, 3, is_causal=True))


def test_kernel_of_the_cpu_is_bit_identical_to_torch() -> None:
    query, key, value = torch.randn(3, 2, 33, 24).unbind()
    heads = [t.unflatten(-1, (3, 8)).transpose(1, 2) for t in (query, key, value)]
    expected = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    assert torch.equal(attention(query, key, value, 3), expected)
