"""The transforms on a live Megatron model in one process, and what pruning must not change."""

from __future__ import annotations

import pytest
import torch
from support.pruning import SHAPE, live, logits, one_process, random_checkpoint, random_kept, tokens
from torch import nn

from nemo_minitron.axes import Axis, KeptUnits, axis_rows
from nemo_minitron.errors import ShapeError
from nemo_minitron.pruning import DepthPrune, WidthPrune, prune_weights, save_kept

TARGET = SHAPE.replace(
    num_layers=2, hidden_size=14, ffn_hidden_size=22, num_query_groups=2, num_attention_heads=2, vocab_size=67
)


@pytest.fixture(scope="module")
def groups():
    with one_process() as found:
        yield found


def both(kept, module):
    return WidthPrune(kept)(DepthPrune(kept)(module))


def parameters(chunks):
    return {name: parameter for chunk in chunks for name, parameter in chunk.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_live_and_offline_give_the_same_bits(groups, tied):
    shape = SHAPE.replace(tied_embeddings=tied)
    checkpoint = random_checkpoint(shape)
    kept = random_kept(shape, TARGET.replace(tied_embeddings=tied))
    offline = live(prune_weights(checkpoint, kept), groups)
    pruned = live(checkpoint, groups)
    both(kept, pruned[0])
    ours, theirs = parameters(pruned), parameters(offline)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
        assert vars(ours[name]) == vars(theirs[name]), name
    ids = tokens(2, 9)
    assert torch.equal(logits(pruned, ids), logits(offline, ids))


def test_every_size_is_that_of_a_model_built_so(groups):
    """Numbers and tuples that any module keeps, its configuration's fields, and the modules' order."""
    kept = random_kept(SHAPE, TARGET)
    pruned = live(random_checkpoint(), groups)
    both(kept, pruned[0])
    built = live(prune_weights(random_checkpoint(), kept), groups)

    def sizes(chunk):
        return {
            name: {k: v for k, v in vars(part).items() if isinstance(v, int | float | tuple | str)}
            for name, part in chunk.named_modules()
        }

    assert list(sizes(pruned[0])) == list(sizes(built[0]))
    assert sizes(pruned[0]) == sizes(built[0])

    def fields(config):
        return {k: v for k, v in vars(config).items() if not callable(v)}

    assert fields(pruned[0].config) == fields(built[0].config)
    assert all(part.config is pruned[0].config for part in pruned[0].modules() if hasattr(part, "config"))


def test_gradients_flow_in_the_pruned_model(groups):
    kept = random_kept(SHAPE, TARGET)
    pruned, offline = live(random_checkpoint(), groups), live(prune_weights(random_checkpoint(), kept), groups)
    both(kept, pruned[0])
    ids = tokens(2, 9)
    for chunk in (pruned[0], offline[0]):
        positions = torch.arange(8).expand(2, 8)
        torch.autograd.backward(chunk(ids[:, :-1], positions, None, labels=ids[:, 1:]).mean())
    for (name, one), other in zip(pruned[0].named_parameters(), offline[0].parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


@pytest.mark.parametrize("tied", [False, True])
def test_keeping_everything_changes_no_bit(groups, tied):
    shape = SHAPE.replace(tied_embeddings=tied)
    chunks = live(random_checkpoint(shape), groups)
    ids = tokens(2, 9)
    before = {name: parameter.detach().clone() for name, parameter in parameters(chunks).items()}
    expected = logits(chunks, ids)
    both(KeptUnits.everything(shape), chunks[0])
    for name, parameter in parameters(chunks).items():
        assert torch.equal(parameter, before[name]), name
    assert torch.equal(logits(chunks, ids), expected)


# ------------------------------------------------------------------------------------- units that do nothing can go


def zero_rows(tensor, dim, rows):
    tensor.index_fill_(dim, rows, 0.0)


def dead_ffn(tensors, shape, kept):
    """Neurons whose output is never read: their columns of the down projection are zero."""
    for layer in range(shape.num_layers):
        gone = complement(axis_rows(Axis.FFN, shape, kept, layer), shape.ffn_hidden_size)
        zero_rows(tensors[f"decoder.layers.{layer}.mlp.linear_fc2.weight"], 1, gone)


def dead_heads(tensors, shape, kept):
    """Heads (and with a whole group of them, its keys and values) whose columns of the output projection are zero."""
    size = shape.num_attention_heads * shape.head_dim
    for layer in range(shape.num_layers):
        gone = complement(axis_rows(Axis.HEADS, shape, kept, layer), size)
        zero_rows(tensors[f"decoder.layers.{layer}.self_attention.linear_proj.weight"], 1, gone)


def dead_hidden(tensors, shape, kept):
    """Channels that nothing writes to: they are zero all through the residual stream.

    Their norm weights and the columns that read them are left random: they must not matter.
    """
    gone = complement(torch.tensor(kept.hidden), shape.hidden_size)
    zero_rows(tensors["embedding.word_embeddings.weight"], 1, gone)
    for layer in range(shape.num_layers):
        for name in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight"):
            zero_rows(tensors[f"decoder.layers.{layer}.{name}"], 0, gone)


def dead_layers(tensors, shape, kept):
    """Layers that add nothing to the residual stream: both output projections are zero."""
    for layer in set(range(shape.num_layers)) - set(kept.layers):
        for name in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight"):
            tensors[f"decoder.layers.{layer}.{name}"].zero_()


def complement(rows, size):
    return torch.tensor(sorted(set(range(size)) - set(rows.tolist())), dtype=torch.int64)


CASES = {
    "ffn": ({"ffn_hidden_size": 22}, dead_ffn),
    "heads": ({"num_attention_heads": 4}, dead_heads),
    "groups": ({"num_query_groups": 2, "num_attention_heads": 4}, dead_heads),
    "hidden": ({"hidden_size": 14}, dead_hidden),
    "layers": ({"num_layers": 2}, dead_layers),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("axis", sorted(CASES))
@pytest.mark.parametrize("path", ["live", "offline"])
def test_units_that_are_zero_can_go(groups, axis, path, tied):
    shape = SHAPE.replace(tied_embeddings=tied)
    changes, kill = CASES[axis]
    kept = random_kept(shape, shape.replace(**changes))
    checkpoint = random_checkpoint(shape, change=lambda tensors: kill(tensors, shape, kept))
    chunks, ids = live(checkpoint, groups), tokens(3, 11)
    expected = logits(chunks, ids)
    assert expected.std() > 0.1
    assert not torch.allclose(expected, logits(live(random_checkpoint(shape), groups), ids), rtol=1e-3)
    if path == "live":
        both(kept, chunks[0])
    else:
        chunks = live(prune_weights(checkpoint, kept), groups)
    if axis == "hidden":
        undo_change_of_width(chunks[0], shape.hidden_size / 14)
    torch.testing.assert_close(logits(chunks, ids), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def undo_change_of_width(chunk, ratio):
    """RMSNorm divides by sqrt(sum x^2 / H + eps), so H enters although the channels are zero.

    With ratio = H / H' the weights times sqrt(ratio) and epsilon times ratio give the old values exactly:
    x sqrt(H/H') / sqrt(S/H' + eps H/H') = x / sqrt(S/H + eps).
    """
    norms = [part for part in chunk.modules() if isinstance(part, nn.RMSNorm)]
    assert len(norms) == 2 * SHAPE.num_layers + 1
    for norm in norms:
        norm.weight.data *= ratio**0.5
        norm.eps *= ratio


@pytest.mark.parametrize("axis", sorted(CASES))
def test_units_that_are_not_zero_are_missed(groups, axis):
    """The test above could not pass by leaving the model alone."""
    kept = random_kept(SHAPE, SHAPE.replace(**CASES[axis][0]))
    chunks, ids = live(random_checkpoint(), groups), tokens(3, 11)
    expected = logits(chunks, ids)
    both(kept, chunks[0])
    assert (logits(chunks, ids) - expected).abs().max() > 0.05 * expected.abs().max()


# ------------------------------------------------------------------------------------------------- wrappers, bad input


def test_wrapped_models_are_found(groups):
    from megatron.core.transformer.module import Float16Module

    kept = random_kept(SHAPE, TARGET)
    (chunk,) = live(random_checkpoint(), groups)
    chunk.config.bf16 = True
    wrapped = nn.ModuleList([Float16Module(chunk.config, chunk)])
    assert both(kept, wrapped) is wrapped
    assert chunk.config.hidden_size == 14
    (parameter,) = {p.dtype for p in chunk.parameters()}
    assert parameter is torch.bfloat16


def test_kept_units_from_a_file(groups, tmp_path):
    kept = random_kept(SHAPE, TARGET)
    save_kept(kept, SHAPE, tmp_path / "kept.json")
    (chunk,) = live(random_checkpoint(), groups)
    both(tmp_path / "kept.json", chunk)
    assert chunk.config.ffn_hidden_size == 22
    with pytest.raises(ShapeError, match="of a model of 4 layers, this one has 2"):
        DepthPrune(tmp_path / "kept.json")(chunk)
    with pytest.raises(ShapeError, match="hidden_size: the units are of a model of 24, this one has 14"):
        WidthPrune(tmp_path / "kept.json")(chunk)


def test_a_module_without_a_model(groups):
    with pytest.raises(ShapeError, match="holds no Megatron GPTModel"):
        DepthPrune(KeptUnits.everything(SHAPE))(nn.Linear(2, 2))


def test_a_model_wrapped_for_training_is_refused(groups):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    (chunk,) = live(random_checkpoint(), groups)
    wrapped = DistributedDataParallel(chunk.config, DistributedDataParallelConfig(), chunk)
    before = {name: parameter.shape for name, parameter in chunk.named_parameters()}
    for module in (wrapped, chunk):
        with pytest.raises(ShapeError, match="prune it before it is wrapped"):
            both(random_kept(SHAPE, TARGET), module)
    assert before == {name: parameter.shape for name, parameter in chunk.named_parameters()}


def test_width_before_depth_is_refused(groups):
    (chunk,) = live(random_checkpoint(), groups)
    with pytest.raises(ShapeError, match="apply DepthPrune"):
        WidthPrune(random_kept(SHAPE, TARGET))(chunk)


def test_units_outside_the_model(groups):
    (chunk,) = live(random_checkpoint(), groups)
    with pytest.raises(ShapeError, match="hidden: an index lies outside"):
        WidthPrune(random_kept(SHAPE.replace(hidden_size=48), SHAPE))(chunk)
    with pytest.raises(ShapeError, match="must be ascending numbers within"):
        DepthPrune(random_kept(SHAPE.replace(num_layers=12), SHAPE, seed=1))(chunk)
    assert chunk.config.hidden_size == SHAPE.hidden_size
