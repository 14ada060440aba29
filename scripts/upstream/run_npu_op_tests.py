"""Runs Ascend's own operator tests with whatever NPU torch_npu sees: a card, or the emulator.

    git clone https://github.com/Ascend/op-plugin && git -C op-plugin checkout 517f2e7d
    git clone https://github.com/Ascend/pytorch && git -C pytorch checkout 9e73e708
    pip install -r requirements-dev.txt -r scripts/upstream/requirements-npu-op-tests.txt
    python -m emulator run --soc Ascend910B3 --devices 2 -- \\
        python scripts/upstream/run_npu_op_tests.py --op_plugin op-plugin --pytorch pytorch --output Ascend910B3.json

Which tests: the operators that Stable Diffusion, its training and the basics of tensors need (SELECTION). A test
that fails for a reason that is not the device's is "not applicable" (NOT_APPLICABLE says why); everything else that
fails counts. Each file runs in a process of its own, in the mode that `ascend.device` sets: no operator is compiled at
run time, private formats only where they are what is tested, and an operator that fails does so in the call itself.

Exit codes: 0 every test that applies passes, 1 one does not or the tests could not run, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tqdm import tqdm

from scripts.fork.fork_wheel import ArgumentParser, ForkError, run_command
from scripts.upstream.run_diffusers_tests import Outcomes, read_report, write_json

# <repository>, folder, and of test_<name>.py there the names
SELECTION: tuple[tuple[str, str, str], ...] = (
    (
        "op_plugin",
        "test/test_base_ops",
        """
    abs absolute acos acosh adaptive_avg_pool2d_backward add addbmm addcdiv addcmul addmm addmm_activation_out addmv
    addr all amp_foreach_non_finite_check_and_unscale_ angle any apply_adam apply_adam_w arange arccosh arcsin
    arcsinh arctan arctan2 arctanh argmax argmin argsort as_strided asin asinh atan atan2 atanh avg_pool2d
    avg_pool2d_backward baddbmm batchnorm_backward batchnorm_backward_eval bernoulli binary_cross_entropy
    binary_cross_entropy_backward binary_cross_entropy_with_logits binary_cross_entropy_with_logits_backward
    bincount bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwisexor bmm bmm_compatible
    broadcast bucketize cast cat ceil channel_shuffle chunk_cat_out clamp clamp_max clamp_min clip clone
    confusion_transpose_backward constant_pad_nd conv1d conv2d conv2d_backward conv_transpose2d_backward copy_ cos
    cosh cumprod cumsum div divide dot dropout dropout_backward dtype_cast elu elu_backward embedding
    embedding_backward embeddingdensebackward empty_strided eq equal erf erfc erfinv exp exp2 expm1 eye fast_gelu
    fast_gelu_backward fill fill_diagonal fix flip floatstatus floor floordivide fmod foreach_abs foreach_acos
    foreach_add_list foreach_add_scalar foreach_add_scalar_list foreach_addcdiv_scalar foreach_addcdiv_scalar_list
    foreach_addcdiv_tensor foreach_addcmul_scalar foreach_addcmul_scalar_list foreach_asin foreach_atan foreach_ceil
    foreach_clamp_empty_scalar foreach_copy foreach_cos foreach_cosh foreach_div_list foreach_div_scalar
    foreach_div_scalar_list foreach_erf foreach_erfc foreach_exp foreach_expm1 foreach_floor foreach_frac
    foreach_log foreach_log10 foreach_log1p foreach_log2 foreach_maximum_list foreach_mul_list foreach_mul_scalar
    foreach_mul_scalar_list foreach_neg foreach_norm foreach_reciprocal foreach_round_off_number foreach_sigmoid
    foreach_sin foreach_sinh foreach_sqrt foreach_sub_list foreach_sub_scalar foreach_sub_scalar_list foreach_tan
    foreach_tanh foreach_trunc foreach_zero format_cast frac from_numpy full fused_sgd gather ge gelu gelu_backward
    gelu_out ger glu glugrad greater greater_equal group_norm group_norm_backward gt hard_swish hard_swish_backward
    hardshrink hardshrink_backward hardsigmoid hardsigmoid_backward hardtanh hardtanh_backward index index_add
    index_copy index_fill index_put index_select indexing is_nonzero isclose isfinite isinf kl_div_backward l1_loss
    l1_loss_backward layer_norm layer_norm_backward le leaky_relu leaky_relu_backward lerp less less_equal linspace
    log log10 log1p log2 log_softmax log_softmax_backward logical_and logical_not logical_or logical_xor logit
    logsigmoid logsigmoid_backward logsigmoidforward logspace logsumexp lt masked_fill masked_scatter masked_select
    matmul matmul_compatible max max_backward max_pool2d max_pool2d_backward max_pool2d_with_indices
    max_pool2d_with_indices_backward mean min min_backward minimum mish mish_backward mish_backward_v2 mish_v2 mm
    mse_loss mse_loss_backward multinomial multiply mv nan_to_num native_dropout_backward ne neg negative nllloss
    nllloss2d nllloss2d_backward nllloss_backward nonzero norm normal not_equal npu_bertapplyadam npu_linear
    npu_linear_backward npu_one_hot one_hot ones ones_like polar pow prelu prelu_backward prod
    prompt_flash_attention put random randperm range reciprocal reflection_pad1d reflection_pad1d_backward
    reflection_pad2d reflection_pad2d_backward relu remainder repeat repeat_interleave replication_pad1d
    replication_pad1d_backward replication_pad2d replication_pad2d_backward reshape roll round rsqrt rsub
    scaled_dot_product_attention scaled_masked_softmax scatter scatter_add scatter_reduce searchsorted sigmoid
    sigmoid_backward sign silu silu_backward sin sinc sinh slice smooth_l1_loss_backward smoothl1loss
    soft_margin_loss soft_margin_loss_backward softmax softmax_backward_data softplus softplus_backward softshrink
    softshrink_backward sort sort_without_indices split_with_sizes_copy sqrt stack std std_mean sub subtract take
    tan tanh tanh_backward tensor_factories threshold_backward tile to topk trace transpose tril triu true_divide
    trunc unfold_backward uniform_ unique unique2 unique_consecutive upsample_bicubic2d upsample_bicubic2d_backward
    upsample_bilinear2d upsample_bilinear2d_backward upsample_nearest2d upsample_nearest2d_backward var where xor
    zero zeros
        """,
    ),
    (
        "op_plugin",
        "test/test_custom_ops",
        """
    group_norm_silu npu_add_layer_norm npu_add_rms_norm npu_add_rms_norm_cast npu_add_rms_norm_v2 npu_addmm
    npu_apply_adam_w npu_apply_rotary_pos_emb npu_clipped_swiglu npu_dropout_gen_mask npu_flash_attention
    npu_flash_attention_grad npu_flash_attention_grad_v2 npu_flash_attention_v2 npu_fused_infer_attention_score
    npu_fused_infer_attention_score_v2 npu_fused_infer_attention_score_v2_with_workspace
    npu_fused_infer_attention_score_with_workspace npu_gelu npu_gelu_backward npu_gelu_mul npu_gemma_rms_norm
    npu_group_norm_swish npu_grouped_matmul npu_indexing npu_layer_norm_eval npu_moe_finalize_routing_v2
    npu_moe_gating_top_k_softmax npu_moe_gating_top_k_softmax_v2 npu_moe_init_routing
    npu_moe_token_permute_and_unpermute npu_rms_norm npu_rms_norm_backward npu_rotary_mul npu_rotary_mul_backward
    npu_sim_exponential_ npu_swi_glu npu_swi_glu_backward prompt_flash_attention
        """,
    ),
    (
        "pytorch",
        "test/custom_ops",
        """
    amp_foreach_non_finite_check_and_unscale fast_gelu float_status npu_confusion_transpose npu_dtype_cast
    npu_format_cast npu_geglu npu_geglu_backward npu_one_hot npu_reshape npu_rotary_mul npu_rotary_mul_backward
    npu_scaled_masked_softmax npu_silu npu_transpose one_ prompt_flash_attention resize_
        """,
    ),
    ("pytorch", "test", "chunk_cat"),
    ("pytorch", "test/npu", "amp check_over_flow combine_tensors generators inf_nan_mode random_sampling"),
    ("pytorch", "test/optim", "fused_optimizers npu_fused_rmsprop_tf swa_utils"),
)

OTHER_WORDS = "is refused as the test wants, in other words than those of the torch_npu that the test was written for"
NO_BFLOAT16 = "310P has no bfloat16"
NO_CUSTOM_DTYPE = "torch_npu has customize_dtype on Ascend950 only"
QUANTISED = "multiplies int8 by int8, which the emulator does not have"
NO_PEER = "310P cannot copy between devices"
NPU_GRAPH = "captures an NPU graph, not an operator"
HALF_OF_THE_HOST = (
    "compares with float16 of this host or of NumPy, which round after each step; the chip's are rounded once"
)
FLAG = "expects the overflow flag of a chip that saturates, where 910B3 finds infinity"
NO_GRADIENT = "310P has no kernel for the gradient"
FLOAT32_FLAG = "expects the overflow flag of float32, which the emulator raises for float16 alone"

# (chip, test, reason): both are patterns, and the first line that fits says why a failed test does not count.
NOT_APPLICABLE: tuple[tuple[str, str, str], ...] = (
    ("*", "*::test_2args_broadcast", "a helper that the file imports, not a test"),
    ("*", "*::test_*_device_check", OTHER_WORDS),
    ("*", "*::test_check_diff_device", OTHER_WORDS),
    ("*", "*TestLerp::test_lerp_inplace_shape_format_910b", OTHER_WORDS),
    ("*", "*TestAddmv::test_addmv_fp16_to_fp32", "torch 2.13 itself refuses operands of different dtypes"),
    (
        "*",
        "*TestGelu::test_gelu_float32_1",
        "draws a number below 3, where the chips' F.gelu, the tanh form, differs from erf",
    ),
    ("*", "*::test_npu_flash_attention_tensor*_graph", NPU_GRAPH),
    ("*", "*::test_npu_flash_attention_tensor_tnd_with_dropmask", NPU_GRAPH),
    ("*", "*TestGroupedMatmul::test_npu_grouped_matmul_quant_3", QUANTISED),
    ("*", "*TestNpuFormatCast*c0_8*", NO_CUSTOM_DTYPE),
    ("*", "*TestNpuFormatCast*customize_dtype*", NO_CUSTOM_DTYPE),
    *(
        ("*", f"*::test_foreach_{name}_*_float16_shpae_tensor_num", HALF_OF_THE_HOST)
        for name in ("add_list", "sub_list", "addcdiv_scalar_list", "addcdiv_tensor", "addcmul_scalar_list")
    ),
    ("Ascend910B*", "*TestAmpForeachNonFiniteCheckAndUnscale::test_grad_scaling_unscale_*", FLAG),
    *(
        ("Ascend310P*", f"*.test_base_ops.test_{name}.*", NO_GRADIENT)
        for name in (
            *("batchnorm_backward", "batchnorm_backward_eval", "embedding_backward", "embeddingdensebackward"),
            *("group_norm_backward", "hard_swish_backward", "hardshrink_backward", "kl_div_backward"),
            *("max_pool2d_backward", "max_pool2d_with_indices", "max_pool2d_with_indices_backward"),
            *("nllloss2d_backward", "nllloss_backward", "prelu_backward", "silu_backward"),
            *("soft_margin_loss_backward", "softplus_backward", "upsample_nearest2d_backward"),
        )
    ),
    ("Ascend310P*", "*TestFusedOptim::*", NO_GRADIENT),
    ("Ascend310P*", "*::test_matmul*bf16*", NO_BFLOAT16),
    ("Ascend310P*", "*TestCombineTensors::*_bfloat16", NO_BFLOAT16),
    ("Ascend310P*", "*TestChunkCat::test_chunk_cat_npu_supported_dtypes", NO_BFLOAT16),
    ("Ascend310P*", "*TestAmpForeachNonFiniteCheckAndUnscale::test_grad_scaling_unscale_float32", FLOAT32_FLAG),
    (
        "Ascend310P*",
        "*TestBmmCompatible::*",
        "mixes in bfloat16, and wants more of float32 than float16 products, which 310P has",
    ),
    ("Ascend310P*", "*TestMatMulCompatible::*fp32", "wants more of float32 than float16 products, which 310P has"),
    ("Ascend310P*", "*TestVar::test_var_mean_dim_correction", "wants infinity, which 310P does not have"),
    ("Ascend310P*", "*::test_dtype_cast_multidevice", NO_PEER),
    ("Ascend310P*", "*::test_npu_*_multinpu", NO_PEER),
)

SECONDS_PER_TEST = 600
CONFTEST = """
import pytest, random, numpy, torch, torch_npu

