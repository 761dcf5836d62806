"""One process of the fuzz: forges files, loads and uses them, and notes what goes wrong. Case n is the same everywhere."""

import argparse
import json
import os
import random
import resource
import shutil
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from narrowkv import Calibration, NarrowKVError, PackedCache, tensor_file
from narrowkv.calibration.calibration import FILE
from tests.fuzz.corpus import Entry, entries, model_of, source_of
from tests.fuzz.mutations import mutate

SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")  # which needs memory of its own
MOST_GROWTH = 2**40 if SANITIZED else 300 * 2**20
MOST_MEMORY = 8 * 2**30  # of addresses, besides what the process begins with: what asks for more is refused, and so noted


class Fuzz:
    """The corpus, and a folder for forged files."""

    def __init__(self, folder: Path, scratch: Path):
        self.scratch = scratch
        self.folder = folder
        self.entries = list(entries(folder))
        self.content = [entry.content() for entry in self.entries]
        self.sources = {(e.model, e.recipe): source_of(folder, e.model, e.recipe) for e in self.entries}

    def warm(self) -> None:
        """Use every file as it was saved: memory that this takes is no growth, and nothing of it may be refused."""
        for entry in self.entries:
            shutil.copy(entry.path, self.scratch / FILE)
            with torch.no_grad():
                self._use(entry, self.scratch / FILE, random.Random(0))

    def run(self, case: int) -> str:
        """Forge, load and use; returns what came of it: `used`, `refused`, or else what no forged file may cause."""
        drawn = random.Random(case)
        at = drawn.randrange(len(self.entries))
        before = _peak()
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._use(self.entries[at], self._forge(at, drawn), drawn)
            outcome = "used"
        except NarrowKVError as error:
            outcome = "refused" if str(error).strip() else "an error without words"
        except Exception:
            outcome = traceback.format_exc()
        grown = _peak() - before
        return outcome if grown < MOST_GROWTH else f"memory grew by {grown >> 20} MB; {outcome}"

    def _forge(self, at: int, drawn: random.Random) -> Path:
        """Write the forged file, with its checksums right, or with a few bytes spoilt."""
        header, tensors = mutate(*self.content[at], drawn)
        path = self.scratch / FILE
        save_file({name: part.clone() for name, part in tensors.items()}, path, {tensor_file.ENTRY: _signed(header, tensors)})
        if drawn.random() < 0.05:
            content = bytearray(path.read_bytes())
            start = drawn.randrange(len(content))
            content[start : start + 8] = drawn.randbytes(drawn.choice((0, 1, 8)))
            path.write_bytes(content)
        return path

    def _use(self, entry: Entry, path: Path, drawn: random.Random) -> None:
        """One forward of two tokens; tables first read a prompt, which they encode."""
        model, options = model_of(entry.model), drawn.choice(({}, {}, {}, {"backend": "torch"}, {"strict": True}))
        if entry.kind == "calibration":
            cache = PackedCache(model, Calibration.from_pretrained(path.parent), **options)
            model(_tokens(1, 70), past_key_values=cache)
        else:
            cache = PackedCache.load(path, model, self.sources[entry.model, entry.recipe], **options)
        model(_tokens(cache.batch_size, 2), past_key_values=cache)


def _tokens(batch: int, tokens: int) -> torch.Tensor:
    return torch.arange(2, 2 + tokens).expand(batch, -1)


def _signed(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    try:
        return json.dumps(tensor_file.sign(header, tensors))
    except (UnicodeEncodeError, TypeError):  # what cannot be signed is written as it is
        return json.dumps(header)


def _addresses() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("scratch", type=Path, help="folder of this worker: forged files, `progress`, and `failures`")
    parser.add_argument("cases", type=int, nargs=3, help="first, stop, step")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    fuzz = Fuzz(arguments.corpus, arguments.scratch)
    fuzz.warm()
    if not SANITIZED:
        resource.setrlimit(resource.RLIMIT_AS, (_addresses() + MOST_MEMORY,) * 2)
    progress = os.open(arguments.scratch / "progress", os.O_CREAT | os.O_WRONLY)
    begin = _peak()
    for case in range(*arguments.cases):
        os.pwrite(progress, case.to_bytes(8, "little"), 0)
        outcome = fuzz.run(case)
        if _peak() - begin > MOST_GROWTH:
            outcome, begin = f"memory grew by 300 MB by and by; {outcome}", _peak()
        with (arguments.scratch / "outcomes").open("a") as file:
            file.write(json.dumps([case, outcome]) + "\n")


if __name__ == "__main__":
    main()
