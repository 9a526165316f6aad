"""Any topology loads a checkpoint of any other, bit for bit, and a save is complete or leaves nothing."""

import json
import os
import resource
import shutil
import signal
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch.distributed.checkpoint.metadata import MetadataIndex

from megafusion.checkpoint import manager as manager_module
from megafusion.checkpoint.config import CheckpointConfig
from megafusion.checkpoint.folder import complete_checkpoints, read_manifest, verify_checkpoint
from megafusion.checkpoint.manager import CheckpointManager
from megafusion.checkpoint.reader import CheckpointReader
from megafusion.engine.ema import Ema
from megafusion.errors import UserError
from tests.support.checkpoints import load_full_tensors
from tests.support.engines import (
    BF16,
    Model,
    Run,
    Topology,
    contents,
    make_run,
    model_weights,
    step_counts,
)
from tests.support.marks import full
from tests.support.workers import WorkersFailed, run_workers

# Some parameters stay whole on every rank, and there are more flat groups than groups of the optimizer.
SMALL = {"zero_optimization": {"stage3_param_persistence_threshold": 50, "sub_group_size": 100}}
TOPOLOGIES = [
    Topology(1, 0),
    Topology(1, 1),
    Topology(2, 1),
    Topology(2, 2),
    Topology(2, 3, SMALL),
    Topology(4, 1),
]
LOW_PRECISION = [Topology(2, 1, BF16), Topology(2, 2, BF16), Topology(2, 3, SMALL | BF16)]
OFFLOADED = [
    Topology(2, stage, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}) for stage in (1, 2, 3)
]


def manager_of(run: Run, folder: Path, keep_last: int = 2, keep_every: int = 0) -> CheckpointManager:
    config = CheckpointConfig(keep_last=keep_last, keep_every=keep_every)
    return CheckpointManager(folder, run.state, run.ema, config)


def save(manager: CheckpointManager, step: int) -> None:
    state = {"step": step, "topology": {"world_size": dist.get_world_size()}}
    manager.save(state, {"batch_number": step, "streams": {str(dist.get_rank()): {"at": step}}})


def save_and_continue(topology: Topology, folder: Path) -> tuple[dict, list[float]]:
    """Three steps, a save, two more: the state at the save, and the losses after it."""
    run = make_run(topology)
    for number in (1, 2, 3):
        run.step(number)
    with manager_of(run, folder) as manager:
        before = contents(run)
        save(manager, 3)
        losses = [run.step(number) for number in (4, 5)]  # while the thread writes
    return before, losses


def load_each(topology: Topology, folders: list[Path]) -> list[tuple[dict, list[float]]]:
    """Load each into one engine: the state after it, and the next losses."""
    run, found = make_run(topology, seed=1), []
    for folder in folders:
        manager = manager_of(run, folder)
        state = manager.load(folder / "step-00000003")
        assert state["step"] == 3
        assert step_counts(run) == {3.0}
        # As after its own step, the small parameters are whole on every rank.
        persistent = getattr(run.engine.optimizer, "persistent_parameters", [])
        assert all(parameter.ds_status == ZeroParamStatus.AVAILABLE for parameter in persistent)
        assert bool(persistent) == (topology.stage == 3)
        after = contents(run)
        for name, weight in model_weights(run).items():
            assert torch.equal(weight, after[f"model.{name}"].to(weight.dtype)), name
        found.append((after, [run.step(number) for number in (4, 5)]))
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, tuple]:
    """The checkpoint of a topology, the state that it should hold, and the losses that followed.

    Each topology is trained and saved when first asked for.
    """
    topologies = {str(topology): topology for topology in TOPOLOGIES + LOW_PRECISION}

    class Saved(dict):
        def __missing__(self, name: str) -> tuple:
            topology, folder = topologies[name], tmp_path_factory.mktemp(name)
            self[name] = (folder, *run_workers(save_and_continue, topology.data, topology, folder)[0])
            return self[name]

    return Saved()


