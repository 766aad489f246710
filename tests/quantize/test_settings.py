"""What a matrix is to become: methods, rules and groups."""

from __future__ import annotations

import pytest

from qwenkit.errors import UsageError
from qwenkit.quantize.settings import QuantizeSettings, Rule, Target, fitting_group

DOWN, GATE = "model.layers.3.mlp.down_proj", "model.layers.3.mlp.gate_proj"


def test_defaults_are_those_of_the_original_script() -> None:
    settings = QuantizeSettings()
    assert settings.to_json() == {
        "method": "gptq",
        "bits": 4,
        "group_size": 128,
        "damp": 0.01,
        "act_order": False,
        "symmetric": True,
        "rules": [],
    }
    assert settings.targets({GATE: 896, DOWN: 4864}) == dict.fromkeys((GATE, DOWN), Target(4, 128))


def test_the_last_rule_that_fits_counts() -> None:
    rules = tuple(Rule.parse(r) for r in (r"down_proj=8", r"layers\.[12]\.=keep", "layers.3.=3"))
    settings = QuantizeSettings(rules=rules)
    paths = DOWN, DOWN.replace("3", "7"), GATE.replace("3", "2")
    targets = settings.targets(dict.fromkeys(paths, 128))
    assert list(targets.values()) == [Target(3, 128), Target(8, 128), None]
    settings.check_rules([DOWN, GATE, "model.layers.1.mlp.up_proj"])


@pytest.mark.parametrize("text", ["down_proj", "=4", "down_proj=5", "down_proj=", "(=4"])
def test_a_rule_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="rule: "):
        Rule.parse(text)


def test_a_rule_that_names_nothing_is_refused() -> None:
    settings = QuantizeSettings(rules=(Rule("lm_head", 8),))
    with pytest.raises(UsageError, match=r"rule: 'lm_head' is in no path such as .*down_proj"):
        settings.check_rules([GATE, DOWN])
    with pytest.raises(UsageError, match="nothing to quantize"):
        QuantizeSettings(rules=(Rule("", None),)).check_rules([DOWN])


@pytest.mark.parametrize(
    ("width", "wanted", "group"),
    [(896, 128, 128), (576, 128, 64), (160, 128, 32), (576, 32, 32), (75, -1, -1)],
)
def test_the_largest_group_that_divides_is_taken(width: int, wanted: int, group: int) -> None:
    assert fitting_group({DOWN: width}, wanted) == group


def test_a_width_that_no_group_divides_is_refused() -> None:
    with pytest.raises(UsageError, match=r"rows of model\.layers\.3\.mlp\.down_proj have 75"):
        fitting_group({GATE: 128, DOWN: 75}, 128)


def test_awq_files_have_one_group_size_and_four_bits() -> None:
    settings = QuantizeSettings(method="awq")
    assert settings.is_awq_layout
    widths = {GATE: 576, DOWN: 1536}
    assert settings.targets(widths)[DOWN] == Target(4, 64)
    mixed = QuantizeSettings(method="awq", rules=(Rule("down", 8),))
    assert not mixed.is_awq_layout  # goes into GPTQ's layout
    assert mixed.targets(widths) == {GATE: Target(4, 64), DOWN: Target(8, 128)}
    assert not settings.is_symmetric


def test_what_is_kept_has_no_say_in_awqs_group_size() -> None:
    with pytest.raises(UsageError, match=r"rows of .*down_proj have 500 .*--rule 'down_proj=keep'"):
        QuantizeSettings(method="awq").targets({GATE: 256, DOWN: 500})
    kept = QuantizeSettings(method="awq", rules=(Rule.parse("down_proj=keep"),))
    assert kept.targets({GATE: 256, DOWN: 500}) == {GATE: Target(4, 128), DOWN: None}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "gtpq"}, "method: got 'gtpq'. Did you mean 'gptq'"),
        ({"bits": 5}, "bits: got 5; allowed: 2, 3, 4 and 8"),
        ({"method": "nf4", "bits": 8}, "bits: got 8; nf4 has 4"),
        ({"method": "int8", "group_size": 64}, "group_size: int8 has groups of its own"),
        ({"group_size": 100}, "group_size: got 100"),
        ({"damp": 0.0}, "damp: got 0.0"),
        ({"method": "rtn", "act_order": True}, "act_order: only gptq"),
        ({"method": "nf4", "symmetric": True}, "symmetric: nf4"),
        ({"method": "awq", "symmetric": True}, "symmetric: AWQ files"),
        ({"method": "nf4", "rules": (Rule("down", 8),)}, "rule: nf4 has 4 bits"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        QuantizeSettings(**given)  # type: ignore[arg-type]
