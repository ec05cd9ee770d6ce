"""A dataclass for each stage, and for the pipeline of stages.

Each module's ``__all__`` lists its public names, and each class of a stage registers itself in
:data:`~nemo_minitron.config.stages.base.STAGES`, in the order of the modules here, which is about the order of a
pipeline.

Whether paths exist is not checked here but by a stage's plan, since in a pipeline an earlier stage writes them.
"""

# ruff: isort: skip_file
from nemo_minitron.config.stages.base import *
from nemo_minitron.config.stages.checkpoints import *
from nemo_minitron.config.stages.importance import *
from nemo_minitron.config.stages.pruning import *
from nemo_minitron.config.stages.reconstruction import *
from nemo_minitron.config.stages.search import *
from nemo_minitron.config.stages.distillation import *
from nemo_minitron.config.stages.cache import *
from nemo_minitron.config.stages.generation import *
from nemo_minitron.config.stages.alignment import *
from nemo_minitron.config.stages.steering import *
from nemo_minitron.config.stages.evaluation import *
from nemo_minitron.config.stages.benchmark import *
from nemo_minitron.config.stages.doctor import *
from nemo_minitron.config.stages.pipeline import *
