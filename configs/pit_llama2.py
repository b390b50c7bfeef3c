"""PIT with the paper's values (appendix F) on Llama 2: what the synthetic config departs from.

    python -m pit_jax.convert --from=hf --input=meta-llama/Llama-2-7b-hf --output=CHECKPOINT
    python -m pit_jax.train --config=configs/pit_llama2.py:7b --config.pretrain.checkpoint=CHECKPOINT \\
        --config.data.path=FOLDER --workdir=runs/llama2_7b

FOLDER holds preference pairs in any form that pit_jax reads (python -m pit_jax.inspect_data shows what it makes of
them): the dialogues of HH-RLHF, the comparisons of OpenAI's summaries (TL;DR), or others. The tokenizer comes with the
checkpoint.

SFT one epoch at 3e-5 and the last checkpoint, reward models at 3e-4 and the best of 128 held-out pairs, RL at 1e-5,
windows 512 / 512 / 512. What the paper leaves open (batch sizes, PPO's own settings) is the default of
`pit_jax.config`.

Mesh: data x 4 (7b), data x 8 (13b). What fits is found without a TPU:

    python -m pit_jax.plan --config=configs/pit_llama2.py:7b --topology=v4-32

says of 7b on 16 chips of TPU v4 (30.75 GiB each) that a chip holds 28.2 GiB while M_PIT samples in RL and 27.5 while it
learns: policy and value model with AdamW, ref_policy, reward model, and the M_P that writes ref_responses. SFT holds
9.8 (M_P) and 11.1 (M_PIT), R_PIT 11.7. On 8 chips the models, optimizers and gradients of RL alone are 31.2 GiB, so 16
are the fewest; for 13b they are 30.2 on 16 chips. On 64 chips (v4-128) with
--config.sft_policy.sequence_length=2048 a batch of 32 sequences takes 0.20 seconds at best, an MFU of 77%. Of 13b it
says that on 32 chips (v4-64) M_PIT's RL holds 29.5 GiB while it learns and needs 31.0 while it samples, which is too
much: 24.5 with --config.ppo_pit.rollout_size=64. On 64 chips it holds 17.2 while it samples. SFT and reward models of
13b were not looked at. Not trained by us.
"""

import ml_collections

from pit_jax import config as c
from pit_jax.models.presets import PRESETS


def get_config(variant: str = "7b") -> ml_collections.ConfigDict:
    """`variant`: 7b or 13b."""
    if variant not in ("7b", "13b"):
        raise ValueError(f"configs/pit_llama2.py has no variant {variant!r}: use :7b or :13b")
    model = PRESETS[f"llama2_{variant}"]
    sft = c.SFTConfig(optimizer=c.OptimizerConfig(learning_rate=3e-5), num_epochs=1.0, chunk_size=256)
    reward = c.RewardModelConfig(optimizer=c.OptimizerConfig(learning_rate=3e-4))
    ppo = c.PPOConfig(chunk_size=128)
    config = c.PitConfig(
        name=f"pit_llama2:{variant}",
        mesh=c.MeshConfig(data=0, model={"7b": 4, "13b": 8}[variant]),
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
        ppo=ppo,
        ppo_pit=ppo,
        evaluation=c.EvaluationConfig(self_refine=False),
    )
    return c.to_config_dict(config)
