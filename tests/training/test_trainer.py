"""One rank, in this process, on a BERT of two layers."""

import functools
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from anymixer.errors import UserError
from anymixer.training import OptimizerConfig, SchedulerConfig
from anymixer.training.composer_model import MixerComposerModel
from anymixer.training.decoupled_adamw import DecoupledAdamW
from anymixer.training.run_callbacks import OptimizerNumbers, changed_keys
from anymixer.training.step_seed import step_seed
from anymixer.training.trainer import build_trainer, fit

OPTIMIZERS = ["adamw", "decoupled_adamw", "stableadamw"]


def test_the_loss_does_not_depend_on_the_microbatch(tiny_run):
    runs = [
        tiny_run.train(tiny_run.config(global_train_batch_size=16, device_train_microbatch_size=size), {"dropout": 0.0})
        for size in (4, 16, 3)
    ]
    assert len(runs[0]) == 6
    for losses in runs[1:]:
        assert losses == pytest.approx(runs[0], abs=1e-5)


def test_the_loss_is_the_mean_over_the_masked_rows_of_the_batch(tiny_run):
    model = tiny_run.model(dropout=0.0)
    batch = torch.utils.data.default_collate([tiny_run.sample(index) for index in range(8)])
    with torch.no_grad():
        expected = model(**batch).loss.item()
    assert tiny_run.train(tiny_run.config(max_duration="1ba", device_train_microbatch_size=1), {"dropout": 0.0}) == [
        pytest.approx(expected, abs=1e-6)
    ]


