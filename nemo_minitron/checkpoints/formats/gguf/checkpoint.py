"""GGUF -> Hugging Face directory: a quantized Llama file becomes an ordinary checkpoint.

This is a converter, without lazy reading: transformers dequantizes the whole model at once, in float32.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoints.formats.huggingface.checkpoint import open_hf
from nemo_minitron.checkpoints.formats.huggingface.config import from_hf, to_hf
from nemo_minitron.checkpoints.tokenizer.files import check_tokenizer
from nemo_minitron.config.parts import SHARD_SIZE
from nemo_minitron.errors import CheckpointError
from nemo_minitron.runtime.atomic import write_aside
from nemo_minitron.runtime.files import take_umask
from nemo_minitron.runtime.requirements import require

if TYPE_CHECKING:
    from nemo_minitron.checkpoints.base import Checkpoint

__all__ = ["convert_gguf", "is_gguf"]

MAGIC = b"GGUF"
FIELDS = (
    "general.architecture",
    "tokenizer.chat_template",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.unknown_token_id",
)
"""What is read of a file's header beside what transformers reads."""

SCALING = "llama.rope.scaling."
"""Begins the fields of RoPE scaling."""

FREQUENCIES = "rope_freqs.weight"
"""Divisors of the frequencies of RoPE, a tensor."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Used where the file carries no template of its own but its vocabulary has ChatML's markers."""

DIGIT_SPLITTERS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
"""Values of ``tokenizer.ggml.pre`` for which llama.cpp splits numbers into single digits before byte-level BPE."""


def is_gguf(path: Path) -> bool:
    """Whether a path has the name of a GGUF file."""
    return path.suffix == ".gguf" and not path.is_dir()


