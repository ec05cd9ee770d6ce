"""One module per command: ``minitron prune`` is ``nemo_minitron.stages.prune``. ``shared`` has the shared code.

A stage is a module with two functions::

    def plan(config: ScoreConfig) -> StagePlan: ...      # cheap: no torch, nothing written
    def run(config: ScoreConfig) -> dict[str, Any]: ...  # on every rank; returns the metrics of the record

``run`` writes its output through :func:`~nemo_minitron.jobs.atomic.stage_output`, or through
:func:`~nemo_minitron.checkpoints.write_checkpoint`; both write aside and rename. :mod:`nemo_minitron.jobs` starts the
processes of a stage, and writes its record once every rank has ended well. No stage imports another.
"""
