"""Whether a run fits into a GPU, told before it starts."""

from megafusion.plan.job import Job
from megafusion.plan.memory import memory
from megafusion.plan.software import of_run


def does_not_fit(job: Job, memory_bytes: float, device: str) -> list[str]:
    """A sentence if the plan says that a run will not fit; none if it fits."""
    held = memory(job, of_run(job.train, job.model.attention))
    if held.total <= memory_bytes:
        return []
    parts = sorted(held.parts().items(), key=lambda part: -part[1])[:3]
    named = ", ".join(f"{name} {value / 2**30:.1f}" for name, value in parts)
    return [
        f"the plan predicts that this run does not fit: pipeline stage {held.stage} needs "
        f"{held.total / 2**30:.1f} GiB a rank ({named}, ...), and {device} has {memory_bytes / 2**30:.1f}; "
        "`megafusion plan` names layouts that fit"
    ]
