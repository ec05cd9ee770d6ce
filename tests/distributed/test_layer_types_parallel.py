"""Layers of two types under tensor, sequence and pipeline parallelism: logits and gradients of transformers' model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_distributed
from support.families import SIZES, family_model
from support.pruning import live, tokens

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-sp": {"tensor": 2, "sequence_parallel": True},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "vpp": {"pipeline": 2, "virtual_pipeline": 2},
}
COPIES = 2
"""Micro-batches, each the same: the interleaved schedule wants as many as stages."""
IDS = tokens(2, 13, vocab=SIZES["vocab_size"])


def forward_backward(folder: str) -> dict[str, Any]:
    """Per layout: the mean loss, and by parameter the relative difference of its gradient from transformers'."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.checkpoints.live import canonical_parameters
    from nemo_minitron.runtime.forward import mask_padding
    from nemo_minitron.runtime.groups import ParallelLayout, initialize

    def step(_: Any, model: Any) -> tuple[torch.Tensor, Any]:
        inputs = IDS[:, :-1].contiguous()
        return model(inputs, torch.arange(12).expand_as(inputs), None), loss

    def loss(logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logits = mask_padding(logits.clone(), SIZES["vocab_size"])
        mean = vocab_parallel_cross_entropy(logits, IDS[:, 1:].contiguous()).mean()
        return mean, {"loss": mean.detach().clone()}

    found: dict[str, Any] = {}
    for layout, options in LAYOUTS.items():
        groups = initialize(ParallelLayout(**options))
        chunks = live(open_checkpoint(Path(folder, "model")), groups)
        expected = live(open_checkpoint(Path(folder, "gradients")), groups)
        config = chunks[0].config
        config.finalize_model_grads_func = finalize_model_grads
        trained = [DistributedDataParallel(config, DistributedDataParallelConfig(), chunk) for chunk in chunks]
        outputs = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[None] * len(trained),
            model=trained if len(trained) > 1 else trained[0],
            num_microbatches=COPIES,
            seq_length=12,
            micro_batch_size=2,
            forward_only=False,
        )
        theirs = {name: value for chunk in expected for name, value in canonical_parameters(chunk)}
        differences = {
            name: float((parameter.main_grad - theirs[name]).abs().max() / theirs[name].abs().max())
            for chunk in chunks
            for name, parameter in canonical_parameters(chunk)
        }
        assert all(float(theirs[name].abs().max()) > 1e-4 for name in differences), "a gradient shows nothing"
        found[layout] = {
            "loss": float(outputs[0]["loss"]) if groups.is_last_stage else None,
            "differences": differences,
            "layers": [layer.layer_number for chunk in chunks for layer in chunk.decoder.layers],
        }
    return found


@pytest.mark.slow
def test_gradients_under_parallel_layouts(tmp_path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        family_model("gemma3", tmp_path / "model", num_hidden_layers=4)
    ).eval()
    expected = model(IDS, labels=IDS).loss
    expected.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(tmp_path / "gradients")
    ranks = run_distributed(forward_backward, 2, tmp_path, folder=str(tmp_path))
    for rank in ranks:
        for layout, result in rank.items():
            if result["loss"] is not None:
                assert result["loss"] == pytest.approx(float(expected), rel=1e-5), layout
            worst = max(result["differences"], key=result["differences"].get)
            assert result["differences"][worst] < 1e-4, (layout, worst, result["differences"][worst])
    assert [rank["pp2"]["layers"] for rank in ranks] == [[1, 2], [3, 4]]
    assert [rank["vpp"]["layers"] for rank in ranks] == [[1, 3], [2, 4]]
