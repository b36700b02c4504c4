"""One fine-tuning job: weights, data, a Composer Trainer, scores, predictions.

    python -m anymixer.glue.job SPEC.json FOLDER

See `anymixer.glue.spec` for what goes in and what comes out.
"""

import dataclasses
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymixer import __version__
from anymixer.checkpoints.files import StoredWeights
from anymixer.entry_point import run
from anymixer.errors import UserError
from anymixer.files import write_text_atomic
from anymixer.glue.data import Examples, SplitMissing, check_data, data_digest, load_split
from anymixer.glue.job_config import check_lengths, early_stopping, starting_point, trainer_config
from anymixer.glue.metrics import majority_metrics
from anymixer.glue.spec import CHECKPOINT_NAME, PREDICTIONS_NAME, RESULT_NAME, JobResult, JobSpec
from anymixer.glue.starting_point import choose_tokenizer, open_starting_point, take_weights
from anymixer.glue.tasks import Task, get_task
from anymixer.models import ModelConfig, build_classifier
from anymixer.options import parse_options
from anymixer.training import TrainerConfig, check_tables

if TYPE_CHECKING:
    from composer import Trainer
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from anymixer.glue.batches import Batches, Encoded
    from anymixer.glue.recorder import JobRecorder

_PACKAGES = ("torch", "mosaicml", "transformers", "tokenizers", "evaluate", "scikit-learn", "scipy", "numpy")


@dataclass(frozen=True)
class _Data:
    """Encoded examples. validation, tests: by name of the set, and of the submission's file."""

    train: "Encoded"
    validation: Mapping[str, "Encoded"]
    tests: Mapping[str, "Encoded"]
    partial: list[str]
    missing: list[str]


