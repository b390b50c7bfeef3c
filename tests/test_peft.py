"""Adapters of ours read by PEFT, and its adapters by us, on models that transformers made."""

import json

import jax
import numpy as np
import pytest

from pit_jax import convert
from pit_jax.config import DataConfig, LoraConfig, PitConfig, PretrainConfig
from pit_jax.data import tokenizer as tokenizer_lib
from pit_jax.models import hf, lora
from pit_jax.models.transformer import ScalarModel, Transformer
from pit_jax.pipelines import common
from pit_jax.pipelines.common import Context
from pit_jax.pipelines.stages import Workdir

torch = pytest.importorskip("torch", reason="torch not installed (extra: parity)")
transformers = pytest.importorskip("transformers", reason="transformers not installed (extra: parity)")
peft = pytest.importorskip("peft", reason="peft not installed (extra: parity)")

pytestmark = pytest.mark.usefixtures("one_device")

SIZES = {
    "vocab_size": 384, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}  # the second has biases at q, k, v
LORA = LoraConfig(rank=3, alpha=5.0)
IDS = np.random.default_rng(0).integers(3, 280, (3, 9))


def moved(params, seed):
    """Adapters and head away from their start."""
    rng = np.random.default_rng(seed)
    draw = lambda x: jax.numpy.asarray(x + 0.3 * rng.normal(size=x.shape).astype(np.float32))  # noqa: E731
    return lora.with_trained(params, jax.tree.map(draw, lora.trained(params)))


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    """(folder of a model by transformers, the same as CKPT, a run whose M_P^SFT and R_P are adapters on it)."""
    root = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = FAMILIES[request.param](**SIZES, tie_word_embeddings=False)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    for name, x in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(x)
    theirs.save_pretrained(root / "theirs")
    description, base = convert.import_hf(str(root / "theirs"), root / "ckpt")
    sizes = description.config
    run = PitConfig(
        policy_model=sizes, pit_model=sizes, reward_model=sizes, lora=LORA, data=DataConfig(response_window=40),
        pretrain=PretrainConfig(checkpoint=str(root / "ckpt")),
    )  # fmt: skip
    workdir = Workdir(root / "run", run)
    (root / "run" / "data").mkdir()
    (root / "run" / "data" / "tokenizer.model").write_bytes(tokenizer_lib.train(["words to learn from"] * 3, 290))
    workdir.finish("data", {})
    context = Context(run, workdir, None)
    for stage, module in (("sft_policy", Transformer(sizes)), ("r_p", ScalarModel(sizes))):
        params = base
        if stage == "r_p":
            backbone = {k: v for k, v in base["params"].items() if k != "unembedding"}
            params = {"params": common.init_params(module, jax.random.key(3))["params"] | {"backbone": backbone}}
        adapted = moved(common.with_adapters(context, stage, params), len(stage))
        common.leave_model(context, stage, adapted, common.pretrained_base(run, sizes))
        workdir.finish(stage, {})
    return root


def logits_of(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


def test_peft_reads_the_adapters_of_a_stage(made, tmp_path):
    description, trained, base = convert.export_peft(made / "run" / "models" / "sft_policy", tmp_path / "out")
    assert base == str(made / "ckpt") and len(jax.tree.leaves(trained)) == 14
    values = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (values["r"], values["lora_alpha"], values["task_type"]) == (3, 5, "CAUSAL_LM")
    model = transformers.AutoModelForCausalLM.from_pretrained(made / "theirs")
    before = logits_of(model)
    after = logits_of(peft.PeftModel.from_pretrained(model, tmp_path / "out"))
    ours, params, _ = convert.load(made / "run" / "models" / "sft_policy")
    expected = convert.forward(ours, params, IDS)
    assert np.abs(before - after).max() > 0.1
    np.testing.assert_allclose(after[..., : expected.shape[-1]], expected, atol=1e-4)
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(ValueError, match="out exists"):
        convert.export_peft(made / "run" / "models" / "sft_policy", tmp_path / "out")


def test_peft_reads_the_adapters_and_the_head_of_a_reward_model(made, tmp_path, capsys):
    convert.export_peft(made / "run" / "models" / "r_p", tmp_path / "out")
    ours, params, _ = convert.load(made / "run" / "models" / "r_p")
    bias = float(params["params"]["bias"])
    said = capsys.readouterr().err
    assert f"bias of {bias:.6g}" in said and "pad_token_id" not in said
    model = transformers.AutoModelForSequenceClassification.from_pretrained(made / "theirs", num_labels=1)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "out")
    np.testing.assert_allclose(logits_of(model)[:, 0] + bias, convert.forward(ours, params, IDS), atol=1e-4)


@pytest.fixture(scope="module")
def by_peft(made):
    """Adapters that PEFT wrote, for three matrices, and the logits with them."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(made / "theirs")
    config = peft.LoraConfig(r=2, lora_alpha=7, target_modules=["q_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    for name, x in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(x, std=0.3)
    model.save_pretrained(made / "adapters")
    return made / "adapters", logits_of(model)


def test_adapters_of_peft_are_merged(made, by_peft, tmp_path):
    folder, logits = by_peft
    description, params = convert.import_peft(folder, made / "ckpt", tmp_path / "out")
    assert description == hf.read_description(made / "ckpt")
    np.testing.assert_allclose(convert.forward(description, params, IDS), logits, atol=1e-4)
    again = convert.load(tmp_path / "out")
    assert again[0] == description
    jax.tree.map(np.testing.assert_array_equal, again[1], params)


def test_adapters_that_cannot_be_merged(made, by_peft, tmp_path):
    folder, _ = by_peft
    values = json.loads((folder / "adapter_config.json").read_text())
    tensors = hf.read_tensors(folder / "adapter_model.safetensors")

    def attempt(message, changed=None, dropped=(), added=None):
        there = tmp_path / "adapters"
        there.mkdir(exist_ok=True)
        (there / "adapter_config.json").write_text(json.dumps(values | (changed or {})))
        kept = {k: np.ascontiguousarray(v) for k, v in tensors.items() if k not in dropped} | (added or {})
        hf.write_tensors(there / "adapter_model.safetensors", kept)
        with pytest.raises(ValueError, match=message):
            convert.import_peft(there, made / "ckpt", tmp_path / "out")

    attempt("use_rslora is True", {"use_rslora": True})
    attempt("rank_pattern is {'q_proj': 4}", {"rank_pattern": {"q_proj": 4}})
    attempt("task_type is 'SEQ_CLS'", {"task_type": "SEQ_CLS"})
    attempt("target_modules is .*lm_head", {"target_modules": ["q_proj", "lm_head"]})
    attempt("r and lora_alpha are 0", {"r": 0})
    attempt("init_lora_weights is 'pissa'", {"init_lora_weights": "pissa"})
    attempt("init_lora_weights is 'olora'", {"init_lora_weights": "olora"})
    attempt(r"alora_invocation_tokens is \[5, 6\]", {"alora_invocation_tokens": [5, 6]})
    attempt(r"lora_A.weight: has shape \(2, 16\), not \(4, 16\)", {"r": 4})
    name = "base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"
    attempt(f"{name}: is missing", dropped=[name])
    attempt("stray: is unknown", added={"stray": np.zeros(2, np.float32)})
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        convert.import_peft(tmp_path, made / "ckpt", tmp_path / "out")
    with pytest.raises(ValueError, match="ckpt has no adapters.*--config.lora.rank=RANK"):
        convert.export_peft(made / "ckpt", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapters"]
