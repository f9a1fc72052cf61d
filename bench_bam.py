"""How fast this program is, what memory it takes, and what each of its optimizations is worth: the code that bam.py
trains and predicts with, beside Hugging Face transformers on the same rows with the same weights, in turns.

    python bench_bam.py                      # everything, on whatever machine this is
    python bench_bam.py --quick              # the mixed stream and evaluation alone; three minutes on two cores
    python bench_bam.py --scale              # also cost against batch, length, model size, rows and processes
    python bench_bam.py --precisions 5       # scores of five seeds in float32 and in bfloat16
    python bench_bam.py --limits             # what a GPU would have to do and to hold, computed without one
    python bench_bam.py --json speed.jsonl   # one object a line for each measurement

Peers: hf_default is run_glue's default, every row padded to 128, float32. hf_best is the best that transformers could
be set to: rows sorted by length, in micro-batches whose number is tuned, and in this run's precision. Both have dropout
on, scaled-dot-product attention and fused AdamW, which are transformers' defaults. A share of the matrix rate counts
the full model's operations over real tokens, whatever a variant adds by padding or leaves out.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bam
import glue_data
import model as bert
from glue_data import Dataset
from model import BertConfig, MultiTaskBert

# ---------------------------------------------------------------------------------------------------------------- rows

# Each task's training rows in the whole of GLUE, and their mean tokens in BERT's uncased vocabulary, at most 128.
GLUE = {"cola": (8551, 11.3), "sst2": (67349, 13.4), "mrpc": (3668, 53.2), "stsb": (5749, 27.8), "qqp": (363846, 30.3),
        "mnli": (392702, 40.0), "qnli": (104743, 49.3), "rte": (2490, 66.6)}  # fmt: skip
LIMIT = 4000  # rows of each task that are used; the mixture is that of all rows


def draw(task, count, mean, vocab_size, spread=4.0, longest=128):
    """A Dataset of random tokens with gamma-distributed lengths, whose standard deviation is mean / √spread."""
    rng, k = np.random.default_rng(count), task.num_outputs
    lengths = np.clip(rng.gamma(spread, mean / spread, count).round(), 5, longest).astype(np.int64)
    starts = (lengths // 2 + 1 if len(task.text) == 2 else lengths).astype(np.int32)
    labels = rng.random((count, 1)) if task.is_regression else np.eye(k)[rng.integers(k, size=count)]
    ids = rng.integers(vocab_size, size=lengths.sum()).astype(np.int32)
    rest = np.zeros(count, np.int32), labels.astype(np.float32), np.arange(count, dtype=np.int32)
    return Dataset((task,), ids, np.concatenate(([0], np.cumsum(lengths))), starts, *rest)


class Rows:
    """GLUE's rows where folder and vocabulary are there, else drawn ones."""

    def __init__(self, data, vocab, vocab_size):
        self.data, self.vocab, self.vocab_size = data, vocab, vocab_size
        found = [task for task in glue_data.resolve("all") if (data / task.folder / task.train).exists()]
        self.real = bool(found) and vocab.exists()
        self.tasks = found if self.real else glue_data.resolve("all")
        self.mixed = glue_data.mix([self.read(task, "train", LIMIT) for task in self.tasks])
        self.sizes = {task.name: self.size(task) * (1 + task.symmetric) for task in self.tasks}

    def read(self, task, split, limit):
        if not self.real:
            return draw(task, limit, GLUE[task.name][1], self.vocab_size)
        tokenizer = glue_data.Tokenizer(self.vocab)
        return glue_data.load_dataset(task, split, self.data, tokenizer, bam.SINGLE.max_length, limit)

    def size(self, task):
        path = self.data / task.folder / task.train
        return path.read_bytes().count(b"\n") - (not task.header) if self.real else GLUE[task.name][0]

    def batches(self, count, size, only=None):
        """(count, size) rows of `mixed`: of all tasks, drawn as training draws them by their whole sizes; or of one."""
        available, names = np.bincount(self.mixed.task_ids), list(self.sizes)
        chosen = [place for place, name in enumerate(names) if only in (None, name)]
        sizes = [self.sizes[names[place]] for place in chosen]
        schedule = glue_data.sample_schedule(sizes, count, size, bam.MULTI.exponent, seed=0)
        task, row = np.array(chosen)[schedule[..., 0]], schedule[..., 1]
        return (np.cumsum(available) - available)[task] + row % available[task]

    def texts(self, folder):
        """(GLUE's folder, vocabulary); generated ones in `folder` where rows are drawn, as those have no text."""
        if self.real:
            return self.data, self.vocab
        if not (folder / "vocab.txt").exists():
            glue_data.write_demo(folder / "glue", folder / "vocab.txt")
        return folder / "glue", folder / "vocab.txt"


# ------------------------------------------------------------------------------------------------------------ variants
# What one does is an item: a batch, the rows of an optimizer step; or a Dataset of one task, whose logits are wanted.

GOLD_WEIGHT = 0.5  # λ; with teachers' logits beside it, all of the loss is computed


