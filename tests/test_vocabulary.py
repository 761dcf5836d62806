"""Words that this field does not use stay out of the code and the pages; CONTRIBUTING.md says which it uses instead."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BANNED = {
    r"(un|de)?quantis\w*|normalis\w*|neighbour\w*|colour\w*|behaviour\w*|centred?": "American spelling",
    r"numbers(?! import)": "elements",
    r"turned|turning|turn_(query|sum|keys|values|back)|turns? (keys|queries|pairs)": "rotate, rotated",
    r"rooms?": "capacity, buffer",
    r"kept": "stored",
    r"told": "passed, device_lengths",
    r"asking": "query positions",
    r"ledgers?": "PositionBuffer",
    r"tally|tallies": "OutlierCounter",
    r"rungs?|ladders?": "AblationStep, ablations",
    r"twins?": "reference",
    r"likeliest": "most likely, top-1",
    r"pictures?": "plots",
    r"fading": "rescale factor",
    r"unfit": "overflow",
    r"loose": "dense segments",
    r"peaks": "running maximum",
    r"stretch(es)?": "scale",
    r"sight": "mask_args",
    r"so many": "a name or n",
    r"as of": "like",
    r"ask(s|ed)? for": "requested, queried",
    r"pieces?": "split, chunk, tile",
    r"beside": "alongside, besides",
    r"held(?!-out|_out)\w*|\w+_held": "stored, owned",
    r"places?_\w+|(\w+_)?places|piece_at|attend_pieces": "position, index, budget, word, chunk",
    r"forgotten": "evicted, removed",
    r"words of (16|32) bits|in_words|may_round": "int16",
    r"blockquantizer|packedside|sideparts|stepper|copier": "IntrinsicValueQuantizer, PackedTensor, ..., TokenEncoder",
    r"passingcache|passinglayer|attentionfacts|modelfacts": "ObserverCache, AttentionLayerInfo, ModelInfo",
    r"matrix_of|why_unread|require_read|require_numbers": "head_rotation, unsupported_reason, require_supported",
    r"triton_(launch|forms|blocks|decode|fetch|join|lookup|loose|outliers|rows|tail|tiles)": "attention.cuda",
}  # fmt: skip
FILES = sorted(
    path
    for folder, ends in (("src", ("py", "pyi", "html")), ("cpp", ("cpp", "h")), ("docs", ("md",)), ("", ("md",)))
    for end in ends
    for path in (ROOT / folder).glob(f"**/*.{end}" if folder else f"*.{end}")
    if not {"log", "mix", "models"} & set(path.relative_to(ROOT).parts)
)
GLOSSARY = re.compile(r"^## Glossary$.*?(?=^## )", flags=re.M | re.S)


def found(pattern, text):
    return [match[0] for match in re.finditer(rf"(?<!from )\b(?:{pattern})\b", text, flags=re.I)]


@pytest.mark.parametrize("pattern", BANNED)
def test_banned_words_are_absent(pattern):
    assert len(FILES) > 150
    used = {path: found(pattern, GLOSSARY.sub("", path.read_text(encoding="utf-8"))) for path in FILES}
    where = {str(path.relative_to(ROOT)): words for path, words in used.items() if words}
    assert not where, f"say {BANNED[pattern]}"


def test_the_search_finds_words_and_no_parts_of_words():
    assert found("rooms?", "Room for two rooms, a mushroom and a classroom") == ["Room", "rooms"]
    assert found("as of", "as of the last, has official") == ["as of"]
