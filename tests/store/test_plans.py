"""What backends store alongside an object: one of each class, countable, and not part of a copy."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from narrowkv.store import Plans


@dataclass(frozen=True)
class Table:
    levels: Tensor

    def tensors(self):
        return [self.levels]


class Other(Table):
    pass


def test_one_plan_of_each_class_is_stored():
    plans, first, second = Plans(), Table(torch.zeros(4)), Table(torch.ones(4))
    assert plans.get(Table) is None
    assert plans.put(first) is first is plans.get(Table)
    assert plans.get(Other) is None
    assert plans.put(second) is second is plans.get(Table)


def test_bytes_are_of_whole_tensors_each_once():
    plans, shared = Plans(), torch.zeros(8, dtype=torch.int16)
    assert plans.nbytes == 0
    plans.put(Table(shared))
    plans.put(Other(shared[:2]))
    assert plans.nbytes == 16 and len(plans.tensors()) == 2


def test_a_copy_begins_without():
    plans = Plans()
    plans.put(Table(torch.zeros(3)))
    assert copy.deepcopy(plans).nbytes == 0 and plans.nbytes == 12
