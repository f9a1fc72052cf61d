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
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
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
    """Every hyper-parameter, with its reason. Values are the original's defaults for one task (bam/configure_*.py)."""

    learning_rate: float = setting(5e-5, "peak rate; the multi-task model sees larger batches of harder mixtures")
    batch_size: int = setting(32, "examples a step; a mixed batch should hold every task")
    epochs: float = setting(3.0, "passes over all rows; distillation has more to learn from than labels")
    warmup: float = setting(0.1, "part of the steps over which the rate rises from 0: Adam has no bias correction here")
    layer_decay: float = setting(0.9, "α: each layer learns this much slower than the one above; low ones are general")
    weight_decay: float = setting(0.01, "decoupled; not on biases and LayerNorm")
    clip_norm: float = setting(1.0, "largest norm of a batch's summed gradient; active at nearly every step")
    exponent: float = setting(0.75, "tasks are sampled with p ∝ size^this: 1 by size, 0 all alike")
    gold_weight: float | None = setting(None, "λ: 'anneal' for step / num_steps, or a constant, 0 teacher to 1 gold")
    max_length: int = setting(128, "tokens an example is cut to; few GLUE examples are longer")


SINGLE = Recipe()
MULTI = Recipe(learning_rate=1e-4, batch_size=128, epochs=6.0)
# The demo starts from random weights, none more general than another, and has few rows: more and bolder steps.
DEMO_SINGLE = dict(learning_rate=1e-3, layer_decay=1.0, max_length=64, batch_size=16, epochs=4.0)
DEMO_MULTI = dict(learning_rate=1e-3, layer_decay=1.0, max_length=64, epochs=5.0)


@dataclass(frozen=True)
class Regime:
    """A row of the paper's table: who is trained, and on whose outputs."""

    label: str
    multi: bool  # one student for all tasks, or one for each
    teacher: str | None = None  # the regime whose models teach; None: gold labels alone


REGIMES = {
    "single": Regime("Single", multi=False),
    "multi": Regime("Multi", multi=True),
    "single-single": Regime("Single→Single", multi=False, teacher="single"),
    "multi-multi": Regime("Multi→Multi", multi=True, teacher="multi"),
    "single-multi": Regime("Single→Multi", multi=True, teacher="single"),  # BAM
}

# ------------------------------------------------------------------------------------- the idea (the paper, section 3)


def annealing_weight(step, num_steps, gold_weight=None, has_teacher=True):
    """λ, the weight of the gold labels: 0 … (N − 1) / N as training goes, or a constant. 1 where nobody teaches."""
    if not has_teacher:
        return 1.0
    return step / num_steps if gold_weight is None else gold_weight


@fused
def distillation_loss(logits, labels, teacher_logits, gold_weight, own, regression):
    """Each example's loss (B,) against λ · gold + (1 − λ) · teacher. The caller sums: the original's sum, not a mean.

    logits, labels, teacher_logits: (B, K), all tasks' outputs side by side; own: (B, K), which of them belong to the
    example's task; regression: (B,), whether that task is a score; gold_weight: λ, 0-dimensional. Cross-entropy with
    the teacher's softmax at temperature 1, or squared error with its score, as the original's task_specific modules.
    """
    others = ~own
    teacher_probabilities = teacher_logits.masked_fill(others, -torch.inf).softmax(-1)
    teacher = torch.where(regression[:, None], teacher_logits, teacher_probabilities)
    target = gold_weight * labels + (1 - gold_weight) * teacher
    log_probabilities = logits.masked_fill(others, -torch.inf).log_softmax(-1).masked_fill(others, 0)
    cross_entropy = -(target * log_probabilities).sum(-1)
    squared_error = (target - logits).masked_fill(others, 0).square().sum(-1)
    return torch.where(regression, squared_error, cross_entropy)


# -------------------------------------------------------------------------------------------------------- optimization


