"""GLUE: its tasks, files, tokens, batches, metrics and submission format. NumPy; imports nothing of ours.

    tasks        what GLUE says of each task                         TASKS, resolve
    reading      TSV files to sentences and labels                   read_split
    tokenizing   sentences to token ids                              Dataset, load_dataset, text_dataset
    mixing       several tasks to one stream of examples             concatenate, sample_schedule
    batches      examples to one row of tokens                       micro_batches, pack
    metrics      outputs to the figures of the paper's table         score
    submission   outputs to what gluebenchmark.com accepts           answers, submission_zip

Dimension letters: N examples, T tokens, B sequences of a batch, K outputs (labels, or one for a score) of a task or of
several tasks side by side.
"""

import io
import json
import re
import zipfile
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np


class InputError(ValueError):
    """A bad file, flag or environment. The message names it, the line where there is one, and what was expected."""


# --------------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """What GLUE says of one task; a new task is a new entry of TASKS (see the README).

    Label order is the original's (bam/task_specific/classification/classification_tasks.py), metrics[0] the paper's.
    """

    name: str  # Hugging Face's name of the `glue` configuration
    folder: str  # the official folder, and the name in the paper's table
    text: tuple[str, ...]  # column names of the one or two sentences
    label: str = "label"  # column name of the label
    labels: tuple[str, ...] = ()  # label words, the second positive for F1; none: a score
    scores: tuple[float, float] = (0.0, 5.0)  # the range of scores
    metrics: tuple[str, ...] = ("accuracy",)
    symmetric: bool = False  # train on every pair twice, the second time swapped
    header: tuple[str, ...] = ()  # column names of labelled files that have no header line
    train: str = "train.tsv"
    dev: tuple[tuple[str, str], ...] = (("dev", "dev.tsv"),)  # (split, file); the first is the paper's
    test: tuple[tuple[str, str], ...] = ()  # (name in the submission, file)

    def __post_init__(self):
        for words in (self.text, self.labels):
            if not isinstance(words, tuple) or len({word for word in words if isinstance(word, str)}) < len(words):
                raise InputError(f"task {self.name}: {words!r}; expected a tuple of different words")
        if len(self.text) not in (1 + self.symmetric, 2):
            expected = "2" if self.symmetric else "1 or 2"
            raise InputError(f"task {self.name}: {len(self.text)} columns of text; expected {expected}")
        suitable = ("pearson", "spearman") if self.is_regression else ("accuracy", "f1", "matthews")
        if not self.metrics or not set(self.metrics) <= set(suitable):
            raise InputError(f"task {self.name}: metrics are {self.metrics}; expected some of {suitable}")
        if not self.dev or len(self.files) < 1 + len(self.dev) + len(self.test):
            raise InputError(f"task {self.name}: splits {', '.join(self.files)}; expected a dev split, no name twice")
        if "f1" in self.metrics and len(self.labels) != 2:
            raise InputError(f"task {self.name}: f1 needs two labels; there are {len(self.labels)}")

    @property
    def num_outputs(self):
        return len(self.labels) or 1

    @property
    def is_regression(self):
        return not self.labels

    @property
    def files(self):
        """Every split's file, by split: train, then dev, then test."""
        return {"train": self.train, **dict(self.dev), **dict(self.test)}


ENTAILMENT = ("entailment", "not_entailment")
SENTENCES = ("sentence1", "sentence2")
TASKS = {
    task.name: task
    for task in (
        Task("cola", "CoLA", ("sentence",), labels=("0", "1"), metrics=("matthews",),
             header=("source", "label", "star", "sentence"), test=(("CoLA", "test.tsv"),)),
        Task("sst2", "SST-2", ("sentence",), labels=("0", "1"), test=(("SST-2", "test.tsv"),)),
        Task("mrpc", "MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1"), metrics=("accuracy", "f1"),
             symmetric=True, test=(("MRPC", "test.tsv"),)),
        Task("stsb", "STS-B", SENTENCES, "score", metrics=("spearman", "pearson"),
             symmetric=True, test=(("STS-B", "test.tsv"),)),
        Task("qqp", "QQP", ("question1", "question2"), "is_duplicate", ("0", "1"), metrics=("accuracy", "f1"),
             test=(("QQP", "test.tsv"),)),
        Task("mnli", "MNLI", SENTENCES, "gold_label", ("contradiction", "entailment", "neutral"),
             dev=(("dev", "dev_matched.tsv"), ("dev_mismatched", "dev_mismatched.tsv")),
             test=(("MNLI-m", "test_matched.tsv"), ("MNLI-mm", "test_mismatched.tsv"),
                   ("AX", "../diagnostic/diagnostic.tsv"))),
        Task("qnli", "QNLI", ("question", "sentence"), labels=ENTAILMENT, test=(("QNLI", "test.tsv"),)),
        Task("rte", "RTE", SENTENCES, labels=ENTAILMENT, test=(("RTE", "test.tsv"),)),
        Task("wnli", "WNLI", SENTENCES, labels=("0", "1"), test=(("WNLI", "test.tsv"),)),
    )
}  # fmt: skip
EIGHT = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")  # the paper's: WNLI gets its majority class


