"""One module per command: ``minitron prune`` is ``nemo_minitron.stages.prune``. ``shared`` has the shared code.

A stage is a module with two functions::

    def plan(config: ScoreConfig) -> StagePlan: ...      # cheap: no torch, nothing written
    def run(config: ScoreConfig) -> dict[str, Any]: ...  # on every rank; returns the metrics of the record

``run`` writes its output through :func:`~nemo_minitron.jobs.atomic.stage_output`, or through a checkpoint writer; both
write aside and rename. :mod:`nemo_minitron.jobs` starts its processes, and writes the record once every rank has
succeeded.
No stage imports another.
"""
