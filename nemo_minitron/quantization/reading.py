"""Read ModelOpt's unified directories back into float models, which compute what the quantized model computes.

It is how the loss of an export is measured where no GPU is: of the very files, by another reader than their writer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import CheckpointError, DataError, first_line
from nemo_minitron.parsing import parse_json

if TYPE_CHECKING:
    import torch

    from nemo_minitron.data.blocks import Blocks

__all__ = ["algorithm_of", "dequantize", "load_quantized", "mean_loss"]

_ALGORITHMS = ("FP8", "NVFP4", "W4A16_AWQ")
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SCALES = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")


def algorithm_of(path: Path) -> str:
    """The quantization of a directory, as its ``hf_quant_config.json`` names it.

    Raises:
        CheckpointError: if it has none, or another than this suite writes.
    """
    file = path / "hf_quant_config.json"
    try:
        algorithm = parse_json(file.read_text(encoding="utf-8"))["quantization"]["quant_algo"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({first_line(error)}); it is no quantized model of ModelOpt"
        ) from error
    if algorithm not in _ALGORITHMS:
        raise CheckpointError(f"{file}: quant_algo {algorithm!r} cannot be read; known: {', '.join(_ALGORITHMS)}")
    return str(algorithm)


def dequantize(algorithm: str, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """The float32 weight of a matrix.

    Args:
        algorithm: of the directory.
        stored: ``weight`` and its scales: FP8 ``[m, n]`` with a scalar; int4 ``[m / 2, n]`` bytes, the even row in the
            low half, with ``[m, n / group]`` scales; NVFP4 ``[m, n / 2]`` bytes, the even column in the low half, with
            ``[m, n / 16]`` scales in E4M3 and a scalar.
    """
    import torch

    weight, scale = stored["weight"], stored["weight_scale"]
    if algorithm == "FP8":
        return weight.float() * scale.float()
    low, high = (weight & 0xF).to(torch.int8), (weight >> 4).to(torch.int8)
    if algorithm == "NVFP4":
        codes = torch.stack([low, high], -1).flatten(-2).long()
        values = torch.tensor(_E2M1)[codes & 7] * torch.where(codes >= 8, -1.0, 1.0)
        scale = scale.float() * stored["weight_scale_2"].float()
    else:
        codes = torch.stack([low, high], 1).flatten(0, 1)
        values = torch.where(codes >= 8, codes - 16, codes).float()
        scale = scale.float()
    group = values.shape[1] // scale.shape[1]
    return values * scale.repeat_interleave(group, 1)


def load_quantized(path: str | Path) -> Any:
    """Transformers' model of a directory, in float32 with the weights as stored; inputs are rounded as they would be.

    Raises:
        CheckpointError: for a directory that is none of ModelOpt's, or tensors that do not fit its configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(path)
    algorithm = algorithm_of(path)
    tensors = {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in _tensors(file)}
    state, inputs = {}, {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part in _SCALES:
            continue
        stored = {scale: tensors[f"{module}.{scale}"] for scale in _SCALES if f"{module}.{scale}" in tensors}
        quantized = part == "weight" and "weight_scale" in stored
        state[name] = dequantize(algorithm, {"weight": tensor, **stored}) if quantized else tensor.float()
        if stored and part == "weight":
            inputs[module] = stored
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32)
    lacking, further = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if wrong := (set(lacking) - tied) | set(further):
        raise CheckpointError(f"{path}: tensors do not fit config.json, such as {', '.join(sorted(wrong)[:3])}")
    model.tie_weights()
    for name, stored in inputs.items():
        _round_inputs(model.get_submodule(name), algorithm, stored)
    return model.eval()


def mean_loss(model: Any, blocks: Blocks, *, micro_batch_size: int = 1) -> float:
    """Mean next-token loss of transformers' model over the labels that count, nats a token.

    Documents of a block are read as one text.

    Raises:
        DataError: if no label counts.
    """
    import torch

    total, labels, counted = 0.0, 0, blocks.counted()
    device = next(model.parameters()).device
    with torch.inference_mode():
        for start in range(0, len(blocks), micro_batch_size):
            tokens = blocks.tokens[start : start + micro_batch_size].to(device)
            logits = model(tokens[:, :-1]).logits.float()
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
            some = torch.ones_like(losses, dtype=torch.bool)
            if counted is not None:
                some = counted[start : start + micro_batch_size].to(device)
            total += losses.double().where(some, 0.0).sum().item()
            labels += int(some.sum())
    if not labels:
        raise DataError("data: no label of the held-out blocks counts; give more text")
    return total / labels


def _round_inputs(module: Any, algorithm: str, stored: dict[str, torch.Tensor]) -> None:
    from nemo_minitron.quantization import fake

    columns, scale = stored.get("pre_quant_scale"), stored.get("input_scale")

    def before(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x = arguments[0]
        if columns is not None:
            x = x * columns.to(x)
        if scale is not None and algorithm == "FP8":
            x = fake.fp8(x, scale * 448.0, clips=True)
        elif scale is not None:
            x = fake.nvfp4(x, scale * (6.0 * 448.0))
        return (x, *arguments[1:])

    if columns is not None or scale is not None:
        module.register_forward_pre_hook(before)


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                yield name, handle.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file ({error}); export it again") from error
