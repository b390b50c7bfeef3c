"""PIT on the synthetic instruction-following task, from nothing, on a laptop.

python -m pit_jax.train --config=configs/pit_synthetic.py --workdir=runs/demo
python -m pit_jax.train --config=configs/pit_synthetic.py:smoke --workdir=runs/smoke
"""

import dataclasses

import ml_collections

from pit_jax import config as c


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """`variant`: empty, or smoke: a small run of every stage."""
    model = c.ModelConfig(
        num_layers=4, d_model=128, num_heads=4, num_kv_heads=2, head_dim=32, mlp_dim=384, copy_init=1.0
    )
    sft = lambda **kw: c.SFTConfig(**{"sequence_length": 208, "batch_size": 16, **kw})  # noqa: E731
    decayed = lambda rate, name="adamw": c.OptimizerConfig(  # noqa: E731
        name=name, learning_rate=rate, schedule="cosine", warmup_fraction=0.05
    )
    reward = c.RewardModelConfig(
        optimizer=decayed(1e-3, "muon"),
        batch_size=32,
        num_epochs=1.5,
        eval_every=90,
        save_every=90,
    )
    ppo = c.PPOConfig(
        policy_optimizer=decayed(5e-4),
        value_optimizer=c.OptimizerConfig(learning_rate=1e-3),
        num_iterations=30,
        rollout_size=128,
        num_epochs=1,
        num_minibatches=2,
        value_warmup=3,
        kl_coef=0.2,
        eval_every=10,
        save_every=10,
    )
    config = c.PitConfig(
        name="pit_synthetic",
        data=c.DataConfig(
            size=78_000,
            num_selection=136,
            num_test=660,
            num_pretrain=48_000,
            prompt_window=38,
            response_window=24,
            reflection_window=28,
        ),
        policy_model=model,
        pit_model=model,
        reward_model=model,
        pretrain=c.PretrainConfig(
            sft=sft(optimizer=decayed(5e-3, "muon"), num_steps=800),
            refinement_share=0.6,
            learn_rejected=True,
        ),
        sft_policy=sft(optimizer=decayed(5e-4), num_epochs=0.125),
        sft_pit=sft(optimizer=decayed(2e-3, "muon"), num_epochs=1.0),
        r_p=reward,
        r_pit=dataclasses.replace(
            reward,
            optimizer=decayed(7e-4, "muon"),
            batch_size=16,
            num_epochs=1.5,
            start_from="r_p",
            eval_every=180,
            save_every=180,
        ),
        evaluator=dataclasses.replace(reward, num_epochs=0.175),
        ppo=ppo,
        ppo_pit=dataclasses.replace(
            ppo, policy_optimizer=decayed(3e-4), num_iterations=20, max_kl=2.0, samples_per_prompt=4
        ),
        evaluation=c.EvaluationConfig(num_prompts=640, batch_size=128, num_pairs=2),
    )
    if variant == "smoke":
        config = smoke(config)
    elif variant:
        raise ValueError(f"configs/pit_synthetic.py has no variant {variant!r}: use :smoke or none")
    return c.to_config_dict(config)


def smoke(config: c.PitConfig) -> c.PitConfig:
    """Every stage, a few steps each."""
    r = dataclasses.replace
    model = r(config.policy_model, num_layers=2, d_model=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64)
    short = lambda s, n: r(s, num_steps=n, batch_size=4, save_every=n)  # noqa: E731
    reward = lambda s: r(s, num_steps=4, batch_size=4, eval_every=4, save_every=4)  # noqa: E731
    ppo = lambda s: r(s, num_iterations=2, rollout_size=8, value_warmup=1, eval_every=2, save_every=1)  # noqa: E731
    return r(
        config,
        name="pit_synthetic:smoke",
        data=r(config.data, size=1500, num_selection=16, num_test=32, num_pretrain=400),
        policy_model=model,
        pit_model=model,
        reward_model=model,
        pretrain=r(config.pretrain, sft=short(config.pretrain.sft, 8)),
        sft_policy=short(config.sft_policy, 4),
        sft_pit=short(config.sft_pit, 4),
        r_p=reward(config.r_p),
        r_pit=reward(config.r_pit),
        evaluator=reward(config.evaluator),
        ppo=ppo(config.ppo),
        ppo_pit=ppo(config.ppo_pit),
        evaluation=r(config.evaluation, num_prompts=16, batch_size=16, num_pairs=1, num_iterations=2),
    )