class Ours:
    """This program, through the functions that bam.train and bam.evaluate are made of."""

    def __init__(self, run, model, targets):
        self.run, self.model, self.targets = run, model, targets

    @functools.cached_property
    def optimizer(self):  # predicting needs none
        return bam.Adam(self.model, bam.MULTI)

    def gradients(self, rows):
        self.model.train()
        return bam.add_gradients(self.model, self.run, self.targets, rows, GOLD_WEIGHT, seed=0)[0]

    def __call__(self, item):
        if isinstance(item, Dataset):
            return bam.predict(self.model, self.run, item, item.tasks[0])
        optimizer = self.optimizer  # before the gradients, which become its own
        loss = self.gradients(item[bam.RANK :: bam.WORLD])
        if bam.WORLD > 1:
            dist.all_reduce(optimizer.gradients)
        optimizer.step(1, 10)
        return loss


class HuggingFace:
    """transformers' encoder with `model`'s weights (random ones where those are on the meta device), and its heads."""

    def __init__(self, run, model, targets, best):
        import transformers

        shape, kind = asdict(model.config), model.config.model_type
        shape = transformers.AutoConfig.for_model(shape.pop("model_type"), **shape)
        self.encoder = transformers.AutoModel.from_config(shape, attn_implementation="sdpa")
        self.head = nn.Linear(*reversed(model.head.weight.shape))
        if not model.head.weight.is_meta:
            public = {name.removeprefix(f"{kind}."): tensor for name, tensor in bert.public_tensors(model).items()}
            self.encoder.load_state_dict({name: t for name, t in public.items() if not name.startswith("heads.")})
            self.head.load_state_dict(model.head.state_dict())
        self.modules = nn.ModuleList([self.encoder, self.head]).to(run.device)
        self.run, self.targets, self.best, self.columns = run, targets, best, model.columns
        self.called, self.count = self.encoder, 8  # hf_best's, which tune() sets: compiled or not, micro-batches
        self.optimizer = torch.optim.AdamW(self.modules.parameters(), lr=5e-5, fused=True)

    def logits(self, dataset, rows):
        """(B, K), each row padded to 128 tokens or, in hf_best, to the longest of `rows`."""
        starts, lengths = dataset.offsets[rows][:, None], np.diff(dataset.offsets)[rows][:, None]
        places = np.arange(lengths.max() if self.best else bam.SINGLE.max_length)
        real = places < lengths
        ids = np.where(real, dataset.input_ids[np.minimum(starts + places, len(dataset.input_ids) - 1)], 0)
        segments = real & (places >= dataset.segment_starts[rows][:, None])
        inputs = {"input_ids": ids, "attention_mask": real, "token_type_ids": segments}
        inputs = {name: self.run.to_device(array.astype(np.int64)) for name, array in inputs.items()}
        with self.run.autocast() if self.best else contextlib.nullcontext():
            out = self.called(**inputs)
        pooled = out.get("pooler_output", out.last_hidden_state[:, 0]).float()  # ELECTRA has no pooler
        return self.head(F.dropout(pooled, self.encoder.config.hidden_dropout_prob, self.encoder.training))

    def micro_batches(self, dataset, rows):
        if not self.best:
            return np.split(rows, range(32, len(rows), 32))
        order = np.argsort(-np.diff(dataset.offsets)[rows], kind="stable")
        return np.array_split(rows[order], min(self.count, len(rows)))

    def gradients(self, rows):
        self.modules.train()
        loss = torch.zeros((), device=self.run.device)
        for part in self.micro_batches(self.targets.dataset, rows):
            logits = self.logits(self.targets.dataset, part)
            part_loss = self.targets.loss(logits, self.run.to_device(part), GOLD_WEIGHT)
            part_loss.backward()
            loss += part_loss.detach()
        return loss

    def __call__(self, item):
        if isinstance(item, Dataset):
            return self.predict(item, item.tasks[0])
        loss = self.gradients(item)
        nn.utils.clip_grad_norm_(self.modules.parameters(), bam.MULTI.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    @torch.no_grad()
    def predict(self, dataset, task):
        """As bam.predict; hf_best's micro-batches are cut as ours, by length and to so many tokens."""
        self.modules.eval()
        rows = np.arange(len(dataset))
        sorted_parts = glue_data.parts(dataset, rows, self.run.tokens_at_once)
        logits = torch.zeros(len(dataset), task.num_outputs, device=self.run.device)
        for part in sorted_parts if self.best else self.micro_batches(dataset, rows):
            logits[self.run.to_device(part)] = self.logits(dataset, part)[:, self.columns[task.name]]
        return logits.cpu().numpy()

    def tune(self, rows, counts, with_compile):
        """Keep the fastest of these settings on these rows, and return it in words."""
        encoders, seconds = [self.encoder, torch.compile(self.encoder, dynamic=True)], {}
        for setting in itertools.product(encoders[: 1 + with_compile], counts):
            self.called, self.count = setting
            seconds[setting] = min(clock(self.run, self, rows) for _ in range(3))
        self.called, self.count = min(seconds, key=seconds.get)
        return f"hf_best in {self.count} micro-batches{', compiled' * (self.called is encoders[1])}, "


def variant_of(name, run, model, dataset):
    """The targets' teachers are random: what they say does not matter to speed."""
    teacher_logits = np.random.default_rng(0).normal(size=dataset.labels.shape).astype(np.float32)
    targets = bam.Targets(run, dataset, teacher_logits)
    return Ours(run, model, targets) if name == "ours" else HuggingFace(run, model, targets, name == "hf_best")


def peers():
    try:
        import transformers  # noqa: F401
    except ImportError:
        print("no transformers here, so ours alone is measured; to compare: pip install transformers==5.24.0")
        return []
    return ["hf_default", "hf_best"]


# ----------------------------------------------------------------------------------------------------------- measuring


def clock(run, function, *args):
    """Seconds, the device's work included."""
    wait = torch.accelerator.synchronize if run.device.type != "cpu" else lambda: None
    wait()
    start = time.perf_counter()
    function(*args)
    wait()
    return time.perf_counter() - start


def all_of(function, items):
    for item in items:
        function(item)


def matrix_rate(run, config):
    """Operations a second of one layer's products, forward and backward, alone: what a step can at most reach."""
    tokens, repeats = run.tokens_at_once, 1 if run.device.type == "cpu" else 10
    hidden, inner, seconds, count = config.hidden_size, config.intermediate_size, 0.0, 0
    kind = {"device": run.device, "dtype": torch.bfloat16 if run.bfloat16 else torch.float32}
    for out, width in ((3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner)):
        x, weight, grad = (torch.randn(shape, **kind) for shape in ((tokens, width), (out, width), (tokens, out)))
        pairs = [(x, weight.T), (grad, weight), (grad.T, x)]
        work = [functools.partial(torch.mm, a, b, out=a @ b) for a, b in pairs] * repeats
        seconds += min(clock(run, all_of, lambda product: product(), work) for _ in range(2))
        count += 2 * tokens * out * width * len(work)
    return count / seconds


def operations(model, lengths, passes):
    """Of the full model over real tokens: 2 a weight and token, and in attention 4 L H a token and layer; training is
    three passes, as backward is two. Embeddings, pooler and heads count for nothing."""
    names, config = ("layers.", "embeddings_project."), model.config
    weights = sum(p.numel() for name, p in model.named_parameters() if name.startswith(names) and p.ndim == 2)
    attention = 4 * config.num_hidden_layers * config.hidden_size * np.square(lengths, dtype=np.float64).sum()
    return passes * float(2 * weights * np.sum(lengths) + attention)


def device(args, config):
    """bam.Device; on a CPU --precision auto becomes bfloat16, for us and hf_best, where its products are faster."""
    run = bam.Device(args)
    if run.device.type == "cpu" and args.precision == "auto":
        run.bfloat16 = False
        rate, run.bfloat16 = matrix_rate(run, config), True
        run.bfloat16 = matrix_rate(run, config) > 1.2 * rate
    args.precision = "bfloat16" if run.bfloat16 else "float32"  # for other processes
    return run


def machine(run):
    if run.device.type == "cuda":
        return torch.cuda.get_device_name(run.device)
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(": ")[-1] for line in lines if line.startswith("model name")), "CPU")
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


