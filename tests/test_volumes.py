"""Volumes: folders of scans in, crops out and back, whatever a scan does; loading and augmentation."""

import errno
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from covidnb import phantom
from covidnb.catalog import CatalogError, load_splits
from covidnb.crop import LungCrop
from covidnb.ct import CTError, read_ct, write_like
from covidnb.lungs import segment_lungs
from covidnb.volumes import (
    SPLITS,
    LungVolumes,
    ScanFiles,
    VolumeError,
    chests,
    crop_of,
    list_scans,
    list_volumes,
    read_scan,
    read_volume,
    record_of,
    scan_of,
    volumes_root,
    write_split,
)
from covidnb.volumes import phantom as phantom_volumes
from covidnb.volumes.__main__ import main
from covidnb.volumes.augment import RandPerspective, augmented
from covidnb.volumes.prepare import outcomes, prepare

SIZE = (12, 32, 32)


@pytest.fixture(scope="session")
def patient():
    return phantom.chest(3, shape=(20, 72, 72), severity=0.2)


@pytest.fixture
def scans(patient, tmp_path):
    """Two scans of one patient in GASNet's folders; the second feet first and without masks."""
    folder = tmp_path / "scans"
    for kind, image in (("images", patient.ct), ("lung", patient.lungs), ("lesion", patient.lesions)):
        (folder / kind).mkdir(parents=True)
        sitk.WriteImage(image, folder / kind / "p2.nii.gz")
    sitk.WriteImage(sitk.DICOMOrient(patient.ct, "RAI"), folder / "images" / "p10.mha")
    return folder


def image_of(root, name, kind="images"):
    return sitk.GetArrayFromImage(sitk.ReadImage(root / kind / f"{name}.nii.gz"))


def test_scans_are_found_in_three_layouts(scans, tmp_path):
    first, second = list_scans(scans)
    assert (first.name, second.name) == ("p2", "p10")
    assert first.lesions.name == "p2.nii.gz" and second.lungs is second.lesions is None
    flat, plain = tmp_path / "flat", tmp_path / "plain"
    for name in ("flat/a_ct.nii.gz", "flat/a_lung.nii.gz", "flat/b_ct.nrrd", "flat/notes.txt", "plain/c.nii"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (plain / "dicom").mkdir()
    assert list_scans(flat) == [
        ScanFiles("a", flat / "a_ct.nii.gz", flat / "a_lung.nii.gz"),
        ScanFiles("b", flat / "b_ct.nrrd"),
    ]
    assert [scan.name for scan in list_scans(plain)] == ["c", "dicom"]


def test_odd_folders_are_refused(scans, tmp_path):
    (scans / "lesion" / "p2.nii.gz").rename(scans / "lesion" / "p3.nii.gz")
    with pytest.raises(VolumeError, match=r"p3.nii.gz belongs to no scan"):
        list_scans(scans)
    (scans / "images" / "p2.nrrd").touch()
    with pytest.raises(VolumeError, match="p2.nrrd and p2.nii.gz carry the same name"):
        list_scans(scans)
    (tmp_path / "empty").mkdir()
    for folder, complaint in (("empty", "holds no scan"), ("nowhere", "not a folder")):
        with pytest.raises(VolumeError, match=complaint):
            list_scans(tmp_path / folder)
    with pytest.raises(VolumeError, match="holds no volume"):
        volumes_root(tmp_path / "empty")


def test_volumes_are_the_lungs_of_the_scans(scans, patient, tmp_path):
    root = tmp_path / "volumes"
    assert prepare(scans, root, size=SIZE) == (["p2", "p10"], [], {})
    crop = LungCrop.of(patient.lungs, SIZE)
    expected = sitk.GetArrayFromImage(crop.apply(patient.ct))
    np.testing.assert_allclose(image_of(root, "p2"), expected, atol=0.51)  # whole HU
    np.testing.assert_array_equal(
        image_of(root, "p2", "lung"), sitk.GetArrayFromImage(crop.apply(patient.lungs))
    )
    lesions = sitk.GetArrayFromImage(crop.apply(patient.lesions))
    assert lesions.max() == 2, "classes are kept"
    np.testing.assert_array_equal(image_of(root, "p2", "lesion"), lesions)
    # the other was turned by its header, and its lungs were segmented
    own = LungCrop.of(segment_lungs(read_ct(scans / "images" / "p10.mha")), SIZE)
    assert crop_of(root, "p10").start == own.start and not (root / "lesion" / "p10.nii.gz").exists()
    overlap = image_of(root, "p10", "lung") > 0, image_of(root, "p2", "lung") > 0
    assert 2 * (overlap[0] & overlap[1]).sum() / (overlap[0].sum() + overlap[1].sum()) > 0.85
    assert np.corrcoef(image_of(root, "p10").ravel(), expected.ravel())[0, 1] > 0.9


def test_a_volume_leads_back_to_its_scan(scans, patient, tmp_path):
    root = tmp_path / "volumes"
    prepare(scans, root, size=SIZE)
    crop, scan = crop_of(root, "p2"), scan_of(root, "p2")
    assert crop == LungCrop.of(scan.lungs, SIZE)
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(scan.lesions), sitk.GetArrayFromImage(patient.lesions)
    )
    assert np.array_equal(sitk.GetArrayFromImage(scan.ct), sitk.GetArrayFromImage(patient.ct))
    back = crop.invert(image_of(root, "p2", "lung"))
    path = write_like(back, scan.ct, tmp_path / "back.nii.gz")
    assert sitk.ReadImage(path).GetSize() == sitk.ReadImage(scans / "images" / "p2.nii.gz").GetSize()
    inside = sitk.GetArrayFromImage(back) > 0, sitk.GetArrayFromImage(patient.lungs) > 0
    assert 2 * (inside[0] & inside[1]).sum() / (inside[0].sum() + inside[1].sum()) > 0.85
    with pytest.raises(VolumeError, match="'p3'"):
        crop_of(root, "p3")
    (scans / "images" / "p10.mha").unlink()
    with pytest.raises(CTError, match=r"p10.mha"):
        scan_of(root, "p10")


