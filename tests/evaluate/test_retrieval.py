import pytest
import torch

from narrowkv.evaluate.retrieval import PASSAGE_ANSWER, PASSAGE_CUE, accuracy, facts, passages


class Letters:
    """A tokenizer of characters."""

    bos_token_id = 1

    def encode(self, text, add_special_tokens=False, verbose=True):
        return [ord(letter) for letter in text]

    def __call__(self, text):
        return {"input_ids": [1, *self.encode(text)]}

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i != 1)


FILLER = [ord(letter) for letter in "The quick brown fox jumps over the lazy dog. " * 9]


def test_the_queried_fact_lies_at_the_distance():
    tokenizer = Letters()
    batch = facts(tokenizer, FILLER, 600, 5, seed=3)
    assert batch.input_ids.shape == batch.answer_mask.shape
    for row, mask in zip(batch.input_ids, batch.answer_mask, strict=True):
        text = tokenizer.decode(row.tolist())
        answer = tokenizer.decode(row[mask].tolist())
        question = text[: len(text) - len(answer)].rsplit("\n", 1)[1]
        assert text.count(question + answer + ".") == 1  # stated once; asked without the full stop
        assert text.count("The password of") == 5  # four facts, one question
        assert len(text) - len(answer) - text.index(question + answer) - len(question) == 600
        assert row[0] == 1


def test_a_passage_is_repeated_at_the_distance():
    batch = passages(Letters(), FILLER, 100, 4, seed=0)
    length = PASSAGE_CUE + PASSAGE_ANSWER
    for row, mask in zip(batch.input_ids, batch.answer_mask, strict=True):
        assert torch.equal(row[-length:], row[-length - 100 : -100])
        assert mask.sum() == PASSAGE_ANSWER and mask[-PASSAGE_ANSWER:].all()


def test_rows_are_the_same_for_a_seed_and_others_for_another():
    one, same, other = (facts(Letters(), FILLER, 600, 3, seed).input_ids for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_row_counts_only_if_every_token_of_its_answer_is_right():
    batch = passages(Letters(), FILLER, 60, 4, seed=0)
    logits = torch.nn.functional.one_hot(batch.input_ids.roll(-1, dims=1), 200).float()
    assert accuracy(logits, batch) == 1.0
    assert accuracy(logits[:, -PASSAGE_ANSWER - 1 :], batch) == 1.0
    logits[2, -2] = 0
    assert accuracy(logits, batch) == 0.75
    with pytest.raises(ValueError, match="miss answer tokens"):
        accuracy(logits[:, -3:], batch)


@pytest.mark.parametrize("make", [facts, passages])
def test_impossible_rows_are_refused(make):
    with pytest.raises(ValueError, match="too small"):
        make(Letters(), FILLER, 10, 2, 0)
    with pytest.raises(ValueError, match="filler is empty"):
        make(Letters(), [], 600, 2, 0)
    with pytest.raises(ValueError, match="at least 1"):
        make(Letters(), FILLER, 600, 0, 0)
