"""DeepCache in the fork: `UNet2DConditionModel` and `StableDiffusionPipeline`."""

from collections.abc import Callable

import diffusers
import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.unets.deep_cache import get_full_steps

from tests.tiny_models import CROSS_ATTENTION_DIM, tiny_unet

BRANCHES = [(block_id, layer_id) for block_id in range(4) for layer_id in range(3)]


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return tiny_unet().eval()


def unet_inputs(height: int = 16, width: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, height, width, generator=generator)
    return sample, torch.tensor(500), torch.randn(2, 77, CROSS_ATTENTION_DIM, generator=generator)


def count_full_calls(pipe: StableDiffusionPipeline) -> list[int]:
    """A list that grows by one entry whenever the UNet runs its middle block, which only full steps do."""
    calls: list[int] = []
    pipe.unet.mid_block.register_forward_hook(lambda *_: calls.append(1))
    return calls


def draw(pipe: StableDiffusionPipeline, **kwargs: object) -> torch.Tensor:
    options = {"num_inference_steps": 7, "height": 64, "width": 64, "output_type": "latent"} | kwargs
    return pipe("a red circle", generator=torch.Generator().manual_seed(0), **options).images


@torch.no_grad()
@pytest.mark.parametrize("branch", BRANCHES)
def test_a_shallow_pass_with_its_own_feature_repeats_the_full_pass(
    unet: UNet2DConditionModel, branch: tuple[int, int]
) -> None:
    inputs = unet_inputs(9, 11)
    (plain,) = unet(*inputs, return_dict=False)
    full, feature = unet(*inputs, return_dict=False, cache_branch=branch)
    (shallow,) = unet(*inputs, return_dict=False, cache_branch=branch, cached_feature=feature)
    assert torch.equal(full, plain)
    assert torch.equal(shallow, plain)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(
    "options",
    [{"height": 72, "width": 88}, {"guidance_scale": 1.0, "num_images_per_prompt": 2}],
    ids=["odd-size-with-guidance", "two-images-without-guidance"],
)
def test_the_pipeline_equals_the_deepcache_package(
    tiny_sd: StableDiffusionPipeline, branch: tuple[int, int], options: dict[str, object]
) -> None:
    block_id, layer_id = branch
    ours = draw(tiny_sd, cache_interval=3, cache_block_id=block_id, cache_layer_id=layer_id, **options)
    helper = DeepCacheSDHelper(pipe=tiny_sd)
    helper.set_params(cache_interval=3, cache_branch_id=3 * block_id + layer_id)
    helper.enable()
    theirs = draw(tiny_sd, **options)
    helper.disable()
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, draw(tiny_sd, **options))


