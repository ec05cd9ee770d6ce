"""The weights of a training with Aligner as plain checkpoints, with the chat template that they were trained with."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints import open_checkpoint, verify, write_checkpoint
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.formats import FORMATS
from nemo_minitron.checkpoints.formats.torch_dist.reader import TorchDist, checkpoint_of
from nemo_minitron.checkpoints.model_record import ModelRecord
from nemo_minitron.checkpoints.tokenizer.files import copy_tokenizer, special_ids
from nemo_minitron.checkpoints.tokenizer.names import TEMPLATE, TEMPLATES, tokenizer_files
from nemo_minitron.checkpoints.tokenizer.spelling import chat_templates
from nemo_minitron.data.chat.templates import DEFAULT, OWN, Template
from nemo_minitron.errors import CheckpointError
from nemo_minitron.parsing import parse_json

__all__ = ["output_name", "save_trained", "templated_tokenizer", "trained_checkpoint"]

logger = logging.getLogger(__name__)


def output_name(form: str) -> str:
    """Name of a format's file or directory in a stage's output; NeMo 2, which other stages read, is ``model``."""
    return "model" if form == "nemo2" else FORMATS[form].output_name


def templated_tokenizer(source: Path, template: Template, directory: Path) -> Path:
    """A copy of a tokenizer that carries a chat template and ends its answers as the template does.

    ``apply_chat_template`` of ``transformers`` then gives the tokens that the model was trained on, and generation
    stops where an answer ended. Of a tokenizer with several templates that is the default one; the others stay, unless
    the training's is none of them.

    Args:
        source: directory of the tokenizer.
        template: the chat template of the training.
        directory: of the copy; emptied first.

    Raises:
        CheckpointError: if the tokenizer's configuration cannot be read.
    """
    shutil.rmtree(directory, ignore_errors=True)
    copy_tokenizer(source, directory)
    path = directory / "tokenizer_config.json"
    try:
        content: dict[str, Any] = parse_json(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source / path.name} cannot be read ({error}); restore the file") from error
    named = chat_templates(directory, content, tokenizer_files(directory)) if template.name.startswith(OWN) else {}
    named[DEFAULT] = template.jinja
    listed = [{"name": name, "template": text} for name, text in named.items()]
    content["chat_template"] = listed if len(named) > 1 else template.jinja
    if template.ends:
        content["eos_token"] = template.ends[0]
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for other in (TEMPLATE, "chat_template.json"):  # they would win over the configuration
        (directory / other).unlink(missing_ok=True)
    shutil.rmtree(directory / TEMPLATES, ignore_errors=True)
    special = directory / "special_tokens_map.json"
    if template.ends and special.is_file():
        tokens = parse_json(special.read_text(encoding="utf-8")) | {"eos_token": template.ends[0]}
        special.write_text(json.dumps(tokens, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return directory


def trained_checkpoint(
    source: Checkpoint, last: Path, *, tokenizer: Path | None, lineage: dict[str, Any]
) -> Checkpoint:
    """The model in a training checkpoint of NeMo 1, without the optimizer state.

    Args:
        source: the checkpoint that the training started from; it gives sizes and constants.
        last: the distributed checkpoint.
        tokenizer: that goes with the model.
        lineage: added to the source's.

    Raises:
        CheckpointError: if it does not hold such a model.
    """
    architecture = source.architecture
    if tokenizer is not None:
        end = special_ids(tokenizer).get("eos_token_id", architecture.eos_token_id)
        architecture = dataclasses.replace(architecture, eos_token_id=end)
    record = ModelRecord(source.shape, architecture, {**source.lineage, **lineage})
    return checkpoint_of(
        TorchDist(last),
        record,
        lambda rows: (source.shape, architecture),
        tokenizer=tokenizer,
        path=last,
        form="nemo",
    )


def save_trained(
    source: Checkpoint,
    last: Path,
    output: Path,
    *,
    template: Template | None,
    lineage: dict[str, Any],
    formats: list[str],
    check: bool = True,
) -> dict[str, Any]:
    """Write ``model`` (NeMo 2) and the other formats asked for below ``output``. One rank calls it.

    Args:
        source: the checkpoint that the training started from.
        last: its last training checkpoint.
        output: of the stage.
        template: of the conversations that it was trained on; None keeps the tokenizer as it is.
        lineage: what was done, for ``minitron.json``.
        formats: besides NeMo 2, names of formats: "hf", "nemo".
        check: load each of these with its format's own library and compare its logits with the NeMo 2 model's.

    Returns:
        For each format ``path`` and ``max_difference`` of the logits (None for NeMo 2 itself, or unchecked).

    Raises:
        CheckpointError: if the logits of a written model differ.
    """
    tokenizer = source.tokenizer
    if tokenizer is not None and template is not None:
        tokenizer = templated_tokenizer(tokenizer, template, output / "tokenizer")
    trained = trained_checkpoint(source, last, tokenizer=tokenizer, lineage=lineage)
    dtype = source.architecture.dtype
    metadata: dict[str, Any] = {}
    model = trained
    for form in dict.fromkeys(["nemo2", *formats]):
        path = output / output_name(form)
        written = write_checkpoint(model, path, form, dtype=dtype, overwrite=True)
        difference = None
        if form == "nemo2":
            model = open_checkpoint(path)
        elif check:
            difference = verify(model, written).max_difference
        metadata[form] = {"path": str(path), "max_difference": difference}
        logger.info("wrote %s", path)
    return metadata
