"""Open models: tiny ones of every family with random parameters, against transformers itself; and what is refused."""

import dataclasses
import functools
import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax import sampling, sharding
from pit_jax.config import ModelConfig, SamplingConfig
from pit_jax.data import batches
from pit_jax.learners import reward_model, sft
from pit_jax.models import hf
from pit_jax.models.transformer import ScalarModel, Transformer, rotary_frequencies
from pit_jax.pipelines.common import init_params, shapes

MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
parity = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} not installed (extra: parity)")
stored = pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="safetensors not installed (extra: hf)"
)
pytestmark = pytest.mark.usefixtures("one_device")

V, P, R = 300, 10, 20
LENGTHS = (10, 7, 2)  # of prompts
SIZES = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LLAMA_3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
CASES = {
    "llama": ("Llama", dict(num_key_value_heads=4, tie_word_embeddings=False)),
    "llama3": ("Llama", dict(
        num_key_value_heads=1, tie_word_embeddings=True, rope_theta=500.0, rope_scaling=LLAMA_3, rms_norm_eps=1e-5
    )),
    "mistral": ("Mistral", dict(sliding_window=6, head_dim=16)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(
        head_dim=16, tie_word_embeddings=True, use_sliding_window=True, sliding_window=5, max_window_layers=0
    )),
    "gemma": ("Gemma", dict(head_dim=16)),
    "gemma2": ("Gemma2", dict(
        head_dim=8, sliding_window=5, query_pre_attn_scalar=12, attn_logit_softcapping=3.0, final_logit_softcapping=9.0
    )),
    "gemma3": ("Gemma3Text", dict(
        num_hidden_layers=7, head_dim=8, sliding_window=5, query_pre_attn_scalar=12,
        rope_parameters={
            "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=5000.0),
            "sliding_attention": dict(rope_type="default", rope_theta=100.0),
        },
    )),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(name, kind, dtype) -> (folder, model of transformers in float32)."""

    @functools.cache
    def make(name, kind="ForCausalLM", dtype="float32", **more):
        import torch
        import transformers

        torch.set_num_threads(1)  # more wait for one another at such sizes
        family, fields = CASES[name]
        labels = dict(num_labels=1) if kind != "ForCausalLM" else {}
        config = getattr(transformers, f"{family}Config")(**(SIZES | fields | labels | more))
        config._attn_implementation = "eager"
        prefix = "Gemma3" if family == "Gemma3Text" and kind == "ForCausalLM" else family
        model = getattr(transformers, f"{prefix}{kind}")(config).eval()
        # Large enough that every part shows in the logits; norms and biases away from their start of 0 or 1. A table
        # that is small beside the last norm: else a tied model says its last token again.
        torch.manual_seed(len(name))
        with torch.no_grad():
            for where, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, (1.5 if "layers" in where else 0.5) / parameter.shape[1] ** 0.5)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.3 + (4.0 if where == "model.norm.weight" else 0.0))
        model = model.to(getattr(torch, dtype))
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        return folder, model.float()

    return make


def read(folder, num_tokens=0, vocab_size=0, known=0):
    """(config in float32, kind, dtype of the files, parameters) of a folder."""
    config, kind = hf.read_config(folder)
    files = hf.TensorFiles(folder)
    dtype, rows = hf.check_tensors(files, config, kind, folder), config.vocab_size
    config = dataclasses.replace(config, dtype="float32", vocab_size=vocab_size or rows, num_tokens=num_tokens)
    like = shapes(ScalarModel(config) if kind == "reward_model" else Transformer(config))
    return config, kind, dtype, hf.read_params(files, config, kind, rows, known, like)


def left_padded():
    """(tokens [3, P + R], lengths of the prompts), with garbage in the padding."""
    rng = np.random.default_rng(0)
    return rng.integers(3, V, (3, P + R)).astype(np.int32), np.asarray(LENGTHS, np.int32)


def ours_of(config, params, tokens, lengths):
    slots = np.arange(tokens.shape[1])[None]
    first = P - lengths[:, None]
    arrays = tokens, (slots >= first).astype(np.int32), np.maximum(slots - first, 0).astype(np.int32)
    model = Transformer(config)
    return np.asarray(
        jax.jit(functools.partial(model.apply, method=Transformer.full_logits))(params, *sharding.shard_batch(arrays))
    ), arrays[1] > 0


def theirs_of(model, tokens, lengths):
    import torch

    slots = torch.arange(tokens.shape[1])[None]
    first = P - torch.tensor(lengths)[:, None]
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(tokens).long(),
            attention_mask=(slots >= first).long(),
            position_ids=(slots - first).clamp(min=0),
        ).logits.numpy()


def exported(folder, config, kind, params, dtype="float32", family="", **more):
    description = hf.Description(kind, family, dtype, config, {"pad_token_id": 0})
    hf.write(folder, jax.device_get(params), description, **more)
    return folder


def opened(folder, kind="CausalLM"):
    import transformers

    auto = getattr(transformers, f"AutoModelFor{kind}")
    model, report = auto.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), report
    return model.float().eval()


@parity
@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_equal_those_of_transformers(made, name, tmp_path):
    """Left-padded rows of 12 to 30 tokens, longer than any window; then 20 greedy tokens with both caches."""
    import torch

    folder, model = made(name)
    config, kind, dtype, params = read(folder)
    tokens, lengths = left_padded()
    ours, real = ours_of(config, params, tokens, lengths)
    theirs = theirs_of(model, tokens, lengths)
    assert 0.5 < theirs[real].std() < 30 and kind == "language_model" and dtype == "float32"
    worst = np.abs(ours - theirs)[real].max()

    prompts = sharding.shard_batch(batches.PromptBatch(tokens[:, :P], lengths))
    generate = functools.partial(
        sampling.generate, model=Transformer(config), config=SamplingConfig(R, temperature=0.0), eos_id=-1
    )
    rollout = jax.jit(generate)(params, prompts, jax.random.key(0))
    model.generation_config.eos_token_id = None
    attention_mask = torch.arange(P)[None] >= P - torch.tensor(lengths)[:, None]
    answer = model.generate(
        torch.tensor(tokens[:, :P]).long(), attention_mask=attention_mask.long(), max_new_tokens=R, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    new = answer.sequences[:, P:].numpy()
    np.testing.assert_array_equal(rollout.tokens[:, P:], new)
    assert len(np.unique(new)) > R / 2, "a degenerate model would agree by chance"
    expected = torch.stack(answer.logits, 1).log_softmax(-1).gather(-1, torch.tensor(new).long()[..., None])[..., 0]
    cached = np.abs(rollout.log_probs - expected.numpy()).max()
    print(f"\n{name}: logits {worst:.1e}, log-probs with the cache {cached:.1e}, greedy tokens equal")
    assert worst < 1e-4 and cached < 1e-4

    # Out again: every tensor as it was, transformers opens it, and we read the same.
    again = exported(tmp_path / "out", config, kind, params, family=hf.read_json(folder / "config.json")["model_type"])
    assert dataclasses.replace(hf.read_config(again)[0], dtype="float32") == config
    for (name, ours), theirs in zip(opened(again).state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    jax.tree.map(np.testing.assert_array_equal, read(again)[3], params)


@parity
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gemma3"])
def test_scores_equal_those_of_transformers(made, name, tmp_path):
    import torch

    folder, model = made(name, "ForSequenceClassification")
    config, kind, _, params = read(folder)
    assert kind == "reward_model" and set(params["params"]) == {"backbone", "head", "bias"}
    tokens, _ = left_padded()
    with torch.no_grad():
        expected = model(torch.tensor(tokens).long()).logits[:, 0].numpy()
    positions = np.broadcast_to(np.arange(P + R, dtype=np.int32), tokens.shape)
    arrays = sharding.shard_batch((tokens, np.ones_like(tokens), positions))
    scores = jax.jit(ScalarModel(config).apply)(params, *arrays)[:, -1]
    print(f"\n{name}: scores {np.abs(scores - expected).max():.1e}")
    assert expected.std() > 0.1
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)  # measured: 4.1e-6

    again = exported(tmp_path / "out", config, kind, params, family=hf.read_json(folder / "config.json")["model_type"])
    with torch.no_grad():
        np.testing.assert_allclose(
            opened(again, "SequenceClassification")(torch.tensor(tokens).long()).logits[:, 0], expected, atol=1e-6
        )
    jax.tree.map(np.testing.assert_array_equal, read(again)[3], params)


@parity
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_comes_back_bitwise(made, dtype, tmp_path):
    """New rows of the tables too, which are rounded as the file is; and a file for each few tensors."""
    import torch

    folder, model = made("qwen2", dtype=dtype)
    config, kind, found, params = read(folder, num_tokens=303, vocab_size=384, known=290)
    assert found == dtype and hf.read_config(folder)[0].dtype == ("bfloat16" if dtype == "bfloat16" else "float32")
    again = exported(tmp_path / "out", config, kind, params, dtype, max_shard_bytes=20_000)
    assert len(list(again.glob("model-0*.safetensors"))) > 3
    jax.tree.map(np.testing.assert_array_equal, read(again, 303, 384, known=290)[3], params)
    theirs = opened(again)
    table = theirs.get_input_embeddings().weight
    assert table.shape == (303, 32)
    mean = model.get_input_embeddings().weight[:290].double().mean(0).to(getattr(torch, dtype)).float()
    for row in table[300:]:
        assert torch.equal(row, mean)
    assert torch.equal(table[:300], model.get_input_embeddings().weight)
    assert np.all(np.asarray(params["params"]["embedding"])[303:] == 0)


@parity
def test_rows_behind_num_tokens_get_no_probability(made):
    """A table that is padded for the mesh: log-probs, also those of sampling, are those of the model without."""
    folder, _ = made("llama3")
    (exact, _, _, params), (config, _, _, longer) = read(folder), read(folder, num_tokens=300, vocab_size=384)
    tokens, lengths = left_padded()
    expected, real = ours_of(exact, params, tokens, lengths)
    logits, _ = ours_of(config, longer, tokens, lengths)
    assert logits.shape[-1] == 384 and np.all(logits[..., 300:] == -1e30)
    np.testing.assert_allclose(
        jax.nn.log_softmax(logits)[real][:, :300], jax.nn.log_softmax(expected)[real], rtol=1e-5, atol=1e-5
    )


@stored
@pytest.mark.parametrize("tied", [True, False])
@parity
def test_a_model_of_ours_is_opened_by_transformers(tmp_path, tied):
    """The scale of the embeddings goes into the table: a Llama, and a tied table becomes two."""
    config = ModelConfig(
        vocab_size=384, num_tokens=300, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=16,
        mlp_dim=48, tie_embeddings=tied, copy_init=1.0,
    )  # fmt: skip
    params = jax.tree.map(lambda x: x * 2 if x.ndim > 2 else x, init_params(Transformer(config), jax.random.key(0)))
    folder = exported(tmp_path / "out", config, "language_model", params)
    model, (tokens, lengths) = opened(folder), left_padded()
    ours, real = ours_of(config, params, tokens, lengths)
    theirs = theirs_of(model, tokens, lengths)
    assert model.config.model_type == "llama" and theirs.shape[-1] == 300
    print(f"\nfrom scratch, tied={tied}: logits {np.abs(ours[..., :300] - theirs)[real].max():.1e}")
    np.testing.assert_allclose(ours[..., :300][real], theirs[real], atol=1e-4)
    back, _, _, read_again = read(folder, vocab_size=384, num_tokens=300)
    assert not back.embedding_scale and not back.tie_embeddings
    ours_again, _ = ours_of(back, read_again, tokens, lengths)
    np.testing.assert_allclose(ours_again[real], ours[real], rtol=1e-5, atol=1e-5)


@parity
def test_a_scalar_model_of_ours_is_opened_by_transformers(tmp_path):
    import torch

    config = ModelConfig(
        vocab_size=384, num_tokens=300, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48
    )
    params = init_params(ScalarModel(config), jax.random.key(0))
    model = opened(exported(tmp_path / "out", config, "reward_model", params), "SequenceClassification")
    tokens, _ = left_padded()
    positions = np.broadcast_to(np.arange(P + R, dtype=np.int32), tokens.shape)
    ours = jax.jit(ScalarModel(config).apply)(params, *sharding.shard_batch((tokens, tokens * 0 + 1, positions)))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens).long()).logits[:, 0].numpy()
    np.testing.assert_allclose(ours[:, -1], theirs, atol=1e-4)


# ------------------------------------------------------------------------------------------------ the fields of a model

EVERYTHING = ModelConfig(
    vocab_size=32, num_tokens=29, num_layers=3, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=16,
    activation="gelu_tanh", norm_offset=1.0, qkv_bias=True, qk_norm=True, post_norms=True, query_scale=3.0,
    attention_softcap=2.0, logit_softcap=5.0, sliding_window=3, global_every=2, local_rope_theta=50.0,
    rope_scaling="llama3", rope_factor=4.0, rope_original_length=16,
)  # fmt: skip


def random_params(module, seed=0):
    """On the mesh that is set; also norms and biases are random."""
    like = shapes(module)
    leaves, tree = jax.tree.flatten(like)
    rng = np.random.default_rng(seed)
    values = [rng.normal(size=x.shape).astype(np.float32) * 0.5 for x in leaves]
    put = [jax.device_put(v, x.sharding.spec if x.ndim else jax.P()) for v, x in zip(values, leaves, strict=True)]
    return jax.tree.unflatten(tree, put)


SHAPES = ((3, 9), (8, 2), (1, 5), (4, 4))


def sft_gradients(shape):
    with jax.set_mesh(sharding.make_mesh(*shape, devices=jax.devices()[: shape[0] * shape[1]])):
        model = Transformer(dataclasses.replace(EVERYTHING, attention_block=5))
        params, rng = random_params(model), np.random.default_rng(1)
        rows = [(list(rng.integers(3, 29, p)), list(rng.integers(3, 29, r))) for p, r in SHAPES]
        batch = sharding.shard_batch(sft.SFTBatch(batches.token_rows(rows, 12)))
        loss = lambda p: sft.sft_loss(p, batch, model=model, num_targets=12)[0]  # noqa: E731
        out = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        # Decoding: a layout that was lost is an error of the trace.
        prompts = sharding.shard_batch(batches.prompt_rows([p for p, _ in rows], 8))
        generate = functools.partial(
            sampling.generate, model=Transformer(EVERYTHING, sharding.DECODE_RULES), eos_id=2, config=SamplingConfig(6)
        )
        rollout = jax.eval_shape(generate, sharding.gather_weights(params), prompts, jax.random.key(0))
        assert rollout.tokens.sharding.spec == jax.P("data", None)
        return jax.device_get(out)


def test_no_field_depends_on_the_mesh():
    """Loss and gradients of a model with every field set, on one device and on a mesh of 2 x 2."""
    one, other = sft_gradients((1, 1)), sft_gradients((2, 2))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), other, one)
    dead = [jax.tree_util.keystr(k) for k, g in jax.tree.leaves_with_path(one[1]) if np.abs(g).max() < 1e-6]
    assert not dead, "every parameter has a gradient"


def test_windows_in_packed_rows_and_in_rows_that_share_tokens():
    """A window counts the tokens of a row, not the slots between."""
    rng = np.random.default_rng(0)
    params = random_params(ScalarModel(EVERYTHING))
    rows = [[*rng.integers(3, 29, 5)], [*rng.integers(3, 29, 9)]]
    shared = [*rng.integers(3, 29, 4)]
    # Behind the beginning stand the rest of row 0 and then that of row 1, 6 slots later.
    group = [[shared + rows[0] + rows[0][:1], shared + rows[1]]]
    score = jax.jit(functools.partial(reward_model.group_scores, ScalarModel(EVERYTHING)))
    together = score(params, sharding.shard_batch(batches.score_rows(group, 1)))
    alone = [score(params, sharding.shard_batch(batches.score_rows([[row]], 1)))[0, 0] for row in group[0]]
    np.testing.assert_allclose(together[0], alone, rtol=1e-4, atol=1e-5)

    params = random_params(Transformer(EVERYTHING))
    texts = [([int(row[0])], [int(i) for i in row[1:]]) for row in (*rows, rows[0][::-1])]
    read = jax.jit(lambda batch: sft.row_log_probs(Transformer(EVERYTHING), params, batch)[0])
    packed, separate = batches.packed_rows(texts, 24), batches.token_rows(texts, 12)
    assert packed.tokens.shape[0] == 1
    logs = [np.asarray(read(sharding.shard_batch(b)))[b.loss_mask[:, 1:]] for b in (packed, separate)]
    np.testing.assert_allclose(*map(np.sort, logs), rtol=1e-4, atol=1e-5)


def test_who_sees_whom_through_a_window():
    """One layer with a window of 3: a token depends on itself and the two before it, by the gradient."""
    config = dataclasses.replace(EVERYTHING, num_layers=1, global_every=0)
    params, model = random_params(Transformer(config)), Transformer(config)
    tokens = sharding.shard_batch(np.arange(3, 9, dtype=np.int32)[None])
    ones, positions = tokens * 0 + 1, tokens - 3
    weights = np.random.default_rng(0).normal(size=16).astype(np.float32)

    def outputs(embedding):
        hidden, _ = model.apply({"params": params["params"] | {"embedding": embedding}}, tokens, ones, positions)
        return jnp.einsum("btd,d->t", hidden, weights)

    jacobian = jax.jit(jax.jacrev(outputs))(params["params"]["embedding"])  # [T, V, D]
    seen = np.abs(np.asarray(jacobian)[:, 3:9]).max(-1) > 0
    np.testing.assert_array_equal(seen, np.tri(6, dtype=bool) & ~np.tri(6, k=-3, dtype=bool))


def test_rotary_frequencies_by_hand():
    """theta 10,000 and H = 8: plain frequencies 1, 0.1, 0.01, 0.001."""
    plain = dataclasses.replace(ModelConfig(), head_dim=8)
    linear = dataclasses.replace(plain, rope_scaling="linear", rope_factor=4.0, sliding_window=2, local_rope_theta=16.0)
    far, near = rotary_frequencies(linear)
    np.testing.assert_allclose(far, [0.25, 0.025, 0.0025, 0.00025], rtol=1e-6)
    np.testing.assert_allclose(near, [1, 0.5, 0.25, 0.125], rtol=1e-6)
    # In 200 pi tokens there are 100, 10, 1 and 0.1 waves: more than 4 stay, 1 and less are divided by 8.
    llama = dataclasses.replace(plain, rope_scaling="llama3", rope_factor=8.0, rope_original_length=round(200 * np.pi))
    np.testing.assert_allclose(rotary_frequencies(llama)[0], [1, 0.1, 0.00125, 0.000125], rtol=1e-3)
    # 2.5 waves are halfway between 1 and 4: (0.1 + 0.1 / 8) / 2.
    half = dataclasses.replace(llama, rope_original_length=round(50 * np.pi))
    np.testing.assert_allclose(rotary_frequencies(half)[0][1], 0.05625, rtol=2e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_tokens=2049), "num_tokens=2049: from 0 to vocab_size=2048"),
        (dict(activation="relu"), "'relu': use silu or gelu_tanh"),
        (dict(rope_scaling="yarn"), "'yarn': use none, linear or llama3"),
        (dict(sliding_window=-1), "sliding_window=-1: not below 0"),
        (dict(global_every=6), "global_every=6 is for models with a sliding_window"),
        (dict(sliding_window=4, global_every=1), "global_every=1: all layers see all"),
        (dict(local_rope_theta=100.0), "local_rope_theta=100.0 is for models with a sliding_window"),
        (dict(rope_factor=2.0), "rope_factor=2.0 is for rope_scaling=linear or llama3"),
        (dict(rope_scaling="linear", rope_factor=0.0), "rope_factor=0.0 must be above 0"),
        (dict(rope_scaling="llama3", rope_low_freq_factor=4.0), "rope_low_freq_factor=4.0 must be below"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_fields_that_contradict_one_another(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)


# --------------------------------------------------------------------------------------------------- published configs

LLAMA = dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_act="silu", rms_norm_eps=1e-5)
GEMMA_3 = dict(
    model_type="gemma3_text", architectures=["Gemma3ForCausalLM"], hidden_activation="gelu_pytorch_tanh",
    query_pre_attn_scalar=256, head_dim=256, rope_theta=1_000_000, rope_local_base_freq=10_000, rope_scaling=None,
    sliding_window=512, sliding_window_pattern=6, attn_logit_softcapping=None, final_logit_softcapping=None,
)  # fmt: skip
PUBLISHED = {
    "SmolLM2-135M": (134_515_008, (49152, 576, 1536, 30, 9, 3), LLAMA | dict(tie_word_embeddings=True)),
    "TinyLlama-1.1B": (1_100_048_384, (32000, 2048, 5632, 22, 32, 4), LLAMA | dict(tie_word_embeddings=False)),
    "Llama-2-7b": (6_738_415_616, (32000, 4096, 11008, 32, 32, None), LLAMA),
    "Llama-3.2-1B": (1_235_814_400, (128256, 2048, 8192, 16, 32, 8), LLAMA | dict(
        tie_word_embeddings=True, rope_theta=500_000.0, rope_scaling=LLAMA_3, head_dim=64, torch_dtype="bfloat16"
    )),
    "Mistral-7B-v0.1": (7_241_732_096, (32000, 4096, 14336, 32, 32, 8), dict(
        model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=4096, tie_word_embeddings=False
    )),
    "Qwen2.5-0.5B": (494_032_768, (151936, 896, 4864, 24, 14, 2), dict(
        model_type="qwen2", architectures=["Qwen2ForCausalLM"], hidden_act="silu", sliding_window=32768,
        max_window_layers=24, use_sliding_window=False, tie_word_embeddings=True, rope_theta=1_000_000.0,
    )),
    "Qwen3-0.6B": (596_049_920, (151936, 1024, 3072, 28, 16, 8), dict(
        model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=128, attention_bias=False,
        tie_word_embeddings=True, max_window_layers=28, sliding_window=None, use_sliding_window=False,
    )),
    "gemma-2b": (2_506_172_416, (256000, 2048, 16384, 18, 8, 1), dict(
        model_type="gemma", architectures=["GemmaForCausalLM"], head_dim=256, hidden_act="gelu"
    )),
    "gemma-2-2b": (2_614_341_888, (256000, 2304, 9216, 26, 8, 4), dict(
        model_type="gemma2", architectures=["Gemma2ForCausalLM"], head_dim=256, hidden_act="gelu_pytorch_tanh",
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0, query_pre_attn_scalar=256, sliding_window=4096,
    )),
    "gemma-3-1b": (999_885_952, (262144, 1152, 6912, 26, 4, 1), GEMMA_3),
}  # fmt: skip
FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "num_key_value_heads",
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_number_of_parameters(name):
    """config.json as on the hub, in the form of its time, written from memory; shapes only."""
    count, sizes, values = PUBLISHED[name]
    values = values | dict(zip(FIELDS, sizes, strict=True))
    config, kind = hf.config_of(values)
    assert sum(x.size for x in jax.tree.leaves(shapes(Transformer(config)))) == count and kind == "language_model"
    candidate, family = hf.exported_config(config, values["model_type"])
    assert family == values["model_type"] and candidate == config
    features = {
        "Llama-3.2-1B": dict(rope_scaling="llama3", rope_factor=8.0, rope_original_length=16, dtype="bfloat16"),
        "Mistral-7B-v0.1": dict(sliding_window=4096, global_every=0),
        "gemma-2b": dict(activation="gelu_tanh", norm_offset=1.0, tie_embeddings=True),
        "gemma-2-2b": dict(sliding_window=4096, global_every=2, attention_softcap=50.0, query_scale=0.0),
        "gemma-3-1b": dict(sliding_window=512, global_every=6, local_rope_theta=10_000.0, rope_theta=1e6),
    }
    for field, value in features.get(name, {}).items():
        assert getattr(config, field) == value, field


# ---------------------------------------------------------------------------------------------------------- bad inputs

LINEAR = dict(rope_type="linear", factor=2.0)
BASE = LLAMA | dict(zip(FIELDS, (64, 16, 24, 2, 4, 2), strict=True))


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (dict(model_type="gpt2"), ["model_type is 'gpt2'", "Supported: llama, mistral, qwen2, qwen3, gemma"]),
        (dict(model_type=None), ["model_type is None"]),
        (dict(attention_bias=True, mlp_bias=True), ["attention_bias is True", "mlp_bias is True"]),
        (dict(hidden_act="relu"), ["hidden_act is 'relu', but must be silu or gelu_pytorch_tanh"]),
        (dict(rope_scaling=dict(type="yarn", factor=2.0)), ["rope_scaling: rope_type is 'yarn'"]),
        (dict(rope_scaling=dict(type="linear")), ["rope_type linear needs the number factor"]),
        (dict(rope_parameters=dict(partial_rotary_factor=0.5)), ["partial_rotary_factor must be 1"]),
        (dict(quantization_config=dict(bits=4)), ["quantization_config"]),
        (dict(architectures=["LlamaForTokenClassification"]), ["architectures is"]),
        (dict(architectures=["MixtralForCausalLM"]), ["architectures is", "must be LlamaForCausalLM or LlamaForSeq"]),
        (dict(architectures="LlamaForCausalLM"), ["architectures is 'LlamaForCausalLM'"]),
        (
            dict(model_type="gemma2", hidden_activation="gelu"),
            ["hidden_activation is 'gelu', but must be silu or gelu"],
        ),
        (dict(GEMMA_3, hidden_activation="gelu"), ["hidden_activation is 'gelu'"]),
        (dict(rope_scaling=LINEAR, rope_parameters=dict(rope_theta=5.0)), ["are both there and differ: keep the one"]),
        (dict(rope_scaling=LLAMA_3, original_max_position_embeddings=16), ["in rope_scaling alone"]),
        (dict(rope_scaling=LLAMA_3 | dict(original_max_position_embeddings=None)), ["needs original_max_position_emb"]),
        (dict(GEMMA_3, rope_parameters=LINEAR), ["rope_parameters must have full_attention and sliding_attention"]),
        (
            dict(GEMMA_3, rope_scaling=LINEAR, rope_parameters=dict(full_attention=LLAMA_3)),
            ["are both there and differ"],
        ),
        (dict(rope_parameters=dict(llama_4_scaling_beta=0.1)), ["rope_parameters has llama_4_scaling_beta"]),
        (dict(rope_scaling="linear"), ["rope_parameters and rope_scaling are {} and 'linear', but must be objects"]),
        (dict(rope_theta="big"), ["rope_theta is 'big', but must be a number above 0"]),
        (dict(rms_norm_eps=-1), ["rms_norm_eps is -1, but must be a number above 0"]),
        (dict(rms_norm_eps=None), ["rms_norm_eps is None"]),
        (dict(tie_word_embeddings="false"), ["tie_word_embeddings is 'false', but must be true or false"]),
        (dict(GEMMA_3, sliding_window_pattern=0), ["sliding_window_pattern is 0"]),
        (dict(GEMMA_3, query_pre_attn_scalar=None), ["query_pre_attn_scalar is None"]),
        (dict(model_type=["llama"]), ["model_type is ['llama']", "Supported: llama, mistral"]),
        (dict(architectures=["LlamaForSequenceClassification"]), ["id2label) is 2, but must be 1"]),
        (dict(hidden_size="16", vocab_size=None), ["hidden_size is '16'", "vocab_size is None"]),
        (dict(num_key_value_heads=3), ["num_heads must be a multiple of num_kv_heads"]),
        (dict(head_dim=7), ["head_dim is 7, but must be an even number"]),
        (
            dict(model_type="qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1),
            ["max_window_layers: full attention must come at every n-th layer"],
        ),
        (dict(model_type="gemma3_text", attn_logit_softcapping=5.0), ["attn_logit_softcapping is 5.0"]),
        (dict(model_type="gemma2", layer_types=["full_attention"]), ["layer_types must have"]),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_unsupported_configs_name_the_fields(changes, messages):
    with pytest.raises(ValueError) as error:
        hf.config_of(BASE | changes, "there/config.json")
    assert str(error.value).startswith("there/config.json")
    for message in messages:
        assert message in str(error.value)
    assert "llama, mistral" in str(error.value) or "num_key_value_heads" in changes


def test_a_value_of_a_wrong_kind_names_the_file():
    with pytest.raises(ValueError, match=r"there/config.json has a value of a wrong kind \(.*iterable"):
        hf.config_of(BASE | dict(model_type="gemma2", architectures=None, layer_types=5), "there/config.json")


@pytest.mark.parametrize(
    ("family", "count"), [("qwen2", 32), ("qwen3", 32), ("gemma", 16), ("mistral", 8), ("llama", 64)]
)
def test_key_heads_that_a_config_leaves_out(family, count):
    """As the config classes of transformers have them; null stands for all heads."""
    values = BASE | dict(model_type=family, architectures=None, num_attention_heads=64, head_dim=4)
    assert hf.config_of({k: v for k, v in values.items() if k != "num_key_value_heads"})[0].num_kv_heads == count
    assert hf.config_of(values | dict(num_key_value_heads=None))[0].num_kv_heads == 64


def test_models_that_no_family_can_express():
    with pytest.raises(ValueError, match="no family of transformers") as error:
        hf.exported_config(EVERYTHING)
    for family in hf.FAMILIES:
        assert f"\n  {family}: " in str(error.value)
    assert "gemma3_text: qkv_bias, attention_softcap\n" in f"{error.value}\n"


@pytest.fixture
def tiny(tmp_path):
    """A Llama in four files."""
    config = ModelConfig(
        vocab_size=32, num_layers=2, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8,
        embedding_scale=False, tie_embeddings=False,
    )  # fmt: skip
    params = random_params(Transformer(config))
    return exported(tmp_path / "tiny", config, "language_model", params, max_shard_bytes=1000), config, params


def rewritten(folder, change):
    """All tensors in one file, after `change(dict)`."""
    from safetensors.numpy import load_file, save_file

    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@stored
def test_all_wrong_tensors_are_listed(tiny):
    folder, _, _ = tiny

    def change(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(8, np.float32)
        tensors["lm_head.weight"] = np.zeros((31, 8), np.float32)
        tensors["model.layers.0.mlp.gate_proj.weight"] = np.zeros((8, 8), np.int8)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)

    rewritten(folder, change)
    with pytest.raises(ValueError) as error:
        read(folder)
    assert str(error.value).split("\n")[1:] == [
        "  model.layers.1.mlp.up_proj.weight: is missing",
        "  model.norm.weight: is missing",
        "  model.layers.0.self_attn.q_proj.bias: is unknown",
        "  lm_head.weight: has shape (31, 8), but config.json says (32, 8)",
        "  model.layers.0.mlp.gate_proj.weight: is stored as I8, but must be one of F32, BF16, F16",
    ]


@stored
def test_two_tables_of_a_model_that_is_said_to_have_one(tiny):
    """transformers keeps the first, older readers take the second: nothing is dropped that differs."""
    folder, _, _ = tiny
    values = json.loads((folder / "config.json").read_text()) | dict(tie_word_embeddings=True)
    (folder / "config.json").write_text(json.dumps(values))
    check = lambda: hf.check_tensors(hf.TensorFiles(folder), *hf.read_config(folder), folder)  # noqa: E731
    with pytest.raises(ValueError, match="lm_head.weight that differs from .*Set tie_word_embeddings to false"):
        check()
    rewritten(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert check() == "float32"
    rewritten(folder, lambda tensors: tensors.update({"lm_head.weight": np.zeros((31, 8), np.float32)}))
    with pytest.raises(ValueError, match="lm_head.weight that differs"):
        check()


@stored
def test_missing_and_damaged_files_are_listed(tiny):
    folder, config, params = tiny
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(names) >= 4
    jax.tree.map(np.testing.assert_array_equal, read(folder)[3], params)
    (folder / names[0]).unlink()
    (folder / names[1]).unlink()
    content = (folder / names[2]).read_bytes()
    (folder / names[2]).write_bytes(content[:-10])
    (folder / names[3]).write_bytes(b"<html>")
    with pytest.raises(ValueError) as error:
        hf.TensorFiles(folder)
    lines = str(error.value).split("\n")[1:]
    assert lines[:2] == [f"  {names[0]}: is missing", f"  {names[1]}: is missing"]
    assert lines[2].startswith(f"  {names[2]}: is damaged or cut short")
    assert lines[3].startswith(f"  {names[3]}: is damaged or cut short")
    assert len(lines) == 4


@stored
def test_an_index_that_leads_astray(tiny):
    folder, _, _ = tiny
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["lm_head.scale"] = first
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{first}: lacks lm_head.scale"):
        hf.TensorFiles(folder)
    del index["weight_map"]["lm_head.scale"]
    files = [*index["weight_map"].values()]
    name, file = next(item for item in index["weight_map"].items() if files.count(item[1]) > 1)
    path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {name: first}}))
    with pytest.raises(ValueError, match=f"{file}: has {name}, which the index says is in {first}"):
        hf.TensorFiles(folder)
    path.write_text(json.dumps(index))
    hf.TensorFiles(folder).close()
    tensors = hf.read_tensors(folder / first)
    hf.write_tensors(folder / first, tensors | {name: np.ones(8, np.float32)})
    with pytest.raises(ValueError, match=f"{first}: has {name}, which {file} has too"):
        hf.TensorFiles(folder)
    hf.write_tensors(folder / first, tensors)
    index["weight_map"]["lm_head.scale"] = "../other.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="other.safetensors: the index names a file outside of the folder"):
        hf.TensorFiles(folder)
    path.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        hf.TensorFiles(folder)


def test_pickles_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        hf.read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds no JSON object"):
        hf.read_config(tmp_path)
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        hf.TensorFiles(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"pytorch_model-00001-of-00002.bin, which can run any code.*save_pretrained"):
        hf.TensorFiles(tmp_path)


@stored
def test_numbers_that_float16_cannot_hold(tiny, tmp_path):
    _, config, params = tiny
    params["params"]["norm"]["scale"] = params["params"]["norm"]["scale"] * 1e6
    with pytest.raises(ValueError, match="norm/scale has numbers that float16 cannot hold: use --dtype=bfloat16"):
        exported(tmp_path / "out", config, "language_model", params, "float16")


@stored
@pytest.mark.parametrize("at_once", [1 << 24, 0], ids=["whole", "by layer"])
def test_reading_onto_a_mesh(tiny, monkeypatch, at_once):
    """Each device reads its own part, and together they are the same."""
    monkeypatch.setattr(hf, "AT_ONCE", at_once)
    folder, _, params = tiny
    folder = shutil.copytree(folder, folder.parent / "copy")
    expected = jax.device_get(params)
    # One key/value head does not go over two devices, the rest does.
    with jax.set_mesh(sharding.make_mesh(4, 1, devices=jax.devices()[:4])):
        made, make = [], jax.make_array_from_callback
        monkeypatch.setattr(
            jax, "make_array_from_callback", lambda shape, *args: made.append(shape) or make(shape, *args)
        )
        _, _, _, params = read(folder, num_tokens=34, vocab_size=64)
        assert {shape[0] for shape in made if len(shape) > 2} == {2 if at_once else 1}, "of layers, on the host"
        gate = params["params"]["layers"]["gate"]
        assert jax.typeof(gate).sharding.spec == jax.P(None, "data", "model")
        assert {x.data.shape for x in gate.addressable_shards} == {(2, 2, 8)}
    got = jax.device_get(params)
    for table in ("embedding", "unembedding"):
        rows = got["params"].pop(table)
        whole = expected["params"].pop(table)
        np.testing.assert_array_equal(rows[:32], whole)
        np.testing.assert_allclose(rows[32:34], np.broadcast_to(whole.mean(0), (2, 8)), rtol=1e-5, atol=1e-7)
        assert not rows[34:].any()
    jax.tree.map(np.testing.assert_array_equal, got, expected)