@pytest.mark.parametrize(
    ("name", "num_calls"),
    [("DDIMScheduler", 7), ("PNDMScheduler", 8), ("DPMSolverMultistepScheduler", 7), ("HeunDiscreteScheduler", 13)],
)
def test_every_scheduler_runs_one_full_call_in_each_interval(
    tiny_sd: StableDiffusionPipeline, name: str, num_calls: int
) -> None:
    options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    tiny_sd.scheduler = getattr(diffusers, name).from_config(tiny_sd.scheduler.config, **options)
    full_calls = count_full_calls(tiny_sd)
    draw(tiny_sd, cache_interval=3)
    assert len(full_calls) == -(-num_calls // 3)


def test_an_explicit_schedule_needs_no_interval(tiny_sd: StableDiffusionPipeline) -> None:
    uniform = draw(tiny_sd, cache_interval=3)
    full_calls = count_full_calls(tiny_sd)
    assert torch.equal(draw(tiny_sd, cache_schedule=[0, 3, 6]), uniform)
    assert len(full_calls) == 3


def test_a_unet_keeps_an_interval(tiny_sd: StableDiffusionPipeline, unet: UNet2DConditionModel) -> None:
    expected, plain = draw(tiny_sd, cache_interval=3), draw(tiny_sd)
    tiny_sd.unet.set_cache_interval(3)
    assert torch.equal(draw(tiny_sd), expected)
    assert torch.equal(draw(tiny_sd, cache_interval=1), plain)  # what a call says goes first
    assert unet.cache_interval == 1  # of another UNet
    tiny_sd.unet.set_cache_interval(1)
    assert torch.equal(draw(tiny_sd), plain)
    with pytest.raises(ValueError, match="must be at least 1, but is 0"):
        unet.set_cache_interval(0)
    others = {"down_block_types": ("AttnDownBlock2D",) * 4, "up_block_types": ("AttnUpBlock2D",) * 4}
    uncut = UNet2DConditionModel.from_config(dict(unet.config) | others)
    with pytest.raises(ValueError, match="has no cache branch"):
        uncut.set_cache_interval(2)


def test_guidance_that_ends_midway_refreshes_the_feature(tiny_sd: StableDiffusionPipeline) -> None:
    def end_guidance(
        pipe: StableDiffusionPipeline, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        if step == 1:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"][-1:]
        return tensors

    full_calls = count_full_calls(tiny_sd)
    draw(
        tiny_sd,
        cache_schedule=[0, 4],
        callback_on_step_end=end_guidance,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    assert len(full_calls) == 3  # steps 0 and 4 by schedule, step 2 because the batch has shrunk


@pytest.mark.parametrize("branch", [(4, 0), (0, 3), (-1, 0)])
def test_an_invalid_branch_is_an_error_that_lists_the_valid_ones(
    unet: UNet2DConditionModel, branch: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match=r"cache_block_id=.*block 0: layers \[0, 1, 2\].*block 3: layers \[0, 1, 2\]"):
        unet(*unet_inputs(), cache_branch=branch)


def test_quadratic_steps_lie_densest_around_the_centre() -> None:
    steps = sorted(get_full_steps(50, 5, "quadratic", cache_center=20, cache_power=1.6))
    gaps = [after - before for before, after in zip(steps, steps[1:], strict=False)]
    nearest = min(range(len(gaps)), key=lambda k: abs(steps[k] + gaps[k] / 2 - 20))
    assert len(steps) == 10
    assert gaps[nearest] == min(gaps)
    assert gaps[0] > gaps[nearest] < gaps[-1]


def test_a_quadratic_schedule_of_power_one_is_uniform() -> None:
    assert get_full_steps(50, 5, "quadratic", cache_center=20, cache_power=1.0) == get_full_steps(50, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache_interval": 0}, "at least 1, but is 0"),
        ({"cache_schedule": "cubic"}, "'uniform', 'quadratic', 'early' or a list of steps, but is 'cubic'"),
        ({"cache_schedule": [0, 10]}, r"names steps \[10\], but the steps go from 0 to 9"),
        ({"cache_schedule": [1, 2]}, "must contain step 0"),
        ({"cache_schedule": "quadratic", "cache_center": 10}, "must lie in 0 to 9, but is 10"),
        ({"cache_schedule": "quadratic", "cache_power": 0.5}, "at least 1, but is 0.5"),
        ({"cache_schedule": [0], "cache_power": 2.0}, "no effect without `cache_schedule='quadratic'`"),
        ({"cache_interval": 2, "cache_center": 0}, "no effect without `cache_schedule='quadratic'`"),
        ({"cache_interval": 2, "cache_full_steps": 5}, "no effect without `cache_schedule='early'`"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_full_steps(10, **arguments)


@torch.no_grad()
def test_full_and_shallow_pass_compile_to_one_graph_each(unet: UNet2DConditionModel) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(unet, backend=record, fullgraph=True, dynamic=False)
    inputs = unet_inputs()
    for _ in range(2):
        full, feature = compiled(*inputs, return_dict=False, cache_branch=(0, 0))
        (shallow,) = compiled(*inputs, return_dict=False, cache_branch=(0, 0), cached_feature=feature)
    assert len(graphs) == 2
    assert torch.equal(full, shallow)
