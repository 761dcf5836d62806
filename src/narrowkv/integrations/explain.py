"""`explain(cache)`: the bytes of a packed cache by part and layer."""

from dataclasses import dataclass

from narrowkv.integrations.cache import PackedCache, require_packed


@dataclass(frozen=True)
class Explanation:
    """Bytes by part for each layer, and of what all layers share; `print` shows a table.

    layers: for each packed layer by index, bytes of codes, scales, outliers, tail, window, sinks, slots, bias and tables.
    positions: bytes of positions or angles, which all layers share. elements: number of stored elements of keys and values.
    bias: in how many layers a projection's bias is subtracted from keys, and from values. gain: in how many layers keys are
    divided by the gain of a norm.
    """

    recipe: str
    layers: dict[int, dict[str, int]]
    positions: int
    elements: int
    bias: tuple[int, int] = (0, 0)
    gain: int = 0

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.positions + sum(sum(layer.values()) for layer in self.layers.values())

    def __str__(self) -> str:
        names = list(next(iter(self.layers.values())))
        totals = {name: sum(layer[name] for layer in self.layers.values()) for name in names}
        rows = [["layer", *names, "all"]]
        rows += [[str(i), *(f"{layer[n]:,}" for n in names), f"{sum(layer.values()):,}"] for i, layer in self.layers.items()]
        rows.append(["all", *(f"{totals[n]:,}" for n in names), f"{sum(totals.values()):,}"])
        if self.elements:
            bits = [8 * totals[n] / self.elements for n in names]
            rows.append(["bits", *(f"{b:.3f}" for b in bits), f"{sum(bits):.3f}"])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        shared = f"{self.recipe}: {self.nbytes:,} bytes, of which {self.positions:,} for positions, shared by all layers"
        return "\n".join([shared, *self._notes(), *lines])

    def _notes(self) -> list[str]:
        (keys, values), notes = self.bias, []
        if keys or values:
            layers = f"{keys} layer{'s' if keys != 1 else ''}"
            notes.append(
                f"the bias of the projections is taken out of the keys of {layers} and the values of {values}, and put back"
            )
        if self.gain:
            notes.append(f"the gain of a norm is folded into the query in {self.gain} layer{'s' if self.gain != 1 else ''}")
        return notes


def explain(cache: PackedCache) -> Explanation:
    """Say where a cache's bytes are; str() of the result is a table. Raises CacheUseError where it is no packed cache."""
    require_packed(cache)
    layers = {}
    for index, layer in zip(cache.modules, cache.packed, strict=True):
        parts = {
            name: sum(tensor.untyped_storage().nbytes() for tensor in tensors) for name, tensors in layer.store.parts().items()
        }
        tables = [table for quantizer in layer.store.quantizers for table in quantizer.tensors().values()]
        layers[index] = parts | {"tables": sum(table.untyped_storage().nbytes() for table in tables)}
    positions = sum(
        tensor.untyped_storage().nbytes()
        for position_buffer in cache.position_buffers.values()
        for tensor in position_buffer.tensors()
    )
    biases = [layer.store.bias for layer in cache.packed]
    taken = tuple(sum(part is not None for part in side) for side in zip(*((b.keys, b.values) for b in biases), strict=True))
    keys = [layer.store.quantizers[0] for layer in cache.packed]
    gain = sum("smooth" in one.tensors() and one.scheme.transform.smooth_alpha == 0 for one in keys)
    return Explanation(cache.recipe.name, layers, positions, cache.elements, (taken[0], taken[1]), gain)
