"""A tokenizer of characters for tiny models of 97 words."""


class Letters:
    bos_token_id = 1

    def __len__(self):
        return 97

    def encode(self, text, add_special_tokens=False, verbose=False):
        return [2 + ord(letter) % 95 for letter in text]


TEXT = "The quick brown fox jumps over the lazy dog, and so it goes on. " * 30
LEARN_FROM = "A journey of a thousand miles begins with a single step; quietly, in the morning. " * 30
