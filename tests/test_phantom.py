"""The digital chest: the same seed gives the same voxels, masks are exact, and it measures like a chest."""

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from covidnb.phantom import ANATOMY, CONSOLIDATION, GGO, STYLES, chest, implant_lesions
from covidnb.phantom.lesions import Disease, grow
from covidnb.phantom.summary import TISSUES, hu_distance, size_distance, summarise
from covidnb.phantom.trees import grow_tree

SMALL = (32, 96, 96)


def array(image):
    return sitk.GetArrayFromImage(image)


def litres(phantom):
    return array(phantom.lungs).sum() * np.prod(phantom.ct.GetSpacing()) / 1e6


@pytest.fixture(scope="module")
def case():
    """The book's running case."""
    return chest()


@pytest.fixture(scope="module")
def small():
    return chest(11, shape=SMALL, severity=0.15)


def test_same_arguments_same_voxels(small):
    again = chest(11, shape=SMALL, severity=0.15)
    for one, two in zip(small, again, strict=True):
        np.testing.assert_array_equal(array(one), array(two))
    other = chest(12, shape=SMALL, severity=0.15)
    assert (array(other.ct) != array(small.ct)).mean() > 0.5


def test_images_are_as_read_ct_returns_them(small):
    for image in small:
        assert image.GetSize() == SMALL[::-1]
        assert image.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
        assert image.GetOrigin() == small.ct.GetOrigin()
        assert image.GetSpacing() == small.ct.GetSpacing()
    assert small.ct.GetPixelID() == sitk.sitkFloat32
    assert {small.lungs.GetPixelID(), small.lesions.GetPixelID(), small.anatomy.GetPixelID()} == {
        sitk.sitkUInt8
    }
    origin, spacing, size = (
        np.array(f()) for f in (small.ct.GetOrigin, small.ct.GetSpacing, small.ct.GetSize)
    )
    assert (np.abs(origin + spacing * size / 2) < 60).all(), "the patient lies near the scanner's centre"


def test_running_case_shows_both_classes_on_both_sides(case):
    ct, lungs, lesions, anatomy = map(array, case)
    assert (lesions[lungs == 0] == 0).all(), "a lesion outside the lungs"
    for label in (GGO, CONSOLIDATION):
        assert (lesions == label).sum() * np.prod(case.ct.GetSpacing()) / 1000 > 5, (
            "at least 5 ml of each class"
        )
    assert -750 < np.median(ct[lesions == GGO]) < -450
    assert -200 < np.median(ct[lesions == CONSOLIDATION]) < 60
    assert 0.02 < (lesions > 0).sum() / lungs.sum() < 0.35
    x = np.broadcast_to(np.arange(lungs.shape[2]), lungs.shape)
    middle = x[lungs > 0].mean()
    assert (x[lesions > 0] < middle).any() and (x[lesions > 0] > middle).any()


def test_vessels_stay_visible_in_ground_glass(case):
    ct, _, lesions, anatomy = map(array, case)
    vessel = (lesions == GGO) & (anatomy == ANATOMY["lung vessels"])
    assert vessel.sum() > 20
    assert np.median(ct[vessel]) > np.median(ct[lesions == GGO]) + 150


def test_tissues_have_their_hu(case):
    ct, lungs, lesions, anatomy = map(array, case)
    expected = {
        "air": (-1020, -980),
        "fat": (-120, -80),
        "muscle": (35, 65),
        "heart": (25, 60),
        "liver": (40, 75),
    }
    expected |= {"aorta": (25, 60), "spine": (120, 500), "ribs": (100, 500), "airway": (-1010, -850)}
    for name, (low, high) in expected.items():
        assert low < np.median(ct[anatomy == ANATOMY[name]]) < high, name
    assert -930 < np.median(ct[(lungs > 0) & (lesions == 0)]) < -780
    assert set(np.unique(anatomy)) == set(ANATOMY.values()), "every structure is there"


def test_left_and_right_front_and_back_up_and_down(case):
    """In an LPS array the last axis runs to the patient's left, the middle one back, the first up."""
    anatomy = array(case.anatomy)
    centre = {n: np.argwhere(anatomy == v).mean(axis=0) for n, v in ANATOMY.items()}
    middle = (centre["spine"] + centre["sternum and clavicles"])[2] / 2
    assert centre["heart"][2] > middle + 5
    assert centre["liver"][2] < middle < centre["stomach"][2]
    assert centre["right lung"][2] < middle < centre["left lung"][2]
    assert centre["sternum and clavicles"][1] < centre["heart"][1] < centre["spine"][1] < centre["table"][1]
    assert centre["liver"][0] < centre["heart"][0] < centre["scapulae"][0]


