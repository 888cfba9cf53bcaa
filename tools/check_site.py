"""Check the built pages: nothing empty, no dead links, nothing fetched from elsewhere, pictures described."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[1]
# what a browser loads by itself when it opens a page
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
# markup that the parser did not understand and printed as it stood
UNPARSED = re.compile(r"\{[a-z][a-z:-]*\}`|:::\{|```")


def has_address(url: str) -> bool:
    """Whether a URL leads to another host (a path inside the site and a data: URL do not)."""
    return bool(urlsplit(url).netloc)


def is_page(soup: BeautifulSoup) -> bool:
    """Whether this is a page of the book, not a redirect or a search index."""
    return soup.select_one("article.bd-article") is not None


def loaded_elsewhere(soup: BeautifulSoup) -> list[str]:
    """URLs on other hosts that the page needs; a link to another page is not one."""
    urls = [tag.get(attribute, "") for name, attribute in LOADED.items() for tag in soup.find_all(name)]
    return [url for url in urls if has_address(url)]


def dead_links(page: Path, soups: dict[Path, BeautifulSoup]) -> list[str]:
    """Links to files or anchors inside the site that are not there."""
    dead = []
    for tag in soups[page].find_all(["a", "img", "script", "link"]):
        url = tag.get("href") or tag.get("src") or ""
        parts = urlsplit(url)
        if parts.scheme or parts.netloc or not url:
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        if not target.exists():
            dead.append(url)
        elif parts.fragment and target in soups:
            anchor = unquote(parts.fragment)
            if not soups[target].find(id=anchor) and not soups[target].find(attrs={"name": anchor}):
                dead.append(url)
    return dead


def undescribed(soup: BeautifulSoup) -> list[str]:
    """Pictures without a description: no alt text, or the file's name where the words should be."""
    found = []
    for image in soup.select("article.bd-article img"):
        alt = (image.get("alt") or "").strip()
        if not alt or "/" in alt.split()[0] or re.fullmatch(r"\S+\.(png|svg|jpe?g|webp)", alt):
            found.append(image.get("src", "")[:60])
    return found


def empty_parts(source: Path, soup: BeautifulSoup) -> list[str]:
    """What an executed page lacks: its text, its code cells, any output; or an error where one should be."""
    found = []
    if len(soup.select_one("article.bd-article").get_text().split()) < 40:
        found.append("is almost empty")
    executed = source.suffix == ".ipynb" or source.read_text().startswith("---\nfile_format: mystnb")
    if executed and not soup.select(".cell_output"):
        found.append("shows no output: it was not executed")
    if source.suffix == ".ipynb":
        notebook = nbformat.read(source, as_version=4)
        code = [
            c
            for c in notebook.cells
            if c.cell_type == "code" and "remove-cell" not in c.metadata.get("tags", [])
        ]
        if len(soup.select("div.cell")) < len(code):
            found.append(f"shows {len(soup.select('div.cell'))} of {len(code)} code cells")
        if not soup.select(".cell_output img, .cell_output svg, .cell_output figure, .cell_output script"):
            found.append("shows no figure")
    if soup.select(".output.traceback"):
        found.append("shows a traceback")
    return found


def unparsed(soup: BeautifulSoup) -> list[str]:
    """Pieces of markup that ended up in the text as they were typed."""
    article = BeautifulSoup(str(soup.select_one("article.bd-article")), "html.parser")
    for tag in article.find_all(["pre", "code", "script", "style"]):
        tag.decompose()
    return UNPARSED.findall(article.get_text())


def check(html: Path, sources: list[Path]) -> list[str]:
    """Faults of the site under `html`, one sentence each; `sources` are its pages' files, from the root."""
    faults = []
    if len(sources) < 2:
        faults.append("_toc.yml lists no pages")
    html = html.resolve()
    soups = {path: BeautifulSoup(path.read_text(), "html.parser") for path in html.rglob("*.html")}
    for source in sources:
        page = html / source.with_suffix(".html")
        if page not in soups or not is_page(soups[page]):
            faults.append(f"{source} has no page")
            continue
        soup = soups[page]
        faults += [f"{source} {what}" for what in empty_parts(ROOT / source, soup)]
        faults += [f"{source} would load {url}" for url in loaded_elsewhere(soup)]
        faults += [f"{source} links to {url}, which is not there" for url in dead_links(page, soups)]
        faults += [f"{source} has a picture without alt text: {name}" for name in undescribed(soup)]
        faults += [f"{source} shows markup as text: {piece}" for piece in unparsed(soup)]
    return faults
