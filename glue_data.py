"""GLUE: its tasks, files, tokens, batches, metrics and submission format. NumPy and `tokenizers`; no torch.

    tasks        what GLUE is, a row a task                          TASKS, resolve
    reading      TSV files to sentences and labels                   read_split
    tokenizing   sentences to token ids                              Tokenizer, load_dataset
    mixing       several tasks to one stream of examples             mix, sample_schedule
    batches      examples to one row of tokens                       pack
    metrics      outputs to the figures of the paper's table         score, mann_whitney_p
    submission   outputs to what gluebenchmark.com accepts           answers, write_submission
    demo         a small GLUE of generated English                   write_demo

Dimension letters: N examples, T tokens, B sequences of a batch, K outputs (labels, or one for a score).
"""

import io
import random
import zipfile
from array import array
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers


class DataError(ValueError):
    """Bad input. The message names the file, the line where there is one, and what was expected."""


# --------------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """What GLUE says of one task; a new task is a new row of TASKS (see the README).

    Label order is the original's (bam/task_specific/classification/classification_tasks.py), metrics[0] the paper's.
    """

    name: str  # Hugging Face's name of the `glue` configuration
    folder: str  # the official folder, also the name on the command line and in the paper's table
    text: tuple[str, ...]  # column names of the one or two sentences
    label: str = "label"  # column name of the label
    labels: tuple[str, ...] = ()  # label words; none: a score
    max_score: float = 5.0  # scores run from 0 to this
    metrics: tuple[str, ...] = ("accuracy",)
    symmetric: bool = False  # train on every pair twice, the second time swapped
    header: tuple[str, ...] = ()  # column names of labelled files that have no header line
    train: str = "train.tsv"
    dev: tuple[tuple[str, str], ...] = (("dev", "dev.tsv"),)  # (split, file); the first is the paper's
    test: tuple[tuple[str, str], ...] = ()  # (name in the submission, file)

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
EIGHT = tuple(name for name in TASKS if name != "wnli")  # the paper's; it leaves WNLI to the majority class


def resolve(names):
    """'rte,SST-2' or 'all' to a list of Tasks. Case and hyphens do not matter; unknown or repeated names raise."""
    known = {alias.lower().replace("-", ""): task for task in TASKS.values() for alias in (task.name, task.folder)}
    wanted = [name.strip() for name in names.split(",")]
    if [name.lower() for name in wanted] == ["all"]:
        return [TASKS[name] for name in EIGHT]
    tasks = []
    for name in wanted:
        task = known.get(name.lower().replace("-", ""))
        if task is None:
            raise DataError(f"--task: unknown task {name!r}; known: all, {', '.join(TASKS)}")
        if task in tasks:
            raise DataError(f"--task: {task.name} is named twice")
        tasks.append(task)
    return tasks


# ------------------------------------------------------------------------------------------------------------- reading


def read_tsv(path, header=()):
    """A TSV file to (column names, rows), each row with its line number: (line, [field, ...]).

    No quoting: in GLUE a double quote is a character. A byte-order mark and CR LF are taken off, nothing else is: edge
    fields may be empty. A line without exactly one field a column raises, and so do blank lines and invalid UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a file of GLUE") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8") from error
    lines = text.split("\n")  # not splitlines(), which also breaks at characters that stand inside sentences
    if lines[-1] == "":
        lines.pop()
    if not header and not lines:
        raise DataError(f"{path}: is empty; expected a header line")
    columns = header or tuple(lines.pop(0).removesuffix("\r").split("\t"))
    rows = []
    for number, line in enumerate(lines, start=1 if header else 2):
        fields = line.removesuffix("\r").split("\t")
        if len(fields) != len(columns):
            expected = f"expected {len(columns)}: {', '.join(columns)}"
            raise DataError(f"{path}, line {number}: {len(fields)} tab-separated fields; {expected}")
        rows.append((number, fields))
    return columns, rows


@dataclass(frozen=True)
class Split:
    """Examples as GLUE writes them; second is None for single-sentence tasks, labels (N, K) is None in a test split."""

    first: list[str]
    second: list[str] | None
    labels: np.ndarray | None
    lines: list[int]  # line numbers in the file


def read_split(task, split, root):
    """One split of a task under GLUE's folder `root` to a Split. Raises DataError, file and line named."""
    path = Path(root) / task.folder / task.files[split]
    labelled = split not in dict(task.test)
    columns, rows = read_tsv(path, task.header if labelled else ())
    wanted = (*task.text, task.label) if labelled else task.text
    for name in wanted:
        if name not in columns:
            raise DataError(f"{path}, line 1: no column {name!r}; found {', '.join(columns)}")
    if not rows:
        raise DataError(f"{path}: has no rows; expected examples of {task.folder}")
    places = [columns.index(name) for name in wanted]
    texts = [[fields[place] for _, fields in rows] for place in places[: len(task.text)]]
    labels = None
    if labelled:
        labels = np.array([read_label(task, fields[places[-1]], path, line) for line, fields in rows], np.float32)
    return Split(texts[0], texts[1] if len(texts) == 2 else None, labels, [line for line, _ in rows])