# What a line of results holds, and how the table shows it; what a measurement does not have is null in the JSON.
COLUMNS = {"seconds": (10, "{:.3f} s"), "examples_per_s": (17, "{:.1f} ex/s"), "tokens_per_s": (14, "{:.0f} tok/s"),
           "share_of_peak": (15, "{:.1%} of peak"), "ratio": (12, "ours ×{:.2f}"),
           "ratio_spread": (14, "({0[0]:.2f}–{0[1]:.2f})"), "peak_bytes": (12, "{:.2e} B"),
           "note": (0, "  {}")}  # fmt: skip
ALSO = ("examples_per_s_spread", "matrix_flops", "rounds", "at", "host_bytes", "device_bytes", "before_bytes")


def summary(name, values):
    return {name: float(np.median(values)), f"{name}_spread": [float(np.min(values)), float(np.max(values))]}


class Bench:
    """What the measurements share: machine, rows, model, variants, and where results go."""

    def __init__(self, args, folder):
        self.args, self.folder, self.peaks = args, folder, {}
        self.json = open(args.json, "w", encoding="utf-8") if args.json else None
        self.on_cpu, self.checkpoint = bam.device_of(args.device).type == "cpu", bam.checkpoint_folder(args.checkpoint)
        self.trained = any((self.checkpoint / file).exists() for file in bert.WEIGHTS)
        shape = "MiniLM-L6" if self.on_cpu else "base"
        config = BertConfig.from_file(self.checkpoint / "config.json") if self.trained else config_of(shape)
        self.rows = Rows(Path(args.data), self.checkpoint / "vocab.txt", config.vocab_size)
        outputs = {task.name: task.num_outputs for task in self.rows.tasks}
        torch.manual_seed(0)
        model = bam.load_pretrained(self.checkpoint, outputs) if self.trained else MultiTaskBert(config, outputs)
        self.run, self.peers = device(args, config), peers()
        self.model = model.to(self.run.device)
        names = (*self.peers, "ours")
        self.variants = {name: variant_of(name, self.run, self.model, self.rows.mixed) for name in names}
        parameters = sum(p.numel() for p in model.parameters())
        self.constants = {"device": machine(self.run), "torch": torch.__version__, "precision": args.precision,
                          "threads": torch.get_num_threads(), "parameters": parameters}  # fmt: skip
        print(", ".join(f"{key} {value}" for key, value in self.constants.items()))
        print(f"model: {self.checkpoint if self.trained else f'no weights in {self.checkpoint}: random ones, {shape}'}")
        print(f"rows: {args.data if self.rows.real else 'no data, or no vocab.txt: drawn with the lengths of GLUE'}")
        print("of peak: of the matrix rate; ours ×: our speed over this one's, median over rounds (min–max)")

    def record(self, name, variant, **values):
        """A line of the table, and of the JSON."""
        given = {**dict.fromkeys((*COLUMNS, *ALSO)), **values}
        cells = [("" if given[key] is None else form.format(given[key])).rjust(n) for key, (n, form) in COLUMNS.items()]
        print(f"  {variant:28}{''.join(cells)}".rstrip(), flush=True)
        if self.json:
            print(json.dumps({"name": name, "variant": variant, **given, **self.constants}), file=self.json, flush=True)

    def compare(self, name, functions, items, about="", model=None, dataset=None, at=None):
        """Let the `functions` {variant: function of an item} do the same items in turns; record each, return ratios.
        A batch's rows are those of the dataset, by default all tasks'."""
        model, offsets = model or self.model, (dataset or self.rows.mixed).offsets
        passes, steps, rounds, began = 3, 1 if self.on_cpu else 10, [], time.perf_counter()
        if isinstance(items[0], Dataset):
            passes, offsets = 1, items[0].offsets
        warm = items[0][:32] if self.on_cpu and passes == 3 else items[0]
        for function in functions.values():
            function(warm)
        for index in range(self.args.rounds):
            chosen = [items[(index * steps + step) % len(items)] for step in range(steps)]
            lengths = np.concatenate([np.diff(offsets)[item if passes == 3 else slice(None)] for item in chosen])
            rate, seconds = matrix_rate(self.run, model.config), {}
            for variant in np.roll(list(functions), index):  # nobody always comes first
                seconds[variant] = clock(self.run, all_of, functions[variant], chosen)
            rounds.append((len(lengths), lengths.sum(), operations(model, lengths, passes), rate, seconds))
            if time.perf_counter() - began > self.args.seconds:
                break
        return self.report(name, functions, rounds, about, at)

    def report(self, name, functions, rounds, about, at=None):
        """rounds: of each its examples, tokens, operations and matrix rate, or None twice, and {variant: seconds}."""
        examples, tokens, done, rates, seconds = (np.array(column) for column in zip(*rounds, strict=True))
        rate, ratios = None if rates[0] is None else float(np.median(rates)), {}
        about += f"{tokens.sum() / examples.sum():.1f} tokens a row, {len(rounds)} rounds"
        print(f"\n{name}: {about}" + (f", matrix rate {rate / 1e9:.0f} GFLOP/s" if rate else ""))
        for variant in functions:
            spent, ours = (np.array([each[who] for each in seconds]) for who in (variant, "ours"))
            values = summary("examples_per_s", examples / spent) | summary("ratio", spent / ours)
            values |= {"tokens_per_s": float(np.median(tokens / spent)), "peak_bytes": self.peaks.get((name, variant))}
            values |= {"share_of_peak": rate and float(np.median(done / spent)) / rate, "matrix_flops": rate}
            self.record(name, variant, **values, rounds=len(rounds), at=at)
            ratios[variant] = values["ratio"]
        return ratios


