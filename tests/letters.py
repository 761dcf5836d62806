"""A tokenizer of characters and its words, small enough for the tiny models."""

import string

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

CHARACTERS = "\n !\"'(),.:;?=-" + string.digits + string.ascii_letters  # with three special tokens they fit 97 words
TEXT = "The quick brown fox jumps over the lazy dog. " * 40


def make_letters(template: str = "$A") -> PreTrainedTokenizerFast:
    """A tokenizer with one token a character. template: what `tokenizer(text)` makes of a text, such as `<s> $A`."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = Fuse()
    special = [(token, vocabulary[token]) for token in ("<s>", "<pad>")]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", unk_token="<unk>")
