"""A program for an environment of vLLM: what it makes of a folder, teacher-forced.

    python vllm_logprobs.py FOLDER 3,1,4,…

Writes one line of JSON: the log-probability of each id but the first, given those before it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import vllm


def main() -> None:
    """Load the folder given, and say."""
    ids = [int(each) for each in sys.argv[2].split(",")]
    llm: Any = vllm.LLM(
        sys.argv[1],
        dtype="bfloat16",
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=2 * len(ids),
        max_num_seqs=1,
    )
    asked: Any = vllm.SamplingParams(max_tokens=1, prompt_logprobs=1, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)
    said = [each[i].logprob for i, each in zip(ids, output.prompt_logprobs, strict=True) if each]
    sys.stdout.write(f"said {json.dumps(said)}\n")


if __name__ == "__main__":
    main()
