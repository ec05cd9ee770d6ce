"""Training a student on its teacher's logits, and on states inside it. See ``docs/distillation.md``.

``losses`` and ``intermediate`` hold the formulae as the papers write them, ``vocabulary_parallel`` those of logits that
tensor parallelism has split, ``attach`` those of states on any pipeline stage, ``layers`` which layer learns from
which, ``balance`` their weights, ``teacher`` the frozen model, ``placement``, ``placed_teacher`` and ``teacher_ranks``
one that is elsewhere, ``cache``, ``cache_filling`` and ``cached_teacher`` its logits on disk, ``module`` NeMo's module
around the student, ``recipe`` the training itself. Nothing heavy is imported until one of them is.
"""
