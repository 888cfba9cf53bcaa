"""Slices: pairing by name, edges against the data set's own, loading, augmentation, folds."""

import errno
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from covidnb.catalog import CatalogError
from covidnb.files import natural_order
from covidnb.slices import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PARTS,
    InfectionSlices,
    SliceError,
    fold,
    list_slices,
    mask_edges,
    patient_folds,
    patient_of,
    read_classes,
    read_mask,
    semiseg_root,
)


def disc(height: int, width: int, radius: float) -> np.ndarray:
    """A filled circle, uint8 0 or 255."""
    y, x = np.ogrid[:height, :width]
    return np.where((y - height / 2) ** 2 + (x - width / 3) ** 2 < radius**2, 255, 0).astype(np.uint8)


@pytest.fixture
def tiny_root(tmp_path):
    """Twelve slices of six patients in the layout: grey ramps with a disc as infection."""
    folder = tmp_path / PARTS["doctor"]
    for kind in ("Imgs", "GT"):
        (folder / kind).mkdir(parents=True)
    for number in range(12):
        name, height, width = f"p{number // 2}_{number + 1}", 60 + number, 80
        ramp = np.tile(np.linspace(20, 180, width), (height, 1)).astype(np.uint8)
        mask = disc(height, width, 8 + number)
        Image.fromarray(np.maximum(ramp, mask)).save(folder / "Imgs" / f"{name}.png")
        Image.fromarray(mask).save(folder / "GT" / f"{name}.png")
    return tmp_path


def test_natural_order_and_parts(tiny_root):
    names = [item.name for item in list_slices(tiny_root, "doctor")]
    assert names[:2] == ["p0_1", "p0_2"] and names[-1] == "p5_12"
    with pytest.raises(SliceError, match="nonsense.*doctor"):
        list_slices(tiny_root, "nonsense")
    with pytest.raises(SliceError, match="LungInfection-Test"):
        list_slices(tiny_root, "test")


def test_natural_order_takes_any_name():
    names = ["10", "2", "²", "a10b2", "a2b10", "a2b9", "b"]
    assert sorted(names, key=natural_order) == ["2", "10", "a2b9", "a2b10", "a10b2", "b", "²"]


def test_odd_files_are_named(tiny_root):
    folder = tiny_root / PARTS["doctor"]
    (folder / "GT" / "p1_3.png").rename(folder / "GT" / "stray.png")
    with pytest.raises(SliceError, match="p1_3.png has no partner"):
        list_slices(tiny_root, "doctor")
    (folder / "Imgs" / "p1_3.png").unlink()
    with pytest.raises(SliceError, match="stray.png belongs to no image"):
        list_slices(tiny_root, "doctor")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b"not a picture at all", "not an image"),
        ("half", "damaged"),
        (None, "does not exist"),
    ],
)
def test_unreadable_files_are_named(tiny_root, content, complaint):
    files = list_slices(tiny_root, "doctor")
    path = files[3].image
    if content is None:
        path.unlink()
    else:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(SliceError, match=f"{path.name} .*{complaint}|{path.name} {complaint}"):
        InfectionSlices(files, 32)[3]


def test_mask_of_another_size_is_refused(tiny_root):
    files = list_slices(tiny_root, "doctor")
    Image.fromarray(disc(10, 12, 3)).save(files[0].mask)
    with pytest.raises(SliceError, match=r"GT/p0_1.png.*12 x 10 and 80 x 60"):
        InfectionSlices(files, 32)[0]


