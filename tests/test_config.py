"""Configs: every file instantiates, and a user's mistake is named with its remedy."""

import dataclasses
import inspect
import json
import runpy
from pathlib import Path

import commands
import pytest

from pit_jax import config as c

FILES = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
VARIANTS = {"pit_llama2": ["7b", "13b"], "pit_smollm": ["135m", "360m"], "pit_hh_rlhf": ["small", "smoke"]}
VARIANTS |= {"pit_synthetic": ["", "smoke"], "srt_synthetic": ["", "smoke"], "srt_tulu2": ["7b", "13b", "70b"]}
VARIANTS |= {"synthesize": ["", "smoke"]}


@pytest.mark.parametrize(("path", "variant"), [(path, v) for path in FILES for v in VARIANTS.get(path.stem, ["smoke"])])
def test_every_config_instantiates(path, variant):
    get_config = runpy.run_path(str(path))["get_config"]
    found = get_config() if variant is None else get_config(variant)
    config = c.from_config_dict(c.SynthesisConfig if path.stem == "synthesize" else c.class_of(found), found)
    if path.stem != "synthesize":
        learner = config.dpo.optimizer if path.stem.startswith("srt") else config.ppo.policy_optimizer
        assert isinstance(learner, c.OptimizerConfig)
    assert config.name == path.stem + (f":{variant}" if variant else "")
    if inspect.signature(get_config).parameters:
        with pytest.raises(ValueError, match=f"configs/{path.name} has no variant 'smok'"):
            get_config("smok")


def test_a_config_dict_is_locked_and_comes_back_the_same():
    config = dataclasses.replace(c.PitConfig(), curriculum=("data", "policy", "pit"), seed=3)
    outside = c.to_config_dict(config)
    assert c.from_config_dict(c.PitConfig, outside) == config
    with pytest.raises(AttributeError, match="kl_coeff"):
        outside.ppo.kl_coeff = 0.1
    outside.ppo.kl_coef = 1  # a whole number is a float
    changed = c.from_config_dict(c.PitConfig, outside)
    assert changed.ppo.kl_coef == 1.0 and isinstance(changed.ppo.kl_coef, float)
    assert c.from_config_dict(c.PitConfig, json.loads(c.to_json(config))) == config


def as_dict():
    return json.loads(c.to_json(c.PitConfig()))


def test_an_unknown_field_names_the_nearest():
    values = as_dict()
    values["ppo"]["kl_cof"] = 0.1
    with pytest.raises(ValueError, match=r"config\.ppo\.kl_cof is not a field.*Did you mean config\.ppo\.kl_coef\?"):
        c.from_config_dict(c.PitConfig, values)
    values = as_dict()
    values["mesh"]["zzz"] = 1
    with pytest.raises(ValueError, match=r"config\.mesh\.zzz is not a field of MeshConfig\. Fields: data, model\."):
        c.from_config_dict(c.PitConfig, values)


@pytest.mark.parametrize(
    ("group", "field", "value", "message"),
    [
        ("ppo", "kl_coef", "much", r"config\.ppo\.kl_coef is 'much' \(str\), but must be of type float"),
        ("ppo", "num_epochs", 1.5, r"config\.ppo\.num_epochs is 1\.5 \(float\), but must be of type int"),
        ("ppo", "num_epochs", True, r"config\.ppo\.num_epochs is True \(bool\), but must be of type int"),
        ("ppo", "kl_coef", True, r"config\.ppo\.kl_coef is True \(bool\), but must be of type float"),
        ("ppo", "adaptive_kl", 1, r"config\.ppo\.adaptive_kl is 1 \(int\), but must be of type bool"),
        ("data", "path", None, r"config\.data\.path is None \(NoneType\), but must be of type str"),
    ],
)
def test_a_value_of_another_type(group, field, value, message):
    values = as_dict()
    values[group][field] = value
    with pytest.raises(ValueError, match=message):
        c.from_config_dict(c.PitConfig, values)


def test_a_missing_field():
    values = as_dict()
    del values["r_pit"]["optimizer"]["b1"], values["r_pit"]["optimizer"]["b2"]
    with pytest.raises(ValueError, match=r"config\.r_pit\.optimizer lacks b1, b2 \(fields of OptimizerConfig\)"):
        c.from_config_dict(c.PitConfig, values)


