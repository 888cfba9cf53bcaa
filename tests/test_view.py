"""Slices, overlays and the slice viewer, the last one in a real browser where there is one."""

import re
import shutil
import subprocess

import matplotlib
import numpy as np
import pytest
import SimpleITK as sitk

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from covidnb import ct, view


@pytest.fixture(scope="module")
def scan() -> sitk.Image:
    """Water in air with noise, 60 slices of 96 x 128, 0.8 x 0.8 x 5 mm; slice z holds a cube of z HU."""
    hu = np.full((60, 96, 128), -1000.0, np.float32)
    hu[:, 20:76, 24:104] = 0
    for z in range(60):
        hu[z, 40:56, 50:70] = 10 * z
    image = sitk.GetImageFromArray(hu + np.random.default_rng(0).normal(0, 15, hu.shape).astype(np.float32))
    image.SetSpacing((0.8, 0.8, 5.0))
    image.SetOrigin((0, 0, -150.0))
    return image


def viewer(scan, **options) -> str:
    body = sitk.BinaryThreshold(scan, -500, 2000)
    return view.slice_viewer(scan, {"lungs": body}, alt="A <box> of water.", **options)._repr_html_()


def test_a_slice_is_windowed_and_keeps_its_proportions(scan):
    _, ax = plt.subplots()
    drawn = view.show_slice(ax, sitk.GetArrayFromImage(scan)[:, 48], -160, 240, spacing=(5.0, 0.8), title="x")
    np.testing.assert_array_equal(
        drawn.get_array(), ct.window(sitk.GetArrayFromImage(scan)[:, 48], -160, 240)
    )
    assert ax.get_aspect() == pytest.approx(5.0 / 0.8)
    view.overlay(ax, sitk.GetArrayFromImage(scan)[:, 48] > -500, view.COLOURS["lungs"], label="body")
    assert ax.get_aspect() == pytest.approx(5.0 / 0.8)
    tint = ax.images[1].get_array()
    assert set(np.unique(tint[..., 3])) == {0, 0.35}
    plt.close()


def test_an_overlay_of_nothing_draws_nothing(scan):
    _, ax = plt.subplots()
    view.show_slice(ax, sitk.GetArrayFromImage(scan)[0])
    view.overlay(ax, np.zeros((96, 128)))
    assert ax.images[1].get_array()[..., 3].max() == 0
    plt.close()


def test_classes_are_tinted_where_they_are():
    classes = np.zeros((20, 30), np.uint8)
    classes[2:6, 3:9], classes[10:15, 10:12] = 1, 2
    row = ("a", np.full((20, 30), 90, np.uint8))
    figure = view.class_table([(*row, classes > 0, classes, classes * 0), (*row, None, classes, classes)])
    assert [ax.get_title() for ax in figure.axes[:3]] == ["slice, prior", "true classes", "predicted"]
    tints = [image.get_array()[..., 3] > 0 for image in figure.axes[1].images[1:]]
    np.testing.assert_array_equal(tints, [classes == 1, classes == 2])
    assert not any(image.get_array()[..., 3].any() for image in figure.axes[2].images[1:])
    plt.close()


def test_a_confusion_matrix_shows_shares_of_each_true_class():
    _, ax = plt.subplots()
    view.confusion_table(ax, [[900, 100], [0, 0]], ("lung", "lesion"))
    assert [text.get_text() for text in ax.texts] == ["90 %\n900", "10 %\n100", "0 %\n0", "0 %\n0"]
    plt.close()


def test_colours_differ_in_lightness_or_hue_also_without_red_and_green():
    """Simulated red-green blindness (Vienot 1999, deuteranopia) keeps every pair of colours apart."""
    rgb = np.array([matplotlib.colors.to_rgb(colour) for colour in view.COLOURS.values()])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    deutan = linear @ np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]).T
    seen = np.clip(deutan, 0, 1) ** (1 / 2.2)
    apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[np.triu_indices(len(seen), 1)]
    assert apart.min() > 0.1


def test_source_shows_the_packaged_code():
    shown = view.source(ct.window).data
    assert shown.startswith("```python\ndef window(") and shown.endswith("\n```")
    assert view.source(view.SliceViewer._repr_html_).data.startswith("```python\ndef _repr_html_")


def test_the_viewer_is_one_self_contained_reproducible_piece(scan):
    page = viewer(scan)
    assert page == viewer(scan)
    assert "http" not in page and "require" not in page and "<box>" not in page
    assert len(page) < 300_000
    assert len(re.findall(r'"numbers":\[(.*?)\]', page)[0].split(",")) == 42
    first, second = (re.search(r'data-viewer="(ct-\w+)"', p)[1] for p in (page, viewer(scan, max_slices=5)))
    assert first != second


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

