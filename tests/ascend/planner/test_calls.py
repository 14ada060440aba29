"""That the dry runs of known models run, and what they depend on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    HiDreamImageEditingPipeline,
    HiDreamImageTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.embeddings import IPAdapterFullImageProjection
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
)

from ascend.device.stand_in import device_for, standing_for
from ascend.planner import MemoryPlan, memory_plan, plan_memory
from ascend.planner.activations import peak_of, record_call
from ascend.planner.activity import FROM_DISK, Part
from ascend.planner.calls import Request, as_called, calls_of, usual_request
from ascend.planner.memory_plan import part_of
from ascend.planner.models import to_meta
from ascend.streaming import find_blocks
from processors import disable_fused_kernels, enable_fused_kernels
from processors.switches import uses_fused_kernels
from tests.processors.test_order import ip_adapter
from tests.tiny_hidream import make_components, make_transformer
from tests.tiny_models import CROSS_ATTENTION_DIM
from tests.tiny_pipelines import make_pipeline, tiny_xl_unet

CHANNELS = {"block_out_channels": (32, 64), "layers_per_block": 1}
VAE = {
    "block_out_channels": (8, 8, 8, 8),
    "norm_num_groups": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


def hidream_models(latent_channels: int = 16) -> dict[str, nn.Module]:
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    return {
        "text_encoder": CLIPTextModelWithProjection(CLIPTextConfig(**small, projection_dim=32)),
        "text_encoder_3": T5EncoderModel(T5Config(d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2)),
        "text_encoder_4": LlamaForCausalLM(LlamaConfig(**small)),
        "transformer": HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=latent_channels,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=32,
            num_attention_heads=2,
            caption_channels=[32, 32],
            text_emb_dim=64,
            axes_dims_rope=(16, 8, 8),
            max_resolution=(32, 32),
            llama_layers=[0, 1],
        ),
        "vae": AutoencoderKL(**VAE, latent_channels=latent_channels),
    }


def controlnet_models() -> dict[str, nn.Module]:
    shape = CHANNELS | {"cross_attention_dim": 32, "attention_head_dim": 8}
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return {
        "controlnet": ControlNetModel(**shape, down_block_types=down, conditioning_embedding_out_channels=(8,) * 4),
        "unet": UNet2DConditionModel(**shape, down_block_types=down, up_block_types=up),
        "vae": AutoencoderKL(**VAE),
    }


@pytest.mark.parametrize("make", [hidream_models, controlnet_models])
def test_every_model_is_known_and_has_a_peak(make: Callable[[], dict[str, nn.Module]]) -> None:
    with torch.device("meta"):
        models = make()
    for model in models.values():
        model.eval().requires_grad_(False)
    parts = {name: part_of(name, models, Request(128, 64, image=True), torch.float32, True) for name in models}
    assert not any(part.unknown for part in parts.values())
    assert all(run.peak > 0 for part in parts.values() for run in part.runs)
    assert [run.phase for run in parts["vae"].runs] == ["encode", "decode"]
    assert sum(part.denoises for part in parts.values()) == len(set(parts) & {"transformer", "controlnet", "unet"})


def test_a_vae_that_sdxl_casts_is_planned_as_it_runs() -> None:
    """Encoding is in float32 whatever the VAE is in, decoding where that is float16."""
    models: dict[str, Any] = {"vae": AutoencoderKL(**VAE), "unet": tiny_xl_unet()}

    def casts(dtype: torch.dtype) -> tuple[Part, list[bool]]:
        bare = {name: to_meta(model.to(dtype)) for name, model in models.items()}
        vae = part_of("vae", bare, Request(64, 64, image=True), dtype, True)
        return vae, [run.cast is not None for run in vae.runs]

    half, are_cast = casts(torch.float16)
    assert are_cast == [True, True] and casts(torch.bfloat16)[1] == [True, False]
    single, are_cast = casts(torch.float32)
    assert are_cast == [False, False]
    assert [(run.cast, run.peak) for run in half.runs] == [(single.weights, run.peak) for run in single.runs]
    assert sum(single.weights.tensors) == 2 * sum(half.weights.tensors)
    models["vae"].register_to_config(force_upcast=False)
    assert casts(torch.float16)[1] == [False, False]
    models["vae"].register_to_config(force_upcast=True)
    models["unet"] = controlnet_models()["unet"]  # of another pipeline, which never casts
    assert casts(torch.float16)[1] == [False, False]


def test_images_of_ip_adapters_are_inputs_where_the_adapter_is_known(tiny_sd: StableDiffusionPipeline) -> None:
    def plan() -> MemoryPlan:
        return plan_memory(tiny_sd, torch.device("cpu"), Request(64, 64), torch.float32, limit=2**30)

    plain = plan()
    tiny_sd.unet._load_ip_adapter_weights([ip_adapter(tiny_sd)])
    assert plan().phases["denoise"] > plain.phases["denoise"] and not plan().unknown
    tiny_sd.unet.encoder_hid_proj.image_projection_layers[0] = IPAdapterFullImageProjection(8, CROSS_ATTENTION_DIM)
    assert plan().unknown == {"unet": "what its IP-Adapter's IPAdapterFullImageProjection is called with is not known"}


@pytest.mark.parametrize("name", ["inpainting", "ControlNet", "SDXL image-to-image"])
def test_a_pipeline_s_usual_picture_is_of_its_models_size(name: str) -> None:
    pipe = make_pipeline(name)
    request = usual_request(pipe)
    assert request == Request(128, 128, image=name != "ControlNet")
    plan = plan_memory(pipe, torch.device("cpu"), request, torch.float32, limit=2**30)
    assert not plan.unknown and plan.is_resident


def test_the_image_encoder_of_an_ip_adapter_is_known() -> None:
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    with torch.device("meta"):
        models = controlnet_models() | {"image_encoder": CLIPVisionModelWithProjection(config).eval()}
    part = part_of("image_encoder", models, Request(64, 64), torch.float32, True)
    assert not part.unknown and [run.phase for run in part.runs] == ["encode"] and part.runs[0].peak > 0


def test_without_a_vae_the_size_of_latents_is_not_known() -> None:
    with torch.device("meta"):
        models = controlnet_models()
    del models["vae"]
    part = part_of("unet", models, Request(64, 64), torch.float32, True)
    assert part.unknown == "there is no component named vae, which says how large latents are" and part.denoises


def test_the_residuals_of_a_controlnet_are_inputs_of_the_unet() -> None:
    with torch.device("meta"):
        models = controlnet_models()
    (call,) = calls_of(models["unet"], models, Request(64, 64), torch.float32)
    down = call.inputs["down_block_additional_residuals"]
    assert [tuple(residual.shape[1:]) for residual in down] == [(32, 8, 8), (32, 8, 8), (32, 4, 4), (64, 4, 4)]


def test_a_model_that_draws_is_planned_as_one_that_edits_where_it_gets_an_image() -> None:
    request = Request(256, 128)
    assert as_called("HiDreamImagePipeline", request)[:2] == (1440, 720)
    assert as_called("HiDreamImagePipeline", request._replace(image=True)) == request._replace(image=True)
    models = hidream_models()
    transformer: Any = models["transformer"]
    tokens = transformer.max_seq
    (call,) = calls_of(
        transformer, models | {"vae": AutoencoderKL(**VAE)}, Request(768, 1280, image=True), torch.float16
    )
    assert call.inputs["hidden_states"].shape[-2:] == (96, 320)
    assert transformer.max_seq == 7680 > tokens


def test_experts_get_as_many_rows_as_the_others() -> None:
    """As a run with values has so many rows in all, whichever way its gate sends them."""
    model: Any = hidream_models()["transformer"].eval().requires_grad_(False)
    block = model.single_stream_blocks[0].block.ff_i
    rows: list[int] = []
    for expert in block.experts:
        expert.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    block(torch.randn(2, 50, 64))
    assert sum(rows) == 200
    rows.clear()
    meta = block.to("meta")
    assert peak_of(record_call(meta, {"x": torch.empty(2, 50, 64, device="meta")}, True)) > 0
    assert rows == [50, 50, 50, 50]


def test_a_model_is_planned_as_it_is_prepared() -> None:
    """Upstream runs one expert after the other; stacked ones have all rows at once. The model itself stays."""
    pipe = HiDreamImageEditingPipeline(**make_components())
    request = Request(64, 64, image=True)
    plan = partial(plan_memory, pipe, "cpu", request, torch.float32)
    prepared = plan(
        prepare=lambda model: isinstance(model, HiDreamImageTransformer2DModel) and enable_fused_kernels(model)
    )
    assert not uses_fused_kernels(pipe.transformer)
    enable_fused_kernels(pipe.transformer)
    fused = plan()
    disable_fused_kernels(pipe.transformer)
    assert prepared.peak == fused.peak != plan().peak


def test_what_is_mapped_from_files_is_prepared_as_that() -> None:
    pipe = HiDreamImageEditingPipeline(**make_components())
    mapped: list[bool] = []
    plan_memory(
        pipe,
        "cpu",
        Request(64, 64, image=True),
        torch.float32,
        mode="disk",
        prepare=lambda model: mapped.append(model._hf_hook.is_mapped),  # type: ignore[union-attr]
    )
    assert mapped and all(mapped)


def test_a_plan_that_ends_with_files_is_of_unstacked_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose blocks have other names than those of stacked ones."""
    pipe = HiDreamImageEditingPipeline(**make_components() | {"transformer": make_transformer(head_dim=128)})
    memory = memory_plan.read_memory
    monkeypatch.setattr(memory_plan, "read_memory", lambda device: memory(device) | {"free": 2**20})  # of the host
    monkeypatch.setattr(memory_plan, "LARGEST_BLOCK", 2**20)

    def prepare(model: nn.Module) -> None:
        if isinstance(model, HiDreamImageTransformer2DModel):
            enable_fused_kernels(model)

    plan = partial(plan_memory, pipe, "cpu", Request(64, 64, image=True), torch.float32, prepare=prepare)
    found = plan(limit=plan(mode="disk", limit=2**30).required + 2**23)
    assert found.where("transformer") == FROM_DISK
    names = set(find_blocks(pipe.transformer, 2**20))
    assert any("experts" in name for name in names) and set(found.kept("transformer")) < names


def test_the_meta_device_stands_for_another_while_it_is_planned_for() -> None:
    meta, gpu = torch.device("meta"), torch.device("cuda")
    with standing_for(gpu):
        assert device_for(meta) == gpu and device_for(torch.device("cpu")) == torch.device("cpu")
    assert device_for(meta) == meta
