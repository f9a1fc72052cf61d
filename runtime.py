"""What keeps a long run alive: device, processes, run directory, checkpoints, progress, and how a command ends.

    Run           a device, a run directory, and the processes that share it
    Progress      metrics.jsonl, checkpoints, speed, gradients that are not finite
    command       errors as one line, and the exit status

Nothing here knows the paper, but for the λ that is logged: bam.py decides what is trained, and asks a Run to write, to
wait, and to stop.
"""

import argparse
import contextlib
import datetime
import fcntl
import functools
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from glue_data import InputError, describe_examples, read_json
from model import CheckpointError, read_safetensors, whole, write_safetensors
from ops import compiled

CUDA_TOKENS = 8192  # tokens at once: what fills the device in training; predicting takes twice as many
CPU_TOKENS = 800  # in float32; more is hardly faster, and takes more memory
CPU_BFLOAT16_TOKENS = 2000
PRECISIONS = ("auto", "float32", "bfloat16")
MIN_TOKENS = 256  # a micro-batch is not halved below this where memory is short


# --------------------------------------------------------------------------------------------------------------- files


def to_json(value, indent=2):
    """JSON text. JSON has no NaN, which a correlation with a constant is: it becomes null."""
    plain = json.loads(json.dumps(value), parse_constant=lambda name: None if name == "NaN" else float(name))
    return json.dumps(plain, indent=indent) + "\n"


def write_whole(path, content):
    """Write text, bytes or an array so that the file appears whole or not at all."""
    with whole(path) as file:
        if isinstance(content, np.ndarray):
            np.save(file, content)
        else:
            file.write(content.encode() if isinstance(content, str) else content)


def differences(one, other, prefix=""):
    """Yield (dotted name, value in one, value in other) where nested dicts differ; 'nothing' stands for no value."""
    for key in {**one, **other}:
        first = one.get(key, "nothing")
        second = other.get(key, "nothing")
        if isinstance(first, dict) and isinstance(second, dict):
            yield from differences(first, second, f"{prefix}{key}.")
        elif first != second:
            yield prefix + key, first, second


def first_line(error):
    """The first line of an error's text, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# -------------------------------------------------------------------------------------------------------------- device


def find_device(name, rank, world):
    """The torch.device of this name; auto: cuda where there is one. Each of several processes takes its own card: the
    one that torchrun says, or else the next in turn."""
    name = str(name)  # perhaps a torch.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and world > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK') or rank % max(1, torch.cuda.device_count())}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device: {name!r} cannot be used ({first_line(error)})") from error


def multiplies_bfloat16(device):
    """Whether the device multiplies bfloat16 natively. A processor that does not takes thirty times float32's time."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def processes():
    """(rank, number of processes) from torchrun's variables, all of them or none. Raises InputError."""
    given = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "MASTER_PORT", "MASTER_ADDR")}
    if given["WORLD_SIZE"] in ("", "1"):
        return 0, 1
    *numbers, address = given.values()
    if all(number.isdecimal() for number in numbers) and address:
        world, rank, port = map(int, numbers)
        if rank < world and port < 65536:
            return rank, world
    found = ", ".join(f"{name} is {value or 'not set'}" for name, value in given.items())
    raise InputError(f"{found}; expected all of torchrun's variables or none, and RANK below WORLD_SIZE")


# ----------------------------------------------------------------------------------------------------------------- run


