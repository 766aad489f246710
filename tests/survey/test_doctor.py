"""The doctor finds every fault that is planted, and none in clean checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenkit.checkpoint import write_safetensors
from qwenkit.errors import ModelNotFoundError
from qwenkit.models.published import published_tensors
from qwenkit.models.spec import architectures, find
from qwenkit.survey.doctor import CHECKS, examine
from qwenkit.survey.doctor_facts import Facts
from tiny import CONFIG, IM_END, TEMPLATE, tiny_tensors, write_tiny_checkpoint

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 3554214752\n"
CONFIG_FILE, GENERATION, SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
)
INDEX = "model.safetensors.index.json"
Plant = Callable[[Path], object]


def edit(folder: Path, name: str, *without: str, **values: Any) -> None:
    """Change keys of a JSON file."""
    file = folder / name
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({k: v for k, v in (known | values).items() if k not in without}))


def config(*without: str, **values: Any) -> Plant:
    return lambda folder: edit(folder, CONFIG_FILE, *without, **values)


def generation(*without: str, **values: Any) -> Plant:
    return lambda folder: edit(folder, GENERATION, *without, **values)


def settings(*without: str, **values: Any) -> Plant:
    return lambda folder: edit(folder, SETTINGS, *without, **values)


def remove(*names: str) -> Plant:
    def plant(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return plant


def write(name: str, text: str = "") -> Plant:
    return lambda folder: (folder / name).write_text(text)


def tensors(change: Callable[[dict[str, torch.Tensor]], object], **values: Any) -> Plant:
    """Write other weights, and change keys of the config."""

    def plant(folder: Path) -> None:
        held = tiny_tensors(CONFIG)
        change(held)
        write_safetensors(folder / "model.safetensors", held)
        edit(folder, CONFIG_FILE, **values)

    return plant


def in_parts(change: Plant) -> Plant:
    """The weights in several files, then a change."""

    def plant(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        write_safetensors(folder / "model.safetensors", tiny_tensors(CONFIG), shard_bytes=20_000)
        change(folder)

    return plant


def first_part(folder: Path) -> Path:
    return min(folder.glob("model-*-of-*.safetensors"))


def deeper(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    for file in [f for f in folder.iterdir() if f.is_file()]:
        file.rename(inner / file.name)


def adapter(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def dead_link(folder: Path) -> None:
    (folder / "qwen.tiktoken").unlink()
    (folder / "qwen.tiktoken").symlink_to(folder / "blobs" / "gone")


def two_vocabularies(folder: Path) -> None:
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))


def no_merges(folder: Path) -> None:
    (folder / "qwen.tiktoken").unlink()
    (folder / "vocab.json").write_text(json.dumps({"a": 0}))


def chat_that_ends_at_text(folder: Path) -> None:
    edit(folder, GENERATION, eos_token_id=[256])
    edit(folder, CONFIG_FILE, eos_token_id=256)
    edit(folder, SETTINGS, eos_token="<|endoftext|>")


def many_rows(folder: Path) -> None:
    """A model of many tokens with the tokenizer of few."""
    write_safetensors(folder / "model.safetensors", tiny_tensors(CONFIG | {"vocab_size": 4000}))
    edit(folder, CONFIG_FILE, vocab_size=4000)


def index(change: Callable[[dict[str, str]], object]) -> Plant:
    """Change the index's map of tensors to files."""

    def plant(folder: Path) -> None:
        known = json.loads((folder / INDEX).read_text())
        change(known["weight_map"])
        (folder / INDEX).write_text(json.dumps(known))

    return plant


def half(held: dict[str, torch.Tensor]) -> None:
    held.update({name: tensor.half() for name, tensor in held.items()})


def scale(name: str, factor: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda held: held.update({name: held[name] * factor})


NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.1.mlp.up_proj.weight"
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}

