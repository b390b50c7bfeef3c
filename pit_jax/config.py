"""Configs: frozen dataclasses inside, `ml_collections.ConfigDict` outside, converted strictly in one place.

A dataclass here is the whole truth about which fields exist and what they default to. Config files under `configs/`
start from `to_config_dict(PitConfig())`, change values and are locked, so `--config.ppo.kl_coef=0.02` works and a
misspelt field is an error that names the nearest one.
"""

import dataclasses
import difflib
import json
import types
import typing
from typing import Any

import ml_collections


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _positive(config: Any, *fields: str) -> None:
    for name in fields:
        _check(getattr(config, name) > 0, f"{name}={getattr(config, name)} must be above 0")


ARMS = ("second_rl_only", "longer_sft", "pit_sft_cot")
"""Second RL only of Table 2 (First RL only is the curriculum's first round), M_P by the settings of M_PIT's SFT, and
M_PIT^SFT with a chain of thought (appendix K)."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of a decoder, and what open families do differently (DESIGN: one decoder with fields, not a file per
    family). The defaults of the second part are those of the models that are trained here from scratch."""

    vocab_size: int = 2048
    num_layers: int = 4
    d_model: int = 192
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    mlp_dim: int = 512
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = True
    dtype: str = "float32"  # of activations and matrix products; parameters are float32
    remat: str = "none"  # none, dots (keep matrix products), full
    attention: str = "auto"  # of longer sequences: auto (by the devices), blocks, stripes, splash (TPU), cudnn (GPU)
    attention_block: int = 128  # sequences of up to two such blocks of queries attend at once
    copy_init: float = 0.0  # o starts as this times v transposed, so that heads pass on what they attend to

    num_tokens: int = 0  # ids that exist: rows of the tables behind them are padding and get no probability; 0: all
    activation: str = "silu"  # of the gate: silu, gelu_tanh
    embedding_scale: bool = True  # embeddings are multiplied by the square root of d_model
    norm_offset: float = 0.0  # norms multiply by this plus their scale (Gemma: 1)
    qkv_bias: bool = False
    qk_norm: bool = False  # queries and keys of each head are normalised before they are turned
    post_norms: bool = False  # also what attention and MLP give back is normalised
    query_scale: float = 0.0  # queries are divided by the square root of this; 0: head_dim
    attention_softcap: float = 0.0  # scores are kept below this by a tanh; 0: not
    logit_softcap: float = 0.0
    sliding_window: int = 0  # a token sees itself and those less than this before it; 0: all before it
    global_every: int = 0  # of a sliding window: layers n, 2n, ... see all before it; 0: none does
    local_rope_theta: float = 0.0  # of layers with a window, without rope_scaling; 0: as the others
    rope_scaling: str = "none"  # none, linear, llama3 (as of Llama 3.1)
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0  # the last three are of llama3
    rope_high_freq_factor: float = 4.0
    rope_original_length: int = 8192

    def __post_init__(self):
        _check(self.num_heads % self.num_kv_heads == 0, "num_heads must be a multiple of num_kv_heads")
        _check(self.remat in ("none", "dots", "full"), f"remat is {self.remat!r}: use none, dots or full")
        _check(self.dtype in ("float32", "bfloat16"), f"dtype is {self.dtype!r}: use float32 or bfloat16")
        _check(
            0 <= self.num_tokens <= self.vocab_size,
            f"num_tokens={self.num_tokens}: from 0 to vocab_size={self.vocab_size}",
        )
        known = ("silu", "gelu_tanh")
        _check(self.activation in known, f"activation is {self.activation!r}: use {' or '.join(known)}")
        known = ("none", "linear", "llama3")
        _check(self.rope_scaling in known, f"rope_scaling is {self.rope_scaling!r}: use none, linear or llama3")
        for name in ("query_scale", "attention_softcap", "logit_softcap", "sliding_window", "local_rope_theta"):
            _check(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: not below 0")
        known = ("auto", "blocks", "stripes", "splash", "cudnn")
        _check(self.attention in known, f"attention is {self.attention!r}: use {', '.join(known[:-1])} or {known[-1]}")
        _positive(self, "attention_block")
        _check(self.global_every >= 0, f"global_every={self.global_every}: not below 0")
        _check(self.global_every != 1, "global_every=1: all layers see all: set sliding_window and global_every to 0")
        for name in ("global_every", "local_rope_theta"):
            _check(
                not getattr(self, name) or self.sliding_window > 0,
                f"{name}={getattr(self, name)} is for models with a sliding_window: set one, or set it to 0",
            )
        _positive(self, "rope_factor")
        _check(
            self.rope_scaling != "none" or self.rope_factor == 1.0,
            f"rope_factor={self.rope_factor} is for rope_scaling=linear or llama3: set one, or set it to 1",
        )
        if self.rope_scaling == "llama3":
            _positive(self, "rope_low_freq_factor", "rope_original_length")
            _check(
                self.rope_low_freq_factor < self.rope_high_freq_factor,
                f"rope_low_freq_factor={self.rope_low_freq_factor} must be below "
                f"rope_high_freq_factor={self.rope_high_freq_factor}",
            )


LAYER_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
"""Weights of a layer that are matrices, by our names."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021) in the place of the weights, in all stages but those that start from nothing.

    There is no dropout: the ratio of PPO would not be 1 at the first update, nor the loss of DPO log 2.
    """

    rank: int = 0  # 0: all weights are trained
    alpha: float = 16.0  # what adapters add is multiplied by alpha / rank
    targets: tuple[str, ...] = LAYER_MATRICES  # adapted matrices of each layer (all: Dettmers et al. 2023)

    def __post_init__(self):
        _check(self.rank >= 0, f"rank={self.rank}: not below 0")
        _positive(self, "alpha")
        for name in self.targets:
            _check(name in LAYER_MATRICES, f"targets names {name!r}: use {', '.join(LAYER_MATRICES)}")
        _check(len(set(self.targets)) == len(self.targets), f"targets names one twice: {', '.join(self.targets)}")
        _check(not self.rank or bool(self.targets), f"rank={self.rank} needs targets: {', '.join(LAYER_MATRICES)}")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Axes of the device mesh; data=0 takes all devices that `model` leaves."""

    data: int = 0
    model: int = 1


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Preference rows (x, y_l, y_w, c) and the windows that bound them."""

    source: str = "synthetic"  # synthetic, file, or a published set that is downloaded: hh_rlhf, summarize
    path: str = ""  # source=file: a file or folder (.jsonl, .json, .gz, .xz, .parquet)
    format: str = "auto"  # source=file: auto, jsonl, hh_rlhf, summarize, tldr, columns
    columns: str = ""  # format=columns: names of columns, as prompt:instruction,chosen:good,rejected:bad
    mixture: str = ""  # source=file, in place of path: [FORMAT@]PATH[:WEIGHT],.. with weights as shares of the rows
    num_rows: int = 0  # source=file: rows that are taken, by a hash of their texts; 0: as many as there can be
    size: int = 13_000  # source=synthetic: rows over the three folds (13K in the paper, section 4.1)
    num_selection: int = 128  # held-out rows on which checkpoints are chosen (appendix F)
    num_test: int = 640
    num_pretrain: int = 60_000  # source=synthetic: rows written for M_pre, outside the folds
    prompt_window: int = 512  # tokens of x (appendix F: 512 / 512 / 512); longer rows are dropped and counted
    response_window: int = 512  # tokens of y, with EOS
    reflection_window: int = 128  # tokens of c
    templates: str = ""  # a folder with all files of pit_jax/data/templates, which replace the package's

    def __post_init__(self):
        known = ("synthetic", "file", "hh_rlhf", "summarize")
        _check(self.source in known, f"source is {self.source!r}: use {', '.join(known[:-1])} or {known[-1]}")
        given = bool(self.path or self.mixture)
        _check(self.source != "file" or given, "source is 'file': set --config.data.path=FILE_OR_FOLDER")
        _check(self.source == "file" or not self.path, "path is for source=file: set --config.data.source=file")
        _check(
            self.source == "file" or not (self.mixture or self.columns or self.num_rows),
            "mixture, columns and num_rows are for source=file: set --config.data.source=file",
        )
        _check(self.num_rows >= 0, f"num_rows={self.num_rows}: not below 0")
        _positive(self, "size", "num_selection", "num_test", "prompt_window", "response_window", "reflection_window")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """A vocabulary from elsewhere, or a SentencePiece model that is trained on the SFT fold."""

    path: str = ""  # a SentencePiece model, a tokenizer.json, a folder with one of them, or bytes; empty: trained
    vocab_size: int = 2048  # of one that is trained
    chat_template: str = ""  # model (the one that comes with path), or a Jinja file; empty: "Human: ...Assistant:"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon with warm-up, decay and a global-norm clip."""

    name: str = "adamw"  # adamw, muon (for the matrices of the layers; NAdam for the rest)
    learning_rate: float = 3e-5
    schedule: str = "constant"  # constant, linear, cosine (to zero at the last step)
    warmup_fraction: float = 0.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float = 1.0

    def __post_init__(self):
        _check(
            self.schedule in ("constant", "linear", "cosine"),
            f"schedule is {self.schedule!r}: use constant, linear or cosine",
        )
        _check(self.name in ("adamw", "muon"), f"name is {self.name!r}: use adamw or muon")
        _check(self.learning_rate > 0, f"learning_rate={self.learning_rate} must be above 0")


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Likelihood training: M_pre, M_P and M_PIT (section 3.2)."""

    optimizer: OptimizerConfig = OptimizerConfig()
    batch_size: int = 32
    sequence_length: int = 0  # >0: rows are packed into sequences of this length; 0: one row per sequence
    num_steps: int = 0  # 0: from num_epochs
    num_epochs: float = 1.0
    unlikelihood: float = 0.0  # weight of the unlikelihood terms of section 3.2 (M_PIT only; 0 as in the paper)
    chain_of_thought: bool = False  # c, y_w instead of y_w (appendix K; M_PIT only)
    accumulation: int = 1  # pieces that a batch is computed in
    loss_on_prompt: bool = False  # M_pre only: plain language modelling
    chunk_size: int = 0  # log-probs over this many positions at a time; 0: all at once
    save_every: int = 200

    def __post_init__(self):
        _positive(self, "batch_size", "num_epochs", "accumulation", "save_every")
        _check(self.unlikelihood >= 0, f"unlikelihood={self.unlikelihood} must not be negative")


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """M_pre: trained from scratch on generated rows, or read from a checkpoint."""

    checkpoint: str = ""  # models/pretrain of another workdir; empty: train one
    sft: SFTConfig = SFTConfig()
    refinement_share: float = 0.5  # rows (x, y_l, c, y_w) of both Self-Refine forms; the rest are (x, y_w, c)
    learn_rejected: bool = False  # the dialogues' y_l is learnt as well
    text: str = ""  # a file or folder of plain text (.txt, .jsonl with "text", .gz, .xz), learnt beside the rows
    text_tokens: int = 0  # at most so many tokens of it; 0: all

    def __post_init__(self):
        _check(not self.text or self.sft.sequence_length > 0, "text is packed: set sft.sequence_length above 0")
        _check(not self.text or not self.checkpoint, "text is for an M_pre that is trained here: leave one empty")
        _check(self.text_tokens >= 0, f"text_tokens={self.text_tokens}: not below 0")


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
    """R_P (Bradley-Terry) and R_PIT (Equation 2)."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4)
    batch_size: int = 16  # pairs (x, y_l, y_w)
    sequence_length: int = 0  # >0: the rows of several pairs are packed into sequences of this length; 0: of one pair
    accumulation: int = 1
    num_steps: int = 0  # 0: from num_epochs
    num_epochs: float = 1.0
    loss: str = "gap"  # R_PIT: gap (Equation 2), gap_no_diagonal, mse, r_p_difference (all appendix C)
    start_from: str = "pretrain"  # pretrain (Algorithm 1), sft, or r_p (R_PIT only)
    eval_every: int = 50  # steps between accuracies on the selection rows; the best checkpoint is kept
    save_every: int = 50

    def __post_init__(self):
        _positive(self, "batch_size", "num_epochs", "accumulation", "eval_every", "save_every")
        _check(self.sequence_length >= 0, f"sequence_length={self.sequence_length}: not below 0")
        losses = ("gap", "gap_no_diagonal", "mse", "r_p_difference")
        _check(self.loss in losses, f"loss is {self.loss!r}: use one of {', '.join(losses)}")
        _check(
            self.start_from in ("pretrain", "sft", "r_p"),
            f"start_from is {self.start_from!r}: use pretrain, sft or (R_PIT only) r_p",
        )


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled."""

    max_new_tokens: int = 512
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    slots: int = 0  # rows that are written at a time: those that end make room for others; 0: all


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """PPO with a per-token KL to the frozen SFT policy (Equations 3 to 5)."""

    policy_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)
    value_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)
    num_iterations: int = 100
    rollout_size: int = 128  # answers per iteration
    rollout_slots: int = 0  # answers that are written at a time: those that end make room for others; 0: all
    samples_per_prompt: int = 1  # above 1: each score is taken relative to the mean of the prompt's other answers
    num_epochs: int = 4
    num_minibatches: int = 4
    temperature: float = 1.0
    top_k: int = 0  # must stay off in RL: the ratio would be biased
    top_p: float = 1.0
    kl_coef: float = 0.05  # beta of Equations 3 to 5
    kl_estimator: str = "k1"  # k1, k3
    adaptive_kl: bool = False
    kl_target: float = 6.0  # adaptive_kl: nats per response
    kl_horizon: int = 10_000
    discount: float = 1.0
    gae_lambda: float = 0.95
    epsilon: float = 0.2  # clip of the ratio
    value_epsilon: float = 0.2  # clip of the value; 0: off
    entropy_coef: float = 0.0
    missing_eos_penalty: float = 1.0  # taken from the score of a response without EOS
    normalize_scores: bool = True  # (score - running mean) / running standard deviation
    chunk_size: int = 0  # log-probs over this many positions at a time; 0: all at once
    value_warmup: int = 0  # first iterations in which only the value model learns
    eval_every: int = 10  # iterations between candidates for the choice by KL bin (appendix F)
    save_every: int = 5
    num_kl_bins: int = 4
    max_kl: float = 0.0  # candidates further than this from the SFT policy (nats per response) are not chosen; 0: any

    def __post_init__(self):
        _check(self.kl_estimator in ("k1", "k3"), f"kl_estimator is {self.kl_estimator!r}: use k1 or k3")
        _check(
            self.top_k == 0 and self.top_p == 1.0,
            "top_k and top_p must stay off: the ratio and the KL would be taken under another distribution "
            "than the one that was sampled. Set top_k=0 and top_p=1.0.",
        )
        _positive(self, "num_iterations", "rollout_size", "num_epochs", "num_minibatches", "eval_every", "save_every")
        _positive(self, "samples_per_prompt")
        _check(
            self.rollout_size % self.samples_per_prompt == 0,
            f"rollout_size={self.rollout_size} must be a multiple of samples_per_prompt={self.samples_per_prompt}",
        )
        _check(
            self.rollout_size % self.num_minibatches == 0,
            f"rollout_size={self.rollout_size} must be a multiple of num_minibatches={self.num_minibatches}",
        )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The tables at the end (section 4.4)."""

    num_prompts: int = 640  # at most; the test rows there are
    batch_size: int = 128
    temperature: float = 1.0
    num_iterations: int = 3  # K of Algorithm 2
    num_pairs: int = 4  # pairs of M_P's own answers per test prompt: what the reward models are asked about
    num_resamples: int = 10_000
    self_refine: bool = True
    show_samples: int = 3

    def __post_init__(self):
        _positive(self, "num_prompts", "batch_size", "num_iterations", "num_pairs", "num_resamples")


@dataclasses.dataclass(frozen=True)
class PitConfig:
    """PIT: Algorithms 1 and 2."""

    name: str = "pit"
    seed: int = 0
    mesh: MeshConfig = MeshConfig()
    profile: int = 0  # steps of each stage of which a trace is written; 0: none
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    policy_model: ModelConfig = ModelConfig()
    pit_model: ModelConfig = ModelConfig()  # may be smaller than the policy (appendix J)
    reward_model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    pretrain: PretrainConfig = PretrainConfig()
    sft_policy: SFTConfig = SFTConfig()
    sft_pit: SFTConfig = SFTConfig()
    r_p: RewardModelConfig = RewardModelConfig()
    r_pit: RewardModelConfig = RewardModelConfig()
    evaluator: RewardModelConfig = RewardModelConfig()
    ppo: PPOConfig = PPOConfig()  # M_P, Equation 3
    ppo_pit: PPOConfig = PPOConfig()  # M_PIT, each round of the curriculum
    # Sources of ref_response, a round for each: data, policy, pit, policy_checkpoint, srt.
    curriculum: tuple[str, ...] = ("data", "policy")
    srt_workdir: str = ""  # curriculum srt: the run of SRT whose refinements are taken
    arms: tuple[str, ...] = ()  # extra models for the tables, of ARMS above
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self):
        _check(self.profile >= 0, f"profile={self.profile}: a number of steps, not below 0")
        for source in self.curriculum:
            _check(
                source in ("data", "policy", "pit", "policy_checkpoint", "srt"),
                f"curriculum names {source!r}: use data, policy, pit, policy_checkpoint or srt",
            )
        _check(
            "srt" not in self.curriculum or bool(self.srt_workdir),
            "curriculum names srt: set --config.srt_workdir=FOLDER, a run of SRT",
        )
        _check(
            not (self.sft_pit.chain_of_thought and self.curriculum),
            "sft_pit.chain_of_thought is for the SFT model only (appendix K: RL would need data that tells good "
            "reflections from bad ones): set --config.curriculum= (empty) with it.",
        )
        for name in ("r_p", "evaluator"):
            _check(getattr(self, name).start_from != "r_p", f"{name}.start_from=r_p: only r_pit comes after R_P")
            _check(getattr(self, name).loss == "gap", f"{name}.loss is for r_pit; {name} is trained by Bradley-Terry")
        for field in ("chain_of_thought", "unlikelihood"):
            _check(not getattr(self.sft_policy, field), f"sft_policy.{field} is for sft_pit")
        for arm in self.arms:
            _check(arm in ARMS, f"arms names {arm!r}: use {', '.join(ARMS)}")


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimization (SRT stage 2; section 4.1 of the paper)."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-7, schedule="cosine", warmup_fraction=0.1)
    beta: float = 0.01
    loss: str = "sigmoid"  # sigmoid, ipo, hinge (SLiC)
    label_smoothing: float = 0.0  # sigmoid only
    length_normalized: bool = False  # log-probs per token instead of per response
    batch_size: int = 32
    num_steps: int = 0  # 0: from num_epochs
    num_epochs: float = 1.0
    chunk_size: int = 0  # answer tokens whose logits are in memory at a time; 0: all
    accumulation: int = 1
    save_every: int = 200

    def __post_init__(self):
        _check(self.loss in ("sigmoid", "ipo", "hinge"), f"loss is {self.loss!r}: use sigmoid, ipo or hinge")
        _check(not self.label_smoothing or self.loss == "sigmoid", "label_smoothing is for loss=sigmoid: set it to 0")
        _check(0 <= self.label_smoothing < 0.5, f"label_smoothing={self.label_smoothing}: from 0 to below 0.5")
        _positive(self, "beta", "batch_size", "num_epochs", "accumulation", "save_every")


