"""The three-dimensional data sets: volumes cropped to the lungs, in GASNet's folders.

A folder of volumes holds images/, lung/ and lesion/ (NIfTI, a file of the same name in each; the last only
for volumes whose lesions were drawn), crop/ (how each was cut out of its scan, JSON) and splits/ (text files,
a name on each line). `prepare.prepare` makes such a folder from scans, `volumes_root` knows where one is,
`list_volumes` which files belong together, `LungVolumes` what a network gets to see of them; `scan_of` and
`crop_of` lead back to the scan.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
import torch
from torch.utils.data import Dataset

from covidnb.crop import CLIP, SIZE, LungCrop
from covidnb.ct import READABLE, read_ct, read_mask, window, write_like
from covidnb.files import natural_order, whole
from covidnb.lungs import segment_lungs

REAL = ("implants", "medseg2")  # data sets of real chests, by name
SPLITS = ("labelled", "covid", "healthy", "validation")  # lesions drawn; volume labels alone; held out


class VolumeError(ValueError):
    """A volume, a mask or a folder of them cannot be used as it is."""


class Scan(NamedTuple):
    """A scan in LPS: HU (float32), lungs 0/1 and, where drawn, lesions (uint8, above 0 infected)."""

    ct: sitk.Image
    lungs: sitk.Image
    lesions: sitk.Image | None


class ScanFiles(NamedTuple):
    """Where a scan is: a file or DICOM folder, and the masks that exist for it."""

    name: str
    ct: Path
    lungs: Path | None = None
    lesions: Path | None = None


class VolumeFiles(NamedTuple):
    """The files of one volume of a folder; lesions are None where none were drawn."""

    name: str
    image: Path
    lungs: Path
    lesions: Path | None


# ---------------------------------------------------------------------------------------------- scans


def _stem(path: Path) -> str | None:
    """Name of a scan's file or folder without its suffix; None for files that hold no volume."""
    if path.name.startswith("."):
        return None
    if path.is_dir():
        return path.name
    suffix = next((s for s in sorted(READABLE, key=len, reverse=True) if path.name.lower().endswith(s)), None)
    return path.name[: -len(suffix)] if suffix else None


def _by_stem(folder: Path) -> dict[str, Path]:
    """Volumes of `folder` by their names; none where the folder does not exist."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        stem = _stem(path)
        if stem in found:
            raise VolumeError(f"{path} and {found[stem].name} carry the same name: keep one of them")
        if stem:
            found[stem] = path
    return found


def list_scans(folder: str | Path) -> list[ScanFiles]:
    """Scans of a folder with their masks, in natural order of their names.

    Three layouts: images/NAME with lung/NAME and lesion/NAME beside it, or NAME_ct, NAME_lung and NAME_lesion
    in one folder, masks being optional in both; or nothing but scans, files and DICOM folders.

    Raises
    ------
    VolumeError : no such folder, no scan in it, two files of one name, or a mask without its scan.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise VolumeError(f"{folder} is not a folder: give the one that holds the scans")
    if (folder / "images").is_dir():
        scans, lungs, lesions = (_by_stem(folder / kind) for kind in ("images", "lung", "lesion"))
    else:
        scans, lungs, lesions = _by_stem(folder), {}, {}
        if any(stem.endswith("_ct") for stem in scans):
            scans, lungs, lesions = (
                {stem.removesuffix(end): path for stem, path in scans.items() if stem.endswith(end)}
                for end in ("_ct", "_lung", "_lesion")
            )
    if not scans:
        raise VolumeError(f"{folder} holds no scan ({', '.join(READABLE)}, or DICOM folders)")
    for name, path in (lungs | lesions).items():
        if name not in scans:
            raise VolumeError(f"{path} belongs to no scan of {folder}: remove it or add the scan {name}")
    return [
        ScanFiles(name, scans[name], lungs.get(name), lesions.get(name))
        for name in sorted(scans, key=natural_order)
    ]


def read_scan(files: ScanFiles, method: str = "threshold", stored_window=None) -> Scan:
    """Read a scan and its masks; the lungs are segmented where they have no file.

    Parameters
    ----------
    method : of `segment_lungs`.
    stored_window : of `read_ct`.

    Raises
    ------
    CTError : a file cannot be used, or no lungs are found.
    """
    ct = read_ct(files.ct, stored_window=stored_window)
    lungs = read_mask(files.lungs, ct) > 0 if files.lungs else segment_lungs(ct, method)
    return Scan(ct, lungs, read_mask(files.lesions, ct) if files.lesions else None)


# ---------------------------------------------------------------------------------------------- volumes


def _record(root: Path, name: str) -> Path:
    return root / "crop" / f"{name}.json"