# -------------------------------------------------------------------------------------------------------- measurements


def work(bench):
    """{measurement: its items}, later ones taking more memory: a dev set, QNLI's where it is there; training rows of
    the largest task; steps on short rows, on long ones, and on the mixed stream."""
    rows, count = bench.rows, 1 if bench.on_cpu else 10
    dev = next((task for task in rows.tasks if task.name == "qnli"), rows.tasks[-1])
    few, batches = (128 if bench.args.quick else 256) if bench.on_cpu else 8192, count * bench.args.rounds
    items = {"evaluate": [rows.read(dev, dev.dev[0][0], few)]}
    if not bench.args.quick:
        largest = max(rows.tasks, key=lambda task: rows.sizes[task.name])
        items["teacher_outputs"] = [rows.read(largest, "train", few)]
        for name in [name for name in ("sst2", "mrpc") if name in rows.sizes]:
            items[f"train_{name}"] = rows.batches(batches, bam.SINGLE.batch_size, name)
    return items | {"train_mixed": rows.batches(batches, bam.MULTI.batch_size)}


def side_by_side(bench, items):
    """Training and predicting, with the peers."""
    for name, each in reversed(items.items()):
        dataset = isinstance(each[0], Dataset)
        about = f"{len(each[0])} rows of {each[0].tasks[0].folder}, " if dataset else f"batches of {len(each[0])}, "
        if bench.peers and not dataset and not (bench.on_cpu and bench.args.quick):
            counts, with_compile = (4, 8, 16) if bench.on_cpu else (1, 2, 4), bench.args.compile or not bench.on_cpu
            about += bench.variants["hf_best"].tune(each[0], counts, with_compile)
        bench.compare(name, bench.variants, each, about)


