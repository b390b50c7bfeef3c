"""A run that starts from a converted model: its sizes, its vocabulary, its tokenizer, and the first stage on it."""

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from pit_jax import checkpoint, config as c, convert, sharding
from pit_jax.data import tokenizer
from pit_jax.models import hf
from pit_jax.models.transformer import Transformer
from pit_jax.pipelines import common, pit, srt
from pit_jax.pipelines.stages import Workdir

transformers = pytest.importorskip("transformers", reason="needs the extra parity")

WORDS = "one two three four five six seven eight nine ten say the word and then another"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny Llama as transformers writes it, with a SentencePiece model that has none of our control symbols."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("llama")
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=640,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([WORDS] * 20), model_writer=file, vocab_size=300, model_type="unigram",
            hard_vocab_limit=False, byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def converted(model_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "llama"
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        convert.import_hf(str(model_folder), output)
    return output


def test_srt_takes_the_sizes_of_a_converted_model(converted):
    made = runpy.run_path("configs/srt_tulu2.py")["get_config"](str(converted))
    config = c.from_config_dict(c.SrtConfig, made)
    assert (config.base, config.mesh.model) == (str(converted), 1)
    assert common.of_checkpoint(config) == config
    other = dataclasses.replace(config, policy_model=dataclasses.replace(config.policy_model, num_layers=3))
    with pytest.raises(ValueError, match=f"num_layers is 3, but must be 2.*configs/srt_tulu2.py:{converted}"):
        common.of_checkpoint(other)


def config_for(converted: Path, data: Path) -> c.PitConfig:
    made = runpy.run_path("configs/pit_smollm.py")["get_config"](str(converted))
    config = c.from_config_dict(c.PitConfig, made)
    r = dataclasses.replace
    return r(
        config,
        data=r(config.data, path=str(data), num_selection=2, num_test=2, prompt_window=32, response_window=32),
        sft_policy=r(config.sft_policy, num_steps=1, batch_size=4, accumulation=1, sequence_length=96, chunk_size=0),
    )


@pytest.fixture
def rows_file(tmp_path):
    rows = [{"prompt": f"say the word {i}", "chosen": "one two", "rejected": f"three {i}"} for i in range(30)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_run_takes_sizes_vocabulary_and_tokenizer_of_the_model(converted, rows_file, tmp_path):
    config = common.of_checkpoint(config_for(converted, rows_file))
    assert config.policy_model.num_tokens == 320 and config.policy_model.vocab_size == 384
    pit.check(config, {"data", "sft_policy"})
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        context = common.Context(config, Workdir(tmp_path / "run", config), common.MetricsWriter(tmp_path / "run"))
        context.workdir.finish("data", common.data_stage(context))
        theirs = tokenizer.load(converted / "tokenizer")
        assert context.encoder.tokenizer.digest == theirs.digest
        assert max(theirs.control_ids.values()) < 320
        common.sft_policy_stage(context, "sft_policy", config.sft_policy)
        trained = common.load_model(context, "sft_policy")
        model = common.model_of(context, "sft_policy")
        like = common.shapes(Transformer(model.config))
        start = checkpoint.restore(converted, 0, like)
        moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), trained, start)
        assert 0 < max(jax.tree.leaves(moved)) < 0.01  # one step from where the model was
        # The trained model goes back, and opens with its tokenizer.
        convert.export_hf(tmp_path / "run" / "models" / "sft_policy", tmp_path / "exported")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert exported.config.vocab_size == 320
    assert exported.config.max_position_embeddings == 640, "that of the model which the run started from"
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert text.encode("say the word", add_special_tokens=False) == theirs.encode("say the word")


def test_other_sizes_are_named(converted, rows_file):
    config = config_for(converted, rows_file)
    wrong = dataclasses.replace(config, pit_model=dataclasses.replace(config.pit_model, num_layers=3, remat="full"))
    with pytest.raises(ValueError, match=r"config\.pit_model\.num_layers is 3, but must be 2\. --config=configs/pit_"):
        common.of_checkpoint(wrong)


def test_a_run_without_a_tokenizer_is_refused(converted, rows_file, tmp_path):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(converted, bare)
    shutil.rmtree(bare / "tokenizer")
    with pytest.raises(ValueError, match=r"config\.pretrain\.checkpoint=.*has no tokenizer"):
        pit.check(config_for(bare, rows_file), {"data"})
    with pytest.raises(ValueError, match=r"config\.base=.*has no tokenizer"):
        srt.check(c.SrtConfig(base=str(bare)), {"data"})


@pytest.mark.parametrize(
    ("mesh", "field"),
    [
        ({"data": 1, "model": 4}, "policy_model.num_kv_heads=2 is no multiple of the 4 devices .*config.mesh.model"),
        ({"data": 3, "model": 1}, "policy_model.d_model=32 is no multiple of the 3 devices .*config.mesh.data"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model(converted, rows_file, mesh, field):
    with pytest.raises(ValueError, match=field):
        common.check_layout(config_for(converted, rows_file), mesh)
    common.check_layout(config_for(converted, rows_file), {"data": 4, "model": 2})


def test_another_tokenizer_is_refused(converted, rows_file):
    config = config_for(converted, rows_file)
    config = dataclasses.replace(config, tokenizer=c.TokenizerConfig(path="bytes"))
    with pytest.raises(ValueError, match="has learnt ids of"):
        pit.check(config, {"data"})


def test_no_checkpoint(rows_file, tmp_path):
    config = c.PitConfig(pretrain=c.PretrainConfig(checkpoint=str(tmp_path)))
    with pytest.raises(ValueError, match="holds no checkpoint of pit_jax.*pit_jax.convert --from=hf"):
        pit.check(config, {"data"})


def test_a_reward_model_is_no_start(converted, rows_file, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(converted, other)
    description = hf.read_description(other)
    hf.write_description(other, description._replace(kind="reward_model"))
    with pytest.raises(ValueError, match="is a reward model: name a language model"):
        common.of_checkpoint(config_for(other, rows_file))
