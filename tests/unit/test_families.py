"""What the families refuse: configurations that mean another model, units that are not there, formats that cannot."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import tiny_tokenizer
from support.families import CLASSES, OWN, SIZES, family_model, some_units

from nemo_minitron import axes
from nemo_minitron.architecture import FULL, SLIDING, Architecture, period_of, types_of
from nemo_minitron.axes import KeptUnits
from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
from nemo_minitron.checkpoints.formats.huggingface.config import from_hf, to_hf
from nemo_minitron.errors import CheckpointError, ShapeError
from nemo_minitron.shape import LayerShape, ModelShape

MIXTURE = ModelShape(
    num_layers=3,
    hidden_size=48,
    ffn_hidden_size=24,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=12,
    vocab_size=131,
    num_moe_experts=4,
)
DENSE = MIXTURE.replace(num_moe_experts=None)


def config(family: str, **changes: Any) -> dict[str, Any]:
    return {"architectures": [f"{CLASSES[family]}ForCausalLM"], **SIZES, **OWN[family], **changes}


@pytest.mark.parametrize("family", list(axes.FAMILIES))
def test_configurations_come_back(family, tmp_path):
    shape, architecture = from_hf(config(family), tmp_path)
    assert architecture.family == family
    assert from_hf(to_hf(shape, architecture, dtype="float32"), tmp_path) == (shape, architecture)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, "sliding_window=16"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 16, "layer_types": [SLIDING] * 3},
            "sliding_window=16",
        ),
        ("llama", {"sliding_window": 16}, "sliding_window=16 is not supported"),
        ("mixtral", {"sliding_window": 16}, "sliding_window=16 is not supported"),
        (
            "llama",
            {"architectures": ["MistralForCausalLM"], "sliding_window": 16, "layer_types": [FULL, SLIDING, SLIDING]},
            "layer_types: full_attention is not supported; supported: sliding_attention",
        ),
        ("llama", {"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window=0"),
        ("llama", {"architectures": ["MistralForCausalLM"], "sliding_window": 7.5}, "sliding_window=7.5"),
        ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported in this family"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True is not supported; a qwen3 model needs False"),
        ("nemotron", {"hidden_act": "gelu", "mlp_bias": True}, "hidden_act='gelu'.*mlp_bias=True"),
        ("nemotron", {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling=.* is not supported"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported"),
        (
            "gemma3",
            {"attn_logit_softcapping": 50.0, "hidden_activation": "gelu", "use_bidirectional_attention": True},
            "hidden_activation='gelu'.*attn_logit_softcapping=50.0.*use_bidirectional_attention=True",
        ),
        ("gemma3", {"layer_types": [FULL] * 3}, "sliding_window_pattern=2 and layer_types=.* differ"),
        ("gemma3", {"layer_types": [FULL]}, "layer_types=.*must name the types of 3 layers"),
        (
            "gemma3",
            {"layer_types": [FULL, SLIDING, "chunked_attention"], "sliding_window_pattern": None},
            "layer_types: chunked_attention is not supported; supported: full_attention, sliding_attention",
        ),
        ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern=0: must be a whole number of at least 1"),
        ("gemma3", {"_sliding_window_pattern": 3}, "_sliding_window_pattern=3 and sliding_window_pattern=2 differ"),
        ("gemma3", {"sliding_window": None}, "sliding_window=None"),
        (
            "gemma3",
            {"rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 2.0}}},
            "RoPE of sliding layers is not scaled",
        ),
        (
            "gemma3",
            {"rope_parameters": {SLIDING: {"rope_theta": 7.0}}},
            "rope_local_base_freq=500.0 and rope_parameters.sliding_attention.rope_theta=7.0 differ",
        ),
        ("gemma3", {"rope_parameters": {FULL: {"rope_theta": 7.0}}}, "rope_theta=20000.0 and .*=7.0 differ"),
        ("gemma3", {"rope_parameters": {FULL: {}, "other": {}}}, "rope_parameters.other={}: must be an object, for"),
        ("llama", {"rope_parameters": {FULL: {"rope_theta": 7.0}}}, "rope_parameters by kind of layer"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_moe_experts=4: each token goes to 5 experts"),
        ("mixtral", {"num_local_experts": 0}, "num_moe_experts=0: must be a whole number"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported; a qwen3_moe model needs 1"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\] is not supported"),
        ("qwen3_moe", {"num_local_experts": 8}, "num_local_experts=8 and num_experts=4 differ"),
        ("qwen3_moe", {"num_experts_per_tok": 5}, "num_moe_experts=4: each token goes to 5 experts"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 24}, "shared_expert_intermediate_size=24 is not known"),
    ],
)
def test_configurations_of_another_model(family, changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        from_hf(config(family, **changes), tmp_path / "config.json")


def test_spellings_of_a_mixture(tmp_path):
    """Names of keys differ between releases, and null means no layer; a public configuration is read."""
    shape, architecture = from_hf(config("qwen3_moe"), tmp_path)
    assert (shape.num_moe_experts, shape.ffn_hidden_size) == (4, 24)
    renamed = config("qwen3_moe", mlp_only_layers=None, num_local_experts=4)
    del renamed["num_experts"]
    assert from_hf(renamed, tmp_path) == (shape, architecture)
    assert architecture.moe_router_pre_softmax
    _, normalized = from_hf(config("qwen3_moe", norm_topk_prob=True), tmp_path)
    assert not normalized.moe_router_pre_softmax
    assert to_hf(shape, normalized, dtype="float32")["norm_topk_prob"]
    with pytest.raises(CheckpointError, match="always normalises"):
        to_hf(shape, dataclasses.replace(architecture, family="mixtral"), dtype="float32")
    public = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    shape, architecture = from_hf(public, tmp_path)
    assert axes.parameter_count(axes.family("qwen3_moe"), shape) == 30532122624
    assert (architecture.moe_router_topk, architecture.moe_router_pre_softmax) == (8, False)


#: config.json of mistralai/Mistral-7B-v0.1
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}


def test_windows_of_mistral(tmp_path):
    """Every layer has the window; it is written under Mistral's name, and Llama's is left to models without one."""
    shape, architecture = from_hf(MISTRAL_7B, tmp_path)
    assert axes.parameter_count(axes.family("llama"), shape) == 7241732096
    assert architecture == Architecture(
        bos_token_id=1, eos_token_id=2, max_position_embeddings=32768, layer_types=(SLIDING,) * 32, sliding_window=4096
    )
    assert Architecture(**json.loads(json.dumps(architecture.to_dict()))) == architecture
    written = to_hf(shape, architecture, dtype="bfloat16")
    assert {key: written[key] for key in MISTRAL_7B.keys() - {"transformers_version"}} == {
        key: value for key, value in MISTRAL_7B.items() if key != "transformers_version"
    }
    assert "layer_types" not in written
    assert from_hf(written, tmp_path) == (shape, architecture)
    fewer = architecture.of_layers(range(8, 32))
    assert fewer.layer_types == (SLIDING,) * 24
    assert to_hf(shape.replace(num_layers=24), fewer, dtype="bfloat16")["sliding_window"] == 4096
    # null, or as long as the longest sequence: no window
    for window in (None, 32768):
        plain = from_hf(MISTRAL_7B | {"sliding_window": window}, tmp_path)[1]
        assert (plain.layer_types, plain.sliding_window) == (None, None)
        assert to_hf(shape, plain, dtype="bfloat16")["architectures"] == ["LlamaForCausalLM"]


def test_windows_that_a_format_cannot_hold(tmp_path):
    """By name, before any work."""
    from nemo_minitron.checkpoints.formats import FORMATS

    shape, mistral = from_hf(MISTRAL_7B, tmp_path)
    assert FORMATS["nemo2"].refuses(shape, mistral, export=True) == FORMATS["hf"].refuses(shape, mistral) == []
    assert FORMATS["nemo"].refuses(shape, mistral) == [
        "a .nemo cannot hold sliding windows (4096 tokens): NeMo 1 has none; write the nemo2 or the hf format"
    ]
    some = dataclasses.replace(mistral, layer_types=(FULL, *mistral.layer_types[1:]))
    for other, model in (
        ("hf", some),
        ("nemo2", some),
        ("hf", dataclasses.replace(mistral, family="qwen2")),
        ("nemo2", dataclasses.replace(mistral, family="qwen2")),
    ):
        (refusal,) = FORMATS[other].refuses(shape, model, export=True)
        assert "these sliding windows" in refusal, (other, model.family)
    scaled = dataclasses.replace(mistral, rotary_scaling={"rope_type": "yarn", "factor": 2.0})
    (refusal,) = FORMATS["nemo2"].refuses(shape, scaled, export=True)
    assert "NeMo scales RoPE of llama models with sliding windows linearly alone, not by the type 'yarn'" in refusal
    uneven = shape.replace(layers=tuple(LayerShape(64 * number) for number in range(1, 33)))
    assert "layers of one size" in FORMATS["hf"].refuses(uneven, mistral)[0]


def test_biases_that_the_family_does_not_have(tmp_path):
    """A Qwen2 model that calls itself Llama."""
    path = family_model("qwen2", tmp_path)
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(CheckpointError, match="model_type='qwen2' is not that of LlamaForCausalLM"):
        open_checkpoint(path)
    content |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="9 tensors have no place in a llama model.*k_proj.bias"):
        open_checkpoint(path)


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "qwen3_moe", "gemma3"])
def test_a_nemo_file_cannot_hold_them(family, tmp_path):
    source = open_checkpoint(tiny_tokenizer(family_model(family, tmp_path / "hf")))
    with pytest.raises(CheckpointError, match=f"cannot hold a {family} model .*; write the nemo2 or the hf format"):
        write_checkpoint(source, tmp_path / "model.nemo", "nemo")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_constants_that_contradict_the_sizes():
    router = Architecture(family="mixtral", moe_router_topk=2)
    assert router.faults(MIXTURE) == []
    assert "needs both" in router.faults(DENSE)[0]
    assert "needs both" in Architecture().faults(MIXTURE)[0]
    assert "keep as many" in router.faults(MIXTURE.replace(num_moe_experts=1))[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": None, "expert_ffn": None}, "experts: is needed for a model of 4 experts"),
        ({"experts": ((0, 1, 2), (0, 1, 4))}, r"layer \d experts: an index lies outside 0..3"),
        ({"experts": ((0, 1, 2), (0, 1))}, "expert_ffn: one row of neurons is needed for each kept expert"),
        ({"experts": ((0, 1, 2),)}, "experts: 1 layers of indices for 2 kept layers"),
        ({"expert_ffn": (((0, 1),) * 3, ((0, 1), (0, 1), (0, 30)))}, "expert 2 ffn: an index lies outside 0..23"),
        (
            {"expert_ffn": (((0, 1),) * 3, ((0, 1), (0, 1), (0,)))},
            r"ffn: experts keep different numbers \(\[1, 2\]\)",
        ),
        ({"ffn": ((1,), ())}, "ffn: must be empty"),
        ({"vocab": (3, 2)}, "vocab: must ascend"),
        ({"vocab": (3, 131)}, "vocab: an index lies outside 0..130"),
    ],
)
def test_units_that_are_not_there(changes, message):
    fine = dataclasses.replace(some_units(MIXTURE), experts=((0, 1, 2), (0, 1, 2)))
    assert fine.faults(MIXTURE) == []
    found = dataclasses.replace(fine, **changes).faults(MIXTURE)
    with pytest.raises(ShapeError, match=message):
        raise ShapeError(found)


def test_dense_models_have_no_experts():
    assert KeptUnits.everything(MIXTURE).faults(DENSE)[0] == "experts: is not for a model of None experts"
    assert KeptUnits.everything(MIXTURE).target(MIXTURE) == MIXTURE
    assert KeptUnits.everything(DENSE).target(DENSE) == DENSE


def test_where_a_pruned_parameter_comes_from():
    kept = dataclasses.replace(some_units(MIXTURE), layers=(0, 2), experts=((0, 1, 2), (1, 2, 3)))
    expert = "decoder.layers.{}.mlp.experts.local_experts.{}.linear_fc1.weight"
    assert kept.source(expert.format(1, 0)) == expert.format(2, 1)
    assert kept.source("decoder.layers.1.mlp.router.weight") == "decoder.layers.2.mlp.router.weight"
    assert kept.source("output_layer.weight") == "output_layer.weight"


def test_experts_that_live_pruning_cannot_reach():
    from nemo_minitron.pruning.expert_moves import keep_experts

    grouped = SimpleNamespace(mlp=SimpleNamespace(experts=SimpleNamespace()))
    with pytest.raises(ShapeError, match="a SimpleNamespace; live pruning needs moe_grouped_gemm=False"):
        keep_experts(grouped, (0,), None)


@given(period=st.integers(1, 9), layers=st.integers(1, 12))
def test_types_by_period(period, layers):
    """The smallest period of types gives them back; the record of a model keeps the list."""
    types = types_of(period, layers)
    smallest = period_of(types)
    assert smallest is not None and smallest <= period and types_of(smallest, layers) == types
    content = json.loads(json.dumps(Architecture(family="gemma3", layer_types=types, sliding_window=4).to_dict()))
    assert Architecture(**content).layer_types == types


@given(st.lists(st.sampled_from([FULL, SLIDING]), min_size=1, max_size=8), st.data())
def test_layers_keep_their_types(types, data):
    architecture = Architecture(layer_types=types, sliding_window=4)
    layers = data.draw(st.lists(st.integers(0, len(types) - 1), unique=True, min_size=1).map(sorted))
    assert architecture.of_layers(layers).layer_types == tuple(types[layer] for layer in layers)
    period = period_of(types)
    assert (period is None) is all(types_of(n, len(types)) != tuple(types) for n in range(1, 2 * len(types) + 2))


def test_records_of_other_families_are_as_before():
    """Constants that only some families have are left out where they are not set: outputs keep their identity."""
    content = Architecture().to_dict()
    assert content.keys().isdisjoint({"layer_types", "sliding_window", "rotary_base_local", "query_pre_attn_scalar"})
    assert Architecture(**content) == Architecture()
    assert "3 entries for num_layers=2" in Architecture(layer_types=(FULL,) * 3).faults(DENSE.replace(num_layers=2))[0]


def test_layers_whose_type_comes_from_their_number():
    """A model of NeMo's own class: layers may go where the others' types still follow the pattern."""
    from nemo_minitron.pruning.live import kept_types

    config = SimpleNamespace(interleaved_attn_pattern=(2, 1), num_layers=6)
    assert kept_types(config, (0, 1, 2)) == (SLIDING, SLIDING, FULL)
    assert kept_types(config, (0, 4, 5)) == (SLIDING, SLIDING, FULL)
    with pytest.raises(ShapeError, match=r"kept layers \[1, 2, 3\]: each layer keeps its type, .*pattern=\(2, 1\)"):
        kept_types(config, (1, 2, 3))
    assert kept_types(SimpleNamespace(num_layers=6), (1, 2)) is None
    assert kept_types(SimpleNamespace(num_layers=3, layer_types=(FULL, SLIDING, FULL)), (0, 2)) == (FULL, FULL)
