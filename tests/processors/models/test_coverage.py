"""What the switches say of each model, and which kernels a user lets them choose from."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from processors import (
    disable_flash_attention,
    disable_token_merging,
    enable_flash_attention,
    enable_token_merging,
)
from processors.kernels.call import AttentionCall
from processors.kernels.select import Kernel, explain, select_kernel
from processors.models.self_attentions import largest_call
from tests.processors.test_switches import modules, outputs, same, state
from tests.tiny_models import CROSS_ATTENTION_DIM, tiny_vae

SLICED = "sliced_attention"


def tiny_clip(implementation: str = "sdpa") -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=99,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act="gelu",
    )
    config._attn_implementation = implementation
    return CLIPTextModel(config)


def tiny_t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


def tiny_flux() -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    parts = {"transformer": transformer, "text_encoder": tiny_clip(), "text_encoder_2": tiny_t5(), "vae": tiny_vae()}
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), tokenizer=None, tokenizer_2=None, **parts)


def tiny_sd3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
    )
    nothing = dict.fromkeys(
        ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    )
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=tiny_vae(), **nothing
    )


def test_report_tells_what_was_done_in_each_model(tiny_sd: StableDiffusionPipeline) -> None:
    assert enable_flash_attention(tiny_sd) == {
        "vae": "2 attentions, 16 residual blocks",
        "text_encoder": "2 attentions, 2 GELUs",
        "unet": "32 attentions, 22 residual blocks",
    }
    assert enable_token_merging(tiny_sd) == {"unet": "4 of 16 self-attentions merge 50% of their tokens"}
    again = enable_token_merging(tiny_sd.unet, ratio=0.25, max_downsample=8)
    assert again == {"UNet2DConditionModel": "16 of 16 self-attentions merge 25% of their tokens"}


def test_attentions_that_are_not_covered_are_reported_and_warned_of_and_the_rest_is_done(caplog) -> None:
    pipe = tiny_flux()
    report = enable_flash_attention(pipe)
    assert report == {
        "vae": "2 attentions, 16 residual blocks",
        "text_encoder": "2 attentions, 2 GELUs",
        "text_encoder_2": "not covered: 1 attention (T5Attention)",
        "transformer": "3 attentions",
    }
    disable_flash_attention(pipe)
    pipe.transformer.set_attention_backend("_native_math")  # what the user chose stays
    report = enable_flash_attention(pipe)
    assert report["transformer"] == "not covered: 3 attentions (FluxAttnProcessor)"
    assert "leaves these attention processors as they are: FluxAttnProcessor (of transformer)" in caplog.text
    pipe.transformer.reset_attention_backend()
    report = enable_flash_attention(tiny_sd3())
    assert report["transformer"] == "1 attention"
    assert report["vae"].startswith("2 attentions")


@pytest.mark.parametrize("make", [tiny_flux, tiny_sd3])
def test_token_merging_refuses_pipelines_without_a_unet(make) -> None:
    with pytest.raises(ValueError, match="needs a UNet2DConditionModel, but .*Pipeline has none as .unet"):
        enable_token_merging(make())


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_switches_take_a_bare_model_and_reach_no_other(tiny_sd: StableDiffusionPipeline, name: str) -> None:
    expected, before = outputs(tiny_sd), state(tiny_sd)
    model = getattr(tiny_sd, name)
    (report,) = enable_flash_attention(model).items()
    assert report == (type(model).__name__, enable_flash_attention(tiny_sd)[name])
    disable_flash_attention(tiny_sd)
    assert same(before, state(tiny_sd))
    enable_flash_attention(model)
    untouched = [part for part in (tiny_sd.unet, tiny_sd.vae, tiny_sd.text_encoder) if part is not model]
    assert not any(type(module).__module__.startswith("processors") for part in untouched for module in part.modules())
    assert not same(before, state(tiny_sd))
    assert all(map(torch.equal, outputs(tiny_sd), expected))
    disable_flash_attention(model)
    assert same(before, state(tiny_sd))


def test_token_merging_takes_a_bare_unet(tiny_sd: StableDiffusionPipeline) -> None:
    before = state(tiny_sd)
    enable_token_merging(tiny_sd)
    merged = outputs(tiny_sd)[0]
    disable_token_merging(tiny_sd.unet)
    assert same(before, state(tiny_sd))
    enable_token_merging(tiny_sd.unet)
    assert torch.equal(outputs(tiny_sd)[0], merged)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (tiny_t5, "T5EncoderModel .*: found T5Attention"),
        (lambda: tiny_clip("eager"), "CLIPTextModel .*: found eager"),
        (lambda: torch.nn.Linear(2, 2), "Linear .*: found no attention at all"),
    ],
)
def test_models_that_are_not_covered_at_all_are_refused(make, found: str) -> None:
    with pytest.raises(ValueError, match=f"no attention of {found}"):
        enable_flash_attention(make())
    with pytest.raises(ValueError, match="needs a UNet2DConditionModel, but .* is none"):
        enable_token_merging(make())


def test_what_is_neither_a_pipeline_nor_a_model_is_refused() -> None:
    for function in (enable_flash_attention, disable_flash_attention, disable_token_merging):
        with pytest.raises(TypeError, match="expected a pipeline of diffusers or a model, got str"):
            function("unet")


def calls_of(pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> list[tuple[AttentionCall, str]]:
    """Each call of attention while the models run once, and the name of its kernel."""
    seen: list[tuple[AttentionCall, str]] = []

    def record(call: AttentionCall) -> Kernel:
        seen.append((call, select_kernel(call).name))
        return select_kernel(call)

    with monkeypatch.context() as patch:
        patch.setattr("processors.kernels.attention.select_kernel", record)
        outputs(pipe)
    return seen


def test_a_choice_of_kernels_reaches_every_attention_is_replaced_and_undone(tiny_sd, monkeypatch) -> None:
    expected, before = outputs(tiny_sd), state(tiny_sd)
    enable_token_merging(tiny_sd, ratio=0.0)
    enable_flash_attention(tiny_sd, kernels=["sliced"])
    calls = calls_of(tiny_sd, monkeypatch)
    assert len(calls) == 2 * 32 + 2 + 2 * 2 and {name for _, name in calls} == {SLICED}
    for actual, wanted in zip(outputs(tiny_sd), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
    enable_flash_attention(tiny_sd, kernels=["sdpa", "npu_prompt_flash_attention"])
    chosen = ("npu_prompt_flash_attention", "scaled_dot_product_attention")
    assert {(call.kernels, name) for call, name in calls_of(tiny_sd, monkeypatch)} == {(chosen, chosen[1])}
    enable_flash_attention(tiny_sd)
    assert {call.kernels for call, _ in calls_of(tiny_sd, monkeypatch)} == {None}
    enable_flash_attention(tiny_sd, kernels=["sliced"])
    disable_flash_attention(tiny_sd)
    disable_token_merging(tiny_sd)
    assert same(before, state(tiny_sd))


def test_an_unknown_kernel_is_refused_and_nothing_has_changed(tiny_sd: StableDiffusionPipeline) -> None:
    before = state(tiny_sd)
    with pytest.raises(ValueError, match="no attention kernel is called 'xformers'"):
        enable_flash_attention(tiny_sd, kernels=["sdpa", "xformers"])
    assert same(before, state(tiny_sd))


def test_a_choice_of_kernels_is_plain_data_on_modules_and_processors(tiny_sd: StableDiffusionPipeline) -> None:
    """What a graph's key is made of."""
    enable_flash_attention(tiny_sd, kernels=["sdpa"])
    enable_token_merging(tiny_sd, ratio=0.25)
    choice = ("scaled_dot_product_attention",)
    holders = [module for module in modules(tiny_sd) if hasattr(module, "switches")]
    assert {module.switches for module in holders} == {(True, choice, None), (True, choice, 0.25)}
    assert {module.processor.kernels for module in holders} == {choice}
    assert {m.kernels for m in tiny_sd.text_encoder.modules() if type(m).__name__ == "CLIPAttention"} == {choice}


