"""The published snippets, with only their import line changed, on a tiny checkpoint."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from first_generation import write_first_generation
from qwenkit import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    TextIteratorStreamer,
    TextStreamer,
    decode_tokens,
    get_stop_words_ids,
    make_context,
    snapshot_download,
)
from qwenkit.compat import CompatModel, CompatTokenizer
from qwenkit.engine.settings import EngineSettings
from qwenkit.errors import QwenkitError, TokenizerError, UsageError
from qwenkit.layers.attention import PackedCausal
from tiny import CONFIG, ENDOFTEXT, IM_END, IM_START, tiny_tensors, write_tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generation = {
        "chat_format": "chatml",
        "eos_token_id": IM_END,
        "pad_token_id": ENDOFTEXT,
        "max_new_tokens": 12,
        "do_sample": True,
        "top_k": 0,
        "top_p": 0.8,
        "max_window_size": 6144,
        "transformers_version": "4.31.0",
    }
    return write_tiny_checkpoint(tmp_path_factory.mktemp("chat"), generation=generation)


@pytest.fixture(scope="module")
def model(folder: Path) -> CompatModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", trust_remote_code=True
    ).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> CompatTokenizer:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def test_three_turns_of_chat(model: CompatModel, tokenizer: CompatTokenizer) -> None:
    response, history = model.chat(tokenizer, "你好", history=None)
    assert history == [("你好", response)]
    kept = list(history)
    second, longer = model.chat(tokenizer, "给我讲一个故事", history=history)
    assert history == kept, "the given history is copied, not changed"
    assert longer == [*kept, ("给我讲一个故事", second)]
    _, third = model.chat(tokenizer, "标题", history=longer, system="你是一个作家")
    assert len(third) == 3


def test_chat_is_repeatable_with_a_seed_and_refuses_stream(
    model: CompatModel, tokenizer: CompatTokenizer
) -> None:
    first, _ = model.chat(tokenizer, "hi", history=None, seed=1234)
    again, _ = model.chat(tokenizer, "hi", history=None, seed=1234)
    assert first == again
    with pytest.raises(UsageError, match="chat_stream"):
        model.chat(tokenizer, "hi", history=None, stream=True)


def test_chat_stream_gives_growing_texts(model: CompatModel, tokenizer: CompatTokenizer) -> None:
    history = [("a", "b")]
    texts = list(model.chat_stream(tokenizer, "hi", history=history, seed=7))
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert history == [("a", "b")]
    whole, _ = model.chat(tokenizer, "hi", history=history, seed=7)
    assert (texts[-1] if texts else "") == whole


def test_generate_and_decode(model: CompatModel, tokenizer: CompatTokenizer) -> None:
    inputs = tokenizer("蒙古国的首都是乌兰巴托", return_tensors="pt")
    inputs = inputs.to(model.device)
    pred = model.generate(**inputs, do_sample=False)
    prompt_tokens = inputs.input_ids.shape[1]
    assert torch.equal(pred[:, :prompt_tokens], inputs.input_ids)
    assert 1 <= pred.shape[1] - prompt_tokens <= 12
    text = tokenizer.decode(pred.cpu()[0], skip_special_tokens=True)
    assert text.startswith("蒙古国的首都是乌兰巴托")


def test_the_qwen2_quick_start(model: CompatModel, tokenizer: CompatTokenizer) -> None:
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Give me a short introduction."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n")
    model_inputs = tokenizer([text], return_tensors="pt").to(model.device)
    assert model_inputs.input_ids[0].tolist() == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True
    )
    generated_ids = model.generate(model_inputs.input_ids, max_new_tokens=6)
    generated_ids = [
        output_ids[len(input_ids) :]
        for input_ids, output_ids in zip(model_inputs.input_ids, generated_ids, strict=True)
    ]
    response = tokenizer.batch_decode(generated_ids, skip_special_tokens=True)[0]
    assert isinstance(response, str)


def test_generation_config_fields_take_effect(folder: Path, model: CompatModel) -> None:
    config = GenerationConfig.from_pretrained(folder, trust_remote_code=True, max_new_tokens=3)
    assert (config.max_new_tokens, config.top_p, config.do_sample) == (3, 0.8, True)
    ids = torch.tensor([[65, 66, 67]])
    config.do_sample = False
    assert model.generate(ids, generation_config=config).shape[1] <= 6
    greedy = model.generate(ids, max_new_tokens=8, do_sample=True, top_k=1)
    assert torch.equal(greedy, model.generate(ids, max_new_tokens=8, do_sample=False))
    with pytest.raises(UsageError, match="max_new_tokens"):
        model.generate(ids, max_new_token=8)
    with pytest.raises(UsageError, match="'top_p'"):
        GenerationConfig.from_pretrained(folder, topp=0.5)


def test_a_left_padded_batch_equals_single_prompts(model: CompatModel, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        folder, pad_token="<|extra_0|>", eos_token="<|endoftext|>", padding_side="left"
    )
    texts = ["short", "a much longer prompt than that", "middle one"]
    batch = tokenizer(texts, padding="longest", return_tensors="pt")
    pad = tokenizer.pad_token_id
    options = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": pad}
    with_mask = model.generate(batch.input_ids, attention_mask=batch.attention_mask, **options)
    without_mask = model.generate(batch.input_ids, **options)
    assert torch.equal(with_mask, without_mask)
    start = batch.input_ids.shape[1]
    for row, text in zip(with_mask, texts, strict=True):
        single = model.generate(tokenizer([text], return_tensors="pt").input_ids, **options)
        alone = single[0, len(tokenizer.encode(text)) :]
        together = row[start : start + len(alone)]
        assert torch.equal(together, alone)
        assert (row[start + len(alone) :] == pad).all()


def test_logits_of_a_padded_batch(model: CompatModel) -> None:
    ids = torch.tensor([[0, 0, 72, 73], [70, 71, 72, 73]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    output = model(ids, attention_mask=mask)
    alone = model.llm.model(torch.tensor([72, 73]), PackedCausal([2]))
    torch.testing.assert_close(output.logits[0, 2:], alone, atol=1e-5, rtol=0)
    assert (output.logits[0, :2] == 0).all()
    torch.testing.assert_close(model(ids[1:]).logits[0], output.logits[1], atol=1e-5, rtol=0)


def test_stop_words_ids_end_the_output_after_the_sequence(model: CompatModel) -> None:
    ids = torch.tensor([[65, 66, 67, 68]])
    free = model.generate(ids, do_sample=False, max_new_tokens=10)[0, 4:].tolist()
    assert len(free) >= 4
    stops = [[999_999 % 256, 5], free[1:3]]
    stopped = model.generate(ids, do_sample=False, max_new_tokens=10, stop_words_ids=stops)
    end = next(i for i in range(len(free)) if free[: i + 1][-2:] == free[1:3])
    assert stopped[0, 4:].tolist() == free[: end + 1]


def test_streamers(
    model: CompatModel, tokenizer: CompatTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = tokenizer("one two", return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 8}
    expected = model.generate(**inputs, **options)[0, inputs.input_ids.shape[1] :]
    text = tokenizer.decode(expected, skip_special_tokens=True)
    model.generate(
        **inputs,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **options,
    )
    assert capsys.readouterr().out == text + "\n"
    streamer = TextIteratorStreamer(tokenizer, True, timeout=60.0, skip_special_tokens=True)
    thread = threading.Thread(
        target=model.generate, kwargs={**inputs, "streamer": streamer, **options}
    )
    thread.start()
    assert "".join(streamer) == text
    thread.join()


def test_make_context_and_decode_tokens(tokenizer: CompatTokenizer) -> None:
    text, ids = make_context(tokenizer, "hi<|im_end|>", [("a", "b")], system="S")
    assert text == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb"
        "<|im_end|>\n<|im_start|>user\nhi<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(IM_END) == 4, "the one in the user's text stays text"
    short, _ = make_context(tokenizer, "hi", [("a" * 50, "b")], system="S", max_window_size=60)
    assert "aaa" not in short
    out = [*ids, *b"answer", IM_END, IM_START]
    assert decode_tokens(out, tokenizer, len(text), len(ids), "chatml", return_end_reason=True) == (
        "answer",
        "Gen '<|im_end|>'",
    )
    assert get_stop_words_ids("chatml", tokenizer) == [[IM_END], [IM_START]]
    raw = decode_tokens([*b"Q", *b" yes Human: no"], tokenizer, 1, 1, "raw")
    assert raw == "yes"
    with pytest.raises(UsageError, match="chat_format"):
        make_context(tokenizer, "hi", chat_format="alpaca")


def test_tokenizer_calls(tokenizer: CompatTokenizer) -> None:
    assert tokenizer.encode("<|im_end|>") == [IM_END]
    assert tokenizer.encode("<|im_end|>", allowed_special=set()) == list(b"<|im_end|>")
    with pytest.raises(ValueError, match="special token"):
        tokenizer.encode("<|im_end|>", allowed_special=set(), disallowed_special="all")
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", b"a"]) == [IM_START, 97]
    assert tokenizer.convert_ids_to_tokens([IM_START, 97]) == ["<|im_start|>", b"a"]
    assert (tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id) == (256, 257, 258)
    assert len(tokenizer) == 464
    ragged = tokenizer(["a", "bb"])
    assert ragged.attention_mask == [[1], [1, 1]]
    with pytest.raises(UsageError, match="padding"):
        tokenizer(["a", "bb"], return_tensors="pt")
    with pytest.raises(TokenizerError, match="nope"):
        CompatTokenizer(tokenizer.core, tokenizer.record, pad_token="<|nope|>")


def test_precision_switches(folder: Path) -> None:
    load = AutoModelForCausalLM.from_pretrained
    assert load(folder, fp32=True).dtype == torch.float32
    assert load(folder, bf16=True).dtype == torch.bfloat16
    assert load(folder, torch_dtype=torch.float16).dtype == torch.float32, "never silent fp16"
    assert load(folder, torch_dtype="auto").dtype == torch.float32
    with pytest.raises(UsageError, match="one precision"):
        load(folder, bf16=True, fp32=True)
    for wrong in ("x", 1, None):
        with pytest.raises(UsageError, match=r"fp16: expected True or False, got "):
            load(folder, fp16=wrong)


def test_a_base_model_refuses_to_chat(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(
        tmp_path, generation={"chat_format": "raw"}, template=None, tensors=tiny_tensors(CONFIG)
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(QwenkitError, match="Chat"):
        model.chat(AutoTokenizer.from_pretrained(folder), "hi", history=None)


def test_the_generation_config_of_a_gguf_is_the_models_own(default_model_path: Path) -> None:
    config = GenerationConfig.from_pretrained(default_model_path)
    assert (config.do_sample, config.temperature, config.top_p) == (True, 0.2, 0.9)
    assert config.eos_token_id


def test_an_engine_error_is_raised_not_swallowed(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.llm.model.get_parameter("model.norm.weight")[3] = float("nan")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[65, 66]])
    with pytest.raises(QwenkitError, match="NaN or infinite"):
        model.generate(ids, max_new_tokens=3)
    with pytest.raises(QwenkitError, match="NaN or infinite"):
        model.generate(ids, max_new_tokens=3, streamer=TextStreamer(tokenizer))
    with pytest.raises(QwenkitError, match="NaN or infinite"):
        model.chat(tokenizer, "hi", history=None)


def test_the_history_window_of_the_config_takes_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = {"chat_format": "chatml", "max_window_size": 6144}
    folder = write_tiny_checkpoint(tmp_path, generation=generation, template=None)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    history = [("q" * 60, "a" * 60), ("r" * 9, "b" * 9)]
    seen: list[bytes] = []
    stream = model.llm.stream

    def watched(ids: tuple[int, ...], sampling: Any) -> Any:
        seen.append(bytes(i for i in ids if i < 256))
        return stream(ids, sampling)

    monkeypatch.setattr(model.llm, "stream", watched)
    model.chat(tokenizer, "hi", history, max_new_tokens=1)
    model.generation_config.max_window_size = 120
    model.chat(tokenizer, "hi", history, max_new_tokens=1)
    assert b"qqq" in seen[0]
    assert b"qqq" not in seen[1]
    assert b"rrr" in seen[1]


def test_names_of_other_hubs_snippets(folder: Path) -> None:
    assert snapshot_download(str(folder), revision="main", ignore_patterns=["*.h5"]) == str(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<|extra_0|>"
    inputs = tokenizer("Q: What is the biggest animal?\nA:", return_tensors="pt").to(model.device)
    pred = model.to("cpu").generate(**inputs, max_new_tokens=32, use_cache=True)
    assert pred.shape[1] <= inputs.input_ids.shape[1] + 32


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_a_device_that_is_not_there_is_said(folder: Path, tokenizer: CompatTokenizer) -> None:
    with pytest.raises(UsageError, match="device"):
        AutoModelForCausalLM.from_pretrained(folder, device_map="cuda:0")
    with pytest.raises(UsageError, match="device"):
        AutoModelForCausalLM.from_pretrained(folder, device_map="gpu")
    with pytest.raises(UsageError, match="device"):
        tokenizer("a", return_tensors="pt").to("cuda")


@pytest.mark.parametrize(
    "call",
    [
        lambda model, tokenizer: model.chat(tokenizer, None, history=None),
        lambda model, tokenizer: model.chat(tokenizer, "hi", history="x"),
        lambda model, tokenizer: model.chat(tokenizer, "hi", history=[("a",)]),
        lambda model, tokenizer: model.generate("hi"),
        lambda model, tokenizer: model.generate(torch.tensor([[65]]), num_beams=4),
        lambda model, tokenizer: tokenizer(None),
        lambda model, tokenizer: tokenizer([5]),
        lambda model, tokenizer: tokenizer.decode("a"),
        lambda model, tokenizer: tokenizer.decode(None),
    ],
)
def test_arguments_of_the_wrong_kind_are_our_errors(
    call: Any, model: CompatModel, tokenizer: CompatTokenizer
) -> None:
    with pytest.raises(QwenkitError):
        call(model, tokenizer)


@pytest.mark.parametrize(
    ("config", "asked", "kept"),
    [
        ({}, None, "auto"),
        ({"use_cache_quantization": True}, None, "int8"),
        ({"use_cache_quantization": True}, False, "auto"),
        ({"use_cache_quantization": False}, True, "int8"),
    ],
)
def test_cache_quantization_is_int8(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    asked: bool | None,
    kept: str,
) -> None:
    folder = write_first_generation(tmp_path, config=config)
    seen: list[str] = []
    original = EngineSettings

    def settings(**given: Any) -> EngineSettings:
        seen.append(given["kv_dtype"])
        return original(**given)

    monkeypatch.setattr("qwenkit.api.session.EngineSettings", settings)
    model = AutoModelForCausalLM.from_pretrained(
        folder, use_cache_quantization=asked, use_cache_kernel=True, use_flash_attn=False
    )
    assert seen[0] == kept
    ids = torch.tensor([[1, 2, 3]])
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > 3
    model.llm.close()
    with pytest.raises(UsageError, match=r"^use_cache_quantization: expected True or False"):
        AutoModelForCausalLM.from_pretrained(folder, use_cache_quantization="yes")  # type: ignore[arg-type]
