import torch

from narrowkv.store import PositionBuffer


def test_positions_come_back_after_any_growth():
    position_buffer, expected = PositionBuffer(), torch.empty(2, 0, dtype=torch.int32)
    for new in (5, 1, 1, 70, 1, 300):
        positions = torch.randint(0, 9999, (2, new))
        position_buffer.append(positions)
        expected = torch.cat([expected, positions.int()], dim=1)
        assert torch.equal(position_buffer.read(0, position_buffer.length), expected)
    assert torch.equal(position_buffer.read(0, 7), expected[:, :7])
    position_buffer.select(torch.tensor([1, 1, 0]))
    assert torch.equal(position_buffer.read(0, 378), expected[[1, 1, 0]])
    position_buffer.crop(10)
    position_buffer.append(torch.zeros(3, 1))
    assert torch.equal(position_buffer.read(0, 10), expected[[1, 1, 0], :10])
    assert position_buffer.length == 11
    position_buffer.reset()
    assert position_buffer.length == 0 and position_buffer.tensors() == []


def test_eviction_frees_memory():
    position_buffer, angles = PositionBuffer(), torch.rand(2, 500, 2, 8)
    for part in angles.split([300, 100, 100], dim=1):
        position_buffer.append(part)
        position_buffer.evict(position_buffer.length - 30)
    assert position_buffer.first == 470 and position_buffer.length == 500
    assert torch.equal(position_buffer.read(480, 500), angles[:, 480:])
    assert sum(tensor.untyped_storage().nbytes() for tensor in position_buffer.tensors()) == angles[:, 470:].nbytes


def test_starts_of_blocks_are_known_where_positions_follow_each_other_and_looked_for_once():
    position_buffer = PositionBuffer()
    position_buffer.append(torch.stack([torch.arange(200), torch.arange(200) + 7]))
    starts = position_buffer.starts(64, 190)
    assert starts is not None and torch.equal(starts, torch.tensor([[64, 128], [71, 135]]))
    assert position_buffer.starts(64, 190) is starts
    for change in (
        lambda: position_buffer.crop(150),
        lambda: position_buffer.append(torch.arange(50).expand(2, -1)),  # which does not follow
        lambda: position_buffer.select(torch.tensor([1])),
        lambda: position_buffer.crop(150),
    ):
        change()
        found, positions = position_buffer.starts(0, position_buffer.length), position_buffer.read(0, position_buffer.length)
        assert (found is None) == (position_buffer.length == 200)
        assert found is None or torch.equal(found, positions[:, ::64])
    position_buffer.step(torch.tensor([[5]]), torch.tensor([149]))
    assert position_buffer.starts(0, 150) is None


def test_starts_of_blocks_continue_after_eviction():
    position_buffer = PositionBuffer()
    position_buffer.append(torch.arange(500)[None])
    assert torch.equal(position_buffer.starts(400, 500), torch.tensor([[400, 464]]))
    position_buffer.evict(400)
    assert torch.equal(position_buffer.starts(400, 500), torch.tensor([[400, 464]]))
    position_buffer.reset()
    position_buffer.append(torch.arange(0, 1000, 2)[None])
    assert position_buffer.starts(400, 500) is None
