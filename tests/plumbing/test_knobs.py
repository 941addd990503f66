"""Settings: every value is taken as it was meant, or refused in one line."""

import dataclasses
import functools
import importlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed.run
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from plumbing import family
from plumbing.config import read_assignments, read_configured, read_yaml, section_keys
from plumbing.knobs import (
    ROOT,
    UserError,
    describe,
    kind_of,
    knob,
    knobs_json,
    read_knobs,
    spellings,
)
from plumbing.results import changed_knobs

PRESETS = {"normal": {}, "small": {"lr": 0.1, "n_layer": 2}}
TRAINERS = ("train_gpt", "train_gpu", "train_scaled", "train_arith")
GATES = ("none", "headwise", "elementwise")


@dataclass(frozen=True)
class Knobs:
    preset: str = knob("normal", "named set of defaults", group="Model", choices=tuple(PRESETS))
    n_layer: int = knob(12, "number of transformer blocks", low=1)
    attngate: str = knob("none", "gate of the attention", choices=GATES)
    lr: float = knob(0.0036, "peak learning rate", group="Schedule", low=0)
    num_iterations: int = knob(100, "number of optimizer steps", low=0)
    warmup_iters: int = knob(0, "steps " + "of linear warm-up " * 9, low=0)
    dropout: float = knob(0.0, "share of activations set to zero", low=0, high=0.9)
    time_budget_s: float | None = knob(None, "seconds of training", above=0, none="off")
    device: str = knob("cuda", "where to train", group="Run", choices=("cuda", "cpu"))
    precision: str = knob("fp32", "of matrix products", choices=("fp32", "bf16", "fp16"))
    tracker: str = knob("off", "where curves are sent", choices=("off", "wandb", "trackio"))
    compile: bool = knob(True, "use torch.compile")
    logs_folder: str = knob("logs", "folder of logs; 100% yours", alias=("output_dir",))

    def __post_init__(self):
        if self.warmup_iters > self.num_iterations:
            raise ValueError(f"WARMUP_ITERS={self.warmup_iters} does not fit")


@dataclass(frozen=True)
class OldKnobs:
    """Of a trainer that still has the names of the program that it follows."""

    num_layers: int = knob(8, "blocks", low=1)
    max_seq_len: int = knob(9, "tokens of something else", low=1)
    sequence_length: int = knob(8, "tokens", low=1)


FIELDS = {field.name: field for field in dataclasses.fields(Knobs)}


def read(argv=(), env=None, cls=Knobs, **options):
    return read_knobs(cls, PRESETS, list(argv), env or {}, **options)


