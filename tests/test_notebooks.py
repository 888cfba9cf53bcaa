"""Every notebook: clean as it is stored, built like a chapter, and executed to its end."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RUNS = sorted((ROOT / "notebooks" / "runs").glob("*.ipynb"))
BIBLIOGRAPHY = (ROOT / "book" / "references.bib").read_text()

# the smallest scale at which a run goes through all of its cells
SMALLEST = {
    "ablation": {"variants": ["decoder", "released schedule"], "epochs": 1, "size": 64, "scales": [1.0]}
    | {"batch": 16},
    "gasnet": {"recipe": "glance", "variants": ["labelled", "gasnet"], "steps": 2, "log_every": 1}
    | {"size": [8, 32, 32], "precision": "32-true"},
    "infnet": {"data": "phantom", "epochs": 1, "size": 64, "scales": [1.0], "batch": 16},
    "multiclass": {"recipe": "glance", "epochs": 1, "infnet": {"epochs": 1, "size": 64}},
    "preprocess": {"size": [8, 32, 32], "jobs": 1},
    "semi_infnet": {
        "infnet": {"epochs": 1, "size": 64, "scales": [1.0]},
        "propagation": {"epochs": 1, "size": 64, "per_round": 30, "share_limits": [0, 100]},
        "pseudo": {"epochs": 1, "size": 64, "scales": [1.0]},
        "doctor": {"epochs": 1, "size": 64, "scales": [1.0]},
    },
}

# Matplotlib's functions that open a figure
FIGURES = ("figure", "subplots", "subplot_mosaic")

IMPORT = re.compile(r"(import|from) \w")


def all_notebooks(function):
    """Run a test on each chapter and each run."""
    paths = [*CHAPTERS, *RUNS]
    return pytest.mark.parametrize("path", paths, ids=[path.stem for path in paths])(function)


def chapters(function):
    """Run a test on each chapter."""
    return pytest.mark.parametrize("path", CHAPTERS, ids=[path.stem for path in CHAPTERS])(function)


def cells(path: Path, kind: str | None = None) -> list:
    """The notebook's cells, all or of one kind."""
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if kind in (None, cell.cell_type)]


def code_lines(cell) -> list[str]:
    """Lines of a code cell that a reader has to think about: neither empty nor an import."""
    return [line for line in cell.source.splitlines() if line.strip() and not IMPORT.match(line)]


def words(path: Path) -> int:
    """Words of prose: text cells without their formulas and directive fences."""
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    text = re.sub(r"\$\$[^$]*\$\$|\$[^$\n]*\$", " ", text)
    text = re.sub(r"^([:`]{3,}|:\w+:).*$", " ", text, flags=re.M)
    return len(re.findall(r"[A-Za-z][\w'-]*", text))


def draws(cell) -> bool:
    """Whether a code cell opens a Matplotlib figure itself, outside a function's definition."""
    todo = list(ast.parse(re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.M)).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in (
            "subplots",
            "subplot_mosaic",
            "figure",
        ):
            return True
        todo.extend(ast.iter_child_nodes(node))
    return False


@all_notebooks
def test_stored_clean(path):
    assert path.stat().st_size < 60_000, "keep a notebook under 60 kB"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in cells(path, "code"):
        assert not cell.outputs and cell.execution_count is None, f"{cell.id}: strip the outputs"
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    for name in ids:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", name), (
            f"{name}: a cell's id says what it is, as in ct-hist-1"
        )


