"""How a teacher's logits come to the student's ranks.

``frozen`` is a teacher in the same processes and layout, ``own_layout`` one in the same processes under a layout of its
own, ``own_ranks`` one in processes of its own, ``learning`` one that is trained beside its student, ``cached`` one
whose logits lie on disk (``logit_cache``, filled by ``cache_filling``). ``open`` makes the one that the settings ask
for, ``placement`` says which rank holds what.
"""