def write_volume(root: Path, name: str, scan: Scan, size: tuple[int, int, int], made_from: dict) -> None:
    """Crop a scan to its lungs and write it into a folder of volumes; its record comes last.

    Parameters
    ----------
    size : (depth, height, width) in voxels.
    made_from : where the scan comes from, for `scan_of`: "files" (of `ScanFiles`), "phantom" or "chest".
    """
    crop = LungCrop.of(scan.lungs, size)
    image = crop.apply(scan.ct)
    _record(root, name).unlink(missing_ok=True)  # a volume without its record is not there
    # whole HU, as scanners store them: 1.7 instead of 3.8 MB at 40 x 160 x 160
    write_like(np.rint(sitk.GetArrayViewFromImage(image)), image, root / "images" / f"{name}.nii.gz")
    write_like(crop.apply(scan.lungs), image, root / "lung" / f"{name}.nii.gz")
    lesions = root / "lesion" / f"{name}.nii.gz"
    if scan.lesions is None:
        lesions.unlink(missing_ok=True)
    else:
        write_like(crop.apply(scan.lesions), image, lesions)
    kinds = ["images", "lung"] + ["lesion"] * (scan.lesions is not None)
    record = {"crop": vars(crop), "kinds": kinds, "made_from": made_from}
    with whole(_record(root, name)) as part:
        part.write_text(json.dumps(record, indent=1) + "\n")


def record_of(root: str | Path, name: str) -> dict | None:
    """What `write_volume` noted: "crop", "kinds" of files, "made_from"; None where no whole volume is."""
    path = _record(Path(root), name)
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    complete = all((Path(root) / kind / f"{name}.nii.gz").is_file() for kind in record["kinds"])
    return record if complete else None


def crop_of(root: str | Path, name: str) -> LungCrop:
    """How a volume was cut out of its scan; `.invert` carries a mask on the volume back onto the scan.

    Raises
    ------
    VolumeError : the folder has no such volume.
    """
    return LungCrop(**{key: tuple(values) for key, values in _required(root, name)["crop"].items()})


def scan_of(root: str | Path, name: str) -> Scan:
    """The scan that a volume was cut out of: read again, or drawn again where it is a phantom.

    Raises
    ------
    VolumeError : the folder has no such volume.
    CTError : the scan is no longer where it was.
    """
    made_from = _required(root, name)["made_from"]
    if "phantom" in made_from:
        from covidnb.volumes.phantom import draw

        return draw(**made_from["phantom"])
    if "chest" in made_from:
        from covidnb.volumes.chests import draw

        return draw(**made_from["chest"])
    paths = {kind: path and Path(path) for kind, path in made_from["files"].items()}
    return read_scan(ScanFiles(name, **paths), made_from["method"], made_from["stored_window"])


def _required(root: str | Path, name: str) -> dict:
    record = record_of(root, name)
    if record is None:
        raise VolumeError(f"{root} holds no volume {name!r} with its record in crop/: prepare the scan again")
    return record


def write_split(root: str | Path, split: str, names: Sequence[str]) -> None:
    """Write splits/<split>.txt, a name on each line."""
    with whole(Path(root) / "splits" / f"{split}.txt") as part:
        part.write_text("".join(f"{name}\n" for name in names))


def list_volumes(root: str | Path, split: str | None = None) -> list[VolumeFiles]:
    """Volumes of a folder, in natural order of their names.

    Parameters
    ----------
    split : name of a file in splits/, such as those of `SPLITS`; its order counts. All volumes without one.

    Raises
    ------
    VolumeError : not such a folder, no such split, a name in it without volume, or an image without lungs.
    """
    root = Path(root)
    images, lungs, lesions = (_by_stem(root / kind) for kind in ("images", "lung", "lesion"))
    if not images:
        raise VolumeError(f"{root / 'images'} holds no volume: make it with python -m covidnb.volumes")
    if split is None:
        names = sorted(images, key=natural_order)
    else:
        path = root / "splits" / f"{split}.txt"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt"))) or "none"
            raise VolumeError(f"{path} does not exist: the splits of this folder are {known}")
        names = path.read_text().split()
    for name in names:
        if name not in images:
            raise VolumeError(f"{root / 'images'} lacks {name}, which splits/{split}.txt names: prepare it")
        if name not in lungs:
            raise VolumeError(f"{images[name]} has no partner in {root / 'lung'}: prepare the scan again")
    return [VolumeFiles(name, images[name], lungs[name], lesions.get(name)) for name in names]