# What one fault brings along, which is none of itself.
ALSO = {
    "adapter-only": {"empty-file"},
    "two-vocabularies": {"broken-tokenizer"},
    "vocabulary-too-large": {"wrong-shape"},
}
# (kind of fault, how it is planted)
PLANTED: list[tuple[str, Plant]] = [
    ("lfs-pointer", write("model.safetensors", LFS)),
    ("lfs-pointer", write("qwen.tiktoken", LFS)),
    ("lfs-pointer", write(CONFIG_FILE, LFS)),
    ("empty-file", write("model.safetensors")),
    ("empty-file", write(GENERATION)),
    ("broken-link", dead_link),
    ("unfinished-download", write("model.safetensors.incomplete", "x")),
    ("broken-json", write(CONFIG_FILE, '{"model_type": "qwen2",}')),
    ("broken-json", write(SETTINGS, "[]")),
    ("adapter-only", adapter),
    ("no-config", remove(CONFIG_FILE)),
    ("nested-folder", deeper),
    ("no-weights", remove("model.safetensors")),
    ("index-disagrees", in_parts(index(lambda tensors: tensors.pop(UP)))),
    (
        "index-disagrees",
        in_parts(index(lambda tensors: tensors.update(ghost=tensors[UP]))),
    ),
    ("missing-shard", in_parts(lambda folder: first_part(folder).unlink())),
    ("no-index", in_parts(remove(INDEX))),
    ("stray-shard", in_parts(write("model-00009-of-00009.safetensors", "old"))),
    ("damaged-weights", cut),
    ("damaged-weights", in_parts(lambda f: first_part(f).write_bytes(b"not a tensor in it"))),
    ("no-tokenizer", remove("qwen.tiktoken")),
    ("no-merges", no_merges),
    ("two-weights", write("pytorch_model.bin", "PK")),
    ("misspelt-key", config(use_dynamc_ntk=True)),
    ("misspelt-key", config(use_long_attn=True)),
    ("misspelt-key", config("rms_norm_eps", rms_norm_epsilon=1e-6)),
    ("misspelt-key", generation(repitition_penalty=1.05)),
    ("misspelt-key", settings(pading_side="left")),
    ("dead-key", config(use_dynamic_ntk=True)),
    ("dead-key", config(use_logn_attn=True)),
    ("dead-window", config(use_sliding_window=True, sliding_window=128, max_window_layers=2)),
    ("no-model-type", config("model_type")),
    ("unknown-model-type", config(model_type="qwen_2")),
    ("architectures-mismatch", config(architectures=["LlamaForCausalLM"])),
    ("bad-config", config(num_attention_heads=5)),
    ("bad-config", config("hidden_size")),
    ("wrong-eps", config(rms_norm_eps=1e-5)),
    ("no-rope-theta", config("rope_theta")),
    ("bad-rope-scaling", config(rope_scaling=YARN | {"type": "yarm"})),
    ("bad-rope-factor", config(rope_scaling={"type": "dynamic", "factor": 0.25})),
    ("bad-config", config(rope_parameters={"rope_type": "yarm", "rope_theta": 1e6})),
    ("bad-config", config(rope_scaling=YARN, rope_parameters=YARN | {"factor": 2.0})),
    ("two-rope-types", config(rope_scaling=YARN | {"rope_type": "linear"})),
    ("no-yarn-length", config(rope_scaling={"type": "yarn", "factor": 4.0})),
    ("unknown-quantization", config(quantization_config={"quant_method": "gptqq"})),
    ("quantized-in-name-only", config(quantization_config={"quant_method": "gptq", "bits": 4})),
    ("broken-tokenizer", write("qwen.tiktoken", "AA== 5\n")),
    ("two-vocabularies", two_vocabularies),
    ("vocabulary-too-large", config(vocab_size=300)),
    ("vocabulary-too-small", many_rows),
    ("no-template", settings("chat_template")),
    ("broken-template", settings(chat_template="{% for m in messages %}")),
    ("template-token", settings(chat_template=TEMPLATE + "<|eot_id|>")),
    ("eos-mismatch", settings(eos_token="<|extra_0|>")),
    ("two-ends", generation(eos_token_id=[256])),
    ("special-id-kind", config(eos_token_id="<|im_end|>")),
    ("special-id-kind", generation(pad_token_id=[256, 1.5])),
    ("eos-misses-turn", chat_that_ends_at_text),
    ("special-id-range", config(pad_token_id=151643)),
    ("unknown-special-token", settings(pad_token="<pad>")),
    ("added-bos", settings(add_bos_token=True)),
    ("bad-sampling", generation(top_p=1.5)),
    ("sampling-at-zero", generation(do_sample=True, temperature=0)),
    ("contradicting-lengths", generation(min_new_tokens=50, max_new_tokens=10)),
    ("no-generation-config", remove(GENERATION)),
    ("missing-tensor", tensors(lambda held: held.pop(UP))),
    ("missing-tensor", config(num_hidden_layers=1000)),
    ("extra-tensor", tensors(lambda held: held.update({"model.norm.bias": held[NORM]}))),
    ("extra-tensor", config(num_hidden_layers=1)),
    ("wrong-shape", config(intermediate_size=64)),
    ("untied-without-head", tensors(lambda held: held.pop(HEAD))),
    ("tied-but-different", config(tie_word_embeddings=True)),
    ("untied-but-same", tensors(lambda held: held.update({HEAD: held[EMBEDDING].clone()}))),
    ("non-finite", tensors(scale(NORM, float("nan")))),
    ("zero-weights", tensors(scale(UP, 0.0))),
    ("dtype-mismatch", config(torch_dtype="bfloat16")),
    ("float16-weights", tensors(half, torch_dtype="float16")),
]


