"""Compiles every learner's step for TPU v4:2x2x1 with the real compiler, on a machine without a TPU.

    python tests/compile_for_tpu.py DATA MODEL DTYPE REMAT CHUNK

Prints one JSON line: program -> bytes of temporaries per device. A process of its own, since the environment has to be
set before jax is imported.
"""

import dataclasses
import json
import os
import sys

os.environ.update(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v4-8", TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # no TPU is held, so two test processes may compile at once
)  # fmt: skip

import jax

from pit_jax import planner, slices
from pit_jax.config import (
    LAYER_MATRICES,
    DataConfig,
    DPOConfig,
    FeedbackConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PitConfig,
    PPOConfig,
    RewardModelConfig,
    SFTConfig,
    SrtConfig,
)

B = 8


def configs(data: int, model: int, dtype: str, remat: str, chunk_size: int, name: str) -> tuple[PitConfig, SrtConfig]:
    """Small ones whose programs differ in all that a layout or a dtype can break; `name` is of the optimizer."""
    sizes = ModelConfig(
        vocab_size=512, num_layers=2, d_model=128, num_heads=4, num_kv_heads=2, head_dim=32, mlp_dim=256,
        dtype=dtype, remat=remat, copy_init=1.0, attention_block=24,
    )  # fmt: skip
    optimizer = OptimizerConfig(name, schedule="cosine", warmup_fraction=0.1, weight_decay=0.1)
    sft = SFTConfig(optimizer, batch_size=B, chunk_size=chunk_size)
    reward = RewardModelConfig(optimizer, batch_size=B)
    ppo = PPOConfig(
        optimizer, optimizer, rollout_size=B, samples_per_prompt=4, num_minibatches=2, num_epochs=2, adaptive_kl=True,
        entropy_coef=0.01,
    )  # fmt: skip
    windows, mesh = DataConfig(prompt_window=16, response_window=16), MeshConfig(data, model)
    pit = PitConfig(
        mesh=mesh, data=windows, policy_model=sizes, pit_model=sizes, reward_model=sizes, sft_policy=sft,
        r_p=dataclasses.replace(reward, sequence_length=200), r_pit=reward, ppo=ppo, ppo_pit=ppo,
    )  # fmt: skip
    srt = SrtConfig(
        mesh=mesh, data=windows, policy_model=sizes, base="elsewhere", feedback_window=16, srt=sft,
        self_feedback=FeedbackConfig(batch_size=B), dpo=DPOConfig(optimizer, batch_size=B, chunk_size=chunk_size),
    )  # fmt: skip
    return pit, srt


def main(*arguments) -> dict[str, int]:
    """Program -> bytes of temporaries per device."""
    place, found = slices.place_of("v4:2x2x1"), {}

    def add(config: PitConfig | SrtConfig, names: str, behind: str = "") -> None:
        names = names.split(", ")
        with jax.set_mesh(planner.on_place(config, place)):
            for program in planner.made_programs(config, place, {name.partition(":")[0] for name in names}):
                if program.stage in names:
                    compiled = planner.lowered(program).stage.compile()
                    by_kernel = "tpu_custom_call" in compiled.as_text()
                    # Not with a cache; not where rows that share tokens have a softcap; "blocks" is what a CPU does.
                    without = program.stage in ("self_feedback: answers", "rl_policy: rollout") or behind == " blocks"
                    without |= (program.stage, behind) == ("r_pit", " windows")
                    assert by_kernel != without, f"{program.stage}{behind}: {by_kernel}"
                    found[program.stage + behind] = compiled.memory_analysis().temp_size_in_bytes

    pit, srt = configs(*arguments, "adamw")
    add(pit, "sft_policy, r_p, r_pit, rl_policy: rollout, rl_policy: reward, rl_policy: update")
    add(srt, "dpo, self_feedback: answers")
    by_difference = dataclasses.replace(pit, r_pit=dataclasses.replace(pit.r_pit, loss="r_p_difference"))
    add(by_difference, "rl_pit: reward", " by difference")
    # Those above attend by the kernel, as rows are longer than two blocks; these have windows by layers, or do without.
    of_gemma = {"sliding_window": 40, "global_every": 2, "attention_softcap": 30.0, "local_rope_theta": 1e3}
    for name, fields in (("windows", of_gemma), ("blocks", {"attention": "blocks"})):
        sizes = dataclasses.replace(pit.reward_model, **fields)
        add(dataclasses.replace(pit, policy_model=sizes, reward_model=sizes), "sft_policy, r_pit", f" {name}")
    if arguments[1] > 1:  # where Muon gathers, and adapters take the layout of their weights
        muon_pit, muon_srt = configs(*arguments, "muon")
        add(muon_pit, "sft_policy, r_p, r_pit", " muon")
        add(muon_srt, "dpo", " muon")
        lora = LoraConfig(rank=8, targets=LAYER_MATRICES)
        add(dataclasses.replace(pit, lora=lora), "rl_policy: rollout, rl_policy: reward, rl_policy: update", " lora")
        add(dataclasses.replace(srt, lora=lora), "dpo", " lora")
    return found


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))))
