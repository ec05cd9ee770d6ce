"""The score file and the aggregations: no model."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.pruning import SHAPE, random_checkpoint

from nemo_minitron.errors import CheckpointError, ConfigError, NonFiniteError, ShapeError
from nemo_minitron.importance import AGGREGATIONS, Scores, fingerprint, magnitude_scores
from nemo_minitron.importance.aggregation import aggregation


def make_scores(**changes) -> Scores:
    s = SHAPE
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.rand(size, generator=generator, dtype=torch.float64)

    values = {
        "ffn": draw(s.num_layers, s.ffn_hidden_size),
        "heads": draw(s.num_layers, s.num_attention_heads),
        "groups": draw(s.num_layers, s.num_query_groups),
        "hidden": draw(s.hidden_size),
        "layers": draw(s.num_layers),
        "shape": s,
        "samples": 3,
        "tokens": 24,
        "sequence": "mean",
        "batch": "l2",
        "fingerprint": "abc",
    }
    return Scores(**{**values, **changes})


def test_round_trip(tmp_path):
    scores = make_scores()
    scores.save(tmp_path / "scores")
    read = Scores.load(tmp_path / "scores")
    for name in ("ffn", "heads", "groups", "hidden", "layers"):
        assert torch.equal(getattr(read, name), getattr(scores, name))
    assert (read.shape, read.samples, read.tokens, read.fingerprint) == (SHAPE, 3, 24, "abc")


def test_save_does_not_replace_unasked(tmp_path):
    make_scores().save(tmp_path / "scores")
    with pytest.raises(CheckpointError, match="exists"):
        make_scores(samples=9).save(tmp_path / "scores")
    assert Scores.load(tmp_path / "scores").samples == 3
    make_scores(samples=9).save(tmp_path / "scores", overwrite=True)
    assert Scores.load(tmp_path / "scores").samples == 9
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


@pytest.fixture
def saved(tmp_path):
    make_scores().save(tmp_path / "scores")
    return tmp_path / "scores"


def edit_meta(saved, **changes):
    meta = json.loads((saved / "scores.json").read_text())
    (saved / "scores.json").write_text(json.dumps({**meta, **changes}))


def edit_tensors(saved, change):
    tensors = load_file(saved / "scores.safetensors")
    change(tensors)
    save_file(tensors, saved / "scores.safetensors")


def test_other_version(saved):
    edit_meta(saved, format_version=99)
    with pytest.raises(CheckpointError, match=r"version 99.*score the model again"):
        Scores.load(saved)


def test_version_1_is_read(saved):
    """It had no other estimator than activations, and no experts."""
    meta = json.loads((saved / "scores.json").read_text())
    old = {name: value for name, value in meta.items() if name not in ("estimator", "experts")}
    old["shape"].pop("num_moe_experts")
    (saved / "scores.json").write_text(json.dumps({**old, "format_version": 1}))
    read = Scores.load(saved)
    assert read.estimator == "activation"
    assert torch.equal(read.ffn, make_scores().ffn)


def test_missing_directory(tmp_path):
    with pytest.raises(CheckpointError, match="run `minitron score`"):
        Scores.load(tmp_path / "nothing")


def test_truncated_file(saved):
    file = saved / "scores.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Scores.load(saved)


@pytest.mark.parametrize("text", ["{", "[]", "{}", "3"])
def test_damaged_meta(saved, text):
    (saved / "scores.json").write_text(text)
    with pytest.raises(CheckpointError, match="scores.json"):
        Scores.load(saved)


def test_meta_without_samples(saved):
    meta = json.loads((saved / "scores.json").read_text())
    del meta["samples"]
    (saved / "scores.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="samples"):
        Scores.load(saved)


def test_missing_layers(saved):
    edit_tensors(saved, lambda t: t.update(ffn=t["ffn"][:2].clone()))
    with pytest.raises(CheckpointError, match="ffn has the scores of 2 layers, the model has 4"):
        Scores.load(saved)


def test_missing_tensor(saved):
    edit_tensors(saved, lambda t: t.pop("heads"))
    with pytest.raises(CheckpointError, match="no scores of heads"):
        Scores.load(saved)


def test_wrong_width(saved):
    edit_tensors(saved, lambda t: t.update(hidden=t["hidden"][:5].clone()))
    with pytest.raises(CheckpointError, match="hidden"):
        Scores.load(saved)


def test_non_finite(saved):
    edit_tensors(saved, lambda t: t["layers"].__setitem__(1, float("nan")))
    with pytest.raises(CheckpointError, match="layers: NaN or infinite"):
        Scores.load(saved)
    with pytest.raises(NonFiniteError):
        make_scores(hidden=torch.full((SHAPE.hidden_size,), float("inf")))


def mixture_scores(**changes) -> Scores:
    shape = SHAPE.replace(num_moe_experts=3)
    experts = torch.rand(shape.num_layers, 3, dtype=torch.float64)
    ffn = torch.rand(shape.num_layers, 3, shape.ffn_hidden_size, dtype=torch.float64)
    return make_scores(**{"shape": shape, "experts": experts, "ffn": ffn, **changes})


def test_experts_round_trip(tmp_path):
    scores = mixture_scores(estimator="taylor", sequence="sum")
    scores.save(tmp_path / "scores")
    read = Scores.load(tmp_path / "scores")
    assert torch.equal(read.experts, scores.experts)
    assert torch.equal(read.ffn, scores.ffn)
    assert (read.estimator, read.sequence, read.shape) == ("taylor", "sum", scores.shape)
    edit_tensors(tmp_path / "scores", lambda t: t.pop("experts"))
    with pytest.raises(CheckpointError, match="no scores of experts"):
        Scores.load(tmp_path / "scores")


def test_experts_belong_to_a_mixture():
    with pytest.raises(ShapeError, match="the model has none"):
        make_scores(experts=torch.ones(SHAPE.num_layers, 3, dtype=torch.float64))
    with pytest.raises(ShapeError, match="scores of experts: nothing where the model needs"):
        mixture_scores(experts=None)
    with pytest.raises(ShapeError, match="scores of ffn"):
        mixture_scores(ffn=make_scores().ffn)


# ------------------------------------------------------------------------------------------------------------ magnitude


def test_magnitude_is_the_norm_of_what_pruning_would_take(tmp_path):
    """Against the definition: what is missing from the squared norm of the weights once a unit is pruned away."""
    from nemo_minitron.axes import KeptUnits
    from nemo_minitron.pruning import prune_weights

    checkpoint = random_checkpoint()
    done = []
    scores = magnitude_scores(checkpoint, fingerprint="abc", progress=done.append)
    assert (scores.estimator, scores.samples, scores.fingerprint) == ("magnitude", 0, "abc")
    assert sum(done) == len(checkpoint.weights.names())

    def squares(weights, only=""):
        return sum(float(weights.tensor(name).double().square().sum()) for name in weights.names() if only in name)

    everything = KeptUnits.everything(SHAPE)
    total = squares(checkpoint.weights)

    def without(**kept):
        return total - squares(prune_weights(checkpoint, dataclasses.replace(everything, **kept)).weights)

    hidden = tuple(i for i in everything.hidden if i != 5)
    assert without(hidden=hidden) == pytest.approx(float(scores.hidden[5]) ** 2, rel=1e-9)
    ffn = tuple(tuple(range(1, SHAPE.ffn_hidden_size)) for _ in range(SHAPE.num_layers))
    assert without(ffn=ffn) == pytest.approx(float(scores.ffn[:, 0].square().sum()), rel=1e-9)
    first = ((0, 2, 4, 6),) * SHAPE.num_layers  # the first head of each group
    heads = tuple(tuple((head,) for head in row) for row in first)
    assert without(heads=heads) == pytest.approx(float(scores.heads[:, 1::2].square().sum()), rel=1e-9)
    groups = ((0, 1, 3),) * SHAPE.num_layers
    kept = tuple(tuple((2 * g, 2 * g + 1) for g in row) for row in groups)
    assert without(groups=groups, heads=kept) == pytest.approx(float(scores.groups[:, 2].square().sum()), rel=1e-9)
    assert squares(checkpoint.weights, "layers.2.") == pytest.approx(float(scores.layers[2]) ** 2, rel=1e-9)


def test_magnitude_names_the_tensor_that_is_not_finite():
    def spoil(tensors):
        tensors["decoder.layers.1.mlp.linear_fc2.weight"][0, 0] = float("nan")

    with pytest.raises(NonFiniteError, match=r"decoder\.layers\.1\.mlp\.linear_fc2\.weight holds NaN"):
        magnitude_scores(random_checkpoint(change=spoil))


def test_check_against_a_model():
    scores = make_scores()
    scores.check(SHAPE, "abc", where="s")
    scores.check(SHAPE, None, where="s")
    with pytest.raises(CheckpointError, match="other weights"):
        scores.check(SHAPE, "abd", where="s")
    with pytest.raises(ShapeError) as caught:
        scores.check(SHAPE.replace(ffn_hidden_size=44, num_layers=5), "abc", where="s")
    assert len(caught.value.faults) == 2


def test_fingerprint_tells_weights_apart():
    one = fingerprint(random_checkpoint())
    assert one == fingerprint(random_checkpoint())
    assert one != fingerprint(random_checkpoint(seed=1))

    def nudge(tensors):
        tensors["decoder.layers.3.mlp.linear_fc2.weight"][0, 0] += 1e-3

    assert one != fingerprint(random_checkpoint(change=nudge))


# ---------------------------------------------------------------------------------------------------------- aggregation

REFERENCE = {
    "mean": lambda x: x.abs().mean(0),
    "l1": lambda x: x.abs().sum(0),
    "l2": lambda x: x.square().sum(0).sqrt(),
    "variance": lambda x: x.var(0, correction=0),
    "max": lambda x: x.abs().amax(0),
}


def test_every_aggregation_has_a_reference():
    assert REFERENCE.keys() == AGGREGATIONS.keys()


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 7), min_size=1, max_size=5), seed=st.integers(0, 1000), shift=st.floats(-3, 3))
def test_streaming_equals_all_at_once(name, cuts, seed, shift):
    x = torch.randn(sum(cuts), 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift
    one = AGGREGATIONS[name]
    total = None
    for part in x.split(cuts):
        found = one.statistics(part, 0)
        total = found if total is None else one.combine(total, found)
    torch.testing.assert_close(one.finish(total, len(x)), REFERENCE[name](x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
def test_bfloat16_adds_up_in_fp32(name):
    x = torch.randn(4096, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    one = AGGREGATIONS[name]
    found = one.finish(one.statistics(x, 0), len(x))
    torch.testing.assert_close(found.double(), REFERENCE[name](x.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_visible(name, value):
    x = torch.ones(4, 2)
    x[1, 0] = value
    assert not torch.isfinite(AGGREGATIONS[name].statistics(x, 0)[..., 0]).all()


def test_unknown_aggregation():
    with pytest.raises(ConfigError, match="aggregation.batch='median'"):
        aggregation("median", "aggregation.batch")
