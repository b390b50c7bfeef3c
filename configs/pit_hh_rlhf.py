"""PIT on Anthropic's HH-RLHF, read from local files.

    python -m pit_jax.train --config=configs/pit_hh_rlhf.py:small --config.data.path=FOLDER \\
        --config.pretrain.text=BOOKS --workdir=runs/hh

FOLDER holds .jsonl, .jsonl.gz or .jsonl.xz files of {"chosen", "rejected"} dialogues, in subfolders too; a file does as
well. BOOKS holds English text to pretrain on (.txt, or .jsonl with a field "text"; compressed too); without it M_pre
learns from the dialogues of the first fold alone. `small` trains a decoder from scratch: enough to run every stage on
real pairs, far too little to write English. A bag of words learnt from the rows of R_P is right on 56.5% [53.0, 59.9],
54.4% [50.9, 57.8] and 56.4% [52.9, 59.8] of 800 held-out pairs of the published test files of helpful-online and
helpful-rejection-sampled at seeds 0, 1 and 2, before any is dropped for its length.
"""

import dataclasses

import ml_collections

from pit_jax import config as c


def get_config(variant: str = "small") -> ml_collections.ConfigDict:
    """`variant`: small, or smoke: a small run of every stage."""
    if variant not in ("small", "smoke"):
        raise ValueError(f"configs/pit_hh_rlhf.py has no variant {variant!r}: use :small or :smoke")
    model = c.ModelConfig(vocab_size=4096, num_layers=4, d_model=128, num_heads=4, num_kv_heads=2, mlp_dim=384)
    adam = lambda rate, **kw: c.OptimizerConfig(learning_rate=rate, **kw)  # noqa: E731
    decayed = lambda rate, name="adamw": adam(rate, name=name, schedule="cosine", warmup_fraction=0.05)  # noqa: E731
    sft = c.SFTConfig(optimizer=decayed(1e-3), batch_size=8, num_epochs=1.0, sequence_length=1280)
    reward = c.RewardModelConfig(optimizer=decayed(3e-4), batch_size=8, num_epochs=2.0, eval_every=25, save_every=25)
    ppo = c.PPOConfig(
        policy_optimizer=adam(1e-4, warmup_fraction=0.1),
        value_optimizer=adam(3e-4),
        num_iterations=4,
        rollout_size=32,
        num_epochs=1,
        num_minibatches=2,
        eval_every=2,
        save_every=2,
    )
    config = c.PitConfig(
        name="pit_hh_rlhf:small",
        data=c.DataConfig(
            source="file",
            path="set --config.data.path=FOLDER",
            num_selection=128,
            num_test=800,
            prompt_window=512,
            response_window=320,
        ),
        tokenizer=c.TokenizerConfig(vocab_size=4096),
        policy_model=model,
        pit_model=model,
        reward_model=model,
        pretrain=c.PretrainConfig(
            sft=dataclasses.replace(
                sft, optimizer=decayed(5e-3, "muon"), batch_size=12, sequence_length=832, loss_on_prompt=True
            ),
            text_tokens=3_000_000,
        ),
        sft_policy=sft,
        sft_pit=sft,
        r_p=reward,
        r_pit=dataclasses.replace(reward, start_from="r_p"),
        evaluator=dataclasses.replace(reward, num_epochs=1.0),  # of three times the rows
        ppo=ppo,
        ppo_pit=ppo,
        evaluation=c.EvaluationConfig(num_prompts=128, batch_size=32, num_iterations=2, self_refine=False),
    )
    if variant == "smoke":
        config = smoke(config)
    return c.to_config_dict(config)


def smoke(config: c.PitConfig) -> c.PitConfig:
    """Every stage, a few steps each."""
    r = dataclasses.replace
    model = r(config.policy_model, num_layers=2, d_model=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64)
    short = lambda s: r(s, num_steps=2, batch_size=4, sequence_length=0)  # noqa: E731
    reward = lambda s: r(s, num_steps=2, batch_size=4, eval_every=2, save_every=2)  # noqa: E731
    ppo = lambda s: r(s, num_iterations=1, rollout_size=8, eval_every=1, save_every=1)  # noqa: E731
    return r(
        config,
        name="pit_hh_rlhf:smoke",
        data=r(config.data, num_selection=24, num_test=40),  # short windows of a small vocabulary drop most real rows
        tokenizer=r(config.tokenizer, vocab_size=512),
        policy_model=model,
        pit_model=model,
        reward_model=model,
        pretrain=r(config.pretrain, sft=short(config.pretrain.sft)),
        sft_policy=short(config.sft_policy),
        sft_pit=short(config.sft_pit),
        r_p=reward(config.r_p),
        r_pit=reward(config.r_pit),
        evaluator=reward(config.evaluator),
        ppo=ppo(config.ppo),
        ppo_pit=ppo(config.ppo_pit),
        evaluation=r(config.evaluation, num_prompts=8, batch_size=8),
    )
