"""``minitron doctor``: what a machine has, which parts of the suite work on it, and checks that prove it.

It has two halves. The quick half reads facts (:mod:`~nemo_minitron.doctor.facts`) without importing torch or NeMo, and
judges them (:mod:`~nemo_minitron.doctor.diagnosis`). The other half runs every part of the suite on a tiny model in the
requested layout and compares the results with one process on the CPU (:mod:`~nemo_minitron.doctor.checks`,
:mod:`~nemo_minitron.doctor.prove`). See ``docs/doctor.md``.
"""
