"""Every python block in the README and the docs runs and prints what it says; links lead somewhere."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from statecache.models import mixers, table

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONTINUES = "<!-- continues -->\n"  # before a block: it goes on in the namespace of the one before
FENCE = re.compile(rf"^({CONTINUES})?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SAYS = re.compile(r"^print\(.*\)  # (.+)$", re.MULTILINE)  # a line that shows what it prints
SHOWN = re.compile(r"\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)  # right under a block: all that it prints
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


def programs() -> Iterator[object]:
    """The blocks of each page, joined where one continues another: the line where each stands, and what it shows."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        joined: list[tuple[int, str, str]] = []
        for block in FENCE.finditer(text):
            line, under = text.count("\n", 0, block.start(2)), SHOWN.match(text, block.end() + 1)
            code, shown = block.group(2), under.group(1) if under else ""
            if block.group(1) and joined:
                first, before, said = joined.pop()
                # blank lines in between: a traceback then points into the page
                joined.append((first, before + "\n" * (line - first - before.count("\n")) + code, said + shown))
            else:
                joined.append((line, code, shown))
        for line, code, shown in joined:
            yield pytest.param(page, line, code, shown, id=f"{page.relative_to(ROOT)}:{line}")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No network, a folder of its own, and whatever a program changes is put back."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    tables = [(rows, dict(rows)) for rows in (table.KINDS, table.SHAPES, mixers.MIXERS)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small models: more threads mostly wait for each other
    with torch.random.fork_rng(), torch.enable_grad():
        yield
    torch.set_num_threads(threads)
    for rows, before in tables:
        rows.clear()
        rows.update(before)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("page", "line", "code", "shown"), list(programs()))
def test_block_runs_and_prints_what_it_says(
    page: Path, line: int, code: str, shown: str, capsys: pytest.CaptureFixture[str]
):
    torch.manual_seed(0)
    exec(compile("\n" * line + code, page, "exec"), {"__name__": "__main__"})
    out = capsys.readouterr().out
    for said in (SAYS.findall(code), shown.splitlines()):
        printed = iter(out.splitlines())
        for what in said:
            assert what in printed, f"{page.name} says that it prints, in this order: {what}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path):
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_no_python_block_is_left_out():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("```py") == len(FENCE.findall(text)), page


def test_plots_are_drawn_from_the_committed_figures(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import plots

    drawn = {plots.decode_svg: plots.DECODE, plots.quality_svg: plots.QUALITY, plots.matrix_svg: plots.MATRIX}
    for draw, data in drawn.items():
        file = ROOT / "docs" / f"{draw.__name__.removesuffix('_svg')}.svg"
        assert file.read_text() == draw(json.loads(data.read_text())), f"{file.name}: run benchmarks/plots.py"
    assert "704 right, 316 wrong, no error, 564 refused or missing" in (ROOT / "docs" / "matrix.svg").read_text()


def test_transformers_versions_in_the_docs_are_the_supported_ones():
    text = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
    assert transformers.__version__.rpartition(".")[0] in text
