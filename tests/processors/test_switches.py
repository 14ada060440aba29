import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, StableDiffusionPipeline, UNet2DModel
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from diffusers.models.attention_processor import AttnProcessor2_0 as DefaultAttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig
from torch._dynamo.utils import counters
from transformers import SiglipModel
from transformers.activations import GELUActivation
from transformers.models.siglip.modeling_siglip import SiglipAttention

from processors import (
    AttnProcessor2_0,
    AttnProcessor2_0Tome,
    disable_flash_attention,
    disable_token_merging,
    enable_flash_attention,
    enable_token_merging,
)
from processors.models.resnet import FusedResnetBlock2D
from tests.tiny_clip import save_tiny_siglip
from tests.tiny_models import CROSS_ATTENTION_DIM

IDS = torch.randint(0, 90, (2, 77), generator=torch.Generator().manual_seed(0))


def modules(pipe: StableDiffusionPipeline) -> list[torch.nn.Module]:
    return [module for model in (pipe.unet, pipe.vae, pipe.text_encoder) for module in model.modules()]


def state(pipe: StableDiffusionPipeline) -> list[object]:
    """All that the functions under test may change, by identity."""
    processors = [module.processor for module in modules(pipe) if isinstance(module, Attention)]
    activations = [module.act for module in modules(pipe) if isinstance(module, GELUActivation)]
    classes = [type(module) for module in modules(pipe)]
    attributes = [sorted(vars(module)) for module in modules(pipe)]
    return [*processors, *activations, classes, attributes, pipe.text_encoder.config._attn_implementation]


def same(before: list[object], after: list[object]) -> bool:
    return all(a is b or (isinstance(a, list | str) and a == b) for a, b in zip(before, after, strict=True))


@torch.no_grad()
def outputs(pipe: StableDiffusionPipeline) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 77, CROSS_ATTENTION_DIM, generator=generator)
    padding = torch.arange(77)[None] < torch.tensor([[77], [40]])
    return [
        pipe.unet(latents, torch.tensor(10), text).sample,
        pipe.unet(latents, torch.tensor(10), text, encoder_attention_mask=padding).sample,
        pipe.vae.decode(latents).sample,
        pipe.vae.encode(torch.randn(1, 3, 32, 32, generator=generator)).latent_dist.mean,
        pipe.text_encoder(IDS).last_hidden_state,
        pipe.text_encoder(IDS, attention_mask=padding).last_hidden_state,
    ]


