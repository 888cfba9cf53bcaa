"""What a fresh clone relies on: commands, pins, the set-up itself, imports that ask for no more than said."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
import set_up

ROOT = Path(__file__).resolve().parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^(\w+):", MAKEFILE, re.M))
REQUIREMENTS = (ROOT / "requirements.txt").read_text()

# Rooms in the order that data walks through them: each may import from those before it.
ROOMS = [
    "files",
    "ct",
    "catalog",
    "lungs",
    "crop",
    "phantom",
    "slices",
    "volumes",
    "kernels",
    "nets",
    "losses",
] + ["metrics", "training", "xray", "predict", "view"]
# what a GPU box may lack, and the rooms that must do without
OFTEN_MISSING = ("SimpleITK", "monai", "matplotlib", "IPython", "ipywidgets", "jupyterlab", "pandas")
ON_A_GPU_BOX = ("kernels", "nets", "losses", "metrics", "training")


def python(code: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter in the project's folder."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def modules() -> list[str]:
    """Dotted names of all modules of covidnb."""
    paths = sorted((ROOT / "covidnb").rglob("*.py"))
    dotted = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)
    return [name.removesuffix(".__init__") for name in dotted]


def imports(path: Path) -> set[str]:
    """Rooms of covidnb that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    rooms = {name.split(".")[1] for name in found if name.startswith("covidnb.")}
    return rooms & {path.stem for path in (ROOT / "covidnb").iterdir()}


def test_commands_in_the_texts_exist():
    for page in (ROOT / "README.md", *(ROOT / "book").glob("*.md")):
        for command in re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(), re.M):
            assert command in TARGETS, f"{page.name} names `make {command}`"
        for module in re.findall(r"python -m (covidnb[.\w]*)", page.read_text()):
            assert module in modules(), f"{page.name} names `python -m {module}`"


def test_readme_says_how_to_start():
    readme = (ROOT / "README.md").read_text()
    assert "make book" in readme and "make lab" in readme and "ot for diagnosis" in readme


def test_readme_python_runs(tmp_path):
    import SimpleITK as sitk

    from covidnb import phantom

    sitk.WriteImage(phantom.chest(shape=(40, 112, 112)).ct, tmp_path / "scan.nii.gz")
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_is_explained():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    public = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[1].split())
    assert public == TARGETS
    for target in TARGETS:
        assert f"make {target} " in listed


def test_unknown_run_names_the_known_ones():
    done = subprocess.run(["make", "run", "RUN=nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "infnet" in done.stderr


def test_requirements_are_pinned_with_a_reason():
    lines = [line for line in REQUIREMENTS.splitlines() if line.strip() and not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[\w.-]+==[\w.]+ +# \S.*", line), line
    assert len(set_up.pins(REQUIREMENTS)) == len(lines)


def test_installed_is_what_is_pinned():
    installed = {re.sub("[-_.]+", "-", d.name).lower(): d.version for d in distributions()}
    assert set_up.faults(set_up.pins(REQUIREMENTS), installed) == []


def test_package_ranges_hold_the_pins():
    from packaging.requirements import Requirement

    pins = set_up.pins(REQUIREMENTS)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted in map(Requirement, project["dependencies"]):
        name = re.sub("[-_.]+", "-", wanted.name).lower()
        assert wanted.specifier.contains(pins[name]), wanted


def test_faults_of_an_environment():
    wanted = {"torch": "2.13.0", "numpy": "2.4.6"}
    assert set_up.faults(wanted, {"torch": "2.13.0+cpu", "numpy": "2.4.6"}) == []
    assert "numpy==2.4.6" in set_up.faults(wanted, {"torch": "2.13.0+cpu", "numpy": "2.4.5"})[0]
    assert "nothing" in set_up.faults(wanted, {"torch": "2.13.0+cpu"})[0]
    dragged = {"torch": "2.13.0+cpu", "numpy": "2.4.6", "nvidia-cublas-cu12": "12.8", "triton": "3.7.1"}
    assert "nvidia-cublas-cu12, triton" in set_up.faults(wanted, dragged)[0]
    # the CUDA build brings them rightly
    assert set_up.faults(wanted, dragged | {"torch": "2.13.0+cu130"}) == []


def test_no_other_python_is_taken(tmp_path):
    old = tmp_path / "python3.11"
    old.write_text("#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
    old.chmod(0o755)
    done = subprocess.run(["make", "setup", f"PYTHON={old}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "PYTHON=" in done.stderr and "3.11, 3.12 or 3.13" in done.stderr


@pytest.fixture
def small_project(tmp_path):
    """A project with the real set-up and next to no requirements."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "set_up.py", tmp_path / "tools")
    pin = re.search(r"^setuptools==\S+", REQUIREMENTS, re.M)[0]
    (tmp_path / "requirements.txt").write_text(f"{pin}  # builds\n")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "small"\nversion = "1"\n[tool.setuptools]\npy-modules = []\n'
    )
    return tmp_path


@pytest.mark.slow
@pytest.mark.network
def test_set_up_survives_being_killed(small_project):
    stamp = small_project / ".venv" / ".complete"
    command = [sys.executable, "tools/set_up.py"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    environment["TMPDIR"] = str(small_project.parent)  # where a killed pip leaves its downloads

    def set_up_again():
        return subprocess.run(
            command, cwd=small_project, env=environment, capture_output=True, text=True, check=True
        ).stdout

    # killed with everything it started, as soon as there is half an environment
    first = subprocess.Popen(
        command, cwd=small_project, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    )
    while not (small_project / ".venv" / "pyvenv.cfg").exists():
        time.sleep(0.01)
        assert first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not stamp.exists()
    left_over = small_project / ".venv" / "left_over"
    left_over.touch()

    assert "removing it" in set_up_again()
    assert not left_over.exists() and json.loads(stamp.read_text())["root"] == str(small_project)
    left_over.touch()
    assert set_up_again() == ""
    with (small_project / "requirements.txt").open("a") as file:
        file.write("# another line\n")
    assert "changed" in set_up_again()
    assert left_over.exists(), "a change is brought up to date in place"


def test_imports_use_no_network():
    done = python(
        "import socket\n"
        "def refuse(*args, **kwargs): raise AssertionError(f'network: {args}')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        f"import importlib\nfor name in {modules()}: importlib.import_module(name)\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("room", ON_A_GPU_BOX)
def test_rooms_of_the_gpu_box_need_torch_alone(room):
    names = [name for name in modules() if name.split(".")[1:2] == [room]]
    if not names:
        pytest.skip(f"covidnb.{room} is not written yet")
    done = python(
        f"import sys\nfor name in {OFTEN_MISSING}: sys.modules[name] = None\n"
        f"import importlib\nfor name in {names}: importlib.import_module(name)\n"
    )
    assert done.returncode == 0, done.stderr


def test_no_import_runs_backwards():
    for path in sorted((ROOT / "covidnb").rglob("*.py")):
        room = path.relative_to(ROOT / "covidnb").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        assert room in ROOMS, f"covidnb.{room} has no place in the order of rooms"
        later = {other for other in imports(path) - {room} if ROOMS.index(other) > ROOMS.index(room)}
        assert not later, f"{path.relative_to(ROOT)} imports {later}"