def learning_rate(step, num_steps, recipe, layers_below_head=0):
    """Linear warm-up from 0, linear decay to 0. The decay counts from step 0, so where warm-up ends the rate falls to
    0.9 of the peak. Times α for each layer below the head (bam/bert/optimization.py)."""
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
            return model.depth(item[0]), item[0].endswith("bias") or "norm" in item[0]

        named = sorted(model.named_parameters(), key=group)
        size, device = sum(parameter.numel() for _, parameter in named), named[0][1].device
        self.recipe = recipe
        self.values, self.gradients, self.mean, self.square = (torch.zeros(size, device=device) for _ in range(4))
        self.adam = torch.optim.AdamW([self.values], lr=0.0, betas=(0.9, 0.999), eps=1e-6, fused=True)
        self.adam.param_groups.clear()  # for the segments, added below
        end = 0
        for (depth, exempt), members in itertools.groupby(named, group):
            start = end
            for _, parameter in members:
                place = slice(end, end := end + parameter.numel())
                self.values[place] = parameter.detach().flatten()
                parameter.data = self.values[place].view_as(parameter)
                parameter.grad = self.gradients[place].view_as(parameter)
            layers_below_head = model.config.num_hidden_layers + 2 - depth
            self.add_segment(slice(start, end), layers_below_head, 0.0 if exempt else recipe.weight_decay)

    def add_segment(self, place, layers_below_head, weight_decay):
        """Parameters with one learning rate and one decay, as a single tensor."""
        segment = self.values[place]
        segment.grad = self.gradients[place]
        group = {"params": [segment], "weight_decay": weight_decay, "layers_below_head": layers_below_head}
        self.adam.add_param_group(group)
        # A count so high that the bias correction 1 - β^count is 1: BERT's Adam has none.
        count = torch.tensor(1e6, device=segment.device)
        self.adam.state[segment] = {"step": count, "exp_avg": self.mean[place], "exp_avg_sq": self.square[place]}

    def step(self, step, num_steps):
        """Update, zero the gradients, and return their norm before clipping (a tensor)."""
        norm = self.gradients.norm()
        self.gradients.mul_(self.recipe.clip_norm / norm.clamp(min=self.recipe.clip_norm))
        for segment in self.adam.param_groups:
            segment["lr"] = learning_rate(step, num_steps, self.recipe, segment["layers_below_head"])
        self.adam.step()
        self.gradients.zero_()
        return norm

    def save(self, path, step):
        tensors = {"values": self.values, "mean": self.mean, "square": self.square, "step": torch.tensor(step)}
        bert.write_safetensors(path, tensors)

    def load(self, path):
        """Restore what save wrote, and return its step."""
        saved = bert.read_safetensors(path)
        for name in ("values", "mean", "square"):
            getattr(self, name).copy_(saved[name])
        return int(saved["step"])


# -------------------------------------------------------------------------- training: one loop for teacher and student

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


class TrainingError(RuntimeError):
    """Training that cannot go on."""


class Targets:
    """What the logits of a dataset's examples are held against, on the device: labels, teachers' logits (N, K), or None
    where nobody teaches, and which of the K outputs are whose."""

    def __init__(self, run, dataset, teacher_logits):
        tasks = dataset.tasks
        self.has_teacher = teacher_logits is not None
        self.labels = run.to_device(dataset.labels)
        self.teacher = run.to_device(teacher_logits) if self.has_teacher else self.labels  # then of weight 0
        self.task_ids = run.to_device(dataset.task_ids).long()
        self.owner = run.to_device(np.repeat(np.arange(len(tasks)), [task.num_outputs for task in tasks]))
        self.regression = run.to_device(np.array([task.is_regression for task in tasks]))

    def loss(self, logits, rows, gold_weight):
        """The summed loss of the examples `rows` (B,), given their logits (B, K)."""
        task = self.task_ids[rows]
        weight = torch.tensor(gold_weight, device=logits.device)
        own = self.owner == task[:, None]
        return distillation_loss(
            logits, self.labels[rows], self.teacher[rows], weight, own, self.regression[task]
        ).sum()


def seed_dropout(seed, step):
    """Each step of each process draws dropout of its own, so a resumed run needs no generator's state."""
    torch.manual_seed((seed + step + RANK * 1_000_003) % 2**32)


def logits_of(model, run, dataset, rows):
    """Run the model on the examples `rows` of a dataset: logits (B, K), and the Batch, which orders the rows anew."""
    batch = pack(dataset, rows)
    tokens = [run.to_device(array) for array in (batch.input_ids, batch.segment_ids, batch.position_ids)]
    with run.autocast():
        return model(*tokens, AttentionPlan(batch.cu_seqlens, run.device)), batch


