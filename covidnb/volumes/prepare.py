"""Folders of scans to folders of volumes: in parallel, on from where it stopped, whatever one scan does."""

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import SimpleITK as sitk
from tqdm.auto import tqdm

from covidnb.crop import SIZE
from covidnb.files import whole
from covidnb.volumes import ScanFiles, VolumeError, list_scans, read_scan, record_of, write_volume

VERSION = 1  # of how volumes are cut and written: with another one all are prepared again


class Prepared(NamedTuple):
    """Names of what was prepared now, of what had been before, and why the others could not be."""

    done: list[str]
    kept: list[str]
    failed: dict[str, str]


def prepare(
    scans: str | Path | Iterable[ScanFiles],
    root: str | Path,
    *,
    size: tuple[int, int, int] = SIZE,
    method: str = "threshold",
    stored_window: tuple[float, float] | None = None,
    jobs: int = 1,
) -> Prepared:
    """Cut the lungs out of every scan and write them into the folder of volumes `root`.

    A scan that cannot be used does not stop the others: it is listed, with the reason, in the result and in
    failed.json. Started again, only what is new, changed or failed is prepared.

    Parameters
    ----------
    scans : a folder (see `list_scans`) or files.
    size : (depth, height, width) of the volumes; the paper's is 40 x 160 x 160.
    method : of `segment_lungs`, for scans without a lung mask.
    stored_window : of `read_ct`, for scans that do not hold HU.
    jobs : number of processes, each on one core.

    Raises
    ------
    VolumeError : the folder holds no scans, a mask without scan, or is the folder to write to.
    """
    root = Path(root)
    scans = list_scans(scans) if isinstance(scans, str | Path) else list(scans)
    settings = {"version": VERSION, "size": list(size), "method": method, "stored_window": stored_window}
    tasks = {scan.name: (scan, settings | _sources(scan, root)) for scan in scans}
    kept = [name for name, (_, made_from) in tasks.items() if _is_there(root, name, made_from)]
    for name in kept:
        del tasks[name]
    done, failed = [], {}
    with tqdm(total=len(scans), initial=len(kept), desc="volumes", unit="scan") as bar:
        for name, reason in outcomes(partial(_prepare_one, root), tasks, jobs):
            if reason is None:
                done.append(name)
            else:
                failed[name] = reason
            bar.update()
    _list_failed(root / "failed.json", failed)
    return Prepared(done, kept, failed)


def _sources(scan: ScanFiles, root: Path) -> dict:
    """Where a scan comes from, and what tells that a file is another than it was: its size and time."""
    paths = {kind: path and path.resolve() for kind, path in scan._asdict().items() if kind != "name"}
    stamps = {}
    for kind, path in paths.items():
        if path and path.is_relative_to(root.resolve()):
            raise VolumeError(f"{path} lies in {root}, where the volumes go: give another folder for them")
        if path and path.exists():
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            states = [file.stat() for file in files]
            stamps[kind] = [sum(s.st_size for s in states), max((s.st_mtime_ns for s in states), default=0)]
    return {"files": {kind: path and str(path) for kind, path in paths.items()}, "stamps": stamps}


def _is_there(root: Path, name: str, made_from: dict) -> bool:
    """Whether a volume was made from this scan with these settings, and wholly."""
    record = record_of(root, name)
    return record is not None and record["made_from"] == json.loads(json.dumps(made_from))


def _prepare_one(root: Path, task: tuple[ScanFiles, dict]) -> None:
    scan, made_from = task
    read = read_scan(scan, made_from["method"], made_from["stored_window"])
    write_volume(root, scan.name, read, tuple(made_from["size"]), made_from)


def _list_failed(path: Path, failed: dict[str, str]) -> None:
    if not failed:
        path.unlink(missing_ok=True)
        return
    with whole(path) as part:
        part.write_text(json.dumps(failed, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------- processes


def outcomes(work, tasks: dict, jobs: int) -> Iterator[tuple[str, str | None]]:
    """Do `work` on each task in `jobs` processes; yield its name and why it failed (None: it did not).

    Parameters
    ----------
    work : function of a task; both can be pickled.
    tasks : by name.
    """
    if jobs == 1:
        for name, task in tasks.items():
            yield name, _reason(work, task)
        return
    alone = []
    pool = _pool(jobs)
    try:
        running = {pool.submit(_reason, work, task): name for name, task in tasks.items()}
        for future in as_completed(running):
            try:
                yield running[future], future.result()
            except BrokenProcessPool:
                alone.append(running[future])
    finally:
        pool.shutdown(cancel_futures=True)
    # one of them ended its process, and with it those of the others: each again on its own
    for name in alone:
        with _pool(1) as pool:
            try:
                reason = pool.submit(_reason, work, tasks[name]).result()
            except BrokenProcessPool:
                reason = "its process was ended from outside: was there enough memory?"
        yield name, reason


def _pool(jobs: int) -> ProcessPoolExecutor:
    # spawned, not forked: a fork of a process with torch's and ITK's threads can hang
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_on_one_core)


def _on_one_core() -> None:
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def _reason(work, task) -> str | None:
    """Why `work` failed on a task, in a sentence; None where it did not."""
    try:
        work(task)
    except (ValueError, OSError) as fault:
        return str(fault)
    except Exception as fault:  # whatever a scan holds that nobody thought of: the others go on
        return f"{type(fault).__name__}: {fault}"
    return None
