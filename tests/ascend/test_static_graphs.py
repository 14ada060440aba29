"""What the name of a compiled graph's directory depends on."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from ascend import static_graphs
from processors import enable_flash_attention, enable_token_merging


@pytest.fixture(autouse=True)
def without_an_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_graphs, "_platform", lambda: "a chip")
    monkeypatch.setattr(static_graphs, "_format", lambda tensor: 2)


def test_the_description_is_the_same_for_the_same_module_loaded_again(
    tiny_sd: StableDiffusionPipeline, tiny_sd_dir: str
) -> None:
    again = StableDiffusionPipeline.from_pretrained(tiny_sd_dir)
    for name in ("text_encoder", "unet", "vae"):
        assert static_graphs.describe(getattr(tiny_sd, name)) == static_graphs.describe(getattr(again, name))


def test_the_description_depends_on_processors_token_merging_formats_and_dtypes(
    tiny_sd: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {static_graphs.describe(tiny_sd.unet)}
    enable_flash_attention(tiny_sd)
    seen.add(static_graphs.describe(tiny_sd.unet))
    for ratio in (0.5, 0.25):
        enable_token_merging(tiny_sd, ratio=ratio)
        seen.add(static_graphs.describe(tiny_sd.unet))
    tiny_sd.unet.to(torch.float16)
    seen.add(static_graphs.describe(tiny_sd.unet))
    monkeypatch.setattr(static_graphs, "_format", lambda tensor: 29)
    seen.add(static_graphs.describe(tiny_sd.unet))
    assert len(seen) == 6


def test_a_result_with_named_fields_is_made_again(tiny_sd: StableDiffusionPipeline) -> None:
    with torch.no_grad():
        expected = tiny_sd.text_encoder(torch.ones(1, 77, dtype=torch.int64))
    fields = tuple(expected.keys())
    restored = static_graphs._restore(
        tuple(expected.values()), fields, type(expected).__module__, type(expected).__name__
    )
    assert type(restored) is type(expected)
    assert restored.last_hidden_state is expected.last_hidden_state
