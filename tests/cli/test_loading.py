"""Opening a model: what is refused is named as on the command line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fake_devices import fake, fake_machine, on_fake_devices
from qwenkit.cli import console, loading
from qwenkit.cli.main import app
from qwenkit.cli.options import ModelOptions
from qwenkit.errors import UsageError
from tiny import write_tiny_checkpoint


def test_names_of_settings_are_checked_before_any_download() -> None:
    with pytest.raises(UsageError, match=r"^--dtype: got 'float16'\. .*'bfloat16'"):
        loading.load_model("no/model", ModelOptions(dtype="float16", offline=True))
    with pytest.raises(UsageError, match=r"^--compute: got 'fast'.*reference"):
        loading.load_model("no/model", ModelOptions(compute="fast", offline=True))
    with pytest.raises(UsageError, match=r"^--kv-dtype: got 'fp8'.*int8"):
        loading.load_model("no/model", ModelOptions(kv_dtype="fp8", offline=True))
    with pytest.raises(UsageError, match=r"^--speculation: got 'lookup'.*prompt-lookup"):
        loading.load_model("no/model", ModelOptions(speculation="lookup", offline=True))


def test_a_draft_model_guesses_and_is_refused_beside_another_guesser(tmp_path: Path) -> None:
    model = str(write_tiny_checkpoint(tmp_path / "m"))
    draft = str(write_tiny_checkpoint(tmp_path / "d", config={"num_hidden_layers": 1}))
    with loading.load_model(model, ModelOptions(draft=draft)) as llm:
        assert len(llm.generate([[1, 2, 3]], {"max_tokens": 4, "seed": 0})[0].token_ids) == 4
    with pytest.raises(UsageError, match=r"^--draft: .* drop one"):
        loading.load_model(model, ModelOptions(draft=draft, speculation="prompt-lookup"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weights": "int5"}, r"^--weights: got 'int5'\. .*'int[48]'"),
        ({"weights": "int4", "group_size": 48}, "^--group-size: got 48; .* 32, 64 and 128"),
        ({"weights": "bf16", "group_size": 32}, "^--group-size: only weights int4 and int8"),
        ({"group_size": 32}, "^--group-size: only weights int4 and int8"),
        ({"weights": "int4", "head_weights": "q4"}, "^--head-weights: got 'q4'"),
        ({"head_weights": "int8"}, "^--head-weights: needs weights to be something else than auto"),
    ],
)
def test_kinds_of_weights_are_checked_before_any_download(given: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        loading.load_model("no/model", ModelOptions(**given, offline=True))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"device": "cuda:7"}, "^--device: 'cuda:7' is not there"),
        ({"device": "auto", "device_map": "auto"}, "^Got both --device and --device-map"),
        ({"device_map": "cuda:0"}, "^--device-map: got 'cuda:0'; .*For one device use --device"),
        ({"device_map": '{"": null}'}, "^--device-map: got .*JSON object"),
        ({"device_map": '{"": 7}'}, "^--device-map: there is no accelerator 7"),
    ],
)
def test_devices_are_checked_before_any_download(
    monkeypatch: pytest.MonkeyPatch, given: Any, said: str
) -> None:
    fake_machine(monkeypatch)
    with pytest.raises(UsageError, match=said):
        loading.load_model("no/model", ModelOptions(**given, offline=True))


def test_a_revision_is_looked_up_and_only_where_there_is_a_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    kept = tmp_path / "models--tiny--model"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "v1").write_text(commit)
    (kept / "snapshots" / commit).mkdir(parents=True)
    folder = write_tiny_checkpoint(kept / "snapshots" / commit)

    def ask(name: str, *more: str) -> Any:
        prompt = ["--prompt", "Once", "--max-tokens", "2", "--revision"]
        return CliRunner().invoke(app, ["generate", name, "--offline", *prompt, *more])

    assert ask("tiny/model", "v1").exit_code == 0
    assert "tiny/model" in ask("tiny/model", "v2").stderr
    assert "--revision: " in ask(str(folder), "v1").stderr
    assert "--revision: the embedded model" in ask("default", "v1").stderr


def test_a_model_on_several_devices_answers_and_says_where_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = str(write_tiny_checkpoint(tmp_path))
    asked = ["generate", folder, "--prompt", "Once upon", "--max-tokens", "4", "--greedy"]
    places = json.dumps({"": "cpu", "model.layers.1": fake(1), "lm_head": 0})
    fake_machine(monkeypatch, 1 << 30, 1 << 30)
    with on_fake_devices():
        here, there, auto = (
            CliRunner().invoke(app, [*asked, *more])
            for more in ([], ["--device-map", places], ["--device", "auto", "--dtype", "float32"])
        )
    assert here.exit_code == there.exit_code == auto.exit_code == 0, there.stderr + auto.stderr
    assert here.stdout == there.stdout == auto.stdout
    assert "layer 0 on cpu, layer 1 on maia:1, norm on cpu, head on maia:0." in there.stderr
    assert "layer" not in here.stderr + auto.stderr


def test_weights_rounded_while_loading_answer(default_model_path: Path) -> None:
    kinds = ["--weights", "int8", "--group-size", "32", "--head-weights", "bf16"]
    prompt = ["--prompt", "The capital of France is", "--max-tokens", "2", "--greedy"]
    result = CliRunner().invoke(app, ["generate", str(default_model_path), *kinds, *prompt])
    assert (result.exit_code, result.stdout) == (0, " Paris.\n"), result.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_person_sees_a_bar_and_a_program_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with console.progress("Loading") as show:
        assert show is None
    written = Terminal()
    monkeypatch.setattr("sys.stderr", written)
    with console.progress("Loading \x1b[2J[bold]x") as show:
        assert show is not None
        show(0.5)
        show(1.0)
    assert "Loading \u241b[2J[bold]x" in written.getvalue()


def test_a_context_that_the_model_lacks(default_model_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--context: got 99999999; .* allows 1 to 32768"):
        loading.load_model(str(default_model_path), ModelOptions(context=99_999_999))


def test_a_tiny_context_and_a_longer_prompt(default_model_path: Path) -> None:
    args = ["generate", str(default_model_path), "--context", "4", "--prompt"]
    result = CliRunner().invoke(app, [*args, "one two three four five six"])
    assert result.exit_code == 2
    assert "Error: the prompt has 6 tokens, the context 4" in result.stderr
    assert CliRunner().invoke(app, [*args, "Once"]).exit_code == 0
