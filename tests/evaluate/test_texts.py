import os
import sys
import threading
from pathlib import Path

import pytest

import narrowkv.evaluate
from narrowkv.errors import TextError
from narrowkv.evaluate.sources import read_text, read_texts
from narrowkv.evaluate.texts import held_out_text, mixed_text, training_text


def paragraphs(text):
    return {" ".join(paragraph.split()) for paragraph in text.split("\n\n")}


def test_nothing_held_out_is_trained_on():
    shared = paragraphs(held_out_text()) & paragraphs(training_text())
    assert all(len(paragraph) <= 40 for paragraph in shared)
    assert len(held_out_text()) > 60_000
    assert len(training_text()) > 3 * len(held_out_text())


MIX = Path(narrowkv.evaluate.__file__).with_name("mix")
KINDS = {path.stem: path.read_text(encoding="utf-8").strip("\n").split("\n%%%%\n") for path in MIX.glob("*.txt")}


def test_every_document_is_in_the_mix_once_and_its_kinds_take_turns():
    assert len(KINDS) >= 8
    text = mixed_text()
    for documents in KINDS.values():
        assert len(documents) >= 5 and all(text.count(document) == 1 for document in documents)
    every = [document for documents in KINDS.values() for document in documents]
    assert len(text) == sum(map(len, every)) + 2 * (len(every) - 1) > 65_000
    for half in (text[: len(text) // 2], text[len(text) // 2 :]):
        for documents in KINDS.values():
            share = sum(len(document) for document in documents if document in half)
            assert share > 0.25 * sum(map(len, documents))


def test_no_kind_fills_the_mix_and_no_line_comes_again_and_again():
    sizes = {kind: sum(map(len, documents)) for kind, documents in KINDS.items()}
    assert max(sizes.values()) < 2.5 * min(sizes.values())
    lines = [line.strip() for line in mixed_text().splitlines() if len(line.strip()) > 60]
    assert len(set(lines)) == len(lines)


def test_named_texts_are_read(tmp_path):
    assert read_text("narrowkv://held-out") == held_out_text()
    assert read_text("narrowkv://train") == training_text()
    assert read_text("narrowkv://mix") == mixed_text()
    path = tmp_path / "mine.txt"
    path.write_text("Ein Haus.", encoding="utf-8")
    assert read_text(str(path)) == "Ein Haus."
    path.write_bytes(b"\xef\xbb\xbfEin Haus.\r\nZwei.")  # as some editors save it
    assert read_text(str(path)) == "Ein Haus.\nZwei."
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"Ein Haus.",))
    writer.start()
    assert read_texts([str(pipe), "narrowkv://train"]) == ["Ein Haus.", training_text()]
    writer.join()


@pytest.mark.parametrize("content", [b"", b"  \n ", b"\xff\xfe\x00"])
def test_files_without_text_are_refused(tmp_path, content):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(TextError, match=r"bad\.txt"):
        read_text(str(path))


def test_unknown_text_names_are_refused(monkeypatch):
    with pytest.raises(TextError, match="check the path"):
        read_text("no/such/file.txt")
    with pytest.raises(TextError, match="cannot be loaded"):
        read_text("no-such-data-set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextError, match="pip install datasets"):
        read_text("no-such-data-set")
