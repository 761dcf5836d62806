import pytest
import torch

from narrowkv.codec.memory import address
from narrowkv.errors import NarrowKVError


def test_an_address_is_given_of_what_a_kernel_reads_and_of_nothing_else():
    good = torch.zeros(2, 3, dtype=torch.float32)
    assert address(good, torch.float32, shape=(2, 3)) == good.data_ptr()
    assert address(good, torch.uint8, torch.float32) == good.data_ptr()
    assert address(None, torch.float32) == 0
    for bad in (good.double(), good.T, good[:, :2], good.to("meta"), good[None]):
        with pytest.raises(NarrowKVError, match=r"A kernel was given .* where it takes torch.float32 "):
            address(bad, torch.float32, shape=(2, 3))
