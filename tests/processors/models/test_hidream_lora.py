"""LoRA for HiDream, experts included: peft's numbers on stacked weights, exact restore, and every form of file."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel
from peft import LoraConfig
from safetensors.torch import save_file

from ascend.streaming import stop_streaming, stream_module
from processors import disable_fused_kernels, enable_fused_kernels, load_adapter, quantize_weights
from processors.kernels.experts import dense, grouped
from processors.kernels.low_rank_experts import Factor, LowRank
from processors.models.full_weights import FullWeights
from processors.models.hidream import FusedMoE, StackedLinear
from tests.hidream_adapters import ATTENTION, add_adapter, full_of, low_rank_of, save_original
from tests.processors.models.test_hidream import predict
from tests.tiny_hidream import make_transformer

TOLERANCE = 1e-4  # of predictions up to 20, in float32


@pytest.fixture
def pipe() -> HiDreamImagePipeline:
    """Of which adapters need the transformer alone."""
    parts = [name for name in inspect.signature(HiDreamImagePipeline).parameters if name != "transformer"]
    return HiDreamImagePipeline(**dict.fromkeys(parts), transformer=make_transformer())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """E1-Full's form without whole weights."""
    return save_original(tmp_path / "edit.safetensors", add_adapter(make_transformer()), {})


def stacked(model: HiDreamImageTransformer2DModel) -> HiDreamImageTransformer2DModel:
    enable_fused_kernels(model)
    assert sum(isinstance(module, FusedMoE) for module in model.modules()) == 3
    return model


@pytest.mark.parametrize(
    ("compute", "dtype"), [(grouped, torch.float32), (dense, torch.float32), (dense, torch.float64)]
)
def test_factors_are_those_of_their_experts(compute: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up, down = torch.randn(4, 16, 8, dtype=dtype), torch.randn(4, 8, 8, dtype=dtype)
    x, indices = torch.randn(30, 8, dtype=dtype), torch.stack([torch.randperm(4)[:2] for _ in range(30)])
    shares = torch.rand(30, 2, dtype=dtype)
    # Of different ranks, two of one expert, none of another.
    of_gate_up = [
        Factor(e, torch.randn(r, 8, dtype=dtype), torch.randn(16, r, dtype=dtype)) for e, r in ((0, 2), (3, 4), (3, 1))
    ]
    of_down = [Factor(1, torch.randn(3, 8, dtype=dtype), torch.randn(8, 3, dtype=dtype))]
    found = compute(x, indices, shares, gate_up, down, LowRank(of_gate_up, of_down))
    merged_gate_up, merged_down = gate_up.clone(), down.clone()
    for merged, factors in ((merged_gate_up, of_gate_up), (merged_down, of_down)):
        for factor in factors:
            merged[factor.expert] += factor.b @ factor.a
    expected = compute(x, indices, shares, merged_gate_up, merged_down)
    assert torch.allclose(found, expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-3 * found.std())
    assert not torch.allclose(found, compute(x, indices, shares, gate_up, down), atol=0.1)


@pytest.mark.parametrize("order", ["fused, then loaded", "loaded, then fused", "loaded, fused and unfused"])
def test_an_adapter_on_stacked_experts_is_pefts(pipe: HiDreamImagePipeline, file: Path, order: str) -> None:
    model = pipe.transformer
    plain, expected = predict(model), predict(add_adapter(make_transformer()))
    if order.startswith("fused"):
        stacked(model)
    load_adapter(pipe, file, "edit")
    if not order.startswith("fused"):
        stacked(model)
    if order.endswith("unfused"):
        disable_fused_kernels(model)
        assert torch.equal(predict(model), expected)
    assert torch.allclose(predict(model), expected, atol=TOLERANCE)
    assert not torch.allclose(expected, plain, atol=0.1)


def test_in_float64_the_difference_is_rounding(pipe: HiDreamImagePipeline, file: Path) -> None:
    moe = stacked(pipe.transformer).single_stream_blocks[0].block.ff_i
    load_adapter(pipe, file, "edit")
    pipe.transformer.double()
    plain: Any = copy.deepcopy(pipe.transformer)
    disable_fused_kernels(plain)
    x = torch.randn(2, 37, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = plain.single_stream_blocks[0].block.ff_i(x)
        assert torch.allclose(moe(x), expected, atol=1e-12)
        pipe.disable_lora()
        assert not torch.allclose(moe(x), expected, atol=1e-3)


def test_switched_off_or_unloaded_everything_is_as_before(pipe: HiDreamImagePipeline, tmp_path: Path) -> None:
    model = stacked(pipe.transformer)
    plain, state = predict(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = save_original(tmp_path / "full.safetensors", add_adapter(make_transformer()), full_of(make_transformer()))
    load_adapter(pipe, path, "edit")
    edited = predict(model)
    assert not torch.allclose(edited, plain, atol=0.1)
    pipe.disable_lora()
    assert torch.equal(predict(model), plain)
    pipe.enable_lora()
    assert torch.equal(predict(model), edited)
    pipe.unload_lora_weights()
    assert torch.equal(predict(model), plain)
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], tensor) for name, tensor in state.items())
    assert not any(isinstance(module, FullWeights) for module in model.modules())
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(predict(HiDreamImageTransformer2DModel.from_pretrained(tmp_path / "saved")), plain)


