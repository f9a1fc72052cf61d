"""BAM! Born-Again Multi-Task Networks for Natural Language Understanding (Clark et al., ACL 2019), from GLUE files and
a public BERT checkpoint to the paper's table and a leaderboard submission.

Single-task models teach one multi-task model: it learns from their output distributions instead of the labels alone.
Teacher annealing moves its target, as training goes, from the teachers' outputs to the gold labels, so that the student
starts as an imitation and ends above its teachers:

    target(step) = λ · gold label + (1 − λ) · teacher's output,      λ = step / num_steps

    python bam.py --demo                     # everything below in two minutes, on generated data
    python bam.py --task all                 # eight teachers, their outputs, one student, the table, a submission
    python bam.py --task rte,mrpc            # the same over two tasks
    python bam.py --task rte                 # plain fine-tuning
    torchrun --nproc_per_node=8 bam.py --task all
"""

import argparse
import contextlib
import copy
import ctypes
import datetime
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.distributed as dist

import figure
import glue_data
import model as bert
from glue_data import DataError, mix, pack, sample_schedule, side_by_side
from model import AttentionPlan, BertConfig, CheckpointError, MultiTaskBert, fused, load_pretrained, save_pretrained

# ----------------------------------------------------------------------------------------------------- what we compare


def setting(default, why):
    return field(default=default, metadata={"why": why})


@dataclass(frozen=True)
class Recipe:
    """Every hyper-parameter, with its reason. Defaults are the original's for one task; MULTI has its defaults for
    several (bam/configure.py)."""

    learning_rate: float = setting(5e-5, "peak rate; higher for the larger batches of several tasks")
    batch_size: int = setting(32, "examples a step; larger where tasks mix")
    epochs: float = setting(3.0, "training takes epochs · N / batch_size steps; sampling passes small tasks more often")
    warmup: float = setting(0.1, "part of the steps over which the rate rises from 0: Adam has no bias correction here")
    layer_decay: float = setting(
        0.9, "α: each layer's rate is this times that of the layer above; low ones are general"
    )
    weight_decay: float = setting(0.01, "decoupled; not on biases and LayerNorm")
    clip_norm: float = setting(1.0, "largest norm of a batch's summed gradient; active at nearly every step")
    exponent: float = setting(0.75, "tasks are sampled with p ∝ size^this: 1 by size, 0 all alike")
    gold_weight: float | None = setting(
        None, "λ: 'anneal', here None, for step / num_steps; or a constant, 0 teacher to 1 gold"
    )
    max_length: int = setting(128, "tokens an example is cut to; few GLUE examples are longer")


SINGLE = Recipe()
MULTI = Recipe(learning_rate=1e-4, batch_size=128, epochs=6.0)
# The demo starts from random weights, no layer more general than another, and has few examples: more and bolder steps.
DEMO_SINGLE = dict(learning_rate=1e-3, layer_decay=1.0, epochs=5.0, max_length=64)
DEMO_MULTI = DEMO_SINGLE | dict(batch_size=64)


@dataclass(frozen=True)
class Regime:
    """A row of the paper's table: who is trained, and on whose outputs."""

    label: str
    multi: bool  # one model for all tasks, or one for each
    teacher: str | None = None  # the regime whose models teach; None: gold labels alone


REGIMES = {
    "single": Regime("Single", multi=False),
    "multi": Regime("Multi", multi=True),
    "single-single": Regime("Single→Single", multi=False, teacher="single"),
    "multi-multi": Regime("Multi→Multi", multi=True, teacher="multi"),
    "single-multi": Regime("Single→Multi", multi=True, teacher="single"),  # BAM
}
# With --teacher-checkpoint the teachers are rows of their own.
ROWS = {
    f"{name}-teacher": replace(REGIMES[name], label=f"{REGIMES[name].label}, teacher") for name in ("single", "multi")
}
ROWS |= REGIMES

# ------------------------------------------------------------------------------------- the idea (the paper, section 3)


def annealing_weight(step, num_steps, gold_weight=None, has_teacher=True):
    """λ, the weight of the gold labels: from 0 at the first step to 1 − 1 / num_steps at the last, or the constant that
    the recipe's gold_weight gives; 1 where nobody teaches."""
    if not has_teacher:
        return 1.0
    return step / num_steps if gold_weight is None else gold_weight


@fused
def distillation_loss(logits, labels, teacher_logits, gold_weight, own, regression):
    """Each example's loss (B,) against λ · gold + (1 − λ) · teacher. Both kinds are computed for every example, and its
    task picks one. The caller sums over the batch, as the original: a mean with the same clip is another algorithm.

    logits, labels, teacher_logits: (B, K), all tasks' outputs side by side; own: (B, K), which of them belong to the
    example's task; regression: (B,), whether that task is a score; gold_weight: λ, 0-dimensional. Cross-entropy with
    the teacher's softmax at temperature 1, or squared error with its score, as the original's task_specific modules.
    """
    others = ~own
    teacher_probabilities = teacher_logits.masked_fill(others, -torch.inf).softmax(-1)
    teacher = torch.where(regression[:, None], teacher_logits, teacher_probabilities)
    target = gold_weight * labels + (1 - gold_weight) * teacher
    log_probabilities = logits.masked_fill(others, -torch.inf).log_softmax(-1).masked_fill(others, 0)  # 0 · −∞ is NaN
    cross_entropy = -(target * log_probabilities).sum(-1)
    squared_error = (target - logits).masked_fill(others, 0).square().sum(-1)
    return torch.where(regression, squared_error, cross_entropy)


# -------------------------------------------------------------------------------------------------------- optimization


def learning_rate(step, num_steps, recipe, layers_below_head=0):
    """Linear warm-up from 0, linear decay to 0. The decay counts from step 0, so where warm-up ends the rate drops
    at once, to 0.9 of the peak after a warm-up of 0.1. Times α for each layer below the head.

    As bam/bert/optimization.py."""
    warmup_steps = int(recipe.warmup * num_steps)
    schedule = step / warmup_steps if step < warmup_steps else max(0.0, 1 - step / num_steps)
    return recipe.learning_rate * schedule * recipe.layer_decay**layers_below_head