class Run:
    """Where to compute, a run directory, and the processes that share it: rank 0 writes and speaks, and the others wait
    for it. Without a folder, one process that writes nothing.

    device: cuda, cpu, mps, or auto. precision: float32, bfloat16 (products in bfloat16; weights, sums and statistics in
    float32), or auto: bfloat16 where the device multiplies it natively. save_minutes and save_steps: between two
    checkpoints of a training, whichever comes first. compile: the encoder, on CUDA. wait_minutes: how long processes
    wait for each other. evaluate_every: steps between dev scores, 0 for none.
    """

    def __init__(
        self, folder=None, device="auto", precision="auto", save_minutes=5, save_steps=0, compile=True, wait_minutes=30,
        evaluate_every=0,
    ):  # fmt: skip
        if precision not in PRECISIONS:
            raise InputError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
        self.rank, self.world = processes() if folder else (0, 1)
        self.device = find_device(device, self.rank, self.world)
        self.bfloat16 = multiplies_bfloat16(self.device) if precision == "auto" else precision == "bfloat16"
        cpu_tokens = CPU_BFLOAT16_TOKENS if self.bfloat16 else CPU_TOKENS
        self.tokens_at_once = CUDA_TOKENS if self.device.type == "cuda" else cpu_tokens
        self.save_seconds = save_minutes * 60
        self.save_steps = save_steps
        self.saved_at = time.monotonic()
        self.compile = compile and self.device.type == "cuda"
        self.compiled_shapes = set()  # the configurations of models that have been compiled
        self.evaluate_every = evaluate_every
        self.asked_at = None  # when a signal last asked to stop
        self.live = self.rank == 0 and sys.stdout is not None and sys.stdout.isatty()
        self.log = None
        self.files = contextlib.ExitStack()  # the log and the lock, open as long as the run is
        self.folder = folder and Path(folder)
        if folder and self.rank == 0:
            self.open_folder()
        if self.world > 1:
            self.join(wait_minutes)

    def open_folder(self):
        """Create the run directory, take its lock, and open its log."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = self.files.enter_context(open(self.folder / "lock", "a+", encoding="utf-8"))
            log = open(self.folder / "log.txt", "a", encoding="utf-8", errors="backslashreplace")
            self.log = self.files.enter_context(log)
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written ({error.strerror}); --out names another") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise InputError(f"{self.folder}: another command is at work there ({lock.read().strip()})") from error
        except OSError:  # a file system without locks
            pass
        lock.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=lock, flush=True)

    def join(self, wait_minutes):
        """Find the other processes."""
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        show(f"process {self.rank} waits at {where} for all {self.world}, {wait_minutes:g} minutes at most")
        timeout = datetime.timedelta(minutes=wait_minutes)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            dist.init_process_group("nccl", timeout=timeout, device_id=self.device)
        else:
            dist.init_process_group("gloo", timeout=timeout)

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        self.files.close()
        if self.live:  # else an error's message would stand at the end of the last live line
            show("\r\033[K", end="")
        if self.compile:  # for whatever the caller compiles next
            torch.compiler.set_stance("default")
        if self.world > 1 and error is None:
            dist.destroy_process_group()

    def all_reduce(self, tensor):
        """Sum the tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)

    def on_rank_0(self, action, *args, **kwargs):
        """Let rank 0 act, and the others wait."""
        if self.rank == 0:
            action(*args, **kwargs)
        if self.world > 1:
            dist.barrier()

    def exists(self, path):
        """Whether rank 0 finds the file: processes that ask at different moments must still act alike."""
        found = torch.tensor(int(self.rank == 0 and path.exists()), device=self.device)
        self.all_reduce(found)
        return bool(found)

    def say(self, line, live=False):
        """Print a line and log it. On a terminal a live line is overwritten by the next, and not logged."""
        if self.rank:
            return
        live = live and self.live
        if live:  # a line that wraps could not be overwritten
            line = line[: shutil.get_terminal_size().columns - 1]
        elif self.log:
            print(line, file=self.log, flush=True)
        show(("\r\033[K" if self.live else "") + line, end="" if live else "\n")

    def claim(self, identity):
        """Write config.json; or, where it is there, refuse settings, data or weights that differ from it."""
        path = self.folder / "config.json"
        if not self.exists(path):
            self.on_rank_0(write_whole, path, to_json(identity))
        lines = [f"  {name}: {old!r} there, {new!r} here" for name, old, new in differences(read_json(path), identity)]
        if lines:
            problem = f"{path}: this folder holds another run; repeat its settings, or name a new folder with --out"
            raise InputError("\n".join([problem, *lines]))

    def catch_signals(self):
        """Stop at the next step, with everything saved, on the signals that terminals and schedulers send."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # which nohup ignores
                signal.signal(number, self.ask_to_stop)

    def ask_to_stop(self, number, _):
        """Note the signal; a second Ctrl-C, not one that torchrun repeats within a second, stops at once."""
        now = time.monotonic()
        if number == signal.SIGINT and self.asked_at and now - self.asked_at > 1:
            raise KeyboardInterrupt
        self.asked_at = now

    def stop_if_asked(self):
        """Raise KeyboardInterrupt where a signal has asked to stop."""
        if self.asked_at:
            raise KeyboardInterrupt

    def time_to_save(self, step):
        """Whether to save now: save_minutes or save_steps are over, or a signal has asked to stop. All processes agree,
        and a yes begins the minutes anew."""
        now = time.monotonic()
        on_step = self.save_steps and (step + 1) % self.save_steps == 0
        asked = self.asked_at is not None
        due = asked or on_step or now - self.saved_at > self.save_seconds
        if self.world > 1:
            if self.device.type == "cuda" and step % Progress.EVERY and not on_step:
                return False  # agreeing makes the host wait for the device: only now and then
            votes = torch.tensor([asked, due], dtype=torch.int32, device=self.device)
            dist.all_reduce(votes, dist.ReduceOp.MAX)
            asked, due = votes.tolist()
        if asked:  # perhaps only another process
            self.asked_at = self.asked_at or now
        if due:
            self.saved_at = now
        return bool(due)

    def compile_encoder(self, model, attempt):
        """Compile the model's encoder in `attempt`, a forward and backward pass of a full micro-batch. Where that fails
        (no compiler, an old card, an unwritable cache), say so in one line, and leave the model uncompiled."""
        if not self.compile:
            return
        if model.config not in self.compiled_shapes:  # else its graph is there
            self.say("compiling the encoder takes a minute or two")
            self.compiled_shapes.add(model.config)
        try:
            torch.compiler.set_stance("default")
            model.compiled = compiled(type(model).pooled_output)
            attempt()
            torch.compiler.set_stance("eager_on_recompile")  # an unforeseen shape costs time, and ends nothing
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler can raise anything
            self.compile = False
            model.compiled = None
            self.say(f"cannot compile ({type(error).__name__}: {first_line(error)}): continuing uncompiled")
        model.zero_grad(set_to_none=False)


def within_memory(function):
    """A decorator: whenever the device runs out of memory in function(model, ..., run=run), halve the micro-batches
    from there on, zero the gradients, and call it again."""

    @functools.wraps(function)
    def call(model, *args, run, **more):
        while True:
            try:
                return function(model, *args, run=run, **more)
            except torch.OutOfMemoryError:
                if run.tokens_at_once < 2 * MIN_TOKENS:
                    raise
            run.tokens_at_once //= 2  # outside of the handler, whose error holds on to the memory
            run.say(f"out of memory: now {run.tokens_at_once} tokens at once; the same gradient but for dropout")
            model.zero_grad(set_to_none=False)

    return call


# -------------------------------------------------------------------------------------------- progress and checkpoints

CHECKPOINT = "training.safetensors"
PREVIOUS = "previous-" + CHECKPOINT  # the one before it


def save_checkpoint(folder, tensors):
    """Write a checkpoint; the one before it stays."""
    if (folder / CHECKPOINT).exists():
        (folder / CHECKPOINT).replace(folder / PREVIOUS)
    write_safetensors(folder / CHECKPOINT, tensors)


def discard_checkpoints(folder):
    for name in (CHECKPOINT, PREVIOUS, CHECKPOINT + ".part"):  # the last: cut off by a kill
        (folder / name).unlink(missing_ok=True)


class Progress:
    """Writes metrics.jsonl (on a CPU the same bits, interrupted or not) and checkpoints, and says how far the training
    is, with speed and time left: in a live line on a terminal, else in a plain line now and then.

    schedule (num_steps, batch_size): the examples of each step. tensors: {name: tensor}, which a checkpoint saves, and
    resume() fills. training_id: a number that tells trainings apart.
    """

    EVERY = 20  # steps between lines of metrics.jsonl: reading a number makes the host wait for the device

    def __init__(self, run, folder, dataset, schedule, tensors, training_id):
        self.run = run
        self.folder = folder
        self.dataset = dataset
        self.schedule = schedule
        self.num_steps, self.batch_size = schedule.shape
        self.num_tokens = np.diff(dataset.offsets)[schedule].sum(1)  # (num_steps,)
        self.unchecked = []  # (step, gradient norm, learning rate)
        self.name = folder.name if folder == run.folder else os.path.relpath(folder, run.folder)
        self.metrics = open(folder / "metrics.jsonl" if run.rank == 0 else os.devnull, "ab")
        progress = torch.zeros(2, dtype=torch.int64, device=run.device)  # steps done, bytes of metrics.jsonl
        self.state = tensors | {"training": torch.tensor(training_id, device=run.device), "progress": progress}

    def resume(self):
        """Fill the training's tensors from its latest checkpoint, in every process, and cut metrics.jsonl to the length
        that it had. Returns the steps done; without a checkpoint 0."""
        self.run.on_rank_0(self.restore)
        if self.run.world > 1:
            for tensor in self.state.values():
                dist.broadcast(tensor, 0)
        self.start, num_bytes = self.state["progress"].tolist()
        if self.run.rank == 0:
            self.metrics.truncate(min(num_bytes, self.metrics.tell()))
        if self.start:
            self.run.say(f"{self.name}  resumes after step {self.start}/{self.num_steps}")
        self.began = time.monotonic()
        self.shown_at = self.began
        return self.start

    def restore(self):
        """Read the latest checkpoint; if it is damaged or of another training, say so and read the one before it."""
        for candidate in (self.folder / CHECKPOINT, self.folder / PREVIOUS):
            if not candidate.exists():
                continue
            try:
                saved = read_safetensors(candidate)
            except CheckpointError as error:
                if isinstance(error.__cause__, OSError):  # the disk's fault: the checkpoint may be good
                    raise
                self.run.say(f"{error}; going back to the one before it, or to the start")
                candidate.unlink()  # else the next save would move it over the one before it, which is whole
                continue
            if saved.keys() == self.state.keys() and torch.equal(saved["training"], self.state["training"].cpu()):
                for name, tensor in self.state.items():
                    tensor.copy_(saved[name])
                return
            problem = "belongs to another training (other data, recipe, seed or weights) and is ignored"
            self.run.say(f"{candidate}: {problem}")

    def save(self, steps_done):
        """Write a checkpoint, once metrics.jsonl is on the disk. Raises for a gradient that was not finite."""
        self.check()
        if self.run.rank == 0:
            os.fsync(self.metrics.fileno())
        num_bytes = self.metrics.seek(0, os.SEEK_END)
        self.state["progress"].copy_(torch.tensor([steps_done, num_bytes]))
        self.run.on_rank_0(save_checkpoint, self.folder, self.state)

    def after(self, step, loss, norm, rate, gold_weight):
        """Note a step: its summed loss and its gradient's norm (tensors), its learning rate and λ."""
        self.unchecked.append((step, norm, rate))
        last = step + 1 == self.num_steps
        log = step % self.EVERY == 0 or last
        if log or norm.device.type == "cpu":
            self.check()
        if not log:
            return
        self.run.all_reduce(loss)
        values = {"step": step, "loss": loss.item() / self.batch_size, "gradient_norm": norm.item()}
        values |= {"learning_rate": rate, "gold_weight": gold_weight}
        self.write(values)
        now = time.monotonic()
        if now - self.shown_at >= (0.2 if self.run.live else 30) or last:
            self.shown_at = now
            self.show(values, now - self.began)

    def write(self, values):
        """A line of metrics.jsonl."""
        self.metrics.write(to_json(values, indent=None).encode())
        self.metrics.flush()

    def check(self):
        """Raise FloatingPointError if a gradient since the last check was not finite."""
        for step, norm, rate in self.unchecked:
            if not norm.isfinite():
                problem = f"{self.name}, step {step}: the gradient's norm is {norm.item()}, at learning rate {rate:.1e}"
                examples = describe_examples(self.dataset, self.schedule[step])
                raise FloatingPointError(f"{problem}; nothing of it was saved. Its examples: {examples}")
        self.unchecked.clear()

    def show(self, values, seconds):
        """Print how far training is."""
        done = values["step"] + 1
        left = seconds / (done - self.start) * (self.num_steps - done)
        examples = (done - self.start) * self.batch_size
        tokens = self.num_tokens[self.start : done].sum()
        self.run.say(
            f"{self.name}  step {done}/{self.num_steps}  loss {values['loss']:.3f}  lr {values['learning_rate']:.1e}  "
            f"λ {values['gold_weight']:.2f}  {examples / seconds:.0f} ex/s  {tokens / seconds:.0f} tok/s  "
            f"{left / 60:.0f} min left",
            live=done < self.num_steps,
        )