def test_preparing_goes_on_where_it_stopped(scans, tmp_path, monkeypatch):
    root = tmp_path / "volumes"
    prepare(scans, root, size=SIZE)
    with monkeypatch.context() as patch:
        patch.setattr("covidnb.volumes.prepare.read_scan", lambda *a: pytest.fail("prepared twice"))
        assert prepare(scans, root, size=SIZE) == ([], ["p2", "p10"], {})
    (root / "lesion" / "p2.nii.gz").unlink()
    os.utime(scans / "images" / "p10.mha", (0, 0))
    assert prepare(scans, root, size=SIZE) == (["p2", "p10"], [], {})
    (scans / "lesion" / "p2.nii.gz").unlink()
    assert prepare(scans, root, size=SIZE).done == ["p2"] and not (root / "lesion" / "p2.nii.gz").exists()
    assert prepare(scans, root, size=(12, 40, 40)).done == ["p2", "p10"]
    assert image_of(root, "p2").shape == (12, 40, 40)


def test_an_interrupted_volume_is_not_there(scans, tmp_path, monkeypatch):
    root = tmp_path / "volumes"

    def full(*arguments):
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("covidnb.volumes.whole", full)  # the record, which comes last
        assert set(prepare(scans, root, size=SIZE).failed.values()) == {"no room"}
    assert record_of(root, "p2") is None
    assert prepare(scans, root, size=SIZE).done == ["p2", "p10"]


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_bad_scan_does_not_stop_the_others(scans, tmp_path, jobs):
    root = tmp_path / "volumes"
    sitk.WriteImage(sitk.Image(30, 30, 30, sitk.sitkUInt8), scans / "images" / "blank.nii.gz")
    whole = (scans / "images" / "p2.nii.gz").read_bytes()
    (scans / "images" / "half.nii.gz").write_bytes(whole[: len(whole) // 2])
    result = prepare(scans, root, size=SIZE, jobs=jobs)
    assert sorted(result.done) == ["p10", "p2"] and sorted(result.failed) == ["blank", "half"]
    assert "every voxel is 0" in result.failed["blank"] and "half.nii.gz" in result.failed["half"]
    assert json.loads((root / "failed.json").read_text()) == result.failed
    for name in ("blank", "half"):
        (scans / "images" / f"{name}.nii.gz").unlink()
    assert sorted(prepare(scans, root, size=SIZE).kept) == ["p10", "p2"]
    assert not (root / "failed.json").exists()


@pytest.mark.slow
def test_a_process_that_dies_takes_no_other_task_with_it():
    found = dict(outcomes(signal.raise_signal, {"deadly": signal.SIGKILL, "well": signal.SIGCONT}, jobs=2))
    assert "memory" in found["deadly"] and found["well"] is None


def test_what_nobody_thought_of_is_a_reason_too():
    assert dict(outcomes({}.__getitem__, {"odd": "key"}, jobs=1)) == {"odd": "KeyError: 'key'"}


def test_scans_are_never_written_over(scans):
    before = (scans / "images" / "p2.nii.gz").read_bytes()
    with pytest.raises(VolumeError, match="give another folder"):
        prepare(scans, scans, size=SIZE)
    assert (scans / "images" / "p2.nii.gz").read_bytes() == before


def test_command_line(scans, tmp_path, capsys):
    arguments = [str(scans), str(tmp_path / "out"), "--size", "12", "32", "32"]
    assert main(arguments) == 0
    assert "2 prepared, 0 there already, 0 failed" in capsys.readouterr().out
    (scans / "images" / "empty.nii").touch()
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert "0 prepared, 2 there already, 1 failed" in out and "empty.nii: the file is empty" in out
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_and_started_again(scans, tmp_path):
    """Killed while it works, by several processes: what is there is whole, and the rest follows."""
    for n in range(6):
        (scans / "images" / f"copy{n}.mha").write_bytes((scans / "images" / "p10.mha").read_bytes())
    root = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "covidnb.volumes",
        scans,
        root,
        "--size",
        "12",
        "32",
        "32",
        "--jobs",
        "2",
    ]
    first = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    while len(list((root / "crop").glob("[!.]*.json")) if root.exists() else ()) < 2:
        assert first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    there = [path.stem for path in (root / "crop").glob("[!.]*.json")]
    assert 2 <= len(there) < 8
    result = prepare(scans, root, size=SIZE)
    assert sorted(result.kept) == sorted(there) and len(result.done) == 8 - len(there)
    assert len(list_volumes(root)) == 8


# --- loading


@pytest.fixture(scope="session")
def root(patient, tmp_path_factory):
    """A folder of three volumes, 12 x 32 x 32, one of them healthy."""
    folder = tmp_path_factory.mktemp("scans")
    for n, chest in enumerate((patient, phantom.chest(5, shape=(20, 72, 72), severity=0.1)), 1):
        for kind, image in (("ct", chest.ct), ("lung", chest.lungs), ("lesion", chest.lesions)):
            sitk.WriteImage(image, folder / f"v{n}_{kind}.nii.gz")
    healthy = phantom.chest(6, kind="healthy", shape=(20, 72, 72))
    sitk.WriteImage(healthy.ct, folder / "v3_ct.nii.gz")
    root = folder / "volumes"
    prepare(folder, root, size=SIZE)
    write_split(root, "healthy", ["v3"])
    write_split(root, "covid", ["v2", "v1"])
    return root


def test_splits(root):
    assert [v.name for v in list_volumes(root)] == ["v1", "v2", "v3"]
    assert [v.name for v in list_volumes(root, "covid")] == ["v2", "v1"]
    assert list_volumes(root, "healthy")[0].lesions is None
    with pytest.raises(VolumeError, match="validation.txt.*covid, healthy"):
        list_volumes(root, "validation")
    write_split(root, "odd", ["v9"])
    with pytest.raises(VolumeError, match="lacks v9, which splits/odd.txt names"):
        list_volumes(root, "odd")
    (root / "splits" / "odd.txt").unlink()


def test_items(root):
    files = list_volumes(root, "covid")
    item = LungVolumes(files, lesions=True)[1]
    hu, masks = read_volume(files[1], lesions=True)
    assert item["name"] == "v1" and item["image"].shape == item["lungs"].shape == (1, *SIZE)
    np.testing.assert_allclose(item["image"][0], (hu + 500) / 750, atol=1e-6)
    np.testing.assert_array_equal(item["lesions"][0], masks[1])
    np.testing.assert_array_equal(item["lungs"][0], image_of(root, "v1", "lung"))
    assert {item[key].dtype for key in ("image", "lungs", "lesions")} == {torch.float32}
    assert set(LungVolumes(files)[0]) == {"image", "lungs", "name"}, "volume labels alone"
    with pytest.raises(VolumeError, match=r"v3.nii.gz has no lesion mask"):
        LungVolumes(list_volumes(root), lesions=True)
    with pytest.raises(VolumeError, match="empty"):
        LungVolumes([])


def test_depth_crops_are_random_and_hold_together(root):
    volumes = LungVolumes(list_volumes(root, "covid"), lesions=True, depth=8)
    whole = LungVolumes(volumes.files, lesions=True)[0]
    starts = set()
    for epoch in range(30):
        volumes.set_epoch(epoch)
        item = volumes[0]
        start = next(k for k in range(5) if torch.equal(item["image"], whole["image"][:, k : k + 8]))
        assert torch.equal(item["lesions"], whole["lesions"][:, start : start + 8])
        starts.add(start)
    assert starts == {0, 1, 2, 3, 4}
    with pytest.raises(VolumeError, match="has 12 slices: 13"):
        LungVolumes(volumes.files, depth=13)[0]


def test_volumes_of_two_sizes_are_refused(root, scans, tmp_path):
    other = tmp_path / "other"
    prepare(scans, other, size=(12, 40, 40))
    volumes = LungVolumes([*list_volumes(root), *list_volumes(other)])
    assert volumes[2]["image"].shape == (1, *SIZE)
    with pytest.raises(VolumeError, match=r"p2.nii.gz is \(12, 40, 40\).*\(12, 32, 32\)"):
        volumes[3]


def test_augmentation_depends_on_seed_epoch_and_index_alone(root):
    def load(seed=7):
        return LungVolumes(list_volumes(root), depth=8, augment=True, seed=seed)

    first, second = load(), load()
    first.set_epoch(3), second.set_epoch(3)
    ahead = first[1]
    for index in (0, 2, 1):  # another order of access
        again = second[index]
    assert torch.equal(ahead["image"], again["image"]) and torch.equal(ahead["lungs"], again["lungs"])
    assert type(ahead["image"]) is type(ahead["lungs"]) is torch.Tensor
    second.set_epoch(4)
    assert not torch.equal(ahead["image"], second[1]["image"])
    other = load(seed=8)
    other.set_epoch(3)
    assert not torch.equal(ahead["image"], other[1]["image"])


@pytest.fixture(scope="module")
def ellipsoid():
    """A bright ellipsoid off the centre, as image and mask, (1, 8, 160, 160)."""
    z, y, x = np.ogrid[:8, :160, :160]
    inside = ((z - 3.5) / 5) ** 2 + ((y - 70) / 45) ** 2 + ((x - 55) / 30) ** 2 < 1
    return torch.from_numpy(inside).float()[None]


def test_image_and_masks_move_together(ellipsoid):
    image = 0.1 + 0.8 * ellipsoid
    masks = torch.cat([ellipsoid, 1 - ellipsoid])
    for seed in range(25):
        moved, both = augmented(image, masks, seed)
        assert set(both.unique().tolist()) == {0, 1}
        agree = ((moved > 0.5).float() == both[:1]).float().mean()
        assert agree > 0.999
        assert (both.sum(0) == 1).float().mean() > 0.999
        assert moved.min() >= 0 and moved.max() <= 1


def test_strength_is_the_papers(ellipsoid):
    """Half are flipped, all have noise, a fifth each is enlarged and turned, warped, tilted, blurred."""
    image = 0.1 + 0.8 * ellipsoid
    flipped, moved, area, shift = [], [], [], []
    for seed in range(200):
        out, mask = augmented(image, ellipsoid, seed)
        x = torch.nonzero(mask[0, 4]).float().mean(0)
        flipped.append(bool(x[1] > 80))
        kept = ellipsoid.flip(-1) if flipped[-1] else ellipsoid
        moved.append(not torch.equal(mask, kept))
        area.append((mask.sum() / ellipsoid.sum()).item())
        shift.append((x - torch.nonzero(kept[0, 4]).float().mean(0)).abs().max().item())
        quiet = out[0, :, :20, :20] - 0.1
        assert quiet.abs().max() <= 0.0051 and quiet.std() > 0.002
    assert 0.4 < np.mean(flipped) < 0.6
    assert 0.35 < np.mean(moved) < 0.6, "1 - .8^3 = .49 are warped one way or another"
    assert min(area) > 0.97 and 1.05 < max(area) < 1.25, "nothing shrinks; at most 5 % and the perspective"
    assert 1 < max(shift) < 12, "pixels"


def test_perspective_takes_the_corners_inwards():
    y, x = torch.meshgrid(torch.arange(100.0), torch.arange(80.0), indexing="ij")
    coordinates = torch.stack([(x + 0.5) / 80, (y + 0.5) / 100])
    warp = RandPerspective(scale=(0.03, 0.03), prob=1.0)
    warp.set_random_state(seed=1)
    u, v = warp(coordinates)
    corners = [(0, 0), (0, -1), (-1, 0), (-1, -1)]
    for row, column in corners:
        for out, straight in ((u, coordinates[0]), (v, coordinates[1])):
            inwards = (0.5 - straight[row, column]).sign() * (out - straight)[row, column]
            assert 0 <= inwards < 0.12
    assert not torch.allclose(u, coordinates[0], atol=0.005)
    # straight lines stay straight
    middle = torch.stack([u[50], v[50]]).double().numpy()
    line = np.polynomial.Polynomial.fit(middle[0], middle[1], 1)
    assert np.abs(line(middle[0]) - middle[1]).max() < 1e-3
    nothing = RandPerspective(scale=(0.03, 0.03), prob=0.0)
    assert nothing(coordinates) is coordinates


# --- the phantom


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Few phantom patients, in an empty cache."""
    monkeypatch.setenv("COVIDNB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(phantom_volumes, "COUNTS", {"labelled": 1, "covid": 1, "healthy": 1, "validation": 1})
    return tmp_path / "cache"


def test_phantom_volumes(small, monkeypatch):
    root = volumes_root("phantom", SIZE)
    assert [path.name for path in small.iterdir()] == [root.name]
    assert {path.stem for path in (root / "splits").iterdir()} == set(SPLITS)
    labelled, covid, healthy = (list_volumes(root, split)[0] for split in ("labelled", "covid", "healthy"))
    assert healthy.lesions is None and covid.lesions is not None
    item = LungVolumes([labelled], lesions=True)[0]
    share = item["lesions"].sum() / item["lungs"].sum()
    assert item["image"].shape == (1, *SIZE) and 0.02 < share < 0.4
    crop, scan = crop_of(root, covid.name), scan_of(root, covid.name)
    again = sitk.GetArrayFromImage(crop.apply(scan.lesions))
    np.testing.assert_array_equal(image_of(root, covid.name, "lesion"), again)
    assert scan_of(root, healthy.name).lesions is None
    with monkeypatch.context() as patch:
        patch.setattr(phantom_volumes, "_draw_all", lambda *a: pytest.fail("drawn twice"))
        assert volumes_root("phantom", SIZE) == root
    before = (root / "images" / f"{covid.name}.nii.gz").read_bytes()
    more = phantom_volumes.phantom_volumes(SIZE, labelled=2, healthy=0, validation=0)
    assert more != root and len(list_volumes(more, "labelled")) == 2
    assert (more / "images" / f"{covid.name}.nii.gz").read_bytes() == before
    one = dict.fromkeys(SPLITS, 0) | {"covid": 1}
    (other,) = list_volumes(phantom_volumes.phantom_volumes(SIZE, seed=1, **one))
    assert other.image.read_bytes() != before
    with pytest.raises(VolumeError, match="'sick'.*covid"):
        phantom_volumes.phantom_volumes(SIZE, sick=3)


def test_interrupted_phantom_leaves_nothing(small, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(phantom_volumes, "write_volume", full)
    with pytest.raises(CatalogError, match="no space left for the drawn volumes"):
        volumes_root("phantom", SIZE)
    assert list(small.iterdir()) == []


# --- real chests with lesions grown in them


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory) -> dict:
    """Small phantoms in the place of the real chests, in the layout of their data sets."""
    root = tmp_path_factory.mktemp("chests")
    for name in ("chest-ct", "uiip", "medseg2"):
        (root / name).mkdir()
    for number in range(5):
        chest = phantom.chest(number, kind="healthy", shape=(20, 72, 72))
        if number == 0:
            lobes = 11 * chest.lungs  # an anatomical mask, whose label 9 is no lung
            lobes[:5, :5, :5] = 9
            files = {"chest-ct/cxr.nii.gz": chest.ct, "chest-ct/mask.nii.gz": lobes}
        else:
            files = {
                f"uiip/uiip_{number}_ct.nii.gz": chest.ct,
                f"uiip/uiip_{number}_lung.nii.gz": chest.lungs,
            }
        for name, image in files.items():
            sitk.WriteImage(image, root / name)
    for number in (1, 2, 5, 6, 7):
        chest = phantom.chest(10 + number, shape=(20, 72, 72), severity=0.1)
        for kind, image in (("ct", chest.ct), ("lung", chest.lungs), ("lesion", chest.lesions)):
            sitk.WriteImage(image, root / f"medseg2/medseg2_{number}_{kind}.nii.gz")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def in_chests(stand_ins, tmp_path, monkeypatch):
    monkeypatch.setenv("COVIDNB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(chests.catalog, "fetch", lambda name: stand_ins[name])
    chests._chest.cache_clear()
    yield
    chests._chest.cache_clear()


def drawn_from(root, split) -> list[str]:
    return [record_of(root, f.name)["made_from"]["chest"]["name"] for f in list_volumes(root, split)]


def test_implants_hold_out_an_anatomy(in_chests, monkeypatch):
    monkeypatch.setattr(chests, "COPIES", 1)
    monkeypatch.setattr(chests, "HELD_OUT", 2)
    root = volumes_root("implants", SIZE, 2022)
    learned = ["uiip_1", "uiip_2", "uiip_4"]
    assert drawn_from(root, "labelled") == ["chest-ct"]
    assert drawn_from(root, "covid") == learned and drawn_from(root, "healthy") == learned
    assert drawn_from(root, "validation") == ["uiip_3", "uiip_3"], "2022 = 4 x 505 + 2: the third is held out"
    assert [f.lesions is None for f in list_volumes(root, "healthy")] == [True] * 3
    first, second = (read_volume(f, lesions=True) for f in list_volumes(root, "validation"))
    assert (first[1][0] == second[1][0]).all() and (first[1][1] != second[1][1]).any(), "other lesions"
    scan = scan_of(root, "chest-ct-sick")
    share = sitk.GetArrayFromImage(scan.lesions > 0).sum() / sitk.GetArrayFromImage(scan.lungs).sum()
    assert 0.5 * chests.MILD < share < 2 * chests.MILD
    again = sitk.GetArrayFromImage(crop_of(root, "chest-ct-sick").apply(scan.lungs))
    np.testing.assert_array_equal(image_of(root, "chest-ct-sick", "lung"), again)
    with monkeypatch.context() as patch:
        patch.setattr(chests, "draw", lambda **a: pytest.fail("drawn twice"))
        assert volumes_root("implants", SIZE, 2022) == root


@pytest.mark.parametrize("seed", range(4))
def test_medseg2_holds_out_a_patient(in_chests, seed):
    root = volumes_root("medseg2", SIZE, seed)
    patients = load_splits("volumes")["sets"]["medseg2"]["folds"]
    labelled, covid, healthy, held_out = (drawn_from(root, split) for split in SPLITS)
    assert held_out == patients[seed] and healthy == ["chest-ct", "uiip_1", "uiip_2", "uiip_3", "uiip_4"]
    real = [name for name in covid if name.startswith("medseg2")]
    assert len(labelled) == 1 and sorted(labelled + real + [held_out[-1]]) == [p[-1] for p in patients]
    assert set(covid) - set(real) == set(healthy), "lesions grown in every healthy chest"
    assert "medseg2_6" not in labelled + covid
    assert list_volumes(root, "labelled")[0].lesions is not None


# --- real scans


def test_implants_in_the_real_chests(data_dir, tmp_path, monkeypatch):
    """uiip as it is; lesions darken nothing, and a chest without them is the one that was read."""
    monkeypatch.setattr(chests.catalog, "fetch", lambda name: data_dir / name)
    chests._chest.cache_clear()
    healthy, sick = chests.draw("uiip_2", 3, None), chests.draw("uiip_2", 3, 0.1)
    before, after = (sitk.GetArrayFromImage(scan.ct) for scan in (healthy, sick))
    lungs, lesions = (sitk.GetArrayFromImage(image) > 0 for image in (sick.lungs, sick.lesions))
    assert healthy.lesions is None and (after >= before - 1e-3).all() and (after == before)[~lungs].all()
    assert lesions[lungs].mean() == pytest.approx(0.1, rel=0.5)
    assert (after - before)[lesions].mean() > 100
    chests._chest.cache_clear()


def test_real_scans(data_dir, tmp_path):
    """medseg2 (lungs, lesions) and uiip (lungs) as they are; coronacases8 is no HU without its window."""
    for name, number, lesions in (("uiip", 4, False), ("medseg2", 5, True)):
        scans = list_scans(data_dir / name)
        assert len(scans) == number and all(s.lungs and bool(s.lesions) == lesions for s in scans)
    scan = list_scans(data_dir / "uiip")[0]
    assert prepare([scan], tmp_path, size=(16, 48, 48)).done == ["uiip_1"]
    item = LungVolumes(list_volumes(tmp_path))[0]
    inside = item["image"][item["lungs"] > 0]
    assert -0.9 < inside.median() < -0.2, "aerated lung: between -1150 and -650 HU"
    eight_bit = list_scans(data_dir / "coronacases8")[0]
    assert "Hounsfield" in prepare([eight_bit], tmp_path / "other").failed["coronacases_002"]


@pytest.mark.slow
def test_real_lesions_survive_the_crop(data_dir, tmp_path):
    scan = list_scans(data_dir / "medseg2")[0]
    prepare([scan], tmp_path)
    (files,) = list_volumes(tmp_path)
    _, masks = read_volume(files, lesions=True)
    full = read_scan(scan)
    share = masks[1].sum() / masks[0].sum()
    truth = (sitk.GetArrayViewFromImage(full.lesions) > 0).sum() / sitk.GetArrayViewFromImage(
        full.lungs
    ).sum()
    assert masks.shape == (2, 40, 160, 160) and share == pytest.approx(truth, rel=0.1)
