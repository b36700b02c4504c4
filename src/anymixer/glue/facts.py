"""What a GLUE run finds on disk before it plans its jobs: checkpoints, the model in them, and each task's data."""

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from anymixer.errors import UserError
from anymixer.glue.config import MNLI, PRETRAINED, GlueSettings
from anymixer.glue.data import SplitMissing, check_data, data_digest
from anymixer.glue.graph import Facts, Graph
from anymixer.glue.job_config import check_lengths
from anymixer.glue.starting_point import KEY, checkpoint_digest, choose_tokenizer, open_starting_point, take_weights
from anymixer.glue.tasks import TASKS
from anymixer.mixers.plugins import module_files
from anymixer.models import ModelConfig, build_classifier

# The key of the run's starting point; that of a task's own is KEY.
_START = "starting_checkpoint_load_path"


def gather(settings: GlueSettings) -> Facts:
    """Look at the starting checkpoint and the data.

    Raises UserError where a checkpoint cannot be found, no task has data, or a task was told to start from an MNLI job
    that cannot be run.
    """
    left_out = _left_out(settings)
    present = [name for name in settings.tasks if name not in left_out]
    if not present:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise UserError(f"data_local: no task can be run: {reasons}")
    start = _local(settings)
    starts = {start, *(settings.task(name).starting_point for name in present)} - {None, PRETRAINED, MNLI}
    local = settings.data_local
    model = _model(settings, start)
    return Facts(
        model=model,
        starting_point=start,
        starting_digests={
            name: checkpoint_digest(name, _START if name == start else KEY) for name in sorted(map(str, starts))
        },
        code_digest=_code_digest(model.get("mixer")),
        data_digests={name: None if local is None else data_digest(TASKS[name], local) for name in present},
        left_out=left_out,
    )


def notes(settings: GlueSettings, facts: Facts, graph: Graph) -> list[str]:
    """Where the jobs differ from what the protocol would have, a line each."""
    lines = []
    without = [n for n in settings.tasks if n not in facts.left_out and settings.starts_from_mnli(n)]
    if MNLI in facts.left_out and without:
        lines.append(f"{', '.join(without)}: from the starting checkpoint, because mnli is left out")
    seed_of = {node.job_id: node.spec.seed for node in graph.nodes}
    borrowed: dict[tuple[str, int], list[int]] = {}
    for node in graph.nodes:
        if node.needs is not None and seed_of[node.needs] != node.spec.seed:
            borrowed.setdefault((node.spec.task, seed_of[node.needs]), []).append(node.spec.seed)
    for (name, seed), seeds in borrowed.items():
        own = ", ".join(map(str, dict.fromkeys(seeds)))
        lines.append(f"{name}: no MNLI job has seed {own}; started from that of seed {seed}")
    return lines


def check_start(settings: GlueSettings, facts: Facts, graph: Graph) -> None:
    """Raise UserError, before any job, for rows longer than the model's, a tokenizer that is not the checkpoint's, or a
    checkpoint that does not fit the model."""
    model = ModelConfig(**facts.model)
    point = None if facts.starting_point is None else open_starting_point(facts.starting_point, _START)
    if point is None and not settings.from_scratch:
        return  # every task names a checkpoint of its own, which its jobs check
    tokenizer = choose_tokenizer(point, settings.tokenizer_name)
    for node in graph.nodes:
        try:
            check_lengths(node.spec, model, len(tokenizer))
        except UserError as error:
            raise UserError(f"tasks.{node.spec.task}: {error}") from None
    if point is not None:
        take_weights(build_classifier(model, num_labels=2, pooling=settings.pooling), point)


def _left_out(settings: GlueSettings) -> dict[str, str]:
    """Tasks whose data is not there, and which part of it."""
    left_out = {}
    for name in settings.tasks:
        try:
            check_data(TASKS[name], settings.data_local)
        except SplitMissing as error:
            left_out[name] = str(error).removeprefix(f"{name}: ")
    if MNLI in left_out:
        insisting = [n for n in settings.tasks if settings.task(n).starting_point == MNLI]
        key = f"tasks.{insisting[0]}.starting_point: mnli" if insisting else "from_mnli: true"
        if insisting or settings.from_mnli:
            raise UserError(f"{key}: cannot be had: mnli has {left_out[MNLI]}")
    return left_out


def _local(settings: GlueSettings) -> str | None:
    """The starting checkpoint; one with a URI is downloaded once."""
    start = settings.starting_point()
    if start is None or "://" not in start:
        return start
    path = Path(str(settings.local_pretrain_checkpoint_folder)) / start.rpartition("/")[2]
    if not path.is_file():
        from composer.utils import maybe_create_object_store_from_uri, parse_uri
        from composer.utils.file_helpers import get_file

        path.parent.mkdir(parents=True, exist_ok=True)
        get_file(parse_uri(start)[2], str(path), object_store=maybe_create_object_store_from_uri(start))
    return str(path)


def _code_digest(mixer: Any) -> str | None:
    """SHA-256 over the files of the user's own mixers; None without any."""
    files = module_files(mixer)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest() if files else None


def _model(settings: GlueSettings, start: str | None) -> dict[str, Any]:
    """The fields of ModelConfig: the file's, else those that the starting checkpoint was saved with.

    Weights are always the starting point's, so the model itself asks for none.
    """
    if settings.model is not None:
        return asdict(replace(settings.model, use_pretrained=False))
    if start is None:
        raise UserError("model: must be set, because there is no starting checkpoint to take it from")
    point = open_starting_point(start, _START)
    if point.config is None:
        raise UserError(f"model: must be set; {start} holds weights without a configuration")
    return model_fields(point.config, start)


def model_fields(saved: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The fields of ModelConfig for a Hugging Face configuration of one of our models, or of a BERT.

    Raises UserError, naming `source`, for a configuration of anything else.
    """
    kind = saved.get("model_type")
    if kind == "mixer_bert":
        from anymixer.models import MixerBertConfig

        known = set(inspect.signature(MixerBertConfig).parameters) - {"mixer", "kwargs"}
        architecture = {key: value for key, value in saved.items() if key in known}
        return asdict(ModelConfig(mixer=saved.get("mixer"), model_config=architecture))
    if kind == "bert":
        from transformers import BertConfig

        known = set(inspect.signature(BertConfig).parameters) - {"kwargs"}
        architecture = {key: value for key, value in saved.items() if key in known}
        return asdict(ModelConfig(name="hf_bert", model_config=architecture))
    raise UserError(f"model: must be set; {source} is a '{kind}', which does not say what model of ours it is")