def faults(path: Path) -> set[str]:
    return {finding.kind for finding in examine(path) if finding.severity == "fault"}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean") / "Tiny-Instruct"
    write_tiny_checkpoint(folder, config={"architectures": ["Qwen2ForCausalLM"]})
    edit(folder, SETTINGS, eos_token="<|im_end|>")
    return folder


def _name(value: object) -> str | None:
    return value if isinstance(value, str) else None


@pytest.mark.parametrize(("kind", "plant"), PLANTED, ids=_name)
def test_what_is_planted_is_found(kind: str, plant: Plant, healthy: Path, tmp_path: Path) -> None:
    folder = tmp_path / healthy.name
    shutil.copytree(healthy, folder)
    plant(folder)
    assert faults(folder) == {kind} | ALSO.get(kind, set())
    found = next(finding for finding in examine(folder) if finding.kind == kind)
    assert found.english
    assert found.english.endswith((".", "?"))
    assert any("\u4e00" <= character <= "\u9fff" for character in found.chinese)


def test_more_than_thirty_kinds_are_planted() -> None:
    assert len({kind for kind, _ in PLANTED}) >= 60


def _tied(folder: Path) -> Path:
    held = tiny_tensors(CONFIG)
    del held[HEAD]
    return write_tiny_checkpoint(folder, config={"tie_word_embeddings": True}, tensors=held)


def _published(folder: Path) -> Path:
    """With everything odd that published checkpoints have."""
    held = {name: tensor.bfloat16() for name, tensor in tiny_tensors(CONFIG).items()}
    write_tiny_checkpoint(folder, tensors=held, shard_bytes=20_000)
    values: dict[str, Any] = {
        "use_sliding_window": False,
        "sliding_window": 512,
        "max_window_layers": 2,
    }
    values |= {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}
    values |= {"torch_dtype": "bfloat16", "bos_token_id": 256, "transformers_version": "4.40.1"}
    edit(folder, CONFIG_FILE, **values, rope_scaling=YARN, architectures=["Qwen2ForCausalLM"])
    edit(folder, GENERATION, do_sample=True, top_k=20, repetition_penalty=1.05, pad_token_id=256)
    edit(folder, SETTINGS, eos_token="<|im_end|>", bos_token=None, errors="replace")
    (folder / "LICENSE").write_text("")
    return folder


def _base(folder: Path) -> Path:
    """A base model: it ends at the end of text, though it has a template."""
    write_tiny_checkpoint(folder, config={"eos_token_id": 256}, generation={"eos_token_id": 256})
    edit(folder, SETTINGS, eos_token="<|endoftext|>")
    return folder