@pytest.mark.parametrize("kind", ["map", "mds"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_repeats_the_unbroken_one_bit_for_bit(tiny_run, tmp_path, name, kind):
    """Stopped in the second epoch, a step after a checkpoint; dropout, data order and optimizer included."""
    options = {"mds": tiny_run.write_shards(tmp_path / "mds")} if kind == "mds" else {}
    changes = {
        "max_duration": "12ba",
        "optimizer": OptimizerConfig(name=name, lr=1e-2, weight_decay=1e-4),
        "save_folder": str(tmp_path / "run"),
        "save_interval": "2ba",
        "autoresume": True,
    }
    whole = tiny_run.train(tiny_run.config(**changes | {"save_folder": None, "autoresume": False}), options)
    first = tiny_run.train(tiny_run.config(**changes), options | {"stop_after": 7})
    rest = tiny_run.train(tiny_run.config(**changes), options)
    assert first == whole[:7]
    assert rest == whole[6:]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_trains_with_the_numbers_that_are_configured_now(tiny_run, tmp_path, name):
    """Changed to these at the start, the optimizer would hold the same at every later step."""
    numbers = {"lr": 3e-3, "betas": [0.8, 0.9], "eps": 1e-7, "weight_decay": 0.5}
    old, new = OptimizerConfig(name=name, lr=1e-2, weight_decay=1e-4), OptimizerConfig(name=name, **numbers)

    def groups(optimizer, folder, **changes):
        changes |= {"save_folder": str(tmp_path / folder), "save_interval": "3ba", "optimizer": optimizer}
        tiny_run.train(tiny_run.config(**changes, autoresume=True))
        state = torch.load((tmp_path / folder / "latest-rank0.pt").resolve(), weights_only=False)["state"]
        kept = next(iter(state["optimizers"].values()))["param_groups"]
        scheduler = next(iter(state["schedulers"].values()))
        return [{k: v for k, v in group.items() if k != "params"} for group in kept], scheduler["base_lrs"]

    expected = groups(new, "new")
    before = groups(old, "resumed", max_duration="3ba", scheduler=SchedulerConfig(t_warmup="2ba", t_max="6ba"))
    assert before != expected
    assert groups(new, "resumed") == expected


def test_a_changed_learning_rate_holds_from_the_next_step_on():
    def made(lr, own_lr):
        parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
        groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": own_lr}]
        optimizer = torch.optim.AdamW(groups, lr=lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return SimpleNamespace(optimizers=[optimizer], schedulers=[scheduler])

    old, new, numbers = made(0.1, 0.3), made(0.2, 0.3), OptimizerNumbers()
    old.optimizers[0].step()
    old.schedulers[0].step()
    numbers.before_load(new, None)
    for part in ("optimizers", "schedulers"):
        getattr(new, part)[0].load_state_dict(getattr(old, part)[0].state_dict())
    numbers.after_load(new, None)
    assert [group["lr"] for group in new.optimizers[0].param_groups] == [0.2 / 2, 0.3 / 2]
    new.optimizers[0].step()
    new.schedulers[0].step()
    assert [group["lr"] for group in new.optimizers[0].param_groups] == pytest.approx([0.2 / 3, 0.3 / 3])


def test_a_changed_option_of_the_optimizer_is_refused(tiny_run, tmp_path):
    changes = {"save_folder": str(tmp_path), "autoresume": True, "save_interval": "3ba"}

    def resume(name, hparams):
        optimizer = OptimizerConfig(name=name)
        config = tiny_run.config(**changes, optimizer=optimizer, max_duration="3ba")
        build_trainer(config, tiny_run.model(), None, tiny_run.spec(8), hparams={"optimizer": hparams}).close()

    trainer = build_trainer(
        tiny_run.config(**changes, max_duration="3ba"),
        tiny_run.model(),
        None,
        tiny_run.spec(8),
        hparams={"optimizer": {"name": "decoupled_adamw", "options": {"amsgrad": False}}},
    )
    fit(trainer)
    trainer.close()
    with pytest.raises(UserError, match=r"^optimizer\.options\.amsgrad: False -> True: cannot change"):
        resume("decoupled_adamw", {"name": "decoupled_adamw", "options": {"amsgrad": True}})
    resume("adamw", {"name": "adamw", "options": {}})  # another optimizer, which starts without a state


def test_a_finished_run_is_said_to_be_finished(tiny_run, tmp_path, capsys):
    changes = {"save_folder": str(tmp_path), "save_interval": "6ba", "autoresume": True}
    assert len(tiny_run.train(tiny_run.config(**changes))) == 6
    assert tiny_run.train(tiny_run.config(**changes)) == []
    assert "nothing left to train: 6ba of 6ba are done" in capsys.readouterr().out
    assert len(tiny_run.train(tiny_run.config(**changes, max_duration="8ba"))) == 2


def test_load_path_resumes_or_warm_starts(tiny_run, tmp_path, capsys):
    whole = tiny_run.train(tiny_run.config(save_folder=str(tmp_path), save_interval="3ba"))
    path = str(tmp_path / "ep0-ba3-rank0.pt")
    assert tiny_run.train(tiny_run.config(load_path=path)) == whole[3:]
    os.truncate(tmp_path / "ep1-ba6-rank0.pt", 100)
    with pytest.raises(UserError, match=r"^load_path: .*ep1-ba6-rank0.pt is no whole checkpoint"):
        tiny_run.train(tiny_run.config(load_path=str(tmp_path)))
    (tmp_path / "ep1-ba6-rank0.pt").unlink()
    assert tiny_run.train(tiny_run.config(load_path=str(tmp_path))) == whole[3:]
    warm = tiny_run.train(tiny_run.config(load_path=path, load_weights_only=True))
    assert len(warm) == 6 and warm[0] not in whole
    assert f"loading the weights of {path}" in capsys.readouterr().out


def test_a_checkpoint_of_another_model_is_refused_in_one_line(tiny_run, tmp_path):
    tiny_run.train(tiny_run.config(save_folder=str(tmp_path)))
    state = torch.load(tmp_path / "latest-rank0.pt", weights_only=False)
    del state["state"]["model"]["model.bert.embeddings.word_embeddings.weight"]
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"^load_path: .*other.pt: the checkpoint does not fit") as error:
        tiny_run.train(tiny_run.config(load_path=str(tmp_path / "other.pt"), load_weights_only=True))
    assert "\n" not in str(error.value)


def test_a_changed_model_is_told_by_its_keys(tiny_run, tmp_path):
    config = tiny_run.config(save_folder=str(tmp_path), autoresume=True, max_duration="1ba")

    def start(hidden_size):
        torch.manual_seed(0)
        sizes = {"vocab_size": 61, "hidden_size": hidden_size, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = BertForMaskedLM(BertConfig(**sizes))
        hparams = {"model": {"model_config": {"hidden_size": hidden_size, "vocab_size": 61}}, "seed": hidden_size}
        trainer = build_trainer(config, model, None, tiny_run.spec(8), hparams=hparams)
        fit(trainer)
        trainer.close()

    start(8)
    with pytest.raises(UserError) as caught:
        start(16)
    found = tmp_path / "ep0-ba1-rank0.pt"
    assert str(caught.value) == (
        f"save_folder: {found}: the checkpoint does not fit this model: model.model_config.hidden_size: 8 -> 16; "
        "use another run_name or save_folder"
    )


def test_a_warm_up_of_no_step_is_one_line(tiny_run, capsys, recwarn):
    tiny_run.train(tiny_run.config(max_duration="4ba", scheduler=SchedulerConfig(t_warmup="0.06dur")))
    line = "scheduler.t_warmup: 0.06dur of 4ba comes to 0ba: there is no warm-up"
    assert capsys.readouterr().out.splitlines().count(line) == 1
    tiny_run.train(tiny_run.config(max_duration="4ba", scheduler=SchedulerConfig(t_warmup="0ba")))
    assert "t_warmup" not in capsys.readouterr().out
    assert not [warning for warning in recwarn if "warmup duration" in str(warning.message)]


def test_a_checkpoint_carries_its_configuration_and_model(tiny_run, tmp_path, capsys):
    tiny_run.train(tiny_run.config(save_folder=str(tmp_path)))
    state = torch.load(tmp_path / "latest-rank0.pt", weights_only=False)["state"]
    assert json.loads(state["callbacks"]["RunConfig"]["config"]) == {"seed": 17, "optimizer": {"lr": 3e-3}}
    assert state["integrations"]["huggingface"]["model"]["config"]["content"]["hidden_size"] == 16
    changes = {"max_duration": "8ba", "optimizer": OptimizerConfig(lr=1e-4)}
    tiny_run.train(tiny_run.config(**changes, load_path=str(tmp_path / "latest-rank0.pt")))
    assert "changed since the checkpoint: optimizer.lr: 0.003 -> 0.0001" in capsys.readouterr().out


def test_changed_keys_are_the_leaves_that_differ():
    assert changed_keys({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == [
        "a.c: 2 -> 3",
        "d: None -> 4",
    ]


def test_everything_a_recipe_names_runs_together(tiny_run, tmp_path, capsys):
    config = tiny_run.config(
        algorithms={
            "gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0},
            "low_precision_layernorm": {},
        },
        callbacks={
            "speed_monitor": {"window_size": 2, "gpu_flops_available": 10**12},
            "lr_monitor": {},
            "memory_monitor": {},
            "runtime_estimator": {},
            "optimizer_monitor": {"log_optimizer_metrics": True, "batch_log_interval": 1},
            "early_stopper": {
                "monitor": "LanguageCrossEntropy",
                "dataloader_label": "eval",
                "patience": "5ep",
            },
        },
        loggers={"in_memory": {}, "tensorboard": {"log_dir": str(tmp_path / "tb")}},
        eval_interval="3ba",
    )
    train, evaluation = tiny_run.spec(8), tiny_run.spec(8)
    trainer = build_trainer(config, tiny_run.model(), None, train, evaluation)
    assert fit(trainer)
    logged = next(log for log in trainer.logger.destinations if type(log).__name__ == "InMemoryLogger").data
    trainer.close()
    assert [float(value) for _, value in logged["throughput/device/mfu"]]
    assert [f"{value:.6f}" for _, value in logged["lr-DecoupledAdamW/group0"]][:3] == [
        "0.000000",
        "0.001500",
        "0.003000",
    ]
    assert len(logged["metrics/eval/LanguageCrossEntropy"]) == 2
    assert "l2_norm/grad/global" in logged
    assert list((tmp_path / "tb").rglob("events*"))
    printed = capsys.readouterr().out
    assert "device cpu, 1 rank, precision fp32 (auto), mixing ops torch (auto: no GPU), global batch 8, " in printed
    assert "microbatch 8 (auto:" in printed


def test_two_evaluations_of_one_model_agree(tiny_run):
    trainer = build_trainer(tiny_run.config(), tiny_run.model(), None, tiny_run.spec(8), tiny_run.spec(8))
    values = []
    for _ in range(2):
        trainer.eval()
        values.append({k: m.compute().item() for k, m in trainer.state.eval_metrics["eval"].items()})
    trainer.close()
    assert values[0] == values[1]


def test_a_microbatch_without_masked_tokens_leaves_the_loss_finite(tiny_run, monkeypatch):
    """Composer divides by the number of masked tokens, which the DataSpec gives as at least 1."""
    model = tiny_run.model(dropout=0.0)
    forward = model.forward

    @functools.wraps(forward)
    def zero_where_nothing_is_masked(**batch):  # as our models do; transformers' give NaN
        outputs = forward(**batch)
        if not (batch["labels"] != -100).any():
            outputs.loss = outputs.logits.sum() * 0.0
        return outputs

    monkeypatch.setattr(model, "forward", zero_where_nothing_is_masked)
    spec, losses = tiny_run.spec(8), tiny_run.Losses()
    spec.batch_transforms = lambda batch: batch | {"labels": batch["labels"].index_fill(0, torch.arange(4, 8), -100)}
    config = tiny_run.config(max_duration="2ba", device_train_microbatch_size=4)
    trainer = build_trainer(config, model, None, spec, extra_callbacks=[losses])
    fit(trainer)
    trainer.close()
    assert len(losses.values) == 2 and all(math.isfinite(loss) for loss in losses.values)


@pytest.mark.parametrize("algorithms, passes", [({}, 1), ({"sam": {"interval": 1}}, 2)])
def test_the_optimizer_steps_before_the_loss_is_read(tiny_run, monkeypatch, algorithms, passes):
    """No closure reads it first, but for SAM, which asks for a second pass."""
    closures, forwards = [], []
    step, forward = DecoupledAdamW.step, MixerComposerModel.forward
    monkeypatch.setattr(DecoupledAdamW, "step", lambda self, closure=None: closures.append(closure) or step(self))
    monkeypatch.setattr(MixerComposerModel, "forward", lambda *batch: forwards.append(batch) or forward(*batch))
    tiny_run.train(tiny_run.config(algorithms=algorithms))
    assert closures == [None] * 6 and len(forwards) == 6 * passes


def test_step_seeds_are_apart():
    seeds = {step_seed(seed, step, rank) for seed in range(5) for step in range(20) for rank in range(5)}
    assert len(seeds) == 500 and all(0 <= seed < 2**32 - 1 for seed in seeds)


def test_a_broken_newest_checkpoint_falls_back_to_the_one_before(tiny_run, tmp_path, capsys):
    changes = {
        "save_folder": str(tmp_path),
        "save_interval": "2ba",
        "autoresume": True,
        "max_duration": "4ba",
    }
    whole = tiny_run.train(tiny_run.config(**changes))
    newest = tmp_path / "ep0-ba4-rank0.pt"
    os.truncate(newest, newest.stat().st_size - 1)
    assert tiny_run.train(tiny_run.config(**changes)) == whole[2:]
    assert "ep0-ba2-rank0.pt; set aside as broken: ep0-ba4-rank0.pt.broken" in capsys.readouterr().out
    assert Path(tmp_path / "latest-rank0.pt").resolve() == newest.resolve()
