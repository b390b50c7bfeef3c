"""Reward models of Hugging Face: tiny ones with random parameters, against transformers itself, row by row."""

import importlib.util
import sys
import warnings

import numpy as np
import pytest

MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} not installed (extra: parity)")

from pit_jax.evaluation import hf_reward  # noqa: E402
from pit_jax.evaluation.hf_reward import load, score  # noqa: E402

PROMPTS = [
    "Name a colour.",
    "x",
    "Say something long about the sea, please, and then stop.",
    "",
    "Hi [there]",
    "naïve 😀",
]
ANSWERS = ["red", "a longer answer than the question", "no", "nothing was asked", "", "é"]
CHAT = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def byte_tokenizer(special, chat_template=None, **names):
    """One token per byte, so that lengths can be counted by hand; `special` comes first in the vocabulary."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocab = {name: i for i, name in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if chat_template is None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = chat_template
    return fast, len(vocab)


@pytest.fixture(scope="module")
def deberta(tmp_path_factory):
    return make_deberta(tmp_path_factory.mktemp("deberta"), 96)


def make_deberta(folder, max_length):
    """A DeBERTa-v2 with dropout and pairs of texts: [CLS] prompt [SEP] answer [SEP]."""
    import torch
    import transformers

    names = dict(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", mask_token="[MASK]")
    names |= dict(model_input_names=["input_ids", "attention_mask", "token_type_ids"])  # those of DebertaV2Tokenizer
    tokenizer, vocab_size = byte_tokenizer(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"], **names)
    tokenizer.save_pretrained(folder)
    config = transformers.DebertaV2Config(
        vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=max_length, type_vocab_size=2, relative_attention=True, pos_att_type=["p2c", "c2p"],
        position_buckets=16, norm_rel_ebd="layer_norm", share_att_key=True, position_biased_input=False,
        hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3, pooler_dropout=0.3, pooler_hidden_size=32,
        pad_token_id=0, num_labels=1, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.DebertaV2ForSequenceClassification(config).save_pretrained(folder)
    return folder


def llama(folder, pad_token_id, num_labels=1, kind="LlamaForSequenceClassification"):
    import torch
    import transformers

    tokenizer, vocab_size = byte_tokenizer(["<pad>", "<s>", "</s>"], CHAT, bos_token="<s>", eos_token="</s>")
    tokenizer.model_max_length = 120
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=200, pad_token_id=pad_token_id, bos_token_id=1, eos_token_id=2,
        num_labels=num_labels, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(1)
    getattr(transformers, kind)(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["deberta", 0, 2, None])
def model(request, tmp_path_factory):
    """DeBERTa, and Llamas whose PAD is a token of its own, is EOS, or is none."""
    if request.param == "deberta":
        return load(request.getfixturevalue("deberta"))
    return load(llama(tmp_path_factory.mktemp("llama"), request.param))


def directly(model, prompts, answers):
    """What transformers says of each row by itself."""
    import torch

    scores = []
    for x, y in zip(prompts, answers, strict=True):
        if model.chat:
            text = f"<s>user: {x}</s><s>assistant: {y}</s>"
            inputs = model.tokenizer(text, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
        else:
            inputs = model.tokenizer(x, y, return_tensors="pt")
        with torch.no_grad():
            scores.append(model.model(**inputs).logits.item())
    return np.asarray(scores)


def test_equals_transformers_row_by_row(model):
    scores = score(model, PROMPTS, ANSWERS, batch_size=4)
    assert scores.dtype == np.float64 and scores.shape == (6,)
    np.testing.assert_allclose(scores, directly(model, PROMPTS, ANSWERS), atol=1e-5, rtol=0)
    assert np.ptp(scores) > 0.1  # the rows differ by much more than that


def test_batch_size_and_order_change_nothing(model):
    scores = score(model, PROMPTS, ANSWERS, batch_size=1)
    for batch_size in (2, 5, 64):
        np.testing.assert_allclose(score(model, PROMPTS, ANSWERS, batch_size), scores, atol=1e-5, rtol=0)
    back = score(model, PROMPTS[::-1], ANSWERS[::-1], batch_size=3)
    np.testing.assert_allclose(back[::-1], scores, atol=1e-5, rtol=0)


def test_dropout_is_off(deberta):
    model = load(deberta)
    assert not model.model.training
    np.testing.assert_array_equal(score(model, PROMPTS, ANSWERS), score(model, PROMPTS, ANSWERS))


def test_pairs_have_their_token_types(deberta):
    row = hf_reward._encode(load(deberta), "ab", "c")
    assert len(row["input_ids"]) == 6  # [CLS] a b [SEP] c [SEP]
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1]


def test_forms_and_limits(deberta, tmp_path):
    assert load(deberta)[2:] == (96, False)  # of the config; the tokenizer has none
    folder = llama(tmp_path, 0)
    assert load(folder)[2:] == (120, True)  # of the tokenizer, below the 200 of the config
    assert load(str(folder), 50).max_length == 50
    with pytest.raises(ValueError, match="max_length of at least 1"):
        load(folder, 0)
    with pytest.raises(ValueError, match="dtype='float64'"):
        load(folder, dtype="float64")


def test_long_rows_lose_the_beginning_of_the_prompt(model):
    # Special tokens and words of the template beside the texts: 3 of a pair, 4 + len("user: assistant: ") of a chat.
    beside = 4 + 17 if model.chat else 3
    limited = model._replace(max_length=beside + 20)
    prompts, answers = ["0123456789" * 3, "short", "abcdefghij" * 2], ["12345", "short", "0123456789"]
    with pytest.warns(UserWarning, match=r"2 of 3 rows are longer than max_length=\d+ tokens \(rows 0, 2\)") as caught:
        scores = score(limited, prompts, answers)
    assert len(caught) == 1
    kept = ["567890123456789", "short", "abcdefghij"]  # 20 bytes less 5, and less 10
    np.testing.assert_allclose(scores, directly(model, kept, answers), atol=1e-5, rtol=0)


def test_an_answer_that_does_not_fit_is_an_error(model):
    beside = 4 + 17 if model.chat else 3
    limited = model._replace(max_length=beside + 5)
    assert score(limited, ["", "x"], ["12345", "1234"]).shape == (2,)
    with pytest.raises(ValueError, match=r"1 of 3 answers alone are longer than max_length=\d+ tokens \(rows 2\)"):
        score(limited, ["", "", "x"], ["1", "12345", "123456"])


def test_special_tokens_in_texts_stay_text(model):
    tokens = ("<s>", "</s>") if model.chat else ("[SEP]", "[CLS]")
    prompts, answers = [f"a{tokens[0]}b", "x"], ["y", f"{tokens[1]}{tokens[1]}"]
    apart = lambda text: text.replace("<", "< ").replace("[", "[ ")  # noqa: E731
    with pytest.warns(UserWarning, match=r"2 of 2 rows have special tokens .* \(rows 0, 1\)"):
        scores = score(model, prompts, answers)
    expected = directly(model, list(map(apart, prompts)), list(map(apart, answers)))
    np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=0)
    assert np.abs(scores - directly(model, prompts, answers)).max() > 1e-3  # which would be control tokens


def test_ordinary_rows_warn_of_nothing(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(model, PROMPTS, ANSWERS)
        assert score(model, [], []).shape == (0,)


def test_wrong_arguments(model):
    with pytest.raises(ValueError, match="2 prompts and 1 answers"):
        score(model, ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="batch_size=0"):
        score(model, ["a"], ["b"], batch_size=0)


def test_models_that_are_no_reward_models(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="it has 2 outputs, but a reward model has one"):
        load(llama(tmp_path / "two", 0, num_labels=2))
    with pytest.raises(ValueError, match=r"lacks the parameters \['score.weight'\]"):
        load(llama(tmp_path / "base", 0, kind="LlamaForCausalLM"))
    with pytest.raises(ValueError, match="reward model .*nowhere cannot be loaded"):
        load(tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[parity\]'"):
        load(tmp_path / "two")