def test_whole_weights_are_in_effect_with_their_adapter(pipe: HiDreamImagePipeline, tmp_path: Path) -> None:
    full = full_of(make_transformer())
    peer = make_transformer()
    peer.load_state_dict(full, strict=False)
    path = save_original(tmp_path / "full.safetensors", add_adapter(peer), full)
    model = stacked(pipe.transformer)
    load_adapter(pipe, path, "edit")
    assert torch.allclose(predict(model), predict(peer), atol=TOLERANCE)
    layer = model.single_stream_blocks[1].block.attn1.q_rms_norm
    tensor = full[f"{ATTENTION}.q_rms_norm.weight"]
    assert torch.equal(layer.weights_of(["edit"])["weight"], tensor)
    pipe.set_adapters(["edit"], [0.25])  # between both
    assert torch.allclose(layer.weights_of(["edit"])["weight"], layer.weight + 0.25 * (tensor - layer.weight))
    pipe.set_adapters(["edit"], [1.0])
    before = layer.weight.clone()
    pipe.fuse_lora()
    assert torch.allclose(predict(model), predict(peer), atol=10 * TOLERANCE)
    pipe.unfuse_lora()
    assert torch.equal(layer.weight, before)


def test_scales_are_pefts(pipe: HiDreamImagePipeline, tmp_path: Path) -> None:
    peer = add_adapter(make_transformer(), "a", seed=1, alpha=2)
    add_adapter(peer, "b", seed=2, alpha=8)
    model = stacked(pipe.transformer)
    for name, seed, alpha in (("a", 1, 2), ("b", 2, 8)):
        one = add_adapter(make_transformer(), "default", seed, alpha)
        one.save_lora_adapter(tmp_path, weight_name=f"{name}.safetensors")
        load_adapter(pipe, tmp_path / f"{name}.safetensors", name)
    for names, scales in ((["a"], [1.0]), (["a", "b"], [0.7, -0.4]), (["b"], [0.5])):
        peer.set_adapters(names, scales)
        pipe.set_adapters(names, scales)
        assert torch.allclose(predict(model), predict(peer), atol=TOLERANCE)
    before = predict(model)
    call = model.forward
    model.forward = lambda **kwargs: call(attention_kwargs={"scale": 0.5}, **kwargs)
    peer.set_adapters(["b"], [0.25])
    assert torch.allclose(predict(model), predict(peer), atol=TOLERANCE)
    model.forward = call
    assert torch.equal(predict(model), before)


@pytest.mark.parametrize("safe", [False, True])
def test_adapters_can_be_merged_into_the_stack(pipe: HiDreamImagePipeline, file: Path, safe: bool) -> None:
    model = stacked(pipe.transformer)
    load_adapter(pipe, file, "edit")
    expected = predict(model)
    pipe.fuse_lora(safe_fusing=safe)
    merged = predict(model)
    assert torch.allclose(merged, expected, atol=10 * TOLERANCE) and not torch.equal(merged, expected)
    disable_fused_kernels(model)
    assert torch.allclose(predict(model), merged, atol=10 * TOLERANCE)
    stacked(model)
    pipe.unfuse_lora()
    assert torch.allclose(predict(model), expected, atol=10 * TOLERANCE)