def test_flash_attention_reaches_every_model_and_changes_no_bit_on_the_cpu(tiny_sd: StableDiffusionPipeline) -> None:
    expected = outputs(tiny_sd)
    enable_flash_attention(tiny_sd)
    for module in modules(tiny_sd):
        assert type(module) is not ResnetBlock2D
        assert not isinstance(module, Attention) or type(module.processor) is AttnProcessor2_0
        assert not isinstance(module, GELUActivation) or module.act is not F.gelu
    assert tiny_sd.text_encoder.config._attn_implementation == "diffusers_npu"
    for actual, wanted in zip(outputs(tiny_sd), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_state_dict_and_saved_pipeline_do_not_know_of_the_switches(tiny_sd, tmp_path) -> None:
    before = {name: list(getattr(tiny_sd, name).state_dict()) for name in ("unet", "vae", "text_encoder")}
    enable_flash_attention(tiny_sd)
    enable_token_merging(tiny_sd)
    assert {name: list(getattr(tiny_sd, name).state_dict()) for name in before} == before
    tiny_sd.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert again.text_encoder.config._attn_implementation == "sdpa"


ENABLE = {"flash": enable_flash_attention, "tome": enable_token_merging}
DISABLE = {"flash": disable_flash_attention, "tome": disable_token_merging}


@pytest.mark.parametrize("enabling", [*itertools.permutations(ENABLE), ("flash", "tome", "flash", "tome")])
@pytest.mark.parametrize("disabling", [*itertools.permutations(DISABLE), ("tome", "tome", "flash", "flash")])
def test_switching_off_in_any_order_restores_the_pipeline_exactly(
    tiny_sd: StableDiffusionPipeline, enabling: tuple[str, ...], disabling: tuple[str, ...]
) -> None:
    before = state(tiny_sd)
    for name in enabling:
        ENABLE[name](tiny_sd)
    assert not same(before, state(tiny_sd))
    for name in disabling:
        DISABLE[name](tiny_sd)
    assert same(before, state(tiny_sd))


@pytest.mark.parametrize("name", ["flash", "tome"])
def test_one_switch_leaves_the_other_alone(tiny_sd: StableDiffusionPipeline, name: str) -> None:
    other = "tome" if name == "flash" else "flash"
    ENABLE[name](tiny_sd)
    alone = outputs(tiny_sd)
    ENABLE[other](tiny_sd)
    DISABLE[other](tiny_sd)
    for actual, wanted in zip(outputs(tiny_sd), alone, strict=True):
        assert torch.equal(actual, wanted)
    types = {type(module.processor) for module in tiny_sd.unet.modules() if isinstance(module, Attention)}
    assert types == ({AttnProcessor2_0} if name == "flash" else {DefaultAttnProcessor, AttnProcessor2_0Tome})


def test_switching_off_what_was_never_on_does_nothing(tiny_sd: StableDiffusionPipeline) -> None:
    tiny_sd.unet.set_attn_processor(AttnProcessor2_0())  # set by hand, so not ours to take away
    before = state(tiny_sd)
    disable_flash_attention(tiny_sd)
    disable_token_merging(tiny_sd)
    assert same(before, state(tiny_sd))


def merging(pipe: StableDiffusionPipeline) -> dict[str, float]:
    found = {name.removesuffix(".processor"): processor for name, processor in pipe.unet.attn_processors.items()}
    return {name: p.ratio for name, p in found.items() if isinstance(p, AttnProcessor2_0Tome)}


def test_default_recipe_merges_first_down_block_and_two_of_the_last_up_block(tiny_sd: StableDiffusionPipeline) -> None:
    enable_token_merging(tiny_sd)
    blocks = ["down_blocks.0.attentions.0", "down_blocks.0.attentions.1"]
    blocks += ["up_blocks.3.attentions.0", "up_blocks.3.attentions.1"]
    assert merging(tiny_sd) == {f"{block}.transformer_blocks.0.attn1": 0.5 for block in blocks}


@pytest.mark.parametrize(
    ("max_downsample", "levels"),
    [
        (1, ("down_blocks.0", "up_blocks.3")),
        (2, ("down_blocks.0", "down_blocks.1", "up_blocks.3", "up_blocks.2")),
        (8, ("down_blocks", "mid_block", "up_blocks")),
    ],
)
def test_max_downsample_chooses_blocks_by_resolution(
    tiny_sd: StableDiffusionPipeline, max_downsample: int, levels: tuple[str, ...]
) -> None:
    enable_token_merging(tiny_sd, ratio=0.25, max_downsample=max_downsample)
    names = [n.removesuffix(".processor") for n in tiny_sd.unet.attn_processors if n.endswith("attn1.processor")]
    assert merging(tiny_sd) == {name: 0.25 for name in names if name.startswith(levels)}


def test_enabling_token_merging_again_replaces_its_settings(tiny_sd: StableDiffusionPipeline) -> None:
    before = state(tiny_sd)
    enable_token_merging(tiny_sd, ratio=0.5, max_downsample=2)
    enable_token_merging(tiny_sd, ratio=0.25, max_downsample=1)
    assert set(merging(tiny_sd).values()) == {0.25} and len(merging(tiny_sd)) == 5
    disable_token_merging(tiny_sd)
    assert same(before, state(tiny_sd))


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"ratio": 0.76}, "from 0 to 0.75, got 0.76"), ({"max_downsample": 0}, "max_downsample=0")]
)
def test_refused_settings_change_nothing(tiny_sd: StableDiffusionPipeline, kwargs: dict, message: str) -> None:
    enable_token_merging(tiny_sd, ratio=0.25)
    before = state(tiny_sd)
    with pytest.raises(ValueError, match=message):
        enable_token_merging(tiny_sd, **kwargs)
    assert same(before, state(tiny_sd))


class Custom(DefaultAttnProcessor):
    """Stands for the processors of IP-Adapter and the like."""


def use_custom(pipe: StableDiffusionPipeline, chosen: Callable[[str], bool]) -> None:
    processors = pipe.unet.attn_processors
    pipe.unet.set_attn_processor({n: Custom() if chosen(n) else p for n, p in processors.items()})


def test_processors_that_are_not_the_default_stay_with_a_warning(tiny_sd, caplog) -> None:
    use_custom(tiny_sd, lambda name: "attn2" in name)
    before = state(tiny_sd)
    enable_flash_attention(tiny_sd)
    assert "leaves these attention processors as they are: Custom" in caplog.text
    processors = tiny_sd.unet.attn_processors
    assert all(type(p) is (Custom if "attn2" in n else AttnProcessor2_0) for n, p in processors.items())
    enable_token_merging(tiny_sd)
    disable_flash_attention(tiny_sd)
    disable_token_merging(tiny_sd)
    assert same(before, state(tiny_sd))


def test_token_merging_refuses_to_replace_a_processor_that_is_not_the_default(tiny_sd) -> None:
    use_custom(tiny_sd, lambda name: name.startswith("up_blocks.3"))
    before = state(tiny_sd)
    with pytest.raises(ValueError, match="AttnProcessor2_0 only: found Custom"):
        enable_token_merging(tiny_sd)
    assert same(before, state(tiny_sd))


