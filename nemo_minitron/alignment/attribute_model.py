"""A model that predicts the attribute values of an answer: its files, and its predictions, without NeMo-Aligner.

NeMo-Aligner trains it (:mod:`nemo_minitron.alignment.reward`). The decoder is saved as an ordinary checkpoint and the
regression head beside it, so that predictions run on a plain Megatron model under any layout.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.data.chat.attributes import AttributeSchema
from nemo_minitron.errors import CheckpointError
from nemo_minitron.parsing import parse_json
from nemo_minitron.runtime.files import replace_file

if TYPE_CHECKING:
    import torch
    from megatron.core.models.gpt import GPTModel

    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.runtime.groups import Groups

__all__ = ["AttributeModel", "AttributeScorer", "load_attribute_model", "save_attribute_model"]

_HEAD = "head.safetensors"
_FILE = "attributes.json"
_PAD_TO = 16  # lengths are rounded up to a multiple, so that few shapes occur


@dataclass(frozen=True)
class AttributeModel:
    """The attribute model in the output of ``minitron reward``.

    Attributes:
        model: the decoder's checkpoint.
        schema: attributes in the order of the head's outputs.
        template: name of the chat template that it was trained with.
        derived: whether its training labels were derived by rules.
        weight, bias: of the head, ``[A, h]`` and ``[A]`` float32.
    """

    model: Path
    schema: AttributeSchema
    template: str
    derived: bool
    weight: torch.Tensor
    bias: torch.Tensor


def save_attribute_model(
    directory: Path, schema: AttributeSchema, template: str, *, derived: bool, weight: torch.Tensor, bias: torch.Tensor
) -> None:
    """Write head and description beside the decoder, which lies in ``directory/model`` already.

    Args:
        directory: output of the stage.
        schema, template, derived, weight, bias: as :class:`AttributeModel`.
    """
    from safetensors.torch import save

    replace_file(directory / _HEAD, save({"weight": weight.float().contiguous(), "bias": bias.float().contiguous()}))
    content = {"version": 1, "schema": dataclasses.asdict(schema), "template": template, "derived": derived}
    replace_file(directory / _FILE, json.dumps(content, indent=2) + "\n")


def load_attribute_model(directory: str | Path) -> AttributeModel:
    """Read what :func:`save_attribute_model` wrote.

    Raises:
        CheckpointError: if it is missing or damaged, or its files do not belong together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    directory = Path(directory)
    if not (directory / _FILE).is_file():
        raise CheckpointError(f"{directory}: holds no {_FILE}; name the output of `minitron reward`")
    try:
        content = parse_json((directory / _FILE).read_text())
        schema = AttributeSchema(**content["schema"] | {"names": tuple(content["schema"]["names"])})
        template, derived = str(content["template"]), bool(content["derived"])
        head = load_file(directory / _HEAD)
        weight, bias = head["weight"], head["bias"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: not a readable attribute model ({error}); train it again") from None
    if weight.shape[0] != len(schema.names) or bias.shape != weight.shape[:1]:
        raise CheckpointError(
            f"{directory}: its head has {weight.shape[0]} outputs for {len(schema.names)} attributes; train it again"
        )
    return AttributeModel(directory / "model", schema, template, derived, weight, bias)


class AttributeScorer:
    """An attribute model, live on this process group.

    Args:
        attribute_model: as :func:`load_attribute_model` gives it.
        groups: of this process.

    Attributes:
        checkpoint: the decoder's.
        schema: the attributes, in the order of the columns of a score.

    Raises:
        CheckpointError: if head and decoder do not fit.
    """

    def __init__(self, attribute_model: AttributeModel, groups: Groups) -> None:
        from nemo_minitron.checkpoints import load_into, open_checkpoint
        from nemo_minitron.runtime.model import build_model

        self.checkpoint: Checkpoint = open_checkpoint(attribute_model.model)
        # The last token's state is needed whole, so the sequence is not split, whatever the layout says.
        groups = groups.without_sequence_parallel()
        self.schema, self.template, self.groups = attribute_model.schema, attribute_model.template, groups
        shape = self.checkpoint.shape
        if attribute_model.weight.shape[1] != shape.hidden_size:
            raise CheckpointError(
                f"{attribute_model.model}: has hidden_size={shape.hidden_size}, its head takes "
                f"{attribute_model.weight.shape[1]}; train it again"
            )
        self.chunks: list[GPTModel] = build_model(shape, self.checkpoint.architecture, groups)
        load_into(self.chunks, self.checkpoint, groups)
        for chunk in self.chunks:
            chunk.eval().requires_grad_(False)
        device = next(self.chunks[0].parameters()).device
        self.weight, self.bias = attribute_model.weight.to(device), attribute_model.bias.to(device)

    def scores(
        self,
        rows: Sequence[Sequence[int]],
        *,
        micro_batch_size: int,
        progress: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Predicted values of each row. Collective: every rank calls it and gets all values.

        Args:
            rows: tokens of whole conversations, the same on every rank; the state after the last token is read.
            micro_batch_size: rows of one forward pass; rows of like length run together.
            progress: called with the number of rows done since its last call.

        Returns:
            ``[n, A]`` float32 on the CPU, on the scale of the schema (not clamped).
        """
        import torch
        import torch.distributed as dist

        groups = self.groups
        predictions = torch.zeros(len(rows), len(self.schema.names), dtype=torch.float64)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        batches = [order[start : start + micro_batch_size] for start in range(0, len(order), micro_batch_size)]
        with torch.no_grad():
            for number, batch in enumerate(batches):
                if number % groups.layout.data == groups.dp_rank:
                    values = self._forward([rows[row] for row in batch])
                    if values is not None and groups.tp_rank == 0:
                        predictions[batch] = values.double().cpu()
                if progress is not None:
                    progress(len(batch))
        # One rank has each row; the sum over the rest, which are zero, gives it to all.
        device = self.weight.device
        predictions = predictions.to(device)
        dist.all_reduce(predictions)
        return predictions.float().cpu()

    def _forward(self, rows: Sequence[Sequence[int]]) -> torch.Tensor | None:
        """``[b, A]`` on the last stage, None on the others."""
        import torch
        from megatron.core.pipeline_parallel import get_forward_backward_func

        lengths = torch.tensor([len(row) for row in rows])
        width = -(-int(lengths.max()) // _PAD_TO) * _PAD_TO
        tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = torch.tensor(row)  # causal: what fills up changes nothing before it
        device = self.weight.device
        tokens, last = tokens.to(device), (lengths - 1).to(device)
        positions = torch.arange(width, device=device).expand_as(tokens)

        def step(_: Any, model: GPTModel) -> tuple[torch.Tensor, Any]:
            # The decoder's own end (its final norm) stays; only the logits, which nobody needs, are left out.
            whole, model.post_process = model.post_process, False
            try:
                return model(tokens, positions, None), read
            finally:
                model.post_process = whole

        def read(states: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
            state = states[last, torch.arange(len(rows), device=device)].float()  # [s, b, h] -> [b, h]
            return state @ self.weight.T + self.bias

        out = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[None] * len(self.chunks) if len(self.chunks) > 1 else None,
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=1,
            seq_length=width,
            micro_batch_size=len(rows),
            forward_only=True,
            collect_non_loss_data=True,
        )
        return out[0] if out else None


def to_values(scores: torch.Tensor, schema: AttributeSchema) -> list[dict[str, int]]:
    """Predictions ``[n, A]`` as whole numbers on the schema's scale."""
    whole = scores.round().clamp(0, schema.highest).int().tolist()
    return [dict(zip(schema.names, row, strict=True)) for row in whole]