# ZeRO 3 and ZeRO 1 in each other, over other numbers of ranks, stand for every pair of topologies.
@pytest.mark.parametrize(
    ("topology", "sources"),
    [
        pytest.param(Topology(2, 3, SMALL), [Topology(2, 1), Topology(4, 1)], id="zero3-from-zero1"),
        pytest.param(Topology(4, 1), [Topology(2, 3, SMALL)], id="zero1-from-zero3"),
        *(pytest.param(each, TOPOLOGIES, id=str(each), marks=pytest.mark.full) for each in TOPOLOGIES),
    ],
)
def test_every_topology_loads_every_other_bit_for_bit(saved, topology, sources):
    sources = [saved[str(source)] for source in sources]
    by_rank = run_workers(load_each, topology.data, topology, [folder for folder, _, _ in sources])
    for found in by_rank:
        for (after, losses), (_, before, losses_then) in zip(found, sources, strict=True):
            assert_same(after, before)
            assert losses == pytest.approx(losses_then, abs=1e-5)


# ZeRO 3 in bf16 and offloaded ZeRO 3 and 1 stand for the other stages.
@pytest.mark.parametrize(
    ("topology", "sources"),
    [
        pytest.param(LOW_PRECISION[2], LOW_PRECISION[::2], id="zero3-from-zero1"),
        pytest.param(OFFLOADED[0], LOW_PRECISION[2:], id="offloaded-zero1"),
        pytest.param(OFFLOADED[2], LOW_PRECISION[:1], id="offloaded-zero3"),
        *(
            pytest.param(each, LOW_PRECISION, id=f"{each}", marks=pytest.mark.full)
            for each in (*LOW_PRECISION, Topology(1, 1), *OFFLOADED)
        ),
    ],
)
def test_bf16_weights_with_float32_masters_and_an_offloaded_optimizer(saved, topology, sources):
    sources = [saved[str(source)] for source in sources]
    by_rank = run_workers(load_each, topology.data, topology, [folder for folder, _, _ in sources])
    for found in by_rank:
        for (after, losses), (_, before, losses_then) in zip(found, sources, strict=True):
            assert_same(after, before)
            assert losses == pytest.approx(losses_then, abs=2e-2)


def shapes_of_model() -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in Model().named_parameters()}


QUICK = [Topology(2, 3, SMALL), Topology(4, 1), LOW_PRECISION[0]]


@pytest.mark.parametrize(
    "topologies", [QUICK, *full((TOPOLOGIES + LOW_PRECISION,))], ids=["three topologies", "all"]
)
def test_full_averages_are_loaded_without_an_engine(saved, topologies):
    for folder, before, _ in (saved[str(topology)] for topology in topologies):
        for name, tensor in load_full_tensors(folder / "step-00000003", shapes_of_model(), "ema").items():
            assert torch.equal(tensor, before[f"ema.{name}"])


def test_a_checkpoint_holds_the_streams_of_all_ranks_and_the_state_given(saved):
    folder, _, _ = saved[str(Topology(2, 1))]
    state = json.loads((folder / "step-00000003/state.json").read_text())
    assert state["data"] == {"batch_number": 3, "streams": {"0": {"at": 3}, "1": {"at": 3}}}
    assert state["topology"] == {"world_size": 2}


@pytest.mark.parametrize("topology", [Topology(2, 1), Topology(2, 3, SMALL), Topology(4, 1)], ids=str)
def test_every_rank_writes_what_it_owns_and_nothing_twice(saved, topology):
    folder, _, _ = saved[str(topology)]
    metadata = CheckpointReader(folder / "step-00000003").read_metadata()
    by_file: Counter = Counter()
    for name, entry in metadata.state_dict_metadata.items():
        for chunk in entry.chunks:
            file = metadata.storage_data[MetadataIndex(name, chunk.offsets)].relative_path
            by_file[file] += chunk.sizes.numel()
    assert by_file.keys() == {f"__{rank}_0.distcp" for rank in range(topology.data)}
    numel = 4 * sum(shape.numel() for shape in shapes_of_model().values())
    assert by_file.total() == numel
    assert max(by_file.values()) < 1.1 * numel / topology.data + 16 * topology.data