def test_lungs_are_two_and_of_human_size():
    volumes, ratios = [], []
    for seed in range(10):
        p = chest(seed, kind="healthy", shape=(20, 80, 80))
        lungs = array(p.lungs)
        volumes.append(litres(p))
        x = np.broadcast_to(np.arange(80), lungs.shape)
        ratios.append((lungs * (x >= 40)).sum() / lungs.sum())
        pieces = sitk.RelabelComponent(sitk.ConnectedComponent(p.lungs > 0))
        sizes = np.bincount(array(pieces).ravel())[1:]
        assert sizes[:2].sum() > 0.98 * sizes.sum() and sizes[1] > 0.5 * sizes[0]
    assert min(volumes) > 2.8 and max(volumes) < 7.5
    assert np.std(volumes) > 0.25, "people differ"
    assert 0.44 < np.mean(ratios) < 0.52, "the left lung gives room to the heart"


def test_healthy_is_the_same_patient_without_lesions(small):
    healthy = chest(11, kind="healthy", shape=SMALL, severity=0.15)
    assert array(healthy.lesions).sum() == 0
    np.testing.assert_array_equal(array(healthy.lungs), array(small.lungs))
    added = array(small.ct) - array(healthy.ct)
    ill = array(small.lesions) > 0
    assert added[ill].mean() > 150
    assert added.min() > -3, "lesions only add"
    far = sitk.SignedMaurerDistanceMap(small.lungs, squaredDistance=False, useImageSpacing=True)
    assert np.abs(added[array(far) > 30]).max() <= 1, "and only in the lungs"


@pytest.mark.parametrize("severity", [0.0, 0.02, 0.1, 0.3])
def test_severity_is_met(severity):
    p = chest(4, shape=SMALL, severity=severity)
    share = (array(p.lesions) > 0).sum() / array(p.lungs).sum()
    assert abs(share - severity) < 0.01 + 0.15 * severity


def test_lesions_prefer_the_back_the_base_and_the_outside():
    back, low, outside = [], [], []
    for seed in range(6):
        p = chest(seed, shape=SMALL, severity=0.06)
        lungs, lesions = array(p.lungs) > 0, array(p.lesions) > 0
        inner = np.argwhere(lungs)
        centre, at = inner.mean(axis=0), np.argwhere(lesions)
        back.append((at[:, 1] > centre[1]).mean())
        low.append((at[:, 0] < centre[0]).mean())
        radius = [np.hypot(*((q - centre)[:, 1:] / np.ptp(inner, axis=0)[1:]).T).mean() for q in (at, inner)]
        outside.append(radius[0] - radius[1])
    assert np.mean(back) > 0.65 and np.mean(low) > 0.6 and np.mean(outside) > 0.02


def test_crazy_paving_adds_septa():
    plain, paved = (chest(7, shape=(24, 160, 160), severity=0.2, crazy_paving=c) for c in (False, True))
    np.testing.assert_array_equal(array(plain.lesions), array(paved.lesions))
    ggo = array(plain.lesions) == GGO
    assert array(paved.ct)[ggo].std() > array(plain.ct)[ggo].std() + 3
    assert array(paved.ct)[ggo].mean() > array(plain.ct)[ggo].mean() + 20


@pytest.mark.parametrize("style", STYLES)
def test_styles_have_their_noise(style):
    p = chest(3, kind="healthy", shape=(24, 160, 160), style=style)
    heart = array(p.ct)[
        sitk.GetArrayFromImage(sitk.BinaryErode(p.anatomy == ANATOMY["heart"], (3, 3, 1))) > 0
    ]
    assert 0.7 * STYLES[style].noise < heart.std() < 1.3 * STYLES[style].noise
    assert abs(heart.mean() - 42 - STYLES[style].offset) < 4 + 0.15 * STYLES[style].noise


def test_thresholding_is_not_enough(case):
    """Vessels, haze and partial volume look like lesions: no single threshold finds them."""
    ct, lungs, lesions, _ = map(array, case)
    values, truth = ct[lungs > 0], lesions[lungs > 0] > 0
    dice = [
        2 * (truth & (values > t)).sum() / (truth.sum() + (values > t).sum()) for t in range(-800, -200, 25)
    ]
    assert 0.2 < max(dice) < 0.85