def resolve(names):
    """The Tasks that 'rte,SST-2', 'all' or 'all,wnli' names. Unknown and repeated names raise InputError."""
    groups = [EIGHT if name.strip().lower() == "all" else (name.strip(),) for name in names.split(",")]
    tasks = [find_task(name) for group in groups for name in group]
    for task in tasks:
        if tasks.count(task) > 1:
            raise InputError(f"--task: {task.name} is named twice")
    return tasks


def find_task(name):
    """The Task of this name. In lower case and without hyphens, the names of GLUE's folders are those of its tasks."""
    task = TASKS.get(name) or TASKS.get(name.lower().replace("-", ""))
    if task is None:
        raise InputError(f"unknown task {name!r}; known: all, {', '.join(TASKS)}")
    return task


# ------------------------------------------------------------------------------------------------------------- reading


def read_file(path, expected):
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from error


def read_json(path):
    """The object in a JSON file."""
    data = read_file(path, "a JSON object")
    try:
        return {**json.loads(data)}
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a JSON object") from error


def parse_tsv(data, path, wanted, header=()):
    """Yield (line number, fields of the `wanted` columns) for the examples of a TSV file's bytes.

    `header` names the columns of a file without a header line. There is no quoting: in GLUE a double quote is a
    character. A byte-order mark and CR LF are removed and nothing else is, because edge fields may be empty.
    """
    columns = header
    for number, line in enumerate(io.BytesIO(data), start=1):  # only a line feed ends a line
        place = f"{path}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{place}: byte 0x{error.object[error.start]:02x} is not UTF-8") from error
        fields = text.removesuffix("\n").removesuffix("\r").split("\t")
        if not columns:
            columns = fields
            for name in wanted:
                if columns.count(name) != 1:
                    found = f"found {len(columns)} by tabs: {brief(columns)}"
                    raise InputError(f"{place}: expected one column {name!r}; {found}")
        elif len(fields) != len(columns):
            expected = f"expected {len(columns)}: {brief(columns)}"
            raise InputError(f"{place}: {len(fields)} tab-separated fields; {expected}")
        else:
            yield number, [fields[columns.index(name)] for name in wanted]
    if not columns:
        raise InputError(f"{path}: is empty; expected a header line")


def brief(fields):
    """The beginning of a line, for a message, with control characters escaped."""
    return repr(", ".join(fields)[:200])


def first_fields(data):
    """The fields of a TSV file's first line."""
    line = data.partition(b"\n")[0].decode("utf-8-sig", "replace")
    return line.removesuffix("\r").split("\t")


@dataclass(frozen=True)
class Split:
    """Examples as GLUE writes them."""

    first: list[str]
    second: list[str] | None  # None for single-sentence tasks
    labels: np.ndarray  # (N, K) float32; zeros where there are none
    lines: np.ndarray  # (N,) int32, line numbers from 1
    index: np.ndarray  # (N,) int32, each example's number in a submission


def read_split(task, split, root):
    """One split of a task, under the GLUE folder `root`, as a Split."""
    if split not in task.files:
        raise InputError(f"task {task.name} has no split {split!r}; expected one of {', '.join(task.files)}")
    path = Path(root) / task.folder / task.files[split]
    data = read_file(path, "a file of GLUE")
    is_test = split in dict(task.test)
    has_index = is_test and "index" in first_fields(data)
    last = ["index"] if has_index else [] if is_test else [task.label]
    texts = []
    labels = array("f")
    lines = {}  # {number in a submission: line}
    for line, words in parse_tsv(data, path, [*task.text, *last], () if is_test else task.header):
        texts.append(words[: len(task.text)])
        number = read_index(words[-1], lines, path, line) if has_index else len(lines)
        lines[number] = line
        labels.extend([0.0] * task.num_outputs if is_test else read_label(task, words[-1], path, line))
    first, second = sentences_of(task, texts, path)
    labels = np.array(labels).reshape(-1, task.num_outputs)  # (N, K)
    return Split(first, second, labels, np.array(list(lines.values()), np.int32), np.array(list(lines), np.int32))


