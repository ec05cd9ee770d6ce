"""Running a model as a user would: engines that are timed side by side, and a conversation in a terminal.

See ``docs/serving.md``. Torch and the engines are imported when a name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_minitron._lazy import lazy

if TYPE_CHECKING:
    from nemo_minitron.serving.chat import Conversation, open_conversation
    from nemo_minitron.serving.engine import Engine, Timing
    from nemo_minitron.serving.engines import open_engine
    from nemo_minitron.serving.process import EngineProcess
    from nemo_minitron.serving.rounds import Load, Subject, measure

__all__ = [
    "Conversation",
    "Engine",
    "EngineProcess",
    "Load",
    "Subject",
    "Timing",
    "measure",
    "open_conversation",
    "open_engine",
]

__getattr__ = lazy(
    __name__,
    {
        "Conversation": "chat",
        "Engine": "engine",
        "EngineProcess": "process",
        "Load": "rounds",
        "Subject": "rounds",
        "Timing": "engine",
        "measure": "rounds",
        "open_conversation": "chat",
        "open_engine": "engines",
    },
)
