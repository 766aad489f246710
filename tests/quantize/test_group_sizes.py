"""AWQ's one group size: whole rows, matrices that keep their numbers, and what the sheet says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantized_made import DENSE, compared, made_rows, write_quantized
from qwenkit.errors import UsageError
from qwenkit.formats.awq import AwqWeight
from qwenkit.load import load
from qwenkit.quantize.report import method_notes
from qwenkit.quantize.run import quantize
from qwenkit.quantize.settings import QuantizeSettings, Rule
from qwenkit.quantize.stream import LayerSource
from tiny import write_tiny_checkpoint

UNEVEN: dict[str, Any] = DENSE | {"intermediate_size": 72}  # a multiple of eight, not of 32


def _groups(folder: Path) -> dict[str, int]:
    return {
        name.removesuffix(".weight"): module.group_size
        for name, module in load(folder).model.named_modules()
        if isinstance(module, AwqWeight)
    }


def test_whole_rows_are_of_each_matrix_its_own_width(tmp_path: Path) -> None:
    settings = QuantizeSettings(method="awq", group_size=-1)
    source, path, rows = write_quantized(tmp_path, settings, config=UNEVEN)
    block = json.loads((path / "config.json").read_text())["quantization_config"]
    assert block["group_size"] == -1
    assert json.loads((path / "quant_config.json").read_text())["q_group_size"] == -1
    groups = _groups(path)
    assert groups["model.layers.0.mlp.up_proj"] == 64
    assert groups["model.layers.1.mlp.down_proj"] == 72
    assert max(m.error for m in compared(source, path, rows).matrices) < 0.3


def test_kept_matrices_have_no_say_in_the_group_size(tmp_path: Path) -> None:
    source = LayerSource(write_tiny_checkpoint(tmp_path / "plain", config=UNEVEN))
    rows = made_rows(source, tmp_path)
    with pytest.raises(UsageError, match=r"rows of model\.layers\.0\.mlp\.down_proj have 72"):
        quantize(source, rows, QuantizeSettings(method="awq"), tmp_path / "refused")
    rule = Rule.parse("down_proj=keep")  # what that message advises
    settings = QuantizeSettings(method="awq", rules=(rule,))
    source, path, rows = write_quantized(tmp_path / "kept", settings, config=UNEVEN)
    block = json.loads((path / "config.json").read_text())["quantization_config"]
    assert block["group_size"] == 64
    assert block["modules_to_not_convert"] == [f"model.layers.{n}.mlp.down_proj" for n in range(2)]
    assert set(_groups(path).values()) == {64}
    found = {m.path: m.error for m in compared(source, path, rows).matrices}
    assert found["model.layers.1.mlp.down_proj"] < 0.01 < found["model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize(
    ("method", "note"),
    [
        ("nf4", None),
        ("int8", None),
        (
            "rtn",
            "groups of 32 instead of 64, which does not divide the width, in 2 matrices, such as ",
        ),
        (
            "awq",
            "groups of 32 instead of 64 in all matrices: AWQ's files have one group size, and no "
            "larger one divides the 96 columns of ",
        ),
    ],
)
def test_the_sheet_says_of_groups_what_is_so(tmp_path: Path, method: str, note: str | None) -> None:
    source = LayerSource(write_tiny_checkpoint(tmp_path / "parent", config=DENSE))  # 64 and 96
    size = None if note is None else 64
    settings = QuantizeSettings(method=method, group_size=size)
    with torch.inference_mode():
        _, results = quantize(source, made_rows(source, tmp_path), settings, tmp_path / "result")
    expected = [] if note is None else [f"{note}model.layers.0.mlp.down_proj"]
    assert method_notes(results, settings) == expected
