"""With several processes a stage encodes the rows of its own devices: here those of the first half of each batch."""

import jax
import numpy as np
import pytest

from pit_jax import sharding
from pit_jax.config import (
    DataConfig,
    DPOConfig,
    ModelConfig,
    PitConfig,
    PPOConfig,
    RewardModelConfig,
    SFTConfig,
    SrtConfig,
)
from pit_jax.data import batches, encode
from pit_jax.learners import dpo, ppo
from pit_jax.metrics import MetricsWriter
from pit_jax.pipelines import common, pit, srt
from pit_jax.pipelines.common import Context
from pit_jax.pipelines.stages import Workdir
from pit_jax.types import PreferenceExample, Rollout

pytestmark = pytest.mark.usefixtures("one_device")

SIZES = ModelConfig(num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16)
EOS, B = 2, 8


class Characters:
    """One id per character, and what was encoded."""

    vocab_size, pad_id, bos_id, eos_id = 128, 0, 1, EOS
    control_ids = {"<<Candidate>>": 4, "<<Improved>>": 5}

    def __init__(self):
        self.seen = set()

    def encode(self, text):
        self.seen.add(text)
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i >= 32)


ROWS = [PreferenceExample(f"{c}?", f"{c}-", f"{c}++") for c in "abcdefghijklmnop"]
TEXTS = {text: row.prompt[0] for row in ROWS for text in (row.prompt, row.rejected, row.chosen)}


class Seen(Exception):
    """The first batch is there."""


