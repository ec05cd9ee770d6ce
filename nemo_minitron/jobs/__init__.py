"""Runs of stages: their processes, folders, records and outputs. See ``docs/architecture.md``.

``local`` runs a stage on this machine, ``pipeline`` several, ``nested`` those that a stage starts, ``in_place`` one in
processes that are there already, ``slurm_submit`` on a cluster. ``worker`` is what each rank runs; ``launch`` and
``warm`` start ranks. ``records``, ``outputs`` and ``reuse`` say what is done, what is kept and what comes back.
A stage is known by its name alone: nothing here imports one.
"""
