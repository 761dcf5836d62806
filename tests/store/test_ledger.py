import torch

from narrowkv.store import Ledger


def test_positions_come_back_after_any_growth():
    ledger, expected = Ledger(), torch.empty(2, 0, dtype=torch.int32)
    for new in (5, 1, 1, 70, 1, 300):
        positions = torch.randint(0, 9999, (2, new))
        ledger.append(positions)
        expected = torch.cat([expected, positions.int()], dim=1)
        assert torch.equal(ledger.read(0, ledger.length), expected)
    assert torch.equal(ledger.read(0, 7), expected[:, :7])
    ledger.select(torch.tensor([1, 1, 0]))
    assert torch.equal(ledger.read(0, 378), expected[[1, 1, 0]])
    ledger.crop(10)
    ledger.append(torch.zeros(3, 1))
    assert torch.equal(ledger.read(0, 10), expected[[1, 1, 0], :10])
    assert ledger.length == 11
    ledger.reset()
    assert ledger.length == 0 and ledger.tensors() == []


def test_what_is_forgotten_frees_its_memory():
    ledger, angles = Ledger(), torch.rand(2, 500, 2, 8)
    for part in angles.split([300, 100, 100], dim=1):
        ledger.append(part)
        ledger.forget(ledger.length - 30)
    assert ledger.first == 470 and ledger.length == 500
    assert torch.equal(ledger.read(480, 500), angles[:, 480:])
    assert sum(tensor.untyped_storage().nbytes() for tensor in ledger.tensors()) == angles[:, 470:].nbytes