@settings(deadline=None, max_examples=8)
@given(
    shape=st.tuples(*[st.integers(16, 40)] * 3),
    spacing=st.tuples(st.floats(6, 14), st.floats(8, 16), st.floats(8, 16)),
    seed=st.integers(0, 10**9),
)
def test_any_grid_gives_sound_masks(shape, spacing, seed):
    p = chest(seed, shape=shape, spacing=spacing)
    ct, lungs, lesions, _ = map(array, p)
    assert ct.shape == shape and p.ct.GetSpacing() == spacing[::-1]
    assert np.isfinite(ct).all() and ct.min() >= -1024 and ct.max() <= 3071
    assert lungs.any() and (lungs <= 1).all()
    assert (lesions[lungs == 0] == 0).all() and (lesions <= 2).all()


def test_a_smaller_field_of_view_shows_the_same_patient():
    whole = chest(6, kind="healthy", shape=(60, 96, 96), spacing=(5, 4, 4))
    part = chest(6, kind="healthy", shape=(30, 64, 64), spacing=(5, 4, 4))
    cut = sitk.Resample(whole.anatomy, part.anatomy, sitk.Transform(), sitk.sitkNearestNeighbor)
    organs = np.isin(array(cut), [ANATOMY[n] for n in ("heart", "aorta", "spine", "ribs", "great vessels")])
    assert organs.sum() > 3000
    assert (array(cut) == array(part.anatomy))[organs].mean() > 0.93


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kind": "sick"}, "kind='sick'"),
        ({"style": "photo"}, "'standard'"),
        ({"shape": (32, 96)}, "shape"),
        ({"shape": (8, 96, 96)}, "shape"),
        ({"shape": (32.5, 96, 96)}, "shape"),
        ({"shape": SMALL, "spacing": (0, 1, 1)}, "spacing"),
        ({"shape": SMALL, "spacing": (5, 1)}, "spacing"),
        ({"shape": (16, 16, 16), "spacing": (0.25, 1, 1)}, "no lung in the field of view"),
        ({"severity": 1.5}, "severity=1.5"),
        ({"severity": -0.1}, "severity"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        chest(1, **arguments)


# ---- lesions in another scan


@pytest.fixture(scope="module")
def healthy():
    return chest(21, kind="healthy", shape=SMALL)


def test_implanting_changes_the_lungs_only(healthy):
    healthy.ct.SetMetaData("patient", "somebody")
    ct, lesions = implant_lesions(healthy.ct, healthy.lungs, 5, severity=0.1)
    before, after, lungs, ill = array(healthy.ct), array(ct), array(healthy.lungs) > 0, array(lesions)
    np.testing.assert_array_equal(before[~lungs], after[~lungs])
    assert (ill[~lungs] == 0).all() and abs((ill > 0).sum() / lungs.sum() - 0.1) < 0.03
    assert (after - before)[ill > 0].mean() > 150 and (after >= before).all()
    assert ct.GetMetaData("patient") == lesions.GetMetaData("patient") == "somebody"
    assert ct.GetPixelID() == sitk.sitkFloat32 and lesions.GetPixelID() == sitk.sitkUInt8
    for image in (ct, lesions):
        assert image.GetOrigin() == healthy.ct.GetOrigin() and image.GetSpacing() == healthy.ct.GetSpacing()
    again = implant_lesions(healthy.ct, healthy.lungs, 5, severity=0.1)
    np.testing.assert_array_equal(array(again[0]), after)


def test_implanting_keeps_the_scans_noise():
    clean = chest(21, kind="healthy", shape=(24, 120, 120), style="thick")
    noise = np.random.default_rng(0).normal(0, 30, (24, 120, 120)).astype(np.float32)
    noisy = sitk.GetImageFromArray(array(clean.ct) + noise)
    noisy.CopyInformation(clean.ct)
    (one, lesions), (two, _) = (implant_lesions(ct, clean.lungs, 5, severity=0.2) for ct in (clean.ct, noisy))
    ggo = array(lesions) == GGO
    kept = (array(two) - array(one))[ggo]
    assert np.corrcoef(kept, noise[ggo])[0, 1] > 0.95
    assert 0.7 < kept.std() / noise[ggo].std() < 1.1


def test_implanting_names_what_is_wrong(healthy):
    with pytest.raises(ValueError, match="size"):
        implant_lesions(healthy.ct, healthy.lungs[:, :, :-1], 1)
    moved = sitk.Image(healthy.lungs)
    moved.SetOrigin((0, 0, 0))
    with pytest.raises(ValueError, match="origin"):
        implant_lesions(healthy.ct, moved, 1)
    with pytest.raises(ValueError, match="mask is empty"):
        implant_lesions(healthy.ct, healthy.lungs * 0, 1)
    with pytest.raises(ValueError, match="LAI"):
        implant_lesions(sitk.DICOMOrient(healthy.ct, "LAI"), sitk.DICOMOrient(healthy.lungs, "LAI"), 1)
    with pytest.raises(ValueError, match="HU"):
        implant_lesions(healthy.ct + 2000, healthy.lungs, 1)


def test_lesions_do_not_cross_lobes():
    lobes = np.zeros((20, 30, 60), np.uint8)
    lobes[:, :, :30], lobes[:, :, 30:] = 1, 2
    disease = Disease(severity=0.02, size=40, ggo=-600, solid=0, paving=0)
    crossed = 0
    for seed in range(6):
        labels = grow(lobes, (5, 5, 5), np.random.default_rng(seed), disease).labels
        pieces = array(sitk.ConnectedComponent(sitk.GetImageFromArray(labels)))
        crossed += any(len(np.unique(lobes[pieces == k])) > 1 for k in range(1, pieces.max() + 1))
    assert crossed <= 1, "two lesions may meet at a fissure by chance, one never crosses it"


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 60))
def test_trees_reach_every_point_and_taper(seed, n):
    rng = np.random.default_rng(seed)
    tree = grow_tree(np.zeros(3), rng.uniform(10, 100, (n, 3)), tip=0.5)
    assert tree.end.shape == (n, 3)
    known = {(0.0, 0.0, 0.0)}
    for start, end in zip(tree.start, tree.end, strict=True):
        assert tuple(map(float, start)) in known, "a branch starts where another ends"
        known.add(tuple(map(float, end)))
    assert np.isclose(tree.radius.min(), 0.5)
    starts = {tuple(map(float, p)) for p in tree.start}
    tips = sum(tuple(map(float, p)) not in starts for p in tree.end)
    roots = tree.radius[(tree.start == 0).all(axis=1)]
    assert np.isclose((roots**2.7).sum(), tips * 0.5**2.7), "Murray: what leaves the root reaches the ends"


