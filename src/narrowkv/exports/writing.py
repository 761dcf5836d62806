"""Where a format is written to, and who writes it."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from narrowkv.exports.checkpoint import checkpoint_folder, write_checkpoint
from narrowkv.exports.formats import Format
from narrowkv.exports.ranges import Ranges
from narrowkv.exports.scale_file import write_scale_file
from narrowkv.exports.static_scales import StaticQuantization
from narrowkv.files import require_new_folder
from narrowkv.integrations.probe import ModelInfo


def folder_for(kind: Format, name: str, target: Path) -> Path | None:
    """The checkpoint that a format adds scales to, None where it adds to none; raises before anything is computed."""
    if not kind.checkpoint:
        return None
    require_new_folder(target)
    return checkpoint_folder(name)


def write(
    kind: Format,
    target: Path,
    source: Path | None,
    model: nn.Module,
    info: ModelInfo,
    quantization: StaticQuantization,
    ranges: Sequence[Ranges],
) -> Path:
    """Write scales in a format, and return what was written. source: as `folder_for` returns it."""
    if source is None:
        return write_scale_file(target, info, quantization, ranges)
    write_checkpoint(target, source, model, info, quantization, ranges)
    return target