@dataclasses.dataclass(frozen=True)
class CriticConfig:
    """Who writes the feedback of stage 1 (SRT section 3.1.1)."""

    kind: str = "verifier"  # verifier (synthetic data only), server, workdir (the model of another SRT run)
    error_rate: float = 0.0  # kind=verifier: share of the requirements that it judges wrongly
    base_url: str = ""  # kind=server: an OpenAI-compatible one; the key is in api_key_env
    model: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float = 0.0  # below 0: not sent, for models that refuse it
    max_tokens: int = 2048  # 0: not sent
    extra: str = ""  # a JSON object of further request fields
    max_in_flight: int = 32
    timeout_s: float = 120.0
    max_lost: float = 0.02  # share of records without a reply, after all retries, with which stage 1 goes on
    workdir: str = ""  # kind=workdir

    def __post_init__(self):
        _check(
            self.kind in ("verifier", "server", "workdir"), f"kind is {self.kind!r}: use verifier, server or workdir"
        )
        _check(0 <= self.error_rate <= 1, f"error_rate={self.error_rate}: from 0 to 1")
        _check(0 <= self.max_lost <= 1, f"max_lost={self.max_lost}: from 0 to 1")
        _check(self.kind == "verifier" or not self.error_rate, "error_rate is for kind=verifier: set it to 0")
        _check(
            self.kind != "server" or bool(self.base_url and self.model),
            "kind is 'server': set --config.critic.base_url=http://HOST/v1 and --config.critic.model=NAME",
        )
        _check(self.kind != "workdir" or bool(self.workdir), "kind is 'workdir': set --config.critic.workdir=FOLDER")


