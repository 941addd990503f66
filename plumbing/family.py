"""family.py -- the names of knobs that the trainers share, and which trainer has which knob.

Promises one vocabulary: a knob of a canonical name has the same other spellings in every trainer,
and a name that only a sibling trainer knows is told apart from one that means nothing. These are
tables and pure functions of names; knobs.py decides what is refused.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

# Spellings that a knob of the canonical name accepts in every trainer. They come from the programs
# that the trainers follow.
ALIASES: dict[str, tuple[str, ...]] = {
    "n_layer": ("num_layers", "n_layers"),
    "n_head": ("num_heads", "num_attention_heads"),
    "n_embd": ("d_model", "hidden_dim"),
    "sequence_length": ("max_seq_length", "max_seq_len", "seq_len"),
    "lr": ("learning_rate",),
    "warmup_iters": ("warmup_steps",),
    "num_iterations": ("num_iter", "max_steps"),
    "grad_clip": ("clip",),
    "data": ("dataset",),
    "precision": ("mixed_precision",),
    "time_budget_s": ("max_seconds",),
    "tracker": ("track", "use_wandb"),
}
KNOB_OF = {spelling: name for name, group in ALIASES.items() for spelling in group}
# Some of those programs also have another word for a value.
ALIAS_VALUES = {
    "use_wandb": {"1": "wandb", "0": "off"},
    "mixed_precision": {"none": "fp32", "no": "fp32"},
}
# Words that people write where a choice is known under another one.
MEANT = {
    "gpu": "cuda",
    "float32": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "none": "off",
    "true": "1",
    "yes": "1",
    "on": "1",
    "false": "0",
    "no": "0",
    "off": "0",
}

# The knobs that every trainer has, and those that only some have, with spellings of their own
# besides those of ALIASES. tests/plumbing/test_knobs.py compares the table with the trainers.
COMMON = (
    "preset batch_size num_iterations seed val_every save_every keep device compile run_id stage "
    "logs_folder results_file dry_run fork_from stop_after"
)
FAMILY = {
    "train_gpt.py": (
        "n_layer n_head n_embd vocab_size attngate gatepos gateact gateopt mlp_match "
        "device_batch_size sequence_length warmup_iters warmdown_iters time_budget_s lr "
        "input_bin input_val_bin data_order data_seed epochs_ok val_tokens precision tracker "
        "early_stop_patience early_stop_min_delta target_loss runpod_instance_type"
    ),
    "train_gpu.py": (
        "mixer n_embd hcm_dim n_layer num_slots n_head vocab_size slowest_decay "
        "use_gating conv memory chunk_length kernel dropout use_auxiliary_loss aux_loss_weight "
        "data tokenizer max_train_samples max_val_samples num_workers sequence_length "
        "device_batch_size carry_state num_epochs time_budget_s use_scheduler warmup_iters lr "
        "weight_decay grad_clip precision gradient_checkpointing final_test early_stop_patience "
        "early_stop_min_delta target_loss save_steps save_epochs compile_model tracker "
        "tracker_project wandb_project run_name data_folder output_dir"
    ),
    "train_scaled.py": (
        "n_layer n_head sliding_window memory mem_range mem_init mem_rows delta_rule "
        "thinking_steps ngram_rows dropout device_batch_size sequence_length carry_state "
        "warmup_iters schedule curriculum lr beta2 weight_decay decay_on data init_from "
        "val_bytes log_every on_nan precision recompute cuda_graph tracker blocks decoder "
        "early_stop_min_delta early_stop_patience grad_clip n_embd target_loss"
    ),
    "train_arith.py": (
        "model_name n_embd n_layer n_head d_ff ffn_type dropout use_rope tie_weights "
        "sequence_length answer_format answer_digits spaces train_path val_path test_path "
        "train_examples val_examples grammar operators operand_min operand_max operands_min "
        "operands_max operands_weights depth_min depth_max deeper_share curriculum_exact "
        "num_epochs schedule warmup_iters warmdown_frac answer_only_loss optimizer lr muon_lr "
        "weight_decay betas "
        "grad_clip eval_interval save_interval config output_dir fp16 bf16 gpu_only cuda_graph "
        "log_interval tracker tracker_project wandb_project early_stop_patience "
        "early_stop_min_delta target_loss"
    ),
}
# Names of this table that other programs put into the environment for reasons of their own. Where a
# trainer lacks them they are not refused; one line says that they set nothing.
ORDINARY = frozenset(
    (
        "CONFIG DATA DATASET MEMORY MIXER NORM NUM_WORKERS OUTPUT_DIR SCHEDULE TRACK WANDB_PROJECT"
    ).split()
)

# Knobs that had another name before. GNU screen, in which people leave runs overnight, sets WINDOW
# to the number of its window in every shell that it opens, and a run would have taken that number.
RENAMED = {"WINDOW": "SLIDING_WINDOW"}


def squeezed(name: str) -> str:
    return name.upper().replace("_", "")


def near_name(name: str, known: Iterable[str]) -> str:
    """The known name that `name` is probably meant to be, or ''. A name that differs only in
    underscores and case comes before one that is merely similar."""
    known = list(known)
    if RENAMED.get(name) in known:
        return RENAMED[name]
    for spelling in known:
        if squeezed(spelling) == squeezed(name):
            return spelling
    close = get_close_matches(name, known, n=1, cutoff=0.85)
    return close[0] if close else ""


def is_ordinary(name: str, env: Mapping[str, str]) -> bool:
    """Whether another program may well have set `name`, so that it is no reason to refuse a run."""
    is_screens_window = name == "WINDOW" and "STY" in env  # screen sets both
    return name in ORDINARY or is_screens_window


def renamed_problem(name: str, known: Iterable[str]) -> str:
    """What is wrong with setting `name` where a knob has another name now; '' where none has."""
    new_name = RENAMED.get(name, "")
    if new_name not in known:
        return ""
    return (
        f"{name} sets nothing: the knob is {new_name} now, since GNU screen sets {name} by itself; "
        f"set that, and unset {name} (env -u {name} for one command)"
    )


def sibling_problem(name: str, program: str, known: Iterable[str]) -> str:
    """What is wrong with setting `name` for `program`, whose spellings are `known`, when it is a
    knob of a sibling; '' for a name that no trainer has."""
    plain = name.lower()
    owners = [trainer for trainer, names in FAMILY.items() if plain in names.split()]
    if plain in COMMON.split():
        owners = list(FAMILY)
    group = [n for n, others in ALIASES.items() if plain == n or plain in others]
    if name != name.upper() or not (owners or group):
        return ""
    synonyms = [spelling for n in group for spelling in (n, *ALIASES[n])]
    ours = [spelling.upper() for spelling in synonyms if spelling.upper() in known]
    if owners:
        what = f"{name} is a knob of {' and '.join(owners)}"
    else:
        what = f"{name} is another spelling of {group[0].upper()}"
    if ours:
        return f"{what}; {program} has {ours[0]}: set that, and unset {name} (env -u {name})"
    return f"{what}; {program} has no such knob: unset it (env -u {name} for one command)"