def read_label(task, word, path, line):
    """The K targets of one example: one-hot, or score / max_score. Raises DataError, file and line named."""
    if task.labels:
        if word not in task.labels:
            raise DataError(f"{path}, line {line}: unknown label {word!r}; expected {' or '.join(task.labels)}")
        return [float(word == label) for label in task.labels]
    try:
        score = float(word)
    except ValueError:
        score = float("nan")
    if not 0 <= score <= task.max_score:
        raise DataError(f"{path}, line {line}: score {word!r}; expected a number from 0 to {task.max_score:g}")
    return [score / task.max_score]


# ---------------------------------------------------------------------------------------------------------- tokenizing


class Tokenizer:
    """BERT's WordPiece over a vocab.txt, as the original's FullTokenizer splits (bam/bert/tokenization.py).

    Built from vocab.txt alone: a tokenizer.json may bring truncation, padding, a shorter longest word, and special
    tokens that a sentence could spell. Cased or not is read off the vocabulary: capitals occur outside [brackets].
    """

    def __init__(self, vocab_file):
        vocab = read_vocab(Path(vocab_file))
        self.size = len(vocab)
        self.cls_id, self.sep_id = vocab["[CLS]"], vocab["[SEP]"]
        self.lowercase = not any(token != token.lower() for token in vocab if not token.startswith("["))
        # 200: the original's longest word.
        wordpiece = models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=200)
        self.backend = tokenizers.Tokenizer(wordpiece)
        self.backend.normalizer = normalizers.BertNormalizer(lowercase=self.lowercase)
        self.backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    def __call__(self, texts):
        """Sentences to lists of token ids, without special tokens."""
        if self.lowercase:  # here, since Python knows the Greek final sigma, as the original does, and Rust does not
            texts = [text.lower() for text in texts]
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]


def read_vocab(path):
    """vocab.txt, a token a line, to {token: id}. Raises DataError on duplicates or a missing special token."""
    try:
        tokens = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a vocabulary, a token a line") from error
    if tokens[-1] == "":
        tokens.pop()
    vocab = {}
    for number, token in enumerate(tokens):
        token = token.removesuffix("\r")
        if token in vocab:
            raise DataError(f"{path}, line {number + 1}: {token!r} stands on line {vocab[token] + 1} already")
        vocab[token] = number
    for token in ("[UNK]", "[CLS]", "[SEP]"):
        if token not in vocab:
            raise DataError(f"{path}: no {token} among {len(vocab)} tokens; expected BERT's vocabulary")
    return vocab


def truncated_lengths(len_a, len_b, limit):
    """How much of a pair stays if tokens are popped off the longer side, off b on a tie, until `limit` are left."""
    half_b = limit // 2  # where both are long, the odd token is a's
    return min(len_a, max(limit - half_b, limit - len_b)), min(len_b, max(half_b, limit - len_a))


@dataclass(frozen=True)
class Dataset:
    """Tokenized examples, end to end:

    [CLS] a [SEP] b [SEP] [CLS] a [SEP] [CLS] ...      input_ids (T,) int32
    0                     7             11             offsets (N + 1,) int64
    segment 1 starts at 3 in the first, at 4 (its length: nowhere) in the second: segment_starts (N,) int32
    """

    tasks: tuple[Task, ...]
    input_ids: np.ndarray
    offsets: np.ndarray
    segment_starts: np.ndarray
    task_ids: np.ndarray  # (N,) int32, places in `tasks`
    labels: np.ndarray  # (N, K) float32, the outputs of all tasks side by side; zeros where there are none
    lines: np.ndarray  # (N,) int32, where an example stands in its file

    def __len__(self):
        return len(self.offsets) - 1