# What published config.json files hold beyond the shapes, by model.
_SHAPES = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32}
_LATER: dict[str, Any] = {
    **_SHAPES,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.37.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_MIXTURE: dict[str, Any] = {
    **_LATER,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen-7B-Chat": {
        **_SHAPES,
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
        "attn_dropout_prob": 0.0,
        "bf16": False,
        "emb_dropout_prob": 0.0,
        "fp16": False,
        "fp32": False,
        "initializer_range": 0.02,
        "intermediate_size": 22016,
        "kv_channels": 128,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 32768,
        "model_type": "qwen",
        "no_bias": True,
        "onnx_safe": None,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": 8192,
        "softmax_in_fp32": False,
        "tie_word_embeddings": False,
        "tokenizer_class": "QWenTokenizer",
        "use_cache": True,
        "use_cache_kernel": False,
        "use_cache_quantization": False,
        "use_dynamic_ntk": True,
        "use_flash_attn": "auto",
        "use_logn_attn": True,
        "vocab_size": 151936,
    },
    "Qwen1.5-7B-Chat": _LATER | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "Qwen2-72B": _LATER
    | {"model_type": "qwen2", "hidden_size": 8192, "rms_norm_eps": 1e-5, "num_attention_heads": 64},
    "Qwen1.5-MoE-A2.7B": _MIXTURE
    | {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "shared_expert_intermediate_size": 5632,
    },
    "Qwen3-8B": _LATER
    | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "rope_scaling": None,
        "sliding_window": None,
    },
    "Qwen3-30B-A3B": _MIXTURE
    | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": []},
    "SmolLM2-135M-Instruct": _SHAPES
    | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "vocab_size": 49152,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_clean(name: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text(json.dumps(PUBLISHED[name]))
    assert faults(tmp_path) == {"no-weights", "no-tokenizer"}  # nothing else is there


def _of(model_type: str, **values: Any) -> Callable[[Path], Path]:
    """A checkpoint of another architecture."""

    def build(folder: Path) -> Path:
        wanted = CONFIG | {"num_key_value_heads": None} | values | {"model_type": model_type}
        wanted = {key: value for key, value in wanted.items() if value is not None}
        architecture = find(model_type)
        published = published_tensors(architecture.build(architecture.config(wanted)))
        generator = torch.Generator().manual_seed(0)
        held = {named.name: torch.randn(named.shape, generator=generator) for named in published}
        write_tiny_checkpoint(folder, tensors=held)
        (folder / CONFIG_FILE).write_text(json.dumps(wanted))
        return folder

    return build


_FIRST = {"layer_norm_epsilon": 1e-6, "seq_length": 512, "use_logn_attn": True}


def _first_generation(folder: Path) -> Path:
    _of("qwen", **_FIRST)(folder)
    edit(folder, CONFIG_FILE, "rms_norm_eps", "rope_theta", eos_token_id=256)
    edit(folder, SETTINGS, "chat_template", "pad_token")
    edit(folder, GENERATION, chat_format="chatml", eos_token_id=256, top_k=0, max_window_size=512)
    return folder


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CLEAN: dict[str, Callable[[Path], Path]] = {
    "qwen": _first_generation,
    "qwen2_moe": _of("qwen2_moe", **_EXPERTS, shared_expert_intermediate_size=24),
    "qwen3": _of("qwen3", head_dim=16, num_key_value_heads=2),
    "qwen3_moe": _of("qwen3_moe", **_EXPERTS, head_dim=16, norm_topk_prob=True),
    "baichuan": _of(
        "baichuan", model_max_length=512, max_position_embeddings=None, z_loss_weight=0
    ),
    "chat": lambda folder: write_tiny_checkpoint(folder),
    "parts": lambda folder: write_tiny_checkpoint(folder, shard_bytes=20_000),
    "llama": _of("llama", rms_norm_eps=1e-5, num_key_value_heads=2),
    "tied": _tied,
    "published": _published,
    "base": _base,
}


@pytest.mark.parametrize("kind", CLEAN)
def test_none_is_found_in_clean_ones(kind: str, tmp_path: Path) -> None:
    path = CLEAN[kind](tmp_path / ("Model-7B" if kind == "base" else "Model-7B-Instruct"))
    assert [finding for finding in examine(path) if finding.severity == "fault"] == []


def test_every_architecture_is_among_the_clean_ones() -> None:
    assert set(architectures()) - set(CLEAN) == {"qwen2"}  # which the others are


def test_the_embedded_model_is_clean(default_model_path: Path) -> None:
    assert examine(default_model_path) == []


def test_what_is_odd_and_harmless_is_explained(tmp_path: Path) -> None:
    notes = {finding.kind for finding in examine(_published(tmp_path / "model"))}
    assert notes == {"padded-vocabulary", "unused-window"}
    folder = write_tiny_checkpoint(
        tmp_path / "greedy", generation={"do_sample": False, "temperature": 0.7, "top_k": 20}
    )
    found = {finding.kind: finding.english for finding in examine(folder)}
    assert "temperature, top_k do nothing" in found["unused-sampling"]


def test_faults_come_first_and_all_of_them(healthy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    shutil.copytree(healthy, folder)
    for plant in (config(rms_norm_eps=1e-5, use_dynamc_ntk=True), remove(GENERATION), cut):
        plant(folder)
    found = examine(folder)
    kinds = {"wrong-eps", "misspelt-key", "no-generation-config", "damaged-weights"}
    assert kinds - {"no-generation-config"} <= {finding.kind for finding in found}
    assert [f.severity for f in found] == sorted(f.severity for f in found)


def test_what_no_check_knows_is_told_all_the_same(
    healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, plant in enumerate((config(num_attention_heads=5), config(eos_token_id="end"))):
        folder = tmp_path / str(number)
        shutil.copytree(healthy, folder)
        plant(folder)
        monkeypatch.setattr("qwenkit.survey.doctor.CHECKS", ())
        assert faults(folder) == {"does-not-load"}


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF but not really")
    assert faults(tmp_path / "model.gguf") == {"damaged-weights"}
    with pytest.raises(ModelNotFoundError):
        examine(tmp_path / "nothing")


def test_every_check_survives_knowing_nothing(tmp_path: Path) -> None:
    facts = Facts(path=tmp_path, folder=tmp_path, files={})
    assert {finding.kind for check in CHECKS for finding in check(facts)} == {"no-config"}


def test_the_ids_of_the_tiny_model_are_those_planted_here() -> None:
    assert CONFIG["eos_token_id"] == IM_END == 258
