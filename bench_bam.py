"""How fast this program is, what memory it takes, and what each of its optimizations is worth: the code that bam.py
trains and predicts with, beside Hugging Face transformers on the same examples with the same weights, in turns.

    python bench_bam.py                      # everything, on whatever machine this is
    python bench_bam.py --quick              # the mixed stream and evaluation alone: two minutes on two cores
    python bench_bam.py --scale              # also cost against batch and model size
    python bench_bam.py --limits             # what a GPU would have to do and to hold, computed without one
    python bench_bam.py --json speed.jsonl   # one object a line for each measurement

Peers: hf_default is run_glue's default, every example padded to 128 tokens, in float32; hf_best is the best setting of
transformers, examples sorted by length in micro-batches of a tuned size, in this run's precision, compiled on CUDA.
Both have transformers' defaults: dropout, scaled-dot-product attention, fused AdamW. A share of the matrix rate counts
the full model's operations over real tokens, whatever a variant adds by padding or leaves out.
"""

import argparse
import collections
import functools
import importlib.util
import json
import os
import sys
import tempfile
import time
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bam
import glue_data
import model as bert
import ops
from glue_data import TASKS, Dataset, concatenate
from model import BertConfig, MultiTaskBert
from runtime import CUDA_TOKENS, PRECISIONS, Run, command
from wordpiece import Tokenizer

# -------------------------------------------------------------------------------------------------- sizes and examples

# Each task's training examples in the whole of GLUE, and their mean tokens in BERT's uncased vocabulary, at most 128.
GLUE = {"cola": (8551, 11.3), "sst2": (67349, 13.4), "mrpc": (3668, 53.2), "stsb": (5749, 27.8), "qqp": (363846, 30.3),
        "mnli": (392702, 40.0), "qnli": (104743, 49.3), "rte": (2490, 66.6)}  # fmt: skip
LIMIT = 4000  # examples of each task that are used; tasks mix by the sizes of the whole
SHAPES = {"tiny": (2, 128, 2), "mini": (4, 256, 4), "small": (4, 512, 8), "minilm": (6, 384, 12),
          "base": (12, 768, 12), "large": (24, 1024, 16)}  # layers, hidden size, heads  # fmt: skip
SIZES = {name: BertConfig(30522, hidden, layers, heads, 4 * hidden) for name, (layers, hidden, heads) in SHAPES.items()}
BATCHES = (32, 128, 512, 2048, 4096)  # of --scale
CALL_SECONDS = 5e-6  # of the host, for one operator call
GOLD_WEIGHT = 0.5  # λ: with teachers' logits beside the labels, all of the loss is computed


def draw(task, count, mean, vocab_size):
    """A Dataset of random tokens with gamma-distributed lengths, whose standard deviation is half of the mean."""
    rng = np.random.default_rng(count)
    lengths = np.clip(rng.gamma(4, mean / 4, count).round(), 5, bam.SINGLE.max_length).astype(np.int32)
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    ids = rng.integers(vocab_size, size=offsets[-1], dtype=np.int32)
    segment_starts = lengths // 2 + 1 if len(task.text) == 2 else lengths
    labels = rng.random((count, task.num_outputs), np.float32)
    zeros = np.zeros(count, np.int32)
    return Dataset((task,), ids, offsets, segment_starts, task_ids=zeros, labels=labels, lines=zeros, index=zeros)


class Examples:
    """GLUE's examples where its folder and a checkpoint's vocabulary are there, else drawn ones."""

    def __init__(self, data, checkpoint, vocab_size):
        self.data = data
        self.checkpoint = checkpoint
        self.vocab_size = vocab_size
        self.tasks = glue_data.resolve("all")
        has_vocabulary = any((checkpoint / name).exists() for name in ("vocab.txt", "tokenizer.json"))
        self.real = has_vocabulary and all((data / task.folder / task.train).exists() for task in self.tasks)
        self.sizes = [GLUE[task.name][0] * (1 + task.symmetric) for task in self.tasks]
        self.mixed = concatenate([self.read(task, "train", LIMIT) for task in self.tasks])

    def read(self, task, split, limit):
        """At most `limit` examples of a task, as a Dataset."""
        if not self.real:
            return draw(task, limit, GLUE[task.name][1], self.vocab_size)
        tokenizer = Tokenizer(self.checkpoint)
        return glue_data.load_dataset(task, split, self.data, tokenizer, bam.SINGLE.max_length, limit)

    def batches(self, count, batch_size, only=None):
        """(count, batch_size) indices into `mixed`: of one task, or of all with p ∝ size^exponent, as in training."""
        weights = np.array(self.sizes) ** bam.MULTI.exponent
        weights *= [only in (None, task.name) for task in self.tasks]
        p = (weights / np.bincount(self.mixed.task_ids))[self.mixed.task_ids]  # of each example
        return np.random.default_rng(0).choice(len(p), (count, batch_size), p=p / p.sum())


