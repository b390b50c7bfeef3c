"""Values of other libraries' tests, where the data are at hand."""

import json
import os
import pathlib

import numpy as np
import pytest

from pit_jax.losses import advantages, masked, preference

DATA = pathlib.Path(os.environ.get("PIT_JAX_DATA", pathlib.Path(__file__).parents[1] / ".." / "shared" / "data"))
GOLDENS = DATA / "goldens" / "goldens.json"

pytestmark = pytest.mark.skipif(
    not GOLDENS.exists(), reason=f"no {GOLDENS}: set PIT_JAX_DATA to the folder of test data"
)


@pytest.fixture(scope="module")
def goldens():
    return json.loads(GOLDENS.read_text())


def test_dpo_of_tunix(goldens):
    golden = goldens["tunix_dpo"]
    # Rows 0 to 3 chosen, 4 to 7 rejected.
    log_probs = np.array(golden["per_token_logps"], np.float32).sum(1).reshape(2, 4).T
    ref_log_probs = np.array(golden["ref_seq_logps"], np.float32).reshape(2, 4).T
    assert [row["loss"] for row in golden["expected"]] == [0.753059, 0.925447]
    for row in golden["expected"]:
        loss, metrics = preference.dpo_loss(
            log_probs, ref_log_probs, beta=golden["beta"], label_smoothing=row["label_smoothing"]
        )
        np.testing.assert_allclose(loss.mean(), row["loss"], atol=golden["atol"])
        np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], row["loss"], atol=golden["atol"])


def test_gae_of_rlax(goldens):
    """rlax takes a value after the last reward and a discount per step; here that value is 0.

    A bootstrap value is added to the last reward as discount * V_R, and a discount of 0 ends a response: the second row
    is one of 4 tokens and one of 1.
    """
    golden = goldens["rlax_gae"]
    rewards, values = np.array(golden["r_t"], np.float32), np.array(golden["v_t"], np.float32)
    rewards[:, -1] += np.array(golden["discount_t"])[:, -1] * values[:, -1]
    values = values[:, :-1]
    for gae_lambda, expected in golden["expected"].items():
        for row, part, discount in ((0, slice(0, 5), 0.99), (1, slice(0, 4), 0.9), (1, slice(4, 5), 0.9)):
            r, v = rewards[row : row + 1, part], values[row : row + 1, part]
            actual, _ = advantages.gae(r, v, np.ones(r.shape, bool), discount=discount, gae_lambda=float(gae_lambda))
            np.testing.assert_allclose(actual[0], expected[row][part], atol=golden["atol"])


def test_masked_mean_and_variance_of_tunix(goldens):
    for row in goldens["tunix_masked"]["masked_mean"]:
        x, mask = np.array(row["x"], np.float32), np.array(row["mask"], bool)
        np.testing.assert_allclose(masked.masked_mean(x, mask, row["axis"]), row["mean"], rtol=1e-5)
    for row in goldens["tunix_masked"]["masked_var_unbiased"]:
        x, mask = np.array(row["x"], np.float32), np.array(row["mask"], bool)
        np.testing.assert_allclose(masked.masked_variance(x, mask, ddof=1), row["var"], rtol=1e-5)


def test_kl_of_nemo_rl(goldens):
    golden = goldens["nemo_rl_kl"]
    log_probs, ref_log_probs = (np.array(golden[name], np.float32) for name in ("logp", "ref_logp"))
    for kind in ("k1", "k2", "k3"):
        actual = advantages.kl_estimate(log_probs, ref_log_probs, kind=kind)
        np.testing.assert_allclose(actual, golden[kind], rtol=golden["rtol"])
