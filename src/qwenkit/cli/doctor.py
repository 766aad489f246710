"""`qwenkit doctor`: what this machine has and uses, or what is wrong with a model's files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwenkit.checkpoint.hub import resolve
from qwenkit.cli import console, download, options

if TYPE_CHECKING:
    from qwenkit.kernels.devices import Device
    from qwenkit.survey.doctor_facts import Finding
    from qwenkit.survey.doctor_machine import Machine

_SEVERITIES = {"fault": "FAULT / 故障", "note": "note / 说明"}


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Name on the hub, folder or .gguf file. [default: look at this machine]",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object.")] = False,
    offline: options.Offline = False,
) -> None:
    """Say what this machine has and uses, or what is wrong with a model's files.

    Without MODEL: processor, kernels in use (or why not), threads, memory, versions. With MODEL:
    what its files have wrong, in English and Chinese, and what to do about it: missing or damaged
    files, misspelt or dead keys, a wrong epsilon or tied flag, ends of text that disagree, weights
    that do not fit. Notes explain what is odd and harmless. Exit status 1 if there is any fault.

    \b
    Examples:
      qwenkit doctor
      qwenkit doctor ./my-model
      qwenkit doctor Qwen/Qwen2-0.5B-Instruct --json
    """
    if model is None:
        _machine(as_json=as_json)
        return
    name = options.check_model_name(model)
    with download.bars() as show:
        path = resolve(name, offline=offline, progress=show)
    from qwenkit.survey.doctor import examine  # torch takes seconds: bad names are refused first

    findings = examine(path)
    if as_json:
        told = [dataclasses.asdict(finding) for finding in findings]
        console.say_json({"model": name, "path": str(path), "findings": told})
    else:
        _show(path, findings)
    if any(finding.severity == "fault" for finding in findings):
        raise typer.Exit(1)


def _show(path: Path, findings: list[Finding]) -> None:
    for finding in findings:
        console.say(f"{_SEVERITIES[finding.severity]}: {finding.file} ({finding.kind})")
        console.say(f"  {finding.english}")
        console.say(f"  {finding.chinese}")
    faults = sum(finding.severity == "fault" for finding in findings)
    if faults:
        console.say(f"{path}: {faults} faults / {faults} 处故障")
    else:
        console.say(f"{path}: no faults found / 未发现故障")


def _machine(*, as_json: bool) -> None:
    from qwenkit.survey.doctor_machine import examine_machine

    with console.busy("Looking at the machine / 正在检查机器 …"):
        machine = examine_machine()
    if as_json:
        values = dataclasses.asdict(machine)
        library = machine.kernels.library
        values["kernels"]["library"] = None if library is None else str(library)
        console.say_json(values)
        return
    for title, value in rows(machine):
        console.say(f"{title}: {value}")


def rows(machine: Machine) -> list[tuple[str, str]]:
    """What is shown of a machine: titles in two languages, and values."""
    kernels = machine.kernels
    used = f"{kernels.variant} ({kernels.library})"
    if kernels.variant is None:
        reason = " ".join((kernels.reason or "").split())
        used = f"torch, slower / 使用较慢的 torch: {reason}"
    versions = [f"{name} {version}" for name, version in machine.versions.items() if version]
    return [
        ("system / 系统", f"{machine.system}, Python {machine.python}"),
        ("versions / 版本", ", ".join(versions)),
        ("processor / 处理器", machine.processor),
        ("instructions / 指令集", ", ".join(kernels.features) or "unknown / 未知"),
        ("kernels / 算子", used),
        ("threads / 线程", f"{kernels.threads} of {machine.cores} processors"),
        ("memory / 内存", _memory(machine)),
        *((f"device / 设备 {device.name}", _device(device)) for device in machine.devices),
    ]


def _device(device: Device) -> str:
    formats = {"bf16": device.bf16, "fp16": device.fp16, "fp32": True}
    said = f"{device.title}, computes in {' '.join(name for name, can in formats.items() if can)}"
    if device.free_bytes is None or device.total_bytes is None:
        return said
    free, total = device.free_bytes / 2**30, device.total_bytes / 2**30
    return f"{said}, {free:.1f} GiB free of {total:.1f} GiB"


def _memory(machine: Machine) -> str:
    amounts: list[Any] = [machine.free_bytes, machine.memory_bytes]
    if None in amounts:
        return "unknown / 未知"
    free, total = (f"{amount / 2**30:.1f} GiB" for amount in amounts)
    return f"{free} free of {total} / 共 {total}，可用 {free}"
