"""`import qwenkit` and `qwenkit --help` answer at once, and import no torch.

Besides guards against hanging, this is the only timed test.
"""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

ALLOWED_S = 0.3
TRIES = 9

IMPORT = "import qwenkit"
HELP = (
    "import sys; sys.argv = ['qwenkit', '--help']\n"
    "from qwenkit.cli.main import main\n"
    "try: main()\n"
    "except SystemExit as end: assert not end.code, end.code"
)


@pytest.mark.parametrize("program", [IMPORT, HELP], ids=["import qwenkit", "qwenkit --help"])
def test_it_is_there_in_no_time(program: str) -> None:
    best_s = float("inf")
    for _ in range(TRIES):  # the best of several: a busy machine is not what is measured
        start_s = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
        best_s = min(best_s, time.perf_counter() - start_s)
        if best_s < ALLOWED_S:
            return
    pytest.fail(f"best of {TRIES}: {best_s:.2f} s; allowed: {ALLOWED_S} s")


@pytest.mark.parametrize("program", [IMPORT, HELP], ids=["import qwenkit", "qwenkit --help"])
def test_it_imports_nothing_heavy(program: str) -> None:
    heavy = {"torch", "numpy", "transformers", "huggingface_hub", "tiktoken", "jinja2", "rich"}
    check = f"{program}\nimport sys\nfound = {heavy} & {{*sys.modules}}\nassert not found, found"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
