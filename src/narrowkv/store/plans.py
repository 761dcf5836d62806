"""What backends make of an object to read it fast: stored alongside it from call to call, freed with it."""

from typing import Any, Protocol, TypeVar

from torch import Tensor


class Plan(Protocol):
    """What a backend has made of an object."""

    def tensors(self) -> list[Tensor]:
        """All tensors that it holds."""
        ...


AnyPlan = TypeVar("AnyPlan", bound=Plan)


class Plans:
    """The plans of one object, each known by its class; whoever makes one looks whether it still fits.

    They follow from the object, so they are not saved, and a copy of the object makes its own.
    """

    def __init__(self) -> None:
        self._plans: dict[type[Plan], Any] = {}

    def __deepcopy__(self, memo: dict) -> "Plans":
        return Plans()

    def get(self, kind: type[AnyPlan]) -> AnyPlan | None:
        """The plan of this class, None before the first."""
        return self._plans.get(kind)

    def put(self, plan: AnyPlan) -> AnyPlan:
        """Store a plan, instead of the one of its class; returns it."""
        self._plans[type(plan)] = plan
        return plan

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return [tensor for plan in self._plans.values() for tensor in plan.tensors()]

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all of them, shared tensors counted once."""
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in self.tensors()}
        return sum(storages.values())
