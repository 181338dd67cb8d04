"""Pascal VOC data sets: an XML file for each image."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from sparse_rcnn.data.dataset import Annotation, Records, some
from sparse_rcnn.data.decode import ImageError, image_size
from sparse_rcnn.sources import IMAGE_SUFFIXES

_SET_NAMES = {"train": ("train", "trainval"), "valid": ("val", "valid", "test"), "test": ("test",)}
_FOLDER_NAMES = {"train": ("train",), "valid": ("valid", "val"), "test": ("test",)}


@dataclass
class VocFiles:
    """Where the files of a split are.

    Attributes:
        root: what messages name, and what file names are relative to.
        annotations: the XML files of the split, in order.
        image_dir: folder of the images; None where each is beside its XML file.
        all_annotations: the XML files of all splits: the classes and the origin of the pixels are common to all.
    """

    root: Path
    annotations: list[Path]
    image_dir: Path | None
    all_annotations: list[Path]


def find_voc(data: Path, split: str) -> tuple[VocFiles | None, list[str]]:
    """Find the files of a split.

    Args:
        data: VOC's own layout (``Annotations/``, ``JPEGImages/`` or ``images/``, and ``ImageSets/Main/<split>.txt``;
            without the latter, all is one split), or Roboflow's (``<split>/`` with each XML beside its image), or a
            folder of XML files beside their images.
        split: ``train`` (``trainval`` if there is no ``train``), ``valid`` (``val``, else ``test``) or ``test``.

    Returns:
        The files or None, and the places that were tried.
    """
    annotations = data / "Annotations"
    image_dir = next((data / name for name in ("JPEGImages", "images") if (data / name).is_dir()), data / "JPEGImages")
    tried = ["Annotations/*.xml with JPEGImages/"]
    if annotations.is_dir() and image_dir.is_dir():
        every = sorted(annotations.glob("*.xml"))
        sets = data / "ImageSets" / "Main"
        if not sets.is_dir():
            return VocFiles(data, every, image_dir, every), tried
        for name in _SET_NAMES[split]:
            if (sets / f"{name}.txt").is_file():
                listed = _listed(sets / f"{name}.txt", annotations)
                return VocFiles(data, listed, image_dir, every), tried
        return None, [f"ImageSets/Main/{name}.txt" for name in _SET_NAMES[split]]
    for name in _FOLDER_NAMES[split]:
        found = sorted((data / name).glob("*.xml"))
        if found:
            every = sorted(path for folder in data.iterdir() if folder.is_dir() for path in folder.glob("*.xml"))
            return VocFiles(data, found, None, every), tried
        tried.append(f"{name}/*.xml")
    found = sorted(data.glob("*.xml"))
    return (VocFiles(data, found, None, found) if found else None), [*tried, "*.xml beside the images"]


def _listed(path: Path, annotations: Path) -> list[Path]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot read the list of images: {error}") from None
    return [annotations / f"{line.strip()}.xml" for line in lines if line.strip()]


def read_voc(files: VocFiles) -> Records:
    """Read a split of a Pascal VOC data set.

    The classes are those of all splits, in alphabetical order (which for VOC's own 20 is the usual one). Images are
    numbered from 1 in the order of the split's list or of their names; so are the categories.

    VOC counts pixels from 1 and its boxes include the last one: xmin..xmax is [xmin - 1, xmax] here, as in detectron2.
    Programs that write VOC files from other formats often count from 0; a 0 anywhere in a data set tells, and then
    its boxes are taken as they stand. Objects marked difficult are crowds: not trained on, and ignored in evaluation.

    Raises:
        ValueError: an XML file cannot be understood, or there are no images.
    """
    parsed = {path: _parse(path) for path in files.all_annotations}
    objects = [thing for document in parsed.values() for thing in document.objects]
    origin = 0.0 if any(min(thing.box[:2]) == 0 for thing in objects) else 1.0
    names = sorted({thing.name for thing in objects})
    if not names:
        raise ValueError(f"{files.root}: expected objects in the annotations, got none in {len(parsed)} files")
    categories = {name: number for number, name in enumerate(names, start=1)}
    records = Records(files.root, files.root, [], categories, [], open_classes=True)
    for path in files.annotations:
        if path in parsed:
            _add_image(path, parsed[path], files, origin, records)
        else:
            records.left_out.append(path.stem)
            records.problems.append(f"{path.relative_to(files.root)}: no such file, left out")
    if not records.images:
        raise ValueError(f"{files.root}: no image of the split can be read; missing: {some(records.left_out)}")
    if files.image_dir is None:
        _note_unannotated(files.annotations, records)
    return records


@dataclass
class _Object:
    name: str
    box: tuple[float, float, float, float]  # xmin, ymin, xmax, ymax as in the file
    difficult: bool


@dataclass
class _Document:
    file_name: str
    size: tuple[int, int] | None  # height, width
    objects: list[_Object]


def _parse(path: Path) -> _Document:
    try:
        root = ElementTree.parse(path).getroot()
        objects = [_parse_object(element) for element in root.iter("object")]
        sides = [int(float(root.findtext(f"size/{side}") or 0)) for side in ("height", "width")]
    except OSError as error:
        raise ValueError(f"{path}: cannot read the annotations: {error.strerror}") from None
    except (ElementTree.ParseError, ValueError, OverflowError, LookupError) as error:
        raise ValueError(f"{path}: not a Pascal VOC annotation: {' '.join(str(error).split())}") from None
    size = (sides[0], sides[1]) if min(sides) > 0 else None
    return _Document((root.findtext("filename") or "").strip(), size, objects)


def _parse_object(element: ElementTree.Element) -> _Object:
    name = (element.findtext("name") or "").strip()
    if not name:
        raise ValueError("an object has no name")
    box = element.find("bndbox")
    corners = [None if box is None else box.findtext(corner) for corner in ("xmin", "ymin", "xmax", "ymax")]
    if None in corners:
        raise ValueError(f"object {name}: expected a bndbox with xmin, ymin, xmax and ymax")
    xmin, ymin, xmax, ymax = map(float, corners)
    return _Object(name, (xmin, ymin, xmax, ymax), (element.findtext("difficult") or "0").strip() == "1")


def _add_image(path: Path, document: _Document, files: VocFiles, origin: float, records: Records) -> None:
    image = _image_of(path, document.file_name, files.image_dir or path.parent)
    name = str((image or path).relative_to(files.root))
    try:
        if image is None:
            raise ImageError("no image of this name")
        size = document.size or image_size(image)
    except ImageError as error:
        records.left_out.append(name)
        records.problems.append(f"{name}: {str(error).removeprefix(f'{image}: ')}, left out")
        return
    index = len(records.images)
    records.images.append({"id": index + 1, "file_name": name, "height": size[0], "width": size[1]})
    for number, thing in enumerate(document.objects, start=1):
        xmin, ymin, xmax, ymax = thing.box
        box = [xmin - origin, ymin - origin, xmax - xmin + origin, ymax - ymin + origin]
        where = f"{path.name} object {number}"
        records.annotations.append(Annotation(index, records.categories[thing.name], box, where, thing.difficult))


def _image_of(path: Path, file_name: str, folder: Path) -> Path | None:
    """The image of an XML file: of the same stem, for the name inside is often that of before an export."""
    suffixes = [".jpg", *sorted(IMAGE_SUFFIXES - {".jpg"})]
    candidates = [folder / f"{path.stem}{suffix}" for suffix in (*suffixes, *map(str.upper, suffixes))]
    # Its name alone: a path inside is that of another machine.
    candidates += [folder / Path(file_name).name] if file_name else []
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _note_unannotated(annotations: Iterable[Path], records: Records) -> None:
    annotated = {Path(name).name for name in (*(i["file_name"] for i in records.images), *records.left_out)}
    for folder in sorted({path.parent for path in annotations}):
        names = {path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}
        records.problems += [f"{name}: an image without an XML file, left out" for name in sorted(names - annotated)]
