"""GLUE: its tasks, files, tokens, batches, metrics and submission format. NumPy and `tokenizers`; no torch.

    tasks        what GLUE is, a row a task                          TASKS, resolve
    reading      TSV files to sentences and labels                   read_split
    tokenizing   sentences to token ids                              Tokenizer, load_dataset
    mixing       several tasks to one stream of examples             mix, sample_schedule
    batches      examples to one row of tokens                       pack
    metrics      outputs to the figures of the paper's table         score, mann_whitney_p
    submission   outputs to what gluebenchmark.com accepts           answers, submission_zip
    demo         a small GLUE of generated English                   write_demo

Dimension letters: N examples, T tokens, B sequences of a batch, K outputs (labels, or one for a score) of a task or of
several tasks side by side.
"""

import io
import itertools
import json
import random
import shutil
import zipfile
from array import array
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors


class DataError(ValueError):
    """Bad input. The message names the file, the line where there is one, and what was expected."""


# --------------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """What GLUE says of one task; a new task is a new row of TASKS (see the README).

    Label order is the original's (bam/task_specific/classification/classification_tasks.py), metrics[0] the paper's.
    """

    name: str  # Hugging Face's name of the `glue` configuration
    folder: str  # the official folder, and the name in the paper's table; --task takes either
    text: tuple[str, ...]  # column names of the one or two sentences
    label: str = "label"  # column name of the label
    labels: tuple[str, ...] = ()  # label words; none: a score
    scores: tuple[float, float] = (0.0, 5.0)  # the range of scores
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
EIGHT = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")  # the paper's: WNLI gets its majority class


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


LONGEST_LINE = 2**20  # bytes; GLUE's have a few thousand


def read_tsv(path, header=(), expected="a file of GLUE"):
    """A TSV file to its rows with their line numbers, (line, [field, ...]), one at a time; first the column names,
    which are `header` where the file does not have them."""
    try:
        return parse_tsv(path.read_bytes(), path, header)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from error


def parse_tsv(data, path, header=()):
    """read_tsv of bytes; path is for messages.

    No quoting: in GLUE a double quote is a character. A byte-order mark and CR LF are taken off, nothing else is: edge
    fields may be empty. A line without exactly one field a column raises, and so do blank lines, invalid UTF-8, columns
    of one name, and lines that cannot be a row.
    """
    columns = header
    if header:
        yield 0, header
    for number, line in enumerate(io.BytesIO(data), start=1):  # it breaks at line feeds and nowhere else
        place = f"{path}, line {number}"
        if len(line) > LONGEST_LINE:
            raise DataError(f"{place}: {len(line)} bytes; expected at most {LONGEST_LINE}")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{place}: byte 0x{error.object[error.start]:02x} is not UTF-8") from error
        fields = text.removesuffix("\n").removesuffix("\r").split("\t")
        columns = columns or fields
        if len(fields) != len(columns):
            expected = f"expected {len(columns)}: {brief(', '.join(columns))}"
            raise DataError(f"{place}: {len(fields)} tab-separated fields; {expected}")
        if fields is columns and len(set(columns)) < len(columns):
            raise DataError(f"{place}: two columns of one name: {brief(', '.join(columns))}")
        yield number, fields
    if not columns:
        raise DataError(f"{path}: is empty; expected a header line")


def brief(text):
    """A file's text in a message: its beginning, control characters spelled out."""
    return repr(text[:200])


def read_sentences(task, data, path):
    """Somebody's own text, bytes: a row a line, the task's sentences with a tab between; or a file with a header, as
    GLUE's, whose columns are taken by name. Returns (first, second or None)."""
    rows = parse_tsv(data, path, () if set(task.text) <= set(header_of(data)) else task.text)
    (_, columns), texts = next(rows), [[] for _ in task.text]
    for _, fields in rows:
        for name, text in zip(task.text, texts, strict=True):
            text.append(fields[columns.index(name)])
    if not texts[0]:
        raise DataError(f"{path}: has no rows; expected {' and '.join(task.text)}, a row a line")
    return texts[0], texts[1] if len(texts) == 2 else None