# ------------------------------------------------------------------------------------------------------------- command


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others."""

    def error(self, message):
        raise InputError(message)


def show(text, end="\n", stream="stdout"):
    """Print, as far as anybody reads: output that cannot be written ends nothing."""
    try:
        if getattr(sys, stream) is not None:
            print(text + end, end="", file=getattr(sys, stream), flush=True)  # one write: processes share it
    except (OSError, ValueError):  # the reader or the terminal is gone, or the stream is closed
        setattr(sys, stream, None)  # so that Python's last flush does not fail either


def command(name, main, argv=None):
    """Call main(argv), with bounded caches and with errors as one line on standard error; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # closed, or somebody's own
            stream.reconfigure(errors="backslashreplace")  # λ in an encoding that lacks it
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's kernels, and PyTorch's
        os.environ.setdefault(cache, "64")  # not 1,024: a kernel serves one shape, and there are many
    resumes = "; the same command resumes from the last checkpoint" if name == "bam.py" else ""
    status = 1
    try:
        main(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
        return 0
    except BrokenPipeError:  # of predict.py | head
        sys.stdout = None
        return 1
    except (InputError, CheckpointError) as error:
        status = 2
        message = f"error: {error}"
    except FloatingPointError as error:  # it diverged, which resuming does not mend
        message = f"error: {error}"
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:  # a full disk; no memory
        message = f"error: {first_line(error)}{resumes}"
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):  # gloo's has no class of its own
            raise
        reason = "another process was lost, whose own message says why, or did not come in time"
        message = f"error: {reason} ({first_line(error)})"
    except KeyboardInterrupt:
        status = 130
        message = f"interrupted{resumes}"
    show(f"{name}: {message}", stream="stderr")
    return status
