"""Sizes of open models, for configs whose checkpoint is not at hand: what `pit_jax.convert` reads from a config.json.

The tables have a row for each of <<Candidate>> and <<Improved>>, and are padded to a multiple of 128, as after a
conversion. A run that starts from a converted checkpoint takes vocab_size and num_tokens from that.
"""

import dataclasses

from pit_jax.config import ModelConfig

_LLAMA = ModelConfig(
    embedding_scale=False, norm_epsilon=1e-5, tie_embeddings=False, head_dim=128, dtype="bfloat16", remat="full"
)


def _with_vocabulary(config: ModelConfig, num_ids: int) -> ModelConfig:
    num_tokens = num_ids + 2
    return dataclasses.replace(config, vocab_size=-(-num_tokens // 128) * 128, num_tokens=num_tokens)


def _llama(num_ids: int, **sizes) -> ModelConfig:
    return _with_vocabulary(dataclasses.replace(_LLAMA, **sizes), num_ids)


PRESETS = {
    "llama2_7b": _llama(32_000, num_layers=32, d_model=4096, num_heads=32, num_kv_heads=32, mlp_dim=11_008),
    "llama2_13b": _llama(32_000, num_layers=40, d_model=5120, num_heads=40, num_kv_heads=40, mlp_dim=13_824),
    "llama2_70b": _llama(32_000, num_layers=80, d_model=8192, num_heads=64, num_kv_heads=8, mlp_dim=28_672),
    "tinyllama_1b": _llama(
        32_000, num_layers=22, d_model=2048, num_heads=32, num_kv_heads=4, head_dim=64, mlp_dim=5632
    ),
    "smollm2_135m": _llama(
        49_152, num_layers=30, d_model=576, num_heads=9, num_kv_heads=3, head_dim=64, mlp_dim=1536,
        rope_theta=100_000.0, tie_embeddings=True,
    ),
    "smollm2_360m": _llama(
        49_152, num_layers=32, d_model=960, num_heads=15, num_kv_heads=5, head_dim=64, mlp_dim=2560,
        rope_theta=100_000.0, tie_embeddings=True,
    ),
}  # fmt: skip
"""Name -> sizes. Tulu 2 has those of Llama 2."""
