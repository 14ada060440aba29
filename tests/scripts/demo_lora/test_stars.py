"""The pictures that an adapter learns from: their judge knows them, and none of them is asked for later."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.demo_lora.stars import STAR, choose_scenes, main
from scripts.demo_model.scenes import SHAPES, score_image


def test_what_is_learnt_is_not_asked_for() -> None:
    learnt, held_out = choose_scenes(100, seed=0)
    assert len(learnt) == 100
    alone, beside = held_out.values()
    assert len(alone) == 40
    assert not {*learnt} & {*alone, *beside}
    assert len({*alone, *beside, *learnt}) == 90 + 3456


def test_the_judge_tells_stars_from_what_the_model_knows() -> None:
    learnt, _ = choose_scenes(20, seed=0)
    for scene in learnt:
        assert score_image(scene.render(), scene, (*SHAPES, STAR)).all
        assert not score_image(scene.render(), scene).shape


def test_pictures_have_captions(tmp_path: Path) -> None:
    main(["--output_dir", str(tmp_path), "--pictures", "4"])
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert all((tmp_path / row["file_name"]).exists() and STAR in row["text"] for row in rows)
