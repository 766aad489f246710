"""What a quantizer sees of a layer, and what it holds on to."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import torch

from quantized_made import DENSE, EXPERTS
from qwenkit.quantize.anatomy import capture, layer_parts
from qwenkit.quantize.stream import LayerSource
from tiny import write_tiny_checkpoint


def test_only_a_mixture_has_no_last_matrix(tmp_path: Path) -> None:
    for config, has_last in ((DENSE, True), (EXPERTS, False)):
        folder = write_tiny_checkpoint(tmp_path / str(has_last), config=config)
        source = LayerSource(folder)
        attention, mlp = layer_parts(source.meta_layer(0), source.anatomy)
        assert attention.last is not None
        assert (mlp.last is not None) == has_last


def test_what_was_computed_is_free_at_once(tmp_path: Path) -> None:
    """Else every batch of every layer stays until Python looks for what holds on to itself."""
    source = LayerSource(write_tiny_checkpoint(tmp_path / "model", config=DENSE))
    layer, _ = source.layer(0)
    _, mlp = layer_parts(layer, source.anatomy)
    seen: list[weakref.ref[torch.Tensor]] = []
    feed = mlp.stages[1][0]
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            x = torch.randn(5, DENSE["hidden_size"])
            takers = [(feed, lambda given: seen.append(weakref.ref(given)))]
            capture(mlp, x, source.context([5]), takers)
        assert len(seen) == 1
        assert seen[0]() is None
    finally:
        gc.enable()
