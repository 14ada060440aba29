"""Static graphs follow the module that they are of: whatever changes, a call gives what the module now computes.

Graphs are traces of torch.jit here, which are made fast and notice no change: what counts is when one is made and when
it goes.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from peft import LoraConfig
from PIL import Image
from torch import nn

from ascend.graphs import compile as graphs
from ascend.graphs.compile import compile_module, compile_pipeline, decompile_pipeline
from ascend.graphs.static import MOST_GRAPHS, Made, StaticGraphs
from ascend.graphs.watch import Watch
from ascend.parallel import Mesh, share_guidance, shared_batch, unshare_guidance
from ascend.parallel.shared_batch import SharedBatch
from ascend.pipelines import PIPELINES
from processors import (
    disable_flash_attention,
    disable_token_merging,
    enable_flash_attention,
    enable_token_merging,
)


class Tracer:
    name = "trace"
    fails = False

    def prepare(self, module: nn.Module, undo: ExitStack) -> None:
        undo.callback(setattr, module, "prepared", getattr(module, "prepared", None))
        module.prepared = True
        if self.fails:
            raise RuntimeError("no compiler")

    def make(self, call: types.MethodType, digest: str, tensors: list[torch.Tensor]) -> Made:
        results = call(*tensors)
        _, structure = pytree.tree_flatten(results[0])

        def compute(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(pytree.tree_leaves(call(*tensors)[0]))

        trace = torch.jit.trace(compute, tuple(tensors), check_trace=False)
        return Made(
            lambda *tensors: (pytree.tree_unflatten(trace(*tensors), structure), *results[1:]), results, is_new=True
        )


@pytest.fixture(autouse=True)
def traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "make_backend", lambda *_: Tracer())
    parts = PIPELINES["StableDiffusionPipeline"]
    everything = parts._replace(each_step=parts.each_step + parts.each_picture, each_picture=())
    monkeypatch.setitem(PIPELINES, "StableDiffusionPipeline", everything)


def draw(pipe: StableDiffusionPipeline, width: int = 64, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "output_type": "latent"} | options
    return pipe("a red circle", height=64, width=width, generator=generator, **options).images


def add_adapter(pipe: StableDiffusionPipeline) -> None:
    torch.manual_seed(1)
    pipe.unet.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q"]))


def draw_eagerly(pipe: StableDiffusionPipeline) -> torch.Tensor:
    """Past the graphs."""
    graphs = vars(pipe.unet).pop("forward")
    try:
        return draw(pipe)
    finally:
        pipe.unet.forward = graphs


def load_other_weights(pipe: StableDiffusionPipeline) -> None:
    pipe.unet.load_state_dict({name: tensor * 1.1 for name, tensor in pipe.unet.state_dict().items()})


def replace_a_layer(pipe: StableDiffusionPipeline) -> None:
    torch.manual_seed(2)
    pipe.unet.conv_out = nn.Conv2d(32, 4, 3, padding=1)


def scale_by_a_hook(pipe: StableDiffusionPipeline) -> None:
    pipe.unet.conv_in.register_forward_hook(lambda module, args, output: output * 0.9)


def merge_then_stop(pipe: StableDiffusionPipeline) -> None:
    enable_token_merging(pipe)
    draw(pipe)
    disable_token_merging(pipe)


pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning"),
]

CHANGES: dict[str, Callable[[StableDiffusionPipeline], object]] = {
    "merging": partial(enable_token_merging, ratio=0.5),
    "merging and not": merge_then_stop,
    "kernels": enable_flash_attention,
    "an adapter": add_adapter,
    "other weights": load_other_weights,
    "another layer": replace_a_layer,
    "freeU": lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "a hook": scale_by_a_hook,
    "another dtype": lambda pipe: pipe.to(torch.float64),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before the first call", "after it"])
def test_a_change_after_compiling_is_seen(small_sd_dir: Path, change: str, when: str) -> None:
    pictures = []
    for compiled in (False, True):
        pipe = StableDiffusionPipeline.from_pretrained(small_sd_dir, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        if compiled:
            assert set(compile_pipeline(pipe).values()) == {Tracer.name}
            if when == "after it":
                draw(pipe)
        made = pipe.unet.forward.compilations if compiled else 0
        CHANGES[change](pipe)
        pictures.append(draw(pipe))
    torch.testing.assert_close(pictures[1], pictures[0])
    assert pipe.unet.forward.compilations > made


def test_an_unchanged_module_keeps_its_graphs(small_sd: StableDiffusionPipeline) -> None:
    enable_flash_attention(small_sd)
    compile_pipeline(small_sd)
    first = draw(small_sd, cache_interval=2, output_type="pt")
    for _ in range(2):
        small_sd.to("cpu")  # where it is
        assert torch.equal(draw(small_sd, cache_interval=2, output_type="pt"), first)
    parts = (small_sd.text_encoder, small_sd.unet, small_sd.vae.decoder)
    assert [part.forward.compilations for part in parts] == [1, 2, 1]


def test_an_adapter_that_is_switched_off_and_on_keeps_its_graphs(small_sd: StableDiffusionPipeline) -> None:
    plain = draw(small_sd)
    add_adapter(small_sd)
    adapted = draw(small_sd)
    compile_module(small_sd.unet)
    for _ in range(2):
        torch.testing.assert_close(draw(small_sd), adapted)
        small_sd.disable_lora()
        torch.testing.assert_close(draw(small_sd), plain)
        small_sd.enable_lora()
    assert small_sd.unet.forward.compilations == 2
    small_sd.unet.conv_out.weight = nn.Parameter(small_sd.unet.conv_out.weight * 0.9)
    torch.testing.assert_close(draw(small_sd), draw_eagerly(small_sd))
    small_sd.disable_lora()  # whose graph has the old weights
    torch.testing.assert_close(draw(small_sd), draw_eagerly(small_sd))


def test_a_module_is_compared_once_a_loop_unless_callbacks_run(
    small_sd: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Watch] = []
    has_changed = Watch.has_changed
    monkeypatch.setattr(Watch, "has_changed", lambda watch: looks.append(watch) or has_changed(watch))
    compile_module(small_sd.unet)
    draw(small_sd, num_inference_steps=3)
    assert len(looks) == 1

    def callback(pipe: StableDiffusionPipeline, step: int, *_: Any) -> dict[str, Any]:
        if step == 0:
            pipe.unet.conv_out.weight.mul_(0.9)
        return {}

    changed = draw(small_sd, num_inference_steps=3, callback_on_step_end=callback)
    assert len(looks) == 4
    small_sd.unet.conv_out.weight.data.div_(0.9)
    decompile_pipeline(small_sd)
    torch.testing.assert_close(changed, draw(small_sd, num_inference_steps=3, callback_on_step_end=callback))


@pytest.mark.parametrize("table", ["_forward_hooks", "_parameters", "_modules"])
def test_a_table_that_is_replaced_is_seen(table: str) -> None:
    module = nn.Sequential(nn.Linear(4, 4))
    holder = module if table == "_modules" else module[0]
    watch = Watch(module)
    setattr(holder, table, type(getattr(holder, table))(getattr(holder, table)))
    assert watch.has_changed()


def test_an_element_that_moves_to_the_next_list_is_seen() -> None:
    module = nn.Linear(4, 4)
    module.skips, module.keeps = [1, 2], [3]
    watch = Watch(module)
    assert not watch.has_changed()
    module.keeps.insert(0, module.skips.pop())
    assert watch.has_changed()


def test_many_sizes_have_a_graph_each(small_sd: StableDiffusionPipeline) -> None:
    compile_module(small_sd.vae.decoder)
    sizes = list(range(1, MOST_GRAPHS + 3))
    with torch.no_grad():
        for size in sizes:
            assert small_sd.vae.decoder(torch.ones(1, 4, 1, size)).shape[-1] == 8 * size
        small_sd.vae.decoder(torch.ones(1, 4, 1, sizes[-1]))
        assert small_sd.vae.decoder.forward.compilations == len(sizes)
        small_sd.vae.decoder(torch.ones(1, 4, 1, sizes[0]))  # the longest unused were dropped
    assert small_sd.vae.decoder.forward.compilations == len(sizes) + 1
    assert len(small_sd.vae.decoder.forward.graphs) == MOST_GRAPHS


def state(pipe: StableDiffusionPipeline) -> list[Any]:
    found: list[Any] = []
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        parameters = list(part.parameters())
        found += [parameter.requires_grad for parameter in parameters]
        found += [(parameter.stride(), parameter.dtype) for parameter in parameters]
        found += ["forward" in vars(module) for module in part.modules()]
    return found


def test_decompiling_puts_everything_back(small_sd: StableDiffusionPipeline) -> None:
    small_sd.unet.conv_in.weight.requires_grad_(False)
    before, plain = state(small_sd), draw(small_sd)
    compile_pipeline(small_sd)
    assert state(small_sd) != before
    torch.testing.assert_close(draw(small_sd), plain)
    for _ in range(2):
        decompile_pipeline(small_sd)
        assert state(small_sd) == before
        assert not small_sd.unet.prepared
    assert torch.equal(draw(small_sd), plain)
    small_sd.unet(torch.ones(1, 4, 8, 8), 10, torch.ones(1, 77, 32)).sample.mean().backward()  # it trains again
    assert small_sd.unet.conv_out.weight.grad is not None


def test_a_failure_while_compiling_leaves_the_pipeline_as_it_was(
    small_sd: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, plain = state(small_sd), draw(small_sd)
    backends = [Tracer(), Tracer()]
    backends[1].fails = True
    monkeypatch.setattr(graphs, "make_backend", lambda *_: backends.pop(0))
    with pytest.raises(RuntimeError, match="no compiler"):
        compile_pipeline(small_sd)
    assert state(small_sd) == before
    assert not small_sd.text_encoder.prepared

    def break_down(*_: Any) -> Made:
        raise RuntimeError("the compiler failed")

    monkeypatch.setattr(graphs, "make_backend", lambda *_: Tracer())
    monkeypatch.setattr(Tracer, "make", break_down)
    compile_module(small_sd.unet)
    with pytest.raises(RuntimeError, match="the compiler failed"):
        draw(small_sd)
    assert state(small_sd) == before
    assert torch.equal(draw(small_sd), plain)


def test_two_pipelines_that_share_a_unet_may_both_be_compiled(small_sd: StableDiffusionPipeline) -> None:
    other = StableDiffusionImg2ImgPipeline.from_pipe(small_sd)
    other.set_progress_bar_config(disable=True)
    image = Image.new("RGB", (64, 64), "red")

    def redraw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"num_inference_steps": 2, "strength": 1.0, "output_type": "latent"}
        return other("a cat", image=image, generator=generator, **options).images

    plain = draw(small_sd), redraw()
    compile_pipeline(small_sd)
    draw(small_sd)
    compiled = dict.fromkeys(("text_encoder", "vae.decoder", "unet"), Tracer.name)
    assert compile_pipeline(other) == {"vae.encoder": "eager", **compiled}
    torch.testing.assert_close((draw(small_sd), redraw()), plain)


def test_an_offloaded_pipeline_stays_eager(
    small_sd: StableDiffusionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (small_sd.text_encoder, small_sd.unet, small_sd.vae):  # as enable_model_cpu_offload does
        module._hf_hook = object()
    assert set(compile_pipeline(small_sd).values()) == {"eager"}
    assert "vae.decoder is not compiled" in caplog.text


def test_offloading_after_compiling_is_refused(small_sd: StableDiffusionPipeline) -> None:
    compile_pipeline(small_sd)
    draw(small_sd)
    small_sd.unet._hf_hook = object()
    with pytest.raises(RuntimeError, match=r"unet is offloaded since it was compiled.*decompile_pipeline"):
        draw(small_sd)


def test_what_wraps_a_compiled_forward_must_go_first(small_sd: StableDiffusionPipeline) -> None:
    compile_pipeline(small_sd)
    graphs = small_sd.unet.forward
    small_sd.unet.forward = SharedBatch.__new__(SharedBatch)
    small_sd.unet.forward.forward = graphs
    with pytest.raises(RuntimeError, match="unet was wrapped after it was compiled"):
        decompile_pipeline(small_sd)
    assert compile_module(small_sd.unet) == Tracer.name  # it is compiled already
    small_sd.unet.forward = graphs
    decompile_pipeline(small_sd)
    small_sd.unet.forward = SharedBatch.__new__(SharedBatch)
    with pytest.raises(RuntimeError, match="cannot be compiled after its forward was replaced by .*SharedBatch"):
        compile_pipeline(small_sd)
    assert "forward" not in vars(small_sd.text_encoder)


@torch.no_grad()
def test_sharing_guidance_around_a_graph_leaves_the_graph(
    small_sd: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        shared_batch, "all_gather", lambda everyone, mine, group: everyone.copy_(torch.cat([mine, mine]))
    )
    latents, text = torch.ones(2, 4, 8, 8), torch.ones(2, 77, 32)
    compile_module(small_sd.unet)
    graphs = small_sd.unet.forward
    small_sd.unet(latents[:1], 10, text[:1])
    share_guidance(small_sd, Mesh(rank=0, world_size=2, branch_size=2, group=object()))
    for prompt in (text, text * 2):  # what sharing remembers of a picture is another each time
        small_sd.unet(latents, torch.tensor(10), encoder_hidden_states=prompt)
        small_sd.unet(latents, torch.tensor(5), encoder_hidden_states=prompt)
    assert graphs.compilations == 2  # with the arguments by position, and by name
    unshare_guidance(small_sd)
    small_sd.unet(latents[:1], 10, text[:1])
    assert small_sd.unet.forward is graphs and graphs.compilations == 2


def test_hooks_that_accelerate_removed_again_do_not_count(small_sd: StableDiffusionPipeline) -> None:
    small_sd.unet.forward = small_sd.unet.forward  # what it leaves behind
    compile_pipeline(small_sd)
    assert isinstance(small_sd.unet.forward, StaticGraphs)


def test_gradients_and_copies_are_refused_not_wrong(small_sd: StableDiffusionPipeline) -> None:
    compile_module(small_sd.unet, name="unet")
    latents = torch.ones(1, 4, 8, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="unet is compiled for inference and gives no gradients"):
        small_sd.unet(latents, 10, torch.ones(1, 77, 32))
    with pytest.raises(TypeError, match="unet is compiled, and graphs cannot be copied"):
        copy.deepcopy(small_sd.unet)


@torch.no_grad()
def test_autocast_and_deterministic_mode_have_graphs_of_their_own(small_sd: StableDiffusionPipeline) -> None:
    inputs = torch.ones(1, 77, dtype=torch.int64)
    compile_module(small_sd.text_encoder)
    single = small_sd.text_encoder(inputs)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = small_sd.text_encoder(inputs)[0]
    assert not torch.equal(single, half)
    assert torch.equal(small_sd.text_encoder(inputs)[0], single)
    assert small_sd.text_encoder.forward.compilations == 2


@torch.no_grad()
def test_results_keep_their_class(small_sd: StableDiffusionPipeline) -> None:
    inputs = torch.ones(1, 77, dtype=torch.int64)
    plain = small_sd.text_encoder(inputs)
    compile_module(small_sd.text_encoder)
    result = small_sd.text_encoder(inputs)
    assert type(result) is type(plain) and result.keys() == plain.keys()
    assert torch.equal(result.last_hidden_state, plain.last_hidden_state)


def test_switching_kernels_off_after_compiling_is_seen(small_sd: StableDiffusionPipeline) -> None:
    enable_flash_attention(small_sd)
    compile_pipeline(small_sd)
    draw(small_sd)
    disable_flash_attention(small_sd)
    draw(small_sd)
    assert small_sd.unet.forward.compilations == 2
