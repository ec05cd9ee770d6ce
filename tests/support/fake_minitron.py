"""``python -m support.fake_minitron ARGS``: the command line with fake stages (see :mod:`support.fake_worker`)."""

from __future__ import annotations

from support import fake_worker

from nemo_minitron import cli
from nemo_minitron.jobs import launch, local


def launch_fakes(module: str, *args: object, **kwargs: object) -> object:
    return launch.launch("support.fake_worker", *args, **kwargs)  # type: ignore[arg-type]


if __name__ == "__main__":
    fake_worker.install()
    local.launch = launch_fakes  # type: ignore[assignment]
    cli.main()
