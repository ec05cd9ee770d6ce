"""Runs of stages: their processes, folders, records and outputs. See ``docs/architecture.md``.

``local`` runs a stage on this machine, ``pipeline`` several stages, ``nested`` the stages that a stage starts,
``in_place`` a stage in processes that another launcher started, ``slurm_submit`` a pipeline on a cluster. Each rank
runs ``worker``; ``launch`` and ``warm`` start ranks. ``output`` and ``records`` keep what is done. Nothing here imports
a stage: stages are known by their names.
"""
