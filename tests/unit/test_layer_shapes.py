"""Models whose layers have sizes of their own: pruned offline, written, read, run, and refused where they must be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import tiny_checkpoint
from support.pruning import SHAPE, DictWeights, random_checkpoint
from support.shapes import MIXED, mixed_shapes

from nemo_minitron import axes
from nemo_minitron.architecture import Architecture
from nemo_minitron.axes import KeptUnits
from nemo_minitron.checkpoints import Checkpoint, open_checkpoint, verify, write_checkpoint
from nemo_minitron.checkpoints.fingerprint import model_fingerprint, same_fingerprint
from nemo_minitron.checkpoints.formats.huggingface.blocks import ffn_size, read_blocks, write_blocks
from nemo_minitron.checkpoints.formats.huggingface.config import from_hf, to_hf
from nemo_minitron.checkpoints.formats.torch_dist.reader import TorchDist, checkpoint_of
from nemo_minitron.checkpoints.formats.torch_dist.writer import write_torch_dist
from nemo_minitron.errors import CheckpointError, ConfigError, ShapeError
from nemo_minitron.planning import Model, pipeline_stage_parameters
from nemo_minitron.planning.memory import MemoryCost, Workload
from nemo_minitron.planning.training import ForwardFlops
from nemo_minitron.pruning import choose_units, load_kept, merge_pruned_heads, prune_weights, save_kept, target_shape
from nemo_minitron.pruning.rounds import intermediate_shapes
from nemo_minitron.report.tables import span
from nemo_minitron.shape import LayerShape, ModelShape

#: Of the four layers of SHAPE: one head of each group; two whole groups; no attention; no MLP.
LAYERS = (LayerShape(40, 4), LayerShape(24, 2), LayerShape(8, 0), LayerShape(0, 4))
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TARGET = SHAPE.replace(num_attention_heads=4, layers=LAYERS)


def tensors_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.weights.tensor(name) for name in checkpoint.weights.names()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@st.composite
def prunings(draw: st.DrawFn) -> tuple[ModelShape, ModelShape, list[int]]:
    """A shape, uniform or not, the layers to drop, and a target for the others."""
    shape = draw(mixed_shapes())
    heads = draw(st.integers(1, shape.num_attention_heads))
    layers = sorted(draw(st.sets(st.integers(0, shape.num_layers - 1), min_size=1)))
    own = []
    for layer in layers:
        sizes = shape.at(layer)
        groups = [n for n in range(1, heads + 1) if heads % n == 0 and n <= sizes.num_query_groups]
        groups = [n for n in groups if heads // n <= sizes.heads_per_group]
        own.append(LayerShape(draw(st.integers(0, sizes.ffn_hidden_size)), draw(st.sampled_from([0, *groups]))))
    if not any(one.ffn_hidden_size for one in own) or not any(one.num_query_groups for one in own):
        # not one layer has the part: keep everything
        layers, heads = list(range(shape.num_layers)), shape.num_attention_heads
        own = [LayerShape(sizes.ffn_hidden_size, sizes.num_query_groups) for sizes in shape.each()]
    target = shape.replace(
        num_layers=len(layers),
        hidden_size=draw(st.integers(1, shape.hidden_size)),
        num_attention_heads=heads,
        layers=tuple(own),
    )
    return shape, target, [layer for layer in range(shape.num_layers) if layer not in layers]


@given(prunings(), st.sampled_from(["llama", "qwen2", "nemotron"]))
@settings(max_examples=60, deadline=None)
def test_pruned_tensors_are_rows_of_the_unpruned_ones(case, family):
    """Every tensor has its layer's sizes; kept units again give the same; everything kept is the identity."""
    shape, target, drop = case
    checkpoint = random_checkpoint(shape, architecture=Architecture(family=family))
    kept = choose_units(None, shape, target, method="random", layers_to_drop=drop)
    assert kept.faults(shape) == []
    assert kept.target(shape) == target
    pruned = prune_weights(checkpoint, kept)
    expected = {entry.name: entry.shape for entry in axes.parameters(axes.family(family), target)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors_of(pruned).items()} == expected
    assert sum(tensor.numel() for tensor in tensors_of(pruned).values()) == axes.parameter_count(
        axes.family(family), target
    )
    everything = KeptUnits.everything(shape)
    assert everything.target(shape) == shape
    assert same(tensors_of(prune_weights(checkpoint, everything)), tensors_of(checkpoint))
    assert kept.compose(KeptUnits.everything(target)) == kept == everything.compose(kept)


