"""Folders and tables: each entry is read, refused or reported; the classes are never silently others."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from models.data.config import DataConfig
from models.data.files import Item, find_files
from models.data.media import write_png
from models.data.open import open_source
from models.precompute import main as precompute
from models.sample import main as sample
from models.train import main

PIXELS = np.full((16, 16, 3), 90, np.uint8)


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, PIXELS)
    return path


def found(source: Path) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    """The files, by their paths from the source's folder, and the classes."""
    items, classes = find_files(source)
    folder = source if source.is_dir() else source.parent
    return [(str(item.path.relative_to(folder)), item.label) for item in items], classes


def test_links_to_folders_are_followed_and_circles_are_named(tmp_path, caplog):
    picture(tmp_path / "elsewhere/deep/a.png")
    picture(tmp_path / "data/dogs/b.png")
    (tmp_path / "data/cats").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/dogs/again").symlink_to(tmp_path / "data")
    (tmp_path / "data/dogs/gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "data/dogs/linked.png").symlink_to(tmp_path / "elsewhere/deep/a.png")
    files, classes = found(tmp_path / "data")
    assert classes == ("cats", "dogs")
    assert files == [
        ("cats/deep/a.png", 0),
        *((f"dogs/{name}.png", 1) for name in ("b", "linked")),
    ]
    assert "links to a folder that they are in are left out: 1, 'dogs/again'" in caplog.text
    assert "links to nothing, pipes and the like are left out: 1, 'dogs/gone.png'" in caplog.text
    assert found(tmp_path / "data/cats") == ([("deep/a.png", 0)], ("deep",))


def test_hidden_and_system_entries_are_no_classes(tmp_path, caplog):
    for name in ("cat/a.png", "dog/b.png"):
        picture(tmp_path / name)
    assert found(tmp_path)[1] == ("cat", "dog") and not caplog.records
    system = (
        ".ipynb_checkpoints/a.png",
        "__MACOSX/cat/._a.png",
        "@eaDir/x.png",
        "cat/.hidden.png",
        "cat/.thumbs/x.png",
    )
    for name in system:
        picture(tmp_path / name)
    (tmp_path / "cat/.DS_Store").write_bytes(b"")  # not worth a word
    assert found(tmp_path) == ([("cat/a.png", 0), ("dog/b.png", 1)], ("cat", "dog"))
    named = "'.ipynb_checkpoints', '@eaDir', '__MACOSX', 'cat/.hidden.png' and 1 more"
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: hidden and system entries are left out: 5, {named}"
    ]


def test_empty_folders_and_files_of_other_kinds_are_counted(tmp_path, caplog):
    for name in (
        "cat/a.PNG",
        "cat/b.webp",
        "cat/c.bmp",
        "cat/d.tiff",
        "dog/e.m4v",
        "dog/f.ts",
        "dog/g.mpg",
        "dog/h.wmv",
    ):
        picture(tmp_path / name)
    (tmp_path / "horse").mkdir()
    for name in ("cat/a.txt", "cat/b.txt", "dog/x.heic", "horse/readme"):
        (tmp_path / name).write_text("")
    files, classes = found(tmp_path)
    assert len(files) == 8 and classes == ("cat", "dog")
    assert "files of other kinds are left out: 4, 2 '.txt', 1 '" in caplog.text and "'.heic'" in caplog.text
    assert "folders without a video or image are no classes: 1, 'horse'" in caplog.text


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    picture(tmp_path / "cat/a.png")
    picture(tmp_path / "dog/b.png")
    scan = os.scandir

    def denied(path):
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(ValueError, match=r"dog' cannot be read: Permission denied"):
        find_files(tmp_path)


