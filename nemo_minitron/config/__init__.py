"""The settings of each stage, and their strict reading, with every fault in one error.

:mod:`~nemo_minitron.config.parts` and :mod:`~nemo_minitron.config.stages` hold the dataclasses,
:mod:`~nemo_minitron.config.load` reads YAML files and ``key=value`` overrides into them. Nothing here imports torch, so
that configuration errors are reported at once.

All public names of the two packages can be imported from here, too.
"""

from nemo_minitron.config.load import (
    find_config,
    load,
    load_doctor,
    load_part,
    load_pipeline,
    load_slurm,
    shipped_configs,
    shipped_slurm,
)
from nemo_minitron.config.parts import *
from nemo_minitron.config.plugins import import_plugins
from nemo_minitron.config.slurm import SlurmConfig
from nemo_minitron.config.stages import *

# Last: what it imports takes names from here.
import_plugins()
