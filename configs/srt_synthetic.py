"""SRT on the synthetic instruction-following task, from nothing, on a laptop: the verifier is the critic.

python -m pit_jax.train --config=configs/srt_synthetic.py --workdir=runs/srt
python -m pit_jax.train --config=configs/srt_synthetic.py:smoke --workdir=runs/srt_smoke

The first takes 18 to 19 minutes on 2 CPU cores with huge pages. Seed 0, 640 test prompts, by the verifier: stage 1 vs.
M_base +6.9 [+3.4, +10.5], stage 2 vs. stage 1 +2.7 [-0.3, +5.6], stage 2 vs. M_base +10.0 [+6.6, +13.6]; all critiques
of test prompts end in a refinement. The second takes less than a minute and learns nothing.
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
    decayed = lambda rate, name="adamw", warmup=0.05: c.OptimizerConfig(  # noqa: E731
        name=name, learning_rate=rate, schedule="cosine", warmup_fraction=warmup
    )
    config = c.SrtConfig(
        name="srt_synthetic",
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
        pretrain=c.PretrainConfig(
            sft=sft(optimizer=decayed(5e-3, "muon"), num_steps=800),
            refinement_share=0.6,
            learn_rejected=True,
        ),
        sft_policy=sft(optimizer=decayed(5e-4), num_epochs=0.125),
        feedback_window=72,
        critic_feedback=c.FeedbackConfig(temperature=1.0),
        srt=sft(optimizer=decayed(5e-3, "muon"), num_epochs=2.0),
        self_feedback=c.FeedbackConfig(num_prompts=8_000, temperature=1.0, keep_ties=False),
        dpo=c.DPOConfig(optimizer=decayed(2e-4, warmup=0.1), beta=0.1, batch_size=32),
        evaluation=c.SrtEvaluationConfig(num_prompts=640, batch_size=128),
    )
    if variant == "smoke":
        config = smoke(config)
    elif variant:
        raise ValueError(f"configs/srt_synthetic.py has no variant {variant!r}: use :smoke or none")
    return c.to_config_dict(config)


def smoke(config: c.SrtConfig) -> c.SrtConfig:
    """Every stage, a few steps each."""
    r = dataclasses.replace
    short = lambda s, n: r(s, num_steps=n, batch_size=4, save_every=n)  # noqa: E731
    return r(
        config,
        name="srt_synthetic:smoke",
        data=r(config.data, size=1500, num_selection=16, num_test=32, num_pretrain=400),
        policy_model=r(
            config.policy_model, num_layers=2, d_model=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64
        ),
        pretrain=r(config.pretrain, sft=short(config.pretrain.sft, 8)),
        sft_policy=short(config.sft_policy, 4),
        critic_feedback=r(config.critic_feedback, num_prompts=48),
        srt=short(config.srt, 4),
        self_feedback=r(config.self_feedback, num_prompts=32),
        dpo=short(config.dpo, 2),
        evaluation=r(config.evaluation, num_prompts=16, batch_size=16, num_candidates=2),
    )
