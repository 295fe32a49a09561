"""Growth of parameter tokens: exact function, unchanged old rows, trainable new rows."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from growing import grow_model
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokengrow.checkpoint.tensors import StateDict
from tokengrow.errors import UserError
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.engine import apply_growth
from tokengrow.growth.plan import plan_growth
from tokengrow.growth.tokens import grow_tokens, token_tensors
from tokengrow.growth.verify import DriftError, measure_drift
from tokengrow.model.config import ROLES, ModelConfig, ParameterTokens, Taus
from tokengrow.model.tokenformer import INIT_STD, TokenFormer

Sized = Callable[..., ModelConfig]
RandomModel = Callable[..., TokenFormer]
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}


@st.composite
def ladders(draw: st.DrawFn) -> list[ModelConfig]:
    """Draw a source and one to three targets, each at least as large as the one before."""
    heads = draw(st.integers(1, 3))
    head_dim = draw(st.integers(2, 8))
    tokens = [draw(st.integers(2, 12)) for _ in ROLES]
    sizes = []
    for _ in range(draw(st.integers(2, 4))):
        sizes.append(ParameterTokens(**dict(zip(ROLES, tokens, strict=True))))
        tokens = [n + draw(st.integers(0, 9)) for n in tokens]
    shape = {
        "vocab_size": draw(st.integers(5, 40)),
        "context_length": 10,
        "layers": draw(st.integers(1, 3)),
        "width": draw(st.sampled_from([heads * head_dim, 7, 16])),
        "heads": heads,
        "head_dim": head_dim,
        "activation": draw(st.sampled_from(["l2_norm_gelu", "gelu_l2_norm"])),
        "init": draw(st.sampled_from(["balanced", "published"])),
    }
    return [ModelConfig(tokens=size, **shape) for size in sizes]


@pytest.mark.parametrize("dtype", EXACT, ids=["float64", "float32"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(ladder=ladders(), seed=st.integers(0, 2**32), spread=st.floats(1.0, 4.0))
def test_every_rung_of_a_ladder_computes_the_same_logits(
    random_model: RandomModel,
    dtype: torch.dtype,
    ladder: list[ModelConfig],
    seed: int,
    spread: float,
) -> None:
    model = source = random_model(ladder[0], seed, dtype, spread)
    ids = torch.randint(source.config.vocab_size, (2, 10), generator=torch.manual_seed(seed))
    with torch.no_grad():
        logits = source(ids)
        largest = max(1.0, logits.abs().max().item())
        # A few shapes (width 2, a norm over two scores) amplify rounding. float32 is tested only on
        # models that it computes to within a tenth of the tolerance.
        wide = TokenFormer.from_weights(source.config, source.state_dict(), torch.float64)
        assume((wide(ids) - logits).abs().max().item() < 0.1 * EXACT[dtype] * largest)
        for target in ladder[1:]:
            model = grow_model(model, target)
            assert model.config.tokens == target.tokens
            assert next(model.parameters()).dtype == dtype
            assert (model(ids) - logits).abs().max().item() < EXACT[dtype] * largest


def appended(source: StateDict, grown: StateDict, name: str) -> Tensor:
    """Return the new rows of a grown tensor."""
    return grown[name][len(source[name]) :]


@pytest.fixture
def grown_pair(random_model: RandomModel, sized: Sized) -> tuple[TokenFormer, TokenFormer]:
    """Source with 6 tokens per role and grown model with 10."""
    model = random_model(sized(6))
    return model, grow_model(model, sized(10))


def test_old_rows_are_bitwise_unchanged(grown_pair: tuple[TokenFormer, TokenFormer]) -> None:
    source, grown = (model.state_dict() for model in grown_pair)
    assert source.keys() == grown.keys()
    for name, old in source.items():
        assert torch.equal(grown[name][: len(old)], old)
        if name not in token_tensors(grown_pair[0].config):
            assert torch.equal(grown[name], old)


def test_new_keys_are_zero_and_new_values_are_not(
    grown_pair: tuple[TokenFormer, TokenFormer],
) -> None:
    source, grown = (model.state_dict() for model in grown_pair)
    for name, role in token_tensors(grown_pair[0].config).items():
        new = appended(source, grown, name)
        assert len(new) == (8 if role == "ffn" else 4)
        assert bool((new == 0).all() if "key_param" in name else (new != 0).all())


def test_source_is_not_modified(random_model: RandomModel, sized: Sized) -> None:
    weights = random_model(sized(6)).state_dict()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    plan = plan_growth(sized(6), sized(10))
    apply_growth(plan, weights, {})
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_std_of_new_values_is_scaled_from_old_ones(
    random_model: RandomModel, sized: Sized, scale: float
) -> None:
    model = random_model(sized(6))  # its values have a standard deviation of 0.5
    grown = grow_model(model, sized(606), GrowthConfig(new_value_scale=scale))
    for name in token_tensors(model.config):
        if "value_param" in name:
            old = model.state_dict()[name]
            new = appended(model.state_dict(), grown.state_dict(), name)
            wanted = scale * old.square().mean().sqrt().item()
            assert new.std().item() == pytest.approx(wanted, rel=0.03)
            assert abs(new.mean().item()) < 0.03 * wanted


def test_new_values_next_to_zeros_have_the_initial_std(sized: Sized) -> None:
    model = TokenFormer(sized(6, init="balanced"))  # output and FFN values start at 0
    grown = grow_model(model, sized(606, init="balanced"))
    for name, role in token_tensors(model.config).items():
        if "value_param" in name and role in ("output", "ffn"):
            new = appended(model.state_dict(), grown.state_dict(), name)
            assert new.std().item() == pytest.approx(INIT_STD, rel=0.03)


def test_two_growths_in_a_row_draw_different_values(
    random_model: RandomModel, sized: Sized
) -> None:
    models = [random_model(sized(6))]
    for n in (10, 14, 18):  # always four new tokens (eight in the FFN)
        models.append(grow_model(models[-1], sized(n)))
    last = models[-1].state_dict()
    for name in token_tensors(models[0].config):
        if "value_param" in name:
            # Same draws would be parallel, not equal: their standard deviations differ a little.
            rows = F.normalize(last[name], dim=1)
            assert (rows @ rows.T).fill_diagonal_(0).max().item() < 0.999, name


def test_new_values_of_different_layers_and_roles_differ(
    grown_pair: tuple[TokenFormer, TokenFormer],
) -> None:
    source, grown = (model.state_dict() for model in grown_pair)
    names = [name for name in token_tensors(grown_pair[0].config) if "value_param" in name]
    rows = torch.cat([appended(source, grown, name) for name in names])
    assert len(rows.unique(dim=0)) == len(rows)


def assert_trainable(model: TokenFormer, grown: TokenFormer) -> None:
    """Assert that every new token moves within two updates, and that all of them differ."""
    grown.train()
    initial = {name: tensor.clone() for name, tensor in grown.state_dict().items()}
    # Without weight decay, an entry moves only if it has a gradient.
    optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-3, weight_decay=0.0)
    ids = torch.randint(40, (4, 13), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(grown(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    for name in token_tensors(model.config):
        new = appended(model.state_dict(), grown.state_dict(), name)
        moved = new - appended(model.state_dict(), initial, name)
        assert (moved.norm(dim=1) > 0).all(), name
        assert len(new.unique(dim=0)) == len(new), name


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
def test_new_tokens_move_within_two_updates(
    random_model: RandomModel, sized: Sized, activation: str
) -> None:
    model = random_model(sized(6, activation=activation))
    assert_trainable(model, grow_model(model, sized(10, activation=activation)))


def test_first_update_moves_keys_second_moves_values(
    grown_pair: tuple[TokenFormer, TokenFormer],
) -> None:
    source, grown = grown_pair
    ids = torch.randint(40, (4, 13), generator=torch.Generator().manual_seed(0))
    F.cross_entropy(grown(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in grown.named_parameters():
        if name in token_tensors(source.config):
            assert parameter.grad is not None
            new = parameter.grad[len(source.state_dict()[name]) :]
            assert bool((new != 0).any(dim=1).all()) == ("key_param" in name)
            assert bool((new == 0).all()) == ("value_param" in name)


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
def test_recomputed_tau_changes_the_function(
    random_model: RandomModel, sized: Sized, activation: str
) -> None:
    # tau is kept for this reason. Both published code bases use tau = sqrt(N') after a growth.
    source, target = sized(6, activation=activation), sized(12, activation=activation)
    assert target.tau != source.tau
    model = random_model(source)
    weights = grow_tokens(model.state_dict(), source, target, GrowthConfig(), seed=0)
    kept = TokenFormer.from_weights(plan_growth(source, target).target, weights)
    recomputed = TokenFormer.from_weights(target, weights)
    probe = torch.randint(40, (2, 13), generator=torch.Generator().manual_seed(0))
    assert measure_drift(model, kept, probe).relative < 1e-12
    assert measure_drift(model, recomputed, probe).max_logit > 0.1


def test_softmax_is_refused_because_of_its_drift(random_model: RandomModel, sized: Sized) -> None:
    # A zero key gets the weight exp(0), which the others lose.
    model = random_model(sized(6, activation="softmax"))
    with pytest.raises(DriftError, match="not the same function"):
        grow_model(model, sized(10, activation="softmax"))


def test_softmax_grows_with_a_larger_tolerance(random_model: RandomModel, sized: Sized) -> None:
    model = random_model(sized(6, activation="softmax"))
    grown = grow_model(model, sized(10, activation="softmax"), GrowthConfig(tolerance=100.0))
    assert grown.config.tokens.query == 10


class TestGram:
    """growth=gram: exact with tau = sqrt(N), so the published code can load the result."""

    CONFIG = GrowthConfig(init="gram", tau="recompute")

    @pytest.mark.parametrize("dtype", EXACT, ids=["float64", "float32"])
    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(
        tokens=st.lists(st.integers(2, 12), min_size=5, max_size=5),
        more=st.lists(st.integers(0, 9), min_size=5, max_size=5),
        width=st.integers(4, 9),
        seed=st.integers(0, 2**32),
    )
    def test_logits_are_the_same_with_the_published_tau(
        self,
        random_model: RandomModel,
        dtype: torch.dtype,
        tokens: list[int],
        more: list[int],
        width: int,
        seed: int,
    ) -> None:
        shape = {"vocab_size": 17, "context_length": 10, "layers": 2, "width": width, "heads": 2}
        source = ModelConfig(
            tokens=ParameterTokens(**dict(zip(ROLES, tokens, strict=True))), head_dim=3, **shape
        )
        ranks = {role: min(source.role_shape(role)[:2]) for role in ROLES}
        larger = {
            role: n + (extra and ranks[role] + extra)
            for (role, n), extra in zip(source.tokens.items(), more, strict=True)
        }
        model = random_model(source, seed, dtype)
        ids = torch.randint(17, (2, 10), generator=torch.manual_seed(seed))
        with torch.no_grad():
            logits = model(ids)
            largest = max(1.0, logits.abs().max().item())
            wide = TokenFormer.from_weights(source, model.state_dict(), torch.float64)
            assume((wide(ids) - logits).abs().max().item() < 0.1 * EXACT[dtype] * largest)
            grown = grow_model(
                model, replace(source, tokens=ParameterTokens(**larger)), self.CONFIG
            )
            assert grown.config.tau == Taus.default(grown.config.tokens)
            assert (grown(ids) - logits).abs().max().item() < 10 * EXACT[dtype] * largest

    def test_new_tokens_move_within_two_updates(
        self, random_model: RandomModel, sized: Sized
    ) -> None:
        model = random_model(sized(6))
        assert_trainable(model, grow_model(model, sized(22), self.CONFIG))

    def test_too_few_new_tokens_are_refused(self, sized: Sized) -> None:
        # The 12 keys of the FFN, with 16 channels, have rank 12.
        target = replace(sized(6), tokens=replace(sized(6).tokens, ffn=22))
        message = r"tokens\.ffn must be 12, or at least 24, .* got 22\..*at least 12 tokens"
        with pytest.raises(UserError, match=message):
            plan_growth(sized(6), target, config=self.CONFIG)

    def test_tau_above_the_target_is_refused(self, sized: Sized) -> None:
        source = replace(sized(6), tau=replace(sized(6).tau, query=5.0))
        message = r"query must be above 25 .*got 22, because tau\.query .* is 5, and sqrt.* 4\.69\."
        with pytest.raises(UserError, match=message):
            plan_growth(source, sized(22), config=self.CONFIG)

    def test_tau_of_a_role_without_growth_stays(
        self, random_model: RandomModel, sized: Sized
    ) -> None:
        # An earlier growth by zero keys kept the tau of the ffn.
        kept = grow_model(
            random_model(sized(6)), replace(sized(6), tokens=replace(sized(6).tokens, ffn=20))
        )
        wanted = replace(kept.config, tokens=replace(kept.config.tokens, query=22))
        grown = grow_model(kept, wanted, self.CONFIG)
        assert grown.config.tau.ffn == 12**0.5
        assert grown.config.tau.query == 22**0.5

    def test_inexact_combinations_are_refused(self, sized: Sized) -> None:
        gelu = [sized(n, activation="gelu_l2_norm") for n in (6, 22)]
        with pytest.raises(UserError, match=r"activation must be l2_norm_gelu .*gelu_l2_norm\."):
            plan_growth(*gelu, config=self.CONFIG)
        with pytest.raises(UserError, match=r"growth\.tau must be recompute .*got 'keep'"):
            GrowthConfig(init="gram")


def test_token_tensors_exclude_embedding_and_final_norm(sized: Sized) -> None:
    model = TokenFormer(sized(6))
    others = {"embedding.weight", "final_norm.weight", "final_norm.bias"}
    named = token_tensors(model.config)
    assert set(named) == set(model.state_dict()) - others
    for name, role in named.items():
        n, d_in, d_out = model.config.role_shape(role)
        assert model.state_dict()[name].shape == (n, d_in if "key_param" in name else d_out)


def test_parameters_increase_along_a_ladder(random_model: RandomModel, sized: Sized) -> None:
    counts = [random_model(sized(6)).config.num_parameters()]
    model = random_model(sized(6))
    for n in (7, 9):
        model = grow_model(model, sized(n))
        counts.append(sum(p.numel() for p in model.parameters()))
        assert counts[-1] == model.config.num_parameters()
    assert all(before < after for before, after in pairwise(counts))
