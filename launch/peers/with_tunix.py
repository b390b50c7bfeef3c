"""The trainers of Tunix: PeftTrainer, DPOTrainer, PPOLearner, and its Sampler.

It has no trainer of reward models: a loss of Bradley-Terry is given to PeftTrainer. DPOTrainer computes the log-probs
of the reference in each step, and has no way to store them.
"""

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.generate import sampler
from tunix.models.llama3 import model as llama
from tunix.rl import common as inputs, utils
from tunix.sft import hooks, peft_trainer
from tunix.sft.dpo import dpo_trainer

NEVER = [-1]
"""Tokens at which sampling ends."""


class Words:
    """A tokenizer: words t3, t4, ... are the ids."""

    def encode(self, text: str, **_) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids, **_) -> str:
        return " ".join(f"t{int(i)}" for i in ids)

    def bos_id(self) -> int:
        return common.BOS

    def eos_id(self) -> int:
        return common.EOS

    def pad_id(self) -> int:
        return common.PAD


class Llama(llama.Llama3):
    """Takes the segments that 0.1.7 gives to the value and reward models, and that its own class does not take."""

    def __call__(self, input_tokens, positions, cache, attention_mask, segment_ids=None):
        return super().__call__(input_tokens, positions, cache, attention_mask)


class Marks(hooks.TrainingHooks):
    """Tells of the ends of steps."""

    def __init__(self, ends: common.Ends):
        self.ends = ends

    def on_train_start(self, *_):
        self.ends.mark()

    def on_train_step_end(self, *_):
        self.ends.mark()

    def on_train_end(self, *_): ...

    def on_train_step_start(self, *_): ...

    def on_eval_step_start(self, *_): ...

    def on_eval_step_end(self, *_): ...


