"""GGUF files that ``export`` writes: read back by the import door, computed in float64, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tokenizers as texts
from support.checkpoints import hf_logits, tiny_checkpoint
from support.families import family_model, windowed_model
from support.gguf_export import LLAMA3, MODELS, PROBES, SIZES, YARN, byte_level, exportable
from support.pruning import live, logits, one_process
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_minitron import axes
from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.checkpoints.formats.entry import ExportNotes
from nemo_minitron.checkpoints.formats.gguf import convert_gguf, gguf_faults, llama_cpp, open_gguf
from nemo_minitron.checkpoints.formats.gguf.architectures import WRITTEN
from nemo_minitron.checkpoints.formats.gguf.importance import measure_importance, read_importance, write_importance
from nemo_minitron.checkpoints.formats.gguf.kinds import KINDS
from nemo_minitron.checkpoints.formats.gguf.llama_cpp import quantizer
from nemo_minitron.checkpoints.formats.gguf.writer import write_gguf
from nemo_minitron.config import ExportConfig, ImportConfig
from nemo_minitron.errors import CheckpointError, MissingDependency, ShapeError
from nemo_minitron.jobs.needs import needs_of
from nemo_minitron.stages import export

gguf = pytest.importorskip("gguf")

from support import gguf_files as made  # noqa: E402 - needs gguf

DIRECT = tuple(name for name, kind in KINDS.items() if not kind.by_llama_cpp)
IDS = torch.randint(0, SIZES["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a name of :data:`MODELS`: the HF directory, and its file of each kind; made once."""
    known: dict[str, tuple[Path, dict[str, Path]]] = {}

    def make(name: str) -> tuple[Path, dict[str, Path]]:
        if name not in known:
            family, changes = MODELS[name]
            folder = tmp_path_factory.mktemp(name)
            model = exportable(folder / "hf", family, **changes)
            known[name] = model, {kind: folder / f"{kind}.gguf" for kind in DIRECT}
            write_gguf(open_checkpoint(model), known[name][1], notes=ExportNotes(name))
        return known[name]

    return make


@pytest.mark.parametrize("name", MODELS)
def test_the_import_door_reads_the_same_model(name, files):
    model, written = files(name)
    source = open_checkpoint(model)
    for kind, path in written.items():
        opened = open_gguf(path)
        assert opened.shape == source.shape
        for field in ("norm_epsilon", "rotary_base", "rotary_scaling", "rotary_percent", "max_position_embeddings",
                      "layer_types", "sliding_window", "rotary_base_local", "moe_router_topk",
                      "moe_router_pre_softmax", "bos_token_id"):  # fmt: skip
            assert getattr(opened.architecture, field) == getattr(source.architecture, field), field
        most = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 1 / 200, "Q4_0": 1 / 7}[kind]
        for weight in source.weights.names():
            ours, theirs = source.weights.tensor(weight), opened.weights.tensor(weight)
            if ours.ndim == 1:  # stored plus one in two families
                assert (ours - theirs).abs().max() <= 4e-7 * (1 + ours.abs().max()), weight
            elif "router" in weight:
                assert torch.equal(ours, theirs)
            elif kind in ("F16", "BF16"):
                assert torch.equal(theirs, ours.to({"F16": torch.float16, "BF16": torch.bfloat16}[kind]).float())
            else:
                assert (ours - theirs).abs().max() <= most * ours.abs().max(), weight


@pytest.mark.parametrize("name", ["llama", "llama3", "linear", "qwen2", "qwen2-usual", "qwen3", "nemotron", "gemma3"])
def test_what_llama_cpp_computes_in_float64(name, files):
    model, written = files(name)
    reference = made.reference_logits(written["F32"], IDS.numpy())
    difference = np.abs(hf_logits(model, IDS).numpy() - reference).max()
    assert reference.std() > 0.05
    assert difference <= 2e-5 * np.abs(reference).max()


