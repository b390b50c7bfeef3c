"""`transformers serve` on loopback with a tiny model: an OpenAI-compatible server that is not ours."""

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

needs_transformers_serve = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("openai", "torch", "transformers", "fastapi", "uvicorn")),
    reason="openai, torch or transformers[serving] is not installed (extra: parity)",
)


def tiny_chat_model(folder: Path, says: Sequence[str] = ()) -> None:
    """A Llama and a tokenizer of bytes with a chat template.

    Args:
      folder: for its files.
      says: pieces of text, all different, that follow each other in every reply; none: its parameters are random.
    """
    import torch
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<assistant>", *says)] if says else [])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    begins = "<assistant>" if says else "<s>assistant: "
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}" + begins + "{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    size = -(-len(tokenizer) // 4) * 4  # two heads of an even width
    sizes = transformers.LlamaConfig(
        vocab_size=size, hidden_size=size if says else 16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8192, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(sizes)
    if says:  # one direction per token, nothing added by the layer: the next token depends on the last one alone
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(torch.eye(size))
            model.lm_head.weight.zero_()
            model.model.layers[0].self_attn.o_proj.weight.zero_()
            model.model.layers[0].mlp.down_proj.weight.zero_()
            chain = [*tokenizer.convert_tokens_to_ids(["<assistant>", *says]), 2]
            for last, following in zip(chain, chain[1:], strict=False):
                model.lm_head.weight[following, last] = 1.0
    model.save_pretrained(folder)


@contextlib.contextmanager
def serve(model: Path, folder: Path) -> Iterator[str]:
    """The address of a server of a model; its log and caches are in a folder."""
    log = folder / "serve.log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", model, "--host", "127.0.0.1"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as file:
        server = subprocess.Popen(
            [*command, "--port", str(port)], env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=folder
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
