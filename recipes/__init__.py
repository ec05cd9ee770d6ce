"""Recipes for published shapes, one file per model: ``minitron plan NAME`` says what each costs.

A file has the function ``recipe(...)``; :func:`nemo_minitron.planning.load_recipe` finds it by its file's name.
"""

#: Modules here that are no recipes but serve them.
SHARED = ("alignment", "distillation", "published", "teachers")
