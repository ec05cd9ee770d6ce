"""One dataclass per stage, and the pipeline of them.

Each module's ``__all__`` says what it offers, and each class of a stage enters itself in
:data:`~nemo_minitron.config.stages.base.STAGES`, in the order of the modules here: about that of a pipeline.

Whether paths exist is not checked here but by a stage's plan, since in a pipeline an earlier stage writes them.
"""

# ruff: isort: skip_file
from nemo_minitron.config.stages.base import *
from nemo_minitron.config.stages.checkpoints import *
from nemo_minitron.config.stages.importance import *
from nemo_minitron.config.stages.pruning import *
from nemo_minitron.config.stages.search import *
from nemo_minitron.config.stages.distillation import *
from nemo_minitron.config.stages.cache import *
from nemo_minitron.config.stages.generation import *
from nemo_minitron.config.stages.alignment import *
from nemo_minitron.config.stages.steering import *
from nemo_minitron.config.stages.evaluation import *
from nemo_minitron.config.stages.doctor import *
from nemo_minitron.config.stages.pipeline import *