@pytest.fixture(autouse=True)
def fresh(request):
    torch.npu.set_compile_mode(jit_compile=False)
    torch.npu.config.allow_internal_format = "format_cast" in request.path.name
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(666)
"""
PROBE = "import torch, torch_npu; print(torch_npu.__version__, torch.npu.device_count(), torch.npu.get_device_name(0))"


def find_npu() -> dict[str, Any]:
    """Which torch_npu there is, and what it sees."""
    result = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ForkError(f"torch_npu sees no NPU: {reason}\nWithout a card: python -m emulator run --help")
    version, devices, chip = result.stdout.splitlines()[-1].split(maxsplit=2)
    return {"torch_npu": version, "devices": int(devices), "chip": chip}


def select(op_plugin: Path, pytorch: Path, only: list[str]) -> dict[str, Path]:
    """The test files by the name that they get here, <repository>/<path>, whose name fits a pattern of `only`."""
    checkouts = {"op_plugin": op_plugin, "pytorch": pytorch}
    files: dict[str, Path] = {}
    for repository, folder, operators in SELECTION:
        paths = [f"{folder}/test_{operator}.py" for operator in operators.split()]
        checkout = checkouts[repository]
        missing = [path for path in paths if not (checkout / path).is_file()]
        if missing:
            problem = f"it lacks {len(missing)} of {len(paths)} files, as {missing[0]}"
            raise ForkError(f"{checkout} is not the checkout that --help names: {problem}")
        files |= {f"{repository}/{path}": checkout / path for path in paths}
    selected = {name: path for name, path in files.items() if any(fnmatchcase(name, pattern) for pattern in only)}
    if not selected:
        raise ForkError(f"--only {' '.join(only)}: no file fits, of {', '.join(files)}")
    return selected


def run_pytest(name: str, scratch: Path, options: list[str]) -> None:
    """The whole life of a test file's process; what it says goes to the file `output` in the folder `scratch`."""
    import pytest

    os.chdir(scratch)
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(output, stream)
    sys.exit(pytest.main([*options, name]))


