"""Suggestions of known keys for an unknown one."""

import difflib
from collections.abc import Sequence

# Our keys, in any section, and other tools' names for them.
_NAMES = """
learning_rate: lr max_lr peak_lr base_lr
final_learning_rate: min_lr lr_min end_lr final_lr min_learning_rate
weight_decay: wd decay l2
num_warmup_steps warmup_steps: warmup warmup_steps warmup_iters warmup_ratio num_warmup lr_warmup
gradient_clip clip_norm: clip grad_clip clip_grad clip_norm max_norm max_grad_norm gradient_clipping
epsilon: eps adam_eps
betas: beta1 beta2 adam_beta1 adam_beta2
global_batch_size micro_batch_size batch_size: bs batch batchsize batch_size train_batch_size
micro_batch_size: gas grad_accum accumulate_grad_batches gradient_accumulation gradient_accumulation_steps
num_steps: steps max_steps n_steps train_steps total_steps num_train_steps iters num_iters train_iters
num_steps: max_iters iterations epoch epochs num_epochs max_epochs num_train_epochs
precision: dtype amp bf16 fp16 fp8 mixed_precision
recompute: gradient_checkpointing activation_checkpointing checkpoint_activations
ema_decay: ema
rank: r lora_r lora_rank
alpha: lora_alpha
dropout: lora_dropout
targets: target_modules lora_targets
freeze: frozen freeze_patterns frozen_layers
learning_rates: lrs lr_groups param_groups
out: output output_dir out_dir outdir save_dir run_dir log_dir logdir folder
seed: random_seed manual_seed rng_seed
num_workers: workers n_workers num_proc dataloader_num_workers
prefetch: prefetch_factor
sequence_length: seq_len seqlen seq_length max_seq_len max_length context_length block_size
sources: dataset datasets data_path train_data
vae: autoencoder vae_path
tokenizer: tokenizer_path tokenizer_file tokenizer_name
hidden_size: dim d_model n_embd embed_dim model_dim width
ffn_hidden_size: ffn_dim intermediate_size mlp_dim
num_layers: depth layers n_layer n_layers num_hidden_layers
num_heads: heads n_head n_heads num_attention_heads
num_kv_heads: n_kv_heads num_key_value_heads num_query_groups
image_sizes image_size: size resolution img_size image_size
checkpoint.every checkpoint_every: save_every save_steps save_interval save_freq checkpoint_interval
keep_last: save_total_limit
log_every: log_interval log_freq logging_steps
samples.every evaluate_every: sample_every sample_steps eval_every eval_steps
parallel.tensor: tp tensor_parallel tensor_parallel_size tensor_model_parallel_size
parallel.pipeline: pp pipeline_parallel pipeline_model_parallel_size
ulysses: cp context_parallel
zero_stage: zero stage fsdp
guidance_scale: cfg cfg_scale guidance
num_inference_steps: sampling_steps inference_steps num_sampling_steps
attention: attn attn_implementation flash_attention
caption_dropout: cfg_dropout text_dropout uncond_prob
timeout_seconds: timeout nccl_timeout
"""
_LINES = [line.partition(": ") for line in _NAMES.strip().splitlines()]
ALIASES = {name: keys.split() for keys, _, names in _LINES for name in names.split()}
"""Keys, or the ends of their dotted paths, by another tool's name."""


def suggest(path: str, section: Sequence[str], keys: Sequence[str]) -> str:
    """A hint for an unknown key: the nearest keys, or the valid ones.

    path: dotted, of the unknown key. section: paths of the valid keys beside it. keys: those of all sections.
    """
    name = _leaf(path).lower().replace("-", "_")
    elsewhere = {_leaf(key): [k for k in keys if _leaf(k) == _leaf(key)] for key in keys if key != path}
    here = {_leaf(key): [key] for key in section}
    found = [key for key in keys for end in ALIASES.get(name, ()) if f".{key}".endswith(f".{end}")]
    for known, cutoff in ((elsewhere, 1.0), (here, 0.6), (elsewhere, 0.75), (here, 0.5)):
        if not found and (near := difflib.get_close_matches(name, known, 1, cutoff)):
            found = known[near[0]]
    # The least nested say it: a key of data.sources is in data.validation.sources, too.
    found = [key for key in found if key.count(".") == min(each.count(".") for each in found)]
    if found:
        return f"did you mean {' or '.join(map(repr, found))}?"
    return f"valid keys: {', '.join(sorted(here))}"


def nearest(name: str, known: Sequence[str], number: int = 3) -> str:
    """The known names that are most like a name, in words."""
    return ", ".join(difflib.get_close_matches(name, known, number, 0.0))


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]
