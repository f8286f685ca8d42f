"""Makes many borg archives in one process: points_borg.py REPOSITORY HOST BEGIN FILE...

A `borg create` takes half a second at least, and longer the more archives there are; ten thousand take hours. So this
does what it does, with borg's own classes, and commits once for all archives of a VM. Run it with the Python that borg
runs with. BEGIN is the time of the first archive in seconds; they are an hour apart.
"""

import datetime
import sys

from borg.archive import Archive, ChunksProcessor, FilesystemObjectProcessors, MetadataCollector
from borg.cache import Cache
from borg.compress import CompressionSpec
from borg.constants import CHUNKER_PARAMS
from borg.helpers import Manifest
from borg.logger import setup_logging
from borg.repository import Repository


class Uncommitted:
    """Holds the commits of repository, cache and manifest back."""

    def __init__(self, *methods):
        self.held = [(owner, name, getattr(owner, name)) for owner, name in methods]

    def __enter__(self):
        for owner, name, _ in self.held:
            setattr(owner, name, lambda *_, **__: None)

    def __exit__(self, *_):
        for owner, name, method in self.held:
            setattr(owner, name, method)


def create(repository, key, manifest, cache, name, time, path):
    archive = Archive(
        repository, key, manifest, name, cache=cache, create=True, chunker_params=CHUNKER_PARAMS,
        start=time, start_monotonic=0,
    )  # fmt: skip
    metadata = MetadataCollector(
        noatime=True, noctime=False, numeric_ids=False, noflags=False, noacls=False, noxattrs=False, nobirthtime=False
    )
    chunks = ChunksProcessor(
        cache=cache, key=key, add_item=archive.add_item, write_checkpoint=archive.write_checkpoint,
        checkpoint_interval=0, rechunkify=False,
    )  # fmt: skip
    objects = FilesystemObjectProcessors(
        metadata_collector=metadata, cache=cache, key=key, add_item=archive.add_item, sparse=False, log_json=False,
        process_file_chunks=chunks.process_file_chunks, chunker_params=CHUNKER_PARAMS, show_progress=False, iec=False,
        file_status_printer=lambda *_: None,
    )  # fmt: skip
    with open(path, "rb") as image:
        objects.process_pipe(path="disk.raw", cache=cache, fd=image, mode=0o600, user="root", group="root")
    archive.stats += objects.stats
    archive.save(timestamp=time)


def main():
    setup_logging(level="warning")
    place, host, begin, paths = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]
    with Repository(place, exclusive=True) as repository:
        manifest, key = Manifest.load(repository, (Manifest.Operation.WRITE,))
        key.compressor = CompressionSpec("zstd,1").compressor
        with Cache(repository, key, manifest) as cache:
            with Uncommitted((repository, "commit"), (cache, "commit"), (manifest, "write")):
                for number, path in enumerate(paths):
                    time = datetime.datetime.utcfromtimestamp(begin + 3600 * number)
                    create(repository, key, manifest, cache, f"{host}-{number:04}", time, path)
            manifest.write()
            repository.commit(compact=False)
            cache.commit()


main()
