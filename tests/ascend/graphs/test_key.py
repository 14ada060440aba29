"""What the name of a compiled graph depends on, and what not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ascend.graphs import key
from ascend.graphs.key import ambient, describe, kind_of
from processors import enable_flash_attention, enable_token_merging
from tests.tiny_transformers import make_transformer


def test_the_same_module_loaded_again_is_described_the_same(
    tiny_sd: StableDiffusionPipeline, tiny_sd_dir: str
) -> None:
    again = StableDiffusionPipeline.from_pretrained(tiny_sd_dir)
    for name in ("text_encoder", "unet", "vae"):
        assert describe(getattr(tiny_sd, name)) == describe(getattr(again, name))


def test_the_choice_of_kernels_of_a_transformer_is_part_of_its_description() -> None:
    """It lies deep: in the arguments of the backend of a processor."""
    model = make_transformer(SD3Transformer2DModel)
    seen = {describe(model)}
    for kernels in (None, ["sliced"], ["sdpa"], ["sdpa", "sliced"]):
        enable_flash_attention(model, kernels=kernels)
        seen.add(describe(model))
    assert len(seen) == 5


def test_what_a_function_closes_over_is_part_of_a_description() -> None:
    """Blocks that differ in such a value alone would share a graph."""

    def described(scale: object) -> str:
        model = torch.nn.Linear(2, 2)
        model.function = lambda x: x * scale
        return describe(model)

    def defaulted(scale: object) -> str:
        model = torch.nn.Linear(2, 2)
        model.function, model.scale = lambda x, by=scale: x * by, np.float32(scale)
        return describe(model)

    for describe_with in (described, defaulted):
        assert describe_with(1.0) == describe_with(1.0) != describe_with(2.0)


def test_a_model_in_another_folder_is_described_the_same(tiny_sd: StableDiffusionPipeline) -> None:
    before = describe(tiny_sd.text_encoder)
    tiny_sd.text_encoder.config._name_or_path = "/somewhere/else"
    assert describe(tiny_sd.text_encoder) == before


def scale_attention(pipe: StableDiffusionPipeline) -> None:
    pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor.scale = 0.5


UNET_CHANGES: dict[str, Callable[[StableDiffusionPipeline], object]] = {
    "kernels": enable_flash_attention,
    "merging": enable_token_merging,
    "another ratio": partial(enable_token_merging, ratio=0.25),
    "a dtype": lambda pipe: pipe.unet.to(torch.float16),
    "a memory format": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
    "an adapter": lambda pipe: pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"])),
    "freeU": lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "fused projections": lambda pipe: pipe.fuse_qkv_projections(),
    "a processor's setting": scale_attention,
    "training": lambda pipe: pipe.unet.train(),
}


@pytest.mark.parametrize("change", UNET_CHANGES)
def test_the_description_depends_on(tiny_sd: StableDiffusionPipeline, change: str) -> None:
    before = describe(tiny_sd.unet)
    UNET_CHANGES[change](tiny_sd)
    assert describe(tiny_sd.unet) != before


def test_the_description_depends_on_the_activation_and_the_registered_attention(
    tiny_sd: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {describe(tiny_sd.text_encoder)}
    mlp = tiny_sd.text_encoder.encoder.layers[0].mlp
    mlp.activation_fn.act = partial(F.gelu, approximate="tanh")  # the same class, another function
    seen.add(describe(tiny_sd.text_encoder))
    mlp.activation_fn = ACT2FN["quick_gelu"]
    seen.add(describe(tiny_sd.text_encoder))
    enable_flash_attention(tiny_sd)
    seen.add(describe(tiny_sd.text_encoder))
    assert len(seen) == 4


def test_the_code_of_a_registered_attention_is_part_of_the_key(
    tiny_sd: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path_factory.mktemp("code") / "their_attention.py"
    monkeypatch.syspath_prepend(source.parent)
    source.write_text("def attention(*args, **kwargs): ...\n")
    import their_attention

    ALL_ATTENTION_FUNCTIONS.register("theirs", their_attention.attention)
    monkeypatch.setattr(tiny_sd.text_encoder.config, "_attn_implementation_internal", "theirs")
    before = describe(tiny_sd.text_encoder)
    source.write_text("def attention(*args, **kwargs): return 1\n")
    key.digest_of.cache_clear()  # as a new process has it
    assert describe(tiny_sd.text_encoder) != before


def test_our_own_code_and_the_versions_are_part_of_the_key(
    tiny_sd: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = {file for package in key.OUR_PACKAGES for file in package.rglob("*.py")}
    assert ours <= key.source_files(tiny_sd.text_encoder)
    assert any(file.name == "kernels.py" or file.parent.name == "kernels" for file in ours)
    before = describe(tiny_sd.unet)
    monkeypatch.setattr(key, "platform", lambda device: "another CANN")
    assert describe(tiny_sd.unet) != before


def test_the_settings_of_the_process_are_part_of_a_kind_of_call() -> None:
    seen = {ambient("cpu")}
    with torch.autocast("cpu", torch.bfloat16):
        seen.add(ambient("cpu"))
    with torch.autocast("cpu", torch.float16):
        seen.add(ambient("cpu"))
    with torch.inference_mode():
        seen.add(ambient("cpu"))
    torch.use_deterministic_algorithms(True)
    try:
        seen.add(ambient("cpu"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(seen) == 5


def test_arguments_are_of_one_kind_where_a_graph_may_serve_both() -> None:
    assert kind_of(torch.zeros(2, 3)) == kind_of(torch.ones(2, 3))
    kinds = [torch.ones(2, 3), torch.ones(3, 2).t(), torch.ones(2, 3).half(), 1, 1.0, True, None, "1"]
    assert len({str(kind_of(leaf)) for leaf in kinds}) == len(kinds)
    with pytest.raises(TypeError, match="not AttnProcessor2_0"):
        kind_of(AttnProcessor2_0())
