"""Room 6: `LLM` and `AsyncLLM`, a loaded model with its engine and chat renderer behind one door.

from qwenkit import LLM
llm = LLM("default")
print(llm.chat([{"role": "user", "content": "What is the capital of France?"}]).text)
"""

from qwenkit.api.async_llm import AsyncLLM
from qwenkit.api.llm import LLM

__all__ = ["LLM", "AsyncLLM"]
