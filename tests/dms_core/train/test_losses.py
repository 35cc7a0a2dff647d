import copy

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from companion.families import tiny_model as tiny_family
from dms_core.config import DMSConfig
from dms_core.model import attach
from dms_core.probe import decoder_of
from dms_core.train.heads import logits_of
from dms_core.train.losses import Distiller, chunked_loss, compression_loss, token_divergence
from dms_core.train.retrofit import pad_collate


def random_logits(seed: int):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(6, 11, generator=g) * 3, torch.randn(6, 11, generator=g) * 3


def test_forward_is_kl_teacher_student_and_reverse_kl_student_teacher():
    student, teacher = random_logits(0)
    s, t = Categorical(logits=student), Categorical(logits=teacher)
    torch.testing.assert_close(token_divergence(student, teacher, "forward"), kl_divergence(t, s))
    torch.testing.assert_close(token_divergence(student, teacher, "reverse"), kl_divergence(s, t))


def test_divergence_is_zero_for_equal_and_finite_for_extreme_logits():
    logits, _ = random_logits(1)
    for direction in ("forward", "reverse"):
        torch.testing.assert_close(token_divergence(logits, logits + 5, direction), torch.zeros(6), atol=1e-5, rtol=0)
        assert torch.isfinite(token_divergence(logits * 1e4, -logits * 1e4, direction)).all()


@pytest.mark.parametrize("direction", ["forward", "reverse", "lm"])
@pytest.mark.parametrize("chunk", [1, 4, 7, 9, 10])
def test_chunked_loss_and_gradients_equal_the_whole(direction, chunk):
    torch.manual_seed(0)
    head, teacher_head = torch.nn.Linear(5, 11), torch.nn.Linear(5, 11)
    hidden, teacher_hidden, targets = torch.randn(10, 5), torch.randn(10, 5), torch.randint(0, 11, (10,))
    results = []
    for size in (100, chunk):
        leaf = hidden.clone().requires_grad_()
        head.zero_grad()
        loss = chunked_loss(leaf, teacher_hidden, targets, (head, teacher_head), direction, size)
        loss.backward()
        results.append([loss.detach(), leaf.grad, head.weight.grad.clone()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert teacher_head.weight.grad is None
    logits = head(hidden)
    whole = {
        "forward": lambda: token_divergence(logits, teacher_head(teacher_hidden), "forward").mean(),
        "reverse": lambda: token_divergence(logits, teacher_head(teacher_hidden), "reverse").mean(),
        "lm": lambda: torch.nn.functional.cross_entropy(logits, targets),
    }[direction]()
    torch.testing.assert_close(results[0][0], whole.detach())


def test_no_labelled_token_gives_zero_loss():
    head = torch.nn.Linear(5, 11)
    nothing = torch.zeros(0, 5)
    assert chunked_loss(nothing, nothing, torch.zeros(0, dtype=torch.long), (head, head), "forward", 4) == 0


def decisions(fractions: list[float], tokens: int = 8):
    """Two layers of (B, 2, T) with these evicted fractions per row."""
    rows = torch.stack([(torch.arange(tokens) < f * tokens).float() for f in fractions])
    return [rows[:, None].expand(-1, 2, -1).clone().requires_grad_() for _ in range(2)]


def test_compression_loss_is_one_sided_and_per_row():
    valid = torch.ones(2, 8, dtype=torch.bool)
    loss, fraction = compression_loss(decisions([0.25, 1.0]), valid, 0.75)
    assert loss.item() == pytest.approx((0.5 + 0) / 2)  # a row above the target does not pay for one below
    assert fraction.item() == pytest.approx(0.625)
    evicted = decisions([1.0, 1.0])
    loss, _ = compression_loss(evicted, valid, 0.75)
    loss.backward()
    assert loss == 0 and all((e.grad == 0).all() for e in evicted)


def test_compression_loss_has_no_per_head_or_per_layer_target():
    valid = torch.ones(1, 4, dtype=torch.bool)
    ones, zeros = torch.ones(1, 1, 4), torch.zeros(1, 1, 4)
    assert compression_loss([torch.cat([ones, zeros], 1)] * 2, valid, 0.5)[0] == 0
    assert compression_loss([ones, zeros], valid, 0.5)[0] == 0


def test_compression_loss_ignores_padding():
    evicted = decisions([0.5])
    valid = torch.arange(8)[None] < 4  # all four valid tokens are evicted, padding is not
    loss, fraction = compression_loss(evicted, valid, 0.875)
    assert loss == 0 and fraction == 1
    loss, fraction = compression_loss(evicted, ~valid, 0.875)
    loss.backward()
    assert loss.item() == pytest.approx(0.875) and fraction == 0
    assert all((e.grad[:, :, :4] == 0).all() and (e.grad[:, :, 4:] < 0).all() for e in evicted)


def documents():
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 40, (n,), generator=g).tolist() for n in (9, 15)]
    return [{"input_ids": x, "labels": [-100] * 3 + x[3:]} for x in ids]