@dataclasses.dataclass(frozen=True)
class FeedbackConfig:
    """How responses, critiques and refinements are made and which are kept (SRT sections 3.1.1, 3.2 and 4.1)."""

    num_prompts: int = 0  # 0: all of the fold
    temperature: float = 0.7  # of the initial responses; critique and refinement are greedy
    num_critiques: int = 1  # rounds of critique and refinement; that with the highest score is kept (Table 2)
    keep_ties: bool = True  # False: the refinement's score must exceed the response's
    min_margin: float = 0.0  # by how much at least
    max_unchanged: float = 1.0  # share of the kept records whose refinement is the response itself; others are dropped
    gap_workdir: str = ""  # a PIT run whose R_PIT must find the refinement better as well; empty: none
    batch_size: int = 128  # rows of a batch of answers or critiques

    def __post_init__(self):
        _positive(self, "num_critiques", "batch_size")
        _check(self.num_prompts >= 0, f"num_prompts={self.num_prompts}: not below 0")
        _check(self.temperature >= 0, f"temperature={self.temperature}: not below 0")
        _check(self.min_margin >= 0, f"min_margin={self.min_margin}: not below 0")
        _check(0 <= self.max_unchanged <= 1, f"max_unchanged={self.max_unchanged}: from 0 to 1")


