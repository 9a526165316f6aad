"""Small engines of every topology, and their state gathered by DeepSpeed's own means."""

from dataclasses import dataclass, field

import megafusion.device  # noqa: F401 - before deepspeed

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from megafusion.engine.config import OptimizerConfig
from megafusion.engine.ema import Ema
from megafusion.engine.optimizer import make_optimizer
from megafusion.engine.optimizer_state import OptimizerState

GLOBAL_BATCH_SIZE = 4


@dataclass(frozen=True)
class Topology:
    """Data ranks, ZeRO stage, and further DeepSpeed settings."""

    data: int
    stage: int
    settings: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return f"dp{self.data}-zero{self.stage}" + "-".join(["", *self.settings])


BF16 = {
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
}


class Model(nn.Module):
    """Parameters of 1 to 4 dimensions, with sizes that no number of ranks divides."""

    def __init__(self, width: int = 13):
        super().__init__()
        self.embedding = nn.Embedding(11, 7)
        self.convolution = nn.Conv2d(1, 3, (3, 5), padding=(1, 2))
        self.hidden = nn.Linear(7, width)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.head = nn.Linear(width, 11, bias=False)

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """The mean cross-entropy."""
        x_BSD = self.embedding(tokens_BS)
        x_BSD = x_BSD + self.convolution(x_BSD[:, None]).mean(1)
        logits = self.head(torch.tanh(self.hidden(x_BSD)) * self.scale)
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels_BS.flatten())


def make_engine(model: nn.Module, topology: Topology, mpu: object = None) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed's engine. Called by every rank."""
    settings = {**topology.settings}
    zero = {"stage": topology.stage, **settings.pop("zero_optimization", {})}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model, OptimizerConfig()),
        mpu=mpu,
        config={
            "train_micro_batch_size_per_gpu": GLOBAL_BATCH_SIZE // topology.data,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **settings,
        },
    )
    return engine


class Run:
    """DeepSpeed's engine with the state that a checkpoint saves."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, topology: Topology):
        self.engine, self.topology = engine, topology
        self.state = OptimizerState(engine.optimizer, engine.module.named_parameters())
        self.ema = Ema(self.state.shards, 0.9)

    def step(self, number: int) -> float:
        """Make update `number` with this rank's part of its batch; returns the loss of the global batch."""
        generator = torch.Generator().manual_seed(number)
        tokens_BS = torch.randint(11, (GLOBAL_BATCH_SIZE, 6), generator=generator)
        share = GLOBAL_BATCH_SIZE // self.topology.data
        rows = tokens_BS.narrow(0, dist.get_rank() % self.topology.data * share, share)
        loss = self.engine(rows, (rows * 3 + 1) % 11)
        self.engine.backward(loss)
        self.engine.step()
        torch._foreach_lerp_(self.ema.fragments, self.ema.weights, self.ema.after(number).weight)
        total = loss.detach().float()
        dist.all_reduce(total)
        return total.item() / dist.get_world_size()


def make_run(topology: Topology, seed: int = 0, width: int = 13) -> Run:
    """A run of Model before its first step."""
    torch.manual_seed(seed)
    return Run(make_engine(Model(width), topology), topology)


def contents(run: Run) -> dict[str, Tensor]:
    """The whole state of a run: weights and moments as DeepSpeed gathers them, averages from all ranks."""
    found = {}
    optimizer, stage = run.engine.optimizer, run.topology.stage
    if stage in (1, 2):  # it links parameters to their moments once, before there are any
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in run.engine.module.named_parameters():
        for kind in ("exp_avg", "exp_avg_sq"):
            if stage == 0:
                whole = optimizer.state[parameter][kind]
            else:
                whole = safe_get_full_optimizer_state(parameter, kind)
            found[f"{kind}.{name}"] = whole.detach().clone().cpu()
        whole = parameter if stage == 0 else safe_get_full_fp32_param(parameter)
        found[f"model.{name}"] = whole.detach().clone().cpu()
        found[f"ema.{name}"] = torch.full(whole.shape, float("nan"))
    parts = [None] * dist.get_world_size()
    own = [(shard.name, shard.start, f) for shard, f in zip(run.state.shards, run.ema.fragments, strict=True)]
    dist.all_gather_object(parts, own)
    for name, start, fragment in (entry for part in parts for entry in part):
        found[f"ema.{name}"].view(-1)[start : start + len(fragment)] = fragment
    assert not any(tensor.isnan().any() for tensor in found.values())
    return found


def model_weights(run: Run) -> dict[str, Tensor]:
    """The full weights that the forward reads on this rank."""
    parameters = dict(run.engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=run.topology.stage == 3):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def step_counts(run: Run) -> set[float]:
    """The step counts in AdamW's state."""
    optimizer = run.engine.optimizer
    adamw = optimizer if run.topology.stage == 0 else optimizer.optimizer
    return {state["step"].item() for state in adamw.state.values()}
