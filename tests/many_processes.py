"""One process of several on one machine: every learner on a 2 x 2 mesh of CPU devices.

    python tests/many_processes.py FOLDER DEVICES [die | stop | pause | damage | fault]

DEVICES are those of this process; the others are named by the variables of `pit_jax.processes`. The first process
writes FOLDER/numbers.json; all save and restore FOLDER/checkpoints. With `die` the last process is killed in between;
with `stop` there is a training of many short steps alone, in which the last process gets SIGTERM; with `pause` work
without a step, in which it does; with `damage` the part of the newest checkpoint that it alone reads is lost;
with `fault` it raises what no user can mend.
"""

import os
import signal
import sys
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={sys.argv[2]} --xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pit_jax import checkpoint, cli, files, interrupts, metrics, processes, sharding, train_state
from pit_jax.config import LoraConfig, ModelConfig, PPOConfig
from pit_jax.data import batches, pairs
from pit_jax.learners import dpo, loop, ppo, reward_model, sft
from pit_jax.models import lora
from pit_jax.models.transformer import ScalarModel, Transformer
from pit_jax.pipelines.common import init_params

SIZES = ModelConfig(vocab_size=32, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=16)
POLICY, DECODER, SCORER = Transformer(SIZES), Transformer(SIZES, sharding.DECODE_RULES), ScalarModel(SIZES)