def test_items_follow_the_released_loader(tiny_root):
    """Pillow's bilinear resize of image, mask and edge, then ImageNet's normalisation."""
    item = list_slices(tiny_root, "doctor")[5]
    got = InfectionSlices([item], 48)[0]
    grey = np.asarray(Image.open(item.image).resize((48, 48), Image.BILINEAR)) / 255
    truth = np.asarray(Image.open(item.mask).resize((48, 48), Image.BILINEAR)) / 255
    for channel in range(3):
        expected = (grey - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        np.testing.assert_allclose(got["image"][channel], expected, atol=1e-6)
    np.testing.assert_allclose(got["mask"][0], truth, atol=1e-6)
    assert 0 < got["edge"].mean() < got["mask"].mean()
    assert got["name"] == "p2_6"


def test_augmentation_depends_on_seed_epoch_and_index_alone(tiny_root):
    files = list_slices(tiny_root, "doctor")
    first, second = (InfectionSlices(files, 64, augment=True, seed=7) for _ in range(2))
    first.set_epoch(3), second.set_epoch(3)
    ahead = first[4]
    for index in (0, 9, 4):  # another order of access
        again = second[index]
    assert all(torch.equal(ahead[key], again[key]) for key in ("image", "mask", "edge"))
    assert type(ahead["image"]) is torch.Tensor
    second.set_epoch(4)
    assert not torch.equal(ahead["image"], second[4]["image"])
    assert not torch.equal(ahead["image"], InfectionSlices(files, 64, augment=True, seed=8)[4]["image"])


def test_augmentation_moves_image_mask_and_edge_together(tiny_root):
    """The disc is the brightest thing in the slice, so the moved image is bright under the moved mask."""
    slices = InfectionSlices(list_slices(tiny_root, "doctor"), 64, augment=True)
    moved = 0
    for epoch in range(4):
        slices.set_epoch(epoch)
        for index in range(len(slices)):
            item = slices[index]
            grey, mask, edge = item["image"][0], item["mask"][0], item["edge"][0]
            assert grey[mask > 0.9].min() > grey[mask < 0.1].max() - 0.3
            rim = (mask > 0.2) & (mask < 0.8)
            assert edge[rim].mean() > 0.3 > edge[~rim].mean()
            assert mask.min() >= 0 and mask.max() <= 1 and edge.max() <= 1
            moved += int((mask[:, :32].sum() > mask[:, 32:].sum()).item())
    assert 0 < moved < 48  # flips and turns carry the disc to either half


@settings(deadline=None, max_examples=25)
@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=20)))
def test_gradient_edges_follow_numpys_gradient(mask):
    down, right = np.gradient((mask > 128).astype(float))
    np.testing.assert_array_equal(mask_edges(mask) > 0, (down != 0) | (right != 0))


def test_edge_methods():
    mask = disc(60, 60, 20)
    wide, thin = mask_edges(mask), mask_edges(mask, "canny")
    assert set(np.unique(wide)) == set(np.unique(thin)) == {0, 255}
    assert 1.5 < (wide > 0).sum() / (thin > 0).sum() < 2.5
    with pytest.raises(SliceError, match="sobel"):
        mask_edges(mask, "sobel")


def test_classes_and_masks_of_palette_files(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8)).convert("P")
    image.putdata([0, 1, 2, 0])
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    image.save(tmp_path / "label.png")
    np.testing.assert_array_equal(read_classes(tmp_path / "label.png"), [[0, 1], [2, 0]])
    np.testing.assert_array_equal(read_mask(tmp_path / "label.png"), [[0, 255], [255, 0]])
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "grey.png")
    with pytest.raises(SliceError, match="grey.png has mode L"):
        read_classes(tmp_path / "grey.png")


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 9), min_size=5, max_size=12), st.integers(0, 4))
def test_folds_share_no_patient(slices_of_each, k):
    names = [f"p{p}_{n}" for p, count in enumerate(slices_of_each) for n in range(count)]
    folds = patient_folds(names)
    assert sorted(name for fold_names in folds for name in fold_names) == sorted(names)
    held_out = {name.split("_")[0] for name in folds[k]}
    assert held_out.isdisjoint(n.split("_")[0] for j, part in enumerate(folds) if j != k for n in part)


def test_fold(tiny_root):
    files = list_slices(tiny_root, "doctor")
    train, held_out = fold(files, 1)
    assert {f.name for f in held_out} == {"p1_3", "p1_4"} and len(train) == 10
    splits = {"folds": [["p0_1"], [f.name for f in files[1:]]]}
    assert [f.name for f in fold(files, 0, splits)[1]] == ["p0_1"]
    with pytest.raises(SliceError, match="no fold 2"):
        fold(files, 2, splits)
    splits["folds"][1].remove("p2_5")
    with pytest.raises(SliceError, match="p2_5"):
        fold(files, 0, splits)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(SliceError, match="not in the COVID-SemiSeg layout"):
        semiseg_root(tmp_path)
    with pytest.raises(SliceError, match="empty"):
        InfectionSlices([])


@pytest.fixture
def small_phantom(tmp_path, monkeypatch):
    """Few, coarse phantom patients in an empty cache."""
    monkeypatch.setenv("COVIDNB_CACHE", str(tmp_path / "cache"))
    patients = {"doctor": 2, "test": 1, "pseudo": 1}
    monkeypatch.setattr(
        "covidnb.slices.phantom.PHANTOM",
        {
            "seed": 1,
            "shape": (16, 96, 96),
            "patients": patients,
            "slices": dict.fromkeys(patients, 3),
            "version": 1,
        },
    )
    return tmp_path / "cache"


