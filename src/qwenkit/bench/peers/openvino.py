"""OpenVINO: exported by optimum-intel, run as a raw stateful model."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

from qwenkit.bench.peers.spec import Options, prompt_ids

_GROUP_OF_ACTIVATIONS = 128  # faster than OpenVINO's own 32 by a third


def prepare(source: Path, target: Path, options: Options) -> None:
    """Export a folder in the hub's layout.

    int4 is symmetric in groups, with embedding and head in int8 unless int4 is asked for; int8 is
    asymmetric per channel.
    """
    intel = importlib.import_module("optimum.intel")
    weights = options.weights
    assert weights is not None
    given: dict[str, Any] = {"load_in_8bit": False}
    if weights.name == "int4":
        config = intel.OVWeightQuantizationConfig(
            bits=4,
            sym=True,
            group_size=weights.group_size,
            ratio=1.0,
            all_layers=weights.head == "int4",
        )
        given = {"quantization_config": config}
    elif weights.name == "int8":
        given = {"quantization_config": intel.OVWeightQuantizationConfig(bits=8)}
    model = intel.OVModelForCausalLM.from_pretrained(source, export=True, compile=False, **given)
    model.save_pretrained(target)


class OpenVino:
    """A folder made by `prepare`; computes in bf16 where the processor can, in fp32 if asked."""

    def __init__(self, model: str, options: Options) -> None:
        openvino = importlib.import_module("openvino")
        self.version = str(openvino.__version__).partition("-")[0]
        weights = options.weights
        self.setting = "" if weights is None else weights.label
        config: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": options.threads,
            "NUM_STREAMS": 1,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": _GROUP_OF_ACTIVATIONS,
        }
        if weights is not None and weights.name == "int8":
            self.setting = "int8 per channel"
        if weights is not None and weights.name == "fp32":
            config["INFERENCE_PRECISION_HINT"] = "f32"
        path = Path(model) / "openvino_model.xml"
        compiled = openvino.Core().compile_model(str(path), "CPU", config)
        self._names = {name for item in compiled.inputs for name in item.get_names()}
        self._request = compiled.create_infer_request()
        self._vocab_size = int(compiled.output("logits").partial_shape[2].get_length())

    def _forward(self, ids: Any, start: int) -> Any:
        """ids [streams, tokens] at positions from `start`; the next ids [streams, 1]."""
        import numpy

        streams, tokens = ids.shape
        positions = numpy.arange(start, start + tokens)[None].repeat(streams, 0)
        given = {
            "input_ids": ids,
            "attention_mask": numpy.ones((streams, start + tokens), dtype=numpy.int64),
            "position_ids": positions,
            "beam_idx": numpy.arange(streams, dtype=numpy.int32),
        }
        self._request.infer({name: given[name] for name in self._names})
        logits = self._request.get_tensor("logits").data  # [streams, tokens or 1, vocab]
        return logits[:, -1].argmax(-1)[:, None]

    def _start(self, tokens: int, streams: int) -> Any:
        import numpy

        self._request.reset_state()
        rows = [prompt_ids(tokens, self._vocab_size, stream) for stream in range(streams)]
        return self._forward(numpy.array(rows), 0)

    def prefill(self, tokens: int) -> float:
        """One call for the whole prompt."""
        start_s = time.perf_counter()
        self._start(tokens, 1)
        return time.perf_counter() - start_s

    def decode(self, tokens: int, streams: int, context: int) -> float:
        """Greedy, one token of every stream a call."""
        ids = self._start(context, streams)
        start_s = time.perf_counter()
        for step in range(tokens):
            ids = self._forward(ids, context + step)
        return time.perf_counter() - start_s
