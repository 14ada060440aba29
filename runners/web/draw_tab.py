"""The tab that draws with Stable Diffusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from runners.web.drawing import GUIDANCE_SCALE, NUM_IMAGES, STEPS, Drawing, DrawingModel
from runners.web.parts import (
    AT_ONCE,
    PROGRESS,
    QUEUE,
    Results,
    Translated,
    error,
    errors_shown,
    files_to_download,
    new_folder,
    save,
    seed_number,
    slider,
    steps_shown,
    warn,
)
from runners.web.texts import text
from runners.web.worker import Cancelled, Worker

DEMO_PROMPT = "a large red circle in the centre, white background"


class DrawTab:
    """Lays itself out where it is made; results are kept in `scratch`."""

    def __init__(
        self, model: DrawingModel, worker: Worker, scratch: Path, make: Translated, language: gr.Radio
    ) -> None:
        self.model, self.worker, self.scratch = model, worker, scratch
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                inputs = self._lay_inputs(make)
                with gr.Row():
                    cancel = make(gr.Button, {"value": "cancel"}, elem_id="cancel-draw")
                    start = make(gr.Button, {"value": "draw"}, variant="primary", elem_id="draw")
            with gr.Column(scale=3, min_width=340):
                gallery = make(
                    gr.Gallery,
                    {"label": "drawn"},
                    interactive=False,
                    columns=2,
                    object_fit="contain",
                    fit_columns=False,
                    elem_id="drawn",
                )
                files = files_to_download(make, "draw-files")
        kept = Results.state()
        drawing = start.click(
            self.draw,
            [language, kept, *inputs],
            [gallery, files, kept],
            show_progress_on=gallery,
            api_name="draw",
            **QUEUE,
        )
        cancel.click(self.cancel, language, **AT_ONCE)
        cancel.click(None, cancels=[drawing])  # what still waits for its turn

    def _lay_inputs(self, make: Translated) -> list[Any]:
        """In the order of `draw`'s arguments."""
        args = self.model.args
        prompt = make(
            gr.Textbox,
            {"label": "prompt", "placeholder": "prompt_hint"},
            value=DEMO_PROMPT if self.model.is_demo else "",
            lines=2,
            elem_id="prompt",
        )
        negative = make(gr.Textbox, {"label": "negative_prompt", "placeholder": "negative_prompt_hint"}, value="")
        return [
            prompt,
            negative,
            slider(make, "steps", STEPS, args.steps),
            slider(make, "guidance_scale", GUIDANCE_SCALE, args.guidance_scale),
            slider(make, "num_images", NUM_IMAGES, 1),
            seed_number(make, args.seed, None),
        ]

    def draw(
        self,
        language: str,
        former: Results,
        prompt: str,
        negative_prompt: str,
        steps: float,
        guidance_scale: float,
        num_images: float,
        seed: int,
        request: gr.Request,
        progress: gr.Progress = PROGRESS,
    ) -> tuple[Any, ...]:
        """The pictures, the files that hold them, and what is kept in the place of `former`."""
        if not prompt.strip():
            raise error(text("no_prompt", language))
        drawing = Drawing([prompt.strip()], negative_prompt, int(steps), guidance_scale, int(num_images), int(seed))
        if self.worker.loaded_name != self.model.name:
            progress(0, desc=text("loading", language))
        show = steps_shown(progress, language)
        owner, model = owner_of(request), self.model
        try:
            with errors_shown():
                drawn, warnings = self.worker.run(
                    owner, model, lambda loaded, on_step: model.draw(loaded, drawing, on_step), show
                )
        except Cancelled:
            return (gr.skip(),) * 3
        with new_folder(self.scratch) as folder:
            files = [save(each.image, f"seed_{each.about['seed']}", each.about, folder) for each in drawn]
        for warning in warnings:
            warn(warning)
        former.remove()
        return [png for png, _ in files], gr.update(value=sum(files, []), visible=True), Results(folder)

    def cancel(self, language: str, request: gr.Request) -> None:
        gr.Info(text("cancelled", language))
        self.worker.cancel(owner_of(request))


def owner_of(request: gr.Request) -> str:
    """One browser's page, as far as it draws."""
    return f"draw {request.session_hash}"
