"""The embedded reasoner: a character tokenizer and a small Llama."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from companion.paths import REASONER
from companion.tasks.programs import ALPHABET, Problem
from companion.tasks.puzzles import Puzzle


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, plus ``<pad>`` (0) and ``<eos>`` (1)."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left", model_max_length=1024
    )


def load_tokenizer(directory: Path | str = REASONER) -> PreTrainedTokenizerFast:
    """The tokenizer saved beside a reasoner's weights."""
    return PreTrainedTokenizerFast.from_pretrained(directory)


def make_model(vocabulary: int, seed: int = 0, width: int = 128) -> LlamaForCausalLM:
    """A fresh reasoner: 4 layers, heads of 32 that fill the width, two query heads to a KV head, tied embeddings."""
    torch.manual_seed(seed)
    heads = width // 32
    shape = {"num_hidden_layers": 4, "num_attention_heads": heads, "num_key_value_heads": heads // 2}
    sizes = {"hidden_size": width, "head_dim": 32, "intermediate_size": 3 * width, "max_position_embeddings": 1024}
    shape |= {"tie_word_embeddings": True}
    tokens = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**shape, **sizes, **tokens, initializer_range=0.04))


def encode_problem(tokenizer: PreTrainedTokenizerFast, problem: Problem | Puzzle) -> tuple[list[int], int]:
    """Token ids of prompt, trace and ``<eos>``, and the prompt's length in tokens."""
    prompt = tokenizer(problem.prompt)["input_ids"]
    return prompt + tokenizer(problem.trace)["input_ids"] + [tokenizer.eos_token_id], len(prompt)
