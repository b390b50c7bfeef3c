"""PIT on SmolLM2, for one small accelerator; with another converted checkpoint, on a model of your own.

    python -m pit_jax.convert --from=hf --input=HuggingFaceTB/SmolLM2-135M --output=CHECKPOINT
    python -m pit_jax.train --config=configs/pit_smollm.py:135m --config.pretrain.checkpoint=CHECKPOINT \\
        --config.data.path=FOLDER --workdir=runs/smollm

FOLDER holds preference pairs (see python -m pit_jax.inspect_data). `:CHECKPOINT` instead of `:135m` or `:360m` takes
the sizes of any checkpoint that `pit_jax.convert` has made. The paper's rates are those of a model with tens of
billions of parameters; here they are higher.

Mesh: one device. Memory: RL holds about 40 bytes per parameter (policy and value model with AdamW and gradients in
float32, ref_policy and reward model), 5.4 GB at 135m and 14.5 GB at 360m, and activations of batches of 16:

    python -m pit_jax.plan --config=configs/pit_smollm.py:135m --topology=v5e:1x1

says of one chip of TPU v5e (15.75 GiB): SFT 5.4 GiB, R_P 4.0, R_PIT 5.4, M_P's RL 7.7 while it samples and 9.6 while it
learns, M_PIT's 10.5 while it samples (its update was not looked at). With --topology=local it does for this machine.
Not trained by us on an accelerator.
"""

import dataclasses
from pathlib import Path

import ml_collections

from pit_jax import config as c
from pit_jax.models import hf
from pit_jax.models.presets import PRESETS


def get_config(variant: str = "135m") -> ml_collections.ConfigDict:
    """`variant`: 135m, 360m, or the folder of a converted checkpoint."""
    name, checkpoint = f"pit_smollm:{variant}", "set --config.pretrain.checkpoint=CHECKPOINT"
    if (Path(variant) / hf.DESCRIPTION).is_file():
        name, checkpoint, model = "pit_smollm", variant, hf.read_description(variant).config
    elif f"smollm2_{variant}" in PRESETS:
        model = PRESETS[f"smollm2_{variant}"]
    else:
        raise ValueError(
            f"configs/pit_smollm.py has no variant {variant!r}, and no folder of that name is a converted checkpoint: "
            "use :135m, :360m or :CHECKPOINT"
        )
    model = dataclasses.replace(model, remat="dots")
    adam = lambda rate: c.OptimizerConfig(learning_rate=rate, schedule="cosine", warmup_fraction=0.1)  # noqa: E731
    sft = c.SFTConfig(
        optimizer=adam(1e-4), batch_size=16, accumulation=4, num_epochs=1.0, sequence_length=2048, chunk_size=128
    )
    reward = c.RewardModelConfig(optimizer=adam(3e-5), batch_size=16, accumulation=4)
    ppo = c.PPOConfig(
        policy_optimizer=c.OptimizerConfig(learning_rate=3e-6, warmup_fraction=0.1),
        value_optimizer=c.OptimizerConfig(learning_rate=1e-5),
        rollout_size=64,
        num_minibatches=8,
        chunk_size=128,
    )
    config = c.PitConfig(
        name=name,
        data=c.DataConfig(source="file", path="set --config.data.path=FOLDER", prompt_window=512, response_window=256),
        policy_model=model,
        pit_model=model,
        reward_model=model,
        pretrain=c.PretrainConfig(checkpoint=checkpoint),
        sft_policy=sft,
        sft_pit=sft,
        r_p=reward,
        r_pit=reward,
        evaluator=reward,
        ppo=ppo,
        ppo_pit=ppo,
        evaluation=c.EvaluationConfig(batch_size=32, self_refine=False),
    )
    return c.to_config_dict(config)