def convert_gguf(
    source: str | Path, target: str | Path, *, dtype: str = "float32", overwrite: bool = False
) -> Checkpoint:
    """Convert a GGUF file of the Llama family into a HF directory and open it.

    The weights are dequantized by transformers. Its tokenizer conversion loses the splitting of digits, the end and
    padding tokens, and that no first token is to be prepended; they are put back from the file's header. Where the
    header says that the tokenizer splits digits, the pre-tokenizer is ``Sequence[Digits(individual), ByteLevel]``.

    Args:
        source: the ``.gguf`` file.
        target: the directory to write.
        dtype: of the tensors written. Quantized weights do not fit bfloat16 exactly.
        overwrite: replace what stands at ``target``.

    Raises:
        CheckpointError: if the file is missing, truncated, or of another architecture; if ``target`` exists; if the
            disk is full.
        MissingDependency: without the ``gguf`` package.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    fields = _fields(source)
    if fields["general.architecture"] != "llama":
        raise CheckpointError(
            f"{source}: architecture {fields['general.architecture']!r} is not supported; supported: 'llama'"
        )
    with write_aside(target, overwrite=overwrite, error=CheckpointError) as partial:
        partial.mkdir(parents=True)
        content = _write_model(source, partial, dtype, _rotary_scaling(source, fields))
        _write_tokenizer(content, partial, fields)
    checkpoint = open_hf(target)
    assert checkpoint.tokenizer is not None
    check_tokenizer(checkpoint.tokenizer, checkpoint.shape.vocab_size)
    return checkpoint


def _fields(source: Path) -> dict[str, Any]:
    """The header's :data:`FIELDS` and all of :data:`SCALING` (None: absent); under :data:`FREQUENCIES`, whether those
    are there.
    """
    require("gguf", for_="reading GGUF")
    from gguf import GGUFReader

    if not source.is_file():
        raise CheckpointError(f"{source} does not exist; check the path")
    with open(source, "rb") as file:
        if file.read(4) != MAGIC:
            raise CheckpointError(f"{source} is not a GGUF file")
    try:
        reader = GGUFReader(source, "r")
        fields = {key: field.contents() if (field := reader.get_field(key)) is not None else None for key in FIELDS}
        fields |= {key: field.contents() for key, field in reader.fields.items() if key.startswith(SCALING)}
        fields[FREQUENCIES] = any(tensor.name == FREQUENCIES for tensor in reader.tensors)
    except (ValueError, IndexError, KeyError, OSError, TypeError) as error:
        raise CheckpointError(f"{source} is truncated or damaged ({error}); fetch it again") from error
    return fields


def _rotary_scaling(source: Path, fields: dict[str, Any]) -> dict[str, Any] | None:
    """HF's ``rope_scaling``, which transformers does not read out of a GGUF file.

    Raises:
        CheckpointError: for a scaling that the header does not describe in full, or that no model here has.
    """
    if fields[FREQUENCIES]:
        raise CheckpointError(
            f"{source}: {FREQUENCIES}: the frequencies of its RoPE are scaled one by one (as of Llama 3.1 and later), "
            "and the file does not say how; import the model's Hugging Face directory"
        )
    given = {key.removeprefix(SCALING): value for key, value in fields.items() if key.startswith(SCALING)}
    kind = given.pop("type", None) or "none"
    given.pop("finetuned", None)
    scaling = {"factor": given.pop("factor", None), "original_max_position_embeddings": None}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = given.pop("original_context_length", None)
    if kind not in ("none", "linear", "yarn") or (given and kind != "none"):
        named = ", ".join(f"{SCALING}{key}={value!r}" for key, value in {"type": kind, **given}.items())
        raise CheckpointError(f"{source}: {named} is not supported; import the model's Hugging Face directory")
    if kind == "none":
        return None
    return {"rope_type": kind, **{key: value for key, value in scaling.items() if value is not None}}


def _write_model(source: Path, directory: Path, dtype: str, scaling: dict[str, Any] | None) -> dict[str, Any]:
    """Write weights and configuration; return what transformers reads of the header: configuration and tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from nemo_minitron.checkpoints.weights import torch_dtype

    # ``from_pretrained(gguf_file=...)`` is these two calls; it also wants accelerate, and its model refuses to be saved
    try:
        content = load_gguf_checkpoint(str(source), return_tensors=False)
        more = {"architectures": ["LlamaForCausalLM"], "rope_scaling": scaling}
        shape, architecture = from_hf(content["config"] | more, source)
        # GGUF stores the epsilon as float32: 9.99999974e-06 was written as 1e-05
        architecture = dataclasses.replace(architecture, norm_epsilon=float(f"{architecture.norm_epsilon:.6g}"))
        config = to_hf(shape, architecture, dtype=dtype)
        with torch.device("meta"):
            model = LlamaForCausalLM(
                LlamaConfig(**{key: value for key, value in config.items() if key != "torch_dtype"})
            )
        tensors = load_gguf_checkpoint(str(source), return_tensors=True, model_to_load=model)["tensors"]
    except (ValueError, KeyError, IndexError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{source} cannot be read by transformers ({str(error).splitlines()[0]})") from error
    if shape.tied_embeddings:
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.to(torch_dtype(dtype)).save_pretrained(directory, max_shard_size=SHARD_SIZE)
    for file in directory.glob("*.safetensors"):
        take_umask(file)
    return content


def _write_tokenizer(content: dict[str, Any], directory: Path, fields: dict[str, Any]) -> None:
    """The tokenizer by transformers, with what its conversion loses put back from the header."""
    from tokenizers import pre_tokenizers, processors
    from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast
    from transformers.integrations.ggml import convert_gguf_tokenizer

    # ``from_pretrained(gguf_file=...)`` is this; it also parses the header twice more, seconds for a real vocabulary
    converted, named = convert_gguf_tokenizer(content["config"]["model_type"], content["tokenizer"])
    settings = content["tokenizer_config"] | named
    backend = LlamaTokenizerFast(tokenizer_object=converted, **settings).backend_tokenizer
    if fields["tokenizer.ggml.pre"] in DIGIT_SPLITTERS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if fields["tokenizer.ggml.add_bos_token"] is False:
        # the conversion to a Llama tokenizer prepends the first token to every text all the same
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    # transformers 4.51 takes the text of the first token for the end token as well, and leaves the padding token out
    special = {
        f"{kind}_token": backend.id_to_token(number)
        for kind, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (number := fields[f"tokenizer.ggml.{name}_token_id"]) is not None
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    tokenizer.chat_template = fields["tokenizer.chat_template"]
    if tokenizer.chat_template is None and {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.get_vocab()):
        tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(directory)
