"""Small engines of every topology, and what they hold, told by other means than checkpoints use."""

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
from megafusion.engine.optimizer_state import OptimizerShard, optimizer_shards

ROWS = 4
"""Rows of a global batch, which the data ranks share."""


@dataclass(frozen=True)
class Mesh:
    """How a run is cut: data ranks, ZeRO stage, and more of DeepSpeed's settings."""

    data: int
    stage: int
    settings: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return f"dp{self.data}-zero{self.stage}" + "-".join(["", *self.settings])


BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


class Model(nn.Module):
    """Parameters of 1 to 4 dimensions, of sizes that no number of ranks divides."""

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


def make_engine(model: nn.Module, mesh: Mesh, mpu: object = None) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed's engine; every rank calls this."""
    settings = {**mesh.settings}
    zero = {"stage": mesh.stage, **settings.pop("zero_optimization", {})}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model, OptimizerConfig()),
        mpu=mpu,
        config={
            "train_micro_batch_size_per_gpu": ROWS // mesh.data,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **settings,
        },
    )
    return engine


@dataclass
class Run:
    """An engine with all that a checkpoint keeps of it."""

    engine: deepspeed.DeepSpeedEngine
    mesh: Mesh
    owned: list[OptimizerShard]
    ema: Ema

    def step(self, number: int) -> float:
        """Update `number` of the run, on this rank's rows of its batch; the loss of the global batch."""
        generator = torch.Generator().manual_seed(number)
        tokens_BS = torch.randint(11, (ROWS, 6), generator=generator)
        share = ROWS // self.mesh.data
        rows = tokens_BS.narrow(0, dist.get_rank() % self.mesh.data * share, share)
        loss = self.engine(rows, (rows * 3 + 1) % 11)
        self.engine.backward(loss)
        self.engine.step()
        self.ema.update(number)
        total = loss.detach().float()
        dist.all_reduce(total)
        return total.item() / dist.get_world_size()


def make_run(mesh: Mesh, seed: int = 0, width: int = 13) -> Run:
    """A run of Model that has not begun."""
    torch.manual_seed(seed)
    engine = make_engine(Model(width), mesh)
    owned = optimizer_shards(engine, engine.module.named_parameters())
    return Run(engine, mesh, owned, Ema(owned, 0.9))


def contents(run: Run) -> dict[str, Tensor]:
    """Everything of a run, whole: weights and moments as DeepSpeed gathers them, averages put together."""
    found = {}
    optimizer = run.engine.optimizer
    if run.mesh.stage in (1, 2):  # it links parameters to their moments once, before there are any
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in run.engine.module.named_parameters():
        for kind in ("exp_avg", "exp_avg_sq"):
            if run.mesh.stage == 0:
                whole = optimizer.state[parameter][kind]
            else:
                whole = safe_get_full_optimizer_state(parameter, kind)
            found[f"{kind}.{name}"] = whole.detach().clone().cpu()
        whole = parameter if run.mesh.stage == 0 else safe_get_full_fp32_param(parameter)
        found[f"model.{name}"] = whole.detach().clone().cpu()
        found[f"ema.{name}"] = torch.full(whole.shape, float("nan"))
    parts = [None] * dist.get_world_size()
    own = [(m.name, m.start, f) for m, f in zip(run.owned, run.ema.fragments, strict=True)]
    dist.all_gather_object(parts, own)
    for name, start, fragment in (entry for part in parts for entry in part):
        found[f"ema.{name}"].view(-1)[start : start + len(fragment)] = fragment
    assert not any(tensor.isnan().any() for tensor in found.values())
    return found


def forward_weights(run: Run) -> dict[str, Tensor]:
    """The weights that the forward reads, whole, as this rank has them."""
    parameters = dict(run.engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=run.mesh.stage == 3):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def steps_taken(run: Run) -> set[float]:
    """AdamW's counts."""
    optimizer = run.engine.optimizer
    adamw = optimizer if run.mesh.stage == 0 else optimizer.optimizer
    return {state["step"].item() for state in adamw.state.values()}
