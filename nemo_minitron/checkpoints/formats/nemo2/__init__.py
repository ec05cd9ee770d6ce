"""NeMo 2 directories: ``context/`` and ``weights/`` (torch_dist)."""