def train(model, run, dataset, teacher_logits, recipe, seed, folder):
    """Train on a dataset of one or several tasks; teacher_logits (N, K), or None to learn from the labels alone.

    Progress goes to metrics.jsonl in `folder`, and every few minutes all that a repeated command needs to go on from
    there goes to training.safetensors.
    """
    sizes = np.bincount(dataset.task_ids)
    first_row = np.cumsum(sizes) - sizes
    num_steps = int(recipe.epochs * len(dataset) / recipe.batch_size)
    schedule = sample_schedule(sizes, num_steps, recipe.batch_size, recipe.exponent, seed)
    targets, optimizer = Targets(run, dataset, teacher_logits), Adam(model, recipe)
    saved = folder / "training.safetensors"
    start = optimizer.load(saved) if run.exists(saved) else 0
    progress = Progress(run, folder, start, num_steps, recipe)
    model.train()
    for step in range(start, num_steps):
        seed_dropout(seed, step)
        gold_weight = annealing_weight(step, num_steps, recipe.gold_weight, targets.has_teacher)
        task, row = schedule[step, RANK::WORLD].T  # this process's share of the batch
        loss, tokens = torch.zeros((), device=run.device), 0
        if len(row):
            logits, batch = logits_of(model, run, dataset, first_row[task] + row)
            loss, tokens = targets.loss(logits, run.to_device(batch.rows), gold_weight), len(batch.input_ids)
            loss.backward()
        if WORLD > 1:
            dist.all_reduce(optimizer.gradients)
        norm = optimizer.step(step, num_steps)
        progress.step(step, loss.detach(), norm, gold_weight, tokens)
        if run.time_to_save():
            run.write(optimizer.save, saved, step + 1)
            run.stop_if_asked()
    progress.close()


class Progress:
    """Where training stands: metrics.jsonl, the same bits however often the run was interrupted; and for people one
    live line on a terminal, or a plain line now and then in a log, with speed and time left."""

    EVERY = 20  # steps; reading a number makes the host wait for the device

    def __init__(self, run, folder, start, num_steps, recipe):
        self.run, self.num_steps, self.start, self.recipe = run, num_steps, start, recipe
        self.stage = folder.relative_to(run.folder)
        self.began = self.shown = time.time()
        self.examples = self.tokens = 0
        path = folder / "metrics.jsonl" if RANK == 0 else Path(os.devnull)
        lines = path.read_text("utf-8").splitlines(keepends=True) if start and RANK == 0 else []
        self.metrics = open(path, "w", encoding="utf-8")
        self.metrics.writelines(line for line in lines if json.loads(line)["step"] < start)

    def step(self, step, loss, norm, gold_weight, tokens):
        self.examples += self.recipe.batch_size
        self.tokens += tokens * WORLD
        if step % self.EVERY and step + 1 < self.num_steps:
            return
        if WORLD > 1:
            dist.all_reduce(loss)
        values = {"step": step, "loss": loss.item() / self.recipe.batch_size, "gradient_norm": norm.item()}
        values |= {"learning_rate": learning_rate(step, self.num_steps, self.recipe), "gold_weight": gold_weight}
        if not np.isfinite([values["loss"], values["gradient_norm"]]).all():
            raise TrainingError(f"{self.stage}: loss or gradient is not finite: {values}")
        self.metrics.write(json.dumps(values) + "\n")
        self.metrics.flush()
        now = time.time()
        if now - self.shown >= (0.2 if self.run.live else 30) or step + 1 == self.num_steps:
            self.shown = now
            self.show(step, values, now - self.began)

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


# ---------------------------------------------------------------------------------------------------------- predicting