def run_file(server: ForkServerContext, name: str, scratch: Path) -> tuple[Outcomes, str]:
    """How each test of the file `name` in the folder `scratch` ended, and what pytest said."""
    report = scratch / "report.xml"
    report.unlink(missing_ok=True)
    options = ["--quiet", "--tb=short", "-p", "no:cacheprovider", f"--timeout={SECONDS_PER_TEST}"]
    process = server.Process(target=run_pytest, args=(name, scratch, [*options, f"--junitxml={report}"]))
    process.start()
    process.join()
    output = scratch.joinpath("output").read_text("utf-8", errors="replace")
    if report.exists():
        return read_report(report), output
    reason = f"the process ended with exit code {process.exitcode}"
    return {f"{name}::": {"outcome": "failed", "reason": reason}}, output


def judge(tests: Outcomes, chip: str) -> Outcomes:
    """`tests` with the failures that NOT_APPLICABLE explains as such."""
    judged = {}
    for name, test in tests.items():
        lines = (line for line in NOT_APPLICABLE if fnmatchcase(chip, line[0]) and fnmatchcase(name, line[1]))
        line = next(lines, None) if test["outcome"] == "failed" else None
        judged[name] = {"outcome": "not applicable", "reason": line[2]} if line else test
    return judged


def run_all(files: dict[str, Path], chip: str) -> Iterator[tuple[Outcomes, str]]:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        scratch.joinpath("conftest.py").write_text(CONFTEST, "utf-8")
        # Importing takes longer than most files' tests, so all are forked from one process that has imported.
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["pytest", "torch_npu.testing.testcase"])
        for name, path in files.items():
            scratch.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, scratch / name)
            tests, output = run_file(server, name, scratch)
            yield judge(tests, chip), output


