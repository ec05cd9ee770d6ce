"""Alignment with NeMo-Aligner's models, trainers and losses. Only this package imports ``nemo_aligner``.

Around Aligner it adds a checked configuration, weights from any checkpoint of this suite, metrics in a file, a resume
that works, and plain checkpoints with their chat template at the end.

    session    Aligner's model and trainer from a checkpoint and a schedule; training
    settings   Aligner's configuration, complete
    metrics    metrics.jsonl, TensorBoard and the progress bar of a training
    batches    conversations as the batches that Aligner's models take, packed or not
    pairs      preference pairs as Aligner's DPO model takes them
    export     the trained weights as checkpoints
"""

from nemo_minitron.runtime.requirements import require

require("nemo 1", "nemo_aligner", for_="alignment")
