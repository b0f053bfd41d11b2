"""Get a public data set: download it where its owner gives it out by address, else say what to do by hand.

    python -m tools.get_data coco
    python -m tools.get_data dawn
    python -m tools.get_data --NAME coco --PARTS val annotations --OUT ./dataset/coco

A download that was cut off goes on where it stopped, also in another run. The disk is looked at before anything is
written, archives are checked (by a checksum where their owner publishes one, else by the CRC of every file in them)
and deleted once they are unpacked. The licence is printed first: reading it is up to you.
"""

import http.client
import shutil
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

from utils import config, download, processes, system
from utils.config import UserError

NAME = ""            # coco, acdc, dawn, rtts, rain100l, rain100h or raindrop
OUT = ""             # folder to put it in; "" for ./dataset/<NAME>
PARTS = ()           # some of a data set's parts (coco: train, val, annotations); () for all

_ROOM = 1.02          # of a disk beyond what is known to be needed


class Archive(NamedTuple):
    """A zip file that unpacks into OUT."""

    url: str
    holds: str           # a file or folder in OUT that is there once it is unpacked
    md5: str | None = None  # only one that the owner has published


class Source(NamedTuple):
    """A data set: archives by part, or what to do by hand."""

    title: str
    licence: str
    page: str
    archives: dict = {}  # {part: Archive}
    by_hand: tuple = ()  # lines


_COCO = "http://images.cocodataset.org"
_PAIRS = ("Unpack it so that every rainy image and its clean partner have the same name, in one folder each:",
          "    {out}/rainy/1.png   {out}/clean/1.png",
          "then train: python train_unet_derain.py --RAINY_DIR {out}/rainy --CLEAR_DIR {out}/clean",
          "(files called rain-001.png and norain-001.png have to be renamed first)")
_VOC = ("Pascal VOC's layout is read as it is (docs/data.md): {out}/JPEGImages, {out}/Annotations and, with lists,",
        "{out}/ImageSets/Main; then for example --COCO_RAIN_DIR {out}")
_SOURCES = {
    "coco": Source(
        "COCO 2017 (Lin et al., ECCV 2014)",
        "see the terms of use on the page above; the images are Flickr users', each under the licence that the "
        "annotation file names",
        "https://cocodataset.org",
        {"annotations": Archive(f"{_COCO}/annotations/annotations_trainval2017.zip",
                                "annotations/instances_val2017.json"),
         "val": Archive(f"{_COCO}/zips/val2017.zip", "val2017"),
         "train": Archive(f"{_COCO}/zips/train2017.zip", "train2017")}),
    "acdc": Source(
        "ACDC, adverse conditions with correspondences (Sakaridis et al., ICCV 2021)",
        "its own, non-commercial, to be accepted with the registration",
        "https://acdc.vision.ee.ethz.ch/download",
        by_hand=("Register on the page, accept the licence and download rgb_anon_trainvaltest.zip and",
                 "gt_detection_trainval.zip. Put images and labels into one of the layouts of docs/data.md,",
                 "below {out}.")),
    "dawn": Source(
        "DAWN, vehicle detection in adverse weather (Kenk and Hassaballah, 2020)",
        "as the page names it; read it before you publish or sell anything",
        "https://data.mendeley.com/datasets/766ygrbt8y/3",
        by_hand=("Download it on the page. It has a folder per weather; for each that you want:",
                 *_VOC, "It comes without lists of a split: docs/data.md has the line that writes them.")),
    "rtts": Source(
        "RTTS, real hazy street scenes of RESIDE (Li et al., TIP 2019)",
        "as the page names it",
        "https://sites.google.com/view/reside-dehaze-datasets",
        by_hand=("Download RTTS (part of RESIDE-beta) from the page.", *_VOC)),
    "rain100l": Source("Rain100L, light synthetic streaks (Yang et al., CVPR 2017)", "as the page names it",
                       "https://www.icst.pku.edu.cn/struct/Projects/joint_rain_removal.html",
                       by_hand=("Download Rain100L from the page.", *_PAIRS)),
    "rain100h": Source("Rain100H, heavy synthetic streaks (Yang et al., CVPR 2017)", "as the page names it",
                       "https://www.icst.pku.edu.cn/struct/Projects/joint_rain_removal.html",
                       by_hand=("Download Rain100H from the page.", *_PAIRS)),
    "raindrop": Source("RainDrop, real drops on glass (Qian et al., CVPR 2018)", "as the page names it",
                       "https://github.com/rui1996/DeRaindrop",
                       by_hand=("Download the data set that the page links to.", *_PAIRS)),
}