class Adam:
    """BERT's Adam over one flat row of all parameters: gradient clipped by its global norm, no bias correction,
    decoupled weight decay, a learning rate for each depth. The model's parameters become views of the row, so that
    clipping, saving and summing over processes are each one operation.
    """

    def __init__(self, model, recipe):
        def group(item):
            name, _ = item
            return model.depth(name), name.endswith("bias") or "norm" in name

        named = sorted(model.named_parameters(), key=group)
        size, device = sum(parameter.numel() for _, parameter in named), named[0][1].device
        self.recipe, segments, state, end = recipe, [], {}, 0
        self.values, self.gradients, self.mean, self.square = (torch.zeros(size, device=device) for _ in range(4))
        for (depth, exempt), members in itertools.groupby(named, group):
            start = end
            for _, parameter in members:
                place = slice(end, end := end + parameter.numel())
                self.values[place] = parameter.detach().flatten()
                parameter.data = self.values[place].view_as(parameter)
                parameter.grad = self.gradients[place].view_as(parameter)
            segment = self.values[start:end]  # one rate and one decay: a single tensor
            segment.grad = self.gradients[start:end]
            layers_below_head = model.config.num_hidden_layers + 2 - depth
            decay = 0.0 if exempt else recipe.weight_decay
            segments.append({"params": [segment], "weight_decay": decay, "layers_below_head": layers_below_head})
            # A count so high that the bias correction 1 - β^count is 1: BERT's Adam has none.
            moments = {"exp_avg": self.mean[start:end], "exp_avg_sq": self.square[start:end]}
            state[segment] = {"step": torch.tensor(1e6, device=device), **moments}
        if device.type == "cpu":
            # The gradients of a batch's words are added to the row alone, without zeros for all the other words.
            model.word_embeddings.sparse = True
            keep_freed_memory()
        self.adam = torch.optim.AdamW(segments, lr=0.0, betas=(0.9, 0.999), eps=1e-6, fused=True)
        self.adam.state.update(state)

    def step(self, step, num_steps):
        """Update, zero the gradients, and return their norm before clipping (a tensor)."""
        norm = self.gradients.norm()
        self.gradients.mul_((self.recipe.clip_norm / norm).clamp(max=1))
        for segment in self.adam.param_groups:
            segment["lr"] = learning_rate(step, num_steps, self.recipe, segment["layers_below_head"])
        self.adam.step()
        self.gradients.zero_()
        return norm

    def state(self, step):
        return {"values": self.values, "mean": self.mean, "square": self.square, "step": torch.tensor(step)}

    def save(self, path, step):
        """Write a checkpoint; the one before lives on beside it."""
        if path.exists():
            path.replace(one_before(path))
        bert.write_safetensors(path, self.state(step))

    def load(self, path, num_steps):
        """Restore what save wrote, and return its step, one of num_steps. Raises CheckpointError, and changes nothing."""
        saved, state = bert.read_safetensors(path), self.state(0)
        found, expected = ({name: (t.dtype, tuple(t.shape)) for name, t in d.items()} for d in (saved, state))
        if found != expected or not 0 <= saved["step"] <= num_steps:
            raise CheckpointError(f"{path}: holds {found}; expected {expected} of a step up to {num_steps}")
        for name in ("values", "mean", "square"):
            state[name].copy_(saved[name])
        return int(saved["step"])


def keep_freed_memory(most=2**31 - 1):
    """Give back what loading has freed. What a step frees from here on, in blocks below 32 MB and up to `most` bytes,
    glibc keeps for the next one, instead of having it mapped again page by page: a setting of the whole process."""
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        glibc = ctypes.CDLL(None)
        glibc.malloc_trim(0)
        glibc.mallopt(mmap_threshold, 2**25)  # bytes; the most it takes
        glibc.mallopt(trim_threshold, most)


CHECKPOINT = "training.safetensors"


def one_before(path):
    return path.with_name("previous-" + path.name)


# -------------------------------------------------------------------------- training: one loop for teacher and student

# Shapes: K is the number of outputs of a model's tasks, 2 for RTE's teacher, 16 for all eight; each task owns some. A
# training set of N examples has labels (N, K), zero outside of an example's own columns, and so are its teachers'
# logits; a model gives all K for every example. schedule[step] is (batch_size,): rows of the training set.
#
# `run` (class Run, below) is what all stages share, a stage being the training of one model: run.tasks,
# run.data[task.name][split], run.single_recipe, run.multi_recipe, run.checkpoint, run.folder, run.device, and
# run.write(f, ...): rank 0 calls f, the others wait; run.exists(path): what rank 0 sees. run.teachers is the run that
# trains the teachers: the same one, or, with --teacher-checkpoint, one like it with another checkpoint and its tokens.

CUDA_TOKENS, CPU_TOKENS = 8192, 2000  # at once, in training and in predicting: what fills the device, and no more
MIN_TOKENS = 256  # where memory is short
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


class TrainingError(RuntimeError):
    """Training that cannot go on."""


class Targets:
    """What the logits of a dataset's examples are held against, on the device: labels, teachers' logits (N, K), or None
    where nobody teaches, and which of the K outputs are whose."""

    def __init__(self, run, dataset, teacher_logits):
        self.dataset, tasks = dataset, dataset.tasks
        self.has_teacher = teacher_logits is not None
        self.labels = run.to_device(dataset.labels)
        self.teacher = run.to_device(teacher_logits) if self.has_teacher else self.labels  # λ is 1 then: any will do
        self.task_ids = run.to_device(dataset.task_ids).long()
        self.owner = run.to_device(np.repeat(np.arange(len(tasks)), [task.num_outputs for task in tasks]))
        self.regression = run.to_device(np.array([task.is_regression for task in tasks]))

    def loss(self, logits, rows, gold_weight):
        """The summed loss of the examples `rows` (B,), given their logits (B, K)."""
        task = self.task_ids[rows]
        weight = torch.full((), gold_weight, device=logits.device)
        own = self.owner == task[:, None]
        return distillation_loss(
            logits, self.labels[rows], self.teacher[rows], weight, own, self.regression[task]
        ).sum()


def dropout_seed(seed, step):
    """Each step of each process draws dropout of its own, so a resumed run needs no generator's state."""
    return (seed + step + RANK * 1_000_003) % 2**32


def logits_of(model, run, dataset, rows):
    """Run the model on the examples `rows` of a dataset: (logits, Batch). pack sorts by length, so logits[i] belong to
    batch.rows[i], not to rows[i]."""
    batch = pack(dataset, rows)
    tokens = [run.to_device(array) for array in (batch.input_ids, batch.segment_ids, batch.position_ids)]
    with run.autocast():
        return model(*tokens, AttentionPlan(batch.cu_seqlens, model.config.num_attention_heads, run.to_device)), batch


