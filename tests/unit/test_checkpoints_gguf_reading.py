"""GGUF files against what they hold: every kind of numbers, architecture, key, tensor, part and tokenizer."""

from __future__ import annotations

import logging
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoints import hf_logits, tiny_hf_model
from support.families import CLASSES, OWN

from nemo_minitron.checkpoints.formats.gguf import convert_gguf
from nemo_minitron.checkpoints.formats.gguf.architectures import ARCHITECTURES
from nemo_minitron.checkpoints.formats.gguf.rope import llama3_divisors
from nemo_minitron.errors import CheckpointError

gguf = pytest.importorskip("gguf")

from support import gguf_files as made  # noqa: E402 - needs gguf

VOCABULARY = 288
#: Rows of every matrix are a multiple of the 32 numbers of a block.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "rope_theta": 20000.0,
}
IDS = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_model(tmp_path_factory.mktemp("model") / "hf", **SIZES)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "nemo_minitron")
    return caplog


def close(logits: torch.Tensor, reference: np.ndarray) -> bool:
    """Within 2e-5 of the largest logit: float32 against float64."""
    assert reference.std() > 0.05
    return bool(np.abs(logits.numpy() - reference).max() <= 2e-5 * np.abs(reference).max())


@pytest.mark.parametrize("stored", made.QUANTIZED)
def test_every_kind_of_numbers(stored, model, tmp_path, warnings):
    source = made.write_gguf(tmp_path / "model.gguf", model, stored=stored)
    convert_gguf(source, tmp_path / "out")
    assert close(hf_logits(tmp_path / "out", IDS), made.reference_logits(source, IDS.numpy()))
    assert not warnings.records


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_kinds_that_the_package_only_reads(kind, tmp_path):
    """Random blocks, against the definition of the kind."""
    from nemo_minitron.checkpoints.formats.gguf.header import read_gguf

    stored = gguf.GGMLQuantizationType[kind]
    size = gguf.GGML_QUANT_SIZES[stored][1]
    blocks = np.random.default_rng(5).integers(0, 256, (3, 2 * size), dtype=np.uint8)
    for start in range(0, 2 * size, size):  # scales that are numbers
        places = (start, start + 2) if kind == "Q4_K" else (start + 208,)
        for place in places:
            blocks[:, place : place + 2] = np.frombuffer(np.float16(0.01).tobytes(), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "blocks.gguf", "llama")
    writer.add_tensor("x.weight", blocks, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = read_gguf(tmp_path / "blocks.gguf")
    assert content.shape("x.weight") == (3, 512)
    expected = made.numbers(content.tensors["x.weight"])
    assert expected.std() > 0.1
    assert np.abs(content.tensor("x.weight").numpy() - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each other architecture."""
    import transformers

    folder = tmp_path_factory.mktemp("others")
    for name in set(ARCHITECTURES) & set(CLASSES) - {"llama"}:
        torch.manual_seed(1)
        own = OWN[name]
        if name == "gemma3":  # what a header does not say; both types of layers in the two
            own = own | {"sliding_window_pattern": 2, "rope_local_base_freq": 10000.0, "query_pre_attn_scalar": 32}
        config = getattr(transformers, f"{CLASSES[name]}ForCausalLM").config_class(**SIZES | own)
        built = getattr(transformers, f"{CLASSES[name]}ForCausalLM")(config)
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.normal_(std=0.2)
                if parameter.ndim == 1 and name not in ("nemotron", "gemma3"):
                    parameter.add_(1.0)
        built.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "nemotron", "gemma3"])
@pytest.mark.parametrize("stored", ["F32", "Q8_0"])
def test_other_architectures(name, stored, others, tmp_path):
    """Biases, norms of heads, norms stored plus one, rotary embeddings on a part of each head."""
    fields = {"gemma3.attention.sliding_window_pattern": 2} if name == "gemma3" else {}
    source = made.write_gguf(tmp_path / "model.gguf", others / name, architecture=name, stored=stored, fields=fields)
    converted = convert_gguf(source, tmp_path / "out")
    assert converted.architecture.family == name
    assert close(hf_logits(tmp_path / "out", IDS), made.reference_logits(source, IDS.numpy()))


def test_every_architecture_is_tested():
    """qwen3moe, and the mixture of "llama", in test_gguf_export."""
    assert set(ARCHITECTURES) == {"llama", "qwen2", "qwen3", "qwen3moe", "nemotron", "gemma3"}


def test_the_reader_of_transformers_has_the_same_numbers(model, tmp_path):
    from transformers import LlamaForCausalLM

    from nemo_minitron.checkpoints import open_checkpoint

    source = made.write_gguf(tmp_path / "model.gguf", model, stored="Q4_1", fields={"general.name": "tiny"})
    converted = convert_gguf(source, tmp_path / "out")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    theirs.config.bos_token_id = 1
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="1GB")
    other = open_checkpoint(tmp_path / "theirs")
    for name in converted.weights.names():
        assert torch.equal(converted.weights.tensor(name), other.weights.tensor(name)), name


def test_a_model_in_parts(model, tmp_path):
    whole = convert_gguf(made.write_gguf(tmp_path / "whole.gguf", model), tmp_path / "whole")
    first = made.write_gguf(tmp_path / "model.gguf", model, parts=3)
    paths = [made.part_path(tmp_path / "model.gguf", place, 3) for place in range(3)]
    assert first == paths[0]
    for number, path in enumerate(paths):
        converted = convert_gguf(path, tmp_path / f"out{number}")
        for name in whole.weights.names():
            assert torch.equal(converted.weights.tensor(name), whole.weights.tensor(name))
    moved = tmp_path / "moved.gguf"
    paths[1].rename(moved)
    with pytest.raises(CheckpointError, match=r"one of 3 parts, and model-00002-of-00003\.gguf is missing"):
        convert_gguf(paths[2], tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"split\.count=3, its name makes it one of 1 parts"):
        convert_gguf(moved, tmp_path / "out")
    shutil.copyfile(paths[2], paths[1])
    with pytest.raises(CheckpointError, match=r"is in another part too"):
        convert_gguf(paths[0], tmp_path / "out")
    moved.rename(paths[1])
    paths[1].rename(moved)
    paths[2].rename(paths[1])
    moved.rename(paths[2])
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf: its header says split\.no=2, its name 1"):
        convert_gguf(paths[0], tmp_path / "out")


@pytest.mark.parametrize(
    "scaling",
    [
        {"factor": 8.0, "low": 1.0, "high": 4.0, "original": 8192},
        {"factor": 32.0, "low": 1.0, "high": 4.0, "original": 8192},
        {"factor": 16.0, "low": 1.0, "high": 2.0, "original": 24},
    ],
)
@pytest.mark.parametrize("theta", [20000.0, 500000.0])
def test_llama_3_scaling_is_recovered(scaling, theta, tmp_path):
    """What llama.cpp's converter stores, as it makes it, gives back transformers' four numbers."""
    head = 128
    model = tiny_hf_model(tmp_path / "hf", **SIZES | {"head_dim": head, "rope_theta": theta})
    freqs = converters_divisors(theta, head, **scaling)
    assert ((freqs > 1) & (freqs < scaling["factor"])).sum() >= 2
    source = made.write_gguf(tmp_path / "model.gguf", model, tensors={"rope_freqs.weight": freqs})
    converted = convert_gguf(source, tmp_path / "out")
    assert converted.architecture.rotary_scaling == {
        "rope_type": "llama3",
        "factor": scaling["factor"],
        "low_freq_factor": scaling["low"],
        "high_freq_factor": scaling["high"],
        "original_max_position_embeddings": scaling["original"],
    }
    assert close(hf_logits(tmp_path / "out", IDS), made.reference_logits(source, IDS.numpy()))
    unscaled = convert_gguf(made.write_gguf(tmp_path / "plain.gguf", model), tmp_path / "plain")
    assert unscaled.architecture.rotary_scaling is None


def converters_divisors(theta: float, head: int, *, factor: float, low: float, high: float, original: int) -> Any:
    """``rope_freqs.weight`` as ``convert_hf_to_gguf.py`` computes it, one frequency after the other."""
    import math

    out = []
    for freq in 1.0 / (theta ** (torch.arange(0, head, 2, dtype=torch.float32) / head)):
        length = 2 * math.pi / freq
        if length < original / high:
            out.append(1)
        elif length > original / low:
            out.append(factor)
        else:
            smooth = (original / length - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array([float(value) for value in out], dtype=np.float32)


def test_divisors_are_those_of_the_converter():
    numbers = {"factor": 8.0, "low": 1.0, "high": 4.0, "original": 8192}
    for theta in (10000.0, 500000.0):
        ours = llama3_divisors(theta, 128, **numbers).numpy()
        assert np.abs(ours / converters_divisors(theta, 128, **numbers) - 1).max() < 4e-7


def test_other_divisors_are_refused(model, tmp_path):
    plain = np.ones(16, dtype=np.float32)
    cases = {
        "odd": np.linspace(1, 8, 16, dtype=np.float32),
        "small": plain / 2,
        "short": np.full(8, 8, dtype=np.float32),
    }
    for name, freqs in cases.items():
        source = made.write_gguf(tmp_path / f"{name}.gguf", model, tensors={"rope_freqs.weight": freqs})
        with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is not the scaling of Llama 3"):
            convert_gguf(source, tmp_path / "out")
    source = made.write_gguf(tmp_path / "ones.gguf", model, tensors={"rope_freqs.weight": plain})
    assert convert_gguf(source, tmp_path / "ones").architecture.rotary_scaling is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}, r"scaling\.type='longrope' is not"),
        ({"llama.rope.scaling.type": "linear"}, r"rope_scaling"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.attn_factor": 0.5}, r"attn_factor=0\.5 is not"),
        ({"llama.expert_count": 8}, r"8 tensors that its header asks for are missing, such as blk\.0\.ffn_gate_inp"),
        ({"llama.attention.sliding_window": 16}, r"llama\.attention\.sliding_window=16"),
        ({"llama.logit_scale": 2.0}, r"llama\.logit_scale=2\.0"),
        ({"llama.attention.value_length": 16}, r"value_length=16 differs from the keys' 32"),
        ({"llama.rope.dimension_count": 16}, r"partial_rotary_factor=0\.5 is not supported"),
        ({"llama.attention.head_count_kv": [2, 4]}, r"head_count_kv differs between layers"),
        ({"llama.block_count": None}, r"its header has no llama\.block_count"),
        ({"llama.embedding_length": 32}, r"token_embd\.weight has shape \[288, 64\] where .* \[288, 32\]"),
        ({"general.type": "adapter"}, r"general\.type=adapter, which is not supported"),
        ({"qwen2.rope.freq_base": 5.0}, r"qwen2\.rope\.freq_base=5\.0"),
        ({"tokenizer.ggml.pre": "chameleon"}, r"tokenizer\.ggml\.pre='chameleon': this way of dividing text"),
        ({"tokenizer.ggml.model": "rwkv"}, r"tokenizer\.ggml\.model='rwkv' is not supported; supported: gpt2, llama"),
        ({"tokenizer.ggml.tokens": None}, r"tokenizer\.ggml\.tokens is missing"),
        ({"tokenizer.ggml.merges": ["a z z"]}, r"tokenizer\.ggml\.merges do not fit"),
        ({"tokenizer.ggml.token_type": [1, 1]}, r"token_type has not one entry for each token"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields, message, model, tmp_path):
    source = made.write_gguf(tmp_path / "model.gguf", model, fields=fields)
    with pytest.raises(CheckpointError, match=rf"model\.gguf.*{message}"):
        convert_gguf(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "without", "message"),
    [
        ({"blk.0.attn_q.bias": np.ones(128, dtype=np.float32)}, (), r"1 tensors have no place .*blk\.0\.attn_q\.bias"),
        ({"blk.1.attn_sinks.weight": np.ones(4, dtype=np.float32)}, (), r"attn_sinks\.weight"),
        (
            {},
            ("blk.1.ffn_up.weight",),
            r"1 tensors that its header asks for are missing, such as blk\.1\.ffn_up\.weight",
        ),
        ({}, ("token_embd.weight",), r"has no token_embd\.weight"),
        ({"output_norm.weight": np.ones(32, dtype=np.float32)}, (), r"output_norm\.weight has shape \[32\]"),
    ],
)
def test_every_tensor_has_its_place(more, without, message, model, tmp_path):
    source = made.write_gguf(tmp_path / "model.gguf", model, tensors=more, without=without)
    with pytest.raises(CheckpointError, match=message):
        convert_gguf(source, tmp_path / "out")


def test_harmless_keys_and_switched_off_ones(model, tmp_path, warnings):
    fields = {
        "general.author": "somebody",
        "general.license.name": "a licence",
        "quantize.imatrix.entries_count": 5,
        "llama.expert_count": 0,
        "llama.logit_scale": 1.0,
        "llama.rope.scaling.type": "none",
        "general.type": "model",
        "tokenizer.ggml.fim_pre_token_id": 3,
    }
    convert_gguf(made.write_gguf(tmp_path / "model.gguf", model, fields=fields), tmp_path / "out")
    assert not warnings.records
    odd = made.write_gguf(tmp_path / "odd.gguf", model, fields={"llama.attention.strange": 0, "llama.new": False})
    convert_gguf(odd, tmp_path / "odd")
    (record,) = warnings.records
    assert "left behind: llama.attention.strange=0, llama.new=False" in record.message


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.text("abcdefghij_", min_size=1, max_size=8),
    value=st.sampled_from([0, 3, 0.0, 0.5, False, True, "x", [1, 2]]),
)
def test_invented_keys_are_refused_or_named(key, value, model, tmp_path, caplog):
    caplog.clear()
    caplog.set_level(logging.WARNING, "nemo_minitron")
    name = f"llama.invented.{key}"
    source = made.write_gguf(tmp_path / f"{uuid.uuid4()}.gguf", model, fields={name: value})
    if value:
        with pytest.raises(CheckpointError, match=re.escape(f"its header has {name}={value}")):
            convert_gguf(source, tmp_path / "out", overwrite=True)
    else:
        convert_gguf(source, tmp_path / "out", overwrite=True)
        assert name in caplog.text


def test_damaged_files(model, tmp_path):
    whole = made.write_gguf(tmp_path / "model.gguf", model).read_bytes()
    for size in (4, 8, 20, 100, 3000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            convert_gguf(tmp_path / "cut.gguf", tmp_path / "out")


# ----------------------------------------------------------------------------------------------------------- tokenizers


def tokenizer_of(model: Path, folder: Path, **fields: Any) -> Any:
    from transformers import AutoTokenizer

    fields = {f"tokenizer.{key.replace('__', '.')}": value for key, value in fields.items()}
    source = made.write_gguf(folder / "model.gguf", model, fields=fields)
    convert_gguf(source, folder / "out", overwrite=True)
    return AutoTokenizer.from_pretrained(folder / "out")


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2"])
def test_ways_of_dividing_text(name, model, tmp_path):
    """As transformers' own converters divide it."""
    from transformers.convert_slow_tokenizer import Qwen2Converter, TikTokenConverter

    tokenizer = tokenizer_of(model, tmp_path, ggml__pre=name)
    ours = tokenizer.backend_tokenizer.pre_tokenizer
    if name == "qwen2":
        theirs = Qwen2Converter.__new__(Qwen2Converter)
        theirs.original_tokenizer = type("", (), {"encoder": {}, "bpe_ranks": {}})()
        theirs = theirs.converted({word: at for at, word in enumerate(made.vocabulary(VOCABULARY))}, []).pre_tokenizer
    else:
        from tokenizers import Regex, pre_tokenizers

        pattern = TikTokenConverter(vocab_file=None).pattern
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
        theirs = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    texts = ["Hello  world's 12345 ab\n\n c", "  x = [1, 2]\r\n\tnaïve日本語 I'LL ... !?", "\U0001f600 a\u0301 №5"]
    for text in texts:
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)
    # Llama 3 takes a word that is a token whole, and begins with its first token
    assert tokenizer("abc").input_ids == tokenizer.convert_tokens_to_ids(["abc"])
    assert tokenizer.decode(tokenizer("naïve 日本語").input_ids) == "naïve 日本語"


def test_ends_and_templates(model, tmp_path):
    tokenizer = tokenizer_of(
        model,
        tmp_path,
        ggml__add_bos_token=True,
        ggml__add_eos_token=True,
        ggml__padding_token_id=0,
        chat_template="default",
        chat_templates=["tool_use"],
        **{"chat_template.tool_use": "tools"},
    )
    assert tokenizer("ab").input_ids == [1, *tokenizer.convert_tokens_to_ids(["ab"]), 2]
    assert tokenizer("<s>ab</s>", add_special_tokens=False).input_ids[0] == 1
    assert tokenizer.pad_token_id == 0
    assert tokenizer.chat_template == {"default": "default", "tool_use": "tools"}
    assert tokenizer_of(model, tmp_path, ggml__add_bos_token=None, ggml__pre="llama-bpe")("ab").input_ids[0] == 1
    assert tokenizer_of(model, tmp_path, ggml__add_bos_token=None)("ab").input_ids[0] != 1


def test_sentencepiece(model, tmp_path):
    """As sentencepiece itself encodes, from its pieces and scores alone."""
    from sentencepiece import SentencePieceProcessor
    from support import tokenizers as texts

    path = texts.sentencepiece_model(tmp_path / "tokenizer.model", size=VOCABULARY, character_coverage=0.98)
    pieces = SentencePieceProcessor(model_file=str(path))
    numbers = range(pieces.vocab_size())
    kinds = [
        2 if pieces.is_unknown(at) else 3 if pieces.is_control(at) else 6 if pieces.is_byte(at) else 1 for at in numbers
    ]
    tokenizer = tokenizer_of(
        model,
        tmp_path,
        ggml__model="llama",
        ggml__pre="default",
        ggml__tokens=[pieces.id_to_piece(at) for at in numbers],
        ggml__scores=[float(pieces.get_score(at)) for at in numbers],
        ggml__token_type=kinds,
        ggml__merges=None,
        ggml__unknown_token_id=0,
        ggml__add_bos_token=None,
    )
    for text in texts.PROBES[:-1]:
        assert tokenizer(text).input_ids == [1, *pieces.encode(text)], text
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_a_file_that_does_not_say_how_text_is_divided(model, tmp_path, warnings):
    tokenizer = tokenizer_of(model, tmp_path, ggml__pre=None)
    assert tokenizer.tokenize("ab 12") == ["ab", "Ġ", "12"]
    assert "does not say how text is divided" in warnings.text
    tokenizer = tokenizer_of(model, tmp_path, ggml__add_space_prefix=True)
    assert tokenizer.tokenize("ab") == ["Ġ", "ab"]