@pytest.mark.parametrize(
    ("text", "expected"), [("data,policy", ("data", "policy")), (" data , pit ", ("data", "pit")), ("", ())]
)
def test_a_tuple_from_a_comma_string(text, expected):
    assert c.from_config_dict(c.PitConfig, as_dict() | {"curriculum": text}).curriculum == expected
    flag = (text,)  # what --config.curriculum=TEXT hands over
    assert c.from_config_dict(c.PitConfig, as_dict() | {"curriculum": flag}).curriculum == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: c.ModelConfig(num_heads=6, num_kv_heads=4), "num_heads must be a multiple of"),
        (lambda: c.ModelConfig(remat="some"), "'some': use none, dots or full"),
        (lambda: c.ModelConfig(dtype="float16"), "'float16': use float32 or bfloat16"),
        (lambda: c.DataConfig(source="file"), "--config.data.path=FILE_OR_FOLDER"),
        (lambda: c.DataConfig(source="summarize", path="a"), "path is for source=file: set --config.data.source=file"),
        (lambda: c.DataConfig(num_rows=3), "num_rows are for source=file"),
        (lambda: c.DataConfig(source="file", path="a", num_rows=-1), "num_rows=-1: not below 0"),
        (lambda: c.RewardModelConfig(sequence_length=-1), "sequence_length=-1: not below 0"),
        (lambda: c.DataConfig(source="web"), "'web': use synthetic, file, hh_rlhf or summarize"),
        (lambda: c.OptimizerConfig(schedule="step"), "'step': use constant, linear or cosine"),
        (lambda: c.RewardModelConfig(loss="hinge"), "'hinge': use one of gap, "),
        (lambda: c.RewardModelConfig(start_from="rl"), r"'rl': use pretrain, sft or \(R_PIT only\) r_p"),
        (lambda: c.PitConfig(r_p=c.RewardModelConfig(start_from="r_p")), "only r_pit comes after R_P"),
        (lambda: c.PPOConfig(kl_estimator="k2"), "'k2': use k1 or k3"),
        (lambda: c.PPOConfig(rollout_size=10, num_minibatches=4), "10 must be a multiple of num_minibatches=4"),
        (
            lambda: c.PitConfig(curriculum=("data", "rl")),
            "names 'rl': use data, policy, pit, policy_checkpoint or srt",
        ),
        (lambda: c.PitConfig(arms=("first",)), "names 'first': use second_rl_only"),
        (lambda: c.PitConfig(sft_pit=c.SFTConfig(chain_of_thought=True)), "--config.curriculum="),
        (lambda: c.PitConfig(r_p=c.RewardModelConfig(loss="mse")), "r_p.loss is for r_pit"),
        (lambda: c.PitConfig(sft_policy=c.SFTConfig(unlikelihood=0.5)), "sft_policy.unlikelihood is for sft_pit"),
        (lambda: c.SFTConfig(unlikelihood=-1.0), "unlikelihood=-1.0 must not be negative"),
        (lambda: c.RewardModelConfig(batch_size=0), "batch_size=0 must be above 0"),
        (lambda: c.DataConfig(size=-5), "size=-5 must be above 0"),
        (lambda: c.OptimizerConfig(learning_rate=-1.0), "learning_rate=-1.0 must be above 0"),
        (lambda: c.EvaluationConfig(num_iterations=0), "num_iterations=0 must be above 0"),
        (lambda: c.SynthesisConfig(min_added=3), "min_added=3 must not be above max_added=2"),
        (lambda: c.SynthesisConfig(num_attempts=0), "num_attempts=0 must be above 0"),
        (lambda: c.SynthesisConfig(num_retries=-1), "num_retries=-1: not below 0"),
        (lambda: c.SynthesisConfig(min_quality=1.5), "min_quality=1.5: from 0 to 1"),
        (lambda: c.SynthesisConfig(held_out=1.0), "held_out=1.0 must be between 0 and 1"),
    ],
)
def test_a_value_out_of_range_says_what_to_use(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_error_names_the_section():
    values = as_dict()
    values["ppo_pit"]["rollout_size"] = 7
    with pytest.raises(ValueError, match=r"config\.ppo_pit: rollout_size=7 must be a multiple of num_minibatches"):
        c.from_config_dict(c.PitConfig, values)


def test_differing_fields():
    ours, theirs = as_dict(), as_dict()
    assert c.differing_fields(ours, theirs) == []
    ours["ppo"]["kl_coef"], ours["seed"] = 0.25, 1
    del theirs["ppo_pit"]["epsilon"]
    assert c.differing_fields(ours, theirs) == [
        "config.ppo.kl_coef: 0.05 -> 0.25",
        "config.ppo_pit.epsilon: None -> 0.2",
        "config.seed: 0 -> 1",
    ]


def test_json_is_stable():
    text = c.to_json(c.PitConfig())
    assert text == c.to_json(c.from_config_dict(c.PitConfig, json.loads(text))) and text.endswith("}\n")
    assert list(json.loads(text)) == sorted(json.loads(text))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--config=configs/srt_synthetic.py:smok",
            "configs/srt_synthetic.py has no variant 'smok': use :smoke or none",
        ),
        ("--confg=x", "Unknown command line flag 'confg'. Did you mean: config ?"),
        (
            "--config=configs/pit_syntetic.py:smoke",
            "there is no config file configs/pit_syntetic.py; did you mean configs/pit_synthetic.py?",
        ),
        ("--config=nowhere/pit.py", "there is no config file nowhere/pit.py"),
    ],
    ids=["variant", "flag", "file", "folder"],
)
def test_a_misspelt_flag_ends_in_one_line(tmp_path, flag, message):
    done = commands.run("-m", "pit_jax.train", flag, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2 and done.stderr == f"error: {message}\n"