@pytest.mark.slow
def test_a_file_stands_where_a_checkpoint_does(files, tmp_path):
    """Megatron's model of a file computes what transformers computes from its conversion."""
    with one_process() as groups:
        for name in ("llama3", "qwen2", "gemma3"):
            _, written = files(name)
            chunks = live(open_checkpoint(written["Q8_0"]), groups)
            found = logits(chunks, IDS)[..., : SIZES["vocab_size"]]
            convert_gguf(written["Q8_0"], tmp_path / name)
            assert (found - hf_logits(tmp_path / name, IDS)).abs().max() <= 1e-4 * found.abs().max()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_blocks_by_their_definition(kind, files):
    """Each number is within half a step of its block, by the definition of the kind."""
    _, written = files("llama")
    exact = {tensor.name: made.numbers(tensor) for tensor in gguf.GGUFReader(written["F32"]).tensors}
    for tensor in gguf.GGUFReader(written[kind]).tensors:
        numbers = exact[tensor.name]
        if tensor.tensor_type.name != kind:
            continue
        blocks = numbers.reshape(-1, 32)
        largest = np.abs(blocks).max(-1, keepdims=True)
        step = largest / (127 if kind == "Q8_0" else 8)
        # float16 of the step adds a half unit in its last place for each step; 4 bits reach one step less on one side
        most = step * (0.5 + 2.0**-11 * 128) if kind == "Q8_0" else step * 1.01
        assert (np.abs(made.numbers(tensor).reshape(-1, 32) - blocks) <= most + 1e-12).all(), tensor.name


def test_kinds_of_tensors(files):
    """Vectors and routers are float32; of 4 bits, the output layer has 8."""
    _, written = files("mixtral")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(written["Q4_0"]).tensors}
    assert kinds["output.weight"] == "Q8_0"
    assert kinds["token_embd.weight"] == kinds["blk.1.attn_q.weight"] == kinds["blk.0.ffn_gate_exps.weight"] == "Q4_0"
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_down_exps.weight"] == "Q4_0"
    _, written = files("llama3")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(written["Q4_0"]).tensors}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert "output.weight" not in kinds
    assert kinds["rope_freqs.weight"] == "F32"


def fields_of(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def test_the_header(tmp_path):
    model = exportable(tmp_path / "hf", "llama")
    (model / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [3, 0, 2, 5], "temperature": 0.6, "top_k": 20})
    )
    notes = ExportNotes("Student", "Teacher-8B", "org/Teacher-8B", "other", "its licence", "LICENSE")
    write_gguf(open_checkpoint(model), {"Q8_0": tmp_path / "x.gguf"}, notes=notes)
    fields = fields_of(tmp_path / "x.gguf")
    assert fields["general.name"] == "Student"
    assert fields["general.base_model.0.name"] == "Teacher-8B"
    assert fields["general.base_model.0.organization"] == "org"
    assert fields["general.license"] == "other"
    assert fields["general.license.name"] == "its licence"
    assert fields["general.size_label"] == "171K"
    assert fields["general.file_type"] == 7
    assert fields["general.sampling.top_k"] == 20
    assert fields["llama.attention.key_length"] == 32
    assert fields["llama.rope.dimension_count"] == 32
    ends = [fields[f"tokenizer.ggml.{kind}_token_id"] for kind in ("eos", "eot", "eom")]
    assert ends == [3, 0, 2]
    assert fields["tokenizer.ggml.pre"] == "qwen2"
    assert fields["tokenizer.ggml.tokens"][-1] == "[PAD323]"
    kinds = fields["tokenizer.ggml.token_type"]
    assert (kinds[3], kinds[319], kinds[-1], kinds[50]) == (3, 4, 5, 1)
    assert open_gguf(tmp_path / "x.gguf").architecture.eos_token_id == 3


# ----------------------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize(("pre", "first"), [("gpt-2", False), ("smollm", True), ("llama-bpe", True), ("tekken", False),
                                            ("gpt-4o", False), ("qwen35", False), ("smaug-bpe", False)])  # fmt: skip
def test_ways_of_dividing_text_come_back(pre, first, tmp_path):
    model = exportable(tmp_path / "hf", "llama", tokenizer=lambda path: byte_level(path, pre=pre, first=first))
    write_gguf(open_checkpoint(model), {"F16": tmp_path / "x.gguf"})
    assert fields_of(tmp_path / "x.gguf")["tokenizer.ggml.pre"] == pre
    opened = open_gguf(tmp_path / "x.gguf")
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (model, opened.tokenizer))
    for text in PROBES:
        assert theirs(text).input_ids == ours(text).input_ids, text
        assert theirs.decode(ours(text).input_ids) == ours.decode(ours(text).input_ids)
    assert theirs.chat_template == ours.chat_template