def get(archive, out, name):
    """Download and unpack one archive, or find that it is there.

    Args:
        archive: Archive; out: Path of the data set's folder; name: of the part.
    Raises:
        UserError: no room, no connection, not on the server, damaged.
    """
    if (out / archive.holds).exists():
        print(f"{name}: {(out / archive.holds).as_posix()} is there already")
        return
    file = out / Path(archive.url).name
    part = file.with_name(f"{file.name}.part")
    if not file.exists():
        try:
            with config.writing(out):
                out.mkdir(parents=True, exist_ok=True)
            # what is to come, and then all of it once more, unpacked
            download.resumed(archive.url, part, file.name, archive.md5, lambda left: require_room(
                out, left + left + (part.stat().st_size if part.exists() else 0)))
            system.replace(part, file)
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"cannot get {archive.url} ({download.reason(error)}): run the same again, what has "
                            f"arrived is kept; or put that file at {file.as_posix()} by other means") from error
    check(archive, file)
    unpack(archive, file, out, name)


def require_room(out, needed):
    """UserError unless a folder's disk has so many bytes, and a little more."""
    free = shutil.disk_usage(out).free
    if free < needed * _ROOM:
        raise UserError(f"OUT = '{out.as_posix()}' has {free / 1e9:.2f} GB free, {needed * _ROOM / 1e9:.2f} GB are "
                        "needed for the archive and what is in it: free some space, or choose another OUT")


def check(archive, file):
    """UserError, and the file is deleted, where it is not what its owner has published."""
    problem = None
    if archive.md5 and (found := download.md5(file)) != archive.md5:
        problem = f"its MD5 sum is {found}, published is {archive.md5}"
    elif not zipfile.is_zipfile(file):
        problem = "it is no zip file"
    if problem:
        file.unlink()
        raise UserError(f"{file.as_posix()} is damaged ({problem}) and was deleted: run again; if that repeats, "
                        f"something on the way changes the file, and {archive.url} has to be got by other means")


def unpack(archive, file, out, name):
    """Unpack into a folder beside the target first, so that what is there is complete; then delete the archive."""
    building = out / f".{name}.unpacking"
    shutil.rmtree(building, ignore_errors=True)  # of a run that was killed
    try:
        with zipfile.ZipFile(file) as content:
            for member in processes.progress(content.infolist(), f"unpacking {file.name}", unit="file"):
                content.extract(member, building)  # checks the CRC, and stays inside the folder
        for path in sorted(building.iterdir()):
            target = out / path.name
            if target.is_dir():
                shutil.copytree(path, target, dirs_exist_ok=True)
            else:
                system.replace(path, target)
    except zipfile.BadZipFile as error:
        file.unlink()
        raise UserError(f"{file.as_posix()} is damaged ({error}) and was deleted: run again") from error
    except OSError as error:
        raise UserError(f"cannot unpack {file.as_posix()} ({error.strerror or error}): free some space, or choose "
                        "another OUT; the archive is kept") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    if not (out / archive.holds).exists():
        raise UserError(f"{file.as_posix()} has no {archive.holds} in it: not the archive that was expected")
    file.unlink()
    print(f"{name}: {(out / archive.holds).as_posix()}")


def main(**overrides):
    """Get a data set. -> True where it was downloaded, False where there are steps to do by hand."""
    cfg = config.resolve(globals(), overrides)
    if cfg.NAME.lower() not in _SOURCES:
        raise UserError(f"NAME = {cfg.NAME!r}: choose one of {', '.join(_SOURCES)}")
    name, source = cfg.NAME.lower(), _SOURCES[cfg.NAME.lower()]
    out = Path(cfg.OUT or f"./dataset/{name}")
    parts = tuple(cfg.PARTS) or tuple(source.archives)
    if unknown := [part for part in parts if part not in source.archives]:
        known = f"has the parts {', '.join(source.archives)}" if source.archives else "is not downloaded here"
        raise UserError(f"PARTS = {cfg.PARTS!r}: {name} has no {', '.join(map(str, unknown))}; it {known}")
    print(f"{source.title}\npage: {source.page}\nlicence: {source.licence}")
    if not source.archives:
        print("It has to be got by hand:")
        for line in source.by_hand:
            print(f"  {line.format(out=out.as_posix())}")
        return False
    for part in parts:
        get(source.archives[part], out, part)
    print(f"data set: {out.as_posix()}")
    return True


def with_name(words):
    """-> words of a command line, with --NAME where the first one is a data set's name."""
    return ["--NAME", *words] if words and not words[0].startswith("-") else words


if __name__ == "__main__":
    main(**config.from_command_line(globals(), with_name(sys.argv[1:])))
