"""The jobs of ``minitron search`` on a cluster: the ranking, and for each of the best candidates its stages.

Which candidate is the n-th best is known when the ranking has ended; so its jobs look it up when they start. They run
beside those of the other candidates, and write nothing that those write. The last job is the stage itself
(:mod:`nemo_minitron.stages.search`), which finds all of this done.
"""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.config import SearchConfig
from nemo_minitron.jobs.atomic import MARKER
from nemo_minitron.jobs.output import Output, claim_output
from nemo_minitron.jobs.records import read_record
from nemo_minitron.jobs.stage_jobs import Prepared
from nemo_minitron.search import Result, candidate_journal, search_journal
from nemo_minitron.stages.shared.search_candidates import (
    Candidates,
    Known,
    candidate_folder,
    findings,
    measuring,
    stages_of,
    subject_of,
    tidy,
)
from nemo_minitron.stages.shared.search_ranking import Work

__all__ = ["finish", "finished", "prepare"]

_RANKING = "shared.search_ranking"


def prepare(config: SearchConfig, name: str, folder: Path) -> Prepared | None:
    """What a job runs: :mod:`~nemo_minitron.stages.shared.search_ranking`, or a stage of a candidate."""
    candidates = Candidates(config)
    number, _, step = name.partition(".")
    if not step:
        journal = search_journal(claim_output(config), subject_of(config))
        journal.read()  # refuses that of another search
        known = findings(config)
        if name == "latency":
            work = candidates.probing(known)
        else:
            candidates.fit_latency(known)
            work = candidates.ranking(known)
        return None if work is None else _ranking(config, work, folder)
    result = _candidate(candidates, findings(config), int(number))
    if result is None or result.distilled_loss is not None:
        return None
    if step == "measured":
        place = candidate_folder(config, result.name)
        journal = candidate_journal(place, subject_of(config))
        journal.read()
        given = measuring(config, result.sizes)
        return _ranking(config, Work(given.candidates, given.distilled, journal=str(journal.path)), folder)
    (stage,) = (stage for stage in stages_of(config, result.sizes) if Path(stage.output).name == step)
    return Prepared(stage)


def finish(config: SearchConfig, name: str, folder: Path) -> None:
    """Of a measured candidate keep the time that its stages took, and remove what is no longer needed."""
    if not name.endswith(".measured"):
        return
    sizes = Work.load(folder).candidates[0]
    records = [read_record(stage.output) for stage in stages_of(config, sizes)]
    seconds = round(sum(record["seconds"] for record in records if record is not None), 1)
    place = candidate_folder(config, sizes.name)
    candidate_journal(place, subject_of(config)).append([(sizes.name, {"distill_seconds": seconds})])
    tidy(config, sizes.name)


def finished(config: SearchConfig) -> set[str]:
    """The jobs whose results are there."""
    if not (Path(config.output) / MARKER).exists():
        return set()
    candidates, known = Candidates(config), findings(config)
    done: set[str] = set()
    if config.budget.latency_ms is not None:
        if candidates.probing(known) is not None:
            return done
        done.add("latency")
        candidates.fit_latency(known)
    if candidates.ranking(known) is not None:
        return done
    done.add("ranking")
    for number in range(1, config.best + 1):
        result = _candidate(candidates, known, number)
        if result is None or result.distilled_loss is not None:
            done |= {job.name for job in config.jobs() if job.name.startswith(f"{number}.")}
            continue
        for stage in stages_of(config, result.sizes):
            if Output(stage).done_record() is None:
                break
            done.add(f"{number}.{Path(stage.output).name}")
    return done


def _candidate(candidates: Candidates, known: Known, number: int) -> Result | None:
    """The n-th best of the ranking; None where there are fewer within the budgets."""
    within = candidates.within(known)
    return within[number - 1] if number <= len(within) else None


def _ranking(config: SearchConfig, work: Work, folder: Path) -> Prepared:
    work.save(config, folder)
    return Prepared(config, _RANKING)
