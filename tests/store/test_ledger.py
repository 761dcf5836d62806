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


def test_starts_of_blocks_are_known_where_positions_follow_each_other_and_looked_for_once():
    ledger = Ledger()
    ledger.append(torch.stack([torch.arange(200), torch.arange(200) + 7]))
    starts = ledger.starts(64, 190)
    assert starts is not None and torch.equal(starts, torch.tensor([[64, 128], [71, 135]]))
    assert ledger.starts(64, 190) is starts
    for change in (
        lambda: ledger.crop(150),
        lambda: ledger.append(torch.arange(50).expand(2, -1)),  # which does not follow
        lambda: ledger.select(torch.tensor([1])),
        lambda: ledger.crop(150),
    ):
        change()
        found, positions = ledger.starts(0, ledger.length), ledger.read(0, ledger.length)
        assert (found is None) == (ledger.length == 200)
        assert found is None or torch.equal(found, positions[:, ::64])
    ledger.step(torch.tensor([[5]]), torch.tensor([149]))
    assert ledger.starts(0, 150) is None


def test_starts_go_on_behind_what_was_forgotten():
    ledger = Ledger()
    ledger.append(torch.arange(500)[None])
    assert torch.equal(ledger.starts(400, 500), torch.tensor([[400, 464]]))
    ledger.forget(400)
    assert torch.equal(ledger.starts(400, 500), torch.tensor([[400, 464]]))
    ledger.reset()
    ledger.append(torch.arange(0, 1000, 2)[None])
    assert ledger.starts(400, 500) is None
