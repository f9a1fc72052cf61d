"""A finished run at work: labels for one's own text, and models for Hugging Face.

    python predict.py runs/all --task rte --text "A cat sat on the mat." --text2 "There was a cat."
    python predict.py runs/all --task stsb pairs.tsv      # a prediction a line; - reads standard input
    python predict.py runs/all --export FOLDER            # every task's model, and the encoder; --task for one
"""

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch

import glue_data
from bam import REGIMES, predict
from model import load_pretrained, public_tensors, save_pretrained
from runtime import PRECISIONS, Parser, Run, command
from wordpiece import Tokenizer


def finished_models(run, tasks, regime=None):
    """{task name: folder of its model} in a run directory: trial 1 of a regime or, without one, for each task of
    the last regime of the table that has finished it."""
    folders = {}
    config = run / "config.json"
    own = glue_data.read_json(config).get("tasks", ()) if config.exists() else ()  # copied teachers may have more
    for name in [regime] if regime else REGIMES:  # later ones replace earlier ones
        top = run / "trial-1" / name
        folders |= {task: path for task in own for path in (top, top / task) if (path / "scores.json").exists()}
    if not folders:
        problem = f"no finished model{' of ' + regime if regime else ''} there"
        raise glue_data.InputError(f"{run}: {problem}; expected the run directory of an earlier command")
    for task in tasks:
        if task.name not in folders:
            raise glue_data.InputError(f"--task: no model of {task.name} in {run}; there are {', '.join(folders)}")
    return {task.name: folders[task.name] for task in tasks} or folders


def load_model(run, folder, task):
    """(model, the task with the run's labels or score range, tokenizer, max_length) of a finished model's folder."""
    config = glue_data.read_json(run / "config.json")
    trained_with = {"labels" if task.labels else "scores": tuple(config["labels"][task.name])}
    return load_pretrained(folder), replace(task, **trained_with), Tokenizer(folder), config["single"]["max_length"]


def utf8(text):
    """An argparse type: an argument whose bytes are UTF-8."""
    return text.encode().decode()


COLUMN_NAME = re.compile(r"[\"'#]?[\w-]+( [\w-]+)?[\"']?", re.ASCII)  # text, #1 String, "Sentence 2", ...


def read_sentences(task, data, path):
    """(first, second or None): the sentences of somebody's own text, given as bytes.

    One example a line, with a tab between the sentences of a pair; or with a header, whose columns are found by name. A
    first line that may be a header of other names is refused, because its prediction would shift all the others.
    """
    names = glue_data.first_fields(data)
    header = () if set(task.text) <= set(names) else task.text
    if header and data and all(COLUMN_NAME.fullmatch(name) for name in names):
        header = "<TAB>".join(task.text)
        advice = f"if it is an example, put the header {header} above it; if it is a header, replace it by that"
        raise glue_data.InputError(f"{path}, line 1: {glue_data.brief(names)} could be column names; {advice}")
    texts = [words for _, words in glue_data.parse_tsv(data, path, task.text, header)]
    return glue_data.sentences_of(task, texts, path)


def label(args, task, folder):
    """Print label and probability, or score, for each line of somebody's own text."""
    if args.file:
        piped = args.file == "-" and sys.stdin
        data = sys.stdin.buffer.read() if piped else glue_data.read_file(Path(args.file), "one example a line")
        first, second = read_sentences(task, data, args.file)
    else:
        texts = [text for text in (args.text, args.text2) if text is not None]
        if args.text is None or len(texts) != len(task.text):
            raise glue_data.InputError(f"{task.name} takes --text{' and --text2' * (len(task.text) - 1)}, or a file")
        first, second = texts[:1], texts[1:] or None
    model, task, tokenizer, max_length = load_model(args.run, folder, task)
    run = Run(None, args.device, args.precision)
    dataset = glue_data.text_dataset(task, first, second, tokenizer, max_length)
    logits = predict(model.to(run.device), dataset, run)  # (N, outputs)
    print("prediction\tprobability" if task.labels else "prediction")
    probabilities = torch.tensor(logits).softmax(-1).amax(-1)
    for word, probability in zip(glue_data.answers(task, logits), probabilities, strict=True):
        print(f"{word}\t{probability:.4f}" if task.labels else word)


