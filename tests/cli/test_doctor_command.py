"""`qwenkit doctor`: the machine, or what is wrong with a model, for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fake_devices import fake, fake_machine
from qwenkit.cli.main import app
from qwenkit.kernels import cpu
from qwenkit.survey import doctor_machine
from tiny import write_tiny_checkpoint

runner = CliRunner()


def test_the_machine_in_two_languages() -> None:
    done = runner.invoke(app, ["doctor"])
    assert done.exit_code == 0
    rows = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    info = cpu.kernel_info()
    assert rows["kernels / 算子"].startswith(info.variant or "torch")
    assert rows["threads / 线程"].startswith(f"{info.threads} of ")
    assert "qwenkit" in rows["versions / 版本"]
    assert rows["memory / 内存"]


def test_the_machine_as_json() -> None:
    done = runner.invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    info = cpu.kernel_info()
    assert told["kernels"]["variant"] == info.variant
    assert told["kernels"]["features"] == list(info.features)
    assert told["versions"]["torch"]
    assert told["cores"] >= 1


def test_devices_and_what_they_compute_in(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_machine(monkeypatch, 3 << 30, None, bf16=True)
    told = json.loads(runner.invoke(app, ["doctor", "--json"]).stdout)["devices"]
    assert [device["name"] for device in told] == ["cpu", fake(0), fake(1)]
    assert (told[1]["bf16"], told[1]["fp16"], told[1]["free_bytes"]) == (True, False, 3 << 30)
    lines = runner.invoke(app, ["doctor"]).stdout.splitlines()
    name = "device / 设备 maia"
    assert f"{name}:0: fake, computes in bf16 fp32, 3.0 GiB free of 3.0 GiB" in lines
    assert f"{name}:1: fake, computes in bf16 fp32" in lines


def test_why_there_are_no_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    without = cpu.KernelInfo((), None, None, 1, "No C++ compiler found.\nInstall g++.")
    monkeypatch.setattr(doctor_machine, "kernel_info", lambda: without)
    done = runner.invoke(app, ["doctor"])
    assert "使用较慢的 torch: No C++ compiler found. Install g++." in done.stdout
    assert json.loads(runner.invoke(app, ["doctor", "--json"]).stdout)["kernels"]["library"] is None


def test_a_machine_without_linuxs_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("_CPU_INFO", "_MEMORY_INFO", "_MEMORY_LIMIT"):
        monkeypatch.setattr(doctor_machine, name, tmp_path / "none")
    done = runner.invoke(app, ["doctor"])
    assert done.exit_code == 0
    assert "memory / 内存: unknown / 未知" in done.stdout


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "max").write_text("1073741824\n")
    monkeypatch.setattr(doctor_machine, "_MEMORY_LIMIT", tmp_path / "max")
    assert doctor_machine.examine_machine().memory_bytes == 2**30


def test_a_clean_model(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "model")
    done = runner.invoke(app, ["doctor", str(folder)])
    assert done.exit_code == 0
    assert "note / 说明: config.json (padded-vocabulary)" in done.stdout
    assert done.stdout.endswith("no faults found / 未发现故障\n")


def test_a_model_with_faults(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "model", config={"rms_norm_eps": 1e-3})
    (folder / "model.safetensors").write_bytes(b"")
    done = runner.invoke(app, ["doctor", str(folder)])
    assert done.exit_code == 1
    assert "FAULT / 故障: config.json (wrong-eps)\n  rms_norm_eps is 0.001" in done.stdout
    assert "FAULT / 故障: model.safetensors (empty-file)" in done.stdout
    assert done.stdout.endswith("2 faults / 2 处故障\n")
    told = json.loads(runner.invoke(app, ["doctor", str(folder), "--json"]).stdout)
    assert [f["kind"] for f in told["findings"] if f["severity"] == "fault"] == [
        "empty-file",
        "wrong-eps",
    ]


def test_a_name_that_leads_nowhere() -> None:
    done = runner.invoke(app, ["doctor", "Qwen2-0.5B"])
    assert done.exit_code == 1
    assert "Did you mean 'Qwen/Qwen2-0.5B'?" in done.stderr
