"""Preprocessing: images, captions and text to shards of latents, token ids, metadata and a manifest.

Two passes over the inputs. The scan reads, checks and hashes every record, one input split at a time. Then
the plan fixes, in input order, which records are kept and which shard each belongs to, and the shards are
written. Each table of the scan and each shard is written atomically, by any process, so a killed command
resumes where it was, and the bytes of a shard do not depend on the process that wrote it.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from pyarrow import parquet
from rich.progress import Progress

from data_prep.config import PreprocessConfig
from data_prep.filters import read_keys
from data_prep.fingerprint import InputFingerprint, write_hashes
from data_prep.plan import Plan, format_counts, make_plan
from data_prep.pool import Pool, Throughput
from data_prep.readers.splits import Inputs
from data_prep.report import describe_unused, summary_line, write_report, write_sheet
from data_prep.scan import table_path
from data_prep.worker import ShardTask, WorkerSettings
from data_prep.write import read_summary, summary_path
from megafusion.data.manifest import FOLDERS, MANIFEST, Kind, Manifest, load_manifest, write_manifest
from megafusion.errors import UserError
from megafusion.progress import progress_bar
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.storage import refuse_foreign

NAMES: dict[Kind, str] = {"pair": "pairs", "text": "texts", "interleaved": "documents"}


class ShardRange(NamedTuple):
    """The shards that one of several tasks writes: every num_tasks-th from the task-th on."""

    task: int = 0
    num_tasks: int = 1


def parse_range(text: str) -> ShardRange:
    """Parse I/N, I from 0. UserError for anything else."""
    task, _, num_tasks = text.partition("/")
    if task.isdecimal() and num_tasks.isdecimal() and int(task) < int(num_tasks):
        return ShardRange(int(task), int(num_tasks))
    raise UserError(f"--shard-range {text}: is not I/N with I from 0 to N - 1; 0/8 is the first of eight")


def preprocess(config: PreprocessConfig, shard_range: ShardRange | None = None) -> list[Manifest]:
    """Write the folders of shards that the configuration describes; those up to date are kept.

    shard_range: each of several tasks writes its own shards, and the last to finish the manifests; the others
    return fewer. Raises UserError for bad input if on_error=fail, a full disk, and a folder that is not ours.
    """
    kinds = [kind for kind, paths in config.inputs.items() if paths]
    if not kinds:
        raise UserError("nothing to preprocess: set `images`, `texts` or `documents`")
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"{config.out}: is a file; name a folder")
    tokenizer = Tokenizer.from_pretrained(config.tokenizer)
    with progress_bar() as progress:
        jobs = [_Job(kind, config, tokenizer, progress, shard_range) for kind in kinds]
        for job in jobs:
            job.refuse_other_shards()
        manifests = {job.folder: job.run() for job in jobs}
    for folder, manifest in manifests.items():
        if manifest:
            write_sheet(folder, manifest, config.vae)
    return [manifest for manifest in manifests.values() if manifest]


class _Job:
    """Preprocessing of one kind of input into one folder of shards."""

    def __init__(
        self,
        kind: Kind,
        config: PreprocessConfig,
        tokenizer: Tokenizer,
        progress: Progress,
        shard_range: ShardRange | None,
    ):
        self.folder = config.out / FOLDERS[kind]
        self._kind, self._config, self._progress, self._shard_range = kind, config, progress, shard_range
        self._inputs = Inputs(
            kind, config.inputs[kind], config.output_folders, config.text_column, config.image_column
        )
        self._splits = self._inputs.splits
        self._fingerprint = InputFingerprint(kind, config, tokenizer, self._inputs)
        self._selected_keys = read_keys(config.keys) if kind == "pair" and config.keys else None
        # Named by the fingerprint, so that concurrent tasks of other inputs never delete each other's work.
        self._partial = self.folder.with_name(f"{self.folder.name}.{self._fingerprint.digest}.partial")
        self._work = self._partial / "work"

    def refuse_other_shards(self) -> None:
        """UserError where the folder holds anything but shards that were made with the same keys."""
        refuse_foreign(self.folder, MANIFEST)
        try:
            manifest = load_manifest(self.folder)
        except UserError:  # no shards, or none that can be used
            return
        changed = self._fingerprint.changed_keys(self.folder, manifest)
        if changed and not self._config.overwrite:
            raise UserError(
                f"{self.folder}: holds {manifest.num_documents} documents made with other values of "
                f"{', '.join(changed)}; choose another out, or set overwrite=true to replace them"
            )

    def run(self) -> Manifest | None:
        """The manifest of the folder; None where other tasks have shards left to write."""
        if self._fingerprint.is_current(self.folder):
            self._print(f"{self.folder}: up to date")
            return self._finished()
        try:
            return self._run()
        except OSError as error:
            if self._fingerprint.is_current(self.folder):  # another task has finished meanwhile
                return self._finished()
            if error.filename and not Path(error.filename).is_relative_to(self._config.out):
                raise UserError(
                    f"{error.filename}: {error.strerror}; restore it, and run the same command to resume"
                ) from error
            way_out = (
                "another command writes there, too; choose another out"
                if isinstance(error, FileNotFoundError)
                else "free space or choose another folder"
            )
            raise UserError(
                f"{self.folder}: cannot be written ({error.strerror or error}); {way_out}; finished work is "
                "kept, and the same command resumes from it"
            ) from error
        finally:
            self._remove_if_empty()

    def _run(self) -> Manifest | None:
        for name in ("scan", "shards"):
            (self._work / name).mkdir(parents=True, exist_ok=True)
        settings = WorkerSettings(
            self._kind, self._config, self._splits, self._selected_keys, self._partial, self._work
        )
        task, num_tasks = self._shard_range or ShardRange()
        with Pool(settings, self._config.num_workers) as pool:
            # Each task starts at its own share of the splits, then scans the rest: none waits for another.
            first = task * len(self._splits) // num_tasks
            self._map(pool, "scan", [*range(first, len(self._splits)), *range(first)], None)
            plan = make_plan(self._splits, self._tables(), self._config, self._selected_keys)
            per_shard = self._config.documents_per_shard
            num_shards = plan.num_shards(per_shard)
            if not num_shards:
                raise UserError(
                    f"{self.folder}: the inputs hold no valid document: {describe_unused(plan)}; nothing is "
                    f"written; files ignored: {format_counts(self._inputs.ignored)}"
                )
            tasks = [ShardTask(n, *plan.shard(n, per_shard)) for n in range(task, num_shards, num_tasks)]
            self._map(pool, "write", tasks, sum(len(task.rows) for task in tasks))
        return self._finish(plan, num_shards)

    def _map(self, pool: Pool, method: str, tasks: list[Any], total: int | None) -> None:
        unit = NAMES[self._kind]
        name = f"scanning {unit}" if method == "scan" else f"{unit} to {self.folder}"
        task, throughput = self._progress.add_task(name, total=total, losses=""), Throughput(unit)
        num_done = 0

        def report(number: int) -> None:
            nonlocal num_done
            num_done = number
            self._progress.update(task, completed=number, losses=throughput(number))

        for _ in pool.map(method, tasks, report):
            pass
        self._progress.update(
            task, total=total if total is not None else num_done, completed=total or num_done
        )

    def _finish(self, plan: Plan, num_shards: int) -> Manifest | None:
        found = (read_summary(summary_path(self._work, number)) for number in range(num_shards))
        summaries = [summary for summary in found if summary]
        if missing := num_shards - len(summaries):
            self._print(
                f"{self.folder}: {missing} of {num_shards} shards are left to other tasks; the last to "
                "finish writes the manifest, or the same command without --shard-range"
            )
            return None
        if self._shard_range and not self._is_first_to_finish():
            self._print(f"{self.folder}: all shards are complete, and another task writes the manifest")
            return None
        self._fingerprint.refuse_changed()
        hashes: dict[str, list] = {}
        for table in self._tables():
            hashes |= json.loads(parquet.read_schema(table).metadata[b"files"])
        hashes = self._fingerprint.hash_files(hashes)
        write_hashes(self._partial, hashes)
        fields = self._fingerprint.fields | {"provenance": self._fingerprint.provenance(hashes)}
        manifest = write_manifest(self._partial, summaries, fields)
        write_report(self._partial, plan, self._inputs.ignored, manifest)
        self._replace()
        self._print(summary_line(self.folder, plan, self._inputs.ignored, manifest))
        return self._finished()

    def _tables(self) -> list[Path]:
        return [table_path(self._work, split.number) for split in self._splits]

    def _is_first_to_finish(self) -> bool:
        try:
            (self._work / "finishing").mkdir()
        except FileExistsError:
            return False
        return True

    def _replace(self) -> None:
        """Rename the finished folder into place. After a kill in between, the next command completes this."""
        old = self.folder.with_name(f"{self.folder.name}.old.partial")
        if self.folder.exists():
            shutil.rmtree(old, ignore_errors=True)  # what a killed command has not deleted
            self.folder.rename(old)
        self._partial.rename(self.folder)
        for stale in self.folder.parent.glob(f"{self.folder.name}.*.partial"):
            shutil.rmtree(stale, ignore_errors=True)

    def _finished(self) -> Manifest:
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        return load_manifest(self.folder)

    def _remove_if_empty(self) -> None:
        """Remove a partial folder without any file."""
        # os.walk tolerates folders that other tasks remove meanwhile.
        if not any(files for _, _, files in os.walk(self._partial)):
            shutil.rmtree(self._partial, ignore_errors=True)

    def _print(self, line: str) -> None:
        self._progress.console.print(line, markup=False)