def test_sentencepiece(tmp_path):
    from sentencepiece import SentencePieceProcessor

    model = family_model("llama", tmp_path / "hf", **SIZES | {"vocab_size": 300})
    path = texts.sentencepiece_model(model / "tokenizer.model", size=290, character_coverage=0.98)
    (model / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True})
    )
    source = open_checkpoint(model)
    write_gguf(source, {"F16": tmp_path / "x.gguf"})
    pieces = SentencePieceProcessor(model_file=str(path))
    fields = fields_of(tmp_path / "x.gguf")
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.tokens"][:290] == [pieces.id_to_piece(at) for at in range(290)]
    kinds = fields["tokenizer.ggml.token_type"]
    assert kinds[:3] == [2, 3, 3]
    assert all((kinds[at] == 6) == pieces.is_byte(at) for at in range(290))
    # the order of scores is what counts
    scored = [at for at in range(290) if kinds[at] == 1 and len(pieces.id_to_piece(at)) > 1]
    theirs = sorted(scored, key=lambda at: -pieces.get_score(at))
    assert sorted(scored, key=lambda at: -fields["tokenizer.ggml.scores"][at]) == theirs
    opened = AutoTokenizer.from_pretrained(open_gguf(tmp_path / "x.gguf").tokenizer)
    for text in texts.PROBES[:-1]:
        assert opened(text).input_ids == [1, *pieces.encode(text)], text