def test_copies_have_a_stack_of_their_own(pipe: HiDreamImagePipeline) -> None:
    model = stacked(pipe.transformer)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layer = other.single_stream_blocks[0].block.ff_i.experts.get_submodule("2.w3")
        mine = model.single_stream_blocks[0].block.ff_i.experts.get_submodule("2.w3")
        assert isinstance(layer, StackedLinear) and torch.equal(layer.weight, mine.weight)
        before = mine.weight.clone()
        layer.weight.data += 1
        assert torch.equal(mine.weight, before)
        assert not torch.equal(predict(other), predict(model))


def test_adapters_may_come_before_a_stream_or_to_it(pipe: HiDreamImagePipeline, tmp_path: Path) -> None:
    model = stacked(pipe.transformer)
    plain = predict(model)
    path = save_original(tmp_path / "full.safetensors", add_adapter(make_transformer()), full_of(make_transformer()))
    load_adapter(pipe, path, "edit")
    expected = predict(model)
    stream_module(model, torch.device("cpu"))
    assert torch.equal(predict(model), expected)
    pipe.disable_lora()
    assert torch.equal(predict(model), plain)
    pipe.unload_lora_weights()
    assert torch.equal(predict(model), plain)
    load_adapter(pipe, path, "again")
    assert torch.equal(predict(model), expected)
    stop_streaming(model)


def renamed(form: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    bare = {name.replace(".default", ""): tensor for name, tensor in tensors.items()}
    if form == "alpha keys":
        down_up = {
            name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): tensor for name, tensor in bare.items()
        }
        return down_up | {f"{name.split('.lora_')[0]}.alpha": torch.tensor(2.0) for name in bare}
    prefix = {"diffusers": "transformer.", "ComfyUI": "diffusion_model.", "peft": "base_model.model."}[form]
    return {f"{prefix}{name}": tensor for name, tensor in bare.items()}


@pytest.mark.parametrize("form", ["diffusers", "ComfyUI", "peft", "alpha keys"])
def test_files_of_other_programs(pipe: HiDreamImagePipeline, tmp_path: Path, form: str) -> None:
    peer = add_adapter(make_transformer(), alpha=4 if form in ("diffusers", "ComfyUI") else 2)
    save_file(renamed(form, low_rank_of(peer)), tmp_path / "adapter_model.safetensors")
    if form == "peft":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2, "alpha_pattern": {}}))
    load_adapter(pipe, tmp_path / "adapter_model.safetensors", "style")
    assert torch.equal(predict(pipe.transformer), predict(peer))


def test_ranks_and_alphas_of_layers(pipe: HiDreamImagePipeline, tmp_path: Path) -> None:
    peer = make_transformer()
    config = LoraConfig(
        r=4,
        lora_alpha=3,
        target_modules=["to_q", "w2"],
        rank_pattern={"w2": 2},
        alpha_pattern={"to_q": 8},
        use_rslora=True,
        init_lora_weights=False,
    )
    peer.add_adapter(config, "default")
    peer.save_lora_adapter(tmp_path, weight_name="a.safetensors")
    load_adapter(pipe, tmp_path / "a.safetensors", "a")
    stacked(pipe.transformer)
    assert torch.allclose(predict(pipe.transformer), predict(peer), atol=TOLERANCE)


