"""NeMo 2 configurations of models whose layers' types follow no pattern of NeMo's, as depth pruning leaves them.

As in :mod:`~nemo_minitron.checkpoints.formats.nemo2.scaled`, the context of a checkpoint names the class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

from nemo.collections.llm.gpt.model.gemma3 import Gemma3Config1B

from nemo_minitron.runtime.device import here
from nemo_minitron.runtime.nemo_layer_types import architecture_of, configure_model

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = ["ListedGemma3Config1B"]


@dataclass
class ListedGemma3Config1B(Gemma3Config1B):
    """A ``Gemma3Config`` with a list of the layers' types.

    Attributes:
        layer_types: as in :class:`~nemo_minitron.architecture.Architecture`.
    """

    layer_types: Optional[list[str]] = None  # noqa: UP045 (NeMo evaluates it)

    def configure_model(
        self, tokenizer: Any, pre_process: Any = None, post_process: Any = None, vp_stage: int | None = None
    ) -> GPTModel:
        """The suite's own layers, with the types of the list."""
        return configure_model(
            self,
            architecture_of(self, "gemma3"),
            tokenizer,
            transformer_engine=here().transformer_engine,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
