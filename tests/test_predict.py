"""A scan in, a mask on its own grid and a report out."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from covidnb import predict as predict_module
from covidnb.ct import read_ct
from covidnb.lungs import segment_lungs
from covidnb.nets import InfNet, InfNetOutput, MultiClassUNet
from covidnb.phantom import chest
from covidnb.predict import lesion_classes, lesion_probability, main, predict
from covidnb.training import multiclass
from covidnb.training.infnet import InfNetConfig, build, load_network
from covidnb.training.multiclass import MultiClassConfig
from covidnb.training.run import ConfigError, Run


@pytest.fixture(scope="module")
def patient():
    return chest(shape=(20, 112, 112))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of an untrained network, as a run would have stored them."""
    torch.manual_seed(0)
    config = InfNetConfig(backbone="efficientnet_lite0", pretrained=False, size=64)
    run = Run(tmp_path_factory.mktemp("run"), config)
    run.save_weights(InfNet("efficientnet_lite0"))
    return run.weights_path


class Bright(torch.nn.Module):
    """A stand-in that calls lesion what is brighter than a grey value: its masks are known."""

    def __init__(self, grey):
        super().__init__()
        self.grey = torch.nn.Parameter(torch.tensor(float(grey)))

    def forward(self, x):
        red = x[:, :1] * 0.229 + 0.485
        return InfNetOutput(*[100 * (red - self.grey / 255)] * 5)


def test_probability_lands_where_it_was_seen(patient):
    """Resized to the crop and back, a threshold on grey values is the same threshold on the scan."""
    probability = lesion_probability(
        [(Bright(100).eval(), InfNetConfig(size=128))], patient.ct, patient.lungs
    )
    inside = sitk.GetArrayFromImage(patient.lungs) > 0
    brighter = sitk.GetArrayFromImage(patient.ct) > -1250 + 1500 * 100 / 255
    assert probability[~inside].max() == 0
    found, wanted = (probability >= 0.5) & inside, brighter & inside
    assert 2 * (found & wanted).sum() / (found.sum() + wanted.sum()) > 0.8


def test_maps_of_several_networks_are_averaged(patient):
    one, other = ((Bright(grey).eval(), InfNetConfig(size=64)) for grey in (60, 140))
    each = [lesion_probability([network], patient.ct, patient.lungs) for network in (one, other)]
    both = lesion_probability([one, other], patient.ct, patient.lungs)
    assert np.abs(each[0] - each[1]).max() > 0.5
    np.testing.assert_allclose(both, np.mean(each, axis=0), atol=1e-6)


class PriorReader(torch.nn.Module):
    """A stand-in that names what its prior marks by brightness, and nothing else."""

    def __init__(self, grey):
        super().__init__()
        self.grey = torch.nn.Parameter(torch.tensor(float(grey)))

    def forward(self, x):
        red, prior = (x[:, k : k + 1] * 0.229 + 0.485 for k in (0, 3))
        dense = 100 * (red - self.grey / 255)
        return torch.cat([1000 * (0.5 - prior), -dense, dense], dim=1)


