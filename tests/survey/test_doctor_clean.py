"""The doctor finds no fault in clean checkpoints, and explains what is odd in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from clean_models import CLEAN, PUBLISHED, published
from planting import CONFIG_FILE, faults

from qwenkit.models.spec import architectures
from qwenkit.survey.doctor import examine
from tiny import write_tiny_checkpoint


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_clean(name: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text(json.dumps(PUBLISHED[name]))
    assert faults(tmp_path) == {"no-weights", "no-tokenizer"}  # nothing else is there


@pytest.mark.parametrize("kind", CLEAN)
def test_none_is_found_in_clean_ones(kind: str, tmp_path: Path) -> None:
    path = CLEAN[kind](tmp_path / ("Model-7B" if kind == "base" else "Model-7B-Instruct"))
    assert [finding for finding in examine(path) if finding.severity == "fault"] == []


def test_every_architecture_is_among_the_clean_ones() -> None:
    assert set(architectures()) - set(CLEAN) == {"qwen2"}  # which the others are


def test_the_embedded_model_is_clean(default_model_path: Path) -> None:
    assert examine(default_model_path) == []


def test_what_is_odd_and_harmless_is_explained(tmp_path: Path) -> None:
    notes = {finding.kind for finding in examine(published(tmp_path / "model"))}
    assert notes == {"padded-vocabulary", "unused-window"}
    folder = write_tiny_checkpoint(
        tmp_path / "greedy", generation={"do_sample": False, "temperature": 0.7, "top_k": 20}
    )
    found = {finding.kind: finding.english for finding in examine(folder)}
    assert "temperature, top_k do nothing" in found["unused-sampling"]
