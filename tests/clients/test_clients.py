"""The client libraries of docs/clients.md, each as a process with its own environment, against one
server process that says what `replies.py` has it say.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "clients.md"
HANG_S = 180.0  # a guard against hanging, not a measure of speed


@dataclass(frozen=True)
class Client:
    """One heading of the page, what looks at its answers, and the environment it runs in."""

    heading: str
    checks: str
    environment: str

    @property
    def python(self) -> Path:
        return ROOT / f".venv-{self.environment}" / "bin" / "python"

    @property
    def section(self) -> str:
        sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
        (section,) = (part for part in sections if part.startswith(f"{self.heading}\n"))
        return section

    @property
    def switches(self) -> dict[str, str]:
        """The variables that the page says to set."""
        return dict(re.findall(r"`([A-Z][A-Z0-9_]+)=(\w+)`", self.section))


CLIENTS = (
    Client("openai", "openai_3", "openai-3"),
    Client("openai, responses", "openai_responses", "openai-3"),
    Client("openai below 1.0", "openai_0", "openai-0"),
    Client("qwen-agent", "qwen_agent", "openai-3"),
    Client("LangChain", "langchain", "openai-3"),
    Client("litellm", "litellm", "openai-3"),
    Client("smolagents", "smolagents", "openai-3"),
    Client("LlamaIndex", "llama_index", "openai-2"),
    Client("CrewAI", "crewai", "openai-2"),
)
each_client = pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.checks)


def test_the_page_shows_each_client() -> None:
    headings = re.findall(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == [client.heading for client in CLIENTS]


def test_the_page_names_the_versions_under_test() -> None:
    pins = {
        name: dict(re.findall(r"^([\w.-]+)==(\S+)$", lines, re.MULTILINE))
        for name in {client.environment for client in CLIENTS}
        for lines in [(HERE / "environments" / f"{name}.txt").read_text(encoding="utf-8")]
    }
    rows = re.findall(r"^\| `(.+)` \| (\S+) \| (\S+)? ?\|$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert len(rows) == len(CLIENTS) - 1  # one client has two sections
    for package, version, beside in rows:
        (name,) = (
            name
            for name, pinned in pins.items()
            if pinned.get(package) == version and beside in ("", pinned["openai"])
        )
        assert name in pins


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    """A server of the default model with scripted tokens, for every client of this process."""
    command = [sys.executable, "-m", "scripted_server", str(HERE / "replies.py"), "default"]
    command += ["--served-model-name", "SmolLM2", "--served-model-name", "Qwen", "--port", "0"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path]),
        "PYTHONUTF8": "1",
    }
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) as process:
        try:
            yield address_of(process)
        finally:
            process.terminate()


def address_of(process: subprocess.Popen[bytes]) -> str:
    """Wait until the server says where it answers."""
    assert process.stderr is not None
    said, deadline_s = b"", time.monotonic() + HANG_S
    while time.monotonic() < deadline_s:
        if not select.select([process.stderr], [], [], 1.0)[0]:
            continue
        data = os.read(process.stderr.fileno(), 65536)
        said += data
        found = re.search(rb"answers at (http://\S+)/v1", said)
        if found:
            return found[1].decode()
        if not data:
            break
    raise AssertionError(f"the server did not start:\n{said.decode(errors='replace')}")


@pytest.mark.oracle
@each_client
def test_a_conversation_with_a_tool(client: Client, server_url: str, tmp_path: Path) -> None:
    if not (client.python.parents[1] / ".installed").exists():
        pytest.skip(f"needs .venv-{client.environment}, which `make oracles` makes")
    done = subprocess.run(
        [client.python, HERE / "run_client.py", client.heading, client.checks, server_url],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=HANG_S,
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),  # what a library keeps of a conversation goes with the test
            "PYTHONUTF8": "1",
            **client.switches,
        },
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    assert done.stdout.endswith(f"{client.heading}: passed\n")
