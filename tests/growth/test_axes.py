"""Growth along every axis: exact function, trainable new entries, continued optimizer state."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from growing import grow_model
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.depth import block_origins
from tokengrow.growth.engine import AppliedGrowth, apply_growth
from tokengrow.growth.plan import plan_growth
from tokengrow.growth.verify import DriftError
from tokengrow.model.config import ROLES, ModelConfig, ParameterTokens
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.optim.config import OptimConfig, build_optimizer
from tokengrow.optim.state import collect_optimizer_state, load_optimizer_state

Sized = Callable[..., ModelConfig]
RandomModel = Callable[..., TokenFormer]
EXACT = {torch.float64: 1e-11, torch.float32: 1e-5}
BATCH = torch.randint(40, (4, 13), generator=torch.Generator().manual_seed(5))


@st.composite
def ladders(draw: st.DrawFn) -> list[ModelConfig]:
    """Draw a source and one to three targets, each larger on some or all axes."""
    heads, head_dim, layers = (draw(st.integers(low, 4)) for low in (1, 2, 1))
    width = draw(st.integers(4, 20))
    tokens = [draw(st.integers(2, 10)) for _ in ROLES]
    activation = draw(st.sampled_from(["l2_norm_gelu", "gelu_l2_norm"]))
    sizes = []
    for _ in range(draw(st.integers(2, 4))):
        sizes.append(
            ModelConfig(
                vocab_size=17,
                context_length=10,
                layers=layers,
                width=width,
                heads=heads,
                head_dim=head_dim,
                tokens=ParameterTokens(**dict(zip(ROLES, tokens, strict=True))),
                activation=activation,
            )
        )
        tokens = [n + draw(st.integers(0, 6)) for n in tokens]
        width += draw(st.integers(0, 9))
        heads += draw(st.integers(0, 2))
        head_dim += draw(st.integers(0, 5))
        layers += draw(st.integers(0, 3))
    return sizes


@pytest.mark.parametrize("dtype", EXACT, ids=["float64", "float32"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(ladder=ladders(), seed=st.integers(0, 2**32), spread=st.floats(1.0, 4.0))
def test_every_rung_of_a_ladder_computes_the_same_logits(
    random_model: RandomModel,
    dtype: torch.dtype,
    ladder: list[ModelConfig],
    seed: int,
    spread: float,
) -> None:
    model = source = random_model(ladder[0], seed, dtype, spread)
    ids = torch.randint(17, (2, 10), generator=torch.manual_seed(seed))
    with torch.no_grad():
        logits = source(ids)
        largest = max(1.0, logits.abs().max().item())
        # A few shapes (width 4, a norm over two scores) amplify rounding. float32 is tested only on
        # models that it computes to within a tenth of the tolerance.
        wide = TokenFormer.from_weights(source.config, source.state_dict(), torch.float64)
        assume((wide(ids) - logits).abs().max().item() < 0.1 * EXACT[dtype] * largest)
        for target in ladder[1:]:
            model = grow_model(model, target, GrowthConfig(tolerance=EXACT[dtype]))
            assert model.config.num_parameters() == target.num_parameters()
            assert (model(ids) - logits).abs().max().item() < EXACT[dtype] * largest


AXES = {
    "width": {"width": 23},
    "heads": {"heads": 3},
    "longer heads": {"head_dim": 13},
    "heads of both kinds": {"heads": 4, "head_dim": 11},
    "depth": {"layers": 5},
    "all": {"width": 23, "heads": 3, "head_dim": 11, "layers": 5},
}


@pytest.fixture(params=AXES.values(), ids=list(AXES))
def grown_pair(
    request: pytest.FixtureRequest, random_model: RandomModel, sized: Sized
) -> tuple[TokenFormer, TokenFormer]:
    """Source and grown model, for each axis and for all of them."""
    model = random_model(sized(6))
    return model, grow_model(model, replace(model.config, **request.param))


def update(model: TokenFormer, optimizer: torch.optim.Optimizer) -> None:
    """Train the model for one update on the batch."""
    optimizer.zero_grad()
    F.cross_entropy(model(BATCH[:, :-1]).flatten(0, 1), BATCH[:, 1:].flatten()).backward()
    optimizer.step()


def test_every_new_entry_moves_within_two_updates(
    grown_pair: tuple[TokenFormer, TokenFormer],
) -> None:
    grown = grown_pair[1].train()
    initial = {name: tensor.clone() for name, tensor in grown.state_dict().items()}
    # Without weight decay, an entry moves only if it has a gradient.
    optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(2):
        update(grown, optimizer)
    for name, tensor in grown.state_dict().items():
        unchanged = tensor == initial[name]
        if name == "embedding.weight":  # a token outside the batch moves only through the head
            assert not unchanged.all(dim=0).any()
        else:
            assert not unchanged.any(), name


def test_new_channels_become_different(random_model: RandomModel, sized: Sized) -> None:
    source = random_model(sized(6))
    grown = grow_model(source, sized(6, width=23, head_dim=8)).train()
    new = grown.state_dict()["embedding.weight"][:, 16:]
    assert (new == new[:, :1]).all()  # initialised to the mean of the others
    optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(2):
        update(grown, optimizer)
    for name, tensor in grown.state_dict().items():
        columns = tensor.reshape(-1, tensor.shape[-1])[:, 16:]
        if tensor.shape[-1] == 23:
            assert len(columns.T.unique(dim=0)) == 7, name


def test_two_copies_of_one_block_become_different(random_model: RandomModel, sized: Sized) -> None:
    grown = grow_model(random_model(sized(6, layers=1)), sized(6, layers=3)).train()
    optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(2):
        update(grown, optimizer)
    first, second = (grown.blocks[layer].state_dict() for layer in (1, 2))
    for name, tensor in first.items():
        assert not torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(
    ("layers", "grown", "places"),
    [
        (2, 4, [0, 0, 1, 1]),
        (2, 5, [0, 0, 0, 1, 1]),
        (3, 4, [0, 0, 1, 2]),
        (1, 3, [0, 0, 0]),
    ],
)
def test_new_blocks_are_spread_evenly(
    sized: Sized, layers: int, grown: int, places: list[int]
) -> None:
    found = block_origins(sized(6, layers=layers), sized(6, layers=grown), "spread")
    assert [block for block, _ in found] == places
    assert sum(original for _, original in found) == layers
    assert all(original == (i == places.index(block)) for i, (block, original) in enumerate(found))


def test_new_block_is_bitwise_identity(random_model: RandomModel, sized: Sized) -> None:
    model = random_model(sized(6), dtype=torch.float32)
    grown = grow_model(model, sized(6, layers=7))
    ids = BATCH[:, :-1]
    with torch.no_grad():
        assert torch.equal(model(ids), grown(ids))


def test_new_blocks_are_placed_on_top_on_request(random_model: RandomModel, sized: Sized) -> None:
    model = random_model(sized(6), dtype=torch.float32)
    grown = grow_model(model, sized(6, layers=5), GrowthConfig(new_block_place="top"))
    for layer in (0, 1):
        for name, old in model.blocks[layer].state_dict().items():
            assert torch.equal(grown.blocks[layer].state_dict()[name], old)
    places = block_origins(sized(6), sized(6, layers=5), "top")
    assert places == [(0, True), (1, True), (0, False), (1, False), (0, False)]
    ids = BATCH[:, :-1]
    with torch.no_grad():
        assert torch.equal(model(ids), grown(ids))


class TestStack:
    """growth=stack: exact copies of blocks, which change the function."""

    CONFIG = GrowthConfig(new_blocks="stack", new_block_place="top", tolerance=float("inf"))

    def test_every_block_is_repeated_in_order(
        self, random_model: RandomModel, sized: Sized
    ) -> None:
        model = random_model(sized(6))
        grown = grow_model(model, sized(6, layers=4), self.CONFIG)
        for layer in range(4):
            for name, old in model.blocks[layer % 2].state_dict().items():
                assert torch.equal(grown.blocks[layer].state_dict()[name], old)

    def test_report_has_the_drift(self, random_model: RandomModel, sized: Sized) -> None:
        plan = plan_growth(sized(6), sized(6, layers=4), config=self.CONFIG)
        report = apply_growth(plan, random_model(sized(6)).to_weights(), {}).report
        assert report["new_blocks"] == "stack"
        assert report["drift"]["max_logit"] > 0.1

    def test_default_tolerance_refuses_it(self, random_model: RandomModel, sized: Sized) -> None:
        config = replace(self.CONFIG, tolerance=None)
        with pytest.raises(DriftError, match="not the same function"):
            grow_model(random_model(sized(6)), sized(6, layers=4), config)


def test_published_rotation_of_a_longer_head_changes_function(
    random_model: RandomModel, sized: Sized
) -> None:
    # rotary_channels is inherited for this reason: 25 % of 16 channels are 4, of 8 they are 2.
    model = random_model(sized(6))
    grown = grow_model(model, sized(6, head_dim=16))
    assert grown.config.rotary_channels == 2
    published = replace(grown.config, rotary_channels=4)
    moved = TokenFormer.from_weights(published, grown.state_dict())
    with torch.no_grad():
        assert (moved(BATCH) - model(BATCH)).abs().max().item() > 0.01


@pytest.mark.parametrize("changes", [{"width": 23}, {"heads": 3}], ids=str)
def test_half_precision_becomes_float32_if_rounded(
    random_model: RandomModel, sized: Sized, changes: dict[str, int]
) -> None:
    model = random_model(sized(6), dtype=torch.float16)
    grown = grow_model(model, replace(model.config, **changes))
    assert {parameter.dtype for parameter in grown.parameters()} == {torch.float32}
    deeper = grow_model(model, replace(model.config, layers=3))
    assert {parameter.dtype for parameter in deeper.parameters()} == {torch.float16}


class TestOptimizer:
    """Adam's moments after a growth, compared with the gradients directly after it."""

    @pytest.fixture(params=["l2_norm_gelu", "gelu_l2_norm"])
    def trained(
        self, request: pytest.FixtureRequest, random_model: RandomModel, sized: Sized
    ) -> tuple[TokenFormer, torch.optim.Optimizer]:
        """Model and optimizer after five updates."""
        model = random_model(sized(6, activation=request.param)).train()
        optimizer = build_optimizer(model, OptimConfig(lr=1e-3))
        for _ in range(5):
            update(model, optimizer)
        return model, optimizer

    def grown_from(
        self, model: TokenFormer, optimizer: torch.optim.Optimizer, **changes: int
    ) -> AppliedGrowth:
        """Grow the model and its optimizer state by changes of the config."""
        plan = plan_growth(model.config, replace(model.config, **changes))
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return apply_growth(plan, weights, collect_optimizer_state(model, optimizer))

    def gradients(self, model: TokenFormer) -> dict[str, Tensor]:
        """Return the gradient of the loss on the batch by parameter name."""
        model.zero_grad()
        F.cross_entropy(model(BATCH[:, :-1]).flatten(0, 1), BATCH[:, 1:].flatten()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def test_state_after_all_axes_is_complete_and_loads(
        self, trained: tuple[TokenFormer, torch.optim.Optimizer]
    ) -> None:
        grown = self.grown_from(*trained, **AXES["all"])
        model = TokenFormer.from_weights(grown.config, grown.weights)
        optimizer = build_optimizer(model, OptimConfig())
        load_optimizer_state(model, optimizer, grown.optimizer)
        assert grown.optimizer.keys() == collect_optimizer_state(model, optimizer).keys()

    def test_gradients_after_width_match(
        self, trained: tuple[TokenFormer, torch.optim.Optimizer]
    ) -> None:
        model, _ = trained
        grown = self.grown_from(*trained, width=23)
        wider = TokenFormer.from_weights(grown.config, grown.weights)
        before, after, rho = self.gradients(model), self.gradients(wider), (16 / 23) ** 0.5
        keys = 1.0 if model.config.activation == "l2_norm_gelu" else rho
        for name, gradient in before.items():
            new = after[name]
            if name.endswith("key_param_tokens") and "output" not in name:
                found = new[:, :16] * keys  # p' = c p has grad' = grad / c
            elif name == "final_norm.weight":
                found = new[:16] * rho
            elif name == "embedding.weight" or name.endswith(
                ("output.value_param_tokens", "ffn.value_param_tokens")
            ):
                found = new[:, :16] + new[:, 16:].sum(dim=1, keepdim=True) / 16  # folded
            else:
                found = new[:16] if new.dim() == 1 else new
            torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-9, msg=name)

    def test_moments_of_scaled_entries_are_divided_by_the_scale(
        self, trained: tuple[TokenFormer, torch.optim.Optimizer]
    ) -> None:
        state, rho = collect_optimizer_state(*trained), (16 / 23) ** 0.5
        grown = self.grown_from(*trained, width=23).optimizer
        for slot, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            old, new = state[f"{slot}.final_norm.weight"], grown[f"{slot}.final_norm.weight"]
            torch.testing.assert_close(new[:16], old / rho**power)
            assert bool((new[16:] == 0).all())
        assert grown["step.final_norm.weight"] == state["step.final_norm.weight"] == 5

    def test_gradients_and_moments_after_heads_match(
        self, trained: tuple[TokenFormer, torch.optim.Optimizer]
    ) -> None:
        model, optimizer = trained
        grown = self.grown_from(model, optimizer, heads=3, head_dim=11)
        longer = TokenFormer.from_weights(grown.config, grown.weights)
        before, after, scale = self.gradients(model), self.gradients(longer), (11 / 8) ** 0.5
        state = collect_optimizer_state(model, optimizer)
        for name, gradient in before.items():
            new, moment = after[name], grown.optimizer[f"exp_avg.{name}"]
            if new.shape != gradient.shape:  # old head h, channel j is at (h, j) of the new layout
                new, moment = (
                    tensor.view(-1, 3, 11)[:, :2, :8].reshape(-1, 16) for tensor in (new, moment)
                )
            by = scale if "query.value" in name else 1.0
            torch.testing.assert_close(new * by, gradient, rtol=1e-6, atol=1e-9, msg=name)
            torch.testing.assert_close(moment * by, state[f"exp_avg.{name}"])

    def test_gradients_and_moments_after_depth_match(
        self, trained: tuple[TokenFormer, torch.optim.Optimizer]
    ) -> None:
        model, optimizer = trained
        grown = self.grown_from(model, optimizer, layers=4)
        deeper = TokenFormer.from_weights(grown.config, grown.weights)
        before, after = self.gradients(model), self.gradients(deeper)
        state = collect_optimizer_state(model, optimizer)
        for name, gradient in before.items():
            at = name.replace("blocks.1.", "blocks.2.")
            torch.testing.assert_close(after[at], gradient, rtol=1e-6, atol=1e-9, msg=name)
            assert torch.equal(grown.optimizer[f"exp_avg.{at}"], state[f"exp_avg.{name}"])
            assert grown.optimizer[f"step.{at}"] == 5
        new = [name for name in grown.weights if name.startswith(("blocks.1.", "blocks.3."))]
        assert new
        for name in new:  # separate tensors, which start with their own bias correction
            assert grown.optimizer[f"step.{name}"] == 0
            assert not grown.optimizer[f"exp_avg.{name}"].any()
