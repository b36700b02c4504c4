"""What a configuration comes to on this machine (device, precision, batch sizes), checked before any work."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from anymixer_kernels import backend
from composer.utils import dist, format_name_with_dist, get_device

from anymixer.errors import UserError
from anymixer.training.checkpoints import list_checkpoints
from anymixer.training.rank_watch import start_watch
from anymixer.training.trainer_config import TrainerConfig

# Without a key that says otherwise, evaluation takes at most this many sequences at once: the training
# batch of one rank may be thousands, to be cut into microbatches, and evaluation is not cut.
EVAL_BATCH_CAP = 128


@dataclass(frozen=True)
class LaunchPlan:
    """The choices that depend on the machine. Batch sizes are sequences of one rank.

    device_train_microbatch_size: "auto" only on a GPU, where Composer searches for it.
    """

    device: str
    precision: str
    world_size: int
    device_train_batch_size: int
    device_train_microbatch_size: int | str
    device_eval_batch_size: int
    cuda_graphs: bool

    def describe(self, config: TrainerConfig) -> str:
        """Return the choices in one line, for the start of the run."""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks ({_parallelism_name(config)})"
        precision = f"{self.precision} (auto)" if config.precision == "auto" else self.precision
        microbatch = str(self.device_train_microbatch_size)
        if self.device_train_microbatch_size == "auto":
            microbatch = f"auto, from {self.device_train_batch_size} down to what fits"
        elif config.device_train_microbatch_size == "auto":
            microbatch += " (auto: the whole batch of a rank)"
        return (
            f"device {self.device}, {ranks}, precision {precision}, "
            f"mixing ops {self._mixing_ops(config)}{', CUDA graphs' if self.cuda_graphs else ''}, "
            f"global batch {config.global_train_batch_size}, "
            f"microbatch {microbatch}, evaluation batch {self.device_eval_batch_size}"
        )

    def _mixing_ops(self, config: TrainerConfig) -> str:
        """The form that they run in, and why `auto` took it."""
        if config.backend != "auto":
            return config.backend
        problem = backend.triton_problem("cuda") if self.device == "gpu" else "no GPU"
        return "triton (auto)" if problem is None else f"torch (auto: {problem})"


def plan_launch(config: TrainerConfig) -> LaunchPlan:
    """Resolve every `auto` for this machine and check what only it can tell.

    Raises UserError, naming the key, for a device or precision this machine lacks, batches that the ranks
    cannot share evenly, or a save_folder that holds another run.
    """
    device = _device(config)
    world_size = dist.get_world_size()
    train = _per_rank(config.global_train_batch_size, world_size, "global_train_batch_size")
    plan = LaunchPlan(
        device=device,
        precision=_precision(config, device),
        world_size=world_size,
        device_train_batch_size=train,
        device_train_microbatch_size=_microbatch(config, device, train),
        device_eval_batch_size=_eval_batch(config, world_size, train),
        cuda_graphs=_cuda_graphs(config, device, world_size),
    )
    _check_backend(config, device)
    _check_save_folder(config)
    return plan


def initialize_distributed(plan: LaunchPlan, config: TrainerConfig) -> None:
    """Join the ranks, where there are several, and watch over them; before a dataset or a model is made."""
    if plan.world_size > 1 or config.parallelism_config:
        if "GROUP_RANK" in os.environ:  # torchrun's name for what Composer asks for
            os.environ.setdefault("NODE_RANK", os.environ["GROUP_RANK"])
        dist.initialize_dist(get_device(plan.device), config.dist_timeout)
        start_watch(config.rank_timeout, config.dist_timeout)


def save_folder(config: TrainerConfig) -> Path | None:
    """Return the local folder of checkpoints, `{run_name}` filled in; None for none or an object store."""
    if not config.save_folder or "://" in config.save_folder:
        return None
    return Path(format_name_with_dist(config.save_folder, config.run_name or "{run_name}"))


def saves_shards(config: TrainerConfig) -> bool:
    """Return whether checkpoints are folders of shards rather than files."""
    fsdp = (config.parallelism_config or {}).get("fsdp") or {}
    return fsdp.get("state_dict_type") == "sharded"


def _device(config: TrainerConfig) -> str:
    device = (config.device or ("gpu" if torch.cuda.is_available() else "cpu")).lower()
    if device == "gpu" and not torch.cuda.is_available():
        raise UserError("device: gpu, but torch sees no CUDA device here; remove the key or set device=cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("device: mps, but torch sees no Apple GPU here; remove the key or set device=cpu")
    if device == "gpu" and dist.get_local_world_size() > torch.cuda.device_count():
        ranks, gpus = dist.get_local_world_size(), torch.cuda.device_count()
        raise UserError(f"device: {ranks} ranks on this machine but {gpus} GPUs; start with: composer -n {gpus}")
    return device


def _precision(config: TrainerConfig, device: str) -> str:
    precision = config.precision.lower()
    if precision == "auto":
        return "amp_bf16" if device == "gpu" else "fp32"
    if device == "cpu" and precision != "fp32":
        raise UserError(f"precision: {precision} needs a GPU, but this run is on the CPU; set precision=auto")
    return precision


def _cuda_graphs(config: TrainerConfig, device: str, world_size: int) -> bool:
    if config.cuda_graphs != "auto":
        if config.cuda_graphs and device != "gpu":
            raise UserError(f"cuda_graphs: needs a GPU, but this run is on '{device}'; remove the key")
        return bool(config.cuda_graphs)
    # With several ranks, the exchange of gradients would not overlap with the backward pass.
    return device == "gpu" and world_size == 1 and not config.compile and not config.parallelism_config


def _check_backend(config: TrainerConfig, device: str) -> None:
    if config.backend not in ("triton", "mamba_ssm"):
        return
    find_problem = backend.triton_problem if config.backend == "triton" else backend.mamba_ssm_problem
    if problem := find_problem("cuda" if device == "gpu" else device):
        raise UserError(f"backend: {problem}; auto takes what runs here")


def _microbatch(config: TrainerConfig, device: str, train: int) -> int | str:
    if config.device_train_microbatch_size != "auto":
        return min(int(config.device_train_microbatch_size), train)
    return "auto" if device == "gpu" else train


def _eval_batch(config: TrainerConfig, world_size: int, train: int) -> int:
    if config.device_eval_batch_size is not None:
        return config.device_eval_batch_size
    if config.global_eval_batch_size is not None:
        return _per_rank(config.global_eval_batch_size, world_size, "global_eval_batch_size")
    return min(train, EVAL_BATCH_CAP)


def _per_rank(batch: int, world_size: int, key: str) -> int:
    if batch % world_size:
        lower = batch - batch % world_size
        nearest = f"{lower} or {lower + world_size}" if lower else f"{world_size}"
        raise UserError(f"{key}: {batch} cannot be shared evenly by {world_size} ranks; use e.g. {nearest}")
    return batch // world_size


def _check_save_folder(config: TrainerConfig) -> None:
    folder = save_folder(config)
    continues = config.load_path is not None and not config.load_weights_only
    if folder is None or config.autoresume or config.save_overwrite or continues:
        return
    if found := list_checkpoints(folder):
        raise UserError(
            f"save_folder: {folder} already holds checkpoints (the newest is {found[-1].name}); "
            "set autoresume=true to continue that run, another save_folder, or save_overwrite=true"
        )


def _parallelism_name(config: TrainerConfig) -> str:
    return "FSDP2" if config.parallelism_config else "DDP"
