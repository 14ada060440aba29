"""One step of the demo editor's training: what is drawn for it, and the losses of editing and refining."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import HiDreamImageTransformer2DModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from scripts.demo_hidream.dataset import Dataset
from scripts.demo_hidream.networks import (
    FLOW_SHIFT,
    TextEncoders,
    Texts,
    build_editor,
    build_refiner,
    to_patches,
    train_experts_densely,
)

# Guidance compares these branches, so each has to be seen: as shares of the edits.
NO_TEXT = 0.08
NO_SOURCE = 0.06
NEITHER = 0.02
NO_DESCRIPTION = 0.1
REFINED_SHARE = 0.25  # of a batch; the refiner only has to finish what the editor began
CHANGED = 0.15  # a latent that differs by more, in units of its size, belongs to what the edit changes
CHANGE_WEIGHT = 5.0  # beside 1 for what stays: copying is learned soon, and most of a picture stays
TIMESTEPS = 1000


class Networks(nn.Module):
    """All that is trained, together: text encoders, the editor and the refiner."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.texts, self.editor, self.refiner = TextEncoders(tokenizer), build_editor(), build_refiner()
        for transformer in (self.editor, self.refiner):
            train_experts_densely(transformer)

    def compile_blocks(self) -> None:
        """Compile the blocks, which are alike: two graphs for each transformer take less time than the whole would."""
        for transformer in (self.editor, self.refiner):
            for block in (*transformer.double_stream_blocks, *transformer.single_stream_blocks):
                block.compile(dynamic=False)


@dataclass
class Batch:
    """Edits and scenes of a step, on the device; latents have unit size.

    Attributes:
        source, target: of edits, float [edits, 4, 16, 16]; a source left out is zero.
        instructions: int64 [edits, tokens].
        scenes: to draw without a source, float [scenes, 4, 16, 16].
        descriptions: int64 [scenes, tokens].
        changed: where an edit changes something, bool [edits, 1, 16, 16].
    """

    source: Tensor
    target: Tensor
    instructions: Tensor
    scenes: Tensor
    descriptions: Tensor
    changed: Tensor


def draw_batch(data: Dataset, size: int, scale: float, shift: float, generator: torch.Generator) -> Batch:
    """`size` edits, all kinds with equal chance, and a quarter as many scenes. Never waits for the device."""
    device = data.latents.device

    def uniform(count: int) -> Tensor:
        return torch.rand(count, device=device, generator=generator)

    def pick(count: int, most: Tensor | int) -> Tensor:
        return (uniform(count) * most).long()

    def normalised(numbers: Tensor) -> Tensor:
        return (data.latents[numbers].float() - shift) * scale

    kinds = pick(size, len(data.counts))
    chosen = (data.counts.cumsum(0) - data.counts)[kinds] + pick(size, data.counts[kinds])
    source, target = (normalised(data.pairs[chosen, side].long()) for side in (0, 1))
    instructions = data.instructions[chosen, pick(size, data.instructions.shape[1])]
    changed = (target - source).abs().amax(dim=1, keepdim=True) > CHANGED
    branch = uniform(size)
    no_text = branch < NO_TEXT + NEITHER
    no_source = (branch >= NO_TEXT) & (branch < NO_TEXT + NEITHER + NO_SOURCE)
    negatives = data.negatives[pick(size, len(data.negatives))]

    count = max(1, int(size * REFINED_SHARE))
    numbers = pick(count, len(data.latents))
    descriptions = data.descriptions[numbers, pick(count, data.descriptions.shape[1])]
    no_description = uniform(count) < NO_DESCRIPTION
    return Batch(
        source=source * ~no_source.view(-1, 1, 1, 1),
        target=target,
        instructions=torch.where(no_text[:, None], negatives, instructions).long(),
        scenes=normalised(numbers),
        descriptions=torch.where(
            no_description[:, None], data.negatives[pick(count, len(data.negatives))], descriptions
        ).long(),
        changed=changed,
    )


def losses(networks: Networks, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The editor's and the refiner's, scalars."""
    edits = len(batch.target)
    texts = networks.texts(torch.cat([batch.instructions, batch.descriptions]))
    weights = 1 + CHANGE_WEIGHT * batch.changed
    shifted = _uniform(batch.target, generator)
    times = FLOW_SHIFT * shifted / (1 + (FLOW_SHIFT - 1) * shifted)  # as often as the scheduler's steps have them
    editing = _flow_loss(
        networks.editor, _rows(texts, 0, edits), batch.target, times, weights, batch.source, generator
    )
    # The refiner comes in where most noise is gone, so its times are not shifted.
    times = _uniform(batch.scenes, generator)
    rest = _rows(texts, edits, len(texts.pooled))
    refining = _flow_loss(networks.refiner, rest, batch.scenes, times, torch.ones_like(times), None, generator)
    return editing, refining


def _flow_loss(
    transformer: HiDreamImageTransformer2DModel,
    texts: Texts,
    clean: Tensor,
    times: Tensor,
    weights: Tensor,
    source: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    """The mean squared error of the flow, clean - noise: the pipeline negates it for its scheduler.

    `clean` is [count, 4, 16, 16], `times` [count, 1, 1, 1] from 0, clean, to 1, noise.
    """
    noise = torch.randn(clean.shape, device=clean.device, generator=generator)
    noisy = torch.lerp(clean, noise, times)
    flow = to_patches(clean - noise)
    predicted = transformer(
        hidden_states=noisy if source is None else torch.cat([noisy, source], dim=-1),
        timesteps=times.flatten() * TIMESTEPS,
        encoder_hidden_states_t5=texts.t5,
        encoder_hidden_states_llama3=texts.llama,
        pooled_embeds=texts.pooled,
        return_dict=False,
    )[0]
    if source is not None:  # the source's patches stand right of the picture's, in each row
        rows, columns = (side // 2 for side in clean.shape[-2:])
        predicted = predicted.unflatten(2, (rows, 2 * columns))[:, :, :, :columns].flatten(2, 3)
    weights = to_patches(weights.expand_as(clean))
    return ((predicted.float() - flow).square() * weights).sum() / weights.sum()


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(len(like), 1, 1, 1, device=like.device, generator=generator)


def _rows(texts: Texts, start: int, end: int) -> Texts:
    return Texts(texts.t5[start:end], texts.llama[:, start:end], texts.pooled[start:end])
