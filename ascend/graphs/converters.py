"""Converters to operators of GE's graphs that torchair lacks."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def register_converters() -> None:
    """Teach torchair what it lacks.

    That is the operator that torch_npu makes of `scaled_dot_product_attention` on other chips than 310P (it has a
    converter for the operator's first version only, which computes the same), the sum with its norm (GE's operator:
    hicann/ops-nn, norm/add_layer_norm/op_graph/add_layer_norm_proto.h) and a product of several matrices by one with a
    bias, as GE itself makes of a product and a sum (hicann/ops-nn, matmul/mat_mul_v3/op_graph/fusion_pass/
    matmul_biasadd_fusion_pass.cpp, from GE 9.1 on).
    """
    import torch_npu  # noqa: F401
    import torchair
    from torchair import ge

    @torchair.register_fx_node_ge_converter(torch.ops.npu.npu_fusion_attention_v3.default)
    def convert_attention(
        query: Any,
        key: Any,
        value: Any,
        head_num: int,
        input_layout: str,
        pse: Any = None,
        padding_mask: Any = None,
        atten_mask: Any = None,
        scale: float = 1.0,
        keep_prob: float = 1.0,
        pre_tockens: int = 2147483647,
        next_tockens: int = 2147483647,
        inner_precise: int = 0,
        prefix: Any = None,
        actual_seq_qlen: Any = None,
        actual_seq_kvlen: Any = None,
        sparse_mode: int = 0,
        gen_mask_parallel: bool = True,
        sync: bool = False,
        softmax_layout: str = "",
        sink: Any = None,
        meta_outputs: Any = None,
    ) -> tuple[Any, ...]:
        unsupported = (padding_mask, prefix, actual_seq_qlen, actual_seq_kvlen, sink)
        if keep_prob != 1 or softmax_layout or any(argument is not None for argument in unsupported):
            raise RuntimeError("attention with dropout, sinks or packed sequences is not compiled to graphs")
        inputs = {"query": query, "key": key, "value": value, "real_shift": pse, "drop_mask": None}
        inputs |= {"padding_mask": None, "atten_mask": atten_mask}
        attributes = {
            "scale_value": ge.attr.Float(scale),
            "keep_prob": ge.attr.Float(1.0),
            "pre_tockens": ge.attr.Int(pre_tockens),
            "next_tockens": ge.attr.Int(next_tockens),
            "head_num": ge.attr.Int(head_num),
            "input_layout": ge.attr.Str(input_layout),
            "inner_precise": ge.attr.Int(inner_precise),
            "sparse_mode": ge.attr.Int(sparse_mode),
        }
        outputs = ["softmax_max", "softmax_sum", "softmax_out", "attention_out"]
        maximum, total, out, attended = ge.custom_op(
            "FlashAttentionScore", inputs=inputs, outputs=outputs, attrs=attributes
        )
        no_dropout = ge.Const(0, dtype=ge.DataType.DT_INT64)
        return attended, maximum, total, out, no_dropout, no_dropout

    @torchair.register_fx_node_ge_converter(torch.ops.npu.npu_add_layer_norm.default)
    def convert_add_layer_norm(
        x1: Any,
        x2: Any,
        gamma: Any,
        beta: Any,
        epsilon: float = 1e-5,
        additional_output: bool = False,
        meta_outputs: Any = None,
    ) -> Any:
        return ge.custom_op(
            "AddLayerNorm",
            inputs={"x1": x1, "x2": x2, "gamma": gamma, "beta": beta, "bias": None},
            outputs=["y", "mean", "rstd", "x"],
            attrs={"epsilon": ge.attr.Float(epsilon), "additional_output": ge.attr.Bool(additional_output)},
        )

    @torchair.register_fx_node_ge_converter(torch.ops.aten.linear.default)
    def convert_linear(input: Any, weight: Any, bias: Any = None, meta_outputs: Any = None) -> Any:
        return ge.custom_op(
            "BatchMatMulV2",
            inputs={"x1": input, "x2": weight, "bias": bias, "offset_w": None},
            outputs=["y"],
            attrs={"adj_x1": ge.attr.Bool(False), "adj_x2": ge.attr.Bool(True), "offset_x": ge.attr.Int(0)},
        )
