"""The command line. Nothing heavy is imported before a stage starts."""

from nemo_minitron.cli.app import main

__all__ = ["main"]
