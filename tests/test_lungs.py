"""Lungs: Dice on real chests, both lungs whatever their state, dense disease inside, clear refusals."""

import sys
import time
import types

import numpy as np
import pytest
import SimpleITK as sitk

from covidnb import catalog, lungs, phantom
from covidnb.ct import CTError, read_ct, read_mask
from covidnb.lungs import LungsNotFound, segment_lungs

SPACING = (4.0, 2.5, 2.5)  # z, y, x in mm


def ellipsoid(grid, centre, radii):
    return sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True)) < 1


def drawn_chest(*, left=1.0, left_hu=-850.0, touching=False, consolidation=False):
    """A chest of ellipsoids on a table: (image, truth of both lungs, consolidation), arrays (z, y, x)."""
    shape = (64, 104, 128)
    z, y, x = np.meshgrid(
        *((np.arange(n) - n / 2) * s for n, s in zip(shape, SPACING, strict=True)), indexing="ij"
    )
    rng = np.random.default_rng(3)
    hu = np.full(shape, -1000.0)
    hu[((x / 150) ** 2 + (y / 105) ** 2) < 1] = 40
    hu[(np.abs(y - 118) < 3) & (np.abs(x) < 120)] = 200  # the table
    offset = 58 if touching else 70
    right = ellipsoid((z, y, x), (0, 0, -offset), (100, 75, 58))
    other = ellipsoid((z, y, x), (0, 0, offset), (100 * left, 75 * left, 58 * left)) & ~right
    hu[right] = -850
    hu[other] = left_hu
    if not touching:
        tube = (np.hypot(x, y) < 8) & (z > 0)
        hu[tube] = -1000
    dense = (
        right & ellipsoid((z, y, x), (0, 75, -70), (25, 35, 30)) if consolidation else np.zeros(shape, bool)
    )
    hu[dense] = 40
    hu += rng.normal(0, 25, shape)
    image = sitk.GetImageFromArray(hu.astype(np.float32))
    image.SetSpacing(SPACING[::-1])
    return image, right | other, dense


def dice(a, b):
    a, b = (sitk.GetArrayFromImage(m) if isinstance(m, sitk.Image) else m for m in (a, b))
    a, b = a > 0, b > 0
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize(
    "kind",
    [{}, {"left": 0.35}, {"touching": True}, {"left_hu": -500.0}, {"left_hu": -330.0}],
    ids=["two", "one much smaller", "touching", "one ground glass", "one above the air threshold"],
)
def test_both_lungs(kind):
    image, truth, _ = drawn_chest(**kind)
    found = sitk.GetArrayFromImage(segment_lungs(image)) > 0
    x = np.arange(truth.shape[2])
    for side in (x < 64, x >= 64):
        assert dice(found[:, :, side], truth[:, :, side]) > 0.94


def test_trachea_table_and_air_around_are_left_out():
    image, truth, _ = drawn_chest()
    found = sitk.GetArrayFromImage(segment_lungs(image)) > 0
    assert not found[:, 40:64, 62:67].any()
    assert (found & ~truth).sum() < 0.02 * truth.sum()


def test_consolidation_on_the_chest_wall_is_inside():
    image, _, dense = drawn_chest(consolidation=True)
    hu = sitk.GetArrayFromImage(image)
    assert (hu[dense] < lungs.AIR).mean() < 0.01  # no threshold finds it
    found = sitk.GetArrayFromImage(segment_lungs(image)) > 0
    assert found[dense].mean() > 0.9


@pytest.mark.parametrize("code", ["LPS", "RAI", "SAL", "PIR"])
def test_orientation_does_not_matter(code):
    image, _, _ = drawn_chest(consolidation=True)
    straight = segment_lungs(image)
    turned = sitk.DICOMOrient(image, code)
    found = segment_lungs(turned)
    assert found.GetDirection() == turned.GetDirection() and found.GetSize() == turned.GetSize()
    assert dice(sitk.DICOMOrient(found, "LPS"), straight) > 0.999


def test_head_first_or_feet_first():
    image, _, _ = drawn_chest()
    flipped = sitk.GetImageFromArray(sitk.GetArrayFromImage(image)[::-1])
    flipped.CopyInformation(image)
    up, down = (sitk.GetArrayFromImage(segment_lungs(i)) for i in (image, flipped))
    assert dice(up, down[::-1]) > 0.999


def test_result_lies_on_the_scan():
    image, _, _ = drawn_chest()
    image.SetOrigin((-12.5, 7.0, 1030.0))
    found = segment_lungs(image)
    assert found.GetPixelID() == sitk.sitkUInt8
    assert (found.GetSize(), found.GetOrigin(), found.GetSpacing(), found.GetDirection()) == (
        image.GetSize(),
        image.GetOrigin(),
        image.GetSpacing(),
        image.GetDirection(),
    )
    assert set(np.unique(sitk.GetArrayFromImage(found))) == {0, 1}