def unet(**changes: object) -> UNet2DConditionModel:
    """Of three levels, without attention in the outermost."""
    torch.manual_seed(0)
    shape = {
        "sample_size": 16,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 8),
        "cross_attention_dim": CROSS_ATTENTION_DIM,
        "norm_num_groups": 8,
        "use_linear_projection": True,
    }
    return UNet2DConditionModel(**(shape | changes)).eval()


@torch.no_grad()
def test_merging_takes_the_outermost_blocks_that_have_attention() -> None:
    model = unet()
    inputs = torch.randn(1, 4, 15, 13), torch.tensor(10), torch.randn(1, 7, CROSS_ATTENTION_DIM)
    plain = model(*inputs).sample
    assert enable_token_merging(model) == {"UNet2DConditionModel": "4 of 17 self-attentions merge 50% of their tokens"}
    names = [name for name, p in model.attn_processors.items() if "Tome" in type(p).__name__]
    blocks = [f"{block}.attentions.{i}" for block in ("down_blocks.1", "up_blocks.1") for i in (0, 1)]
    assert names == [f"{block}.transformer_blocks.0.attn1.processor" for block in blocks]
    assert (model(*inputs).sample - plain).abs().max() > 1e-4
    with pytest.raises(ValueError, match="no self-attention at max_downsample=1: try a larger one"):
        enable_token_merging(model, max_downsample=1)