def test_classes_lie_where_the_prior_is(patient):
    """The same grid for slice and prior: each voxel of the mask is named by its own grey value."""
    inside = sitk.GetArrayFromImage(patient.lungs) > 0
    prior = inside.astype(np.float32)
    prior[:, : inside.shape[1] // 2] = 0
    network = PriorReader(100).eval(), MultiClassConfig(size=128, flips=False)
    classes = lesion_classes(network, patient.ct, patient.lungs, prior)
    assert classes[~inside].max() == 0
    found, wanted = classes > 0, prior > 0
    assert 2 * (found & wanted).sum() / (found.sum() + wanted.sum()) > 0.95
    brighter = sitk.GetArrayFromImage(patient.ct) > -1250 + 1500 * 100 / 255
    found, wanted = classes == 2, brighter & wanted
    assert 2 * (found & wanted).sum() / (found.sum() + wanted.sum()) > 0.8


def stored(folder, config, net):
    """Weights as a run would have stored them."""
    run = Run(folder, config)
    run.save_weights(net)
    return str(run.weights_path)


def test_two_networks_find_and_one_names(patient, weights, tmp_path, capsys):
    """From the command line: the mask is what the parts make of the same scan, the report counts it."""
    torch.manual_seed(1)
    finder = InfNetConfig(network="unet", width=4, size=96)
    net = build(finder).eval()
    inside = sitk.GetArrayFromImage(patient.lungs) > 0
    middles = [
        np.median(lesion_probability([network], patient.ct, patient.lungs)[inside])
        for network in (load_network(weights), (net, finder))
    ]
    # together they call about half of the lungs lesion, whatever each calls alone
    list(net.parameters())[-1].data -= float(sum(np.log(m / (1 - m)) for m in middles))
    other = stored(tmp_path / "other", finder, net)
    config = MultiClassConfig(network="unet", width=4, size=32, lesions="prior")
    namer = stored(tmp_path / "namer", config, MultiClassUNet(6, 4))
    scan, out = tmp_path / "scan.nii.gz", tmp_path / "out"
    sitk.WriteImage(patient.ct, scan)
    asked = [str(scan), str(out), "--weights", str(weights), "--weights", other, "--classes", namer]
    assert main(asked) == 0
    report = json.loads(capsys.readouterr().out)
    mask = sitk.ReadImage(out / "mask.nii.gz")
    found = sitk.GetArrayFromImage(mask)

    ct = read_ct(scan)
    lungs = segment_lungs(ct)
    networks = [load_network(path) for path in (weights, other)]
    prior = lesion_probability(networks, ct, lungs)
    np.testing.assert_array_equal(found, lesion_classes(multiclass.load_network(namer), ct, lungs, prior))
    np.testing.assert_array_equal(found > 0, prior >= 0.5)
    alone = [lesion_probability([network], ct, lungs) >= 0.5 for network in networks]
    assert all((one != (found > 0)).any() for one in alone)

    voxel_ml = np.prod(mask.GetSpacing()) / 1000
    for k, name in enumerate(("GGO", "consolidation"), 1):
        assert report[f"{name}_ml"] == pytest.approx((found == k).sum() * voxel_ml, abs=0.1)
    assert report["lesions_ml"] == pytest.approx((found > 0).sum() * voxel_ml, abs=0.1)
    assert set(report["weights_sha256"]) == {str(weights), other, namer}


def test_flips_average_positions(patient):
    """A network that looks at the left half of what it is given finds both halves, half as sure."""

    class LeftHalf(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.none = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            left = torch.linspace(1, -1, x.shape[-1]).sign() * 100
            return InfNetOutput(*[left.expand(x.shape[0], 1, *x.shape[-2:]) + self.none] * 5)

    network = [(LeftHalf().eval(), InfNetConfig(size=64))]
    probability = lesion_probability(network, patient.ct, patient.lungs, flips=True)
    inside = sitk.GetArrayFromImage(patient.lungs) > 0
    assert np.abs(probability[inside] - 0.5).mean() < 0.05


def test_other_weights_are_refused(patient, weights, tmp_path, capsys):
    scan = tmp_path / "scan.nii.gz"
    sitk.WriteImage(patient.ct, scan)
    asked = [str(scan), str(tmp_path / "out"), "--weights", str(weights), "--classes"]
    assert main([*asked, str(weights)]) == 2
    assert "knows no classes" in capsys.readouterr().err
    config = MultiClassConfig(network="unet", width=4, size=32, prior="none")
    assert main([*asked, stored(tmp_path / "alone", config, MultiClassUNet(3, 4))]) == 2
    assert "takes no prior" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no weights"):
        predict(scan, tmp_path / "out", [])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("orientation", ["LPS", "RAI", "ASL"])
def test_mask_is_on_the_files_own_grid(patient, weights, tmp_path, orientation, capsys):
    scan = tmp_path / "scan.nii.gz"
    sitk.WriteImage(sitk.DICOMOrient(patient.ct, orientation), scan)
    assert main([str(scan), str(tmp_path / "out"), "--weights", str(weights)]) == 0
    mask, original = sitk.ReadImage(tmp_path / "out" / "mask.nii.gz"), sitk.ReadImage(scan)
    assert mask.GetSize() == original.GetSize() and mask.GetPixelID() == sitk.sitkUInt8
    for part in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(mask, part)(), getattr(original, part)())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report == json.loads(capsys.readouterr().out)
    lesions_ml = sitk.GetArrayFromImage(mask).sum() * np.prod(mask.GetSpacing()) / 1000
    assert report["lesions_ml"] == pytest.approx(lesions_ml, abs=0.1)
    assert report["infected_share_percent"] == pytest.approx(100 * lesions_ml / report["lungs_ml"], abs=0.05)


def test_faults_are_one_sentence_and_leave_nothing(patient, weights, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(tmp_path / "none.nii.gz"), str(out), "--weights", str(weights)]) == 2
    assert "none.nii.gz" in capsys.readouterr().err
    water = sitk.Image(64, 64, 24, sitk.sitkFloat32) - 1000
    water[16:48, 16:48, 4:20] = 40
    sitk.WriteImage(water, tmp_path / "water.nii.gz")
    assert main([str(tmp_path / "water.nii.gz"), str(out), "--weights", str(weights)]) == 2
    assert "lung" in capsys.readouterr().err
    assert main([str(tmp_path / "water.nii.gz"), str(out), "--weights", str(tmp_path / "no.st")]) == 2
    assert "no.st" in capsys.readouterr().err
    assert not out.exists() or not list(out.iterdir())


def test_full_disk_leaves_no_half_result(patient, weights, tmp_path, monkeypatch, capsys):
    sitk.WriteImage(patient.ct, tmp_path / "scan.nii.gz")

    def full(*_):
        raise OSError(28, "no room to write mask.nii.gz: free some space and start again")

    monkeypatch.setattr(predict_module, "write_like", full)
    assert main([str(tmp_path / "scan.nii.gz"), str(tmp_path / "out"), "--weights", str(weights)]) == 2
    assert "no room" in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.json").exists()
