"""NeMo-Aligner's trainings on the small model: supervised, preferences, attributes, rewards. The only room that imports it."""
