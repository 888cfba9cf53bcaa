"""Viewers that work on a static page: slices of a volume, and figures, behind a slider."""

import base64
import hashlib
import html
import io
import json

import matplotlib.pyplot as plt
import numpy as np
import SimpleITK as sitk
from matplotlib.colors import to_rgb
from PIL import Image

from covidnb.ct import WINDOWS

from .pictures import COLOURS

# HU -> stored grey level: eight bits spent where chests need them, 5 HU a level in soft tissue, 10 in lung.
_HU_KNOTS = (-1300, -1000, -200, 300, 1050, 2000)
_LEVEL_KNOTS = (0, 30, 110, 210, 245, 255)


class SliceViewer:
    """What `slice_viewer` returns: HTML and script that a notebook and a static page both show."""

    def __init__(self, markup: str):
        self._markup = markup

    def _repr_html_(self) -> str:
        return self._markup


def slice_viewer(volume, masks=None, windows=WINDOWS, *, alt, max_slices=42, max_pixels=288) -> SliceViewer:
    """Axial slices with a slider, window buttons, mask switches and the HU under the pointer.

    Everything, pictures included, is in the HTML: no server, no kernel, no network. Slices are thinned out,
    made smaller and compressed with loss, to stay at a few hundred kilobytes: the HU shown are approximate.

    Parameters
    ----------
    volume : SimpleITK.Image in HU, LPS
    masks : {name: mask on the volume's grid, image or array (z, y, x)}, at most eight; a name in `COLOURS`
        gives the colour
    windows : {name: (low, high)} in HU, a button each; the first one is shown
    alt : what the viewer shows, in a sentence, for readers who cannot see it
    max_slices, max_pixels : how many slices at most, and pixels along the longer side of each
    """
    masks = masks or {}
    hu = sitk.GetArrayViewFromImage(volume)
    kept = np.unique(np.linspace(0, len(hu) - 1, max_slices).round().astype(int))
    dx, dy, _ = volume.GetSpacing()
    width_mm, height_mm = hu.shape[2] * dx, hu.shape[1] * dy
    per_mm = min(max_pixels, max(hu.shape[1:])) / max(width_mm, height_mm)
    size = (max(1, round(width_mm * per_mm)), max(1, round(height_mm * per_mm)))

    columns = int(np.ceil(np.sqrt(len(kept))))
    sheet_size = (columns * size[0], -(-len(kept) // columns) * size[1])
    greys, flags = Image.new("L", sheet_size), Image.new("L", sheet_size)
    for n, z in enumerate(kept):
        corner = (n % columns * size[0], n // columns * size[1])
        small = np.asarray(Image.fromarray(hu[z].astype(np.float32)).resize(size, Image.Resampling.BOX))
        greys.paste(Image.fromarray(np.interp(small, _HU_KNOTS, _LEVEL_KNOTS).astype(np.uint8)), corner)
        bits = np.zeros(hu.shape[1:], np.uint8)
        for bit, mask in enumerate(masks.values()):
            mask = sitk.GetArrayViewFromImage(mask) if isinstance(mask, sitk.Image) else mask
            bits |= (np.asarray(mask[z]) > 0).astype(np.uint8) << bit
        flags.paste(Image.fromarray(bits).resize(size, Image.Resampling.NEAREST), corner)

    spare = iter(["#F0E442", "#999999", "#117733", "#882255"])
    colours = {name: COLOURS.get(name) or next(spare) for name in masks}
    data = {
        "greys": _data_uri(greys, "WEBP", quality=72, method=6),
        "flags": _data_uri(flags, "PNG", optimize=True),
        "size": size,
        "columns": columns,
        "z": [round(volume.TransformIndexToPhysicalPoint((0, 0, int(z)))[2], 1) for z in kept],
        "numbers": [int(z) for z in kept],
        "depth": len(hu),
        "hu": np.interp(np.arange(256), _LEVEL_KNOTS, _HU_KNOTS).round().astype(int).tolist(),
        "windows": list(windows.values()),
        "colours": [[round(255 * part) for part in to_rgb(colour)] for colour in colours.values()],
        "alt": alt,
    }
    buttons = "".join(
        f'<button type="button" aria-pressed="false">{html.escape(name)}'
        f"<small> {low:g} to {high:g}</small></button>"
        for name, (low, high) in windows.items()
    )
    switches = "".join(
        f'<label><input type="checkbox" checked><i style="background:{colour}"></i>'
        f"{html.escape(name)}</label>"
        for name, colour in colours.items()
    )
    payload = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    name = "ct-" + hashlib.sha256((payload + buttons + switches).encode()).hexdigest()[:12]
    markup = (
        _VIEWER.replace("@NAME@", name)
        .replace("@STYLE@", _STYLE)
        .replace("@ALT@", html.escape(alt))
        .replace("@LAST@", str(len(kept) - 1))
        .replace("@BUTTONS@", buttons)
        .replace("@SWITCHES@", switches)
        .replace("@DATA@", payload)
    )
    return SliceViewer(markup)


def _data_uri(picture: Image.Image, form: str, **options) -> str:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return f"data:image/{form.lower()};base64," + base64.b64encode(stream.getvalue()).decode()


_STYLE = """<style>
.ct-viewer{max-width:30rem;margin:1rem 0;font-size:.85rem;line-height:1.4}
.ct-viewer canvas{display:block;width:100%;background:#000;border-radius:4px;cursor:crosshair}
.ct-viewer div{display:flex;flex-wrap:wrap;gap:.4rem .8rem;align-items:center;margin-top:.4rem}
.ct-viewer input[type=range]{flex:1;min-width:10rem;accent-color:#0072B2}
.ct-viewer button{font:inherit;color:inherit;background:none;border:1px solid currentColor;border-radius:4px;
padding:.1rem .5rem;opacity:.75;cursor:pointer}
.ct-viewer button[aria-pressed=true]{background:#0072B2;border-color:#0072B2;color:#fff;opacity:1}
.ct-viewer label{display:flex;align-items:center;gap:.3rem;cursor:pointer}
.ct-viewer i{width:.8rem;height:.8rem;border-radius:2px}
.ct-viewer output{font-variant-numeric:tabular-nums}
.ct-viewer :focus-visible{outline:2px solid #E69F00;outline-offset:2px}
html[data-theme=dark] .text_html:has(.ct-viewer){background:none!important;color:inherit!important}
</style>"""

# The script finds its figure by a name made from the content, not by chance: the same notebook gives the same
# page, and a viewer shown twice works twice.
_VIEWER = """
<figure class="ct-viewer" data-viewer="@NAME@" aria-label="Slice viewer: @ALT@">
@STYLE@
<canvas role="img" tabindex="0" aria-label="@ALT@"></canvas>
<div><label style="flex:1">Slice <input type="range" min="0" max="@LAST@" step="1"></label></div>
<div role="group" aria-label="Window in HU">@BUTTONS@</div>
<div role="group" aria-label="Masks">@SWITCHES@</div>
<div><output aria-live="polite"></output><span class="ct-hu"></span></div>
<script>
(function () {
  const data = @DATA@;
  const [width, height] = data.size;
  const letters = [["R", 0.03, 0.5], ["L", 0.97, 0.5], ["A", 0.5, 0.04], ["P", 0.5, 0.96]];

  function load(uri) {
    return new Promise(function (done) {
      const picture = new Image();
      picture.onload = function () {
        const sheet = document.createElement("canvas");
        sheet.width = picture.width;
        sheet.height = picture.height;
        const pen = sheet.getContext("2d", { willReadFrequently: true });
        pen.drawImage(picture, 0, 0);
        done(pen);
      };
      picture.src = uri;
    });
  }

  function start(figure, greys, flags) {
    const canvas = figure.querySelector("canvas");
    const slider = figure.querySelector("input[type=range]");
    const buttons = [...figure.querySelectorAll("button")];
    const switches = [...figure.querySelectorAll("input[type=checkbox]")];
    const text = figure.querySelector("output");
    const reading = figure.querySelector(".ct-hu");
    const pen = canvas.getContext("2d");
    const shown = pen.createImageData(width, height);
    let chosen = 0;
    let levels;
    canvas.width = width;
    canvas.height = height;

    function draw() {
      const n = Number(slider.value);
      const left = (n % data.columns) * width;
      const top = Math.floor(n / data.columns) * height;
      levels = greys.getImageData(left, top, width, height).data;
      const bits = flags.getImageData(left, top, width, height).data;
      const [low, high] = data.windows[chosen];
      const grey = data.hu.map((hu) => Math.max(0, Math.min(255, (255 * (hu - low)) / (high - low))));
      for (let p = 0; p < 4 * width * height; p += 4) {
        const colour = [0, 0, 0].fill(grey[levels[p]]);
        switches.forEach(function (box, bit) {
          const inside = (q) => (bits[q] >> bit) & 1;
          if (!box.checked || !inside(p)) return;
          const border = [p - 4, p + 4, p - 4 * width, p + 4 * width].some((q) => !inside(q));
          const share = border ? 0.9 : 0.25;
          for (let c = 0; c < 3; c++) colour[c] += share * (data.colours[bit][c] - colour[c]);
        });
        for (let c = 0; c < 3; c++) shown.data[p + c] = colour[c];
        shown.data[p + 3] = 255;
      }
      pen.putImageData(shown, 0, 0);
      pen.fillStyle = "#fff";
      pen.font = Math.round(height / 20) + "px sans-serif";
      pen.textAlign = "center";
      pen.textBaseline = "middle";
      letters.forEach((l) => pen.fillText(l[0], l[1] * width, l[2] * height));
      text.textContent = `Slice ${data.numbers[n] + 1} of ${data.depth}, z = ${data.z[n]} mm`;
      canvas.setAttribute("aria-label", data.alt + " " + text.textContent);
      slider.setAttribute("aria-valuetext", text.textContent);
      buttons.forEach((button, b) => button.setAttribute("aria-pressed", b === chosen));
    }

    buttons.forEach((button, b) => (button.onclick = () => { chosen = b; draw(); }));
    switches.forEach((box) => (box.onchange = draw));
    slider.oninput = draw;
    canvas.onkeydown = function (event) {
      const step = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      slider.value = Number(slider.value) + step;
      draw();
    };
    canvas.onmousemove = function (event) {
      const x = Math.floor((event.offsetX / canvas.clientWidth) * width);
      const y = Math.floor((event.offsetY / canvas.clientHeight) * height);
      const hu = data.hu[levels[4 * (y * width + x)]];
      reading.textContent = Number.isFinite(hu) ? "about " + Math.round(hu / 10) * 10 + " HU here" : "";
    };
    canvas.onmouseleave = () => (reading.textContent = "");
    slider.value = Math.floor(data.z.length / 2);
    draw();
  }

  Promise.all([load(data.greys), load(data.flags)]).then(function (sheets) {
    document.querySelectorAll('[data-viewer="@NAME@"]:not([data-ready])').forEach(function (figure) {
      figure.dataset.ready = "yes";
      start(figure, ...sheets);
    });
  });
})();
</script>
</figure>
"""


def frame_viewer(figures, labels, *, alt, name="Step", start=0) -> SliceViewer:
    """Figures behind a slider, for what moves when a number does; the HTML holds all, as in `slice_viewer`.

    Parameters
    ----------
    figures : Matplotlib figures of one size, drawn one by one from any iterable and closed
    labels : what each is, in words, shown beside the slider
    alt : what the viewer shows, in a sentence, for readers who cannot see it
    name : of the slider
    start : index of the figure shown first
    """
    pictures = []
    for figure in figures:
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=90)
        plt.close(figure)
        pictures.append(_data_uri(Image.open(stream).convert("RGB"), "WEBP", quality=60, method=6))
    payload = json.dumps({"pictures": pictures, "labels": list(labels), "start": start}).replace("</", "<\\/")
    key = "frames-" + hashlib.sha256(payload.encode()).hexdigest()[:12]
    markup = (
        _FRAMES.replace("@NAME@", key)
        .replace("@STYLE@", _STYLE)
        .replace("@ALT@", html.escape(alt))
        .replace("@SLIDER@", html.escape(name))
        .replace("@FIRST@", pictures[start])
        .replace("@START@", str(start))
        .replace("@LAST@", str(len(pictures) - 1))
        .replace("@DATA@", payload)
    )
    return SliceViewer(markup)


_FRAMES = """
<figure class="ct-viewer" data-viewer="@NAME@" style="max-width:52rem" aria-label="@ALT@">
@STYLE@
<img src="@FIRST@" alt="@ALT@" style="display:block;width:100%;background:#fff;border-radius:4px">
<div><label style="flex:1">@SLIDER@ <input type="range" min="0" max="@LAST@" value="@START@" step="1"></label>
<output aria-live="polite"></output></div>
<script>
(function () {
  const data = @DATA@;
  document.querySelectorAll('[data-viewer="@NAME@"]:not([data-ready])').forEach(function (figure) {
    figure.dataset.ready = "yes";
    const slider = figure.querySelector("input");
    slider.oninput = function () {
      figure.querySelector("img").src = data.pictures[slider.value];
      figure.querySelector("output").textContent = data.labels[slider.value];
      slider.setAttribute("aria-valuetext", data.labels[slider.value]);
    };
    slider.value = data.start;
    slider.oninput();
  });
})();
</script>
</figure>
"""