def count(tests: Outcomes) -> dict[str, int]:
    found = Counter(test["outcome"] for test in tests.values())
    return {outcome: found[outcome] for outcome in ("passed", "failed", "not applicable", "skipped")}


def names_of(tests: Outcomes, outcome: str) -> Iterable[tuple[str, str]]:
    return ((name, test["reason"]) for name, test in tests.items() if test["outcome"] == outcome)


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        prog="run_npu_op_tests.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op_plugin", metavar="DIR", type=Path, required=True, help="checkout of Ascend/op-plugin")
    parser.add_argument("--pytorch", metavar="DIR", type=Path, required=True, help="checkout of Ascend/pytorch")
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help="where the outcomes go, as JSON")
    parser.add_argument(
        "--only", metavar="PATTERN", nargs="+", default=["*"], help="run only the files that fit, as '*/test_add*'"
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    files = select(arguments.op_plugin, arguments.pytorch, arguments.only)
    os.environ["TASK_QUEUE_ENABLE"] = "0"
    npu = find_npu()
    tests: Outcomes = {}
    with tqdm(total=len(files), unit="file") as progress:
        for outcomes, output in run_all(files, npu["chip"]):
            tests |= outcomes
            counts = count(tests)
            if any(names_of(outcomes, "failed")):
                progress.write(output)
            progress.set_postfix_str(", ".join(f"{number} {outcome}" for outcome, number in counts.items()))
            progress.update()
    write_json(arguments.output, npu | {"counts": count(tests), "tests": tests})
    for reason, number in Counter(reason for _, reason in names_of(tests, "not applicable")).items():
        print(f"not applicable ({number}): {reason}")
    for name, reason in names_of(tests, "failed"):
        print(f"failed: {name}: {reason}")
    print(f"torch_npu {npu['torch_npu']} with {npu['devices']} x {npu['chip']}: {count(tests)}")
    return 1 if any(names_of(tests, "failed")) else 0


if __name__ == "__main__":
    run_command("run_npu_op_tests.py", main)
