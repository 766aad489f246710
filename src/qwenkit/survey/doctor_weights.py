"""Checks of the tensors: that they fit the config, and that what they hold are a model's numbers.

Fitting is asked of the loader itself, on the meta device: no weight is read. Numbers are sampled at
the ends and in the middle of each tensor, which costs milliseconds for a model of any size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from qwenkit.checkpoint.spec import Checkpoint, StoredTensor
from qwenkit.errors import CheckpointError, ConfigError, suggest
from qwenkit.fill import fill
from qwenkit.survey.doctor_facts import Facts, Finding, fault, note
from qwenkit.tensor_names import tensors_by_our_names

_PLAIN = ("F32", "F16", "BF16", "F64")
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SAMPLED = 256  # numbers at each of three places
# What the loader says, and the kind of fault that it is.
_MISFITS = {
    "is missing; the model needs it": "missing-tensor",
    "belong to no part of the model": "extra-tensor",
    "has shape": "wrong-shape",
    "no known format reads": "unknown-storage",
    "but no weight is stored so": "quantized-in-name-only",
}


def fitting(facts: Facts) -> Iterator[Finding]:
    checkpoint, architecture, config = facts.checkpoint, facts.architecture, facts.model_config
    if checkpoint is None or architecture is None or config is None:
        return
    tied = config.tie_word_embeddings
    named = {n: t for n, t in checkpoint.tensors.items() if not (tied and _is_head(n))}
    if config.num_hidden_layers > max(1, len(named)):
        reason = f"{config.num_hidden_layers} layers, but only {len(named)} tensors."
        yield _misfit("missing-tensor", "config.json", reason)
        return
    try:
        with torch.device("meta"):
            model = architecture.build(config)
        model.dtype = torch.float32
        fill(model, architecture, dataclasses.replace(checkpoint, tensors=named), device="meta")
    except CheckpointError as error:
        kinds = [kind for words, kind in _MISFITS.items() if words in str(error)]
        kind = kinds[0] if kinds else "unfit-tensor"
        if kind == "missing-tensor" and _is_head(error.field):
            return  # told by `heads`
        yield _misfit(kind, error.file.rpartition("/")[2], str(error))
    except ConfigError as error:
        if "quantization_config" not in str(error):  # told by `doctor_config`
            yield _misfit("bad-config", "config.json", str(error))


def _misfit(kind: str, file: str, reason: str) -> Finding:
    return fault(
        kind,
        file,
        f"weights and config.json do not fit together: {reason}",
        f"权重与 config.json 不匹配：{reason}",
    )


def heads(facts: Facts) -> Iterator[Finding]:
    """Whether the head is the embedding, as the flag says."""
    checkpoint, architecture, config = facts.checkpoint, facts.architecture, facts.model_config
    if checkpoint is None or architecture is None or config is None:
        return
    ours = tensors_by_our_names(architecture, checkpoint, config.head_dim)
    head = next((t for n, t in ours.items() if _is_head(n)), None)
    embedding = next((t for n, t in ours.items() if _is_embedding(n)), None)
    if not config.tie_word_embeddings and head is None and checkpoint.container != "gguf":
        yield fault(
            "untied-without-head",
            "config.json",
            "tie_word_embeddings is false, but there is no lm_head.weight. Small models of Qwen "
            "are tied: set it to true, or fetch the missing weights.",
            "tie_word_embeddings 为 false，但没有 lm_head.weight。Qwen 的小模型共享词嵌入，"
            "请设为 true，或补全权重。",
        )
    if head is None or embedding is None:
        return
    same = head.shape == embedding.shape and _sample(head).equal(_sample(embedding))
    if config.tie_word_embeddings and not same:
        yield fault(
            "tied-but-different",
            "config.json",
            "tie_word_embeddings is true, but lm_head.weight differs from the embedding. Set it to "
            "false, or the trained head is lost.",
            "tie_word_embeddings 为 true，但 lm_head.weight 与词嵌入不同。请设为 false，"
            "否则训练好的输出层会丢失。",
        )
    if not config.tie_word_embeddings and same:
        yield fault(
            "untied-but-same",
            "config.json",
            "tie_word_embeddings is false, but lm_head.weight is the embedding: memory for it is "
            "needed twice. Set it to true.",
            "tie_word_embeddings 为 false，但 lm_head.weight 与词嵌入相同，占用双倍内存，"
            "请设为 true。",
        )


def numbers(facts: Facts) -> Iterator[Finding]:
    for tensor in facts.checkpoint.tensors.values() if facts.checkpoint else ():
        if tensor.storage not in _PLAIN or 0 in tensor.shape:
            continue
        sample = _sample(tensor)
        if not sample.isfinite().all():
            yield fault(
                "non-finite",
                tensor.file.name,
                f"{tensor.name} holds NaN or infinity: every output would be NaN. The training or "
                "conversion overflowed; use bfloat16.",
                f"{tensor.name} 含有 NaN 或无穷大，输出会全部变成 NaN。"
                "训练或转换时溢出，请使用 bfloat16。",
            )
        elif len(tensor.shape) > 1 and not sample.any():
            yield fault(
                "zero-weights",
                tensor.file.name,
                f"{tensor.name} is zero wherever it was looked at: the file was not written or "
                "downloaded to its end. Fetch it again.",
                f"{tensor.name} 抽查到的数全为零，文件可能未写完或未下载完，请重新下载。",
            )


def dtypes(facts: Facts) -> Iterator[Finding]:
    if facts.checkpoint is None or facts.folder is None or "quantization_config" in facts.config:
        return
    stored = _most(facts.checkpoint)
    named = facts.config.get("torch_dtype", facts.config.get("dtype"))
    wanted = _DTYPES.get(named) if isinstance(named, str) else None
    if wanted and stored and wanted != stored:
        yield fault(
            "dtype-mismatch",
            "config.json",
            f"torch_dtype says {named}, but the weights are stored as {stored}: converted without "
            "saying so. Correct it, other programs load by it.",
            f"torch_dtype 为 {named}，但权重以 {stored} 存储，请更正，其他程序按它加载。",
        )
    if stored == "F16" and facts.is_llm_of_qwen:
        yield note(
            "float16-weights",
            "config.json",
            "the weights are float16; Qwen models are published in bfloat16, and their "
            "activations overflow where float16 is also computed in. qwenkit computes in bfloat16 "
            "or float32.",
            "权重为 float16；Qwen 模型以 bfloat16 发布，若以 float16 计算，其激活会溢出。"
            "qwenkit 以 bfloat16 或 float32 计算。",
        )


def named_dtype(facts: Facts) -> Iterator[Finding]:
    for key in ("torch_dtype", "dtype"):
        named = facts.config.get(key)
        name = named.removeprefix("torch.") if isinstance(named, str) else ""
        if named in (None, "auto") or isinstance(getattr(torch, name, None), torch.dtype):
            continue
        yield fault(
            "unknown-dtype",
            "config.json",
            f"{key} is {named!r}; {suggest(str(named), _DTYPES)}",
            f"{key}：未知的类型 {named!r}。{suggest(str(named), _DTYPES)}",
        )


def _most(checkpoint: Checkpoint) -> str | None:
    """The plain dtype that most bytes are stored in; None when another kind holds more."""
    sizes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        sizes[tensor.storage] = sizes.get(tensor.storage, 0) + tensor.size_bytes
    most = max(sizes, key=lambda tag: sizes[tag], default=None)
    return most if most in _PLAIN else None


def _is_head(name: str) -> bool:
    return name in ("lm_head.weight", "output.weight")


def _is_embedding(name: str) -> bool:
    return name.endswith(("embed_tokens.weight", "wte.weight"))


def _sample(tensor: StoredTensor) -> torch.Tensor:
    """Some numbers of it: the first, some of the middle, the last."""
    flat = tensor.read().flatten()
    middle = max(0, (len(flat) - _SAMPLED) // 2)
    return torch.cat([flat[:_SAMPLED], flat[middle : middle + _SAMPLED], flat[-_SAMPLED:]])


CHECKS = (fitting, heads, numbers, dtypes, named_dtype)