def public_head(encoder, weight, bias):
    """One task's head, weight (k, H), under Hugging Face's names. ELECTRA's there has two layers with a GELU between
    them, which give the same logits: the first is W and -W, the second the difference, as GELU(x) - GELU(-x) = x."""
    if encoder == "bert":
        return {"classifier.weight": weight, "classifier.bias": bias}
    k, hidden = weight.shape
    unused = hidden - 2 * k
    if unused < 0:
        raise glue_data.InputError(f"--export: ELECTRA's head there holds {hidden // 2} labels at most, not {k}")
    dense = torch.cat([weight, -weight, torch.zeros(unused, hidden)])  # (H, H)
    out = torch.cat([torch.eye(k), -torch.eye(k), torch.zeros(k, unused)], 1)  # (k, H)
    tensors = {"dense.weight": dense, "dense.bias": torch.zeros(hidden), "out_proj.weight": out, "out_proj.bias": bias}
    return {f"classifier.{name}": tensor for name, tensor in tensors.items()}


def write_public(model, folder, task=None):
    """Write what Hugging Face's AutoModelForSequenceClassification loads, whose logits are this model's; without a
    task, what AutoModel loads."""
    encoder = model.config.model_type
    tensors = {name: tensor for name, tensor in public_tensors(model).items() if name.startswith(f"{encoder}.")}
    config = {"architectures": [f"{encoder.capitalize()}{'ForSequenceClassification' if task else 'Model'}"]}
    if task:
        columns = model.columns[task.name]
        tensors |= public_head(encoder, model.head.weight[columns], model.head.bias[columns])
        words = dict(enumerate(task.labels or ["score"]))
        config |= {"id2label": words, "label2id": {word: index for index, word in words.items()}}
        config["problem_type"] = "single_label_classification" if task.labels else "regression"
    save_pretrained(model, folder, tensors, **config)


def export(args, folders):
    """Write each task's model, and the encoder that several tasks share, as folders that Hugging Face loads."""
    encoders = {}  # {folder of a model of several tasks: the first of them}
    for name, source in folders.items():
        model, task, tokenizer, max_length = load_model(args.run, source, glue_data.find_task(name))
        targets = {Path(args.export) / name: task}
        if len(model.num_outputs) > 1 and not args.task and encoders.setdefault(source, name) == name:
            targets[Path(args.export) / "encoder"] = None
        for target, its_task in targets.items():
            if (target / "scores.json").exists():
                raise glue_data.InputError(f"--export: {target} is a model of a run; expected another folder")
            write_public(model, target, its_task)
            tokenizer.save(target, max_length)
            print(target)


def main(argv=None):
    """The command."""
    parser = Parser("predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="run directory of an earlier bam.py")
    add("file", metavar="FILE", nargs="?", help="a TSV of one's own: a line each, a tab between two sentences; or -")
    add("--task", help="whose head predicts, or is exported (default for --export: all)")
    add("--text", type=utf8, help="label one text, or with --text2 one pair")
    add("--text2", type=utf8)
    add("--export", metavar="FOLDER", help="write the encoder and each task's model for Hugging Face")
    add("--regime", metavar="NAME", help="a folder of RUN/trial-1 (default: the task's last in the table)")
    add("--device", default="auto", help="cuda, cpu, mps (default: cuda where there is one)")
    add("--precision", choices=PRECISIONS, default="auto")
    args = parser.parse_intermixed_args(argv)  # FILE may come after --task
    given = [args.file is not None, args.text is not None or args.text2 is not None, args.export is not None]
    if sum(given) != 1:
        parser.error("expected one of FILE, --text and --export")
    tasks = glue_data.resolve(args.task) if args.task else []
    folders = finished_models(args.run, tasks, args.regime)
    if args.export:
        return export(args, folders)
    if len(tasks) != 1:
        raise glue_data.InputError(f"--task: expected one of {', '.join(folders)}")
    label(args, tasks[0], folders[tasks[0].name])


if __name__ == "__main__":
    sys.exit(command("predict.py", main))
