"""The doctor as a whole: the order of what it finds, and what no check knows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import test_doctor_config
import test_doctor_files
import test_doctor_tokens
import test_doctor_weights
from planting import GENERATION, LFS, config, cut, faults, remove

from qwenkit.errors import ModelNotFoundError
from qwenkit.survey.doctor import CHECKS, examine
from qwenkit.survey.doctor_facts import Facts
from tiny import CONFIG, IM_END

PLANTED = [
    *test_doctor_files.PLANTED,
    *test_doctor_config.PLANTED,
    *test_doctor_tokens.PLANTED,
    *test_doctor_weights.PLANTED,
]


def test_more_than_thirty_kinds_are_planted() -> None:
    assert len({kind for kind, _ in PLANTED}) >= 60


def test_faults_come_first_and_all_of_them(healthy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    shutil.copytree(healthy, folder)
    for plant in (config(rms_norm_eps=1e-3, use_dynamc_ntk=True), remove(GENERATION), cut):
        plant(folder)
    found = examine(folder)
    kinds = {"wrong-eps", "misspelt-key", "no-generation-config", "damaged-weights"}
    assert kinds - {"no-generation-config"} <= {finding.kind for finding in found}
    assert [f.severity for f in found] == sorted(f.severity for f in found)


def test_what_no_check_knows_is_told_all_the_same(
    healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, plant in enumerate((config(num_attention_heads=5), config(eos_token_id="end"))):
        folder = tmp_path / str(number)
        shutil.copytree(healthy, folder)
        plant(folder)
        monkeypatch.setattr("qwenkit.survey.doctor.CHECKS", ())
        assert faults(folder) == {"does-not-load"}


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF but not really")
    assert faults(tmp_path / "model.gguf") == {"damaged-weights"}
    (tmp_path / "pointer.gguf").write_text(LFS)
    assert [finding.kind for finding in examine(tmp_path / "pointer.gguf")] == ["lfs-pointer"]
    with pytest.raises(ModelNotFoundError):
        examine(tmp_path / "nothing")


def test_every_check_survives_knowing_nothing(tmp_path: Path) -> None:
    facts = Facts(path=tmp_path, folder=tmp_path, files={})
    assert {finding.kind for check in CHECKS for finding in check(facts)} == {"no-config"}


def test_the_ids_of_the_tiny_model_are_those_planted_here() -> None:
    assert CONFIG["eos_token_id"] == IM_END == 258
