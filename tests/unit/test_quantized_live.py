"""A live Megatron model that rounds, against its own quantized export read back: logits and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import family_model
from support.pruning import live, one_process
from support.pruning import logits as padded_logits

from nemo_minitron import axes
from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
from nemo_minitron.checkpoints.formats.huggingface.names import hf_names, merge
from nemo_minitron.errors import CheckpointError
from nemo_minitron.quantization import load_quantized, matrices_of, scheme_of, write_quantized
from nemo_minitron.quantization.live import LiveRounding
from nemo_minitron.quantization.matrices import training_faults
from nemo_minitron.quantization.ranges import TrainedFor
from nemo_minitron.runtime.forward import evaluating

IDS = torch.randint(0, 131, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(chunks: list[Any]) -> torch.Tensor:
    """``[b, s, 131]``, without padding."""
    return padded_logits(chunks, IDS)[..., :131]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ("fp8", "int4", "nvfp4")),
        ("qwen2", ("int4", "nvfp4")),  # biases of queries, keys and values
        ("gemma3", ("fp8", "nvfp4")),
        ("nemotron", ("int4",)),  # no gate; in FP8 one input of these tokens lies at the border of two roundings
        ("mixtral", ("int4",)),
    ],
)
def test_logits_and_gradients_are_those_of_the_export(tmp_path: Path, family: str, names: tuple[str, ...]) -> None:
    family_model(family, tmp_path / "hf", hidden_size=64, intermediate_size=96, head_dim=16, num_hidden_layers=2)
    model = open_checkpoint(tmp_path / "hf")
    write_checkpoint(model, tmp_path / "float", "hf")
    with one_process() as groups:
        for name in names:
            scheme = scheme_of(name, 32)
            chunks = live(model, groups)
            plain = logits(chunks)
            rounding = LiveRounding(scheme)
            rounding.attach(chunks[0], model, groups)
            if scheme.inputs:
                assert rounding.lacks_ranges
                with rounding.measuring(groups):
                    assert torch.equal(logits(chunks), plain)  # nothing is rounded meanwhile
            assert not rounding.lacks_ranges
            path = tmp_path / name
            write_quantized(
                tmp_path / "float",
                model,
                path,
                scheme,
                dtype="float32",
                calibrate=lambda hf: hf(IDS[:, :3]),  # other ranges: those of the training win
                ranges=rounding.ranges,
            )
            theirs = load_quantized(path)
            expected = theirs(IDS).logits
            torch.testing.assert_close(logits(chunks), expected.detach(), rtol=2e-4, atol=2e-4)
            assert not torch.allclose(expected, plain, atol=1e-2)

            expected.square().mean().backward()
            positions = torch.arange(IDS.shape[1]).expand_as(IDS)
            with evaluating(chunks), torch.enable_grad():
                output = chunks[0](IDS, positions, None)[..., : model.shape.vocab_size]
            output.square().mean().backward()
            gradients = {name: p.grad for name, p in theirs.named_parameters()}
            for entry in axes.parameters(model.family, model.shape):
                if entry.name not in matrices_of(model.family, model.shape, scheme).canonical:
                    continue
                mine = chunks[0].get_parameter(entry.name).grad
                parts = [gradients[part] for part in hf_names(family, entry.name)]
                if any(part is None for part in parts):
                    continue  # an expert that no token chose
                reference = merge(entry.row.axes, parts, entry.sizes)
                assert mine is not None
                error = (mine - reference).norm() / reference.norm()
                assert error < 1e-3, (entry.name, error)
            assert set(chunks[0].state_dict()) == set(live(model, groups)[0].state_dict())


def test_what_a_training_cannot_round(tmp_path: Path) -> None:
    family_model("mixtral", tmp_path / "hf", hidden_size=64, intermediate_size=96, head_dim=16)
    model = open_checkpoint(tmp_path / "hf")
    (fault,) = training_faults(model.shape, model.architecture, scheme_of("fp8"))
    assert fault == "quantize=fp8: rounds inputs, whose ranges differ by expert; use int4 for a mixture"
    (fault,) = training_faults(model.shape, model.architecture, scheme_of("int4", 32), tensor=2)
    assert fault.startswith("parallel.tensor=2: cuts 96 columns within groups of 32")

    TrainedFor("int4", 32).write(tmp_path)
    assert TrainedFor.read(tmp_path) == TrainedFor("int4", 32, {})
    (tmp_path / "trained_quantization.json").write_text('{"quantize": "int4"}')
    with pytest.raises(CheckpointError, match="is damaged .*; restore it, or remove it to calibrate anew"):
        TrainedFor.read(tmp_path)