@pytest.fixture
def half(monkeypatch):
    """Calls a stage up to its first batch -> (rows of which a text was encoded for it, the batch)."""
    tokenizer, found = Characters(), []
    measured = batches.measured

    def forgotten(rows, measure):
        sizes = measured(rows, measure)
        rows._found.clear()  # what another process would have measured
        return sizes

    def run(state, *, batch_at, **_):
        tokenizer.seen.clear()
        found.append(batch_at(0))
        raise Seen

    def log_probs(model, params, data, *_, **__):
        return np.zeros((len(data), 2), np.float32)

    monkeypatch.setattr(sharding, "own_rows", lambda count, *_: np.arange(count // 2))
    monkeypatch.setattr(batches, "measured", forgotten)
    monkeypatch.setattr(common.loop, "run", run)
    monkeypatch.setattr(dpo, "reference_log_probs", log_probs)
    for module in (common, srt):  # no model is read
        monkeypatch.setattr(module.optimizers, "make_optimizer", lambda *_: None)
    monkeypatch.setattr(common.train_state, "create", lambda *_: None)
    monkeypatch.setattr(ppo, "create", lambda *_: None)
    for name in ("load_model", "load_pretrained", "with_adapters"):
        monkeypatch.setattr(common, name, lambda *_: {"params": {"backbone": {}, "head": np.zeros(1)}})

    def of(config, stage, functions, root):
        encoder = encode.make_encoder(tokenizer, config.data)
        workdir = Workdir(root, config)
        rows = {"sft": ROWS, "rm": ROWS, "rl": ROWS, "selection": ROWS[:4]}
        with pytest.raises(Seen):
            functions(Context(config, workdir, MetricsWriter(root), rows=rows, encoder=encoder))[stage]()
        return {TEXTS[text] for text in tokenizer.seen & TEXTS.keys()}, found[-1]

    return of


def of_pit(**more):
    return PitConfig(
        data=DataConfig(prompt_window=4, response_window=4, reflection_window=4),
        policy_model=SIZES, pit_model=SIZES, reward_model=SIZES, sft_policy=SFTConfig(batch_size=B),
        sft_pit=SFTConfig(batch_size=B, unlikelihood=0.1), r_p=RewardModelConfig(batch_size=B, start_from="pretrain"),
        r_pit=RewardModelConfig(batch_size=B, start_from="pretrain"), ppo=PPOConfig(rollout_size=B),
        ppo_pit=PPOConfig(rollout_size=B, **more),
    )  # fmt: skip


@pytest.mark.parametrize("stage", ["sft_policy", "sft_pit", "r_p", "r_pit"])
def test_learning_from_pairs(half, stage, tmp_path):
    seen, batch = half(of_pit(), stage, pit.stage_functions, tmp_path)
    assert len(seen) == B // 2 == len(jax.tree.leaves(batch)[0])


def test_sequences_of_several_rows(half, tmp_path):
    config = of_pit()
    config = common.dataclasses.replace(config, sft_policy=SFTConfig(batch_size=2, sequence_length=64))
    seen, batch = half(config, "sft_policy", pit.stage_functions, tmp_path)
    rows_of = np.max(np.asarray(batch.likely.segments), axis=1)
    assert len(rows_of) == 1 and len(seen) == rows_of[0] > 1


@pytest.mark.parametrize("stage", ["r_p", "r_pit"])
def test_sequences_of_several_groups(half, stage, tmp_path, capsys):
    settings = RewardModelConfig(batch_size=B, sequence_length=100, start_from="pretrain")
    config = common.dataclasses.replace(of_pit(), r_p=settings, r_pit=settings)
    seen, batch = half(config, stage, pit.stage_functions, tmp_path)
    groups_of = np.max(np.asarray(batch.segments), axis=1)
    assert 1 < groups_of[0] <= batch.last.shape[1] and len(seen) == sum(groups_of) < B
    assert "packed into sequences of 100 tokens, " in capsys.readouterr().out


@pytest.mark.parametrize(("stage", "copies", "distinct"), [("rl_policy", 1, 4), ("rl_pit_1", 1, 4), ("rl_pit_1", 4, 1)])
def test_prompts_of_rl_and_their_ref_responses(half, stage, copies, distinct, tmp_path):
    seen, batch = half(of_pit(samples_per_prompt=copies), stage, pit.stage_functions, tmp_path)
    assert len(seen) == distinct and len(batch.arrays.prompts.lengths) == B // 2
    assert len(batch.rows) == B


def test_pairs_of_dpo(half, tmp_path):
    config = SrtConfig(data=of_pit().data, policy_model=SIZES, dpo=DPOConfig(batch_size=B), srt=SFTConfig(batch_size=B))
    records = [
        srt.Record(i, r.prompt, r.rejected, "w", "s", 5.0, r.chosen, 7.0, (5.0, 7.0), "", "", "c", 0, 0)
        for i, r in enumerate(ROWS)
    ]
    for stage, name in (("srt", "critic_feedback"), ("dpo_1", "self_feedback_1")):

        def functions(context, name=name):
            srt.write_records(context, name, records)
            return srt.stage_functions(context)

        seen, batch = half(config, stage, functions, tmp_path)
        assert len(seen) == B // 2 == len(jax.tree.leaves(batch)[0]), stage


def test_texts_are_read_in_the_own_rows_and_counted_over_all(monkeypatch, tmp_path):
    """Four answers: a copy, one that is none, and two of another process, whose counts come from there."""
    config = of_pit()
    rows = [PreferenceExample("x?", "no", "yes", requirements=r) for r in ((), (), (), ())]
    context = Context(config, None, None, encoder=encode.make_encoder(Characters(), config.data))
    answer = np.asarray([[*map(ord, "no"), EOS], [*map(ord, "go"), EOS]], np.int32)
    rollout = Rollout(answer, None, None, None, np.ones((2, 3), bool))
    references = batches.Rows(["no"] * 4, lambda y: [*map(ord, y)])
    asked = []
    make_batch = sharding.make_batch

    def with_others(count, make):
        counts = make(np.arange(2))
        return make_batch(count, lambda own: np.concatenate([counts, [[1, 0, 0], [1, 0, 0]]]))

    monkeypatch.setattr(sharding, "own_rows", lambda count, *_: np.arange(count if asked else 2))
    monkeypatch.setattr(sharding, "make_batch", lambda *args: asked.append(1) or with_others(*args))
    found = pit.text_metrics(context, rollout, pit.TextBatch(None, rows, references))
    assert found == {"copy_rate": (3, 4)}