@all_notebooks
def test_parameters_are_literals(path):
    tagged = [cell for cell in cells(path, "code") if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    for statement in ast.parse(tagged[0].source).body:
        assert isinstance(statement, ast.Assign | ast.AnnAssign), ast.unparse(statement)
        ast.literal_eval(statement.value)


@all_notebooks
def test_code_cells_are_short(path):
    for cell in cells(path, "code"):
        assert len(cell.source.splitlines()) <= 25, cell.id


@all_notebooks
def test_title_and_tone(path):
    first = cells(path)[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    prose = "\n".join(cell.source for cell in cells(path, "markdown"))
    assert not re.search(r"\bsimply\b", prose, re.I)
    assert not re.search(
        r"(?<![\w.])/(home|root|work|tmp|Users)/", "\n".join(cell.source for cell in cells(path))
    )


@all_notebooks
def test_citations_are_in_the_bibliography(path):
    prose = "\n".join(cell.source for cell in cells(path, "markdown"))
    keys = {
        key.strip() for group in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", prose) for key in group.split(",")
    }
    missing = sorted(key for key in keys if f"{{{key}," not in BIBLIOGRAPHY)
    assert not missing, f"not in book/references.bib: {missing}"


@all_notebooks
def test_a_named_figure_is_all_that_its_cell_shows(path):
    """A table behind it would get the figure's name, too, and the book stops at a name that stands twice."""
    for cell in cells(path, "code"):
        if "name" in cell.metadata.get("mystnb", {}).get("figure", {}):
            last = ast.parse(cell.source).body[-1]
            shows = isinstance(last, ast.Expr) and not ast.unparse(last).startswith(("print(", "plt.show("))
            said = f"{cell.id}: end its last line with ';', or move it to a cell of its own"
            assert not shows or cell.source.rstrip().endswith(";"), said


@all_notebooks
def test_figures_are_described(path):
    for cell in cells(path, "code"):
        if draws(cell):
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(alt.split()) >= 5, f"{cell.id}: say in mystnb.image.alt what the figure shows"


@all_notebooks
def test_links_to_notebooks_and_files(path):
    for cell in cells(path, "markdown"):
        for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", cell.source):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{cell.id}: {target}"


@chapters
def test_chapter_has_its_measure(path):
    inside, lines = False, 0
    for cell in cells(path):
        inside = "{solution-start}" in cell.source or inside and "{solution-end}" not in cell.source
        lines += len(code_lines(cell)) if cell.cell_type == "code" and not inside else 0
    assert 25 <= len(cells(path)) <= 60, f"{len(cells(path))} cells"
    assert 80 <= lines <= 240, f"{lines} lines of code outside the solutions"
    assert 1200 <= words(path) <= 2500, f"{words(path)} words"


@chapters
def test_exercises_have_solutions_with_code(path):
    texts = [(cell.cell_type, cell.source) for cell in cells(path)]
    prose = "\n".join(source for kind, source in texts if kind == "markdown")
    exercises = re.findall(r"\{exercise(?:-start)?\}[^\n]*\n:label: (\S+)", prose)
    assert exercises and len(set(exercises)) == len(exercises)
    inside, with_code = None, set()
    for kind, source in texts:
        if start := re.search(r"\{solution-start\} (\S+)", source):
            assert inside is None, f"the solution of {inside} is not ended"
            inside = start[1]
        elif inside and kind == "code":
            with_code.add(inside)
        if "{solution-end}" in source:
            inside = None
    assert inside is None
    assert with_code == set(exercises)


@pytest.mark.slow
@chapters
def test_chapter_executes(path):
    nbval = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=300"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *nbval, "-q", "-p", "no:cacheprovider", "-p", "no:xdist", path],
        cwd=ROOT,
        env={name: value for name, value in environment.items() if not name.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("path", RUNS, ids=[path.stem for path in RUNS])
def test_run_executes_at_its_smallest_scale(path, tmp_path):
    parameters = SMALLEST[path.stem] | {"out": str(tmp_path / "run")}
    papermill.execute_notebook(path, tmp_path / "report.ipynb", parameters, cwd=ROOT, progress_bar=False)
    finished = {folder.parent for folder in (tmp_path / "run").rglob("weights.safetensors")}
    assert finished or list((tmp_path / "run").rglob("lung/*.nii.gz"))  # networks, or volumes for them
    for folder in finished:
        for name in ("config.json", "log.csv", "metrics.json", "model_card.md"):
            assert (folder / name).stat().st_size > 0, name
        assert list((folder / "predictions").iterdir())