@pytest.mark.parametrize("value", [40.0, -1000.0])
def test_a_scan_without_lungs(value):
    image = sitk.Image(64, 64, 32, sitk.sitkFloat32) + value
    with pytest.raises(LungsNotFound, match=r"looked for a pocket of 100 ml .* largest pocket has 0 ml"):
        segment_lungs(image)
    assert issubclass(LungsNotFound, CTError)


def test_bowel_gas_is_no_lung():
    image, truth, _ = drawn_chest()
    hu = np.where(truth, -1000, sitk.GetArrayFromImage(image)).astype(np.float32)
    hu[:, 40:64, 62:67] = 40
    gas = sitk.GetImageFromArray(hu)
    gas.CopyInformation(image)
    with pytest.raises(LungsNotFound):
        segment_lungs(gas)


def test_unknown_method():
    with pytest.raises(ValueError, match="'threshold' and 'lungmask'"):
        segment_lungs(drawn_chest()[0], method="otsu")


def test_lungs_and_disease_of_a_phantom():
    chest = phantom.chest(2020, shape=(48, 160, 160))
    found = sitk.GetArrayFromImage(segment_lungs(chest.ct)) > 0
    lesions = sitk.GetArrayFromImage(chest.lesions)
    assert dice(found, chest.lungs) > 0.97
    assert found[lesions == 1].mean() > 0.95
    assert (
        found[lesions == 2].mean()
        > 0.7
        > 0.2
        > (sitk.GetArrayFromImage(chest.ct)[lesions == 2] < -400).mean()
    )


# ------------------------------------------------------------------------------------------ lungmask


def test_lungmask_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "lungmask", None)
    with pytest.raises(ModuleNotFoundError, match="pip install lungmask"):
        segment_lungs(drawn_chest()[0], method="lungmask")


class FakeInferer:
    """Stands for lungmask.LMInferer: right lung 1, left lung 2."""

    def __init__(self, modelpath, tqdm_disable):
        self.modelpath = modelpath

    def apply(self, image):
        labels = np.zeros(image.GetSize()[::-1], np.uint8)
        labels[:, :, 2], labels[:, :, 5] = 1, 2
        return labels


def test_lungmask_weights_not_here(monkeypatch):
    def fetch(name):
        raise catalog.CatalogError(f"{name} is not here")

    monkeypatch.setitem(sys.modules, "lungmask", types.SimpleNamespace(LMInferer=FakeInferer))
    monkeypatch.setattr(catalog, "fetch", fetch)
    with pytest.raises(catalog.CatalogError, match="lungmask-r231 is not here"):
        segment_lungs(drawn_chest()[0], method="lungmask")


def test_lungmask_labels_become_one_mask(monkeypatch):
    monkeypatch.setitem(sys.modules, "lungmask", types.SimpleNamespace(LMInferer=FakeInferer))
    monkeypatch.setattr(catalog, "fetch", lambda name: "unet_r231.pth")
    image, _, _ = drawn_chest()
    found = segment_lungs(image, method="lungmask")
    assert np.flatnonzero(sitk.GetArrayFromImage(found).any((0, 1))).tolist() == [2, 5]
    assert found.GetSpacing() == image.GetSpacing() and sitk.GetArrayFromImage(found).max() == 1


# ------------------------------------------------------------------------------------------ real chests


@pytest.mark.slow
@pytest.mark.parametrize("folder, numbers", [("medseg2", (1, 2, 5, 6, 7)), ("uiip", (1, 2, 3, 4))])
def test_dice_on_real_chests(data_dir, folder, numbers):
    scores = []
    for n in numbers:
        ct = read_ct(data_dir / folder / f"{folder}_{n}_ct.nii.gz")
        truth = read_mask(data_dir / folder / f"{folder}_{n}_lung.nii.gz", ct)
        scores.append(dice(segment_lungs(ct), truth))
    assert np.mean(scores) >= 0.965 and min(scores) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("number, share, dense_share", [(1, 0.87, 0.58), (2, 0.93, 0.93), (5, 0.98, 0.97)])
def test_lesions_inside_the_lungs(data_dir, number, share, dense_share):
    ct = read_ct(data_dir / "medseg2" / f"medseg2_{number}_ct.nii.gz")
    lesion = read_mask(data_dir / "medseg2" / f"medseg2_{number}_lesion.nii.gz", ct)
    lesion = sitk.GetArrayFromImage(lesion)
    found = sitk.GetArrayFromImage(segment_lungs(ct)) > 0
    assert found[lesion > 0].mean() >= share
    assert found[lesion == 2].mean() >= dense_share


@pytest.mark.slow
@pytest.mark.network
def test_full_resolution_chest():
    folder = catalog.fetch("chest-ct", quiet=True)
    ct = read_ct(folder / "cxr.nii.gz")
    anatomy = sitk.GetArrayFromImage(read_mask(folder / "mask.nii.gz", ct))
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        start = time.process_time()
        found = segment_lungs(ct)
        seconds = time.process_time() - start
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    assert dice(found, (anatomy >= 10) & (anatomy <= 14)) >= 0.97  # the five lobes
    assert seconds < 3