# ------------------------------------------------------------------------------------------------------------ variants


class Ours:
    """This program, through the functions that bam.train and bam.evaluate are made of."""

    def __init__(self, run, model, dataset, targets):
        self.run = run
        self.model = model
        self.dataset = dataset
        self.targets = targets
        self.optimizer = bam.Adam(model, bam.MULTI)

    def gradients(self, batch):
        """Add the gradient of a batch, indices of examples."""
        self.model.train()
        bam.add_gradients(self.model, self.dataset, self.targets, batch, GOLD_WEIGHT, seed=0, run=self.run)

    def step(self, batch):
        self.gradients(batch)
        self.optimizer.step(1, 10)

    def predict(self, dataset):
        """The logits of a Dataset of one task."""
        return bam.predict(self.model, dataset, self.run)


class HuggingFace:
    """transformers' encoder and a head, with `model`'s weights."""

    def __init__(self, run, model, dataset, targets, best):
        import transformers

        config = transformers.AutoConfig.for_model(**vars(model.config))
        self.encoder = transformers.AutoModel.from_config(config, attn_implementation="sdpa")
        self.head = nn.Linear(model.head.in_features, model.head.out_features)
        public = {name.partition(".")[::2]: tensor for name, tensor in bert.public_tensors(model).items()}
        self.encoder.load_state_dict({name: t for (module, name), t in public.items() if module != "heads"})
        self.head.load_state_dict(model.head.state_dict())
        self.modules = nn.ModuleList([self.encoder, self.head]).to(run.device)
        self.optimizer = torch.optim.AdamW(self.modules.parameters(), lr=5e-5, fused=True)
        self.run = run
        self.dataset = dataset
        self.targets = targets
        self.columns = model.columns
        self.best = best
        self.called = self.encoder
        self.num_tokens = 500  # of a micro-batch: see tune()
        if best and run.device.type == "cuda":  # ours, which may come first, permits no other graph than its own
            self.called = torch.compiler.set_stance("default")(torch.compile(self.encoder, dynamic=True))

    def logits(self, dataset, examples):
        """(B, K), each example padded to 128 tokens or, in hf_best, to the longest of them."""
        batch = glue_data.pack(dataset, examples)
        lengths = np.diff(batch.cu_seqlens)[:, None]
        is_token = np.arange(lengths.max() if self.best else bam.SINGLE.max_length) < lengths  # (B, L)
        inputs = np.zeros((3, *is_token.shape), np.int64)
        for padded, tokens in zip(inputs, (batch.input_ids, batch.segment_ids, 1), strict=True):
            padded[is_token] = tokens
        ids, segments, mask = (torch.from_numpy(array).to(self.run.device) for array in inputs)
        with torch.autocast(self.run.device.type, torch.bfloat16, enabled=self.best and self.run.bfloat16):
            out = self.called(input_ids=ids, token_type_ids=segments, attention_mask=mask)
        pooled = out.get("pooler_output", out.last_hidden_state[:, 0]).float()  # ELECTRA has no pooler
        return self.head(F.dropout(pooled, self.encoder.config.hidden_dropout_prob, self.encoder.training))

    def micro_batches(self, dataset, examples):
        """hf_default's 32 examples at a time; hf_best's as ours, by length, but in training of a tuned size."""
        if not self.best:
            return np.split(examples, range(32, len(examples), 32))
        num_tokens = self.num_tokens if self.encoder.training else 2 * self.run.tokens_at_once
        return glue_data.micro_batches(dataset, examples, num_tokens)

    def gradients(self, batch):
        """As ours."""
        self.modules.train()
        for examples in self.micro_batches(self.dataset, batch):
            logits = self.logits(self.dataset, examples)
            index = torch.from_numpy(examples).to(self.run.device)
            targets = [target.index_select(0, index) for target in self.targets]
            bam.distillation_loss(logits, *targets, GOLD_WEIGHT).sum().backward()

    def step(self, batch):
        self.gradients(batch)
        nn.utils.clip_grad_norm_(self.modules.parameters(), bam.MULTI.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def predict(self, dataset):
        """As ours."""
        self.modules.eval()
        outputs = torch.zeros(dataset.labels.shape, device=self.run.device)
        for examples in self.micro_batches(dataset, np.arange(len(dataset))):
            logits = self.logits(dataset, examples)[:, self.columns[dataset.tasks[0].name]]
            outputs[torch.from_numpy(examples)] = logits
        return outputs.cpu().numpy()

    def tune(self, batch):
        """Keep the number of tokens at once that is fastest on this batch, and return it."""
        seconds = {}
        for num_tokens in (250, 500, 1000, 2000) if self.run.device.type == "cpu" else (2000, 4000, 8000):
            self.num_tokens = num_tokens
            seconds[num_tokens] = min(clock(self.run, self.step, [batch]) for _ in range(3))
        self.num_tokens = min(seconds, key=seconds.get)
        return self.num_tokens


def variant_of(name, run, model, dataset):
    """The variant of this name. Its teachers are random: what they say does not matter to speed."""
    teacher_logits = np.random.default_rng(0).normal(size=dataset.labels.shape).astype(np.float32)
    targets = bam.targets_of(dataset, teacher_logits, run.device)
    shared = run, model, dataset, targets
    return Ours(*shared) if name == "ours" else HuggingFace(*shared, best=name == "hf_best")


# ----------------------------------------------------------------------------------------------------------- measuring


def clock(run, function, items):
    """The seconds that the function takes for all of the items, the device's work included."""
    wait = torch.get_device_module(run.device).synchronize  # on a CPU it does nothing
    wait()
    start = time.perf_counter()
    for item in items:
        function(item)
    wait()
    return time.perf_counter() - start


def matrix_rate(run, config):
    """Operations a second of one layer's products, forward and backward, alone: the most that a step can reach."""
    tokens = run.tokens_at_once
    hidden, inner = config.hidden_size, config.intermediate_size
    dtype = torch.bfloat16 if run.bfloat16 else torch.float32
    seconds = 0.0
    count = 0
    for out, width in ((3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner)):
        shapes = (tokens, width), (out, width), (tokens, out)
        x, weight, grad = (torch.randn(shape, device=run.device, dtype=dtype) for shape in shapes)
        work = [(a, b, a @ b) for a, b in ((x, weight.T), (grad, weight), (grad.T, x))]
        work *= 1 if run.device.type == "cpu" else 10
        seconds += min(clock(run, lambda abc: torch.mm(abc[0], abc[1], out=abc[2]), work) for _ in range(2))
        count += 2 * tokens * out * width * len(work)
    return count / seconds


def operations(config, lengths, passes, counts=1):
    """Operations of the full model over sequences of these lengths, each so many times: 2 a weight and token, and in
    attention 4 L H a token and layer. Training is three passes. Embeddings, pooler and heads count for nothing."""
    hidden = config.hidden_size
    weights = config.num_hidden_layers * (4 * hidden + 2 * config.intermediate_size) * hidden
    lengths = np.asarray(lengths, np.float64)
    attention = 4 * config.num_hidden_layers * hidden * np.sum(lengths**2 * counts)
    return passes * float(2 * weights * np.sum(lengths * counts) + attention)


# What a line of results holds, and its width and form in the table; what a measurement lacks is null in the JSON.
COLUMNS = {"seconds": (10, "{:.3g} s"), "examples_per_s": (17, "{:.1f} ex/s"), "tokens_per_s": (14, "{:.0f} tok/s"),
           "share_of_peak": (15, "{:.1%} of peak"), "ratio": (12, "ours ×{:.2f}"),
           "ratio_spread": (14, "({0[0]:.2f}–{0[1]:.2f})"), "peak_bytes": (12, "{:.2e} B"),
           "note": (0, "  {}"), "matrix_flops": (0, ""), "rounds": (0, ""), "at": (0, "")}  # fmt: skip


class Bench:
    """What the measurements share: device, examples, model, variants, and where results go."""

    def __init__(self, args, folder):
        self.args = args
        self.json = open(args.json or os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self.run = Run(folder, args.device, args.precision)
        self.on_cpu = self.run.device.type == "cpu"
        self.steps = 1 if self.on_cpu else 10  # of each variant in a round
        self.load(args.size, Path(args.checkpoint))
        self.peers = ["hf_default", "hf_best"] if importlib.util.find_spec("transformers") else []
        shared = self.run, self.model, self.examples.mixed
        self.variants = {name: variant_of(name, *shared) for name in [*self.peers, "ours"]}
        self.constants = {
            "device": f"{torch.backends.cpu.get_cpu_capability()} CPU" if self.on_cpu else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "precision": "bfloat16" if self.run.bfloat16 else "float32",
            "threads": torch.get_num_threads(),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
        }
        print(", ".join(f"{key} {value}" for key, value in self.constants.items()))
        if not self.peers:
            print("no transformers here, so ours alone is measured; to compare: pip install transformers==5.24.0")
        print("of peak: of the matrix rate; ours ×: our speed over this one's, median over rounds (min–max)")

    def load(self, size, checkpoint):
        """Load examples and model: the checkpoint's or, without its weights, random ones."""
        if not size and not any((checkpoint / name).exists() for name in bert.WEIGHTS):
            size = "minilm" if self.on_cpu else "base"
        config = SIZES[size] if size else bert.read_config(checkpoint / "config.json")
        self.examples = Examples(Path(self.args.data), checkpoint, config.vocab_size)
        num_outputs = {task.name: task.num_outputs for task in self.examples.tasks}
        torch.manual_seed(0)
        model = MultiTaskBert(config, num_outputs) if size else bert.load_pretrained(checkpoint, num_outputs)
        self.model = model.to(self.run.device)
        print(f"model: {f'random weights of size {size}' if size else checkpoint}")
        print(f"examples: {self.args.data if self.examples.real else 'drawn with the lengths of GLUE'}")

    def record(self, name, variant, **values):
        """Write a line of the table, and of the JSON."""
        values = dict.fromkeys(COLUMNS) | values
        cells = ""
        for key, (width, form) in COLUMNS.items():
            cells += ("" if values[key] is None else form.format(values[key])).rjust(width)
        print(f"  {variant:28}{cells}".rstrip(), flush=True)
        print(json.dumps({"name": name, "variant": variant, **values, **self.constants}), file=self.json, flush=True)

    def compare(self, name, functions, items, about="", config=None, dataset=None, at=None):
        """Let the functions {variant: function of an item} do the same items in turns, and record each. An item is a
        Dataset to predict; or a batch of training examples, by default of all tasks."""
        config = config or self.model.config
        lengths = np.diff((dataset or self.examples.mixed).offsets)
        is_training = not isinstance(items[0], Dataset)
        for function in functions.values():  # to warm up
            function(items[0][:32] if self.on_cpu and is_training else items[0])
        facts = []  # of each round: examples, tokens, operations, matrix rate
        seconds = {variant: [] for variant in functions}
        for number in range(self.args.rounds):
            chosen = [items[(number * self.steps + step) % len(items)] for step in range(self.steps)]
            tokens = np.concatenate([lengths[item] if is_training else np.diff(item.offsets) for item in chosen])
            work = operations(config, tokens, passes=3 if is_training else 1)
            facts.append((len(tokens), tokens.sum(), work, matrix_rate(self.run, config)))
            for variant in np.roll(list(functions), number):  # nobody always comes first
                seconds[variant].append(clock(self.run, functions[variant], chosen))
            if sum(map(sum, seconds.values())) > (40 if self.args.quick else 240):
                break
        self.report(name, about, at, seconds, *np.array(facts).T)

    def report(self, name, about, at, seconds, examples, tokens, work, rates):
        """Record each variant's medians over the rounds."""
        rate = float(np.median(rates))
        about += f"{tokens.sum() / examples.sum():.1f} tokens an example, {len(rates)} rounds"
        print(f"\n{name}: {about}, matrix rate {rate / 1e9:.0f} GFLOP/s")
        for variant, spent in seconds.items():
            ratios = np.divide(spent, seconds["ours"])
            speeds = {"examples_per_s": np.median(examples / spent), "tokens_per_s": np.median(tokens / spent)}
            speeds |= {"share_of_peak": np.median(work / spent) / rate, "matrix_flops": rate}
            values = {"ratio": np.median(ratios), "ratio_spread": [ratios.min(), ratios.max()], "at": at}
            self.record(name, variant, **speeds, **values, rounds=len(rates))


# -------------------------------------------------------------------------------------------------------- measurements


def compiling(bench):
    """On CUDA, compile ours, and record how long it takes and how many other batches would need another graph."""
    step = bench.variants["ours"].step
    batches = bench.examples.batches(50, bam.MULTI.batch_size)
    seconds = clock(bench.run, lambda batch: bench.run.compile_encoder(bench.model, lambda: step(batch)), batches[:1])
    if not bench.model.compiled:  # on a CPU; or it failed, and compile_encoder has said why
        return
    recompilations = 0
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in batches:
            try:
                step(batch)
            except RuntimeError:
                recompilations += 1
    bench.record("compile", "ours", seconds=seconds, note=f"{recompilations} recompilations in {len(batches)} batches")


def training(bench):
    """Record steps on MRPC and SST-2, except with --quick, and last, since `memory` follows, on the mixed stream."""
    streams = [("mrpc", bam.SINGLE), ("sst2", bam.SINGLE), (None, bam.MULTI)]
    functions = {variant: each.step for variant, each in bench.variants.items()}
    for task, recipe in streams[-1 if bench.args.quick else 0 :]:
        batches = bench.examples.batches(bench.args.rounds * bench.steps, recipe.batch_size, task)
        about = f"hf_best with {bench.variants['hf_best'].tune(batches[0])} tokens at once, " if bench.peers else ""
        bench.compare(f"train_{task or 'mixed'}", functions, batches, about)


def predicting(bench):
    """Record the evaluation of QNLI's dev set and, except with --quick, a teacher's outputs for MNLI."""
    sets = [("evaluate", "qnli", "dev"), ("teacher_outputs", "mnli", "train")]
    functions = {variant: each.predict for variant, each in bench.variants.items()}
    for name, task, split in sets[: 1 if bench.args.quick else 2]:
        dataset = bench.examples.read(TASKS[task], split, 256 if bench.on_cpu else 8192)
        bench.compare(name, functions, [dataset], f"{len(dataset)} examples of {TASKS[task].folder}, ")


def tokenizing(bench, most=2000):
    """Record GLUE's sentences to tokens, beside transformers' tokenizer of the same vocabulary."""
    if not bench.examples.real:
        return
    splits = {task: glue_data.read_split(task, "train", bench.examples.data) for task in bench.examples.tasks}
    texts = [(task, split.first[:most], split.second and split.second[:most]) for task, split in splits.items()]
    tokenizer = Tokenizer(bench.examples.checkpoint)
    limit = bam.SINGLE.max_length
    functions = {"ours": lambda text: glue_data.text_dataset(*text, tokenizer, limit)}
    if bench.peers:
        tokenizer.save(bench.run.folder, limit)
        theirs = importlib.import_module("transformers").AutoTokenizer.from_pretrained(bench.run.folder)
        functions["hf_default"] = lambda text: theirs(*text[1:], truncation=True, max_length=limit)
    count = sum(len(first) for _, first, _ in texts)
    print(f"\ntokenize: up to {most} training examples of each task")
    for variant, function in functions.items():
        seconds = clock(bench.run, function, texts)
        bench.record("tokenize", variant, seconds=seconds, examples_per_s=count / seconds)


def memory(bench):
    """Record the most bytes of tensors at once in a step on the mixed stream: those it finds, and those it makes."""
    (batch,) = bench.examples.batches(1, bam.MULTI.batch_size)
    print("\nmemory: weights, gradients, Adam's two moments, and what a step makes; ×: ours over this")
    peaks = {}
    for variant in ["ours", *bench.peers]:
        found = 16 if variant == "ours" else 12  # bytes a parameter; between steps Hugging Face's have no gradients
        made = most_bytes_made(bench.run, bench.variants[variant].step, batch)
        peaks[variant] = found * bench.constants["parameters"] + made
        note = f"{peaks[variant] / bench.constants['parameters'] / 16:.2f} times 16 bytes a parameter"
        bench.record("memory", variant, peak_bytes=peaks[variant], ratio=peaks["ours"] / peaks[variant], note=note)


def most_bytes_made(run, step, batch):
    """The most bytes at once of the tensors that a step makes."""
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(batch)
        return torch.cuda.max_memory_allocated() - before
    with Ledger() as ledger:
        step(batch)
    return ledger.most_bytes


def profile(bench):
    """Record mixed steps of ours in torch's profiler: how long kernels (on a CPU, operators) run, and the longest."""
    batches = bench.examples.batches(bench.steps, bam.MULTI.batch_size)
    with torch.profiler.profile() as profiler:
        clock(bench.run, bench.variants["ours"].step, batches)
    events = [event for event in profiler.events() if (event.device_type == DeviceType.CPU) == bench.on_cpu]
    seconds = collections.Counter()  # a step's, by name
    for event in events:
        microseconds = event.self_cpu_time_total if bench.on_cpu else event.self_device_time_total
        seconds[event.name] += microseconds / 1e6 / bench.steps
    print("\nprofile: how long a mixed step keeps the device busy, and with what for longest")
    calls = f"{len(events) / bench.steps:.0f} {'operators' if bench.on_cpu else 'kernels and copies'}"
    for name, value in [(calls, seconds.total()), *seconds.most_common(8)]:
        bench.record("profile", "ours", seconds=value, note=name)


def left_out(bench):
    """[(optimization, (object, attribute, the value that leaves it out))]."""
    layer = bert.BertLayer.forward
    embedding = F.embedding
    adamw = bam.adamw

    def every_token(self, x, layout, only_cls=False):
        x = layer(self, x, layout)
        return x.index_select(0, layout.cls) if only_cls else x

    def float_mask(x, p):  # F.dropout's
        return torch.empty_like(x).bernoulli_(1 - p), 1 / (1 - p)

    patches = [
        ("compiling", (bench.model, "compiled", None)),
        ("micro-batches", (bench.run, "tokens_at_once", 2**40)),
        ("fused AdamW", (bam, "adamw", lambda *args, **more: adamw(*args, **more | dict(fused=False, foreach=False)))),
        ("only [CLS] at the end", (bert.BertLayer, "forward", every_token)),
        ("two groups by length", (ops, "first_of_second_group", lambda lengths: len(lengths) - 2)),
        ("16-bit dropout", (ops, "dropout_mask", float_mask)),
        ("words' gradient by rows", (F, "embedding", lambda ids, words, *_, **__: embedding(ids, words))),
    ]
    return patches[1:] if bench.on_cpu else patches[:3]  # what is inside of a compiled graph stays there


def ablations(bench):
    """Record ours without one optimization after the other: a ratio above 1 is what it is worth here."""
    step = bench.variants["ours"].step
    functions = {"ours": step}
    for name, patch in left_out(bench):
        functions[f"without {name}"] = mock.patch.object(*patch)(step)
    bench.compare("ablation", functions, bench.examples.batches(bench.args.rounds, bam.MULTI.batch_size))


def scale(bench):
    """Record ours alone, as the batch grows, and then the model, with random weights."""
    for size in BATCHES:
        batches = bench.examples.batches(2, size)
        bench.compare("scale_batch", {"ours": bench.variants["ours"].step}, batches, f"{size} examples, ", at=size)
    for size, config in list(SIZES.items())[: -1 if bench.on_cpu else None]:
        dataset = draw(TASKS["rte"], 128, 30, config.vocab_size)
        model = MultiTaskBert(config, {"rte": 2}).to(bench.run.device)
        step = variant_of("ours", bench.run, model, dataset).step
        batch = np.arange(len(dataset))
        bench.run.compile_encoder(model, functools.partial(step, batch))
        bench.compare("scale_model", {"ours": step}, [batch], f"{size}, ", config, dataset, at=size)


# ------------------------------------------------------------------------------------------------ tensors without data


class Ledger(TorchDispatchMode):
    """Counts operator calls, and the most bytes at once of the tensors that they make."""

    def __init__(self):
        super().__init__()
        self.storages = weakref.WeakSet()
        self.most_bytes = 0
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor) and not leaf.is_sparse]
        self.storages.update(tensor.untyped_storage() for tensor in tensors)
        self.most_bytes = max(self.most_bytes, sum(storage.nbytes() for storage in self.storages))
        self.calls += 1
        return out