def sentences_of(task, texts, path):
    """(first, second or None) of the texts of all examples."""
    if not texts:
        raise InputError(f"{path}: has no examples; expected {' and '.join(task.text)}, one example a line")
    first, *second = [list(column) for column in zip(*texts, strict=True)]
    return first, second[0] if second else None


def read_index(word, lines, path, line):
    """An example's number in the submission, which need not be its position in the file."""
    if not re.fullmatch("[0-9]{1,9}", word):
        raise InputError(f"{path}, line {line}: index {brief([word])}; expected a whole number")
    if int(word) in lines:
        raise InputError(f"{path}, line {line}: index {word} stands on line {lines[int(word)]} already")
    return int(word)


def read_label(task, word, path, line):
    """The K labels of one example: one-hot, or the score as a fraction of its range."""
    if task.labels:
        if word not in task.labels:
            raise InputError(f"{path}, line {line}: unknown label {brief([word])}; expected {' or '.join(task.labels)}")
        return [float(word == label) for label in task.labels]
    try:
        score = float(word.replace("_", "?"))  # to Python, 0_5 would be 5
    except ValueError:
        score = float("nan")
    low, high = task.scores
    if not low <= score <= high:
        raise InputError(f"{path}, line {line}: score {brief([word])}; expected a number from {low:g} to {high:g}")
    return [(score - low) / (high - low)]


# ---------------------------------------------------------------------------------------------------------- tokenizing

@dataclass(frozen=True)
class Dataset:
    """Tokenized examples, end to end:

    [CLS] a [SEP] b b b [SEP] [CLS] c c [SEP] [CLS] ...      input_ids (T,) int32
    0                         7               11             offsets (N + 1,) int64
    segment 1 starts at 3 in the first, at 4 (its length: nowhere) in the second: segment_starts (N,) int32
    """

    tasks: tuple[Task, ...]
    input_ids: np.ndarray
    offsets: np.ndarray
    segment_starts: np.ndarray
    task_ids: np.ndarray  # (N,) int32, positions in `tasks`
    labels: np.ndarray  # (N, K) float32, the outputs of all tasks side by side; zeros where there are none
    lines: np.ndarray  # (N,) int32, line numbers in the files
    index: np.ndarray  # (N,) int32, numbers in a submission

    def __len__(self):
        return len(self.offsets) - 1


def load_dataset(task, split, root, tokenizer, max_length, limit=None):
    """One split, read and tokenized, as a Dataset; at most `limit` examples, evenly spaced.

    The training sets of symmetric tasks hold all pairs, then all pairs swapped, as the original's `double_unordered`.
    """
    whole = read_split(task, split, root)
    count = len(whole.first)
    chosen = np.linspace(0, count - 1, limit).astype(int) if limit and limit < count else np.arange(count)
    first = [whole.first[i] for i in chosen]
    second = [whole.second[i] for i in chosen] if whole.second else None
    if task.symmetric and split == "train":
        first, second = first + second, second + first
        chosen = np.tile(chosen, 2)
    examples = Split(first, second, whole.labels[chosen], whole.lines[chosen], whole.index[chosen])
    return make_dataset(task, examples, tokenizer, max_length)


def text_dataset(task, first, second, tokenizer, max_length):
    """Somebody's own sentences as a Dataset whose labels are zeros."""
    labels = np.zeros((len(first), task.num_outputs), np.float32)
    index = np.arange(len(first), dtype=np.int32)
    return make_dataset(task, Split(first, second, labels, index + 1, index), tokenizer, max_length)


