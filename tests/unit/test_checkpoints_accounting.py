"""The Hugging Face reader accounts for every key, every tensor and every file that it is given."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoints import hf_logits, tiny_checkpoint, tiny_hf_model, tokens

from nemo_minitron import accounting
from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
from nemo_minitron.checkpoints.formats.huggingface import known
from nemo_minitron.checkpoints.formats.huggingface.beside import account_files
from nemo_minitron.checkpoints.formats.huggingface.config import from_hf, to_hf
from nemo_minitron.errors import CheckpointError

NAMES = st.from_regex(r"[a-z][a-z_]{3,20}", fullmatch=True)
OFF = st.sampled_from([None, False, 0, 0.0, "", [], {}])
ON = st.one_of(
    st.just(True),
    st.integers().filter(bool),
    st.floats(allow_nan=False, allow_infinity=False).filter(bool),
    st.text(min_size=1),
    st.lists(st.integers(), min_size=1),
    st.dictionaries(NAMES, st.integers(), min_size=1),
)
EACH = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("accounting") / "hf")


@pytest.fixture(scope="module")
def config(source: Path) -> dict[str, Any]:
    return json.loads((source / "config.json").read_text())


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is warned of in the course of a test."""
    kept: list[str] = []
    monkeypatch.setattr(accounting, "_warned", set())

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.append(record.getMessage())

    handler = Keep(logging.WARNING)
    # Whatever other tests of this process did to the loggers.
    monkeypatch.setattr(accounting.logger, "disabled", False)
    monkeypatch.setattr(accounting.logger, "level", logging.WARNING)
    monkeypatch.setattr(accounting.logger.manager, "disable", logging.NOTSET)
    accounting.logger._cache.clear()  # type: ignore[attr-defined]
    accounting.logger.addHandler(handler)
    yield kept
    accounting.logger.removeHandler(handler)
    accounting.logger._cache.clear()  # type: ignore[attr-defined]


@EACH
@given(key=NAMES, value=ON)
def test_an_unknown_key_that_is_switched_on_is_refused(config: dict[str, Any], key: str, value: Any) -> None:
    if key in config or key in known.KEYS or key in known.NEUTRAL_KEYS:
        return
    with pytest.raises(CheckpointError, match=re.escape(f"config.json: {key}=")) as caught:
        from_hf(config | {key: value}, Path("config.json"))
    assert "remove the key" in str(caught.value)
    assert "\n" not in str(caught.value)


@EACH
@given(key=NAMES, value=OFF)
def test_an_unknown_key_that_is_switched_off_is_warned_of(
    config: dict[str, Any], warnings: list[str], key: str, value: Any
) -> None:
    if key in config or key in known.KEYS or key in known.NEUTRAL_KEYS:
        return
    accounting._warned.clear()
    warnings.clear()
    assert from_hf(config | {key: value}, Path("config.json")) == from_hf(config, Path("config.json"))
    (warning,) = warnings
    assert f"{key}={value!r}" in warning


