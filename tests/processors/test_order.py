"""Our switches before, after and between diffusers' own, which replace processors wholesale."""

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers.models.attention_processor import AttnProcessor2_0 as DefaultAttnProcessor
from peft import LoraConfig

from processors import (
    AttnProcessor2_0,
    AttnProcessor2_0Tome,
    disable_flash_attention,
    disable_token_merging,
    enable_flash_attention,
    enable_token_merging,
)
from tests.tiny_models import CROSS_ATTENTION_DIM

RATIO = 0.25  # not the default, which a new processor would have
OURS = (AttnProcessor2_0, AttnProcessor2_0Tome)


def enable(pipe: StableDiffusionPipeline) -> None:
    enable_flash_attention(pipe)
    enable_token_merging(pipe, ratio=RATIO)


def disable(pipe: StableDiffusionPipeline) -> None:
    disable_flash_attention(pipe)
    disable_token_merging(pipe)


@torch.no_grad()
def noise(pipe: StableDiffusionPipeline, **kwargs: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 77, CROSS_ATTENTION_DIM, generator=generator)
    return pipe.unet(latents, torch.tensor(10), text, **kwargs).sample


@torch.no_grad()
def picture(pipe: StableDiffusionPipeline) -> torch.Tensor:
    return pipe.vae.decode(torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))).sample


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the rounding of another order of summation."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def types(pipe: StableDiffusionPipeline) -> set[type]:
    return {type(processor) for processor in pipe.unet.attn_processors.values()}


def merging(pipe: StableDiffusionPipeline) -> list[float]:
    return [p.ratio for p in pipe.unet.attn_processors.values() if isinstance(p, AttnProcessor2_0Tome)]


def assert_nothing_of_ours_is_left(pipe: StableDiffusionPipeline) -> None:
    for model in (pipe.unet, pipe.vae):
        for module in model.modules():
            if isinstance(module, Attention):
                assert type(module) is Attention and not isinstance(module.processor, OURS)
                assert "switches" not in vars(module)


SWITCHES: dict[str, Callable[[StableDiffusionPipeline], None]] = {
    "flash": enable_flash_attention,
    "merge": lambda pipe: enable_token_merging(pipe, ratio=RATIO) and None,
    "fuse": lambda pipe: pipe.fuse_qkv_projections(),
}


@pytest.mark.parametrize("order", list(itertools.permutations(SWITCHES)), ids=" ".join)
def test_fused_projections_keep_both_switches_in_any_order(tiny_sd: StableDiffusionPipeline, order) -> None:
    plain, plain_picture = noise(tiny_sd), picture(tiny_sd)
    enable(tiny_sd)
    merged = noise(tiny_sd)
    disable(tiny_sd)
    for name in order:
        SWITCHES[name](tiny_sd)
    assert types(tiny_sd) == set(OURS) and merging(tiny_sd) == [RATIO] * 4
    close(noise(tiny_sd), merged)
    close(picture(tiny_sd), plain_picture)
    tiny_sd.unfuse_qkv_projections()
    assert types(tiny_sd) == set(OURS) and merging(tiny_sd) == [RATIO] * 4
    close(noise(tiny_sd), merged)
    enable_token_merging(tiny_sd, ratio=0.5)  # the switches still know the processors that they replaced
    enable(tiny_sd)
    assert types(tiny_sd) == set(OURS) and merging(tiny_sd) == [RATIO] * 4
    disable(tiny_sd)
    assert_nothing_of_ours_is_left(tiny_sd)
    close(noise(tiny_sd), plain)