# ---- numbers about sets of scans


def test_summary_of_the_same_scans_agrees(case):
    a = summarise([case[:3]])
    for tissue in TISSUES:
        assert hu_distance(a, a, tissue) == 0
        assert np.isclose(np.sum(a["hu_density"][tissue]) * 25, 1, atol=1e-3)
    assert size_distance(a, a) == 0
    shifted = summarise([(case.ct + 50, case.lungs, case.lesions)])
    assert abs(hu_distance(a, shifted, "GGO") - 50) < 8
    infected = (array(case.lesions) > 0).sum() / array(case.lungs).sum()
    assert abs(a["shares"]["infected"][0] - infected) < 1e-3


def test_summary_without_lesions():
    p = chest(1, kind="healthy", shape=(16, 48, 48))
    s = summarise([p[:3]])
    assert s["shares"]["infected"] == [0] and s["lesion_ml_quartiles"] == [] and s["hu_density"]["GGO"] == []
    assert np.isnan(hu_distance(s, s, "GGO"))


@pytest.mark.slow
def test_the_phantom_looks_like_medseg2(data_dir):
    """On the real volumes: histograms within 60 HU, and lesion sizes within a factor of three."""
    from covidnb.ct import read_ct, read_mask

    def real():
        for k in (1, 2, 5):
            ct = read_ct(data_dir / "medseg2" / f"medseg2_{k}_ct.nii.gz")
            yield (
                ct,
                *(
                    read_mask(data_dir / "medseg2" / f"medseg2_{k}_{n}.nii.gz", ct)
                    for n in ("lung", "lesion")
                ),
            )

    theirs, ours = (
        summarise(real()),
        summarise(p[:3] for p in (chest(s, shape=(48, 160, 160)) for s in range(8))),
    )
    assert hu_distance(theirs, ours, "lung") < 60
    assert hu_distance(theirs, ours, "GGO") < 60
    assert hu_distance(theirs, ours, "consolidation") < 110
    assert size_distance(theirs, ours) < np.log10(3)
