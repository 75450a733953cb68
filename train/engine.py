"""Training, from top to bottom: build, resume, steps, evaluation, checkpoints, finish. Labels are left to the tasks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .data.bad_images import BadImages
from .data.files import sample_names
from .data.loader import Batches, EvaluationOrder, TrainingOrder, batches
from .data.permutation import order_method
from .runtime import ranges, sharded
from .runtime.checkpoint import save as save_checkpoint
from .runtime.checkpoint import write_json, write_text
from .runtime.config import (
    Count,
    NonNegativeInt,
    Positive,
    Range,
    check,
    check_finite,
    check_typed,
    dump,
    flatten,
    signature,
)
from .runtime.distributed import (
    DEFAULT_TIMEOUT,
    StopRequest,
    all_reduce_max,
    all_reduce_sum,
    apply_fsdp,
    check_same,
    is_sharded,
    rank,
    seed_generators,
    set_timeout,
    sync_errors,
    world_size,
    wrap_ddp,
)
from .runtime.errors import UserError, closest, options
from .runtime.log import Log, environment, format_metrics, versions
from .runtime.numbers import Numbers, Part, examine
from .runtime.profiling import Profile
from .runtime.ranges import warmup_message
from .runtime.run_folder import HEADER, list_outputs, prepare_folder  # noqa: F401  (part of this module's interface)
from .runtime.state import State, best_weights
from .runtime.trackers import check_trackers, start
from .trial import set_up

SCHEDULES = ["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none"]  # timm's by step


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
    batch_size: Count | Literal["auto"],
    epochs: Count | None = None,
    iterations: Count | None = None,
    accumulate: Count = 1,
    repeats: Count = 1,
    clip_grad: Positive | None = None,
    ema: dict | None = None,
    checkpoint: str | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    strategy: Literal["ddp", "fsdp"] = "ddp",
    sharded_checkpoints: bool = False,
    freeze: int | str | Sequence[str] | None = None,
    sync_bn: bool = False,
    compile: bool = False,
    channels_last: bool = False,
    grad_checkpointing: bool = False,
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0,
    workers: NonNegativeInt = 0,
    device: str | None = None,
    log_every: Count = 50,
    save_every: Count | None = None,
    eval_every: Count | None = None,
    patience: Count | None = None,
    profile: Count | None = None,
    max_skipped: Count = 10,
    loss_spike: Annotated[float, Range(1, open_low=True)] | None = 4.0,
    timeout: Positive = DEFAULT_TIMEOUT,
    trackers: Sequence[str] = (),
) -> None:
    """Train a model; a config's keys are these arguments. docs/train.md says which can change when a run resumes.

    model: name, and arguments of timm.create_model; drop rates from 0 to less than 1. data, task: `type`, a class, and
    its arguments.
    optimizer: arguments of timm.optim.create_optimizer_v2: lr more than 0, weight_decay 0 or more, momentum and betas
    from 0 to less than 1. schedule: of timm's create_scheduler_v2, followed step by step; lengths 0 or more.
    epochs: passes over the training images, 1 or more; images that don't fill a last batch are left out of a pass.
    Alternatively iterations: steps, in which the schedule's lengths (warmup_epochs, decay_epochs, …) and eval_every are
    then given.
    batch_size: images in an optimizer step, over all processes and accumulated parts, as papers count; 1 or more, or
    "auto": the largest that fits into memory (saccade.train.trial); lr stays as given.
    accumulate: forward and backward passes per step, 1 or more. repeats: of each image in an epoch (1 or more), which
    then sees fewer of them (repeated augmentation). clip_grad: largest norm of the gradient, more than 0.
    ema: arguments of timm.utils.ModelEmaV3 (decay from 0 to 1); the averaged weights are evaluated too.
    checkpoint: weights to begin with; a classifier of another size than the data's is left out.
    freeze: parameters that are not trained: the number of first stages, or names; see saccade.train.models.freeze.
    precision: of autocast.
    strategy: ddp: each process has a full model; fsdp: weights, gradients and optimizer state are sharded over the
    processes (torch's FSDP2). sharded_checkpoints: with fsdp, each process writes its own shards to a folder that all
    share, for models larger than the memory of one host.
    sync_bn: BatchNorm over all processes. compile: by torch.compile. channels_last: memory format of weights and maps.
    grad_checkpointing: recompute activations in the backward pass.
    seed: 0 to 2**32 - 1. workers: loader processes per process, 0 or more. device: cpu or cuda (None: cuda if any).
    log_every, save_every: steps, 1 or more. eval_every: epochs, 1 or more (None: each). A checkpoint is saved before
    and after each evaluation too.
    patience: evaluations without a better score after which a run ends early, 1 or more (None: never).
    profile: steps, after the first two, that torch.profiler records into the run's profile/, 1 or more (None: none).
    max_skipped: steps in a row whose loss or gradients are not finite, 1 or more; each is skipped with a warning, and
    the last ends the run. loss_spike: a loss more than this many times the median of those before is reported; more
    than 1 (None: never).
    timeout: seconds that a process waits for the others, more than 0, before the job ends.
    trackers: of "tensorboard" and "wandb", which get what the log gets.
    Raises UserError for errors that the user can fix and, with the state saved, after SIGTERM or SIGUSR1 (exit code 75)
    and Ctrl-C (130); 69 and 70 are in saccade.train.runtime.errors.
    """
    config = {key: value for key, value in locals().items() if key not in ("run_dir", "resume")}
    stop = StopRequest()
    set_timeout(timeout)
    own = "workers", "device", "data.root"  # may differ from machine to machine
    check_same({k: v for k, v in flatten(dump(config)).items() if k not in own} | {"--resume": resume} | versions())

    # Build
    with sync_errors():
        device, data, task, net, trained, frozen, inputs, training, validation, autocast, batch_size, per_epoch = (
            set_up(run_dir if resume else None, **config)
        )
        config["batch_size"] = batch_size
        if ema is not None:
            # Sharded parameters and full buffers can't be averaged in one call, as `foreach` would.
            ema = ModelEmaV3(net, **ema | (dict(foreach=False) if strategy == "fsdp" else {}))
        if strategy == "fsdp" and world_size() > 1:
            for each in (net, ema.module) if ema is not None else (net,):
                apply_fsdp(each, device, task.methods)
        try:
            optimizer = create_optimizer_v2(net, **optimizer)
            unit = 1 if epochs is None else per_epoch  # steps that the schedule's lengths and eval_every count
            by_step = dict(num_epochs=epochs or iterations, step_on_epochs=False, updates_per_epoch=unit)
            scheduler, length = create_scheduler_v2(optimizer, **schedule, **by_step)
        except (ValueError, TypeError, AssertionError) as error:  # values that timm or torch refuse
            raise UserError(f"the optimizer or schedule section is invalid: {error}") from error
        steps = length * unit
        eval_steps = eval_every * unit if eval_every else per_epoch
        if compile:
            net.compile()
        scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        log = Log(run_dir, steps, per_epoch, batch_size, device)

    sizes = dict(parameters=sum(p.numel() for p in net.parameters()), classes=len(data.class_names))
    check_same({"number of training images": len(training), "number of val images": len(validation), **sizes})
    bad = BadImages(run_dir / "bad_images.txt", data, resume)
    bad.share()

    # Resume
    of_data = data.class_names, len(training), order_method(len(training))
    state = State(net, ema, optimizer, scaler, dump(config), *of_data)
    folder = run_dir / "checkpoints"
    with sync_errors():
        messages = [*task.messages, *warmup_message(config), *(state.load(folder, device, steps) if resume else ())]
        if scheduler and state.step > 0:
            scheduler.step_update(state.step - 1)  # the rate of the last step, as the checkpoint has it
        if rank() == 0:
            write_text(run_dir / "config.py", f"{HEADER}\n\n{state.config}")
            write_json(run_dir / "environment.json", environment(device))
            started = start(trackers, run_dir, state.config, state.step, log.message)
            log.start(state.step, state.evaluated, started)
        for line in messages:
            log.message(line)
    saved = state.step

    def save(best: bool = False) -> None:
        nonlocal saved
        with log.paused(), sync_errors():
            tensors, meta = state.content(gather=not sharded_checkpoints)
            if rank() == 0 and not sharded_checkpoints:
                save_checkpoint(folder, tensors, meta, best, rotate=saved != state.step)
        if sharded_checkpoints:
            with log.paused():
                sharded.save(folder, tensors, meta, best, rotate=saved != state.step)
        saved = state.step
        stop.saved = f"--resume continues after step {saved}, the last checkpoint in {folder}"

    def stopped() -> UserError:
        if saved != state.step:
            save()
        message = f"step {state.step} of {steps} is saved in {folder}; the same command with --resume continues"
        log.message(message, show=False)
        return UserError(message, stop.code, quiet=rank() > 0)

    def measure(loader: Batches, weights: nn.Module) -> dict[str, float]:
        return evaluate(weights, task, loader, autocast, stop, inputs if is_sharded(weights) else None)[0]

    # Steps
    ddp_model = wrap_ddp(trained, device)
    aspects = getattr(training, "aspects", None)
    order = partial(TrainingOrder, len(training), batch_size, seed, repeats=repeats, aspects=aspects)
    order = partial(order, accumulate=accumulate)
    training_batches = iter(batches(training, order(state.step, steps), seed, workers, device, bad))
    sequences = getattr(validation, "sequences", None)
    evaluation_order = EvaluationOrder(len(validation), max(1, batch_size // world_size()), sequences)
    validation_batches = batches(validation, evaluation_order, seed, workers, device, bad)
    resumed_at = state.step
    numbers = Numbers(state, max_skipped, loss_spike, log.message)

    def explain() -> list[Part]:
        """Load the images of this step again, and find where a value is not finite."""
        seed_generators("step", seed, state.step, rank())
        keys, parts = list(order(state.step, state.step + 1)), []
        for part, batch in zip(keys, batches(training, order(state.step, state.step + 1), seed, 0, device, bad)):
            with autocast():
                parts.append(examine(trained, partial(task.loss, trained, batch), sample_names(training, part)))
        return parts

    profiler = Profile(run_dir / "profile", profile, log.message)
    stop.catch_interrupts()
    while True:
        finished = state.step == steps
        due = state.step // eval_steps > state.evaluated // eval_steps and not state.skipped_in_row
        if state.step > state.evaluated and (finished or due):
            if saved != state.step:
                save()  # before the evaluation, which may fail
            with log.paused():
                metrics = state.evaluate(partial(measure, validation_batches))
            if stop.agreed(bad, wait=True):
                raise stopped()
            improved = state.judge(metrics, task.score)
            log.evaluation(state.step, metrics, improved)
            save(improved)
        elif save_every and state.step % save_every == 0 and state.step > resumed_at and not state.skipped_in_row:
            save()
        if finished or state.has_stalled(patience, eval_steps):
            break
        if stop.agreed(bad):
            raise stopped()

        seed_generators("step", seed, state.step, rank())
        if scheduler:
            scheduler.step_update(state.step)
        ddp_model.train()
        for module in frozen:
            module.eval()
        numbers.begin()
        sums: dict[str, Tensor] = {}
        for part in range(accumulate):
            with log.waiting():
                batch = next(training_batches)
            if state.step == part == 0 and rank() == 0:
                log.image(task.draw_batch(run_dir, batch, inputs), 0)
                seed_generators("step", seed, state.step, rank())  # as they were
            with nullcontext() if ddp_model is trained or part == accumulate - 1 else ddp_model.no_sync():
                with autocast():
                    loss, extra = task.loss(ddp_model, batch)
                scaler.scale(loss / accumulate).backward()
            for name, value in {"loss": loss.detach(), **extra}.items():
                sums[name] = sums.get(name, 0) + value / accumulate
        values = numbers.accept(sums, explain, stop.flags(bad))
        stop.heard(numbers.flags)
        if values is not None:
            if clip_grad is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip_grad)
            scaler.step(optimizer)
            scaler.update()
            state.note(values)
        optimizer.zero_grad()
        state.step += 1
        if ema is not None and values is not None:
            ema.update(net, step=state.step)
        log.stepped(state.step)
        profiler.step()
        if state.step % log_every == 0 or state.step == steps:
            log.training(state.step, state.take_means(), max(group["lr"] for group in optimizer.param_groups))

    # Finish
    stop.catch_interrupts(False)
    profiler.stop()
    if state.step < steps:
        log.message(f"ended early, at step {state.step} of {steps}: no better score in {patience} evaluations")
    with sync_errors():
        if rank() == 0:
            best = task.model(**model | dict(pretrained=False))  # plain, however `net` was wrapped
            best.load_state_dict(best_weights(folder))
            task.export(best, run_dir, inputs, data.class_names)
    if rank() == 0:
        plots = task.plot_training(run_dir)
        for file in plots:
            log.image(file, state.step)
    log.stop()
    if rank() == 0:
        metrics = format_metrics(state.best["metrics"])
        skipped = f"; {state.skipped} steps were skipped, see log.txt" if state.skipped else ""
        log.message(f"done: the best on val was step {state.best['step']} of {steps} ({metrics}){skipped}")
        log.message(list_outputs(run_dir, [run_dir / "model.safetensors", run_dir / "log.jsonl", *plots]))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Any,
    loader: Batches,
    autocast: Callable[[], AbstractContextManager],
    stop: StopRequest | None = None,
    sharded_inputs: dict[str, Any] | None = None,
) -> tuple[dict[str, float], Any]:
    """Return the task's metrics over all processes, each image counted once, and its detail; `stop` cuts it short.

    Images that can't be read are left out; where there are any, "skipped" is how many. Undefined metrics are NaN.

    sharded_inputs: of a model that is sharded over the processes, the preprocessing: processes with fewer batches than
    others run the model on a blank one, since all must run it equally often; none stops before the others.
    """
    rounds = all_reduce_max(len(loader)) if sharded_inputs else 0

    def counted() -> Iterator:
        count = 0
        for batch in loader:
            count += 1
            if stop is not None and stop.asked and not sharded_inputs:
                return
            yield batch
        for _ in range(rounds - count):
            task.probe(model, sharded_inputs)

    model.eval()
    with autocast():
        metrics, detail = task.evaluate(model, counted())
    skipped = int(all_reduce_sum(torch.tensor(loader.skipped)))
    return metrics | (dict(skipped=skipped) if skipped else {}), detail


def validate(config: dict) -> None:
    """Check a config against what it builds. Raises UserError for an unknown key or name, or a wrong value."""
    check("", config, train)
    check_finite("", config)
    check_typed("data", config["data"])
    check_typed("task", config["task"])
    if not isinstance(config["model"].get("name"), str):
        raise UserError("model.name is missing: set it in the config or with model.name=… on the command line")
    for key in {"num_classes", "checkpoint", "new_head"} & config["model"].keys():
        raise UserError(f"model.{key} can't be set: classes come from the data, weights from {options().checkpoint}")
    ranges.check_model(config["model"])
    name = config["optimizer"].get("opt", "sgd")
    if name not in list_optimizers():
        raise UserError(f"unknown optimizer.opt {name!r}{closest(str(name), list_optimizers())}")
    name = config["schedule"].get("sched", "cosine")
    if name not in SCHEDULES:
        raise UserError(f"unknown schedule.sched {name!r}{closest(str(name), SCHEDULES)}")
    for section, (built, given, allowed) in timm_sections(config).items():
        if config.get(section) is not None:
            check(section, config[section], *built, without=given, ranges=allowed)
    check_trackers(config.get("trackers", ()))
    if config.get("strategy") == "fsdp" and config.get("channels_last"):
        raise UserError("channels_last=True can't be combined with strategy=fsdp, which shards contiguous weights only")
    if config.get("sharded_checkpoints") and config.get("strategy") != "fsdp":
        raise UserError("sharded_checkpoints=True needs strategy=fsdp: with ddp each process has all weights")
    if (config.get("epochs") is None) == (config.get("iterations") is None):
        raise UserError("give one of epochs and iterations, with the other None")


def timm_sections(config: dict) -> dict[str, tuple[tuple, tuple, dict[str, Range]]]:
    """Return the sections passed to timm: the callables, the arguments that the engine gives, ranges of the others."""
    optimizer = create_optimizer_v2, get_optimizer_class(config["optimizer"].get("opt", "sgd"), bind_defaults=False)
    by_engine = ("optimizer", "num_epochs", "step_on_epochs", "updates_per_epoch")
    return dict(
        optimizer=(optimizer, ("model_or_params", "params", "param_group_fn"), ranges.OPTIMIZER),
        schedule=((create_scheduler_v2,), by_engine, ranges.SCHEDULE),
        ema=((ModelEmaV3,), ("model", "device"), ranges.EMA),
    )


def known_keys(config: dict) -> list[str]:
    """List the keys that a valid config can have: "epochs", "optimizer.lr", …"""
    keys = [key for key in signature(train) if key not in ("model", "data", "task", "optimizer", "schedule", "ema")]
    keys += [f"{section}.{key}" for section in ("data", "task") for key in signature(config[section]["type"])]
    keys += ["model.name", "model.pretrained", "model.drop_rate", "model.drop_path_rate"]
    for section, (built, given, _) in timm_sections(config).items():
        keys += [f"{section}.{key}" for key in signature(*built, without=given)]
    return keys
