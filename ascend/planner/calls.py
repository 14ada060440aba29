"""How a picture calls the models of its pipeline: shapes and dtypes, without values."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import nn

HIDREAM = "HiDreamImageTransformer2DModel"
HIDREAM_DRAWING, HIDREAM_EDITING = "HiDreamImagePipeline", "HiDreamImageEditingPipeline"
HIDREAM_SIDE, HIDREAM_MULTIPLE = 1024, 16  # to how many pixels HiDream's pipeline scales every picture that it draws
CLIP_TOKENS, HIDREAM_TOKENS = 77, 128  # to which pipelines pad prompts; the latter is max_sequence_length's default


class Request(NamedTuple):
    """What is drawn: pixels, pictures at a time, whether guidance doubles them, whether it begins with an image.

    `text_tokens` are those that HiDream pads its texts to; None: what its pipelines do by default.
    """

    height: int
    width: int
    batch: int = 1
    guidance: bool = True
    image: bool = False
    text_tokens: int | None = None

    @property
    def rows(self) -> int:
        """Of a denoiser's batch."""
        return self.batch * (2 if self.guidance else 1)


def usual_request(pipe: Any) -> Request:
    """A picture of the size that `pipe` draws by default."""
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    size = getattr(pipe, "default_sample_size", None) or getattr(denoiser, "config", {}).get("sample_size") or 64
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    scale = getattr(pipe, "vae_scale_factor", 8)
    begins_with_image = not {"strength", "image_guidance_scale"}.isdisjoint(
        inspect.signature(type(pipe).__call__).parameters
    )
    return Request(height * scale, width * scale, image=begins_with_image)


