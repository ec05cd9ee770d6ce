"""Check a conversion by the logits that NeMo's and transformers' own loaders get."""

from nemo_minitron._lazy import lazy

__all__ = ["compare_logits", "verify"]

__getattr__ = lazy(__name__, {"compare_logits": "compare", "verify": "compare"})
