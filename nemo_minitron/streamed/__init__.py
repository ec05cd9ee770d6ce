"""Forward passes layer by layer, for models that are larger than the memory.

A live model runs a sample through all layers, then the next sample. A streamed pass runs all samples through a layer,
then through the next, so that one layer's weights are in memory at a time. Between two layers the hidden states of all
samples are kept, in memory or in a file. The layers are Megatron's own (:class:`StreamedModel`), and a pass gives what
a live model gives (:class:`Pass`).
"""

from nemo_minitron._lazy import lazy

__all__ = ["Pass", "Progress", "States", "StreamedModel", "Trail", "streamed_faults"]

__getattr__ = lazy(
    __name__,
    {
        "Pass": "passes",
        "Progress": "passes",
        "States": "states",
        "StreamedModel": "model",
        "Trail": "trail",
        "streamed_faults": "model",
    },
)
