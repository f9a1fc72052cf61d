"""What bam.py is given: its flags, and the folders that they name, downloaded where they are missing, read and checked
before anything is trained.

    flags      parse_args, recipes
    folders    data_folder, checkpoint_folder
    contents   load_data, load_cached, identity
"""

import argparse
import contextlib
import fcntl
import hashlib
import math
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np

import glue_data
from glue_data import Dataset, InputError, load_dataset, read_file
from model import WEIGHTS, CheckpointError, load_pretrained, weight_files, whole
from runtime import PRECISIONS, Parser
from wordpiece import Tokenizer

DATA = "glue_data"
CHECKPOINT_NAME = "google-bert/bert-base-uncased"

# --------------------------------------------------------------------------------------------------------------- flags


def number(kind, low, high=math.inf):
    """An argparse type: a number in a range."""

    def convert(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return kind(text)

    convert.__name__ = "whole number" if kind is int else "number"
    return convert


def one_or_two(entry):
    """An argparse type for a field of Recipe: one value, or two with a comma, as (single, multi)."""
    convert = number(int if entry.type is int else float, entry.metadata["low"], entry.metadata["high"])

    def convert_both(text):
        single, comma, multi = text.partition(",")
        words = (single, multi if comma else single)
        return [None if word == "none" and entry.default is None else convert(word) for word in words]

    convert_both.__name__ = convert.__name__
    return convert_both


def parse_args(argv, description, defaults, regimes):
    """The flags of bam.py. defaults: the recipes for one task and for several; regimes: {name: Regime}."""
    parser = Parser("bam.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_flags(parser, ", ".join(regimes))
    add_machine_flags(parser)
    add = parser.add_argument_group("recipe", "one value for both, or single,multi").add_argument
    for entry in fields(defaults[0]):
        values = [getattr(recipe, entry.name) for recipe in defaults]
        shown = ",".join(dict.fromkeys("none" if value is None else f"{value:g}" for value in values))
        why = f"{entry.metadata['why']} (default {shown})"
        add("--" + entry.name.replace("_", "-"), type=one_or_two(entry), metavar="X", help=why)
    args = parser.parse_args(argv)
    if args.table and args != parser.parse_args(["--table", *map(str, args.table)]):
        parser.error("--table: takes run directories and no other flag")
    if args.demo and (args.data != DATA or args.checkpoint != CHECKPOINT_NAME):
        parser.error("--demo makes its own data and checkpoint; --data and --checkpoint are for real ones")
    if args.demo and args.precision == "auto":
        args.precision = "float32"  # its products are so small that on a CPU bfloat16 makes them slower
    args.out = args.out or f"runs/{'demo' if args.demo else args.task.replace(',', '-')}"
    several = len(glue_data.resolve(args.task)) > 1  # which refuses unknown names
    names = ("single-multi" if several else "single") if args.regime is None else args.regime
    args.regime = list(regimes) if names == "all" else names.split(",")
    for name in args.regime:
        if name not in regimes:
            parser.error(f"--regime: unknown regime {name!r}; expected all, or some of {', '.join(regimes)}")
    constant = args.gold_weight not in (None, [None, None])
    for_teachers = args.teacher_checkpoint or args.teachers > 1 or constant
    if for_teachers and not any(regimes[name].teacher for name in args.regime):
        advice = "name also one that has, such as single-multi"
        flags = "--teachers, --teacher-checkpoint and --gold-weight"
        parser.error(f"--regime: {','.join(args.regime)} has no teacher, which {flags} need; {advice}")
    return args


def add_training_flags(parser, regimes):
    """What is trained, and on which files."""
    count = number(int, 1)
    add = parser.add_argument_group("what is trained").add_argument
    add("--task", default="all", help="all (the first eight), or some, with commas: " + ", ".join(glue_data.TASKS))
    rows = f"rows of the table: all, or {regimes} (default single-multi, or single for one task)"
    add("--regime", metavar="NAMES", help=rows)
    add("--trials", type=count, default=1, metavar="N", help="seeds; reports median, spread and p-values (default 1)")
    add("--teachers", type=count, default=1, metavar="N", help="seeds per teacher; outputs are averaged (default 1)")
    add("--seed", type=int, default=0, metavar="N", help="from which every model derives its own (default 0)")
    add("--limit", type=count, metavar="N", help="at most N lines of each training file, evenly spaced (default all)")
    add("--table", nargs="+", type=Path, metavar="RUN", help="train nothing; one table over several run directories")
    add = parser.add_argument_group("files").add_argument
    add("--demo", action="store_true", help="generated data, a tiny BERT, its own recipe: no download, a minute or two")
    add("--data", default=DATA, help=f"the GLUE folder (default {DATA}, downloaded if missing)")
    add("--download", action="store_true", help="fetch what --data lacks of GLUE, whatever its name")
    name = f"a folder, or a public checkpoint's name, ORG/NAME (default {CHECKPOINT_NAME})"
    add("--checkpoint", default=CHECKPOINT_NAME, help=name)
    add("--teacher-checkpoint", help="another one for the teachers: only their outputs reach the student")
    add("--out", help="run directory; repeating the command resumes there (default runs/TASK or runs/demo)")


def add_machine_flags(parser):
    """Where it runs, and how often it saves."""
    count = number(int, 1)
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="cuda, cpu, mps (default: cuda where there is one)")
    precision = "default: bfloat16 where the device multiplies it natively, float32 elsewhere and with --demo"
    add("--precision", choices=PRECISIONS, default="auto", help=precision)
    add("--no-compile", dest="compile", action="store_false", help="CUDA: do not compile the encoder")
    add("--save-minutes", type=number(float, 0), default=5, metavar="X", help="between checkpoints (default 5)")
    add("--save-steps", type=count, default=0, metavar="N", help="the same in steps, whichever comes first")
    add("--evaluate-every", type=count, default=0, metavar="N", help="steps between dev scores in metrics.jsonl")
    wait = "how long processes wait for each other, downloads by process 0 included (default 30)"
    add("--wait-minutes", type=number(float, 0.1, 1e6), default=30, metavar="X", help=wait)


def recipes(args, defaults):
    """The recipes for one task and for several: the defaults with what the flags override."""
    given = {entry.name: getattr(args, entry.name) for entry in fields(defaults[0])}
    single, multi = (
        replace(recipe, **{name: values[position] for name, values in given.items() if values})
        for position, recipe in enumerate(defaults)
    )
    if single.max_length != multi.max_length:
        raise InputError("--max-length: teachers and student read the same examples; expected one value")
    return single, multi


# ------------------------------------------------------------------------------------------------------------- folders


def data_folder(args, run):
    """The GLUE folder, downloaded where it is missing, unless its name may be a mistake."""
    folder = Path(args.data)
    wanted = args.download or run.exists(folder / ".download")  # or begun before
    if wanted or not run.exists(folder):
        if not wanted and args.data != DATA:
            raise InputError(f"--data: there is no folder {folder}; with --download GLUE is fetched into it")
        run.on_rank_0(download, run, "glue", str(folder))
    return folder


def checkpoint_folder(name, run):
    """The folder of this name; or the one where the public checkpoint ORG/NAME is kept, downloaded if it is missing."""
    if Path(name).exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return Path(name)
    folder = Path("checkpoints") / name
    if not any(run.exists(folder / file) for file in WEIGHTS):
        run.on_rank_0(download, run, "checkpoint", name, str(folder))
    return folder


def download(run, *arguments):
    """Run download_glue.sh, all the network code there is, after other commands that download to the same folder."""
    script = Path(__file__).with_name("download_glue.sh")
    lock = Path(arguments[-1] + ".lock")  # the last argument is the folder
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        run.say(f"downloading to {arguments[-1]}, after any other command that does")
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        run.stop_if_asked()
        result = subprocess.run(["bash", str(script), *arguments], env={**os.environ, "PYTHON": sys.executable})
    if result.returncode:
        run.stop_if_asked()  # Ctrl-C ends the script too
        raise InputError(f"{script.name} {' '.join(arguments)} failed, as said above; --demo needs no download")


# ------------------------------------------------------------------------------------------------------------ contents


def load_data(checkpoint, run, tasks, folder, max_length, limit):
    """{task: {split: Dataset}} of all files that are there, tokenized for the checkpoint, which is checked too."""
    config = load_pretrained(checkpoint, {"": 1}, run.say).config
    tokenizer = Tokenizer(checkpoint)
    if tokenizer.size > config.vocab_size:
        problem = f"a vocabulary of {tokenizer.size} tokens; expected {config.vocab_size}, as config.json says"
        raise CheckpointError(f"{checkpoint}: {problem}")
    if max_length > config.max_position_embeddings:
        raise InputError(f"--max-length: the checkpoint has {config.max_position_embeddings} positions")
    run.say(f"reading {', '.join(task.folder for task in tasks)} from {folder}; tokenizer: {tokenizer.description}")
    data = {}
    for task in tasks:
        tests = [split for split, file in task.test if (folder / task.folder / file).exists()]
        data[task.name] = {}
        for split in ["train", *dict(task.dev), *tests]:
            run.stop_if_asked()
            arguments = task, split, folder, tokenizer, max_length, limit if split == "train" else None
            data[task.name][split] = dataset = load_cached(run, *arguments)
            words = dataset.input_ids[~np.isin(dataset.input_ids, (tokenizer.cls_id, tokenizer.sep_id))]
            unknown = np.sum(words == tokenizer.unk_id)
            if unknown > 0.05 * len(words):
                share = f"{unknown / len(words):.0%} of the tokens of {task.folder} {split} are [UNK]"
                run.say(f"warning: {share}; is it the right tokenizer?")
    return data


def load_cached(run, task, split, root, tokenizer, *settings):
    """What load_dataset gives, kept in the run directory as long as file, tokenizer, settings and code are the same."""
    data = read_file(root / task.folder / task.files[split], "a file of GLUE")
    code = Path(glue_data.__file__).read_bytes()
    key = repr((task, split, settings, tokenizer.fingerprint())).encode() + code + data
    path = run.folder / "tokens" / f"{task.name}-{split}-{hashlib.sha256(key).hexdigest()[:16]}.npz"
    if path.exists():
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile), np.load(path) as arrays:
            return Dataset((task,), **arrays)
    dataset = load_dataset(task, split, root, tokenizer, *settings)
    if run.rank == 0:
        path.parent.mkdir(exist_ok=True)
        with whole(path) as file:
            np.savez(file, **{field.name: getattr(dataset, field.name) for field in fields(dataset)[1:]})
    return dataset


def identity(experiment, run, folder, limit):
    """What decides the numbers (but for dropout's draws, which the number of processes decides too), so that models of
    different runs never mix. Files count by content, not by path."""
    labelled = [Path(t.folder, file) for t in experiment.tasks for file in (t.train, *dict(t.dev).values())]
    files = {str(path): folder / path for path in labelled}
    for prefix, source in (("", experiment), ("teacher/", experiment.teacher_experiment)):
        if source:
            names = ["config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json"]
            paths = [source.checkpoint / name for name in names] + weight_files(source.checkpoint)
            files |= {prefix + path.name: path for path in paths}
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if path.is_file()}
    return {
        "tasks": [task.name for task in experiment.tasks],
        "labels": {task.name: list(task.labels or task.scores) for task in experiment.tasks},
        "seed": experiment.seed,
        "teachers": experiment.copies,
        "limit": limit,
        "precision": "bfloat16" if run.bfloat16 else "float32",
        "single": asdict(experiment.single),
        "multi": asdict(experiment.multi),
        "files": digests,
    }
