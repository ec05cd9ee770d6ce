"""The parts that several stages share: layout, process, text, and the small groups of options.

A field without a default (``MISSING``) must be given. ``faults()`` reports what a dataclass's own fields can show to be
wrong (ranges, choices, contradictions); faults of nested dataclasses are theirs.

Each module's ``__all__`` says what it offers.
"""

from nemo_minitron.config.parts.attributes import *
from nemo_minitron.config.parts.chat import *
from nemo_minitron.config.parts.checks import *
from nemo_minitron.config.parts.cluster import *
from nemo_minitron.config.parts.evaluation import *
from nemo_minitron.config.parts.generation import *
from nemo_minitron.config.parts.losses import *
from nemo_minitron.config.parts.preferences import *
from nemo_minitron.config.parts.process import *
from nemo_minitron.config.parts.pruning import *
from nemo_minitron.config.parts.schedule import *
from nemo_minitron.config.parts.search import *
from nemo_minitron.config.parts.text import *
