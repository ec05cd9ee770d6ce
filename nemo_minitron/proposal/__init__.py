"""A whole pipeline for a model, a text and a machine that nobody has seen before: what ``minitron init`` proposes.

:func:`propose` looks at what it is given and makes every choice. Each kind of rule has a module, with the sources of
its rules: :mod:`~nemo_minitron.proposal.shape`, :mod:`~nemo_minitron.proposal.schedule`,
:mod:`~nemo_minitron.proposal.layout`. Importing this imports no torch.
"""

from __future__ import annotations

from nemo_minitron.proposal.machine import Machine, parse_cluster, this_machine
from nemo_minitron.proposal.plan import Plan, Request
from nemo_minitron.proposal.propose import Proposal, propose

__all__ = ["Machine", "Plan", "Proposal", "Request", "parse_cluster", "propose", "this_machine"]