def tokenizing(bench):
    """Files to sentences, which transformers leaves to others; and sentences to tokens of the same vocabulary."""
    root, vocab = bench.rows.texts(bench.folder)
    began, length = time.perf_counter(), bam.SINGLE.max_length
    splits = {task: glue_data.read_split(task, "train", root) for task in bench.rows.tasks}
    seconds, count = time.perf_counter() - began, sum(len(split.first) for split in splits.values())
    print("\nread: whole training files to sentences and labels")
    bench.record("read", "ours", seconds=seconds, examples_per_s=count / seconds)
    texts = [(task, split.first[:2000], split.second and split.second[:2000], split.labels[:2000], split.lines[:2000])
             for task, split in splits.items()]  # fmt: skip

    def ours():
        tokenizer = glue_data.Tokenizer(vocab)
        return [glue_data.make_dataset(*text, tokenizer, length) for text in texts]

    functions, tokens = {"ours": ours}, sum(len(dataset.input_ids) for dataset in ours())
    if bench.peers:
        import transformers

        folder = Path(tempfile.mkdtemp(dir=bench.folder))
        glue_data.save_tokenizer(vocab, folder, length)
        theirs = functools.partial(transformers.AutoTokenizer.from_pretrained(folder), truncation=True)
        functions["hf_default"] = lambda: [theirs(text[1], text[2], max_length=length) for text in texts]
    count, rounds = sum(len(text[1]) for text in texts), []
    for _ in range(bench.args.rounds):
        seconds = {name: clock(bench.run, function) for name, function in functions.items()}
        rounds.append((count, tokens, None, None, seconds))
    bench.report("tokenize", functions, rounds, "up to 2000 training rows of each task, ")


def start_up(bench, items):
    """From the command to the end of the first step: ours with all of its reading, transformers' without any."""
    rte = bench.rows.real and bench.trained and "rte" in bench.rows.sizes
    print(f"\nstart_up: to the first step of bam.py --task rte {'' if rte else '--demo '}(reading included)")
    given = ["--data", bench.args.data, "--checkpoint", str(bench.checkpoint)] if rte else ["--demo"]
    given += ["--device", bench.args.device, "--precision", bench.args.precision]
    ours, compiled = first_step([*given, "--no-compile"]), first_step([*given, "--compile"])
    bench.record("start_up", "ours", seconds=ours)
    if compiled:
        bench.record("start_up", "ours, compiled", seconds=compiled, note=f"{compiled - ours:.1f} s of it compiling")
    else:
        print("  ours, compiled: does not work here")
    for variant in bench.peers[:1]:
        spent = child(bench, variant, [("start_up", items["train_mixed"][0][:32])])[0]["since"]
        note = "random weights, rows tokenized before"
        bench.record("start_up", variant, seconds=spent, ratio=spent / ours, note=note)


def first_step(arguments):
    """Seconds until bam.py has written its first line of metrics, or None where it fails before."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, bam.__file__, "--task", "rte", "--out", out, *arguments]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{out}/cache"}  # else compiled before now and then
        began, metrics = time.perf_counter(), Path(out, "trial-1", "single", "rte", "metrics.jsonl")
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (written := metrics.exists() and metrics.stat().st_size) and process.poll() is None:
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        process.kill()
        process.wait()
        return seconds if written else None


def child(bench, variant, jobs, launcher=(), **environment):
    """Do the jobs [(name, item)] in a fresh process, and return what serve_child says of each."""
    path = bench.folder / "jobs.pickle"
    path.write_bytes(pickle.dumps((variant, bench.args, bench.model.config, bench.rows.mixed, jobs, time.time())))
    command = [sys.executable, *launcher, __file__, "--child", str(path)]
    result = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def serve_child(path):
    """The process that child() starts. Of each job: its seconds, those since the start, and the most memory so far."""
    variant, args, config, dataset, jobs, began = pickle.loads(Path(path).read_bytes())
    run, results = bam.Device(args), []
    if bam.WORLD > 1:
        bam.join_processes(run.device)
    if variant != "ours":
        peers()
    before, where = host_peak(), run.device if variant == "ours" else "meta"
    with torch.device(where):
        model = MultiTaskBert(config, {task.name: task.num_outputs for task in dataset.tasks})
    function = variant_of(variant, run, model, dataset)
    for name, item in jobs:
        seconds = clock(run, function, item)
        on_device = torch.cuda.max_memory_allocated() if run.device.type == "cuda" else None
        results.append({"name": name, "seconds": seconds, "since": time.time() - began, "host_bytes": host_peak(),
                        "device_bytes": on_device, "before_bytes": before})  # fmt: skip
    if bam.WORLD > 1:
        dist.destroy_process_group()
    if bam.RANK == 0:
        print(json.dumps(results))


def host_peak():
    """The most memory that this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's begins with what the parent had when it started this process
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory(bench, items):
    """Each variant's peaks, in a process of its own. Every measurement's goes into its own line, train_mixed's here."""
    state, last = 16 * bench.constants["parameters"], {}
    for variant in bench.variants:
        few = 32 if variant == "hf_default" else None  # its micro-batches come one after the other, all of one size
        jobs = [(name, each[0] if isinstance(each[0], Dataset) else each[0][:few]) for name, each in items.items()]
        for job in child(bench, variant, jobs):
            bench.peaks[job["name"], variant] = job["device_bytes"] or job["host_bytes"]
            last[variant] = job
    if not bench.args.quick:
        print("\nmemory: a process of train_mixed, on the device where it has memory of its own; ×: ours over this")
        for variant, job in last.items():
            used = job["device_bytes"] or job["host_bytes"] - job["before_bytes"]
            peak, ours = (bench.peaks["train_mixed", who] for who in (variant, "ours"))
            note = f"{used / 1e6:.0f} MB without imports and rows, {used / state:.2f} times 16 bytes a parameter"
            more = {key: job[key] for key in ("host_bytes", "device_bytes", "before_bytes")}
            bench.record("memory", variant, peak_bytes=peak, ratio=ours / peak, note=note, **more)


