from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import distributed_training as cases
import pytest
import torch
from ranks import Ranks, environment, free_port

from palm_pytorch.cli import main
from palm_pytorch.training.distributed import choose_grid, own_gpu
from palm_pytorch.training.logging import read_metrics

WORLDS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "1": (1, "none", {}),
    "ddp-2": (2, "ddp", {}),
    "ddp-4": (4, "ddp", {}),
    "fsdp-2": (2, "fsdp", {}),
    "fsdp-4": (4, "fsdp", {}),
    "tp-2": (2, "tp", {}),
    "tp-4": (4, "tp", {}),
    "ddp-2-again": (2, "ddp", {"activation_checkpointing": "block"}),
    "fsdp-2-again": (2, "fsdp", {"activation_checkpointing": "attention"}),
    "tp-2-again": (2, "tp", {"activation_checkpointing": "block"}),
    "fsdp-2-tp-2": (4, "fsdp+tp", {"tensor_parallel": 2}),
    "1-compiled": (1, "none", {"compile": True}),
    "fsdp-2-compiled": (2, "fsdp", {"compile": True}),
    "tp-2-compiled-again": (2, "tp", {"compile": True, "activation_checkpointing": "block"}),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


def run(ranks: Ranks, world: str, function: Callable[..., Any], *args: Any) -> list[Any]:
    world_size, kind, options = WORLDS[world]
    return ranks.run(world_size, function, *args, kind, options)


@pytest.fixture(scope="module")
def alone() -> dict[str, cases.Trained]:
    return {name: cases.train_alone(name) for name in cases.MODELS}


@pytest.mark.parametrize("world", WORLDS)
def test_losses_gradients_and_weights_are_those_of_one_process(
    ranks: Ranks, alone: dict[str, cases.Trained], world: str
) -> None:
    """A tensor-parallel plan that leaves the single key/value head or the norms to themselves runs without
    an error, and learns something else: tensor ranks drift apart. So does compiled code whose compiler lost a
    gradient, as torch 2.11's does of an autograd Function with a result that was changed in place."""
    world_size, kind, _ = WORLDS[world]
    names = list(cases.MODELS)
    results = run(ranks, world, cases.train_together, names)
    for number, name in enumerate(names):
        expected, trained = alone[name], results[0][number]
        assert trained.losses == pytest.approx(expected.losses, rel=1e-5), name
        assert trained.norms == pytest.approx(expected.norms, rel=1e-5), name
        assert trained.size == expected.size, name
        for what in ("gradients", "parameters"):
            found, wanted = getattr(trained, what), getattr(expected, what)
            assert found.keys() == wanted.keys()
            for parameter, value in wanted.items():
                scale = 1e-5 * value.abs().max().item()
                torch.testing.assert_close(
                    found[parameter],
                    value,
                    rtol=1e-5,
                    atol=scale,
                    msg=lambda text, where=f"{what} of {name}, {parameter}": f"{where}: {text}",
                )
        tensor_ranks = {"tp": world_size, "fsdp+tp": 2}.get(kind, 1)
        for rank, result in enumerate(results):
            first = results[rank - rank % tensor_ranks][number].replicas
            assert result[number].replicas.keys() == first.keys()
            for piece, value in result[number].replicas.items():
                assert torch.equal(value, first[piece]), f"{name}, {piece} of rank {rank}"


