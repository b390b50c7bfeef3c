"""Learners: each step learns, keeps the types of its state, and PPO keeps the identities that it rests on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pit_jax import checkpoint, sharding, train_state
from pit_jax.config import ModelConfig, PPOConfig
from pit_jax.data import batches
from pit_jax.learners import loop, ppo, reward_model, sft
from pit_jax.losses import policy_gradient
from pit_jax.metrics import MetricsWriter
from pit_jax.models.transformer import ScalarModel, Transformer
from pit_jax.pipelines.common import init_params
from pit_jax.types import PromptBatch, Rollout

pytestmark = pytest.mark.usefixtures("one_device")

V, EOS = 16, 2
SIZES = ModelConfig(vocab_size=V, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16)
POLICY, DECODER, SCORER = Transformer(SIZES), Transformer(SIZES, sharding.DECODE_RULES), ScalarModel(SIZES)


@functools.cache
def _initial(module, seed):
    return jax.device_get(init_params(module, jax.random.key(seed))), init_params(module, jax.random.key(seed))


def initial(module, seed=0):
    """Parameters of their own: steps donate what they are given."""
    host, like = _initial(module, seed)
    return jax.tree.map(lambda x, y: jax.device_put(x, jax.typeof(y).sharding.spec), host, like)


def ids(rng, low, high):
    return list(rng.integers(3, V, rng.integers(low, high)))


def likely(seed=0, rows=8):
    """Rows whose responses differ in length: a mean of means would not be their mean."""
    rng = np.random.default_rng(seed)
    pairs = [([1, *ids(rng, 1, 4)], [*ids(rng, 0, 7), EOS]) for _ in range(rows)]
    return batches.token_rows(pairs, 12)


def groups(width, seed=0, rows=8):
    rng = np.random.default_rng(seed)
    return batches.score_rows([[[1, *ids(rng, 1, 9)] for _ in range(width)] for _ in range(rows)])


LEARNERS = {
    "sft": (POLICY, lambda o, a: sft.make_train_step(POLICY, o, accumulation=a), sft.SFTBatch(likely())),
    "sft_unlikelihood": (
        POLICY,
        lambda o, a: sft.make_train_step(POLICY, o, unlikelihood=0.5, num_targets=8, chunk_size=4, accumulation=a),
        sft.SFTBatch(likely(), likely(1)),
    ),
    "r_p": (SCORER, lambda o, a: reward_model.make_train_step(SCORER, o, loss="gap", accumulation=a), groups(2)),
    "r_pit": (SCORER, lambda o, a: reward_model.make_train_step(SCORER, o, loss="gap", accumulation=a), groups(4)),
    "r_pit_mse": (SCORER, lambda o, a: reward_model.make_train_step(SCORER, o, loss="mse", accumulation=a), groups(4)),
}


def mean(metric):
    return float(metric[0]) / float(metric[1])


def types(tree):
    return jax.tree.map(jax.typeof, tree)


def assert_close(a, b, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@pytest.mark.parametrize("name", ["sft", "r_p", "r_pit"])
def test_a_step_learns_and_keeps_its_types(name):
    """Eight rows are learnt by heart; one program serves all steps."""
    module, make, batch = LEARNERS[name]
    optimizer = optax.adam(1e-2)
    step = make(optimizer, 1)
    batch = sharding.shard_batch(batch)
    state = train_state.create(initial(module), optimizer)
    before, losses = types(state), []
    for _ in range(80):
        state, metrics = step(state, batch)
        losses.append(mean(metrics["loss"]))
    assert types(state) == before and int(state.step) == 80
    assert step._cache_size() == 1
    assert losses[-1] < 0.25 * losses[0], losses[::10]


def test_an_update_that_is_not_finite_is_seen_before_it_is_saved(tmp_path):
    """Loss and gradients of the step are finite; only the new parameters are not."""
    module, make, batch = LEARNERS["r_p"]
    optimizer = optax.scale_by_schedule(lambda count: jnp.where(count == 2, jnp.nan, -1e-3))
    with pytest.raises(loop.NonFiniteError, match="param_norm not finite at step 3; the checkpoint of step 2"):
        loop.run(
            train_state.create(initial(module), optimizer),
            stage="r_p",
            num_steps=3,
            batch_at=lambda step: sharding.shard_batch(batch),
            train_step=make(optimizer, 1),
            directory=tmp_path / "checkpoints",
            writer=MetricsWriter(tmp_path),
            save_every=1,
        )
    assert checkpoint.latest_step(tmp_path / "checkpoints") == 2


@pytest.mark.parametrize("name", LEARNERS)
def test_accumulated_micro_batches_equal_one_batch(name):
    """With plain SGD the update is the gradient."""
    module, make, batch = LEARNERS[name]
    batch, optimizer = sharding.shard_batch(batch), optax.sgd(1.0)
    start = jax.device_get(initial(module))
    results = {}
    for pieces in (1, 4, 8):  # of 8, 2 rows and one
        state, metrics = make(optimizer, pieces)(train_state.create(initial(module), optimizer), batch)
        results[pieces] = jax.tree.map(np.subtract, jax.device_get(state.params), start), jax.device_get(metrics)
    assert_close(results[4], results[1])
    assert_close(results[8], results[1])
    assert mean(results[1][1]["grad_norm"]) > 1e-3


def test_accumulation_of_the_ppo_losses():
    rng = np.random.default_rng(0)
    prompts = batches.prompt_rows([[1, *ids(rng, 0, 5)] for _ in range(8)], 6)
    mask = np.arange(5) < rng.integers(1, 6, 8)[:, None]
    rollout = ppo.sampling.append_response(PromptBatch(*prompts), rng.integers(3, V, (8, 5)), mask)
    numbers = lambda: rng.normal(size=(8, 5)).astype(np.float32)  # noqa: E731
    rollout = rollout._replace(log_probs=np.where(mask, -3 + 0.2 * numbers(), 0).astype(np.float32))
    batch = sharding.shard_batch(ppo.Experience(rollout, numbers(), numbers(), numbers()))

    def policy_loss(params, b):
        mask = b.rollout.response_mask
        log_probs, entropy = ppo.response_log_probs(POLICY, params, b.rollout, temperature=0.7)
        per_row, metrics = policy_gradient.ppo_policy_loss(
            log_probs, b.rollout.log_probs, b.advantages, mask, epsilon=0.2, entropy=entropy, entropy_coef=0.1
        )
        return (jnp.sum(per_row), jnp.sum(mask.astype(jnp.float32))), metrics

    def value_loss(params, b):
        mask = b.rollout.response_mask
        values = ppo.response_values(SCORER, params, b.rollout)
        per_row, metrics = policy_gradient.ppo_value_loss(values, b.values, b.returns, mask, value_epsilon=0.2)
        return (jnp.sum(per_row), jnp.sum(mask.astype(jnp.float32))), metrics

    for loss, module in ((policy_loss, POLICY), (value_loss, SCORER)):
        compute = jax.jit(functools.partial(train_state.gradients, loss), static_argnums=2)
        assert_close(compute(initial(module), batch, 4), compute(initial(module), batch, 1))


def test_scores_relative_to_the_other_answers_by_hand():
    scores = jnp.array([1.0, 2.0, 3.0, 6.0, 0.0, 0.0, 4.0, 0.0])
    # The others' means: 11/3, 10/3, 9/3, 6/3; 4/3, 4/3, 0, 4/3.
    expected = [-8 / 3, -4 / 3, 0.0, 4.0, -4 / 3, -4 / 3, 4.0, -4 / 3]
    # Thirds in float32: a few units in the last place, 1.2e-7 each.
    np.testing.assert_allclose(ppo.relative_scores(scores, 4), expected, rtol=1e-6)
    np.testing.assert_array_equal(ppo.relative_scores(scores, 1), scores)
    shared = jnp.repeat(jnp.array([8.0, -64.0]), 4)  # what all answers to a prompt share plays no part
    # Near 64 a unit in the last place is 3.8e-6 or 7.6e-6, and the smallest number expected is 4/3.
    np.testing.assert_allclose(ppo.relative_scores(scores + shared, 4), expected, rtol=5e-6)


def test_the_name_of_a_loss_chooses_it():
    """Equation 2 and the options of appendix C by hand; a group of two is R_P's whatever the name."""
    wl, ww, ll, lw = scores = (1.0, 0.5, -1.0, -1.5)
    log_s = lambda x: -np.log1p(np.exp(-x))  # noqa: E731
    expected = {
        "gap": -sum(log_s(d) for d in (wl - ww, wl - ll, wl - lw, ww - lw, ll - lw)),
        "gap_no_diagonal": -log_s(wl - lw),
        "mse": (0.0 + 0.0 + 1.5**2 + 1.5**2) / 4,  # to 1, 0.5, 0.5, 0
    }
    for name, value in expected.items():
        loss, _ = reward_model.preference_loss(np.array([scores], np.float32), name)
        np.testing.assert_allclose(loss, [value], rtol=1e-6)
    loss, _ = reward_model.preference_loss(np.array([[1.0, -0.5]], np.float32), "gap")
    np.testing.assert_allclose(loss, [-log_s(1.5)], rtol=1e-6)  # R_P


