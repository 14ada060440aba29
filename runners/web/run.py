"""What gradio_demo_npu.py does: it checks the models, and serves the page."""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from ascend.memory import keep_freed_memory
from runners.cli import ArgumentParser, UserError, file_path, non_negative_int, one_line_errors
from runners.devices import add_device_arguments, choose_device, choose_dtype
from runners.model_dir import require_patched_diffusers
from runners.report import Report
from runners.stable_diffusion.arguments import lora
from runners.web.drawing import DrawingModel
from runners.web.editing import FAMILIES, EditingModel
from runners.web.texts import LANGUAGES
from runners.web.worker import Worker

SHARED = ("device", "local_rank", "memory", "memory_limit", "soc_version", "FA", "dynamo")


def parse_arguments(description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("page").add_argument
    add("--host", default="127.0.0.1", metavar="NAME", help="address to listen on; 0.0.0.0 is all (127.0.0.1)")
    add("--port", type=non_negative_int, default=7860, metavar="N", help="0 takes the first free from 7860 on (7860)")
    add("--language", choices=LANGUAGES, default="en", help="which people see first (en)")
    add = parser.add_argument_group("models").add_argument
    add("--e1_1_path", type=file_path, metavar="DIR", help="HiDream-E1.1 in diffusers' layout")
    add("--e1_full_path", type=file_path, metavar="DIR", help="HiDream-E1-Full; without both, the demo model is each")
    add(
        "--edit_lora",
        type=lora,
        metavar="FILE[:SCALE]",
        help="HiDream-E1-Full's adapter, with HiDream-I1-Full in --e1_full_path",
    )
    add("--refiner_path", type=file_path, metavar="DIR", help="folder of HiDream-I1-Full's transformer")
    add("--llama_path", type=file_path, metavar="DIR", help="Llama 3.1 8B Instruct, where the models have none")
    add("--sd_path", type=file_path, metavar="DIR", help="Stable Diffusion, for the second tab (demo model)")
    add("--model", choices=FAMILIES, help="which is chosen first (the first that there is)")
    add_device_arguments(parser)
    add = parser.add_argument_group("acceleration").add_argument
    add("--FA", action="store_true", help="fused attention and experts, see README")
    add("--dynamo", action="store_true", help="graphs: torchair on NPUs, inductor elsewhere")
    args = parser.parse_args(arguments)
    for name in ("refiner_path", "llama_path"):
        if getattr(args, name) and not (args.e1_1_path or args.e1_full_path):
            parser.error(f"--{name} has no effect on the demo model: give --e1_1_path or --e1_full_path")
    if args.edit_lora and not args.e1_full_path:
        parser.error("--edit_lora is for HiDream-I1-Full in --e1_full_path, which is not given")
    return args


def run(args: argparse.Namespace, folder: Path) -> None:
    """Serve until the program is interrupted; `folder` is that of HiDream's examples."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError(
            "the page needs gradio: pip install -r examples/hidream_e1/requirements_gradio.txt in this environment"
        )
    require_patched_diffusers()
    report = Report()
    manager = choose_device(args, report)
    if manager.device.type == "cpu":
        keep_freed_memory()
    shared = {name: getattr(args, name) for name in SHARED} | {"dtype": choose_dtype(args, manager, report)}
    paths = {"e1.1": args.e1_1_path, "e1-full": args.e1_full_path}
    keys = [key for key in FAMILIES if paths[key] or not any(paths.values())]
    if args.model and args.model not in keys:
        raise UserError(f"--model {args.model} is none of the models that are given: give its path, too")
    files = {"refiner_path": args.refiner_path, "llama_path": args.llama_path}
    adapters = {"e1.1": None, "e1-full": args.edit_lora}
    editing = [
        EditingModel(
            key, shared | files | {"model_path": paths[key], "edit_lora": adapters[key]}, folder, manager, report
        )
        for key in sorted(keys, key=lambda key: key != args.model)
    ]
    drawing = DrawingModel(shared | {"model_path": args.sd_path}, folder.parent / "sd2.1", manager, report)
    worker = Worker(manager)
    try:
        with tempfile.TemporaryDirectory(prefix="diffusers-npu-page-") as scratch:
            serve(args, editing, drawing, worker, folder, Path(scratch))
    finally:
        worker.close()


def serve(
    args: argparse.Namespace,
    editing: Sequence[EditingModel],
    drawing: DrawingModel,
    worker: Worker,
    folder: Path,
    scratch: Path,
) -> None:
    """Uploads and results are in `scratch`."""
    # gradio reads these when it is imported, and would tell its authors of each start.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(scratch)}
    import gradio

    from runners.web.page import CSS, FONTS, build_page

    page = build_page(editing, drawing, worker, folder, scratch, drawing.args.dtype, args.language)
    try:
        page.launch(
            server_name=args.host,
            server_port=args.port or None,
            share=False,
            inbrowser=False,
            ssr_mode=False,
            footer_links=[],
            theme=gradio.themes.Default(font=FONTS),
            css=CSS,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(
            f"cannot listen on --host {args.host} --port {args.port}: the port is in use, or the address not here"
        ) from error
    print(f"the page is at {page.local_url}, until Ctrl-C", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        return
    finally:
        page.close()


def main(description: str | None, folder: Path, arguments: Sequence[str] | None = None) -> None:
    """Run the command line of the program that `description` describes, in `folder`, beside its demo model."""
    with one_line_errors():
        run(parse_arguments(description, arguments), folder)
