"""The client libraries of docs/clients.md, each as a process with its own environment, against
server processes whose models say what `replies.py` has them say.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from first_generation import FIRST, GENERATION, write_first_generation
from tiny import write_tiny_checkpoint

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
    Client("Ollama", "ollama", "openai-3"),
)
# Each with the default model, which calls tools as Hermes; some with others, that have other words.
CONVERSATIONS = (
    *((client, "hermes") for client in CLIENTS),
    *((client, "qwen_fn") for client in CLIENTS[:2]),
    *((client, "react") for client in CLIENTS[:3]),
)


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
def url_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Where the model with a dialect of tools is served: scripted tokens, one process a model."""
    urls: dict[str, str] = {}
    with ExitStack() as processes:

        def url(dialect: str) -> str:
            if dialect not in urls:
                model = model_of(dialect, tmp_path_factory.mktemp(dialect))
                urls[dialect] = processes.enter_context(serving(model))
            return urls[dialect]

        yield url


def model_of(dialect: str, folder: Path) -> str:
    """The default model, or a tiny one of the generation whose dialect this is."""
    if dialect == "qwen_fn":
        return str(write_tiny_checkpoint(folder, config={"max_position_embeddings": 8192}))
    if dialect == "react":
        long = {"seq_length": 8192, "max_position_embeddings": 8192}
        generation = GENERATION | {"max_window_size": 8192, "max_new_tokens": 512}
        return str(write_first_generation(folder, config=FIRST | long, generation=generation))
    return "default"


@contextmanager
def serving(model: str) -> Iterator[str]:
    command = [sys.executable, "-m", "scripted_server", str(HERE / "replies.py"), model]
    command += ["--served-model-name", "tested", "--served-model-name", "Qwen", "--port", "0"]
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
@pytest.mark.parametrize(
    ("client", "dialect"), CONVERSATIONS, ids=lambda value: getattr(value, "checks", value)
)
def test_a_conversation_with_a_tool(
    client: Client, dialect: str, url_of: Callable[[str], str], tmp_path: Path
) -> None:
    if not (client.python.parents[1] / ".installed").exists():
        pytest.skip(f"needs .venv-{client.environment}, which `make oracles` makes")
    done = subprocess.run(
        [
            *(client.python, HERE / "run_client.py"),
            *(client.heading, client.checks, url_of(dialect), dialect),
        ],
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