def step_on_paper(config, dataset, batch):
    """The Ledger of a training step as on CUDA, but not compiled, on tensors without data: a step that reads a number
    back, for which the host would have to wait, raises."""
    linear = F.linear

    def bfloat16_linear(x, weight, bias):
        return linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16())

    def autocast(device_type, dtype, enabled):  # torch's knows no tensors without data
        return mock.patch.object(F, "linear", bfloat16_linear)

    def attention(q, k, v, attn_mask, dropout_p):  # what CUDA does with a mask
        bias = attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, dropout_p)[0]

    run = Run(None, "meta", "bfloat16")
    run.tokens_at_once = CUDA_TOKENS
    patch = mock.patch.multiple
    with Ledger() as ledger, patch(torch, autocast=autocast), patch(F, scaled_dot_product_attention=attention):
        with run.device:
            model = MultiTaskBert(config, {task.name: task.num_outputs for task in dataset.tasks})
        ours = variant_of("ours", run, model, dataset)
        ledger.calls = 0  # only the step's count
        ours.step(batch)
    return ledger


def limits(rate):
    """Print what whole BAM and a student's step take at least on a GPU with products of `rate` operations a second."""
    examples = Examples(Path(os.devnull), Path(os.devnull), 30522)  # drawn, since there are none
    lengths = np.diff(examples.mixed.offsets)
    longest = np.argsort(-lengths)[: bam.MULTI.batch_size]
    (typical,) = examples.batches(1, bam.MULTI.batch_size)
    task_ids = examples.mixed.task_ids
    counts = (examples.sizes / np.bincount(task_ids))[task_ids]  # how many of GLUE's each drawn example stands for
    passes = 3 * (bam.SINGLE.epochs + bam.MULTI.epochs) + 1  # teachers and student; the teachers' outputs
    print(f"with {rate / 1e12:.0f} TFLOP/s, and without compiling {CALL_SECONDS * 1e6:.0f} µs of the host a call")
    for size, config in list(SIZES.items())[-2:]:
        total = operations(config, lengths, passes, counts)
        products = operations(config, lengths[typical], passes=3) / rate
        calls = step_on_paper(config, examples.mixed, typical).calls
        most_bytes = step_on_paper(config, examples.mixed, longest).most_bytes
        print(f"BERT {size}: whole BAM {total / 1e15:.0f} PFLOP, at least {total / rate / 60:.1f} min")
        print(f"  a step: {1e3 * products:.1f} ms of products, {1e3 * CALL_SECONDS * calls:.0f} ms of {calls} calls")
        print(f"  the longest step: {most_bytes / 1e9:.1f} GB")