def test_merging_in_a_unet_with_attention_in_the_middle_alone_says_how() -> None:
    model = unet(
        down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3, transformer_layers_per_block=1
    )
    with pytest.raises(ValueError, match="no self-attention at max_downsample=None: try max_downsample=8"):
        enable_token_merging(model)
    assert enable_token_merging(model, max_downsample=8)["UNet2DConditionModel"].startswith("1 of 1 ")
    assert largest_call(model, 1, 16, 16).query_length == 16 - 8


@pytest.mark.parametrize("ratio", [None, 0.5])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (15, 13)])
@torch.no_grad()
def test_largest_call_is_the_one_over_the_most_tokens_that_the_unet_makes(monkeypatch, ratio, height, width) -> None:
    model = unet()
    enable_flash_attention(model, kernels=["sdpa"])
    if ratio:
        enable_token_merging(model, ratio=ratio)
    seen: list[AttentionCall] = []
    monkeypatch.setattr(
        "processors.kernels.attention.select_kernel", lambda call: seen.append(call) or select_kernel(call)
    )
    model(torch.randn(2, 4, height, width), torch.tensor(10), torch.randn(2, 7, CROSS_ATTENTION_DIM))
    largest = largest_call(model, 2, height, width)
    assert largest in seen and largest.query_length == max(call.query_length for call in seen)
    assert explain(largest).startswith("scaled_dot_product_attention for ")


def test_largest_call_of_a_unet_without_attention_is_an_error() -> None:
    blocks = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    with pytest.raises(ValueError, match="UNet2DConditionModel has no self-attention"):
        largest_call(unet(**blocks, mid_block_type=None, transformer_layers_per_block=1), 1, 16, 16)


def test_residual_blocks_that_stay_are_reported() -> None:
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    assert enable_flash_attention(vae)["AutoencoderKL"].startswith("2 attentions, ")
    model = unet(resnet_time_scale_shift="scale_shift", down_block_types=("CrossAttnDownBlock2D",) * 3)
    words = enable_flash_attention(model)["UNet2DConditionModel"]
    assert words == "38 attentions; not covered: 17 residual blocks that scale, shift or resample"
