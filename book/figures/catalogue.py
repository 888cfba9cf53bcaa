"""The tables of the data page, made of data/catalog.yaml."""

import re
from pathlib import Path

import yaml
from IPython.display import Markdown

CATALOG = yaml.safe_load((Path(__file__).resolve().parents[2] / "data" / "catalog.yaml").read_text())
WAYS = {"wheel": "package registry", "url": "download", "archives": "download"}


def page_links(entry: dict) -> str:
    """The entry's pages as links, each named by its host."""
    urls = re.findall(r"https?://[^\s,)]+", " ".join(entry.get("pages", [])))
    return ", ".join(f"[{re.sub('^www[.]', '', url.split('/')[2])}]({url})" for url in urls)


def as_text(words: str) -> str:
    """Words on one line, with the characters escaped that Markdown would read as markup."""
    return re.sub(r"([*_`\[\]])", r"\\\1", " ".join(words.split()))


def table(kind: str) -> Markdown:
    """One row for each entry of a kind, "data" or "weights"."""
    rows = ["| name | what | MB | how it gets here | licence |", "| --- | --- | --- | --- | --- |"]
    for name, entry in CATALOG.items():
        if entry["kind"] == kind:
            way = WAYS[next(iter(entry["source"]))] if "source" in entry else "by hand"
            size = entry.get("megabytes", "")
            rows.append(f"| `{name}` | {entry['title']} | {size} | {way} | {entry['licence']} |")
    return Markdown("\n".join(rows))


def details() -> Markdown:
    """Layout, note and pages of each entry that has them."""
    items = []
    for name, entry in CATALOG.items():
        parts = []
        if "layout" in entry:
            parts.append(f"Layout: {as_text(entry['layout'])}.")
        if "note" in entry:
            parts.append(as_text(entry["note"]))
        if links := page_links(entry):
            parts.append(f"Pages: {links}.")
        if parts:
            items.append(f"- **`{name}`**: {' '.join(parts)}")
    return Markdown("\n".join(items))