def spoil(kind: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first = next(name for name in tensors if "lora_A" in name)
    if kind == "nothing":
        return {f"unet.{name}": tensor for name, tensor in tensors.items()}
    if kind == "in part":
        pair = (first, first.replace("lora_A", "lora_B"))
        return tensors | {name.replace("stream_blocks.0", "stream_blocks.7"): tensors[name] for name in pair}
    if kind == "unknown whole weight":
        return tensors | {"x_embedder.norm.weight": torch.ones(3)}
    if kind == "whole expert":
        return tensors | {"single_stream_blocks.0.block.ff_i.experts.0.w1.weight": torch.ones(3)}
    if kind == "one matrix":
        return {name: tensor for name, tensor in tensors.items() if name != first}
    if kind == "idle alpha":
        return tensors | {"caption_projection.0.linear.alpha": torch.tensor(1.0)}
    if kind == "other width":
        return tensors | {first: torch.ones(4, 31)}
    if kind == "other whole width":
        return tensors | {f"{ATTENTION}.q_rms_norm.weight": torch.ones(3)}
    return {"x_embedder.proj.bias": torch.ones(32)}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nothing", r"no place for unet\.double_stream_blocks.* more; it has one for 0 others"),
        ("in part", r"no place for double_stream_blocks\.7\.block\.attn1\.to_q; it has one for 65 others"),
        ("unknown whole weight", r"no place for x_embedder\.norm\.weight; it has one for 65 others"),
        ("whole expert", r"no place for single_stream_blocks\.0\.block\.ff_i\.experts\.0\.w1\.weight"),
        ("one matrix", r"one of two matrices only.*double_stream_blocks\.0\.block\.attn1\.to_q"),
        ("idle alpha", r"no matrices for caption_projection\.0\.linear\.alpha"),
        ("other width", r"of another size: double.*\(\(32, 4\) @ \(4, 31\) for \(32, 32\)\)"),
        ("other whole width", r"of another size: .*q_rms_norm\.weight \(\(3,\) for \(32,\)\)"),
        ("no adapter", r"is no LoRA file: .* there is x_embedder\.proj\.bias"),
    ],
)
def test_a_file_that_does_not_fit_is_named_and_changes_nothing(
    pipe: HiDreamImagePipeline, tmp_path: Path, kind: str, message: str
) -> None:
    tensors = low_rank_of(add_adapter(make_transformer()))
    save_file({name: tensor.clone() for name, tensor in spoil(kind, tensors).items()}, tmp_path / "a.safetensors")
    plain = predict(stacked(pipe.transformer))
    with pytest.raises(ValueError, match=message):
        load_adapter(pipe, tmp_path / "a.safetensors", "a")
    assert torch.equal(predict(pipe.transformer), plain) and not pipe.get_list_adapters()


def test_a_whole_weight_and_integers_exclude_each_other(pipe: HiDreamImagePipeline, tmp_path: Path) -> None:
    model = pipe.transformer
    name = "single_stream_blocks.0.block.adaLN_modulation.1.weight"
    path = save_original(
        tmp_path / "a.safetensors", add_adapter(make_transformer()), {name: model.state_dict()[name] * 2}
    )
    load_adapter(pipe, path, "edit")
    assert "1 Linear whose weight an adapter replaces" in quantize_weights(model)["HiDreamImageTransformer2DModel"]
    pipe.unload_lora_weights()
    quantize_weights(model)
    with pytest.raises(ValueError, match=f"no place for {name}"):
        load_adapter(pipe, path, "edit")


def test_what_stacked_experts_cannot_compute_is_an_error(pipe: HiDreamImagePipeline, file: Path) -> None:
    model = stacked(pipe.transformer)
    load_adapter(pipe, file, "edit")
    for name in ("", "an.edit"):
        with pytest.raises(ValueError, match=f"it has no dots, and '{name}' is none"):
            load_adapter(pipe, file, name)
    with pytest.raises(ValueError, match="there is an adapter 'edit' already"):
        load_adapter(pipe, file, "edit")
    pipe.unload_lora_weights()
    model.add_adapter(LoraConfig(r=2, target_modules=["w1"], use_dora=True), "dora")
    with pytest.raises(ValueError, match="adapter 'dora' has a bias.*disable_fused_kernels"):
        predict(model)
    disable_fused_kernels(model)
    predict(model)


def test_what_diffusers_saves_of_an_adapter_is_loaded_again(pipe: HiDreamImagePipeline, tmp_path: Path) -> None:
    """Whole weights, too."""
    model = pipe.transformer
    before = predict(model)
    path = save_original(tmp_path / "full.safetensors", add_adapter(make_transformer()), full_of(make_transformer()))
    load_adapter(pipe, path, "edit")
    expected = predict(model)
    model.save_lora_adapter(tmp_path / "saved", adapter_name="edit")
    model.unload_lora()
    assert torch.equal(predict(model), before)
    load_adapter(pipe, next((tmp_path / "saved").glob("*.safetensors")), "again")
    assert torch.equal(predict(model), expected)
