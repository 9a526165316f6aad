"""The work of a test process: some steps of a run at a topology, and their outcome."""

from dataclasses import dataclass

import megafusion.device  # noqa: F401 - before deepspeed

import deepspeed
import torch
from torch import Tensor

from megafusion.config import parse_config
from megafusion.engine.engine import Engine, rows_of_rank
from megafusion.engine.optimizer import make_optimizer, set_learning_rate
from megafusion.engine.process_group import start_process_group
from megafusion.model.lora import add_lora
from megafusion.model.transfusion import Transfusion
from megafusion.model.wrapper import canonical_name
from megafusion.objective.losses import Losses
from megafusion.parallel.mesh import Mesh, make_mesh
from megafusion.parallel.sharding import ShardSpec, shard_spec_of
from megafusion.sequence.packing import PackedBatch, collate, pack_row, target_index
from megafusion.train.build import build_components, build_engine
from megafusion.train.config import RunConfig
from megafusion.train.loop import train_step
from tests.support.rows import latents_as_features
from tests.support.weights import initialize

LEARNING_RATE = 2e-3
"""Not the configuration's, so that a step which does not set it fails."""


@dataclass
class Outcome:
    """A rank's `Losses` and gradient norm by step, and its shards of the weights."""

    losses: list[list[float]]
    weights: list[tuple[str, ShardSpec, Tensor]]