def as_called(pipeline: str, request: Request) -> Request:
    """What a pipeline of the class of that name makes of a request: HiDream's edits an image, or draws a megapixel.

    That which draws has an image if an adapter lets its transformer edit.
    """
    if pipeline == HIDREAM_EDITING:
        return request._replace(image=True)
    if pipeline == HIDREAM_DRAWING and not request.image:
        factor = math.sqrt(HIDREAM_SIDE**2 / (request.height * request.width))
        sides = (int(side * factor // HIDREAM_MULTIPLE * HIDREAM_MULTIPLE) for side in (request.height, request.width))
        height, width = sides
        return request._replace(height=height, width=width)
    return request


class Call(NamedTuple):
    """One way in which a component runs: in each step or once a picture, with these arguments.

    `cast` is the dtype that the pipeline casts the component to for this call, where it does.
    """

    phase: str  # "encode", "denoise" or "decode"
    inputs: dict[str, Any]
    target: Callable[[nn.Module], nn.Module] = lambda module: module
    cast: torch.dtype | None = None


class UnknownCallError(ValueError):
    """It is not known with what a component is called; the message says why."""


def calls_of(model: nn.Module, models: dict[str, nn.Module], request: Request, dtype: torch.dtype) -> list[Call]:
    """How a component runs in a picture.

    Args:
        model: on the meta device.
        models: all components of its pipeline, there, too.

    Raises:
        UnknownCallError: its class is not known here, or a part of it, or how large latents are.
    """
    make = CALLS.get(type(model).__name__)
    if make is None:
        raise UnknownCallError(f"how pipelines call a {type(model).__name__} is not known")
    return make(model, models, request, dtype)


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _latents(models: dict[str, nn.Module], request: Request) -> tuple[int, int]:
    vae: Any = models.get("vae")
    if vae is None:
        raise UnknownCallError("there is no component named vae, which says how large latents are")
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    return request.height // scale, request.width // scale


def _tokens(models: dict[str, nn.Module], request: Request) -> int:
    is_hidream = any(type(model).__name__ == HIDREAM for model in models.values())
    return (request.text_tokens or HIDREAM_TOKENS) if is_hidream else CLIP_TOKENS


def _text(model: Any, models: dict[str, nn.Module], request: Request, dtype: torch.dtype) -> list[Call]:
    length = min(getattr(model.config, "max_position_embeddings", CLIP_TOKENS), _tokens(models, request))
    return [Call("encode", {"input_ids": _meta(1, length, dtype=torch.int64), "output_hidden_states": True})]


def _t5(model: Any, models: dict[str, nn.Module], request: Request, dtype: torch.dtype) -> list[Call]:
    ids = _meta(1, request.text_tokens or HIDREAM_TOKENS, dtype=torch.int64)
    return [Call("encode", {"input_ids": ids})]  # of a mask, which is little, transformers looks at the values


def _llama(model: Any, models: dict[str, nn.Module], request: Request, dtype: torch.dtype) -> list[Call]:
    ids = _meta(1, request.text_tokens or HIDREAM_TOKENS, dtype=torch.int64)
    # HiDream's pipeline asks for both.
    return [Call("encode", {"input_ids": ids, "output_hidden_states": True, "output_attentions": True})]


def _conditions(model: Any, models: dict[str, nn.Module], request: Request, dtype: torch.dtype) -> dict[str, Any]:
    """What the UNet and ControlNets are called with in each step."""
    width = model.config.cross_attention_dim
    inputs: dict[str, Any] = {
        "sample": _meta(request.rows, model.config.in_channels, *_latents(models, request), dtype=dtype),
        "timestep": _meta(dtype=torch.int64),
        "encoder_hidden_states": _meta(
            request.rows, CLIP_TOKENS, width if isinstance(width, int) else width[0], dtype=dtype
        ),
    }
    if is_xl(model):
        text = model.config.projection_class_embeddings_input_dim - 6 * model.config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": _meta(request.rows, text, dtype=dtype),
            "time_ids": _meta(request.rows, 6, dtype=dtype),
        }
    adapters: Any = getattr(model, "encoder_hid_proj", None)
    if type(adapters).__name__ == "MultiIPAdapterImageProjection":
        images = [
            _meta(request.rows, 1, _embedding_of(layer), dtype=dtype) for layer in adapters.image_projection_layers
        ]
        inputs["added_cond_kwargs"] = inputs.get("added_cond_kwargs", {}) | {"image_embeds": images}
    return inputs


def _embedding_of(projection: Any) -> int:
    """Channels of the image embedding that an IP-Adapter projects."""
    if type(projection).__name__ != "ImageProjection":
        raise UnknownCallError(f"what its IP-Adapter's {type(projection).__name__} is called with is not known")
    return projection.image_embeds.in_features


def is_xl(model: Any) -> bool:
    """Whether a UNet or a ControlNet is conditioned on sizes and a pooled prompt, as SDXL's."""
    return getattr(model.config, "addition_embed_type", None) == "text_time"


def _controlnet(model: Any, models: dict[str, nn.Module], request: Request, dtype: torch.dtype) -> list[Call]:
    picture = _meta(request.rows, model.config.conditioning_channels, request.height, request.width, dtype=dtype)
    return [Call("denoise", _conditions(model, models, request, dtype) | {"controlnet_cond": picture})]


def _unet(model: Any, models: dict[str, nn.Module], request: Request, dtype: torch.dtype) -> list[Call]:
    inputs = _conditions(model, models, request, dtype)
    for other in models.values():
        if type(other).__name__ == "ControlNetModel":
            (call,) = _controlnet(other, models, request, dtype)
            down, middle = other(**call.inputs, return_dict=False)
            inputs |= {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    return [Call("denoise", inputs)]


def _hidream(model: Any, models: dict[str, nn.Module], request: Request, dtype: torch.dtype) -> list[Call]:
    rows, config = request.rows, model.config
    height, width = _latents(models, request)
    if request.image:  # edits: the source is beside the picture, and guidance has a branch without it
        rows, width = request.batch * (3 if request.guidance else 1), 2 * width
    # Who edits with a model that draws raises what its configuration says, as HiDream-E1's scripts do.
    model.max_seq = max(model.max_seq, height * width // config.patch_size**2)
    t5, llama = config.caption_channels
    layers, tokens = max(config.llama_layers) + 1, _tokens(models, request)
    inputs = {
        "hidden_states": _meta(rows, config.in_channels, height, width, dtype=dtype),
        "timesteps": _meta(rows, dtype=torch.int64),
        "encoder_hidden_states_t5": _meta(rows, tokens, t5, dtype=dtype),
        "encoder_hidden_states_llama3": _meta(layers, rows, tokens, llama, dtype=dtype),
        "pooled_embeds": _meta(rows, config.text_emb_dim, dtype=dtype),
        "return_dict": False,
    }
    return [Call("denoise", inputs)]


def _vae(model: Any, models: dict[str, nn.Module], request: Request, dtype: torch.dtype) -> list[Call]:
    # SDXL's pipelines encode in float32 and decode in what is not float16.
    unet = models.get("unet")
    is_cast = model.config.force_upcast and model.dtype != torch.float32 and unet is not None and is_xl(unet)
    cast = torch.float32 if is_cast else None
    casts = {"encode": cast, "decode": cast if model.dtype == torch.float16 else None}

    def call(phase: str, half: str, channels: int, height: int, width: int) -> Call:
        sample = _meta(request.batch, channels, height, width, dtype=casts[phase] or model.dtype)
        return Call(phase, {"sample": sample}, attrgetter(half), casts[phase])

    calls = [call("decode", "decoder", model.config.latent_channels, *_latents(models, request))]
    if request.image:
        calls.insert(0, call("encode", "encoder", model.config.in_channels, request.height, request.width))
    return calls


def _image_encoder(model: Any, models: dict[str, nn.Module], request: Request, dtype: torch.dtype) -> list[Call]:
    size = model.config.image_size
    return [Call("encode", {"pixel_values": _meta(1, model.config.num_channels, size, size, dtype=dtype)})]


CALLS: dict[str, Callable[[Any, dict[str, nn.Module], Request, torch.dtype], list[Call]]] = {
    "AutoencoderKL": _vae,
    "CLIPTextModel": _text,
    "CLIPTextModelWithProjection": _text,
    "CLIPVisionModelWithProjection": _image_encoder,
    "ControlNetModel": _controlnet,
    HIDREAM: _hidream,
    "LlamaForCausalLM": _llama,
    "T5EncoderModel": _t5,
    "UNet2DConditionModel": _unet,
}