def evaluated(model, teacher, items, **options):
    """Losses with hard decisions: no noise, so that rows can be compared."""
    distiller = Distiller(model, teacher, **options)
    model.eval()
    with torch.no_grad():
        return distiller(**pad_collate(0)(items), alpha_target=0.9)


@pytest.mark.parametrize("direction", ["forward", "reverse", "lm"])
def test_padding_in_a_batch_changes_no_rows_loss(tiny_model, direction):
    model, teacher = tiny_model(), tiny_model(seed=1, gates=False)
    short, long = documents()
    alone, other, both = (evaluated(model, teacher, x, direction=direction) for x in ([short], [long], [short, long]))
    tokens = (6, 12)  # labelled
    mean = (alone["kd"] * tokens[0] + other["kd"] * tokens[1]) / sum(tokens)
    torch.testing.assert_close(both["kd"], mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(both["aux"], (alone["aux"] + other["aux"]) / 2)
    torch.testing.assert_close(both["loss"], both["kd"] + both["aux"])


def test_distiller_without_teacher_uses_student_with_gates_off(tiny_model):
    model, original = tiny_model(), tiny_model(gates=False)
    own = evaluated(model, None, documents())
    torch.testing.assert_close(own["kd"], evaluated(model, original, documents())["kd"], rtol=1e-4, atol=1e-6)
    assert own["kd"] > 1e-3
    with model.dms.disabled():
        hidden = model.get_decoder()(torch.tensor([documents()[0]["input_ids"]])).last_hidden_state
    expected = original.get_decoder()(torch.tensor([documents()[0]["input_ids"]])).last_hidden_state
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)


def test_untrained_gates_have_zero_distillation_loss(tiny_model):
    model = attach(tiny_model(gates=False), DMSConfig(window=2))
    assert evaluated(model, None, documents())["kd"] < 1e-6


def test_teacher_is_frozen_and_no_part_of_the_trained_module(tiny_model):
    model, teacher = tiny_model().train(), tiny_model(seed=1, gates=False).train()
    before = copy.deepcopy(teacher.state_dict())
    distiller = Distiller(model, teacher)
    out = distiller(**pad_collate(0)(documents()), alpha_target=0.9)
    out["loss"].backward()
    assert not teacher.training and all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(name.startswith("student.") for name in distiller.state_dict())
    assert all(torch.equal(x, teacher.state_dict()[name]) for name, x in before.items())
    assert all(p.grad is not None for p in model.parameters())


def test_unknown_direction_is_named(tiny_model):
    with pytest.raises(ValueError, match=r"direction 'backward': must be one of .*forward.*reverse"):
        Distiller(tiny_model(), None, "backward")


SCALED = {  # families whose logits are not those of the output layer alone, and others built in their own ways
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
    "gemma2": {"final_logit_softcapping": 5.0},
    "gemma3_text": {"final_logit_softcapping": 5.0},
    "falcon_h1": {"lm_head_multiplier": 0.1},
    "opt": {},
    "llama4_text": {},
    "gemma3": {},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("chunk", [4, 100])
def test_divergence_is_that_of_the_models_own_logits(kind, chunk):
    student, teacher = (tiny_family(kind, seed, **SCALED[kind]) for seed in (0, 1))
    items = documents()[:1]
    ids = torch.tensor([items[0]["input_ids"]])
    if kind == "opt":  # no gates go on it
        inputs = {"input_ids": ids, "use_cache": False}
        torch.testing.assert_close(
            logits_of(student, decoder_of(student)(**inputs).last_hidden_state[0]), student(**inputs).logits[0]
        )
        return
    attach(student, DMSConfig(window=2, scale=10.0, offset=0.0))
    facts = evaluated(student, teacher, items, chunk=chunk)
    with torch.no_grad():
        own = [model(ids, use_cache=False).logits[0, 2:-1] for model in (student, teacher)]
    expected = token_divergence(*own, "forward").mean()
    torch.testing.assert_close(facts["kd"], expected, rtol=1e-4, atol=1e-6)
    if SCALED[kind]:
        heads = (model.get_output_embeddings() for model in (student, teacher))
        hidden = [
            decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0, 2:-1] for model in (student, teacher)
        ]
        alone = token_divergence(*(head(h) for head, h in zip(heads, hidden, strict=True)), "forward").mean()
        assert abs(alone - expected) > 0.05 * expected  # the output layer by itself says something else


def test_models_are_whole_after_a_loss_and_after_an_error(tiny_model):
    model = tiny_model()
    before = dict(vars(model))
    logits_of(model, torch.zeros(3, 32))
    with pytest.raises(RuntimeError):
        logits_of(model, torch.zeros(3, 31))
    assert vars(model) == before and "model" not in vars(model)


def test_a_model_without_an_output_layer_is_refused(tiny_model):
    with pytest.raises(ValueError, match="LlamaModel: no decoder; DMS is for causal language models"):
        logits_of(tiny_model(gates=False).model, torch.zeros(3, 32))