def add_gradients(model, run, targets, rows, gold_weight, seed):
    """Add the gradient of the summed loss of the examples `rows` (B,) to the parameters'; return (loss, tokens).

    The gradient of a sum is the sum of the gradients: one part of the batch after the other bounds the memory."""
    torch.manual_seed(seed)
    loss, tokens = torch.zeros((), device=run.device), 0
    for part in glue_data.parts(targets.dataset, rows, run.tokens_at_once):
        logits, batch = logits_of(model, run, targets.dataset, part)
        part_loss = targets.loss(logits, run.to_device(batch.rows), gold_weight)
        part_loss.backward()
        loss, tokens = loss + part_loss.detach(), tokens + len(batch.input_ids)
    return loss, tokens


def add_gradients_within_memory(optimizer, model, run, *batch):
    """add_gradients, and where the device runs out of memory again, from then on in parts of half the size."""
    while True:
        try:
            return add_gradients(model, run, *batch)
        except torch.OutOfMemoryError:
            if run.tokens_at_once < 2 * MIN_TOKENS:
                raise
        run.tokens_at_once //= 2
        run.say(f"out of memory: from here on {run.tokens_at_once} tokens at once; the gradient is the same")
        optimizer.gradients.zero_()


def resume(optimizer, run, path, num_steps):
    """Restore the latest checkpoint and return its step, 0 where there is none. A damaged one is named, and the one
    before used."""
    present = [candidate for candidate in (path, one_before(path)) if run.exists(candidate)]
    for candidate in present:
        try:
            return optimizer.load(candidate, num_steps)
        except CheckpointError as error:
            run.say(f"{error}; going back to the one before it")
    if present:
        run.say(f"{path}: no checkpoint is whole; the training of this model starts again")
    return 0


def train(model, run, dataset, teacher_logits, recipe, seed, folder):
    """Train on a dataset of one or several tasks; teacher_logits (N, K), or None to learn from the labels alone.

    Progress goes to metrics.jsonl in `folder`, and every few minutes all that a repeated command needs to go on from
    there goes to training.safetensors.
    """
    sizes = np.bincount(dataset.task_ids)
    first_row = np.cumsum(sizes) - sizes
    num_steps = int(recipe.epochs * len(dataset) / recipe.batch_size)
    schedule = sample_schedule(sizes, num_steps, recipe.batch_size, recipe.exponent, seed)
    schedule = first_row[schedule[..., 0]] + schedule[..., 1]  # (num_steps, batch_size) rows of the whole dataset
    targets, optimizer = Targets(run, dataset, teacher_logits), Adam(model, recipe)
    start = resume(optimizer, run, folder / CHECKPOINT, num_steps)
    progress = Progress(run, folder, start, recipe, dataset, schedule)
    model.train()
    for step in range(start, num_steps):
        gold_weight = annealing_weight(step, num_steps, recipe.gold_weight, targets.has_teacher)
        share = schedule[step, RANK::WORLD]  # this process's part of the batch
        batch = targets, share, gold_weight, dropout_seed(seed, step)
        loss, tokens = add_gradients_within_memory(optimizer, model, run, *batch)
        if WORLD > 1:
            dist.all_reduce(optimizer.gradients)
        norm = optimizer.step(step, num_steps)
        progress.step(step, loss, norm, gold_weight, tokens)
        if run.time_to_save(step):
            progress.sync(step)
            run.write(optimizer.save, folder / CHECKPOINT, step + 1)
            run.stop_if_asked()
    progress.close()


class Progress:
    """Where training stands: metrics.jsonl, the same bits however often the run was interrupted; and for people one
    live line on a terminal, or a plain line now and then in a log, with speed and time left."""

    EVERY = 20  # steps; reading a number makes the host wait for the device

    def __init__(self, run, folder, start, recipe, dataset, schedule):
        self.run, self.start, self.recipe, self.dataset, self.schedule = run, start, recipe, dataset, schedule
        self.num_steps, self.norms = len(schedule), []
        self.stage = folder.relative_to(run.folder)
        self.began = self.shown = time.time()
        self.examples = self.tokens = 0
        path = folder / "metrics.jsonl"
        if RANK == 0:
            lines = read_file(path).split(b"\n")[:-1] if start and path.exists() else []  # a kill can leave half a line
            steps = [parse(line, f"{path}, line {number}", logged_step) for number, line in enumerate(lines, 1)]
            write_whole(path, b"".join(line + b"\n" for line, step in zip(lines, steps, strict=True) if step < start))
        self.metrics = open(path if RANK == 0 else os.devnull, "a", encoding="utf-8")

    def step(self, step, loss, norm, gold_weight, tokens):
        self.examples += self.recipe.batch_size
        self.tokens += tokens * WORLD
        self.norms.append(norm)
        log = step % self.EVERY == 0 or step + 1 == self.num_steps
        if log or norm.device.type == "cpu":
            self.check(step)
        if not log:
            return
        if WORLD > 1:
            dist.all_reduce(loss)
        values = {"step": step, "loss": loss.item() / self.recipe.batch_size, "gradient_norm": norm.item()}
        values |= {"learning_rate": learning_rate(step, self.num_steps, self.recipe), "gold_weight": gold_weight}
        self.metrics.write(json.dumps(values) + "\n")
        self.metrics.flush()
        now = time.time()
        if now - self.shown >= (0.2 if self.run.live else 30) or step + 1 == self.num_steps:
            self.shown = now
            self.show(step, values, now - self.began)

    def check(self, step):
        """Raise TrainingError if a gradient since the last check, up to and with `step`, was not finite."""
        norms, self.norms = torch.stack(self.norms or [torch.zeros(())]).tolist(), []
        for at, norm in enumerate(norms, step + 1 - len(norms)):
            if not math.isfinite(norm):
                rate = learning_rate(at, self.num_steps, self.recipe)
                problem = f"{self.stage}, step {at}: the gradient's norm is {norm}, at learning rate {rate:.1e}"
                rows = glue_data.where(self.dataset, self.schedule[at])
                raise TrainingError(f"{problem}; nothing of it was saved. The step's rows: {rows}")

    def sync(self, step):
        """Before a checkpoint: nothing bad gets into it, and metrics.jsonl on the disk reaches as far."""
        self.check(step)
        self.metrics.flush()
        if RANK == 0:
            os.fsync(self.metrics.fileno())

    def show(self, step, values, seconds):
        left = seconds / (step + 1 - self.start) * (self.num_steps - step - 1)
        self.run.say(
            f"{self.stage}  step {step + 1}/{self.num_steps}  loss {values['loss']:.3f}  "
            f"lr {values['learning_rate']:.1e}  λ {values['gold_weight']:.2f}  {self.examples / seconds:.0f} ex/s  "
            f"{self.tokens / seconds:.0f} tok/s  {left / 60:.0f} min left",
            live=step + 1 < self.num_steps,
        )

    def close(self):
        self.metrics.close()