def make_dataset(task, examples, tokenizer, max_length):
    """A Split as a Dataset of one task: [CLS] a [SEP], or [CLS] a [SEP] b [SEP] if b has a token."""
    input_ids, offsets, segment_starts = array("i"), array("q", [0]), array("i")
    first = tokenizer(examples.first)
    second = tokenizer(examples.second) if examples.second else [[]] * len(examples.first)
    for a, b in zip(first, second, strict=True):
        kept_a, kept_b = truncated_lengths(len(a), len(b), max_length - (3 if b else 2))
        ids = [tokenizer.cls_id, *a[:kept_a], tokenizer.sep_id]
        segment_starts.append(len(ids))
        if b:
            ids += [*b[:kept_b], tokenizer.sep_id]
        input_ids.extend(ids)
        offsets.append(len(input_ids))
    return Dataset(
        tasks=(task,),
        input_ids=np.array(input_ids),
        offsets=np.array(offsets),
        segment_starts=np.array(segment_starts),
        task_ids=np.zeros(len(examples.first), np.int32),
        labels=examples.labels,
        lines=examples.lines,
        index=examples.index,
    )


def truncated_lengths(len_a, len_b, limit):
    """How many tokens of a pair stay if the longer side, or b on a tie, loses one at a time until `limit` are left."""
    half_b = limit // 2  # where both are long, the odd token is a's
    return min(len_a, max(limit - half_b, limit - len_b)), min(len_b, max(half_b, limit - len_a))


def describe_examples(dataset, examples):
    """The files and lines of training examples, for an error message."""
    descriptions = []
    for task_id, task in enumerate(dataset.tasks):
        lines = np.unique(dataset.lines[examples[dataset.task_ids[examples] == task_id]])
        if len(lines):
            descriptions.append(f"{task.folder}/{task.train}, line {', '.join(map(str, lines))}")
    return "; ".join(descriptions)


# -------------------------------------------------------------------------------------------------------------- mixing


def concatenate(datasets):
    """Datasets of one task each, in this order, as one Dataset; each task's labels have columns of their own."""
    end_to_end = ("input_ids", "segment_starts", "lines", "index")
    lengths = np.concatenate([np.diff(dataset.offsets) for dataset in datasets])
    return Dataset(
        tasks=tuple(dataset.tasks[0] for dataset in datasets),
        offsets=np.concatenate(([0], np.cumsum(lengths))),
        task_ids=np.repeat(np.arange(len(datasets), dtype=np.int32), [len(dataset) for dataset in datasets]),
        labels=block_diagonal([dataset.labels for dataset in datasets]),
        **{name: np.concatenate([getattr(dataset, name) for dataset in datasets]) for name in end_to_end},
    )


def block_diagonal(blocks):
    """Blocks (N1, K1), (N2, K2), ... on the diagonal of an array (N1 + N2 + ..., K1 + K2 + ...), zeros elsewhere."""
    ends = np.cumsum([block.shape for block in blocks], axis=0)
    out = np.zeros(ends[-1], np.float32)
    for block, (row, column) in zip(blocks, ends, strict=True):
        out[row - block.shape[0] : row, column - block.shape[1] : column] = block
    return out


