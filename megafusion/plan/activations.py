"""Numbers that forward saves for backward, a position and block, in closed form.

With D the residual stream, H K the queries, G K the keys, F the feed-forward's hidden layer, on one rank:
7 D' + 3 G K + 4 F where D' is D or H K (10 D + 4 F without grouped keys, which is 20 D + 8 F bytes in bf16);
6 D + 2 F with selective recompute, D with full. tests/plan holds it against the saved tensors of the real code.
"""

from megafusion.parallel.config import Recompute
from megafusion.plan.job import Job
from megafusion.plan.software import Software


def saved_by_block(job: Job, software: Software, recompute: Recompute | None = None) -> float:
    """Numbers for each of `Job.tokens` that a block keeps until its backward pass."""
    model, parallel = job.model, job.parallel
    stream, ranks = model.hidden_size, parallel.tensor
    queries, keys, hidden = (
        number / ranks
        for number in (model.num_heads * model.head_size, model.kv_heads * model.head_size, model.ffn_size)
    )
    local = stream / ranks if parallel.sequence else stream  # of the residual stream and its norms
    recompute = recompute or job.train.recompute
    if recompute == "full":
        return local
    qkv = queries + 2 * keys
    if recompute == "selective" and software.selective == "alternate":
        return local + queries + keys + hidden + stream + queries
    if recompute == "selective":
        saved = local + qkv + 2 * hidden + 2 * stream  # the products' results, before they are reduced
        if ranks > 1:
            saved += 2 * (stream + local) if parallel.sequence else 2 * stream  # the collectives' results
        return saved
    norms = 2 * stream  # gathered, with sequence parallelism
    if not software.fuses_norms:
        norms += 2 * local * (4 / job.bytes_per_number)
    if model.qk_norm:
        norms += queries + keys
    attention = (
        qkv + queries + keys + queries
    )  # the fused product, which holds v; rotated q and k; the result
    if parallel.ulysses > 1:
        attention = qkv + 2 * queries  # exchanged q, k and v; the result before and after its exchange
    if software.is_compiled:  # norms, the activation and their product are computed again
        return 2 * local + attention + 2 * hidden
    return 2 * local + norms + attention + 4 * hidden


def saved_by_tail(job: Job) -> float:
    """Numbers that the tail saves of a micro-batch: the last norm's input and output, images' hidden states."""
    model, parallel = job.model, job.parallel
    stream = model.hidden_size
    local = stream / parallel.tensor if parallel.sequence else stream
    return job.tokens * (local + stream) + job.local_slots * max(model.patches) * stream


def block_peak(job: Job, software: Software) -> float:
    """Numbers that one block's backward pass needs beside what is saved: what it recomputes, and gradients."""
    again = 0.0
    if job.train.recompute != "none":
        again = saved_by_block(job, software, "none") - saved_by_block(job, software)
    model, ranks = job.model, job.parallel.tensor
    return max(0.0, again) + 3 * model.ffn_size / ranks + 2 * model.hidden_size