def test_phantom_has_the_layout(small_phantom):
    root = semiseg_root("phantom")
    assert [path.name for path in small_phantom.iterdir()] == [root.name]
    parts = {part: list_slices(root, part) for part in PARTS}
    assert {part: len(files) for part, files in parts.items()} == {
        "doctor": 6,
        "pseudo": 3,
        "test": 3,
        "multiclass_train": 6,
        "multiclass_test": 3,
    }
    patients = {part: {patient_of(f.name) for f in files} for part, files in parts.items()}
    assert patients["doctor"] == patients["multiclass_train"] and len(patients["doctor"]) == 2
    assert len(patients["doctor"] | patients["test"] | patients["pseudo"]) == 4
    for item, classes in zip(parts["doctor"], parts["multiclass_train"], strict=True):
        mask = read_mask(item.mask)
        assert set(np.unique(mask)) == {0, 255}
        np.testing.assert_array_equal(read_mask(item.edge), mask_edges(mask))
        np.testing.assert_array_equal(read_classes(classes.mask) > 0, mask > 0)
        np.testing.assert_array_equal(read_mask(classes.prior), mask)
    assert parts["pseudo"][0].mask is None and Image.open(parts["pseudo"][0].image).format == "JPEG"
    with pytest.raises(SliceError, match="has no mask"):
        InfectionSlices(parts["pseudo"])


def test_phantom_is_drawn_once_and_again_when_its_parameters_change(small_phantom, monkeypatch):
    from covidnb.slices import phantom as phantom_slices

    monkeypatch.setitem(phantom_slices.PHANTOM, "patients", {"doctor": 1})
    root = semiseg_root("phantom")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(phantom_slices, "_draw_phantom", lambda root: pytest.fail("drawn twice"))
        assert semiseg_root("phantom") == root
    shutil.rmtree(root)
    assert semiseg_root("phantom") == root
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    monkeypatch.setitem(phantom_slices.PHANTOM, "seed", 2)
    assert semiseg_root("phantom") != root


def test_interrupted_phantom_leaves_nothing(small_phantom, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("covidnb.slices.phantom._write_slice", full)
    with pytest.raises(CatalogError, match="no space left for the phantom's slices"):
        semiseg_root("phantom")
    assert list(small_phantom.iterdir()) == []


def test_doctor_edges_are_reproduced(data_dir):
    """All 50 Edge files, pixel for pixel, by the gradient; Canny draws another, thinner line."""
    agreement, dice = [], []
    for item in list_slices(data_dir / "covid-semiseg", "doctor"):
        mask, own = read_mask(item.mask), read_mask(item.edge) > 0
        np.testing.assert_array_equal(mask_edges(mask) > 0, own)
        canny = mask_edges(mask, "canny") > 0
        agreement.append((canny == own).mean())
        dice.append(2 * (canny & own).sum() / (canny.sum() + own.sum()))
    assert len(dice) == 50
    assert np.mean(agreement) == pytest.approx(0.987, abs=5e-4)
    assert np.mean(dice) == pytest.approx(0.71, abs=5e-3)


def test_pseudo_label_edges_are_reproduced(data_dir):
    """Every twentieth of the 1,600 (all of them agree), pixel for pixel, by Canny."""
    files = list_slices(data_dir / "covid-semiseg", "pseudo")
    assert len(files) == 1600
    for item in files[::20]:
        np.testing.assert_array_equal(mask_edges(read_mask(item.mask), "canny"), read_mask(item.edge))


def test_real_parts_are_complete(data_dir):
    root = data_dir / "covid-semiseg"
    counts = {part: len(list_slices(root, part)) for part in PARTS}
    assert counts == {"doctor": 50, "pseudo": 1600, "test": 48, "multiclass_train": 50, "multiclass_test": 48}
    item = list_slices(root, "multiclass_train")[0]
    assert item.prior is not None and set(np.unique(read_classes(item.mask))) <= {0, 1, 2}
    batch = InfectionSlices(list_slices(root, "test")[:2], 64)[1]
    assert batch["image"].shape == (3, 64, 64) and 0 < batch["mask"].mean() < 1
