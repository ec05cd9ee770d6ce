"""Sliding windows under tensor, sequence and pipeline parallelism: logits and gradients of transformers' models.

Of Gemma 3, with layers of two types, and of Mistral, where all layers slide.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_distributed
from support.families import SIZES, family_model, windowed_model
from support.pruning import live, tokens

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-sp": {"tensor": 2, "sequence_parallel": True},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "vpp": {"pipeline": 2, "virtual_pipeline": 2},
}
MISTRAL_LAYOUTS = ("tp2-sp", "pp2")
COPIES = 2
"""Micro-batches, each the same: the interleaved schedule wants as many as stages."""
IDS = tokens(2, 13, vocab=SIZES["vocab_size"])


def forward_backward(folder: str) -> dict[str, Any]:
    """Per model and layout: the mean loss, and by parameter its gradient's relative difference from transformers'."""
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
    for name, layout in [*(("gemma3", each) for each in LAYOUTS), *(("mistral", each) for each in MISTRAL_LAYOUTS)]:
        groups = initialize(ParallelLayout(**LAYOUTS[layout]))
        chunks = live(open_checkpoint(Path(folder, name, "model")), groups)
        expected = live(open_checkpoint(Path(folder, name, "gradients")), groups)
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
        theirs = {key: value for chunk in expected for key, value in canonical_parameters(chunk)}
        differences = {
            key: float((parameter.main_grad - theirs[key]).abs().max() / theirs[key].abs().max())
            for chunk in chunks
            for key, parameter in canonical_parameters(chunk)
        }
        assert all(float(theirs[key].abs().max()) > 1e-4 for key in differences), "a gradient shows nothing"
        found[name, layout] = {
            "loss": float(outputs[0]["loss"]) if groups.is_last_stage else None,
            "differences": differences,
            "layers": [layer.layer_number for chunk in chunks for layer in chunk.decoder.layers],
        }
    return found


@pytest.mark.slow
def test_gradients_under_parallel_layouts(tmp_path):
    import transformers

    losses = {}
    for name in ("gemma3", "mistral"):
        path = tmp_path / name / "model"
        if name == "mistral":
            windowed_model(path, num_hidden_layers=4)
        else:
            family_model(name, path, num_hidden_layers=4)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        losses[name] = loss.item()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.grad)
        model.save_pretrained(tmp_path / name / "gradients")
    ranks = run_distributed(forward_backward, 2, tmp_path, folder=str(tmp_path))
    for rank in ranks:
        for (name, layout), result in rank.items():
            if result["loss"] is not None:
                assert result["loss"] == pytest.approx(losses[name], rel=1e-5), (name, layout)
            worst = max(result["differences"], key=result["differences"].get)
            assert result["differences"][worst] < 1e-4, (name, layout, worst, result["differences"][worst])
    assert [rank["gemma3", "pp2"]["layers"] for rank in ranks] == [[1, 2], [3, 4]]
    assert [rank["gemma3", "vpp"]["layers"] for rank in ranks] == [[1, 3], [2, 4]]