SRT_ARMS = (
    *("without_score", "without_suggestions", "without_weaknesses", "without_feedback", "all_but_refinement"),
    *("quarter", "half"),
)
"""Stage 1 with a part of the sequence left out (Table 6), and on a part of the sequences (Figure 5)."""


@dataclasses.dataclass(frozen=True)
class SrtEvaluationConfig:
    """The tables at the end (SRT section 4)."""

    num_prompts: int = 640  # at most; the test rows there are
    batch_size: int = 128
    temperature: float = 0.7  # of first answers
    num_iterations: int = 3  # refinements of refinements
    num_candidates: int = 16  # of re-ranking (Figure 4)
    num_resamples: int = 10_000
    show_samples: int = 3

    def __post_init__(self):
        _positive(self, "num_prompts", "batch_size", "num_iterations", "num_candidates", "num_resamples")


@dataclasses.dataclass(frozen=True)
class SrtConfig:
    """SRT: two stages of self-refinement tuning (SRT section 3)."""

    name: str = "srt"
    seed: int = 0
    mesh: MeshConfig = MeshConfig()
    profile: int = 0  # steps of each stage of which a trace is written; 0: none
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    policy_model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    base: str = ""  # M_base: a models/STAGE of another run; empty: pretrain and sft_policy make one
    pretrain: PretrainConfig = PretrainConfig()
    sft_policy: SFTConfig = SFTConfig()
    critic: CriticConfig = CriticConfig()
    feedback_window: int = 512  # tokens of a critique with its headings, without the refinement
    critic_feedback: FeedbackConfig = FeedbackConfig()  # stage 1
    srt: SFTConfig = SFTConfig(
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="cosine", warmup_fraction=0.1), num_epochs=5.0
    )
    without: str = ""  # of the sequence: score, suggestions, weaknesses, feedback (Table 6)
    learn: tuple[str, ...] = ("response", "weaknesses", "suggestions", "score", "refinement")  # parts with loss
    self_feedback: FeedbackConfig = FeedbackConfig(keep_ties=False)  # stage 2
    dpo: DPOConfig = DPOConfig()
    num_rounds: int = 1  # of stage 2
    arms: tuple[str, ...] = ()  # extra models for the tables, of SRT_ARMS above
    evaluation: SrtEvaluationConfig = SrtEvaluationConfig()

    def __post_init__(self):
        _check(self.profile >= 0, f"profile={self.profile}: a number of steps, not below 0")
        parts = SrtConfig.__dataclass_fields__["learn"].default
        for part in self.learn:
            _check(part in parts, f"learn names {part!r}: use {', '.join(parts)}")
        _check("refinement" in self.learn, "learn must name refinement: nothing else ends a sequence")
        _check(self.num_rounds >= 0, f"num_rounds={self.num_rounds}: not below 0")
        known = ("", "score", "suggestions", "weaknesses", "feedback")  # all_but_refinement is an arm: it refines not
        _check(self.without in known, f"without is {self.without!r}: use {', '.join(known[1:])}, or leave it empty")
        _check(
            not self.num_rounds or not self.without,
            f"without={self.without}: stage 2 needs whole critiques of the model: set num_rounds to 0",
        )
        _check(self.data.source == "synthetic" or self.critic.kind != "verifier", NO_VERIFIER)
        for arm in self.arms:
            _check(arm in SRT_ARMS, f"arms names {arm!r}: use {', '.join(SRT_ARMS)}")