def volumes_root(
    data: str | Path = "phantom", size: tuple[int, int, int] = SIZE, patients: int = 2020
) -> Path:
    """Folder of volumes of a data set.

    Parameters
    ----------
    data : "phantom" (drawn once into the cache, within a minute); "implants" or "medseg2" (real chests, see
        `covidnb.volumes.chests`, the same way); or a folder that `prepare.prepare` made.
    size : (depth, height, width) of what is drawn; a folder's volumes are what they are.
    patients : seed of the phantom's patients, or of grown lesions and who is held out.

    Raises
    ------
    VolumeError : the folder holds no volumes.
    CatalogError : the chests are not here, or the disk is full.
    """
    if data == "phantom":
        from covidnb.volumes.phantom import phantom_volumes

        return phantom_volumes(size, seed=patients)
    if data in REAL:
        from covidnb.volumes.chests import chest_volumes

        return chest_volumes(data, size, seed=patients)
    list_volumes(data)
    return Path(data)


class LungVolumes(Dataset):
    """Volumes cropped to the lungs as GASNet sees them, augmented on demand.

    HU from -1250 to 250 become -1 to 1. (The released loader stretches each volume from its own darkest to
    its brightest voxel: lung is then darker where the air is -1024 HU than where padding reaches -2000.) The
    augmentation depends on (seed, epoch, index) alone, so that a resumed run sees what an uninterrupted one
    would have seen; `covidnb.volumes.augment` says what it does.

    Parameters
    ----------
    files : from `list_volumes`.
    lesions : whether items carry lesion masks, as those of the labelled volume and of evaluation must.
    depth : number of slices of each item, at random where; the paper trains on 32 of 40. None: all.
    augment : noise, flips and faint warps; call `set_epoch` before each epoch.
    seed : of the depth crop and the augmentation.

    Items are dicts: "image" float32 (1, D, H, W) in [-1, 1]; "lungs" and, if asked for, "lesions", float32
    (1, D, H, W), 0 or 1; "name" str.

    Raises
    ------
    VolumeError : no files, a volume without lesions where they are asked for, or of another size or depth
        than can be stacked.
    CTError : a file cannot be read.
    """

    def __init__(
        self,
        files: Sequence[VolumeFiles],
        *,
        lesions: bool = False,
        depth: int | None = None,
        augment: bool = False,
        seed: int = 0,
    ):
        if not files:
            raise VolumeError("no volumes to load: the list of files is empty")
        for item in files:
            if lesions and item.lesions is None:
                raise VolumeError(f"{item.image} has no lesion mask: it cannot be learned from or scored")
        self.files = list(files)
        self.lesions = lesions
        self.depth = depth
        self.augment = augment
        self.seed = seed
        self.epoch = 0
        self._volumes: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def set_epoch(self, epoch: int) -> None:
        """Draw depth crop and augmentation of `epoch` from now on."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict:
        hu, masks = self._volume(index)
        crop_seed, augment_seed = np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(2)
        if self.depth is not None:
            first = np.random.default_rng(crop_seed).integers(len(hu) - self.depth + 1)
            hu, masks = hu[first : first + self.depth], masks[:, first : first + self.depth]
        image, masks = torch.from_numpy(window(hu, *CLIP))[None], torch.from_numpy(masks).float()
        if self.augment:
            from covidnb.volumes.augment import augmented

            image, masks = augmented(image, masks, int(augment_seed))
        item = {"image": 2 * image - 1, "lungs": masks[:1], "name": self.files[index].name}
        return item | ({"lesions": masks[1:]} if self.lesions else {})

    def _volume(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """HU, int16 (D, H, W), and masks, uint8 (1 or 2, D, H, W); read at first use and kept."""
        if index not in self._volumes:
            hu, masks = read_volume(self.files[index], self.lesions)
            self._check_shape(self.files[index].image, hu.shape)
            self._volumes[index] = hu, masks
        return self._volumes[index]

    def _check_shape(self, path: Path, shape: tuple[int, ...]) -> None:
        self._shape = self._shape or shape
        if shape != self._shape:
            raise VolumeError(
                f"{path} is {shape} (depth, height, width), others are {self._shape}: prepare all"
            )
        if self.depth is not None and shape[0] < self.depth:
            raise VolumeError(f"{path} has {shape[0]} slices: {self.depth} cannot be taken out of them")


def read_volume(files: VolumeFiles, lesions: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """HU, int16 (D, H, W), and masks of the lungs and, if asked for, lesions, uint8 0 or 1 (1 or 2, D, H, W).

    Raises
    ------
    CTError : a file cannot be used; volumes scaled to 8 bits are not HU.
    """
    image = read_ct(files.image)
    paths = [files.lungs, files.lesions] if lesions else [files.lungs]
    masks = [sitk.GetArrayFromImage(read_mask(path, image)) > 0 for path in paths]
    return sitk.GetArrayFromImage(image).astype(np.int16), np.stack(masks).astype(np.uint8)
