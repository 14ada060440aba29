"""The tab that edits pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from runners.cli import UserError
from runners.hidream.arguments import DEMO_DESCRIPTION, DEMO_IMAGE, DEMO_INSTRUCTION
from runners.hidream.edits import Edit
from runners.hidream.refine_instruction import check_endpoint, refine_edit
from runners.web.editing import Edited, EditingModel, Settings
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


class EditTab:
    """Lays itself out where it is made.

    Args:
        models: of which people choose; the first is chosen already.
        folder: of the demo's picture, which is there already where the model is the demo's.
        scratch: where results are kept.
    """

    def __init__(
        self,
        models: Sequence[EditingModel],
        worker: Worker,
        folder: Path,
        scratch: Path,
        make: Translated,
        language: gr.Radio,
    ) -> None:
        self.models = {model.family.name: model for model in models}
        self.worker, self.scratch = worker, scratch
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                inputs = self._lay_inputs(models[0], folder, make)
                with gr.Row():
                    cancel = make(gr.Button, {"value": "cancel"}, elem_id="cancel-edit")
                    start = make(gr.Button, {"value": "edit"}, variant="primary", elem_id="edit")
            with gr.Column(scale=3, min_width=340):
                compare = make(gr.ImageSlider, {"label": "result"}, type="filepath", elem_id="compare")
                results = make(
                    gr.Gallery,
                    {"label": "results"},
                    interactive=False,
                    allow_preview=False,
                    object_fit="contain",
                    columns=5,
                    height=220,
                    fit_columns=False,
                    visible=False,
                    elem_id="results",
                )
                files = files_to_download(make, "edit-files")
        kept = Results.state()
        edits = start.click(
            self.edit,
            [language, kept, *inputs],
            [compare, results, files, kept],
            show_progress_on=compare,
            api_name="edit",
            **QUEUE,
        )
        cancel.click(self.cancel, language, **AT_ONCE)
        cancel.click(None, cancels=[edits])  # what still waits for its turn
        results.select(self.choose_result, kept, compare, queue=False, api_visibility="private")

    def _lay_inputs(self, model: EditingModel, folder: Path, make: Translated) -> list[Any]:
        """In the order of `edit`'s arguments."""
        args, ranges, demo = model.args, model.ranges, model.is_demo
        name = make(gr.Radio, {"label": "model"}, choices=list(self.models), value=model.family.name, elem_id="model")
        pictures = make(
            gr.Gallery,
            {"label": "pictures"},
            value=[folder / DEMO_IMAGE] if demo else None,
            type="filepath",
            file_types=["image"],
            columns=3,
            height=220,
            object_fit="contain",
            fit_columns=False,
            interactive=True,
            elem_id="pictures",
        )
        words = [
            make(
                gr.Textbox,
                {"label": key, "placeholder": f"{key}_hint"},
                value=value if demo else "",
                lines=2,
                elem_id=key,
            )
            for key, value in (("instruction", DEMO_INSTRUCTION), ("description", DEMO_DESCRIPTION))
        ]
        has_endpoint = can_refine_words()
        words.append(
            make(
                gr.Checkbox,
                {"label": "refine_words", "info": "refine_words_hint"},
                value=has_endpoint and refines_words(model),
                interactive=has_endpoint,
            )
        )
        with make(gr.Accordion, {"label": "settings"}, open=False):
            negative = make(
                gr.Textbox,
                {"label": "negative_prompt", "placeholder": "negative_prompt_hint"},
                value=args.negative_prompt,
            )
            settings = [
                slider(make, "steps", ranges.steps, args.steps),
                slider(make, "guidance_scale", ranges.guidance_scale, args.guidance_scale),
                slider(make, "image_guidance_scale", ranges.image_guidance_scale, args.image_guidance_scale),
                slider(make, "refine_strength", ranges.refine_strength, args.refine_strength),
                make(gr.Checkbox, {"label": "clip_cfg_norm"}, value=args.clip_cfg_norm),
            ]
            settings[3].interactive = model.refines
            seed = seed_number(make, args.seed, ranges.seed[1])
        chosen = [negative, *settings, seed]
        name.change(self.choose_model, name, [words[-1], *chosen], queue=False, api_visibility="private")
        return [name, pictures, *words, *chosen]

    def choose_model(self, name: str) -> list[dict[str, Any]]:
        """That model's own settings, within its ranges."""
        model = self.models[name]
        args, ranges = model.args, model.ranges
        updates = [
            gr.update(value=can_refine_words() and refines_words(model)),
            gr.update(value=args.negative_prompt),
        ]
        for key in ("steps", "guidance_scale", "image_guidance_scale", "refine_strength"):
            least, most, step = getattr(ranges, key)
            updates.append(gr.update(minimum=least, maximum=most, step=step, value=getattr(args, key)))
        updates[-1]["interactive"] = model.refines
        return [*updates, gr.update(value=args.clip_cfg_norm), gr.update(value=args.seed, maximum=ranges.seed[1])]

    def edit(
        self,
        language: str,
        former: Results,
        model_name: str,
        pictures: list[tuple[str, str | None]] | None,
        instruction: str,
        description: str,
        refine_words: bool,
        negative_prompt: str,
        steps: float,
        guidance_scale: float,
        image_guidance_scale: float,
        refine_strength: float,
        clip_cfg_norm: bool,
        seed: int,
        request: gr.Request,
        progress: gr.Progress = PROGRESS,
    ) -> tuple[Any, ...]:
        """The pair to compare, all results, their files, and what is kept in the place of `former`."""
        if not pictures:
            raise error(text("no_picture", language))
        if not instruction.strip():
            raise error(text("no_instruction", language))
        description = description.strip()
        if refine_strength > 0 and not description and not refine_words:
            warn(text("no_description", language))
        settings = Settings(
            negative_prompt, int(steps), guidance_scale, image_guidance_scale, refine_strength, clip_cfg_norm
        )
        edits = [
            Edit(Path(path), instruction.strip(), description or None, int(seed), f"{number}_{Path(path).stem}")
            for number, (path, _) in enumerate(pictures, start=1)
        ]
        model, owner = self.models[model_name], owner_of(request)
        try:
            with errors_shown(), new_folder(self.scratch) as folder, self.worker.request(owner) as go_on:
                updates = self._edit_all(
                    model, edits, refine_words, settings, folder, owner, language, progress, go_on
                )
        except Cancelled:
            return (gr.skip(),) * 4
        former.remove()
        return updates

    def _edit_all(
        self,
        model: EditingModel,
        edits: Sequence[Edit],
        refine_words: bool,
        settings: Settings,
        folder: Path,
        owner: str,
        language: str,
        progress: gr.Progress,
        go_on: Callable[[], None],
    ) -> tuple[Any, ...]:
        pairs: list[tuple[str, str]] = []
        files: list[str] = []
        for number, edit in enumerate(edits, start=1):
            show = steps_shown(progress, language, number, len(edits))
            go_on()
            try:
                if refine_words:
                    progress(0, desc=text("wording", language))
                wanted = refine_edit(edit) if refine_words else edit
                go_on()
                if self.worker.loaded_name != model.name:
                    progress(0, desc=text("loading", language))
                edited = self.worker.run(owner, model, make_edit(model, wanted, settings), show)
            except UserError as problem:
                if len(edits) == 1:
                    raise
                warn(str(problem))  # the others can do without
                continue
            if edited.warning:
                warn(edited.warning)
            before = folder / f"{edit.name}_before.jpg"
            edited.source.save(before, quality=95)
            about = edited.about if wanted is edit else edited.about | {"original_instruction": edit.instruction}
            saved = save(edited.image, edit.name, about, folder)
            files += saved
            pairs.append((str(before), saved[0]))
        several = len(edits) > 1
        return (
            pairs[0] if pairs else None,
            gr.update(value=[after for _, after in pairs], visible=several),
            gr.update(value=files, visible=bool(files)),
            Results(folder, pairs),
        )

    def choose_result(self, kept: Results, event: gr.SelectData) -> tuple[str, str]:
        return kept.pairs[event.index]

    def cancel(self, language: str, request: gr.Request) -> None:
        gr.Info(text("cancelled", language))
        self.worker.cancel(owner_of(request))


def make_edit(model: EditingModel, edit: Edit, settings: Settings) -> Callable[..., Edited]:
    return lambda loaded, on_step: model.edit(loaded, edit, settings, on_step)


def can_refine_words() -> bool:
    try:
        check_endpoint()
    except UserError:
        return False
    return True


def refines_words(model: EditingModel) -> bool:
    """Whether the original's page does so unless it is told not to."""
    return model.key == "e1-full" and not model.is_demo


def owner_of(request: gr.Request) -> str:
    """One browser's page, as far as it edits."""
    return f"edit {request.session_hash}"
