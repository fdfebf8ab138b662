"""`AutoregressiveWrapper` around small models, and around nets that answer from a script."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from definitions import error
from torch import Tensor, nn

from palm_pytorch import AutoregressiveWrapper, LaMDA, PaLM, PaLMLite, PerceiverAR

V, EOS = 37, 5
SHAPE: dict[str, Any] = {"num_tokens": V, "dim": 24, "depth": 2, "heads": 3, "dim_head": 16, "ff_mult": 2}
LENGTHS = {"max_seq_len": 20, "cross_attn_seq_len": 6}
MODELS: dict[Callable[..., nn.Module], dict[str, Any]] = {
    PaLM: {},
    PaLMLite: {},
    LaMDA: {},
    PerceiverAR: LENGTHS,
}
models = pytest.mark.parametrize("kind", MODELS)


def build(kind: Callable[..., nn.Module], **options: Any) -> nn.Module:
    return kind(**SHAPE, **MODELS[kind], **options)


def random_tokens(n: int = 15) -> Tensor:
    return torch.randint(V, (2, n))


class Counting(nn.Module):
    """Always predicts the token after the last one it sees; remembers what it was shown."""

    def __init__(self, num_tokens: int = V) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.dropout = nn.Dropout(0.5)
        self.shown: list[Tensor] = []
        self.modes: list[bool] = []

    def forward(self, tokens: Tensor, **inputs: Any) -> Tensor:
        assert ((tokens >= 0) & (tokens < self.num_tokens)).all()
        self.shown.append(tokens)
        self.modes.append(self.dropout.training)
        assert not torch.is_grad_enabled()
        return F.one_hot((tokens + 1) % self.num_tokens, self.num_tokens).float() * 100


def prompt(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


# Loss


@models
def test_loss_predicts_each_token_from_those_before(kind: Callable[..., nn.Module]) -> None:
    """Byte 0 and the pad token count as well."""
    net = build(kind).double()
    x = random_tokens()
    x[:, ::4] = 0
    logits = net(x[:, :-1])
    wanted = F.cross_entropy(logits.flatten(0, 1), x[:, -logits.shape[1] :].flatten())
    assert error(AutoregressiveWrapper(net)(x), wanted) <= 1e-12


@models
def test_masked_tokens_are_never_targets(kind: Callable[..., nn.Module]) -> None:
    net = build(kind).double()
    x, mask = random_tokens(), torch.rand(2, 15) > 0.4
    logits = net(x[:, :-1])
    n = logits.shape[1]
    each = F.cross_entropy(logits.flatten(0, 1), x[:, -n:].flatten(), reduction="none")
    counted = mask[:, -n:].flatten()
    assert error(AutoregressiveWrapper(net)(x, mask=mask), each[counted].mean()) <= 1e-12


def test_loss_takes_int32_and_leaves_its_input_alone() -> None:
    wrapper, x = AutoregressiveWrapper(build(PaLM)), random_tokens()
    before = x.clone()
    loss = wrapper(x, mask=torch.ones(2, 15, dtype=torch.bool))
    assert torch.equal(wrapper(x.int()), loss) and torch.equal(x, before)
    loss.backward()
    assert all(p.grad is not None for p in wrapper.parameters())


def test_loss_passes_inputs_on() -> None:
    net = build(PerceiverAR).double()
    x, mask = random_tokens(), torch.zeros(2, 6, dtype=torch.bool)
    wrapper = AutoregressiveWrapper(net)
    wanted = F.cross_entropy(net(x[:, :-1], prefix_mask=mask).flatten(0, 1), x[:, 7:].flatten())
    assert error(wrapper(x, prefix_mask=mask), wanted) <= 1e-12
    assert error(wrapper(x, ignore_index=3), wrapper(x, mask=x != 3)) <= 1e-12


# Generation


@models
@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 0.0}, {"filter_thres": 1.0}], ids=str
)
def test_greedy_is_the_loop_written_out(kind: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    net = build(kind).double().eval()
    start = random_tokens(9)
    tokens = start
    with torch.no_grad():
        for _ in range(8):
            tokens = torch.cat([tokens, net(tokens)[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    found = AutoregressiveWrapper(net).generate(start, 8, **options)
    assert found.dtype == torch.long and torch.equal(found, tokens[:, 9:])


@models
@pytest.mark.parametrize("max_seq_len", [7, 20])
def test_generation_goes_on_past_the_window(kind: Callable[..., nn.Module], max_seq_len: int) -> None:
    net = build(kind).double().eval()
    start = random_tokens(9)
    tokens = start
    with torch.no_grad():
        for _ in range(25):
            logits = net(tokens[:, -max_seq_len:])[:, -1]
            tokens = torch.cat([tokens, logits.argmax(dim=-1, keepdim=True)], dim=1)
    wrapper = AutoregressiveWrapper(net, max_seq_len=max_seq_len)
    assert torch.equal(wrapper.generate(start, 25, temperature=0), tokens[:, 9:])


def test_the_window_of_a_net_with_a_longest_sequence_is_never_longer_than_that() -> None:
    """Perceiver AR knows its own limit; older scripts wrap it without naming one."""
    net = build(PerceiverAR)
    assert AutoregressiveWrapper(net).generate(random_tokens(19), 10).shape == (2, 10)
    long = PerceiverAR(**{**SHAPE, "dim_head": 8, "dim": 8}, max_seq_len=2300, cross_attn_seq_len=2100)
    assert AutoregressiveWrapper(long).generate(random_tokens(2250), 1).shape == (2, 1)


def test_window_and_inputs_reach_the_net() -> None:
    net = Counting()
    AutoregressiveWrapper(net, max_seq_len=4).generate(prompt([1, 2, 3]), 4, temperature=0)
    assert [t.tolist() for t in net.shown] == [[[1, 2, 3]], [[1, 2, 3, 4]], [[2, 3, 4, 5]], [[3, 4, 5, 6]]]


def test_an_end_token_in_the_prompt_ends_nothing() -> None:
    found = AutoregressiveWrapper(Counting()).generate(prompt([EOS, 9, EOS, 10]), 4, eos_token=EOS)
    assert found.tolist() == [[11, 12, 13, 14]]


def test_rows_end_at_their_own_end_token_and_are_padded() -> None:
    wrapper = AutoregressiveWrapper(Counting(), pad_value=36)
    start = prompt([1, 3], [1, 1], [EOS, 20])
    found = wrapper.generate(start, 6, eos_token=EOS, temperature=0)
    # The row that never ends keeps the others going.
    assert found.tolist() == [[4, EOS, 36, 36, 36, 36], [2, 3, 4, EOS, 36, 36], [21, 22, 23, 24, 25, 26]]


def test_generation_stops_when_every_row_has_ended() -> None:
    net = Counting()
    found = AutoregressiveWrapper(net).generate(prompt([3], [1]), 100, eos_token=EOS, temperature=0)
    assert found.tolist() == [[4, EOS, 0, 0], [2, 3, 4, EOS]]
    assert len(net.shown) == 4


def test_without_an_end_token_nothing_ends() -> None:
    found = AutoregressiveWrapper(Counting()).generate(prompt([3]), 5, temperature=0)
    assert found.tolist() == [[4, EOS, 6, 7, 8]]


@pytest.mark.parametrize("pad_value", [0, EOS, V, -1, -100])
def test_any_pad_value_will_do(pad_value: int) -> None:
    """The end token itself, or a value that is no token and that the net must never see."""
    wrapper = AutoregressiveWrapper(Counting(), pad_value=pad_value)
    found = wrapper.generate(prompt([4], [1]), 10, eos_token=EOS, temperature=0)
    assert found.tolist() == [[EOS] + [pad_value] * 3, [2, 3, 4, EOS]]


def test_nothing_to_generate() -> None:
    net = Counting()
    found = AutoregressiveWrapper(net).generate(prompt([1, 2], [3, 4]), 0, eos_token=EOS)
    assert found.shape == (2, 0) and found.dtype == torch.long and not net.shown


@pytest.mark.parametrize("dtype", [torch.long, torch.int], ids=str)
def test_tokens_keep_their_dtype_and_the_prompt_is_left_alone(dtype: torch.dtype) -> None:
    start = random_tokens(9).to(dtype)
    before = start.clone()
    found = AutoregressiveWrapper(build(PaLM)).generate(start, 3)
    assert found.dtype == dtype and found.shape == (2, 3) and torch.equal(start, before)
    assert not found.requires_grad


@models
@pytest.mark.parametrize("filter_thres", [0.0, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1.0, 10.0])
def test_any_filter_and_temperature_gives_tokens(
    kind: Callable[..., nn.Module], filter_thres: float, temperature: float
) -> None:
    wrapper = AutoregressiveWrapper(build(kind))
    found = wrapper.generate(random_tokens(9), 3, temperature=temperature, filter_thres=filter_thres)
    assert found.shape == (2, 3) and ((found >= 0) & (found < V)).all()


def test_half_precision_net() -> None:
    wrapper = AutoregressiveWrapper(build(LaMDA).bfloat16())
    assert wrapper.generate(random_tokens(9), 5).shape == (2, 5)


def test_generation_follows_the_seed() -> None:
    wrapper, start = AutoregressiveWrapper(build(PaLM)), random_tokens(9)

    def tokens(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return wrapper.generate(start, 20, filter_thres=0.0)

    assert torch.equal(tokens(0), tokens(0)) and not torch.equal(tokens(0), tokens(1))


@pytest.mark.parametrize("stride", [1, 5])
def test_a_prefix_mask_moves_with_the_tokens(stride: int) -> None:
    """What was hidden stays hidden where it goes, and what comes after it is seen."""
    net, p, longest = build(PerceiverAR).double().eval(), 6, 20
    tokens, mask = random_tokens(17), torch.ones(2, 60, dtype=torch.bool)
    mask[:, :p] = torch.rand(2, p) > 0.5
    shown, start = 17, tokens
    with torch.no_grad():
        for _ in range(25):
            first = tokens.shape[1] - shown
            logits = net(tokens[:, first:], prefix_mask=mask[:, first : first + p])[:, -1]
            tokens = torch.cat([tokens, logits.argmax(dim=-1, keepdim=True)], dim=1)
            shown = shown + 1 if shown < longest else longest + 1 - stride
    wrapper = AutoregressiveWrapper(net)
    found = wrapper.generate(start, 25, temperature=0, stride=stride, prefix_mask=mask[:, :p])
    assert torch.equal(found, tokens[:, 17:])


def test_a_compiled_net_sees_the_masks_too() -> None:
    """Of a prefix that is masked, and of one that the prompt does not fill."""
    net = build(PerceiverAR).double().eval()
    compiled = torch.compile(net, backend="eager")
    mask = torch.tensor([[True, False, True, False, False, True]] * 2)
    for start, inputs in ((random_tokens(17), {"prefix_mask": mask}), (random_tokens(3), {})):
        found, wanted = (
            AutoregressiveWrapper(each, max_seq_len=20).generate(start, 5, temperature=0, **inputs)
            for each in (compiled, net)
        )
        assert torch.equal(found, wanted)
    torch.compiler.reset()


def test_a_prompt_shorter_than_the_prefix() -> None:
    net, start = build(PerceiverAR).double(), random_tokens(3)
    found = AutoregressiveWrapper(net).generate(start, 9, temperature=0)
    assert torch.equal(found, net.generate(start, 9, temperature=0))


@models
def test_tokens_are_read_once_while_they_fit_the_window(kind: Callable[..., nn.Module]) -> None:
    net = build(kind)
    lengths: list[int] = []
    net.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    AutoregressiveWrapper(net, max_seq_len=12).generate(random_tokens(9), 7)
    assert lengths == [9, 1, 1, 1, 12, 12, 12]


# Modes


@pytest.mark.parametrize("training", [True, False])
def test_the_net_is_evaluated_and_its_mode_restored(training: bool) -> None:
    net = Counting().train(training)
    wrapper = AutoregressiveWrapper(net).train(training)
    wrapper.generate(prompt([1]), 3)
    assert net.modes == [False] * 3
    assert net.training is net.dropout.training is wrapper.training is training


def test_the_mode_is_restored_after_an_error() -> None:
    net = build(PaLM)
    wrapper = AutoregressiveWrapper(net)
    with pytest.raises(ValueError):
        wrapper.generate(torch.full((1, 3), V), 5)
    with pytest.raises(ValueError):
        wrapper.generate(random_tokens(), 5, temperature=-1.0)
    assert all(module.training for module in net.modules())


def test_a_part_that_was_frozen_stays_frozen() -> None:
    net = Counting()
    net.dropout.eval()
    AutoregressiveWrapper(net).generate(prompt([1]), 1)
    assert net.training and not net.dropout.training


def test_gradients_are_on_again_afterwards() -> None:
    wrapper = AutoregressiveWrapper(build(PaLM))
    wrapper.generate(random_tokens(), 2)
    assert torch.is_grad_enabled() and wrapper(random_tokens()).requires_grad


# Bad input


@pytest.mark.parametrize("max_seq_len", [0, -1])
def test_a_window_of_nothing_is_refused(max_seq_len: int) -> None:
    with pytest.raises(ValueError, match=f"max_seq_len: .*{max_seq_len}"):
        AutoregressiveWrapper(Counting(), max_seq_len=max_seq_len)


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"x": torch.zeros(5, dtype=torch.long)}, ValueError, r"x: .*\(5,\)"),
        ({"x": torch.zeros(2, 1, dtype=torch.long)}, ValueError, r"x: .*\(2, 1\)"),
        ({"x": [[1, 2, 3]]}, TypeError, "x: .*list"),
        ({"x": torch.zeros(2, 15)}, TypeError, "float32"),
        ({"x": torch.full((2, 15), V)}, ValueError, "37"),
        ({"mask": torch.ones(2, 14, dtype=torch.bool)}, ValueError, r"mask: .*\(2, 14\)"),
        ({"mask": torch.ones(2, 15)}, (TypeError, ValueError), "mask: .*float32"),
        ({"mask": [[True] * 15] * 2}, TypeError, "mask: .*list"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_training_input_is_refused_by_name(
    changes: dict[str, Any], kind: type[Exception], said: str
) -> None:
    wrapper = AutoregressiveWrapper(build(PaLM))
    with pytest.raises(kind, match=said):
        wrapper(**{"x": random_tokens(), **changes})


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"start_tokens": torch.zeros(5, dtype=torch.long)}, ValueError, r"start_tokens: .*\(5,\)"),
        ({"start_tokens": torch.zeros(2, 0, dtype=torch.long)}, ValueError, r"start_tokens: .*\(2, 0\)"),
        ({"start_tokens": torch.zeros(0, 2, dtype=torch.long)}, ValueError, r"start_tokens: .*\(0, 2\)"),
        ({"start_tokens": [[1, 2]]}, TypeError, "start_tokens: .*list"),
        ({"start_tokens": torch.zeros(2, 3)}, TypeError, "float32"),
        ({"start_tokens": torch.full((2, 3), V)}, ValueError, "37"),
        ({"seq_len": -1}, ValueError, "seq_len: .*-1"),
        ({"seq_len": 2.5}, TypeError, r"seq_len: .*2\.5"),
        ({"temperature": -0.5}, ValueError, "temperature: .*-0.5"),
        ({"filter_thres": 2.0}, ValueError, "filter_thres: .*2.0"),
        ({"stride": 0}, ValueError, "stride: .*0"),
        ({"stride": 2049}, ValueError, "stride: .*2049"),
        ({"eos_token": V}, ValueError, "eos_token: .*37"),
        ({"eos_token": "x"}, TypeError, "eos_token: .*'x'"),
        ({"key_mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "key_mask: .*generate"),
        ({"surprise": 1}, TypeError, "surprise"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_generation_input_is_refused_by_name(
    changes: dict[str, Any], kind: type[Exception], said: str
) -> None:
    wrapper = AutoregressiveWrapper(build(PaLM))
    with pytest.raises(kind, match=said):
        wrapper.generate(**{"start_tokens": random_tokens(3), "seq_len": 2, **changes})


@pytest.mark.parametrize(
    ("start", "mask", "said"),
    [
        (9, torch.ones(2, 5, dtype=torch.bool), r"prefix_mask: .*\(2, 5\)"),
        (6, torch.ones(2, 6).bool(), "prefix_mask: .*6"),
    ],
)
def test_a_prefix_mask_that_does_not_fit_is_refused(start: int, mask: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AutoregressiveWrapper(build(PerceiverAR)).generate(random_tokens(start), 2, prefix_mask=mask)


def test_a_window_that_predicts_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_seq_len: .*6.*6"):
        AutoregressiveWrapper(build(PerceiverAR), max_seq_len=6).generate(random_tokens(9), 1)