def decoder(work: dict, seed: int = 0) -> Llama:
    """float32, with random weights, which its own initialisation has not in all places."""
    sizes = work["sizes"]
    made = Llama(
        llama.ModelConfig(
            num_layers=sizes["num_layers"], vocab_size=sizes["vocab_size"], embed_dim=sizes["d_model"],
            hidden_dim=sizes["mlp_dim"], num_heads=sizes["num_heads"], head_dim=sizes["head_dim"],
            num_kv_heads=sizes["num_kv_heads"], rope_theta=int(sizes["rope_theta"]), norm_eps=sizes["norm_epsilon"],
            weight_tying=sizes["tie_embeddings"],
        ),
        rngs=nnx.Rngs(params=seed),
    )  # fmt: skip
    graph, state = nnx.split(made)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [
        0.02 * jax.random.normal(key, leaf.shape, leaf.dtype) if leaf.ndim > 1 else leaf
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return nnx.merge(graph, jax.tree.unflatten(tree, drawn))


def scorer(work: dict, seed: int = 0) -> nnx.Module:
    """A reward or value model."""
    return utils.create_critic_model(decoder(work, seed), seed=seed)


def optimizer(work: dict) -> optax.GradientTransformation:
    """AdamW with a clip."""
    how = work["optimizer"]
    adamw = optax.adamw(how["learning_rate"], weight_decay=how["weight_decay"])
    return optax.chain(optax.clip_by_global_norm(how["clip_norm"]), adamw)


def settings(kind: type, calls: int, **more):
    """Of a trainer."""
    return kind(eval_every_n_steps=10**9, max_steps=calls, pbar_description=None, **more)


def multiply(matrix: np.ndarray):
    """See common.limit."""
    matrix, product = jnp.asarray(matrix), jax.jit(jnp.matmul)
    return lambda: product(matrix, matrix).block_until_ready()


def train(trainer: peft_trainer.PeftTrainer, data: list, ends: common.Ends) -> None:
    """Over all batches."""
    trainer.with_training_hooks(Marks(ends))
    trainer.train(data)


def places(ids: jax.Array) -> dict[str, jax.Array]:
    """Of full rows."""
    mask = jnp.ones(ids.shape, bool)
    return {
        "positions": inputs.build_positions_from_mask(mask), "attention_mask": inputs.make_causal_attn_mask(mask)
    }  # fmt: skip


def sft(work: dict, variant: str, calls: int, ends: common.Ends) -> None:
    """Steps of training."""
    trainer = peft_trainer.PeftTrainer(
        decoder(work), optimizer(work), settings(peft_trainer.TrainingConfig, calls)
    )  # fmt: skip
    trainer.with_gen_model_input_fn(
        lambda x: {"input_tokens": x.input_tokens, "input_mask": x.input_mask, **places(x.input_tokens)}
    )
    ids = [common.random_tokens(work, i, work["rows"], work["length"]) for i in range(calls)]
    train(trainer, [peft_trainer.TrainingInput(input_tokens=x, input_mask=np.ones_like(x)) for x in ids], ends)


def dpo(work: dict, variant: str, calls: int, ends: common.Ends) -> None:
    """Steps of training."""
    data = []
    for i in range(calls):
        fields = zip(("prompt", "chosen", "rejected"), common.pairs(work, i), strict=True)
        both = {f"{name}_{what}": f(x) for name, x in fields for what, f in (("ids", np.array), ("mask", np.ones_like))}
        data.append(dpo_trainer.TrainingInput(**both))
    how = settings(dpo_trainer.DPOTrainingConfig, calls, beta=0.1)
    train(dpo_trainer.DPOTrainer(decoder(work), decoder(work), optimizer(work), how), data, ends)


def rm(work: dict, variant: str, calls: int, ends: common.Ends) -> None:
    """Steps of training."""

    def loss(model, ids, positions, attention_mask):
        scores, _ = model(ids, positions, None, attention_mask)
        chosen, rejected = jnp.split(scores[:, -1, 0], 2)
        return -jnp.mean(jax.nn.log_sigmoid(chosen - rejected))

    trainer = peft_trainer.PeftTrainer(
        scorer(work), optimizer(work), settings(peft_trainer.TrainingConfig, calls)
    )  # fmt: skip
    trainer.with_loss_fn(loss).with_gen_model_input_fn(lambda x: {"ids": x["ids"], **places(x["ids"])})
    data = []
    for i in range(calls):
        x, chosen, rejected = common.pairs(work, i)
        data.append({"ids": np.concatenate([np.hstack([x, chosen]), np.hstack([x, rejected])])})
    train(trainer, data, ends)


def prompts(work: dict, seed: int) -> list[str]:
    """One token less than a prompt has, as BOS comes before them."""
    return [Words().decode(row) for row in common.random_tokens(work, seed, work["rows"], work["prompt"] - 1)]


def gen(work: dict, variant: str, calls: int, ends: common.Ends) -> None:
    """Batches of sampling."""
    sizes = work["sizes"]
    cache = sampler.CacheConfig(
        cache_size=work["prompt"] + work["new"], num_layers=sizes["num_layers"],
        num_kv_heads=sizes["num_kv_heads"], head_dim=sizes["head_dim"],
    )  # fmt: skip
    sample = sampler.Sampler(decoder(work), Words(), cache)
    ends.mark()
    for i in range(calls):
        found = sample(
            prompts(work, i), max_generation_steps=work["new"], max_prompt_length=work["prompt"], temperature=1.0,
            top_p=1.0, seed=i, eos_tokens=NEVER,
        )  # fmt: skip
        if {len(row) for row in found.tokens} != {work["new"]}:
            raise RuntimeError(f"sampled {sorted(len(row) for row in found.tokens)} tokens")
        ends.mark()


def ppo(work: dict, variant: str, calls: int, ends: common.Ends) -> None:
    """Iterations: sampling, scoring and the updates; one ends where the next batch is asked for."""
    from tunix.rl import rl_cluster
    from tunix.rl.ppo import ppo_learner
    from tunix.rl.rollout import base_rollout

    mesh, Role = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp")), rl_cluster.Role
    roles = (Role.ACTOR, Role.CRITIC, Role.REFERENCE, Role.REWARD, Role.ROLLOUT)
    how = rl_cluster.RLTrainingConfig(
        actor_optimizer=optimizer(work), critic_optimizer=optimizer(work), eval_every_n_steps=10**9, max_steps=10**6,
        mini_batch_size=work["rows"] // work["minibatches"],
    )  # fmt: skip
    sampling = base_rollout.RolloutConfig(
        max_tokens_to_generate=work["new"], max_prompt_length=work["prompt"],
        kv_cache_size=work["prompt"] + work["new"], temperature=1.0, top_p=1.0, eos_tokens=NEVER,
    )  # fmt: skip
    cluster = rl_cluster.RLCluster(
        actor=decoder(work), critic=scorer(work, 1), reference=decoder(work), reward=scorer(work, 2),
        tokenizer=Words(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh), rollout_engine="vanilla", training_config=how,
            rollout_config=sampling,
        ),
    )  # fmt: skip
    learner = ppo_learner.PPOLearner(cluster, ppo_learner.PPOConfig(num_iterations=work["epochs"], beta=0.05))

    def data():
        for i in range(calls):
            ends.mark()
            yield {"prompts": np.array(prompts(work, i))}
        ends.mark()

    with mesh:
        learner.train(data())


if __name__ == "__main__":
    kinds = {"sft": sft, "dpo": dpo, "rm": rm, "gen": gen, "ppo": ppo}
    common.main(multiply, kinds, ("google-tunix", "qwix", "jax", "flax", "optax"))
