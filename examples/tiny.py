"""A small random model, its tokenizer and a text, so that the examples run offline in seconds.

Put AutoModelForCausalLM.from_pretrained(...), AutoTokenizer.from_pretrained(...) and your own data
in their place.
"""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = """the adapter learns and the base stays as it was
a low rank product is added to the frozen product
each layer keeps its input and one bit for each entry that dropout keeps"""


def tokenizer():
    words = ["<pad>", "<unk>", "<eos>", *sorted(set(TEXT.split()))]
    model = WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    wrapped = Tokenizer(model)
    wrapped.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=wrapped, **special)


def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def rows():
    """Token ids and labels of each line."""
    encode = tokenizer()
    lines = [encode(line)["input_ids"] for line in TEXT.splitlines()]
    return [{"input_ids": ids, "labels": ids} for ids in lines]