def test_fused_projections_are_what_runs_but_for_lora_which_they_lack(tiny_sd: StableDiffusionPipeline) -> None:
    enable(tiny_sd)
    tiny_sd.fuse_qkv_projections()
    calls: list[str] = []
    for name, module in tiny_sd.unet.named_modules():
        if name.endswith(("to_qkv", "to_kv", "to_k", "to_v")):
            module.register_forward_hook(lambda *_, name=name: calls.append(name.rsplit(".", 1)[1]))
    noise(tiny_sd)
    assert set(calls) == {"to_qkv", "to_kv"}
    calls.clear()
    plain = noise(tiny_sd)
    tiny_sd.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    calls.clear()
    with_lora = noise(tiny_sd)
    assert not {"to_qkv", "to_kv"} & set(calls)
    assert (with_lora - plain).abs().max() > 1e-3


def test_disabling_while_fused_and_unfusing_later_brings_nothing_back(tiny_sd: StableDiffusionPipeline) -> None:
    plain = noise(tiny_sd)
    enable(tiny_sd)
    tiny_sd.fuse_qkv_projections()
    disable(tiny_sd)
    assert_nothing_of_ours_is_left(tiny_sd)
    assert types(tiny_sd) == {FusedAttnProcessor2_0}
    close(noise(tiny_sd), plain)
    tiny_sd.unfuse_qkv_projections()
    assert_nothing_of_ours_is_left(tiny_sd)
    close(noise(tiny_sd), plain)


def test_disabling_one_switch_while_fused_leaves_the_other(tiny_sd: StableDiffusionPipeline) -> None:
    enable_token_merging(tiny_sd, ratio=RATIO)
    merged = noise(tiny_sd)
    enable_flash_attention(tiny_sd)
    tiny_sd.fuse_qkv_projections()
    disable_flash_attention(tiny_sd)
    close(noise(tiny_sd), merged)
    tiny_sd.unfuse_qkv_projections()
    assert merging(tiny_sd) == [RATIO] * 4 and AttnProcessor2_0 not in types(tiny_sd)
    close(noise(tiny_sd), merged)


def test_attention_slicing_takes_over_with_a_warning_and_both_switches_come_back_after_it(tiny_sd) -> None:
    tiny_sd.enable_attention_slicing()
    sliced = noise(tiny_sd)
    tiny_sd.disable_attention_slicing()
    enable(tiny_sd)
    merged = noise(tiny_sd)
    with pytest.warns(UserWarning, match="SlicedAttnProcessor computes an attention from now on: neither the kernels"):
        tiny_sd.enable_attention_slicing()
    assert types(tiny_sd) == {SlicedAttnProcessor}
    assert torch.equal(noise(tiny_sd), sliced)
    tiny_sd.disable_attention_slicing()
    assert types(tiny_sd) == set(OURS) and merging(tiny_sd) == [RATIO] * 4
    assert torch.equal(noise(tiny_sd), merged)


def test_disabling_leaves_sliced_attention_and_nothing_comes_back(tiny_sd: StableDiffusionPipeline) -> None:
    enable(tiny_sd)
    with pytest.warns(UserWarning, match="SlicedAttnProcessor"):
        tiny_sd.enable_attention_slicing()
    disable(tiny_sd)
    assert types(tiny_sd) == {SlicedAttnProcessor}
    tiny_sd.disable_attention_slicing()
    assert_nothing_of_ours_is_left(tiny_sd)
    assert types(tiny_sd) == {DefaultAttnProcessor}


def test_switches_on_a_sliced_unet_say_that_they_leave_it(tiny_sd: StableDiffusionPipeline, caplog) -> None:
    tiny_sd.enable_attention_slicing()
    report = enable_flash_attention(tiny_sd)
    assert "not covered: 32 attentions (SlicedAttnProcessor)" in report["unet"]
    assert "as they are: SlicedAttnProcessor (of unet)" in caplog.text
    with pytest.raises(ValueError, match="found SlicedAttnProcessor"):
        enable_token_merging(tiny_sd)