def header_of(data):
    line = io.BytesIO(data).readline(LONGEST_LINE)
    return line.decode("utf-8-sig", "replace").removesuffix("\n").removesuffix("\r").split("\t")


@dataclass(frozen=True)
class Split:
    """Examples as GLUE writes them; second is None for single-sentence tasks, labels (N, K) is None in a test split."""

    first: list[str]
    second: list[str] | None
    labels: np.ndarray | None
    lines: np.ndarray  # (N,) int32, from 1


def read_split(task, split, root):
    """One split of a task under GLUE's folder `root` to a Split. Raises DataError, file and line named."""
    path = Path(root) / task.folder / task.files[split]
    labelled = split not in dict(task.test)
    rows = read_tsv(path, task.header if labelled else ())
    columns = next(rows)[1]
    wanted = (*task.text, task.label) if labelled else task.text
    for name in wanted:
        if name not in columns:
            raise DataError(f"{path}, line 1: no column {name!r}; found {brief(', '.join(columns))}")
    places, texts, labels = [columns.index(name) for name in wanted], [[] for _ in task.text], array("f")
    lines = array("i")
    for line, fields in rows:
        lines.append(line)
        for text, place in zip(texts, places, strict=False):  # the label's comes last
            text.append(fields[place])
        if labelled:
            labels.extend(read_label(task, fields[places[-1]], path, line))
    if not texts[0]:
        raise DataError(f"{path}: has no rows; expected examples of {task.folder}")
    labels = np.array(labels).reshape(-1, task.num_outputs) if labelled else None
    return Split(texts[0], texts[1] if len(texts) == 2 else None, labels, np.array(lines, np.int32))


def read_label(task, word, path, line):
    """The K targets of one example: one-hot, or the score's place in its range. Raises DataError, file and line named."""
    if task.labels:
        if word not in task.labels:
            raise DataError(f"{path}, line {line}: unknown label {brief(word)}; expected {' or '.join(task.labels)}")
        return [float(word == label) for label in task.labels]
    try:
        score = float(word.replace("_", "?"))  # to Python, 0_5 would be 5
    except ValueError:
        score = float("nan")
    low, high = task.scores
    if not low <= score <= high:
        raise DataError(f"{path}, line {line}: score {brief(word)}; expected a number from {low:g} to {high:g}")
    return [(score - low) / (high - low)]


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
        self.known = {}  # {what stands between two spaces: its ids}

    def __call__(self, texts, chunk=8192):
        """Sentences to lists of token ids, without special tokens; a chunk at a time, since words take memory."""
        chunks = [texts[start : start + chunk] for start in range(0, len(texts), chunk)]
        return [ids for part in chunks for ids in self.encode(part)]

    def encode(self, texts):
        """A space always ends a token, so what stands between two is tokenized once, however often it occurs."""
        if self.lowercase:  # here, since Python knows the Greek final sigma, as the original does, and Rust does not
            texts = [text.lower() for text in texts]
        sentences, known = [text.split(" ") for text in texts], self.known
        new = list(set(itertools.chain.from_iterable(sentences)) - known.keys())
        encodings = self.backend.encode_batch_fast(new, add_special_tokens=False)
        known.update((word, encoding.ids) for word, encoding in zip(new, encodings, strict=True))
        return [list(itertools.chain.from_iterable([known[word] for word in words])) for words in sentences]


