"""Rules over recorded values: what each finds, what it does not claim, and how it is shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from telemetry import catalogue
from telemetry.backends.memory import MemoryBackend
from telemetry.delivery.recorder import Recorder
from telemetry.health import HealthMonitor
from telemetry.health.__main__ import reference
from telemetry.health.rulebook import RULES
from telemetry.health.rules import Level
from telemetry.records import Alert, Record, Scalar, Sum, Table


def scalars(values: Mapping[str, float]) -> list[Record]:
    return [Scalar(tag, value) for tag, value in values.items()]


def levels(found: list[Record]) -> dict[str, float]:
    return {record.tag.split("/", 1)[1]: record.value for record in found if isinstance(record, Scalar)}


def alerts(found: list[Record]) -> list[Alert]:
    return [record for record in found if isinstance(record, Alert)]


def judged(*steps: Mapping[str, float]) -> dict[str, float]:
    """The levels after several due steps."""
    monitor = HealthMonitor()
    found: list[Record] = []
    for step, values in enumerate(steps):
        found += monitor.check(step, scalars(values), due=True)
    return levels(found)


GAIN = "zero_shot/conditioning/gain"
EVAL_GAIN = "zero_shot/conditioning/eval/gain"
LOSS = "outputs/loss/audio"
EOS = "zero_shot/eos_hit_rate"
HITS = "outputs/accuracy/audio"
ENDING = "outputs/eos/probability"
REFERENCE = "zero_shot/reference"
ASKED = "setup/asked/text"
HIDDEN = "inputs/tokens/hidden_fraction"
FIT = "inputs/length_correlation/target"
OPTIMIZER = "setup/optimizer"
OWN = "setup/references"
BAD_LOSSES, ZEROS = (f"steps/{kind}_losses" for kind in ("nonfinite", "zero"))
RATE, USUAL = "train/learning_rate", "steps/median_loss"
TIME, MEMORY = "throughput/seconds_per_step", "throughput/memory_bytes"
RATIO = "gradients/lora/update_ratio"

PLANTED = [
    ("nonfinite", [{"outputs/loss/text": 1.0}], [{"outputs/loss/text": math.nan}], Level.FAILING),
    ("nonfinite", [{"gradients/lora/nonfinite": 0.0}], [{"gradients/lora/nonfinite": 2.0}], Level.FAILING),
    ("loss_finite", [{BAD_LOSSES: 0.0}], [{BAD_LOSSES: 2.0}], Level.FAILING),
    ("learning_rate", [{RATE: 0.0}, {RATE: 1e-4}], [{RATE: 1e-4}, {RATE: 0.0}, {RATE: 0.0}], Level.FAILING),
    ("step_skipped", [{ZEROS: 1.0, USUAL: 0.0}], [{ZEROS: 1.0, USUAL: 2.0}], Level.FAILING),
    (
        "learning_rate",
        [{RATE: 0.0, RATIO: 0.1}, {RATE: 0.0, RATIO: 0.1}],
        [{RATE: 0.0, RATIO: 0.0}, {RATE: 0.0, RATIO: 0.0}],
        Level.FAILING,
    ),
    ("invalid_ids", [{"inputs/invalid_ids": 0.0}], [{"inputs/invalid_ids": 1.0}], Level.FAILING),
    (
        "labels",
        [{"inputs/supervised/samples_fraction": 1.0}],
        [{"inputs/supervised/samples_fraction": 0.0}],
        Level.FAILING,
    ),
    (
        "prompt_masked",
        [{"inputs/supervised/text_fraction": 0.3, "inputs/tokens/target_audio_fraction": 0.4}],
        [{"inputs/supervised/text_fraction": 1.0, "inputs/tokens/target_audio_fraction": 0.4}],
        Level.WARNING,
    ),
    ("eos_supervised", [{"outputs/eos/supervised": 1.0}], [{"outputs/eos/supervised": 0.0}], Level.FAILING),
    ("eos_supervised", [{"outputs/eos/supervised": 1.0}], [{"outputs/eos/supervised": 0.9}], Level.WARNING),
    (
        "reference_present",
        [{"zero_shot/reference/present_fraction": 1.0}],
        [{"zero_shot/reference/present_fraction": 0.25}],
        Level.FAILING,
    ),
    ("chatml", [{"zero_shot/chatml/compliance": 1.0}], [{"zero_shot/chatml/compliance": 0.75}], Level.WARNING),
    (
        "reference_attended",
        [{"attention/layer_0/target_to_reference": 0.0, "attention/layer_3/target_to_reference": 0.2}],
        [{"attention/layer_0/target_to_reference": 0.0, "attention/layer_3/target_to_reference": 1e-5}],
        Level.WARNING,
    ),
    (
        "reference_masked",
        [{"inputs/tokens/reference_audio_fraction": 0.2, "zero_shot/reference/seconds": 3.0}],
        [{"inputs/tokens/reference_audio_fraction": 0.0, "zero_shot/reference/seconds": 3.0}],
        Level.FAILING,
    ),
    ("reference_used", [{GAIN: 0.0}] * 5 + [{GAIN: 0.2}], [{GAIN: 0.001}] * 6, Level.WARNING),
    (
        "reference_used",  # the training samples are known by heart
        [{LOSS: 4.0, GAIN: 0.0, EVAL_GAIN: 0.0}, {LOSS: 2.0, GAIN: 0.0, EVAL_GAIN: 0.02}, {EVAL_GAIN: 0.03}],
        [{LOSS: 4.0, GAIN: 0.1, EVAL_GAIN: 0.0}, {LOSS: 2.0, GAIN: 0.1, EVAL_GAIN: 0.002}, {EVAL_GAIN: 0.001}],
        Level.WARNING,
    ),
    *[
        ("reference_sound", [{f"{REFERENCE}/{name}": well}], [{f"{REFERENCE}/{name}": bad}], Level.WARNING)
        for name, well, bad in [
            ("level_db", -23.0, -120.0),
            ("clipping_fraction", 0.0, 0.02),
            ("sampling_rate", 24000.0, 8000.0),
            ("silence_fraction", 0.3, 1.0),
        ]
    ],
    (
        "updates_arrive",
        [{RATIO: 0.0}, {RATIO: 0.001}],  # a warm-up begins with a learning rate of 0
        [{RATIO: 0.0}, {RATIO: 0.0}],
        Level.FAILING,
    ),
    (
        "padding",
        [{"inputs/tokens/padding_fraction": 0.4}],
        [{"inputs/tokens/padding_fraction": 0.95}],
        Level.WARNING,
    ),
    (
        "speech_worse",
        [{"zero_shot/wer": 0.3}, {"zero_shot/wer": 0.95}, {"zero_shot/wer": 0.4}],  # one bad evaluation is none
        [{"zero_shot/wer": 0.3}, {"zero_shot/wer": 0.95}, {"zero_shot/wer": 0.9}],
        Level.WARNING,
    ),
    (
        "speech_worse",
        [{"zero_shot/speaker_similarity": 0.5}, *[{"zero_shot/speaker_similarity": 0.8}] * 2],
        [{"zero_shot/speaker_similarity": 0.8}, *[{"zero_shot/speaker_similarity": 0.5}] * 2],
        Level.WARNING,
    ),
    (
        "overfitting",
        [{"eval/loss": loss, "zero_shot/wer": wer} for loss, wer in [(3.0, 0.9), (2.0, 0.5), (2.5, 0.4), (2.6, 0.3)]],
        [{"eval/loss": loss, "zero_shot/wer": wer} for loss, wer in [(3.0, 0.9), (2.0, 0.5), (2.5, 0.6), (2.6, 0.8)]],
        Level.WARNING,
    ),
    (
        "overfitting",
        [{"eval/loss": loss} for loss in (3.0, 2.0, 2.1)],
        [{"eval/loss": loss} for loss in (3.0, 2.0, 2.5, 2.6)],
        Level.WARNING,
    ),
    (
        "gradients_arrive",
        [{"gradients/lora/norm": 0.1, "gradients/norms/norm": 1e-9}],
        [{"gradients/lora/norm": 0.1, "gradients/norms/norm": 0.0}],
        Level.FAILING,
    ),
    (
        "gradients_arrive",
        [{"gradients/lora/norm": 0.1}] * 2,
        [{"gradients/lora/norm": 0.1, "gradients/norms/norm": 1.0}, {"gradients/lora/norm": 0.1}],
        Level.WARNING,
    ),
    (
        "update_size",
        [{"gradients/lora/update_ratio": 0.001}],
        [{"gradients/lora/update_ratio": 0.5}],
        Level.WARNING,
    ),
    ("loss_steady", [{"train/loss": 2.0}] * 12, [{"train/loss": 2.0}] * 12 + [{"train/loss": 9.0}], Level.WARNING),
    (
        "loss_steady",  # of few values, a larger jump
        [{"train/loss": 2.0}] * 3 + [{"train/loss": 9.0}],
        [{"train/loss": 2.0}] * 3 + [{"train/loss": 13.0}],
        Level.WARNING,
    ),
    ("generation_ends", [{HITS: 0.9}, {EOS: 0.0}, {EOS: 0.5}], [{HITS: 0.9}, {EOS: 0.0}, {EOS: 0.0}], Level.WARNING),
    (
        "generation_ends",  # where it should end it would: the bound on the length came first
        [{HITS: 0.9, ENDING: 0.8}, {EOS: 0.0}, {EOS: 0.0}],
        [{HITS: 0.9, ENDING: 0.001}, {EOS: 0.0}, {EOS: 0.0}],
        Level.WARNING,
    ),
    (
        "asked_labels",
        [{f"{ASKED}/next": 1.0, f"{ASKED}/offset": 1.0, f"{ASKED}/at_offset": 1.0}],
        [{f"{ASKED}/next": 0.1, f"{ASKED}/offset": 2.0, f"{ASKED}/at_offset": 1.0}],
        Level.FAILING,
    ),
    ("loss_weight", [{"setup/loss_weight/text": 0.94}], [{"setup/loss_weight/text": 0.0}], Level.FAILING),
    ("loss_weight", [{"setup/loss_weight/text": 1.0}], [{"setup/loss_weight/text": 4.0}], Level.FAILING),
    ("supervised", [{f"{ASKED}/padding": 0.0}], [{f"{ASKED}/padding": 0.3}], Level.FAILING),
    (
        "recombined",
        [{}, {"train/loss": 4.0, "outputs/loss/total": 4.0}],
        [{}, {"train/loss": 2.0, "outputs/loss/total": 4.0}],
        Level.WARNING,
    ),
    ("chance", [{"setup/chance/text": 0.9}], [{"setup/chance/text": 1.3}], Level.WARNING),
    ("optimizer", [{f"{OPTIMIZER}/held_fraction": 1.0}], [{f"{OPTIMIZER}/held_fraction": 0.4}], Level.FAILING),
    (
        "optimizer",  # a warm-up begins with a learning rate of 0
        [{f"{OPTIMIZER}/held_fraction": 1.0, f"{OPTIMIZER}/moved_fraction": 0.0, f"{OPTIMIZER}/learning_rate": 0.0}],
        [{f"{OPTIMIZER}/held_fraction": 1.0, f"{OPTIMIZER}/moved_fraction": 0.03, f"{OPTIMIZER}/learning_rate": 1e-5}],
        Level.FAILING,
    ),
    (
        "frozen",  # that of the language model is meant
        [{"outputs/loss/audio": 1.0, "setup/trained/audio_ffn": 1.0, "setup/trained/text_ffn": 0.0}],
        [{"outputs/loss/audio": 1.0, "setup/trained/audio_ffn": 0.0, "setup/trained/text_ffn": 1.0}],
        Level.WARNING,
    ),
    ("adapters", [{"setup/adapters/active_fraction": 1.0}], [{"setup/adapters/active_fraction": 0.0}], Level.FAILING),
    ("modes", [{"setup/modes/training_fraction": 0.5}], [{"setup/modes/training_fraction": 0.0}], Level.FAILING),
    ("modes", [{"setup/modes/evaluation_fraction": 0.0}], [{"setup/modes/evaluation_fraction": 1.0}], Level.FAILING),
    *[
        (
            "references",
            [{f"{OWN}/samples": 4.0, f"{OWN}/different": 4.0, "setup/targets/different": 4.0}],
            [{f"{OWN}/samples": 4.0, f"{OWN}/different": 4.0, "setup/targets/different": 4.0, **bad}],
            Level.FAILING,
        )
        for bad in ({f"{OWN}/different": 1.0}, {f"{OWN}/equal_fraction": 0.5}, {f"{OWN}/constant_fraction": 1.0})
    ],
    *[
        (f"data_{name}", [{f"setup/data/{of}": well}], [{f"setup/data/{of}": ill}], level)
        for name, of, well, ill, level in (
            ("pairs", "equal_fraction", 0.0, 0.5, Level.FAILING),
            ("pairs", "commonest_reference_fraction", 0.1, 0.9, Level.FAILING),
            ("voices", "other_voices_nearer", 0.1, 0.5, Level.FAILING),
            ("words", "target/other_texts_nearer", 0.1, 0.5, Level.WARNING),
            ("rate", "rate_ratio", 1.1, 0.6, Level.WARNING),
            ("sound", "target/noisy_fraction", 0.0, 0.5, Level.WARNING),
        )
    ],
    *[
        (name, [{f"setup/{name}/{of}": 0.0}], [{f"setup/{name}/{of}": 0.4}], Level.FAILING)
        for name, of in (("alone", "changes"), ("ranks", "weights_apart"))
    ],
    (
        "causality",
        [{"setup/causality/earlier_changes": 0.0}],
        [{"setup/causality/earlier_changes": 0.4}],
        Level.FAILING,
    ),
    (
        "targets",
        [{"setup/targets/samples": 4.0, "setup/targets/commonest_fraction": 0.5}],
        [{"setup/targets/samples": 4.0, "setup/targets/commonest_fraction": 0.75}],
        Level.WARNING,
    ),
    ("mask_holes", [{HIDDEN: 0.0}], [{HIDDEN: 0.1}], Level.FAILING),
    ("transcripts", [{FIT: 0.9}], [{FIT: 0.0}], Level.WARNING),
    ("step_skipped", [{"train/loss": 2.0}] * 6, [{"train/loss": 2.0}] * 5 + [{"train/loss": 0.0}], Level.FAILING),
    ("clipping", [{"gradients/clip_coefficient": 0.02}], [{"gradients/clip_coefficient": 1e-7}], Level.FAILING),
    (
        "step_time",  # one slow measurement is none, nor is a short step that takes a little longer
        [*[{TIME: 1.0}] * 6, {TIME: 4.0}, {TIME: 1.1}],
        [*[{TIME: 1.0}] * 6, {TIME: 4.0}, {TIME: 3.9}],
        Level.WARNING,
    ),
    ("step_time", [*[{TIME: 0.01}] * 6, *[{TIME: 0.1}] * 2], [*[{TIME: 0.4}] * 6, *[{TIME: 1.0}] * 2], Level.WARNING),
    (
        "memory_grows",  # what has its longest batch grows now and then
        [{MEMORY: 1e9 * (1 + n // 3)} for n in range(12)],
        [{MEMORY: 1e9 * (1 + 0.05 * n)} for n in range(12)],
        Level.WARNING,
    ),
    ("records_lost", [{"telemetry/dropped_records": 0.0}], [{"telemetry/dropped_records": 3.0}], Level.WARNING),
]


@pytest.mark.parametrize(("rule", "well", "planted", "level"), PLANTED)
def test_a_planted_fault_is_found_and_a_healthy_run_is_not_blamed(
    rule: str, well: list[dict[str, float]], planted: list[dict[str, float]], level: Level
) -> None:
    assert judged(*well)[rule] == Level.OK
    assert judged(*planted)[rule] == level


def test_every_rule_is_tried() -> None:
    assert {rule.name for rule in RULES} == {name for name, *_ in PLANTED}


def test_a_rule_without_values_says_nothing() -> None:
    assert set(judged({"train/learning_rate": 1e-3})) == {"nonfinite"}
    assert HealthMonitor().check(1, [], due=True) == []
    assert HealthMonitor().check(1, scalars({"telemetry/step_seconds": 0.1}), due=True) == []  # nothing of the training


@pytest.mark.parametrize("steps", [[{GAIN: 0.0}] * 4, [{"train/loss": 1.0}] * 2 + [{"train/loss": 99.0}], [{EOS: 0.0}]])
def test_too_few_values_are_not_judged(steps: list[dict[str, float]]) -> None:
    assert set(judged(*steps)) == {"nonfinite"}


def test_the_table_puts_the_worst_first_with_its_evidence_and_what_to_do() -> None:
    values = {"inputs/invalid_ids": 7.0, "zero_shot/chatml/compliance": 0.75, "outputs/eos/supervised": 1.0}
    table = next(r for r in HealthMonitor().check(3, scalars(values), due=True) if isinstance(r, Table))
    assert [row[1] for row in table.rows] == ["failing", "warning", "ok", "ok"]
    finding, _, evidence, advice, otherwise = table.rows[0]
    assert (finding, evidence) == ("ids lie outside their vocabulary", "inputs/invalid_ids = 7")
    assert advice
    assert otherwise
    assert all(not row[3] for row in table.rows if row[1] == "ok")


def test_an_alert_comes_when_a_verdict_worsens_and_not_again_until_it_was_well() -> None:
    monitor = HealthMonitor()

    def alerted(step: int, value: float, due: bool = True) -> int:
        return len(alerts(monitor.check(step, scalars({"outputs/eos/supervised": value}), due)))

    assert [alerted(1, 1.0), alerted(2, 0.9), alerted(3, 0.8), alerted(4, 0.0), alerted(5, 0.0)] == [0, 1, 0, 1, 0]
    assert alerted(6, 1.0, due=False) == 0  # too little to call it mended
    assert alerted(7, 0.0) == 0
    assert [alerted(8, 1.0), alerted(9, 0.0)] == [0, 1]


def test_between_due_steps_what_has_become_worse_is_shown_and_nothing_else() -> None:
    monitor = HealthMonitor()
    assert monitor.check(6, scalars({"train/loss": 1.0}), due=False) == []
    found = monitor.check(7, scalars({"train/loss": math.inf}), due=False)
    assert [type(record) for record in found] == [Alert, Scalar, Table]
    assert alerts(found)[0].level == "error"
    assert "train/loss = inf" in alerts(found)[0].text
    assert monitor.check(8, scalars({"train/loss": math.inf}), due=False) == []


def test_a_verdict_of_the_last_evaluation_has_its_value_and_its_row_once_a_step() -> None:
    monitor = HealthMonitor()
    monitor.check(10, scalars({EOS: 0.0, HITS: 0.9}), due=True)
    assert levels(monitor.check(20, scalars({HITS: 0.9}), due=True))
    found = monitor.check(20, scalars({EOS: 0.0}), due=False)
    assert levels(found) == {"generation_ends": Level.WARNING}  # the others have their value at this step
    (table,) = [record for record in found if isinstance(record, Table)]
    assert table.rows[0][:2] == ("free-running speech does not end by itself", "warning")
    better = monitor.check(30, scalars({EOS: 1.0}), due=False)
    assert levels(better)["generation_ends"] == Level.OK


def test_the_root_of_several_faults_is_the_one_that_is_alerted_and_the_others_name_it() -> None:
    values = {
        "inputs/tokens/reference_audio_fraction": 0.0,
        "zero_shot/reference/seconds": 3.0,
        "zero_shot/reference/present_fraction": 0.0,
        "zero_shot/chatml/compliance": 0.0,
        "attention/layer_0/target_to_reference": 0.0,
    }
    found = HealthMonitor().check(1, scalars(values), due=True)
    assert [alert.title for alert in alerts(found)] == ["reference audio is trained on"]
    (table,) = [record for record in found if isinstance(record, Table)]
    bad = [row[0] for row in table.rows if row[1] != "ok"]
    assert bad[0] == "reference audio is trained on"
    assert len(bad) == 4
    assert all("which follows from: reference audio is trained on" in str(finding) for finding in bad[1:])


def test_every_rule_says_what_people_ask() -> None:
    names = [rule.name for rule in RULES]
    for rule in RULES:
        assert {*rule.follows} <= {*names}
        assert rule.advice, rule.name
        assert rule.absent, rule.name
        assert rule.proof, rule.name
        assert rule.otherwise or rule.name in ("records_lost", "adapters")


def test_what_rules_record_is_in_the_catalogue() -> None:
    for rule in RULES:
        assert catalogue.find(rule.tag) is not None
    assert catalogue.find("health/alerts").kind == "alert"  # type: ignore[union-attr]
    assert catalogue.find("health/checks").kind == "table"  # type: ignore[union-attr]


def test_the_recorder_writes_verdicts_beside_the_step() -> None:
    memory = MemoryBackend()
    recorder = Recorder([memory], judge=HealthMonitor())
    recorder.metric("inputs/invalid_ids", Sum(2.0))
    recorder.flush(5)
    recorder.close()
    assert memory.scalars("health/invalid_ids") == {5: 2.0}
    assert memory.last("health/alerts", Alert).text.startswith("Step 5: inputs/invalid_ids = 2.")


def test_a_judge_that_fails_costs_its_verdicts_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        calls = 0

        def check(self, step: int, records: object, due: bool) -> list[Record]:
            self.calls += 1
            raise RuntimeError("planted")

    memory, broken = MemoryBackend(), Broken()
    recorder = Recorder([memory], judge=broken)
    for step in (1, 2):
        recorder.metric("inputs/invalid_ids", Sum(0.0))
        recorder.flush(step)
    recorder.close()
    assert memory.scalars("inputs/invalid_ids") == {1: 0.0, 2: 0.0}
    assert broken.calls == 1
    assert "no more verdicts" in caplog.text


def test_the_document_is_that_of_the_rules() -> None:
    written = (Path(__file__).parents[3] / "docs" / "health.md").read_text(encoding="utf-8")
    assert written == reference(), "python -m telemetry.health > docs/health.md"