class FreedMemoryGoesBack:
    """For a while, glibc as it ends up by itself once large blocks were freed."""

    def __enter__(self):
        bam.keep_freed_memory(2**26)

    def __exit__(self, *_):
        bam.keep_freed_memory()


def optimizations(bench):
    """{name: what takes one optimization off for a while}."""
    run, patch, layer = bench.run, mock.patch.object, bert.BertLayer.forward
    groups = bench.variants["ours"].optimizer.adam.param_groups

    def whole(self, x, plan, only_cls=False):
        x = layer(self, x, plan)
        return x[plan.cls] if only_cls else x

    def dropout_mask(x, p):
        return F.dropout(torch.ones_like(x), p), 1.0

    off = {
        "parts of a batch": [patch(run, "tokens_at_once", 2**40)],
        "only [CLS] at the end": [patch(bert.BertLayer, "forward", whole)],
        "buckets by length": [patch(bert.Buckets, "SHRINK", 0)],
        "own gradient of indexing": [patch(bert.Reindex, "apply", lambda x, index, _: x.index_select(0, index))],
        "fused AdamW": [mock.patch.dict(group, fused=False, foreach=False) for group in groups],
    }
    if bench.on_cpu:
        off["16-bit dropout"] = [patch(bert, "dropout_mask", dropout_mask)]
        off["own gradient of attention"] = [patch(bert.Attend, "apply", bert.plain_attend)]
        off["words' gradient by rows"] = [patch(bench.model.word_embeddings, "sparse", False)]
        off["freed memory kept"] = [FreedMemoryGoesBack()]
    else:
        if bert.VARLEN:
            off["varlen attention"] = [patch(bert, "VARLEN", False)]
        off["pinned copies"] = [patch(run, "to_device", lambda array: torch.from_numpy(array).to(run.device))]
    if run.bfloat16:
        off["bfloat16"] = [patch(run, "bfloat16", False)]
    return off


def ablations(bench, items):
    """Ours without one optimization after the other: a ratio above 1 is what it is worth here."""
    ours, patch = bench.variants["ours"], mock.patch.object

    def patched(patches, rows):
        with contextlib.ExitStack() as stack:
            for each in patches:
                stack.enter_context(each)
            ours(rows)

    functions = {f"without {name}": functools.partial(patched, each) for name, each in optimizations(bench).items()}
    switched = functools.partial(patched, [patch(bert, "COMPILE", not bert.COMPILE)])
    try:
        switched(items[0])
        functions["without compile" if bert.COMPILE else "with compile"] = switched
    except Exception as error:  # of a machine without a compiler
        print(f"\nablations: torch.compile does not work here ({str(error).splitlines()[0]})")
    ratios = bench.compare("ablation", {"ours": ours, **functions}, items, "train_mixed, ")
    idle = [name for name, ratio in ratios.items() if name.startswith("without") and ratio < 1.02]
    print(f"  worth less than 2 % here: {', '.join(idle) or 'none'}")


# --------------------------------------------------------------------------------------------------------- with --scale

BATCHES, LENGTHS, COUNTS = (32, 128, 512, 2048, 4096), (16, 32, 64, 128, 256, 512), (1000, 10_000, 100_000)
SHAPES = {"tiny": (2, 128, 2), "mini": (4, 256, 4), "small": (4, 512, 8), "MiniLM-L6": (6, 384, 12),
          "base": (12, 768, 12), "large": (24, 1024, 16)}  # fmt: skip


def config_of(shape):
    layers, hidden, heads = SHAPES[shape]
    return BertConfig(30522, hidden, layers, heads, 4 * hidden)


def scale(bench):
    """Ours alone, as one thing grows after the other."""
    rte, config, ours = glue_data.TASKS["rte"], bench.model.config, {"ours": bench.variants["ours"]}
    for size in BATCHES:
        bench.compare("scale_batch", ours, bench.rows.batches(2, size), f"{size} rows, ", at=size)
    lengths = [length for length in LENGTHS if length <= config.max_position_embeddings]
    sizes = [("scale_length", config, draw(rte, 64, length, 1000, 1e9, 512), length) for length in lengths]
    sizes += [
        ("scale_model", config_of(shape), draw(rte, 128, 30, 1000), shape)
        for shape in SHAPES
        if not bench.on_cpu or shape != "large"
    ]
    for name, config, dataset, at in sizes:
        model = MultiTaskBert(config, {"rte": 2}).to(bench.run.device)
        functions = {"ours": variant_of("ours", bench.run, model, dataset)}
        bench.compare(name, functions, [np.arange(len(dataset))], f"{at}, ", model, dataset, at)
    scale_rows(bench)
    scale_processes(bench)