def save_while_writing_is_held(folder: Path) -> list[float]:
    run = make_run(Topology(2, 1))
    run.step(1)
    released, write = threading.Event(), manager_module._Writer.write_data

    def held(*arguments):
        assert released.wait(60)
        return write(*arguments)

    manager_module._Writer.write_data = held
    with manager_of(run, folder) as manager:
        expected = contents(run)
        save(manager, 3)
        run.step(2)
        run.step(3)
        assert complete_checkpoints(folder) == []
        threading.Timer(0.5, released.set).start()
        save(manager, 4)  # waits for the running one
        assert [c.name for c in complete_checkpoints(folder)] == ["step-00000003"]
        later = contents(run)
    return expected, later


def interrupt_while_writing_is_held(folder: Path) -> bool:
    run, released = make_run(Topology(1, 1)), threading.Event()
    manager_module._Writer.write_data = lambda *_: released.wait(60)
    manager = manager_of(run, folder)
    save(manager, 3)
    manager.__exit__(KeyboardInterrupt)
    was_waited_for = not manager.is_saving
    released.set()
    return was_waited_for


def test_an_interrupt_waits_for_no_save(tmp_path):
    assert run_workers(interrupt_while_writing_is_held, 1, tmp_path) == [False]


def test_training_continues_while_a_thread_writes_the_state_at_the_save(tmp_path):
    expected, later = run_workers(save_while_writing_is_held, 2, tmp_path)[0]
    for step, contents_then in ((3, expected), (4, later)):
        found = load_full_tensors(tmp_path / f"step-{step:08d}", shapes_of_model(), "ema")
        for name, tensor in found.items():
            assert torch.equal(tensor, contents_then[f"ema.{name}"])
    assert any(not torch.equal(expected[name], later[name]) for name in expected)


def die_while_saving(folder: Path, victim: int) -> str:
    run = make_run(Topology(4, 1))
    manager = manager_of(run, folder, keep_last=1)
    save(manager, 3)
    manager.wait()
    if dist.get_rank() == victim:

        def killed(writer, *_):
            (Path(writer.path) / f"__{victim}_0.distcp").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

        manager_module._Writer.write_data = killed
    save(manager, 4)
    with pytest.raises(RuntimeError, match=r"(?i)clos|reset|peer|timed out"):
        manager.wait()
    return "survived"


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_killed_while_saving_leaves_the_earlier_checkpoints_and_no_partial_one(tmp_path, victim):
    with pytest.raises(WorkersFailed) as failed:
        run_workers(die_while_saving, 4, tmp_path, victim)
    assert str(failed.value) == f"rank {victim}: ended with status -9"
    assert [c.name for c in complete_checkpoints(tmp_path)] == ["step-00000003"]
    verify_checkpoint(tmp_path / "step-00000003")
    assert (tmp_path / "step-00000004.partial").exists() == (victim == 0)  # rank 0 would have deleted it
    run_workers(load_each, 1, Topology(1, 1), [tmp_path])
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("is_renamed", [False, True])
def test_a_kill_while_a_step_is_saved_again_leaves_one_of_both(saved, tmp_path, is_renamed):
    """`publish` renames the older checkpoint, then the new one."""
    folder, _, _ = saved[str(Topology(2, 1))]
    copy = shutil.copytree(folder, tmp_path / "copy")
    older = copy / "step-00000003.older.partial"
    (copy / "step-00000003").rename(older)
    if is_renamed:
        shutil.copytree(older, copy / "step-00000003")
    else:
        shutil.copytree(older, copy / "step-00000003.partial")
    run_workers(load_each, 1, Topology(1, 1), [copy])
    assert [p.name for p in copy.iterdir()] == ["step-00000003"]
    verify_checkpoint(copy / "step-00000003")


def save_to_a_full_disk(folder: Path) -> list[str]:
    run = make_run(Topology(2, 1))
    manager, said = manager_of(run, folder, keep_last=1), []
    save(manager, 3)
    manager.wait()
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    for end in (manager.wait, lambda: save(manager, 5)):
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (600, most))
        save(manager, 4)
        assert manager.latest_complete() is None
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        with pytest.raises(UserError) as refused:
            end()
        said.append(str(refused.value))
        assert [p.name for p in folder.iterdir()] == ["step-00000003"]
        dist.barrier()
    save(manager, 6)
    assert manager.latest_complete() == folder / "step-00000006"
    manager.wait()
    return said


