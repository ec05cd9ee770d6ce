"""What stages write, for their plans: bytes of checkpoints, training states and token blocks."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable
from pathlib import Path

from nemo_minitron.checkpoints.formats import FORMATS
from nemo_minitron.checkpoints.model_record import peek_architecture, peek_shape
from nemo_minitron.checkpoints.peek import peek_vocabulary
from nemo_minitron.config import AlignConfig, DataConfig
from nemo_minitron.config.hub import cached_model
from nemo_minitron.config.parts.checks import AUTO
from nemo_minitron.config.stages.distillation import TrainingConfig
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.expected import ExpectedModel
from nemo_minitron.jobs.plans import DiskNeed, human_bytes
from nemo_minitron.parsing import parse_json
from nemo_minitron.planning import Model
from nemo_minitron.planning.disk import blocks_bytes, states_at_once, training_state_bytes, weights_bytes

__all__ = [
    "aligning_needs",
    "block_needs",
    "checkpoint_need",
    "described",
    "expected",
    "readable_model",
    "training_needs",
]

#: dtypes as a safetensors file spells them, and the most bytes of its head that are read.
_CODES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_HEAD = 1 << 26


def readable_model(path: str) -> Model | None:
    """What small files say of a model of this suite's or of Hugging Face's; None where that is not known yet."""
    shape, architecture = peek_shape(path), peek_architecture(path)
    if shape is not None and architecture is not None:
        return Model(shape, architecture)
    given = Path(path).expanduser()
    place = given if given.exists() else cached_model(path)
    if place is None or not (place / "config.json").is_file():
        return None
    from nemo_minitron.checkpoints.formats.huggingface.config import from_hf, read_json

    try:
        content = read_json(place / "config.json")
        shape, architecture = from_hf(content, place / "config.json")
    except MinitronError:
        return None  # the stage says why
    dtype = str(_stored_dtype(place) or content.get("dtype") or content.get("torch_dtype"))
    return Model(shape, dataclasses.replace(architecture, dtype=dtype if dtype in _CODES.values() else "float32"))


def _stored_dtype(place: Path) -> str | None:
    """The dtype of the first tensor in a Hugging Face directory, by the head of a file; None where none tells."""
    for file in sorted(place.glob("*.safetensors")):
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                head = parse_json(stream.read(min(length, _HEAD)))
            return next(_CODES.get(entry["dtype"]) for name, entry in head.items() if name != "__metadata__")
        except (OSError, ValueError, LookupError, AttributeError, TypeError, StopIteration, struct.error):
            continue
    return None


def expected(model: Model, source: str, *, dtype: str | None = None) -> ExpectedModel:
    """A model that will be written.

    Args:
        model: its sizes and constants.
        source: the model that it is made of. It has the same tokenizer if it has as large a vocabulary.
        dtype: that it is written in; None keeps the model's own.
    """
    architecture = model.architecture if dtype is None else dataclasses.replace(model.architecture, dtype=dtype)
    try:
        vocabulary = peek_vocabulary("model", source)
    except MinitronError:
        vocabulary = None  # the stage says why
    same = vocabulary is not None and vocabulary.rows == model.shape.vocab_size
    return ExpectedModel(model.shape, architecture, vocabulary.tokenizer if vocabulary is not None and same else None)


def described(model: Model) -> str:
    """The sizes of a model in a few words."""
    shape = model.shape
    parts = [f"{shape.num_layers} layers", f"hidden {shape.hidden_size}"]
    if shape.uniform:
        parts += [f"MLP {shape.ffn_hidden_size}", f"heads {shape.num_attention_heads}/{shape.num_query_groups}"]
    else:
        parts.append("layers of sizes of their own")
    if shape.num_moe_experts is not None:
        parts.append(f"experts {shape.num_moe_experts}")
    return ", ".join([*parts, f"vocabulary {shape.vocab_size:,}"])


def checkpoint_need(what: str, path: str, model: Model, form: str, *, dtype: str | None = None) -> DiskNeed:
    """The need of one checkpoint. A format that is one file is collected from parts first, which takes it twice."""
    size = weights_bytes(model, dtype, padded=False)
    twice = form in FORMATS and FORMATS[form].suffix is not None
    return DiskNeed(what, path, 2 * size if twice else size, stay=size)


def training_needs(config: TrainingConfig, trained: Model, extra: Iterable[Model] = ()) -> list[DiskNeed]:
    """The needs of a training with NeMo 2, whose model is written when its states before the last one are gone.

    Args:
        config: of the stage.
        trained: the model that the output is made of.
        extra: further models that are trained, and part of a state.
    """
    tensor = config.parallel.tensor
    state, certain = (
        sum(training_state_bytes(model, precision, tensor=tensor) for model in (trained, *extra))
        for precision in (config.precision, _least(config.precision))
    )
    dtype = "bfloat16" if config.precision.startswith("bf16") else "float32"
    best = 0.0
    if config.keep_best is not None:
        best = sum(weights_bytes(model, dtype, tensor=tensor) for model in (trained, *extra))
    model = weights_bytes(trained, padded=False)
    count = states_at_once(config.steps, config.save_every, config.validate_every)
    few = 1 if config.max_minutes is not None else count  # it may stop after its first step
    return [
        _trained(config.output, state, count, few, model, certain=certain),
        *([DiskNeed("best weights", f"{config.output}/best", best, least=0.0)] if best else []),
        *block_needs(
            config.data,
            (config.steps + config.validation_batches) * config.global_batch_size,
        ),
    ]


def aligning_needs(config: AlignConfig, model: Model, *, states: int = 1) -> list[DiskNeed]:
    """The needs of a training with NeMo-Aligner, and of the formats that its model is written in.

    Args:
        config: of the stage.
        model: that is trained.
        states: that stay, one of each round.
    """
    state = training_state_bytes(model, "32", tensor=config.parallel.tensor)
    certain = training_state_bytes(model, _least(config.precision), tensor=config.parallel.tensor)
    unknown = config.steps is None or config.max_minutes is not None
    count = states_at_once(config.steps or 3 * config.save_every, config.save_every) + states - 1
    few = states if unknown else count
    model_bytes = weights_bytes(model, padded=False)
    needs = [_trained(config.output, state, count, few, model_bytes, certain=certain, stay=states)]
    return needs + [
        checkpoint_need(f"model ({form})", config.output, model, form)
        for form in dict.fromkeys(config.formats)
        if form != "nemo2"
    ]


def _trained(
    output: str, state: float, count: int, few: int, model: float, *, certain: float | None = None, stay: int = 1
) -> DiskNeed:
    """The need of ``count`` states, of which ``few`` are certain, and of the model.

    The model is written when only ``stay`` states are left, in the room of the others.
    """
    certain = state if certain is None else certain
    states = "training state" if count == 1 else f"training states, {count} of {human_bytes(state)} at once,"
    return DiskNeed(
        f"{states} and model",
        output,
        max(count * state, stay * state + model),
        stay=stay * state + model,
        least=max(few * certain, stay * certain + model),
    )


def _least(precision: str) -> str:
    """The precision that a training may take and that needs the least room."""
    return "bf16-mixed" if precision == AUTO else precision


def block_needs(data: DataConfig, blocks: int) -> list[DiskNeed]:
    """The need of the token blocks in the cache of texts, which may be there already."""
    size = blocks_bytes(blocks, data.sequence_length, documents=data.documents != "join")
    return [DiskNeed("token blocks", data.cache_dir, size, least=0.0)]
