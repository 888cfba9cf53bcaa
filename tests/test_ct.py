"""Scans and masks in and out: orientation, HU, and every kind of file that must be refused."""

import errno
import gzip
import itertools
import os
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from covidnb import ct
from covidnb.ct import CTError, read_ct, read_mask, window, write_like, write_series

ORIENTATIONS = [
    "".join(letters)
    for axes in itertools.permutations(["RL", "AP", "SI"])
    for letters in itertools.product(*axes)
]


def toy_scan(shape=(8, 20, 24), spacing=(0.8, 0.8, 2.5), origin=(-90.5, 12.25, -300.0), seed=0) -> sitk.Image:
    """A float32 box of tissue (40 HU) in air (-1000 HU) with noise; shape (z, y, x), spacing (x, y, z) mm."""
    hu = np.full(shape, -1000.0, np.float32)
    hu[:, shape[1] // 4 : -(shape[1] // 4), shape[2] // 4 : -(shape[2] // 4)] = 40
    hu += np.random.default_rng(seed).normal(0, 10, shape).astype(np.float32)
    image = sitk.GetImageFromArray(np.round(hu).clip(-1024))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    return image


def save(image: sitk.Image, path) -> str:
    sitk.WriteImage(image, str(path), useCompression=True)
    return str(path)


def geometry(image: sitk.Image) -> tuple:
    return image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection()


# ------------------------------------------------------------------------------------------ orientation


@settings(deadline=None, max_examples=48)
@given(
    code=st.sampled_from(ORIENTATIONS),
    shape=st.tuples(*[st.integers(4, 13)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 7.0)] * 3),
    origin=st.tuples(*[st.floats(-400, 400)] * 3),
    suffix=st.sampled_from([".nii.gz", ".nii", ".mha", ".nrrd"]),
)
def test_any_orientation_is_read_as_lps_and_written_back_to_its_own_grid(
    tmp_path_factory, code, shape, spacing, origin, suffix
):
    folder = tmp_path_factory.mktemp("scan")
    lps = toy_scan(shape, spacing, origin)
    stored = sitk.ReadImage(save(sitk.DICOMOrient(lps, code), folder / f"scan{suffix}"))

    image = read_ct(folder / f"scan{suffix}")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(lps))
    np.testing.assert_allclose(image.GetDirection(), np.eye(3).ravel(), atol=1e-5)
    assert image.GetPixelID() == sitk.sitkFloat32

    mask = (sitk.GetArrayFromImage(image) > -500).astype(np.uint8)
    path = write_like(mask, image, folder / f"mask{suffix}")
    written = sitk.ReadImage(str(path))
    if suffix == ".nrrd":  # stores spacing times direction, so the last digit depends on the product
        for got, expected in zip(geometry(written), geometry(stored), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
    else:
        assert geometry(written) == geometry(stored)  # to the last digit
    np.testing.assert_array_equal(sitk.GetArrayFromImage(written), sitk.GetArrayFromImage(stored) > -500)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_mask(path, image)), mask)


def test_all_48_orientations_are_tried():
    assert len(set(ORIENTATIONS)) == 48


def test_an_oblique_scan_keeps_its_angles(tmp_path):
    scan = toy_scan()
    turn = sitk.Euler3DTransform((0, 0, 0), 0.1, -0.2, 0.05)
    scan.SetDirection(turn.GetMatrix())
    save(sitk.DICOMOrient(scan, "RAI"), tmp_path / "oblique.mha")
    image = read_ct(tmp_path / "oblique.mha")
    np.testing.assert_allclose(image.GetDirection(), turn.GetMatrix(), atol=1e-12)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(scan))


def test_write_like_accepts_images_floats_and_booleans(tmp_path):
    image = read_ct(save(toy_scan(), tmp_path / "scan.nii.gz"))
    array = sitk.GetArrayFromImage(image)
    assert sitk.ReadImage(str(write_like(image, image, tmp_path / "a.mha"))).GetPixelID() == sitk.sitkFloat32
    assert (
        sitk.ReadImage(str(write_like(array > 0, image, tmp_path / "b.mha"))).GetPixelID() == sitk.sitkUInt8
    )
    assert (
        sitk.ReadImage(str(write_like(array.astype(int), image, tmp_path / "c.mha"))).GetPixelID()
        == sitk.sitkFloat32
    )