def test_names_that_are_not_utf_8_are_read(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    picture(folder / os.fsdecode(b"\xff.png"))
    items, classes = find_files(tmp_path)
    assert classes == ("caf\\xe9",) and items[0].path.is_file()
    source = open_source(DataConfig(str(tmp_path), frames=1, size=(16, 16)))
    assert len(source.digest) == 64 and source.clip(0, np.random.default_rng(0))[0].mean() == 90


ROWS = {
    "utf-8": ("utf-8", "path,label\na.png,café\nb.png,dog\n"),
    "a mark": ("utf-8-sig", "path,label\na.png,café\nb.png,dog\n"),
    "utf-16": ("utf-16", "path,label\na.png,café\nb.png,dog\n"),
    "big-endian": ("utf-16-be", "\ufeffpath,label\r\na.png,café\r\nb.png,dog\r\n"),
    "spaces": ("utf-8", "path, label\na.png, café\nb.png, dog\n"),
    "another order": ("utf-8", "label, path\ncafé, a.png\n dog, b.png\n"),
    "more columns": ("utf-8", 'note,path,label\n"one, two",a.png,café\n,b.png,dog\n\n'),
    "old Macs": ("utf-8", "path,label\ra.png,café\rb.png,dog\r"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_tables_of_many_programs_are_read(tmp_path, kind):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    encoding, text = ROWS[kind]
    (tmp_path / "list.csv").write_bytes(text.encode(encoding))
    assert found(tmp_path / "list.csv") == ([("a.png", 0), ("b.png", 1)], ("café", "dog"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("path,label\na.png,café\n".encode("latin-1"), "line 2: byte 0xe9 is not utf-8"),
        ("path,label\na.png,cat\n".encode("utf-16-le"), "zero bytes"),
        (b"label,path\ncat,a.png\ndog\n", "line 3: no path"),
        (b"path,label\n,cat\n", "line 2: no path"),
        (b"path,text\na.png,a dog, running\n", "line 2: 3 cells for 2 columns; a cell with a comma must be in quotes"),
        (b'path,text\na.png,"a dog\nb.png,a cat\n', "line 3: unexpected end of data"),
        (b"path,text\na.png," + b"x" * 200_000 + b"\n", "field larger than field limit"),
        (b"path;label\na.png;cat\n", r"has columns \['path;label'\]; it must have path and label, or path and text"),
        (b"path,path,label\na.png,b.png,cat\n", "has columns"),
        (b"path,label,text\na.png,cat,a cat\n", "has columns"),
        (b"", "has columns"),
        (b"path,label\n", "lists no file"),
        (b"path,label\na.png,700000\nb.png,1\n", "has the label 700000; a class id may be 0 to 99999"),
        (b"path,label\na.png," + b"9" * 5000 + b"\n", "has the label 9999"),
    ],
)
def test_a_table_that_is_wrong_is_refused_with_its_line(tmp_path, data, message):
    (tmp_path / "list.csv").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        find_files(tmp_path / "list.csv")
    assert "list.csv" in str(error.value) and len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_labels_that_leave_classes_empty_and_paths_that_are_no_file_are_counted(tmp_path, caplog):
    names = ("a.png", "b.png")
    for name in names:
        picture(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "list.csv").write_text("path,label\na.png,1\nb.png,07\nnone.png,1\npipe.mp4,1\nhttp://host/x.mp4,1\n")
    items, classes = find_files(tmp_path / "list.csv")
    assert classes == tuple("01234567") and [item.label for item in items] == [1, 7, 1, 1, 1]
    assert "of 8 classes these have no file, as labels count from 0: 6, '0', '2', '3', '4' and 2 more" in caplog.text
    missing = [str(tmp_path / name) for name in ("none.png", "pipe.mp4", "http:/host/x.mp4")]
    assert f"paths that are no file: 3, {', '.join(map(repr, missing))}" in caplog.text
    source = open_source(DataConfig(str(tmp_path / "list.csv"), frames=1, size=(16, 16)))
    assert source.clip(3, np.random.default_rng(0))[1] == 1  # the pipe does not block, the next file stands in
    assert f"{tmp_path}/pipe.mp4 cannot be decoded and is skipped: it is not a regular file" in caplog.text


def test_a_class_without_a_file_is_dealt_to_no_sample(tmp_path, caplog, capsys):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    (tmp_path / "list.csv").write_text("path,label\na.png,1\nb.png,3\n")
    data = ["--data.source", str(tmp_path / "list.csv"), "--data.frames", "1", "--data.size", "16", "16"]
    precompute([*data, "--encoder", "pixels", "--out", str(tmp_path / "latents")])
    model = ["--model.width", "24", "--model.depth", "1", "--model.heads", "1", "--steps", "1"]
    model += ["--model.patch", "1", "8", "8", "--batch-size", "2", "--preview.every", "0"]
    for source in (data, ["--data.source", str(tmp_path / "latents")]):
        run = tmp_path / f"run-{len(source)}"
        main([*source, *model, "--run", str(run)])
        capsys.readouterr()
        sample([str(run), "--count", "3", "--steps", "1"])
        assert "1, 3, 1" in capsys.readouterr().out
        sample([str(run), "--count", "2", "--steps", "1", "--class", "3", "2", "--overwrite"])
        assert "3, 2" in capsys.readouterr().out
        assert caplog.messages[-1] == "no clip of the training data had class 2: the model has not learned it"


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_refused(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match="data source is"):
        find_files(name)
    with pytest.raises(ValueError, match=r"data\.source is"):
        DataConfig(name)
    with pytest.raises(SystemExit, match="2"):
        main(["--preset", "digits", "--data.source", name, "--run", str(tmp_path / "run")])
    assert "data.source is" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("fps", [-1.0, float("nan"), float("inf"), 1e6])
def test_a_rate_that_is_none_is_refused(fps):
    with pytest.raises(ValueError, match=r"data\.fps is"):
        DataConfig(fps=fps)
    with pytest.raises(ValueError, match=r"data\.fps is 8; digits have no"):
        open_source(DataConfig(fps=8, size=(12, 12)))


def test_items_are_what_they_were(tmp_path):
    picture(tmp_path / "b/1/a.png")
    picture(tmp_path / "a/z.png")
    assert find_files(tmp_path) == ([Item(tmp_path / "a/z.png", 0), Item(tmp_path / "b/1/a.png", 1)], ("a", "b"))
