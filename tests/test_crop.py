"""The crop and the way back: exact where it can be, on any grid, and refused where the sizes are wrong."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from covidnb.crop import SMALLEST, LungCrop
from covidnb.ct import CTError, read_ct, read_mask, write_like

FEW = settings(deadline=None, max_examples=25)
ORIENTATIONS = ["LPS", "RAS", "LAI", "SPL", "AIR", "PSR"]


def image_of(array, spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0), direction=None):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    if direction is not None:
        image.SetDirection(direction)
    return image


def array_of(image):
    return sitk.GetArrayFromImage(image)


def dice(a, b):
    a, b = array_of(a) > 0, array_of(b) > 0
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def millilitres(mask):
    return (array_of(mask) > 0).sum() * np.prod(mask.GetSpacing()) / 1000


def tenths(low, high):
    return st.integers(low, high).map(lambda n: n / 10)


@st.composite
def scans(draw):
    """A grid of any shape, spacing and direction with a box of lungs that may touch its border."""
    shape = draw(st.tuples(*[st.integers(2, 45)] * 3))
    spacing = draw(st.tuples(*[tenths(4, 80)] * 3))
    origin = draw(st.tuples(*[tenths(-9000, 9000)] * 3))
    turn = sitk.Euler3DTransform()
    turn.SetRotation(*draw(st.tuples(*[tenths(-6, 6)] * 3)))  # a tilted table as well
    flips = np.diag(draw(st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3)))
    direction = (np.array(turn.GetMatrix()).reshape(3, 3) @ flips).ravel().tolist()
    lungs = np.zeros(shape, np.uint8)
    box = []
    for n in shape:
        low = draw(st.integers(0, n - 1))
        box.append(slice(low, draw(st.integers(low + 1, n))))
    lungs[tuple(box)] = 1
    assume(lungs.sum() >= SMALLEST * lungs.size)
    return image_of(lungs, spacing, origin, direction), tuple(box)


sizes = st.tuples(*[st.integers(1, 40)] * 3)


@FEW
@given(scans(), sizes, st.integers(0, 2**32 - 1))
def test_what_survives_the_resolution_comes_back_unchanged(scan, size, seed):
    lungs, box = scan
    crop = LungCrop.of(lungs, size)
    assert crop.slices == box
    noise = np.zeros(array_of(lungs).shape, np.uint8)
    noise[box] = np.random.default_rng(seed).integers(0, 4, noise[box].shape)
    mask = image_of(noise)
    mask.CopyInformation(lungs)
    once = crop.invert(crop.apply(mask))
    assert once.GetSize() == lungs.GetSize() and once.GetPixelID() == sitk.sitkUInt8
    assert once.GetOrigin() == lungs.GetOrigin() and once.GetDirection() == lungs.GetDirection()
    np.testing.assert_array_equal(array_of(crop.invert(crop.apply(once))), array_of(once))
    outside = np.ones(noise.shape, bool)
    outside[box] = False
    assert not array_of(once)[outside].any()
    if all(n <= m for n, m in zip(noise[box].shape, size, strict=True)):  # the crop is as fine as the scan
        np.testing.assert_array_equal(array_of(once), noise)


@FEW
@given(scans(), sizes, st.integers(0, 2**32 - 1))
def test_prediction_comes_back_where_it_was_made(scan, size, seed):
    lungs, box = scan
    crop = LungCrop.of(lungs, tuple(min(n, s.stop - s.start) for n, s in zip(size, box, strict=True)))
    prediction = np.random.default_rng(seed).integers(0, 2, crop.size, np.uint8)
    np.testing.assert_array_equal(array_of(crop.apply(crop.invert(prediction))), prediction)


@FEW
@given(scans(), sizes)
def test_faces_are_aligned(scan, size):
    lungs, box = scan
    crop = LungCrop.of(lungs, size)
    small = crop.apply(lungs)
    for corner in np.ndindex(2, 2, 2):
        here = small.TransformContinuousIndexToPhysicalPoint(
            [c * n - 0.5 for c, n in zip(corner, small.GetSize(), strict=True)]
        )
        there = lungs.TransformContinuousIndexToPhysicalPoint(
            [(s.stop if c else s.start) - 0.5 for c, s in zip(corner, box[::-1], strict=True)]
        )
        np.testing.assert_allclose(here, there, atol=1e-6)
    assert array_of(small).all()


@FEW
@given(scans(), sizes, st.tuples(*[tenths(-30, 30)] * 3))
def test_a_linear_ramp_stays_where_it_is(scan, size, slope):
    """Linear interpolation gives a linear function exactly, wherever all its neighbours exist."""
    lungs, _ = scan
    z, y, x = np.indices(array_of(lungs).shape)
    ramp = image_of((slope[0] * x + slope[1] * y + slope[2] * z - 500).astype(np.float32))
    ramp.CopyInformation(lungs)
    small = LungCrop.of(lungs, size).apply(ramp)
    k, j, i = np.indices(size)
    for index in zip(*(a.ravel()[:: max(1, i.size // 50)].tolist() for a in (i, j, k)), strict=True):
        point = small.TransformIndexToPhysicalPoint(index)
        at = np.clip(lungs.TransformPhysicalPointToContinuousIndex(point), 0, np.array(lungs.GetSize()) - 1)
        assert small[index] == pytest.approx(np.dot(slope, at) - 500, abs=2e-3)


def test_ct_is_linear_and_clipped_masks_are_nearest():
    lungs = image_of(np.ones((4, 4, 4), np.uint8))
    crop = LungCrop.of(lungs, (4, 4, 8))
    hu = image_of(np.tile(np.float32([-3000, -1000, 0, 1000]), (4, 4, 1)))
    row = array_of(crop.apply(hu))[0, 0]
    np.testing.assert_allclose(row, [-1250, -1250, -1250, -750, -250, 250, 250, 250])
    labels = image_of(np.tile(np.uint8([0, 1, 2, 3]), (4, 4, 1)))
    assert array_of(crop.apply(labels))[0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert crop.apply(hu).GetPixelID() == sitk.sitkFloat32
    assert crop.apply(sitk.Cast(hu, sitk.sitkInt16)).GetPixelID() == sitk.sitkFloat32


def test_gasnet_size_and_geometry():
    lungs = np.zeros((60, 200, 240), np.uint8)
    lungs[5:45, 20:180, 30:190] = 1
    crop = LungCrop.of(image_of(lungs, (0.7, 0.8, 2.5), (10, 20, 30)))
    small = crop.apply(image_of(lungs, (0.7, 0.8, 2.5), (10, 20, 30)))
    assert small.GetSize() == (160, 160, 40)
    np.testing.assert_allclose(small.GetSpacing(), (0.7, 0.8, 2.5))
    np.testing.assert_allclose(small.GetOrigin(), (10 + 30 * 0.7, 20 + 20 * 0.8, 30 + 5 * 2.5))


def test_box_holds_both_lungs_and_no_crumbs():
    lungs = np.zeros((40, 64, 64), np.uint8)
    lungs[5:30, 10:50, 4:28] = 1
    lungs[10:25, 20:40, 36:60] = 1
    lungs[38, 60, 0:5] = 1  # below a thousandth of the scan
    assert LungCrop.of(image_of(lungs)).slices == (slice(5, 30), slice(10, 50), slice(4, 60))


def ball(shape, spacing, centre, radius):
    axes = (np.arange(n) * s for n, s in zip(shape, spacing, strict=True))
    grid = np.meshgrid(*axes, indexing="ij", sparse=True)
    return (sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) < radius**2).astype(np.uint8)


def test_a_lesion_of_some_size_comes_back():
    """A ball of 26 mm radius through voxels of 1.66 x 1.31 x 5.9 mm: the rim is lost, the volume is not."""
    shape, spacing = (100, 360, 420), (2.5, 0.7, 0.7)
    lungs = np.zeros(shape, np.uint8)
    lungs[4:98, 30:330, 20:400] = 1
    crop = LungCrop.of(image_of(lungs, spacing[::-1]))
    lesion = image_of(ball(shape, spacing, (120, 130, 90), 26), spacing[::-1])
    back = crop.invert(crop.apply(lesion))
    assert dice(back, lesion) >= 0.94
    assert millilitres(back) == pytest.approx(millilitres(lesion), rel=0.01)


@pytest.mark.parametrize("code", ORIENTATIONS)
def test_back_to_the_file_it_came_from(tmp_path, code):
    rng = np.random.default_rng(1)
    hu = rng.normal(40, 15, (24, 40, 36)).astype(np.float32)
    hu[4:20, 8:34, 4:32] = -850
    file = sitk.DICOMOrient(image_of(hu, (1.5, 2.0, 4.0), (-31.25, 12.5, 400.0)), code)
    sitk.WriteImage(file, tmp_path / "scan.nii.gz")
    ct = read_ct(tmp_path / "scan.nii.gz")
    lungs = sitk.BinaryThreshold(ct, -1000, -400)
    crop = LungCrop.of(lungs)
    written = write_like(crop.invert(crop.apply(lungs)), ct, tmp_path / "mask.nii.gz")
    saved, scan = sitk.ReadImage(written), sitk.ReadImage(tmp_path / "scan.nii.gz")
    assert saved.GetSize() == scan.GetSize() and saved.GetPixelID() == sitk.sitkUInt8
    for get in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(saved, get)(), getattr(scan, get)(), atol=1e-5)
    np.testing.assert_array_equal(array_of(saved), array_of(scan) < -400)


def test_kept_as_json():
    lungs = image_of(np.ones((6, 7, 8), np.uint8), (0.7, 0.7, 5.0), (1.0, 2.0, 3.0))
    crop = LungCrop.of(lungs, (3, 4, 5))
    kept = LungCrop(**json.loads(json.dumps(asdict(crop))))
    prediction = np.random.default_rng(0).integers(0, 2, (3, 4, 5))
    assert dice(kept.invert(prediction), crop.invert(prediction)) == 1
    assert kept.apply(lungs).GetSpacing() == crop.apply(lungs).GetSpacing()


# ------------------------------------------------------------------------------------------ refusals


@pytest.fixture
def crop():
    return LungCrop.of(image_of(np.ones((6, 7, 8), np.uint8)), (3, 4, 5))


def test_a_mask_without_lungs():
    with pytest.raises(CTError, match="largest has 0 of 216 voxels"):
        LungCrop.of(image_of(np.zeros((6, 6, 6), np.uint8)))


@pytest.mark.parametrize("shape", [(5, 4, 3), (1, 3, 4, 5), (3, 4)])
def test_prediction_of_another_size(crop, shape):
    with pytest.raises(CTError, match=r"the crop is \(3, 4, 5\)"):
        crop.invert(np.zeros(shape, np.uint8))


def test_prediction_image_on_another_grid(crop):
    with pytest.raises(CTError, match="compared with the crop"):
        crop.invert(image_of(np.zeros((3, 4, 5), np.uint8), (9.0, 1.0, 1.0)))


@pytest.mark.parametrize("value", [0.3, -1, 256])
def test_probabilities_are_no_labels(crop, value):
    with pytest.raises(CTError, match="Threshold probabilities first"):
        crop.invert(np.full((3, 4, 5), value))


@pytest.mark.parametrize(
    "other",
    [image_of(np.ones((6, 7, 9), np.uint8)), image_of(np.ones((6, 7, 8), np.uint8), (1.0, 1.0, 2.0))],
    ids=["size", "spacing"],
)
def test_an_image_of_another_scan(crop, other):
    with pytest.raises(CTError, match="the image to crop"):
        crop.apply(other)


@pytest.mark.parametrize("number", [1, 5])
def test_real_lesions_keep_their_volume(data_dir, number):
    ct = read_ct(data_dir / "medseg2" / f"medseg2_{number}_ct.nii.gz")
    lungs, lesion = (
        read_mask(data_dir / "medseg2" / f"medseg2_{number}_{kind}.nii.gz", ct) for kind in ("lung", "lesion")
    )
    crop = LungCrop.of(lungs)
    back = crop.invert(crop.apply(lungs))
    assert millilitres(back) == pytest.approx(millilitres(lungs), rel=0.01)
    assert dice(back, lungs) > 0.97
    inside = sitk.Mask(lesion, lungs)
    assert millilitres(crop.invert(crop.apply(inside))) == pytest.approx(millilitres(inside), rel=0.01)
