"""Build the site into _build/html: execute what changed, a page on each core, then build and check all pages.

`make book` runs this. The outputs of executed pages are cached under _build/notebook_cache; the cache is
emptied when anything that they import or read has changed.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml
from check_site import check
from jupyter_cache import get_cache
from jupyter_cache.executors import load_executor

from covidnb import catalog

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "_build" / "notebook_cache"
KEY = ROOT / "_build" / "notebook_cache.key"
HTML = ROOT / "_build" / "html"
# for the kernels: a thread for each page that is executed at the same time, and the pages' own figures
KERNELS = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "book")}
# what the pages import or read, besides their own text
SOURCES = ("covidnb/**/*.py", "book/figures/*.py", "requirements.txt")
SOURCES += ("data/*.yaml", "data/splits/*", "data/reference/*", "data/results/*")


def toc_pages(toc: dict) -> list[Path]:
    """The source files that a table of contents in jupyter-book's format names, root first."""
    chapters = [c for part in toc.get("parts", [toc]) for c in part.get("chapters", [])]
    pages = []
    for name in [toc["root"], *(chapter["file"] for chapter in chapters)]:
        found = [
            ROOT / f"{name}{suffix}" for suffix in (".md", ".ipynb") if (ROOT / f"{name}{suffix}").exists()
        ]
        if not found:
            sys.exit(f"_toc.yml lists {name}, but there is neither {name}.md nor {name}.ipynb")
        pages.append(found[0])
    return pages


def real_data() -> list[str]:
    """Which data sets are at hand, and where: pages use them when they are."""
    found = {name: catalog.find(name) for name in catalog.entries()}
    return [f"{name}: {path}" for name, path in found.items() if path]


def drop_stale_cache() -> None:
    """Empty the cache of executed pages unless it was filled with the present sources, data and Python."""
    digest = hashlib.sha256(f"{sys.version} {real_data()}".encode())
    for path in sorted(p for pattern in SOURCES for p in ROOT.glob(pattern)):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    key = digest.hexdigest()
    if not KEY.exists() or KEY.read_text() != key:
        shutil.rmtree(CACHE, ignore_errors=True)
        KEY.parent.mkdir(exist_ok=True)
        KEY.write_text(key)


def execute(pages: list[Path]) -> None:
    """Execute the pages that are not in the cache, one on each core, each in a temporary folder."""
    cache = get_cache(CACHE)
    # runs take longest: they go first, beside the chapters
    for page in sorted(pages, key=lambda page: page.parent.name != "runs"):
        if page.suffix == ".ipynb":
            cache.add_nb_to_project(str(page))
        elif page.read_text().startswith("---\nfile_format: mystnb"):
            cache.add_nb_to_project(str(page), read_data={"name": "myst_nb_md", "type": "plugin"})
    started = time.monotonic()
    os.environ.update(KERNELS)
    logger = logging.getLogger("pages")
    logger.setLevel(logging.INFO)
    result = load_executor("temp-parallel", cache, logger=logger).run_and_cache(timeout=1800)
    for uri in [*result.excepted, *result.errored]:
        print(f"{uri} failed:\n{cache.get_project_record(uri).traceback or ''}", file=sys.stderr)
    if result.excepted or result.errored:
        sys.exit(f"book: {len(result.excepted) + len(result.errored)} page(s) failed, see above")
    print(f"book: executed {len(result.succeeded)} page(s) in {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    """Execute, build with every warning an error, check."""
    started = time.monotonic()
    pages = toc_pages(yaml.safe_load((ROOT / "_toc.yml").read_text()))
    drop_stale_cache()
    execute(pages)
    # a page that left the table of contents must not linger
    shutil.rmtree(HTML, ignore_errors=True)
    command = [
        Path(sys.executable).with_name("jupyter-book"),
        "build",
        ".",
        "-W",
        "-n",
        "--keep-going",
        "--all",
        "--quiet",
    ]
    if subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL).returncode:
        sys.exit("book: the build failed, see above")
    faults = check(HTML, [page.relative_to(ROOT) for page in pages])
    if faults:
        sys.exit("book: the pages were built, but\n  " + "\n  ".join(faults))
    print(f"book: {len(pages)} pages in {time.monotonic() - started:.0f} s: {HTML / 'index.html'}")


if __name__ == "__main__":
    main()