def logged_step(entry):
    if type(entry["step"]) is not int:
        raise ValueError(f"step {entry['step']!r}")
    return entry["step"]


# ---------------------------------------------------------------------------------------------------------- predicting


@torch.no_grad()
def predict(model, run, dataset, task):
    """One task's logits (N, its outputs) for every example of a dataset, dropout off, in the dataset's order."""
    model.eval()
    outputs = torch.zeros(len(dataset), task.num_outputs, device=run.device)
    for rows in glue_data.parts(dataset, np.arange(len(dataset)), run.tokens_at_once)[RANK::WORLD]:
        if WORLD == 1:  # else the others would wait for this one
            run.stop_if_asked()
        logits, batch = logits_of(model, run, dataset, rows)
        outputs[run.to_device(batch.rows)] = logits[:, model.columns[task.name]]
    if WORLD > 1:
        dist.all_reduce(outputs)
    return outputs.cpu().numpy()


def evaluate(model, run, tasks, folder):
    """Predict every dev split, write the predictions, and return {task: {split: {metric: percent}}}."""
    scores = {}
    for task in tasks:
        scores[task.name] = {}
        for split, _ in task.dev:
            dataset = run.data[task.name][split]
            logits = predict(model, run, dataset, task)
            score = glue_data.score(task, logits, dataset.labels)
            # JSON has no NaN, which a correlation with a constant is.
            scores[task.name][split] = {name: None if np.isnan(value) else value for name, value in score.items()}
            words = glue_data.answers(task, logits)
            run.write(write_whole, folder / f"{task.name}.{split}.tsv", glue_data.predictions_tsv(words))
            shown = f"{task.metrics[0]} {score[task.metrics[0]]:.1f}"
            collapsed = f", a collapsed run: every answer is {words[0]}" if len(set(words)) == 1 else ""
            run.say(f"{folder.relative_to(run.folder)}  {task.folder} {split} {shown}{collapsed}")
    return scores


# ---------------------------------------------------------------------------------------------------------- born again
# A student starts from a public checkpoint, not from its teacher's weights; in the paper from the same one, so that it
# has its teacher's architecture. What passes from one to the other is an array of logits, one row a training example.


def run_regime(run, name, trial, number=1):
    """Train a row of the table and return {task: folder of the model that has its head}.

    Its teachers come first, by recursion: --teachers copies of the teacher's row, the second and later ones in folders
    name-2, name-3, ..., which also give them their seeds.
    """
    regime = REGIMES[name]
    numbers = range(1, run.num_teachers + 1) if regime.teacher else ()
    teachers = [run_regime(run.teachers, regime.teacher, trial, other) for other in numbers]
    top = run.folder / f"trial-{trial}" / (name + run.suffix + (f"-{number}" if number > 1 else ""))
    recipe, models = run.multi_recipe if regime.multi else run.single_recipe, stages(run, regime, top)
    for folder, tasks in models.items():
        if not run.exists(folder / "scores.json"):
            train_stage(run, tasks, recipe, teachers, folder)
    return {task.name: folder for folder, tasks in models.items() for task in tasks}


def stages(run, regime, top):
    """{folder of a model: its tasks} of a row of the table."""
    return {top: run.tasks} if regime.multi else {top / task.name: [task] for task in run.tasks}


def train_stage(run, tasks, recipe, teachers, folder):
    """Train one model and leave its folder: weights, vocabulary, metrics, dev predictions, and, last, scores.json."""
    run.write(folder.mkdir, parents=True, exist_ok=True)
    seed = stage_seed(run, folder)
    if run.exists(folder / "model.safetensors"):
        model = load_trained(folder, tasks).to(run.device)
    else:
        torch.manual_seed(seed)
        model = load_pretrained(run.checkpoint, {task.name: task.num_outputs for task in tasks}).to(run.device)
        teacher_logits = (
            side_by_side([average_teacher(run.teachers, task, teachers) for task in tasks]) if teachers else None
        )
        dataset = mix([run.data[task.name]["train"] for task in tasks])
        train(model, run, dataset, teacher_logits, recipe, seed, folder)
        run.write(shutil.copyfile, run.checkpoint / "vocab.txt", folder / "vocab.txt")
        run.write(save_pretrained, model, folder, heads={task.name: task.labels for task in tasks})
    scores = evaluate(model, run, tasks, folder)
    for checkpoint in (folder / CHECKPOINT, one_before(folder / CHECKPOINT)):
        run.write(checkpoint.unlink, missing_ok=True)
    run.write(write_whole, folder / "scores.json", to_json(scores))


def load_trained(folder, tasks):
    """The model that an earlier stage has left, which has to have heads for the tasks."""
    model = load_pretrained(folder)
    for task in tasks:
        if model.num_outputs.get(task.name) != task.num_outputs:
            problem = f"{model.num_outputs.get(task.name, 'no')} outputs for {task.name}; expected {task.num_outputs}"
            raise CheckpointError(f"{folder / bert.WEIGHTS[0]}: {problem}")
    return model


def teacher_outputs(run, task, folder):
    """A teacher's logits (N, outputs) on its own training set, row by row; both orders of the symmetric tasks."""
    path = folder / f"{task.name}.train-logits.npy"
    if not run.exists(path):
        logits = predict(load_trained(folder, [task]).to(run.device), run, run.data[task.name]["train"], task)
        run.write(write_whole, path, logits)
    shape = run.data[task.name]["train"].labels.shape
    try:
        logits = np.load(path)
        if (logits.dtype, logits.shape) != (np.float32, shape) or not np.isfinite(logits).all():
            raise ValueError(f"holds {logits.shape} of {logits.dtype}, or not finite")
        return logits
    except Exception as error:  # a damaged array raises whatever it stumbles over
        raise UsageError(
            f"{path}: cannot be used ({error}); expected a teacher's logits, {shape}; delete it"
        ) from error


def average_teacher(run, task, teachers):
    """Logits (N, outputs) whose softmax is the mean of the teachers' distributions; or the mean of their scores."""
    logits = torch.tensor(np.stack([teacher_outputs(run, task, folders[task.name]) for folders in teachers]))
    if task.is_regression or len(teachers) == 1:
        return logits.mean(0).numpy()
    return (logits.log_softmax(-1).logsumexp(0) - np.log(len(teachers))).numpy()


def stage_seed(run, folder):
    """A seed for every stage of every trial; else a student would share its teacher's batches and dropout."""
    name = f"{run.seed}/{folder.relative_to(run.folder).as_posix()}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") >> 1


# --------------------------------------------------------------------------------------------------- the paper's table


