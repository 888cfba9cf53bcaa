"""The site's sources fit together, and its build notices pages that are empty, broken or need a network."""

import re
import shutil
from pathlib import Path

import build_book
import check_site
import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[1]
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
BIBLIOGRAPHY = (ROOT / "book" / "references.bib").read_text()


def test_toc_lists_every_page_and_chapter_in_order():
    pages = [page.relative_to(ROOT).as_posix() for page in build_book.toc_pages(TOC)]
    assert len(set(pages)) == len(pages)
    chapters = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert [page for page in pages if re.match(r"notebooks/\d", page)] == chapters
    prose = {path.relative_to(ROOT).as_posix() for path in (ROOT / "book").glob("*.md")}
    assert prose <= set(pages)


def test_toc_with_a_missing_page_is_an_error():
    with pytest.raises(SystemExit, match="book/nonsense"):
        build_book.toc_pages({"root": "book/index", "parts": [{"chapters": [{"file": "book/nonsense"}]}]})


def test_config_names_files_that_exist():
    for path in (CONFIG["logo"], CONFIG["html"]["favicon"], *CONFIG["bibtex_bibfiles"]):
        assert (ROOT / path).is_file(), path
    assets = ROOT / CONFIG["sphinx"]["config"]["html_static_path"][0]
    assert all((assets / name).is_file() for name in CONFIG["sphinx"]["config"]["html_css_files"])
    assert CONFIG["execute"]["execute_notebooks"] == "cache"
    assert ROOT / CONFIG["execute"]["cache"] == build_book.CACHE
    # Sphinx would load every script in a folder of this name
    assert not list(ROOT.glob("book/**/_static"))


def test_bibliography_can_be_followed():
    entries = re.findall(r"^@\w+\{([^,]+),(.*?)^\}", BIBLIOGRAPHY, re.M | re.S)
    keys = [key for key, _ in entries]
    assert len(set(keys)) == len(keys) and {"fan2020infnet", "xu2020gasnet"} <= set(keys)
    for key, fields in entries:
        assert "doi" in fields or "url" in fields, key
        for needed in ("author", "title"):
            assert re.search(rf"^\s*{needed}\s*=", fields, re.M), f"{key} has no {needed}"


def test_pages_cite_and_define_what_exists():
    glossary = (ROOT / "book" / "glossary.md").read_text()
    terms = {
        line.strip()
        for block in re.findall(r"```\{glossary\}\n(.*?)```", glossary, re.S)
        for line in block.splitlines()
        if line and not line.startswith(" ")
    }
    for page in (ROOT / "book").glob("*.md"):
        text = page.read_text()
        for group in re.findall(r"\{cite\}`([^`]+)`", text):
            assert all(f"{{{key}," in BIBLIOGRAPHY for key in group.split(",")), group
        assert set(re.findall(r"\{term\}`([^`<]+)`", text)) <= terms, page.name


def test_catalogue_cites_what_exists():
    catalogue = yaml.safe_load((ROOT / "data" / "catalog.yaml").read_text())
    for name, entry in catalogue.items():
        assert entry.get("citation") is None or f"{{{entry['citation']}," in BIBLIOGRAPHY, name


def test_picture_is_small_and_can_be_drawn_again():
    assert (ROOT / "book" / "assets" / "overview.png").stat().st_size < 150_000
    assert "assets/overview.png" in (ROOT / "README.md").read_text()
    assert (ROOT / "book" / "figures" / "overview.py").exists()


def test_cache_is_dropped_when_a_source_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(build_book, "ROOT", tmp_path)
    monkeypatch.setattr(build_book, "CACHE", tmp_path / "_build" / "cache")
    monkeypatch.setattr(build_book, "KEY", tmp_path / "_build" / "key")
    source = tmp_path / "covidnb" / "nets" / "infnet.py"
    source.parent.mkdir(parents=True)
    source.write_text("x = 1\n")

    build_book.drop_stale_cache()
    kept = tmp_path / "_build" / "cache" / "page"
    kept.parent.mkdir()
    kept.touch()
    build_book.drop_stale_cache()
    assert kept.exists()
    source.write_text("x = 2\n")
    build_book.drop_stale_cache()
    assert not kept.exists()

    kept.parent.mkdir(exist_ok=True)
    kept.touch()
    monkeypatch.setattr(build_book, "real_data", lambda: ["a data set that has arrived"])
    build_book.drop_stale_cache()
    assert not kept.exists()


PAGE = """<html><head><script src="a.js"></script></head><body><article class="bd-article">
<h1 id="top">A page</h1><p>{words}</p><a href="#top">up</a> <a href="https://example.org">elsewhere</a>
<div class="cell"><div class="cell_output"><img src="p.png" alt="a slice with two lesions"></div></div>
</article></body></html>"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A built site of two pages without fault; returns its folder and the names of the sources."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("draw()")])
    nbformat.write(notebook, tmp_path / "chapter.ipynb")
    (tmp_path / "page.md").write_text("# A page")
    monkeypatch.setattr(check_site, "ROOT", tmp_path)
    html = tmp_path / "html"
    html.mkdir()
    for name in ("chapter", "page"):
        (html / f"{name}.html").write_text(PAGE.format(words="word " * 60))
    for name in ("a.js", "p.png"):
        (html / name).touch()
    return html, [Path("chapter.ipynb"), Path("page.md")]


def test_good_site_has_no_faults(site):
    assert check_site.check(*site) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('src="a.js"', 'src="https://cdn.example.org/a.js"', "would load https://cdn"),
        ('src="a.js"', 'src="gone.js"', "gone.js, which is not there"),
        ('href="#top"', 'href="page.html#nowhere"', "page.html#nowhere, which is not there"),
        ('alt="a slice with two lesions"', "", "without alt text"),
        ('alt="a slice with two lesions"', 'alt="../_images/p.png"', "without alt text"),
        ("cell_output", "nothing", "it was not executed"),
        ('<div class="cell">', "<div>", "0 of 1 code cells"),
        ("A page</h1>", "A page {cite}`nobody`</h1>", "markup as text"),
        ("word " * 50, "", "almost empty"),
        ("bd-article", "redirect", "has no page"),
    ],
)
def test_faults_of_a_page_are_found(site, old, new, fault):
    html, sources = site
    page = html / "chapter.html"
    assert old in page.read_text()
    page.write_text(page.read_text().replace(old, new))
    faults = check_site.check(html, sources)
    assert any(fault in found and "chapter.ipynb" in found for found in faults), faults


def test_empty_build_is_a_fault(site):
    html, _ = site
    assert check_site.check(html, []) == ["_toc.yml lists no pages"]
    shutil.rmtree(html)
    assert len(check_site.check(html, [Path("chapter.ipynb"), Path("page.md")])) == 2


def test_an_outside_link_is_no_dependency():
    soup = BeautifulSoup(
        '<a href="https://example.org">x</a><img src="data:image/png;base64,AA">', "html.parser"
    )
    assert check_site.loaded_elsewhere(soup) == []