def test_write_like_refuses_another_shape_or_grid(tmp_path):
    image = read_ct(save(toy_scan(), tmp_path / "scan.nii.gz"))
    with pytest.raises(CTError, match="out.nii.gz.*invert the crop"):
        write_like(np.zeros((3, 4, 5), np.uint8), image, tmp_path / "out.nii.gz")
    moved = sitk.Image(image)
    moved.SetOrigin((0, 0, 0))
    with pytest.raises(CTError, match="mm off the scan's grid"):
        write_like(moved, image, tmp_path / "out.nii.gz")
    with pytest.raises(CTError, match="out.png"):
        write_like(image, image, tmp_path / "out.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scan.nii.gz"]


# ------------------------------------------------------------------------------------------------- masks


def test_a_mask_in_another_axis_order_lands_on_the_scans_grid(tmp_path):
    scan = toy_scan(spacing=(0.703125, 0.703125, 1.2345678))
    image = read_ct(save(sitk.DICOMOrient(scan, "RAS"), tmp_path / "scan.mha"))
    mask = sitk.DICOMOrient(sitk.Cast(scan > -500, sitk.sitkInt16), "ASL")
    mask.SetSpacing(np.round(mask.GetSpacing(), 4))  # as many tools do
    got = read_mask(save(mask, tmp_path / "mask.nii.gz"), image)
    assert geometry(got) == geometry(image) and got.GetPixelID() == sitk.sitkUInt8
    np.testing.assert_array_equal(sitk.GetArrayFromImage(got), sitk.GetArrayFromImage(scan) > -500)


def test_masks_that_do_not_fit_are_refused(tmp_path):
    scan = toy_scan()
    image = read_ct(save(scan, tmp_path / "scan.nii.gz"))
    mask = sitk.Cast(scan > -500, sitk.sitkUInt8)
    with pytest.raises(CTError, match="small.nii.gz.*voxels"):
        read_mask(save(mask[1:], tmp_path / "small.nii.gz"), image)
    for change, name in [
        (lambda m: m.SetOrigin((0, 0, 0)), "origin.mha"),
        (lambda m: m.SetSpacing((0.8, 0.8, 2.6)), "spacing.mha"),
    ]:
        moved = sitk.Image(mask)
        change(moved)
        with pytest.raises(CTError, match=f"{name}.*mm off"):
            read_mask(save(moved, tmp_path / name), image)
    with pytest.raises(CTError, match="soft.mha.*whole numbers"):
        read_mask(save(sitk.Cast(mask, sitk.sitkFloat32) * 0.5, tmp_path / "soft.mha"), image)
    with pytest.raises(CTError, match="scan.nii.gz.*whole numbers"):
        read_mask(tmp_path / "scan.nii.gz", image)


# ------------------------------------------------------------------------------------------------- DICOM


