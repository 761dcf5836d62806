import torch

from narrowkv.store import Ledger


def test_positions_come_back_after_any_growth():
    ledger, expected = Ledger(), torch.empty(2, 0, dtype=torch.int32)
    for new in (5, 1, 1, 70, 1, 300):
        positions = torch.randint(0, 9999, (2, new))
        ledger.append(positions)
        expected = torch.cat([expected, positions.int()], dim=1)
        assert torch.equal(ledger.read(ledger.length), expected)
    assert torch.equal(ledger.read(7), expected[:, :7])
    ledger.select(torch.tensor([1, 1, 0]))
    assert torch.equal(ledger.read(378), expected[[1, 1, 0]])
    ledger.crop(10)
    ledger.append(torch.zeros(3, 1))
    assert torch.equal(ledger.read(10), expected[[1, 1, 0], :10])
    assert ledger.length == 11
    ledger.reset()
    assert ledger.length == 0 and ledger.tensors() == []
