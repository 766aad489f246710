"""Row 27: hostile text in the chat page, in a real browser."""

from qwenkit.bench.reliability.tested import row_of_tests

ROW = row_of_tests(
    27,
    "no text of a model or user runs as a script or asks another machine for anything",
    "tests/web/test_web_hostile_page.py",
    environment=".venv-oracles",  # Gradio and Playwright
)