def write_and_read_torch_dist(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    from nemo_minitron.checkpoints.model_record import read_model_record, write_model_record

    write_torch_dist(checkpoint, folder / "weights", prefix="module.", dtype="float32", vocab_rows=128, common={})
    write_model_record(checkpoint, folder, dtype="float32", form="torch_dist")
    store = TorchDist(folder / "weights")
    return checkpoint_of(store, read_model_record(folder), None, tokenizer=None, path=folder, form="torch_dist")


@given(prunings())
@settings(max_examples=15, deadline=None)
def test_a_pruned_model_comes_back_from_disk(tmp_path_factory, case):
    """Prune, record, write as Hugging Face's and as a distributed checkpoint, read: the same tensors and shape."""
    shape, target, drop = case
    folder = tmp_path_factory.mktemp("layers")
    kept = choose_units(None, shape, target, method="random", layers_to_drop=drop)
    save_kept(kept, shape, folder / "kept.json")
    assert load_kept(folder / "kept.json") == (kept, shape)
    pruned = prune_weights(random_checkpoint(shape), kept)
    written = write_checkpoint(pruned, folder / "hf", "hf")
    (folder / "dist").mkdir()
    stored = write_and_read_torch_dist(pruned, folder / "dist")
    for other in (written, stored):
        assert other.shape == target
        assert same(tensors_of(other), tensors_of(pruned))
        assert same_fingerprint(model_fingerprint(other), model_fingerprint(pruned))
    assert open_checkpoint(written.path).lineage["parents"]["model"]["shape"] == shape.to_dict()
    # without our record config.json says the same
    (folder / "hf" / "minitron.json").unlink()
    assert open_checkpoint(folder / "hf").shape == target


def layered_logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a written directory by transformers' Llama, each of whose layers is given its block's sizes."""
    from safetensors.torch import load_file
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

    class Nothing(nn.Module):
        def __init__(self, *, pair: bool) -> None:
            super().__init__()
            self.pair = pair

        def forward(self, *args, hidden_states=None, **kwargs):
            nothing = torch.zeros_like(args[0] if args else hidden_states)
            return (nothing, None) if self.pair else nothing

    content = json.loads((path / "config.json").read_text())
    blocks = content.pop("block_configs")
    known = content | {"intermediate_size": 8, "num_key_value_heads": 1, "model_type": "llama"}
    model = LlamaForCausalLM(LlamaConfig(**known))
    for number, sizes in enumerate(read_blocks(content | {"block_configs": blocks})):
        layer = model.model.layers[number]
        own = {"intermediate_size": sizes.ffn_hidden_size or 1, "num_key_value_heads": sizes.num_query_groups or 1}
        config = LlamaConfig(**known | own)
        config._attn_implementation = model.config._attn_implementation
        layer.self_attn = LlamaAttention(config, number) if sizes.num_query_groups else Nothing(pair=True)
        layer.mlp = LlamaMLP(config) if sizes.ffn_hidden_size else Nothing(pair=False)
    missing, unexpected = model.load_state_dict(load_file(path / "model.safetensors"), strict=False)
    assert not unexpected
    # What is not stored is the norm before a part that is not there.
    assert all(name.endswith("layernorm.weight") for name in missing)
    with torch.no_grad():
        return model.double()(ids, use_cache=False).logits


def test_a_pruned_model_computes_what_is_left(tmp_path):
    """As the unpruned model does whose pruned heads and neurons write nothing into the residual stream."""
    source = random_checkpoint()
    kept = choose_units(None, SHAPE, TARGET, method="random")
    silenced = tensors_of(source)
    for layer in range(SHAPE.num_layers):
        heads = {head for group in kept.heads[layer] for head in group}
        gone = [head * 6 + channel for head in range(8) if head not in heads for channel in range(6)]
        idle = [neuron for neuron in range(40) if neuron not in kept.ffn[layer]]
        silenced[f"decoder.layers.{layer}.self_attention.linear_proj.weight"][:, gone] = 0
        silenced[f"decoder.layers.{layer}.mlp.linear_fc2.weight"][:, idle] = 0
    write_checkpoint(prune_weights(source, kept), tmp_path / "pruned", "hf")
    write_checkpoint(dataclasses.replace(source, weights=DictWeights(silenced)), tmp_path / "silenced", "hf")
    from transformers import LlamaForCausalLM

    ids = torch.randint(0, 67, (2, 11), generator=torch.Generator().manual_seed(0))
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "silenced", torch_dtype=torch.float64)
    with torch.no_grad():
        expected = whole(ids, use_cache=False).logits
    # float64 sums of the same products in another order
    assert torch.allclose(layered_logits(tmp_path / "pruned", ids), expected, atol=1e-10, rtol=0)


def test_scores_choose_the_units_of_each_layer():
    from nemo_minitron.importance import magnitude_scores

    source = random_checkpoint()
    scores = magnitude_scores(source)
    kept = choose_units(scores, SHAPE, TARGET, method="magnitude")
    assert kept.target(SHAPE) == TARGET
    best = scores.ffn[1].argsort(descending=True, stable=True)[:24]
    assert kept.ffn[1] == tuple(sorted(best.tolist()))
    assert (kept.ffn[3], kept.groups[2], kept.heads[2]) == ((), (), ())
    assert [len(heads) for heads in kept.heads[1]] == [2, 2]
    merged = prune_weights(merge_pruned_heads(source, kept, scores.heads), kept)
    qkv = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert merged.weights.tensor(qkv).shape == prune_weights(source, kept).weights.tensor(qkv).shape
    assert not torch.equal(merged.weights.tensor(qkv), prune_weights(source, kept).weights.tensor(qkv))


def test_a_model_of_such_layers_is_pruned_further():
    """Its hidden size, and whole layers; what asks for scores is told that there are none."""
    mixed = prune_weights(random_checkpoint(), choose_units(None, SHAPE, TARGET, method="random"))
    target = target_shape(mixed.shape, {"hidden_size": 16}, layers_to_drop=[1])
    assert target == TARGET.of_layers([0, 2, 3]).replace(hidden_size=16)
    kept = choose_units(None, mixed.shape, target, method="random", layers_to_drop=[1])
    pruned = prune_weights(mixed, kept)
    assert {name: tuple(tensor.shape) for name, tensor in tensors_of(pruned).items()} == {
        entry.name: entry.shape for entry in axes.parameters(axes.FAMILIES["llama"], target)
    }
    # layers that are named, and nothing else: no scores needed
    whole = target_shape(mixed.shape, {}, layers_to_drop=[1])
    assert choose_units(None, mixed.shape, whole, layers_to_drop=[1]).target(mixed.shape) == whole
    with pytest.raises(ConfigError, match="scores: method=activation needs the scores"):
        choose_units(None, mixed.shape, target, layers_to_drop=[1])
    with pytest.raises(ShapeError, match="num_layers=3: the model's layers differ in size; name those to drop"):
        target_shape(mixed.shape, {"num_layers": 3})
    with pytest.raises(ShapeError, match="layer 1: ffn_hidden_size=40: the model has only 24") as error:
        target_shape(mixed.shape, {"ffn_hidden_size": 40})
    assert len(error.value.faults) == 3


def test_a_mixture_of_experts_may_differ_in_width():
    shape = SHAPE.replace(num_moe_experts=3)
    target = shape.replace(
        num_moe_experts=2, layers=(LayerShape(), LayerShape(8), LayerShape(0), LayerShape(8, 0)), num_attention_heads=4
    )
    architecture = Architecture(family="mixtral", moe_router_topk=1)
    kept = choose_units(None, shape, target, method="random")
    assert kept.faults(shape) == []
    assert kept.target(shape) == target
    pruned = prune_weights(random_checkpoint(shape, architecture=architecture), kept)
    found = {name: tuple(tensor.shape) for name, tensor in tensors_of(pruned).items()}
    assert found == {entry.name: entry.shape for entry in axes.parameters(axes.FAMILIES["mixtral"], target)}
    assert found["decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.weight"] == (24, 8)
    assert not any(name.startswith("decoder.layers.2.") and "mlp" in name for name in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn": ((), (), (), ())}, "ffn: nothing is kept in any layer"),
        ({"heads": (((0,),), ((0,),), (), ((0,), (2,)))}, "heads: layers keep different numbers"),
        ({"groups": ((0,), (0,), (0,), (0,))}, "layer 2 heads: one row of heads is needed for each kept group"),
    ],
)
def test_units_that_leave_no_model(changes, message):
    kept = KeptUnits.everything(SHAPE)
    base = {"groups": ((0,), (0,), (), (0, 1)), "heads": (((0,),), ((0,),), (), ((0,), (2,)))}
    found = dataclasses.replace(kept, **(base | changes)).faults(SHAPE)
    assert any(message in fault for fault in found), found


def test_units_of_a_part_that_is_not_there():
    assert dataclasses.replace(KeptUnits.everything(MIXED), ffn=((0,), (0,), (0,))).faults(MIXED) == [
        "layer 1 ffn: an index lies in a part that the layer lacks"
    ]


def test_config_json_is_llama_nemotrons(tmp_path):
    """The keys of nvidia/Llama-3_1-Nemotron-51B-Instruct, whose multipliers give these widths."""
    assert [ffn_size(factor, 8192) for factor in (5.25, 2.625, 1.3125, 0.5, 1.0)] == [28672, 14336, 7168, 2816, 5632]
    shape = ModelShape(
        num_layers=4,
        hidden_size=8192,
        ffn_hidden_size=28672,
        num_attention_heads=64,
        num_query_groups=8,
        head_dim=128,
        vocab_size=128256,
        layers=(LayerShape(), LayerShape(14336, 0), LayerShape(0, 4), LayerShape(2816)),
    )
    config = to_hf(shape, Architecture(), dtype="bfloat16")
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["model_type"] == "nemotron-nas"
    assert (config["intermediate_size"], config["num_key_value_heads"]) == (None, None)
    blocks = config["block_configs"]
    assert [block["attention"]["n_heads_in_group"] for block in blocks] == [8, None, 16, 8]
    assert [block["attention"]["no_op"] for block in blocks] == [False, True, False, False]
    assert [block["ffn"]["no_op"] for block in blocks] == [False, False, True, False]
    assert blocks[0]["ffn"]["ffn_mult"] == 5.25
    assert from_hf(config, tmp_path)[0] == shape
    # nvidia's own files say more of each block, all of it off
    for block in blocks:
        block["attention"] |= {
            "window_length": None,
            "num_sink_tokens": None,
            "unshifted_sink": False,
            "sparsify": None,
        }
        block["ffn"] |= {"sparsify": None}
    del config["head_dim"]
    assert from_hf(config, tmp_path)[0] == shape


def test_widths_that_no_multiplier_gives_are_written_as_they_are():
    blocks = write_blocks(TARGET)
    assert [block["ffn"].get("intermediate_size") for block in blocks] == [40, 24, 8, None]
    assert not any("ffn_mult" in block["ffn"] for block in blocks)


@given(st.integers(1, 300).map(lambda count: 256 * count), st.integers(1, 20000))
def test_multipliers_give_every_multiple_back(width, hidden):
    shape = SHAPE.replace(hidden_size=hidden, layers=(*[LayerShape(width)] * 3, LayerShape(width, 0)))
    assert all("ffn_mult" in block["ffn"] for block in write_blocks(shape))
    config = {"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": hidden}
    assert read_blocks(config | {"block_configs": write_blocks(shape)}) == shape.layers


def test_blocks_that_are_all_alike_are_a_llama(tmp_path):
    config = to_hf(TARGET, Architecture(), dtype="float32")
    block = {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}}
    shape, architecture = from_hf(config | {"block_configs": [block] * 4}, tmp_path)
    assert shape.uniform
    assert (shape.ffn_hidden_size, shape.num_query_groups, architecture.family) == (256, 2, "llama")
    assert to_hf(shape, architecture, dtype="float32")["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (
            "attention",
            {"replace_with_linear": True},
            r"block_configs\[1\].attention.replace_with_linear=True is not",
        ),
        ("ffn", {"replace_with_linear": True}, r"block_configs\[1\].ffn.replace_with_linear=True is not supported"),
        ("attention", {"window_length": 64}, r"attention.window_length=64 is not supported"),
        ("ffn", {"hidden_act": "gelu"}, r"ffn.hidden_act='gelu' is not supported"),
        ("ffn", {"gated": False}, r"ffn.gated=False is not supported"),
        ("attention", {"n_heads_in_group": 3}, r"n_heads_in_group=3: must be a whole number that divides .*heads=4"),
        ("attention", {"n_heads_in_group": None}, r"n_heads_in_group=None: must be"),
        ("ffn", {"intermediate_size": None}, r"ffn_mult=None: must be a number above 0"),
        ("ffn", {"ffn_mult": -1.0}, r"ffn_mult=-1.0: must be a number above 0"),
    ],
)
def test_blocks_of_another_model(part, changes, message, tmp_path):
    config = to_hf(TARGET, Architecture(), dtype="float32")
    config["block_configs"][1][part] |= changes
    with pytest.raises(CheckpointError, match=message):
        from_hf(config, tmp_path / "config.json")


def test_blocks_that_are_missing(tmp_path):
    config = to_hf(TARGET, Architecture(), dtype="float32")
    with pytest.raises(CheckpointError, match="block_configs: 3 entries for num_hidden_layers=4"):
        from_hf(config | {"block_configs": config["block_configs"][:3]}, tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"block_configs\[0\].ffn: is missing"):
        from_hf(config | {"block_configs": [{"attention": {"no_op": True}}] * 4}, tmp_path / "config.json")
    del config["block_configs"]
    with pytest.raises(CheckpointError, match="lacks 'block_configs'"):
        from_hf(config, tmp_path / "config.json")


def test_tensors_must_have_their_layers_sizes(tmp_path):
    pruned = prune_weights(random_checkpoint(), choose_units(None, SHAPE, TARGET, method="random"))
    write_checkpoint(pruned, tmp_path / "hf", "hf")
    (tmp_path / "hf" / "minitron.json").unlink()
    content = json.loads((tmp_path / "hf" / "config.json").read_text())
    content["block_configs"][1]["ffn"]["intermediate_size"] = 32
    (tmp_path / "hf" / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.down_proj.weight has shape \[24, 24\] .* \[24, 32\]"):
        open_checkpoint(tmp_path / "hf")
    content["block_configs"][2]["attention"] = {"n_heads_in_group": 1}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="5 tensors that config.json asks for are missing, .*layers.2.input_"):
        open_checkpoint(tmp_path / "hf")


def test_keys_of_a_distributed_checkpoint_are_each_layers(tmp_path):
    pruned = prune_weights(random_checkpoint(), choose_units(None, SHAPE, TARGET, method="random"))
    write_and_read_torch_dist(pruned, tmp_path)
    sizes = TorchDist(tmp_path / "weights").sizes
    assert sizes["module.decoder.layers.1.mlp.linear_fc1.weight"] == (48, 24)
    assert not any(key.startswith("module.decoder.layers.3.mlp") for key in sizes)


# Who cannot take them


def test_formats_refuse_before_they_write(tmp_path):
    pruned = prune_weights(random_checkpoint(), choose_units(None, SHAPE, TARGET, method="random"))
    for form, name in (("nemo2", "model"), ("nemo", "model.nemo")):
        with pytest.raises(ShapeError, match=f"the {form} format: takes no model whose layers differ in size"):
            write_checkpoint(pruned, tmp_path / name, form)
    qwen = dataclasses.replace(pruned, architecture=Architecture(family="qwen2"))
    with pytest.raises(CheckpointError, match=r"family 'qwen2': Hugging Face has no form .*\(of these it has: llama\)"):
        write_checkpoint(qwen, tmp_path / "qwen", "hf")
    assert list(tmp_path.iterdir()) == []


def test_live_models_scores_and_rounds_refuse(tmp_path):
    from nemo_minitron.distillation.compatibility import check_model
    from nemo_minitron.importance import magnitude_scores
    from nemo_minitron.pruning import DepthPrune, WidthPrune
    from nemo_minitron.runtime.device import decide
    from nemo_minitron.runtime.groups import ParallelLayout
    from nemo_minitron.runtime.model import transformer_config
    from nemo_minitron.search import SearchSpace

    kept = choose_units(None, SHAPE, TARGET, method="random")
    save_kept(kept, SHAPE, tmp_path / "kept.json")
    pruned = prune_weights(random_checkpoint(), kept)
    cases = {
        "pruning a live model": lambda: WidthPrune(tmp_path / "kept.json"),
        r"pruning a live model \(DepthPrune": lambda: DepthPrune(tmp_path / "kept.json"),
        "pruning in rounds": lambda: intermediate_shapes(SHAPE, TARGET, 2),
        "scoring": lambda: magnitude_scores(pruned),
        "a Megatron model": lambda: transformer_config(TARGET, Architecture(), ParallelLayout(), decide("cpu")),
        "model: distillation": lambda: check_model(pruned, ParallelLayout(), 16),
        "a search of uniform shapes": lambda: SearchSpace(TARGET, {}),
        "comparing a conversion's logits": lambda: verify(pruned, pruned),
    }
    for what, refuse in cases.items():
        with pytest.raises(ShapeError, match=what + r".*takes no model whose layers differ in size \(layer 0 has"):
            refuse()


@pytest.fixture
def mixed(tmp_path) -> Path:
    """A written model of such layers with its record, as plans find it."""
    source = open_checkpoint(tiny_checkpoint(tmp_path / "model"))
    target = source.shape.replace(layers=(LayerShape(), LayerShape(20, 2), LayerShape(0, 2)))
    kept = choose_units(None, source.shape, target, method="random")
    write_checkpoint(prune_weights(source, kept), tmp_path / "mixed", "hf")
    return tmp_path / "mixed"


@pytest.mark.parametrize(
    ("stage", "words", "message"),
    [
        ("score", ["model=MODEL", "estimator=magnitude"], "scoring: takes no model whose layers differ in size"),
        ("score", ["model=MODEL"], "scoring: takes"),
        ("depth", ["model=MODEL"], "measuring depth: takes"),
        ("search", ["model=MODEL"], "a search of uniform shapes: takes"),
        ("iterate", ["model=MODEL", "target={hidden_size: 24}"], "pruning in rounds: takes"),
        ("distill", ["student=MODEL", "teacher=MODEL"], "student: training: takes"),
        ("distill", ["student=MODEL", "teacher=MODEL"], "teacher: training: takes"),
        ("correct", ["model=MODEL"], "model: training: takes"),
        ("cache", ["teacher=MODEL"], "teacher: a logit cache: takes"),
        ("evaluate", ["models={mixed: MODEL}", "baseline=mixed"], "model 'mixed': evaluation: takes"),
        ("generate", ["model=MODEL"], "generation: takes"),
        ("sft", ["model=MODEL"], "alignment: takes"),
        ("export", ["model=MODEL", "formats=[nemo2]", "verify=false"], "format=nemo2: takes"),
        ("export", ["model=MODEL", "formats=[hf]"], "verify=true, which compares logits: takes"),
        ("import", ["source=MODEL", "package=null", "format=nemo2", "verify=false"], "format=nemo2: takes"),
        ("prune", ["model=MODEL", "method=random", "target={hidden_size: 24}"], "format=nemo2: takes"),
    ],
)
def test_plans_refuse(mixed, stage, words, message):
    """Before anything runs, with exit code 2."""
    from importlib import import_module

    from nemo_minitron.config import load

    overrides = [word.replace("MODEL", str(mixed)) for word in words]
    config = load(stage, CONFIGS / f"{stage}.yaml", overrides)
    module = import_module(f"nemo_minitron.stages.{'import_' if stage == 'import' else stage}")
    faults = module.plan(config).faults
    assert any(fault.startswith(message) for fault in faults), faults


def test_offline_pruning_and_conversion_of_them_run(mixed, tmp_path):
    """Through the stages: import without verification, prune, export."""
    from nemo_minitron.config import ExportConfig, ImportConfig, PruneConfig, TargetConfig
    from nemo_minitron.stages import export, import_, prune

    config = ImportConfig(source=str(mixed), output=str(tmp_path / "in"), format="hf", verify=False)
    assert import_.plan(config).faults == []
    assert import_.run(config)["shape"] == open_checkpoint(mixed).shape.to_dict()
    config = PruneConfig(
        model=str(tmp_path / "in"),
        output=str(tmp_path / "pruned"),
        format="hf",
        method="random",
        target=TargetConfig(hidden_size=24),
        layers_to_drop=[0],
    )
    assert prune.plan(config).faults == []
    found = prune.run(config)
    after = open_checkpoint(tmp_path / "pruned")
    assert found["shape"] == after.shape.to_dict()
    assert after.shape == open_checkpoint(mixed).shape.of_layers([1, 2]).replace(hidden_size=24)
    config = ExportConfig(model=str(tmp_path / "pruned"), output=str(tmp_path / "out"), formats=["hf"], verify=False)
    assert export.plan(config).faults == []
    export.run(config)
    assert same(tensors_of(open_checkpoint(tmp_path / "out" / "hf")), tensors_of(after))
    with pytest.raises(ShapeError, match="verify=true, which compares logits"):
        export.run(dataclasses.replace(config, verify=True, output=str(tmp_path / "verified")))
    assert not (tmp_path / "verified").exists()


# Plans and reports


@given(mixed_shapes(), st.sampled_from([1, 2]))
@settings(max_examples=40, deadline=None)
def test_costs_are_the_sums_of_the_layers(shape, pipeline):
    """Of memory the weights and the cache, of a rank the parameters, and the operations."""
    if shape.num_layers < pipeline:
        return
    table, model = axes.FAMILIES["llama"], Model(shape)
    ranks = pipeline_stage_parameters(model, tensor=1, pipeline=pipeline)
    padded = shape.replace(vocab_size=128)
    tied = padded.vocab_size * shape.hidden_size if shape.tied_embeddings and pipeline > 1 else 0
    counted = [sum(torch.Size(size).numel() for size in rank.values()) for rank in ranks]
    assert sum(counted) == axes.parameter_count(table, padded) + tied
    uses = MemoryCost(table, shape, Workload(batch_size=3, sequence_length=5, bytes=4, pipeline=pipeline)).ranks(shape)
    assert [use.weights for use in uses] == [4 * count for count in counted]
    groups = sum(sizes.num_query_groups for sizes in shape.each())
    assert sum(use.cache for use in uses) == 4 * 2 * 3 * 5 * groups * shape.head_dim
    matrices = sum(
        entry.count for entry in axes.parameters(table, shape) if len(entry.shape) == 2 and entry.layer is not None
    )
    cores = sum(2 * 7 * sizes.num_attention_heads * sizes.head_dim for sizes in shape.each())
    flops = ForwardFlops.of(model, 7)
    assert flops.total == pytest.approx(2 * matrices + cores + flops.output, rel=1e-12)


@pytest.mark.parametrize("fused", [True, False])
def test_activations_are_the_sum_of_the_layers(fused):
    """A model of two kinds of layers keeps the mean of the models of one kind; a missing part keeps nothing."""
    sizes = (LayerShape(40, 4), LayerShape(24, 2))
    work = Workload(training=True, sequence_length=16, fused=fused)

    def kept(shape: ModelShape) -> float:
        return MemoryCost(axes.FAMILIES["llama"], shape, work).ranks(shape)[0].activations

    alike = [kept(SHAPE.replace(layers=(one,) * 4)) for one in sizes]
    assert kept(SHAPE.replace(layers=sizes * 2)) == pytest.approx(sum(alike) / 2, rel=1e-12)
    # Of two layers, one's attention and the other's MLP: what one whole layer keeps.
    halves, whole = SHAPE.of_layers([0, 1]).replace(layers=(LayerShape(0), LayerShape(40, 0))), SHAPE.of_layers([0])
    assert kept(halves) == pytest.approx(kept(whole), rel=1e-12)


def test_the_report_shows_from_the_least_to_the_largest():
    assert span(SHAPE, "ffn_hidden_size") == "40"
    assert span(TARGET, "ffn_hidden_size") == "0 – 40"
    assert span(TARGET, "num_query_groups") == "0 – 4"
