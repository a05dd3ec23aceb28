from pathlib import Path

import pytest

from ctxlib.files import replacing, whole_lines, write


@pytest.mark.parametrize("content", ["é\n", b"\x00\xff"])
def test_what_is_written_is_there_to_the_byte_in_a_folder_that_was_not(tmp_path, content):
    path = write(tmp_path / "new" / "file", content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write(tmp_path / "t.csv", "old")

    def full_disk(beside: Path, content: bytes) -> None:
        beside.touch()
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space"):
        write(path, "new")
    assert [inner.name for inner in tmp_path.iterdir()] == ["t.csv"]
    assert path.read_text() == "old"


def test_a_block_that_raises_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write(tmp_path / "t.csv", "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as beside:
        beside.write_text("new")
        assert beside.parent == path.parent and path.read_text() == "old"
        _ = 1 / 0
    assert [inner.name for inner in tmp_path.iterdir()] == ["t.csv"] and path.read_text() == "old"


@pytest.mark.parametrize("torn", [b"", b'{"a": "\xc3'])
def test_a_torn_last_line_is_cut_off_the_file_and_all_others_are_kept(tmp_path, torn):
    path = tmp_path / "lines.jsonl"
    assert whole_lines(path) == []
    path.write_bytes(b"{}\n[]\n" + torn)
    assert whole_lines(path) == [b"{}", b"[]"]
    assert path.read_bytes() == b"{}\n[]\n"