def scale_rows(bench):
    root, vocab = bench.rows.texts(bench.folder)
    task, tokenizer = bench.rows.tasks[0], glue_data.Tokenizer(vocab)
    texts = glue_data.read_split(task, "train", root).first
    print(f"\nscale_rows: {task.folder}'s sentences to tokens; the schedule of six epochs")
    for count in COUNTS:
        first = list(itertools.islice(itertools.cycle(texts), count))
        more = np.zeros((count, task.num_outputs), np.float32), np.arange(count, dtype=np.int32), tokenizer, 128
        jobs = {
            "tokenize": (count, glue_data.make_dataset, task, first, None, *more),
            "schedule": (6 * count, glue_data.sample_schedule, [count], 6 * count // 128, 128, bam.MULTI.exponent, 0),
        }
        for variant, (examples, *job) in jobs.items():
            seconds = clock(bench.run, *job)
            note = f"{count} rows"
            bench.record("scale_rows", variant, at=count, seconds=seconds, examples_per_s=examples / seconds, note=note)


def scale_processes(bench):
    """The same batches shared by 1, 2, 4, ... processes, and on a CPU the threads shared too."""
    most = bench.constants["threads"] if bench.on_cpu else torch.cuda.device_count()
    jobs = [("step", item) for item in bench.rows.batches(1 + bench.args.rounds, bam.MULTI.batch_size)]
    print("\nscale_processes: train_mixed under torchrun; ×: what one process takes over this")
    one = None
    for count in [2**power for power in range(most.bit_length())]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        steps = child(bench, "ours", jobs, launcher, OMP_NUM_THREADS=str(bench.constants["threads"] // count or 1))
        seconds = float(np.median([step["seconds"] for step in steps[1:]]))
        one = one or seconds
        speed, note = bam.MULTI.batch_size / seconds, f"{count} processes"
        bench.record("scale_processes", "ours", at=count, examples_per_s=speed, ratio=one / seconds, note=note)


# ---------------------------------------------------------------------------------------------------- with --precisions

TRAINED = {"mrpc": 625, "rte": 1250}  # rows of each; a seed of both takes minutes on two cores


class RoundedProduct(torch.autograd.Function):
    """a b as a processor of bfloat16 does it: operands rounded, sums in float32, the result rounded."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a.bfloat16(), b.bfloat16())
        return (a.bfloat16().float() @ b.bfloat16().float()).bfloat16()

    @staticmethod
    def backward(ctx, grad):
        (a, b), grad = ctx.saved_tensors, grad.float()
        return (grad @ b.float().mT).bfloat16(), (a.float().mT @ grad).bfloat16()


@contextlib.contextmanager
def emulated_bfloat16():
    """bfloat16's numbers at float32's speed, for processors that multiply bfloat16 slowly or not at all."""
    linear, product = F.linear, bert.product

    def rounded_linear(x, weight, bias):
        if not torch.is_autocast_enabled("cpu"):
            return linear(x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            return RoundedProduct.apply(x.bfloat16(), weight.bfloat16().T) + bias.bfloat16()

    def rounded_product(a, b, scale=1.0, out=None):
        if a.dtype != torch.bfloat16:
            return product(a, b, scale, out)
        rounded = product(a.float(), b.float(), scale).bfloat16()
        return rounded if out is None else out.copy_(rounded)

    with mock.patch.object(F, "linear", rounded_linear), mock.patch.object(bert, "product", rounded_product):
        yield


def precisions(args):
    """Fine-tune for each task of TRAINED with so many seeds in float32 and in bfloat16, and print the scores."""
    config = BertConfig.from_file(bam.checkpoint_folder(args.checkpoint) / "config.json")
    run = device(args, config)
    emulate = run.device.type == "cpu" and not run.bfloat16
    print(f"{machine(run)}, torch {torch.__version__}, {args.checkpoint}{', bfloat16 emulated' * emulate}", flush=True)
    given = ["--data", args.data, "--checkpoint", args.checkpoint, "--device", args.device]
    given += ["--compile"] * bool(args.compile) + ["--no-varlen"] * (not args.varlen)
    for task, precision in itertools.product(TRAINED, ("float32", "bfloat16")):
        emulated = emulate and precision == "bfloat16"
        out = Path("runs/precisions") / f"{task}-{'emulated-' * emulated}{precision}"
        command = ["--task", task, "--limit", TRAINED[task], "--trials", args.precisions, "--precision", precision]
        with emulated_bfloat16() if emulated else contextlib.nullcontext():
            bam.main([*map(str, command), *given, "--out", str(out)])
        trials = json.loads((out / "results.json").read_text())["single"]
        scores = [trial[task]["dev"][glue_data.TASKS[task].metrics[0]] for trial in trials]
        name = f"{glue_data.TASKS[task].folder}, {TRAINED[task]} rows, {precision}"
        print(f"precisions: {name}: median {np.median(scores):.1f} ({min(scores):.1f}–{max(scores):.1f})", flush=True)


# -------------------------------------------------------------------------------------------------------- with --limits


class Ledger(TorchDispatchMode):
    """How many bytes the tensors have that are made under it and live, now and at most, and how many calls of operators
    there were."""

    def __init__(self):
        super().__init__()
        self.storages, self.bytes, self.most_bytes, self.calls = set(), 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.storages:
                storage = tensor.untyped_storage()
                weakref.finalize(storage, self.count, storage._cdata, -storage.nbytes())
                self.count(storage._cdata, storage.nbytes())
        return out

    def count(self, key, size):
        (self.storages.add if size > 0 else self.storages.discard)(key)
        self.bytes += size
        self.most_bytes = max(self.most_bytes, self.bytes)


class OnPaper(bam.Device):
    """A GPU of tensors without data, on which a step that reads a number back is an error."""

    def __init__(self):
        super().__init__(argparse.Namespace(device="cpu", precision="float32", compile=False, varlen=False))
        self.device, self.tokens_at_once = torch.device("meta"), bam.CUDA_TOKENS

    def to_device(self, array):
        return torch.from_numpy(array).to(self.device)


def step_on_paper(config, dataset, rows):
    """The Ledger of a training step as on CUDA, products in bfloat16, nothing compiled."""
    run, patch, linear = OnPaper(), mock.patch.object, F.linear

    def half(x, weight, bias):
        return linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16())

    with contextlib.ExitStack() as stack:
        ledger = stack.enter_context(Ledger())
        stack.enter_context(patch(bert, "VARLEN", True))
        stack.enter_context(patch(F, "linear", half))
        stack.enter_context(patch(torch, "autocast", lambda *_, **__: contextlib.nullcontext()))
        with run.device:
            model = MultiTaskBert(config, {task.name: task.num_outputs for task in dataset.tasks})
        Ours(run, model, bam.Targets(run, dataset, dataset.labels))(rows)
    return ledger


def whole_bam(model, rows):
    """Operations of teachers, their outputs and student over all of GLUE: three passes a training epoch, one for what
    a teacher says. Lengths are drawn, so for attention they are roughly right."""
    total = 0.0
    for task in rows.tasks:
        lengths = np.diff(rows.mixed.offsets)[rows.mixed.task_ids == rows.tasks.index(task)]
        passes = 3 * (bam.SINGLE.epochs + bam.MULTI.epochs) + 1
        total += operations(model, lengths, passes) * rows.sizes[task.name] / len(lengths)
    return total


def limits(rate):
    """Of a GPU with products of `rate` operations a second: what whole BAM takes at least, and a step's memory."""
    rows = Rows(Path(os.devnull), Path(os.devnull), 30522)  # so they are drawn
    longest = np.argsort(-np.diff(rows.mixed.offsets))[: bam.MULTI.batch_size]
    print(f"{'':16}{'whole BAM':>12}{'at least':>12}{'an hour buys':>14}{'step, memory':>14}{'calls':>8}")
    for shape in ("base", "large"):
        with torch.device("meta"):
            model = MultiTaskBert(config_of(shape), {task.name: task.num_outputs for task in rows.tasks})
        work, ledger = whole_bam(model, rows), step_on_paper(config_of(shape), rows.mixed, longest)
        print(f"  BERT {shape:9}{work / 1e15:8.0f} PFLOP{work / rate / 60:8.1f} min{3600 * rate / work:9.1f} runs"
              f"{ledger.most_bytes / 1e9:11.1f} GB{ledger.calls:8}")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the command


def parse_args(argv):
    parser = argparse.ArgumentParser(
        "bench_bam.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="glue_data", help="the GLUE folder; without it rows are drawn (default glue_data)")
    add("--checkpoint", default="google-bert/bert-base-uncased", help="as bam.py's; without it weights are random")
    add("--json", metavar="FILE", help="write an object a line for each measurement")
    add("--quick", action="store_true", help="the mixed stream and evaluation alone")
    add("--scale", action="store_true", help="cost against batch, length, model size, rows and processes too")
    add("--precisions", type=int, metavar="SEEDS", help="of RTE and MRPC in float32 and in bfloat16, alone")
    add("--limits", type=float, nargs="?", const=790e12, metavar="RATE", help="of a GPU whose products reach so many "
        "operations a second, alone and without one (default an H200's, 790e12)")  # fmt: skip
    add("--rounds", type=int, help="of each comparison, fewer where they take minutes (default 7; 3 with --quick)")
    add("--device", default="auto", help="as bam.py's")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: the one faster here")
    add("--compile", action=argparse.BooleanOptionalAction, help="as bam.py's; hf_best tries it too")
    add("--no-varlen", action="store_false", dest="varlen", help="as bam.py's")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.rounds, args.seconds = args.rounds or (3 if args.quick else 7), 40 if args.quick else 240
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.child:
        return serve_child(args.child)
    if args.limits:
        return limits(args.limits)
    if args.precisions:
        return precisions(args)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        items = work(bench)
        memory(bench, items)
        side_by_side(bench, items)
        if not args.quick:
            tokenizing(bench)
            start_up(bench, items)
            ablations(bench, items["train_mixed"])
        if args.scale:
            scale(bench)


if __name__ == "__main__":
    try:
        main()
    except (bam.UsageError, bam.DataError, bam.CheckpointError) as error:
        sys.exit(f"bench_bam.py: error: {error}")