def load_dataset(task, split, root, tokenizer, max_length, limit=None):
    """Read and tokenize one split; at most `limit` rows, evenly spaced over the file (a head would be one source's).

    The training sets of symmetric tasks hold all pairs, then all pairs swapped, as the original's `double_unordered`.
    """
    examples = read_split(task, split, root)
    rows = range(len(examples.first))
    if limit and limit < len(rows):
        rows = np.linspace(0, len(rows) - 1, limit).astype(int)
    first = [examples.first[row] for row in rows]
    second = [examples.second[row] for row in rows] if examples.second else None
    labels = np.zeros((len(first), task.num_outputs), np.float32) if examples.labels is None else examples.labels[rows]
    lines = np.array(examples.lines, np.int32)[rows]
    if task.symmetric and split == "train":
        first, second = first + second, second + first
        labels, lines = np.tile(labels, (2, 1)), np.tile(lines, 2)
    input_ids, lengths, segment_starts = tokenize(first, second, tokenizer, max_length)
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    return Dataset((task,), input_ids, offsets, segment_starts, np.zeros(len(first), np.int32), labels, lines)


def tokenize(first, second, tokenizer, max_length, chunk=8192):
    """Sentences to one flat array of ids, each example's length, and where its segment 1 starts."""
    input_ids, lengths, segment_starts = array("i"), array("i"), array("i")
    for start in range(0, len(first), chunk):
        all_a = tokenizer(first[start : start + chunk])
        all_b = tokenizer(second[start : start + chunk]) if second else [[]] * len(all_a)
        for a, b in zip(all_a, all_b, strict=True):
            if b:
                len_a, len_b = truncated_lengths(len(a), len(b), max_length - 3)
                example = [tokenizer.cls_id, *a[:len_a], tokenizer.sep_id, *b[:len_b], tokenizer.sep_id]
            else:  # one sentence, or a second one of which no token is left
                len_a = min(len(a), max_length - 2)
                example = [tokenizer.cls_id, *a[:len_a], tokenizer.sep_id]
            input_ids.extend(example)
            lengths.append(len(example))
            segment_starts.append(len_a + 2)
    return tuple(np.array(values, np.int32) for values in (input_ids, lengths, segment_starts))


# -------------------------------------------------------------------------------------------------------------- mixing


def mix(datasets):
    """Several tasks' examples as one Dataset, in the order given. Each task's labels keep to columns of their own."""
    if len(datasets) == 1:
        return datasets[0]
    starts = np.cumsum([0] + [len(dataset.input_ids) for dataset in datasets[:-1]])
    offsets = [dataset.offsets[1:] + start for dataset, start in zip(datasets, starts, strict=True)]
    return Dataset(
        tasks=tuple(task for dataset in datasets for task in dataset.tasks),
        input_ids=np.concatenate([dataset.input_ids for dataset in datasets]),
        offsets=np.concatenate([[0], *offsets]),
        segment_starts=np.concatenate([dataset.segment_starts for dataset in datasets]),
        task_ids=np.repeat(np.arange(len(datasets), dtype=np.int32), [len(dataset) for dataset in datasets]),
        labels=side_by_side([dataset.labels for dataset in datasets]),
        lines=np.concatenate([dataset.lines for dataset in datasets]),
    )


def side_by_side(blocks):
    """[(N1, K1), (N2, K2), ...] to (N1 + N2 + ..., K1 + K2 + ...): the blocks on the diagonal, zeros elsewhere."""
    corners = np.cumsum([(0, 0)] + [block.shape for block in blocks], axis=0)
    out = np.zeros(corners[-1], np.float32)
    for block, (row, column) in zip(blocks, corners[:-1], strict=True):
        out[row : row + block.shape[0], column : column + block.shape[1]] = block
    return out


