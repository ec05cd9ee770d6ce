"""Training a student on its teacher's logits, and on states inside it. See ``docs/distillation.md``.

``losses`` holds the formulae, ``teachers`` how a teacher's logits come to a student's rank, ``training`` the loop, its
data, metrics and checkpoints; ``compatibility`` says which student can learn from which teacher, ``module`` is NeMo's
module around the student, ``recipe`` the training itself, ``several`` both for several teachers. Nothing heavy is
imported until one of them is.
"""