class Batches:
    """The emoji stream. Of five batches one has only text, one only images, half of them given, and one has
    text in half of its rows, images in the others and an empty last row, so that ranks differ in what they
    have.
    """

    def __init__(self, values: dict, mesh: Mesh):
        data, objective = values["data"], values.get("objective", {})
        self.has_features = "alignment" in objective
        # No vision model is loaded: see `next`.
        values = {**values, "objective": {k: v for k, v in objective.items() if k != "alignment"}}
        text = {**data, "sources": {"text": data["sources"]["text"]}}
        images = {**data, "sources": {"pairs": data["sources"]["pairs"]}}
        images |= {"caption_first": 1.0, "caption_dropout": 1.0}
        configs = [parse_config(RunConfig, {**values, "data": d}, "test") for d in (data, text, images)]
        self.streams = [build_components(config, mesh).loader for config in configs]
        self.config, self.mesh, self.number = configs[0], mesh, 0

    def next(self) -> list[PackedBatch]:
        """This rank's micro-batches of the next global batch, with latents as features if these are read."""
        batches = self._next()
        if self.has_features:
            for batch in batches:
                batch.features = latents_as_features(batch)
        return batches

    def _next(self) -> list[PackedBatch]:
        self.number += 1
        mixed, text, images = self.streams
        match self.number % 5:
            case 3:
                return text.next()
            case 4:
                return [_some_given(batch) for batch in images.next()]
            case 0:
                halves = zip(text.next(), images.next(), strict=True)
                return [self._lopsided(number, *pair) for number, pair in enumerate(halves)]
        return mixed.next()

    def _lopsided(self, number: int, text: PackedBatch, images: PackedBatch) -> PackedBatch:
        train = self.config.train
        first = rows_of_rank(train.global_batch_size, self.mesh).start + number * train.micro_batch_size
        rows = torch.arange(first, first + train.micro_batch_size)
        empty = collate([pack_row([], self.config.sequence_shape)] * train.micro_batch_size)
        return _by_row(
            rows == train.global_batch_size - 1,
            empty,
            _by_row(rows < train.global_batch_size // 2, text, images),
        )


def _some_given(batch: PackedBatch) -> PackedBatch:
    """Every other image of a row as a condition without a loss."""
    for field in (batch.has_loss, batch.noise, batch.t):
        field[:, 1::2] = 0
    return batch


def _by_row(chosen: Tensor, first: PackedBatch, second: PackedBatch) -> PackedBatch:
    """Rows of the first batch where chosen is true, else of the second."""
    fields = {}
    for name, value in vars(first).items():
        if name == "target_index":
            continue  # of a batch, not of its rows
        mask = chosen.view(-1, *[1] * (value.ndim - 1)) if value.ndim else torch.tensor(True)
        fields[name] = torch.where(mask, value, getattr(second, name))
    return PackedBatch(**fields, target_index=target_index(fields["labels"]))


def parallel_steps(values: dict, num_steps: int) -> Outcome:
    """Train at the topology of the configuration. Called by every rank."""
    start_process_group()
    torch.set_num_threads(1)
    config = parse_config(RunConfig, values, "test")
    mesh = make_mesh(config.parallel)
    batches, engine = Batches(values, mesh), build_engine(config, mesh)
    losses = []
    for _ in range(num_steps):
        found = train_step(engine, batches.next(), LEARNING_RATE)
        norm = engine.grad_norm()
        losses.append([*(float(loss) for loss in found), norm])
    return Outcome(losses, weights_of(engine))


def weights_of(engine: Engine) -> list[tuple[str, ShardSpec, Tensor]]:
    found = []
    for name, parameter in engine.stage.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found.append((name, shard_spec_of(parameter), parameter.detach().float().clone()))
    return found


def plain_steps(values: dict, num_steps: int) -> Outcome:
    """The same steps on one device with the plain model and torch's AdamW, without DeepSpeed."""
    start_process_group()
    values = {**values, "parallel": {}}
    config = parse_config(RunConfig, values, "test")
    batches = Batches(values, make_mesh(config.parallel))
    model = Transfusion(config.model, config.objective, config.data.clean_context)
    if config.train.lora:
        add_lora(model, config.train.lora)
    initialize(model, config.model.num_layers, config.seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(config.train.trains(canonical_name(name)))
    optimizer = make_optimizer(model, config.optimizer)
    set_learning_rate(optimizer, LEARNING_RATE)
    losses = []
    for _ in range(num_steps):
        micro_batches = batches.next()
        counts = torch.stack([batch.counts() for batch in micro_batches]).sum(0)
        optimizer.zero_grad()
        sums = torch.zeros(len(Losses._fields))
        for batch in micro_batches:
            batch.num_text_targets, batch.num_images = counts.unbind()
            found = model(batch)
            found.total.backward()
            sums += torch.stack(found).detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clip)
        optimizer.step()
        losses.append([*sums.tolist(), norm.item()])
    return Outcome(losses, [(n, shard_spec_of(w), w.clone()) for n, w in model.weights().items()])


def loss_error(outcome: Outcome, plain: Outcome) -> float:
    """Largest relative error of any loss at any step; the absolute error of a loss that is 0."""
    found, true = torch.tensor(outcome.losses)[:, :-1], torch.tensor(plain.losses)[:, :-1]
    return ((found - true).abs() / torch.where(true == 0, 1, true.abs())).max().item()


def norm_error(outcome: Outcome, plain: Outcome) -> float:
    """Largest relative error of the gradient norm at any step; AdamW hides a wrong scale from the weights.

    The absolute error of a norm that is 0, as that of image adapters is on a batch of text.
    """
    found, true = torch.tensor(outcome.losses)[:, -1], torch.tensor(plain.losses)[:, -1]
    return ((found - true).abs() / torch.where(true == 0, 1, true)).max().item()


def parameter_error(outcomes: list[Outcome], plain: Outcome) -> float:
    """Largest absolute error of any weight on any rank. Asserts that the shards cover every weight."""
    true = {name: value for name, _, value in plain.weights}
    covered = {name: torch.zeros_like(value) for name, value in true.items()}
    worst = 0.0
    for outcome in outcomes:
        for name, spec, value in outcome.weights:
            assert spec.shape == true[name].shape, name
            worst = max(worst, (value - spec.shard(true[name])).abs().max().item())
            for span in spec.spans:
                covered[name].narrow(spec.dim, span.whole_start, span.length).fill_(1)
    assert all(value.all() for value in covered.values())
    return worst
