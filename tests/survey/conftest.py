"""What the tests of the doctor share."""

from __future__ import annotations

from pathlib import Path

import pytest
from planting import SETTINGS, edit

from tiny import write_tiny_checkpoint


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean") / "Tiny-Instruct"
    write_tiny_checkpoint(folder, config={"architectures": ["Qwen2ForCausalLM"]})
    edit(folder, SETTINGS, eos_token="<|im_end|>")
    return folder
