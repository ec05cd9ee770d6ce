"""The parts that several stages share: layout, process, text, and the small groups of options.

A field without a default (``MISSING``) must be given. ``faults()`` of a dataclass reports what is wrong with its own
fields (ranges, choices, contradictions); a nested dataclass reports its own faults.

Each module's ``__all__`` lists its public names.
"""

from nemo_minitron.config.parts.attributes import *
from nemo_minitron.config.parts.chat import *
from nemo_minitron.config.parts.checks import *
from nemo_minitron.config.parts.cluster import *
from nemo_minitron.config.parts.evaluation import *
from nemo_minitron.config.parts.generation import *
from nemo_minitron.config.parts.losses import *
from nemo_minitron.config.parts.on_policy import *
from nemo_minitron.config.parts.preferences import *
from nemo_minitron.config.parts.process import *
from nemo_minitron.config.parts.pruning import *
from nemo_minitron.config.parts.quantization import *
from nemo_minitron.config.parts.reconstruction import *
from nemo_minitron.config.parts.schedule import *
from nemo_minitron.config.parts.search import *
from nemo_minitron.config.parts.sizes import *
from nemo_minitron.config.parts.teachers import *
from nemo_minitron.config.parts.text import *
