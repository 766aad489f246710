"""A model on several devices: each one's share of a pipeline, and what tensor parallelism needs.

The pipeline places layers as the first generation's own script did: embedding and last norm on the
first device, the head on the last, each of the three counted like a layer between them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qwenkit.errors import UsageError
from qwenkit.models.spec import ModelConfig
from qwenkit.survey.plan_memory import Workload, activation_bytes, kv_bytes
from qwenkit.survey.plan_weights import Weights, layer_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One device's share: layers from `first_layer` up to, not including, `end_layer`."""

    first_layer: int
    end_layer: int
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes


@dataclass(frozen=True, slots=True)
class Advice:
    """A width that does not split evenly: `units` (heads, groups of columns) over the devices.

    `padded` is the width filled up with zeros so that it does; None where only fewer devices help.
    """

    name: str
    width: int
    units: int
    padded: int | None


def layer_devices(layers: int, devices: int) -> tuple[int, ...]:
    """The device of each layer. Raises UsageError for more devices than layers can fill."""
    if not 1 <= devices <= layers:
        raise UsageError(f"devices: got {devices}; a model of {layers} layers fills 1 to {layers}.")
    share = (layers + 2) / devices
    placed: list[int] = []
    device, used = 0, 2  # embedding and last norm
    for _ in range(layers):
        if used >= share:
            device, used = device + 1, 0
        placed.append(min(device, devices - 1))
        used += 1
    return tuple(placed)


def stages(
    config: ModelConfig, weights: Weights, work: Workload, devices: int
) -> tuple[Stage, ...]:
    """Each device's share. A tied head is the embedding once more, on the last device."""
    layers = config.num_hidden_layers
    placed = layer_devices(layers, devices)
    held = [0] * devices
    for piece in weights.pieces:
        layer = layer_of(piece.path)
        if layer is not None:
            held[placed[layer]] += piece.held_bytes
        else:
            held[-1 if piece.path == "lm_head" else 0] += piece.held_bytes
    if config.tie_word_embeddings:
        held[-1] += weights.pieces[0].held_bytes
    kept = kv_bytes(config, weights, work)
    computed = activation_bytes(config, weights, replace(work, users=1))
    made = []
    for device in range(devices):
        own = [layer for layer, place in enumerate(placed) if place == device]
        made.append(
            Stage(
                first_layer=own[0] if own else layers,
                end_layer=own[-1] + 1 if own else layers,
                weight_bytes=held[device],
                kv_bytes=kept * len(own) // layers,
                activation_bytes=computed,
            )
        )
    return tuple(made)


def split_advice(config: ModelConfig, weights: Weights, devices: int) -> tuple[Advice, ...]:
    """What keeps tensor parallelism from splitting the model evenly over so many devices.

    Feed-forward widths split by whole groups of columns that share a scale.
    """
    advice = []
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % devices:
        advice.append(Advice("num_attention_heads", heads, heads, None))
    if kv_heads % devices and devices % kv_heads:  # fewer heads than devices are held twice
        advice.append(Advice("num_key_value_heads", kv_heads, kv_heads, None))
    unit = max(1, weights.group)
    for width in weights.inner_widths:
        if width % (devices * unit):
            step = devices * unit
            advice.append(
                Advice("intermediate_size", width, width // unit, -(-width // step) * step)
            )
    if config.vocab_size % devices:
        padded = -(-config.vocab_size // devices) * devices
        advice.append(Advice("vocab_size", config.vocab_size, config.vocab_size, padded))
    return tuple(advice)
