"""Training a student on its teacher's logits. See ``docs/distillation.md``.

``losses`` holds the formulae as the papers write them, ``vocabulary_parallel`` the same over logits that tensor
parallelism has split, ``teacher`` the frozen model, ``module`` NeMo's module around the student, ``recipe`` the
training itself. Nothing heavy is imported until one of them is.
"""
