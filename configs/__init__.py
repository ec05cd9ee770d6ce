"""The configurations that ship with nemo_minitron: one YAML file per stage and the demo pipelines."""