def run_job(spec: JobSpec, folder: Path, device: str) -> JobResult:
    """Train and score one job; predictions and, where asked for, the checkpoint are left in `folder`.

    device: "cpu", or "gpu", which is the first that this process sees.

    Raises:
        UserError: a key, a file or a checkpoint is at fault, found before any training.
        SplitMissing: the task's training data, or all of its validation data, is not there.
        LossNotFinite: the loss became NaN or infinite.
    """
    task = get_task(spec.task, "task")
    check_data(task, spec.data_local)
    config = trainer_config(spec, device)
    check_tables(config)
    # Composer takes seconds to import, so mistakes are found first.
    from anymixer.training.run_record import peak_memory_bytes

    name = starting_point(spec)
    point = None if name is None else open_starting_point(name)
    digest = None if point is None else point.digest  # now, not when the file may have changed
    _check_unchanged(task, spec, digest)
    tokenizer = choose_tokenizer(point, spec.tokenizer_name)
    model_config = parse_options(ModelConfig, spec.model, "model")
    check_lengths(spec, model_config, len(tokenizer))
    data = _load(task, spec, tokenizer)
    model, starting = _build_model(task, spec, model_config, point)
    print(f"{spec.job_id}: {starting}", flush=True)
    trainer, recorder, seconds = _train(task, spec, config, model, tokenizer, data)
    if recorder.best_weights is not None:
        trainer.state.model.load_state_dict(recorder.best_weights)
    folder.mkdir(parents=True, exist_ok=True)
    predictions = _predict(task, spec, trainer, tokenizer, data.tests, folder)
    checkpoint = _save(model, tokenizer, folder) if spec.save_checkpoint else None
    trainer.close()
    best, last = recorder.best, recorder.evaluations[-1]
    selected = best if spec.select == "best" else last
    return JobResult(
        job_id=spec.job_id,
        task=spec.task,
        seed=spec.seed,
        spec=json.loads(spec.to_json()),
        evaluations=recorder.evaluations,
        best=best,
        last=last,
        metrics=selected["metrics"],
        score=selected["score"],
        majority_baseline=_majority(task, data),
        sizes={"train": len(data.train), **{name: len(one) for name, one in data.validation.items()}},
        partial=data.partial,
        missing=data.missing,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        versions=_versions(),
        starting=starting,
        checkpoint_hash=digest,
        train_losses=recorder.losses,
        predictions=predictions,
        checkpoint=checkpoint,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _check_unchanged(task: Task, spec: JobSpec, starting_digest: str | None) -> None:
    """Raise UserError for files that are not those the job was planned with, by which its result is filed: a sweep
    takes hours, in which pretraining may go on."""
    changed = []
    if spec.starting_digest not in (None, starting_digest):
        changed.append(f"starting_point: {spec.starting_point}")
    if spec.data_digest is not None and data_digest(task, str(spec.data_local)) != spec.data_digest:
        changed.append(f"data_local: {spec.data_local}")
    if changed:
        raise UserError(f"{changed[0]} has changed since this job was planned; start glue.py again")


def _load(task: Task, spec: JobSpec, tokenizer: "PreTrainedTokenizerFast") -> _Data:
    """Read and tokenize all there is of the task."""
    from anymixer.glue.batches import encode

    partial, missing = [], []

    def encoded(examples: Examples, name: str) -> "Encoded":
        if examples.partial:
            partial.append(name)
        if examples.unreadable:
            print(f"{task.name}: {examples.unreadable} unreadable lines of {name} left out")
        return encode(examples, tokenizer, spec.max_sequence_length)

    train = encoded(load_split(task, "train", spec.data_local), "train")
    validation, tests = {}, {}
    for name, split in task.validation.items():
        try:
            validation[name] = encoded(load_split(task, split, spec.data_local), name)
        except SplitMissing:
            missing.append(name)
    for test in task.tests if spec.predict else ():
        try:
            examples = load_split(task, test.split, spec.data_local, labelled=False, other=test.task)
            tests[test.submission] = encoded(examples, test.submission)
        except SplitMissing:
            missing.append(test.submission)
    for name in missing:
        print(f"{task.name}: no data for {name}; left out", flush=True)
    return _Data(train, validation, tests, partial, missing)


def _build_model(
    task: Task, spec: JobSpec, config: ModelConfig, point: StoredWeights | None
) -> tuple["PreTrainedModel", str]:
    from composer.utils import reproducibility

    from anymixer.models.sequence_classification import draw_head

    reproducibility.seed_all(spec.seed)
    model = build_classifier(config, task.num_labels, pooling=spec.pooling, classifier_dropout=spec.classifier_dropout)
    reproducibility.seed_all(spec.seed)
    draw_head(model, model.config.initializer_range)
    if point is None:
        return model, "all weights drawn at random (from_scratch)"
    return model, take_weights(model, point)


def _train(
    task: Task,
    spec: JobSpec,
    config: TrainerConfig,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    data: _Data,
) -> tuple["Trainer", "JobRecorder", float]:
    """Train to the end, or until there is no more gain; returns the seconds that took, too."""
    from anymixer.glue.batches import Batches, data_spec, pad_token_id
    from anymixer.glue.composer_model import ClassifierComposerModel
    from anymixer.glue.recorder import JobRecorder
    from anymixer.training.launch import plan_launch
    from anymixer.training.trainer import build_trainer, fit

    plan = plan_launch(config)
    row_length = spec.max_sequence_length if spec.packing else None
    batches = Batches(
        data.train,
        spec.batch_size,
        pad_token_id=pad_token_id(tokenizer),
        longest_row=spec.max_sequence_length,
        seed=spec.seed,
        row_length=row_length,
    )
    recorder = JobRecorder(
        task,
        data.validation,
        steps_per_epoch=len(batches),
        keep_best=spec.select == "best",
        **early_stopping(spec),
    )
    trainer = build_trainer(
        config,
        ClassifierComposerModel(model, tokenizer, task),
        tokenizer,
        data_spec(batches),
        {
            name: data_spec(_eval_batches(one, plan.device_eval_batch_size, tokenizer, spec))
            for name, one in data.validation.items()
        },
        extra_callbacks=[recorder],
        hparams=dataclasses.asdict(spec),
    )
    started = time.perf_counter()
    fit(trainer)
    return trainer, recorder, time.perf_counter() - started


def _eval_batches(data: "Encoded", size: int, tokenizer: "PreTrainedTokenizerFast", spec: JobSpec) -> "Batches":
    from anymixer.glue.batches import Batches, pad_token_id

    return Batches(data, size, pad_token_id=pad_token_id(tokenizer), longest_row=spec.max_sequence_length)


def _predict(
    task: Task,
    spec: JobSpec,
    trainer: "Trainer",
    tokenizer: "PreTrainedTokenizerFast",
    tests: Mapping[str, "Encoded"],
    folder: Path,
) -> dict[str, str]:
    """Write the answers to every test set; returns submission file -> its place in `folder`."""
    import torch

    from anymixer.glue.batches import data_spec
    from anymixer.glue.composer_model import answers
    from anymixer.glue.predictions import submission

    written = {}
    for name, test in tests.items():
        batches = _eval_batches(test, spec.batch_size, tokenizer, spec)
        outputs: Any = trainer.predict(data_spec(batches), return_outputs=True)
        in_order = answers(torch.cat([output["logits"].float().cpu() for output in outputs])).numpy()
        predicted = in_order.copy()
        predicted[batches.order] = in_order
        written[name] = f"{PREDICTIONS_NAME}/{name}"
        write_text_atomic(folder / written[name], submission(task, predicted))
    return written


def _save(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", folder: Path) -> str:
    """Leave the weights and the tokenizer as a Hugging Face folder; what an earlier attempt left goes."""
    half, whole = folder / f".{CHECKPOINT_NAME}", folder / CHECKPOINT_NAME
    for path in (half, whole):
        shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(half)
    tokenizer.save_pretrained(str(half))
    half.rename(whole)
    return CHECKPOINT_NAME


def _majority(task: Task, data: _Data) -> dict[str, float]:
    """The majority baseline of every validation set, by "set/metric"."""
    assert data.train.labels is not None
    return {
        f"{name}/{metric}": value
        for name, one in data.validation.items()
        if one.labels is not None
        for metric, value in majority_metrics(task, data.train.labels, one.labels).items()
    }


def _versions() -> dict[str, str]:
    return {"anymixer": __version__, "python": platform.python_version()} | {name: version(name) for name in _PACKAGES}


def main(arguments: list[str]) -> None:
    """SPEC.json and FOLDER: run the job on the spec's device and leave its result in FOLDER."""
    if len(arguments) != 2:
        raise UserError("usage: python -m anymixer.glue.job SPEC.json FOLDER")
    spec = JobSpec.from_json(Path(arguments[0]).read_text(encoding="utf-8"))
    folder = Path(arguments[1])
    device, _, number = spec.device.partition(":")
    if number:
        # Before torch looks for devices; from here on it is this process's only one.
        os.environ["CUDA_VISIBLE_DEVICES"] = number
    result = run_job(spec, folder, device)
    write_text_atomic(folder / RESULT_NAME, result.to_json())
    print(f"{spec.job_id}: {100 * result.score:.2f} ({spec.select} of {len(result.evaluations)} evaluations)")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
