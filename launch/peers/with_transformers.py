"""A loop around transformers, as one writes it: steps of SFT (eager, compile) and generate (dynamic; static: a static
cache; static+compile: also a compiled forward pass)."""

import common
import numpy as np
import torch
import transformers


def config(work: dict, **more) -> transformers.LlamaConfig:
    """The sizes of a work in the names of Llama."""
    sizes = work["sizes"]
    return transformers.LlamaConfig(
        vocab_size=sizes["vocab_size"], hidden_size=sizes["d_model"], intermediate_size=sizes["mlp_dim"],
        num_hidden_layers=sizes["num_layers"], num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"], head_dim=sizes["head_dim"], max_position_embeddings=1024,
        rms_norm_eps=sizes["norm_epsilon"], tie_word_embeddings=sizes["tie_embeddings"], dtype="float32",
        pad_token_id=common.PAD, bos_token_id=common.BOS, eos_token_id=common.EOS, **more,
    )  # fmt: skip


def causal_lm(work: dict, seed: int = 0) -> transformers.LlamaForCausalLM:
    """float32, with random weights."""
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config(work)).float()


def multiply(matrix: np.ndarray):
    """See common.limit."""
    matrix = torch.from_numpy(matrix)
    return lambda: torch.mm(matrix, matrix)


def sft(work: dict, variant: str, calls: int, ends: common.Ends) -> None:
    """Steps of training."""
    model, how = causal_lm(work).train(), work["optimizer"]
    made = torch.optim.AdamW(
        model.parameters(), lr=how["learning_rate"], weight_decay=how["weight_decay"], fused=True
    )  # fmt: skip
    forward = torch.compile(model) if variant == "compile" else model
    ends.mark()
    for i in range(calls):
        ids = torch.from_numpy(common.random_tokens(work, i, work["rows"], work["length"])).long()
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), how["clip_norm"])
        made.step()
        made.zero_grad(set_to_none=True)
        loss.item()
        ends.mark()


def gen(work: dict, variant: str, calls: int, ends: common.Ends) -> None:
    """Batches of sampling; the config has no EOS, so all rows have all tokens."""
    model, static = causal_lm(work).eval(), variant.startswith("static")
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=work["new"], pad_token_id=common.PAD,
        **({"cache_implementation": "static"} if static else {}),
    )  # fmt: skip
    if variant.endswith("compile"):
        model.forward = torch.compile(model.forward)
    ends.mark()
    for i in range(calls):
        ids = torch.from_numpy(common.random_tokens(work, i, work["rows"], work["prompt"])).long()
        with torch.inference_mode():
            found = model.generate(ids, attention_mask=torch.ones_like(ids)).numpy()
        if found.shape != (work["rows"], work["prompt"] + work["new"]):
            raise RuntimeError(f"sampled {found.shape}")
        ends.mark()


if __name__ == "__main__":
    common.main(multiply, {"sft": sft, "gen": gen}, ("torch", "transformers"))