@settings(deadline=None, max_examples=15)
@given(
    shape=st.tuples(*[st.integers(4, 13)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 7.0)] * 3),
    origin=st.tuples(*[st.floats(-400, 400)] * 3),
    angles=st.tuples(*[st.floats(-0.3, 0.3)] * 3),
    shuffle=st.randoms(use_true_random=False),
)
def test_a_dicom_series_is_read_in_hu_whatever_its_file_names(
    tmp_path_factory, shape, spacing, origin, angles, shuffle
):
    scan = toy_scan(shape, spacing, origin)
    scan.SetDirection(sitk.Euler3DTransform((0, 0, 0), *angles).GetMatrix())
    folder = write_series(scan, tmp_path_factory.mktemp("scan") / "dicom")
    files = sorted(folder.iterdir())
    numbers = list(range(len(files)))
    shuffle.shuffle(numbers)
    for old, number in zip(files, numbers, strict=True):
        old.rename(folder / f"{number}.dcm")
    image = read_ct(folder)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(scan))
    for got, expected in zip(geometry(image), geometry(scan), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_series_is_not_written_over_another_nor_with_hu_that_do_not_fit(tmp_path):
    with pytest.raises(CTError, match="exists"):
        write_series(toy_scan(), tmp_path)
    with pytest.raises(CTError, match="low: HU from -2.* do not fit"):
        write_series(toy_scan() - 1200, tmp_path / "low")
    assert not list(tmp_path.iterdir())


def test_two_series_are_listed_and_one_can_be_chosen(tmp_path):
    write_series(toy_scan(seed=1), tmp_path / "d", uid="2.25.101", name="lung 1.25")
    write_series(toy_scan((5, 20, 24), seed=2), tmp_path / "e", uid="2.25.102", name="soft 5.0")
    for path in (tmp_path / "e").iterdir():
        path.rename(tmp_path / "d" / f"e_{path.name}")
    with pytest.raises(
        CTError, match=r"(?s)which DICOM series.*25\.101: 8 slices, lung.*25\.102: 5 slices, soft"
    ):
        read_ct(tmp_path / "d")
    assert read_ct(tmp_path / "d", series="2.25.102").GetDepth() == 5
    with pytest.raises(CTError, match="which DICOM series"):
        read_ct(tmp_path / "d", series="9.9")


def test_a_missing_slice_is_named_by_its_position(tmp_path):
    write_series(toy_scan(), tmp_path / "d")
    sorted((tmp_path / "d").iterdir())[3].unlink()
    with pytest.raises(CTError, match=r"d: a slice is missing between -295.0 and -290.0 mm"):
        read_ct(tmp_path / "d")


def test_doubled_slices_tilted_gantry_and_damaged_slices_are_refused(tmp_path):
    write_series(toy_scan(), tmp_path / "tilted")
    for k, path in enumerate(sorted((tmp_path / "tilted").iterdir())):
        data = path.read_bytes()
        assert (
            data.count(b"\\12.25\\") == 1
        )  # y of the position; moved by 0.4 mm a slice, in as many characters
        path.write_bytes(data.replace(b"\\12.25\\", b"\\%05.2f\\" % (12.25 + 0.4 * k)))
    with pytest.raises(CTError, match="tilted gantry.*0.4 mm"):
        read_ct(tmp_path / "tilted")
    write_series(toy_scan(), tmp_path / "double")
    first = sorted((tmp_path / "double").iterdir())[0]
    shutil.copy(first, first.with_name("again.dcm"))
    with pytest.raises(CTError, match="slices too close, at -300.0 and -300.0 mm"):
        read_ct(tmp_path / "double")
    for path in sorted((tmp_path / "double").iterdir()):
        shutil.copy(path, path.with_name(f"copy_{path.name}"))
    with pytest.raises(CTError, match="most slices lie in the same place"):
        read_ct(tmp_path / "double")
    write_series(toy_scan(), tmp_path / "cut")
    last = sorted((tmp_path / "cut").iterdir())[-1]
    data = last.read_bytes()
    for missing in (1, 300, 962, 970, 1600):  # in the pixels, in their length, before them, in the header
        last.write_bytes(data[:-missing])
        with pytest.raises(CTError, match=f"{last.name}: this DICOM file is cut short"):
            read_ct(tmp_path / "cut")
    write_series(toy_scan()[:, :, :1], tmp_path / "one")
    with pytest.raises(CTError, match="2-D"):
        read_ct(tmp_path / "one")


def test_a_folder_without_dicom_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no scan here")
    with pytest.raises(CTError, match="no DICOM slices"):
        read_ct(tmp_path)
    with pytest.raises(CTError, match="series="):
        read_ct(save(toy_scan(), tmp_path / "scan.mha"), series="1.2.3")


# --------------------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize("suffix", ct.READABLE)
@pytest.mark.parametrize("reader", [read_ct, lambda path: read_mask(path, toy_scan())])
def test_missing_empty_foreign_and_truncated_files_are_one_clear_error(tmp_path, suffix, reader):
    path = tmp_path / f"scan{suffix}"
    with pytest.raises(CTError, match=f"scan{suffix}: no such file"):
        reader(path)
    path.write_bytes(b"")
    with pytest.raises(CTError, match=f"scan{suffix}: the file is empty"):
        reader(path)
    path.write_bytes(b"<html>404 not found</html>" * 40)
    with pytest.raises(CTError, match=f"scan{suffix}: cannot be read"):
        reader(path)
    sitk.WriteImage(sitk.Cast(toy_scan(), sitk.sitkInt16), str(path), useCompression=suffix == ".nii.gz")
    data = path.with_suffix(".raw") if suffix in (".mhd", ".nhdr") else path
    data.write_bytes(data.read_bytes()[: -data.stat().st_size // 3])
    with pytest.raises(CTError, match=f"scan{suffix}: (cut short|cannot be read)"):
        reader(path)


def test_a_damaged_gzip_stream_is_noticed(tmp_path):
    path = tmp_path / "scan.nii.gz"
    save(toy_scan(), path)
    raw = bytearray(gzip.compress(gzip.decompress(path.read_bytes()), 0))
    raw[-500] ^= 0xFF  # uncompressed blocks: still a valid stream, only the checksum can tell
    path.write_bytes(bytes(raw))
    with pytest.raises(CTError, match="damaged"):
        read_ct(path)


def test_pictures_folders_and_wrong_dimensions_are_refused(tmp_path):
    sitk.WriteImage(sitk.Image(8, 8, sitk.sitkUInt8), str(tmp_path / "slice.png"))
    with pytest.raises(CTError, match="slice.png: not a volume file"):
        read_ct(tmp_path / "slice.png")
    with pytest.raises(CTError, match="a folder"):
        read_mask(tmp_path, toy_scan())
    hu = sitk.GetArrayFromImage(toy_scan())
    for name, array in [("4d.nii.gz", np.stack([hu, hu])), ("flat.nii.gz", hu[0]), ("one.mha", hu[:1])]:
        save(sitk.GetImageFromArray(array, isVector=False), tmp_path / name)
        with pytest.raises(CTError, match=rf"{name}: (a 2-D|4-D)"):
            read_ct(tmp_path / name)
    save(sitk.GetImageFromArray(np.stack([hu] * 3, -1), isVector=True), tmp_path / "rgb.mha")
    with pytest.raises(CTError, match="rgb.mha: 3 values per voxel"):
        read_ct(tmp_path / "rgb.mha")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_infinite_and_constant_volumes_are_refused(tmp_path, bad):
    hu = sitk.GetArrayFromImage(toy_scan())
    hu[1, 2, 3] = bad
    with pytest.raises(CTError, match="bad.mha: holds NaN or infinite"):
        read_ct(save(sitk.GetImageFromArray(hu), tmp_path / "bad.mha"))
    with pytest.raises(CTError, match="flat.mha: every voxel is -1000"):
        read_ct(save(sitk.GetImageFromArray(np.full_like(hu, -1000)), tmp_path / "flat.mha"))


# ------------------------------------------------------------------------------------------------ HU or not


def not_hu(kind: str) -> np.ndarray:
    hu = sitk.GetArrayFromImage(toy_scan())
    shown = window(hu, *ct.WINDOWS["lung"])
    return {
        "8-bit": np.round(shown * 255).astype(np.uint8),
        "8-bit in float": np.round(shown * 255),
        "unit": shown,
        "signed unit": shown * 2 - 1,
        "z-score": (hu - hu.mean()) / hu.std(),
        "no intercept": (hu + 1024).astype(np.int16),
        "stretched": shown * 2048 - 1024,
        "thousandths": hu / 1000,
    }[kind]


KINDS = [
    "8-bit",
    "8-bit in float",
    "unit",
    "signed unit",
    "z-score",
    "no intercept",
    "stretched",
    "thousandths",
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_hu_is_refused_with_the_reason(tmp_path, kind):
    path = save(sitk.GetImageFromArray(not_hu(kind)), tmp_path / "x.nii.gz")
    with pytest.raises(
        CTError, match="x.nii.gz: not in Hounsfield units.*air is -1000 and water 0.*stored_window="
    ):
        read_ct(path)


@pytest.mark.parametrize("kind", KINDS[:4])
def test_a_stated_window_brings_hu_back_to_half_a_grey_level(tmp_path, kind):
    path = save(sitk.GetImageFromArray(not_hu(kind)), tmp_path / "x.nii.gz")
    low, high = ct.WINDOWS["lung"]
    got = sitk.GetArrayFromImage(read_ct(path, stored_window=(low, high)))
    truth = sitk.GetArrayFromImage(toy_scan())
    assert np.abs(got - truth).max() <= 0.5 * (high - low) / 255 + 1e-3


def test_a_window_for_a_file_in_hu_is_refused(tmp_path):
    path = save(toy_scan(), tmp_path / "x.nii.gz")
    with pytest.raises(CTError, match="leave stored_window out"):
        read_ct(path, stored_window=(-1250, 250))
    with pytest.raises(CTError, match="low below high"):
        read_ct(path, stored_window=(250, -1250))


def test_padding_and_metal_do_not_fool_the_check(tmp_path):
    hu = sitk.GetArrayFromImage(toy_scan((8, 40, 40)))
    hu[:, :, :20] = -2048
    hu[2, 20, 20] = 15000
    assert (
        sitk.GetArrayFromImage(read_ct(save(sitk.GetImageFromArray(hu), tmp_path / "x.mha"))).min() == -2048
    )


def test_window_is_linear_and_clips():
    got = window(np.array([-2000, -1250, -500, 250, 3000]), -1250, 250)
    np.testing.assert_allclose(got, [0, 0, 0.5, 1, 1])
    assert got.dtype == np.float32 and window(toy_scan(), -1250, 250).shape == (8, 20, 24)
    with pytest.raises(ValueError, match="low must be below high"):
        window(got, 250, -1250)


# ---------------------------------------------------------------------------------------------- full disk


def test_a_full_disk_leaves_no_half_a_series(tmp_path, monkeypatch):
    def full(writer, image):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(sitk.ImageFileWriter, "Execute", full)
    with pytest.raises(OSError, match="series: could not be written"):
        write_series(toy_scan(), tmp_path / "series")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    image = read_ct(save(toy_scan(), tmp_path / "scan.nii.gz"))
    write_like(image, image, tmp_path / "old.nii.gz")
    before = (tmp_path / "old.nii.gz").read_bytes()
    write = sitk.WriteImage

    def full(out, name, **options):
        write(out, name, **options)
        os.truncate(name, 500)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sitk, "WriteImage", full)
    for name in ("old.nii.gz", "new.nii.gz", "new.mha"):
        with pytest.raises(OSError, match=rf"no room to write .*{name}"):
            write_like(image, image, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old.nii.gz", "scan.nii.gz"]
    assert (tmp_path / "old.nii.gz").read_bytes() == before


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_nifti_that_itk_cut_short_without_a_word_is_noticed(tmp_path, monkeypatch, suffix):
    """ITK's NIfTI writer prints to stderr and succeeds when the disk fills up."""
    image = read_ct(save(toy_scan(), tmp_path / "scan.nii.gz"))
    write = sitk.WriteImage

    def silent(out, name, **options):
        write(out, name, **options)
        os.truncate(name, os.path.getsize(name) // 2)

    monkeypatch.setattr(sitk, "WriteImage", silent)
    with pytest.raises(OSError, match="could not be written"):
        write_like(image, image, tmp_path / f"mask{suffix}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scan.nii.gz"]


# ---------------------------------------------------------------------------------------------- real scans


def test_real_scans_in_hu_are_accepted_and_8_bit_ones_refused(data_dir):
    in_hu = sorted(data_dir.glob("medseg2/*_ct.nii.gz")) + sorted(data_dir.glob("uiip/*_ct.nii.gz"))
    assert in_hu
    for path in in_hu:
        image = read_ct(path)
        read_mask(str(path).replace("_ct", "_lung"), image)
    eight_bit = sorted(data_dir.glob("coronacases8/*_ct.nii.gz"))
    assert eight_bit
    for path in eight_bit:
        with pytest.raises(CTError, match="8-bit picture"):
            read_ct(path)
    image = read_ct(eight_bit[0], stored_window=(-1250, 250))
    assert np.ptp(sitk.GetArrayViewFromImage(image)) == 1500


@pytest.mark.network
def test_the_registry_ct_with_padding_is_accepted_and_its_heart_lies_left():
    from covidnb import catalog

    folder = catalog.fetch("chest-ct", quiet=True)
    image = read_ct(folder / "cxr.nii.gz")  # stored with y flipped
    assert sitk.GetArrayViewFromImage(image).min() == -2048
    labels = sitk.GetArrayFromImage(read_mask(folder / "mask.nii.gz", image))
    left_lobes, right_lobes = np.isin(labels, [10, 11]), np.isin(labels, [12, 13, 14])
    assert np.nonzero(left_lobes)[2].mean() > np.nonzero(right_lobes)[2].mean() + 100  # x grows to the left
