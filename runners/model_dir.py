"""A pipeline's folder in diffusers' layout: what is in it, and loading it, with errors that name the file at fault.

`checkpoint` has those that are one file, whose configurations are in such a folder.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from runners.cli import UserError, is_finite_number, is_out_of_memory
from runners.weight_files import check_weights, digest_of_files, first_line, read_start

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)

INDEX = "model_index.json"
DEFAULTS = "defaults.json"  # this project's, beside INDEX: {"guidance_scale": 1.5}
GUIDANCE_SCALE = 7.5  # where a model says nothing
# What a component's folder must hold beside weights, by a part of its class's name; any one of the names will do.
CONFIG_FILES = {
    "Scheduler": ("scheduler_config.json",),
    "Tokenizer": ("tokenizer.json", "vocab.json"),
    "Processor": ("preprocessor_config.json",),
    "FeatureExtractor": ("preprocessor_config.json",),
}
MODEL_CONFIG = ("config.json",)
REQUIRED = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")


@dataclass(frozen=True)
class Model:
    """A folder that has been checked.

    Attributes:
        folder: of the configurations and, without a `checkpoint`, of the weights.
        variant: "fp16" when that variant of the weights is the only one there, None for the plain ones.
        configs: of each component, its configuration.
        files: of all components what decides the pictures, weights and configurations.
        checkpoint: the file that has all weights, in the layout of the original authors.
    """

    folder: Path
    variant: str | None
    configs: dict[str, dict[str, Any]]
    scheduler_class: str
    files: tuple[Path, ...]
    checkpoint: Path | None = None

    def digest(self) -> str:
        """Of what is in the files, whatever the folder's name. Reads all of them."""
        return digest_of_files(self.folder, self.files)

    def load_scheduler(self) -> SchedulerMixin:
        """The model's own. Raises UserError for one that diffusers does not have or cannot make."""
        try:
            scheduler_class = getattr(diffusers, self.scheduler_class)
            return scheduler_class.from_config(self.configs["scheduler"])
        except Exception as error:  # of any kind: the configuration is the user's
            raise UserError(
                f"cannot make the scheduler in {self.folder / 'scheduler'}: {first_line(error)}"
            ) from error


def require_patched_diffusers() -> None:
    """Raise UserError on a diffusers that knows nothing of block inputs and feature caches."""
    if "+npu" not in diffusers.__version__:
        raise UserError(f"diffusers {diffusers.__version__} lacks this project's patches; run: bash apply_patch.sh")


def load_pipeline(
    pipeline_class: type[Pipeline], folder: Path, dtype: torch.dtype, model: Model | None = None, **components: Any
) -> Pipeline:
    """The pipeline saved in `folder` (diffusers' layout), in evaluation mode, on the CPU, its weights cast to `dtype`.

    Weights are mapped from file one model at a time, so the peak is the size of the pipeline and not twice that.

    Args:
        model: what `check_model_dir` says of `folder`, when that is known already.
        components: taken instead of the ones in `folder`.

    Raises:
        UserError: a file is missing or damaged, or the folder holds a model of another kind.
    """
    model = model or check_model_dir(folder)
    options = {"dtype": dtype, "local_files_only": True, **components}
    try:
        if model.checkpoint:
            pipe = pipeline_class.from_single_file(str(model.checkpoint), config=str(model.folder), **options)
        else:
            pipe = pipeline_class.from_pretrained(folder, variant=model.variant, **options)
    except Exception as error:  # of any kind: the files are the user's, and the libraries do not say which is at fault
        if is_out_of_memory(error):
            raise
        if model.checkpoint and isinstance(error, NotImplementedError):  # torch's, of a weight that got no value
            raise UserError(
                f"{folder} lacks weights of the model that the configurations in {model.folder} describe: it is "
                "incomplete, or of another model"
            ) from error
        raise UserError(f"cannot load the model in {folder}: {first_line(error)}") from error
    limit_prompts(pipe, model)
    return pipe


def limit_prompts(pipe: Any, model: Model) -> None:
    """Cut prompts where the text encoder's table of positions ends, also where the tokenizer has no limit."""
    limit = pipe.text_encoder.config.max_position_embeddings
    pipe.tokenizer.model_max_length = min(pipe.tokenizer.model_max_length, limit)
    known = pipe.text_encoder.config.vocab_size
    if len(pipe.tokenizer) > known:
        raise UserError(
            f"tokenizer and text encoder in {model.folder} do not belong together: {len(pipe.tokenizer)} tokens, of "
            f"which the text encoder knows {known}"
        )


def check_model_dir(folder: Path, pipeline_class: str = "StableDiffusionPipeline") -> Model:
    """Make sure that `folder` holds a pipeline of that class whose components are there, whole and fit each other.

    Reads configurations and the headers of weights, and takes well under a second. Raises UserError.
    """
    model, models = check_configs(folder, pipeline_class)
    weights = find_weights([folder / name for name in models])
    return replace(model, variant=variant_of(weights[0]), files=(*model.files, *weights))


def check_configs(folder: Path, pipeline_class: str = "StableDiffusionPipeline") -> tuple[Model, list[str]]:
    """What `folder` says of a pipeline, without its weights, and which components have some. Raises UserError."""
    check_is_pipeline(folder)
    index = read_json(folder / INDEX)
    found = index.get("_class_name", pipeline_class)
    if found != pipeline_class:
        raise UserError(
            f"{folder} holds a {found}, and what draws here is a {pipeline_class}: take a model of that kind"
        )
    kinds = {name: kind for name, kind in index.items() if isinstance(kind, list) and len(kind) == 2 and kind[0]}
    lacking = [name for name in REQUIRED if name not in kinds]
    if lacking:
        raise UserError(f"{folder / INDEX} names no {' and no '.join(lacking)}, which a {pipeline_class} needs")

    configs = {name: read_config(folder / name, class_name) for name, (_, class_name) in kinds.items()}
    check_components_fit(folder, configs)
    settings = [path for name in kinds for kind in ("*.json", "*.txt") for path in (folder / name).glob(kind)]
    for path in settings:
        read_start(path)
    model = Model(folder, None, configs, kinds["scheduler"][1], (folder / INDEX, *settings))
    return model, [name for name, (_, class_name) in kinds.items() if config_names(class_name) is MODEL_CONFIG]


