"""Adapters whose weights are in tiers: pictures are those of diffusers alone, and those not in use take no memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from ascend import AdapterStore, Tier, TieredStore
from ascend.tiers import TierError

MIB = 2**20
SCALES: list[dict[str, float]] = [{"a": 1.0}, {}, {"b": 0.5}, {"a": 0.25, "c": 1.0}, {"c": 1.0}, {"a": 1.0}]


@pytest.fixture
def files(tiny_sd: StableDiffusionPipeline, tmp_path: Path) -> dict[str, Path]:
    """Three adapters: of the UNet, of the UNet with another rank and alpha, and of UNet and text encoder."""
    kinds: dict[str, dict[str, Any]] = {"a": {"r": 4}, "b": {"r": 2, "lora_alpha": 8}, "c": {"r": 4}}
    paths = {}
    for seed, (name, kind) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        config = LoraConfig(target_modules=["to_q", "to_v", "proj_in"], init_lora_weights=False, **kind)
        tiny_sd.unet.add_adapter(config)
        layers: dict[str, Any] = {"unet_lora_layers": get_peft_model_state_dict(tiny_sd.unet)}
        if name == "b":
            about = {
                key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()
            }
            layers["unet_lora_adapter_metadata"] = about
        if name == "c":
            tiny_sd.text_encoder.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
            layers["text_encoder_lora_layers"] = get_peft_model_state_dict(tiny_sd.text_encoder)
        StableDiffusionPipeline.save_lora_weights(tmp_path, weight_name=f"{name}.safetensors", **layers)
        paths[name] = tmp_path / f"{name}.safetensors"
        tiny_sd.unload_lora_weights()
    return paths


def draw(pipe: StableDiffusionPipeline) -> torch.Tensor:
    return pipe(
        "a cat", num_inference_steps=2, height=64, width=64, generator=torch.manual_seed(0), output_type="latent"
    ).images


def expected(pipe: StableDiffusionPipeline, files: Mapping[str, Path], scales: Mapping[str, float]) -> torch.Tensor:
    """Of diffusers alone."""
    for name in scales:
        pipe.load_lora_weights(files[name].parent, weight_name=files[name].name, adapter_name=name)
    if scales:
        pipe.set_adapters(list(scales), list(scales.values()))
    picture = draw(pipe)
    pipe.unload_lora_weights()
    return picture


def bytes_of(pipe: StableDiffusionPipeline) -> int:
    modules = (pipe.unet, pipe.text_encoder)
    return sum(
        parameter.nbytes for module in modules for name, parameter in module.named_parameters() if "lora_" in name
    )


def test_pictures_are_those_of_the_adapters_in_use(
    tiny_sd: StableDiffusionPipeline, files: dict[str, Path], tmp_path: Path
) -> None:
    wanted = [expected(tiny_sd, files, scales) for scales in SCALES]
    assert not torch.equal(wanted[0], wanted[1]) and not torch.equal(wanted[3], wanted[4])
    with TieredStore([Tier("cpu", 8 * 2**10), Tier(tmp_path / "tier", MIB)]) as store:
        adapters = AdapterStore(tiny_sd, store)
        for name, path in files.items():
            adapters.load(name, path)
            assert bytes_of(tiny_sd) == 0
        for scales, picture in zip(SCALES, wanted, strict=True):
            adapters.use(scales)
            assert torch.equal(draw(tiny_sd), picture)
        assert adapters.store.stats()["demotions"] and list((tmp_path / "tier").rglob("*.safetensors"))
        adapters.use({})
        assert bytes_of(tiny_sd) == 0
        for name in files:
            adapters.remove(name)
        assert [tier["tensors"] for tier in store.stats()["tiers"]] == [0, 0]
        assert torch.equal(draw(tiny_sd), wanted[1])
        assert not any("lora_" in name for name, _ in tiny_sd.unet.named_parameters())


def test_what_was_written_to_an_adapter_in_use_is_kept(
    tiny_sd: StableDiffusionPipeline, files: dict[str, Path]
) -> None:
    with TieredStore([Tier("cpu", MIB), Tier("cpu", MIB)]) as store:
        adapters = AdapterStore(tiny_sd, store)
        adapters.load("a", files["a"])
        adapters.use({"a": 1.0})
        with torch.no_grad():
            for name, parameter in tiny_sd.unet.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(2)
        trained = draw(tiny_sd)
        adapters.use({})
        adapters.use({"a": 1.0})
        assert torch.equal(draw(tiny_sd), trained)


def test_adapters_that_the_pipeline_has_are_taken_over(
    tiny_sd: StableDiffusionPipeline, files: dict[str, Path]
) -> None:
    plain, wanted = draw(tiny_sd), expected(tiny_sd, files, {"a": 1.0})
    tiny_sd.load_lora_weights(files["a"].parent, weight_name="a.safetensors", adapter_name="a")
    with TieredStore([Tier("cpu", MIB)]) as store:
        adapters = AdapterStore(tiny_sd, store)
        assert adapters.names() == ["a"] and torch.equal(draw(tiny_sd), plain)
        adapters.prefetch(["a"])
        adapters.use({"a": 1.0})
        assert torch.equal(draw(tiny_sd), wanted)


def test_bad_adapters_leave_all_as_it_was(
    tiny_sd: StableDiffusionPipeline, files: dict[str, Path], tmp_path: Path
) -> None:
    wanted = expected(tiny_sd, files, {"a": 1.0})
    size = sum(tensor.nbytes for tensor in load_file(files["a"]).values())
    other = tmp_path / "other.safetensors"
    save_file({f"transformer.x.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}, other)
    with TieredStore([Tier("cpu", size + 100)]) as store:
        adapters = AdapterStore(tiny_sd, store)
        adapters.load("a", files["a"])
        adapters.use({"a": 1.0})
        with pytest.raises(ValueError, match="there is an adapter 'a' already"):
            adapters.load("a", files["b"])
        with pytest.raises(ValueError, match="there is no adapter 'x'; there are: a"):
            adapters.use({"x": 1.0})
        with pytest.raises(TierError, match="fits in no tier"):
            adapters.load("b", files["b"])
        with pytest.raises(ValueError, match="none of the weights in .*other.safetensors is of a layer of this"):
            adapters.load("other", other)
        assert adapters.names() == ["a"] and torch.equal(draw(tiny_sd), wanted)


def test_a_cast_in_between_changes_no_adapter(tiny_sd: StableDiffusionPipeline, files: dict[str, Path]) -> None:
    wanted = expected(tiny_sd, files, {"a": 1.0})
    with TieredStore([Tier("cpu", MIB)]) as store:
        adapters = AdapterStore(tiny_sd, store)
        adapters.load("a", files["a"])
        adapters.use({"a": 1.0})
        tiny_sd.to(torch.bfloat16)
        adapters.use({})
        adapters.use({"a": 1.0})  # of a model that is of bfloat16 now
        assert {parameter.dtype for parameter in tiny_sd.unet.parameters()} == {torch.bfloat16}
        adapters.use({})
        assert {parameter.dtype for parameter in tiny_sd.unet.parameters()} == {torch.bfloat16}
        assert torch.equal(store.get(store_key(store)), load_file(files["a"])[FIRST].float())
    assert wanted.dtype == torch.float32


FIRST = "unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"


def store_key(store: TieredStore) -> str:
    (key,) = (key for key in store._entries if "down_blocks.0.attentions.0.proj_in.lora_A" in key)
    return key


def test_two_stores_of_adapters_keep_apart(
    tiny_sd: StableDiffusionPipeline, tiny_sd_dir: Path, files: dict[str, Path]
) -> None:
    other = StableDiffusionPipeline.from_pretrained(tiny_sd_dir)
    other.set_progress_bar_config(disable=True)
    wanted = [expected(tiny_sd, files, {name: 1.0}) for name in "ab"]
    with TieredStore([Tier("cpu", MIB)]) as store:
        first, second = AdapterStore(tiny_sd, store), AdapterStore(other, store)
        for adapters, name in ((first, "a"), (second, "b")):
            adapters.load("style", files[name])
            adapters.use({"style": 1.0})
            adapters.use({})
        first.use({"style": 1.0})
        second.use({"style": 1.0})
        assert torch.equal(draw(tiny_sd), wanted[0]) and torch.equal(draw(other), wanted[1])
        first.remove("style")
        second.use({})
        second.use({"style": 1.0})
        assert torch.equal(draw(other), wanted[1])
        with pytest.raises(ValueError, match="another AdapterStore has the adapters of this"):
            AdapterStore(StableDiffusionImg2ImgPipeline(**tiny_sd.components), store)
        del first, adapters
        AdapterStore(tiny_sd, store)


def test_a_store_that_is_too_small_takes_nothing_over(
    tiny_sd: StableDiffusionPipeline, files: dict[str, Path]
) -> None:
    for name in "ac":
        tiny_sd.load_lora_weights(files[name].parent, weight_name=files[name].name, adapter_name=name)
    tiny_sd.set_adapters(["a", "c"])
    wanted = draw(tiny_sd)
    size = sum(tensor.nbytes for tensor in load_file(files["a"]).values())
    with TieredStore([Tier("cpu", size + 100)]) as store:
        with pytest.raises(TierError, match="fits in no tier"):
            AdapterStore(tiny_sd, store)
        assert store.stats()["tiers"][0]["tensors"] == 0 and torch.equal(draw(tiny_sd), wanted)


def test_a_file_of_another_shape_leaves_no_layer_behind(
    tiny_sd: StableDiffusionPipeline, files: dict[str, Path], tmp_path: Path
) -> None:
    tensors = load_file(files["a"])
    tensors[FIRST] = tensors[FIRST].repeat(1, 2)
    save_file(tensors, tmp_path / "wrong.safetensors")
    with TieredStore([Tier("cpu", MIB)]) as store:
        adapters = AdapterStore(tiny_sd, store)
        with pytest.raises(RuntimeError, match="size mismatch"):
            adapters.load("wrong", tmp_path / "wrong.safetensors")
        assert not any(hasattr(module, "base_layer") for module in tiny_sd.unet.modules())


def test_scales_and_fused_adapters(tiny_sd: StableDiffusionPipeline, files: dict[str, Path]) -> None:
    with TieredStore([Tier("cpu", MIB)]) as store:
        adapters = AdapterStore(tiny_sd, store)
        adapters.load("a", files["a"])
        for scale in (float("nan"), float("inf"), "1", None):
            with pytest.raises(ValueError, match="scale of adapter 'a' must be a finite number"):
                adapters.use({"a": scale})  # type: ignore[dict-item]
            assert adapters.in_use == {}
        adapters.use({"a": 1.0})
        tiny_sd.fuse_lora()
        with pytest.raises(ValueError, match="unfuse_lora"):
            adapters.use({})
        tiny_sd.unfuse_lora()
        adapters.use({})