def sample_schedule(sizes, num_steps, batch_size, exponent, seed):
    """The examples of a whole run, (num_steps, batch_size, 2) int32 of (task, row), from one seed.

    Each example's task is drawn with p ∝ size^exponent; the paper's 0.75 keeps the large tasks from drowning the small.
    Its row is the next of the task's current pass, and each pass is a fresh permutation.
    """
    rng = np.random.default_rng(seed)
    weights = np.asarray(sizes, np.float64) ** exponent
    tasks = rng.choice(len(sizes), size=num_steps * batch_size, p=weights / weights.sum())
    schedule = np.stack([tasks, tasks], axis=1).astype(np.int32)
    for task, size in enumerate(sizes):
        places = np.flatnonzero(tasks == task)
        passes = [rng.permutation(size) for _ in range(-(-len(places) // size))]
        schedule[places, 1] = np.concatenate(passes)[: len(places)] if passes else 0
    return schedule.reshape(num_steps, batch_size, 2)


# ------------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """B sequences as one row of T tokens, longest first, no padding:

    [CLS] a a a [SEP] b b [SEP] [CLS] c c [SEP] [CLS] d [SEP]     input_ids    (T,) int64
      0   0 0 0   0   1 1   1     0   0 0   0     0   0   0       segment_ids  (T,) int64
      0   1 2 3   4   5 6   7     0   1 2   3     0   1   2       position_ids (T,) int64
      0                           8              12         15    cu_seqlens   (B + 1,) int32
    """

    input_ids: np.ndarray
    segment_ids: np.ndarray
    position_ids: np.ndarray
    cu_seqlens: np.ndarray
    rows: np.ndarray  # (B,) which examples of the Dataset these are


def pack(dataset, rows):
    """The examples `rows` (B,) of a Dataset as a Batch."""
    lengths = dataset.offsets[rows + 1] - dataset.offsets[rows]
    order = np.argsort(-lengths, kind="stable")
    rows, lengths = rows[order], lengths[order]
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
    position_ids = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
    input_ids = dataset.input_ids[np.repeat(dataset.offsets[rows], lengths) + position_ids].astype(np.int64)
    segment_ids = (position_ids >= np.repeat(dataset.segment_starts[rows], lengths)).astype(np.int64)
    return Batch(input_ids, segment_ids, position_ids, cu_seqlens.astype(np.int32), rows)


# ------------------------------------------------------------------------------------------------------------- metrics


def accuracy(true, predicted):
    return np.mean(true == predicted)


def f1(true, predicted):
    """Of class 1; 0 where neither side has one (as scikit-learn's zero_division=0)."""
    positives = np.sum(true == 1) + np.sum(predicted == 1)
    return 2 * np.sum((true == 1) & (predicted == 1)) / positives if positives else 0.0


def matthews(true, predicted):
    """Matthews correlation of two classes; 0 where one side is constant (as scikit-learn)."""
    if np.ptp(true) == 0 or np.ptp(predicted) == 0:
        return 0.0
    return np.corrcoef(true, predicted)[0, 1]


def pearson(true, predicted):
    """NaN where one side is constant: there is no correlation to speak of (as SciPy)."""
    if np.ptp(true) == 0 or np.ptp(predicted) == 0:
        return float("nan")
    return np.corrcoef(true.astype(np.float64), predicted.astype(np.float64))[0, 1]


def ranks(values):
    """Ranks from 1; equal values share the mean of their places."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(true, predicted):
    return pearson(ranks(true), ranks(predicted))


METRICS = {metric.__name__: metric for metric in (accuracy, f1, matthews, pearson, spearman)}


def score(task, logits, labels):
    """Outputs and labels, both (N, K), to {metric: percent}, the paper's metric first."""
    reduce = (lambda outputs: outputs[:, 0]) if task.is_regression else (lambda outputs: outputs.argmax(1))
    return {name: 100 * float(METRICS[name](reduce(labels), reduce(logits))) for name in task.metrics}


def mann_whitney_p(a, b):
    """Two-sided p of the Mann-Whitney U test, the paper's. Exact for small samples without ties, else the normal
    approximation with tie and continuity corrections: the same choice as scipy.stats.mannwhitneyu."""
    n, m = len(a), len(b)
    values = np.concatenate([a, b])
    u = ranks(values)[:n].sum() - n * (n + 1) / 2
    u = max(u, n * m - u)
    _, ties = np.unique(values, return_counts=True)
    if min(n, m) <= 8 and ties.max() == 1:
        counts = np.zeros((n + 1, n * m + 1))  # counts[i, s]: ways to pick i of the ranks so far with U statistic s
        counts[0, 0] = 1
        for rank in range(n + m):
            for i in range(min(n, rank + 1), 0, -1):
                shift = rank - (i - 1)  # how many values of b lie below, if this one is the i-th of a
                if shift <= m:
                    counts[i, shift:] += counts[i - 1, : n * m + 1 - shift]
        return float(min(1.0, 2 * counts[n, int(u) :].sum() / counts[n].sum()))
    variance = n * m / 12 * (n + m + 1 - (ties**3 - ties).sum() / ((n + m) * (n + m - 1)))
    return 1.0 if variance == 0 else min(1.0, 2 * NormalDist().cdf(-(u - n * m / 2 - 0.5) / variance**0.5))


# ---------------------------------------------------------------------------------------------------------- submission


def answers(task, logits):
    """Outputs (N, K) to the words of GLUE's files: label words, or scores with three decimals inside their range."""
    if task.is_regression:
        return [f"{value:.3f}" for value in np.clip(logits[:, 0] * task.max_score, 0, task.max_score)]
    return [task.labels[index] for index in logits.argmax(1)]


def predictions_tsv(words):
    """The leaderboard's file format."""
    return "index\tprediction\n" + "".join(f"{index}\t{word}\n" for index, word in enumerate(words))


def write_submission(path, predictions):
    """A zip that gluebenchmark.com accepts, of {name in it: answers}; the same bytes for the same answers."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, words in predictions.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.tsv"), predictions_tsv(words), zipfile.ZIP_DEFLATED)
    path.write_bytes(buffer.getvalue())
