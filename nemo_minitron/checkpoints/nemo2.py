"""The NeMo 2 door: a directory with ``weights/`` (a distributed checkpoint) and ``context/`` (what NeMo rebuilds from).

Reading takes ``context/model.yaml`` as data: ``context/io.json`` can name any Python symbol, and NeMo calls what it
names, so it is never opened here. Writing leaves the context to NeMo's own ``io_dump``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.record import read_record, write_record
from nemo_minitron.checkpoints.tokenizer import (
    check_tokenizer,
    copy_tokenizer,
    find_tokenizer,
    special_ids,
    token_count,
)
from nemo_minitron.checkpoints.weights import torch_dtype
from nemo_minitron.errors import CheckpointError, MissingDependency, ShapeError
from nemo_minitron.shape import Architecture, ModelShape

__all__ = ["open_nemo2", "padded", "parse_yaml", "write_nemo2"]

CONFIG_CLASSES = ("LlamaConfig", "Llama2Config", "Llama3", "CodeLlamaConfig", "MistralConfig", "GPTConfig")
"""Beginnings of the names of NeMo's configuration classes whose models compute what a Llama model does."""

REQUIRED: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "qk_layernorm": False,
    "layernorm_zero_centered_gamma": False,
    "multi_latent_attention": False,
    "num_moe_experts": None,
    "seq_len_interpolation_factor": None,
}
"""What makes a NeMo model a Llama model; a configuration that says otherwise is refused, one that is silent is not."""

NO_FUSIONS = dict.fromkeys(
    (
        "apply_rope_fusion",
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "cross_entropy_loss_fusion",
        "gradient_accumulation_fusion",
        "masked_softmax_fusion",
        "persist_layer_norm",
    ),
    False,
)
"""Written contexts must load where there is neither CUDA nor Transformer Engine; a recipe on GPUs turns them on."""

COMMON = {"epoch": 0, "global_step": 0, "state_dict": {}, "loops": {}, "callbacks": {}, "optimizer_states": []}