def collect(run, trials):
    """{regime: [each trial's {task: {split: {metric: percent}}}]} of the rows that are finished in every trial."""
    results = {}
    for name, regime in ROWS.items():
        tops = [run.folder / f"trial-{trial}" / name for trial in range(1, trials + 1)]
        trials_models = [stages(run, regime, top) for top in tops]
        if all((folder / "scores.json").exists() for models in trials_models for folder in models):
            results[name] = [
                dict(item for folder, tasks in models.items() for item in read_scores(folder, tasks).items())
                for models in trials_models
            ]
    return results


def read_scores(folder, tasks):
    """{task: {split: {metric: percent, or None}}} of a model of these tasks, and of nothing else."""

    def percent(value):
        if value is not None and not (type(value) in (int, float) and abs(value) < 101):
            raise ValueError(f"{value!r} is not percent")
        return value

    def known(scores):
        return {
            task.name: {
                split: {metric: percent(scores[task.name][split][metric]) for metric in task.metrics}
                for split, _ in task.dev
            }
            for task in tasks
        }

    return read_json(folder / "scores.json", known)


def columns_of_table(run, trials):
    """[Avg, each task]: the paper's metric over the trials; the average is taken within each trial."""
    rows = [[scores[task.name][task.dev[0][0]][task.metrics[0]] for scores in trials] for task in run.tasks]
    tasks = np.array(rows, float)
    return [tasks.mean(0), *tasks]


def table(run, results):
    """The paper's table with this run's rows; over several trials the median, the spread and p against Single."""
    rows = [["Model", "Avg", *(task.folder for task in run.tasks)]]
    single = columns_of_table(run, results["single"]) if "single" in results else None
    for name, result in results.items():
        columns = columns_of_table(run, result)
        rows.append([ROWS[name].label, *(f"{np.median(column):.1f}" for column in columns)])
        if len(columns[0]) > 1:
            rows.append(["  min to max", *(f"{min(column):.1f}–{max(column):.1f}" for column in columns)])
            if single and name != "single":
                p_values = map(glue_data.mann_whitney_p, columns, single)
                rows.append(["  p against Single", *(f"{p:.3f}" for p in p_values)])
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    metrics = ", ".join(f"{task.folder} {task.metrics[0]}" for task in run.tasks)
    return "\n".join([*lines, "", f"GLUE dev, percent: {metrics}."]) + "\n"


def submit(run, folders, folder):
    """Predict every test split that is there and write the leaderboard's zip; say which of its files are missing."""
    path = folder / "submission.zip"
    if run.exists(path):
        return
    predictions, missing, loaded = {}, [], None
    for task in glue_data.TASKS.values():
        for name, _ in task.test:
            if name == "WNLI" and run.wnli_test_rows and task not in run.tasks:
                predictions[name] = ["0"] * run.wnli_test_rows  # the majority class, as in the paper
            elif task in run.tasks and name in run.data[task.name]:
                if folders[task.name] != loaded:  # one model in memory at a time
                    loaded = folders[task.name]
                    model = load_trained(loaded, [task]).to(run.device)
                logits = predict(model, run, run.data[task.name][name], task)
                predictions[name] = glue_data.answers(task, logits)
            else:
                missing.append(name)
    run.write(write_whole, path, glue_data.submission_zip(predictions))
    incomplete = f"; not in it, so the leaderboard would refuse it: {', '.join(missing)}" if missing else ""
    run.say(f"{path}: {len(predictions)} of 11 files{incomplete}")


# ------------------------------------------------------------------------------------------- what a finished run is for


def finished_models(args):
    """{task: folder of its model} of a run directory: trial 1 of --regime or, without it, of the last row there."""
    folders, tasks = {}, glue_data.resolve(args.task)
    for name in regimes_of(args.regime, tasks) if args.regime else REGIMES:  # later rows replace earlier ones
        for path in sorted(Path(args.out).glob(f"trial-1/{name}/**/scores.json")):
            tasks = read_json(path, lambda scores: [glue_data.TASKS[name].name for name in scores])
            folders |= dict.fromkeys(tasks, path.parent)
    if not folders:
        raise UsageError(f"{args.out}: no finished model there; expected the run directory of an earlier command")
    return folders


def own_text(args, task):
    """The sentences that --text and --text2, or --predict, give: (first, second or None)."""
    if args.predict:
        data = sys.stdin.buffer.read() if args.predict == "-" else read_file(Path(args.predict))
        return glue_data.read_sentences(task, data, args.predict)
    texts = [text for text in (args.text, args.text2) if text is not None]
    if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
        raise UsageError("--text: is not UTF-8")
    if len(texts) != len(task.text):
        raise UsageError(f"{task.name} takes {len(task.text)} text(s): --text{' and --text2' * (len(task.text) - 1)}")
    return texts[:1], texts[1:] or None


def predict_text(args):
    """Print label and probability, or score, for each row of somebody's own text."""
    tasks, folders = glue_data.resolve(args.task), finished_models(args)
    if len(tasks) != 1 or tasks[0].name not in folders:
        raise UsageError(f"--task: no model of {args.task!r} in {args.out}; there are {', '.join(folders)}")
    task, folder = tasks[0], folders[tasks[0].name]
    first, second = own_text(args, task)
    model, labels, tokenizer = trained_head(folder, task)
    lengths = range(8, model.config.max_position_embeddings + 1)
    max_length = read_json(
        Path(args.out) / "config.json", lambda run: lengths[lengths.index(run["single"]["max_length"])]
    )
    unknown, lines = np.zeros((len(first), 1), np.float32), np.arange(len(first), dtype=np.int32)
    dataset = glue_data.make_dataset(task, first, second, unknown, lines, tokenizer, max_length)
    device = Device(args)
    logits = predict(model.to(device.device), device, dataset, task)
    print("prediction\tprobability" if labels else "prediction")
    answers = glue_data.answers(replace(task, labels=labels), logits)
    for word, p in zip(answers, torch.tensor(logits).softmax(-1).amax(-1), strict=True):
        print(f"{word}\t{p:.4f}" if labels else word)


def trained_head(folder, task):
    """(model, its label words, none for a score, and its tokenizer) of a finished model."""
    model = load_trained(folder, [task])

    def words(config):
        labels = config.get("heads", {}).get(task.name, task.labels)
        fit = len(labels) == len(set(labels)) and (len(labels) or 1) == task.num_outputs
        if isinstance(labels, str) or not fit or not all(word.isprintable() for word in labels):
            raise ValueError(f"labels {labels!r} for {task.num_outputs} outputs")
        return tuple(labels)

    return model, read_json(folder / "config.json", words), read_tokenizer(folder, model.config)