def refused(model: Path, folder: Path, error: type[Exception], match: str, kinds: tuple[str, ...] = ("F16",)) -> None:
    folder.mkdir(exist_ok=True)
    with pytest.raises(error, match=match):
        write_gguf(open_checkpoint(model), {kind: folder / f"{kind}.gguf" for kind in kinds})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": {"Regex": "x+"}}, r"pre_tokenizer is .*x\+.* which is none of llama\.cpp's ways"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer is .*Lowercase"),
        ({"ignore_merges": True}, r"pre_tokenizer is .* which is none of llama\.cpp's ways"),
        ({"twice": True}, r"it puts 2 tokens before each text, \[1, 1\], and llama\.cpp one at most"),
    ],
)
def test_tokenizers_that_gguf_cannot_express(change, message, tmp_path):
    model = exportable(tmp_path / "hf", "llama")
    content = json.loads((model / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0] |= {key: change[key] for key in ("pattern",) if key in change}
    content["model"] |= {key: change[key] for key in ("ignore_merges",) if key in change}
    content |= {key: change[key] for key in ("normalizer",) if key in change}
    if "twice" in change:
        first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        known = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
        content["post_processor"] = {
            "type": "TemplateProcessing", "single": [first, first, text], "pair": [first, text, text],
            "special_tokens": known,
        }  # fmt: skip
    (model / "tokenizer.json").write_text(json.dumps(content))
    refused(model, tmp_path / "out", CheckpointError, rf"tokenizer\.json: GGUF cannot express .*{message}")
    assert not list((tmp_path / "out").iterdir())


def test_a_tokenizer_of_words_is_refused(tmp_path):
    model = tiny_checkpoint(tmp_path / "hf")
    refused(model, tmp_path / "out", CheckpointError, r"tokenizer\.json: GGUF cannot express .*'WordLevel'")
    bare = tiny_checkpoint(tmp_path / "bare", tokenizer=False)
    refused(bare, tmp_path / "out", CheckpointError, "carries no tokenizer")


# ------------------------------------------------------------------------------------------------------------ bad input


def shape_of(family: str, path: Path, **changes: Any) -> list[str]:
    model = open_checkpoint(family_model(family, path, **SIZES | changes))
    return gguf_faults(model.shape, model.architecture)


def test_what_llama_cpp_lacks_is_named(tmp_path):
    cases = {
        "nemotron": ("nemotron", {"head_dim": 32}, "num_attention_heads=4 of head_dim=32 are 128 wide"),
        "moe": ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob=false"),
        "gemma3": ("gemma3", {"query_pre_attn_scalar": 20}, "query_pre_attn_scalar=20: llama.cpp takes 32"),
        "scaling": ("qwen3", {"rope_scaling": LLAMA3}, "rope_scaling of type 'llama3'"),
        "yarn": (
            "qwen2",
            {"rope_scaling": YARN | {"attention_factor": 2.0}},
            "attention_factor=2.0: llama.cpp takes 1.13863",
        ),
    }
    for name, (family, changes, message) in cases.items():
        (fault,) = shape_of(family, tmp_path / name, **changes)
        assert message in fault
        assert fault.startswith("format=gguf: ")
        assert fault.endswith("export it as hf")
    window = open_checkpoint(windowed_model(tmp_path / "window"))
    assert "sliding_window=5: llama.cpp's architecture" in gguf_faults(window.shape, window.architecture)[0]
    unknown = Architecture(family="other")
    assert "has no architecture for the family 'other'" in gguf_faults(window.shape, unknown)[0]
    layers = window.shape.replace(num_layers=2)
    own = type(layers).from_dict(layers.to_dict() | {"layers": [{"ffn_hidden_size": 8}, {"ffn_hidden_size": 16}]})
    assert "takes no model whose layers differ" in gguf_faults(own, Architecture())[0]


def test_every_family_is_written():
    assert set(WRITTEN) == set(axes.FAMILIES)


def test_rows_that_no_block_holds(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "nemo_minitron")
    model = exportable(tmp_path / "hf", "llama", intermediate_size=76)
    files = {kind: tmp_path / f"{kind}.gguf" for kind in ("Q8_0", "Q4_0")}
    write_gguf(open_checkpoint(model), files, requantized=["Q4_K_M", "Q6_K"])
    lines = [record.message for record in caplog.records if "are no multiple of" in record.message]
    assert len(lines) == 2
    assert "GGUF Q4_K_M, Q6_K: 23 tensors whose rows of 64, 76, 128 are no multiple of 256 get" in lines[1]
    assert (
        "GGUF Q8_0, Q4_0: 3 tensors whose rows of 76 are no multiple of 32 stay in float16: blk.*.ffn_down.weight"
        in lines[0]
    )


def test_numbers_beyond_float16(tmp_path):
    from safetensors.torch import load_file, save_file

    model = exportable(tmp_path / "hf", "llama")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused(
        model, tmp_path / "out", CheckpointError, r"blk\.1\.ffn_up\.weight has numbers up to 1e\+05, beyond float16"
    )


@settings(max_examples=20, deadline=None)
@given(heads=st.integers(1, 6), groups=st.integers(1, 3), half=st.integers(1, 4), hidden=st.integers(1, 3))
def test_the_order_of_query_rows_is_undone(heads, groups, half, hidden):
    from nemo_minitron.checkpoints.formats.gguf.architectures import ARCHITECTURES

    shape = open_shape(heads * groups, groups, 2 * half, hidden)
    change = ARCHITECTURES["llama"].changes
    for name, rows in (("attn_q.weight", heads * groups), ("attn_k.weight", groups)):
        tensor = torch.arange(rows * 2 * half * hidden, dtype=torch.float32).reshape(-1, hidden)
        turned = change[name].make(tensor, shape)
        assert torch.equal(change[name].undo(turned, shape), tensor)
        # neighbours there are half a head apart here
        assert torch.equal(turned[0::2][:half], tensor[:half])
        assert torch.equal(turned[1::2][:half], tensor[half : 2 * half])


def open_shape(heads: int, groups: int, head: int, hidden: int) -> Any:
    from nemo_minitron.shape import ModelShape

    return ModelShape(1, hidden, 8, heads, groups, head, 16)


# ----------------------------------------------------------------------------------------------------------- importance


@pytest.mark.parametrize("family", ["mixtral", "llama"])
def test_importance_is_the_mean_square_of_each_matrix_inputs(family, tmp_path):
    model = exportable(tmp_path / "hf", family, tie_word_embeddings=family == "llama")
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    states = {}

    def keep(name):
        def hook(module, inputs, output):
            states[name] = output.detach().double()

        return hook

    loaded.model.layers[1].input_layernorm.register_forward_hook(keep("queries"))
    loaded.model.norm.register_forward_hook(keep("output"))
    loaded.model.layers[2].post_attention_layernorm.register_forward_hook(keep("mlp"))
    measured = measure_importance(open_checkpoint(model), loaded, lambda one: one(IDS))
    write_importance(tmp_path / "m.gguf", measured, chunk=40)
    means = read_importance(tmp_path / "m.gguf")
    output = "token_embd.weight" if family == "llama" else "output.weight"
    wanted = {"blk.1.attn_q.weight": "queries", "blk.1.attn_v.weight": "queries", output: "output"}
    if family == "llama":
        wanted["blk.2.ffn_up.weight"] = "mlp"
    else:
        sums, counts = measured["blk.2.ffn_up_exps.weight"]
        assert counts.sum() == 2 * IDS.numel()  # each token goes to two experts
        expected = 2 * states["mlp"].square().sum((0, 1))
        assert torch.allclose(sums.double().sum(0), expected, rtol=1e-5)
        assert means["blk.2.ffn_up_exps.weight"].size == sums.numel()
    for name, state in wanted.items():
        expected = states[state].square().mean((0, 1)).numpy()
        assert np.allclose(means[name], expected, rtol=1e-5), name
    kept = [name for name in fields_of(tmp_path / "m.gguf") if name.startswith("general.")]
    assert kept == ["general.type"]
    write_gguf(open_checkpoint(model), {"F16": tmp_path / "x.gguf"})
    with pytest.raises(CheckpointError, match=r"x\.gguf is no importance matrix: it has no in_sum2"):
        read_importance(tmp_path / "x.gguf")
    (tmp_path / "text").write_text("imatrix")
    with pytest.raises(CheckpointError, match="text is no importance matrix in llama"):
        read_importance(tmp_path / "text")


# ------------------------------------------------------------------------------------------------------------ the stage


def test_the_stage(tmp_path):
    model = exportable(tmp_path / "hf", "llama")
    config = ExportConfig(model=str(model), output=str(tmp_path / "out"), formats=["gguf"], base_model="org/base")
    config.gguf.types = ["F32", "Q8_0"]
    plan = export.plan(config)
    assert not plan.faults
    assert [need.path for need in plan.disk] == [
        str(tmp_path / f"out/gguf/model-{kind}.gguf") for kind in ("F32", "Q8_0")
    ]
    record = export.run(config)
    files = record["formats"]["gguf"]["files"]
    assert set(files) == {"F32", "Q8_0"}
    assert files["F32"]["weight_error"] == 0
    assert 1e-3 < files["Q8_0"]["weight_error"] < 1e-2
    assert files["Q8_0"]["bytes"] == (tmp_path / "out/gguf/model-Q8_0.gguf").stat().st_size < files["F32"]["bytes"] / 2
    card = (tmp_path / "out/gguf/README.md").read_text()
    assert "library_name: gguf" in card
    assert "llama-server -m" in card
    assert sorted(file.name for file in (tmp_path / "out/gguf").iterdir()) == [
        "README.md", "minitron.json", "model-F32.gguf", "model-Q8_0.gguf"]  # fmt: skip
    fields = fields_of(tmp_path / "out/gguf/model-Q8_0.gguf")
    assert fields["general.base_model.0.name"] == "base"
    converted = convert_gguf(tmp_path / "out/gguf/model-F32.gguf", tmp_path / "back")
    for name in converted.weights.names():
        assert torch.equal(converted.weights.tensor(name), open_checkpoint(model).weights.tensor(name))


def test_settings_and_needs(tmp_path):
    model = exportable(tmp_path / "hf", "llama")
    config = ExportConfig(model=str(model), output=str(tmp_path / "out"), formats=["gguf"])
    assert "gguf" in needs_of(config)
    assert "llama_cpp" not in needs_of(config)
    config.gguf.types = ["Q4_K_M", "F16"]
    assert ("llama_cpp" in needs_of(config)) == (quantizer() is None)
    config.gguf.types = ["Q9", "F16", "F16"]
    config.gguf.importance = "m.gguf"
    assert [fault.split(":")[0] for fault in config.gguf.faults()] == ["types", "types", "importance=m.gguf"]
    config.gguf.types = []
    assert "none is given" in config.gguf.faults()[0]
    # no stage works on from such a file
    assert any("format" in fault for fault in ImportConfig(source=str(model), output="x.gguf", format="gguf").faults())


def test_k_quants_without_llama_cpp(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "quantizer", lambda: None)
    model = exportable(tmp_path / "hf", "llama")
    config = ExportConfig(model=str(model), output=str(tmp_path / "out"), formats=["gguf"])
    config.gguf.types = ["Q4_K_M"]
    with pytest.raises(MissingDependency, match=r'CMAKE_ARGS=.* pip install "nemo-minitron\[llama-cpp\]"'):
        export.run(config)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ShapeError, match="sliding_window=5"):
        export.run(
            ExportConfig(model=str(windowed_model(tmp_path / "window")), output=str(tmp_path / "w"), formats=["gguf"])
        )
