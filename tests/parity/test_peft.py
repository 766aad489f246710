"""LoRA adapters against peft on the same files: logits beside the model, merged, and trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import QWEN2_MOE, TINY, make_pair, read_model

from adapters_made import FIRST, adapter_tensors
from first_generation import first_tensors, write_first_generation
from qwenkit.adapter_files import read_adapter, write_adapter
from qwenkit.adapters.bank import AdapterBank, Segment
from qwenkit.adapters.lora import LoraLinear, Merging
from qwenkit.adapters.peft_files import LoraAdapter, to_tensors
from qwenkit.checkpoint import open_checkpoint
from qwenkit.fill import fill
from qwenkit.kernels import cpu
from qwenkit.kernels.ops.add_low_rank import add_low_rank
from qwenkit.layers.attention import PackedCausal
from qwenkit.models import qwen
from qwenkit.models.spec import CausalModel, find

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_bias=True"),
    pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor.* invalid shape"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:.*modules_to_save"),
]
peft = pytest.importorskip("peft")
cpu.register()

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all-linear": ({"model_type": "qwen2"}, {"target_modules": "all-linear"}),
    "query and value": (
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"target_modules": ["q_proj", "v_proj"]},
    ),
    "pattern": ({"model_type": "qwen2"}, {"target_modules": r".*\.(o_proj|up_proj)"}),
    "head": ({"model_type": "qwen2"}, {"target_modules": ["k_proj", "lm_head"]}),
    "rank patterns": (
        {"model_type": "qwen2"},
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
            "alpha_pattern": {"v_proj": 32, r"layers\.[02]\.self_attn\.o_proj": 3},
        },
    ),
    "rank-stabilised": (
        {"model_type": "qwen2"},
        {"use_rslora": True, "target_modules": ["up_proj"]},
    ),
    "all biases": (
        {"model_type": "qwen2"},
        {"bias": "all", "target_modules": ["q_proj", "o_proj"]},
    ),
    "own biases": (
        {"model_type": "qwen2"},
        {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]},
    ),
    "bias of the product": (
        {"model_type": "qwen2"},
        {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]},
    ),
    "some layers": (
        {"model_type": "qwen2"},
        {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [0, 2]},
    ),
    "excluded": (
        {"model_type": "qwen2"},
        {"target_modules": ["q_proj", "gate_proj"], "exclude_modules": ["1.self_attn.q_proj"]},
    ),
    "mixture": (QWEN2_MOE, {"target_modules": "all-linear"}),
    "mixture, attention": (QWEN2_MOE, {"target_modules": ["q_proj", "k_proj", "o_proj"]}),
    "llama": ({"model_type": "llama"}, {"target_modules": "all-linear"}),
}


def make_adapter(
    variant: dict[str, Any], config: dict[str, Any], folder: Path
) -> tuple[Any, CausalModel, LoraAdapter]:
    """A random model with a random adapter in peft, ours of the same files, and the adapter."""
    theirs, ours = make_pair(variant, folder / "model", std=0.3)
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=12, **config))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder / "adapter")
    return adapted.eval(), ours, read_adapter(folder / "adapter")


def logits(model: Any, ids: torch.Tensor, *, bank: AdapterBank | None = None) -> torch.Tensor:
    if bank is not None:
        bank.choose([Segment(1, 0, len(ids))], [Segment(1, 0, len(ids))])
        model = bank.model
    with torch.no_grad():
        result: torch.Tensor = model(ids, PackedCausal([len(ids)]))  # [tokens, vocab_size]
    return result


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_logits_agree_beside_the_model_and_merged(name: str, tmp_path: Path) -> None:
    variant, config = CASES[name]
    theirs, ours, adapter = make_adapter(variant, config, tmp_path)
    ids = torch.randint(0, TINY["vocab_size"], (40,))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]  # [40, vocab_size]
    plain = logits(ours, ids)
    assert (expected - plain).abs().max() > 0.05 * expected.abs().max()  # it matters
    for native in (False, True) if add_low_rank.backends else (False,):
        bank = AdapterBank(ours, native=native)
        bank.add(1, bank.prepare(adapter))
        assert_close(logits(None, ids, bank=bank), expected)
        bank.choose((), ())
        assert torch.equal(logits(bank.model, ids), plain)
    assert_close(logits(_merged(tmp_path / "model", adapter), ids), expected)


def _merged(path: Path, adapter: LoraAdapter) -> CausalModel:
    checkpoint = open_checkpoint(path)
    architecture = find(checkpoint.config["model_type"])
    with torch.device("meta"):
        model = architecture.build(architecture.config(checkpoint.config))
    model.dtype = torch.float32
    fill(model, architecture, checkpoint, merging=Merging(adapter))
    return model


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_peft_s_own_file(name: str, tmp_path: Path) -> None:
    _, _, adapter = make_adapter(*CASES[name], tmp_path)
    write_adapter(adapter, tmp_path / "written")
    read, written = tmp_path / "adapter", tmp_path / "written"
    file = "adapter_model.safetensors"
    assert (written / file).read_bytes() == (read / file).read_bytes()
    texts = [json.loads((f / "adapter_config.json").read_text()) for f in (read, written)]
    assert texts[0] == texts[1]


def test_a_head_and_an_embedding_that_were_trained_whole_are_merged(tmp_path: Path) -> None:
    """As the first generation's script does with a base model that does not know ChatML."""
    whole = ["embed_tokens", "lm_head"]
    theirs, ours = make_pair({"model_type": "qwen2"}, tmp_path / "model", std=0.1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=whole)
    adapted = peft.get_peft_model(theirs, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.randint(0, TINY["vocab_size"], (20,))
    with torch.no_grad():
        expected = adapted.eval()(ids[None]).logits[0]
    merged = _merged(tmp_path / "model", read_adapter(tmp_path / "adapter"))
    assert_close(logits(merged, ids), expected)
    assert (logits(ours, ids) - expected).abs().max() > 0.1 * expected.abs().max()


def test_pickled_weights_are_read_alike(tmp_path: Path) -> None:
    _, _, adapter = make_adapter(*CASES["all-linear"], tmp_path)
    folder = tmp_path / "adapter"
    tensors = {n: t.clone() for n, t in to_tensors(adapter).items()}
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    again = to_tensors(read_adapter(folder))
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_gradients_agree_with_peft_s(tmp_path: Path) -> None:
    theirs, ours, adapter = make_adapter(*CASES["all-linear"], tmp_path)
    theirs.train()
    for path, pair in adapter.low_ranks.items():
        parent, _, name = path.rpartition(".")
        setattr(ours.get_submodule(parent), name, LoraLinear.of(ours.get_submodule(path), pair))
    ids = torch.randint(0, TINY["vocab_size"], (24,))
    theirs(ids[None]).logits[0].logsumexp(1).sum().backward()
    ours(ids, PackedCausal([24])).logsumexp(1).sum().backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert len(expected) == 2 * len(adapter.low_ranks)
    for path in adapter.low_ranks:
        layer = ours.get_submodule(path)
        assert layer.linear.weight.grad is None
        for own, side in ((layer.down, "lora_A"), (layer.up, "lora_B")):
            assert own.grad is not None
            assert_close(own.grad, expected[f"base_model.model.{path}.{side}.default.weight"])


def test_the_first_generation(tmp_path: Path) -> None:
    """peft knows no such model, so its layers are put around those of ours."""
    folder = write_first_generation(tmp_path / "model")
    ours = read_model(folder)
    targets = adapter_tensors(ours, FIRST, 4)
    theirs = qwen.Model(qwen.read_config(json.loads((folder / "config.json").read_text())))
    theirs.dtype = torch.float32
    theirs.load_state_dict(first_tensors(json.loads((folder / "config.json").read_text())))
    for path, module in list(theirs.named_modules()):
        name = f"base_model.model.{path}.lora_A.weight"
        if name in targets:
            parent, _, step = path.rpartition(".")
            setattr(theirs.get_submodule(parent), step, _AsLinear(module, targets, path))
    given = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": FIRST}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(given))
    torch.save(targets, tmp_path / "adapter" / "adapter_model.bin")
    adapter = read_adapter(tmp_path / "adapter")
    ids = torch.randint(0, 464, (30,))
    bank = AdapterBank(ours, native=False)
    bank.add(1, bank.prepare(adapter))
    assert_close(logits(None, ids, bank=bank), logits(theirs, ids))
    assert_close(logits(_merged(folder, adapter), ids), logits(theirs, ids))


class _AsLinear(torch.nn.Module):
    """peft's layer over one of ours, called as ours are."""

    def __init__(self, linear: Any, tensors: dict[str, torch.Tensor], path: str) -> None:
        super().__init__()
        base = torch.nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
        base.weight, base.bias = linear.weight, linear.bias
        config = peft.LoraConfig(r=4, lora_alpha=16)
        self.layer = peft.tuners.lora.Linear(base, "default", config=config, r=4, lora_alpha=16)
        with torch.no_grad():
            for side, module in (("A", self.layer.lora_A), ("B", self.layer.lora_B)):
                module["default"].weight.copy_(
                    tensors[f"base_model.model.{path}.lora_{side}.weight"]
                )

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        return y if residual is None else residual + y