def test_last_slots_by_hand():
    segments = np.array([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]], np.int32)
    np.testing.assert_array_equal(ppo.last_slots(segments), [[2], [3], [3]])


def test_rows_that_share_tokens_score_as_each_on_its_own():
    """Scores and gradients of groups laid out as trees equal those of their rows one by one."""
    rng = np.random.default_rng(0)
    trees = []
    for _ in range(4):  # x -> {y_w, y_l} -> {y_w, y_l}, as in R_PIT's pairings; the two answers begin alike
        x, start = [1, *ids(rng, 1, 6)], ids(rng, 0, 3)
        w, l = [[*start, *ids(rng, 1, 5)] for _ in range(2)]
        trees.append([[*x, 9, *ref, 10, *y, EOS] for y, ref in ((w, l), (w, w), (l, l), (l, w))])
    together, alone = batches.score_rows(trees), batches.score_rows([[row] for tree in trees for row in tree])
    assert np.sum(together.members > 0) < 0.6 * np.sum(alone.members > 0)
    params = jax.tree.map(lambda x: 2 * x, initial(SCORER))
    weights = rng.normal(size=(4, 4)).astype(np.float32)

    @jax.jit
    def scores_and_gradients(batch):
        summed = lambda p, s: jnp.sum(s(p) * weights.reshape(s(p).shape))  # noqa: E731
        score = lambda p: reward_model.group_scores(SCORER, p, batch)  # noqa: E731
        return score(params), jax.grad(summed)(params, score)

    scores, gradient = scores_and_gradients(sharding.shard_batch(together))
    expected, expected_gradient = scores_and_gradients(sharding.shard_batch(alone))
    assert np.std(scores) > 0.1
    # Float32 sums run in another order: a few units in the last place of 10 (1e-6 each), or of a leaf's largest entry.
    np.testing.assert_allclose(scores, np.asarray(expected).reshape(4, 4), rtol=1e-6, atol=5e-6)
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


