"""Recipe: how a whole cache is quantized. Plain data, validated, printable, with a published name."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from narrowkv.codec import AnyQuantizer, Scheme, quantizer_for
from narrowkv.errors import RecipeError
from narrowkv.files import reason

MOST_SINKS, MAX_RESIDUAL, MOST_LAYERS, MOST_BITS = 1024, 2**20, 4096, 64


@dataclass(frozen=True)
class LayerSchemes:
    """The schemes of one layer."""

    keys: Scheme
    values: Scheme


@dataclass(frozen=True)
class SearchSpace:
    """Schemes that calibration chooses from, separately for the keys and for the values of each layer.

    budget: bits per element that the whole cache may take at 32,768 tokens, tables included; the schemes with the least loss
    under it are chosen. value_budget: budget of the values; `budget` is then that of the keys. equal_layers: whether keys and
    values together take the same number of bytes per token in all layers of one shape. Raises RecipeError if a budget is not a
    number above 0, has more bits than an element, or there is nothing to choose from.
    """

    budget: float
    keys: tuple[Scheme, ...]
    values: tuple[Scheme, ...]
    value_budget: float | None = None
    equal_layers: bool = False

    def __post_init__(self) -> None:
        for budget in self.budgets:
            if not isinstance(budget, (int, float)) or isinstance(budget, bool) or not 0 < budget <= MOST_BITS:
                raise RecipeError(f"A budget is a number of bits above 0, at most {MOST_BITS}, not {budget!r:.40}.")
        if not self.keys or not self.values:
            raise RecipeError("A recipe that chooses needs a scheme for the keys and one for the values at least.")
        if len({scheme.datatype == "trellis" for scheme in (*self.keys, *self.values)}) > 1:
            raise RecipeError("Trellis-coded schemes, whose rates are allocated, are chosen among themselves.")
        if type(self.equal_layers) is not bool:
            raise RecipeError(f"Layers are equal or not: true or false, not {self.equal_layers!r:.40}.")
        if (self.value_budget is not None or self.equal_layers) and not self.by_rate:
            raise RecipeError(
                "Budgets for keys and values apart, and equal layers, are for trellis-coded schemes; leave them out."
            )

    @property
    def budgets(self) -> tuple[float, float]:
        """Budgets of the keys and of the values; the same one twice if they share it."""
        return self.budget, self.budget if self.value_budget is None else self.value_budget

    @property
    def by_rate(self) -> bool:
        """Whether rates of channels are allocated, in addition to the choice of schemes."""
        return self.keys[0].datatype == "trellis"


@dataclass(frozen=True)
class Recipe:
    """How a cache is quantized: a scheme for keys, one for values, and the tokens in full precision.

    sinks: number of first tokens of each sequence, after padding, in full precision (KVQuant, section 3.5). residual_length:
    number of newest tokens in full precision, at least as many as a scheme looks ahead. layers: schemes of layers that differ
    from the rest, by index. search_space: what calibration chooses from to fill `layers`. Raises RecipeError if settings
    contradict each other.
    """

    name: str
    keys: Scheme
    values: Scheme
    sinks: int = 0
    residual_length: int = 0
    layers: dict[int, LayerSchemes] = field(default_factory=dict)
    search_space: SearchSpace | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise RecipeError(f"A recipe's name is text, not {self.name!r:.40}.")
        for name, most in (("sinks", MOST_SINKS), ("residual_length", MAX_RESIDUAL)):
            count = getattr(self, name)
            if type(count) is not int or not 0 <= count <= most:
                raise RecipeError(f"{name} must be an integer from 0 to {most:,}, not {count!r:.40}.")
        if any(type(layer) is not int or not 0 <= layer < MOST_LAYERS for layer in self.layers):
            raise RecipeError(f"Layers are numbered from 0 to {MOST_LAYERS - 1}; name those of the model.")
        if any(values.transform.pre_rope for _, values in self.every_scheme()):
            raise RecipeError("Values have no rotary embedding; pre_rope is for keys.")
        ahead = max(scheme.lookahead_tokens for pair in self.every_scheme() for scheme in pair)
        if self.residual_length < ahead:
            raise RecipeError(
                f"residual_length {self.residual_length} is too small: levels look {ahead} tokens ahead; raise it to that."
            )

    def every_scheme(self) -> list[tuple[Scheme, Scheme]]:
        """Pairs of schemes for keys and values that together contain every scheme of this recipe."""
        pairs = [(self.keys, self.values), *((pair.keys, pair.values) for pair in self.layers.values())]
        if self.search_space:
            pairs += [(scheme, self.values) for scheme in self.search_space.keys]
            pairs += [(self.keys, scheme) for scheme in self.search_space.values]
        return pairs

    def schemes(self, layer: int) -> LayerSchemes:
        """The schemes of one layer."""
        return self.layers.get(layer, LayerSchemes(self.keys, self.values))

    def require_layers(self, layers: Sequence[int]) -> None:
        """Raise RecipeError if this recipe names a layer that is not among a model's attention layers."""
        if not set(self.layers) <= set(layers):
            raise RecipeError(
                f"Recipe {self.name} names layers {sorted(self.layers)}; the model's attention layers are "
                f"{', '.join(map(str, layers))}."
            )

    @property
    def needs_calibration(self) -> bool:
        """Whether any table is learned offline."""
        return bool(self.search_space) or any(scheme.needs_calibration for pair in self.every_scheme() for scheme in pair)

    def quantizers(self, layer: int) -> tuple[AnyQuantizer, AnyQuantizer]:
        """Quantizers for keys and values of one layer; raises RecipeError if the recipe needs calibration."""
        if self.needs_calibration:
            raise RecipeError(
                f"Recipe {self.name} learns its tables from a model; run `narrowkv calibrate MODEL --recipe {self.name}` "
                "(or narrowkv.calibrate) and make the cache from that calibration."
            )
        pair = self.schemes(layer)
        return quantizer_for(pair.keys), quantizer_for(pair.values)

    def with_options(self, **changes: Any) -> "Recipe":
        """A copy with fields replaced, for instance `with_options(sinks=5, residual_length=32)`."""
        unknown = set(changes) - {f.name for f in fields(self)}
        if unknown:
            raise RecipeError(
                f"A recipe has no {', '.join(sorted(unknown))}; it has {', '.join(f.name for f in fields(self))}."
            )
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back; keys of `layers` become text, as JSON wants them."""
        plain: dict[str, Any] = _plain(self, defaults=True)
        return plain

    def settings(self) -> dict[str, Any]:
        """Plain data of what differs from the defaults, which stays the same where a later version has more fields."""
        plain: dict[str, Any] = _plain(self, defaults=False)
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "Recipe":
        """Inverse of `to_dict`; raises RecipeError on unknown, missing or wrong fields."""
        try:
            _known(plain, cls)
            layers = {
                int(layer): LayerSchemes(Scheme.from_dict(pair["keys"]), Scheme.from_dict(pair["values"]))
                for layer, pair in plain.get("layers", {}).items()
            }
            search_space = None
            if plain.get("search_space") is not None:
                sides = {
                    side: tuple(Scheme.from_dict(scheme) for scheme in plain["search_space"][side])
                    for side in ("keys", "values")
                }
                search_space = SearchSpace(**_known({**plain["search_space"], **sides}, SearchSpace))
            rest = {
                name: setting for name, setting in plain.items() if name not in ("keys", "values", "layers", "search_space")
            }
            keys, values = Scheme.from_dict(plain["keys"]), Scheme.from_dict(plain["values"])
            return cls(keys=keys, values=values, layers=layers, search_space=search_space, **rest)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            if isinstance(error, RecipeError):
                raise
            raise RecipeError(f"This is not a recipe: {error}; `narrowkv recipes show NAME` prints a valid one.") from error

    @classmethod
    def from_file(cls, path: str | Path) -> "Recipe":
        """Read a recipe from a JSON file, as `narrowkv recipes show NAME --json FILE` writes it."""
        try:
            plain = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise RecipeError(f"Cannot read a recipe from {path}: {reason(error)}.") from error
        if not isinstance(plain, dict):
            raise RecipeError(f"{path} has no recipe (a JSON object is expected).")
        return cls.from_dict(plain)


def _plain(value: Any, defaults: bool) -> Any:
    """A recipe, or a part of one, as plain data; defaults: whether fields are shown that have theirs."""
    if isinstance(value, Scheme):
        return value.to_dict() if defaults else value.settings()
    if is_dataclass(value) and not isinstance(value, type):
        shown = {part.name: getattr(value, part.name) for part in fields(value)}
        if not defaults:
            shown = {part.name: shown[part.name] for part in fields(value) if shown[part.name] not in (part.default, {})}
        return {name: _plain(setting, defaults) for name, setting in shown.items()}
    if isinstance(value, dict):
        return {str(name): _plain(setting, defaults) for name, setting in value.items()}
    return [_plain(part, defaults) for part in value] if isinstance(value, tuple) else value


def _known(plain: dict[str, Any], kind: type) -> dict[str, Any]:
    """Plain data, all of whose fields a dataclass has; raises RecipeError for others, such as those of an earlier version."""
    unknown = sorted(set(plain) - {part.name for part in fields(kind)})
    if unknown:
        raise RecipeError(
            f"A {kind.__name__} has no field {', '.join(unknown)[:80]}; `narrowkv recipes show NAME` prints a valid recipe."
        )
    return plain