def refusal(*args, **options) -> str:
    """The one line with which these settings are refused."""
    with pytest.raises(UserError) as error:
        read(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_flag_beats_environment_beats_file_beats_preset_beats_default():
    env = {"PRESET": "small"}
    assert read().lr == 0.0036
    assert read(env=env).lr == 0.1
    assert read(env=env, config={"lr": "0.2"}).lr == 0.2
    assert read(env=env | {"LR": "0.5"}, config={"lr": "0.2"}).lr == 0.5
    assert read(["--lr", "0.25"], env | {"LR": "0.5"}, config={"lr": "0.2"}).lr == 0.25
    assert read(["--warmup-iters=3", "--compile=0"]).warmup_iters == 3


def values_of(field) -> st.SearchStrategy:
    """Values that a knob takes."""
    meta = field.metadata
    if meta["choices"]:
        return st.sampled_from(meta["choices"])
    if kind_of(field) is bool:
        return st.booleans()
    if kind_of(field) is int:
        return st.integers(min_value=meta["low"])
    if kind_of(field) is float:
        low = meta["above"] if meta["low"] is None else meta["low"]
        numbers = st.floats(
            low, meta["high"], exclude_min=meta["low"] is None, allow_infinity=False
        )
        return numbers | st.none() if meta["none"] else numbers
    return st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(st.data())
def test_every_value_that_is_described_is_read_back(data):
    field = FIELDS[data.draw(st.sampled_from(sorted(set(FIELDS) - {"warmup_iters", "preset"})))]
    value = data.draw(values_of(field))
    text = describe(field, value)
    assert getattr(read(env={field.name.upper(): text}), field.name) == value
    assert getattr(read([f"--{field.name}={text}"]), field.name) == value


@given(st.sampled_from(sorted(FIELDS)), st.text(max_size=20))
def test_any_text_is_taken_or_refused_in_words_that_name_the_knob(name, text):
    try:
        read(env={name.upper(): text})
    except UserError as error:
        assert name.upper() in str(error)


BAD = {int: "1.5", float: "0,3", bool: "yes"}


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_a_bad_value_is_refused_with_what_would_do(field):
    meta = field.metadata
    bad = [str(meta[key] - 1) for key in ("low", "above") if meta[key] is not None]
    if meta["choices"]:
        bad.append("no-such-choice")
    elif kind_of(field) in BAD:
        bad.append(BAD[kind_of(field)])
    if kind_of(field) is float:
        bad += ["nan", "inf"]
    for text in bad:
        words = refusal(env={field.name.upper(): text})
        assert words.startswith(f"{field.name.upper()}={text!r}: expected "), words
        assert "(the default is " in words
        assert refusal([f"--{field.name}={text}"]) == words
    assert bad or kind_of(field) is str


@pytest.mark.parametrize(
    ("name", "text", "meant"),
    [
        ("DEVICE", "gpu", "cuda"),
        ("ATTNGATE", "headwize", "headwise"),
        ("PRECISION", "bfloat16", "bf16"),
        ("COMPILE", "yes", "1"),
        ("TIME_BUDGET_S", "none", "off"),
    ],
)
def test_a_wrong_choice_names_the_one_that_was_meant(name, text, meant):
    assert f"did you mean {meant}?" in refusal(env={name: text})


@pytest.mark.parametrize("name", ["ATTN_GATE", "attngate", "N_LAYER_", "compile"])
def test_a_name_that_differs_in_underscores_and_case_is_refused_whatever_its_value(name):
    assert f"{name} is set, but it is not a knob; did you mean" in refusal(env={name: "gnu"})


def test_a_similar_name_is_refused_if_the_knob_could_take_its_value_and_else_left_alone():
    assert read(env={"COMPILER": "gnu", "NUM_ITERATION": "many"}) == Knobs()
    assert "did you mean COMPILE?" in refusal(env={"COMPILER": "1"})
    assert "did you mean NUM_ITERATIONS?" in refusal(env={"NUM_ITERATION": "50"})


def test_an_unknown_flag_is_refused_with_the_near_one():
    assert (
        refusal(["--attn_gate=none"]) == "--attn_gate=none is not a flag; did you mean --attngate?"
    )
    assert "--help lists the knobs" in refusal(["--lr"])
    assert "--no-lr is not a flag" in refusal(["--no-lr"])


def test_a_switch_is_turned_off_by_its_no_form_and_the_environment_loses_to_it():
    assert not read(["--no-compile"]).compile
    assert not read(["--no_compile"], {"COMPILE": "1"}).compile
    assert read(["--compile"], {"COMPILE": "0"}).compile


def test_two_spellings_of_one_knob_must_agree():
    assert read(env={"NUM_ITER": "1500", "NUM_ITERATIONS": "1500"}).num_iterations == 1500
    words = refusal(env={"NUM_ITER": "1500", "NUM_ITERATIONS": "1600"})
    assert "NUM_ITERATIONS=1600 and NUM_ITER=1500 are one knob with two values" in words


def test_knobs_that_do_not_fit_together_are_refused():
    assert refusal(env={"WARMUP_ITERS": "101"}) == "WARMUP_ITERS=101 does not fit"


# ----------------------------------------------------------------------------
# One vocabulary


@pytest.mark.parametrize(
    ("spelling", "text", "name", "value"),
    [
        ("num_layers", "3", "n_layer", 3),
        ("learning_rate", "0.5", "lr", 0.5),
        ("max_steps", "7", "num_iterations", 7),
        ("max_seconds", "9", "time_budget_s", 9.0),
        ("mixed_precision", "none", "precision", "fp32"),
        ("use_wandb", "1", "tracker", "wandb"),
        ("use_wandb", "0", "tracker", "off"),
        ("output_dir", "x", "logs_folder", "x"),
    ],
)
def test_other_spellings_set_the_knob_by_flag_and_environment(spelling, text, name, value):
    dashed = spelling.replace("_", "-")
    for cfg in (
        read(env={spelling.upper(): text}),
        read([f"--{spelling}={text}"]),
        read([f"--{dashed}", text]),
    ):
        assert getattr(cfg, name) == value


def test_the_switch_among_the_spellings_needs_no_value():
    assert read(["--use_wandb"]).tracker == "wandb"


def test_a_spelling_that_is_a_field_of_its_own_is_not_another_ones_alias():
    cfg = read(env={"MAX_SEQ_LEN": "3", "SEQ_LEN": "4"}, cls=OldKnobs)
    assert (cfg.max_seq_len, cfg.sequence_length) == (3, 4)
    assert "N_LAYERS" not in spellings(OldKnobs)


def test_a_siblings_knob_is_refused_by_name_with_the_name_that_it_has_here():
    words = refusal(env={"N_LAYER": "2"}, cls=OldKnobs)
    assert words.startswith("N_LAYER is a knob of train_gpt.py")
    assert "test_knobs.py has NUM_LAYERS" in words and "env -u N_LAYER" in words
    assert "test_knobs.py has no such knob" in refusal(env={"HCM_DIM": "64"})
    words = refusal(env={"N_LAYERS": "2"}, cls=OldKnobs)
    assert "N_LAYERS is another spelling of N_LAYER; test_knobs.py has NUM_LAYERS" in words


def test_a_siblings_knob_with_an_ordinary_name_is_left_alone_with_a_line(capsys):
    assert read(env={"MEMORY": "1", "WANDB_PROJECT": "mine"}) == Knobs()
    assert "MEMORY is a knob of train_gpu.py and train_scaled.py" in capsys.readouterr().err


def test_gnu_screens_window_sets_no_knob_and_the_knobs_old_name_is_refused_elsewhere(capsys):
    """screen sets WINDOW=0, 1, 2, ... and STY in every shell that it opens."""
    scaled = importlib.import_module("train_scaled")
    read_scaled = functools.partial(read_knobs, scaled.Knobs, scaled.PRESETS)
    assert read_scaled([], {"WINDOW": "1", "STY": "4711.pts-0"}).sliding_window == 64
    assert "WINDOW sets nothing: the knob is SLIDING_WINDOW" in capsys.readouterr().err
    with pytest.raises(UserError, match="WINDOW sets nothing: the knob is SLIDING_WINDOW now"):
        read_scaled([], {"WINDOW": "32"})
    with pytest.raises(UserError, match="did you mean --sliding_window"):
        read_scaled(["--window=32"], {})
    assert read(env={"WINDOW": "32"}) == Knobs(), "no knob of other trainers, and never was"
    assert capsys.readouterr().err == ""


def knobs_of(trainer: str) -> tuple[set[str], set[str]]:
    """The fields of a trainer's Knobs, inherited ones too, and the aliases that they have."""
    fields = dataclasses.fields(importlib.import_module(trainer).Knobs)
    aliases = {alias for field in fields for alias in field.metadata["alias"]}
    return {field.name for field in fields}, aliases


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_familys_table_has_the_knobs_of_each_trainer(trainer):
    vocabulary = {name for name, others in family.ALIASES.items() for name in (name, *others)}
    fields, aliases = knobs_of(trainer)
    listed = set(family.COMMON.split()) | set(family.FAMILY[f"{trainer}.py"].split())
    assert len(fields) > 20
    assert listed == fields | (aliases - vocabulary), f"correct {trainer}.py in plumbing/family.py"


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_knob_of_every_trainer_refuses_nonsense_and_its_misspelling(trainer):
    module = importlib.import_module(trainer)
    for field in dataclasses.fields(module.Knobs):
        name = field.name.upper()
        if kind_of(field) is not str or field.metadata["choices"]:
            with pytest.raises(UserError, match=f"{name}='!': expected .*default is"):
                read_knobs(module.Knobs, module.PRESETS, [], {name: "!"})
        with pytest.raises(UserError, match="is not a flag"):
            read_knobs(module.Knobs, module.PRESETS, [f"--{field.name}x=1"], {})
        wrong = name[:3] + name[4:]
        if len(name) > 5 and wrong not in spellings(module.Knobs):
            with pytest.raises(UserError, match=f"{wrong} is "):
                text = describe(field, field.default)
                read_knobs(module.Knobs, module.PRESETS, [], {wrong: text})


def test_no_flag_is_a_prefix_of_one_of_torchruns():
    """torchrun reads the whole command line, and refuses a prefix of two of its flags even behind
    the script's name."""
    actions = torch.distributed.run.get_args_parser()._actions
    theirs = [option for action in actions for option in action.option_strings]
    names = {name for others in family.ALIASES.items() for name in (others[0], *others[1])}
    names |= {name for listed in family.FAMILY.values() for name in listed.split()}
    names |= set(family.COMMON.split())
    for name in sorted(names | {f"no_{name}" for name in names}):
        for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
            assert not any(option.startswith(flag) for option in theirs), flag


# ----------------------------------------------------------------------------
# --help, records


def test_help_is_grouped_fits_100_columns_and_shows_every_knob_once(capsys):
    with pytest.raises(SystemExit):
        read(["--help"], doc="A trainer.")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    groups = [line for line in lines if line in ("model:", "schedule:", "run:")]
    assert groups == ["model:", "schedule:", "run:"]
    for name in FIELDS:
        assert sum(line.startswith(f"  --{name} ") for line in lines) == 1, name
    text = "\n".join(lines)
    assert "--device {cuda,cpu}" in text and "--time_budget_s SECONDS" in text
    assert "--logs_folder DIR" in text and "--n_layer N" in text and "--compile [0|1]" in text
    assert "--num_layers and --n_layers for --n_layer" in " ".join(text.split())


def test_changed_knobs_are_those_that_the_preset_does_not_explain():
    cfg = read(env={"PRESET": "small", "ATTNGATE": "headwise", "LR": "0.1", "DEVICE": "cpu"})
    assert changed_knobs(cfg, PRESETS, ["device"]) == ["PRESET=small", "ATTNGATE=headwise"]
    assert '"lr": 0.1' in knobs_json(cfg)


def test_reading_knobs_needs_no_torch():
    code = (
        "import sys, types; root = sys.argv[1]\n"
        "package = types.ModuleType('plumbing'); package.__path__ = [root + '/plumbing']\n"
        "sys.modules['plumbing'] = package\n"
        "import plumbing.knobs\n"
        "assert 'torch' not in sys.modules and 'yaml' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], env=dict(os.environ))
    assert done.returncode == 0


# ----------------------------------------------------------------------------
# YAML

NAMES = {
    "model.num_layers": "num_layers",
    "model.depth": "num_layers",
    "training.num_epochs": "num_iterations",
    "training.optimizer.lr": "lr",
    "logging.use_wandb": "use_wandb",
    "run.compile": "compile",
}
FIXED = {"model.vocab_size": (35, "the tokenizer has 35 ids")}


def from_yaml(folder: Path, content: str | bytes) -> Knobs:
    path = folder / "c.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read(config=read_yaml(str(path), NAMES, FIXED))


def test_the_keys_of_a_yaml_file_reach_their_knobs(tmp_path):
    text = (
        "\ufeffmodel:\r\n  num_layers: 3\r\n  vocab_size: 35\r\ntraining:\n  optimizer:\n"
        "    lr: 1e-3\nlogging:\n  use_wandb: true\nrun:\n  compile: false\n"
    )
    cfg = from_yaml(tmp_path, text)
    assert (cfg.n_layer, cfg.lr, cfg.tracker, cfg.compile) == (3, 0.001, "wandb", False)
    assert from_yaml(tmp_path, "model:\n") == Knobs()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("model:\n  numlayers: 3", "model.numlayers is not a key; did you mean model.num_layers?"),
        ("training:\n  lr: 0.1", "training.lr is not a key; did you mean training.optimizer.lr?"),
        ("model:\n  vocab_size: 40", "vocab_size: 40 is refused: the tokenizer has 35 ids"),
        ("model:\n  num_layers: many", "NUM_LAYERS='many': expected a whole number >= 1"),
        ("model:\n  num_layers: many", "c.yaml: model.num_layers: many]"),
        ("model:\n  num_layers: 3\n  depth: 4", "one knob"),
        ("model:\n  num_layers: 3\n  num_layers: 4", "num_layers is given twice"),
        ("model:\n  num_layers:", "model.num_layers has no value"),
        ("model: [1]", "model is not a key"),
        ("just words", "expected sections"),
        ("a: [", "not YAML"),
        ("a: &a [1]\nb: *a", "references are not accepted"),
        ("[" * 5000, "not YAML"),
        ("? [1, 2]\n: 3", "not YAML"),
        ("model:\n  num_layers: 3".encode("utf-16"), "looks like UTF-16"),
        ("model:\n  ad: \xfe".encode("latin-1"), "line 2 is not UTF-8"),
    ],
)
def test_a_yaml_file_is_refused_in_one_line(tmp_path, content, words):
    with pytest.raises(UserError) as error:
        from_yaml(tmp_path, content)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_yaml_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.yaml: cannot be read .*configs/ has examples"):
        read_yaml(str(tmp_path / "nowhere.yaml"), NAMES)


