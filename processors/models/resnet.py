"""Residual blocks that normalise and activate in one kernel."""

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D


class FusedResnetBlock2D(ResnetBlock2D):
    """`ResnetBlock2D` whose GroupNorm and SiLU are one kernel on an NPU, and the same operations elsewhere.

    A block becomes one by `fuse` and an ordinary one again by `unfuse`: the class changes, parameters and hooks stay.
    """

    takes_time_projections = True  # tells the compiler of graphs that it may project the time for several blocks

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None) -> torch.Tensor:
        hidden_states = self._convolve(group_norm_silu(self.norm1, input_tensor), temb)
        hidden_states = self.conv2(self.dropout(group_norm_silu(self.norm2, hidden_states)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        output = input_tensor + hidden_states
        return output if self.output_scale_factor == 1 else output / self.output_scale_factor

    def _convolve(self, hidden_states: torch.Tensor, temb: torch.Tensor | None) -> torch.Tensor:
        """The first convolution and what the time adds to it."""
        if self.time_emb_proj is not None and temb is not None and not self.skip_time_act:
            temb = self.nonlinearity(temb)
        projections = getattr(self, "time_projections", None)
        if torch.compiler.is_compiling() and projections is not None and self.may_share_time_projection():
            shift = projections(temb)[self.time_part][:, :, None, None]
            return self.conv1._conv_forward(hidden_states, self.conv1.weight, None) + shift
        hidden_states = self.conv1(hidden_states)
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb)[:, :, None, None]
        if temb is not None and self.time_embedding_norm == "default":
            hidden_states = hidden_states + temb
        return hidden_states

    def may_share_time_projection(self) -> bool:
        """Whether the weights of the first convolution and of the projection tell what these compute."""
        return (
            self.time_embedding_norm == "default"
            and _is_plain(self.conv1, torch.nn.Conv2d)
            and _is_plain(self.time_emb_proj, torch.nn.Linear)
        )


def _is_plain(layer: torch.nn.Module | None, kind: type[torch.nn.Module]) -> bool:
    """Whether `layer` has a bias and neither adapters nor hooks."""
    if type(layer) is not kind or layer.bias is None:
        return False
    return not (layer._forward_pre_hooks or layer._forward_hooks) and "forward" not in vars(layer)


def is_fusable(block: ResnetBlock2D) -> bool:
    """Whether `block` is a residual block with SiLU that does not scale, shift or resample in between."""
    if type(block) not in (ResnetBlock2D, FusedResnetBlock2D):
        return False
    resamples = block.upsample is not None or block.downsample is not None
    return (
        isinstance(block.nonlinearity, torch.nn.SiLU) and not resamples and block.time_embedding_norm != "scale_shift"
    )


def fuse(block: ResnetBlock2D) -> None:
    """Turn a block that `is_fusable` into a fused one; others stay as they are."""
    if is_fusable(block):
        block.__class__ = FusedResnetBlock2D


def unfuse(block: ResnetBlock2D) -> None:
    """Undo `fuse`."""
    block.__class__ = ResnetBlock2D


def group_norm_silu(norm: torch.nn.GroupNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    """`silu(norm(hidden_states))`. The NPU's kernel takes an affine norm in the dtype of its input.

    It has no derivative (op-plugin op_plugin/config/derivatives.yaml): torch would warn once, and the gradients of all
    before it would be missing or wrong.
    """
    weight, bias = norm.weight, norm.bias
    needs_grad = torch.is_grad_enabled() and (
        hidden_states.requires_grad or weight.requires_grad or bias.requires_grad
    )
    # The devices differ while weights are offloaded: calling `norm` is what brings them back.
    if (
        hidden_states.device.type == "npu"
        and not needs_grad
        and weight.device == hidden_states.device
        and weight.dtype == hidden_states.dtype
    ):
        return torch.ops.npu.npu_group_norm_silu(hidden_states, weight, bias, norm.num_groups, norm.eps)[0]
    return F.silu(norm(hidden_states))