def ip_adapter(pipe: StableDiffusionPipeline) -> dict[str, dict[str, torch.Tensor]]:
    """A state dict of random weights as IP-Adapter files hold it: one image embedding of 8 numbers, 4 tokens."""
    generator = torch.Generator().manual_seed(0)
    keys: dict[str, torch.Tensor] = {}
    for index, name in enumerate(pipe.unet.attn_processors):
        if name.endswith("attn2.processor"):
            width = pipe.unet.get_submodule(name.removesuffix(".processor")).inner_dim
            for part in ("to_k_ip", "to_v_ip"):
                keys[f"{index}.{part}.weight"] = torch.randn(width, CROSS_ATTENTION_DIM, generator=generator)
    proj = torch.randn(4 * CROSS_ATTENTION_DIM, 8, generator=generator)
    norm = {"norm.weight": torch.ones(CROSS_ATTENTION_DIM), "norm.bias": torch.zeros(CROSS_ATTENTION_DIM)}
    return {"image_proj": {"proj.weight": proj, "proj.bias": torch.zeros(len(proj)), **norm}, "ip_adapter": keys}


IMAGE = {"added_cond_kwargs": {"image_embeds": [torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(3))]}}


def test_an_ip_adapter_may_come_and_go_before_and_after_both_switches(tiny_sd: StableDiffusionPipeline) -> None:
    adapter = ip_adapter(tiny_sd)
    tiny_sd.unet._load_ip_adapter_weights([adapter])
    enable(tiny_sd)
    expected = noise(tiny_sd, **IMAGE)
    disable(tiny_sd)
    assert_nothing_of_ours_is_left(tiny_sd)
    tiny_sd.unload_ip_adapter()

    enable(tiny_sd)
    merged = noise(tiny_sd)
    with pytest.warns(UserWarning, match="IPAdapterAttnProcessor2_0 computes an attention from now on"):
        tiny_sd.unet._load_ip_adapter_weights([adapter])
    assert types(tiny_sd) == {IPAdapterAttnProcessor2_0, *OURS} and merging(tiny_sd) == [RATIO] * 4
    actual = noise(tiny_sd, **IMAGE)
    assert torch.equal(actual, expected) and not torch.equal(actual, merged)
    tiny_sd.unload_ip_adapter()
    assert types(tiny_sd) == set(OURS) and merging(tiny_sd) == [RATIO] * 4
    assert torch.equal(noise(tiny_sd), merged)
    disable(tiny_sd)
    assert types(tiny_sd) == {DefaultAttnProcessor}
    assert_nothing_of_ours_is_left(tiny_sd)


class Custom(DefaultAttnProcessor):
    """A user's processor, as for xformers or to record attention."""


@pytest.mark.parametrize("processor", [Custom(), AttnProcessor()], ids=lambda processor: type(processor).__name__)
def test_a_users_processor_takes_over_stays_when_disabled_and_gives_way_to_the_default(tiny_sd, processor) -> None:
    tiny_sd.unet.set_attn_processor(processor)
    expected = noise(tiny_sd)
    tiny_sd.unet.set_attn_processor(DefaultAttnProcessor())
    enable(tiny_sd)
    merged = noise(tiny_sd)
    with pytest.warns(UserWarning, match=f"{type(processor).__name__} computes an attention from now on"):
        tiny_sd.unet.set_attn_processor(processor)
    assert torch.equal(noise(tiny_sd), expected)
    tiny_sd.unet.set_attn_processor(DefaultAttnProcessor())
    assert torch.equal(noise(tiny_sd), merged) and merging(tiny_sd) == [RATIO] * 4
    with pytest.warns(UserWarning):
        tiny_sd.unet.set_attn_processor(processor)
    disable(tiny_sd)
    assert set(map(id, tiny_sd.unet.attn_processors.values())) == {id(processor)}
    tiny_sd.unet.set_attn_processor(DefaultAttnProcessor())
    assert_nothing_of_ours_is_left(tiny_sd)


