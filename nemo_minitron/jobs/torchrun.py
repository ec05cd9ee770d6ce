"""``python -m nemo_minitron.jobs.torchrun WORLD MODULE [ARG ...]``: torchrun through nemo_run's local executor.

A process of its own, because nemo_run reads ``NEMORUN_HOME`` when it is imported, installs signal handlers, and prints
panels that belong in a log. What it prints goes to ``launcher.log``; see :mod:`nemo_minitron.jobs.launch`.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """Run the job.

    Returns:
        0 if every rank ended with 0, else 1.
    """
    import nemo_run as run

    world_size, module, *args = argv
    executor = run.LocalExecutor(ntasks_per_node=int(world_size), launcher="torchrun")
    script = run.Script(path=module, m=True, entrypoint="python", args=args)
    name = args[0] if args else "job"
    with run.Experiment(name, executor=executor, log_level="WARNING") as experiment:
        experiment.add(script, executor=executor, name=name, tail_logs=False)
        experiment.run(detach=False, tail_logs=False)
        states = [str(status["status"]) for status in experiment.status(return_dict=True).values()]
    return 0 if states and all(state.startswith("SUCCEEDED") for state in states) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