PROBE = """<script>
window.addEventListener("load", () => setTimeout(() => {
  const figures = [...document.querySelectorAll("figure")];
  const grey = (figure) => {
    const canvas = figure.querySelector("canvas");
    const part = canvas.getContext("2d").getImageData(canvas.width * .46, canvas.height * .5, 4, 4).data;
    return Array.from(part.slice(0, 3)).join(",");
  };
  const f = figures[0], say = [], slider = f.querySelector("input[type=range]");
  const note = (word) => say.push(word + "=" + grey(f) + "@" + f.querySelector("output").textContent);
  note("start");
  f.querySelectorAll("input[type=checkbox]")[0].click(); note("bare");
  slider.value = 59; slider.dispatchEvent(new Event("input")); note("last");
  f.querySelectorAll("button")[1].click(); note("mediastinum");
  f.querySelector("canvas").dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown"})); note("key");
  f.querySelector("canvas").dispatchEvent(new MouseEvent("mousemove", {clientX: 1, clientY: 1}));
  say.push("second=" + grey(figures[1]) + "@" + figures[1].querySelector("output").textContent);
  say.push("pressed=" + [...f.querySelectorAll("button")].map((b) => b.getAttribute("aria-pressed")).join());
  document.body.dataset.said = say.join(";");
}, 500));
</script>"""


def shown(body: str, tmp_path) -> str:
    """The page's DOM after its scripts have run."""
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><meta charset='utf-8'><body>{body}</body>")
    return subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"),
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine to show the viewer in")
def test_the_viewer_works_in_a_browser(scan, tmp_path):
    markup = viewer(scan, max_slices=60)
    dom = shown(f"{markup}{markup}{PROBE}", tmp_path)
    said = dict(part.split("=", 1) for part in re.search(r'data-said="([^"]*)"', dom)[1].split(";"))
    grey = {
        name: [int(v) for v in text.split("@")[0].split(",")] for name, text in said.items() if "@" in text
    }

    def expected(z, name):  # the cube of 10 z HU, as the viewer should draw it
        return 255 * ct.window(np.array(10.0 * z), *ct.WINDOWS[name])

    assert said["start"].endswith("@Slice 31 of 60, z = 0 mm")
    assert len(set(grey["start"])) > 1 and len(set(grey["bare"])) == 1  # tinted, then grey
    assert grey["bare"][0] == pytest.approx(expected(30, "lung"), abs=10)
    assert said["last"].endswith("@Slice 60 of 60, z = 145 mm")
    assert said["key"].endswith("@Slice 59 of 60, z = 140 mm")
    assert grey["mediastinum"][0] == pytest.approx(expected(59, "mediastinum"), abs=1)
    assert grey["second"] == grey["start"]  # the same viewer shown twice: each has its own state
    assert said["pressed"] == "false,true,false,false"


def frames(**options) -> str:
    def figures():
        for width in (1, 5, 9):
            figure, ax = plt.subplots(figsize=(4, 2))
            ax.plot([0, 1], lw=width)
            yield figure

    labels = ["1 pt", "5 pt </script>", "9 pt"]
    return view.frame_viewer(figures(), labels, alt="A <line> getting wider.", **options)._repr_html_()


def test_frames_are_one_self_contained_reproducible_piece():
    page = frames()
    assert page == frames() and not plt.get_fignums()
    assert "http" not in page and "<line>" not in page and page.count("</script>") == 1
    assert page.count("data:image/webp") == 1 + 3  # one is shown before any script has run
    assert frames(start=1) != page


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine to show the viewer in")
def test_frames_move_in_a_browser(tmp_path):
    probe = """<script>
    window.addEventListener("load", () => {
      const [f, g] = document.querySelectorAll("figure"), slider = f.querySelector("input"), say = [];
      const picture = f.querySelector("img"), first = picture.src;
      const note = () => say.push(f.querySelector("output").textContent + picture.naturalWidth);
      note();
      slider.value = 2; slider.dispatchEvent(new Event("input")); note();
      say.push(first !== picture.src, first === g.querySelector("img").src);
      document.body.dataset.said = say.join(";");
    });</script>"""
    dom = shown(frames(start=1) * 2 + probe, tmp_path)
    said = re.search(r'data-said="([^"]*)"', dom)[1]
    assert re.fullmatch(r"5 pt &lt;/script&gt;360;9 pt\d+;true;true", said), said
