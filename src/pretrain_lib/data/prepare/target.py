"""Check the folder into which text is prepared: neither foreign files nor a source."""

from pathlib import Path

from pretrain_lib.data.prepare.job import JOB, Job
from pretrain_lib.data.tokens.manifests import MANIFEST, parse_manifest
from pretrain_lib.files.outputs import check_folder
from pretrain_lib.files.reading import read_object


def check_target(job: Job, folder: Path) -> None:
    """Raise ValueError unless `folder` is new, empty or prepared, and none of the sources."""
    for name in (source for source in job.sources if isinstance(source, str)):
        if Path(name).expanduser().resolve() == folder.resolve():
            raise ValueError(
                f"data.path={folder} is data.source={name}, the text itself; give another folder"
            )
    check_folder(folder, named="data.path=", kind="a prepared folder", is_ours=is_prepared)


def is_prepared(folder: Path) -> bool:
    """Return whether a folder was made by `pretrain prepare`, even if it did not finish."""
    try:
        if (folder / JOB).is_file():
            return {"format_version", "sources"} <= read_object(folder / JOB).keys()
        return bool(parse_manifest(folder / MANIFEST))
    except (OSError, ValueError):
        return False
