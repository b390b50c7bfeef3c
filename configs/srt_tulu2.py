"""SRT with the paper's values (section 4.1) on Tulu 2: what the synthetic config departs from.

    python -m pit_jax.convert --from=hf --input=allenai/tulu-2-7b --output=CHECKPOINT
    python -m pit_jax.train --config=configs/srt_tulu2.py:7b --config.data.path=FILE --config.base=CHECKPOINT \\
        --config.critic.base_url=https://api.openai.com/v1 --config.critic.model=MODEL --workdir=runs/srt7b

FILE holds a JSON object per line, {"prompt": ...}; answers are not needed, as M_base writes them. A quarter of the
instructions is for stage 1, the rest for stage 2: 100,000 and the test rows are the paper's number. The tokenizer comes
with CHECKPOINT. `:CHECKPOINT` instead of `:7b` takes the sizes of any checkpoint that `pit_jax.convert` has made.

25,000 instructions for stage 1 and 75,000 others for stage 2; responses at temperature 0.7, critiques and refinements
greedy; stage 1: 5 epochs at 1e-5; stage 2: DPO with beta 0.01, one epoch at 5e-7; batches of 32, cosine with 10% of
warm-up, sequences of 8,192 tokens. Rows are packed into these, so that a batch holds more than 32 of them; whether the
paper packs is not stated. What it leaves open is the default of `pit_jax.config`: ties are kept in stage 1 and dropped
in stage 2, ref_policy is the model of stage 1.

Mesh: data x 4 (7b), data x 8 (13b and 70b). What fits is found without a TPU:

    python -m pit_jax.plan --config=configs/srt_tulu2.py:70b --topology=v4:4x8x8

says of 70b on 256 chips of TPU v4 (30.75 GiB each) that a chip holds 15.7 GiB in stage 1, 20.4 and 26.1 where answers
and critiques are sampled, 2.0 for the log-probs of ref_policy and 13.0 in DPO; and that a batch takes 2.2 seconds in
stage 1 (32 sequences of 8,192 tokens) and 1.6 in DPO (32 pairs of 6,176) at best, an MFU of 77% and 75%. 7b on 64 chips
(v4-128) holds 7.1 GiB in stage 1, 10.3 and 20.8 where answers and critiques are sampled, 0.9 for the log-probs of
ref_policy and 6.2 in DPO; 13b 30.4 where critiques are sampled, which is nearly all (its other programs were not looked
at; --config.self_feedback.batch_size makes it less). Smaller slices: --smallest. Not trained by us.
"""

from pathlib import Path

import ml_collections

from pit_jax import config as c
from pit_jax.models import hf
from pit_jax.models.presets import PRESETS


def get_config(variant: str = "7b") -> ml_collections.ConfigDict:
    """`variant`: 7b, 13b, 70b, or the folder of a converted checkpoint."""
    name, base = f"srt_tulu2:{variant}", "set --config.base=CHECKPOINT"
    if (Path(variant) / hf.DESCRIPTION).is_file():
        name, base, model, mesh = "srt_tulu2", variant, hf.read_description(variant).config, 1
    elif variant in ("7b", "13b", "70b"):
        model = PRESETS[f"llama2_{variant}"]  # which Tulu 2 was trained from
        mesh = {"7b": 4, "13b": 8, "70b": 8}[variant]
    else:
        raise ValueError(
            f"configs/srt_tulu2.py has no variant {variant!r}, and no folder of that name is a converted checkpoint: "
            "use :7b, :13b, :70b or :CHECKPOINT"
        )
    decayed = lambda rate: c.OptimizerConfig(learning_rate=rate, schedule="cosine", warmup_fraction=0.1)  # noqa: E731
    config = c.SrtConfig(
        name=name,
        mesh=c.MeshConfig(data=0, model=mesh),
        data=c.DataConfig(
            source="file",
            path="set --config.data.path=FILE",
            prompt_window=2048,
            response_window=2048,
            reflection_window=2048,
        ),
        policy_model=model,
        base=base,
        critic=c.CriticConfig(
            kind="server", base_url="https://api.openai.com/v1", model="set --config.critic.model=NAME"
        ),
        feedback_window=2048,
        critic_feedback=c.FeedbackConfig(num_prompts=25_000, temperature=0.7),
        srt=c.SFTConfig(optimizer=decayed(1e-5), batch_size=32, num_epochs=5.0, sequence_length=8192, chunk_size=512),
        self_feedback=c.FeedbackConfig(num_prompts=75_000, temperature=0.7, keep_ties=False),
        dpo=c.DPOConfig(optimizer=decayed(5e-7), beta=0.01, batch_size=32, num_epochs=1.0),
    )
    return c.to_config_dict(config)