def check_is_pipeline(folder: Path) -> None:
    """Raise UserError with what `folder` is, unless it looks like a pipeline."""
    layout = f"a folder in diffusers' layout is wanted, with {INDEX} and a folder for each component"
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"model directory {folder} is a link to {folder.readlink()}, which is not there")
    if folder.is_file():
        raise UserError(f"{folder} is a file: {layout}")
    if not folder.is_dir():
        raise UserError(f"model directory {folder} does not exist")
    if (folder / INDEX).exists() or (folder / INDEX).is_symlink():
        return
    inside = sorted(path.parent for path in [*folder.glob(f"*/{INDEX}"), *folder.glob(f"snapshots/*/{INDEX}")])
    if inside:
        raise UserError(f"{folder} holds no model itself; {inside[-1]} does")
    if (folder.parent / INDEX).exists():
        raise UserError(f"{folder} is a part of a model: give {folder.parent}")
    raise UserError(f"the model lacks {folder / INDEX}: {layout}")


def config_names(class_name: str) -> tuple[str, ...]:
    return next((names for part, names in CONFIG_FILES.items() if part in class_name), MODEL_CONFIG)


def read_config(folder: Path, class_name: str) -> dict[str, Any]:
    names = config_names(class_name)
    return read_json(next((folder / name for name in names if (folder / name).exists()), folder / names[0]))


def find_weights(folders: Sequence[Path]) -> list[Path]:
    """The files that are loaded for the components in `folders`, all of one variant and checked.

    Plain weights are taken before the fp16 variant, and .safetensors before .bin, as diffusers does.
    """
    found = {folder: sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]) for folder in folders}
    for folder, paths in found.items():
        if not paths:
            raise UserError(f"the model lacks its weights {folder}/*.safetensors")
    kinds = {folder: {variant_of(path) for path in paths} for folder, paths in found.items()}
    variant = next((v for v in (None, "fp16") if all(v in kind for kind in kinds.values())), None)
    weights = []
    for folder, paths in found.items():
        same = [path for path in paths if variant_of(path) == variant]
        used = [path for path in same if path.suffix == ".safetensors"] or same
        if not used:
            raise UserError(
                f"{folder} has weights of the fp16 variant only, and other components have plain ones only"
            )
        check_shards(folder, used[0].suffix, variant)
        weights += used
    for path in weights:
        check_weights(path)
    return weights


def check_shards(folder: Path, suffix: str, variant: str | None) -> None:
    """Raise UserError unless all files are there that an index of weights lists."""
    for index in folder.glob(f"*{suffix}.index*.json"):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise UserError(f"{index} lists no files of weights: it has no 'weight_map'")
        for shard in sorted(set(shards.values())) if variant_of(index) == variant else ():
            if not (folder / shard).is_symlink() and not (folder / shard).exists():
                raise UserError(f"the model lacks {folder / shard}, which {index.name} lists")


def variant_of(weights: Path) -> str | None:
    return "fp16" if ".fp16" in weights.name else None


def check_components_fit(folder: Path, configs: dict[str, dict[str, Any]]) -> None:
    """Raise UserError for components of different models, and for a UNet that needs more than latents and a prompt."""
    unet, vae, text_encoder = (configs[name] for name in ("unet", "vae", "text_encoder"))
    # The defaults are those of diffusers and transformers for what an old configuration leaves out.
    channels, latents = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels != latents:
        kind = "an inpainting model" if channels == 2 * latents + 1 else "of another kind"
        raise UserError(
            f"the UNet in {folder} takes {channels} channels and the VAE's latents have {latents}: it is {kind}, "
            "which does not draw from text alone"
        )
    for setting in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        if unet.get(setting) is not None:
            raise UserError(
                f"the UNet in {folder} needs more than a prompt ({setting} is {unet[setting]!r}, as in the XL "
                "family): take a model of Stable Diffusion 1 or 2"
            )
    width, prompt_width = unet.get("cross_attention_dim", 1280), text_encoder.get("hidden_size", 512)
    if set(width if isinstance(width, list) else [width]) != {prompt_width}:
        raise UserError(
            f"text encoder and UNet in {folder} are of different models: prompts are {prompt_width} numbers wide, and "
            f"the UNet takes {width}"
        )


def guidance_scale_of(folder: Path) -> float:
    """What the model is best drawn with: `guidance_scale` in DEFAULTS in its folder, else diffusers' own default.

    DEFAULTS is this project's: diffusers has no place for it. Raises UserError for one that says anything else.
    """
    path = folder / DEFAULTS
    if not path.exists():
        return GUIDANCE_SCALE
    defaults = read_json(path)
    scale = defaults.pop("guidance_scale", GUIDANCE_SCALE)
    if defaults:
        raise UserError(f"{path}: {', '.join(defaults)} is unknown; it may say guidance_scale")
    if not is_finite_number(scale):
        raise UserError(f"{path}: guidance_scale must be a number, not {scale!r}")
    return scale


def read_json(path: Path) -> dict[str, Any]:
    read_start(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content