@torch.no_grad()
def predict(model, run, dataset, task, tokens_per_batch=8192):
    """One task's logits (N, its outputs) for every example of a dataset, dropout off, in the dataset's order."""
    model.eval()
    lengths = np.diff(dataset.offsets)
    order = np.argsort(-lengths, kind="stable")
    chunks = np.split(order, np.flatnonzero(np.diff(np.cumsum(lengths[order]) // tokens_per_batch)) + 1)
    outputs = torch.zeros(len(dataset), task.num_outputs, device=run.device)
    for rows in chunks[RANK::WORLD]:
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
            scores[task.name][split] = glue_data.score(task, logits, dataset.labels)
            words = glue_data.answers(task, logits)
            run.write(write_whole, folder / f"{task.name}.{split}.tsv", glue_data.predictions_tsv(words))
            score = f"{task.metrics[0]} {scores[task.name][split][task.metrics[0]]:.1f}"
            collapsed = f", a collapsed run: every answer is {words[0]}" if len(set(words)) == 1 else ""
            run.say(f"{folder.relative_to(run.folder)}  {task.folder} {split} {score}{collapsed}")
    return scores


# ---------------------------------------------------------------------------------------------------------- born again


def run_regime(run, name, trial, copy=1):
    """Train a row of the table, its teachers first, and return {task: folder of the model that has its head}.

    A teacher is a regime run first; of several teachers each is a copy of it with a seed of its own.
    """
    regime = REGIMES[name]
    copies = range(1, run.teachers + 1) if regime.teacher else ()
    teachers = [run_regime(run, regime.teacher, trial, other) for other in copies]
    top = run.folder / f"trial-{trial}" / (name if copy == 1 else f"{name}-{copy}")
    folders = {}
    for group in [run.tasks] if regime.multi else [[task] for task in run.tasks]:
        folder = top / ("" if regime.multi else group[0].name)
        if not run.exists(folder / "scores.json"):
            train_stage(run, group, run.multi if regime.multi else run.single, teachers, folder)
        folders |= {task.name: folder for task in group}
    return folders


def train_stage(run, tasks, recipe, teachers, folder):
    """Train one model and leave its folder: weights, vocabulary, metrics, dev predictions, and, last, scores.json."""
    run.write(folder.mkdir, parents=True, exist_ok=True)
    seed = stage_seed(run, folder)
    if run.exists(folder / "model.safetensors"):
        model = load_pretrained(folder).to(run.device)
    else:
        torch.manual_seed(seed)
        model = load_pretrained(run.checkpoint, {task.name: task.num_outputs for task in tasks}).to(run.device)
        teacher_logits = side_by_side([average_teacher(run, task, teachers) for task in tasks]) if teachers else None
        dataset = mix([run.data[task.name]["train"] for task in tasks])
        train(model, run, dataset, teacher_logits, recipe, seed, folder)
        run.write(shutil.copyfile, run.checkpoint / "vocab.txt", folder / "vocab.txt")
        run.write(save_pretrained, model, folder, heads={task.name: task.labels for task in tasks})
    scores = evaluate(model, run, tasks, folder)
    run.write(write_whole, folder / "scores.json", to_json(scores))
    run.write((folder / "training.safetensors").unlink, missing_ok=True)


def average_teacher(run, task, teachers):
    """Logits (N, outputs) whose softmax is the mean of the teachers' distributions; or the mean of their scores."""
    logits = torch.tensor(np.stack([teacher_outputs(run, task, folders[task.name]) for folders in teachers]))
    if task.is_regression or len(teachers) == 1:
        return logits.mean(0).numpy()
    return (logits.log_softmax(-1).logsumexp(0) - np.log(len(teachers))).numpy()


def stage_seed(run, folder):
    """Every stage of every trial has a seed of its own; else a Single→Single student would repeat its teacher."""
    name = f"{run.seed}/{folder.relative_to(run.folder).as_posix()}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") >> 1


def teacher_outputs(run, task, folder):
    """A teacher's logits (N, outputs) on its own training set, row by row; both orders of the symmetric tasks."""
    path = folder / f"{task.name}.train-logits.npy"
    if not run.exists(path):
        logits = predict(load_pretrained(folder).to(run.device), run, run.data[task.name]["train"], task)
        run.write(write_whole, path, logits)
    logits = np.load(path)
    assert logits.shape == run.data[task.name]["train"].labels.shape, f"{path}: {logits.shape}: of other data?"
    return logits


# --------------------------------------------------------------------------------------------------- the paper's table


def collect(run, names, trials):
    """{regime: {task: {split: {metric: [percent of each trial]}}}} of the regimes that are finished in all trials."""
    results = {}
    for name in names:
        for trial in range(1, trials + 1):
            folder = run.folder / f"trial-{trial}" / name
            files = [folder] if REGIMES[name].multi else [folder / task.name for task in run.tasks]
            for path in files:
                for task, splits in json.loads((path / "scores.json").read_text("utf-8")).items():
                    for split, metrics in splits.items():
                        for metric, value in metrics.items():
                            row = results.setdefault(name, {}).setdefault(task, {}).setdefault(split, {})
                            row.setdefault(metric, []).append(np.nan if value is None else value)
    return results


def columns_of_table(run, result):
    """[Avg, each task]: the paper's metric over the trials; the average is taken within each trial."""
    tasks = [result[task.name]["dev"][task.metrics[0]] for task in run.tasks]
    return [np.mean(tasks, axis=0), *map(np.array, tasks)]


def table(run, results):
    """The paper's table with this run's rows; over several trials the median, the spread and p against Single."""
    rows = [["Model", "Avg", *(task.folder for task in run.tasks)]]
    single = columns_of_table(run, results["single"]) if "single" in results else None
    for name, result in results.items():
        columns = columns_of_table(run, result)
        rows.append([REGIMES[name].label, *(f"{np.median(column):.1f}" for column in columns)])
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
    predictions, missing, models = {}, [], {}
    for task in glue_data.TASKS.values():
        for name, _ in task.test:
            if name == "WNLI" and run.wnli_test_rows and task not in run.tasks:
                predictions[name] = ["0"] * run.wnli_test_rows  # the majority class, as in the paper
            elif task in run.tasks and name in run.data[task.name]:
                if folders[task.name] not in models:
                    models = {folders[task.name]: load_pretrained(folders[task.name]).to(run.device)}
                logits = predict(models[folders[task.name]], run, run.data[task.name][name], task)
                predictions[name] = glue_data.answers(task, logits)
            else:
                missing.append(name)
    run.write(glue_data.write_submission, path, predictions)
    incomplete = f"; not in it, so the leaderboard would refuse it: {', '.join(missing)}" if missing else ""
    run.say(f"{path}: {len(predictions)} of 11 files{incomplete}")


# ------------------------------------------------------------------------------------------- what a finished run is for


def finished_models(args):
    """{task: folder of its model} of a run directory: trial 1 of --regime or, without it, of the best row there."""
    folders = {}
    for name in [args.regime] if args.regime else REGIMES:  # from Single to BAM, so that the better one stays
        for path in sorted(Path(args.out).glob(f"trial-1/{name}/**/scores.json")):
            folders |= dict.fromkeys(json.loads(path.read_text("utf-8")), path.parent)
    if not folders:
        raise UsageError(f"{args.out}: no finished model there; expected the run directory of an earlier command")
    return folders


def predict_text(args):
    """Print label and probability, or score, for each row of somebody's own text."""
    (task,), folders = glue_data.resolve(args.task), finished_models(args)
    if task.name not in folders:
        raise UsageError(f"{args.out}: no model of {task.name}; there are {', '.join(folders)}")
    folder, path = folders[task.name], args.predict or "--text"
    if args.text is not None:
        data = "\t".join(text for text in (args.text, args.text2) if text is not None).encode()
    else:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    first, second = glue_data.read_sentences(task, data, path)
    config = json.loads((Path(args.out) / "config.json").read_text("utf-8"))
    labels = json.loads((folder / "config.json").read_text("utf-8"))["heads"][task.name]
    tokenizer, zeros = glue_data.Tokenizer(folder / "vocab.txt"), np.zeros((len(first), 1), np.float32)
    dataset = glue_data.make_dataset(task, first, second, zeros, zeros, tokenizer, config["single"]["max_length"])
    device = Device(args)
    logits = predict(load_pretrained(folder).to(device.device), device, dataset, task)
    print("prediction\tprobability" if labels else "prediction")
    answers = glue_data.answers(replace(task, labels=tuple(labels)), logits)
    probabilities = torch.tensor(logits).softmax(-1).max(-1)
    for word, p in zip(answers, probabilities.values, strict=True):
        print(f"{word}\t{p:.4f}" if labels else word)


def export(args):
    """Write each task's model, and the encoder of several tasks, as folders that Hugging Face loads."""
    for task, folder in finished_models(args).items():
        model, config = load_pretrained(folder), json.loads((folder / "config.json").read_text("utf-8"))
        first = task == next(iter(model.num_outputs))
        for name, head in [(task, task)] + [("encoder", None)] * (first and len(model.num_outputs) > 1):
            target = Path(args.export) / name
            target.mkdir(parents=True, exist_ok=True)
            bert.export(model, target, head, config["heads"][task])
            glue_data.save_tokenizer(folder / "vocab.txt", target, config["max_position_embeddings"])
            print(target)


# --------------------------------------------------------------------------------------------------- the run directory


class UsageError(ValueError):
    """A command that cannot be carried out as given."""


def to_json(value):
    """Indented JSON; a metric that is undefined, as a correlation with a constant, is null there and NaN here."""
    return json.dumps(value, indent=2).replace("NaN", "null") + "\n"


def write_whole(path, content):
    """Write text or an array so that the file appears whole or not at all."""
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        if isinstance(content, np.ndarray):
            np.save(file, content)
        else:
            file.write(content.encode())
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


class Device:
    """Where and how precisely the model computes."""

    def __init__(self, args):
        self.device = device_of(args.device)
        on_cuda = self.device.type == "cuda"
        self.bfloat16 = on_cuda if args.precision == "auto" else args.precision == "bfloat16"
        bert.COMPILE = on_cuda if args.compile is None else args.compile
        self.stop_asked = False

    def to_device(self, array):
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.bfloat16 else contextlib.nullcontext()

    def ask_to_stop(self, signal_number, _):
        """Stop at the next step, with everything saved; asked a second time, at once."""
        self.stop_asked = True
        signal.signal(signal_number, signal.SIG_DFL)

    def stop_if_asked(self):
        if self.stop_asked:
            raise KeyboardInterrupt


class Run(Device):
    """What every stage of a run shares: its folder, data, checkpoint and recipes."""

    def __init__(self, args):
        super().__init__(args)
        self.tasks, self.seed, self.folder = glue_data.resolve(args.task), args.seed, Path(args.out)
        self.single, self.multi = recipes(args)
        self.teachers = args.teachers
        self.regimes = regimes_of(args.regime, self.tasks)
        self.live = sys.stdout.isatty() and RANK == 0
        self.save_every, self.saved_at = args.save_minutes * 60, time.time()
        self.make_folder()
        self.log = open(self.folder / "log.txt", "a", encoding="utf-8") if RANK == 0 else None
        data, self.checkpoint = self.demo() if args.demo else (Path(args.data), checkpoint_folder(args.checkpoint))
        if not args.demo:
            self.write(download, data, self.checkpoint, args.checkpoint)
        self.config = load_pretrained(self.checkpoint, {"": 1}).config  # a bad checkpoint is found before any work
        self.read(data, args.limit)
        self.check_sizes()
        self.refuse_other(self.identity(data, args.limit))

    def make_folder(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ".part").write_bytes(b"")
            (self.folder / ".part").unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(
                f"{self.folder}: cannot be written ({error.strerror}); --out names the run directory"
            ) from error

    def demo(self):
        """Generated GLUE, its vocabulary and a tiny BERT of random weights: (data, checkpoint)."""
        data, checkpoint = self.folder / "demo" / "glue", self.folder / "demo" / "checkpoint"
        if not self.exists(checkpoint / "model.safetensors"):
            self.write(write_demo, data, checkpoint)
        return data, checkpoint

    def read(self, data, limit):
        """Read and tokenize every split, so that bad input is found before any work."""
        tokenizer, length = glue_data.Tokenizer(self.checkpoint / "vocab.txt"), self.single.max_length
        if tokenizer.size != self.config.vocab_size:
            found = f"{tokenizer.size} tokens; expected {self.config.vocab_size}, the rows of config.json's embedding"
            raise CheckpointError(f"{self.checkpoint / 'vocab.txt'}: {found}")
        if length > self.config.max_position_embeddings:
            raise UsageError(f"--max-length: the checkpoint has {self.config.max_position_embeddings} positions")
        self.say(f"reading {', '.join(task.folder for task in self.tasks)} from {data}")
        self.data = {}
        for task in self.tasks:
            tests = [split for split, file in task.test if (data / task.folder / file).exists()]
            self.data[task.name] = {
                split: glue_data.load_dataset(task, split, data, tokenizer, length, limit if split == "train" else None)
                for split in ("train", *dict(task.dev), *tests)
            }
        wnli = glue_data.TASKS["wnli"]
        present = (data / wnli.folder / wnli.files["WNLI"]).exists()
        self.wnli_test_rows = len(glue_data.read_split(wnli, "WNLI", data).first) if present else 0

    def check_sizes(self):
        """Every model of the regimes gets at least one step."""
        for group, recipe in [*(([task], self.single) for task in self.tasks), (self.tasks, self.multi)]:
            rows = sum(len(self.data[task.name]["train"]) for task in group)
            if int(recipe.epochs * rows / recipe.batch_size) < 1:
                names = ", ".join(task.folder for task in group)
                raise UsageError(f"{names}: {rows} training rows are less than one batch of {recipe.batch_size}")

    def identity(self, data, limit):
        """All that decides the numbers, so that stages of different runs never mix."""
        files = [data / task.folder / file for task in self.tasks for file in task.files.values()]
        files += [self.checkpoint / name for name in ("config.json", "vocab.txt", *bert.WEIGHTS)]
        return {
            "tasks": [task.name for task in self.tasks],
            "seed": self.seed,
            "teachers": self.teachers,
            "limit": limit,
            "precision": "bfloat16" if self.bfloat16 else "float32",
            "single": asdict(self.single),
            "multi": asdict(self.multi),
            "files": {str(path): file_digest(path) for path in files if path.exists()},
        }

    def refuse_other(self, identity):
        """Write config.json, or hold the one that is there against this command's."""
        path = self.folder / "config.json"
        if not self.exists(path):
            self.write(write_whole, path, to_json(identity))
        before = json.loads(path.read_text("utf-8"))
        differences = [
            f"  {name}: {old!r} there, {new!r} here" for name, old, new in compare(before, identity) if old != new
        ]
        if differences:
            lines = "\n".join(differences)
            raise UsageError(f"{path}: this folder holds another run; name a new one with --out\n{lines}")

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
            end = "" if live and self.live else "\n"
            print(("\r\033[K" if self.live else "") + line, end=end, flush=True)
            if not live or not self.live:
                print(line, file=self.log, flush=True)

    def time_to_save(self):
        """Whether minutes have passed, or somebody asked to stop; the same on every process."""
        due = self.stop_asked or time.time() - self.saved_at > self.save_every
        if WORLD > 1:
            asked = torch.tensor(due, dtype=torch.int32, device=self.device)
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            due = bool(asked)
        if due:
            self.saved_at = time.time()
        return due


def write_demo(data, checkpoint):
    """A small GLUE, its vocabulary, and a tiny BERT of random weights. Pre-training would have taught it which words
    are alike; in its place queries begin as keys, so that equal words attend to each other from the start."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    vocab_size = glue_data.write_demo(data, checkpoint / "vocab.txt")
    torch.manual_seed(0)
    model = MultiTaskBert(BertConfig(vocab_size, 64, 2, 4, 128, 64, 2, 0.0, 0.0, initializer_range=0.125), {"": 1})
    for layer in model.layers:
        layer.qkv.weight.data[:64] = layer.qkv.weight.data[64:128]
    for table in (model.position_embeddings, model.segment_embeddings):
        table.weight.data.mul_(0.5)
    save_pretrained(model, checkpoint)


def compare(old, new, prefix=""):
    """The leaves of two nested dicts, as (name, old, new)."""
    for key in [*old, *(key for key in new if key not in old)]:
        a, b = old.get(key, "nothing"), new.get(key, "nothing")
        if isinstance(a, dict) and isinstance(b, dict):
            yield from compare(a, b, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", a, b


def file_digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------------------------------------- the command


def device_of(name):
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
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
    for entry in fields(Recipe):
        given = getattr(args, entry.name)
        if given is not None:
            values = [read_setting(entry, text) for text in given.split(",")]
            if len(values) > 2:
                raise UsageError(f"{flag_of(entry)}: {given!r}; expected one value, or two: single,multi")
            single, multi = replace(single, **{entry.name: values[0]}), replace(multi, **{entry.name: values[-1]})
    if single.max_length != multi.max_length:
        raise UsageError("--max-length: teachers and student read the same rows; expected one value")
    return single, multi


def flag_of(entry):
    return "--" + entry.name.replace("_", "-")


LOWEST = {"batch_size": 1, "max_length": 8, "epochs": 1e-9}
HIGHEST = {"gold_weight": 1, "warmup": 1}


def read_setting(entry, text):
    name = flag_of(entry)
    if entry.name == "gold_weight" and text == "anneal":
        return None
    try:
        value = int(text) if entry.type is int else float(text)
    except ValueError:
        raise UsageError(f"{name}: {text!r} is not {'a whole' if entry.type is int else 'a'} number") from None
    low, high = LOWEST.get(entry.name, 0), HIGHEST.get(entry.name, float("inf"))
    if not low <= value <= high:
        raise UsageError(f"{name}: {text} is not from {low:g} to {high:g}")
    return value


def parse_args(argv):
    parser = argparse.ArgumentParser(
        "bam.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", default="all", help="all, or names with commas between: " + ", ".join(glue_data.TASKS))
    add(
        "--regime",
        help=f"rows of the table, commas between, or all: {', '.join(REGIMES)} (default: the last, or single)",
    )
    add("--trials", type=int, default=1, help="repeat over seeds; report median, spread and Mann-Whitney p (default 1)")
    add("--teachers", type=int, default=1, help="so many seeds of each teacher, their outputs averaged (default 1)")
    add("--seed", type=int, default=0, help="trial 1's; every stage of every trial derives its own (default 0)")
    add("--data", default="glue_data", help="the GLUE folder; downloaded if it is not there (default %(default)s)")
    add(
        "--checkpoint", default="google-bert/bert-base-uncased", help="a folder, or a public name (default %(default)s)"
    )
    add("--out", help="run directory; repeating the command goes on there (default runs/TASK)")
    add("--limit", type=int, help="at most so many rows of each training set, evenly spaced (default: all)")
    add("--demo", action="store_true", help="generated data and a tiny BERT: no download, two minutes")
    add("--device", default="auto", help="cuda, cpu, mps (default: cuda where there is one)")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 autocast on CUDA")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the fused ops (default: on CUDA)")
    add("--save-minutes", type=float, default=5, help="between two checkpoints inside a stage (default 5)")
    finished = parser.add_argument_group("with a finished run", "--out names it, and --task the head")
    finished.add_argument("--predict", metavar="FILE", help="label a TSV of one's own, - for standard input")
    finished.add_argument("--text", help="label one text, or with --text2 one pair")
    finished.add_argument("--text2")
    finished.add_argument("--export", metavar="FOLDER", help="write the encoder and each task's model for Hugging Face")
    group = parser.add_argument_group("recipe", "one value for both, or single,multi")
    for entry in fields(Recipe):
        shown = [getattr(recipe, entry.name) for recipe in (SINGLE, MULTI)]
        default = ",".join(dict.fromkeys("anneal" if value is None else f"{value:g}" for value in shown))
        why = entry.metadata["why"].replace("%", "%%")
        group.add_argument(flag_of(entry), metavar="X", help=f"{why} (default {default})")
    args = parser.parse_args(argv)
    if min(args.trials, args.teachers, 1 if args.limit is None else args.limit) < 1:
        raise UsageError("--trials, --teachers and --limit: expected at least 1")
    args.out = args.out or f"runs/{'demo' if args.demo else args.task.replace(',', '-')}"
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.export:
        return export(args)
    if args.predict or args.text is not None:
        return predict_text(args)
    if WORLD > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    run = Run(args)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, run.ask_to_stop)
    for trial in range(1, args.trials + 1):
        for name in run.regimes:
            submit(run, run_regime(run, name, trial), run.folder / f"trial-{trial}" / name)
    ran = {*run.regimes, *(REGIMES[name].teacher for name in run.regimes)}
    results = collect(run, [name for name in REGIMES if name in ran], args.trials)
    run.write(write_whole, run.folder / "results.json", to_json(results))
    run.write(write_whole, run.folder / "table.txt", table(run, results))
    run.write(figure.draw, run.folder)
    run.say("\n" + table(run, results))


def command(argv=None):
    """main with errors as one line on stderr; returns the exit status."""
    try:
        main(argv)
        return 0
    except (UsageError, DataError, CheckpointError) as error:
        print(f"bam.py: error: {error}", file=sys.stderr)
        return 2
    except (TrainingError, OSError) as error:  # a diverged run, a full disk
        print(f"bam.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nbam.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(command())