def rows(count: int, low: int, high: int, seed: int) -> list[list[int]]:
    """Ids."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 32, rng.integers(low, high)).tolist() for _ in range(count)]


def main(folder: Path, dies: bool) -> None:
    """Runs everything; the rows that this process has encoded are numbered in FOLDER/encoded_PROCESS.json."""
    mesh = sharding.make_mesh(2, 2)
    found = {"processes": jax.process_count()}
    adam = optax.adam(1e-2)

    encoded = {}

    def counted(name, rows):
        """`rows`, of which it is written down which ones were asked for."""
        encoded[name] = []
        return batches.Rows(range(len(rows)), lambda i: encoded[name].append(i) or rows[i])

    def take(name, step, state, batch_at):
        for i in range(2):
            state, values = step(state, batch_at(f"{name}_{i}")(i))
            found[f"{name}_{i}"] = metrics.reduce(values)
        return state

    with jax.set_mesh(mesh):
        policy, reward = (init_params(m, jax.random.key(0)) for m in (POLICY, SCORER))
        turns = list(zip(rows(60, 1, 4, 0), rows(60, 1, 6, 1), strict=True))
        held = batches.pack(batches.row_sizes(counted("measured", turns))[:, 0].tolist(), 16)

        def of_turns(name):
            asked = counted(name, turns)
            make = lambda numbers: sft.SFTBatch(batches.lay_out([[asked[i] for i in held[n]] for n in numbers], 16))  # noqa: E731
            return batches.make_batch_at(make, len(held), 8, seed=1)

        create = lambda params: train_state.create(params, adam)  # noqa: E731
        state = take("sft", sft.make_train_step(POLICY, adam, num_targets=12, chunk_size=4), create(policy), of_turns)
        # A checkpoint of arrays of which no process holds all.
        checkpoint.save(folder / "checkpoints", 2, state)
        step, again = checkpoint.restore_latest(folder / "checkpoints", state)
        same = jax.tree.map(lambda a, b: np.array_equal(sharding.to_host(a), sharding.to_host(b)), state, again)
        found["restored"] = [step, all(jax.tree.leaves(same))]
        if dies and jax.process_index() == jax.process_count() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        groups = [tuple([1, 5, *row] for row in rows(4, 1, 9, seed)) for seed in range(16)]

        def of_groups(name):
            asked = counted(name, groups)
            return batches.make_score_batch_at(asked, batches.group_sizes(asked), 8, seed=1, num_steps=2)

        def of_packed_groups(name):
            asked = counted(name, groups)
            return batches.make_packed_score_batch_at(asked, batches.group_sizes(asked), 8, 1, 2, 56, multiple=2)[0]

        gap = reward_model.make_train_step(SCORER, adam, loss="gap")
        reward = init_params(SCORER, jax.random.key(0))
        learnt = take("r_pit", gap, create(reward), of_groups)
        take("packed", gap, learnt, of_packed_groups)
        adapted = lora.add(again.params, LoraConfig(rank=2), jax.random.key(1))
        found["frozen"] = lora.checksums(adapted)
        triples = pairs_of(16)
        log_probs = dpo.reference_log_probs(POLICY, again.params, triples, 4)
        found["log_probs"] = log_probs
        of_pairs = lambda name: pairs.make_pair_batch_at(counted(name, triples), log_probs, 8, seed=1)  # noqa: E731
        take("dpo", dpo.make_train_step(POLICY, adam, beta=0.1), create(adapted), of_pairs)
        fresh = checkpoint.restore(folder / "checkpoints", 2, state).params  # training takes its memory
        rl(fresh, init_params(SCORER, jax.random.key(2)), found)
        found["prompt_length"] = batches.longest_prompt_length([[1] * 9] * 15 + [[1] * 200], 512)
    files.write_json_atomic(folder / f"encoded_{jax.process_index()}.json", encoded)
    found["of_first"] = processes.on_first(lambda: {"pid": np.int64(7)})["pid"]
    if processes.is_first():
        files.write_json_atomic(folder / "numbers.json", found)
    processes.wait("end")


def train(folder: Path) -> None:
    """200 steps of x -> x + batch; in step 5 the last process gets SIGTERM."""

    def batch_at(step):
        time.sleep(0.05)
        if step == 5 and jax.process_index() == jax.process_count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return sharding.shard_batch(np.full(4, step, np.float32))

    with jax.set_mesh(sharding.make_mesh(2, 2)):
        step = jax.jit(lambda x, batch: (x + batch, {"loss": (jnp.sum(batch), jnp.float32(1.0))}))
        writer = metrics.MetricsWriter(processes.own_file(folder / "metrics").parent)
        loop.run(
            sharding.shard_batch(np.zeros(4, np.float32)), stage="s", num_steps=200, batch_at=batch_at,
            train_step=step, directory=folder / "stopped", writer=writer, save_every=1000,
        )  # fmt: skip


def pause() -> None:
    """What a stage does that samples or asks: 200 pieces, in the fifth of which the last process gets SIGTERM."""
    for piece in range(200):
        interrupts.check()
        time.sleep(0.05)
        if piece == 5 and jax.process_index() == jax.process_count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
    print("to the end")


def damage(folder: Path) -> None:
    """Two checkpoints of an array that lies on all devices; of the newer one the last process loses its part."""
    with jax.set_mesh(sharding.make_mesh(4, 1)):
        rows = sharding.shard_batch(np.random.default_rng(0).normal(size=(4, 50_000)).astype(np.float32))
        for step in (1, 2):
            checkpoint.save(folder / "steps", step, {"x": rows * step})
        last = jax.process_count() - 1
        if jax.process_index() == last:
            for file in (folder / "steps" / "2" / "arrays").rglob(f"ocdbt.process_{last}/d/*"):
                file.write_bytes(b"")
        processes.wait("damaged")
        step, state = checkpoint.restore_latest(folder / "steps", {"x": rows})
        assert np.array_equal(sharding.to_host(state["x"]), sharding.to_host(rows))
        checkpoint.save(folder / "steps", 3, state)  # and all are in step
        print(f"went on from {step}", file=sys.stderr)


def pairs_of(count: int) -> list[pairs.Pair]:
    """Pairs of answers to a prompt."""
    return list(zip(rows(count, 2, 5, 4), rows(count, 1, 6, 5), rows(count, 1, 6, 6), strict=True))


def rl(policy, reward, found: dict) -> None:
    """An iteration of PPO."""
    settings = PPOConfig(rollout_size=8, samples_per_prompt=2, num_epochs=1, num_minibatches=2)
    score = lambda params, rollout, _: ppo.rollout_scores(SCORER, params, rollout)  # noqa: E731
    sgd = optax.sgd(0.5)
    sample, judge, update = ppo.make_ppo(POLICY, DECODER, SCORER, score, sgd, sgd, settings, max_new_tokens=5, eos_id=2)
    ref, value = jax.tree.map(lambda x: x * 1.1, policy), jax.tree.map(lambda x: x * 0.9, reward)
    state = ppo.create(policy, value, sgd, sgd, 0.1)
    prompts = [row for row in rows(4, 1, 6, 3) for _ in range(settings.samples_per_prompt)]
    batch = sharding.shard_batch(ppo.RLBatch(batches.prompt_rows(prompts, 6)))
    key = jax.random.key(0)
    experience, raw, statistics, values = judge(state, ref, reward, batch, sample(state, batch, key))
    rollout = sharding.to_host(experience.rollout)
    state, more = update(state, experience, statistics, values["kl"][0] / values["kl"][1], key)
    found |= {"tokens": rollout.tokens, "raw": sharding.to_host(raw), "ppo": metrics.reduce(values | more)}


if __name__ == "__main__":
    from absl import flags

    flags.FLAGS([sys.argv[0]])
    with cli.one_line_errors("the same command goes on"):
        processes.start()
        if sys.argv[3:] == ["fault"]:
            processes.wait("all")
            if jax.process_index() == jax.process_count() - 1:
                raise TypeError("a fault")
            processes.wait("the others")
        elif sys.argv[3:] == ["stop"]:
            train(Path(sys.argv[1]))
        elif sys.argv[3:] == ["damage"]:
            damage(Path(sys.argv[1]))
        elif sys.argv[3:] == ["pause"]:
            pause()
        else:
            main(Path(sys.argv[1]), sys.argv[3:] == ["die"])