def test_one_warning_for_all_modules_that_a_processor_is_set_on(tiny_sd: StableDiffusionPipeline) -> None:
    enable(tiny_sd)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        tiny_sd.unet.set_attn_processor(Custom())
    assert len([w for w in caught if "Custom computes an attention" in str(w.message)]) == 1


def test_processors_that_a_user_kept_and_sets_again_follow_the_switches_of_now(tiny_sd) -> None:
    enable(tiny_sd)
    kept = dict(tiny_sd.unet.attn_processors)
    enable_token_merging(tiny_sd, ratio=0.5)
    tiny_sd.unet.set_attn_processor(dict(kept))
    assert merging(tiny_sd) == [0.5] * 4
    disable(tiny_sd)
    tiny_sd.unet.set_attn_processor(dict(kept))
    disable(tiny_sd)
    assert_nothing_of_ours_is_left(tiny_sd)


def test_default_processors_are_refused_with_what_to_do_while_a_switch_is_on(tiny_sd) -> None:
    enable(tiny_sd)
    with pytest.raises(ValueError, match=r"disable_(flash_attention|token_merging) takes it away"):
        tiny_sd.unet.set_default_attn_processor()
    with pytest.raises(ValueError, match="disable_flash_attention takes it away"):
        tiny_sd.vae.set_default_attn_processor()
    disable(tiny_sd)
    tiny_sd.unet.set_default_attn_processor()
    assert types(tiny_sd) == {AttnProcessor}


def test_a_subclass_of_attention_is_left_what_it_is(tiny_sd: StableDiffusionPipeline) -> None:
    class Users(Attention):
        pass

    attn = tiny_sd.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attn.__class__ = Users
    report = enable_flash_attention(tiny_sd)
    assert "not covered: 1 attention (AttnProcessor2_0)" in report["unet"]
    enable_token_merging(tiny_sd)
    disable(tiny_sd)
    assert type(attn) is Users and type(attn.processor) is DefaultAttnProcessor


def set_backend(pipe: StableDiffusionPipeline) -> None:
    pipe.unet.set_attention_backend("native")


def add_lora(pipe: StableDiffusionPipeline) -> None:
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False))


def fuse_lora(pipe: StableDiffusionPipeline) -> None:
    add_lora(pipe)
    pipe.unet.fuse_lora()


def offload(pipe: StableDiffusionPipeline) -> None:
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))  # hooks on each layer, as sequential offload has them


@pytest.mark.parametrize(
    "other",
    [
        set_backend,
        add_lora,
        fuse_lora,
        lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
        offload,
        lambda pipe: pipe.unet.enable_gradient_checkpointing(),
    ],
    ids=["attention backend", "LoRA", "fused LoRA", "FreeU", "offload", "checkpointing"],
)
def test_what_touches_no_processor_is_the_same_before_and_after_ours(
    tiny_sd_dir: Path, other: Callable[[StableDiffusionPipeline], None]
) -> None:
    def fresh() -> StableDiffusionPipeline:
        return StableDiffusionPipeline.from_pretrained(tiny_sd_dir, dtype=torch.float32)

    alone, before, after = fresh(), fresh(), fresh()
    other(alone)
    other(before)
    enable(before)
    enable(after)
    other(after)
    assert torch.equal(noise(before), noise(after))
    for pipe in (before, after):
        disable_token_merging(pipe)
        assert torch.equal(noise(pipe), noise(alone))


def test_lora_that_is_loaded_fused_and_unloaded_under_the_switches_leaves_them_alone(tiny_sd) -> None:
    enable(tiny_sd)
    merged = noise(tiny_sd)
    add_lora(tiny_sd)
    with_lora = noise(tiny_sd)
    tiny_sd.unet.fuse_lora()
    close(noise(tiny_sd), with_lora)
    tiny_sd.unet.unfuse_lora()
    tiny_sd.unet.unload_lora()
    close(noise(tiny_sd), merged)
    assert types(tiny_sd) == set(OURS) and (with_lora - merged).abs().max() > 1e-3