def test_assignments_are_checked_as_a_file_is_and_the_later_one_counts(tmp_path):
    items = ["training.optimizer.lr=0.5", "training.optimizer.lr=0.25", "logging.use_wandb=true"]
    cfg = read(config=read_assignments(items, NAMES, FIXED))
    assert (cfg.lr, cfg.tracker) == (0.25, "wandb")
    with pytest.raises(UserError, match="expected key=value"):
        read_assignments(["lr"], NAMES)
    with pytest.raises(UserError, match=r"did you mean training\.optimizer\.lr"):
        read_assignments(["lr=3"], NAMES)


@given(st.text(max_size=60))
def test_no_yaml_gives_a_traceback(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp()
    try:
        from_yaml(folder, text.encode("utf-8", "surrogatepass"))
    except UserError as error:
        assert str(error)


def test_a_file_has_the_headings_of_help_as_its_sections():
    keys = section_keys(Knobs, ("Model",))
    assert keys["Model.n_layer"] == "n_layer" and keys["Model.num_layers"] == "num_layers"
    assert section_keys(Knobs, ("Elsewhere",)) == {}


def test_a_flag_beats_the_environment_beats_set_beats_the_file(tmp_path):
    @dataclass(frozen=True)
    class WithConfig(Knobs):
        config: str = knob("", "YAML file of knobs")

    text = "Model:\n  n_layer: 3\n  attngate: headwise\nSchedule:\n  lr: 0.5\n  warmup_steps: 7\n"
    (tmp_path / "c.yaml").write_text(text)
    flags = [f"--config={tmp_path}/c.yaml", "--set", "n_layer=4", "--set", "lr=0.6", "--lr=0.8"]
    settled = []

    def settle(given):
        settled.append(dict(given))
        return {}

    keys = section_keys(WithConfig, ("Model", "Schedule"))
    env = {"N_LAYER": "5", "LR": "0.7"}
    cfg = read_configured(WithConfig, PRESETS, flags, env, "", keys, {}, settle)
    assert (cfg.n_layer, cfg.attngate, cfg.lr, cfg.warmup_iters) == (5, "headwise", 0.8, 7)
    (given,) = settled
    assert given["n_layer"] == 5 and given["lr"] == 0.8 and "attngate" not in given


def test_what_is_settled_before_the_file_is_opened_is_kept(tmp_path):
    settle = lambda given: {"n_layer": "9"}
    keys = section_keys(Knobs, ("Model",))
    cfg = read_configured(Knobs, PRESETS, ["--n_layer=2"], {}, "", keys, {}, settle)
    assert cfg.n_layer == 9
