"""Compiles every learner's step for TPU v4:2x2x1 with the real compiler, on a machine without a TPU.

    python tests/compile_for_tpu.py DATA MODEL DTYPE REMAT CHUNK

Prints one JSON line: program -> bytes of temporaries per device. A process of its own, since the environment has to be
set before jax is imported.
"""

import dataclasses
import functools
import json
import os
import sys

os.environ.update(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v4-8", TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # no TPU is held, so two test processes may compile at once
)  # fmt: skip

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from pit_jax import optimizers, sampling, sharding, train_state
from pit_jax.config import LAYER_MATRICES, LoraConfig, ModelConfig, OptimizerConfig, PPOConfig, SamplingConfig
from pit_jax.data.pairs import PairBatch
from pit_jax.learners import dpo, ppo, reward_model, sft
from pit_jax.models import lora
from pit_jax.models.transformer import ScalarModel, Transformer
from pit_jax.types import PromptBatch, Rollout, ScoreBatch, TokenBatch

B, T, P, R = 8, 64, 32, 16


def main(data: int, model: int, dtype: str, remat: str, chunk_size: int) -> dict[str, int]:
    """Program -> bytes of temporaries per device."""
    topology = topologies.get_topology_desc(
        "v4:2x2x1", platform="tpu", chip_config_name="megacore", chips_per_host_bounds=(2, 2, 1), num_slices=1
    )
    mesh = sharding.make_mesh(data, model, devices=topology.devices)
    config = ModelConfig(
        vocab_size=512, num_layers=2, d_model=128, num_heads=4, num_kv_heads=2, head_dim=32, mlp_dim=256,
        dtype=dtype, remat=remat, copy_init=1.0, attention_block=24,
    )  # fmt: skip
    decoder, decode, scalar = Transformer(config), Transformer(config, sharding.DECODE_RULES), ScalarModel(config)
    made = {
        name: optimizers.make_optimizer(
            OptimizerConfig(name, schedule="cosine", warmup_fraction=0.1, weight_decay=0.1), 10
        )
        for name in (("adamw", "muon") if model > 1 else ("adamw",))
    }
    adamw = made["adamw"]

    def array(shape, dtype):
        spec = jax.P("data", *[None] * (len(shape) - 1)) if shape else jax.P()
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    # Nothing may run while this mesh is set: its devices compile, but do not exist.
    key = array((), jax.eval_shape(lambda: jax.random.key(0)).dtype)

    def on_mesh(tree):
        def place(x):
            spec = jax.P() if x.sharding is None else x.sharding.spec
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

        return jax.tree.map(place, tree)

    def parameters(module, method=None):
        rows = array((4, 8), jnp.int32)
        init = lambda k, x: module.init(k, x, x, x, method=method)  # noqa: E731
        return on_mesh(jax.eval_shape(init, key, rows))

    def state(params, optimizer=adamw):
        start = lambda p: train_state.TrainState(jnp.int32(0), p, optimizer.init(lora.trained(p)))  # noqa: E731
        return on_mesh(jax.eval_shape(start, params))

    with jax.set_mesh(mesh):
        policy, reward = parameters(decoder, Transformer.full_logits), parameters(scalar)
        ints = lambda *shape: array(shape, jnp.int32)  # noqa: E731
        tokens = TokenBatch(ints(B, T), ints(B, T), ints(B, T), array((B, T), jnp.bool_))
        groups = lambda C, T: ScoreBatch(ints(B, T), ints(B, T), ints(B, T), ints(B, C))  # noqa: E731
        collect, update = ppo.make_ppo(
            decoder, decode, scalar, lambda p, r, _: ppo.rollout_scores(scalar, p, r), adamw, adamw,
            PPOConfig(
                rollout_size=B, samples_per_prompt=4, num_minibatches=2, num_epochs=2,
                adaptive_kl=True, entropy_coef=0.01,
            ),
            max_new_tokens=R, eos_id=2,
        )  # fmt: skip
        targets = LoraConfig(rank=8, targets=LAYER_MATRICES)
        adapted = lambda params: on_mesh(jax.eval_shape(lambda p: lora.add(p, targets, jax.random.key(0)), params))  # noqa: E731
        number = array((), jnp.float32)
        ppo_state = ppo.PPOState(
            array((), jnp.int32), state(policy), state(reward), number, ppo.ScoreStatistics(number, number, number)
        )
        batch = ppo.RLBatch(PromptBatch(ints(B, P), ints(B)))
        rows, mask = ints(B, P + R), array((B, R), jnp.bool_)
        behind = Rollout(rows, rows, rows, array((B, R), jnp.float32), mask)
        with_references = batch._replace(policy_prompts=batch.prompts, references=behind)
        difference = jax.jit(functools.partial(ppo.difference_scores, scalar))
        experience, _, statistics, _ = jax.eval_shape(collect, ppo_state, policy, reward, batch, key)
        programs = {
            "ppo_collect": (collect, ppo_state, policy, reward, batch, key),
            "ppo_update": (update, ppo_state, on_mesh(experience), on_mesh(statistics), number, key),
            "difference_scores": (difference, reward, behind, with_references),
            "generate_with_stop": (
                jax.jit(functools.partial(
                    sampling.generate, model=decode, config=SamplingConfig(R), eos_id=2, stop=(5, 6, 7)
                )),
                policy, batch.prompts, key,
            ),
        }  # fmt: skip
        adapted_state = ppo_state._replace(policy=state(adapted(policy)), value=state(adapted(reward)))
        pairs = PairBatch(
            *(ints(B, T) for _ in range(3)), *(ints(B, 2 * R) for _ in range(3)), array((B, 2), jnp.float32)
        )
        for name, optimizer in made.items():
            sft_step = sft.make_train_step(decoder, optimizer, num_targets=32, chunk_size=chunk_size)
            step = reward_model.make_train_step(scalar, optimizer, loss="gap")
            dpo_step = dpo.make_train_step(decoder, optimizer, beta=0.1, chunk_size=chunk_size)
            programs |= {
                f"dpo_{name}": (dpo_step, state(policy, optimizer), pairs),
                f"sft_{name}": (sft_step, state(policy, optimizer), sft.SFTBatch(tokens)),
                f"r_p_{name}": (step, state(reward, optimizer), groups(2, T)),
                f"r_pit_{name}": (step, state(reward, optimizer), groups(4, 2 * T)),
            }
        # Those above attend by the kernel: T is above two blocks. These have windows by layers, or cannot do it so.
        gemma = dataclasses.replace(
            config, sliding_window=40, global_every=2, attention_softcap=30.0, local_rope_theta=1e3
        )
        windows = Transformer(gemma), ScalarModel(gemma)
        unrolled = ScalarModel(dataclasses.replace(config, attention="blocks"))
        for name, module in (("windows", windows[1]), ("blocks", unrolled)):
            step = reward_model.make_train_step(module, adamw, loss="gap")
            programs[f"r_pit_{name}"] = step, state(parameters(module)), groups(4, 2 * T)
        step = sft.make_train_step(windows[0], adamw, num_targets=32, chunk_size=chunk_size)
        policy_of_windows = parameters(windows[0], Transformer.full_logits)
        programs["sft_windows"] = step, state(policy_of_windows), sft.SFTBatch(tokens)
        if model > 1:  # adapters take the layout of their weights: it is on this mesh that they can go wrong
            dpo_step = dpo.make_train_step(decoder, adamw, beta=0.1, chunk_size=chunk_size)
            programs |= {
                "dpo_lora": (dpo_step, state(adapted(policy)), pairs),
                "ppo_collect_lora": (collect, adapted_state, policy, reward, batch, key),
                "ppo_update_lora": (update, adapted_state, on_mesh(experience), on_mesh(statistics), number, key),
            }
        return {
            name: program.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
            for name, (program, *arguments) in programs.items()
        }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))))
