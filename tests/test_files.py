"""Folders take each other's names whole: whatever happens in between, the old one or the new one is there."""
from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from minilora import OutputError, files

replace = os.replace


def write(out: Path, text: str) -> None:
    with files.new_folder(out, overwrite=True) as folder:
        (folder / "content").write_text(text)


@pytest.fixture(params=["in one step", "in two steps"])
def out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with something in it, on a system that can let two folders change names and on one that can't."""
    if request.param == "in two steps":
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    elif not files._exchange(*(made(tmp_path / name) for name in "ab")):
        pytest.skip("this system has no such step")
    out = tmp_path / "folder" / "out"
    write(out, "old")
    return out


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_folder_takes_the_place_of_another_and_nothing_else_is_left(out: Path) -> None:
    write(out, "new")
    assert (out / "content").read_text() == "new" and list(out.parent.iterdir()) == [out]


def test_a_link_to_a_folder_is_replaced_and_the_folder_stays(out: Path) -> None:
    out.rename(out.with_name("elsewhere"))
    out.symlink_to("elsewhere")
    write(out, "new")
    assert (out / "content").read_text() == "new" and not out.is_symlink()
    assert (out.with_name("elsewhere") / "content").read_text() == "old" and len(list(out.parent.iterdir())) == 2


@pytest.mark.parametrize("kept", ["a file", "nothing"])
def test_what_is_no_folder_is_replaced_too(out: Path, kept: str) -> None:
    files._remove(out)
    if kept == "a file":
        out.write_text("old")
    write(out, "new")
    assert (out / "content").read_text() == "new" and list(out.parent.iterdir()) == [out]


def test_a_rename_that_fails_leaves_the_old_folder_in_its_place(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    def failing(one: Path, other: Path) -> None:
        if Path(other) == out and "-old-" not in str(one):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(one, other)

    monkeypatch.setattr(files.os, "replace", failing)
    with pytest.raises(OutputError, match="Input/output error"):
        write(out, "new")
    assert (out / "content").read_text() == "old" and list(out.parent.iterdir()) == [out]


def test_names_are_never_both_gone(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the one step, whoever looks between any two calls finds the folder."""
    if files._exchange.__name__ == "<lambda>":
        pytest.skip("two steps are two")
    seen: list[bool] = []
    for name in ("replace", "rmdir", "unlink", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(files.os, name, lambda *a, real=real, **k: (seen.append(out.is_dir()), real(*a, **k))[1])
    monkeypatch.setattr(files, "_remove", lambda path: seen.append((out / "content").read_text() == "new"))
    write(out, "new")
    assert seen and all(seen)


KIND = files.Kind("marker", ("marker", "*.csv"))


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    for name in ("marker", "a.csv", ".tmp-left", ".DS_Store"):
        (tmp_path / name).write_text("")
    files.check_output(tmp_path, overwrite=True, kind=KIND)
    (tmp_path / "important").mkdir()
    with pytest.raises(OutputError, match="holds important, which no earlier output of this kind would"):
        files.check_output(tmp_path, overwrite=True, kind=KIND)


@pytest.mark.parametrize("read", ["out", "out/a.csv", "out/deep/down", "link", "link/a.csv"])
def test_what_is_read_is_never_replaced(tmp_path: Path, read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "deep" / "down").mkdir(parents=True)
    (tmp_path / "link").symlink_to("out")
    for name in ("marker", "a.csv"):
        (tmp_path / "out" / name).write_text("")
    for given in (read, tmp_path / read):
        with pytest.raises(OutputError, match=r"is or holds .*, which is read here"):
            files.check_output("out", overwrite=True, kind=files.Kind("marker"), reads=[None, "org/name", given])
    files.check_output("out", overwrite=True, kind=files.Kind("marker"), reads=[None, "org/name", "out2", tmp_path])


def test_a_file_that_could_not_be_written_in_the_end_is_refused_first(tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    files.check_output_file(tmp_path / "new", overwrite=False)
    with pytest.raises(OutputError, match="there is no folder"):
        files.check_output_file(tmp_path / "no" / "new", overwrite=False)
    with pytest.raises(OutputError, match="is a folder; name a file"):
        files.check_output_file(made(tmp_path / "folder"), overwrite=False)
    monkeypatch.setattr(os, "access", lambda path, mode: False)         # as on a disk that is read only
    with pytest.raises(OutputError, match="may not be written to"):
        files.check_output_file(tmp_path / "new", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
