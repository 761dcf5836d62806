"""`narrowkv export`: scales of keys and values for engines that take nothing but scales."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from narrowkv.cli.common import load_model, note_mix, out, progress, texts_to_learn, wide_console, windows_to_learn
from narrowkv.cli.options import (
    BosOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LearnedSamplesOption,
    LearnedTextOption,
    LearnedWindowOption,
    ModelArgument,
    folder_to_write,
)
from narrowkv.defaults import AUTO, EXPORT_FORMATS, REFERENCE_TOKENS
from narrowkv.errors import TextError
from narrowkv.files import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from narrowkv.exports import Ranges, Rounding, StaticQuantization
    from narrowkv.integrations.probe import ModelInfo


def export(
    model: ModelArgument,
    kind: Annotated[str, typer.Option("--format", help=f"{', '.join(EXPORT_FORMATS[:-1])} or {EXPORT_FORMATS[-1]}.")],
    target: Annotated[
        Path, typer.Option("--out", parser=folder_to_write, metavar="FOLDER", help="Folder to write to; new for a checkpoint.")
    ],
    datatype: Annotated[str | None, typer.Option(help="fp8, int8 or int4.", show_default="what is usual there")] = None,
    strategy: Annotated[
        str | None, typer.Option(help="A scale for each tensor, head or channel.", show_default="what is usual there")
    ] = None,
    text: LearnedTextOption = None,
    window: LearnedWindowOption = None,
    samples: LearnedSamplesOption = None,
    check: Annotated[int, typer.Option(min=1, help="Measure the loss on this many further windows.")] = 4,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    bos: BosOption = None,
    json_file: JsonOption = None,
) -> None:
    """Write scales of keys and values for another engine, and measure what they lose; those that break a model are refused."""
    from narrowkv.evaluate.sources import read_texts
    from narrowkv.evaluate.windows import cut_apart
    from narrowkv.exports import require_bearable
    from narrowkv.exports.formats import FORMATS, quantization_for
    from narrowkv.exports.writing import folder_for, write
    from narrowkv.integrations.preparation import model_info_for

    quantization = quantization_for(kind, datatype, strategy)
    source = folder_for(FORMATS[kind], model, target)
    sources = texts_to_learn(model, text)
    window, samples = windows_to_learn(sources, window, samples)
    words = read_texts(sources)
    loaded, tokenizer = load_model(model, dtype, device)
    note_mix(model, text)
    windows, unseen = cut_apart(tokenizer, words, window, samples, check, bos=bos)
    if not len(unseen):
        raise TextError(f"The text ends with the {len(windows)} windows of the ranges; give more text, or fewer --samples.")
    info = model_info_for(loaded, AUTO, [])
    ranges, found, loss = _measured(loaded, info, quantization, windows, unseen)
    wide_console().print(rounding_table(found, quantization, loss, info))
    require_bearable(quantization, found, loss)
    written = write(FORMATS[kind], target, source, loaded, info, quantization, ranges)
    if json_file is not None:
        rows = [asdict(one) for one in found]
        write_json(json_file, {"quantization": asdict(quantization), "kld_strict": loss, "layers": rows})
    out.print(f"Scales of {len(ranges)} layers ({kind}), saved in {written}.", markup=False, highlight=False, soft_wrap=True)


def _measured(
    model: Any, info: "ModelInfo", quantization: "StaticQuantization", windows: "Tensor", unseen: "Tensor"
) -> "tuple[list[Ranges], list[Rounding], float]":
    """Ranges of the first windows, and what scales of them do to the others."""
    from narrowkv.exports import divergence, fitted_ranges, measure_rounding, observe_ranges
    from narrowkv.exports.clipping import FEW_BITS
    from narrowkv.integrations.calibrator import counted

    with progress("measuring") as advance:
        step = counted(advance, (1 if quantization.bits > FEW_BITS else 2) * len(windows) + 2 * len(unseen))
        ranges = observe_ranges(model, info, windows.split(1), step)
        ranges = fitted_ranges(model, info, quantization, ranges, windows.split(1), step)
        found = measure_rounding(model, info, quantization, ranges, unseen.split(1), step)
        return ranges, found, divergence(model, info, quantization, ranges, unseen.split(1), step)


def rounding_table(found: "Sequence[Rounding]", quantization: "StaticQuantization", loss: float, info: "ModelInfo") -> Table:
    """What rounding does to the keys and values of each layer."""
    layer = info.attention[0]
    bits = quantization.bits_per_element(layer.kv_heads, layer.head_dim, REFERENCE_TOKENS)
    table = Table(
        title=f"{quantization.datatype}, a scale for each {quantization.strategy}: {bits:.3f} bits per element; "
        f"KLD {loss:.4f} nats per token, strict, on text that was not used for the ranges",
        caption="noise: error over the tokens, by what tells them apart; bias: by the rest of a key; both of the worst head.",
        caption_justify="left",
        title_justify="left",
    )
    for heading in ("layer", "keys up to", "clipped", "noise", "bias", "values up to", "clipped", "noise"):
        table.add_column(heading, justify="right")
    for keys, values in zip(found[::2], found[1::2], strict=True):
        cells = [f"{keys.largest:.3g}", f"{keys.clipped:.4%}", f"{keys.noise:.4f}", f"{keys.bias:.1f}" if keys.bias else "-"]
        cells += [f"{values.largest:.3g}", f"{values.clipped:.4%}", f"{values.noise:.4f}"]
        table.add_row(str(keys.layer), *cells)
    return table