def export(args):
    """Write each task's model, and the encoder of several tasks, as folders that Hugging Face loads."""
    for task, folder in finished_models(args).items():
        model, labels, _ = trained_head(folder, glue_data.TASKS[task])
        first = task == next(iter(model.num_outputs))
        for name, head in [(task, task)] + [("encoder", None)] * (first and len(model.num_outputs) > 1):
            target = Path(args.export) / name
            target.mkdir(parents=True, exist_ok=True)
            bert.export(model, target, head, labels)
            glue_data.save_tokenizer(folder / "vocab.txt", target, model.config.max_position_embeddings)
            print(target)


# --------------------------------------------------------------------------------------------------- the run directory


class UsageError(ValueError):
    """A command that cannot be carried out as given."""


def to_json(value):
    return json.dumps(value, indent=2) + "\n"


def read_file(path):
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error


def read_json(path, check):
    return parse(read_file(path), path, check)


def parse(data, place, check):
    """What `check` makes of JSON that an earlier command has left; it raises where that is somebody else's."""
    try:
        return check(bert.parse_json(data))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{place}: cannot be read ({error!r}); expected what an earlier command wrote") from error


def read_tokenizer(folder, config):
    tokenizer = glue_data.Tokenizer(folder / "vocab.txt")
    if tokenizer.size > config.vocab_size:
        found = f"{tokenizer.size} tokens; expected {config.vocab_size}, the rows of config.json's embedding"
        raise CheckpointError(f"{folder / 'vocab.txt'}: {found}")
    return tokenizer


def write_whole(path, content):
    """Write text, bytes or an array so that the file appears whole or not at all."""
    with bert.whole(path) as file:
        if isinstance(content, np.ndarray):
            np.save(file, content)
        else:
            file.write(content.encode() if isinstance(content, str) else content)


class Device:
    """Where and how precisely the model computes."""

    def __init__(self, args):
        self.device = device_of(args.device)
        on_cuda = self.device.type == "cuda"
        self.bfloat16 = on_cuda if args.precision == "auto" else args.precision == "bfloat16"
        bert.COMPILE = on_cuda if args.compile is None else args.compile
        self.wants_varlen = on_cuda and self.bfloat16 and args.varlen
        bert.VARLEN = self.wants_varlen and bert.varlen_works(self.device)
        self.tokens_at_once = CUDA_TOKENS if on_cuda else CPU_TOKENS
        self.signals = []  # asking to stop

    def to_device(self, array):
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.bfloat16 else contextlib.nullcontext()

    def ask_to_stop(self, signal_number, _):
        """Stop at the next step, with everything saved; asked a second time, at once."""
        self.signals.append(signal_number)
        signal.signal(signal_number, signal.SIG_DFL)

    def stop_if_asked(self):
        if self.signals:
            raise KeyboardInterrupt