NO_VERIFIER = "critic.kind=verifier knows the synthetic task only: set --config.critic.kind=server"


@dataclasses.dataclass(frozen=True)
class SynthesisConfig:
    """Preference rows written by a language model behind an OpenAI-compatible server (PIT appendix D).

    The paper states the steps and 13K rows; all other values are ours.
    """

    name: str = "synthesize"
    seed: int = 0  # of the draws of tasks, subjects and requirements
    base_url: str = ""  # of the server; the key is in api_key_env
    model: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    num_rows: int = 13_000  # may be raised on a finished folder
    max_candidates: int = 0  # rows that are begun, at most; 0: four for each row that is wanted
    min_requirements: int = 2  # of the first question, "several"
    max_requirements: int = 3
    min_added: int = 1  # what is then added to it, "a few more"
    max_added: int = 2
    show_rejected: bool = True  # the model sees y_l when it writes y_w, as the paper's example suggests
    temperature: float = 1.0  # of questions, answers and reflections; below 0: not sent
    verify_temperature: float = 0.0  # of the self-verification; below 0: not sent
    max_tokens: int = 2048  # 0: not sent
    extra: str = ""  # a JSON object of further request fields
    max_in_flight: int = 32  # 256 at most: so many candidates are under way together
    timeout_s: float = 120.0
    num_retries: int = 6  # of a request that failed
    num_attempts: int = 3  # how often a reply is asked for that did not come or cannot be used
    prompts: str = ""  # a folder whose files replace those of pit_jax/pipelines/prompts
    labels: str = ""  # rows {"prompt", "response", "label"} that the classifier learns from; empty: no classifier
    min_quality: float = 0.5  # rows that the classifier finds good with a smaller probability are dropped
    held_out: float = 0.2  # share of the labelled rows that its accuracy is measured on
    prompt_price: float = 0.0  # of a million tokens, for the cost; 0 and 0: tokens alone are shown
    completion_price: float = 0.0

    def __post_init__(self):
        _positive(self, "num_rows", "min_requirements", "min_added", "max_in_flight", "timeout_s", "num_attempts")
        for low, high in (("min_requirements", "max_requirements"), ("min_added", "max_added")):
            a, b = getattr(self, low), getattr(self, high)
            _check(a <= b, f"{low}={a} must not be above {high}={b}")
        for name in ("seed", "max_candidates", "max_tokens", "num_retries", "prompt_price", "completion_price"):
            _check(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: not below 0")
        _check(0 <= self.min_quality <= 1, f"min_quality={self.min_quality}: from 0 to 1")
        _check(0 < self.held_out < 1, f"held_out={self.held_out} must be between 0 and 1")


def class_of(config: ml_collections.ConfigDict | dict) -> type:
    """The dataclass of a whole config, by its fields."""
    return SrtConfig if "critic" in config else PitConfig


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """A dataclass as a locked ConfigDict, whose fields flags can override."""

    def convert(value):
        if dataclasses.is_dataclass(value):
            fields = dataclasses.fields(value)
            return ml_collections.ConfigDict({f.name: convert(getattr(value, f.name)) for f in fields})
        return value

    return convert(config).lock()


def from_config_dict(cls: type, config: ml_collections.ConfigDict | dict, path: str = "config") -> Any:
    """A ConfigDict as the frozen dataclass `cls`.

    Raises:
      ValueError: for an unknown field (the nearest is named), a missing field or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = dict(config.items())
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f" Did you mean {path}.{near[0]}?" if near else f" Fields: {', '.join(fields)}."
            raise ValueError(f"{path}.{name} is not a field of {cls.__name__}.{hint}")
    missing = [name for name in fields if name not in values]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)} (fields of {cls.__name__})")
    converted = {name: _convert(hints[name], values[name], f"{path}.{name}") for name in fields}
    try:
        return cls(**converted)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_config_dict(hint, value, path)
    origin = typing.get_origin(hint)
    if origin is tuple:
        item = typing.get_args(hint)[0]
        if item is str:
            # --config.FIELD=a,b comes as ("a,b",) and --config.FIELD= as ("",).
            text = value if isinstance(value, str) else ",".join(map(str, value))
            value = [part.strip() for part in text.split(",") if part.strip()]
        return tuple(_convert(item, v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is types.UnionType:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{path} is {value!r} ({type(value).__name__}), but must be of type {hint.__name__}")
    return value


def complete(values: dict, default: Any = None) -> dict:
    """A resolved config of an earlier version (from JSON) with the fields that it had not, at their defaults.

    Fields are added with defaults that do what was done before; fields that no longer exist stay, and are an error of
    `from_config_dict`.
    """
    default = class_of(values)() if default is None else default
    out = dict(values)
    for field in dataclasses.fields(default):
        value = getattr(default, field.name)
        if field.name not in out:
            out[field.name] = json.loads(to_json(value)) if dataclasses.is_dataclass(value) else value
        elif dataclasses.is_dataclass(value) and isinstance(out[field.name], dict):
            out[field.name] = complete(out[field.name], value)
    return out


def to_json(config: Any) -> str:
    """The resolved config as stable, readable JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True) + "\n"


def differing_fields(ours: dict, theirs: dict, path: str = "config") -> list[str]:
    """`path: theirs -> ours` for every field in which two resolved configs (from JSON) differ."""
    lines = []
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differing_fields(a, b, f"{path}.{name}")
        elif a != b:
            lines.append(f"{path}.{name}: {b!r} -> {a!r}")
    return lines
