"""A program that compiles the Triton losses for GPUs that need not be there; sizes of the machine code as JSON."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nemo_minitron.distillation.losses import triton_kernels

#: Compute capability (A100, H100, B200), type of the logits, reverse KL.
CASES = ((80, "*bf16", False), (90, "*bf16", False), (90, "*fp32", True), (100, "*bf16", True))
WIDE = {"maxima": "*fp32", "sums": "*fp32", "scales": "*fp32", "means": "*fp32", "inverse_temperature": "fp32"}


def size(kernel: Any, logits: str, out: str, capability: int, reverse: bool) -> int:
    constants = {"reverse": reverse, "block": triton_kernels.BLOCK}
    types = {"p": logits, "q": logits, "out": out, "lowest": "fp32", **WIDE}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    target = GPUTarget("cuda", capability, 32)
    source, options = ASTSource(kernel, signature, values), {"num_warps": triton_kernels.WARPS}
    compiled = triton.compile(source, target=target, options=options)
    return len(compiled.asm["cubin"])


def main() -> None:
    warnings.simplefilter("ignore")
    found = {}
    for capability, logits, reverse in CASES:
        for name in ("_statistics_kernel", "_derivative_kernel"):
            kernel, out = getattr(triton_kernels, name), "*fp32" if reverse else logits
            found[f"{name} {capability} {logits} reverse={reverse}"] = size(kernel, logits, out, capability, reverse)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