def padded(vocab_size: int, multiple: int) -> int:
    """Vocabulary rows as NeMo stores them at TP 1: the next multiple."""
    return -(-vocab_size // multiple) * multiple


def open_nemo2(path: Path) -> Checkpoint:
    """Open a NeMo 2 checkpoint directory, ours or NeMo's own. Tensors are read later, one at a time.

    The true vocabulary size is ``minitron.json``'s; without one it is the configuration's ``vocab_size``, else the
    tokenizer's, else the stored rows.

    Raises:
        CheckpointError: a missing or damaged part, a foreign architecture, sizes that do not fit the tensors, a
            tokenizer that does not fit.
    """
    from nemo_minitron.checkpoints.torch_dist import TorchDist, checkpoint_of

    for part in ("weights", "context"):
        if not (path / part).is_dir():
            raise CheckpointError(f"{path / part} is missing; a NeMo 2 checkpoint has weights/ and context/")
    source = path / "context" / "model.yaml"
    try:
        content = parse_yaml(source.read_bytes(), source)
    except FileNotFoundError:
        raise CheckpointError(f"{source} is missing; the checkpoint's context is incomplete") from None
    tokenizer = _find_tokenizer(path / "context", content)
    store = TorchDist(path / "weights")
    return checkpoint_of(
        store,
        read_record(path),
        lambda rows: _from_config(content, source, rows, tokenizer),
        tokenizer=tokenizer,
        path=path,
        form="nemo2",
    )


def write_nemo2(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    dtype: str,
    vocab_multiple: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Write a NeMo 2 directory into ``directory`` (which this creates; callers write aside).

    Raises:
        CheckpointError: if the tokenizer does not fit the vocabulary.
        MissingDependency: where NeMo cannot be imported.
    """
    from nemo_minitron.checkpoints.torch_dist_writer import write_torch_dist

    if checkpoint.tokenizer is not None:
        check_tokenizer(checkpoint.tokenizer, checkpoint.shape.vocab_size)
    directory.mkdir(parents=True)
    rows = padded(checkpoint.shape.vocab_size, vocab_multiple)
    write_torch_dist(
        checkpoint,
        directory / "weights",
        prefix="module.",
        dtype=dtype,
        vocab_rows=rows,
        common=COMMON,
        progress=progress,
    )
    _write_context(checkpoint, directory / "context", dtype=dtype, rows=rows, multiple=vocab_multiple)
    write_record(checkpoint, directory, dtype=dtype, form="nemo2")


def llama_config(shape: ModelShape, architecture: Architecture, *, dtype: str, multiple: int, rows: int | None) -> Any:
    """NeMo's ``LlamaConfig`` (``Llama31Config`` where RoPE is scaled) for these sizes.

    Args:
        shape, architecture: the model's.
        dtype: of the parameters.
        multiple: what NeMo pads the tokenizer's vocabulary to (times TP).
        rows: fixed number of vocabulary rows; None lets NeMo derive it from the tokenizer for any TP.
    """
    from nemo.collections.llm.gpt.model.llama import Llama31Config, LlamaConfig

    base = architecture.rotary_base
    values: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.head_dim,
        "share_embeddings_and_output_weights": shape.tied_embeddings,
        "layernorm_epsilon": architecture.norm_epsilon,
        "rotary_base": int(base) if float(base).is_integer() else base,
        "seq_length": architecture.max_position_embeddings,
        "make_vocab_size_divisible_by": multiple,
        "vocab_size": rows,
        "fp16": dtype == "float16",
        "bf16": dtype == "bfloat16",
        "params_dtype": torch_dtype(dtype),
        "use_cpu_initialization": True,
        **NO_FUSIONS,
    }
    if architecture.rotary_scaling is None:
        return LlamaConfig(**values)
    scaling = architecture.rotary_scaling
    return Llama31Config(
        **values,
        scale_factor=scaling["factor"],
        low_freq_factor=scaling["low_freq_factor"],
        high_freq_factor=scaling["high_freq_factor"],
        old_context_len=scaling["original_max_position_embeddings"],
    )


def _write_context(checkpoint: Checkpoint, directory: Path, *, dtype: str, rows: int, multiple: int) -> None:
    """``context/`` through NeMo's ``io_dump``: io.json, model.yaml and a copy of the tokenizer."""
    try:
        from nemo import lightning as nl
        from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
        from nemo.collections.llm.gpt.model.llama import LlamaModel
        from nemo.lightning.io.pl import TrainerContext
    except ImportError as error:
        raise MissingDependency(
            f"writing a NeMo 2 checkpoint needs nemo-toolkit, which cannot be imported ({error})"
        ) from error

    shape = checkpoint.shape
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer: Any = None
        fixed: int | None = rows
        if checkpoint.tokenizer is not None:
            # NeMo copies the whole directory and keeps its name; hand it one that holds the tokenizer alone
            copy = Path(scratch) / "nemo_tokenizer"
            copy_tokenizer(checkpoint.tokenizer, copy)
            tokenizer = AutoTokenizer(str(copy))
            if tokenizer.vocab_size == shape.vocab_size:
                fixed = None
        config = llama_config(shape, checkpoint.architecture, dtype=dtype, multiple=multiple, rows=fixed)
        context = TrainerContext(
            model=LlamaModel(config, tokenizer=tokenizer),
            trainer=nl.Trainer(devices=1, accelerator="cpu", strategy=nl.MegatronStrategy(ckpt_save_optimizer=False)),
            extra={},
        )
        context.io_dump(directory, yaml_attrs=["model"])


def _from_config(
    content: dict[str, Any], source: Path, rows: int, tokenizer: Path | None
) -> tuple[ModelShape, Architecture]:
    """Sizes and constants out of a ``model.yaml`` that NeMo wrote."""
    config = content.get("config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{source} has no model configuration; it is not a NeMo 2 language model's")
    name = str(config.get("_target_", "unknown")).rsplit(".", 1)[-1]
    if not name.startswith(CONFIG_CLASSES):
        raise CheckpointError(
            f"{source}: architecture {name} is not supported; supported: {', '.join(CONFIG_CLASSES)} and their sizes"
        )
    activation = config.get("activation_func")
    activation = activation.get("_target_") if isinstance(activation, dict) else activation
    found = [
        f"{key}={config[key]!r} is not supported (needed: {value!r})"
        for key, value in REQUIRED.items()
        if key in config and config[key] != value
    ]
    if activation is not None and not str(activation).endswith("silu"):
        found.append(f"activation_func={activation} is not supported (needed: silu)")
    window = config.get("window_size")
    if window is not None and window[0] + 1 < config["seq_length"]:
        found.append(f"window_size={window} is not supported: sliding-window attention is not in the Llama table")
    if found:
        raise CheckpointError(f"{source}: " + "; ".join(found))
    special = special_ids(tokenizer) if tokenizer is not None else {}
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        vocab = config.get("vocab_size")
        if vocab is None:
            vocab = token_count(tokenizer) if tokenizer is not None else rows
        shape = ModelShape(
            num_layers=config["num_layers"],
            hidden_size=hidden,
            ffn_hidden_size=config["ffn_hidden_size"],
            num_attention_heads=heads,
            num_query_groups=config["num_query_groups"] or heads,
            head_dim=config["kv_channels"] or hidden // heads,
            vocab_size=vocab,
            tied_embeddings=config["share_embeddings_and_output_weights"],
        )
        architecture = Architecture(
            family="llama",
            norm_epsilon=config["layernorm_epsilon"],
            rotary_base=float(config["rotary_base"]),
            rotary_scaling=_rotary_scaling(config),
            max_position_embeddings=config["seq_length"],
            bos_token_id=special.get("bos_token_id"),
            eos_token_id=special.get("eos_token_id"),
            pad_token_id=special.get("pad_token_id"),
        )
    except KeyError as error:
        raise CheckpointError(f"{source} lacks {error}; it is not a complete Llama configuration") from None
    except (ShapeError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source}: {error}") from error
    return shape, architecture


def _rotary_scaling(config: dict[str, Any]) -> dict[str, Any] | None:
    """HF's ``rope_scaling`` for a ``Llama31Config``; its classes are the only ones with a ``scale_factor``."""
    if "scale_factor" not in config:
        return None
    return {
        "rope_type": "llama3",
        "factor": config["scale_factor"],
        "low_freq_factor": config["low_freq_factor"],
        "high_freq_factor": config["high_freq_factor"],
        "original_max_position_embeddings": config["old_context_len"],
    }


def _find_tokenizer(context: Path, content: dict[str, Any]) -> Path | None:
    """The HF tokenizer inside ``context/``; a name that leads out of it is not followed."""
    described = content.get("tokenizer")
    name = described.get("pretrained_model_name") if isinstance(described, dict) else None
    candidates = [context / name] if isinstance(name, str) and name else []
    for candidate in [*candidates, context / "nemo_tokenizer"]:
        inside = candidate.resolve().is_relative_to(context.resolve())
        if inside and candidate.is_dir() and (found := find_tokenizer(candidate)):
            return found
    return None


def parse_yaml(data: bytes, path: Path) -> dict[str, Any]:
    """A YAML mapping as plain data; ``path`` names it in messages.

    Raises:
        CheckpointError: if it is not that; tags that build Python objects are refused.
    """
    import yaml

    try:
        content = yaml.safe_load(data)
    except (ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read as plain YAML ({reason}); restore the file") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a model description; restore the file")
    return content