def packed_trees(seed=0, count=6):
    """(trees x -> {y_w, y_l} -> {y_w, y_l}; 2, 3, none and 1 of them in sequences of 64 tokens, with room for 3)."""
    rng, trees = np.random.default_rng(seed), []
    for _ in range(count):
        x, (w, l) = [1, *ids(rng, 1, 6)], (ids(rng, 1, 5) for _ in range(2))
        trees.append([[*x, 9, *ref, 10, *y, EOS] for y, ref in ((w, l), (w, w), (l, l), (l, w))])
    return trees, batches.lay_out_groups([trees[:2], trees[2:5], [], trees[5:]], 96, 3, 4)


@pytest.mark.parametrize("changes", [{}, {"attention": "blocks"}, {"attention": "stripes"}, {"attention": "splash"}])
def test_groups_of_a_sequence_score_as_each_on_its_own(changes):
    """Scores and gradients; of 96 tokens, more than two blocks of 16 go another way than the square."""
    model = ScalarModel(dataclasses.replace(SIZES, attention_block=16 if changes else 128, **changes))
    trees, together = packed_trees()
    params = jax.tree.map(lambda x: 2 * x, initial(SCORER))
    places = [0, 1, 3, 4, 5, 9]  # of 4 sequences with room for 3 groups
    weights = np.zeros((12, 4), np.float32)
    weights[places] = np.random.default_rng(1).normal(size=(6, 4))

    def scores_and_gradients(model, batch, weights):
        def total(params):
            scores = reward_model.group_scores(model, params, batch)
            return jnp.sum(scores * weights), scores

        gradient, scores = jax.jit(jax.grad(total, has_aux=True))(params)
        return np.asarray(scores), gradient

    batch = sharding.shard_batch(together)
    assert list(np.flatnonzero(reward_model.are_groups(model, batch))) == places
    scores, gradient = scores_and_gradients(model, batch, weights)
    alone = sharding.shard_batch(batches.score_rows(trees))
    expected, expected_gradient = scores_and_gradients(SCORER, alone, weights[places])
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(scores[places], expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    # Other tokens in the group in the middle: those before and behind it do not move.
    changed = np.where(together.segments == 2, (together.tokens + 5) % V, together.tokens)
    changed[0] = together.tokens[0]
    other, _ = scores_and_gradients(model, sharding.shard_batch(together._replace(tokens=changed)), weights)
    same = [0, 1, 3, 5, 9]
    np.testing.assert_array_equal(other[same], scores[same])
    assert np.all(np.abs(other[4] - scores[4]) > 1e-3)


@pytest.mark.parametrize(("width", "loss", "pieces"), [(4, "gap", 1), (4, "mse", 2), (2, "gap", 4)])
def test_a_step_on_packed_groups_is_that_on_the_groups(width, loss, pieces):
    """The mean over groups, whatever sequences and pieces they stand in: of four pieces one has none."""
    trees, _ = packed_trees()
    trees = [tree[:width] for tree in trees]
    optimizer = optax.sgd(1.0)
    batches_ = batches.score_rows(trees), batches.lay_out_groups([trees[:2], trees[2:5], [], trees[5:]], 96, 3, width)
    found = []
    for batch, accumulation in zip(batches_, (1, pieces), strict=True):
        step = reward_model.make_train_step(SCORER, optimizer, loss=loss, accumulation=accumulation)
        state, metrics = step(train_state.create(initial(SCORER), optimizer), sharding.shard_batch(batch))
        found.append((jax.device_get(state.params), {k: mean(v) for k, v in metrics.items()}, metrics["loss"][1]))
    assert found[0][2] == found[1][2] == 6
    assert_close(found[1][:2], found[0][:2], rtol=1e-5, atol=1e-6)
    assert found[0][1]["grad_norm"] > 0.1


def test_scores_do_not_depend_on_the_side_of_the_padding():
    """A rollout (left-padded prompt) scores what the same tokens score in a right-padded group."""
    rng = np.random.default_rng(0)
    prompts, responses = [[1, *ids(rng, 0, 5)] for _ in range(4)], [ids(rng, 0, 5) for _ in range(4)]
    params = initial(SCORER)
    rollout = ppo.sampling.append_ids(batches.prompt_rows(prompts, 6), responses, 5, EOS)
    scores = jax.jit(functools.partial(ppo.rollout_scores, SCORER))(params, sharding.shard_batch(rollout))
    rows = [[(p + r + [EOS])[: len(p) + 5]] for p, r in zip(prompts, responses, strict=True)]
    expected = jax.jit(functools.partial(reward_model.group_scores, SCORER))(
        params, sharding.shard_batch(batches.score_rows(rows))
    )
    np.testing.assert_allclose(scores, np.asarray(expected)[:, 0], rtol=1e-4, atol=1e-5)
    assert np.std(scores) > 0.01


def test_difference_scores():
    """r(x, y) - r(x, y_ref): 0 where y = y_ref, and the other sign when the two change places."""
    rng = np.random.default_rng(0)
    plain, behind = (batches.prompt_rows([[1, *ids(rng, 0, 5)] for _ in range(4)], 6) for _ in range(2))
    responses, others = ([ids(rng, 0, 5) for _ in range(4)] for _ in range(2))
    of = lambda prompts, r: ppo.sampling.append_ids(prompts, r, 5, EOS)  # noqa: E731
    params, difference = initial(SCORER), jax.jit(functools.partial(ppo.difference_scores, SCORER))

    def scores(y, ref):
        batch = ppo.RLBatch(behind, policy_prompts=plain, references=of(plain, ref))
        return np.asarray(difference(params, *sharding.shard_batch((of(behind, y), batch))))

    np.testing.assert_allclose(scores(responses, responses), 0.0, atol=1e-6)
    np.testing.assert_allclose(scores(responses, others), -scores(others, responses), rtol=1e-4, atol=1e-5)
    assert np.abs(scores(responses, others)).max() > 0.01


# ------------------------------------------------------------------------------------------------------------------ PPO


def score_by_model(params, rollout: Rollout, _):
    return ppo.rollout_scores(SCORER, params, rollout)


def collect_by(sample, judge, state, ref, reward, batch, key):
    return judge(state, ref, reward, batch, sample(state, batch, key))


def make(settings: PPOConfig, score=score_by_model, *, eos_id=EOS, max_new_tokens=5):
    policy_optimizer = optax.adam(settings.policy_optimizer.learning_rate)
    value_optimizer = optax.adam(settings.value_optimizer.learning_rate)
    sample, judge, update = ppo.make_ppo(
        POLICY, DECODER, SCORER, score, policy_optimizer, value_optimizer, settings,
        max_new_tokens=max_new_tokens, eos_id=eos_id,
    )  # fmt: skip
    state = ppo.create(initial(POLICY), initial(SCORER, 5), policy_optimizer, value_optimizer, settings.kl_coef)
    return functools.partial(collect_by, sample, judge), update, state


def prompts_of(seed, rows=8):
    rng = np.random.default_rng(seed)
    return sharding.shard_batch(ppo.RLBatch(batches.prompt_rows([[1, *ids(rng, 0, 5)] for _ in range(rows)], 6)))


def adam(rate):
    return PPOConfig().policy_optimizer.__class__(learning_rate=rate)


# gae_lambda = discount = 1: the first return of a row is the sum of its rewards.
LAWS = PPOConfig(
    policy_optimizer=adam(1e-2), value_optimizer=adam(1e-2), rollout_size=8, num_epochs=2, num_minibatches=2,
    temperature=0.7, kl_coef=0.3, gae_lambda=1.0, normalize_scores=False, missing_eos_penalty=0.625,
)  # fmt: skip


@pytest.fixture(scope="module")
def four_iterations(one_device):
    """(types of the state before and after, programs, what four iterations gave); the policy starts from ref_policy."""
    collect, update, state = make(LAWS)
    ref, reward, key = initial(POLICY), initial(SCORER, 9), jax.random.key(3)
    before, iterations = types(state), []
    for i in range(4):
        experience, raw, statistics, metrics = collect(state, ref, reward, prompts_of(i), key)
        kept = jax.device_get((experience, raw, statistics, metrics))
        state, more = update(state, experience, statistics, metrics["kl"][0] / metrics["kl"][1], key)
        iterations.append((*kept, jax.device_get(more)))
    return before, types(state), (*collect.args, update), iterations


def test_ppo_keeps_its_types(four_iterations):
    before, after, programs, _ = four_iterations
    assert after == before
    assert [program._cache_size() for program in programs] == [1, 1, 1]


def test_the_first_ratio_of_every_rollout_is_1(four_iterations):
    for _, _, _, _, metrics in four_iterations[3]:
        np.testing.assert_allclose(mean(metrics["policy/first_ratio_max"]), 1.0, atol=1e-4)
        assert mean(metrics["policy/ratio_max"]) > 1.005, "the later updates of the iteration move away from it"


def test_answers_that_take_turns_in_slots_are_the_same_rollout(four_iterations, monkeypatch):
    """Two at a time, of eight; tied embeddings repeat the last token of a prompt, so that some of them end at once."""
    slots, generate = [], ppo.sampling.generate

    def recorded(*arguments, config, **more):
        slots.append(config.slots)
        return generate(*arguments, config=config, **more)

    monkeypatch.setattr(ppo.sampling, "generate", recorded)
    collect, _, state = make(dataclasses.replace(LAWS, rollout_slots=2))
    prompts = [[1, 5], [1, EOS], [1, 4, 7], [1, 6], [1, EOS], [1, 9], [1, 8, 3], [1, EOS]]
    batch = sharding.shard_batch(ppo.RLBatch(batches.prompt_rows(prompts, 6)))
    expected, turns = (
        jax.device_get(sample(state, batch, jax.random.key(3))) for sample in (four_iterations[2][0], collect.args[0])
    )
    assert slots == [2] and len(set(expected.response_mask.sum(1))) > 1, "answers end at different times"
    for name in ("tokens", "segments", "positions", "response_mask"):
        np.testing.assert_array_equal(getattr(turns, name), getattr(expected, name))
    assert_close(turns.log_probs, expected.log_probs)


def test_kl_is_0_where_the_policy_starts_from_the_reference(four_iterations):
    first, second = (metrics["kl"] for _, _, _, metrics, _ in four_iterations[3][:2])
    np.testing.assert_allclose(mean(first), 0.0, atol=1e-5)
    assert abs(mean(second)) > 1e-3


def test_rewards_of_a_row_sum_to_score_less_penalty_less_kl(four_iterations):
    ref, ended_rows = initial(POLICY), []
    log_probs = jax.jit(functools.partial(ppo.response_log_probs, POLICY, temperature=0.7))
    for experience, raw, _, metrics, _ in four_iterations[3]:
        rollout, mask = experience.rollout, experience.rollout.response_mask
        ref_log_probs = np.asarray(log_probs(ref, sharding.shard_batch(rollout))[0])
        kl = np.sum((rollout.log_probs - ref_log_probs) * mask, 1)
        ended = np.array([EOS in row[m] for row, m in zip(rollout.tokens[:, -5:], mask, strict=True)])
        expected = raw - 0.625 * ~ended - 0.3 * kl
        np.testing.assert_allclose(experience.returns[:, 0], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(metrics["reward"][0], expected.sum(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(mean(metrics["kl"]), kl.mean(), rtol=1e-3, atol=1e-5)
        assert mean(metrics["ended"]) == ended.mean() and mean(metrics["length"]) == mask.sum(1).mean()
        ended_rows += list(ended)
    assert 0 < sum(ended_rows) < len(ended_rows), "some responses end and some do not"


def test_advantages_are_white_and_nothing_is_off_the_mask(four_iterations):
    for experience, *_ in four_iterations[3]:
        mask = experience.rollout.response_mask
        kept = experience.advantages[mask]
        np.testing.assert_allclose([kept.mean(), kept.var()], [0, 1], atol=1e-4)
        for x in (experience.values, experience.advantages, experience.returns):
            assert np.all(x[~mask] == 0)


def test_score_statistics_equal_numpy_over_all_batches(four_iterations):
    seen = []
    for _, raw, statistics, _, _ in four_iterations[3]:
        seen += list(raw)
        expected = [np.mean(seen), np.var(seen), len(seen)]
        np.testing.assert_allclose([float(x) for x in statistics], expected, rtol=1e-4)


@pytest.fixture(scope="module")
def warmed(one_device):
    """A run with a warm-up of one iteration and adaptive KL, whose mini-batches are written down."""
    rows = []
    take = ppo.sharding.take_rows

    def recorded(tree, numbers, rules):
        jax.debug.callback(lambda x: rows.append(np.asarray(x)), numbers, ordered=True)
        return take(tree, numbers, rules)

    settings = PPOConfig(
        policy_optimizer=adam(1e-2), value_optimizer=adam(1e-2), rollout_size=8, num_epochs=3, num_minibatches=2,
        kl_coef=0.5, gae_lambda=1.0, missing_eos_penalty=0.0, adaptive_kl=True, kl_target=6.0, kl_horizon=100,
        value_warmup=1,
    )  # fmt: skip
    key, states, first = jax.random.key(0), [], None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo.sharding, "take_rows", recorded)
        collect, update, state = make(settings)
        states.append(jax.device_get(state))
        ref, reward = initial(POLICY), initial(SCORER, 9)
        for mean_kl in (50.0, 0.1, 6.6):
            experience, raw, statistics, _ = collect(state, ref, reward, prompts_of(0), key)
            first = first or jax.device_get((experience, raw))
            state, _ = update(state, experience, statistics, jnp.float32(mean_kl), key)
            states.append(jax.device_get(state))
        jax.effects_barrier()
    return states, np.array(rows).reshape(3, 3, 8), first


def test_value_warmup_leaves_the_policy_bitwise_as_it_was(warmed):
    start, first, second, _ = warmed[0]
    jax.tree.map(np.testing.assert_array_equal, first.policy, start.policy)
    equal = lambda a, b: all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))  # noqa: E731
    assert not equal(first.value.params, start.value.params)
    assert not equal(second.policy.params, first.policy.params)
    assert (first.policy.step, second.policy.step, second.value.step) == (0, 6, 12)


def test_adaptive_kl_moves_the_right_way(warmed):
    """Far above the target by 20 % of 8/100, far below by as much, 10 % above by 10 %."""
    coefficients = [float(state.kl_coef) for state in warmed[0]]
    expected = [0.5, 0.5 * 1.016, 0.5 * 1.016 * 0.984, 0.5 * 1.016 * 0.984 * 1.008]
    np.testing.assert_allclose(coefficients, expected, rtol=1e-5)


def test_every_epoch_has_a_permutation_of_its_own(warmed):
    orders = warmed[1]  # iteration, epoch, row
    np.testing.assert_array_equal(np.sort(orders, -1), np.broadcast_to(np.arange(8), (3, 3, 8)))
    assert len({tuple(order) for order in orders.reshape(9, 8)}) == 9


def test_normalised_scores(warmed):
    experience, raw = warmed[2]
    np.testing.assert_allclose(experience.returns[:, 0], (raw - raw.mean()) / raw.std(), rtol=1e-3, atol=1e-3)


def test_ppo_learns_to_write_a_token():
    """The score is the share of the response that is token 7: 1 in 16 at the start."""

    def share(_, rollout, __):
        mask = rollout.response_mask
        return jnp.sum((rollout.tokens[:, -4:] == 7) & mask, 1) / jnp.sum(mask, 1).astype(jnp.float32)

    settings = PPOConfig(
        policy_optimizer=adam(1e-2), value_optimizer=adam(1e-2), rollout_size=32, num_epochs=2, num_minibatches=2,
        kl_coef=0.01, missing_eos_penalty=0.0,
    )  # fmt: skip
    collect, update, state = make(settings, share, eos_id=V + 1, max_new_tokens=4)
    ref, key, scores = initial(POLICY), jax.random.key(1), []
    for i in range(20):
        experience, _, statistics, metrics = collect(state, ref, None, prompts_of(i, 32), key)
        state, _ = update(state, experience, statistics, metrics["kl"][0] / metrics["kl"][1], key)
        scores.append(mean(metrics["score"]))
    assert scores[0] < 0.3 and scores[-1] > 0.8, scores
    assert mean(metrics["ended"]) == 0 and mean(metrics["kl"]) > 0.5


def test_a_response_that_cannot_end_pays_the_penalty():
    """With an EOS outside the vocabulary and no KL, each row's reward is its score less the penalty."""
    collect, _, state = make(LAWS, eos_id=V + 1)
    _, raw, _, metrics = collect(state, initial(POLICY), initial(SCORER, 9), prompts_of(0), jax.random.key(0))
    np.testing.assert_allclose(metrics["reward"][0], np.sum(raw) - 8 * 0.625, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of the compiler for CPUs")
def test_products_of_long_rows_go_to_eigen():
    """What XLA gives to YNNPACK by default: no product of a step, but those of sampling."""
    x = jnp.ones((256, 256))
    by_default = jax.jit(jnp.matmul).lower(x, x).compile().as_text()
    of_a_step = train_state.jit_step(jnp.matmul).lower(x, x).compile().as_text()
    assert "ynn_fusion" in by_default and "ynn_fusion" not in of_a_step
    assert " dot(" in of_a_step


def test_an_option_that_a_compiler_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(train_state, "EIGEN", {"xla_no_such_option": ""})
    train_state.by_eigen.cache_clear()
    try:
        assert train_state.by_eigen() == {}
        assert train_state.jit_step(lambda x: x + 1)(1) == 2
    finally:
        train_state.by_eigen.cache_clear()
