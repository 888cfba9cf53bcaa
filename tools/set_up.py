"""Build .venv from requirements.txt, or leave it alone when it is complete. Standard library only.

`.venv/.complete` is written last and holds what the environment was built from. Without it (never built, or
interrupted) the folder is thrown away and built again; with another content (requirements.txt or
pyproject.toml changed) pip brings it up to date.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".complete"
REQUIREMENTS = ROOT / "requirements.txt"

# Runs inside .venv: what is installed, as JSON.
LIST_INSTALLED = """
import importlib.metadata as m, json, re
print(json.dumps({re.sub("[-_.]+", "-", d.name).lower(): d.version for d in m.distributions()}))
"""


def pins(text: str) -> dict[str, str]:
    """Name to version of each `name==version` line of a requirements file, names in pip's normal form."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {re.sub("[-_.]+", "-", name.strip()).lower(): version.strip() for name, version in pairs}


def faults(wanted: dict[str, str], installed: dict[str, str]) -> list[str]:
    """What is wrong with an environment: pins not met, and CUDA packages beside a CPU build of torch."""
    found = []
    for name, version in wanted.items():
        have = installed.get(name)
        # a local version such as 2.13.0+cpu is the same release, built for a device
        if have is None or have.split("+")[0] != version:
            found.append(f"{name}=={version} is pinned, {have or 'nothing'} is installed")
    if installed.get("torch", "").endswith("+cpu"):
        cuda = sorted(n for n in installed if n.startswith(("nvidia-", "cuda-")) or n == "triton")
        if cuda:
            found.append(f"torch is the CPU build, yet CUDA packages came along: {', '.join(cuda)}")
    return found


def recipe() -> dict[str, str]:
    """What .venv depends on; the root's path is in it because scripts in a venv hold absolute paths."""
    digest = hashlib.sha256(REQUIREMENTS.read_bytes() + b"\0" + (ROOT / "pyproject.toml").read_bytes())
    return {"files": digest.hexdigest(), "root": str(ROOT)}


def read_stamp() -> dict[str, str]:
    """The recipe and the Python that .venv was completed with; empty when it is not complete."""
    try:
        subprocess.run([PYTHON, "-c", "pass"], check=True, capture_output=True)
        return json.loads(STAMP.read_text())
    except (OSError, ValueError, subprocess.CalledProcessError):
        return {}


def run(command: list, lock_fd: int) -> None:
    """Run `command`; it keeps the lock while it lives, so a killed set-up's pip is waited for, not raced."""
    environment = os.environ | {"PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, pass_fds=[lock_fd])
    if done.returncode:
        sys.exit(
            f"set-up: `{' '.join(map(str, command))}` failed, see its message above. "
            "Once its cause is gone, run the same make command again: it starts afresh."
        )


def set_up(lock_fd: int) -> None:
    """Bring .venv to what requirements.txt and pyproject.toml say."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    wanted, stamp = recipe(), read_stamp()
    same_place = stamp.get("root") == wanted["root"]
    # another interpreter counts only when it was asked for by name
    same_python = stamp.get("python") == python or not os.environ.get("PYTHON")
    if same_place and same_python and stamp["files"] == wanted["files"]:
        return

    started = time.monotonic()
    if same_place and same_python:
        print("set-up: requirements.txt or pyproject.toml changed, bringing .venv up to date", flush=True)
        STAMP.unlink()
        python = stamp["python"]
    else:
        if VENV.exists():
            print(
                "set-up: .venv is unfinished or was made for another Python or folder, removing it",
                flush=True,
            )
            STAMP.unlink(missing_ok=True)
            shutil.rmtree(VENV)
        print(
            f"set-up: building .venv with Python {python} (once; minutes, and about 2 GB of disk)", flush=True
        )
        # the base interpreter, so that building does not depend on a venv that may go away
        run([getattr(sys, "_base_executable", sys.executable), "-m", "venv", VENV], lock_fd)

    # progress for a person, errors only for a log
    pip = [PYTHON, "-m", "pip", "install", *([] if sys.stdout.isatty() else ["-qq"])]
    print("set-up: installing requirements.txt", flush=True)
    run([*pip, "-r", REQUIREMENTS], lock_fd)
    print("set-up: installing covidnb in place", flush=True)
    # without dependencies and build isolation: nothing else is fetched, torch stays the one pinned above
    run([*pip, "--no-deps", "--no-build-isolation", "--editable", "."], lock_fd)

    installed = json.loads(subprocess.check_output([PYTHON, "-c", LIST_INSTALLED]))
    found = faults(pins(REQUIREMENTS.read_text()), installed)
    if found:
        sys.exit("\n  ".join(["set-up: .venv is not what requirements.txt says (try `make clean`):", *found]))
    run([PYTHON, "-m", "pip", "check", "--quiet"], lock_fd)

    unfinished = STAMP.with_suffix(".new")
    unfinished.write_text(json.dumps(wanted | {"python": python}))
    os.replace(unfinished, STAMP)
    print(f"set-up: done in {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    """Set up under a lock, so that two make commands at once do not build the same folder."""
    with REQUIREMENTS.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("set-up: another set-up of this folder is at work, waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            set_up(lock.fileno())
        except KeyboardInterrupt:
            sys.exit("set-up: interrupted; run the same make command again, it starts afresh")


if __name__ == "__main__":
    main()