@pytest.fixture(scope="module")
def written(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """The folder of a checkpoint from each world, and what is in it."""
    result = {}
    for world in ("1", "fsdp-2", "tp-4", "fsdp-2-tp-2"):
        folder = tmp_path_factory.mktemp(world)
        with suppress(pytest.skip.Exception):
            result[world] = folder, run(ranks, world, cases.save, RESHARDED, folder)[0]
    return result


RESHARDED = ["palm", "lamda"]


@pytest.mark.parametrize("world", ["1", "ddp-2", "fsdp-4", "tp-2", "fsdp-2-tp-2"])
def test_a_checkpoint_of_any_number_of_processes_resumes_on_any(
    ranks: Ranks, written: dict[str, tuple[Path, Any]], world: str
) -> None:
    folders = [folder for folder, _ in written.values()]
    loaded = run(ranks, world, cases.load, RESHARDED, folders)[0]
    for (source, (_, states)), models in zip(written.items(), loaded, strict=True):
        for name, state in states.items():
            assert models[name].keys() == state.keys()
            assert any("exp_avg" in key for key in state)
            for key, value in state.items():
                assert torch.equal(models[name][key], value), f"from {source}: {name}, {key}"


@pytest.mark.parametrize("world", ["ddp-2", "fsdp-4", "fsdp-2-tp-2"])
def test_gradients_travel_after_the_last_slice_only(ranks: Ranks, world: str) -> None:
    assert run(ranks, world, cases.synchronized) == [[False, True]] * WORLDS[world][0]


@pytest.mark.parametrize("world", ["ddp-2", "fsdp-2", "tp-2"])
def test_a_loss_that_is_no_number_on_one_process_is_skipped_on_all(ranks: Ranks, world: str) -> None:
    """Processes that decided by themselves would drift apart, or wait for each other."""
    results = run(ranks, world, cases.train_poisoned)
    for updated, (start, skipped, end) in results:
        assert updated == [False, True]
        for name, value in start.items():
            assert torch.equal(skipped[name], value)
            assert torch.equal(end[name], results[0][1][2][name])
        assert not torch.equal(end["token_emb.weight"], start["token_emb.weight"])


@pytest.mark.parametrize("world", ["ddp-2", "tp-2"])
def test_what_is_wrong_on_one_process_sets_all_back(ranks: Ranks, world: str, tiny: dict[str, Any]) -> None:
    """Tensor ranks compute each loss for themselves, and two of these may differ by their rounding: a process
    that alone finds a spike would wait for the others for ever."""
    quick = {"eval_every": 0, "generate_every": 0, "save_every": 4, "steps": 16}
    spike = {"spike_factor": 2.0, "spike_rewind": 3, "spike_skip": 10}
    results = run(ranks, world, cases.train_through_faults, {**tiny, **quick, **spike})
    (numbers, parameters), *others = results
    assert (numbers["step"], numbers["rollbacks"], numbers["passed_over"]) == (16, 1, [[8, 18]])
    assert numbers["skipped_steps"] == 1
    for same_numbers, same_parameters in others:
        assert same_numbers == numbers
        for name, value in parameters.items():
            assert torch.equal(same_parameters[name], value), name
    events = [row for row in read_metrics(Path(tiny["out"]) / "metrics.jsonl") if "event" in row]
    assert [(row["step"], row["event"]) for row in events] == [(4, "skip"), (8, "rollback")]
    assert events[0]["loss"] == "inf"


def test_nothing_of_what_was_computed_again_is_held(ranks: Ranks) -> None:
    """A layer that left its term with the next one kept each block's second graph alive until the next
    forward pass, for checkpointing stops as soon as it has what the backward pass wants."""
    for held in run(ranks, "tp-2-again", cases.held_after_backward):
        assert held == {name: [] for name in cases.MODELS}


@pytest.mark.parametrize("world", ["tp-2", "fsdp-2-tp-2"])
def test_adafactor_scales_by_whole_matrices_of_which_each_process_has_a_share(
    ranks: Ranks, world: str
) -> None:
    (alone,) = run(ranks, "1", cases.train_by_recipe, "palm")
    for together in run(ranks, world, cases.train_by_recipe, "palm"):
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "world_size, options, complaint",
    [
        (2, {"parallel": "none"}, "parallel is 'none', and there are 2 processes"),
        (4, {"parallel": "tp", "tensor_parallel": 2}, "tensor_parallel is 2, and there are 4 processes"),
        (4, {"parallel": "fsdp+tp", "tensor_parallel": 3}, "tensor_parallel is 3; expected a divisor"),
        (2, {"parallel": "ddp", "tensor_parallel": 2}, "tensor_parallel is 2 and parallel 'ddp'"),
        (8, {"parallel": "tp"}, "heads is 4; expected a multiple of the 8 processes"),
        (3, {"parallel": "tp", "heads": 3, "dim": 32}, r"dim \* ff_mult is 64; expected a multiple of the 3"),
        (
            2,
            {"parallel": "tp", "model": "lamda", "heads": 6, "architecture": "kv_heads=3"},
            "kv_heads is 3; expected a multiple of the 2 processes",
        ),
        (2, {"parallel": "tp", "dropout": 0.1}, "dropout is 0.1; expected 0 with parallel 'tp'"),
        (3, {"parallel": "ddp"}, "batch_size is 4; expected a multiple of the 3 processes"),
        (3, {}, "batch_size is 4; expected a multiple of the 3 processes"),
    ],
)
def test_what_does_not_divide_is_refused(world_size: int, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        choose_grid(cases.config_of(options.pop("parallel", "auto"), **options), world_size)


def test_the_kind_follows_from_the_number_of_processes() -> None:
    assert choose_grid(cases.config_of("auto"), 1) == ("none", 1)
    assert choose_grid(cases.config_of("auto"), 4) == ("ddp", 1)
    assert choose_grid(cases.config_of("tp"), 4) == ("tp", 4)
    assert choose_grid(cases.config_of("fsdp+tp", tensor_parallel=2), 4) == ("fsdp+tp", 2)


def test_a_process_without_a_gpu_of_its_own_is_refused_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only where there is none: torchrun ends the others, and what they would say, when one fails."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in range(3):
        environment(monkeypatch, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=3)
        with pytest.raises(ValueError, match=r"nproc-per-node is 3; expected at most .* 2 GPUs"):
            own_gpu(torch.device("cuda"))
    environment(monkeypatch, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2)
    assert own_gpu(torch.device("cuda")) == torch.device("cuda", 1)


def test_of_several_processes_each_complains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--device", "cpu", "--heads", "3", "--parallel", "tp", "--out", str(tmp_path / "run")]
    for rank in (0, 1):
        environment(monkeypatch, WORLD_SIZE=2, RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert main(["train", *flags]) == 2
        said = capsys.readouterr().err
        assert said.startswith(
            f"rank {rank}: palm: error: heads is 3; expected a multiple of the 2 processes"
        )
    assert not (tmp_path / "run").exists()
