"""PPO with a per-token KL to the frozen SFT policy, for M_P (Equation 3) and M_PIT (Equations 4 and 5).

The two differ only in their prompts: `Human: {x}Assistant:` and
`Human: {x}Assistant:<<Candidate>> {y_ref}<<Improved>>`.
A prompt followed by its sampled response is, token for token, the row that R_P and R_PIT were trained on
(appendix A), so the reward model reads the rollout as it is.

One iteration, in numbered steps: `sample` is 1, `judge` is 2 to 6, `update` is 7.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from pit_jax import sampling, sharding, train_state
from pit_jax.config import PPOConfig, SamplingConfig
from pit_jax.losses import advantages as adv, policy_gradient
from pit_jax.losses.log_probs import token_log_probs
from pit_jax.losses.masked import masked_whiten
from pit_jax.models.transformer import ScalarModel, Transformer
from pit_jax.train_state import TrainState, apply_gradients, gradients, jit_step
from pit_jax.types import Array, Params, PromptBatch, Rollout


class ScoreStatistics(NamedTuple):
    """Running mean and variance of scores (Chan et al. 1979), [] float32 each."""

    mean: Array
    variance: Array
    count: Array


class PPOState(NamedTuple):
    """All that a PPO run must save to go on bitwise.

    Attributes:
      step: [] int32, iterations done; the keys of an iteration are folded from it.
      policy, value: parameters and optimizers.
      kl_coef: [] float32, beta; moves under adaptive KL.
      scores: statistics of the scores that it learns from (`relative_scores`).
    """

    step: Array
    policy: TrainState
    value: TrainState
    kl_coef: Array
    scores: ScoreStatistics


class RLBatch(NamedTuple):
    """Prompts of an iteration.

    Attributes:
      prompts: what the policy continues; with `samples_per_prompt` n, each n times, one after the other.
      policy_prompts: the same x in the form of M_P, where the score is a difference of R_P; else None.
      references: ref_response behind `policy_prompts`, as a Rollout; else None.
    """

    prompts: PromptBatch
    policy_prompts: PromptBatch | None = None
    references: Rollout | None = None


class Experience(NamedTuple):
    """A rollout and what PPO learns from it; [B, R] unless said."""

    rollout: Rollout
    values: Array
    advantages: Array
    returns: Array


def create(
    policy_params: Params,
    value_params: Params,
    policy_optimizer: optax.GradientTransformation,
    value_optimizer: optax.GradientTransformation,
    kl_coef: float,
) -> PPOState:
    """The state before the first iteration."""
    return PPOState(
        step=jnp.int32(0),
        policy=train_state.create(policy_params, policy_optimizer),
        value=train_state.create(value_params, value_optimizer),
        kl_coef=jnp.float32(kl_coef),
        scores=ScoreStatistics(jnp.float32(0.0), jnp.float32(1.0), jnp.float32(0.0)),
    )


def response_log_probs(
    model: Transformer, params: Params, rollout: Rollout, *, temperature: float, chunk_size: int = 0
) -> tuple[Array, Array]:
    """(log-probs, entropy), both [B, R], of the sampled tokens under `params`, by the forward pass of sampling."""
    R = rollout.response_mask.shape[1]
    hidden, _ = model.apply(params, rollout.tokens, rollout.segments, rollout.positions, read=slice(-R - 1, -1))
    return token_log_probs(
        lambda h: model.apply(params, h, method=Transformer.logits),
        hidden,
        rollout.tokens[:, -R:],
        temperature=temperature,
        chunk_size=chunk_size or None,
    )


def response_values(model: ScalarModel, params: Params, rollout: Rollout) -> Array:
    """Values [B, R] of the states in which the response tokens were chosen."""
    R = rollout.response_mask.shape[1]
    return model.apply(params, rollout.tokens, rollout.segments, rollout.positions, read=slice(-R - 1, -1))


def last_slots(segments: Array) -> Array:
    """The slot of the last real token of each row, [B, 1]; rows may be padded on either side."""
    slots = jnp.arange(segments.shape[1], dtype=jnp.int32)
    return jnp.max(jnp.where(segments > 0, slots, 0), axis=1, keepdims=True)


def rollout_scores(model: ScalarModel, params: Params, rollout: Rollout) -> Array:
    """Scores [B] of a reward model at the last real token of prompt + response."""
    read = last_slots(rollout.segments)
    return model.apply(params, rollout.tokens, rollout.segments, rollout.positions, read=read)[:, 0]


def difference_scores(model: ScalarModel, params: Params, rollout: Rollout, batch: RLBatch) -> Array:
    """r(x, y) - r(x, y_ref) [B] by R_P: the alternative to R_PIT that appendix C argues against."""
    R = rollout.response_mask.shape[1]
    answers = sampling.append_response(batch.policy_prompts, rollout.tokens[:, -R:], rollout.response_mask)
    return rollout_scores(model, params, answers) - rollout_scores(model, params, batch.references)


def relative_scores(scores: Array, samples_per_prompt: int) -> Array:
    """Scores [B] less the mean score of the other answers to the same prompt; as they are for one answer per prompt.

    The others' mean does not depend on the answer itself, so it is a baseline: it leaves the expected gradient of
    Equations 3 to 5 as it is and takes out what all answers to a prompt share. A gap reward shares much: r_gap(x, y,
    y_ref) differs far more between good and bad y_ref than between the answers y to one of them.

    Args:
      scores: [B], the answers to a prompt one after the other.
      samples_per_prompt: answers per prompt, a divisor of B.
    """
    if samples_per_prompt == 1:
        return scores
    # One number per row: every device takes all of them, as a prompt's answers may lie on several.
    groups = sharding.replicate(scores).reshape(-1, samples_per_prompt)
    others = (jnp.sum(groups, axis=1, keepdims=True) - groups) / (samples_per_prompt - 1)
    return sharding.laid_like((groups - others).reshape(scores.shape), scores)


def update_statistics(statistics: ScoreStatistics, scores: Array) -> ScoreStatistics:
    """Adds a batch of scores [B] to the running mean and variance."""
    count = jnp.float32(scores.shape[0])
    mean, variance = jnp.mean(scores), jnp.var(scores)
    total = statistics.count + count
    delta = mean - statistics.mean
    squares = statistics.variance * statistics.count + variance * count
    squares += jnp.square(delta) * statistics.count * count / total
    return ScoreStatistics(statistics.mean + delta * count / total, squares / total, total)


def make_ppo(
    model: Transformer,
    decode_model: Transformer,
    value_model: ScalarModel,
    score: Callable[[Params, Rollout, RLBatch], Array],
    policy_optimizer: optax.GradientTransformation,
    value_optimizer: optax.GradientTransformation,
    config: PPOConfig,
    *,
    max_new_tokens: int,
    eos_id: int,
):
    """The three jitted programs of an iteration.

    Args:
      model, decode_model: the same decoder with the rules of training and of decoding.
      value_model: the separate value model.
      score: (reward parameters, rollout, batch) -> [B], r(x, y) or r_gap(x, y, y_ref).
      policy_optimizer, value_optimizer: of the two models.
      config: PPO settings; `temperature` is that of sampling and of training log-probs.
      max_new_tokens: R.
      eos_id: ends a response.

    Returns:
      (sample(state, batch, key) -> Rollout,
       judge(state, ref_params, reward_params, batch, rollout) -> (Experience, scores [B], new statistics, metrics),
       update(state, experience, statistics, mean KL, key) -> (state, metrics)); `update` donates the state. `key` is
       the typed PRNG key of the run: an iteration folds its number in. As an argument, it lets rounds share a program.
    """
    settings = SamplingConfig(max_new_tokens=max_new_tokens, temperature=config.temperature, slots=config.rollout_slots)
    read = functools.partial(response_log_probs, model, temperature=config.temperature, chunk_size=config.chunk_size)

    def iteration_key(key: Array, state: PPOState, purpose: int) -> Array:
        return jax.random.fold_in(jax.random.fold_in(key, state.step), purpose)

    def sample(state: PPOState, batch: RLBatch, key: Array):
        # 1. Sample with the current policy, its weights gathered once.
        with jax.named_scope("rollout"):
            gathered = sharding.gather_weights(state.policy.params, model.rules, model.config.dtype)
            return sampling.generate(
                gathered, batch.prompts, iteration_key(key, state, 0), model=decode_model, config=settings,
                eos_id=eos_id, samples=config.samples_per_prompt,
            )  # fmt: skip

    def judge(state: PPOState, ref_params: Params, reward_params: Params, batch: RLBatch, rollout: Rollout):
        mask = rollout.response_mask
        # 2. Log-probs under the SFT policy, and the KL per token.
        with jax.named_scope("reference"):
            ref_log_probs, _ = read(ref_params, rollout)
        kl = adv.kl_estimate(rollout.log_probs, ref_log_probs, kind=config.kl_estimator) * mask
        # 3. Scores, relative to the prompt's other answers; running statistics bring them to unit scale; a penalty
        #    where no EOS came.
        with jax.named_scope("reward"):
            raw = score(reward_params, rollout, batch)
        reward = relative_scores(raw, config.samples_per_prompt)
        statistics = update_statistics(state.scores, reward)
        if config.normalize_scores:
            reward = (reward - statistics.mean) / jnp.sqrt(statistics.variance + 1e-6)
        ended = jnp.any((rollout.tokens[:, -max_new_tokens:] == eos_id) & mask, axis=1)
        reward = reward - config.missing_eos_penalty * (1.0 - ended)
        # 4. Reward per token: -beta * KL, and the score at the last one.
        rewards = adv.token_rewards(reward, kl, mask, kl_coef=state.kl_coef)
        # 5. Values and generalised advantages.
        with jax.named_scope("value"):
            values = response_values(value_model, state.value.params, rollout) * mask
        advantages, returns = adv.gae(rewards, values, mask, discount=config.discount, gae_lambda=config.gae_lambda)
        # 6. Advantages of mean 0 and variance 1 over the tokens of the whole rollout.
        advantages = masked_whiten(advantages, mask)
        rows, tokens = jnp.float32(mask.shape[0]), jnp.sum(mask.astype(jnp.float32))
        metrics = {
            "score": (jnp.sum(raw), rows),
            "reward": (jnp.sum(rewards), rows),
            "kl": (jnp.sum(kl), rows),
            "kl_coef": (state.kl_coef, jnp.float32(1.0)),
            "length": (tokens, rows),
            "ended": (jnp.sum(ended.astype(jnp.float32)), rows),
            "explained_variance": (policy_gradient.explained_variance(values, returns, mask), jnp.float32(1.0)),
        }
        return Experience(rollout, values, advantages, returns), raw, statistics, metrics

    def policy_loss(params: Params, batch: Experience):
        rollout, mask = batch.rollout, batch.rollout.response_mask
        log_probs, entropy = read(params, rollout)
        per_row, metrics = policy_gradient.ppo_policy_loss(
            log_probs, rollout.log_probs, batch.advantages, mask, epsilon=config.epsilon,
            entropy=entropy, entropy_coef=config.entropy_coef,
        )  # fmt: skip
        return (jnp.sum(per_row), jnp.sum(mask.astype(jnp.float32))), metrics

    def value_loss(params: Params, batch: Experience):
        mask = batch.rollout.response_mask
        values = response_values(value_model, params, batch.rollout)
        per_row, metrics = policy_gradient.ppo_value_loss(
            values, batch.values, batch.returns, mask, value_epsilon=config.value_epsilon
        )
        return (jnp.sum(per_row), jnp.sum(mask.astype(jnp.float32))), metrics

    def update(state: PPOState, experience: Experience, statistics: ScoreStatistics, mean_kl: Array, key: Array):
        # 7. Epochs of minibatches, a new permutation each epoch.
        B = experience.values.shape[0]
        size = B // config.num_minibatches
        permute = lambda k: jax.random.permutation(k, B)  # noqa: E731
        orders = jax.vmap(permute)(jax.random.split(iteration_key(key, state, 1), config.num_epochs))
        learn_policy = state.step >= config.value_warmup

        def minibatch(carry, rows):
            policy, value = carry
            batch = sharding.take_rows(experience, rows, model.rules)
            with jax.named_scope("policy_update"):
                grads, metrics = gradients(policy_loss, policy.params, batch)
                new_policy, metrics = apply_gradients(policy, grads, metrics, policy_optimizer)
                policy = jax.tree.map(lambda new, old: jnp.where(learn_policy, new, old), new_policy, policy)
            with jax.named_scope("value_update"):
                grads, more = gradients(value_loss, value.params, batch)
                value, more = apply_gradients(value, grads, more, value_optimizer)
            metrics = {f"policy/{k}": v for k, v in metrics.items()} | {f"value/{k}": v for k, v in more.items()}
            return (policy, value), metrics

        rows = orders.reshape(config.num_epochs * config.num_minibatches, size)
        (policy, value), metrics = jax.lax.scan(minibatch, (state.policy, state.value), rows)
        first_ratio = jax.tree.map(lambda x: x[0], metrics["policy/ratio_max"])
        metrics = jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics) | {"policy/first_ratio_max": first_ratio}
        kl_coef = state.kl_coef
        if config.adaptive_kl:
            kl_coef = adv.adaptive_kl_update(kl_coef, mean_kl, B, target=config.kl_target, horizon=config.kl_horizon)
        return PPOState(state.step + 1, policy, value, kl_coef, statistics), metrics

    return jax.jit(sample), jit_step(judge), jit_step(update, donate_argnums=0)
