"""PIT with the paper's values (appendix F) on a decoder of 7B parameters: what the synthetic config departs from.

    python -m pit_jax.train --config=configs/pit_7b.py --config.data.path=FOLDER \\
        --config.pretrain.checkpoint=CHECKPOINT --config.tokenizer.path=tokenizer.model --workdir=runs/7b

SFT one epoch at 3e-5, reward models at 3e-4, RL at 1e-5, windows 512 / 512 / 512, best of 128 held-out pairs. What the
paper leaves open (batch sizes, PPO's own settings) is the default of `pit_jax.config`. Not trained by us: it needs a
checkpoint in this package's format and a TPU slice.
"""

import ml_collections

from pit_jax import config as c


def get_config() -> ml_collections.ConfigDict:
    """Values of appendix F."""
    model = c.ModelConfig(
        vocab_size=32_000,
        num_layers=32,
        d_model=4096,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        mlp_dim=11_008,
        tie_embeddings=False,
        dtype="bfloat16",
        remat="full",
    )
    sft = c.SFTConfig(optimizer=c.OptimizerConfig(learning_rate=3e-5), num_epochs=1.0, chunk_size=256)
    reward = c.RewardModelConfig(optimizer=c.OptimizerConfig(learning_rate=3e-4))
    config = c.PitConfig(
        name="pit_7b",
        mesh=c.MeshConfig(data=0, model=4),
        data=c.DataConfig(source="file", path="set --config.data.path=FOLDER"),
        policy_model=model,
        pit_model=model,
        reward_model=model,
        pretrain=c.PretrainConfig(checkpoint="set --config.pretrain.checkpoint=CHECKPOINT"),
        sft_policy=sft,
        sft_pit=sft,
        r_p=reward,
        r_pit=reward,
        evaluator=reward,
        ppo=c.PPOConfig(chunk_size=128),
        ppo_pit=c.PPOConfig(chunk_size=128),
    )
    return c.to_config_dict(config)
