"""``.nemo`` archives of NeMo 1, which NeMo-Aligner reads."""
