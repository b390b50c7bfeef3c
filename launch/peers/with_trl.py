"""The trainers of TRL: SFTTrainer, DPOTrainer, RewardTrainer, and PPOTrainer of the last release that has one.

Their defaults of bfloat16 and gradient checkpointing are off, as works have neither. DPOTrainer computes the log-probs
of the reference in each step, as it does by default, or (stored) has them in the data as ours has; it adds an EOS to
texts without one, so here the last token is one. PPOTrainer clips no gradients, and has no setting for that. With
compile a trainer compiles the forward pass (torch_compile).
"""

import tempfile

import common
import torch
import transformers
import trl
from datasets import Dataset
from with_transformers import causal_lm, config, multiply


class Marks(transformers.TrainerCallback):
    """Tells of the ends of steps."""

    def __init__(self, ends: common.Ends):
        self.on_train_begin = self.on_step_end = lambda *args, **more: ends.mark()


def scorer(work: dict, seed: int = 0) -> transformers.LlamaForSequenceClassification:
    """A reward or value model."""
    torch.manual_seed(seed)
    return transformers.LlamaForSequenceClassification(config(work, num_labels=1)).float()


def tokenizer(work: dict) -> transformers.PreTrainedTokenizerFast:
    """Words t3, t4, ... are the ids."""
    import tokenizers

    words = {"<pad>": common.PAD, "<s>": common.BOS, "</s>": common.EOS}
    words |= {f"t{i}": i for i in range(3, work["sizes"]["vocab_size"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<s>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<s>",
        padding_side="left",
    )  # fmt: skip


def text(ids) -> str:
    """What the tokenizer reads as these."""
    return " ".join(f"t{i}" for i in ids)


def settings(work: dict, calls: int, variant: str, **more) -> dict:
    """Of a trainer."""
    how = work["optimizer"]
    return dict(
        output_dir=tempfile.mkdtemp(prefix="trl-"), per_device_train_batch_size=work["rows"], max_steps=calls,
        learning_rate=how["learning_rate"], weight_decay=how["weight_decay"], max_grad_norm=how["clip_norm"],
        lr_scheduler_type="constant", bf16=False, fp16=False, use_cpu=True, gradient_checkpointing=False,
        torch_compile="compile" in variant, save_strategy="no", report_to="none", disable_tqdm=True, **more,
    )  # fmt: skip


def train(trainer: transformers.Trainer, ends: common.Ends) -> None:
    """To the last step."""
    trainer.add_callback(Marks(ends))
    trainer.train()


def sft(work: dict, variant: str, calls: int, ends: common.Ends) -> None:
    """Steps of training."""
    ids = common.random_tokens(work, 0, calls * work["rows"], work["length"])
    how = trl.SFTConfig(**settings(work, calls, variant, max_length=work["length"], packing=False))
    data = Dataset.from_dict({"input_ids": ids.tolist()})
    train(trl.SFTTrainer(causal_lm(work), args=how, train_dataset=data, processing_class=tokenizer(work)), ends)


def dpo(work: dict, variant: str, calls: int, ends: common.Ends) -> None:
    """Steps of training."""
    rows = [row for i in range(calls) for row in zip(*common.pairs(work, i), strict=True)]
    data = {"prompt": [text(x) for x, _, _ in rows]}
    for place, name in enumerate(("chosen", "rejected"), 1):
        data[name] = [f" {text(row[place][:-1])} </s>" for row in rows]
    stored = "stored" in variant
    length = work["prompt"] + work["answer"]
    how = trl.DPOConfig(
        **settings(work, calls, variant, max_length=length, beta=0.1, precompute_ref_log_probs=stored)
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        causal_lm(work), ref_model=None if stored else causal_lm(work), args=how, train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer(work),
    )  # fmt: skip
    shape = tuple(next(iter(trainer.get_train_dataloader()))["input_ids"].shape)
    if shape != (2 * work["rows"], length):
        raise RuntimeError(f"a batch of DPO is {shape}")
    train(trainer, ends)


def rm(work: dict, variant: str, calls: int, ends: common.Ends) -> None:
    """Steps of training."""
    rows = [row for i in range(calls) for row in zip(*common.pairs(work, i), strict=True)]
    data = Dataset.from_dict(
        {name: [[*row[0], *row[place]] for row in rows] for place, name in ((1, "chosen_ids"), (2, "rejected_ids"))}
    )
    how = trl.RewardConfig(**settings(work, calls, variant, max_length=work["prompt"] + work["answer"]))
    train(trl.RewardTrainer(scorer(work), args=how, train_dataset=data, processing_class=tokenizer(work)), ends)


def ppo(work: dict, variant: str, calls: int, ends: common.Ends) -> None:
    """Iterations: sampling, scoring and the updates."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    rows = work["rows"]
    given = settings(work, calls, variant)
    del given["max_steps"]
    how = PPOConfig(
        **given, total_episodes=calls * rows, num_ppo_epochs=work["epochs"], num_mini_batches=work["minibatches"],
        local_rollout_forward_batch_size=rows, response_length=work["new"], temperature=1.0, kl_coef=0.05,
        num_sample_generations=0, stop_token=None,
    )  # fmt: skip
    prompts = common.random_tokens(work, 0, calls * rows, work["prompt"])
    trainer = PPOTrainer(
        args=how, processing_class=tokenizer(work), model=causal_lm(work), ref_model=causal_lm(work),
        reward_model=scorer(work, 1), value_model=scorer(work, 2),
        train_dataset=Dataset.from_dict({"input_ids": prompts.tolist()}),
    )  # fmt: skip
    train(trainer, ends)


if __name__ == "__main__":
    kinds = {"sft": sft, "dpo": dpo, "rm": rm, "ppo": ppo}
    common.main(multiply, kinds, ("trl", "torch", "transformers", "accelerate"))
