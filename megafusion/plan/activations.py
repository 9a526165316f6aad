"""Numbers that forward saves for backward, a position and block, in closed form.

With D the residual stream, H K the queries, G K the keys and F the feed-forward's hidden layer of a rank:
4 D + 3 H K + 3 G K + 3 F (20 D + 6 F bytes in bf16 without grouped keys); with selective recompute
3 D + H K + 2 G K + 2 F, with full D. tests/plan/ holds it against real ranks.
"""

from megafusion.parallel.config import Recompute
from megafusion.plan.job import Job
from megafusion.plan.software import Software


def saved_by_block(job: Job, software: Software, recompute: Recompute | None = None) -> float:
    """Numbers for each of `Job.tokens` that a block keeps until its backward pass."""
    model, parallel = job.model, job.parallel
    stream, ranks = float(model.hidden_size), parallel.tensor
    queries = model.num_heads * model.head_size / ranks
    keys = model.kv_heads * model.head_size / ranks
    hidden = model.ffn_size / ranks
    local, qkv = _local(job), queries + 2 * keys
    recompute = recompute or job.train.recompute
    if recompute == "full":
        return local
    if recompute == "selective" and software.selective == "alternate":
        return local + queries + keys + hidden + stream + queries
    if recompute == "selective":
        saved = local + qkv + 2 * hidden + 2 * stream  # the products' results, before they are reduced
        if ranks > 1:
            saved += 2 * (stream + local) if parallel.sequence else 2 * stream  # the collectives' results
        return saved
    attention = (
        qkv + queries + keys + queries
    )  # the fused product, which holds v; rotated q and k; the result
    if parallel.ulysses > 1:
        attention = qkv + 2 * queries  # exchanged q, k and v; the result before and after its exchange
    normed = 2 * stream  # gathered, with sequence parallelism
    if model.qk_norm:
        normed += queries + keys
    norms = 2 * local if software.is_compiled else 2 * _norm(job, software)
    feed_forward = (4 if software.saves_silu else 3) * hidden
    return norms + normed + attention + feed_forward


def saved_by_tail(job: Job, software: Software) -> float:
    """Numbers that the tail saves of a micro-batch: of the last norm, its output (from the loss on, its
    gradient), images' hidden states."""
    stream = job.model.hidden_size
    whole = job.tokens * job.parallel.ulysses  # the tail gathers all positions
    return (
        job.tokens * _norm(job, software) + whole * stream + job.local_slots * max(job.model.patches) * stream
    )


def saved_once(job: Job, software: Software) -> float:
    """Bytes that all blocks of a stage share in a micro-batch: rotations, and a dense mask."""
    rotations = 8 * job.tokens * job.model.head_size
    mask = job.train.micro_batch_size * job.sequence_length**2 * job.bytes_per_number
    return rotations + (mask if software.attention_is_dense else 0)


def backward_of_block(job: Job, software: Software) -> float:
    """Numbers for each of `Job.tokens` that one block's backward pass needs beside what is saved: what it
    computes again, and gradients."""
    again = 0.0
    if job.train.recompute != "none":
        again = saved_by_block(job, software, "none") - saved_by_block(job, software)
    model, ranks = job.model, job.parallel.tensor
    return max(0.0, again) + 3 * model.ffn_size / ranks + 2 * model.hidden_size


def _local(job: Job) -> float:
    """Numbers of a position's residual stream on a rank, on average."""
    stream = job.model.hidden_size
    return stream / job.parallel.tensor if job.parallel.sequence else stream


def _norm(job: Job, software: Software) -> float:
    """Numbers that RMSNorm saves: its input; not fused, float32 copies of that, normalized and not."""
    return _local(job) * (1 if software.fuses_norms else 8 / job.bytes_per_number)
