"""Logits of a Hugging Face directory by transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import SLIDING
from nemo_minitron.checkpoints.formats.huggingface.config import from_hf, read_json, to_hf
from nemo_minitron.checkpoints.formats.huggingface.rotary import read_scaling, scaling_type
from nemo_minitron.errors import CheckpointError
from nemo_minitron.runtime.versions import matches

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

__all__ = ["hf_logits", "hf_logits_streamed", "load_transformers"]

#: Keys that both generations have, with another meaning (YaRN's context).
_MEANT_OTHERWISE = ("max_position_embeddings",)


def hf_logits(path: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[rows, s, V]`` logits of transformers' model, weights rounded to ``dtype``, in float32 arithmetic."""
    return load_transformers(path, dtype).float().eval()(ids).logits


def load_transformers(path: Path, dtype: torch.dtype) -> Any:
    """Transformers' model of a directory, which computes what this suite reads from it.

    transformers up to 4.52 knows types of layers as a pattern only. There a model whose types have no pattern gets them
    after it is built, and computes without its cache, which goes by the pattern.
    """
    from transformers import AutoModelForCausalLM

    config, types = _typed(path)
    model = AutoModelForCausalLM.from_pretrained(path, config=config, torch_dtype=dtype, local_files_only=True)
    _type_layers(model, types)
    return model


def hf_logits_streamed(path: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """:func:`hf_logits` with the weights of one layer, or of the embedding or output layer, in memory at a time.

    The forward pass is the model's own; each part is filled before it runs and emptied afterwards.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from nemo_minitron.checkpoints.formats.huggingface.checkpoint import HFWeights, open_hf

    weights = open_hf(path).weights
    assert isinstance(weights, HFWeights), "open_hf gives no other"
    config, types = _typed(path)
    with _without_parameters():
        model: Any = AutoModelForCausalLM.from_config(config, torch_dtype=dtype)
    model = model.float().eval()
    _type_layers(model, types)
    tied = model.get_output_embeddings() if config.tie_word_embeddings else None
    names = {module: name for name, module in model.named_modules()}

    def fill(part: torch.nn.Module, args: Any) -> None:
        for name, parameter in list(part.named_parameters()):
            owner, _, last = name.rpartition(".")
            module = part.get_submodule(owner)
            place = names[model.get_input_embeddings() if module is tied else module]
            tensor = weights.stored(f"{place}.{last}")
            if tensor.shape != parameter.shape:
                raise CheckpointError(
                    f"{path}: {place}.{last} has shape {list(tensor.shape)} where transformers' model has "
                    f"{list(parameter.shape)}; its config.json belongs to another model"
                )
            filled = tensor.to(dtype).float()
            setattr(module, last, torch.nn.Parameter(filled, requires_grad=False))

    def empty(part: torch.nn.Module, args: Any, output: Any) -> None:
        part.to("meta")

    layers = list(model.get_decoder().layers)
    inside = {module for layer in layers for module in layer.modules()}
    ends = [module for module in names if module not in inside and dict(module.named_parameters(recurse=False))]
    for part in [*layers, *ends]:
        part.register_forward_pre_hook(fill)
        part.register_forward_hook(empty)
    return model(ids, use_cache=False).logits


@contextmanager
def _without_parameters() -> Iterator[None]:
    """Within the block, parameters of new modules have a shape and no memory; buffers are as ever."""
    import torch

    register = torch.nn.Module.register_parameter

    def register_empty(self: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        register(self, name, None if parameter is None else torch.nn.Parameter(parameter.to("meta"), False))

    torch.nn.Module.register_parameter = register_empty  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def _typed(path: Path) -> tuple[Any, list[str]]:
    """The configuration, and types of layers that have to be set by hand."""
    config: Any = _config(path)
    types: list[str] = getattr(config, "layer_types", None) or []
    unknown = getattr(config, "sliding_window_pattern", types) is None  # Qwen's have a list too, and no pattern
    if not (types and unknown and matches("transformers<4.53")):
        return config, []
    config.sliding_window_pattern, config.use_cache = 1, False
    return config, types


def _type_layers(model: Any, types: list[str]) -> None:
    """Give the layers of a model their types; none are given where it has them."""
    if not types:
        return
    model.generation_config.cache_implementation, model.generation_config.use_cache = None, False
    for layer, kind in zip(model.model.layers, types, strict=True):
        slides = kind == SLIDING
        layer.is_sliding = layer.self_attn.is_sliding = slides
        layer.self_attn.sliding_window = model.config.sliding_window if slides else None


def _config(path: Path) -> PretrainedConfig:
    """The configuration in a directory, by transformers; of YaRN, and what transformers 4 does not know of a file that
    transformers 5 wrote, as this suite reads it.

    See :func:`~nemo_minitron.checkpoints.formats.huggingface.rotary.read_scaling`.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    content = read_json(path / "config.json")
    if "rope_parameters" in content and matches("transformers<5"):
        try:
            spelled = to_hf(*from_hf(content, path / "config.json"), dtype="float32")
        except CheckpointError:  # of a family that another process registered; transformers' reading stands
            return config
        for key, value in spelled.items():
            # What the file says under another name (rope_parameters, num_local_experts), or not at all.
            if key not in content or key in _MEANT_OTHERWISE:
                setattr(config, key, value)
        return config
    scaling = getattr(config, "rope_scaling", None)
    # transformers 5 goes by the factor
    if scaling_type(scaling) == "yarn" and not hasattr(config, "rope_parameters"):
        config.rope_scaling, config.max_position_embeddings = read_scaling(scaling, config.max_position_embeddings)
    return config
