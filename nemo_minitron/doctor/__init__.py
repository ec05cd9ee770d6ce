"""``minitron doctor``: what a machine has, what of the suite works with it, and the proof that it does.

Two halves. The quick one reads facts (:mod:`~nemo_minitron.doctor.facts`), without importing torch or NeMo, and judges
them (:mod:`~nemo_minitron.doctor.diagnosis`). The other runs every part of the suite on a tiny model in the layout that
is asked for and compares it with one process on the CPU (:mod:`~nemo_minitron.doctor.checks`,
:mod:`~nemo_minitron.doctor.prove`). See ``docs/doctor.md``.
"""
