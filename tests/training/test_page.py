"""The page of the demo: it has the clips, the curve and the commands, and it is never half written."""

from __future__ import annotations

import base64
import math
import re
import shlex
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_docs import flags_of

from models import demo
from models import sample as sampling
from models.data import page as demo_page
from models.training.log import Losses


class Parsed(HTMLParser):
    """Sources of the images, the text of ``pre`` elements, and whether every element is closed."""

    VOID = ("meta", "img", "polyline", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.commands: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes)["src"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "pre":
            self.commands.append(data)


def run_folder(path, losses):
    path.mkdir()
    lines = [",".join(Losses.HEADER), *(f"{i},{loss!r},1.0,0.1" for i, loss in enumerate(losses))]
    (path / "losses.csv").write_text("\n".join(lines) + "\n")
    (path / "a.gif").write_bytes(b"GIF89a clips")
    (path / "a.png").write_bytes(b"PNG sheet")
    return path


def page(run, text="new clips", commands=(("Go on:", "make digits"),)):
    return demo_page.write_page(run, run / "a.gif", run / "a.png", text, list(commands))


def test_the_page_has_clips_curve_and_commands(tmp_path):
    run = run_folder(tmp_path / "a & b", [2.0**-i for i in range(10)])
    path = page(run, "clips < films", [("One:", "echo '<&>'"), ("Two:", "make digits")])
    text = path.read_text()
    parsed = Parsed(text)
    assert not parsed.open and parsed.commands == ["echo '<&>'", "make digits"]
    assert [base64.b64decode(source.split(",")[1]) for source in parsed.images] == [b"GIF89a clips", b"PNG sheet"]
    assert "a &amp; b" in text and "clips &lt; films" in text and "http" not in text
    assert "The last value is 0.0020, after 10 steps" in text
    assert list(run.glob("*.tmp")) == []


def points(svg):
    return [
        [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        for line in ElementTree.fromstring(svg).iter("polyline")
    ]


def test_the_curve_falls_as_the_logarithm_of_the_loss():
    (line,) = points(demo_page.plot([10.0, 1.0, 0.1], 15))
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 - x0 == pytest.approx(x2 - x1) and y1 - y0 == pytest.approx(y2 - y1) and y0 < y1
    labels = [text.text for text in ElementTree.fromstring(demo_page.plot([10.0, 1.0, 0.1], 15)).iter("text")]
    assert labels == ["0.1", "0", "1", "8", "10", "15"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_a_loss_that_has_no_logarithm_leaves_a_gap(bad):
    assert [len(line) for line in points(demo_page.plot([1.0, 2.0, bad, 3.0], 1))] == [2, 1]
    assert "No loss" in demo_page.plot([bad], 1)


def test_one_step_and_a_flat_curve_are_drawn():
    assert points(demo_page.plot([0.5], 1)) and points(demo_page.plot([0.5] * 3, 1))


def test_a_long_run_is_drawn_as_means():
    means, window = demo_page.smooth([float(i) for i in range(1000)], points=200)
    assert window == 5 and len(means) == 200 and means[0] == 2.0
    assert demo_page.smooth([1.0, 3.0, 5.0], points=2) == ([2.0, 5.0], 2)


@pytest.mark.parametrize("text", ["", "step,loss\n", "step,los\n0,1\n", "step,loss\n0,x\n", "step,loss\n0\n"])
def test_a_file_that_is_not_of_a_run_is_named_and_the_old_page_stays(text, tmp_path):
    run = run_folder(tmp_path / "run", [1.0])
    before = page(run).read_text()
    (run / "losses.csv").write_text(text)
    with pytest.raises(ValueError, match=r"losses\.csv"):
        page(run)
    assert (run / "index.html").read_text() == before


def test_the_commands_of_the_demo_exist(tmp_path):
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    for _, line in demo.go_on(tmp_path / "a run"):
        words = shlex.split(line)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE)
        else:
            assert words[1] == "-m" and words[2] in ("models.sample", "models.train")
            for flag in (word for word in words if word.startswith("--")):
                assert re.search(rf"{re.escape(flag)}(?![\w-])", flags_of(words[2])), (flag, words)


def test_the_sample_of_the_demo_parses(tmp_path):
    """The flags of the first command are the sampler's."""
    line = demo.go_on(tmp_path / "a run")[0][1]
    config = sampling.tyro.cli(sampling.SampleConfig, args=shlex.split(line)[3:])
    assert config.checkpoint == tmp_path / "a run" and config.count == 12 and config.overwrite
