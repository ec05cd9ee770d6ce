"""What a reader has after ``make demo``, in the paths of the guides and tiny; and the process that runs their code.

``python -m support.page_world FOLDER PAGE...`` makes the folder, runs every Python block of the pages in it, one after
the other in one process, and writes ``results.json``: for each block, by its name, nothing or what went wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.chats import chats, preferences
from support.checkpoints import tiny_checkpoint
from support.pages import Block, read_blocks
from support.text import sentences, write_jsonl

__all__ = ["make_world", "run_page"]


def make_world(folder: Path) -> None:
    """Text, conversations, a Hugging Face model, and the outputs of the demonstration: below ``folder``.

    Nothing of it needs the CPU layer, which stays off.
    """
    from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
    from nemo_minitron.importance import fingerprint, magnitude_scores
    from nemo_minitron.pruning import choose_units, prune_weights, save_kept

    for name, words in (("corpus", 40), ("data", 60)):
        (folder / name).mkdir(parents=True)
        write_jsonl(folder / name / "text.jsonl", sentences(400, words, 0))
    for name, records in (("chats", chats(24)), ("pairs", preferences(24))):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "data" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    model = tiny_checkpoint(
        folder / "models/teacher", num_hidden_layers=4, max_position_embeddings=512, intermediate_size=80
    )
    demo = folder / "runs/demo"
    for parent in ("distilled", "export"):
        (demo / parent).mkdir(parents=True)
    teacher = write_checkpoint(open_checkpoint(model), demo / "teacher", "nemo2")
    scores = dataclasses.replace(
        magnitude_scores(teacher), estimator="activation", sequence="mean", batch="l2", fingerprint=fingerprint(teacher)
    )
    scores.save(demo / "scores")
    kept = choose_units(scores, teacher.shape, teacher.shape.replace(num_layers=3, ffn_hidden_size=48))
    pruned = write_checkpoint(prune_weights(teacher, kept), demo / "pruned", "nemo2")
    save_kept(kept, teacher.shape, demo / "pruned/kept.json")
    write_checkpoint(pruned, demo / "reconstructed", "nemo2")
    save_kept(kept, teacher.shape, demo / "reconstructed/kept.json")
    for path, form in (("distilled/model", "nemo2"), ("export/hf", "hf"), ("export/model.nemo", "nemo")):
        write_checkpoint(pruned, demo / path, form)


def _import_everything() -> None:
    """What a script of the user's may import. That alone decides on no device and switches nothing on."""
    for package in ("checkpoints", "data", "evaluation", "generation", "importance", "pruning"):
        module = importlib.import_module(f"nemo_minitron.{package}")
        for name in module.__all__:
            getattr(module, name)
    for name in ("distillation.recipe", "recipes.alignment", "recipes.distillation", "recipes.published"):
        importlib.import_module(f"nemo_minitron.{name}")
    from nemo_minitron.runtime import cpu, device

    assert not cpu.is_active()
    assert not device._decided


@contextlib.contextmanager
def _as_in_a_fresh_process() -> Iterator[None]:
    """No process groups and no CPU layer before and after."""
    from nemo_minitron.runtime import cpu, device

    assert not cpu.is_active(), "the layer is on before the page's code begins"
    try:
        yield
    finally:
        import gc

        from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

        from nemo_minitron.runtime.groups import destroy

        destroy()
        destroy_num_microbatches_calculator()
        cpu.deactivate()
        device.forget()
        gc.collect()


@contextlib.contextmanager
def _executors_start_nothing() -> Iterator[None]:
    """``run.run`` looks whether the executor starts as many processes as the recipe needs, and prints what it would."""
    import fiddle as fdl
    import nemo_run as run

    from nemo_minitron.config import DistillConfig
    from nemo_minitron.jobs.in_place import checked

    real = run.run

    def look(recipe: Any, *, executor: Any, **options: Any) -> None:
        nodes = getattr(executor, "nodes", 1)
        built = fdl.build(recipe).keywords
        if "config" in built:
            config = built["config"]
        else:
            schedule = built.pop("schedule")
            seed = built.pop("seed", 0)
            config = DistillConfig(**built, **vars(schedule))
            config.runtime.seed = seed
        config = checked(config)
        started = nodes * executor.ntasks_per_node
        assert config.processes == started, f"the recipe needs {config.processes} processes, {started} are started"
        real(recipe, executor=executor, dryrun=True, **options)

    run.run = look
    try:
        yield
    finally:
        run.run = real


def run_page(blocks: list[Block], results: dict[str, str]) -> None:
    """Run the Python blocks of a page; each has names of its own unless it continues the one before."""
    names: dict[str, Any] = {}
    chains: list[list[Block]] = []
    for block in blocks:
        if block.continues:
            chains[-1].append(block)
        else:
            chains.append([block])
    for chain in chains:
        names = {"__name__": "__main__"}
        with _as_in_a_fresh_process():
            failed = None
            for block in chain:
                begun = time.monotonic()
                try:
                    if failed is not None:
                        raise AssertionError(f"it continues {failed}, which failed")
                    exec(compile(block.set_up, f"set-up of {block.name}", "exec"), names)
                    code = "\n" * (block.line - 1) + block.code  # tracebacks name the line of the page
                    exec(compile(code, block.page, "exec"), names)
                    results[block.name] = ""
                except BaseException:
                    failed = block.name
                    results[block.name] = traceback.format_exc()
                print(f"{block.name}: {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)


def main(folder: str, *pages: str) -> None:
    """See the module."""
    from support.pages import ROOT

    _import_everything()
    world = Path(folder)
    begun = time.monotonic()
    make_world(world)
    print(f"world: {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)
    os.chdir(world)
    results: dict[str, str] = {}
    for page in pages:
        blocks = [b for b in read_blocks(ROOT / page) if b.language == "python" and not b.code.startswith("# ")]
        with _executors_start_nothing():
            run_page(blocks, results)
    Path("results.json").write_text(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)  # an ordinary exit takes seconds


if __name__ == "__main__":
    main(*sys.argv[1:])