def save_tokenizer(vocab_file, folder, max_length):
    """Write vocab.txt and the files from which Hugging Face's AutoTokenizer makes this tokenizer."""
    tokenizer = Tokenizer(vocab_file)
    tokens = {
        name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    }
    vocab = tokenizer.backend.get_vocab()
    tokenizer.backend.add_special_tokens([token for token in tokens.values() if token in vocab])
    single = "[CLS]:0 $A:0 [SEP]:0"
    special = [(token, vocab[token]) for token in ("[CLS]", "[SEP]")]
    pair = single + " $B:1 [SEP]:1"
    tokenizer.backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs}
    settings |= {"model_max_length": max_length, **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    shutil.copyfile(vocab_file, folder / "vocab.txt")


def read_vocab(path):
    """vocab.txt, a token a line, to {token: id}. Raises DataError on duplicates or a missing special token."""
    vocab, rows = {}, read_tsv(path, ("token",), "a vocabulary, a token a line")
    next(rows)  # the column's name
    for line, (token,) in rows:
        if token in vocab:
            raise DataError(f"{path}, line {line}: {brief(token)} stands on line {vocab[token] + 1} already")
        vocab[token] = line - 1
    for token in ("[UNK]", "[CLS]", "[SEP]"):
        if token not in vocab:
            raise DataError(f"{path}: no {token} among {len(vocab)} tokens; expected BERT's vocabulary")
    return vocab


def truncated_lengths(len_a, len_b, limit):
    """How much of a pair stays if tokens are popped off the longer side, off b on a tie, until `limit` are left."""
    half_b = limit // 2  # where both are long, the odd token is a's
    kept_a = np.minimum(len_a, np.maximum(limit - half_b, limit - len_b))
    return kept_a, np.minimum(len_b, np.maximum(half_b, limit - len_a))


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
    task_ids: np.ndarray  # (N,) int32, places in `tasks`
    labels: np.ndarray  # (N, K) float32, the outputs of all tasks side by side; zeros where there are none
    lines: np.ndarray  # (N,) int32, where they stand in their files

    def __len__(self):
        return len(self.offsets) - 1


def load_dataset(task, split, root, tokenizer, max_length, limit=None):
    """Read and tokenize one split; at most `limit` rows, evenly spaced: a file's first may be of one source.

    The training sets of symmetric tasks hold all pairs, then all pairs swapped, as the original's `double_unordered`.
    """
    examples = read_split(task, split, root)
    rows = range(len(examples.first))
    if limit and limit < len(rows):
        rows = np.linspace(0, len(rows) - 1, limit).astype(int)
    first = [examples.first[row] for row in rows]
    second = [examples.second[row] for row in rows] if examples.second else None
    labels = np.zeros((len(first), task.num_outputs), np.float32) if examples.labels is None else examples.labels[rows]
    lines = examples.lines[rows]
    if task.symmetric and split == "train":
        first, second = first + second, second + first
        labels, lines = np.tile(labels, (2, 1)), np.tile(lines, 2)
    return make_dataset(task, first, second, labels, lines, tokenizer, max_length)


def make_dataset(task, first, second, labels, lines, tokenizer, max_length):
    """Sentences (second may be None), labels (N, K) and line numbers (N,) to a Dataset of one task."""
    input_ids, lengths, segment_starts = tokenize(first, second, tokenizer, max_length)
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    return Dataset((task,), input_ids, offsets, segment_starts, np.zeros(len(first), np.int32), labels, lines)


def where(dataset, rows):
    """The files and lines of training examples, for a message."""
    words = []
    for place, task in enumerate(dataset.tasks):
        lines = sorted(set(dataset.lines[rows[dataset.task_ids[rows] == place]].tolist()))
        if lines:
            words.append(f"{task.folder}/{task.train}, line {', '.join(map(str, lines))}")
    return "; ".join(words)


def tokenize(first, second, tokenizer, max_length):
    """Sentences to one flat array of ids, each example's length, and where its segment 1 starts."""
    ids_a, all_a = flatten(tokenizer(first))
    ids_b, all_b = flatten(tokenizer(second) if second else [[]] * len(first))
    pair = all_b > 0  # else one sentence, or a second one of which no token is left
    len_a, len_b = truncated_lengths(all_a, all_b, max_length - 2 - pair)
    lengths = len_a + len_b + 2 + pair
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    input_ids = np.full(ends[-1], tokenizer.sep_id, np.int32)
    input_ids[starts] = tokenizer.cls_id
    for ids, whole, kept, start in ((ids_a, all_a, len_a, starts + 1), (ids_b, all_b, len_b, starts + 2 + len_a)):
        inside = np.arange(kept.sum()) - np.repeat(np.cumsum(kept) - kept, kept)  # 0 1 2, 0 1, ...
        input_ids[np.repeat(start, kept) + inside] = ids[np.repeat(np.cumsum(whole) - whole, kept) + inside]
    return input_ids, lengths.astype(np.int32), (len_a + 2).astype(np.int32)


def flatten(lists):
    """Lists of ids to one array, and each one's length."""
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    return np.fromiter(itertools.chain.from_iterable(lists), np.int32, lengths.sum()), lengths


# -------------------------------------------------------------------------------------------------------------- mixing


def mix(datasets):
    """Several tasks' examples as one Dataset, in the order given. Each task's labels keep to columns of their own."""
    if len(datasets) == 1:
        return datasets[0]
    lengths = np.concatenate([np.diff(dataset.offsets) for dataset in datasets])
    return Dataset(
        tasks=tuple(task for dataset in datasets for task in dataset.tasks),
        input_ids=np.concatenate([dataset.input_ids for dataset in datasets]),
        offsets=np.concatenate(([0], np.cumsum(lengths))),
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

    sizes: each task's training examples, doubled pairs counted twice. An example's task is drawn with p ∝
    size^exponent; the paper's 0.75 keeps the large tasks from drowning the small. Its row is the next of the task's
    current pass, and each pass is a fresh permutation.
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


def parts(dataset, rows, num_tokens):
    """The examples `rows` (B,) longest first, cut into as many parts as hold about num_tokens tokens each."""
    lengths = dataset.offsets[rows + 1] - dataset.offsets[rows]
    order = np.argsort(-lengths, kind="stable")
    if not len(rows):  # a process's share of a batch smaller than the number of processes
        return []
    ends = np.cumsum(lengths[order])
    count = -(-ends[-1] // num_tokens)
    return np.split(rows[order], np.flatnonzero(np.diff((ends - 1) * count // ends[-1])) + 1)


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
    true, predicted = (outputs[:, 0] if task.is_regression else outputs.argmax(1) for outputs in (labels, logits))
    return {name: 100 * float(METRICS[name](true, predicted)) for name in task.metrics}


def mann_whitney_p(a, b):
    """Two-sided p of the Mann-Whitney U test, the paper's. Exact for small samples without ties, else the normal
    approximation with tie and continuity corrections: the same choice as scipy.stats.mannwhitneyu."""
    n, m = len(a), len(b)
    values = np.concatenate([a, b])
    if np.isnan(values).any():
        return float("nan")
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
        low, high = task.scores
        return [f"{value:.3f}" for value in np.clip(low + logits[:, 0] * (high - low), low, high)]
    return [task.labels[index] for index in logits.argmax(1)]


def predictions_tsv(words):
    """The leaderboard's file format."""
    return "index\tprediction\n" + "".join(f"{index}\t{word}\n" for index, word in enumerate(words))


def submission_zip(predictions):
    """The bytes of a zip that gluebenchmark.com accepts, of {name in it: answers}; the same for the same answers."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, words in predictions.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.tsv"), predictions_tsv(words), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------- demo

# A sentence is a meaning, {slot: concept}, said in one of several ways. A concept is its synonyms, the second one rare;
# neighbours among the tastes are opposites. All eight tasks are drawn from the same meanings, so that what one task
# teaches (that a cook is a chef) serves the others, as in GLUE.
WORDS = {
    "person": "cook/chef kid/youngster robber/burglar sailor/mariner author/writer lawyer/attorney",
    "verb": "mend/repair want/demand select/pick lift/hoist film/record inspect/review",
    "taste": "superb/great awful/terrible lovely/charming ugly/hideous",
    "thing": "car/auto boat/ship couch/sofa bench/seat coat/jacket hat/cap",
    "place": " ".join(
        start + end for start in ("nor", "wes", "green", "red", "oak") for end in ("ton", "field", "wood")
    ),
}
CONCEPTS = {slot: [concept.split("/") for concept in words.split()] for slot, words in WORDS.items()}
KINDS = ("vehicle", "vehicle", "furniture", "furniture", "garment", "garment")  # of the things above, in their order
KNOWN_PLACES, OTHER_PLACES = range(12), range(12, 15)  # the others stand in the mismatched sets alone
ASKED = {"who": "person", "what": "thing", "where": "place"}
DEMO_ROWS = {"cola": 1500, "sst2": 2000, "mrpc": 800, "stsb": 800, "qqp": 4000, "mnli": 5000, "qnli": 3000, "rte": 300}
DEMO_DEV_ROWS, DEMO_TEST_ROWS, DEMO_NOISE = 400, 100, 0.05  # noise: wrong labels, so that nothing scores 100


def meaning(rng, places, negated=0.0):
    """A random clause: who will do what to which thing, and perhaps where."""
    clause = {slot: rng.randrange(len(concepts)) for slot, concepts in CONCEPTS.items()}
    clause["place"] = rng.choice(places)
    clause |= {slot: None for slot in ("taste", "place") if rng.random() < 0.5}
    return clause | {"not": rng.random() < negated, "vague": False}


def word(clause, rng, slot):
    synonyms = CONCEPTS[slot][clause[slot]]
    return rng.choices(synonyms, (6, 1)[: len(synonyms)])[0]


def say(clause, rng, asked=None):
    """A clause in words, active or passive; or the question for its 'who', 'what' or 'where'."""
    thing = ["the", word(clause, rng, "thing")]
    if clause["vague"]:
        thing[1] = KINDS[clause["thing"]]
    if clause["taste"] is not None:
        thing.insert(1, word(clause, rng, "taste"))
    person, verb = ["the", word(clause, rng, "person")], word(clause, rng, "verb")
    will = ["will", "not"] if clause["not"] else ["will"]
    place = [] if clause["place"] is None or asked == "where" else ["in", word(clause, rng, "place")]
    if asked:
        words = [asked, *will, *(person if asked != "who" else []), verb, *(thing if asked != "what" else [])]
    elif rng.random() < 0.2:
        words = [*thing, *will, "be", verb + "ed", "by", *person]
    else:
        words = [*person, *will, verb, *thing]
    return " ".join([*words, *place, "?" if asked else "."])


def change(clause, rng, places, among=tuple(CONCEPTS), count=None):
    """The same but for one to three, or `count`, of the slots that are filled: each gets another concept."""
    clause, filled = dict(clause), [slot for slot in among if clause[slot] is not None]
    for slot in rng.sample(filled, min(rng.randint(1, 3) if count is None else count, len(filled))):
        others = places if slot == "place" else range(len(CONCEPTS[slot]))
        clause[slot] = rng.choice([concept for concept in others if concept != clause[slot]])
    return clause


def demo_cola(rng, places):
    """A sentence, or one with two neighbouring words exchanged."""
    words, good = say(meaning(rng, places), rng).split(), rng.random() < 0.6
    place = rng.randrange(1, len(words) - 2)
    if not good:
        words[place], words[place + 1] = words[place + 1], words[place]
    return str(int(good)), " ".join(words)


def demo_sst2(rng, places):
    """One or two judgements; the last one counts, and 'not' turns it round."""
    clauses = []
    for _ in range(rng.choice((1, 1, 2))):
        clause = meaning(rng, places, negated=0.3) | {"taste": rng.randrange(4)}
        negation = ["not"] * clause["not"]
        clauses.append(" ".join(["the", word(clause, rng, "thing"), "is", *negation, word(clause, rng, "taste")]))
    return str(int((clause["taste"] % 2 == 0) != clause["not"])), " but ".join(clauses) + " ."


def demo_paraphrase(rng, places):
    """MRPC: the same said otherwise, or with one to three slots changed."""
    clause, same = meaning(rng, places), rng.random() < 0.6
    other = clause if same else change(clause, rng, places)
    return str(int(same)), say(clause, rng), say(other, rng)


def demo_qqp(rng, places):
    """The same of questions."""
    clause, same, asked = meaning(rng, places), rng.random() < 0.4, rng.choice(list(ASKED))
    slots = [slot for slot in CONCEPTS if slot != ASKED[asked]]
    other = clause if same else change(clause, rng, places, slots)
    return str(int(same)), say(clause, rng, asked), say(other, rng, asked)


def demo_stsb(rng, places):
    """Five points, less a share for each slot that differs, as several people's judgements would scatter."""
    clause, changed = meaning(rng, places), rng.randrange(4)
    filled = sum(clause[slot] is not None for slot in CONCEPTS)
    score = 5 * (1 - changed / filled) + rng.gauss(0, 0.3)
    return f"{min(max(score, 0), 5):.3f}", say(clause, rng), say(change(clause, rng, places, count=changed), rng)


def demo_mnli(rng, places):
    """Entailed: something left out or vaguer; contradicted: negated; neutral: something else."""
    clause, label = meaning(rng, places, negated=0.1), rng.choice(TASKS["mnli"].labels)
    other = dict(clause)
    if label == "entailment":
        other |= {slot: None for slot in ("taste", "place") if rng.random() < 0.3}
        other["vague"] = rng.random() < 0.2
    elif label == "contradiction":
        other["not"] = not clause["not"]
    else:
        other = change(clause, rng, places, ("person", "verb", "thing", "place"))
    return label, say(clause, rng), say(other, rng)


def demo_rte(rng, places):
    """MNLI's, contradictions and neutral pairs as one class; with so few rows that MNLI's have to help."""
    label, first, second = demo_mnli(rng, places)
    return ENTAILMENT[label != "entailment"], first, second


def demo_qnli(rng, places):
    """A question, and a sentence that answers it or speaks of something else."""
    clause, good, asked = meaning(rng, places), rng.random() < 0.5, rng.choice(list(ASKED))
    clause["place"] = rng.choice(places)
    slots = [slot for slot in ("person", "verb", "thing") if slot != ASKED[asked]]
    other = clause if good else change(clause, rng, places, slots)
    return ENTAILMENT[not good], say(clause, rng, asked), say(other, rng)


MAKERS = {"cola": demo_cola, "sst2": demo_sst2, "mrpc": demo_paraphrase, "stsb": demo_stsb, "qqp": demo_qqp,
          "mnli": demo_mnli, "qnli": demo_qnli, "rte": demo_rte}  # fmt: skip


def demo_file(rng, task, split):
    """The text of one file, in the official layout but for columns that nobody reads."""
    test = split in dict(task.test)
    size = DEMO_ROWS[task.name] if split == "train" else DEMO_TEST_ROWS if test else DEMO_DEV_ROWS
    places = OTHER_PLACES if split in ("dev_mismatched", "MNLI-mm") else KNOWN_PLACES
    columns = ("index", *task.text) if test else task.header or ("index", *task.text, task.label)
    lines = [] if task.header and not test else ["\t".join(columns)]
    for index in range(size):
        label, *sentences = MAKERS[task.name](rng, places)
        if task.labels and rng.random() < DEMO_NOISE:
            label = rng.choice([other for other in task.labels if other != label])
        fields = {"index": str(index), task.label: label, **dict(zip(task.text, sentences, strict=True))}
        lines.append("\t".join(fields.get(column, "") for column in columns))
    return "\n".join(lines) + "\n"


def write_demo(root, vocab_file, seed=0):
    """Write a small GLUE of generated English under `root`, and its vocabulary; returns the vocabulary's size."""
    rng, beside = random.Random(seed), root.with_name(root.name + ".part")
    for leftover in (beside, root):
        shutil.rmtree(leftover, ignore_errors=True)
    for task in [TASKS[name] for name in EIGHT]:
        for split, file in task.files.items():
            path = (beside / task.folder / file).resolve()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(demo_file(rng, task, split), "utf-8")
    (beside / "WNLI").mkdir(exist_ok=True)
    (beside / "WNLI" / "test.tsv").write_text("index\tsentence1\tsentence2\n0\tThe cook is old.\tIt is old.\n", "utf-8")
    beside.replace(root)  # whole or not at all
    return write_demo_vocab(root, vocab_file)


def write_demo_vocab(root, vocab_file):
    """A WordPiece vocabulary of the demo's words and letters; places are made of two pieces, so that new ones can be
    read. Sorted by hand: `tokenizers`' trainer gives other ids each time."""
    text = " ".join(path.read_text("utf-8") for path in sorted(root.glob("*/train.tsv"))).lower()
    words = {piece for piece, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text) if piece.isalpha()}
    places = {place for (place,) in CONCEPTS["place"]}
    pieces = {"nor", "wes", "green", "red", "oak", "##ton", "##field", "##wood"}
    letters = {letter for letter in text if letter.isalpha()}
    known = sorted(words - places | pieces | letters | {"##" + letter for letter in letters} | {".", "?"})
    vocab_file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *known]) + "\n", "utf-8")
    return len(known) + 5
