"""The documents: generated parts, links, words of the README, the picture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ds_gradmix
from ds_gradmix import rules
from ds_gradmix.config import SLOTS, Slot
from ds_gradmix.rules import GradientFreeMixing
from tests.support import documents
from tests.support.documents import PICTURES, ROOT, name_of

DOCUMENTS = documents.documents()
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def text_of(document: Path) -> str:
    """Without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """Of headings, as they are made from their words where Markdown is shown."""
    headings = HEADING.findall(text_of(document))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_generated_parts_are_up_to_date(document: Path) -> None:
    text = document.read_text()
    assert documents.written(text) == text, "run python -m tests.support.documents"
    assert text.count("<!-- generated: ") == text.count("<!-- end of generated -->")


def test_every_generated_part_is_in_a_document() -> None:
    texts = "".join(document.read_text() for document in DOCUMENTS)
    assert sorted(re.findall(r"<!-- generated: ([\w ]+) -->\n\S", texts)) == sorted(documents.PARTS)
    for name, picture in documents.pictures().items():
        assert (PICTURES / name).read_text() == picture, f"{name}: run python -m tests.support.documents"


class Median(GradientFreeMixing):
    """Takes the middle.

    Nobody 1999, arXiv 9901.00001.
    """

    width: int = 3


def test_a_new_rule_is_in_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SLOTS, "mixing", Slot(rules.Mixing, (*rules.MIXING, Median)))
    name = Median.type_name()
    assert f"| mixing | `{name}` | Takes the middle | [arXiv 9901.00001](" in documents.rules()
    assert f"| `mixing.params.width` ({name}) | `3` | an integer |" in documents.config_keys()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(text_of(document)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_files_that_are_named_exist(document: Path) -> None:
    folders = "benchmarks|configs|docs|ds_gradmix|launch|tests"
    for path in re.findall(rf"(?<![\w/.])((?:{folders})/[\w./-]*\w)", text_of(document)):
        assert (ROOT / path).exists() or (ROOT / "ds_gradmix" / path).exists(), path


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


def test_readme_is_short() -> None:
    assert len(text_of(ROOT / "README.md").split()) <= 900


def test_messages_name_pages_that_exist() -> None:
    for module in (ROOT / "ds_gradmix").rglob("*.py"):
        for page in re.findall(r"docs/[\w.]+\.md", module.read_text()):
            assert (ROOT / page).exists(), f"{module}: {page}"
        assert "README" not in module.read_text(), f"{module}: name a page of docs/"


def test_citation_has_the_papers_and_the_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r'^    url: "https://(.*)"$', citation, re.MULTILINE) == [
        "arxiv.org/abs/2412.18052",
        "openreview.net/forum?id=5c_nxk-dX1J",
        "arxiv.org/abs/2006.02924",
        "arxiv.org/abs/2411.03742",
        "arxiv.org/abs/1703.02757",
        "arxiv.org/abs/1912.13445",
        "arxiv.org/abs/2406.16232",
        "arxiv.org/abs/2309.13681",
        "arxiv.org/abs/2006.05720",
    ]
    assert f"version: {ds_gradmix.__version__}\n" in citation and "license: Apache-2.0\n" in citation