def test_a_full_disk_is_reported_with_its_rank_on_all_and_leaves_no_partial_checkpoint(tmp_path):
    for said in run_workers(save_to_a_full_disk, 2, tmp_path):
        for message in said:
            assert (
                "step-00000004: cannot write the checkpoint (rank 1: File too large); free space" in message
            )
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000006"]
    verify_checkpoint(tmp_path / "step-00000006")


def save_often(folder: Path) -> list[str]:
    run, seen = make_run(Topology(1, 1)), []
    with manager_of(run, folder, keep_last=2, keep_every=3) as manager:
        for step in range(1, 8):
            save(manager, step)
            manager.wait()
            seen.append([int(c.name[-2:]) for c in complete_checkpoints(folder)])
    return seen


def test_the_latest_and_every_nth_checkpoint_are_kept(tmp_path):
    (seen,) = run_workers(save_often, 1, tmp_path)
    assert seen == [[1], [1, 2], [2, 3], [3, 4], [3, 4, 5], [3, 5, 6], [3, 6, 7]]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-0000000{n}" for n in (3, 6, 7)]


def load_refused(folder: Path, width: int, forget: int) -> str:
    run = make_run(Topology(2, 1), width=width)
    if forget:
        run.state.shards = [shard for shard in run.state.shards if shard.name != "embedding.weight"]
    shards = run.state.shards
    before = [[t.clone() for t in (s.weight, s.exp_avg, s.exp_avg_sq)] for s in shards]
    run.ema = Ema(shards, 0.9)
    with pytest.raises(UserError) as refused:
        manager_of(run, folder).load(folder / "step-00000003")
    for shard, (weight, exp_avg, exp_avg_sq), average in zip(shards, before, run.ema.fragments, strict=True):
        assert torch.equal(shard.weight, weight)
        assert torch.equal(average, weight)
        assert torch.equal(shard.exp_avg, exp_avg)
        assert torch.equal(shard.exp_avg_sq, exp_avg_sq)
    return str(refused.value)


@pytest.mark.parametrize(
    ("width", "forget", "message"),
    [
        (14, 0, "head.weight has shape [11, 13] there, but has shape [11, 14] in this model"),
        (13, 1, "embedding.weight has shape [11, 7] there, but is missing in this model"),
    ],
)
def test_another_model_is_refused_with_nothing_overwritten(saved, width, forget, message):
    folder, _, _ = saved[str(Topology(4, 1))]
    for said in run_workers(load_refused, 2, folder, width, forget):
        assert message in said


@pytest.mark.parametrize("num_ranks", [1, 2, 5, 9])
def test_each_file_is_hashed_by_one_rank(saved, tmp_path, num_ranks):
    folder, _, _ = saved[str(Topology(4, 1))]
    path = shutil.copytree(folder, tmp_path / "copy") / "step-00000003"
    names = read_manifest(path)
    assert len(names) == 6
    for name in names:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:-1])
        refusals = []
        for rank in range(num_ranks):
            try:
                verify_checkpoint(path, rank, num_ranks)
            except UserError as error:
                refusals.append(str(error).partition(";")[0])
        assert refusals == [f"{path / name}: damaged: size or SHA-256 is not the manifest's"]
        (path / name).write_bytes(content)


def test_a_damaged_file_of_any_rank_is_reported_on_all(saved, tmp_path):
    folder, _, _ = saved[str(Topology(4, 1))]
    for name, damage in (("__3_0.distcp", "flip"), ("__1_0.distcp", "remove"), (".metadata", "cut")):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        file = copy / "step-00000003/tensors" / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content if damage == "flip" else content[:-1])
        if damage == "remove":
            file.unlink()
        reason = "missing from the checkpoint" if damage == "remove" else "damaged"
        for said in run_workers(load_refused, 2, copy, 13, 0):
            assert said.startswith(f"{file}: {reason}")
