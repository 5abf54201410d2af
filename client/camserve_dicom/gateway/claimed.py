"""Workitems that the gateway has claimed, on disk. The entry of a workitem in the spool has these files:

workitem.json UIDs of the workitem and of the transaction, the phase, and the outcome with its attributes
images/       a file for each image of the workitem, which is named as the entry of the image
added/        a file for each image that was added to the inbox, or was in progress already
failed/       a file with the reason for each image that could not be retrieved
skipped/      a file with the reason for each image that is not to be explained
done/         a file for each image whose results the PACS has, with references to them
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydicom import dcmread

from camserve_dicom.gateway.spool import Spool, Stage, read_json, write_file

__all__ = ["Images", "image_states", "record_results", "results_of"]

_RESULT = ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID")


@dataclass(frozen=True)
class Images:
    """Names of the images of a workitem, by state.

    Attributes:
        to_retrieve: Those that are not retrieved yet.
        pending: Those that are explained or stored.
        done: Those whose results the PACS has.
        skipped: Those that are not to be explained.
        not_retrieved: Those that could not be retrieved.
        failed: Those that could not be explained, or whose results the PACS refuses.
    """

    to_retrieve: list[str]
    pending: list[str]
    done: list[str]
    skipped: list[str]
    not_retrieved: list[str]
    failed: list[str]

    @property
    def total(self) -> int:
        """The number of images."""
        return sum(map(len, vars(self).values()))

    @property
    def left(self) -> int:
        """The number of images that are not finished."""
        return len(self.to_retrieve) + len(self.pending)


def image_states(spool: Spool, entry: Path) -> Images:
    """Return the images of a workitem by state.

    Args:
        spool: The spool.
        entry: The entry of the workitem.
    """
    images = Images([], [], [], [], [], [])
    for path in sorted((entry / "images").glob("[!.]*")):
        name = path.name
        # `record_results` runs before an entry leaves these stages. Messages that are not sent do not count.
        if spool.is_in_progress(name, besides=Stage.notify):
            images.pending.append(name)
        elif (entry / "done" / name).exists():
            images.done.append(name)
        elif (entry / "skipped" / name).exists():
            images.skipped.append(name)
        elif (entry / "failed" / name).exists():
            images.not_retrieved.append(name)
        elif (entry / "added" / name).exists():
            images.failed.append(name)
        else:
            images.to_retrieve.append(name)
    return images


def record_results(spool: Spool, entry: Path) -> None:
    """Record in the workitems of an image that the PACS has its results.

    Args:
        spool: The spool.
        entry: The entry of the image, with all its results in sent/.
    """
    workitems = [each for each in spool.entries(Stage.worklist) if (each / "images" / entry.name).exists()]
    if not workitems:
        return
    headers = [dcmread(file, specific_tags=[*_RESULT]) for file in sorted((entry / "sent").glob("*.dcm"))]
    results = [{name: str(header[name].value) for name in _RESULT} for header in headers]
    if not entry.exists():  # another thread removed it
        return
    for each in workitems:
        write_file(each / "done" / entry.name, {"results": results}, new_folder=True)
    spool.arrived[Stage.worklist].set()


def results_of(entry: Path, images: list[str]) -> list[dict[str, str]]:
    """Return references to the results of images of a workitem, without repetitions."""
    found = [each for name in images for each in read_json(entry / "done" / name)["results"]]
    return [each for index, each in enumerate(found) if each not in found[:index]]
