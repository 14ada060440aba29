"""Token merging against tomesd 0.1.3 without randomness."""

from collections.abc import Callable
from typing import Any

import pytest
import tomesd
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0 as DefaultAttnProcessor
from tomesd.merge import bipartite_soft_matching_random2d
from tomesd.patch import make_diffusers_tome_block
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from processors import AttnProcessor2_0, AttnProcessor2_0Tome, attention, enable_token_merging
from processors.kernels.npu_attention import causal_mask
from processors.merging import tome
from tests.tiny_models import CROSS_ATTENTION_DIM, small_unet, tiny_unet
from tests.tiny_pipelines import PIPELINES, draw, make_pipeline

GRIDS = [(8, 8), (7, 9), (5, 12), (1, 6), (9, 2)]  # h x w: even, odd, wide, without a full cell, narrow
CPU = torch.device("cpu")


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def merged_and_back(metric: torch.Tensor, tokens: torch.Tensor, h: int, w: int, sy: int, sx: int, ratio: float) -> Any:
    matching = tome.match(metric, tome.partition(h, w, sy, sx, CPU), tome.count_merged(h, w, sy, sx, ratio))
    return matching, tome.merge(tokens, matching)


@pytest.mark.parametrize(("h", "w"), [grid for grid in GRIDS if grid != (1, 6)])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("sy", "sx", "ratio"), [(2, 2, 0.25), (2, 2, 0.5), (2, 2, 0.75), (3, 2, 0.8), (1, 2, 0.5)])
def test_merge_and_unmerge_equal_tomesd(h: int, w: int, batch: int, sy: int, sx: int, ratio: float) -> None:
    metric, tokens = torch.randn(2, batch, h * w, 6, generator=torch.Generator().manual_seed(h * w)).unbind()
    merge, unmerge = bipartite_soft_matching_random2d(metric, w, h, sx, sy, int(h * w * ratio), no_rand=True)
    expected = merge(tokens)
    matching, actual = merged_and_back(metric, tokens, h, w, sy, sx, ratio)
    assert actual.shape == expected.shape
    close(tome.unmerge(actual, matching), unmerge(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_both_ways_to_average_agree(dtype: torch.dtype) -> None:
    metric, tokens = torch.randn(2, 2, 63, 6, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()
    matching, looked_up = merged_and_back(metric, tokens, 7, 9, 2, 2, 0.5)
    product = tome.mean_by_product(tokens, matching)
    assert product.dtype == looked_up.dtype == dtype
    torch.testing.assert_close(product, looked_up, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


def test_mean_of_many_large_half_precision_tokens_does_not_overflow() -> None:
    tokens = torch.full((1, 64, 4), 30000.0, dtype=torch.float16)
    matching, looked_up = merged_and_back(tokens, tokens, 8, 8, 2, 2, 0.75)
    for merged in (looked_up, tome.mean_by_product(tokens, matching)):
        torch.testing.assert_close(merged, torch.full_like(merged, 30000.0), rtol=2e-3, atol=0)


def test_tokens_whose_norm_exceeds_half_precision_are_matched_by_direction() -> None:
    metric = torch.rand(1, 64, 32, generator=torch.Generator().manual_seed(0)).half() * 2 - 1
    cells = tome.partition(8, 8, 2, 2, CPU)
    expected = tome.match(metric, cells, 32)
    actual = tome.match(metric * 2**15, cells, 32)  # norms of about 2**15 * sqrt(32 / 3), and float16 ends at 65504
    assert torch.equal(actual.rows, expected.rows)


def test_zero_tokens_are_merged_without_nan() -> None:
    metric = torch.zeros(1, 16, 4)
    _, merged = merged_and_back(metric, torch.ones(1, 16, 4), 4, 4, 2, 2, 0.5)
    assert torch.equal(merged, torch.ones(1, 8, 4))


def test_merging_is_deterministic_and_independent_of_the_batch() -> None:
    metric, tokens = torch.randn(2, 2, 256, 8, generator=torch.Generator().manual_seed(0)).unbind()
    matching, merged = merged_and_back(metric, tokens, 16, 16, 2, 2, 0.5)
    again, merged_again = merged_and_back(metric, tokens, 16, 16, 2, 2, 0.5)
    assert torch.equal(matching.rows, again.rows) and torch.equal(merged, merged_again)
    alone, merged_alone = merged_and_back(metric[1:], tokens[1:], 16, 16, 2, 2, 0.5)
    assert torch.equal(alone.rows[0], matching.rows[1]) and torch.equal(merged_alone[0], merged[1])


def test_index_maps_are_made_once_for_a_grid() -> None:
    first = tome.partition(6, 10, 2, 2, CPU)
    assert tome.partition(6, 10, 2, 2, CPU).sources is first.sources
    assert tome.partition(10, 6, 2, 2, CPU).sources is not first.sources


class Pictures(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unet = small_unet().eval()
        set_merging(self.unet, lambda name: True, 0.5)

    def forward(self, latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.unet(latents, 10, text).sample


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_exporting_a_merged_unet_leaves_the_process_and_the_exported_program_right(strict: bool) -> None:
    model = Pictures()
    inputs = (torch.randn(1, 4, 12, 10), torch.randn(1, 7, CROSS_ATTENTION_DIM))  # a grid that no other test uses
    exported = torch.export.export(model, inputs, strict=strict).module()
    expected = model(*inputs)
    assert type(expected) is torch.Tensor and expected.isfinite().all()
    close(exported(*inputs), expected)
    assert torch.equal(model(*inputs), expected)


def test_tensors_made_under_a_fake_mode_are_neither_kept_nor_mixed_with_real_ones() -> None:
    for make in (lambda: tome.partition(22, 6, 2, 2, CPU).sources, lambda: causal_mask(22, 6, CPU)):
        for _ in range(2):
            with FakeTensorMode() as mode:
                fake = make()
                assert (
                    mode is getattr(fake, "fake_mode", None)
                    and (fake.new_zeros(fake.shape) == fake).shape == fake.shape
                )
            assert type(make()) is torch.Tensor


@pytest.mark.parametrize(("h", "w"), [*GRIDS, (4, 3)])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75])
def test_partition_splits_every_grid_into_corners_and_the_rest(h: int, w: int, ratio: float) -> None:
    sources, destinations, inverse = tome.partition(h, w, 2, 2, CPU)
    corners = [y * w + x for y in range(0, h // 2 * 2, 2) for x in range(0, w // 2 * 2, 2)]
    assert destinations.tolist() == corners
    assert torch.cat([sources, destinations])[inverse].tolist() == list(range(h * w))
    merged = tome.count_merged(h, w, 2, 2, ratio)
    assert merged == (min(int(h * w * ratio), len(sources)) if corners else 0)


def transformer_block() -> BasicTransformerBlock:
    torch.manual_seed(0)
    return BasicTransformerBlock(32, 4, 8, cross_attention_dim=CROSS_ATTENTION_DIM).eval()


@pytest.mark.parametrize(("h", "w"), GRIDS[:3])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.75])
@torch.no_grad()
def test_transformer_block_equals_tomesd(h: int, w: int, batch: int, ratio: float) -> None:
    hidden_states = torch.randn(batch, h * w, 32, generator=torch.Generator().manual_seed(1))
    text = torch.randn(batch, 7, CROSS_ATTENTION_DIM, generator=torch.Generator().manual_seed(2))

    expected_block = transformer_block()
    expected_block.__class__ = make_diffusers_tome_block(BasicTransformerBlock)
    settings = {"max_downsample": 1, "ratio": ratio, "sx": 2, "sy": 2, "use_rand": False, "generator": None}
    merged_parts = {"merge_attn": True, "merge_crossattn": False, "merge_mlp": False}
    expected_block._tome_info = {"size": (h, w), "args": settings | merged_parts}

    block = transformer_block()
    block.attn1.set_processor(AttnProcessor2_0Tome(h, w, ratio=ratio))
    close(block(hidden_states, encoder_hidden_states=text), expected_block(hidden_states, encoder_hidden_states=text))


def set_merging(unet: UNet2DConditionModel, chosen: Callable[[str], bool], ratio: float) -> None:
    for name, module in unet.named_modules():
        if name.endswith("attn1") and chosen(name):
            module.set_processor(AttnProcessor2_0Tome(ratio=ratio))


@pytest.mark.parametrize(("h", "w", "batch", "ratio"), [(16, 16, 2, 0.5), (15, 13, 1, 0.75), (9, 20, 3, 0.25)])
@pytest.mark.parametrize("max_downsample", [1, 4])
@torch.no_grad()
def test_unet_equals_tomesd(h: int, w: int, batch: int, ratio: float, max_downsample: int) -> None:
    torch.manual_seed(0)
    unet = tiny_unet().eval()
    inputs = (torch.randn(batch, 4, h, w), torch.tensor(10), torch.randn(batch, 7, CROSS_ATTENTION_DIM))
    plain = unet(*inputs).sample
    tomesd.apply_patch(unet, ratio=ratio, max_downsample=max_downsample, use_rand=False)
    expected = unet(*inputs).sample
    tomesd.remove_patch(unet)
    levels = ["down_blocks.0", "up_blocks.3"] + ["down_blocks.1", "up_blocks.2", "down_blocks.2", "up_blocks.1"]
    chosen = tuple(levels[:2] if max_downsample == 1 else levels)
    set_merging(unet, lambda name: name.startswith(chosen), ratio)
    actual = unet(*inputs).sample
    close(actual, expected)
    assert (actual - plain).abs().max() > 1e-3  # the comparison above is of something


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_each_pipeline_equals_tomesd(name: str, ratio: float) -> None:
    pipe = make_pipeline(name)
    plain = draw(pipe, name)
    tomesd.apply_patch(pipe, ratio=ratio, max_downsample=2, use_rand=False)
    expected = draw(pipe, name)
    tomesd.remove_patch(pipe)
    enable_token_merging(pipe, ratio=ratio, max_downsample=2)
    actual = draw(pipe, name)
    close(actual, expected, 1e-4)  # of latents up to 10, after seven steps
    assert (actual - plain).norm() > 1e-3 * plain.norm()


def test_ratio_zero_is_bit_identical_to_no_merging() -> None:
    block, hidden_states = transformer_block(), torch.randn(2, 64, 32)
    text = torch.randn(2, 7, CROSS_ATTENTION_DIM)
    expected = block(hidden_states, encoder_hidden_states=text)
    block.attn1.set_processor(AttnProcessor2_0Tome(8, 8, ratio=0.0))
    assert torch.equal(block(hidden_states, encoder_hidden_states=text), expected)


def test_gradients_flow_through_merged_attention() -> None:
    block, hidden_states = transformer_block(), torch.randn(2, 64, 32, requires_grad=True)
    block.attn1.set_processor(AttnProcessor2_0Tome(8, 8))
    with torch.inference_mode():  # makes the index maps first, which a training step uses then
        tome.partition(8, 8, 2, 2, CPU)
    block(hidden_states, encoder_hidden_states=torch.randn(2, 7, CROSS_ATTENTION_DIM)).sum().backward()
    assert hidden_states.grad is not None and hidden_states.grad.isfinite().all()


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_gradients_of_merged_attention_are_those_of_dense_math(ratio: float) -> None:
    """Merging as a matrix of means and unmerging as one of copies, between which autograd sees plain products."""
    h, w, channels, heads = 6, 7, 12, 3
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(channels, channels, generator=generator, dtype=torch.float64) for _ in range(3)]
    tokens = torch.randn(2, h * w, channels, generator=generator, dtype=torch.float64)
    metric = torch.randn(2, h * w, channels, generator=generator, dtype=torch.float64)
    wanted = torch.randn(2, h * w, channels, generator=generator, dtype=torch.float64)
    cells, merged = tome.partition(h, w, 2, 2, CPU), tome.count_merged(h, w, 2, 2, ratio)

    def gradients(dense: bool) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (tokens, metric, *weights)]
        hidden, similar, *projections = leaves
        matching = tome.match(similar, cells, merged)
        copies = F.one_hot(matching.rows, h * w - merged).double()  # [batch, tokens, rows]
        if dense:
            means = copies.transpose(1, 2) / copies.sum(1)[:, :, None]
            query, key, value = (
                ((means @ hidden) @ projection).unflatten(-1, (heads, -1)).transpose(1, 2)
                for projection in projections
            )
            scores = query @ key.transpose(-1, -2) / (channels // heads) ** 0.5
            output = copies @ (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        else:
            reduced = tome.merge(hidden, matching)
            output = tome.unmerge(attention(*(reduced @ projection for projection in projections), heads), matching)
        (output * wanted).sum().backward()
        assert similar.grad is None  # which tokens merge is a choice, not a function to follow downhill
        return [leaf.grad for leaf in (hidden, *projections) if leaf.grad is not None]

    actual, expected = gradients(dense=False), gradients(dense=True)
    assert len(actual) == len(expected) == 4
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # the means are summed in float32


class SortedAndScattered(TorchDispatchMode):
    """The dtypes that are sorted, and the names of operations that scatter, while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.sorted: list[torch.dtype] = []
        self.scattered: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("sort", "argsort", "topk"):
            self.sorted.append(args[0].dtype)
        if "scatter" in name or name.startswith(("index_put", "put")):
            self.scattered.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("h", "w"), [*GRIDS, (64, 64)])
def test_matching_sorts_floating_point_alone_and_scatters_nothing(h: int, w: int) -> None:
    """What Ascend's AI Cores have kernels for. The permutation's inverse equals that of a scatter to the bit."""
    metric = torch.randn(2, h * w, 8, generator=torch.Generator().manual_seed(0))
    cells, merged = tome.partition(h, w, 2, 2, CPU), tome.count_merged(h, w, 2, 2, 0.5)
    if not merged:
        return
    with SortedAndScattered() as seen:
        matching = tome.match(metric, cells, merged)
    assert seen.sorted == [torch.float32] * 2 and not seen.scattered
    order = matching.order
    rank = torch.zeros_like(order).scatter(1, order, torch.arange(order.shape[1]).expand_as(order))
    kept = order.shape[1] - merged
    source_rows = matching.rows.index_select(1, cells.sources)
    assert torch.equal(source_rows, torch.where(rank < merged, kept + matching.nearest, rank - merged))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ratio": 0.8}, "ratio from 0 to 0.75, got 0.8"),
        ({"ratio": -0.1}, "got -0.1"),
        ({"ratio": float("nan")}, "got nan"),
        ({"ratio": 0.7, "sy": 1}, "cells of 1 x 2 takes a ratio from 0 to 0.5"),
        ({"sy": 0}, "sy=0"),
        ({"h": 8}, "both h and w"),
    ],
)
def test_impossible_settings_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttnProcessor2_0Tome(**kwargs)


def test_calls_that_cannot_be_merged_say_why() -> None:
    block, hidden_states = transformer_block(), torch.randn(1, 64, 32)
    text = torch.randn(1, 7, CROSS_ATTENTION_DIM)
    block.attn1.set_processor(AttnProcessor2_0Tome(8, 9))
    with pytest.raises(ValueError, match="grid of 8 x 9 got 64 tokens"):
        block(hidden_states, encoder_hidden_states=text)
    block.attn1.set_processor(AttnProcessor2_0Tome())
    with pytest.raises(ValueError, match="knows no grid"):
        block(hidden_states, encoder_hidden_states=text)
    with pytest.raises(ValueError, match="cannot apply an attention_mask"):
        block(hidden_states, attention_mask=torch.zeros(1, 1, 64), encoder_hidden_states=text, token_grid=(8, 8))
    with pytest.raises(ValueError, match="needs the block's input"):
        block.attn1(hidden_states)


@torch.no_grad()
def test_compiled_block_is_one_graph_for_each_grid_and_equal() -> None:
    block, text = transformer_block(), torch.randn(2, 7, CROSS_ATTENTION_DIM)
    block.attn1.set_processor(AttnProcessor2_0Tome())
    block.attn2.set_processor(AttnProcessor2_0())
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(block, backend="eager", fullgraph=True, dynamic=False)
    for h, w in [(8, 8), (7, 9)] * 3:
        hidden_states = torch.randn(2, h * w, 32)
        expected = block(hidden_states, encoder_hidden_states=text, token_grid=(h, w))
        assert torch.equal(compiled(hidden_states, encoder_hidden_states=text, token_grid=(h, w)), expected)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@torch._inductor.config.patch(compile_threads=1)
@torch.no_grad()
def test_merging_compiled_by_inductor_is_deterministic_and_equal() -> None:
    def there_and_back(metric: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        matching = tome.match(metric, tome.partition(7, 9, 2, 2, metric.device), tome.count_merged(7, 9, 2, 2, 0.5))
        return tome.unmerge(tome.merge(tokens, matching), matching)

    compiled = torch.compile(there_and_back, fullgraph=True, dynamic=False)
    metric, tokens = torch.randn(2, 2, 63, 8).unbind()
    close(compiled(metric, tokens), there_and_back(metric, tokens))
    assert torch.equal(compiled(metric, tokens), compiled(metric, tokens))


def test_processor_without_the_attribute_is_called_as_ever() -> None:
    block, text = transformer_block(), torch.randn(1, 7, CROSS_ATTENTION_DIM)
    hidden_states = torch.randn(1, 64, 32)
    block.attn1.set_processor(DefaultAttnProcessor())
    expected = block(hidden_states, encoder_hidden_states=text)
    block.attn1.set_processor(AttnProcessor2_0())
    assert torch.equal(block(hidden_states, encoder_hidden_states=text, token_grid=(8, 8)), expected)