def test_pipelines_without_attention_or_unet_are_refused(tiny_sd: StableDiffusionPipeline) -> None:
    unet = UNet2DModel(8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                       norm_num_groups=4, add_attention=False)  # fmt: skip
    pipe = DDPMPipeline(unet, DDPMScheduler())
    with pytest.raises(ValueError, match="found no attention at all"):
        enable_flash_attention(pipe)
    with pytest.raises(ValueError, match="needs a UNet2DConditionModel, but DDPMPipeline"):
        enable_token_merging(pipe)
    tiny_sd.unet.set_attn_processor(FusedAttnProcessor2_0())
    tiny_sd.vae.set_attn_processor(FusedAttnProcessor2_0())
    with pytest.raises(ValueError, match="found FusedAttnProcessor2_0"):
        enable_flash_attention(tiny_sd)


def test_lora_keeps_its_effect_and_is_not_disturbed(tiny_sd: StableDiffusionPipeline) -> None:
    plain = outputs(tiny_sd)[0]
    tiny_sd.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False))
    expected = outputs(tiny_sd)
    before = state(tiny_sd)
    enable_flash_attention(tiny_sd)
    actual = outputs(tiny_sd)
    assert torch.equal(actual[0], expected[0]) and not torch.equal(actual[0], plain)
    disable_flash_attention(tiny_sd)
    assert same(before, state(tiny_sd))


def test_pipeline_makes_the_same_picture_twice_with_both_on(tiny_sd: StableDiffusionPipeline) -> None:
    def picture() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return tiny_sd("a red ball", num_inference_steps=2, generator=generator, output_type="pt").images

    plain = picture()
    enable_flash_attention(tiny_sd)
    assert torch.equal(picture(), plain)
    enable_token_merging(tiny_sd)
    merged = picture()
    assert torch.equal(picture(), merged) and not torch.equal(merged, plain)


@torch.no_grad()
def test_siglip_is_put_back(tmp_path: Path) -> None:
    model = SiglipModel.from_pretrained(save_tiny_siglip(tmp_path))
    attentions = [module for module in model.modules() if isinstance(module, SiglipAttention)]
    before = [vars(module).copy() for module in attentions]
    enable_flash_attention(model, kernels=["sdpa"])
    assert {module.kernels for module in attentions} == {("scaled_dot_product_attention",)}
    assert {module.config._attn_implementation for module in attentions} == {"diffusers_npu"}
    disable_flash_attention(model)
    assert [vars(module).keys() for module in attentions] == [each.keys() for each in before]
    assert {module.config._attn_implementation for module in attentions} == {"sdpa"}


def test_compiled_text_encoder_and_residual_block_are_one_graph(tiny_sd: StableDiffusionPipeline) -> None:
    enable_flash_attention(tiny_sd)
    block = tiny_sd.vae.decoder.mid_block
    latents = torch.randn(1, 16, 8, 8)
    cases = [(tiny_sd.text_encoder, (IDS,), lambda out: out.last_hidden_state), (block, (latents,), lambda out: out)]
    for model, inputs, result in cases:
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
        for _ in range(2):
            assert torch.equal(result(compiled(*inputs)), result(model(*inputs)))
        assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    "kwargs",
    [
        {"temb_channels": 12},
        {"temb_channels": None, "out_channels": 24},
        {"temb_channels": 12, "skip_time_act": True, "output_scale_factor": 2.0},
        {"temb_channels": 12, "groups_out": 2},
        {"temb_channels": None, "time_embedding_norm": "group"},
    ],
    ids=str,
)
@torch.no_grad()
def test_fused_residual_block_is_bit_identical_on_the_cpu(kwargs: dict) -> None:
    from processors.models import resnet

    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=16, groups=4, **kwargs).eval()
    image = torch.randn(2, 16, 6, 6)
    temb = torch.randn(2, 12) if kwargs["temb_channels"] else None
    expected = block(image, temb)
    resnet.fuse(block)
    assert type(block) is FusedResnetBlock2D and torch.equal(block(image, temb), expected)
    resnet.unfuse(block)
    assert type(block) is ResnetBlock2D


@pytest.mark.parametrize(
    "kwargs",
    [{"time_embedding_norm": "scale_shift"}, {"up": True}, {"down": True}, {"non_linearity": "mish"}],
    ids=str,
)
def test_residual_blocks_that_are_not_norm_then_silu_stay(kwargs: dict) -> None:
    from processors.models import resnet

    block = ResnetBlock2D(in_channels=16, groups=4, **kwargs)
    resnet.fuse(block)
    assert type(block) is ResnetBlock2D