class Run(Device):
    """What every stage of a run shares: its folder, data, checkpoint and recipes."""

    def __init__(self, args):
        super().__init__(args)
        self.tasks, self.seed, self.folder = glue_data.resolve(args.task), args.seed, Path(args.out)
        self.single_recipe, self.multi_recipe = recipes(args)
        self.num_teachers = args.teachers
        self.regimes = regimes_of(args.regime, self.tasks)
        self.live = sys.stdout.isatty() and RANK == 0
        self.save_seconds, self.save_steps, self.saved_at = args.save_minutes * 60, args.save_steps, time.time()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.log = open(self.folder / "log.txt" if RANK == 0 else os.devnull, "a", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{self.folder}: cannot be written ({error.strerror}); --out names another") from error
        if self.wants_varlen and not bert.VARLEN:
            self.say("FlashAttention does not do here what is expected of it: attention runs in padded buckets")
        self.limit, self.suffix, self.teachers = args.limit, "", self
        if args.demo:
            self.data_folder, checkpoint = self.demo()
        else:
            self.data_folder, checkpoint = Path(args.data), checkpoint_folder(args.checkpoint)
            self.write(download, self.data_folder, checkpoint, args.checkpoint)
        self.open_checkpoint(checkpoint)
        if args.teacher_checkpoint:
            self.teachers, checkpoint = copy.copy(self), checkpoint_folder(args.teacher_checkpoint)
            self.teachers.suffix = "-teacher"
            self.write(download, self.data_folder, checkpoint, args.teacher_checkpoint)
            self.teachers.open_checkpoint(checkpoint)
        self.check_sizes()
        self.refuse_other(self.identity())

    def demo(self):
        """Generated GLUE, its vocabulary and a tiny BERT of random weights: (data, checkpoint)."""
        data, checkpoint = self.folder / "demo" / "glue", self.folder / "demo" / "checkpoint"
        if not self.exists(checkpoint / "model.safetensors"):
            self.write(write_demo, data, checkpoint)
        return data, checkpoint

    def open_checkpoint(self, checkpoint):
        """Read and tokenize every split with its vocabulary, so that bad input is found before any work."""
        self.checkpoint, data, length = checkpoint, self.data_folder, self.single_recipe.max_length
        self.config = load_pretrained(checkpoint, {"": 1}).config
        tokenizer = read_tokenizer(checkpoint, self.config)
        if length > self.config.max_position_embeddings:
            raise UsageError(f"--max-length: the checkpoint has {self.config.max_position_embeddings} positions")
        self.say(f"reading {', '.join(task.folder for task in self.tasks)} from {data}")
        self.data = {}
        for task in self.tasks:
            tests = [split for split, file in task.test if (data / task.folder / file).exists()]
            splits = ("train", *dict(task.dev), *tests)
            self.data[task.name] = {split: self.read(task, split, tokenizer) for split in splits}
        wnli = glue_data.TASKS["wnli"]
        present = (data / wnli.folder / wnli.files["WNLI"]).exists()
        self.wnli_test_rows = len(glue_data.read_split(wnli, "WNLI", data).first) if present else 0

    def read(self, task, split, tokenizer):
        """A split, tokenized once: tokens/ keeps it for the same file, vocabulary, settings and code."""
        source, limit = self.data_folder / task.folder / task.files[split], self.limit if split == "train" else None
        arguments = task, split, self.data_folder, tokenizer, self.single_recipe.max_length, limit
        if not source.is_file():
            return glue_data.load_dataset(*arguments)  # which says what is wrong
        files = [file_digest(path) for path in (source, self.checkpoint / "vocab.txt", Path(glue_data.__file__))]
        key = hashlib.sha256(repr((task, split, arguments[4:], files, tokenizers.__version__)).encode()).hexdigest()
        path = self.folder / "tokens" / f"{task.name}-{split}-{key[:16]}.safetensors"
        if self.exists(path):
            with contextlib.suppress(CheckpointError):  # damaged
                return glue_data.Dataset((task,), **{k: v.numpy() for k, v in bert.read_safetensors(path).items()})
        dataset = glue_data.load_dataset(*arguments)
        arrays = {entry.name: torch.from_numpy(getattr(dataset, entry.name)) for entry in fields(dataset)[1:]}
        self.write(path.parent.mkdir, exist_ok=True)
        self.write(bert.write_safetensors, path, arrays)
        return dataset

    def check_sizes(self):
        """Every model that will be trained gets at least one step."""
        names = {*self.regimes, *(REGIMES[name].teacher for name in self.regimes)} - {None}
        several = {REGIMES[name].multi for name in names}
        groups = [([task], self.single_recipe) for task in self.tasks] * (False in several)
        for group, recipe in groups + [(self.tasks, self.multi_recipe)] * (True in several):
            rows = sum(len(self.data[task.name]["train"]) for task in group)
            if int(recipe.epochs * rows / recipe.batch_size) < 1:
                names = ", ".join(task.folder for task in group)
                steps = f"{recipe.epochs:g} epochs in batches of {recipe.batch_size} are less than one step"
                raise UsageError(f"{names}: {rows} training rows, {steps}")

    def identity(self):
        """What decides the numbers (but for dropout's draws, which the number of processes decides too), so that stages
        of different runs never mix. Files by what they are, wherever they lie."""
        names, data = ("config.json", "vocab.txt", *bert.WEIGHTS), self.data_folder
        files = {f"{t.folder}/{file}": data / t.folder / file for t in self.tasks for file in t.files.values()}
        files |= {name: self.checkpoint / name for name in names}
        if self.teachers is not self:
            files |= {f"teacher/{name}": self.teachers.checkpoint / name for name in names}
        return {
            "tasks": [task.name for task in self.tasks],
            "seed": self.seed,
            "teachers": self.num_teachers,
            "limit": self.limit,
            "precision": "bfloat16" if self.bfloat16 else "float32",
            "single": asdict(self.single_recipe),
            "multi": asdict(self.multi_recipe),
            "files": {name: file_digest(path) for name, path in files.items() if path.is_file()},
        }

    def refuse_other(self, identity):
        """Write config.json, or hold the one that is there against this command's."""
        path = self.folder / "config.json"
        if not self.exists(path):
            self.write(write_whole, path, to_json(identity))
        old, new = read_json(path, lambda run: dict(leaves(run))), dict(leaves(identity))
        names = [name for name in {**old, **new} if old.get(name, "nothing") != new.get(name, "nothing")]
        if names:
            lines = [
                f"  {name}: {old.get(name, 'nothing')!r} there, {new.get(name, 'nothing')!r} here" for name in names
            ]
            problem = "this folder holds another run; name a new one with --out"
            raise UsageError("\n".join([f"{path}: {problem}", *lines]))

    def write(self, action, *args, **kwargs):
        """Let rank 0 act, and the others wait."""
        if RANK == 0:
            action(*args, **kwargs)
        if WORLD > 1:
            dist.barrier()

    def exists(self, path):
        """Whether rank 0 finds the file: each process asks at a moment of its own, and all must act alike."""
        found = torch.tensor(path.exists(), dtype=torch.int32, device=self.device)
        if WORLD > 1:
            dist.broadcast(found, 0)
        return bool(found)

    def say(self, line, live=False):
        """Print a line; a live one is overwritten by the next, and kept out of the log file."""
        if RANK == 0:
            live = live and self.live
            if live:  # a line that wraps could not be overwritten
                line = line[: shutil.get_terminal_size().columns - 1]
            end = "" if live else "\n"
            print(("\r\033[K" if self.live else "") + line, end=end, flush=True)
            if not live:
                print(line, file=self.log, flush=True)

    def time_to_save(self, step):
        """Whether minutes or steps have passed, or somebody asked to stop; every process gets the same answer."""
        on_time = time.time() - self.saved_at > self.save_seconds
        code = 2 if self.signals else int(on_time or (step + 1) % self.save_steps == 0)
        if WORLD > 1:
            if self.device.type == "cuda" and step % Progress.EVERY:  # agreeing makes the host wait for the device
                return False
            agreed = torch.tensor(code, device=self.device)
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
            code = int(agreed)
        if code == 2 and not self.signals:  # another process was asked
            self.signals.append(signal.SIGTERM)
        if code:
            self.saved_at = time.time()
        return code > 0


def write_demo(data, checkpoint):
    """A small GLUE, its vocabulary, and a tiny BERT of random weights; small position and segment embeddings, so that a
    word looks the same wherever it stands, as pre-training would have taught it."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    vocab_size = glue_data.write_demo(data, checkpoint / "vocab.txt")
    torch.manual_seed(0)
    model = MultiTaskBert(BertConfig(vocab_size, 64, 2, 4, 128, 64, 2, 0.0, 0.0, initializer_range=0.2), {"": 1})
    for table in (model.position_embeddings, model.segment_embeddings):
        table.weight.data.mul_(0.2)
    save_pretrained(model, checkpoint)


def leaves(tree, prefix=""):
    """(dotted name, value) of nested dicts."""
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]


def file_digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------------------------------------- the command


def device_of(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device: {name!r} cannot be used ({str(error).splitlines()[0]})") from error


def regimes_of(names, tasks):
    """--regime to a list of names; by default the student's row with several tasks and Single with one."""
    if names is None:
        return ["single-multi" if len(tasks) > 1 else "single"]
    wanted = list(REGIMES) if names == "all" else names.split(",")
    for name in wanted:
        if name not in REGIMES:
            raise UsageError(f"--regime: unknown regime {name!r}; known: all, {', '.join(REGIMES)}")
    return wanted


def checkpoint_folder(name):
    """A folder that is there, or where a public checkpoint of this name is kept."""
    return Path(name) if Path(name).is_dir() else Path("checkpoints") / name


def download(data, checkpoint, name):
    """Run download_glue.sh, all the network code there is, for what is not there, or was broken off."""
    wanted = []
    if not data.is_dir() or (data / ".download").exists():
        wanted.append(["glue", str(data)])
    if not Path(name).is_dir() and not any((checkpoint / file).exists() for file in bert.WEIGHTS):
        wanted.append(["checkpoint", name, str(checkpoint)])
    script = Path(__file__).with_name("download_glue.sh")
    for arguments in wanted:
        if subprocess.run(["bash", str(script), *arguments], env={**os.environ, "PYTHON": sys.executable}).returncode:
            raise UsageError(f"{script.name} {' '.join(arguments)} failed, as said above; --demo needs no download")


def recipes(args):
    """SINGLE and MULTI with what the flags override: one value for both, or two with a comma between."""
    single, multi = SINGLE, MULTI
    if args.demo:
        single, multi = replace(single, **DEMO_SINGLE), replace(multi, **DEMO_MULTI)
    flags = {entry: getattr(args, entry.name) for entry in fields(Recipe)}
    given = {entry.name: read_setting(entry, text) for entry, text in flags.items() if text is not None}
    single = replace(single, **{name: values[0] for name, values in given.items()})
    multi = replace(multi, **{name: values[-1] for name, values in given.items()})
    if single.max_length != multi.max_length:
        raise UsageError("--max-length: teachers and student read the same rows; expected one value")
    return single, multi


RANGES = {"batch_size": (1, 1e6), "max_length": (8, 1e6), "epochs": (1e-9, 1e6), "clip_norm": (1e-9, 1e9),
          "gold_weight": (0, 1), "warmup": (0, 1)}  # fmt: skip


def flag_of(entry):
    return "--" + entry.name.replace("_", "-")


def read_setting(entry, text):
    """A recipe flag to its one or two values."""
    flag, (low, high), values = flag_of(entry), RANGES.get(entry.name, (0, 1e9)), []
    for word in text.split(","):
        if entry.name == "gold_weight" and word == "anneal":
            values.append(None)
            continue
        try:
            values.append(int(word) if entry.type is int else float(word))
        except ValueError:
            raise UsageError(f"{flag}: {word!r} is not {'a whole' if entry.type is int else 'a'} number") from None
        if not low <= values[-1] <= high:
            raise UsageError(f"{flag}: {word} is not from {low:g} to {high:g}")
    if len(values) > 2:
        raise UsageError(f"{flag}: {text!r}; expected one value, or two: single,multi")
    return values


def build_parser():
    parser = argparse.ArgumentParser(
        "bam.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_training_flags(parser)
    add = parser.add_argument_group("with a finished run", "--out names it, and --task the head").add_argument
    add("--predict", metavar="FILE", help="label a TSV of one's own, - for standard input")
    add("--text", help="label one text, or with --text2 one pair")
    add("--text2")
    add("--export", metavar="FOLDER", help="write the encoder and each task's model for Hugging Face")
    add = parser.add_argument_group("recipe", "one value for both, or single,multi").add_argument
    for entry in fields(Recipe):
        shown = [getattr(recipe, entry.name) for recipe in (SINGLE, MULTI)]
        default = ",".join(dict.fromkeys("anneal" if value is None else f"{value:g}" for value in shown))
        why = entry.metadata["why"].replace("%", "%%")
        add(flag_of(entry), metavar="X", help=f"{why} (default {default})")
    return parser


def add_training_flags(parser):
    add = parser.add_argument_group("what is trained").add_argument
    add("--task", default="all", help="all, or names with commas between: " + ", ".join(glue_data.TASKS))
    rows = ", ".join(REGIMES)
    add("--regime", help=f"rows of the table: all, or {rows} (default single-multi, or single for one task)")
    add("--trials", type=int, default=1, help="repeat over seeds; report median, spread and Mann-Whitney p (default 1)")
    add("--teachers", type=int, default=1, help="so many seeds of each teacher, their outputs averaged (default 1)")
    add("--seed", type=int, default=0, help="trial 1's; every stage of every trial derives its own (default 0)")
    add("--limit", type=int, help="at most so many rows of each training set, evenly spaced (default: all)")
    add = parser.add_argument_group("files").add_argument
    add("--demo", action="store_true", help="generated data and a tiny BERT: no download, two minutes")
    add("--data", help="the GLUE folder; downloaded if it is not there (default glue_data)")
    add("--checkpoint", help="a folder, or a public name (default google-bert/bert-base-uncased)")
    add("--teacher-checkpoint", help="another one for the teachers: only their outputs reach the student")
    add("--out", help="run directory; repeating the command goes on there (default runs/TASK)")
    add("--save-minutes", type=float, default=5, help="between two checkpoints inside a stage (default 5)")
    add("--save-steps", type=int, default=10**9, help="the same in steps, whichever comes first (default: never)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="cuda, cpu, mps (default: cuda where there is one)")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 autocast on CUDA")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the fused ops (default: on CUDA)")
    add("--no-varlen", action="store_false", dest="varlen", help="CUDA: attention in padded buckets")


def parse_args(argv):
    args = build_parser().parse_args(argv)
    if min(args.trials, args.teachers, args.save_steps, 1 if args.limit is None else args.limit) < 1:
        raise UsageError("--trials, --teachers, --save-steps and --limit: expected at least 1")
    if args.demo and (args.data or args.checkpoint):
        raise UsageError("--demo makes its own data and checkpoint; --data and --checkpoint are for real ones")
    args.data = args.data or "glue_data"
    args.checkpoint = args.checkpoint or "google-bert/bert-base-uncased"
    args.out = args.out or f"runs/{'demo' if args.demo else args.task.replace(',', '-')}"
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.export:
        return export(args)
    if args.predict or args.text is not None or args.text2 is not None:
        return predict_text(args)
    if WORLD > 1:
        join_processes(device_of(args.device))
    run = Run(args)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, run.ask_to_stop)
    for trial in range(1, args.trials + 1):
        for name in run.regimes:
            submit(run, run_regime(run, name, trial), run.folder / f"trial-{trial}" / name)
    results = collect(run, args.trials)
    run.write(write_whole, run.folder / "results.json", to_json(results))
    run.write(write_whole, run.folder / "table.txt", table(run, results))
    run.write(draw, run)
    run.say("\n" + table(run, results))
    if WORLD > 1:
        dist.destroy_process_group()


def join_processes(device):
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Hours, since rank 0 may download while the others wait.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=6))


def draw(run):
    """The picture comes last, and a finished run does not fail for it."""
    try:
        figure.draw(run.folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        run.say(f"no figure.svg: {error!r}")


def command(argv=None):
    """main with errors as one line on stderr; returns the exit status."""
    try:
        main(argv)
        return 0
    except (UsageError, DataError, CheckpointError) as error:
        print(f"bam.py: error: {str(error)[:10_000]}", file=sys.stderr)  # it may quote a file
        return 2
    except (TrainingError, OSError, torch.OutOfMemoryError) as error:  # OSError: a full disk
        print(f"bam.py: error: {error}\nbam.py: the same command goes on from the last checkpoint", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "Connection" in str(error)):  # gloo's has no class of its own
            raise
        print(f"bam.py: error: process {RANK} lost another one, whose own message says why", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nbam.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(command())
