"""`fuse_qkv_projections` keeps what takes fused projections, and undoing it leaves nothing behind."""

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0
from peft import LoraConfig


class Fusing(FusedAttnProcessor2_0):
    """A processor of a package, which reads fused projections where there are any."""

    takes_fused_projections = True

    def __call__(self, attn: Attention, *args: Any, **kwargs: Any) -> torch.Tensor:
        if attn.fused_projections:
            return super().__call__(attn, *args, **kwargs)
        return AttnProcessor2_0()(attn, *args, **kwargs)


def draw(pipe: StableDiffusionPipeline) -> torch.Tensor:
    size = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    return pipe("a red circle", generator=torch.Generator().manual_seed(0), **size).images


def types(pipe: StableDiffusionPipeline) -> set[type]:
    return {type(processor) for model in (pipe.unet, pipe.vae) for processor in model.attn_processors.values()}


def test_a_processor_that_takes_fused_projections_is_kept(tiny_sd: StableDiffusionPipeline) -> None:
    plain = draw(tiny_sd)
    tiny_sd.unet.set_attn_processor(Fusing())
    tiny_sd.vae.set_attn_processor(Fusing())
    tiny_sd.fuse_qkv_projections()
    assert types(tiny_sd) == {Fusing}
    torch.testing.assert_close(draw(tiny_sd), plain, rtol=1e-4, atol=1e-5)  # one matrix product instead of three
    tiny_sd.unfuse_qkv_projections()
    assert types(tiny_sd) == {Fusing}
    assert torch.equal(draw(tiny_sd), plain)


def test_undoing_the_fusion_leaves_no_copy_of_the_weights(tiny_sd: StableDiffusionPipeline) -> None:
    names, plain = set(tiny_sd.unet.state_dict()), draw(tiny_sd)
    for _ in range(2):
        tiny_sd.fuse_qkv_projections()
    assert types(tiny_sd) == {FusedAttnProcessor2_0}
    tiny_sd.unfuse_qkv_projections()
    assert set(tiny_sd.unet.state_dict()) == names
    assert not any(module.fused_projections for module in tiny_sd.unet.modules() if isinstance(module, Attention))
    assert torch.equal(draw(tiny_sd), plain)


def test_processors_that_were_set_after_the_fusion_outlive_it(tiny_sd: StableDiffusionPipeline) -> None:
    tiny_sd.fuse_qkv_projections()
    chosen = tiny_sd.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    chosen.set_processor(AttnProcessor())
    tiny_sd.unfuse_qkv_projections()
    assert type(chosen.processor) is AttnProcessor
    assert types(tiny_sd) == {AttnProcessor, AttnProcessor2_0}


def test_a_lora_that_fused_projections_would_leave_out_is_an_error(tiny_sd: StableDiffusionPipeline) -> None:
    tiny_sd.unet.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k"]), "style")
    with pytest.raises(ValueError, match="would leave out the loaded LoRA"):
        tiny_sd.fuse_qkv_projections()
    tiny_sd.unet.fuse_lora()
    merged = draw(tiny_sd)
    tiny_sd.fuse_qkv_projections()
    torch.testing.assert_close(draw(tiny_sd), merged, rtol=1e-4, atol=1e-5)


def test_a_lora_that_comes_after_the_fusion_is_not_left_out_silently(tiny_sd: StableDiffusionPipeline) -> None:
    tiny_sd.fuse_qkv_projections()
    tiny_sd.unet.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k"]), "style")
    with pytest.raises(ValueError, match="would leave out the loaded LoRA"):
        draw(tiny_sd)
    unet = tiny_sd.unet
    for change in (unet.fuse_lora, unet.unfuse_lora, unet.enable_lora, unet.disable_lora):
        with pytest.raises(ValueError, match="would not change with the LoRA"):
            change()
    tiny_sd.unfuse_qkv_projections()
    with_lora = draw(tiny_sd)
    tiny_sd.unet.fuse_lora()
    tiny_sd.fuse_qkv_projections()
    torch.testing.assert_close(draw(tiny_sd), with_lora, rtol=1e-4, atol=1e-5)


def test_a_lora_that_is_switched_off_is_nothing_that_fused_projections_leave_out(
    tiny_sd: StableDiffusionPipeline,
) -> None:
    plain = draw(tiny_sd)
    tiny_sd.unet.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k"]), "style")
    tiny_sd.unet.disable_lora()
    tiny_sd.fuse_qkv_projections()
    torch.testing.assert_close(draw(tiny_sd), plain, rtol=1e-4, atol=1e-5)
    tiny_sd.unfuse_qkv_projections()
    tiny_sd.unet.enable_lora()
    assert (draw(tiny_sd) - plain).abs().max() > 1e-3