# ---------------------------------------------------------------------------------------------------------- the command


def main(argv=None):
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="glue_data", help="the GLUE folder; without it examples are drawn (default glue_data)")
    add("--checkpoint", default="checkpoints/google-bert/bert-base-uncased", help="weights and vocabulary, if there")
    add("--size", choices=SIZES, help="random weights of this size in place of the checkpoint's")
    add("--json", metavar="FILE", help="write an object a line for each measurement")
    add("--quick", action="store_true", help="the mixed stream and evaluation alone")
    add("--scale", action="store_true", help="also cost against batch and model size")
    about = "only what a GPU needs with so many operations a second in its products (default an H200's)"
    add("--limits", type=float, nargs="?", const=790e12, metavar="RATE", help=about)
    add("--rounds", type=int, default=5, help="of each comparison, fewer where they take minutes (default 5)")
    add("--device", default="auto", help="as bam.py's")
    add("--precision", choices=PRECISIONS, default="auto", help="as bam.py's; hf_best's too")
    args = parser.parse_args(argv)
    if args.limits:
        return limits(args.limits)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        compiling(bench)
        training(bench)
        predicting(bench)
        if not args.quick:
            memory(bench)
            profile(bench)
            ablations(bench)
            tokenizing(bench)
        if args.scale:
            scale(bench)


if __name__ == "__main__":
    sys.exit(command("bench_bam.py", main))
