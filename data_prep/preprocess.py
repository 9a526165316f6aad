"""Pictures, captions and text to shards that a run reads: latents, token ids, metadata, a manifest.

Two passes over the inputs. The scan reads, judges and hashes every record, a piece of the inputs at a time.
Then it is settled, in input order, what is kept and in which shard it stands; and the shards are made. Tables
of the scan and shards are each written whole or not at all, by any process, so a command that was killed goes
on where it was, and no byte of a shard depends on who made it.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pyarrow import parquet
from rich.progress import Progress

from data_prep.config import PreprocessConfig
from data_prep.fingerprint import InputFingerprint, write_hashes
from data_prep.plan import Plan, make_plan
from data_prep.pool import Pool, Speed
from data_prep.readers.inputs import find_pieces
from data_prep.report import summary, write_report, write_sheet
from data_prep.worker import ShardTask, WorkerSettings, table_path
from data_prep.write import read_record, shard_record
from megafusion.data.shards import FOLDERS, MANIFEST, Kind, Manifest, load_manifest, write_manifest
from megafusion.errors import UserError
from megafusion.progress import progress_bar
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.storage import refuse_foreign

NAMES: dict[Kind, str] = {"pair": "pairs", "text": "texts", "interleaved": "documents"}


class ShardRange(NamedTuple):
    """Which shards a command makes: every count-th from the index-th on."""

    index: int = 0
    count: int = 1


def parse_range(text: str) -> ShardRange:
    """I/N, I from 0. UserError for anything else."""
    index, _, count = text.partition("/")
    if index.isdecimal() and count.isdecimal() and int(index) < int(count):
        return ShardRange(int(index), int(count))
    raise UserError(f"--shard-range {text}: is not I/N with I from 0 to N - 1; 0/8 is the first of eight")


def preprocess(config: PreprocessConfig, part: ShardRange | None = None) -> list[Manifest]:
    """Make the folders of shards that the configuration asks for; those already up to date are kept.

    part: of several tasks each makes its own shards, and the one that ends last the manifests; the others
    return fewer. Raises UserError for bad input by policy, a full disk, and a folder that is not ours.
    """
    if not (config.pictures or config.texts or config.documents):
        raise UserError("nothing to preprocess: give `pictures`, `texts` or `documents`")
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"{config.out}: is a file; name a folder")
    tokenizer = Tokenizer.from_pretrained(config.tokenizer)
    kinds: dict[Kind, Sequence[Path]] = {
        "pair": config.pictures,
        "text": config.texts,
        "interleaved": config.documents,
    }
    with progress_bar() as progress:
        jobs = [_Job(kind, config, tokenizer, progress, part) for kind, paths in kinds.items() if paths]
        made = {job.folder: job.run() for job in jobs}
    for folder, manifest in made.items():
        if manifest:
            write_sheet(folder, manifest, config.vae)
    return [manifest for manifest in made.values() if manifest]


class _Job:
    """The making of one folder of shards."""

    def __init__(
        self,
        kind: Kind,
        config: PreprocessConfig,
        tokenizer: Tokenizer,
        progress: Progress,
        part: ShardRange | None,
    ):
        self.folder = config.out / FOLDERS[kind]
        self._kind, self._config, self._progress, self._part = kind, config, progress, part
        self._pieces = find_pieces(kind, config)
        self._identity = InputFingerprint(kind, config, tokenizer, self._pieces)
        self._wanted = set(config.keys.read_text().split()) if kind == "pair" and config.keys else None
        # Named by what goes in, so that tasks that start side by side never clear away each other's work.
        self._partial = self.folder.with_name(f"{self.folder.name}.{self._identity.digest}.partial")
        self._work = self._partial / "work"

    def run(self) -> Manifest | None:
        """The manifest of the folder; None where shards are left that other tasks make."""
        if self._identity.is_current(self.folder):
            self._say(f"{self.folder}: up to date")
            return self._cleared()
        refuse_foreign(self.folder, MANIFEST)
        try:
            return self._make()
        except OSError as error:
            if self._identity.is_current(self.folder):  # another task has ended the work meanwhile
                return self._cleared()
            if error.filename and not Path(error.filename).is_relative_to(self._config.out):
                raise UserError(
                    f"{error.filename}: {error.strerror}; bring it back, and the same command goes on"
                ) from error
            raise UserError(
                f"{self.folder}: cannot be written ({error.strerror or error}); free space or choose another "
                "folder; what is made is kept, and the same command goes on from it"
            ) from error
        finally:
            self._remove_if_empty()

    def _make(self) -> Manifest | None:
        for name in ("scan", "shards"):
            (self._work / name).mkdir(parents=True, exist_ok=True)
        settings = WorkerSettings(
            self._kind, self._config, self._pieces, self._wanted, self._partial, self._work
        )
        index, count = self._part or ShardRange()
        with Pool(settings, self._config.num_workers) as pool:
            # Each task begins with a share of its own, then helps with what is left: none waits for another.
            first = index * len(self._pieces) // count
            order = [*range(first, len(self._pieces)), *range(first)]
            self._run(pool, "scan", order, None)
            plan = make_plan(self._pieces, self._tables(), self._config, self._wanted)
            per_shard = self._config.documents_per_shard
            num_shards = plan.num_shards(per_shard)
            if not num_shards:
                raise UserError(
                    f"{self.folder}: the inputs hold no document that can be used; nothing is written"
                )
            tasks = [ShardTask(n, *plan.shard(n, per_shard)) for n in range(index, num_shards, count)]
            self._run(pool, "make", tasks, sum(len(task.rows) for task in tasks))
        return self._finish(plan, num_shards)

    def _run(self, pool: Pool, method: str, tasks: list[Any], total: int | None) -> None:
        what = NAMES[self._kind]
        name = f"scanning {what}" if method == "scan" else f"{what} to {self.folder}"
        task, speed = self._progress.add_task(name, total=total, losses=""), Speed(what)
        done = 0

        def report(number: int) -> None:
            nonlocal done
            done = number
            self._progress.update(task, completed=number, losses=speed(number))

        for _ in pool.map(method, tasks, report):
            pass
        self._progress.update(task, total=total if total is not None else done, completed=total or done)

    def _finish(self, plan: Plan, num_shards: int) -> Manifest | None:
        records = [read_record(shard_record(self._work, number)) for number in range(num_shards)]
        if missing := records.count(None):
            self._say(
                f"{self.folder}: {missing} of {num_shards} shards are left to other tasks; the one that ends "
                "last writes the manifest, or the same command without --shard-range"
            )
            return None
        if self._part and not self._is_first_to_finish():
            self._say(f"{self.folder}: all shards are made, and another task writes the manifest")
            return None
        self._identity.refuse_changed()
        hashes: dict[str, list] = {}
        for table in self._tables():
            hashes |= json.loads(parquet.read_schema(table).metadata[b"files"])
        hashes = self._identity.hash_files(hashes)
        write_hashes(self._partial, hashes)
        fields = self._identity.fields | {"provenance": self._identity.provenance(hashes)}
        made = write_manifest(self._partial, records, fields)
        write_report(self._partial, plan, made)
        self._replace()
        self._say(summary(self.folder, plan, made))
        return self._cleared()

    def _tables(self) -> list[Path]:
        return [table_path(self._work, piece.number) for piece in self._pieces]

    def _is_first_to_finish(self) -> bool:
        try:
            (self._work / "finishing").mkdir()
        except FileExistsError:
            return False
        return True

    def _replace(self) -> None:
        """Put what is made in its place. A kill in between leaves it beside, whole, for the next command."""
        old = self.folder.with_name(f"{self.folder.name}.old.partial")
        if self.folder.exists():
            self.folder.rename(old)
        self._partial.rename(self.folder)
        for left in self.folder.parent.glob(f"{self.folder.name}.*.partial"):
            shutil.rmtree(left, ignore_errors=True)

    def _cleared(self) -> Manifest:
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        return load_manifest(self.folder)

    def _remove_if_empty(self) -> None:
        """What has come to nothing leaves nothing behind."""
        # os.walk, for other tasks may take folders away meanwhile.
        if not any(files for _, _, files in os.walk(self._partial)):
            shutil.rmtree(self._partial, ignore_errors=True)

    def _say(self, line: str) -> None:
        self._progress.console.print(line, markup=False)