def test_known_keys_pass_without_a_word(source: Path, config: dict[str, Any], warnings: list[str]) -> None:
    expected = from_hf(config, source)
    for key in known.KEYS:
        assert from_hf({**config, key: config.get(key, "anything")}, source) == expected
    for key, value in known.NEUTRAL_KEYS.items():
        assert from_hf({**config, key: value}, source) == expected
        with pytest.raises(CheckpointError, match=f"{key}=7"):
            from_hf({**config, key: 7}, source)
    assert all(reason.strip() for table in (known.KEYS, known.FILES, known.REFUSED_FILES) for reason in table.values())
    assert warnings == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type='mistral' is not that of LlamaForCausalLM, 'llama'"),
        ({"num_local_experts": 8}, "num_local_experts=8 is not known"),
        ({"kv_channels": 7}, "kv_channels=7 contradicts the 12"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}, "has code of its own"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: sliding_attention"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "low_freq_factor=None: type 'llama3' needs a number",
        ),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [2, 2]}}, r"rope_scaling\.mrope_section"),
        ({"rope_scaling": {"rope_type": "default", "type": "llama3"}}, "remove one of them"),
        ({"rope_scaling": 2.0}, "must be an object"),
        ({"auto_map": 3, "mlp_bias": True}, "mlp_bias=True is not supported.*; a value is of the wrong kind"),
        ({"layer_types": [{}]}, "a value is of the wrong kind"),
        ({"architectures": 5}, "architecture 5 is not supported"),
    ],
)
def test_keys_that_change_the_model_are_refused(config: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        from_hf(config | changes, Path("config.json"))


def test_keys_that_agree_pass(config: dict[str, Any]) -> None:
    more = {"kv_channels": 12, "layer_types": ["full_attention"] * 3, "auto_map": {"AutoTokenizer": ["a", None]}}
    assert from_hf(config | more, Path("config.json")) == from_hf(config, Path("config.json"))


@settings(EACH, max_examples=25)
@given(name=st.from_regex(r"(model\.)?(layers\.[0-9]\.)?[a-z_]{3,12}\.(weight|bias|scale)", fullmatch=True))
def test_an_unknown_tensor_is_refused(source: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    if name in tensors:
        return
    changed = source.parent / "tensors"
    shutil.rmtree(changed, ignore_errors=True)
    shutil.copytree(source, changed)
    save_file({**tensors, name: torch.ones(2)}, changed / "model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(name)):
        open_checkpoint(changed)


def test_buffers_of_old_releases_are_passed_over(source: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, tmp_path / "hf")
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    save_file(load_file(source / "model.safetensors") | buffers, tmp_path / "hf" / "model.safetensors")
    assert open_checkpoint(tmp_path / "hf").shape == open_checkpoint(source).shape


def test_index_and_files_must_agree(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "part.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "hf" / "part.safetensors", "pt") as file:
        places = dict.fromkeys(file.keys(), "part.safetensors")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    open_checkpoint(tmp_path / "hf")
    index.write_text(json.dumps({"weight_map": {**places, "model.more": "part.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model\.more"):
        open_checkpoint(tmp_path / "hf")
    # a tensor that transformers would load and the index does not name
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "hf" / "part.safetensors")
    index.write_text(json.dumps({"weight_map": places}))
    save_file(tensors | {"model.norm.bias": torch.ones(48)}, tmp_path / "hf" / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"in the files but not in the index, such as model\.norm\.bias"):
        open_checkpoint(tmp_path / "hf")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "hf" / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"do not hold them, such as model\.norm\.weight"):
        open_checkpoint(tmp_path / "hf")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_tied_output_layer_must_be_the_embedding(tmp_path: Path, suffix: str) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny_hf_model(tmp_path / "hf", tied=True)
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()

    def save(output: torch.Tensor) -> None:
        content = tensors | {"lm_head.weight": output}
        if suffix == "bin":
            torch.save(content, model / "pytorch_model.bin")
        else:
            save_file(content, model / "model.safetensors")

    save(tensors["model.embed_tokens.weight"].clone())
    assert open_checkpoint(model).shape.tied_embeddings
    save(tensors["model.embed_tokens.weight"] + 1)
    with pytest.raises(CheckpointError, match="another matrix than the embedding"):
        open_checkpoint(model)


@EACH
@given(name=st.from_regex(r"[a-z]{4,12}\.(py|json|xyz|npz)", fullmatch=True))
def test_an_unknown_file_is_named(source: Path, warnings: list[str], tmp_path: Path, name: str) -> None:
    accounting._warned.clear()
    warnings.clear()
    shutil.rmtree(tmp_path / "hf", ignore_errors=True)
    (tmp_path / "hf").mkdir()
    for file in (*known.FILES, "config.json", "tokenizer.json", "model.safetensors", name):
        (tmp_path / "hf" / file.replace("*", "x")).touch()
    weights = tmp_path / "hf" / "model.safetensors"
    account_files(tmp_path / "hf", weights, [weights])
    if name == "config.json" or name in known.FILES:
        return
    (warning,) = warnings
    assert warning.endswith(f"files that are not known are left behind: {name}")


@pytest.mark.parametrize("name", known.REFUSED_FILES)
def test_files_that_change_the_model_are_refused(source: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(source, tmp_path / "hf")
    (tmp_path / "hf" / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"{name} lies beside the weights"):
        open_checkpoint(tmp_path / "hf")


def test_own_exports_have_nothing_to_name(source: Path, tmp_path: Path, warnings: list[str]) -> None:
    write_checkpoint(open_checkpoint(source), tmp_path / "out", "hf")
    open_checkpoint(tmp_path / "out")
    assert warnings == []
    assert torch.equal(hf_logits(tmp_path / "out", tokens()), hf_logits(source, tokens()))


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_type": "llama3",
}


def newer(config: dict[str, Any], **rope: Any) -> dict[str, Any]:
    """The configuration as transformers 5 writes it."""
    kept = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    return {**kept, "dtype": "float32", "rope_parameters": rope}


def test_both_spellings_of_rotary_embeddings(config: dict[str, Any]) -> None:
    where = Path("config.json")
    plain = from_hf({**config, "rope_theta": 30000.0, "rope_scaling": None}, where)
    scaled = from_hf({**config, "rope_theta": 30000.0, "rope_scaling": LLAMA3}, where)
    assert (scaled[1].rotary_base, scaled[1].rotary_scaling) == (30000.0, LLAMA3)
    assert from_hf(newer(config, rope_theta=30000.0, rope_type="default"), where) == plain
    assert from_hf(newer(config, rope_theta=30000.0, **LLAMA3), where) == scaled
    for shape, architecture in (plain, scaled):
        written = to_hf(shape, architecture, dtype="float32")
        assert from_hf(written, where) == (shape, architecture)
        for key in ("rope_parameters", "rope_scaling", "rope_theta"):
            assert key in written
        older = {key: value for key, value in written.items() if key != "rope_parameters"}
        only_newer = {key: value for key, value in written.items() if key not in ("rope_scaling", "rope_theta")}
        assert from_hf(older, where) == from_hf(only_newer, where) == (shape, architecture)


@pytest.mark.parametrize(
    ("outside", "rope", "message"),
    [
        (
            {"rope_theta": 10000.0},
            {"rope_theta": 5e5},
            r"rope_theta=10000\.0 and rope_parameters\.rope_theta=500000\.0",
        ),
        ({"rope_scaling": LLAMA3}, {"rope_theta": 5e5}, "rope_scaling=.* and rope_parameters=.* differ"),
        ({"rope_scaling": LLAMA3}, {**LLAMA3, "factor": 4.0}, "rope_scaling=.* and rope_parameters=.* differ"),
        ({}, {"rope_type": "longrope", "factor": 4.0}, "'longrope' is not supported"),
        ({}, {"rope_theta": 5e5, "alpha": 2.0}, r"rope_scaling\.alpha=2\.0 is not known"),
        ({}, {"full_attention": {"rope_theta": 5e5}}, "by kind of layer"),
        ({}, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported in this family"),
    ],
)
def test_rotary_embeddings_that_are_refused(
    config: dict[str, Any], outside: dict[str, Any], rope: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        from_hf({**newer(config, **rope), **outside}, Path("config.json"))


def test_weights_are_chosen_as_transformers_chooses(source: Path, tmp_path: Path, warnings: list[str]) -> None:
    """Four models in one directory: each time the one that is read is removed."""
    from safetensors.torch import load_file, save_file

    model = tmp_path / "hf"
    shutil.copytree(source, model)
    tensors = load_file(model / "model.safetensors")

    def scaled(factor: float) -> dict[str, torch.Tensor]:
        return {**tensors, "model.embed_tokens.weight": tensors["model.embed_tokens.weight"] * factor}

    save_file(scaled(2.0), model / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    torch.save(scaled(3.0), model / "pytorch_model.bin")
    torch.save(scaled(4.0), model / "pytorch_model-00001-of-00001.bin")
    for index, file in (
        ("model.safetensors.index.json", "model-00001-of-00001.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"),
    ):
        places = dict.fromkeys(tensors, file)
        (model / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    order = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    for place, first in enumerate(order):
        warnings.clear()
        opened = open_checkpoint(model)
        embedding = opened.weights.tensor("embedding.word_embeddings.weight")
        assert torch.equal(embedding, tensors["model.embed_tokens.weight"] * (place + 1.0)), first
        write_checkpoint(opened, tmp_path / f"out{place}", "hf")
        assert torch.equal(hf_logits(tmp_path / f"out{place}", tokens()), hf_logits(model, tokens())), first
        (warning,) = warnings
        assert f"weights that are not read, since {first} comes first: " in warning
        for other in order[place + 1 :]:
            assert other in warning.partition("comes first")[2]
        (model / first).unlink()


def test_what_a_torch_file_holds_besides_tensors(source: Path, tmp_path: Path, warnings: list[str]) -> None:
    from safetensors.torch import load_file

    shutil.copytree(source, tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save({**tensors, "epoch": 3}, tmp_path / "hf" / "pytorch_model.bin")
    open_checkpoint(tmp_path / "hf")
    (warning,) = warnings
    assert warning.endswith("pytorch_model.bin: entries that are no tensors are left behind: epoch")
    torch.save([1, 2], tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds list where tensors by name are needed"):
        open_checkpoint(tmp_path / "hf")


@pytest.mark.parametrize("architectures", [None, []])
def test_without_a_class_the_type_says_the_model(config: dict[str, Any], architectures: Any) -> None:
    where = Path("config.json")
    assert from_hf(config | {"architectures": architectures}, where) == from_hf(config, where)
    mistral = config | {"architectures": architectures, "model_type": "mistral", "sliding_window": 16}
    assert from_hf(mistral, where)[1].sliding_window == 16
    with pytest.raises(CheckpointError, match="architecture gpt2 is not supported"):
        from_hf(config | {"architectures": architectures, "model_type": "gpt2"}, where)


@pytest.mark.parametrize("name", ["MyLlamaForCausalLM", "LLaMAForCausalLM", "LlamaForCausalLMTuned"])
def test_a_subclass_is_read_by_its_type(config: dict[str, Any], warnings: list[str], name: str) -> None:
    where = Path(f"{name}.json")
    assert from_hf(config | {"architectures": [name]}, where) == from_hf(config, where)
    (warning,) = warnings
    assert warning.endswith(
        f"architecture {name} is read as LlamaForCausalLM: transformers, too, goes by model_type='llama'"
    )
    own = config | {"architectures": [name], "auto_map": {"AutoModelForCausalLM": f"modeling.{name}"}}
    with pytest.raises(CheckpointError, match="the model has code of its own"):
        from_hf(own, where)


def test_a_class_of_another_name_is_refused_with_the_remedy(config: dict[str, Any], warnings: list[str]) -> None:
    where = Path("config.json")
    for names in (["LlamaForSequenceClassification"], ["OtherForCausalLM"], ["MyLlamaForCausalLM", "Other"]):
        with pytest.raises(
            CheckpointError, match="if it is a plain LlamaForCausalLM, as model_type='llama' says, write"
        ):
            from_hf(config | {"architectures": names}, where)
    with pytest.raises(CheckpointError) as refused:
        from_hf(config | {"architectures": ["MyLlamaForCausalLM"], "model_type": "gpt2"}, where)
    assert "architecture MyLlamaForCausalLM is not supported" in str(refused.value)
    assert "if it is a plain" not in str(refused.value)
    assert warnings == []
