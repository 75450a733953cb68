"""A run, from top to bottom: build, resume, steps, evaluation, checkpoints, finish. Labels are the tasks' affair."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .data.bad_images import BadImages
from .data.loader import Batches, EvaluationOrder, TrainingOrder, batches, steps_per_epoch
from .models.freeze import freeze as frozen
from .runtime.checkpoint import save as save_checkpoint
from .runtime.checkpoint import write_text
from .runtime.config import build, check, check_typed, dump
from .runtime.distributed import (
    StopRequest,
    all_reduce_max,
    all_reduce_sum,
    apply_fsdp,
    choose_device,
    is_sharded,
    rank,
    seed_generators,
    sync_batchnorm,
    sync_errors,
    world_size,
    wrap_ddp,
)
from .runtime.errors import PREEMPTED, UserError, closest, from_os
from .runtime.log import Log, environment, format_metrics
from .runtime.state import State, best_weights
from .runtime.trackers import start

HEADER = '"""The configuration of this run."""'  # config.py's, by which a run's folder is known
RUN_FILES = ("checkpoints", "pictures", "config.json", "environment.json", "log.jsonl", "log.txt")
RUN_FILES += ("tensorboard", "wandb", "metrics.json", "classes.csv", "model.safetensors", "config.py", "bad_images.txt")
SCHEDULES = (
    "cosine",
    "tanh",
    "step",
    "multistep",
    "poly",
    "wsd",
    "rsqrt",
    "constant",
    "none",
)  # timm's that follow steps


def train(
    run_dir: Path,
    resume: bool,
    /,
    *,
    model: dict,
    data: dict,
    task: dict,
    optimizer: dict,
    schedule: dict,
    batch_size: int,
    epochs: int | None = None,
    iterations: int | None = None,
    accumulate: int = 1,
    repeats: int = 1,
    clip_grad: float | None = None,
    ema: dict | None = None,
    checkpoint: str | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    strategy: Literal["ddp", "fsdp"] = "ddp",
    freeze: int | str | Sequence[str] | None = None,
    sync_bn: bool = False,
    compile: bool = False,
    channels_last: bool = False,
    grad_checkpointing: bool = False,
    seed: int = 0,
    workers: int = 0,
    device: str | None = None,
    log_every: int = 50,
    save_every: int | None = None,
    eval_every: int | None = None,
    trackers: Sequence[str] = (),
) -> None:
    """Train a model; a config's keys are these arguments.

    model: name, and what timm.create_model takes. data, task: `type`, a class, and its arguments.
    optimizer: arguments of timm.optim.create_optimizer_v2. schedule: of timm's create_scheduler_v2, followed step by
    step.
    epochs: passes over the training images; images that don't fill a last batch are left out of a pass. Or, in their
    place, iterations: steps, in which the schedule's lengths (warmup_epochs, decay_epochs, …) and eval_every are then
    given.
    batch_size: images that one optimiser step sees, over all processes and accumulated parts, as papers count.
    accumulate: forward and backward passes that a step is made of. repeats: of each image in an epoch, which then sees
    fewer of them (repeated augmentation). clip_grad: largest norm of the gradient.
    ema: arguments of timm.utils.ModelEmaV3; the averaged weights are evaluated beside the others.
    checkpoint: weights to begin with; a classifier of another size than the data's is left out.
    freeze: what does not learn: the number of first stages, or names in the model; see saccade.train.models.freeze.
    precision: of autocast.
    strategy: ddp: each process has the whole model; fsdp: weights, gradients and optimiser state are divided over them
    (torch's FSDP2).
    sync_bn: BatchNorm over all processes. compile, channels_last, grad_checkpointing: switches.
    workers: loader processes of each process. device: cpu or cuda; None: cuda where there is one.
    log_every, save_every: steps; eval_every: epochs (None: each). A checkpoint is saved at each evaluation too.
    trackers: of "tensorboard" and "wandb", which get what the log gets.
    Raises UserError for whatever the user can mend, and (exit code 75) after SIGTERM or SIGUSR1, the state saved.
    """
    config = {key: value for key, value in locals().items() if key not in ("run_dir", "resume")}
    stop = StopRequest()

    # Build
    with sync_errors():
        place = choose_device(device)
        if precision == "fp16" and place.type == "cpu":
            raise UserError("precision=fp16 needs a GPU: use precision=bf16 on the CPU")
        seed_generators(seed)
        source = build(data)
        job = build(task, source)
        net = job.model(**model, checkpoint=checkpoint, new_head=True)
        inputs = source.inputs(net.pretrained_cfg)
        net = net.to(place, memory_format=torch.channels_last if channels_last else torch.preserve_format)
        job.probe(net, inputs)
        if sync_bn:
            net = sync_batchnorm(net, place)
        if grad_checkpointing:
            net.set_grad_checkpointing(True)
        learner = job.trained(net)
        still = frozen(net, freeze) if freeze is not None else []
        averaged = None
        if ema is not None:
            # Parts of tensors and whole ones (buffers) can't be averaged in one call, as `foreach` would.
            averaged = ModelEmaV3(net, **ema | (dict(foreach=False) if strategy == "fsdp" else {}))
        if strategy == "fsdp" and world_size() > 1:
            for divided in (net, averaged.module) if averaged is not None else (net,):
                apply_fsdp(divided, place, job.methods)
        training, validation = source.dataset("train", inputs, training=True), source.dataset("val", inputs)
        per_epoch = steps_per_epoch(len(training), batch_size, accumulate)
        try:
            stepper = create_optimizer_v2(net, **optimizer)
            unit = 1 if epochs is None else per_epoch  # steps that the schedule's lengths and eval_every count
            by_step = dict(num_epochs=epochs or iterations, step_on_epochs=False, updates_per_epoch=unit)
            scheduler, length = create_scheduler_v2(stepper, **schedule, **by_step)
        except (ValueError, TypeError, AssertionError) as error:  # values that timm or torch refuse
            raise UserError(f"the optimizer or schedule section does not do: {error}") from error
        steps = length * unit
        between = eval_every * unit if eval_every else per_epoch  # evaluations
        if compile:
            net.compile()
        scaler = torch.amp.GradScaler(place.type, enabled=precision == "fp16")
        autocast = autocasting(place, precision)
        log = Log(run_dir, steps, per_epoch, batch_size, place)

    bad = BadImages(run_dir / "bad_images.txt", source, resume)
    bad.share()

    # Resume
    state = State(net, averaged, stepper, scaler, dump(config), source.class_names)
    folder = run_dir / "checkpoints"
    with sync_errors():
        said = state.load(folder, place) if resume else []
        if rank() == 0:
            write_text(run_dir / "config.py", f"{HEADER}\n\n{state.config}")
            write_text(run_dir / "environment.json", json.dumps(environment(place), indent=2) + "\n")
            log.start(state.step, state.evaluated, start(trackers, run_dir, state.config, state.step))
        for line in said:
            log.say(line)

    def save(best: bool = False) -> None:
        state.check_finite()
        with log.aside(), sync_errors():
            tensors, meta = state.content()
            if rank() == 0:
                save_checkpoint(folder, tensors, meta, best)

    def preempted() -> UserError:
        save()
        said = f"step {state.step} of {steps} is saved in {folder}; the same command with --resume goes on"
        log.say(said, show=False)
        return UserError(said, PREEMPTED, quiet=rank() > 0)

    def measured(batches: Iterable, weights: nn.Module) -> dict[str, float]:
        divided = inputs if is_sharded(weights) else None
        return evaluate(weights, job, batches, autocast, stop, divided)[0]

    # Steps
    shared = wrap_ddp(learner, place)
    aspects = getattr(training, "aspects", None)
    order = TrainingOrder(len(training), batch_size, seed, state.step, steps, accumulate, repeats, aspects)
    training_batches = iter(batches(training, order, seed, workers, place, bad))
    order = EvaluationOrder(len(validation), max(1, batch_size // world_size()))
    validation_batches = batches(validation, order, seed, workers, place, bad)
    resumed_at = state.step
    while True:
        finished = state.step == steps
        if state.step > state.evaluated and (finished or state.step % between == 0):
            state.check_finite()
            with log.aside():
                metrics = state.evaluate(partial(measured, validation_batches))
            if stop.agreed(bad):
                raise preempted()
            improved = state.judge(metrics, job.score)
            log.evaluation(state.step, metrics, improved)
            save(improved)
        elif save_every and state.step % save_every == 0 and state.step > resumed_at:
            save()
        if finished:
            break
        if stop.agreed(bad):
            raise preempted()

        seed_generators("step", seed, state.step, rank())
        if scheduler:
            scheduler.step_update(state.step)
        shared.train()
        for module in still:
            module.eval()
        sums: dict[str, Tensor] = {}
        for part in range(accumulate):
            with log.waiting():
                batch = next(training_batches)
            if state.step == part == 0 and rank() == 0:
                log.picture(job.sample(run_dir, batch, inputs), 0)
                seed_generators("step", seed, state.step, rank())  # as they were
            with nullcontext() if shared is learner or part == accumulate - 1 else shared.no_sync():
                with autocast():
                    loss, extra = job.loss(shared, batch)
                scaler.scale(loss / accumulate).backward()
            for name, value in {"loss": loss.detach(), **extra}.items():
                sums[name] = sums.get(name, 0) + value / accumulate
        if clip_grad is not None:
            scaler.unscale_(stepper)
            nn.utils.clip_grad_norm_(net.parameters(), clip_grad)
        scaler.step(stepper)
        scaler.update()
        stepper.zero_grad()
        state.step += 1
        if averaged is not None:
            averaged.update(net, step=state.step)
        state.note(sums)
        log.stepped(state.step)
        if state.step % log_every == 0 or state.step == steps:
            log.training(state.step, state.take_means(), max(group["lr"] for group in stepper.param_groups))

    # Finish
    with sync_errors():
        if rank() == 0:
            best = job.model(**model | dict(pretrained=False))  # whatever training made of `net`, a plain one
            best.load_state_dict(best_weights(folder))
            job.export(best, run_dir, inputs, source.class_names)
    if rank() == 0:
        drawn = job.pictures(run_dir)
        for file in drawn:
            log.picture(file, state.step)
    log.stop()
    if rank() == 0:
        metrics = format_metrics(state.best["metrics"])
        log.say(f"done: the best on val was step {state.best['step']} of {steps} ({metrics})")
        log.say(where(run_dir, [run_dir / "model.safetensors", run_dir / "log.jsonl", *drawn]))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    job: Any,
    loader: Batches,
    autocast: Callable[[], AbstractContextManager],
    stop: StopRequest | None = None,
    divided: dict[str, Any] | None = None,
) -> tuple[dict[str, float], Any]:
    """The task's metrics over all processes, each image counted once, and its detail; `stop` cuts it short.

    Images that can't be read are left out; where there are any, "skipped" is how many.

    divided: of a model whose parameters are divided over the processes, the preprocessing: those with fewer batches
    than others run the model on a blank one, since all must run it equally often; none stops before the others.
    """
    rounds = all_reduce_max(len(loader)) if divided else 0

    def arriving() -> Iterator:
        arrived = 0
        for batch in loader:
            arrived += 1
            if stop is not None and stop.asked and not divided:
                return
            yield batch
        for _ in range(rounds - arrived):
            job.probe(model, divided)

    model.eval()
    with autocast():
        metrics, detail = job.evaluate(model, arriving())
    skipped = int(all_reduce_sum(torch.tensor(loader.skipped)))
    return metrics | (dict(skipped=skipped) if skipped else {}), detail


def where(run_dir: Path, paths: list[Path]) -> str:
    """Where everything is, and, of a model that timm can build, the line that loads it."""
    lines = [f"  {path}" for path in paths]
    file = run_dir / "config.json"
    if file.exists() and "architecture" in json.loads(file.read_text(encoding="utf-8")):
        lines.append(f'  import saccade.backbones, timm; timm.create_model("local-dir:{run_dir}", pretrained=True)')
    return "\n".join(lines)


def autocasting(device: torch.device, precision: str) -> Callable[[], AbstractContextManager]:
    if precision == "fp32":
        return nullcontext
    return partial(torch.autocast, device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def validate(config: dict) -> None:
    """Hold a config to what it builds; raises UserError for a key, a value or a name that is not known."""
    check("", config, train)
    check_typed("data", config["data"])
    check_typed("task", config["task"])
    if not isinstance(config["model"].get("name"), str):
        raise UserError("model.name is missing: set it in the config or with model.name=… on the command line")
    for key in {"num_classes", "checkpoint", "new_head"} & config["model"].keys():
        raise UserError(f"model.{key} can't be set: classes come from the data, weights from checkpoint=…")
    name = config["optimizer"].get("opt", "sgd")
    if name not in list_optimizers():
        raise UserError(f"unknown optimizer.opt {name!r}{closest(str(name), list_optimizers())}")
    optimizer = create_optimizer_v2, get_optimizer_class(name, bind_defaults=False)
    check("optimizer", config["optimizer"], *optimizer, without=("model_or_params", "params", "param_group_fn"))
    engine_gives = ("optimizer", "num_epochs", "step_on_epochs", "updates_per_epoch")
    check("schedule", config["schedule"], create_scheduler_v2, without=engine_gives)
    name = config["schedule"].get("sched", "cosine")
    if name not in SCHEDULES:
        raise UserError(f"unknown schedule.sched {name!r}{closest(str(name), SCHEDULES)}")
    if config.get("ema") is not None:
        check("ema", config["ema"], ModelEmaV3, without=("model", "device"))
    if config.get("strategy") == "fsdp" and config.get("channels_last"):
        raise UserError("channels_last=True does not go with strategy=fsdp, which divides contiguous weights only")
    if (config.get("epochs") is None) == (config.get("iterations") is None):
        raise UserError("give one of epochs and iterations, with the other None")
    for key in ("epochs", "iterations", "batch_size", "accumulate", "repeats", "log_every", "save_every", "eval_every"):
        if config.get(key) is not None and config[key] < 1:
            raise UserError(f"{key}={config[key]} must be 1 or more")


def prepare_folder(run_dir: Path, resume: bool, overwrite: bool) -> None:
    """Make the run's folder, or take it as it is to resume, or empty it of an earlier run's files to overwrite.

    Raises UserError for a folder that holds something else, and for one that can't be written.
    """
    with sync_errors():
        if rank() > 0:
            return
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            patterns = (".*.*.tmp", "checkpoints/.*.tmp", "checkpoints/.tmp*")
            stale = [path for pattern in patterns for path in run_dir.glob(pattern)]  # of a process that was killed
            if any(path not in stale for path in run_dir.iterdir()):
                config = run_dir / "config.py"
                if not config.exists() or HEADER not in config.read_text(encoding="utf-8"):
                    raise UserError(f"{run_dir} is not empty and not a run's folder: choose another with --run-dir")
                if not resume and not overwrite:
                    raise UserError(f"{run_dir} holds a run: go on with --resume, or start again with --overwrite")
            for path in [*stale, *(map(run_dir.joinpath, RUN_FILES) if overwrite else ())]:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        except OSError as error:
            raise from_os(error, f"making {run_dir}") from error
