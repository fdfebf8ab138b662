"""Recorded steps: what is around a CUDA graph, with a stand-in for it on the CPU, then the graph itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import Kind, V, build, each_of, variants_of
from torch import Tensor

from palm_pytorch import PaLM, PerceiverAR
from palm_pytorch.generation import decode, recording

models = each_of(variants_of(40)[1::2])
PROMPT = torch.randint(V, (2, 12), generator=torch.Generator().manual_seed(3))
MASK = torch.arange(12) >= torch.tensor([[0], [7]])
NEW = decode.LEAST_STEPS + 6


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Contexts record on the CPU too: a stand-in works as often as it is replayed, always into the same
    logits. The room of every recording."""
    rooms: list[int] = []
    prepare = decode.Context.__init__

    def record(work: Callable[[], Tensor], again: Callable[[], None]) -> Callable[[], Tensor]:
        result = work().clone()
        again()
        return lambda: result.copy_(work())

    def prepared(context: decode.Context, *arguments: Any, **options: Any) -> None:
        prepare(context, *arguments, **options)
        context.packed, context.recordable = None, True

    class Static(recording.StaticCache):
        def __init__(self, cache: Any, room: int) -> None:
            super().__init__(cache, room)
            rooms.append(room)

    monkeypatch.setattr(recording, "record", record)
    monkeypatch.setattr(recording, "StaticCache", Static)
    monkeypatch.setattr(recording, "LEAST_ROOM", 16)
    monkeypatch.setattr(decode.Context, "__init__", prepared)
    return rooms


@models
def test_recorded_steps_draw_what_others_do(
    kind: Kind, options: dict[str, Any], recordings: list[int]
) -> None:
    """Through several rooms, or several windows of Perceiver AR."""
    net, drawn = build(kind, options), {"temperature": 0, "num_samples": 2, "prompt_mask": MASK}
    found, scores = net.generate(PROMPT, NEW, log_probs=True, **drawn)
    wanted, right = net.generate(PROMPT, NEW, log_probs=True, use_cache=False, **drawn)
    assert torch.equal(found, wanted) and (scores - right).abs().max() <= 1e-4
    assert recordings == ([24, 40] if kind is PerceiverAR else [24, 48, 82])


def test_what_cannot_be_recorded_goes_on_without(
    recordings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first step, and from the one at which a room is full."""
    net, stand_in = build(PaLM, {}), recording.record
    wanted = net.generate(PROMPT, NEW, temperature=0, prompt_mask=MASK, use_cache=False)
    for successes in (0, 1):
        left = [stand_in] * successes

        def record(work: Any, again: Any, left: list[Any] = left) -> Any:
            if not left:
                raise RuntimeError("operation not permitted when stream is capturing")
            return left.pop()(work, again)

        monkeypatch.setattr(recording, "record", record)
        with pytest.warns(UserWarning, match="not recorded.*capturing"):
            found = net.generate(PROMPT, NEW, temperature=0, prompt_mask=MASK)
        assert torch.equal(found, wanted)


def test_a_cpu_records_nothing() -> None:
    context = decode.Context(
        build(PaLM, {}), PROMPT, None, room=500, window=None, stride=None, use_cache=True
    )
    assert not context.recordable


@models
def test_compiled_steps_give_what_others_do(
    kind: Kind, options: dict[str, Any], recordings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded, with nothing that the compiler could not follow. Rooms are compiled for once, and of several
    rows once more for one that is all of the storage."""
    torch.compiler.reset()
    compile_as, graphs, calls = torch.compile, [], []

    def counted(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return lambda *x: calls.append(x[0]) or graph(*x)

    monkeypatch.setattr(
        torch, "compile", lambda code, options, **how: compile_as(code, backend=counted, **how)
    )
    net, found = build(kind, options), []
    for compile in (False, True):
        window = options.get("max_seq_len")
        context = decode.Context(
            net, PROMPT, MASK, room=NEW, window=window, stride=None, use_cache=True, compile=compile
        )
        tokens = torch.randint(V, (2, NEW), generator=torch.Generator().manual_seed(5))
        found.append([context.read(), *(context.extend(column) for column in tokens.unbind(1)[:-1])])
        found[-1] = [logits.clone() for logits in found[-1]]
    assert len(graphs) <= 2 and len(calls) >= NEW // 2
    assert all((a - b).abs().max() <= 1e-4 for a, b in zip(*found, strict=True))


def test_only_a_gpu_compiles_steps() -> None:
    net = build(PaLM, {})
    assert decode.compiled_step(net) is decode.compiled_step(net) is not decode.compiled_step(build(PaLM, {}))
    with pytest.raises(ValueError, match=r"compile: .*GPU.*cpu"):
        net.generate(PROMPT, NEW, compile=True)


@pytest.mark.gpu
@models
@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_gives_what_steps_by_themselves_give(
    kind: Kind, options: dict[str, Any], dtype: torch.dtype, compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph of a real device, which no stand-in replaces. In bfloat16 likeliest tokens may tie, so the
    log-probabilities decide there."""
    monkeypatch.setattr(recording, "LEAST_ROOM", 16)
    net = build(kind, options).to("cuda", dtype)
    prompt, mask, made = PROMPT.to("cuda"), MASK.to("cuda"), []
    record = recording.record
    monkeypatch.setattr(recording, "record", lambda *work: made.append(record(*work)) or made[-1])
    drawn = {"temperature": 0, "prompt_mask": mask, "log_probs": True}
    found, scores = net.generate(prompt, 80, compile=compile, **drawn)
    assert len(made) >= 2
    hook = net.register_forward_hook(lambda *_: None)  # what a graph would not call
    wanted, right = net.generate(prompt, 80, **drawn)
    hook.remove()
    if dtype == torch.float32:
        assert torch.equal(found, wanted)
    same = (found == wanted).cumprod(dim=1).bool()
    allowed = 1e-3 if dtype == torch.float32 else 0.2
    assert same[:, 0].all() and (scores - right)[same].abs().max() <= allowed