def sample_schedule(sizes, num_steps, batch_size, exponent, seed):
    """The examples of a whole run, (num_steps, batch_size) indices into the concatenated dataset, from one seed.

    sizes: each task's training examples, doubled pairs counted twice. An example's task is drawn with p ∝
    size^exponent; the paper's 0.75 keeps the large tasks from drowning the small. The example is the next of the task's
    current pass, and each pass is a fresh permutation.
    """
    rng = np.random.default_rng(seed)
    weights = np.asarray(sizes, np.float64) ** exponent
    tasks = rng.choice(len(sizes), size=num_steps * batch_size, p=weights / weights.sum())
    schedule = np.zeros(num_steps * batch_size, np.int64)
    first_index = 0
    for task, size in enumerate(sizes):
        draws = np.flatnonzero(tasks == task)
        passes = [rng.permutation(size) for _ in range(-(-len(draws) // size))]
        schedule[draws] = first_index + np.concatenate([np.zeros(0, np.int64), *passes])[: len(draws)]
        first_index += size
    return schedule.reshape(num_steps, batch_size)


# ------------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """B sequences as one row of T tokens, without padding; all int32:

    [CLS] a a a [SEP] b b [SEP] [CLS] c c [SEP] [CLS] d [SEP]     input_ids    (T,)
      0   0 0 0   0   1 1   1     0   0 0   0     0   0   0       segment_ids  (T,)
      0   1 2 3   4   5 6   7     0   1 2   3     0   1   2       position_ids (T,)
      0                           8              12         15    cu_seqlens   (B + 1,)

    cu_seqlens are where sequences begin, and T. examples (B,): which of the dataset these are.
    """

    input_ids: np.ndarray
    segment_ids: np.ndarray
    position_ids: np.ndarray
    cu_seqlens: np.ndarray
    examples: np.ndarray


def micro_batches(dataset, examples, num_tokens):
    """The examples (B,), longest first, as a list of arrays of about num_tokens tokens each."""
    if not len(examples):  # a process's share of a batch smaller than the number of processes
        return []
    lengths = dataset.offsets[examples + 1] - dataset.offsets[examples]  # (B,)
    order = np.argsort(-lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    count = -(-ends[-1] // num_tokens)
    numbers = (ends - 1) * count // ends[-1]  # (B,) each example's micro-batch: 0 0 1 1 1 2 ...
    return np.split(examples[order], np.flatnonzero(np.diff(numbers)) + 1)


def pack(dataset, examples):
    """The examples (B,) of a Dataset as a Batch, in the order given."""
    starts = dataset.offsets[examples]  # (B,)
    lengths = dataset.offsets[examples + 1] - starts  # (B,)
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))  # (B + 1,)
    position_ids = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)  # (T,)
    input_ids = dataset.input_ids[np.repeat(starts, lengths) + position_ids]  # (T,)
    segment_ids = position_ids >= np.repeat(dataset.segment_starts[examples], lengths)  # (T,)
    return Batch(*(array.astype(np.int32) for array in (input_ids, segment_ids, position_ids, cu_seqlens, examples)))


# ------------------------------------------------------------------------------------------------------------- metrics


def accuracy(true, predicted):
    return np.mean(true == predicted)


def f1(true, predicted):
    """F1 of class 1; 0 where neither side has one (as scikit-learn's zero_division=0)."""
    positives = np.sum(true == 1) + np.sum(predicted == 1)
    return 2 * np.sum((true == 1) & (predicted == 1)) / positives if positives else 0.0


def matthews(true, predicted):
    """Matthews correlation of two or more classes; 0 where one side is constant (as scikit-learn)."""
    classes = np.arange(1 + max(true.max(), predicted.max()))
    of_true = (true[:, None] == classes) - np.mean(true[:, None] == classes, 0)  # (N, classes)
    of_predicted = (predicted[:, None] == classes) - np.mean(predicted[:, None] == classes, 0)
    scale = np.sqrt(np.sum(of_true**2) * np.sum(of_predicted**2))
    return np.sum(of_true * of_predicted) / scale if scale else 0.0


def pearson(true, predicted):
    """NaN where one side is constant: there is no correlation to speak of (as SciPy)."""
    if np.ptp(true) == 0 or np.ptp(predicted) == 0:
        return float("nan")
    return np.corrcoef(true, predicted, dtype=np.float64)[0, 1]


def ranks(values):
    """Ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(true, predicted):
    return pearson(ranks(true), ranks(predicted))


METRICS = {metric.__name__: metric for metric in (accuracy, f1, matthews, pearson, spearman)}


def score(task, logits, labels):
    """{metric: percent} of outputs and labels, both (N, K), the paper's metric first."""
    true, predicted = (outputs[:, 0] if task.is_regression else outputs.argmax(1) for outputs in (labels, logits))
    return {name: 100 * float(METRICS[name](true, predicted)) for name in task.metrics}


# ---------------------------------------------------------------------------------------------------------- submission


def answers(task, logits):
    """The words of GLUE's files for outputs (N, K): label words, or scores with three decimals inside their range."""
    if task.is_regression:
        low, high = task.scores
        return [f"{value:.3f}" for value in np.clip(low + logits[:, 0] * (high - low), low, high)]
    return [task.labels[index] for index in logits.argmax(1)]


def predictions_tsv(words, index):
    """The text of one leaderboard file, in the order of `index`, the words' numbers."""
    lines = [f"{number}\t{word}\n" for number, word in sorted(zip(index, words, strict=True))]
    return "index\tprediction\n" + "".join(lines)


def submission_zip(predictions):
    """The bytes of a zip that gluebenchmark.com accepts, from {name: (words, index)}; equal for equal words."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (words, index) in predictions.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.tsv"), predictions_tsv(words, index), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
